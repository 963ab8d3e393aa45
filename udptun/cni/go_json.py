"""JSON as Go writes and reads it, so that flannel's plugin and ours make the same files of the same input.  Pure."""

from __future__ import annotations

import json

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
"""What Go escapes in strings and Python does not; outside strings none of these can stand."""


def dumps(value: object) -> str:
    """Keys sorted and nothing between the tokens, as json.Marshal of a map."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    if not is_text(text):
        # Half a surrogate pair, which JSON can say: Go makes the same of it when it reads it.
        text = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    return text.translate(_ESCAPES)


def loads(text: str | bytes) -> object:
    """The value.  A float without a fraction becomes an int: Go writes 1.0 as 1.  Raises ValueError."""
    try:
        return json.loads(text, parse_float=_number, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too many arrays and objects within one another") from None


def _number(text: str) -> int | float:
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return int(value) if value.is_integer() and abs(value) < 1e21 else value


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(text: str) -> bool:
    """Whether the system would take it in a path, or in a variable."""
    return "\0" not in text and is_text(text)


def member(values: dict[str, object], key: str) -> object:
    """The member `key`, in whatever letter case it is written; None when there is none."""
    if key in values:
        return values[key]
    wanted = key.casefold()
    return next((value for name, value in values.items() if name.casefold() == wanted), None)

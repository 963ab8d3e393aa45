r"""Regular expressions in the syntax of Go's regexp package (RE2), made into Python's.  Pure.

What the two write alike is left alone.  What differs:

    \z               \Z, the end of the text
    \Q...\E          the characters between, each as itself
    (?i)             from there to the end of the group, whatever `|` comes between; Python takes it at the start only
    (?U)             says which match is found, not whether there is one, so it is left out
    (?<name>         (?P<name>
    [[:alpha:]]      POSIX classes, and [[:^alpha:]], which Python would misread without an error
    \d \s \w         ASCII, as the POSIX classes; \s without \v
    \x{10FFFF} \17   a code point in hexadecimal or in octal
    {,3}             itself

What only RE2 refuses, as a look-ahead, is accepted.  What only RE2 knows, as \pL, is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

_LAST = 0x10FFFF

_CLASSES: dict[str, str] = {
    "alnum": "09AZaz",
    "alpha": "AZaz",
    "ascii": "\0\x7f",
    "blank": "\t\t  ",
    "cntrl": "\0\x1f\x7f\x7f",
    "digit": "09",
    "graph": "!~",
    "lower": "az",
    "print": " ~",
    "punct": "!/:@[`{~",
    "space": "\t\r  ",
    "upper": "AZ",
    "word": "09AZ__az",
    "xdigit": "09AFaf",
}
"""First and last character of each range, ascending."""

_PERL_CLASSES = {"d": "09", "s": "\t\n\f\r  ", "w": _CLASSES["word"]}

_FLAGS = re.compile(r"\(\?([A-Za-z]*)(?:-([A-Za-z]*))?([:)])")
_REPEAT = re.compile(r"\{\d+(,\d*)?\}")
_POSIX = re.compile(r"\[:(\^?)(\w+):\]")
_CODE_POINT = re.compile(r"\\(?:x\{([0-9A-Fa-f]{1,6})\}|(0[0-7]{0,2}|[1-7][0-7]{1,2}))")


def compile_go(text: str) -> re.Pattern[str]:
    """Raises ValueError with the reason when `text` is no regular expression."""
    try:
        with warnings.catch_warnings():
            # Python warns of [[ and [--, which mean the same in both.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile("".join(_translate(text)), re.ASCII)
    except (re.error, OverflowError, RecursionError) as exc:
        raise ValueError(str(exc)) from exc


def _translate(text: str) -> Iterator[str]:
    """Python's form of `text`, in pieces."""
    # For each group that is open, the flags set in it so far: each has made a group of its own, to its end.
    opened: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        char = text[at]
        if text.startswith(r"\Q", at):
            end = text.find(r"\E", at)
            yield re.escape(text[at + 2 : end if end >= 0 else len(text)])
            at = end + 2 if end >= 0 else len(text)
        elif char == "\\":
            piece, at = _escape(text, at, is_in_class=False)
            yield piece
        elif char == "[":
            piece, at = _bracket(text, at)
            yield piece
        elif (match := _FLAGS.match(text, at)) is not None:
            flags = _flags(match[1], match[2])
            at = match.end()
            yield flags
            if match[3] == ")":
                opened[-1].append(flags)
            else:
                opened.append([])
        elif char == "(":
            opened.append([])
            is_named = text.startswith("(?<", at) and text[at + 3 : at + 4] not in ("=", "!")
            yield "(?P" if is_named else "("
            at += 2 if is_named else 1
        elif char == ")":
            # One too many is Python's to refuse.
            yield ")" * len(opened.pop() if len(opened) > 1 else opened[0]) + ")"
            at += 1
        elif char == "|":
            yield ")" * len(opened[-1]) + "|" + "".join(opened[-1])
            at += 1
        elif char == "{" and not _REPEAT.match(text, at):
            yield r"\{"
            at += 1
        else:
            yield char
            at += 1
    yield ")" * len(opened[-1])


def _flags(on: str, off: str | None) -> str:
    """The beginning of a group in which these flags are set."""
    if unknown := set(on + (off or "")) - set("imsU"):
        raise ValueError(f"unknown flag {min(unknown)} in (?{on}{'' if off is None else f'-{off}'}")
    on, off = on.replace("U", ""), (off or "").replace("U", "")
    return f"(?{on}{f'-{off}' if off else ''}:"


def _escape(text: str, at: int, *, is_in_class: bool) -> tuple[str, int]:
    """The escape at `at`, and where it ends."""
    if (match := _CODE_POINT.match(text, at)) is not None:
        code_point = int(match[1], 16) if match[1] else int(match[2], 8)
        if code_point > _LAST:
            raise ValueError(f"{match[0]} is no character")
        return _literal(code_point), match.end()
    letter = text[at + 1 : at + 2]
    if letter == "z" and not is_in_class:
        return r"\Z", at + 2
    if letter.lower() in _PERL_CLASSES:
        members = _ranges(_PERL_CLASSES[letter.lower()], is_negated=letter.isupper())
        return (members if is_in_class else f"[{members}]"), at + 2
    return text[at : at + 2], at + 2


def _bracket(text: str, at: int) -> tuple[str, int]:
    """The bracket expression that begins at `at`, and where it ends."""
    match = re.compile(r"\[\^?\]?").match(text, at)
    assert match is not None
    pieces = [match[0]]
    at = match.end()
    while at < len(text) and text[at] != "]":
        posix = _POSIX.match(text, at)
        if posix is not None:
            if posix[2] not in _CLASSES:
                raise ValueError(f"no character class {posix[0]}")
            pieces.append(_ranges(_CLASSES[posix[2]], is_negated=bool(posix[1])))
            at = posix.end()
        elif text[at] == "\\":
            piece, at = _escape(text, at, is_in_class=True)
            pieces.append(piece)
        else:
            pieces.append(text[at])
            at += 1
    return "".join(pieces) + text[at : at + 1], at + 1


def _ranges(ends: str, *, is_negated: bool) -> str:
    """The members of a class as they stand between brackets."""
    points = [ord(char) for char in ends]
    if is_negated:
        # From behind the end of each range to before the beginning of the next.
        points = [0, *(point + (1 if i % 2 else -1) for i, point in enumerate(points)), _LAST]
    pairs = zip(points[::2], points[1::2], strict=True)
    return "".join(f"{_literal(first)}-{_literal(last)}" for first, last in pairs if first <= last)


def _literal(code_point: int) -> str:
    return f"\\U{code_point:08x}"

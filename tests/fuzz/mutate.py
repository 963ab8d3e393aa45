"""Mutations that keep an input's form: JSON stays JSON, and lines stay lines.  Random bytes alone would test parsers of
JSON, which are not ours.

A target gives the words of its field, and gets a function that makes a new input of another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]
"""Makes another input.  The same bytes and the same state of the Random give the same one."""

MANY_DIGITS = "9" * 4400
"""A number that int() refuses (sys.int_info.default_max_str_digits)."""


class Raw(str):
    """JSON text that stands as it is: what `json.dumps` would not write."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs: a dict would hide a key that is there twice."""


NASTY: Sequence[Any] = (
    None, True, False, 0, 1, -1, 24, 30, 65535, 65536, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**400, -0.5, 1.0,
    Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw(MANY_DIGITS), Raw("1E400"), Raw("[" * 1200 + "]" * 1200),
    "", " ", "\n", "\0", "a\nb", "\x1b[31m", "\ud800", "\u2028", "\u202e", "\u0661", "x" * 300, "x" * 5000, "é" * 40,
    MANY_DIGITS, "true", "null", "10.244.0.0/16", "10.244.1.0/24", "10.244.1.7", "0.0.0.0", "255.255.255.255",
    "127.0.0.1", "224.0.0.1", "192.0.2.1", "fd00:1::/48", "fd00:1::1", "fe80::1%a\nb", "::ffff:192.0.2.1",
    "10.244.1.0-24", [], {},
)  # fmt: skip


def json_mutator(keys: Sequence[str], values: Sequence[Any] = ()) -> Mutate:
    """For inputs that are one JSON value with these keys; `values` are tried beside NASTY."""
    pool = [*values, *values, *NASTY]

    def mutate(data: bytes, random: Random) -> bytes:
        try:
            value = json.loads(data, object_pairs_hook=Pairs, parse_int=_kept_int, parse_constant=Raw)
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                value = _changed(value, random, keys, pool)
            return _dumped(value).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            return bytes_mutator(data, random)

    return mutate


def lines_mutator(of_line: Mutate, first: Mutate | None = None, end: bytes = b"\n") -> Mutate:
    """For inputs of several lines; `first` is for the first of them."""

    def mutate(data: bytes, random: Random) -> bytes:
        lines = data.split(end)
        at = random.randrange(len(lines))
        what = random.random()
        if what < 0.1:
            lines.insert(at, random.choice(lines))
        elif what < 0.2 and len(lines) > 1:
            del lines[at]
        elif what < 0.25:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines[at] = (first if first is not None and at == 0 else of_line)(lines[at], random)
        return end.join(lines)

    return mutate


def words_mutator(words: Sequence[bytes]) -> Mutate:
    """For text in which `words` mean something."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.4:
            return bytes_mutator(data, random)
        at = random.randint(0, len(data))
        return data[:at] + random.choice(words) + data[at + random.choice((0, 0, 1, 4, 16)) :]

    return mutate


def either(*mutators: Mutate) -> Mutate:
    """One of them, by chance."""
    return lambda data, random: random.choice(mutators)(data, random)


def bytes_mutator(data: bytes, random: Random) -> bytes:
    """Some bytes changed, left out, repeated or added."""
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randint(0, len(data))
        end = at + random.choice((1, 1, 2, 4, 8, 64))
        what = random.randrange(5)
        if what == 0:
            data = data[:at] + data[end:]
        elif what == 1:
            data = data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
        elif what == 2:
            data = data[:at] + random.randbytes(random.choice((1, 1, 2, 4))) + data[at:]
        elif what == 3 and at < len(data):
            data = data[:at] + bytes((data[at] ^ 1 << random.randrange(8),)) + data[at + 1 :]
        else:
            data = data[:at] + random.choice((b"\0", b"\n", b"\xff", b'"', b"[", b"{", b"9", b"\\ud800")) + data[at:]
    return data


def _kept_int(text: str) -> int | Raw:
    return int(text) if len(text) < 400 else Raw(text)


def _changed(value: Any, random: Random, keys: Sequence[str], pool: Sequence[Any]) -> Any:
    """The value with one change somewhere in it."""
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        what = random.random()
        changed = type(value)(value)
        if what < 0.12:
            del changed[at]
        elif what < 0.24:
            changed.insert(at, random.choice(value))
        elif isinstance(value, Pairs):
            name, item = value[at]
            if what < 0.36:
                changed[at] = (_other_key(name, random, keys), item)
            elif what < 0.5:
                changed.insert(at, (_other_key(name, random, keys), random.choice(pool)))
            else:
                changed[at] = (name, _changed(item, random, keys, pool))
        else:
            changed[at] = _changed(value[at], random, keys, pool)
        return changed
    what = random.random()
    if isinstance(value, str) and not isinstance(value, Raw) and what < 0.35:
        return bytes_mutator(value.encode("utf-8", "surrogatepass"), random).decode("utf-8", "replace")
    if type(value) is int and what < 0.4:
        return value + random.choice((-1, 1, 8, -8, 256, 2**32))
    if what > 0.95:
        return Pairs([(random.choice(keys), value)]) if keys and random.random() < 0.5 else [value]
    return random.choice(pool)


def _other_key(name: str, random: Random, keys: Sequence[str]) -> str:
    return random.choice((*keys, *keys, name, name.lower(), name.upper(), f"{name}x", "a\nb", "\ud800", "", name[:-1]))


def _dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_dumped(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumped, value)) + "]"
    return json.dumps(value) if not isinstance(value, int) or abs(value) < 10**4000 else MANY_DIGITS

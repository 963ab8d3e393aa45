"""JSON objects read into dataclasses by the rules of Go's encoding/json.  Pure.

Key names match in any letter case, null is "not given", unknown keys are ignored, an integer has neither fraction nor
exponent.  In one point we are stricter: a key that is given twice is a problem, and Go takes the last.
All problems of a text are gathered in a Report, so that a person can mend them at once.

A dataclass says with `key` which of its fields are keys, as a Go struct does with its tags; `read_keys` fills it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar

from udptun.core.errors import ConfigError, did_you_mean, one_line

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

Reader = Callable[[object], T | None]
"""Makes a field's value of a JSON value that is not null; None means "as if it were not given".

Raises ValueError when the JSON value is of the wrong kind.  The text says what it must be: "must be true or false".
"""


_MANY = 50
"""So many lines of a kind a text gets; a hint for each of a million wrong keys would take minutes."""


class Report:
    """What is wrong with one text, and what is merely odd.  `source` names the text in each line."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, key: str, reason: str) -> None:
        self._add(self._problems, f"{key}: {reason}")

    def note(self, text: str) -> None:
        self._add(self.notes, text)

    def _add(self, lines: list[str], text: str) -> None:
        if len(lines) < _MANY:
            lines.append(one_line(f"{self._source}: {text}"))
        elif len(lines) == _MANY:
            lines.append(f"{self._source}: and more of the kind")

    def raise_problems(self) -> None:
        """Raise ConfigError with a line for each problem, if there is one."""
        if self._problems:
            raise ConfigError(*self._problems, notes=self.notes)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A JSON object as it was written: in order, with its duplicates."""

    pairs: Sequence[tuple[str, object]]


class JsonFields:
    """The values of one JSON object, under the names in `known` where Go would match them.

    `path` stands before each key in messages, as "Backend." does.
    """

    def __init__(self, json_object: JsonObject, known: Sequence[str], path: str, report: Report) -> None:
        self._path = path
        self._report = report
        self._values: dict[str, object] = {}
        by_fold = {name.casefold(): name for name in known}
        written: dict[str, str] = {}
        for key, value in json_object.pairs:
            name = by_fold.get(key.casefold(), key)
            if name in written:
                other = "" if written[name] == key else f" (as {written[name]} and {key})"
                report.problem(path + name, f"given twice{other}; keep one")
                continue
            written[name] = key
            self._values[name] = value

    @classmethod
    def of_text(cls, text: str, known: Sequence[str], report: Report) -> JsonFields:
        """The top level of a file.  Raises ConfigError at once when it is not a JSON object."""
        try:
            value = json.loads(text, object_pairs_hook=JsonObject, parse_constant=_refuse_constant)
        except json.JSONDecodeError as exc:
            report.problem("not JSON", f"line {exc.lineno} column {exc.colno}: {exc.msg}")
        except (ValueError, RecursionError) as exc:
            report.problem("not JSON", str(exc))
        else:
            if isinstance(value, JsonObject):
                return cls(value, known, "", report)
            report.problem("not a configuration", f"a JSON object is needed, not {shown(value)}")
        report.raise_problems()
        raise AssertionError("unreachable: a problem was reported")

    def note_unknown(self, known: Sequence[str]) -> None:
        """Leave a note for each key that is none of `known`."""
        for name in [name for name in self._values if name not in known][: _MANY + 1]:
            hint = did_you_mean(name, known, self._path)
            self._report.note(f"{self._path}{name}: unknown key, ignored{hint}")

    def has(self, key: str) -> bool:
        """Whether the key is there at all, null included."""
        return key in self._values

    def raw(self, key: str) -> object:
        """The value; None when it is absent or null."""
        return self._values.get(key)

    def get(self, key: str, read: Reader[T], default: T) -> T:
        """The value that `read` makes; `default` when the key is absent, null or wrong.  What is wrong is reported."""
        value = self.raw(key)
        if value is None:
            return default
        try:
            found = read(value)
        except ValueError as exc:
            self.wrong(key, str(exc))
            return default
        return default if found is None else found

    def wrong(self, key: str, what_it_must_be: str) -> None:
        """Report a value; the text is as that of a Reader's ValueError."""
        self._report.problem(self._path + key, f"{what_it_must_be}, not {shown(self.raw(key))}")

    def names(self) -> list[str]:
        """The keys in the order of the text."""
        return list(self._values)


def _refuse_constant(name: str) -> object:
    """Python's json takes NaN and Infinity; JSON has neither."""
    raise ValueError(f"{name} is not a JSON value")


def shown(value: object) -> str:
    """A value as the file's author would recognise it, on one short line."""
    if isinstance(value, JsonObject):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------------------ readers


def boolean(value: object) -> bool:
    """true or false; see `Reader` for this and the following."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def integer(allowed: range | None = None, *, zero_is_unset: bool = False) -> Reader[int]:
    """A number of `allowed`, or any from 0 up; with `zero_is_unset` 0 is the same as absent."""

    def read(value: object) -> int | None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("must be a JSON integer")
        if value == 0 and zero_is_unset:
            return None
        if allowed is not None and value not in allowed:
            raise ValueError(f"must be {allowed.start}..{allowed.stop - 1}")
        if value < 0:
            raise ValueError("must not be negative")
        return value

    return read


def choice(choices: Mapping[str, E]) -> Reader[E]:
    """One of `choices`, whose names are in lower case; matched in any case."""
    *others, last = (f'"{name}"' for name in choices)

    def read(value: object) -> E:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"must be {', '.join(others)} or {last}")
        return choices[value.lower()]

    return read


# ------------------------------------------------------------------------------------------ dataclasses made of keys


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a JSON object, kept with the field of the dataclass that holds its value."""

    name: str
    read: Reader[Any]  # of the field's own type: `key` sees to it
    is_live: bool


class KeyedDataclass(Protocol):
    """A dataclass with fields made by `key`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


D = TypeVar("D", bound=KeyedDataclass)


def key(name: str, read: Reader[T], default: T, *, is_live: bool = False) -> T:
    """A field that the JSON object gives under `name`.  `is_live`: it can change while packets flow."""
    return field(default=default, metadata={"key": Key(name, read, is_live)})


def keys_of(kind: KeyedDataclass | type[KeyedDataclass]) -> dict[str, Key]:
    """The keys by the names of their fields."""
    return {it.name: it.metadata["key"] for it in fields(kind) if "key" in it.metadata}


def read_keys(kind: type[D], values: JsonFields) -> D:
    """A `kind` with those of its keys that are given.  What is wrong is reported in the order of the text."""
    by_name = {it.name: (field_name, it.read) for field_name, it in keys_of(kind).items()}
    given = {}
    for name in values.names():
        if name in by_name:
            field_name, read = by_name[name]
            if (value := values.get(name, read, None)) is not None:
                given[field_name] = value
    return kind(**given)

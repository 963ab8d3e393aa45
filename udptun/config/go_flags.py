"""Flags by the rules of Go's flag package, and the environment variables that stand in for them.  Pure.

`-x` and `--x` mean the same, and so do `--x=v` and `--x v`: the next word is the value whatever it looks like.  A
boolean takes its value only after `=`.  The last of several wins unless the flag is a list.  A flag that the command
line lacks is read from the variable <PREFIX><NAME> by flannel's rules: an empty variable counts as unset, a bad one
costs a warning and leaves the default, and a list gets one element.

A dataclass says with `flag` and its siblings which of its fields are flags; each then has its flag's name, with `_`
for `-`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from udptun.core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


def boolean(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return text in _TRUE


def integer(text: str) -> int:
    """Go's strconv.ParseInt with base 0: decimal, 0x, 0o, 0b, and a leading 0 for octal."""
    try:
        return int(text, 8) if re.fullmatch(r"[+-]?0[0-9_]+", text) else int(text, 0)
    except ValueError:
        raise ValueError("must be an integer") from None


def integer_in(allowed: range) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = integer(text)
        if value not in allowed:
            raise ValueError(f"must be {allowed.start}..{allowed.stop - 1}")
        return value

    return parse


def nonempty_path(text: str) -> Path:
    if not text:
        raise ValueError("must be a path")
    return Path(text)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.  `parse` turns its text into the value or raises ValueError with the reason."""

    name: str
    topic: str
    """The heading of the help under which it stands."""
    parse: Callable[[str], object]
    default: Any  # of the type that `parse` returns
    value_name: str
    help: str
    is_list: bool = False
    is_secret: bool = False

    @property
    def is_boolean(self) -> bool:
        return self.parse is boolean

    def variable(self, prefix: str) -> str:
        """The environment variable that stands in for the flag."""
        return prefix + self.name.upper().replace("-", "_")


def flag(
    topic: str,
    parse: Callable[[str], T],
    default: T,
    value_name: str,
    help: str,
    *,
    is_secret: bool = False,
) -> T:
    """A field of a dataclass that holds what a flag says."""
    metadata = {"flag": Flag("", topic, parse, default, value_name, help, is_secret=is_secret)}
    return field(default=default, repr=not is_secret, metadata=metadata)


def list_flag(topic: str, parse: Callable[[str], T], value_name: str, help: str) -> tuple[T, ...]:
    """The same for a flag that may be given several times, an element each."""
    return field(default=(), metadata={"flag": Flag("", topic, parse, (), value_name, help, is_list=True)})


def flag_without_effect(
    topic: str, parse: Callable[[str], T], default: T, value_name: str, help: str, name: str = ""
) -> T:
    """The same for a flag that is only accepted.  `name` is for one that has `_` in it."""
    metadata = {"flag": Flag(name, topic, parse, default, value_name, help)}
    return field(default=default, compare=False, metadata=metadata)


def settled_flag(topic: str, parse: Callable[[str], object], default: object, value_name: str, help: str) -> Any:
    """The same for a field whose value depends on other flags: whoever makes the dataclass must give it."""
    return field(metadata={"flag": Flag("", topic, parse, default, value_name, help)})


def flags_of(kind: type[DataclassInstance], prefix: str = "") -> dict[str, Flag]:
    """The flags by the names of their fields; `prefix` stands before each flag's name."""
    declared = {it.name: it.metadata["flag"] for it in fields(kind) if "flag" in it.metadata}
    return {name: replace(it, name=it.name or prefix + name.replace("_", "-")) for name, it in declared.items()}


class Given:
    """What argv gives, and then the environment: a value for each flag, and where it was said."""

    def __init__(
        self, flags: Mapping[str, Flag], argv: Sequence[str], n_words: int = 0, *, ends_at_word: bool = False
    ) -> None:
        """`flags` by their names.  Raises UsageError.

        Of arguments that are no flags `n_words` are taken, and one more is an error.  With `ends_at_word` the first of
        them ends the flags, as in Go.
        """
        self._flags = flags
        self._n_words = n_words
        self._ends_at_word = ends_at_word
        self.words: list[str] = []
        """Arguments that are no flags."""
        self.rest: list[str] = []
        """With `ends_at_word`: the argument that ended the flags, and all behind it."""
        self.n_flag_words = len(argv)
        """So many arguments are before that one."""
        self.values: dict[str, Any] = {name: flag.default for name, flag in flags.items()}  # each flag's own type
        self.said: dict[str, str] = {}
        """Each flag that was given, as `--name` or as its variable."""
        self.warnings: list[str] = []
        self.is_help = False
        for flag, text in self._scan(argv):
            try:
                self._take(flag, text, f"--{flag.name}")
            except ValueError as exc:
                raise UsageError(f"--{flag.name}={text}: {exc}") from None

    def read_environment(self, environ: Mapping[str, str], prefix: str) -> None:
        """Take from variables what the command line lacks.  What is wrong with one is left in `warnings`."""
        for name, flag in self._flags.items():
            variable = flag.variable(prefix)
            text = environ.get(variable, "")
            if text and name not in self.said:
                try:
                    self._take(flag, text, variable)
                except ValueError as exc:
                    self.warnings.append(f"{variable}={text}: {exc}; ignored, as flannel does")

    def fields_of(self, flags: Mapping[str, Flag]) -> dict[str, Any]:
        """The values by the names of the fields, as `flags_of` has them."""
        return {name: self.values[flag.name] for name, flag in flags.items()}

    def _take(self, flag: Flag, text: str, said: str) -> None:
        value = flag.parse(text)
        if flag.is_list:
            value = self.values[flag.name] + ((value,) if text else ())
        self.values[flag.name] = value
        self.said[flag.name] = said

    def _scan(self, argv: Sequence[str]) -> Iterator[tuple[Flag, str]]:
        """Flags with their texts, in order, by the rules of Go's flag.Parse."""
        words = iter(argv)
        for word in words:
            is_end = word == "--"
            if self._ends_at_word and (is_end or not word.startswith("-") or word == "-"):
                self.rest = [*words] if is_end else [word, *words]
                self.n_flag_words = len(argv) - len(self.rest) - is_end
                return
            if is_end:
                for rest in words:
                    raise UsageError(_unexpected(rest))
                return
            match = re.fullmatch(r"--?([^-=][^=]*)(=.*)?", word, re.DOTALL)
            if match is None and not word.startswith("-") and len(self.words) < self._n_words:
                self.words.append(word)
                continue
            if match is None:
                raise UsageError(_unexpected(word))
            name, text = match.groups()
            if name in ("h", "help"):
                self.is_help = True
                return
            flag = self._flags.get(name)
            if flag is None:
                raise UsageError(f"unknown flag --{name}{did_you_mean(name, self._flags, '--')}")
            if text is not None:
                yield flag, text[1:]
            elif flag.is_boolean:
                yield flag, "true"
            else:
                value = next(words, None)
                if value is None:
                    raise UsageError(f"--{name} needs a value: {flag.value_name}")
                yield flag, value


def _unexpected(word: str) -> str:
    if word.startswith("-") and word.strip("-"):
        return f"bad flag syntax: {word}"
    if word in _TRUE + _FALSE:
        return f"unexpected argument {word!r}; a boolean takes its value after =, as in --ip-masq={word}"
    return f"unexpected argument {word!r}; the daemon takes flags only"


def help_text(topics: Mapping[str, Sequence[Flag]], prefix: str) -> str:
    """What `--help` says about flags under their headings; `prefix` is that of the variables."""
    lines = []
    for topic, flags in topics.items():
        lines += ["", f"{topic}:"] if topic else []
        for flag in flags:
            lines.append(f"  --{flag.name}{' ' if flag.value_name else ''}{flag.value_name}")
            default = str(flag.default or "").lower() if flag.is_boolean else str(flag.default or "")
            remarks = [
                flag.help,
                "may be repeated" if flag.is_list else "",
                f"default {default}" if default not in ("", "false") else "",
            ]
            lines.append(f"        {'; '.join(remark for remark in remarks if remark)}")
    return "\n".join(
        [
            *lines,
            "",
            "Flags are written -x or --x, with =VALUE or VALUE as the next word; booleans as --x or --x=false.",
            f"Each can be given as {prefix}<NAME> instead, as in {prefix}SUBNET_FILE.",
        ]
    )

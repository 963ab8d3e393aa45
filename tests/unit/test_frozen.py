"""Our quick dataclass against the standard one: the same classes, made by both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field, fields, replace
from typing import Any

import pytest

from udptun.core import frozen


def _classes(dataclass: Callable[..., Any]) -> dict[str, Any]:
    @dataclass(frozen=True, slots=True)
    class Plain:
        """Two without a default, one with."""

        a: int
        b: str
        c: tuple[int, ...] = (1,)

    @dataclass(frozen=True, slots=True)
    class Empty:
        """No field."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Keywords:
        """Keywords only; a field without a default after one with."""

        a: int = 1
        b: int

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Child(Keywords):
        """Adds a field to another's."""

        c: int = 3

    @dataclass(frozen=True, slots=True)
    class Derived:
        """A field that it sets itself, one that is made anew each time, one that is not shown."""

        a: int
        items: list[int] = field(default_factory=list)
        secret: str = field(default="s", repr=False)
        double: int = field(init=False, compare=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "double", 2 * self.a)

    @dataclass(frozen=True, slots=True)
    class Shown:
        """Says itself how it is shown."""

        a: int

        def __repr__(self) -> str:
            return f"<{self.a}>"

    return {kind.__name__: kind for kind in (Plain, Empty, Keywords, Child, Derived, Shown)}


KINDS = {"ours": _classes(frozen.dataclass), "standard": _classes(dataclasses.dataclass)}

CALLS: list[tuple[str, tuple[object, ...], dict[str, object]]] = [
    ("Plain", (1, "x"), {}),
    ("Plain", (1,), {"b": "x", "c": ()}),
    ("Plain", (1,), {}),
    ("Plain", (1, "x", (), 4), {}),
    ("Plain", (1, "x"), {"d": 4}),
    ("Plain", ([], "x"), {}),
    ("Empty", (), {}),
    ("Keywords", (), {"b": 2}),
    ("Keywords", (2,), {}),
    ("Keywords", (), {}),
    ("Child", (), {"b": 2, "c": 5}),
    ("Derived", (4,), {}),
    ("Derived", (4, [1], "x"), {}),
    ("Derived", (4,), {"double": 1}),
    ("Shown", (7,), {}),
]


def _answer(do: Callable[[], object]) -> object:
    try:
        return do()
    except (TypeError, AttributeError, ValueError) as exc:
        return type(exc), str(exc)


def _behaviour(whose: str, kind: str, args: tuple[object, ...], keywords: dict[str, object]) -> list[object]:
    """What can be seen of an instance, or of the attempt to make one."""
    cls = KINDS[whose][kind]
    made = _answer(lambda: cls(*args, **keywords))
    if not isinstance(made, cls):
        return [made]
    twin, other = cls(*args, **keywords), _answer(lambda: replace(made, a=-1))
    return [
        repr(made),
        [getattr(made, it.name) for it in fields(made)],
        cls.__match_args__,
        cls.__slots__,
        (made == twin, made != twin, made == other, made == args),
        _answer(lambda: hash(made)),
        repr(other),
        _answer(lambda: replace(made, double=1)),
        hasattr(made, "__dict__"),
    ]


@pytest.mark.parametrize(("kind", "args", "keywords"), CALLS)
def test_quick_dataclass_behaves_as_the_standard_one(
    kind: str, args: tuple[object, ...], keywords: dict[str, object]
) -> None:
    # Twice: the first call of a method compiles it.
    for _ in range(2):
        assert _behaviour("ours", kind, args, keywords) == _behaviour("standard", kind, args, keywords)


@pytest.mark.parametrize("whose", KINDS)
def test_instance_of_either_cannot_be_changed(whose: str) -> None:
    made = KINDS[whose]["Plain"](1, "x")
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'a'"):
        made.a = 2
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'a'"):
        del made.a


def test_methods_are_compiled_when_they_are_called_first() -> None:
    cls = _classes(frozen.dataclass)["Plain"]
    before = cls.__init__, cls.__eq__, cls.__hash__
    made = cls(1, "x")
    assert cls.__init__ is not before[0]
    assert (cls.__eq__, cls.__hash__) == before[1:]
    assert made == cls(1, "x")
    assert cls.__eq__ is not before[1]

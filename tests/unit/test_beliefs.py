"""How long packets may be by the kernel's beliefs, the routes and what was measured."""

from __future__ import annotations

import pytest

from udptun.probing.beliefs import Beliefs

FULL = 1472


@pytest.mark.parametrize(
    ("believed", "route", "measured", "path_mtu"),
    [
        (FULL, None, None, FULL),
        (1272, None, None, 1272),  # nobody answers
        (1272, None, FULL, FULL),  # forged, or mended since
        (1272, None, 1272, 1272),
        (FULL, None, 1272, 1272),  # in silence
        (1372, 1372, FULL, 1372),  # somebody wants it so
        (1272, 1372, FULL, 1372),
        (1272, 1372, 1272, 1272),
        (1272, 1372, None, 1272),
        (9000, 9000, FULL, FULL),  # the device allows less
    ],
)
def test_the_path_mtu_is_as_measured_or_else_as_believed_and_never_more_than_the_routes(
    believed: int, route: int | None, measured: int | None, path_mtu: int
) -> None:
    beliefs: Beliefs[str] = Beliefs(FULL)
    beliefs.note({"a": believed})
    said = beliefs.note_routes(beliefs.take_new(), {} if route is None else {"a": route})
    assert said == ({"a": believed} if believed < min(FULL, route or FULL) else {})
    assert beliefs.path_mtu("a", measured) == path_mtu
    assert ("a" in beliefs) == (believed < FULL)
    assert beliefs.peers == ["a"] * (believed < FULL)


def test_what_the_kernel_believes_is_new_only_when_it_is_something_else() -> None:
    beliefs: Beliefs[str] = Beliefs(FULL)
    beliefs.note({"a": FULL, "b": 1272})
    assert beliefs.take_new() == {"b"}
    beliefs.note({"a": FULL, "b": 1272})
    assert beliefs.take_new() == set()
    beliefs.note({"a": 1200, "b": FULL})
    assert beliefs.take_new() == {"a", "b"}
    beliefs.note({"a": FULL})
    beliefs.remove("a")
    assert (beliefs.take_new(), beliefs.peers) == (set(), [])

"""Every counter has words for people, and a place in docs/wire-format.md that is about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from udptun import _fastpath
from udptun.core.counter_words import COUNTERS, PAGE, is_drop

TEXT = (Path(__file__).parents[2] / PAGE).read_text()


def sections() -> dict[str, str]:
    """Anchor -> what stands below that heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)[1:]
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


def test_every_counter_of_the_datapath_has_words() -> None:
    # The workers do not count these two.
    assert set(COUNTERS) == {*_fastpath.COUNTERS, "inject_drop_full", "drop_stranger"}


@pytest.mark.parametrize("name", COUNTERS)
def test_the_place_of_a_counter_names_it_and_drops_have_a_row_there(name: str) -> None:
    below = sections()[COUNTERS[name].section]
    assert f"`{name}`" in below
    if is_drop(name) and name != "inject_drop_full":
        assert re.search(rf"^\|.*`{name}`", below, re.MULTILINE)


def test_words_are_short_and_plain_and_tell_the_drops_of_one_direction_apart() -> None:
    for name, it in COUNTERS.items():
        # So that a reason, its name and figures fit on 80 columns.
        assert len(it.words) <= (31 if is_drop(name) else 48)
        assert not re.search(r"[_`.;\n]", it.words), name
    for direction in ("encap", "decap", "inject"):
        words = [it.words for name, it in COUNTERS.items() if name.startswith(direction) and is_drop(name)]
        assert len(set(words)) == len(words)

"""Text for a terminal: where its lines are broken."""

from __future__ import annotations

import pytest

from udptun.core.line_breaks import broken


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four five", ["one two three four", "five"]),
        ("do: `ip link set x up`, or", ["do:", "`ip link set x up`,", "or"]),
        ("`a b` and (`c d e`)", ["`a b` and (`c d e`)"]),
        ("a command `that is longer than a line`", ["a command `that is", "longer than a line`"]),
        ("x" * 25, ["x" * 20, "x" * 5]),
        ("", [""]),
    ],
)
def test_lines_are_broken_between_words_and_not_within_a_command_that_fits(text: str, lines: list[str]) -> None:
    assert broken(text, 20) == lines


def test_all_lines_but_the_first_are_indented_and_none_is_too_long() -> None:
    lines = broken("-> run `sysctl -w net.ipv4.ip_forward=1`, and have it kept", 44, "   ")
    assert lines == ["-> run `sysctl -w net.ipv4.ip_forward=1`,", "   and have it kept"]

"""What every target promises of its texts."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_LINE = 3000
"""Characters.  An error quotes what is wrong, and somebody else may have written that."""
MANY_LINES = 60


def check_line(line: str) -> None:
    """A message for the log and for `udptun status` is one short line, and cannot command a terminal."""
    assert line, "an empty message"
    assert len(line) <= LONGEST_LINE, f"a message of {len(line)} characters: {line[:300]!r}..."
    assert line.isprintable(), f"not one printable line: {line!r}"


def check_lines(lines: Sequence[str]) -> None:
    for line in lines:
        check_line(line)


def check_few_lines(lines: Sequence[str]) -> None:
    """The same for what one person has to mend, in one text."""
    assert len(lines) <= MANY_LINES, f"{len(lines)} lines"
    check_lines(lines)

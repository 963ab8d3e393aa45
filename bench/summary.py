"""From raw runs to medians, spreads and ratios.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Rounds = Sequence[Mapping[str, float]]
"""One figure a path (by name), round by round."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of some figures, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def spread(rounds: Rounds, name: str) -> Spread:
    """Of one path over all rounds."""
    return Spread.of([figures[name] for figures in rounds])


def ratio(rounds: Rounds, name: str, base: str) -> Spread:
    """`name` as a multiple of `base`, divided within each round: what slows a whole round down cancels out."""
    return Spread.of([figures[name] / figures[base] for figures in rounds])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell; the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]

"""From runs to medians, spreads and ratios.  Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rounds = Mapping[int, float]
"""Round -> one figure, without the rounds in which it could not be measured."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of some figures, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Cell:
    """What a figure belongs to.  Its values over all rounds are one cell of the tables."""

    mode: str
    workload: str
    path: str
    figure: str


class Runs:
    """The runs of one result file, by cell."""

    def __init__(self, runs: Iterable[Mapping[str, Any]]) -> None:
        self.cells: dict[Cell, dict[int, float]] = {}
        for run in runs:
            for figure, value in run["figures"].items():
                cell = Cell(run["mode"], run["workload"], run["path"], figure)
                self.cells.setdefault(cell, {})[run["round"]] = value

    def spread(self, cell: Cell) -> Spread | None:
        """The cell's spread over all rounds; None when it was not measured."""
        rounds = self.cells.get(cell)
        return Spread.of(list(rounds.values())) if rounds else None

    def ratio(self, cell: Cell, base: str) -> Spread | None:
        """The cell as a multiple of the same figure of the path `base`; None when there is no round with both."""
        other = Cell(cell.mode, cell.workload, base, cell.figure)
        paired = ratios(self.cells.get(cell, {}), self.cells.get(other, {}))
        return Spread.of(list(paired.values())) if paired else None

    def modes(self) -> list[str]:
        return list(dict.fromkeys(cell.mode for cell in self.cells))

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(cell.workload for cell in self.cells))

    def paths(self, workload: str) -> list[str]:
        """The paths on which the workload was measured, in the order in which they came first."""
        return list(dict.fromkeys(cell.path for cell in self.cells if cell.workload == workload))


def ratios(rounds: Rounds, base: Rounds) -> dict[int, float]:
    """Ratios within each round, so that what slows a whole round down cancels out.  A base of 0 makes no ratio."""
    return {i: value / base[i] for i, value in rounds.items() if base.get(i)}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least value that `percent` of all do not exceed (nearest rank).  `ordered` ascends and is not empty."""
    # Rounded first: 99.9 % of 1000 must be 999, not 999.0000000000001.
    rank = math.ceil(round(len(ordered) * percent / 100, 6))
    return ordered[max(rank, 1) - 1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell: the first column to the left, all others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]

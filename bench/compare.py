"""Two results beside each other: what became faster, what slower, and what cannot be told apart."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bench import results
from bench.figures import FIGURES, PATHS
from bench.summary import Cell, Runs, Spread, ratios, table

MIN_RUNS = 3
"""Either result must have so many runs of a cell before anything is said about it."""

_CERTAIN = 0.9
"""Share of all pairs of an old run and a new one that must agree.

With five runs each, a change that is none reaches it about once in thirty cells; with ten each, once in five hundred.
With three each, all pairs must agree.
"""


class Verdict(Enum):
    """What is said of one cell.  Faster means better: a higher rate, or less time, loss or memory."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference"
    TOO_FEW = "too few runs"


@dataclass(frozen=True, slots=True)
class Change:
    """One cell in both results."""

    cell: Cell
    old: Spread
    new: Spread
    verdict: Verdict


def judge(old: Sequence[float], new: Sequence[float], is_more_better: bool) -> Verdict:
    """Compare every old run with every new one.  A tie is half a win; how large a difference is does not count."""
    if min(len(old), len(new)) < MIN_RUNS:
        return Verdict.TOO_FEW
    wins = sum((after > before) + (after == before) / 2 for before in old for after in new)
    more = wins / (len(old) * len(new))
    better = more if is_more_better else 1 - more
    if better >= _CERTAIN:
        return Verdict.FASTER
    return Verdict.SLOWER if 1 - better >= _CERTAIN else Verdict.SAME


def changes(old: Runs, new: Runs, base: str | None) -> list[Change]:
    """Every cell that both have and that can be better or worse, as multiples of the path `base` where it is given."""
    found = []
    for cell in old.cells:
        is_more_better = FIGURES[cell.figure].is_more_better if cell.figure in FIGURES else None
        if is_more_better is None:
            continue
        before, after = _values(old, cell, base), _values(new, cell, base)
        if before and after:
            verdict = judge(before, after, is_more_better)
            found.append(Change(cell, Spread.of(before), Spread.of(after), verdict))
    return sorted(found, key=lambda change: (change.cell.mode, change.cell.workload, change.cell.figure))


def _values(runs: Runs, cell: Cell, base: str | None) -> list[float]:
    rounds = runs.cells.get(cell, {})
    if base is not None:
        if cell.path == base:
            return []
        rounds = ratios(rounds, runs.cells.get(Cell(cell.mode, cell.workload, base, cell.figure), {}))
    return list(rounds.values())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each thing besides the commit that was not the same.  Each of them can explain a difference too."""
    facts = [("machine", name) for name in ("kernel", "cpu", "cores", "python", "iperf3", "tcp_congestion_control")]
    return [
        f"{name}: {old[group][name]} then, {new[group][name]} now"
        for group, name in [*facts, ("options", "seconds")]
        if old[group][name] != new[group][name]
    ]


def lines(found: Sequence[Change], base: str | None) -> list[str]:
    """The table."""

    def spread(of: Spread, figure: str) -> str:
        form = FIGURES[figure].form if base is None else ".3f"
        return f"{of.median:{form}} ({of.low:{form}}–{of.high:{form}})"

    rows = [
        [
            f"{change.cell.mode} {change.cell.workload} {FIGURES[change.cell.figure].title}",
            change.cell.path,
            spread(change.old, change.cell.figure),
            spread(change.new, change.cell.figure),
            f"{change.new.median / change.old.median - 1:+.1%}" if change.old.median else "-",
            change.verdict.value,
        ]
        for change in found
    ]
    return table(["", "path", "old", "new", "median", ""], rows)


def main(arguments: Sequence[str]) -> None:
    """`python -m bench compare OLD NEW`.  Raises BenchError."""
    parser = argparse.ArgumentParser(prog="./dev bench compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--relative-to",
        choices=PATHS,
        metavar="PATH",
        help="compare multiples of that path's figures, taken within each round, instead of the figures: what differs "
        "between the two days then cancels out",
    )
    options = parser.parse_args(arguments)
    base = PATHS[options.relative_to] if options.relative_to else None
    old, new = results.load(options.old), results.load(options.new)
    print(f"old: commit {old['machine']['commit']}, {old['started']}")
    print(f"new: commit {new['machine']['commit']}, {new['started']}")
    for difference in differences(old, new):
        print(f"not the same: {difference}")
    found = changes(Runs(old["runs"]), Runs(new["runs"]), base)
    if base is not None:
        print(f"multiples of {base}")
    print("\n".join(lines(found, base)) if found else "nothing was measured in both")

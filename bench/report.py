"""From a result to Markdown; `write` puts it and the plots beside the result, all else is pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plot, results
from bench.figures import FIGURES, MODES, N_LEASES, NAIVE, PATHS, PLAIN, TITLES, TUNNEL, VXLAN, lease_path
from bench.goals import Verdict, judge
from bench.session import BUSY_LIMIT
from bench.summary import Cell, Runs, Spread

_TABLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "streams": [
        ("tcp_1", "gbit_per_s"),
        ("tcp_8", "gbit_per_s"),
        ("tcp_both", "gbit_per_s"),
        ("tcp_1", "tunnel_cpu_s_per_gb"),
        ("tcp_1", "system_cpu_s_per_gb"),
        ("memory", "memory_mib"),
    ],
    "datagrams": [
        *((f"udp_{n}", figure) for n in (64, 512, 1400) for figure in ("kpackets_per_s", "lost")),
        *(("rtt", figure) for figure in ("p50_us", "p99_us", "p99_9_us")),
    ],
}
_LEASES = [
    ("leases_tcp_1", "gbit_per_s"),
    ("leases_tcp_1", "tunnel_cpu_s_per_gb"),
    ("leases_udp_64", "kpackets_per_s"),
    ("leases_memory", "daemon_mib"),
    ("leases_memory", "datapath_mib"),
]
_RATIOS = [
    *(("tcp_1", figure) for figure in ("gbit_per_s", "tunnel_cpu_s_per_gb", "system_cpu_s_per_gb")),
    *((workload, "gbit_per_s") for workload in ("tcp_8", "tcp_both")),
    *((f"udp_{n}", "kpackets_per_s") for n in (64, 512, 1400)),
    *(("rtt", figure) for figure in ("p50_us", "p99_us", "p99_9_us")),
]


def write(file: Path) -> list[Path]:
    """Write Markdown and plots beside the result `file`, with its name; return what was written.  Raises BenchError."""
    document = results.load(file)
    return results.write_beside(file, {".md": markdown(document), **plot.files(document)})


def markdown(document: Mapping[str, Any]) -> str:
    """The whole report."""
    runs = Runs(document["runs"])
    lines = _head(document)
    if verdicts := judge(runs):
        lines += ["", "## Goals", "", *_goals(verdicts)]
    for mode in [mode for mode in MODES if mode in runs.modes()]:
        lines += ["", f"## Mode {mode}: {MODES[mode]}"]
        for title, columns in _TABLES.items():
            lines += _figures(runs, mode, title, columns)
        lines += _ratios(runs, mode)
        lines += _figures(runs, mode, "by leases", _LEASES)
    return "\n".join([*lines, ""])


def _head(document: Mapping[str, Any]) -> list[str]:
    machine = document["machine"]
    foreign = [run["usage"]["foreign_cores"] for run in document["runs"]]
    n_disturbed = sum(cores >= BUSY_LIMIT for cores in foreign)
    failed = [run for run in document["runs"] if run["error"]]
    changed = " with uncommitted changes" * bool(machine["uncommitted_changes"])
    lines = [
        f"# Benchmark of {document['started']}",
        "",
        f"`{' '.join(document['command'])}`",
        "",
        f"* commit {machine['commit'] or 'unknown'}{changed}; {machine['kernel']}; {machine['cpu']}, "
        f"{machine['cores']} cores; {machine['iperf3']}",
        f"* {document['options']['repeats']} interleaved rounds, {document['options']['seconds']} s a run; "
        "median (least–greatest); ratios are taken within a round",
        f"* before: {document['idle_busy_cores']:.2f} cores busy with something else",
    ]
    if foreign:
        lines.append(
            f"* during: {statistics.median(foreign):.2f} cores taken by others (median; {max(foreign):.2f} at most); "
            f"{BUSY_LIMIT:g} or more in {n_disturbed} of {len(foreign)} runs"
        )
    lines += [f"* {name} left out: {reason}" for name, reason in document["missing"].items()]
    return lines + [
        f"* failed: round {run['round']}, mode {run['mode']}, {run['workload']}, {run['path']}: {run['error']}"
        for run in failed
    ]


def _goals(verdicts: Sequence[Verdict]) -> list[str]:
    goals = list(dict.fromkeys(verdict.goal for verdict in verdicts))
    by_cell = {(verdict.goal, verdict.mode): verdict for verdict in verdicts}
    modes = [mode for mode in MODES if any(verdict.mode == mode for verdict in verdicts)]

    def cell(verdict: Verdict | None) -> str:
        if verdict is None:
            return "-"
        sign = "≤" if verdict.goal.is_at_most else "≥"
        word = "met" if verdict.is_met else "**missed**"
        return f"{sign} {verdict.goal.limits[verdict.mode]:g}: {_ratio(verdict.ratio)} {word}"

    rows = [[f"{goal.title} vs {goal.base}", *(cell(by_cell.get((goal, mode))) for mode in modes)] for goal in goals]
    return _markdown_table(["", *(f"mode {mode}" for mode in modes)], rows)


def _figures(runs: Runs, mode: str, title: str, columns: Sequence[tuple[str, str]]) -> list[str]:
    paths = list(dict.fromkeys(path for workload, _ in columns for path in runs.paths(workload)))
    found = {
        (path, column): spread
        for path in paths
        for column in columns
        if (spread := runs.spread(Cell(mode, column[0], path, column[1]))) is not None
    }
    used = [column for column in columns if any(key[1] == column for key in found)]
    rows = [
        [path, *(_spread(found.get((path, column)), column[1]) for column in used)]
        for path in _in_order(paths)
        if any((path, column) in found for column in used)
    ]
    if not rows:
        return []
    return ["", *_markdown_table([title, *(f"{_short(w)}: {FIGURES[f].title}" for w, f in used)], rows)]


def _ratios(runs: Runs, mode: str) -> list[str]:
    bases = [NAIVE, VXLAN, PLAIN]
    rows = []
    for workload, figure in _RATIOS:
        cells = [runs.ratio(Cell(mode, workload, TUNNEL, figure), base) for base in bases]
        if any(cells):
            rows.append([f"{_short(workload)}: {FIGURES[figure].title}", *(_ratio(one) for one in cells)])
    if not rows:
        return []
    return ["", *_markdown_table([f"{TUNNEL} as a multiple of", *bases], rows)]


def _short(workload: str) -> str:
    return TITLES[workload].removesuffix(", by leases")


def _in_order(paths: Sequence[str]) -> list[str]:
    """Rounds begin with different paths, so the order in which they came says nothing."""
    known = [*PATHS.values(), *(lease_path(n) for n in N_LEASES)]
    return sorted(paths, key=known.index)


def _spread(spread: Spread | None, figure: str) -> str:
    if spread is None:
        return "-"
    form = FIGURES[figure].form
    return f"{spread.median:{form}} ({spread.low:{form}}–{spread.high:{form}})"


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]

"""From a result to Markdown.  `write` puts it and the plots beside the result; everything else is pure."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plot, results
from bench.figures import FIGURES, LEASE_PATHS, MODES, NAIVE, PATHS, PLAIN, TITLES, TUNNEL, VXLAN, by_ipv6
from bench.goals import Verdict, judge
from bench.session import BUSY_LIMIT
from bench.summary import Cell, Runs, Spread

_WIDTH = 120

_TABLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "Gbit/s": [(workload, "gbit_per_s") for workload in ("tcp_1", "tcp_8", "tcp_both")],
    "CPU and memory": [("tcp_1", "tunnel_cpu_s_per_gb"), ("tcp_1", "system_cpu_s_per_gb"), ("memory", "memory_mib")],
    "kpackets/s": [(f"udp_{n}", "kpackets_per_s") for n in (64, 512, 1400)],
    "lost": [(f"udp_{n}", "lost") for n in (64, 512, 1400)],
    "ping-pong, UDP, 64 bytes": [("rtt", figure) for figure in ("p50_us", "p99_us", "p99_9_us")],
}
"""What the first column's head says -> columns as (workload, figure); not wider than _WIDTH."""

_LEASES: Mapping[str, Sequence[tuple[str, str]]] = {
    "speed by leases": [
        ("leases_tcp_1", "gbit_per_s"),
        ("leases_tcp_1", "tunnel_cpu_s_per_gb"),
        ("leases_udp_64", "kpackets_per_s"),
    ],
    "memory by leases": [("leases_memory", "daemon_mib"), ("leases_memory", "datapath_mib")],
}
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
        for title, columns in _TABLES.items():
            lines += _by_family(runs, mode, title, columns)
        for title, columns in _LEASES.items():
            lines += _figures(runs, mode, title, columns)
    return "\n".join([*lines, ""])


def _head(document: Mapping[str, Any]) -> list[str]:
    machine = document["machine"]
    foreign = [run["usage"]["foreign_cores"] for run in document["runs"]]
    n_disturbed = sum(cores >= BUSY_LIMIT for cores in foreign)
    changed = " with uncommitted changes" * bool(machine["uncommitted_changes"])
    chosen = document["options"].get("congestion")
    congestion = f"; TCP's congestion control is {chosen}" if chosen else ""
    items = [
        f"commit {machine['commit'] or 'unknown'}{changed}; {machine['kernel']}; {machine['cpu']}, "
        f"{machine['cores']} cores; {machine['iperf3']}{congestion}",
        f"{document['options']['repeats']} interleaved rounds, {document['options']['seconds']} s a run; "
        "median (least–greatest); ratios are taken within a round",
        f"before: {document['idle_busy_cores']:.2f} cores busy with something else",
    ]
    if foreign:
        items.append(
            f"during: {statistics.median(foreign):.2f} cores taken by others (median; {max(foreign):.2f} at most); "
            f"{BUSY_LIMIT:g} or more in {n_disturbed} of {len(foreign)} runs"
        )
    items += [f"{name} left out: {reason}" for name, reason in document["missing"].items()]
    items += [
        f"failed: round {run['round']}, mode {run['mode']}, {run['workload']}, {run['path']}: {run['error']}"
        for run in document["runs"]
        if run.get("error")
    ]
    command = " \\\n".join(_wrapped(" ".join(document["command"]), "    ", "        ", _WIDTH - len(" \\")))
    return [
        f"# Benchmark of {document['started']}",
        "",
        *command.split("\n"),
        "",
        *(line for item in items for line in _wrapped(item, "* ", "  ", _WIDTH)),
    ]


def _wrapped(text: str, first: str, other: str, width: int) -> list[str]:
    """Lines of `width` at most, broken at blanks alone; `first` and `other` are what the lines begin with."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    )


def _goals(verdicts: Sequence[Verdict]) -> list[str]:
    """A table for each path that is compared with."""
    by_cell = {(verdict.goal, verdict.mode): verdict for verdict in verdicts}
    modes = [mode for mode in MODES if any(verdict.mode == mode for verdict in verdicts)]
    lines = ["In each cell the goal, then the ratio that was measured. Bold: missed."]
    for base in dict.fromkeys(verdict.goal.base for verdict in verdicts):
        goals = dict.fromkeys(verdict.goal for verdict in verdicts if verdict.goal.base == base)
        rows = [[goal.title, *(_verdict(by_cell.get((goal, mode))) for mode in modes)] for goal in goals]
        lines += ["", *_markdown_table([f"vs {base}", *(f"mode {mode}" for mode in modes)], rows)]
    return lines


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return "-"
    sign = "≤" if verdict.goal.is_at_most else "≥"
    bold = "" if verdict.is_met else "**"
    median, _, spread = _ratio(verdict.ratio).partition(" ")
    return f"{sign} {verdict.goal.limits[verdict.mode]:g}: {bold}{median}{bold} {spread}"


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
    return ["", *_markdown_table([title, *_heads(columns, used)], rows)] if rows else []


def _heads(columns: Sequence[tuple[str, str]], used: Sequence[tuple[str, str]]) -> list[str]:
    """Heads of the `used` ones of a table's columns.  The first column's head says what they all have in common."""
    if len({figure for _, figure in columns}) == 1:
        return [_short(workload) for workload, _ in used]
    if len({workload for workload, _ in columns}) == 1:
        return [FIGURES[figure].title for _, figure in used]
    return [f"{_short(workload)}: {FIGURES[figure].title}" for workload, figure in used]


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


def _by_family(runs: Runs, mode: str, title: str, columns: Sequence[tuple[str, str]]) -> list[str]:
    """How each path by IPv6 compares with itself by IPv4, where both were measured."""
    found = {
        (path, column): ratio
        for path in PATHS.values()
        for column in columns
        if column in _RATIOS
        if (ratio := runs.ratio(Cell(mode, column[0], by_ipv6(path), column[1]), path)) is not None
    }
    used = [column for column in columns if any(key[1] == column for key in found)]
    rows = [
        [path, *(_ratio(found.get((path, column))) for column in used)]
        for path in dict.fromkeys(path for path, _ in found)
    ]
    return ["", *_markdown_table([f"IPv6 / IPv4: {title}", *_heads(columns, used)], rows)] if rows else []


def _short(workload: str) -> str:
    return TITLES[workload].removesuffix(", by leases")


def _in_order(paths: Sequence[str]) -> list[str]:
    """In the order of figures.PATHS: rounds begin with different paths, so the order of the runs says nothing."""
    known = [*PATHS.values(), *LEASE_PATHS]
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

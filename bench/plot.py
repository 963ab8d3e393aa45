"""Bars of a result: one row a figure, one column a mode, one bar a path, with a whisker from the least to the greatest.

A plot is a list of shapes first; `svg` writes them as a file.  Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from bench.figures import FIGURES, LEASE_PATHS, MODES, PATHS, TITLES, TUNNELS, VTEP, by_ipv6
from bench.summary import Cell, Runs, Spread

PLOTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "-tcp": [("tcp_1", "gbit_per_s"), ("tcp_8", "gbit_per_s"), ("tcp_both", "gbit_per_s")],
    "-cpu": [("tcp_1", "tunnel_cpu_s_per_gb"), ("tcp_1", "system_cpu_s_per_gb")],
    "-udp": [(f"udp_{n}", "kpackets_per_s") for n in (64, 512, 1400)],
    "-rtt": [("rtt", "p50_us"), ("rtt", "p99_us"), ("rtt", "p99_9_us")],
    "-leases": [("leases_tcp_1", "gbit_per_s"), ("leases_udp_64", "kpackets_per_s"), ("leases_memory", "memory_mib")],
}
"""File name's ending -> rows."""

_INK, _OURS, _ALSO_OURS, _OTHERS = "#1f2933", "#0b6fb8", "#7fb2dc", "#b8c2cc"
# Pixels.
_LABEL, _PANEL, _VALUE, _GAP, _MARGIN = 112, 170, 56, 18, 16
_LETTER = 6.8
"""Of a path's name, on average: `_LABEL` has room for 16, and a longer name makes it wider."""
_BAR, _PITCH, _TITLE, _ROW_GAP = 12, 18, 22, 16
_GLOSS = 15
"""Of the line that says what a mode or a bar is."""
_NORMAL, _SMALL = 12, 11
"""Sizes of text."""


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle; x and y are its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True, slots=True)
class Text:
    """`anchor` as SVG has it: start or end; y is the base line."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    size: int = _NORMAL
    is_bold: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """Shapes in drawing order, on white, `width` by `height` pixels, y downwards."""

    width: float
    height: float
    shapes: tuple[Box | Text, ...]


def files(document: Mapping[str, Any]) -> dict[str, str]:
    """Every plot that the document has figures for: the end of its file's name -> SVG."""
    runs = Runs(document["runs"])
    drawings = {f"{suffix}.svg": draw(runs, rows) for suffix, rows in PLOTS.items()}
    return {suffix: svg(drawing) for suffix, drawing in drawings.items() if drawing is not None}


def draw(runs: Runs, rows: Sequence[tuple[str, str]]) -> Drawing | None:
    """Draw rows of (workload, figure); None without a figure.  All modes of a row share a scale that begins at 0."""
    drawn = {cell.mode for cell in runs.cells if (cell.workload, cell.figure) in rows}
    modes = [mode for mode in MODES if mode in drawn]
    if not modes:
        return None
    label = max(_LABEL, *(_LETTER * len(path) for workload, _ in rows for path in runs.paths(workload)))

    def column(i: int) -> float:
        return _MARGIN + label + i * (_PANEL + _VALUE + _GAP)

    shapes: list[Box | Text] = [
        Text(column(i), _MARGIN + 10, f"mode {mode}", is_bold=True) for i, mode in enumerate(modes)
    ]
    shapes += [Text(column(i), _MARGIN + 10 + _GLOSS, _IN_SHORT[mode], size=_SMALL) for i, mode in enumerate(modes)]
    y = float(_MARGIN + _TITLE + _GLOSS)
    for workload, figure in rows:
        measured = {
            (mode, path): spread
            for mode in modes
            for path in runs.paths(workload)
            if (spread := runs.spread(Cell(mode, workload, path, figure))) is not None
        }
        if not measured:
            continue
        paths = [path for path in _ORDER if any(key[1] == path for key in measured)]
        most = max(spread.high for spread in measured.values()) or 1.0
        y += _TITLE
        title = TITLES[workload].removesuffix(", by leases")
        better = {True: ", more is better", False: ", less is better", None: ""}[FIGURES[figure].is_more_better]
        shapes.append(Text(_MARGIN, y - 8, f"{title}: {FIGURES[figure].title}{better}", is_bold=True))
        for i, path in enumerate(paths):
            shapes.append(Text(_MARGIN + label - 6, y + i * _PITCH + 10, path, "end", is_bold=path in TUNNELS))
        for (mode, path), spread in measured.items():
            left = column(modes.index(mode))
            shapes += _bar(spread, path, FIGURES[figure].form, left, y + paths.index(path) * _PITCH, most)
        height = len(paths) * _PITCH
        shapes += [Box(column(i), y - 2, 1, height, _INK) for i in range(len(modes))]
        y += height + _ROW_GAP
    shapes.append(Text(_MARGIN, y, "bar: median of the rounds; whisker: least to greatest", size=_SMALL))
    return Drawing(column(len(modes)) - _GAP + _MARGIN, y + _MARGIN, tuple(shapes))


_IN_SHORT: Mapping[str, str] = {
    "A": "large segments cross whole",
    "B": "one frame per packet",
    "C": "one frame per packet, receiver merges",
}
"""What MODES says, in a column's width."""

_ORDER = (*PATHS.values(), *LEASE_PATHS)


def _bar(spread: Spread, path: str, form: str, left: float, y: float, most: float) -> list[Box | Text]:
    def x(value: float) -> float:
        return round(left + value / most * _PANEL, 1)

    middle = y + _BAR / 2
    return [
        Box(left, y, x(spread.median) - left, _BAR, _colour(path)),
        Box(x(spread.low), middle - 0.75, max(x(spread.high) - x(spread.low), 0.5), 1.5, _INK),
        *(Box(x(end) - 0.5, middle - 3, 1, 6, _INK) for end in (spread.low, spread.high)),
        Text(x(spread.high) + 5, y + 10, f"{spread.median:,{form}}", size=_SMALL),
    ]


def _colour(path: str) -> str:
    if path in TUNNELS or path in LEASE_PATHS:
        return _OURS
    return _ALSO_OURS if path in (VTEP, by_ipv6(VTEP)) else _OTHERS


def svg(drawing: Drawing) -> str:
    """As a file of its own.  The group names what most shapes share, so that each shape names only what differs."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{drawing.width:g}" height="{drawing.height:g}" '
        f'viewBox="0 0 {drawing.width:g} {drawing.height:g}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<g fill="{_INK}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="{_SMALL}">',
    ]
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            fill = f' fill="{shape.colour}"' * (shape.colour != _INK)
            lines.append(
                f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}"{fill}/>'
            )
        else:
            size = f' font-size="{shape.size}"' * (shape.size != _SMALL)
            anchor = f' text-anchor="{shape.anchor}"' * (shape.anchor != "start")
            weight = ' font-weight="bold"' * shape.is_bold
            lines.append(f'<text x="{shape.x:g}" y="{shape.y:g}"{size}{anchor}{weight}>{escape(shape.text)}</text>')
    return "\n".join([*lines, "</g>", "</svg>", ""])

"""A mesh as text: what is wrong first, then the hosts, then who reaches whom.  Pure.

A page without limits, as in a pipe, has all hosts.  On a terminal there are as many as fit, those in trouble first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from udptun.commands.figures import duration, plural
from udptun.commands.mesh.matrix import Host, Mesh, State, Way
from udptun.commands.mesh.problems import Problem, Verdict, verdict_of
from udptun.commands.mesh.scale import bounds_of, rtt_text, step_names, step_of
from udptun.commands.screen import BOLD, DIM, GREEN, RED, YELLOW, Line, Page, Span, labelled, paint, problem_rows

_MOST_PROBLEMS, _MOST_NOTES = 12, 6
"""Lines about what is wrong, and notes, on a terminal."""
_LEAST_HOSTS = 4
_CELL = 6
"""Columns of a cell that has a time in it."""
_MOST_WIDE = 24
"""So many hosts have times in their cells in a pipe; more have one character each."""

_MARKS = {State.DEAD: "X", State.UNKNOWN: "?", State.MISSING: "M", State.NO_VIEW: " "}
_WORDS = {State.DEAD: "dead", State.UNKNOWN: "?", State.MISSING: "none", State.NO_VIEW: ""}
_STYLES = {State.DEAD: f"{BOLD};{RED}", State.UNKNOWN: YELLOW, State.MISSING: RED, State.NO_VIEW: DIM}
_LOSSY, _NARROW = "!", "m"


def render(mesh: Mesh, problems: Sequence[Problem], notes: Sequence[str], page: Page) -> list[str]:
    """The lines."""
    lines = [_verdict(mesh, problems), *labelled("gathered", gathered(mesh), page)]
    lines += _some([problem_rows(problem.text, page) for problem in problems], _MOST_PROBLEMS, page)
    lines += _some([labelled("note", note, page) for note in notes], _MOST_NOTES, page)
    hosts = _shown(mesh, problems, page, len(lines))
    lines += [[], *_hosts(hosts, mesh, page)]
    if len(hosts) < len(mesh.hosts):
        n_more = len(mesh.hosts) - len(hosts)
        lines.append([Span(f"… and {plural(n_more, 'more host')}: --html FILE shows all, as does a pipe", DIM)])
    lines += [[], *_matrix(mesh, hosts, page)]
    return [paint(line, page) for line in lines]


def _verdict(mesh: Mesh, problems: Sequence[Problem]) -> Line:
    verdict, words = verdict_of(mesh, problems)
    colour = {Verdict.WELL: GREEN, Verdict.WRONG: RED, Verdict.UNSURE: YELLOW}[verdict]
    return [Span("mesh".ljust(11), BOLD), Span(words, f"{BOLD};{colour}")]


def gathered(mesh: Mesh) -> str:
    """`2026-11-29 14:03:11 in 0.04 s; 3 hosts, 2 of which say what they see`."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mesh.made_at))
    asked = f", asked at port {mesh.port}" if mesh.port else ""
    n = len(mesh.viewers)
    say = "this one alone says" if n == 1 else f"{n} of which say"
    return f"{at} in {mesh.took_s:.2f} s; {plural(len(mesh.hosts), 'host')}, {say} what they see{asked}"


def _some(found: Sequence[list[Line]], most: int, page: Page) -> list[Line]:
    shown = found if page.height is None else found[:most]
    lines = [line for rows in shown for line in rows]
    n_more = len(found) - len(shown)
    return lines + labelled("", f"… and {n_more:,} more: udptun mesh | more", page, DIM) if n_more else lines


def _shown(mesh: Mesh, problems: Sequence[Problem], page: Page, n_above: int) -> list[Host]:
    """As many as fit, those that problems are about first; in the order of their numbers."""
    n = len(mesh.hosts)
    if page.height is not None:
        # A line in the list, and one in the matrix; its head and legend, and what is between.
        n = min(n, max((page.height - n_above - 11) // 2, _LEAST_HOSTS))
    if page.width is not None:
        n = min(n, max(page.width - _margin(mesh) - 1, _LEAST_HOSTS))
    about = dict.fromkeys(number for problem in problems for number in problem.hosts)
    rank = {number: i for i, number in enumerate(about)}
    first = sorted(mesh.hosts, key=lambda host: (rank.get(host.number, len(rank)), not host.is_self, host.number))
    return sorted(first[:n], key=lambda host: host.number)


def _margin(mesh: Mesh) -> int:
    return len(str(mesh.hosts[-1].number)) + 1


def _hosts(hosts: Sequence[Host], mesh: Mesh, page: Page) -> list[Line]:
    heads = ("#", "SUBNET", "ADDRESS", "ITS VIEW")
    rows = [heads, *((str(it.number), str(it.subnet), str(it.public_ip), said(it)) for it in hosts)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines: list[Line] = []
    for (number, *texts), host in zip(rows, [None, *hosts], strict=True):
        style = DIM if host is None else "" if host.view is not None else RED if host.is_wrong else YELLOW
        line = [Span(f"{number:>{widths[0]}}  ", "" if host is None else BOLD)]
        line += [Span(f"{text:<{width}}  ") for text, width in zip(texts, widths[1:], strict=False)]
        lines.append([*line, Span(texts[-1], style)])
    return lines


def said(host: Host) -> str:
    """What is known of its view: what it runs and how soon it answered, or why there is none."""
    if host.view is None:
        return f"none: {host.reason}"
    what = f"{host.view.backend}, MTU {host.view.mtu}, version {host.view.version}"
    return f"this host: {what}" if host.is_self else f"{what}, in {1000 * host.took_s:.0f} ms"


# ---------------------------------------------------------------------------------------------------- the matrix


def _matrix(mesh: Mesh, hosts: Sequence[Host], page: Page) -> list[Line]:
    bounds = bounds_of(mesh.rtts_ms)
    margin = _margin(mesh)
    is_wide = margin + _CELL * len(hosts) <= page.width if page.width is not None else len(hosts) <= _MOST_WIDE
    if is_wide:
        heads = [[Span(" " * margin + "".join(f"{host.number:>{_CELL}}" for host in hosts), BOLD)]]
        cell: Callable[[Way | None], Span] = _wide_cell
        title = "RTT in ms, from the host of the row to that of the column"
    else:
        n_digits = len(str(hosts[-1].number))
        numbers = [str(host.number).rjust(n_digits) for host in hosts]
        heads = [[Span(" " * margin + "".join(text[i] for text in numbers), BOLD)] for i in range(n_digits)]

        def narrow_cell(way: Way | None) -> Span:
            return _narrow_cell(way, bounds)

        cell = narrow_cell
        title = "RTT, from the host of the row to that of the column"
    lines: list[Line] = [[Span(title, DIM)], *heads]
    for start in hosts:
        cells = [cell(mesh.way(start, end)) for end in hosts]
        lines.append([Span(f"{start.number:>{margin - 1}} ", BOLD), *cells])
    shown = [way for start in hosts for end in hosts if (way := mesh.way(start, end)) is not None]
    return [*lines, *_legend(shown, None if is_wide else bounds, page)]


def _wide_cell(way: Way | None) -> Span:
    if way is None:
        return Span(f"{'·':>{_CELL}}", DIM)
    if way.state is not State.ALIVE:
        return Span(f"{_WORDS[way.state]:>{_CELL}}", _STYLES[way.state])
    time_ms = "alive" if way.found.rtt_ms is None else rtt_text(way.found.rtt_ms)
    return Span(f"{time_ms + _mark(way):>{_CELL}}", YELLOW if _mark(way) else GREEN)


def _narrow_cell(way: Way | None, bounds: list[float]) -> Span:
    if way is None:
        return Span("·", DIM)
    if way.state is not State.ALIVE:
        return Span(_MARKS[way.state], _STYLES[way.state])
    if mark := _mark(way):
        return Span(mark, f"{BOLD};{YELLOW}")
    return Span("+" if way.found.rtt_ms is None else str(step_of(way.found.rtt_ms, bounds)), GREEN)


def _mark(way: Way) -> str:
    return _LOSSY if way.is_lossy else _NARROW if way.is_narrow else ""


def _legend(ways: Sequence[Way], bounds: list[float] | None, page: Page) -> list[Line]:
    """What the marks that are there mean; `bounds`: of the steps, where cells have steps in place of times."""
    used = {way.state for way in ways}
    marks = _WORDS if bounds is None else _MARKS
    said = {
        State.DEAD: f"{marks[State.DEAD]} dead" if bounds is not None else "",
        State.UNKNOWN: "? has never answered",
        State.MISSING: f"{marks[State.MISSING]} has no lease of it",
        State.NO_VIEW: "empty: its view is not known",
    }
    parts = [said[state] for state in State if state in used and said.get(state)]
    parts += ["! loses probes"] * any(way.is_lossy for way in ways)
    parts += ["m takes shorter packets than the device"] * any(way.is_narrow and not way.is_lossy for way in ways)
    if bounds is not None:
        parts += [f"{i} {text}" for i, text in enumerate(step_names(bounds))]
    ages = [way.found.rtt_age_s for way in ways if way.state is State.ALIVE and way.found.rtt_age_s is not None]
    if ages:
        parts.append(f"the oldest time is of {duration(max(ages))} ago")
    return labelled("", "; ".join(parts), page, DIM) if parts else []

"""A mesh as one HTML page that needs nothing else: no script, no other file, no network.  Pure.

Everything that is written into it is escaped, and a policy of content (CSP) in its head forbids whatever is no style.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

from udptun.commands.figures import duration, plural
from udptun.commands.mesh.matrix import Host, Mesh, State, Way
from udptun.commands.mesh.problems import Problem, verdict_of
from udptun.commands.mesh.scale import bounds_of, rtt_text, step_names, step_of
from udptun.commands.mesh.style import CSS
from udptun.commands.mesh.table import gathered, said

_MOST_PROBLEMS = 100
_SIZES = (16, 48, 100)
"""Up to so many hosts a cell has text in it, is large, or small; beyond it is tiny."""
_NAMED = 48
"""Up to so many hosts a tooltip has subnets beside the numbers: there is one for each pair."""
_LOSSES = (0.0, 0.05, 0.2, 0.5)
"""More than these shares of probes lost are the steps of the map of loss."""
_LESS = (0, 100, 400)
"""More than so many bytes less than the device are the steps of the map of path MTUs."""

_CLASSES = {
    State.ALIVE: "",
    State.DEAD: "dead",
    State.UNKNOWN: "unknown",
    State.MISSING: "missing",
    State.NO_VIEW: "untold",
}
_WORDS = {
    State.DEAD: "dead",
    State.UNKNOWN: "has never answered",
    State.MISSING: "has no lease of it",
    State.NO_VIEW: "its view is not known",
}
_SHORT = {State.DEAD: "dead", State.UNKNOWN: "?", State.MISSING: "none", State.NO_VIEW: ""}
_MAPS = (("rtt", "RTT, ms"), ("loss", "Loss, %"), ("mtu", "Path MTU, bytes"))


def render(mesh: Mesh, problems: Sequence[Problem], notes: Sequence[str]) -> str:
    """The page, in UTF-8 once it is encoded so."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>udptun mesh: {escape(verdict_of(mesh, problems)[1])}</title>",
            f"<style>\n{CSS}</style></head><body>",
            *_head(mesh, problems),
            *_problems(problems),
            *_matrix(mesh),
            *_hosts(mesh.hosts),
            *_list(notes, "notes", "Notes"),
            "<footer>A cell is what the host of its row says of the host of its column. Times and losses are what "
            "the hosts' own probes have found; point at a cell to see all of it. Loss is of the last 10 to 20 "
            "minutes.</footer>",
            "</body></html>\n",
        ]
    )


def _head(mesh: Mesh, problems: Sequence[Problem]) -> list[str]:
    verdict, words = verdict_of(mesh, problems)
    return [
        f'<header><h1>udptun mesh</h1><span class="verdict {verdict}">{escape(words)}</span></header>',
        f'<p class="when">Gathered {escape(gathered(mesh))}.</p>',
    ]


def _problems(problems: Sequence[Problem]) -> list[str]:
    texts = [problem.text for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        texts.append(f"and {len(problems) - _MOST_PROBLEMS:,} more, which --json has")
    return _list(texts, "problems", "What is wrong")


def _list(texts: Iterable[str], kind: str, title: str) -> list[str]:
    items = [f"<li>{escape(text)}</li>" for text in texts]
    return [f"<h2>{title}</h2>", f'<ul class="{kind}">', *items, "</ul>"] if items else []


# ---------------------------------------------------------------------------------------------------- the matrix


def _matrix(mesh: Mesh) -> Iterator[str]:
    size = sum(len(mesh.hosts) > most for most in _SIZES)
    bounds = bounds_of(mesh.rtts_ms)
    for name, _ in _MAPS:
        chosen = " checked" if name == "rtt" else ""
        yield f'<input class="map" type="radio" name="map" id="by-{name}"{chosen}>'
    yield "<section><h2>Who reaches whom</h2>"
    labels = "".join(f'<label class="{name}" for="by-{name}">{text}</label>' for name, text in _MAPS)
    axes = "a row is what one host says, a column the host that it says it of"
    yield f'<div class="maps">{labels}<span class="axes">{axes}</span></div>'
    yield f'<div class="scroll"><table class="matrix n{size}"><thead><tr><th></th>'
    yield "".join(_heads(mesh.hosts, size))
    yield "</tr></thead><tbody>"
    for start in mesh.hosts:
        cells = "".join(_cell(mesh, start, end, bounds, with_text=size == 0) for end in mesh.hosts)
        # In the columns there is no room for it.
        subnet = "" if size else f"<small>{escape(str(start.subnet))}</small>"
        yield f'<tr><th scope="row"{_tip(start)}>{_label(start, size)}{subnet}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    yield from _legends(mesh, bounds)
    yield "</section>"


def _tip(host: Host) -> str:
    return f' title="{escape(f"{host.number}: {host.subnet} at {host.public_ip}; {said(host)}")}"'


def _heads(hosts: Sequence[Host], size: int) -> Iterator[str]:
    """Of the columns.  Where cells are small, every tenth has a number, which takes the room of those behind it."""
    at = [i for i, host in enumerate(hosts) if _label(host, size)]
    for i, after in pairwise([*at, len(hosts)]):
        label = _label(hosts[i], size) if size < 2 or after - i > len(str(hosts[i].number)) else ""
        span = f' colspan="{after - i}"' if after - i > 1 else ""
        yield f'<th scope="col"{span}{_tip(hosts[i])}>{label}</th>'


def _label(host: Host, size: int) -> str:
    """Where cells are small every tenth has one."""
    return str(host.number) if size < 2 or host.number == 1 or not host.number % 10 else ""


def _cell(mesh: Mesh, start: Host, end: Host, bounds: list[float], *, with_text: bool) -> str:
    way = mesh.way(start, end)
    if way is None:
        return '<td class="self"></td>'
    kinds, texts = " ".join(_kinds(way, bounds)), ""
    if with_text:
        texts = "".join(f'<i class="{name}">{escape(text)}</i>' for name, text in _texts(way).items())
    pair = f"{start.number} to {end.number}"
    if len(mesh.hosts) <= _NAMED:
        pair = f"{start.number} ({start.subnet}) to {end.number} ({end.subnet})"
    return f'<td class="{kinds}" title="{escape(f"{pair}: {_words(way)}")}">{texts}</td>'


def _kinds(way: Way, bounds: list[float]) -> Iterator[str]:
    """The classes of a cell."""
    if way.state is not State.ALIVE:
        yield _CLASSES[way.state]
        return
    found = way.found
    if found.rtt_ms is not None:
        yield f"s{step_of(found.rtt_ms, bounds)}"
    if found.loss is not None:
        yield f"l{sum(found.loss > least for least in _LOSSES)}"
    if found.path_mtu is not None and found.mtu is not None:
        yield f"m{sum(found.mtu - found.path_mtu > least for least in _LESS)}"
    if way.is_lossy or way.is_narrow:
        yield "odd"


def _texts(way: Way) -> dict[str, str]:
    """What stands in a cell, by the map."""
    if way.state is not State.ALIVE:
        return dict.fromkeys(("rtt", "loss", "mtu"), _SHORT[way.state])
    found = way.found
    return {
        "rtt": "alive" if found.rtt_ms is None else rtt_text(found.rtt_ms),
        "loss": "-" if found.loss is None else f"{100 * found.loss:.0f}",
        "mtu": str(found.path_mtu or "-"),
    }


def _words(way: Way) -> str:
    """All that is known of a way."""
    found, parts = way.found, [_WORDS.get(way.state, "alive")]
    if way.family:
        parts[0] += f" by {way.family}"
    if found.rtt_ms is not None:
        last = "RTT" if way.state is State.ALIVE else "the last RTT was"
        age = "" if found.rtt_age_s is None else f", {duration(found.rtt_age_s)} ago"
        parts.append(f"{last} {rtt_text(found.rtt_ms)} ms{age}")
    if found.probes_sent:
        parts.append(f"{found.probes_lost} of {plural(found.probes_sent, 'probe')} lost")
    if found.path_mtu is not None:
        parts.append(f"path MTU {found.path_mtu}{f' of {found.mtu}' if found.is_narrow else ''}")
    return "; ".join(parts)


def _legends(mesh: Mesh, bounds: list[float]) -> Iterator[str]:
    """One for each map, of what is in it."""
    ways = [way for row in mesh.ways for way in row if way is not None]
    classes = {kind for way in ways for kind in _kinds(way, bounds)}
    states = [(_CLASSES[state], text) for state, text in _WORDS.items() if _CLASSES[state] in classes]
    odd = [("odd", "loses probes, or takes shorter packets than the device")] if "odd" in classes else []
    steps = {
        "rtt": [(f"rule{i}", text) for i, text in enumerate(step_names(bounds)) if f"s{i}" in classes],
        "loss": [(f"less{i}", text) for i, text in enumerate(_loss_names()) if f"l{i}" in classes],
        "mtu": [(f"less{i}", text) for i, text in enumerate(_less_names()) if f"m{i}" in classes],
    }
    for name, keys in steps.items():
        items = "".join(
            f'<li><span class="key {kind}"></span>{escape(text)}</li>' for kind, text in (*keys, *states, *odd)
        )
        yield f'<ul class="legend {name}">{items}</ul>'


def _loss_names() -> list[str]:
    high = [*(f"up to {100 * share:.0f} %" for share in _LOSSES[1:]), "more"]
    return ["no probe lost", *(f"{text} lost" for text in high)]


def _less_names() -> list[str]:
    return ["as long as the device", *(f"up to {n} bytes less" for n in _LESS[1:]), "still less"]


def _hosts(hosts: Sequence[Host]) -> Iterator[str]:
    yield '<h2>Hosts</h2><div class="wide"><table class="hosts"><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in ("#", "Subnet", "Address", "Its view")) + "</tr></thead><tbody>"
    for host in hosts:
        subnets = "<br>".join(escape(str(it)) for it in (host.subnet, host.ipv6_subnet) if it is not None)
        style = "" if host.view is not None else ' class="wrong"' if host.is_wrong else ' class="why"'
        yield (
            f"<tr><td>{host.number}</td><td>{subnets}</td><td>{escape(str(host.public_ip))}</td>"
            f"<td{style}>{escape(said(host))}</td></tr>"
        )
    yield "</tbody></table></div>"

"""The status document as one screen for people: what is wrong, this node, its peers, what was dropped.

Pure: a screen follows from the daemon's answer, an earlier one for what happens a second, and the page that it shall
fit.  A page without limits, as in a pipe, has everything, one thing a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from udptun.commands.figures import count, duration, plural, scaled, unit
from udptun.commands.hosts import Document, Host, Look, Sum, counters_of, hosts_of, sum_of
from udptun.core.counter_words import COUNTERS, PAGE, is_drop
from udptun.core.line_breaks import broken
from udptun.core.offload import ALL, names

BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
"""Parameters of SGR, the control sequence for colours."""

_LABEL = 11
"""Columns of the word that a line begins with."""
_MIN_PROBLEMS, _MIN_PEERS, _MIN_DROPS = 4, 3, 2
"""Lines that each gets at least, if it has so many."""
_MAX_DROPS = 6
"""And that drops get at most while peers need the room."""
_MAX_SKIPPED, _SKIPPED_CHARS = 100, 300
_WIDE = 100
"""From so many columns on a port is shown, too, that is like our own."""


@dataclass(frozen=True, slots=True)
class Page:
    """Where a screen is shown.  `width`, `height`: columns and lines; None where there is no limit."""

    width: int | None = None
    height: int | None = None
    has_colours: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Text in one style, SGR parameters."""

    text: str
    style: str = ""


Line = list[Span]


def render(look: Look, earlier: Look | None, page: Page, corner: str = "") -> list[str]:
    """The lines of the screen.  `corner` stands in the upper right one."""
    hosts, node, drops = hosts_of(look, earlier), _node(look, page), _drop_lines(look, earlier, page)
    title, reasons = drops[:1], drops[1:]
    # What is there however little room there is: verdict, this node, titles, empty lines.
    left = None if page.height is None else page.height - len(node) - 4 - bool(hosts) - 2 * bool(title)
    least = min(len(hosts), _MIN_PEERS) + min(len(reasons), _MIN_DROPS)
    problems = _fit_problems(_problems(look.document, page), None if left is None else max(left - least, _MIN_PROBLEMS))
    n_peers, n_reasons = _share(None if left is None else left - len(problems), len(hosts), len(reasons))
    lines = [_verdict(look, earlier, corner, page), *problems, [], *node, []]
    lines += _peers(look, earlier, hosts, n_peers, page)
    if drops:
        lines += [[], *title, *_fit_drops(reasons, n_reasons)]
    return [paint(line, page) for line in lines]


def _share(left: int | None, n_peers: int, n_reasons: int) -> tuple[int, int]:
    """How many lines peers and reasons for drops get."""
    if left is None or n_peers + n_reasons <= left:
        return n_peers, n_reasons
    reasons = min(n_reasons, max(min(_MAX_DROPS, left // 2), left - n_peers, 1))
    return max(left - reasons, 1), reasons


def sgr(text: str, style: str) -> str:
    """The text with the control sequences of its colours (ECMA-48, SGR)."""
    return f"\x1b[{style}m{text}\x1b[0m"


def paint(line: Line, page: Page) -> str:
    """The line as it is written: cut to the page, with the control sequences of its colours."""
    text, left = "", page.width
    for span in line:
        shown = span.text if left is None else span.text[:left]
        left = None if left is None else left - len(shown)
        text += sgr(shown, span.style) if page.has_colours and span.style and shown else shown
    return text if page.has_colours else text.rstrip()


def labelled(label: str, text: str, page: Page, style: str = "", label_style: str = DIM) -> list[Line]:
    """`text` behind a label, on as many lines as it takes."""
    room = None if page.width is None else max(page.width - _LABEL, 20)
    rows = [text] if room is None else broken(text, room)
    return [
        [Span((label if i == 0 else "").ljust(_LABEL), label_style), Span(row, style)] for i, row in enumerate(rows)
    ]


def problem_rows(text: str, page: Page) -> list[Line]:
    """A problem of the daemon's: what is wrong in red, and behind the first semicolon what follows, and what to do."""
    n_red = len(text.partition(";")[0])
    lines: list[Line] = []
    for label, row in labelled("problem", text, page, label_style=RED):
        lines.append([label, Span(row.text[:n_red], RED), Span(row.text[n_red:])])
        # With the space at which the line was broken.
        n_red = max(n_red - len(row.text) - 1, 0)
    return lines


def _append_if_it_fits(line: Line, span: Span, page: Page) -> None:
    if page.width is None or sum(len(it.text) for it in line) + len(span.text) <= page.width:
        line.append(span)


# ------------------------------------------------------------------------------------------------ what is wrong


def _verdict(look: Look, earlier: Look | None, corner: str, page: Page) -> Line:
    document = look.document
    problems, skipped = document["problems"], document["skipped"]
    dropping = sum(_drop_rates(look, earlier).values())
    if problems:
        what = Span(plural(len(problems), "problem"), f"{BOLD};{RED}")
    elif skipped:
        what = Span(f"{plural(len(skipped), 'lease')} of the store not used", f"{BOLD};{YELLOW}")
    elif dropping:
        what = Span("no problem known, but packets are dropped", f"{BOLD};{YELLOW}")
    else:
        what = Span("all is well", f"{BOLD};{GREEN}")
    line = [Span("udptun".ljust(_LABEL), BOLD), what]
    if corner and page.width is not None:
        used = sum(len(span.text) for span in line)
        line.append(Span(corner.rjust(page.width - used), DIM))
    return line


def _problems(document: Document, page: Page) -> list[list[Line]]:
    """The lines of each problem, and of the leases that are not used."""
    found = [problem_rows(text, page) for text in document["problems"]]
    return found + _skipped(document["skipped"], page)


def _fit_problems(found: list[list[Line]], room: int | None) -> list[Line]:
    """As many whole ones as there is room for, or a part of the first."""
    if room is None or sum(map(len, found)) <= room:
        return [line for rows in found for line in rows]
    lines: list[Line] = []
    n_shown = 0
    while len(lines) + len(found[n_shown]) < room:
        lines += found[n_shown]
        n_shown += 1
    if not n_shown:
        lines = found[0][: room - 1]
        label, *spans = lines.pop()
        text = "".join(span.text for span in spans)
        lines.append([label, Span(f"{text[:-2]} …", next(span.style for span in spans if span.text))])
        n_shown = 1
    n_more = len(found) - n_shown
    return [*lines, [Span(" " * _LABEL), Span(f"… and {n_more} more: udptun status | more", DIM)]] if n_more else lines


def _skipped(skipped: Sequence[str], page: Page) -> list[list[Line]]:
    """How many leases are not used, and the first of them by name."""
    if not skipped:
        return []
    n_more = len(skipped) - _MAX_SKIPPED
    return [
        labelled("skipped", f"{len(skipped)} of the leases in the store", page, YELLOW, YELLOW),
        *(labelled("", line[:_SKIPPED_CHARS], page) for line in skipped[:_MAX_SKIPPED]),
        *([labelled("", f"… and {n_more} more: --json has them all", page)] if n_more > 0 else []),
    ]


# ---------------------------------------------------------------------------------------------------- this node


def _node(look: Look, page: Page) -> list[Line]:
    document = look.document
    lease, underlay, backend = (document[key] for key in ("lease", "underlay", "backend"))
    datapath, firewall = document["datapath"], document["firewall"]
    rows = [
        ("lease", f"{lease['subnet']} of {document['network']}, {lease_end(lease['expires_at'], look.unix_s)}"),
        ("store", _store(document, look.unix_s)),
        ("underlay", f"{underlay['interface']} {underlay['address']}, MTU {underlay['mtu']}, public {_public(lease)}"),
        ("backend", _backend(backend)),
    ]
    # A daemon of an earlier version does not say it.
    if (probes := backend.get("probes", "on")) != "on":
        rows.append(("probes", probes))
    if ipv6 := document.get("ipv6"):
        rows.append(("IPv6", _ipv6(ipv6)))
    if datapath is not None:
        rows.append(("datapath", _datapath(datapath, backend.get("offloads"))))
    if ipv6 and (own := ipv6.get("datapath")):
        rows.append(("", f"for IPv6: {_datapath(own, None)}"))
    rules = " and ".join(kind for kind in ("masquerade", "forward") if firewall[kind])
    rows.append(("firewall", f"{firewall['form']}: {rules}" if rules else "no rules"))
    up = duration(document["uptime_s"])
    rows.append(("daemon", f"up {up}, version {document['version']}, pid {document['pid']}"))
    return [line for label, text in rows for line in labelled(label, text, page)]


def lease_end(expires_at: float | None, unix_s: float) -> str:
    if expires_at is None:
        return "never expires"
    return f"expires in {duration(expires_at - unix_s)}" if expires_at > unix_s else "expired"


def _store(document: Document, unix_s: float) -> str:
    parts = [document["store"]]
    # A daemon of an earlier version does not say these.
    if (answers := document.get("store_answers")) is not None:
        parts.append("answers" if answers else "away")
    if (at := document.get("store_answered_at")) is not None:
        parts.append(f"last news {duration(max(unix_s - at, 0))} ago")
    return ", ".join(parts)


def _public(lease: Document) -> str:
    return address_and_port(lease["public_ip"], lease["port"])


def address_and_port(address: str, port: int | None) -> str:
    """`192.0.2.1:8285`, `[2001:db8::1]:8285`; without a port the address."""
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _backend(backend: Document) -> str:
    check = f", source check {backend['source_check']}" if "source_check" in backend else ""
    return f"{backend['type']}, {_device(backend['device'])}, MTU {backend['mtu']}{check} ({backend['reason']})"


def _device(name: str | None) -> str:
    return name or "no device"


def _ipv6(ipv6: Document) -> str:
    carried = "not carried" if ipv6["mtu"] is None else f"{_device(ipv6['device'])}, MTU {ipv6['mtu']}"
    # In Type udp a host needs none.
    public = "" if ipv6["public_ip"] is None and ipv6["mtu"] is not None else f"public {ipv6['public_ip'] or 'none'}, "
    return f"{ipv6['subnet'] or 'no subnet'} of {ipv6['network']}, {public}{carried}"


def _datapath(datapath: Document, offloads: Sequence[str] | None) -> str:
    states = datapath["workers"]
    if not datapath["pid"]:
        what = "no process"
    elif set(states) == {"running"}:
        what = f"up {duration(datapath['uptime_s'] or 0)}, {plural(len(states), 'worker')}"
    else:
        what = f"up {duration(datapath['uptime_s'] or 0)}, workers {', '.join(states)}"
    parts = [what, "standby ready" if datapath["standby_pids"] else "no standby"]
    # A daemon of an earlier version does not say these.
    if offloads is not None:
        lack = [name for name in names(ALL) if name not in offloads]
        parts.append(f"offloads all but {', '.join(lack)}" if lack else "all offloads")
    if confinement := datapath.get("confinement"):
        parts.append(f"confinement {confinement}")
    if (shortcut := datapath.get("shortcut", "off")) != "off":
        parts.append(f"shortcut {shortcut}")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------- the peers


@dataclass(frozen=True, slots=True)
class _Column:
    """One column; the first that fit are shown."""

    head: str
    text: Callable[[Host, Document], str]
    is_number: bool = True
    style: Callable[[Host], str] = lambda host: ""


def liveness_style(host: Host) -> str:
    return {"alive": GREEN, "unknown": YELLOW, "-": ""}.get(host.liveness, RED)


def _measured_style(host: Host) -> str:
    """Of what was measured: of a dead host that is past."""
    return DIM if host.liveness == "dead" else ""


def _rtt(host: Host) -> str:
    rtt_ms = host.first.get("rtt_ms")
    return "-" if rtt_ms is None else f"{rtt_ms:.2f}" if rtt_ms < 100 else f"{rtt_ms:.0f}"


_COLUMNS = [
    _Column("PEER SUBNET", lambda host, own: host.subnets[0], is_number=False),
    _Column("ADDRESS", lambda host, own: _address(host, own), is_number=False),
    _Column("STATE", lambda host, own: host.liveness, is_number=False, style=liveness_style),
    _Column("RTT ms", lambda host, own: _rtt(host), style=_measured_style),
    _Column(
        "MTU",
        lambda host, own: str(host.first.get("path_mtu") or "-"),
        style=lambda host: YELLOW if host.is_narrow else _measured_style(host),
    ),
]
_COUNTED = [
    _Column("OUT bit/s", lambda host, own: _rate(host, "encap_bytes", 8)),
    _Column("IN bit/s", lambda host, own: _rate(host, "decap_bytes", 8)),
    _Column("OUT pkt/s", lambda host, own: _rate(host, "encap_packets")),
    _Column("IN pkt/s", lambda host, own: _rate(host, "decap_packets")),
    _Column("SENT", lambda host, own: "-" if host.total is None else unit(host.total.encap_bytes, "B")),
    _Column("RECEIVED", lambda host, own: "-" if host.total is None else unit(host.total.decap_bytes, "B")),
]
_FURTHER = [
    _Column("BY", lambda host, own: "udptun" if host.first.get("udptun", True) else "flannel", is_number=False),
]
_IPV6 = [_Column("IPv6 SUBNET", lambda host, own: " ".join(host.subnets[1:]) or "-", is_number=False)]


def _rate(host: Host, counter: str, factor: int = 1) -> str:
    return "-" if host.rates is None else scaled(factor * getattr(host.rates, counter))


def _address(host: Host, own: Document) -> str:
    """With the port where that is another than our own, or where there is room."""
    port = host.first.get("port")
    if port is None or port == own["port"]:
        return str(host.first["public_ip"])
    return _public(host.first)


def _peers(look: Look, earlier: Look | None, hosts: list[Host], room: int, page: Page) -> list[Line]:
    """A summary, and a table of `room` lines at most."""
    whole = sum_of(hosts)
    if not hosts:
        return labelled("peers", "none", page, BOLD)
    lines: list[Line] = [[Span("peers".ljust(_LABEL), DIM), *_summary(whole)]]
    if whole.rates is not None and earlier is not None:
        _append_if_it_fits(lines[0], Span(f", measured for {look.at_s - earlier.at_s:.1f} s", DIM), page)
    n_shown = len(hosts) if len(hosts) <= room else room - 1
    shown, more = hosts[:n_shown], hosts[n_shown:]
    lines += _table(shown, look.document, page)
    if more:
        rest = sum_of(more)
        lines.append([Span(f"… and {rest.n:,} more: "), *_summary(rest)])
    return lines


def _summary(whole: Sum) -> Line:
    """`3 alive, 1 dead; out 1.01 Mbit/s, in 8 bit/s`."""
    counts = [(f"{n:,} {liveness}", RED if liveness == "dead" else "") for liveness, n in whole.liveness.items()]
    line: Line = []
    for text, colour in counts or [(plural(whole.n, "peer"), "")]:
        line += [Span(", ")] if line else []
        line.append(Span(text, f"{BOLD};{colour}" if colour else BOLD))
    if whole.rates is not None:
        out, into = (unit(8 * n, "bit/s") for n in (whole.rates.encap_bytes, whole.rates.decap_bytes))
        line.append(Span(f"; out {out}, in {into}", BOLD))
    return line


def _table(hosts: Sequence[Host], document: Document, page: Page) -> list[Line]:
    own = document["lease"]
    if page.width is None or page.width >= _WIDE:
        own = {**own, "port": None}
    columns = list(_COLUMNS)
    if any(host.total is not None for host in hosts):
        columns += _COUNTED
    columns += _FURTHER
    if any(len(host.parts) > 1 for host in hosts):
        columns += _IPV6
    lines: list[Line] = [[] for _ in range(len(hosts) + 1)]
    used = 0
    for column in columns:
        cells = [column.head, *(column.text(host, own) for host in hosts)]
        width = max(map(len, cells))
        used += width + 2 * bool(used)
        if page.width is not None and used > page.width and len(lines[0]) > 2 * 2:
            break
        styles = [DIM, *map(column.style, hosts)]
        for line, cell, style in zip(lines, cells, styles, strict=True):
            if line:
                line.append(Span("  "))
            line.append(Span(cell.rjust(width) if column.is_number else cell.ljust(width), style))
    return lines


# ------------------------------------------------------------------------------------------- what was dropped


@dataclass(frozen=True, slots=True)
class _Drop:
    """A reason for which packets are dropped: its counter, how many, and how many a second (0: not known either)."""

    counter: str
    n: int
    a_second: float


def _drop_rates(look: Look, earlier: Look | None) -> dict[str, float]:
    """How many packets are dropped a second, by counter."""
    if earlier is None:
        return {}
    counters, before = counters_of(look.document), counters_of(earlier.document)
    elapsed_s = look.at_s - earlier.at_s
    return {
        name: grown / elapsed_s
        for name, n in counters.items()
        if is_drop(name) and (grown := n - before.get(name, 0)) > 0
    }


def _drop_lines(look: Look, earlier: Look | None, page: Page) -> list[Line]:
    """The title, and a line for each reason: what happens now first."""
    counters, rates = counters_of(look.document), _drop_rates(look, earlier)
    drops = [_Drop(name, n, rates.get(name, 0)) for name, n in counters.items() if is_drop(name) and n]
    if not drops:
        return labelled("drops", "none", page, GREEN) if counters else []
    drops.sort(key=lambda drop: (-drop.a_second, -drop.n))
    total, now = sum(drop.n for drop in drops), sum(drop.a_second for drop in drops)
    title = f"{count(total)} packets, {f'{scaled(now)} a second now' if now else 'none now'}; see {PAGE}"
    rows = [_drop_cells(drop) for drop in drops]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = labelled("drops", title, page, BOLD)
    for drop, (n, a_second, words, name, place) in zip(drops, rows, strict=True):
        colour = YELLOW if drop.a_second else ""
        line = [
            Span(f"{n:>{_LABEL - 2}}  "),
            Span(f"{a_second:>{widths[1]}}  ", colour or DIM),
            Span(f"{words:<{widths[2]}}  ", colour),
            Span(f"{name:<{widths[3]}}", DIM),
        ]
        _append_if_it_fits(line, Span(f"  {place}", DIM), page)
        lines.append(line)
    return lines


def _drop_cells(drop: _Drop) -> tuple[str, str, str, str, str]:
    it = COUNTERS.get(drop.counter)
    a_second = f"{scaled(drop.a_second)}/s" if drop.a_second else "-"
    # A counter of a later daemon.
    words, place = ("", "") if it is None else (it.words, f"#{it.section}")
    return count(drop.n), a_second, words, drop.counter, place


def _fit_drops(lines: list[Line], room: int) -> list[Line]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], [Span(f"… and {plural(len(lines) - room + 1, 'more reason')}", DIM)]]

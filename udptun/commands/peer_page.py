"""All that the status document knows of one peer, for people.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from udptun.commands.figures import count, unit
from udptun.commands.hosts import COUNTERS, Host, Look, Traffic, hosts_of, matching, parts_of, rates_of, traffic_of
from udptun.commands.screen import (
    YELLOW,
    Line,
    Page,
    address_and_port,
    labelled,
    lease_end,
    liveness_style,
    paint,
    problem_rows,
)

_Row = tuple[str, str, str]
"""Label, text, style."""


def render(look: Look, earlier: Look | None, wanted: str, page: Page) -> list[str]:
    """A block for each host that `wanted` means: several may share a public address."""
    subnets = matching(look.document, wanted)
    lines: list[Line] = []
    for host in hosts_of(look, earlier):
        if subnets.isdisjoint(host.subnets):
            continue
        if lines:
            lines.append([])
        if problems := [line for line in look.document["problems"] if _is_about(line, host)]:
            lines += [row for line in problems for row in problem_rows(line, page)]
            lines.append([])
        for label, text, style in _rows(host, look, earlier):
            lines += labelled(label, text, page, style)
    return [paint(line, page) for line in lines]


def _rows(host: Host, look: Look, earlier: Look | None) -> Iterator[_Row]:
    document, part = look.document, host.first
    yield "peer", " and ".join(host.subnets), ""
    rtt_ms = part.get("rtt_ms")
    rtt = "never answered a probe" if rtt_ms is None else f"its last answer took {rtt_ms:.2f} ms"
    if host.liveness != "-":
        yield "state", f"{host.liveness}, {rtt}", liveness_style(host)
    # A daemon of an earlier version does not count them.
    if sent := part.get("probes_sent"):
        lost = part["probes_lost"]
        said = f"{count(sent)} in the last 20 minutes, {count(lost) if lost else 'none'} lost"
        yield "probes", said, YELLOW if lost else ""
    # The items of `ipv6.peers` have none where the kernel carries the packets.
    port = "" if part.get("port") is None else f", UDP port {part['port']}"
    any_port = ", takes datagrams from any port" if part.get("any_source_port") else ""
    yield "address", f"{part['public_ip']}{port}{any_port}", ""
    for it in (it for of_family in host.parts for it in of_family.get("learned", ())):
        yield "learned", f"sends from {address_and_port(it['address'], it['port'])}, too", ""
    if strays := part.get("strays"):
        yield "strays", f"{count(strays)} packets of its subnet came from elsewhere and were dropped", YELLOW
    path_mtu, mtu = part.get("path_mtu"), document["backend"]["mtu"]
    path = "MTU not measured" if path_mtu is None else f"MTU {path_mtu}"
    yield "path", f"{path}, the device's is {mtu}", YELLOW if host.is_narrow else ""
    if "ecn" in part:
        yield "ECN", "marks of congestion reach its pods" if part["ecn"] else "no marks of congestion", ""
    if (document["datapath"] or {}).get("shortcut") == "on":
        by_kernel = "the kernel (shortcut), slower for floods of small datagrams, and with GRO for many streams"
        yield "sent by", by_kernel if part.get("shortcut") else "the workers", ""
    by = "udptun" if part.get("udptun", True) else "flannel"
    yield "lease", f"by {by}, {lease_end(part.get('expires_at'), look.unix_s)}", ""
    yield from _traffic(host, look, earlier)


def _traffic(host: Host, look: Look, earlier: Look | None) -> Iterator[_Row]:
    """A row for each direction, and for each family where there are two."""
    before, elapsed_s = ({}, 0.0) if earlier is None else (parts_of(earlier.document), look.at_s - earlier.at_s)
    for part in host.parts:
        if COUNTERS[0] not in part:
            continue
        family = "" if len(host.parts) == 1 else "IPv6 " if ":" in part["subnet"] else "IPv4 "
        total, rates = traffic_of(part), rates_of(part, before.get(part["subnet"]), elapsed_s)
        yield family + "out", _way(total.encap_packets, total.encap_bytes, _a_second(rates, "encap")), ""
        yield family + "in", _way(total.decap_packets, total.decap_bytes, _a_second(rates, "decap")), ""


def _way(packets: float, n_bytes: float, a_second: str) -> str:
    return f"{a_second}{unit(n_bytes, 'B')} in {count(packets)} packets so far"


def _a_second(rates: Traffic | None, way: str) -> str:
    if rates is None:
        return ""
    packets, n_bytes = (getattr(rates, f"{way}_{what}") for what in ("packets", "bytes"))
    return f"{unit(8 * n_bytes, 'bit/s')}, {unit(packets, 'packets/s')}; "


def _is_about(problem: str, host: Host) -> bool:
    """Whether the line names a subnet or the address of the host."""
    named = (*host.subnets, *(part["public_ip"] for part in host.parts))
    return any(re.search(rf"(?<![\w.:]){re.escape(name)}(?![\w:/]|\.\d)", problem) for name in named)

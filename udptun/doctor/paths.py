"""The ways to the peers: whether they answer, through the tunnel and outside of it, and how long packets may be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from errno import errorcode

from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.doctor.facts import Document, Facts, Peer
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.probes import Echo, Echoes, Remote, ask_echoes, find_closed_ports
from udptun.doctor.sample import sample
from udptun.kernel.netlink import Netlink
from udptun.kernel.pod_links import find_pod_links

_OVERHEADS = {"udp": {4: 28, 6: 48}, "vxlan": {4: 50, 6: 70}, "host-gw": {4: 0, 6: 0}}
"""Bytes around an inner packet, by the family of the outer one."""


@dataclass(frozen=True, slots=True)
class _Answers:
    """What came back from a peer that does not answer through the tunnel.

    `is_outer`: an answer of its own address.  `no_route`: the error with which the kernel does not send there.
    `closed`: the error that came back from its UDP port.  `is_heard`: packets of it have arrived meanwhile;
    `has_been_heard`: ever.
    """

    is_outer: bool
    no_route: str
    closed: str
    is_heard: bool
    has_been_heard: bool


async def reachability(facts: Facts) -> list[Finding]:
    peers = _asked(facts)
    remotes = [(it.public_ip, it.port) for it in peers if it.port is not None]
    inner, outer = {it: Echo(it.inner) for it in peers}, {it: Echo(it.public_ip) for it in peers}
    try:
        echoes = await ask_echoes([*{*inner.values(), *outer.values()}])
    except OSError as exc:
        raise NotHereError(f"no raw socket ({errorcode.get(exc.errno or 0)}); run as root") from exc
    silent = [it for it in peers if inner[it] not in echoes.answered]
    if not silent:
        return []
    closed = await find_closed_ports([it for it in remotes if it[0] in {peer.public_ip for peer in silent}])
    before, now = _received(facts.document), _received(await asyncio.to_thread(facts.ask_again))
    found = []
    for peer in silent:
        subnet = str(peer.subnet)
        answers = _answers(peer, echoes, closed, before.get(subnet, 0), now.get(subnet, 0))
        found.append((peer, _judge(peer, answers)))
    return _by_host(found)


def _by_host(found: Iterable[tuple[Peer, Finding]]) -> list[Finding]:
    """What is found alike of a host's subnets, which are one of each family, is one finding."""
    alike: dict[tuple[IPAddress, Finding], list[Peer]] = {}
    for peer, it in found:
        alike.setdefault((peer.public_ip, replace(it, subject="")), []).append(peer)
    return [
        replace(it, subject=f"{' and '.join(str(peer.subnet) for peer in peers)} at {ip}")
        for (ip, it), peers in alike.items()
    ]


def _asked(facts: Facts) -> tuple[Peer, ...]:
    if facts.backend_type == "alloc":
        raise NotHereError("with Backend.Type alloc something else carries the packets")
    if facts.document is None and not facts.paths:
        raise NotHereError("no daemon runs, and there is no tunnel to ask through")
    if not facts.peers:
        raise NotHereError("there are no peers, as far as is known here")
    return sample(facts.peers).chosen


def _answers(peer: Peer, echoes: Echoes, closed: Mapping[Remote, str], n_before: int, n_now: int) -> _Answers:
    """`n_before` and `n_now`: packets that the peer has sent until the probes, and until now."""
    outer = Echo(peer.public_ip)
    refused = echoes.refused.get(outer)
    return _Answers(
        outer in echoes.answered,
        "" if refused is None else errorcode.get(refused.errno or 0, str(refused)),
        "" if peer.port is None else closed.get((peer.public_ip, peer.port), ""),
        n_now > n_before,
        n_now > 0,
    )


def _received(document: Document | None) -> dict[str, int]:
    """Packets from each peer so far, by its subnet, as the datapath has counted."""
    if document is None:
        return {}
    listed = (*document["peers"], *(document.get("ipv6") or {}).get("peers", ()))
    return {it["subnet"]: int(it.get("decap_packets", 0)) for it in listed}


def _judge(peer: Peer, answers: _Answers) -> Finding:
    """Of a peer that does not answer through the tunnel."""
    ip, port, severity = peer.public_ip, peer.port, Severity.ERROR
    where = f"UDP port {port}" if port is not None else "the backend's packets"
    if answers.no_route:
        cause = f"packets to it cannot be sent ({answers.no_route})"
        remedy = f"`ip route get {ip}` and the firewall's OUTPUT chain say why"
    elif answers.closed == "ECONNREFUSED":
        cause = f"nobody listens on its UDP port {port}"
        remedy = "start the daemon there (`udptun status`, its log), or give both hosts one Backend.Port"
    elif answers.closed == "EPERM":
        cause = f"this host does not let datagrams to its UDP port {port} out (EPERM)"
        remedy = "`packet-filters` names the rule, or a program of eBPF refuses them: accept them there"
    elif answers.closed:
        cause = f"its UDP port {port} is refused on the way ({answers.closed})"
        remedy = f"let UDP port {port} pass, in at the peer and out here"
    elif not answers.is_outer:
        cause = "it answers neither through the tunnel nor to a ping of its own address"
        remedy = f"is it up, is the address right (`udptun lease list`), does the network lead there? `ping {ip}`"
    elif peer.liveness == "unknown" and answers.has_been_heard:
        severity = Severity.WARNING
        cause = "it has never answered a ping through the tunnel, though packets of its pods arrive"
        remedy = f"pods may reach each other all the same; let ICMP echoes to {peer.inner} in at the peer to know"
    elif answers.is_heard:
        cause = f"packets of it arrive here, and what this host sends to {where} there does not, or is not answered"
        remedy = f"let {where} in at the peer and out here: firewalls of both, and of the network between"
    elif peer.liveness == "unknown":
        cause = "it answers a ping of its own address, and has never answered through the tunnel"
        remedy = f"let {where} in at both hosts, and ICMP echoes to {peer.inner} at the peer"
    else:
        cause = "it answers a ping of its own address, and nothing comes from it through the tunnel"
        remedy = (
            f"let {where} in at both hosts: a firewall of the peer, of the network between, or of this host "
            "(`packet-filters` names it then) drops it"
        )
    return Finding(severity, str(peer), cause, remedy)


async def path_mtu(facts: Facts) -> list[Finding]:
    if facts.mtu is None or facts.document is None:
        raise NotHereError("no daemon says how long packets may be")
    ipv6_mtu = (facts.document.get("ipv6") or {}).get("mtu")
    mtus = {4: facts.mtu, 6: ipv6_mtu or facts.mtu}
    peers = _asked(facts)
    full = {it: Echo(it.inner, mtus[it.inner.version]) for it in peers}
    short = {it: Echo(it.inner) for it in peers}
    try:
        echoes = await ask_echoes([*full.values(), *short.values()])
    except OSError as exc:
        raise NotHereError(f"no raw socket ({errorcode.get(exc.errno or 0)}); run as root") from exc
    found = []
    for peer in peers:
        if full[peer] in echoes.answered or short[peer] not in echoes.answered:
            continue
        mtu = mtus[peer.inner.version]
        shorter = f"those of {peer.path_mtu}" if peer.path_mtu is not None and peer.path_mtu < mtu else "shorter ones"
        cause = f"packets of {mtu} bytes do not reach it and come back, and {shorter} do"
        remedy = (
            "mend the path (a link with a smaller MTU, a tunnel, a filter), or give all hosts a smaller Backend.MTU; "
            "until then senders are told to send less"
        )
        found.append((peer, Finding(Severity.WARNING, str(peer), cause, remedy)))
    return _by_host(found)


async def mtu_in_use(facts: Facts) -> list[Finding]:
    if facts.mtu is None or facts.document is None:
        raise NotHereError("no daemon says how long packets may be")
    underlay = facts.document["underlay"]
    outer = 6 if ":" in underlay["address"] else 4
    overhead = _OVERHEADS.get(facts.backend_type, {4: 0, 6: 0})[outer]
    found = []
    link = next((it for it in facts.links.values() if it.name == facts.underlay), None)
    room = underlay["mtu"] if link is None or link.is_loopback else link.mtu
    if facts.mtu + overhead > room:
        cause = f"pods may send {facts.mtu} bytes, {facts.mtu + overhead} on {facts.underlay}, and that takes {room}"
        remedy = f"set Backend.MTU (or --mtu) to {room} at most, or leave it out"
        found.append(Finding(Severity.WARNING, facts.underlay, cause, remedy))
    by_name = {it.name: it for it in facts.links.values()}
    for path in facts.paths:
        for name in await find_pod_links(path):
            if name in by_name and by_name[name].mtu > facts.mtu:
                cause = (
                    f"{name} has an MTU of {by_name[name].mtu}, and packets to other hosts may have {facts.mtu} bytes"
                )
                remedy = f"start its pods again, which reads subnet.env; or `ip link set {name} mtu {facts.mtu}`"
                found.append(Finding(Severity.WARNING, name, cause, remedy))
    return list(dict.fromkeys(found))


async def peer_routes(facts: Facts) -> list[Finding]:
    """The tunnel's own datagrams must not go into the tunnel, and must leave by the underlay at all."""
    peers = _asked(facts)
    by_address: dict[IPAddress, Peer] = {it.public_ip: it for it in peers}
    async with Netlink() as kernel:
        routes = await kernel.routes_to(by_address)
    found = []
    devices = {facts.device(family) for family in Family} - {"", facts.underlay}
    for ip, peer in by_address.items():
        route = routes.get(ip)
        if route is None:
            cause, remedy = f"this host has no route to {ip}", f"`ip route get {ip}`; a default route is missing?"
        elif (device := facts.link_name(route.oif)) in devices:
            cause = f"the route to {ip} leads into {device}, so the tunnel's own datagrams come back"
            remedy = f"`ip route get {ip}` shows it; choose another Network, or delete that route"
        else:
            continue
        found.append(Finding(Severity.ERROR, str(peer), cause, remedy))
    return found

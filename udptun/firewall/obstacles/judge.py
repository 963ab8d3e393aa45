"""What drops the overlay's packets, in words with a remedy.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.pod_path import PodPath
from udptun.core.tunnel_path import TunnelPath
from udptun.firewall.obstacles.ruleset import (
    BaseChain,
    Drop,
    Flow,
    Hook,
    Ranges,
    State,
    Tool,
    Traffic,
    Verdict,
    difference,
    find_drops,
    ranges_of,
)

_MAX_POD_LINKS = 4
"""Where each pod has a link of its own, so many of them stand for all."""

Chains = Mapping[Traffic, Sequence[BaseChain]]
"""Those that each traffic passes."""


class Way(Protocol):
    """A way on which packets of ours pass the host's packet filters."""

    @property
    def links(self) -> frozenset[str]:
        """The links that matter on it."""

    @property
    def traffics(self) -> Sequence[Traffic]:
        """What passes there."""

    def judge(self, chains: Chains) -> list[str]:
        """A line for each rule or policy that certainly drops packets there.  `chains` are those of `traffics`."""


_FORWARDED = (Hook.PREROUTING, Hook.FORWARD, Hook.POSTROUTING)
_RECEIVED, _SENT = (Hook.PREROUTING, Hook.INPUT), (Hook.OUTPUT, Hook.POSTROUTING)
_UDP = 17
"""IPPROTO_UDP."""
_NEW = frozenset({State.NEW})
_NOT_OF_A_CONNECTION = frozenset({State.NEW, State.UNTRACKED})
_ANY = frozenset({State.NEW, State.UNTRACKED, State.ESTABLISHED})


@dataclass(frozen=True, slots=True)
class PodWay:
    """Packets between the pods here, which are behind `pod_links`, and those of other hosts.

    Judged is the first packet of a connection.
    """

    path: PodPath
    pod_links: tuple[str, ...]

    @property
    def links(self) -> frozenset[str]:
        return frozenset({self.path.device, *self.pod_links})

    @property
    def traffics(self) -> Sequence[Traffic]:
        return (self._traffic,)

    @property
    def _traffic(self) -> Traffic:
        return Traffic(self.path.family, _FORWARDED, _NEW)

    def judge(self, chains: Chains) -> list[str]:
        bases, path = chains[self._traffic], self.path
        drops = [
            (number, drop)
            for number, flows in enumerate(self._flows())
            for flow in flows
            for drop in find_drops(bases, flow)
        ]
        return [
            f"{begin} {_DIRECTIONS[directions]}; {_remedy_for_pods(drop, path)}"
            for begin, directions, drop in _together(drops, path.family)
        ]

    def _flows(self) -> tuple[list[Flow], list[Flow]]:
        """From pods here, and to pods here."""
        own = ranges_of(self.path.subnet)
        others = difference(ranges_of(self.path.network), own)
        device, links = self.path.device, self.pod_links[:_MAX_POD_LINKS]
        return (
            [Flow(link, device, own, others) for link in links],
            [Flow(device, link, others, own) for link in links],
        )


_DIRECTIONS = {
    frozenset({0}): "from pods here to other hosts",
    frozenset({1}): "from other hosts to pods here",
    frozenset({0, 1}): "between pods here and other hosts",
}


@dataclass(frozen=True, slots=True)
class TunnelWay:
    """The tunnel's own datagrams, from the peers and to them."""

    path: TunnelPath

    @property
    def links(self) -> frozenset[str]:
        return frozenset(filter(None, [self.path.link]))

    @property
    def traffics(self) -> Sequence[Traffic]:
        states = (_ANY, _NOT_OF_A_CONNECTION) if self.path.looks_answered else (_NOT_OF_A_CONNECTION,)
        directions = (False, True) if self.path.is_sent_back else (False,)
        return tuple(self._traffic(is_out, it) for it in states for is_out in directions)

    def _traffic(self, is_out: bool, states: frozenset[State]) -> Traffic:
        port = self.path.peer_port if is_out else self.path.port
        return Traffic(self.path.family, _SENT if is_out else _RECEIVED, states, _UDP, port)

    def judge(self, chains: Chains) -> list[str]:
        """What drops only what looks like no answer has a line of its own: peers send first, too."""
        lines: list[str] = []
        said: set[tuple[object, ...]] = set()
        for traffic in self.traffics:
            is_out, is_first = traffic.hooks == _SENT, State.ESTABLISHED not in traffic.states
            drops = [it for it in find_drops(chains[traffic], self._flow(is_out)) if _chain_of(it) not in said]
            said |= {_chain_of(it) for it in drops}
            direction = self._direction(is_out)
            if is_first and self.path.looks_answered:
                direction += _UNLESS[is_out]
            for begin, _, drop in _together([(0, it) for it in drops], self.path.family):
                lines.append(f"{begin} {direction}; {_remedy_for_tunnel(drop, traffic, self.path.port)}")
        return lines

    def _flow(self, is_out: bool) -> Flow:
        own, peers = _ranges([self.path.address]), _ranges(self.path.peers)
        return Flow(None, self.path.link, own, peers) if is_out else Flow(self.path.link, None, peers, own)

    def _direction(self, is_out: bool) -> str:
        if not is_out:
            return f"of peers to UDP port {self.path.port} here"
        port = self.path.peer_port
        return f"from here to {f'UDP port {port}' if port is not None else 'the UDP ports'} of peers"


_UNLESS = {
    False: " unless this host has just sent to them",
    True: " unless they have just sent to this host",
}


def _ranges(addresses: Iterable[IPAddress]) -> Ranges:
    """Neighbours make one range."""
    found: list[tuple[int, int]] = []
    for number in sorted(map(int, addresses)):
        if found and number <= found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def _together(drops: Sequence[tuple[int, Drop]], family: Family) -> Iterator[tuple[str, frozenset[int], Drop]]:
    """How the line about each rule or policy begins, the directions of what it drops, and one of its drops.

    `drops` come with the number of their direction.
    """
    by_place: dict[str, list[tuple[int, Drop]]] = {}
    for number, drop in drops:
        by_place.setdefault(_place(drop), []).append((number, drop))
    for place, same in by_place.items():
        _, drop = same[0]
        what = "rejects" if drop.rule is not None and drop.rule.verdict is Verdict.REJECT else "drops"
        packets = "packets" if family is Family.IPV4 else "IPv6 packets"
        which = f"some {packets}" if all(drop.is_partial for _, drop in same) else packets
        yield f"{place} {what} {which}", frozenset(number for number, _ in same), drop


def _chain_of(drop: Drop) -> tuple[object, ...]:
    base = drop.base
    return base.tool, base.family, base.table, base.name


def _place(drop: Drop) -> str:
    base, rule = drop.base, drop.rule
    if base.tool is Tool.NFT:
        of = f"chain {drop.chain} (nft, table {base.family} {base.table})"
        return f"the policy of {of}" if rule is None else f"the rule with handle {rule.number} of {of}"
    of = f"{drop.chain} ({base.tool.value}, table {base.table})"
    return f"the policy of {of}" if rule is None else f"rule {rule.number} of {of}"


def _remedy_for_pods(drop: Drop, path: PodPath) -> str:
    base, network = drop.base, path.network
    if base.table == "firewalld":
        return f"`firewall-cmd --permanent --zone=trusted --add-source={network}`, then `firewall-cmd --reload`"
    if base.tool is Tool.NFT:
        command = f"nft insert rule {base.family} {base.table} {base.name} {path.family.nft_name}"
        return f"accept the overlay there: `{command} saddr {network} accept`, and the same with daddr"
    if drop.rule is None:
        return (
            f"flannel's rules are not there (--iptables-forward-rules): `{_iptables(base)} -A {base.name} "
            f"-s {network} -j ACCEPT`, and the same with -d"
        )
    if base.hook is Hook.PREROUTING or (drop.chain.startswith("DOCKER") and drop.chain != "DOCKER-USER"):
        return 'if Docker has set it, `"allow-direct-routing": true` in daemon.json ends it; else delete the rule'
    return (
        f"delete it, or accept the overlay before it: `{_iptables(base)} -I {drop.chain} -s {network} -j ACCEPT`, and "
        "the same with -d"
    )


def _remedy_for_tunnel(drop: Drop, traffic: Traffic, own_port: int) -> str:
    base, is_out = drop.base, traffic.hooks == _SENT
    # Where the peers' ports differ, ours is what all datagrams have in common.
    end, port = ("dport", traffic.destination_port) if traffic.destination_port is not None else ("sport", own_port)
    if base.table == "firewalld" and not is_out:
        return f"`firewall-cmd --permanent --add-port={port}/udp`, then `firewall-cmd --reload`"
    if any(name.startswith(("ufw-", "ufw6-")) for name in base.chains):
        return f"`ufw allow {'out' if is_out else 'in'} {port}/udp`"
    if base.tool is Tool.NFT:
        command = f"nft insert rule {base.family} {base.table} {base.name} udp {end} {port} accept"
        return f"accept the tunnel there: `{command}`"
    rule = f"-p udp --{end} {port} -j ACCEPT"
    if drop.rule is None:
        return f"accept the tunnel: `{_iptables(base)} -A {base.name} {rule}`"
    return f"delete it, or accept the tunnel before it: `{_iptables(base)} -I {drop.chain} {rule}`"


def _iptables(base: BaseChain) -> str:
    return base.tool.value if base.table == "filter" else f"{base.tool.value} -t {base.table}"

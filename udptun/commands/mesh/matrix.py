"""The hosts of a mesh, and what each says of the way to each other one.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from udptun.commands.mesh.answer import Found, Peer, View
from udptun.commands.mesh.ask import Answer
from udptun.core.ip_text import ip_address, ip_network
from udptun.core.network_state import IPAddress, IPNetwork

MOST_HOSTS = 200
"""So many hosts a mesh has at most."""
MUCH_LOST = 2
"""From so many lost probes on a way loses packets: one alone may be chance."""


_NOTHING = Found()


class State(StrEnum):
    """Of the way from one host to another one, as the first one says."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """It has never answered a probe, or nobody probes."""
    MISSING = "missing"
    """The host has a view, and the other one is not in it."""
    NO_VIEW = "no view"
    """Nobody has heard what the host says."""


@dataclass(frozen=True, slots=True)
class Way:
    """`found` is of the family that is worse off.  `family`: which one that is, where both families differ."""

    state: State
    found: Found = _NOTHING
    family: str = ""

    @property
    def is_lossy(self) -> bool:
        return self.state is State.ALIVE and self.found.probes_lost >= MUCH_LOST

    @property
    def is_narrow(self) -> bool:
        return self.state is State.ALIVE and self.found.is_narrow


_NO_VIEW, _MISSING = Way(State.NO_VIEW), Way(State.MISSING)


@dataclass(frozen=True, slots=True)
class Host:
    """`number` is from 1, in the order of the subnets.  `view` None: it is not known, for `reason`.

    `is_wrong`: it has given an answer that is none.
    """

    number: int
    subnet: IPNetwork
    ipv6_subnet: IPNetwork | None
    public_ip: IPAddress
    is_udptun: bool
    is_self: bool = False
    view: View | None = None
    reason: str = ""
    took_s: float = 0.0
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Mesh:
    """`n_left_out`: so many more hosts there are.  `made_at`: Unix time.  `took_s`: how long all answers took.

    `port` 0: nobody was asked.  `ways` has a row for each host, with a place for each host; its own is None.
    """

    hosts: Sequence[Host]
    ways: Sequence[Sequence[Way | None]]
    n_left_out: int
    made_at: float
    took_s: float
    port: int

    def way(self, start: Host, end: Host) -> Way | None:
        """None: they are one."""
        return self.ways[start.number - 1][end.number - 1]

    @property
    def rtts_ms(self) -> list[float]:
        """Of all ways that are alive."""
        ways = (way for row in self.ways for way in row if way is not None and way.state is State.ALIVE)
        return [way.found.rtt_ms for way in ways if way.found.rtt_ms is not None]

    @property
    def viewers(self) -> list[Host]:
        """Those whose view is known."""
        return [host for host in self.hosts if host.view is not None]


def choose(own: View, wanted: Collection[str] = (), most: int = MOST_HOSTS) -> list[Peer]:
    """Which peers the mesh has, beside this host.  In trouble first, then by subnet; the result is by subnet.

    `wanted`: subnets, public addresses, or addresses of pods; with these no others.  Raises ValueError, which names it,
    for one that nobody has.
    """
    peers: Iterable[Peer] = own.peers
    if wanted:
        peers = {peer.subnet: peer for text in wanted for peer in _named(own, text)}.values()
    by_trouble = sorted(peers, key=lambda peer: (_worst(peer), _place(peer.subnet)))
    return sorted(by_trouble[: most - 1], key=lambda peer: _place(peer.subnet))


def build(
    own: View,
    peers: Sequence[Peer],
    answers: Mapping[IPNetwork, Answer],
    *,
    made_at: float,
    took_s: float,
    port: int,
    are_named: bool = False,
) -> Mesh:
    """The mesh of this host and these peers.  `answers` are by the peers' subnets.

    `are_named`: nobody has asked for more peers than these, so none is left out.
    """
    n_left_out = 0 if are_named else own.n_peers - len(peers)
    others = [_host(peer, answers.get(peer.subnet)) for peer in peers]
    here = Host(0, own.subnet, own.ipv6_subnet, own.public_ip, is_udptun=True, is_self=True, view=own)
    in_order = sorted([here, *others], key=lambda host: _place(host.subnet))
    hosts = [replace(host, number=number) for number, host in enumerate(in_order, 1)]
    return Mesh(hosts, [_row(host, hosts) for host in hosts], n_left_out, made_at, took_s, port)


def _host(peer: Peer, answer: Answer | None) -> Host:
    if answer is None:
        reason = "not asked" if peer.is_udptun else "flannel, which has no view to give"
        answer = Answer(None, reason)
    return Host(
        0,
        peer.subnet,
        peer.ipv6_subnet,
        peer.public_ip,
        peer.is_udptun,
        view=answer.view,
        reason=answer.reason,
        took_s=answer.took_s,
        is_wrong=answer.is_wrong,
    )


def _row(start: Host, hosts: Sequence[Host]) -> list[Way | None]:
    if start.view is None:
        return [None if end is start else _NO_VIEW for end in hosts]
    # Of a lease that one of two hosts can use by IPv6 alone it knows the IPv6 subnet alone.
    peers = {subnet: peer for peer in start.view.peers for subnet in (peer.ipv6_subnet, peer.subnet)}
    unknown = _MISSING if start.view.is_whole else _NO_VIEW

    def to(end: Host) -> Way:
        peer = peers.get(end.subnet) or (None if end.ipv6_subnet is None else peers.get(end.ipv6_subnet))
        return unknown if peer is None else _way(peer)

    return [None if end is start else to(end) for end in hosts]


def _way(peer: Peer) -> Way:
    if peer.ipv6 is None or _trouble(peer.ipv6) >= _trouble(peer.found):
        family = "" if peer.ipv6 is None or _trouble(peer.ipv6) == _trouble(peer.found) else f"IPv{peer.subnet.version}"
        return Way(State(peer.found.liveness or State.UNKNOWN), peer.found, family)
    return Way(State(peer.ipv6.liveness or State.UNKNOWN), peer.ipv6, "IPv6")


def _worst(peer: Peer) -> int:
    """By either family."""
    return min(_trouble(found) for found in (peer.found, peer.ipv6) if found is not None)


def _trouble(found: Found) -> int:
    """The smaller the worse."""
    if found.liveness == State.DEAD:
        return 0
    if found.probes_lost >= MUCH_LOST and found.liveness == State.ALIVE:
        return 1
    return 2 if found.is_narrow else 3


def _named(own: View, text: str) -> list[Peer]:
    """The peer that a subnet or an address names; none for this host itself.  Raises ValueError."""
    wanted = ip_network(text, strict=False)

    def is_it(subnets: Iterable[IPNetwork | None], public_ip: IPAddress) -> bool:
        if "/" in text:
            return wanted in subnets
        address = ip_address(text)
        return address == public_ip or any(address in subnet for subnet in subnets if subnet is not None)

    found = [peer for peer in own.peers if is_it((peer.subnet, peer.ipv6_subnet), peer.public_ip)]
    if not found and not is_it((own.subnet, own.ipv6_subnet), own.public_ip):
        raise ValueError(text)
    return found


def _place(subnet: IPNetwork) -> tuple[int, int]:
    return subnet.version, int(subnet.network_address)

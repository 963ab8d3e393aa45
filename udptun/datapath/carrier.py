"""Probes travel through the tunnel: the workers send them and hand the answers back."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from udptun._fastpath import LAYOUT
from udptun.core.echo import echo_request, min_length, parse_echo_reply
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.tunnel import IPV6_MTU_MIN
from udptun.datapath.rings import Punt, Result, Rings
from udptun.datapath.settings import OUTER_HEADERS
from udptun.datapath.sockets import believed_mtus
from udptun.datapath.stats import PeerTraffic
from udptun.datapath.tunnel import Tunnel
from udptun.kernel.netlink import Netlink
from udptun.probing.carrier import Fate, Take

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Injected:
    rings: Rings
    number: int

    def fate(self) -> Fate:
        injected = self.rings.injected(self.number)
        if injected is None:
            # Others have followed it, so the worker has handled it.
            return Fate(has_left=True)
        return Fate(injected.result is Result.DONE, injected.error == errno.EMSGSIZE, injected.time_ns)


class TunnelCarrier:
    """See `Carrier`.  Packets to dead peers are refused, and those that are too long for a path."""

    def __init__(self, tunnel: Tunnel) -> None:
        self.echo_id = random.SystemRandom().randrange(1, 1 << 16)
        """Of our echoes.  Two daemons that serve one after the other have different ones."""
        self.own_addresses: Mapping[int, IPAddress] = {}
        """The tunnel addresses that probes leave from, by IP version."""
        self._tunnel = tunnel
        self._traffic = PeerTraffic(tunnel.stats)
        self._is_narrow_changed = False

    def listen(self, take: Take) -> None:
        self._take_answer = take
        self._tunnel.rings.listen(self._take)

    def close(self) -> None:
        self._tunnel.rings.close()

    def obstacle(self) -> None:
        """There is none: what is injected waits for a worker."""

    def poll(self) -> None:
        for punt in self._tunnel.rings.take_punts():
            self._take(punt)

    def _take(self, punt: Punt) -> None:
        """An echo reply with our id.  One that is not ours goes to whom it is for: somebody may ping with that id."""
        echo = parse_echo_reply(punt.packet)
        is_ours = echo is not None and self._take_answer(echo.nonce, echo.source, punt.time_ns)
        if not is_ours and punt.length == len(punt.packet):
            self._tunnel.rings.inject(punt.packet, into_tun=True)

    def add(self, peer: IPNetwork) -> bool:
        """After it was added to the tunnel, whose table may be full."""
        return self._tunnel.table.index_of(peer) is not None

    def remove(self, peer: IPNetwork) -> None:
        self._tunnel.peers.set_dead(peer, is_dead=False)
        self._tunnel.peers.set_path_mtu(peer, None)

    def traffic(self) -> Mapping[IPNetwork, tuple[int, int]]:
        """What a follower sends and gets is its leader's (`peer_entries.py`)."""
        table, leader = self._tunnel.table, self._tunnel.peers.leader
        found: dict[IPNetwork, tuple[int, int]] = {}
        for index, (n_sent, n_received) in self._traffic.look(table.top).items():
            if (subnet := table.subnet_at(index)) is not None:
                peer = leader(subnet)
                n_sent_before, n_received_before = found.get(peer, (0, 0))
                found[peer] = n_sent_before + n_sent, n_received_before + n_received
        return found

    def send(self, address: IPAddress, nonce: bytes, length: int) -> _Injected | None:
        length = max(length, min_length(address))
        source = self.own_addresses[address.version]
        number = self._tunnel.rings.inject(echo_request(source, address, self.echo_id, 0, nonce, length), length)
        return None if number is None else _Injected(self._tunnel.rings, number)

    def set_dead(self, peer: IPNetwork, *, is_dead: bool) -> None:
        self._tunnel.peers.set_dead(peer, is_dead=is_dead)

    def set_path_mtu(self, peer: IPNetwork, mtu: int) -> None:
        self._tunnel.peers.set_path_mtu(peer, mtu)
        self._is_narrow_changed = True

    def believed_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        found: dict[IPAddress, int] = {}
        for family in Family:
            of_family = [host for host in hosts if host.version == family.value]
            if of_family and (source := self._tunnel.where.of(family)) is not None:
                found |= believed_mtus(source, of_family)
        return {host: mtu - self._around(host) for host, mtu in found.items()}

    async def route_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        try:
            async with Netlink() as kernel:
                routes = await kernel.routes_to(hosts, as_configured=True)
        except KernelError as exc:
            log.warning("%s", exc)
            return {}
        return {host: route.mtu - self._around(host) for host, route in routes.items() if route.mtu is not None}

    def _around(self, host: IPAddress) -> int:
        """How many bytes there are around an inner packet to a host."""
        return OUTER_HEADERS[host.version] + (LAYOUT["prefix"] if self._tunnel.table.vtep else 0)

    async def publish(self) -> None:
        await self._tunnel.publish()
        if self._is_narrow_changed:
            self._is_narrow_changed = False
            self._tunnel.narrow_changed()

    def dead_line(self, host: str, since: str) -> str:
        return (
            f"{host} has answered and does not any more, nothing has come from it since {since}; packets to its pods "
            "are refused (host unreachable) until something does; is it up, and does the network between the two hosts "
            "carry the tunnel's datagrams?"
        )

    def narrow_line(self, host: str, mtu: int, full: int) -> str:
        device = self._tunnel.tun.name
        small = (
            f"; IPv6 packets of up to {IPV6_MTU_MIN} bytes, which every link has to take, go in fragments, and are "
            "lost where the path drops those"
        )
        return (
            f"the path to {host} takes packets of {mtu} bytes, {self._tunnel.peers.mtu - mtu} fewer than {device}; "
            f"longer ones are fragmented, or their senders told (fragmentation needed)"
            f"{small if mtu < IPV6_MTU_MIN and 6 in self.own_addresses else ''}; "
            f"have all hosts use a Backend.MTU that is {full - mtu} lower, or mend the path"
        )

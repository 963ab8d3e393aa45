"""`udptun trace` where a datapath carries the family: by its own checks, and the kernel's routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import NamedTuple

from udptun.control.running import Running
from udptun.control.trace.checks import DECAP, ENCAP, SEND, outcomes
from udptun.control.trace.ends import Document, counted, end_before, end_behind, published_peer, whose
from udptun.control.trace.kernel import KernelView
from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.trace_request import TraceRequest
from udptun.core.tunnel import IPV6_MTU_MIN
from udptun.datapath.judge import Judge
from udptun.datapath.settings import OUTER_HEADERS
from udptun.datapath.slot import PublishedPeer
from udptun.datapath.tunnel import Tunnel

_NOBODY = IPv4Address(0)
"""An outer source that is no host's."""
_VXLAN_PREFIX = 22
"""Bytes: VXLAN header 8, inner Ethernet header 14."""


class _Sender(NamedTuple):
    """Where a datagram may come from, and who that is."""

    who: str
    address: IPAddress
    port: int


class ByDatapath:
    """Of a family that a datapath carries."""

    def __init__(self, running: Running, packet: TraceRequest, kernel: KernelView, tunnel: Tunnel) -> None:
        self._packet, self._kernel, self._tunnel = packet, kernel, tunnel
        self._table = tunnel.table
        self._judge = Judge(tunnel.table, tunnel.stats)
        forwarding = running.forwarding
        self._device = forwarding.device(packet.family) if packet.family in forwarding.families else None
        self._own = running.membership.own.subnets.of(packet.family)

    def is_leased_by_peer(self, address: IPAddress) -> bool:
        return self._table.peer_of(address) is not None

    async def outgoing(self) -> Document:
        way = await self._kernel.from_here(self._packet, self._device)
        document = {"kernel": way.document()}
        if end := end_before(way, self._device):
            return {**document, **end}
        packet = way.packet
        said = self._judge.encap(packet.packet())
        peer, counter, outer = said.peer, said.counter, None
        is_good = counter == "encap_sent"
        if is_good and peer is not None:
            counter, outer = await self._send(packet, peer)
        facts = {
            "encap_drop_ttl": f"it is {packet.ttl}",
            "encap_drop_no_route": "none does" if peer is None else whose(peer),
            "encap_drop_too_big": "" if peer is None else f"{packet.length} of {peer.mtu} bytes",
        }
        return {
            **document,
            "peer": published_peer(peer),
            "checks": outcomes(ENCAP, said.counter, facts) + outcomes((SEND,), counter, {}, is_reached=is_good),
            "outer": outer,
            "longer": None if peer is None else self._longer(packet, peer),
            "verdict": counted(counter),
        }

    async def _send(self, packet: TraceRequest, peer: PublishedPeer) -> tuple[str, Document]:
        """The counter of the kernel's answer, and the outer packet."""
        source = self._tunnel.where.of(Family(peer.address.version))
        length = packet.length + OUTER_HEADERS[peer.address.version]
        length += 0 if self._table.vtep is None else _VXLAN_PREFIX
        way = await self._kernel.of_datagram(source or peer.address, peer.address)
        is_longer = packet.length > peer.mtu or (way.mtu is not None and length > way.mtu)
        may_be_cut = packet.length <= IPV6_MTU_MIN if packet.family is Family.IPV6 else not packet.has_df
        counter = "encap_sent"
        if way.refusal:
            counter = "encap_drop_send"
        elif is_longer and not may_be_cut:
            counter = "encap_drop_too_big"
        return counter, {
            "source": None if source is None else str(source),
            "destination": str(peer.address),
            "port": peer.port,
            "bytes": length,
            "is_fragmented": is_longer and may_be_cut,
            "device": way.device,
            "gateway": way.document()["gateway"],
            "mtu": way.mtu,
            "refusal": way.refusal or None,
        }

    def _longer(self, packet: TraceRequest, peer: PublishedPeer) -> Document | None:
        """Where packets end that are longer than the peer's path takes; None: there are none."""
        than = peer.mtu if packet.family is Family.IPV4 else max(peer.mtu, IPV6_MTU_MIN)
        if than >= 65535:
            return None
        counters = [
            self._judge.encap(packet.with_length(than + 1, has_df=has_df).packet()).counter for has_df in (True, False)
        ]
        return {"than": than, "with_df": counters[0], "without_df": counters[1]}

    async def arriving(self) -> Document:
        packet, senders = self._packet, self._senders()
        said = [self._judge.decap(packet.packet(), it.address, it.port) for it in senders]
        counter, peer = said[0].counter, said[0].peer
        facts = {
            "decap_drop_unknown_peer": "" if senders[0].address == _NOBODY else str(senders[0].address),
            "decap_drop_source_spoofed": "no host leases it" if peer is None else whose(peer),
            "decap_drop_foreign_destination": f"that is {self._own}",
            "decap_drop_ttl": f"it is {packet.ttl}",
            "decap_drop_oversize": f"{packet.length} of {self._table.published['mtu']} bytes",
        }
        document = {
            "peer": published_peer(peer),
            "checks": outcomes(DECAP, counter, facts),
            "senders": [
                {
                    "who": it.who,
                    "address": None if it.address == _NOBODY else str(it.address),
                    "port": it.port or None,
                    "counter": verdict.counter,
                }
                for it, verdict in zip(senders, said, strict=True)
            ],
            "verdict": counted(counter),
        }
        if counter != "decap_delivered":
            return document
        way = await self._kernel.from_tunnel(replace(packet, ttl=packet.ttl - 1), self._device)
        return {**document, "kernel": way.document(), **end_behind(way, self._device, counter)}

    def _senders(self) -> Sequence[_Sender]:
        """Where datagrams with the packet may come from; the first one is asked about."""
        asked = self._packet
        found = []
        if asked.outer is not None:
            found.append(_Sender("as given", asked.outer, asked.outer_port or self._tunnel.where.port))
        peer = self._leasing(asked.source)
        if peer is not None:
            found.append(_Sender("the host that leases the source", peer.address, peer.port))
            found += [
                _Sender("where that host was found to send from", address, port)
                for address, port in self._table.learned(peer.subnet).items()
            ]
        for subnet in self._table.subnets:
            other = self._published(self._table.index_of(subnet))
            if other is not None and (peer is None or other.address != peer.address):
                found.append(_Sender("another host" if peer else "any host", other.address, other.port))
                break
        return [*found, _Sender("anybody else", _NOBODY, 0)]

    def _leasing(self, address: IPAddress) -> PublishedPeer | None:
        found = self._table.peer_of(address)
        return None if found is None else self._published(self._table.index_of(found[0]))

    def _published(self, index: int | None) -> PublishedPeer | None:
        return None if index is None else self._table.published.peer(index)

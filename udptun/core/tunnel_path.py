"""Where the tunnel's own datagrams pass on this host.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from udptun.core.family import Family
from udptun.core.network_state import IPAddress


@dataclass(frozen=True, slots=True)
class TunnelPath:
    """Of one address family of the underlay.

    Peers send to `port` of `address`, and their datagrams come in by `link`; None: by any, or it is not known.
    `peers` are the addresses of some peers, and `peer_port` is the UDP port of all of them; None: they differ.
    `looks_answered`: a datagram from a peer may look like the answer to one of ours, for a firewall that remembers
    what has left, as both go between the same two ports.  `is_sent_back`: we send to `peer_port` of theirs, too.
    """

    link: str | None
    address: IPAddress
    port: int
    peers: tuple[IPAddress, ...]
    peer_port: int | None
    looks_answered: bool
    is_sent_back: bool = True

    @classmethod
    def to_peers(
        cls,
        link: str | None,
        address: IPAddress,
        port: int,
        ends: Iterable[tuple[IPAddress, int]],
        looks_answered: bool,
    ) -> Self:
        """`ends`: addresses and ports of the peers; several may have one address."""
        ends = list(ends)
        peers = tuple(dict.fromkeys(peer for peer, _ in ends))
        ports = {peer_port for _, peer_port in ends}
        return cls(link, address, port, peers, ports.pop() if len(ports) == 1 else None, looks_answered)

    @property
    def family(self) -> Family:
        return Family(self.address.version)

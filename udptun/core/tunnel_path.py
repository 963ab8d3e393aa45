"""Where the tunnel's own datagrams pass on this host.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from udptun.core.family import Family
from udptun.core.network_state import IPAddress


@dataclass(frozen=True, slots=True)
class TunnelPath:
    """Of one address family of the underlay.

    Peers send to `port` of `address`, and their datagrams come in by `link`; None: by any, or it is not known.
    `peers` are the addresses of some peers, and `peer_port` is the UDP port of all of them; None: they differ.
    `looks_answered`: a datagram from a peer may look like the answer to one of ours, for a firewall that remembers
    what has left, as both go between the same two ports.
    """

    link: str | None
    address: IPAddress
    port: int
    peers: tuple[IPAddress, ...]
    peer_port: int | None
    looks_answered: bool

    @property
    def family(self) -> Family:
        return Family(self.address.version)

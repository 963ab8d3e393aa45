"""What the prober needs of whatever carries the packets to the peers.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from udptun.core.network_state import IPAddress, IPNetwork

Take = Callable[[bytes, IPAddress, int], bool]
"""Is given the nonce of an answer, its source, and when it came (ns, CLOCK_MONOTONIC).  False: it is none of ours."""


@dataclass(frozen=True, slots=True)
class Target:
    """A peer to probe.

    `address` is asked, and answers.  `host`: the PublicIP of its host.  `place`: where that is, for people.  `remote`:
    what else makes it another peer when it changes.  `less`: so many bytes fewer than the device allows packets to it
    may have, because more headers are put around them.
    """

    address: IPAddress
    host: IPAddress
    place: str
    remote: Hashable = None
    less: int = 0

    @property
    def identity(self) -> str:
        """Tells a peer from another one that has its subnet later."""
        return f"{self.address} at {self.place}"


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a probe on this host.

    `is_too_long`: it was refused for its length.  `at_ns`: when it left (CLOCK_MONOTONIC); None: that is not known.
    """

    has_left: bool
    is_too_long: bool = False
    at_ns: int | None = None


class Sent(Protocol):
    """A probe that was handed over."""

    def fate(self) -> Fate: ...


class Carrier(Protocol):
    """Sends echo requests the way that packets to the peers take, and obeys what comes of them."""

    def listen(self, take: Take) -> None:
        """Call `take` in this event loop for each answer, until `close`."""

    def close(self) -> None:
        """Listen no more."""

    def obstacle(self) -> str | None:
        """Why no probes can be sent now, with a remedy; None: they can.  Asked before each look."""

    def poll(self) -> None:
        """Hand over what has come by now, as `listen` does."""

    def add(self, peer: IPNetwork) -> bool:
        """Whether packets to the peer are carried, so that it can be probed."""

    def remove(self, peer: IPNetwork) -> None:
        """Forget the peer, and all that was set for it."""

    def traffic(self) -> Mapping[IPNetwork, tuple[int, int]]:
        """Packets sent to peers and received from them since the last time, without our probes and their answers."""

    def send(self, address: IPAddress, nonce: bytes, length: int) -> Sent | None:
        """Send an echo request with DF, `length` bytes with its IP header; None: there is no room for it now."""

    def set_dead(self, peer: IPNetwork, *, is_dead: bool) -> None:
        """A peer was found dead, or alive again; it takes effect with `publish`."""

    def set_path_mtu(self, peer: IPNetwork, mtu: int) -> None:
        """Packets to the peer may be `mtu` bytes long; it takes effect with `publish`."""

    def believed_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        """How long packets to peers on these hosts may be, as the kernel believes; those without a path are left out.

        Nothing, when the kernel itself keeps packets so short.
        """

    async def route_mtus(self, hosts: Collection[IPAddress]) -> Mapping[IPAddress, int]:
        """Likewise by the `mtu` of the route to each host; those without one are left out."""

    async def publish(self) -> None: ...

    def dead_line(self, host: str, since: str) -> str:
        """The problem of a dead host; `host` names it, `since` is when it was last heard."""

    def narrow_line(self, host: str, mtu: int, full: int) -> str:
        """The problem of a path that takes packets of `mtu` bytes and not of `full`, which pods may send."""

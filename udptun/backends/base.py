"""What a backend wants of the kernel, as data.  Pure; the reconciler makes it so and keeps it so."""

from __future__ import annotations

from dataclasses import dataclass

from udptun.netstate import IPAddress, IPNetwork, Route, RouteType


@dataclass(frozen=True, slots=True)
class Sysctl:
    """One setting, named by its path below /proc/sys.

    `is_optional`: the host does well without it (its file may be missing, or read-only in a container).
    """

    path: str
    value: str
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class DesiredLink:
    """A device that is up, with this MTU in bytes and room for at least `min_tx_queue_len` packets.

    Everything on it is ours: an address that is not desired is removed.
    """

    name: str
    mtu: int
    min_tx_queue_len: int
    sysctls: tuple[Sysctl, ...] = ()


@dataclass(frozen=True, slots=True)
class DesiredAddress:
    link: str
    ip: IPAddress
    prefixlen: int


@dataclass(frozen=True, slots=True)
class DesiredRoute:
    """A route of the main table, through `link`, or through none (`unreachable`)."""

    dst: IPNetwork
    link: str | None = None
    type: RouteType = RouteType.UNICAST
    metric: int = 0

    def on(self, oif: int | None) -> Route:
        """The route itself, once the link's index is known."""
        return Route(self.dst, oif=oif, type=self.type, metric=self.metric)


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All that a backend wants.  Whatever else carries our mark is a leftover."""

    links: tuple[DesiredLink, ...] = ()
    addresses: tuple[DesiredAddress, ...] = ()
    routes: tuple[DesiredRoute, ...] = ()

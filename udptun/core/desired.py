"""What the kernel shall have, as values: links, addresses, routes, neighbours, fdb entries, sysctls.  Pure.

A backend says it (`backends/`).  The reconciler makes it so and keeps it so (`kernel/reconcile/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network

from udptun.core.network_state import IPAddress, IPNetwork, Route, RouteType, Vxlan

WORST_METRIC = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Sysctl:
    """One setting, named by its path below /proc/sys.

    Packets flow without any of them: in a container that is not privileged, /proc/sys is read-only.  `without` says in
    words what is then the case instead.  A setting whose file is missing, as IPv6's may be, has nothing to act on.
    """

    path: str
    value: str
    without: str


@dataclass(frozen=True, slots=True)
class DesiredLink:
    """A device that is up, with this MTU in bytes and room for at least `min_tx_queue_len` packets.

    With `vxlan` it is a VXLAN device with this `mac`; one that differs in `vxlan` is deleted and created anew.
    Without, it is the TUN device of the datapath, which brings it back.  Everything on the device is ours.  Addresses
    that are not desired are removed.  On a VXLAN device the same holds for routes, permanent neighbours and permanent
    fdb entries.
    """

    name: str
    mtu: int
    min_tx_queue_len: int
    sysctls: tuple[Sysctl, ...] = ()
    vxlan: Vxlan | None = None
    mac: str = ""


@dataclass(frozen=True, slots=True)
class DesiredAddress:
    """An address on a desired link."""

    link: str
    ip: IPAddress
    prefixlen: int


@dataclass(frozen=True, slots=True)
class DesiredRoute:
    """A route of the main table.

    It leads through the desired link `link`, through any link by its index `oif`, or nowhere (`type`).
    `onlink`: see `Route`.
    """

    dst: IPNetwork
    link: str | None = None
    type: RouteType = RouteType.UNICAST
    metric: int = 0
    gateway: IPAddress | None = None
    onlink: bool = False
    oif: int | None = None

    def on(self, oif: int | None) -> Route:
        """The route itself, now that the link's index is known."""
        return Route(self.dst, self.gateway, oif, type=self.type, metric=self.metric, onlink=self.onlink)


def guard(network: IPv4Network) -> DesiredRoute:
    """A route that refuses packets to `network` when no better route is left.

    A device that is down or gone has no routes.  The guard then keeps pod packets from following the default route in
    clear text.
    """
    return DesiredRoute(network, type=RouteType.UNREACHABLE, metric=WORST_METRIC)


def blackhole(own_subnet: IPv4Network) -> DesiredRoute:
    """A route that swallows packets to our own pods while there is no bridge, which would go in circles without it.

    flannel gives it metric 0.  The kernel refuses such a route beside the one of cni0.  When the blackhole is there
    first, the kernel prefers it to the one of cni0, and no pod of the host is reached.
    """
    return DesiredRoute(own_subnet, type=RouteType.BLACKHOLE, metric=WORST_METRIC)


@dataclass(frozen=True, slots=True)
class DesiredNeighbour:
    """A permanent neighbour on a VXLAN link."""

    link: str
    ip: IPAddress
    mac: str


@dataclass(frozen=True, slots=True)
class DesiredFdb:
    """A permanent forwarding entry of a VXLAN link."""

    link: str
    mac: str
    dst: IPAddress


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All that the kernel shall have of a backend.  Everything else that carries our mark is a leftover."""

    links: tuple[DesiredLink, ...] = ()
    addresses: tuple[DesiredAddress, ...] = ()
    routes: tuple[DesiredRoute, ...] = ()
    neighbours: tuple[DesiredNeighbour, ...] = ()
    fdb: tuple[DesiredFdb, ...] = ()

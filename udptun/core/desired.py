"""What the kernel shall have, as values: links, addresses, routes, neighbours, fdb entries, sysctls.  Pure.

A backend says it (`backends/`), the reconciler makes it so and keeps it so (`kernel/reconcile/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network

from udptun.core.network_state import IPAddress, IPNetwork, Route, RouteType, Vxlan

_WORST_METRIC = 0xFFFFFFFF


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

    With `vxlan` it is made so, and made anew when it differs, and has this `mac`; without, it is the datapath's, which
    brings it back.  Everything on it is ours: an address that is not desired is removed, and so are, of a VXLAN device,
    routes, permanent neighbours and permanent fdb entries.
    """

    name: str
    mtu: int
    min_tx_queue_len: int
    sysctls: tuple[Sysctl, ...] = ()
    vxlan: Vxlan | None = None
    mac: str = ""


@dataclass(frozen=True, slots=True)
class DesiredAddress:
    link: str
    ip: IPAddress
    prefixlen: int


@dataclass(frozen=True, slots=True)
class DesiredRoute:
    """A route of the main table: through `link`, a desired one; through the link `oif`, whoever's; or `unreachable`.

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
        """The route itself, once the link's index is known."""
        return Route(self.dst, self.gateway, oif, type=self.type, metric=self.metric, onlink=self.onlink)


def guard(network: IPv4Network) -> DesiredRoute:
    """Refuses packets to `network` when no better route is left.

    When a device is down or gone its routes go with it; this one then keeps pod packets from following the default
    route in clear text.
    """
    return DesiredRoute(network, type=RouteType.UNREACHABLE, metric=_WORST_METRIC)


def blackhole(own_subnet: IPv4Network) -> DesiredRoute:
    """Swallows packets to our own pods while there is no bridge for them, which would go round in circles otherwise.

    flannel gives it metric 0.  Beside cni0's route the kernel refuses that, and when it is there first the kernel
    prefers it to cni0's, and no pod of the host is reached.
    """
    return DesiredRoute(own_subnet, type=RouteType.BLACKHOLE, metric=_WORST_METRIC)


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
    """All that a backend wants.  Whatever else carries our mark is a leftover."""

    links: tuple[DesiredLink, ...] = ()
    addresses: tuple[DesiredAddress, ...] = ()
    routes: tuple[DesiredRoute, ...] = ()
    neighbours: tuple[DesiredNeighbour, ...] = ()
    fdb: tuple[DesiredFdb, ...] = ()

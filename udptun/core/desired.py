"""What the kernel shall have, as values: links, addresses, routes, neighbours, fdb entries, sysctls.  Pure.

A backend says it (`backends/`).  The reconciler makes it so and keeps it so (`kernel/reconcile/`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from udptun.core.network_state import IPAddress, IPNetwork, Route, RouteType, Vxlan

WORST_METRIC = 0xFFFFFFFF

_USUAL_IPV6_METRIC = 1024
"""What the kernel takes for an IPv6 route without a metric (IP6_RT_PRIO_USER)."""


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
    `onlink`: see `Route`.  `mtu` is that of the path in bytes, where it is smaller than the link's.
    """

    dst: IPNetwork
    link: str | None = None
    type: RouteType = RouteType.UNICAST
    metric: int = 0
    gateway: IPAddress | None = None
    onlink: bool = False
    oif: int | None = None
    mtu: int | None = None

    def on(self, oif: int | None) -> Route:
        """The route itself, now that the link's index is known."""
        metric = self.metric or (0 if self.dst.version == 4 else _USUAL_IPV6_METRIC)
        return Route(self.dst, self.gateway, oif, type=self.type, metric=metric, mtu=self.mtu, onlink=self.onlink)


def guard(prefix: IPNetwork) -> DesiredRoute:
    """A route that refuses packets to `prefix` when no better route is left.

    A device that is down or gone has no routes.  The guard then keeps pod packets from following a wider route, such as
    the default route, in clear text.
    """
    return DesiredRoute(prefix, type=RouteType.UNREACHABLE, metric=WORST_METRIC)


@dataclass(frozen=True, slots=True)
class Pods:
    """Where pods are or may be: their packets never follow another owner's route in clear text.

    `leasable` are the prefixes that hosts may lease.  Each is guarded as a whole, unless another owner has a route to
    all of it, other than a default route.  That route may reach hosts, so only what is leased is guarded then.
    `own_subnet` is ours and `leased` are the peers'; they are guarded in any case, also outside `leasable`.
    `link`: the desired link that all peers' packets go into; None: the peers have routes of their own.
    """

    network: IPNetwork
    leasable: tuple[IPNetwork, ...]
    own_subnet: IPNetwork
    leased: tuple[IPNetwork, ...]
    link: str | None = None
    longest: int = field(init=False, repr=False)
    """The longest prefix length of a subnet: no longer route leads to all of one."""

    def __post_init__(self) -> None:
        longest = max(subnet.prefixlen for subnet in (self.own_subnet, *self.leased))
        object.__setattr__(self, "longest", longest)

    def prefixes(self, others: Collection[IPNetwork], guarded: Collection[IPNetwork]) -> list[IPNetwork]:
        """What needs a guard besides `guarded`, where other owners' routes lead to `others`."""
        around = _Prefixes(others)
        whole = [prefix for prefix in self.leasable if around.longest(prefix, prefix.prefixlen) == 0]
        covers = _Prefixes([*whole, *guarded])
        # Another owner's route of the same length comes before a guard, which has the worst metric.
        single = [
            subnet
            for subnet in self.leased
            if (cover := covers.longest(subnet, subnet.prefixlen)) == 0
            or around.longest(subnet, subnet.prefixlen) >= cover
        ]
        own = self.own_subnet
        if (cover := covers.longest(own, own.prefixlen)) == 0 or around.longest(own, own.prefixlen - 1) >= cover:
            single.append(own)
        return list(dict.fromkeys([*whole, *single]))


class _Prefixes:
    """A set of prefixes, asked for those that contain another one."""

    def __init__(self, prefixes: Iterable[IPNetwork]) -> None:
        self._firsts: dict[int, set[int]] = {}
        for prefix in prefixes:
            self._firsts.setdefault(prefix.prefixlen, set()).add(int(prefix.network_address))
        self._lengths = sorted(self._firsts, reverse=True)

    def longest(self, prefix: IPNetwork, at_most: int) -> int:
        """The length of the longest one that contains `prefix` and is no longer than `at_most`; 0: there is none."""
        first = int(prefix.network_address)
        for length in self._lengths:
            if length <= at_most and first & -(1 << prefix.max_prefixlen - length) in self._firsts[length]:
                return length
        return 0


def blackhole(own_subnet: IPNetwork) -> DesiredRoute:
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
    pods: Pods | None = None

    def routes_beside(self, others: Collection[IPNetwork]) -> tuple[DesiredRoute, ...]:
        """`routes`, and those that keep the packets of `pods` from other owners' routes, which lead to `others`."""
        pods = self.pods
        if pods is None:
            return self.routes
        refused = {route.dst for route in self.routes if route.type is not RouteType.UNICAST}
        prefixes = pods.prefixes(others, refused)
        guards = [guard(prefix) for prefix in prefixes if prefix not in refused]
        if pods.link is None:
            return (*guards, *self.routes)
        # The way to our own pods is not ours to say: it is that of their bridge.
        routed = {route.dst for route in self.routes if route.type is RouteType.UNICAST} | {pods.own_subnet}
        through = [DesiredRoute(prefix, pods.link) for prefix in prefixes if prefix not in routed]
        return (*guards, *self.routes, *through)

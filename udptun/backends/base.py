"""What a backend is, and what it wants of the kernel, as data.  Pure; the reconciler makes it so and keeps it so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

from udptun.config import SourceCheck
from udptun.datapath.settings import Remote, Settings, Vtep
from udptun.lease import Lease, LeaseAttrs
from udptun.netstate import IPAddress, IPNetwork, Route, RouteType, Vxlan
from udptun.offload import Offload
from udptun.underlay import Underlay

_WORST_METRIC = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Live:
    """What SIGHUP can change.  `mtu`: largest packet of a pod, bytes.  The rest is the userspace tunnel's alone."""

    mtu: int
    workers: int
    source_check: SourceCheck
    offload: Offload


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a backend decides from.

    `peers` are usable leases, disjoint and none of them our own.  `direct`: those PublicIPs that the kernel reaches
    without a gateway, each with the index of the link that leads there; filled in when `Backend.asks_direct`.
    """

    network: IPv4Network
    underlay: Underlay
    own_subnet: IPv4Network
    live: Live
    peers: Collection[Lease] = ()
    direct: Mapping[IPv4Address, int] = field(default_factory=dict)

    def settings(self, vtep: Vtep | None = None) -> Settings:
        """What the datapath is told of it; `vtep` as in `Settings`."""
        live = self.live
        return Settings(
            self.network,
            self.own_subnet,
            self.underlay.address,
            live.mtu,
            live.source_check,
            live.offload,
            vtep,
        )


class Encapsulation(Protocol):
    """What the datapath is told by a backend whose packets it carries."""

    @property
    def port(self) -> int:
        """The UDP port of its sockets."""

    @property
    def n_senders(self) -> int:
        """How many sockets of ports of their own its datagrams leave from; 0: from those that receive."""

    def settings(self, situation: Situation) -> Settings:
        """What holds for all packets; `peers` and `direct` have no part in it."""

    def remote(self, lease: Lease) -> Remote:
        """Where a peer is.  The lease is one that `Backend.refusal` has nothing against."""


class Backend(Protocol):
    """One way to carry packets: leases in, wishes out.  Knows values only, is made once a run, and never changes.

    Whoever drives it (`forwarding.py`) makes device and sockets before the lease, gives it every change of the peers
    and of the underlay as another `Situation`, and does what it says.
    """

    @property
    def type(self) -> str:
        """Its name, as `Backend.Type` has it."""

    @property
    def device(self) -> str | None:
        """The device that the pods' packets to other hosts go through; None: it makes none."""

    @property
    def overhead(self) -> int:
        """Bytes around each inner packet."""

    @property
    def encapsulation(self) -> Encapsulation | None:
        """What the datapath is to do; None: the kernel carries the packets, and there is no datapath."""

    @property
    def asks_direct(self) -> bool:
        """Whether `desired` depends on `Situation.direct`."""

    def attrs(self, underlay: Underlay, node_id: str) -> LeaseAttrs:
        """What our lease says.  Raises UdptunError when this host cannot be a peer of this kind."""

    def refusal(self, lease: Lease) -> str | None:
        """Why a valid lease, of whatever backend, is no peer of ours; None when it is one."""

    def links(self, underlay: Underlay, live: Live) -> tuple[DesiredLink, ...]:
        """The `links` of `desired`, which must be there before a lease is worth having."""

    def desired(self, situation: Situation) -> DesiredState:
        """What the kernel is to have, complete: whatever else carries our mark is a leftover."""


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

"""What a backend is, and what it wants of the kernel, as data.  Pure; the reconciler makes it so and keeps it so."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

from udptun.config import SourceCheck
from udptun.datapath.settings import Remote, Settings
from udptun.lease import Lease, LeaseAttrs
from udptun.netstate import IPAddress, IPNetwork, Route, RouteType
from udptun.offload import Offload
from udptun.underlay import Underlay


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

    `peers` are usable leases, disjoint and none of them our own.  `direct` holds those PublicIPs that the kernel
    reaches without a gateway; it is looked at when `Backend.asks_direct`.
    """

    network: IPv4Network
    underlay: Underlay
    own_subnet: IPv4Network
    live: Live
    peers: Collection[Lease] = ()
    direct: frozenset[IPv4Address] = frozenset()


class Encapsulation(Protocol):
    """What the datapath is told by a backend whose packets it carries."""

    @property
    def port(self) -> int:
        """The UDP port of its sockets."""

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

"""What a backend is: leases in, the desired state of the kernel and of the datapath out.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

from udptun.config.net_conf import SourceCheck
from udptun.core.desired import DesiredLink, DesiredState
from udptun.core.lease import Lease, LeaseAttrs
from udptun.core.offload import Offload
from udptun.datapath.settings import PacketSettings, Remote, Vtep
from udptun.kernel.underlay import Underlay


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What SIGHUP can change.  `mtu`: largest packet of a pod, bytes.  The rest is the userspace tunnel's alone."""

    mtu: int
    workers: int
    source_check: SourceCheck
    offload: Offload


@dataclass(frozen=True, slots=True)
class BackendInput:
    """All that a backend decides from.

    `peers` are usable leases, disjoint and none of them our own.  `direct`: those PublicIPs that the kernel reaches
    without a gateway, each with the index of the link that leads there; filled in when `Backend.asks_direct`.
    """

    network: IPv4Network
    underlay: Underlay
    own_subnet: IPv4Network
    live: LiveSettings
    peers: Collection[Lease] = ()
    direct: Mapping[IPv4Address, int] = field(default_factory=dict)

    def packet_settings(self, vtep: Vtep | None = None) -> PacketSettings:
        """What the datapath is told of it; `vtep` as in `PacketSettings`."""
        live = self.live
        return PacketSettings(
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

    def packet_settings(self, inputs: BackendInput) -> PacketSettings:
        """What holds for all packets; `peers` and `direct` have no part in it."""

    def remote(self, lease: Lease) -> Remote:
        """Where a peer is.  The lease is one that `Backend.refusal` has nothing against."""


class Backend(Protocol):
    """One way to carry packets: leases in, wishes out.  Knows values only, is made once a run, and never changes.

    Whoever drives it (`forwarding.py`) makes device and sockets before the lease, gives it every change of the peers
    and of the underlay as another `BackendInput`, and does what it says.
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
        """Whether `desired` depends on `BackendInput.direct`."""

    def attrs(self, underlay: Underlay, node_id: str) -> LeaseAttrs:
        """What our lease says.  Raises UdptunError when this host cannot be a peer of this kind."""

    def refusal(self, lease: Lease) -> str | None:
        """Why a valid lease, of whatever backend, is no peer of ours; None when it is one."""

    def links(self, underlay: Underlay, live: LiveSettings) -> tuple[DesiredLink, ...]:
        """The `links` of `desired`, which must be there before a lease is worth having."""

    def desired(self, inputs: BackendInput) -> DesiredState:
        """What the kernel is to have, complete: whatever else carries our mark is a leftover."""

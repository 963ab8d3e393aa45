"""What a backend is: leases in, the desired state of the kernel and of the datapath out.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Protocol

from udptun.config.go_json import boolean, choice, integer, key
from udptun.config.net_conf import BackendKeys, NetConf
from udptun.core.desired import DesiredLink, DesiredState, Pods
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, LeasePart
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.offload import ALL, Offload
from udptun.core.offload import parse as parse_offloads
from udptun.core.tunnel import MTU_MIN, UNDERLAY_MTUS, WORKERS, ShortcutMode, SourceCheck
from udptun.datapath.settings import PacketSettings, Remote, Vtep, Where
from udptun.kernel.underlay import Underlay


def _all_offloads_but(value: object) -> Offload:
    """Reads a JSON list of offloads' names; see `Reader`."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a list of offload names")
    return ALL & ~parse_offloads(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedKeys(BackendKeys):
    """The keys of a backend whose peers are probed."""

    probe: bool = key("Probe", boolean, True, is_live=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelKeys(ProbedKeys):
    """The keys of a backend that puts packets into UDP datagrams.

    `mtu` is the underlay's in bytes, None: the interface's.  `workers` None: `default_workers`.  `offload` is what may
    be used where the kernel grants it.
    """

    mtu: int | None = key("MTU", integer(UNDERLAY_MTUS, zero_is_unset=True), None, is_live=True)
    workers: int | None = key("Workers", integer(WORKERS), None, is_live=True)
    source_check: SourceCheck = key(
        "SourceCheck", choice({it.value: it for it in SourceCheck}), SourceCheck.PEER, is_live=True
    )
    offload: Offload = key("OffloadDisabled", _all_offloads_but, ALL, is_live=True)


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What SIGHUP can change.  All but the MTUs and `probe` concerns the userspace tunnel.

    `mtu` is the largest packet of a pod by the first family that is carried, bytes, and `ipv6_mtu` the largest of IPv6;
    None: none is carried.  Without `has_ipv4` none of IPv4 is.
    `probe`: whether the peers are probed.
    `source_ports`: how many ports datagrams leave from, where the peer takes any and nothing else forbids it.
    `carries_ecn`: whether every mark of congestion on what peers send can be carried on.
    `takes_shortcut`: whether our kernel takes what a peer's has encapsulated, which only our lease says.
    """

    mtu: int
    workers: int
    source_check: SourceCheck
    offload: Offload
    source_ports: int = 1
    probe: bool = True
    carries_ecn: bool = False
    ipv6_mtu: int | None = None
    has_ipv4: bool = True
    shortcut: ShortcutMode = ShortcutMode.OFF
    takes_shortcut: bool = False

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that are carried, IPv4 first."""
        return (Family.IPV4,) * self.has_ipv4 + (Family.IPV6,) * (self.ipv6_mtu is not None)

    @property
    def pod_mtu(self) -> int:
        """What fits whatever the family, for the devices of the pods, which have one MTU."""
        return self.mtu if self.ipv6_mtu is None else min(self.mtu, self.ipv6_mtu)

    def mtu_of(self, family: Family) -> int:
        mtu = self.mtu if family is Family.IPV4 else self.ipv6_mtu
        assert mtu is not None, f"{family} is not carried"
        return mtu


@dataclass(frozen=True, slots=True)
class BackendInput:
    """All that a backend decides from about one address family.

    `leasable`: see `SubnetPool`.  `peers` are usable leases, disjoint and none of them our own.  `direct` has the
    PublicIPs that the kernel reaches without a gateway, each with the index of the link that leads there.  It is filled
    in when `Backend.asks_direct`.
    """

    network: IPNetwork
    leasable: tuple[IPNetwork, ...]
    underlay: Underlay
    own_subnet: IPNetwork
    live: LiveSettings
    peers: Collection[Lease] = ()
    direct: Mapping[IPAddress, int] = field(default_factory=dict)
    family: Family = Family.IPV4

    @property
    def parts(self) -> Iterator[LeasePart]:
        """What the leases of `peers` say of the family, where each travels over its own."""
        return (lease.part(self.family) for lease in self.peers)

    def pods(self, leasable: tuple[IPNetwork, ...], link: str | None = None) -> Pods:
        """What is to be kept from other owners' routes; `leasable` and `link` as in `Pods`."""
        leased = tuple(lease.subnet_of(self.family) for lease in self.peers)
        return Pods(self.network, leasable, self.own_subnet, leased, link)


def packet_settings(inputs: Mapping[Family, BackendInput], where: Where, vtep: Vtep | None = None) -> PacketSettings:
    """What a datapath is told of all packets; `where` are its sockets, and `vtep` is as in `PacketSettings`.

    `inputs` are of the families that it carries.
    """
    ipv4, ipv6 = inputs.get(Family.IPV4), inputs.get(Family.IPV6)
    first = ipv4 or ipv6
    assert first is not None
    network, own = (None, None) if ipv4 is None else (ipv4.network, ipv4.own_subnet)
    network_ipv6, own_ipv6 = (None, None) if ipv6 is None else (ipv6.network, ipv6.own_subnet)
    assert network is None or isinstance(network, IPv4Network)
    assert own is None or isinstance(own, IPv4Network)
    assert network_ipv6 is None or isinstance(network_ipv6, IPv6Network)
    assert own_ipv6 is None or isinstance(own_ipv6, IPv6Network)
    return PacketSettings(
        network,
        own,
        where.address,
        first.live.mtu_of(first.family),
        first.live.source_check,
        first.live.offload,
        vtep,
        port=where.port,
        network_ipv6=network_ipv6,
        own_subnet_ipv6=own_ipv6,
    )


def mtu_for(underlay_mtu: int, overhead: int) -> int:
    """The largest inner IPv4 packet, bytes, that fits one outer packet with `overhead` bytes of headers around it.

    Raises ConfigError below 68, the smallest MTU IPv4 allows (RFC 791).
    """
    mtu = underlay_mtu - overhead
    if mtu < MTU_MIN:
        raise ConfigError(
            f"MTU: an underlay MTU of {underlay_mtu} leaves {mtu} bytes for the pods' packets; "
            f"IPv4 needs {MTU_MIN}, so the underlay needs {MTU_MIN + overhead}"
        )
    return mtu


def claimed(backend: Backend, conf: NetConf, family: Family = Family.IPV4) -> tuple[IPNetwork, ...]:
    """The prefixes in which no host's own address may lie: the tunnel's own datagrams would go into the tunnel."""
    pool = conf.pool(family)
    return (pool.network,) if backend.routes_network else pool.leasable


def check_underlay(backend: Backend, conf: NetConf, address: IPv4Address | None) -> None:
    """Raise ConfigError, with the ways out that there are, when the backend claims this host's IPv4 address."""
    if conf.ipv4 is None or address is None:
        return
    if not any(address in prefix for prefix in claimed(backend, conf)):
        return
    between = f"between SubnetMin ({conf.ipv4.subnet_min}) and SubnetMax ({conf.ipv4.subnet_max})"
    if not backend.routes_network:
        raise ConfigError(
            f"Network: this host's underlay address {address} lies {between}, where hosts lease their subnets; "
            "set SubnetMin and SubnetMax so that no host's own address lies between them, or choose another Network"
        )
    contains = f"Network: {conf.ipv4.network} contains this host's underlay address {address}"
    another = "choose a Network that no host's own address lies in"
    if any(address in prefix for prefix in conf.ipv4.leasable):
        raise ConfigError(f"{contains}; {another}")
    # Where the Type is vxlan, udp is what the kernel's lack of vxlan led to.
    is_fallback = conf.backend.type != backend.type
    ways = ['set Backend.Fallback to "vtep"' if is_fallback else "use Backend.Type vxlan or host-gw"]
    narrower = next(it for it in map(conf.ipv4.leasable[0].supernet, range(33)) if conf.ipv4.leasable[-1].subnet_of(it))
    if address not in narrower and narrower.prefixlen <= conf.ipv4.subnet_len - 2:
        ways.append(f"make Network {narrower}, which has all that hosts lease")
    raise ConfigError(
        f"{contains}; the {backend.type} backend leads all of Network into its device, not only what lies {between}: "
        f"{', '.join(ways)}, or {another}"
    )


class Encapsulation(Protocol):
    """What a datapath is told by a backend whose packets it carries."""

    @property
    def device(self) -> str:
        """The device whose packets it carries."""

    @property
    def families(self) -> frozenset[Family]:
        """What of the pods it can carry."""

    def where(self, underlay: Underlay) -> Where:
        """The addresses and the UDP port of its sockets."""

    def n_senders(self, underlay: Underlay, live: LiveSettings) -> int:
        """How many sockets, each with a port of its own, datagrams leave from to peers that take any source port.

        0: they leave from those that receive.
        """

    def packet_settings(self, inputs: Mapping[Family, BackendInput]) -> PacketSettings:
        """What holds for all packets, by the inputs of each of `families` that is carried.

        It does not depend on `peers` and `direct`.
        """

    def remote(self, lease: Lease) -> Remote:
        """Where a peer is.  `Backend.refusal` has accepted the lease."""


class OverSameFamily:
    """Of a backend whose packets of a family travel between addresses of that family alone."""

    needs_same_family = True

    def outer(self, attrs: LeaseAttrs, family: Family) -> Family:
        return family


class Backend(Protocol):
    """One way to carry packets: leases in, the desired state out.  It knows values only, and stays the same for a run.

    `control/forwarding.py` drives it: it makes device and sockets before the lease is claimed, gives the backend each
    change of the peers and of the underlay as another `BackendInput`, and does what the backend says.
    """

    @property
    def type(self) -> str:
        """Its name, as `Backend.Type` has it."""

    @property
    def summary(self) -> str:
        """How it carries packets, in a few words for people."""

    @property
    def overhead(self) -> int:
        """Bytes around each inner IPv4 packet."""

    @property
    def ipv6_overhead(self) -> int:
        """Bytes around each inner IPv6 packet."""

    @property
    def needs_same_family(self) -> bool:
        """Whether packets of a family travel between addresses of that family alone."""

    @property
    def encapsulations(self) -> Sequence[Encapsulation]:
        """What each datapath shall do, one for all families or one for each; none: the kernel carries the packets."""

    @property
    def ports(self) -> tuple[int, int] | None:
        """The UDP port that peers send to, and that of a peer whose lease names none; None: there are no datagrams."""

    @property
    def routes_network(self) -> bool:
        """Whether all of Network leads into its device, as with flannel's udp; otherwise what can be leased does."""

    @property
    def peer_types(self) -> frozenset[str]:
        """The BackendTypes of leases whose hosts reach ours; empty: it carries no packets, whatever a lease says."""

    @property
    def needs_backend_data(self) -> bool:
        """Whether a peer's lease has to say more of the peer than its PublicIP and port."""

    @property
    def asks_direct(self) -> bool:
        """Whether `desired` depends on `BackendInput.direct`."""

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        """What our lease says.  Raises UdptunError when this host cannot be a peer of this kind."""

    def outer(self, attrs: LeaseAttrs, family: Family) -> Family:
        """Between addresses of which family packets of `family` travel to a host whose lease says this."""

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        """Why a valid lease, of any backend, is not a peer of ours by that family; None when it is one."""

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[DesiredLink, ...]:
        """The `links` of `desired`.  They are made before the lease is claimed: a host without them needs none."""

    def desired(self, inputs: BackendInput) -> DesiredState:
        """All that the kernel shall have of the family.  Everything else of it that carries our mark is a leftover."""


def device_of(backend: Backend, underlay: Underlay, live: LiveSettings, family: Family) -> str | None:
    """The device that the pods' packets of that family to other hosts go through; None: there is none."""
    return next((link.name for link in backend.links(underlay, live, family)), None)

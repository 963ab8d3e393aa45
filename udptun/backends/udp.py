"""The udp backend: flannel's wire format through a TUN device (backend/udp/udp_network_amd64.go).  Pure.

IPv6 packets of the pods go through the same device and between the same addresses of the hosts, to hosts whose lease
says that they take them.  flannel's udp drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from udptun.backends.base import BackendInput, LiveSettings, TunnelKeys, packet_settings
from udptun.config.go_json import choice, integer, key
from udptun.core.desired import DesiredAddress, DesiredLink, DesiredRoute, DesiredState, Sysctl, guard
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs
from udptun.core.tunnel import AS_MANY_AS_WORKERS, PORTS, SOURCE_PORTS, ShortcutMode
from udptun.datapath.settings import OUTER_HEADERS, PacketSettings, Remote, Where
from udptun.kernel.underlay import Underlay

TUN_NAME = "flannel0"
"""The name of the device, unless it belongs to a daemon of ours for another Network.  flannel asks for `flannel%d`, and
gets flannel1 when a flannel0 is left over.  The route to Network then stays on flannel0, which nobody reads, and
traffic is lost in silence."""

_MIN_TX_QUEUE_LEN = 500
"""What the kernel gives a TUN device (TUN_READQ_SIZE).  Packets wait there while a dead datapath is replaced."""


def _source_ports(value: object) -> int:
    """Reads a number of ports, or "auto"; see `Reader`."""
    if isinstance(value, str) and value.lower() == "auto":
        return AS_MANY_AS_WORKERS
    if isinstance(value, int) and not isinstance(value, bool) and value in SOURCE_PORTS:
        return value
    raise ValueError(f'must be {SOURCE_PORTS.start}..{SOURCE_PORTS.stop - 1} or "auto"')


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpKeys(TunnelKeys):
    """`Backend` of Type udp.

    `own_port` is this host's port where --port sets another one.  It is not in net-conf.json, which is for all hosts.
    """

    type: ClassVar[str] = "udp"
    port: int = key("Port", integer(PORTS), 8285)
    source_ports: int = key("SourcePorts", _source_ports, 1, is_live=True)
    shortcut: ShortcutMode = key(
        "Shortcut", choice({it.value: it for it in ShortcutMode}), ShortcutMode.OFF, is_live=True
    )
    own_port: int | None = None


class Udp:
    """See `Backend`; it is its own `Encapsulation`."""

    type = UdpKeys.type
    summary = "userspace tunnel, flannel's udp wire format"
    families = frozenset(Family)
    needs_same_family = False
    routes_network = True
    peer_types = frozenset((UdpKeys.type, ""))
    needs_backend_data = False
    asks_direct = False

    def __init__(
        self,
        port: int,
        own_port: int | None = None,
        device: str = TUN_NAME,
        outer: frozenset[Family] = frozenset((Family.IPV4,)),
    ) -> None:
        """`port` is that of every peer whose lease names none, as flannel's.  It is ours too without an `own_port`.

        `outer`: the families of which this host has an address to send from.
        """
        self.device = device
        self._outer = [family for family in Family if family in outer]
        self.overhead = self.ipv6_overhead = OUTER_HEADERS[self._outer[0].value]
        self.port = own_port or port
        self._default_port = port
        self.ports = (self.port, port)

    @property
    def encapsulations(self) -> tuple[Udp]:
        return (self,)

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        """flannel's own udp leases have neither type nor data, and flannel ignores both in others."""
        data = {"Port": self.port, "NodeID": node_id, "Udptun": 1}
        if not underlay.is_behind_nat:
            data["AnySourcePort"] = True
        if live.carries_ecn:
            data["ECN"] = True
        if live.ipv6_mtu is not None:
            data["IPv6"] = True
        if live.takes_shortcut:
            data["Shortcut"] = True
        return LeaseAttrs(underlay.public_ip, underlay.public_ipv6, self.type, data)

    def outer(self, attrs: LeaseAttrs, family: Family) -> Family:
        """IPv4 where both hosts have it, else IPv6; where they have none in common that which the lease lacks."""
        return next((it for it in self._outer if attrs.address(it) is not None), self._outer[0])

    def where(self, underlay: Underlay) -> Where:
        beside = underlay.ipv6 if underlay.address is not None else None
        return Where(underlay.first_address, self.port, beside)

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        """By IPv4 every lease is accepted, as by flannel: any host that listens on the port is a peer.

        One of another type, which most likely does not listen, is named (`peer_types`).
        """
        if family is Family.IPV4 or lease.attrs.carries_ipv6:
            return None
        return "its host does not take IPv6 in Type udp: it runs flannel, an earlier udptun, or cannot carry IPv6"

    def n_senders(self, underlay: Underlay, live: LiveSettings) -> int:
        """None behind a NAT, which may let in only what answers a datagram that has left from our port."""
        return live.source_ports if live.source_ports > 1 and not underlay.is_behind_nat else 0

    def packet_settings(self, inputs: Mapping[Family, BackendInput]) -> PacketSettings:
        return packet_settings(inputs, self.where(next(iter(inputs.values())).underlay))

    def remote(self, lease: Lease) -> Remote:
        attrs = lease.attrs
        address = attrs.address(self.outer(attrs, Family.IPV4))
        assert address is not None
        return Remote(
            address,
            attrs.port(self._default_port),
            attrs.is_udptun,
            attrs.takes_any_source_port,
            carries_ecn=attrs.carries_ecn,
            takes_shortcut=attrs.takes_shortcut,
        )

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[DesiredLink]:
        """The device is the same for both families."""
        return (tun_link(self.device, live.mtu, with_ipv6=live.ipv6_mtu is not None),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        """The device with our subnet's first address, and the routes that lead Network into it.

        The address is a /32, as flannel's since 0.11.  With the length of Network the kernel would add a route and a
        broadcast address by itself.
        """
        network, own = inputs.network, inputs.own_subnet
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live),
            addresses=(DesiredAddress(self.device, own.network_address, own.max_prefixlen),),
            routes=(guard(network), DesiredRoute(network, self.device)),
            pods=inputs.pods((), self.device),
        )


def tun_link(name: str, mtu: int, *, with_ipv6: bool) -> DesiredLink:
    """The datapath's device `name`; `mtu` is the largest inner packet, bytes.  `with_ipv6`: it carries both families.
    """
    # Our ICMP errors come out of the device with our own address as their source.  Without this the kernel drops those
    # of IPv4 as martians (fib_validate_source).
    accept_local = Sysctl(
        f"net/ipv4/conf/{name}/accept_local",
        "1",
        "this host and its pods are not told of packets that are too big for the tunnel or have no peer",
    )
    solicits = "the kernel sends IPv6 router solicitations into the tunnel, which drops them"
    of_ipv6 = f"net/ipv6/conf/{name}"
    # Nobody answers neighbour discovery in the tunnel.  The device gets no link-local address (IN6_ADDR_GEN_MODE_NONE),
    # and the kernel solicits routers from such an address alone.  It must not get one when IPv6 is enabled, so that
    # comes last.
    ipv6 = (
        (
            Sysctl(f"{of_ipv6}/addr_gen_mode", "1", solicits),
            Sysctl(f"{of_ipv6}/accept_ra", "0", "this host takes IPv6 routes that a peer advertises in the tunnel"),
            Sysctl(f"{of_ipv6}/disable_ipv6", "0", "pods have no IPv6 to other hosts"),
        )
        if with_ipv6
        else (Sysctl(f"{of_ipv6}/disable_ipv6", "1", solicits),)
    )
    return DesiredLink(name, mtu, _MIN_TX_QUEUE_LEN, (accept_local, *ipv6))

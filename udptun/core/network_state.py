"""Links, addresses, routes, neighbours and fdb entries as values, of both address families.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

ROUTE_PROTOCOL = 158
"""Marks our routes (rtm_protocol).  Routing daemons choose values above RTPROT_STATIC.  This one is taken neither in
include/uapi/linux/rtnetlink.h, nor in rt_protos of iproute2, nor by FRR (186..198)."""

DEVICE_NAME = re.compile(r"flannel(\d+|(-v6)?\.\d+)")
"""The names of the devices that our backends create; flannel uses the same names."""

NUD_INCOMPLETE, NUD_REACHABLE, NUD_FAILED = 0x01, 0x02, 0x20
"""Neighbour states: the kernel is asking for the link-layer address, it has heard of the neighbour in the last minute,
and nobody has answered."""

NUD_PERMANENT = 0x80
"""Neighbour state (include/uapi/linux/neighbour.h): set by a program, never aged."""

MAIN_TABLE, LOCAL_TABLE = 254, 255


@dataclass(frozen=True, slots=True)
class TunFlags:
    """Properties of a TUN or TAP device."""

    is_tap: bool
    has_vnet_hdr: bool
    is_multi_queue: bool
    is_persistent: bool


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The properties of a VXLAN device that cannot be changed once it exists.

    `local` is the source address of its datagrams, `lower_index` the interface that they leave by; 0: any.
    """

    vni: int
    local: IPAddress | None
    lower_index: int
    port: int
    learning: bool
    gbp: bool
    group: IPAddress | None = None
    l2miss: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A network device.

    `kind` is the name of the driver ("tun", "veth", …), empty for hardware and lo.  `mtu` is in bytes, `tx_queue_len`
    in packets.  `tun` and `vxlan` are set for devices of that kind alone.  `mac` is empty where there is none.
    """

    index: int
    name: str
    kind: str
    mtu: int
    is_up: bool
    has_carrier: bool
    is_loopback: bool
    tx_queue_len: int
    tun: TunFlags | None = None
    vxlan: Vxlan | None = None
    mac: str = ""
    alias: str = ""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What to change of `link`; None leaves a setting as it is."""

    link: Link
    up: bool | None = None
    mtu: int | None = None
    tx_queue_len: int | None = None
    mac: str | None = None
    alias: str | None = None
    has_arp: bool | None = None

    def __str__(self) -> str:
        """As `ip link set` takes it."""
        words = [self.link.name]
        if self.up is not None:
            words.append("up" if self.up else "down")
        if self.mtu is not None:
            words.append(f"mtu {self.mtu}")
        if self.tx_queue_len is not None:
            words.append(f"txqueuelen {self.tx_queue_len}")
        if self.mac is not None:
            words.append(f"address {self.mac}")
        if self.alias is not None:
            words.append(f"alias '{self.alias}'")
        if self.has_arp is not None:
            words.append(f"arp {'on' if self.has_arp else 'off'}")
        return " ".join(words)


class Scope(IntEnum):
    """Scope of an address or a route (rt_scope)."""

    UNIVERSE = 0
    SITE = 200
    LINK = 253
    HOST = 254
    NOWHERE = 255


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a link.  `peer` is the other end of a point-to-point address, None elsewhere.

    `is_tentative`: the kernel still asks whether another host has it, or has found one.  Nobody can use it.
    """

    link_index: int
    ip: IPAddress
    prefixlen: int
    scope: int = Scope.UNIVERSE
    is_permanent: bool = True
    is_temporary: bool = False
    is_deprecated: bool = False
    is_tentative: bool = False
    peer: IPAddress | None = None


class RouteType(IntEnum):
    """The types of routes that udptun handles (rtm_type).  Other types stay plain numbers."""

    UNICAST = 1
    LOCAL = 2
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8


@dataclass(frozen=True, slots=True)
class Route:
    """A route.  Where there are several next hops, `oif` and `gateway` are those of the first.

    `metric` 0 is the best.  `mtu` is the route's own limit in bytes, None when it has none.
    """

    dst: IPNetwork
    gateway: IPAddress | None = None
    oif: int | None = None
    table: int = MAIN_TABLE
    protocol: int = ROUTE_PROTOCOL
    type: int = RouteType.UNICAST
    scope: int = Scope.UNIVERSE
    metric: int = 0
    prefsrc: IPAddress | None = None
    mtu: int | None = None
    onlink: bool = False
    """The kernel takes the gateway to be reachable through `oif`, whatever the addresses of that link are."""
    is_encapsulated: bool = False
    """The route puts packets into a tunnel of its own (`ip route … encap`)."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The MAC (`aa:bb:cc:dd:ee:ff`) that belongs to an address on the link."""

    link_index: int
    ip: IPAddress
    mac: str
    is_permanent: bool = True


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """The VTEP, `dst`, to which a VXLAN link sends frames for a MAC."""

    link_index: int
    mac: str
    dst: IPAddress
    is_permanent: bool = True


def socket_address(host: IPAddress | str, port: int) -> str:
    """`host:port`, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def describe_route(route: Route, link_names: Mapping[int, str] | None = None) -> str:
    """The route as `ip route` takes it.  A link that `link_names` does not know is called by its index."""
    words = [] if route.type == RouteType.UNICAST else [_type_name(route.type)]
    words.append(str(route.dst))
    if route.gateway is not None:
        family = "inet6 " if route.gateway.version != route.dst.version else ""
        words.append(f"via {family}{route.gateway}")
    if route.oif is not None:
        words.append(f"dev {(link_names or {}).get(route.oif, f'if{route.oif}')}")
    if route.onlink:
        words.append("onlink")
    if route.metric:
        words.append(f"metric {route.metric}")
    if route.mtu is not None:
        words.append(f"mtu {route.mtu}")
    words.append(f"proto {route.protocol}")
    return " ".join(words)


def _type_name(number: int) -> str:
    try:
        return RouteType(number).name.lower()
    except ValueError:
        return f"type {number}"

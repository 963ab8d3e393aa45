"""Links, addresses and routes as values: what the kernel has, and what it is asked for.  Pure.

IPv4 for now; the types take both families.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

ROUTE_PROTOCOL = 158
"""Marks our routes (rtm_protocol).  Values above RTPROT_STATIC are for routing daemons to choose; those of
include/uapi/linux/rtnetlink.h, of iproute2's rt_protos and of FRR (186..198) leave this one free."""

DEVICE_NAME = re.compile(r"flannel(0|\.\d+)")
"""The names of the devices that our backends make, and flannel's."""

MAIN_TABLE = 254


@dataclass(frozen=True, slots=True)
class TunFlags:
    """What the kernel says about a TUN or TAP device."""

    is_tap: bool
    has_vnet_hdr: bool
    is_multi_queue: bool
    is_persistent: bool


@dataclass(frozen=True, slots=True)
class Link:
    """`kind` is the driver's ("tun", "veth", …), empty for hardware and lo.  `tun` is set for "tun" alone."""

    index: int
    name: str
    kind: str
    mtu: int
    is_up: bool
    has_carrier: bool
    is_loopback: bool
    tx_queue_len: int
    tun: TunFlags | None = None


class Scope(IntEnum):
    """Scope of an address or a route (rt_scope)."""

    UNIVERSE = 0
    SITE = 200
    LINK = 253
    HOST = 254
    NOWHERE = 255


@dataclass(frozen=True, slots=True)
class Address:
    """`ip` is our end; `peer` the other end of a point-to-point address, None elsewhere."""

    link_index: int
    ip: IPAddress
    prefixlen: int
    scope: int = Scope.UNIVERSE
    is_permanent: bool = True
    is_temporary: bool = False
    is_deprecated: bool = False
    peer: IPAddress | None = None


class RouteType(IntEnum):
    """rtm_type, as far as udptun handles it; others stay plain numbers."""

    UNICAST = 1
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8


@dataclass(frozen=True, slots=True)
class Route:
    """A route.  `oif` and `gateway` are the first next hop's where there are several.

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

"""Routes, neighbours and fdb entries as rtnetlink messages, in both directions.  Pure.

A host has three of these for each peer, and there may be thousands of peers.  pyroute2 takes half a millisecond to
encode one of them, struct some microseconds.  The layouts are in include/uapi/linux/rtnetlink.h and neighbour.h.
Numbers are in host byte order, addresses in network byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from udptun.core.family import Family
from udptun.core.network_state import NUD_PERMANENT, FdbEntry, IPAddress, IPNetwork, Neighbour, Route, RouteType

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id."""
ERROR, DONE = 2, 3
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
F_REQUEST, F_ACK, F_DUMP_INTR, F_DUMP = 0x1, 0x4, 0x10, 0x300
F_REPLACE, F_EXCL, F_CREATE = 0x100, 0x200, 0x400
_F_CAPPED, _F_ACK_TLVS = 0x100, 0x200

_AF_INET, _AF_BRIDGE, _AF_INET6 = 2, 7, 10
AF = {Family.IPV4: _AF_INET, Family.IPV6: _AF_INET6}
"""The families as the kernel numbers them."""

_ATTRIBUTE = struct.Struct("=HH")
_ROUTE = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags."""
ROUTE_LEN = _ROUTE.size
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, ifindex, state, flags, type."""
_NEXT_HOP = struct.Struct("=HBBi")
"""struct rtnexthop: length, flags, hops, ifindex."""
_VIA = struct.Struct("=H")
"""struct rtvia: family; the address follows.  A gateway of another family than the route's stands in it."""
_U32, _I32 = struct.Struct("=I"), struct.Struct("=i")

RTA_DST, _RTA_SRC, _RTA_IIF, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 2, 3, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTAX_MTU = 8, 9, 15, 2
_RTA_VIA, _RTA_ENCAP_TYPE = 18, 21
_RTNH_F_ONLINK = 4
_RTM_F_FIB_MATCH = 0x2000
_RTPROT_KERNEL = 2
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_NTF_SELF = 2
_NOWHERE = (RouteType.BLACKHOLE, RouteType.UNREACHABLE, RouteType.PROHIBIT)
_NLMSGERR_ATTR_MSG = 1
_TYPE_MASK = 0x3FFF
"""Without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""


@dataclass(frozen=True, slots=True)
class Request:
    """One message without its header.  `operation` begins an error message: "cannot add route …"."""

    operation: str
    type: int
    flags: int
    body: bytes

    def encode(self, sequence: int) -> bytes:
        """The whole message.  The kernel answers it with an acknowledgement, or with a dump."""
        flags = self.flags | F_REQUEST | (0 if self.flags & F_DUMP == F_DUMP else F_ACK)
        return HEADER.pack(HEADER.size + len(self.body), self.type, flags, sequence, 0) + self.body


def add_route(route: Route) -> Request:
    """Add a route.  EEXIST when there is a route with this prefix and metric, ours or not: none is ever overwritten.

    The kernel's "replace" compares prefix and metric alone, and so would replace another owner's route.
    """
    return Request(f"cannot add route {route.dst}", NEWROUTE, F_CREATE | F_EXCL, _route_body(route))


def delete_route(route: Route) -> Request:
    """Delete the route with this prefix, metric, type, protocol and next hop.  No other owner's route can match."""
    return Request(f"cannot delete route {route.dst}", DELROUTE, 0, _route_body(route))


def dump_routes(family: Family, table: int, protocol: int) -> Request:
    """The routes of one table; unless `protocol` is 0, only those of that owner."""
    body = _ROUTE.pack(AF[family], 0, 0, 0, table, protocol, 0, 0, 0)
    return Request("cannot list routes", GETROUTE, F_DUMP, body)


def get_route(
    ip: IPAddress, *, as_configured: bool = False, source: IPAddress | None = None, from_link: int = 0
) -> Request:
    """How the kernel would send to `ip`.  `as_configured`: the route itself, without what ICMP has changed.

    `source`: what the packet has for one.  `from_link`: the index of the link that it has come from, which must be
    given for one that is not this host's own.
    """
    flags, bits = _RTM_F_FIB_MATCH if as_configured else 0, 8 * len(ip.packed)
    body = _ROUTE.pack(family_of(ip), bits, 0 if source is None else bits, 0, 0, 0, 0, 0, flags)
    body += attribute(RTA_DST, ip.packed)
    if source is not None:
        body += attribute(_RTA_SRC, source.packed)
    if from_link:
        body += attribute(_RTA_IIF, _U32.pack(from_link))
    return Request(f"no route to {ip}", GETROUTE, 0, body)


def set_neighbour(neighbour: Neighbour) -> Request:
    """Add a neighbour, or replace the one with this address."""
    operation = f"cannot set neighbour {neighbour.ip}"
    return Request(operation, NEWNEIGH, F_CREATE | F_REPLACE, _neighbour_body(neighbour))


def delete_neighbour(neighbour: Neighbour) -> Request:
    return Request(f"cannot delete neighbour {neighbour.ip}", DELNEIGH, 0, _neighbour_body(neighbour))


def set_fdb(entry: FdbEntry) -> Request:
    """Add a forwarding entry, or replace the one for this MAC."""
    return Request(f"cannot set fdb entry {entry.mac}", NEWNEIGH, F_CREATE | F_REPLACE, _fdb_body(entry))


def delete_fdb(entry: FdbEntry) -> Request:
    return Request(f"cannot delete fdb entry {entry.mac}", DELNEIGH, 0, _fdb_body(entry))


def dump_neighbours(link_index: int, family: Family) -> Request:
    """The neighbours on one link."""
    body = _NEIGHBOUR.pack(AF[family], 0, 0, 0, 0) + attribute(_NDA_IFINDEX, _U32.pack(link_index))
    return Request("cannot list neighbours", GETNEIGH, F_DUMP, body)


def dump_fdb(link_index: int) -> Request:
    """The forwarding entries of one VXLAN link."""
    return Request("cannot list fdb", GETNEIGH, F_DUMP, _NEIGHBOUR.pack(_AF_BRIDGE, link_index, 0, 0, 0))


def decode_route(body: bytes) -> Route:
    """The route in a message's body.  Of several next hops the first is taken."""
    family, dst_len, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
    found = dict(attributes(body, _ROUTE.size))
    hop = found
    if _RTA_MULTIPATH in found:
        length, flags, _, oif = _NEXT_HOP.unpack_from(found[_RTA_MULTIPATH])
        hop = dict(attributes(found[_RTA_MULTIPATH][:length], _NEXT_HOP.size))
        hop[_RTA_OIF] = _U32.pack(oif)
    metrics = dict(attributes(found.get(_RTA_METRICS, b""), 0))
    return Route(
        _network(family, found.get(RTA_DST), dst_len),
        _gateway(hop),
        # The kernel has IPv6 routes that lead nowhere lead through lo.
        None if kind in _NOWHERE else _u32(hop.get(_RTA_OIF)),
        _u32(found.get(_RTA_TABLE)) or table,
        protocol,
        kind,
        scope,
        _u32(found.get(_RTA_PRIORITY)) or 0,
        _address(found[_RTA_PREFSRC]) if _RTA_PREFSRC in found else None,
        _u32(metrics.get(_RTAX_MTU)),
        bool(flags & _RTNH_F_ONLINK),
        _RTA_ENCAP_TYPE in hop,
    )


def decode_local_route(body: bytes) -> IPNetwork | None:
    """The destination of a route, if it is of type local and not one that the kernel has made for an address.

    A host may have thousands of those.
    """
    family, dst_len, _, _, _, protocol, _, kind, _ = _ROUTE.unpack_from(body)
    if kind != RouteType.LOCAL or protocol == _RTPROT_KERNEL:
        return None
    first = dict(attributes(body, _ROUTE.size)).get(RTA_DST)
    if family == _AF_INET:
        return IPv4Network((first or bytes(4), dst_len))
    return IPv6Network((first or bytes(16), dst_len))


def decode_neighbour(body: bytes) -> Neighbour | None:
    """The neighbour in a message's body; None when it has no link-layer address (yet)."""
    _, link_index, state, _, _ = _NEIGHBOUR.unpack_from(body)
    found = dict(attributes(body, _NEIGHBOUR.size))
    if _NDA_DST not in found or len(found.get(_NDA_LLADDR, b"")) != 6:
        return None
    return Neighbour(link_index, _address(found[_NDA_DST]), found[_NDA_LLADDR].hex(":"), bool(state & NUD_PERMANENT))


def decode_neighbour_state(body: bytes) -> tuple[IPAddress | None, int]:
    """Whose neighbour entry a message's body is, and its NUD_* state, also without a link-layer address."""
    _, _, state, _, _ = _NEIGHBOUR.unpack_from(body)
    dst = dict(attributes(body, _NEIGHBOUR.size)).get(_NDA_DST)
    return (None if dst is None else _address(dst)), state


def decode_fdb_entry(body: bytes) -> FdbEntry | None:
    """The forwarding entry in a message's body; None when it does not lead to another VTEP."""
    _, link_index, state, _, _ = _NEIGHBOUR.unpack_from(body)
    found = dict(attributes(body, _NEIGHBOUR.size))
    if _NDA_DST not in found or len(found.get(_NDA_LLADDR, b"")) != 6:
        return None
    return FdbEntry(link_index, found[_NDA_LLADDR].hex(":"), _address(found[_NDA_DST]), bool(state & NUD_PERMANENT))


def decode_error(body: bytes, flags: int) -> tuple[int, str]:
    """errno (0: done) and the kernel's own sentence, from the body of an ERROR message."""
    (number,) = _I32.unpack_from(body)
    (echoed,) = _U32.unpack_from(body, _I32.size)
    start = _I32.size + (HEADER.size if flags & _F_CAPPED else echoed)
    return -number, _sentence(body, start) if number and flags & _F_ACK_TLVS else ""


def decode_done(body: bytes, flags: int) -> tuple[int, str]:
    """errno (0: complete) and the kernel's own sentence, from the body of a DONE message, the last one of a dump."""
    (number,) = _I32.unpack_from(body)
    return -number, _sentence(body, _I32.size) if number and flags & _F_ACK_TLVS else ""


def _sentence(body: bytes, start: int) -> str:
    text = dict(attributes(body, start)).get(_NLMSGERR_ATTR_MSG, b"")
    return text.rstrip(b"\0").decode(errors="replace")


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message in one datagram."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            return
        yield kind, flags, sequence, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _route_body(route: Route) -> bytes:
    dst = route.dst.network_address
    flags = _RTNH_F_ONLINK if route.onlink else 0
    parts = [
        _ROUTE.pack(
            family_of(dst),
            route.dst.prefixlen,
            0,
            0,
            route.table if route.table < 256 else 0,
            route.protocol,
            route.scope,
            route.type,
            flags,
        ),
        attribute(RTA_DST, dst.packed),
        attribute(_RTA_TABLE, _U32.pack(route.table)),
    ]
    if route.metric:
        parts.append(attribute(_RTA_PRIORITY, _U32.pack(route.metric)))
    if route.gateway is not None and route.gateway.version == dst.version:
        parts.append(attribute(_RTA_GATEWAY, route.gateway.packed))
    elif route.gateway is not None:
        parts.append(attribute(_RTA_VIA, _VIA.pack(family_of(route.gateway)) + route.gateway.packed))
    if route.oif is not None:
        parts.append(attribute(_RTA_OIF, _U32.pack(route.oif)))
    if route.prefsrc is not None:
        parts.append(attribute(_RTA_PREFSRC, route.prefsrc.packed))
    if route.mtu is not None:
        parts.append(attribute(_RTA_METRICS, attribute(_RTAX_MTU, _U32.pack(route.mtu))))
    return b"".join(parts)


def _neighbour_body(neighbour: Neighbour) -> bytes:
    head = _NEIGHBOUR.pack(family_of(neighbour.ip), neighbour.link_index, NUD_PERMANENT, 0, 0)
    mac = bytes.fromhex(neighbour.mac.replace(":", ""))
    return head + attribute(_NDA_DST, neighbour.ip.packed) + attribute(_NDA_LLADDR, mac)


def _fdb_body(entry: FdbEntry) -> bytes:
    head = _NEIGHBOUR.pack(_AF_BRIDGE, entry.link_index, NUD_PERMANENT, _NTF_SELF, 0)
    mac = bytes.fromhex(entry.mac.replace(":", ""))
    return head + attribute(_NDA_DST, entry.dst.packed) + attribute(_NDA_LLADDR, mac)


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def attributes(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute in a message's body, from `offset` on."""
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def family_of(ip: IPAddress) -> int:
    """AF_INET or AF_INET6."""
    return _AF_INET if ip.version == 4 else _AF_INET6


def _gateway(hop: Mapping[int, bytes]) -> IPAddress | None:
    if _RTA_GATEWAY in hop:
        return _address(hop[_RTA_GATEWAY])
    return _address(hop[_RTA_VIA][_VIA.size :]) if _RTA_VIA in hop else None


def _address(packed: bytes) -> IPAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _network(family: int, packed: bytes | None, length: int) -> IPNetwork:
    if family == _AF_INET:
        return IPv4Network((packed or bytes(4), length))
    return IPv6Network((packed or bytes(16), length))


def _u32(packed: bytes | None) -> int | None:
    return None if packed is None else int(_U32.unpack(packed)[0])

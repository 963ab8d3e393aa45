"""Links and addresses as rtnetlink messages, in both directions.  Opens no socket.

A host has few links and addresses.  A link has many properties that depend on its kind, and pyroute2 knows them all.
Routes, neighbours and fdb entries, of which each peer has some, are in rtnetlink.py: struct takes some microseconds for
a message, pyroute2 half a millisecond.  Addresses are read here with struct too: kube-proxy may add one a service.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from types import ModuleType
from typing import Any

from udptun.core.family import Family
from udptun.core.network_state import Address, IPAddress, Link, LinkSettings, TunFlags, Vxlan
from udptun.kernel.lean_import import import_without_init, stand_ins
from udptun.kernel.rtnetlink import AF, F_CREATE, F_DUMP, F_EXCL, HEADER, Request, attributes, family_of

# pyroute2 only mentions these three, for processes of its own that we do not have: 0.8 MB.
_multiprocessing = ModuleType("multiprocessing")
_multiprocessing.__dict__.update(Pipe=None, Queue=None, Process=None)
with stand_ins(_multiprocessing):
    import_without_init("pyroute2", "netlink.rtnl.ifinfmsg", "netlink.rtnl.ifaddrmsg")

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # noqa: E402

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22

_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP, _IFF_LOWER_UP = 0x1, 0x8, 0x80, 0x10000
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80
_IFA_F_OPTIMISTIC, _IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x04, 0x08, 0x40
_ADDRESS = struct.Struct("=BBBBi")
"""struct ifaddrmsg: family, prefixlen, flags, scope, index."""
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_U32 = struct.Struct("=I")
_IFF_TAP = 2
"""What IFLA_TUN_TYPE says of a TAP device."""

_Attributes = list[tuple[str, object]]


def dump_links() -> Request:
    """Every link."""
    return _request("cannot list links", GETLINK, F_DUMP, ifinfmsg())


def get_link(name: str) -> Request:
    """The link called `name`; ENODEV when there is none."""
    return _request(f"cannot look up link {name}", GETLINK, 0, ifinfmsg(), [("IFLA_IFNAME", name)])


def add_vxlan(name: str, vxlan: Vxlan, mac: str, mtu: int) -> Request:
    """Make a VXLAN device, still down.  EOPNOTSUPP: the kernel has no VXLAN."""
    data: _Attributes = [
        ("IFLA_VXLAN_ID", vxlan.vni),
        ("IFLA_VXLAN_LINK", vxlan.lower_index),
        ("IFLA_VXLAN_PORT", vxlan.port),
        ("IFLA_VXLAN_LEARNING", vxlan.learning),
    ]
    if vxlan.local is not None:
        name_of_local = "IFLA_VXLAN_LOCAL" if vxlan.local.version == 4 else "IFLA_VXLAN_LOCAL6"
        data.append((name_of_local, str(vxlan.local)))
    if vxlan.gbp:
        data.append(("IFLA_VXLAN_GBP", True))
    info: _Attributes = [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]
    attributes: _Attributes = [
        ("IFLA_IFNAME", name),
        ("IFLA_ADDRESS", mac),
        ("IFLA_MTU", mtu),
        ("IFLA_LINKINFO", {"attrs": info}),
    ]
    operation = f"cannot create {name} (vxlan id {vxlan.vni})"
    return _request(operation, NEWLINK, F_CREATE | F_EXCL, ifinfmsg(), attributes)


def add_pair(names: tuple[str, str], macs: tuple[str, str], mtu: int, n_queues: int) -> Request:
    """Make two devices of which each receives what the other one sends (veth), still down.

    The first one sends by so many queues, and the second one receives by them.
    """
    other: _Attributes = [
        ("IFLA_IFNAME", names[1]),
        ("IFLA_ADDRESS", macs[1]),
        ("IFLA_MTU", mtu),
        ("IFLA_NUM_TX_QUEUES", 1),
        ("IFLA_NUM_RX_QUEUES", n_queues),
    ]
    data: _Attributes = [("VETH_INFO_PEER", {"attrs": other})]
    info: _Attributes = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": data})]
    attributes: _Attributes = [
        ("IFLA_IFNAME", names[0]),
        ("IFLA_ADDRESS", macs[0]),
        ("IFLA_MTU", mtu),
        ("IFLA_NUM_TX_QUEUES", n_queues),
        ("IFLA_NUM_RX_QUEUES", 1),
        ("IFLA_LINKINFO", {"attrs": info}),
    ]
    return _request(f"cannot create {names[0]} and {names[1]}", NEWLINK, F_CREATE | F_EXCL, ifinfmsg(), attributes)


def set_link(settings: LinkSettings) -> Request:
    """Change the settings that are given, and leave the others."""
    message = ifinfmsg()
    message["index"] = settings.link.index
    flags = {_IFF_UP: settings.up, _IFF_NOARP: None if settings.has_arp is None else not settings.has_arp}
    message["flags"] = sum(flag for flag, is_set in flags.items() if is_set)
    message["change"] = sum(flag for flag, is_set in flags.items() if is_set is not None)
    attributes: _Attributes = [
        ("IFLA_MTU", settings.mtu),
        ("IFLA_TXQLEN", settings.tx_queue_len),
        ("IFLA_ADDRESS", settings.mac),
        ("IFLA_IFALIAS", settings.alias),
    ]
    given = [(name, value) for name, value in attributes if value is not None]
    return _request(f"cannot set link {settings}", NEWLINK, 0, message, given)


def delete_link(link: Link) -> Request:
    message = ifinfmsg()
    message["index"] = link.index
    return _request(f"cannot delete link {link.name}", DELLINK, 0, message)


def decode_link(body: bytes) -> Link:
    """The link in a message's body."""
    message = _decoded(ifinfmsg, NEWLINK, body)
    info = message.get("linkinfo")
    kind = str(info.get("kind") or "") if info is not None else ""
    data = info.get("data") if info is not None else None
    flags = message["flags"]
    return Link(
        message["index"],
        message.get("ifname"),
        kind,
        message.get("mtu") or 0,
        bool(flags & _IFF_UP),
        bool(flags & _IFF_LOWER_UP),
        bool(flags & _IFF_LOOPBACK),
        message.get("txqlen") or 0,
        _tun_flags(data) if kind == "tun" and data is not None else None,
        _vxlan(data) if kind == "vxlan" and data is not None else None,
        message.get("address") or "",
        message.get("ifalias") or "",
    )


def _tun_flags(data: Any) -> TunFlags:
    return TunFlags(
        data.get("tun_type") == _IFF_TAP,
        bool(data.get("tun_vnet_hdr")),
        bool(data.get("tun_multi_queue")),
        bool(data.get("tun_persist")),
    )


def _vxlan(data: Any) -> Vxlan:
    local = data.get("vxlan_local") or data.get("vxlan_local6")
    group = data.get("vxlan_group") or data.get("vxlan_group6")
    return Vxlan(
        data.get("vxlan_id"),
        None if local is None else ip_address(local),
        data.get("vxlan_link") or 0,
        # The kernel has the port in network byte order; pyroute2 converts it, in both directions.
        data.get("vxlan_port"),
        bool(data.get("vxlan_learning")),
        data.get("vxlan_gbp") is not None,
        None if group is None else ip_address(group),
        bool(data.get("vxlan_l2miss")),
    )


def dump_addresses(link_index: int, family: Family) -> Request:
    """The addresses of one link, or of all (0)."""
    message = ifaddrmsg()
    message["family"], message["index"] = AF[family], link_index
    return _request("cannot list addresses", GETADDR, F_DUMP, message)


def add_address(address: Address) -> Request:
    operation = f"cannot add {address.ip}/{address.prefixlen} to link {address.link_index}"
    message = _address_message(address)
    message["scope"] = int(address.scope)
    return _request(operation, NEWADDR, F_CREATE | F_EXCL, message, _address_attributes(address))


def delete_address(address: Address) -> Request:
    operation = f"cannot delete {address.ip}/{address.prefixlen} from link {address.link_index}"
    return _request(operation, DELADDR, 0, _address_message(address), _address_attributes(address))


def decode_address(body: bytes) -> Address:
    """The address in a message's body."""
    _, prefixlen, flags, scope, link_index = _ADDRESS.unpack_from(body)
    found = dict(attributes(body, _ADDRESS.size))
    # IFA_LOCAL is our end and IFA_ADDRESS the other one; IPv6 leaves IFA_LOCAL out unless they differ.
    other = ip_address(found.get(_IFA_ADDRESS) or found[_IFA_LOCAL])
    ip = ip_address(found[_IFA_LOCAL]) if _IFA_LOCAL in found else other
    if _IFA_FLAGS in found:
        (flags,) = _U32.unpack(found[_IFA_FLAGS])
    return Address(
        link_index,
        ip,
        prefixlen,
        scope,
        bool(flags & _IFA_F_PERMANENT),
        bool(flags & _IFA_F_TEMPORARY),
        bool(flags & _IFA_F_DEPRECATED),
        bool(flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED)) and not flags & _IFA_F_OPTIMISTIC,
        None if other == ip else other,
    )


def decode_local_address(body: bytes) -> IPAddress:
    """Our end of the address in a message's body, and nothing else: a host may have thousands.

    The kernel gives an IPv6 address without another end as IFA_ADDRESS alone.
    """
    found = dict(attributes(body, _ADDRESS.size))
    return ip_address(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS])


def _address_message(address: Address) -> Any:
    message = ifaddrmsg()
    message["family"] = family_of(address.ip)
    message["index"], message["prefixlen"] = address.link_index, address.prefixlen
    return message


def _address_attributes(address: Address) -> _Attributes:
    return [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.peer or address.ip))]


def _request(operation: str, kind: int, flags: int, message: Any, attributes: _Attributes | None = None) -> Request:
    message["attrs"] = attributes or []
    message.encode()
    # `Request.encode` writes the header.
    return Request(operation, kind, flags, bytes(message.data[HEADER.size :]))


def _decoded(form: Any, kind: int, body: bytes) -> Any:
    message = form(HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body)
    message.decode()
    return message

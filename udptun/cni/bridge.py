"""A bridge that still has the address of another subnet, which makes every ADD on it fail.

It is left when the host's subnet changes: after `kubeadm reset`, with another CNI before, with a new Network. Nothing
uses such a bridge while it has no ports, and then the address can go.

bridge does not mind an IPv6 address of another subnet. But the kernel has a route to that subnet by the bridge, and
packets for the host that has the subnet now would follow it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from udptun.cni.errors import FOREIGN_BRIDGE, IO_FAILURE, CniError

_DEFAULT_NAME = "cni0"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h, linux/if_addr.h
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 16, 18, 20, 21, 22
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_IFLA_IFNAME, _IFLA_MASTER = 3, 10
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence number, port."""
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
"""Family, prefix length, flags, scope, link."""
_EVERYWHERE = 0
"""RT_SCOPE_UNIVERSE: not link-local."""


def make_way(conf: dict[str, object], subnets: list[str]) -> str:
    """Take addresses of other subnets off the bridge that `conf` names, if it has no ports; say what was done.

    Raises CniError when it has ports and an IPv4 address is in bridge's way.
    """
    ours = [ipaddress.ip_network(subnet) for subnet in subnets]
    is_gateway = conf.get("isGateway") or conf.get("isDefaultGateway")
    if conf.get("type") != "bridge" or not is_gateway or conf.get("forceAddress") or not ours:
        return ""
    name = str(conf.get("bridge") or _DEFAULT_NAME)
    try:
        return _make_way(name, ours)
    except OSError as exc:
        raise CniError(IO_FAILURE, f"cannot look at the bridge {name}: {exc.strerror}") from exc


def _make_way(name: str, ours: list[_Network]) -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        links = _links(netlink)
        idx = next((idx for idx, (link, _) in links.items() if link == name), 0)
        foreign = [it for subnet in ours for it in _foreign(netlink, idx, subnet)] if idx else []
        ports = sorted(link for link, master in links.values() if master == idx)
        if ports and (in_the_way := [it for it in foreign if it[0].version == 4]):
            raise _in_use(name, _text(in_the_way), ours[0], ports)
        if ports or not foreign:
            return ""
        for address, length in foreign:
            _delete(netlink, idx, address, length)
    own = " and ".join(map(str, ours))
    return f"took {_text(foreign)} off {name}, which has no ports: this node's subnet is {own} now"


def _foreign(netlink: socket.socket, idx: int, ours: _Network) -> list[tuple[_Address, int]]:
    """The addresses of the link and of the family of `ours`, if none of them is of that subnet."""
    found = _addresses(netlink, idx, socket.AF_INET if ours.version == 4 else socket.AF_INET6)
    return [] if any(address in ours for address, _ in found) else found


def _text(addresses: list[tuple[_Address, int]]) -> str:
    return ", ".join(f"{address}/{length}" for address, length in addresses)


def _in_use(name: str, text: str, ours: _Network, ports: list[str]) -> CniError:
    shown = ", ".join(ports[:5]) + (f" and {len(ports) - 5} more" if len(ports) > 5 else "")
    return CniError(
        FOREIGN_BRIDGE,
        f'"{name}" already has an IP address different from this node\'s subnet {ours}: {text}',
        f"containers with addresses of the old subnet are attached to it ({shown}). Drain the node "
        f"(kubectl drain) or remove these containers; then the next ADD repairs {name}, or `ip link delete {name}`",
    )


def _links(netlink: socket.socket) -> dict[int, tuple[str, int]]:
    """Index -> name, index of the bridge that it is a port of (0: of none)."""
    found = {}
    for body in _dump(netlink, _RTM_GETLINK, _RTM_NEWLINK, _LINK.pack(0, 0, 0, 0, 0)):
        idx = _LINK.unpack_from(body)[2]
        attributes = _attributes(body[_LINK.size :])
        name = attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
        found[idx] = name, int.from_bytes(attributes.get(_IFLA_MASTER, b""), "little" if _IS_LITTLE else "big")
    return found


_IS_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _addresses(netlink: socket.socket, idx: int, wanted: int) -> list[tuple[_Address, int]]:
    """The addresses of the link that are of the address family `wanted`, each with its prefix length.

    Without link-local ones of IPv6, which each link has.
    """
    found: list[tuple[_Address, int]] = []
    for body in _dump(netlink, _RTM_GETADDR, _RTM_NEWADDR, _ADDRESS.pack(wanted, 0, 0, 0, 0)):
        family, length, _, scope, of = _ADDRESS.unpack_from(body)
        attributes = _attributes(body[_ADDRESS.size :])
        local = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        is_wanted = of == idx and family == wanted and (family == socket.AF_INET or scope == _EVERYWHERE)
        if is_wanted and local:
            found.append((ipaddress.ip_address(local), length))
    return found


def _delete(netlink: socket.socket, idx: int, address: _Address, length: int) -> None:
    """An address that another ADD has just taken off is no error."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    attribute = struct.pack("=HH", 4 + len(address.packed), _IFA_LOCAL) + address.packed
    body = _ADDRESS.pack(family, length, 0, 0, idx) + attribute
    _send(netlink, _RTM_DELADDR, _NLM_F_REQUEST | _NLM_F_ACK, body)
    for kind, answer in _messages(netlink.recv(1 << 16)):
        number = -struct.unpack_from("=i", answer)[0] if kind == _NLMSG_ERROR else 0
        if number not in (0, errno.EADDRNOTAVAIL):
            raise OSError(number, os.strerror(number))


def _send(netlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)


def _dump(netlink: socket.socket, request: int, kind: int, body: bytes) -> list[bytes]:
    _send(netlink, request, _NLM_F_REQUEST | _NLM_F_DUMP, body)
    found: list[bytes] = []
    while True:
        for got, answer in _messages(netlink.recv(1 << 17)):
            if got == _NLMSG_DONE:
                return found
            if got == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", answer)[0]
                raise OSError(number, os.strerror(number))
            if got == kind:
                found.append(answer)


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    """Type and body of each message."""
    found, offset = [], 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        found.append((kind, data[offset + _HEADER.size : offset + length]))
        offset += max(_HEADER.size, (length + 3) & ~3)
    return found


def _attributes(data: bytes) -> dict[int, bytes]:
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        found[kind] = data[offset + 4 : offset + length]
        offset += max(4, (length + 3) & ~3)
    return found

"""IPsec policies (xfrm): whether they mean the tunnel's own datagrams.

A socket's datagrams pass them, out and in.  What the kernel carries by the shortcut passes them by: it leaves in clear
text, and comes in where nothing but encrypted packets may.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network

from udptun.core.errors import KernelError
from udptun.core.tunnel_path import TunnelPath
from udptun.kernel.conversation import Conversation
from udptun.kernel.rtnetlink import F_DUMP, Request, attributes

# include/uapi/linux/xfrm.h and netlink.h
_NETLINK_XFRM = 6
_GETPOLICY, _GETDEFAULT = 0x15, 0x28
_POLICY_ID_LEN = 64
_ADDRESSES_AND_PORTS, _FAMILY_AND_REST = struct.Struct("!16s16s4H"), struct.Struct("=HBBB")
"""struct xfrm_selector: destination, source, their ports each with its mask; family, prefix lengths, protocol."""
_DIRECTION_AT, _ACTION_AT, _POLICY_LEN = 160, 161, 168
_DIRECTIONS = {0: "in", 1: "out"}
"""Those of forwarded packets and of single sockets are not about ours."""
_ALLOW, _TEMPLATE = 0, 5
_DEFAULT_BLOCK = 1
_AF_INET, _UDP = 2, 17
_ANY = IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, slots=True)
class Policy:
    """Over IPv4: forbids packets, or wants them encrypted.  `own` and `other` are the ends; `direction`: in, out.

    A port is a value and its mask: mask 0 is any.  `protocol` 0 is any.
    """

    direction: str
    own: IPv4Network
    other: IPv4Network
    protocol: int
    own_port: tuple[int, int]
    other_port: tuple[int, int]

    def is_of_ours(self, path: TunnelPath) -> bool:
        """Whether it means datagrams between us and somebody, the ports considered."""
        return (
            self.protocol in (0, _UDP)
            and path.address in self.own
            and _is_of(self.own_port, path.port)
            and (path.peer_port is None or _is_of(self.other_port, path.peer_port))
        )

    def __str__(self) -> str:
        ends = (self.own, self.other) if self.direction == "out" else (self.other, self.own)
        return f"the IPsec policy `src {ends[0]} dst {ends[1]} dir {self.direction}` covers packets of the tunnel"


async def read_policies() -> list[Policy]:
    """All that let not everything pass, those by default last.  Raises KernelError."""
    try:
        async with Conversation(_NETLINK_XFRM) as kernel:
            bodies = await kernel.dump(Request("cannot list IPsec policies", _GETPOLICY, F_DUMP, bytes(_POLICY_ID_LEN)))
            asked = Request("cannot read the default IPsec policies", _GETDEFAULT, 0, bytes(4))
            ((error, defaults),) = await kernel.ask([asked])
    except KernelError as exc:
        # The kernel has no IPsec, or nothing by which it could be set.
        if exc.errno == errno.EPROTONOSUPPORT:
            return []
        raise
    found = [it for it in map(decode_policy, bodies) if it is not None]
    # EINVAL: Linux before 5.15 has no defaults.
    if error is not None and error.errno != errno.EINVAL:
        raise error
    return [*found, *(it for body in defaults for it in _of_default(body))]


def find_policy(policies: Iterable[Policy], path: TunnelPath) -> str:
    """A line about the first that covers datagrams between us and one of the path's peers; empty when none does."""
    peers = [int(it) for it in path.peers if isinstance(it, IPv4Address)]

    # There may be thousands of both.
    @cache
    def networks(mask: int) -> frozenset[int]:
        return frozenset(it & mask for it in peers)

    for it in policies:
        if it.is_of_ours(path) and int(it.other.network_address) in networks(int(it.other.netmask)):
            return str(it)
    return ""


def decode_policy(body: bytes) -> Policy | None:
    """Of a message's body; None: it lets everything pass, or is not about IPv4 or not about sockets' packets."""
    dst, src, dport, dport_mask, sport, sport_mask = _ADDRESSES_AND_PORTS.unpack_from(body)
    family, dst_len, src_len, protocol = _FAMILY_AND_REST.unpack_from(body, _ADDRESSES_AND_PORTS.size)
    direction = _DIRECTIONS.get(body[_DIRECTION_AT])
    if family != _AF_INET or direction is None:
        return None
    if body[_ACTION_AT] == _ALLOW and _TEMPLATE not in dict(attributes(body, _POLICY_LEN)):
        return None
    to = _network(dst, dst_len), (dport & dport_mask, dport_mask)
    of = _network(src, src_len), (sport & sport_mask, sport_mask)
    (own, own_port), (other, other_port) = (of, to) if direction == "out" else (to, of)
    return Policy(direction, own, other, protocol, own_port, other_port)


def _of_default(body: bytes) -> list[Policy]:
    """struct xfrm_userpolicy_default: in, forwarded, out."""
    of = {"in": body[0], "out": body[2]}
    return [Policy(it, _ANY, _ANY, 0, (0, 0), (0, 0)) for it, action in of.items() if action == _DEFAULT_BLOCK]


def _network(address: bytes, length: int) -> IPv4Network:
    return IPv4Network((address[:4], length), strict=False)


def _is_of(port: tuple[int, int], number: int) -> bool:
    value, mask = port
    return number & mask == value

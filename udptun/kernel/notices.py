"""The kernel's notices of changed links, addresses, routes and neighbours.

`watch` says that something changed, never what it is now: whoever listens looks again.  The kernel sends no notice for
the routes that it removes together with a link or an address, so a listener for routes needs the other kinds as well.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import LOCAL_TABLE
from udptun.kernel import rtnetlink

_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR = 16, 17, 20, 21
_RTMGRP_LINK, _RTMGRP_NEIGH = 0x1, 0x4
_RTMGRP_ADDRESSES_AND_ROUTES = {Family.IPV4: 0x10 | 0x40, Family.IPV6: 0x100 | 0x400}

_BUFFER_LEN = 1 << 20
"""Receive buffer of the socket, bytes: some thousand notices."""
_READ_LEN = 1 << 16
"""Room for one datagram, bytes."""


class NoticeKind(Enum):
    LINK = "link"
    ADDRESS = "address"
    ROUTE = "route"
    NEIGHBOUR = "neighbour"
    """An fdb entry too."""
    OVERFLOW = "overflow"
    """The kernel had more to say than the buffer holds: anything may have changed."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something of this kind changed.

    A listener tells by a route's owner and destination whether it can matter, and by a neighbour's link.  `dst` is the
    first address of the destination as a number, host byte order.  `is_local`: of a route in the table of this host's
    own addresses.
    """

    kind: NoticeKind
    protocol: int = 0
    prefixlen: int = 0
    link_index: int = 0
    dst: int = 0
    is_local: bool = False


async def watch(*families: Family, neighbours: bool = False) -> AsyncGenerator[frozenset[Notice], None]:
    """Yield the notices as they come, of `families` and of links; those that arrive together are one set.

    Without a family given it is IPv4.  It never ends by itself.  The first item is an OVERFLOW, sent once the socket
    listens: earlier changes were not seen.
    `neighbours`: report those too; a host's own come and go all the time.
    A socket that fails is replaced by a new one, with an OVERFLOW.  Raises KernelError when none can be opened.
    """
    groups = _RTMGRP_LINK | (_RTMGRP_NEIGH if neighbours else 0)
    for family in families or (Family.IPV4,):
        groups |= _RTMGRP_ADDRESSES_AND_ROUTES[family]
    async with aclosing(datagrams(socket.NETLINK_ROUTE, groups)) as received:
        async for data in received:
            yield frozenset({Notice(NoticeKind.OVERFLOW)} if data is None else _decode(data))


async def datagrams(protocol: int, groups: int) -> AsyncGenerator[bytes | None, None]:
    """Yield each datagram that the kernel sends to these groups of one netlink protocol.  Never ends by itself.

    None comes first, once the socket listens, and again whenever notices were lost.  Raises KernelError when no socket
    can be opened.
    """
    loop = asyncio.get_running_loop()
    while True:
        with _open(protocol, groups) as listener:
            yield None
            while True:
                try:
                    data = await loop.sock_recv(listener, _READ_LEN)
                except OSError as exc:
                    if exc.errno != errno.ENOBUFS:
                        break
                    _drain(listener)
                    yield None
                    continue
                yield data


def _open(protocol: int, groups: int) -> socket.socket:
    try:
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    except OSError as exc:
        raise KernelError("cannot listen for netlink notices", exc.errno or 0) from exc
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_LEN)
        listener.bind((0, groups))
    except OSError as exc:
        listener.close()
        raise KernelError("cannot listen for netlink notices", exc.errno or 0) from exc
    return listener


def _drain(listener: socket.socket) -> None:
    """Throw away what is queued.

    The kernel reports an overflow once and then drops in silence until the queue is empty (NETLINK_S_CONGESTED in
    net/netlink/af_netlink.c).  A listener that looks before the queue is empty may miss the next change.
    """
    while True:
        try:
            listener.recv(_READ_LEN)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                return


def _decode(data: bytes) -> set[Notice]:
    """The notices in one datagram.  Of the attributes a route's destination is read alone."""
    notices: set[Notice] = set()
    offset = 0
    while offset + rtnetlink.HEADER.size <= len(data):
        length, kind, *_ = rtnetlink.HEADER.unpack_from(data, offset)
        body = offset + rtnetlink.HEADER.size
        if length < rtnetlink.HEADER.size or offset + length > len(data):
            # The datagram is cut off; the rest of its notices are lost.
            notices.add(Notice(NoticeKind.OVERFLOW))
            break
        if kind in (_RTM_NEWLINK, _RTM_DELLINK):
            notices.add(Notice(NoticeKind.LINK))
        elif kind in (_RTM_NEWADDR, _RTM_DELADDR):
            notices.add(Notice(NoticeKind.ADDRESS))
        elif kind in (rtnetlink.NEWROUTE, rtnetlink.DELROUTE):
            # struct rtmsg: family, dst_len, src_len, tos, table, protocol, …
            found = dict(rtnetlink.attributes(data[body : offset + length], rtnetlink.ROUTE_LEN))
            dst = int.from_bytes(found.get(rtnetlink.RTA_DST, b""))
            _, prefixlen, _, _, table, protocol = data[body : body + 6]
            is_local = table == LOCAL_TABLE
            notices.add(Notice(NoticeKind.ROUTE, protocol, prefixlen, dst=dst, is_local=is_local))
        elif kind in (rtnetlink.NEWNEIGH, rtnetlink.DELNEIGH):
            # struct ndmsg: family, three of padding, ifindex, …
            notices.add(Notice(NoticeKind.NEIGHBOUR, link_index=struct.unpack_from("=i", data, body + 4)[0]))
        offset += (length + 3) & ~3
    return notices

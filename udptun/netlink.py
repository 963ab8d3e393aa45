"""The kernel's links, addresses and routes: every call of pyroute2, and the socket that reports changes.

A `Netlink` is one short conversation: open it, look, change, close it.  Opening costs 0.15 ms; keeping one is
what hurts: after its receive buffer has overflowed once, pyroute2 answers a dump with nothing at all, and no
error.  For the same reason an empty dump is believed only when a second socket says the same.

`watch` says *that* something changed, never what; whoever listens looks again.  The kernel sends no notice for
the routes it removes together with a link or an address: a listener for routes needs the other kinds as well.

IPv4 for now; whatever differs by family takes it as a parameter.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from udptun.errors import KernelError
from udptun.netstate import MAIN_TABLE, Address, IPAddress, Link, Route, TunFlags

_NLMSG_HDR = struct.Struct("=IHHII")
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR = 16, 17, 20, 21
_RTM_GETADDR, _RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 22, 24, 25, 26
_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40

_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80

_REPLY_LIMIT_S = 10.0
"""rtnl_lock may be held for seconds while thousands of links go; later than this no answer will come."""
_DUMP_TRIES = 5
"""How often a dump that the kernel marks as torn by a change (NLM_F_DUMP_INTR) is started again."""
_WATCH_BUFFER = 1 << 20
"""Receive buffer of the notice socket, bytes: some thousand notices."""


class Netlink:
    """One conversation with the kernel, in the network namespace of the thread that enters it.

    An async context manager for one task.  Every method raises KernelError with the kernel's own words.
    """

    async def __aenter__(self) -> Netlink:
        self._socket = _open()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()

    async def links(self) -> list[Link]:
        """Every link.  There is always one (lo): an empty answer is an error."""
        messages = await self._dump("list links", lambda kernel: kernel.link("dump"))
        if not messages:
            raise KernelError("cannot list links", errno.ENODATA, "the kernel sent an empty list")
        return [_link(message) for message in messages]

    async def link(self, name: str) -> Link | None:
        """The link called `name`, None when there is none."""
        try:
            messages = await _answer(f"cannot look up link {name}", self._socket.link("get", ifname=name))
        except KernelError as exc:
            if exc.errno == errno.ENODEV:
                return None
            raise
        return _link(messages[0])

    async def addresses(self, link_index: int = 0, family: int = socket.AF_INET) -> list[Address]:
        """The addresses of one link, or of all (0)."""

        def request(kernel: Any) -> Any:
            message = ifaddrmsg()
            message["family"], message["index"] = family, link_index
            return kernel.nlm_request(message, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP)

        return [_address(message) for message in await self._dump("list addresses", request)]

    async def routes(self, protocol: int = 0, family: int = socket.AF_INET) -> list[Route]:
        """The main table in the kernel's order (of equal prefixes the best metric first).

        `protocol` limits it to one owner's routes; the kernel filters, so that the cost is theirs alone.
        """

        def request(kernel: Any) -> Any:
            message = rtmsg()
            message["family"], message["table"], message["proto"] = family, MAIN_TABLE, protocol
            return kernel.nlm_request(message, _RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP)

        return [_route(message) for message in await self._dump("list routes", request)]

    async def route_get(self, ip: IPAddress) -> Route:
        """How the kernel would send to `ip` now.  `prefsrc` is the source address it would choose."""
        messages = await _answer(f"no route to {ip}", self._socket.route("get", dst=str(ip)))
        return _route(messages[0])

    async def set_link(
        self, index: int, *, up: bool | None = None, mtu: int | None = None, tx_queue_len: int | None = None
    ) -> None:
        """Change what is given, leave the rest."""
        changes: dict[str, object] = {}
        if up is not None:
            changes["state"] = "up" if up else "down"
        if mtu is not None:
            changes["mtu"] = mtu
        if tx_queue_len is not None:
            changes["txqlen"] = tx_queue_len
        text = " ".join(f"{key} {value}" for key, value in changes.items())
        await _answer(f"cannot set link {index} {text}", self._socket.link("set", index=index, **changes))

    async def delete_link(self, index: int) -> None:
        await _answer(f"cannot delete link {index}", self._socket.link("del", index=index))

    async def add_address(self, address: Address) -> None:
        await _answer(
            f"cannot add {address.ip}/{address.prefixlen} to link {address.link_index}",
            self._socket.addr("add", **_address_arguments(address), scope=int(address.scope)),
        )

    async def delete_address(self, address: Address) -> None:
        await _answer(
            f"cannot delete {address.ip}/{address.prefixlen} from link {address.link_index}",
            self._socket.addr("del", **_address_arguments(address)),
        )

    async def add_route(self, route: Route) -> None:
        """Add; EEXIST when any route, whoever's, has this prefix and metric: nothing is ever overwritten.

        The kernel's "replace" looks at prefix and metric alone and would take another owner's route.
        """
        await _answer(f"cannot add route {route.dst}", self._socket.route("add", **_route_arguments(route)))

    async def delete_route(self, route: Route) -> None:
        """Delete the route of this prefix, metric, type, protocol and next hop; no other owner's can match."""
        request = self._socket.route("del", **_route_arguments(route))
        await _answer(f"cannot delete route {route.dst}", request)

    async def _dump(self, operation: str, request: Any) -> list[Any]:
        messages = await _dump(self._socket, operation, request)
        if not messages:
            fresh = _open()
            try:
                messages = await _dump(fresh, operation, request)
            finally:
                fresh.close()
        return messages


def _open() -> Any:
    try:
        # ext_ack: the kernel's own sentence in errors.  strict_check: it obeys a dump's filters (Linux 4.20).
        return AsyncIPRoute(ext_ack=True, strict_check=True)
    except OSError as exc:
        raise KernelError("cannot open a netlink socket", exc.errno or 0) from exc


async def _answer(operation: str, request: Awaitable[list[Any]]) -> list[Any]:
    """Wait for the answer of a request that is no dump."""
    try:
        async with asyncio.timeout(_REPLY_LIMIT_S):
            return await request
    except NetlinkError as exc:
        raise KernelError(operation, exc.code, str(exc.args[1])) from exc
    except TimeoutError as exc:
        raise KernelError(operation, errno.ETIMEDOUT, f"no answer in {_REPLY_LIMIT_S:.0f} s") from exc
    except OSError as exc:
        raise KernelError(operation, exc.errno or 0) from exc


async def _dump(kernel: Any, operation: str, request: Any) -> list[Any]:
    async def collect() -> list[Any]:
        async with aclosing(await request(kernel)) as answer:
            return [message async for message in answer]

    for _ in range(_DUMP_TRIES):
        messages = await _answer(f"cannot {operation}", collect())
        if not any(message["header"]["flags"] & _NLM_F_DUMP_INTR for message in messages):
            return messages
    raise KernelError(f"cannot {operation}", errno.EINTR, f"it changed during each of {_DUMP_TRIES} readings")


def _link(message: Any) -> Link:
    info = message.get("linkinfo")
    kind = str(info.get("kind") or "") if info is not None else ""
    tun = None
    if kind == "tun" and (data := info.get("data")) is not None:
        # IFLA_TUN_TYPE holds IFF_TUN (1) or IFF_TAP (2).
        tun = TunFlags(
            data.get("tun_type") == 2,
            bool(data.get("tun_vnet_hdr")),
            bool(data.get("tun_multi_queue")),
            bool(data.get("tun_persist")),
        )
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
        tun,
    )


def _address(message: Any) -> Address:
    # IFA_LOCAL is our end and IFA_ADDRESS the other one; IPv6 leaves IFA_LOCAL out unless they differ.
    other = ip_address(message.get("address") or message.get("local"))
    ip = ip_address(message.get("local") or str(other))
    flags = message.get("flags") or 0
    return Address(
        message["index"],
        ip,
        message["prefixlen"],
        message["scope"],
        bool(flags & _IFA_F_PERMANENT),
        bool(flags & _IFA_F_TEMPORARY),
        bool(flags & _IFA_F_DEPRECATED),
        None if other == ip else other,
    )


def _route(message: Any) -> Route:
    multipath = message.get("multipath")
    hop = multipath[0] if multipath else message
    gateway = hop.get("gateway")
    prefsrc = message.get("prefsrc")
    metrics = message.get("metrics")
    any_address = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    return Route(
        ip_network(f"{message.get('dst') or any_address}/{message['dst_len']}"),
        None if gateway is None else ip_address(gateway),
        hop.get("oif"),
        message.get("table"),
        message["proto"],
        message["type"],
        message["scope"],
        message.get("priority") or 0,
        None if prefsrc is None else ip_address(prefsrc),
        None if metrics is None else metrics.get("mtu"),
    )


def _address_arguments(address: Address) -> dict[str, object]:
    return {
        "index": address.link_index,
        "local": str(address.ip),
        "address": str(address.peer or address.ip),
        "prefixlen": address.prefixlen,
    }


def _route_arguments(route: Route) -> dict[str, object]:
    arguments: dict[str, object] = {
        "family": socket.AF_INET if route.dst.version == 4 else socket.AF_INET6,
        "dst": str(route.dst),
        "table": route.table,
        "proto": route.protocol,
        "type": int(route.type),
        "scope": int(route.scope),
    }
    if route.metric:
        arguments["priority"] = route.metric
    if route.gateway is not None:
        arguments["gateway"] = str(route.gateway)
    if route.oif is not None:
        arguments["oif"] = route.oif
    if route.prefsrc is not None:
        arguments["prefsrc"] = str(route.prefsrc)
    if route.mtu is not None:
        arguments["metrics"] = {"mtu": route.mtu}
    return arguments


class NoticeKind(Enum):
    LINK = "link"
    ADDRESS = "address"
    ROUTE = "route"
    OVERFLOW = "overflow"
    """The kernel had more to say than the buffer holds: anything may have changed."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something of this kind changed.  A route's owner and prefix length tell whether it can matter."""

    kind: NoticeKind
    protocol: int = 0
    prefixlen: int = 0


async def watch() -> AsyncGenerator[frozenset[Notice], None]:
    """Notices as they come, those that arrive together as one set.  Never ends by itself.

    The first item is an OVERFLOW, sent once the socket listens: whatever happened before then was not seen.
    A socket that fails is opened anew, with an OVERFLOW.  Raises KernelError when none can be opened.
    """
    loop = asyncio.get_running_loop()
    while True:
        with _notice_socket() as listener:
            yield frozenset({Notice(NoticeKind.OVERFLOW)})
            while True:
                try:
                    data = await loop.sock_recv(listener, 1 << 16)
                except OSError as exc:
                    if exc.errno != errno.ENOBUFS:
                        break
                    _drain(listener)
                    yield frozenset({Notice(NoticeKind.OVERFLOW)})
                    continue
                yield frozenset(_notices(data))


def _notice_socket() -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WATCH_BUFFER)
        listener.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV4_ROUTE))
    except OSError as exc:
        listener.close()
        raise KernelError("cannot listen for netlink notices", exc.errno or 0) from exc
    return listener


def _drain(listener: socket.socket) -> None:
    """Throw away what is queued.

    The kernel tells of an overflow once and then drops in silence until the queue is empty (NETLINK_S_CONGESTED
    in net/netlink/af_netlink.c).  Whoever looks before that may miss the change that comes next.
    """
    while True:
        try:
            listener.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                return


def _notices(data: bytes) -> set[Notice]:
    """Decode the fixed part of each message; attributes are not needed."""
    notices: set[Notice] = set()
    offset = 0
    while offset + _NLMSG_HDR.size <= len(data):
        length, kind, *_ = _NLMSG_HDR.unpack_from(data, offset)
        body = offset + _NLMSG_HDR.size
        if length < _NLMSG_HDR.size or offset + length > len(data):
            # Cut off: what the rest said is lost.
            notices.add(Notice(NoticeKind.OVERFLOW))
            break
        if kind in (_RTM_NEWLINK, _RTM_DELLINK):
            notices.add(Notice(NoticeKind.LINK))
        elif kind in (_RTM_NEWADDR, _RTM_DELADDR):
            notices.add(Notice(NoticeKind.ADDRESS))
        elif kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
            # struct rtmsg: family, dst_len, src_len, tos, table, protocol, …
            notices.add(Notice(NoticeKind.ROUTE, protocol=data[body + 5], prefixlen=data[body + 1]))
        offset += (length + 3) & ~3
    return notices

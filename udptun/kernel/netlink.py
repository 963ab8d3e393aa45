"""The kernel's links, addresses, routes and neighbours: every call of pyroute2.

A `Netlink` is one short conversation: open it, look, change, close it.  Opening costs 0.15 ms; keeping one is
what hurts: after its receive buffer has overflowed once, pyroute2 answers a dump with nothing at all, and no
error.  For the same reason its empty dump is believed only when a second socket says the same.

Links and addresses, few and with many properties, are pyroute2's.  Routes, neighbours and fdb entries, of which there
are some for each peer, go through a socket of our own in batches (`change`); rtnetlink.py knows their form.

IPv4 for now; whatever differs by family takes it as a parameter.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address, ip_address
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from udptun.core.errors import KernelError
from udptun.core.network_state import (
    MAIN_TABLE,
    Address,
    FdbEntry,
    IPAddress,
    Link,
    Neighbour,
    Route,
    RouteType,
    TunFlags,
    Vxlan,
)
from udptun.kernel import rtnetlink
from udptun.kernel.rtnetlink import Request

_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_RTM_GETADDR = 22
# include/uapi/linux/netlink.h
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12

_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80

_REPLY_LIMIT_S = 10.0
"""rtnl_lock may be held for seconds while thousands of links go; later than this no answer will come."""
_DUMP_TRIES = 5
"""How often a dump that the kernel marks as torn by a change (NLM_F_DUMP_INTR) is started again."""
_BATCH = 100
"""Requests sent at once: their answers, 0.8 KiB of the receive buffer each, fit into the kernel's default for it."""
_READ_LEN = 1 << 18
"""Room for one datagram of a dump, bytes; the kernel makes them 32 KiB at most."""


class Netlink:
    """One conversation with the kernel, in the network namespace of the thread that enters it.

    An async context manager for one task.  Every method raises KernelError with the kernel's own words.
    """

    async def __aenter__(self) -> Netlink:
        self._socket = _open()
        try:
            self._raw = _open_raw()
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()
        self._raw.close()

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

        return [rtnetlink.route(body) for body in await self._list(rtnetlink.dump_routes(family, MAIN_TABLE, protocol))]

    async def route_get(self, ip: IPAddress) -> Route:
        """How the kernel would send to `ip` now.  `prefsrc` is the source address it would choose."""
        ((error, bodies),) = await self._ask([rtnetlink.get_route(ip)])
        if error is not None:
            raise error
        return rtnetlink.route(bodies[0])

    async def on_link(self, ips: Iterable[IPv4Address]) -> dict[IPv4Address, int]:
        """Those that the kernel reaches without a gateway, each with the index of the link that leads there."""
        asked = list(ips)
        found: dict[IPv4Address, int] = {}
        answers = await self._ask([rtnetlink.get_route(ip) for ip in asked])
        for ip, (error, bodies) in zip(asked, answers, strict=True):
            if error is None:
                route = rtnetlink.route(bodies[0])
                if route.gateway is None and route.oif is not None and route.type == RouteType.UNICAST:
                    found[ip] = route.oif
        return found

    async def neighbours(self, link_index: int, family: int = socket.AF_INET) -> list[Neighbour]:
        """Of one link; those without a link-layer address left out."""
        bodies = await self._list(rtnetlink.dump_neighbours(link_index, family))
        return [found for body in bodies if (found := rtnetlink.neighbour(body)) is not None]

    async def fdb(self, link_index: int) -> list[FdbEntry]:
        """The forwarding entries of one VXLAN link that lead to another VTEP."""
        bodies = await self._list(rtnetlink.dump_fdb(link_index))
        return [found for body in bodies if (found := rtnetlink.fdb_entry(body)) is not None]

    async def change(self, requests: Sequence[Request]) -> list[KernelError | None]:
        """Make these changes in order, each whatever becomes of the others; what the kernel had against each."""
        return [error for error, _ in await self._ask(requests)]

    async def add_vxlan(self, name: str, vxlan: Vxlan, mac: str, mtu: int) -> None:
        """Make a VXLAN device, still down.  EOPNOTSUPP: the kernel has none."""
        attributes: dict[str, object] = {
            "ifname": name,
            "kind": "vxlan",
            "address": mac,
            "mtu": mtu,
            "vxlan_id": vxlan.vni,
            "vxlan_link": vxlan.lower_index,
            "vxlan_port": vxlan.port,
            "vxlan_learning": vxlan.learning,
        }
        if vxlan.local is not None:
            attributes["vxlan_local"] = str(vxlan.local)
        if vxlan.gbp:
            attributes["vxlan_gbp"] = True
        await _answer(f"cannot create {name} (vxlan id {vxlan.vni})", self._socket.link("add", **attributes))

    async def set_link(
        self,
        index: int,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        tx_queue_len: int | None = None,
        mac: str | None = None,
        alias: str | None = None,
    ) -> None:
        """Change what is given, leave the rest."""
        changes: dict[str, object] = {}
        if up is not None:
            changes["state"] = "up" if up else "down"
        if mtu is not None:
            changes["mtu"] = mtu
        if tx_queue_len is not None:
            changes["txqlen"] = tx_queue_len
        if mac is not None:
            changes["address"] = mac
        if alias is not None:
            changes["ifalias"] = alias
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
        """See `rtnetlink.add_route`."""
        await self._must(rtnetlink.add_route(route))

    async def delete_route(self, route: Route) -> None:
        """See `rtnetlink.delete_route`."""
        await self._must(rtnetlink.delete_route(route))

    async def _must(self, request: Request) -> None:
        for error in await self.change([request]):
            if error is not None:
                raise error

    async def _list(self, request: Request) -> list[bytes]:
        """What a dump says.  Raises KernelError when it changes all the time."""
        for _ in range(_DUMP_TRIES):
            ((error, bodies),) = await self._ask([request])
            if error is None:
                return bodies
            if error.errno != errno.EINTR:
                raise error
        raise KernelError(request.operation, errno.EINTR, f"it changed during each of {_DUMP_TRIES} readings")

    async def _ask(self, requests: Sequence[Request]) -> list[tuple[KernelError | None, list[bytes]]]:
        """Send `requests`; for each what went wrong with it and the bodies of its answers."""
        answers: list[tuple[KernelError | None, list[bytes]]] = []
        for start in range(0, len(requests), _BATCH):
            answers += await self._ask_batch(requests[start : start + _BATCH])
        return answers

    async def _ask_batch(self, requests: Sequence[Request]) -> list[tuple[KernelError | None, list[bytes]]]:
        first = self._sequence + 1
        self._sequence += len(requests)
        batch = b"".join(request.encode(first + n) for n, request in enumerate(requests))
        bodies: list[list[bytes]] = [[] for _ in requests]
        errors: dict[int, KernelError | None] = {}
        torn: set[int] = set()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_REPLY_LIMIT_S):
                await loop.sock_sendall(self._raw, batch)
                while len(errors) < len(requests):
                    for kind, flags, sequence, body in rtnetlink.messages(await loop.sock_recv(self._raw, _READ_LEN)):
                        n = sequence - first
                        if not 0 <= n < len(requests):
                            continue  # late, from a batch that we gave up
                        if flags & rtnetlink.F_DUMP_INTR:
                            torn.add(n)
                        if kind == rtnetlink.DONE:
                            errors[n] = KernelError(requests[n].operation, errno.EINTR) if n in torn else None
                        elif kind == rtnetlink.ERROR:
                            number, text = rtnetlink.refusal(body, flags)
                            errors[n] = KernelError(requests[n].operation, number, text) if number else None
                        else:
                            bodies[n].append(body)
        except TimeoutError as exc:
            raise KernelError(requests[0].operation, errno.ETIMEDOUT, f"no answer in {_REPLY_LIMIT_S:.0f} s") from exc
        except OSError as exc:
            raise KernelError(requests[0].operation, exc.errno or 0) from exc
        return [(errors[n], bodies[n]) for n in range(len(requests))]

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


def _open_raw() -> socket.socket:
    try:
        raw = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            raw.setsockopt(_SOL_NETLINK, option, 1)
    except OSError as exc:
        raise KernelError("cannot open a netlink socket", exc.errno or 0) from exc
    return raw


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
    vxlan = None
    if kind == "vxlan" and (data := info.get("data")) is not None:
        local, group = data.get("vxlan_local"), data.get("vxlan_group")
        vxlan = Vxlan(
            data.get("vxlan_id"),
            None if local is None else ip_address(local),
            data.get("vxlan_link") or 0,
            # In the network's byte order, which pyroute2 turns around.
            data.get("vxlan_port"),
            bool(data.get("vxlan_learning")),
            data.get("vxlan_gbp") is not None,
            None if group is None else ip_address(group),
            bool(data.get("vxlan_l2miss")),
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
        vxlan,
        message.get("address") or "",
        message.get("ifalias") or "",
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


def _address_arguments(address: Address) -> dict[str, object]:
    return {
        "index": address.link_index,
        "local": str(address.ip),
        "address": str(address.peer or address.ip),
        "prefixlen": address.prefixlen,
    }

"""A conversation with the kernel about its links, addresses, routes, neighbours and fdb entries.

A `Netlink` is short: open it, look, change, close it.  The messages are written and read by link_messages.py (links and
addresses, with pyroute2) and rtnetlink.py (routes, neighbours and fdb entries); this module sends them and finds the
answers that belong to them.

IPv4 for now; whatever differs by family takes it as a parameter.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address

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
)
from udptun.kernel import link_messages, rtnetlink
from udptun.kernel.rtnetlink import Request

# include/uapi/linux/netlink.h
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12

_REPLY_LIMIT_S = 10.0
"""Deleting thousands of links can hold rtnl_lock for seconds.  After this time no answer will come any more."""
_DUMP_TRIES = 5
"""So often a dump is started again that the kernel marks as torn by a change (NLM_F_DUMP_INTR)."""
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
        self._sequence = 0
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()

    async def links(self) -> list[Link]:
        """Every link.  There is always one (lo), so an empty answer is an error."""
        bodies = await self._dump(link_messages.dump_links())
        if not bodies:
            raise KernelError("cannot list links", errno.ENODATA, "the kernel sent an empty list")
        return [link_messages.decode_link(body) for body in bodies]

    async def link(self, name: str) -> Link | None:
        """The link called `name`, None when there is none."""
        ((error, bodies),) = await self._ask([link_messages.get_link(name)])
        if error is not None:
            if error.errno == errno.ENODEV:
                return None
            raise error
        return link_messages.decode_link(bodies[0])

    async def addresses(self, link_index: int = 0, family: int = socket.AF_INET) -> list[Address]:
        """The addresses of one link, or of all (0).  A link that is gone has none."""
        try:
            bodies = await self._dump(link_messages.dump_addresses(link_index, family))
        except KernelError as exc:
            if exc.errno == errno.ENODEV:
                return []
            raise
        return [link_messages.decode_address(body) for body in bodies]

    async def routes(self, protocol: int = 0, family: int = socket.AF_INET) -> list[Route]:
        """The main table in the kernel's order (of equal prefixes the best metric first).

        `protocol` limits it to one owner's routes.  The kernel filters, so other routes cost nothing.
        """
        bodies = await self._dump(rtnetlink.dump_routes(family, MAIN_TABLE, protocol))
        return [rtnetlink.decode_route(body) for body in bodies]

    async def route_get(self, ip: IPAddress) -> Route:
        """How the kernel would send to `ip` now.  `prefsrc` is the source address it would choose."""
        ((error, bodies),) = await self._ask([rtnetlink.get_route(ip)])
        if error is not None:
            raise error
        return rtnetlink.decode_route(bodies[0])

    async def routes_to(self, ips: Iterable[IPv4Address]) -> dict[IPv4Address, Route]:
        """`route_get` for each; those that the kernel has no route to are left out."""
        asked = list(ips)
        answers = await self._ask([rtnetlink.get_route(ip) for ip in asked])
        return {
            ip: rtnetlink.decode_route(bodies[0])
            for ip, (error, bodies) in zip(asked, answers, strict=True)
            if error is None
        }

    async def on_link(self, ips: Iterable[IPv4Address]) -> dict[IPv4Address, int]:
        """Those that the kernel reaches without a gateway, each with the index of the link that leads there."""
        return {
            ip: route.oif
            for ip, route in (await self.routes_to(ips)).items()
            if route.gateway is None
            and route.oif is not None
            and route.type == RouteType.UNICAST
            and not route.is_encapsulated
        }

    async def neighbours(self, link_index: int, family: int = socket.AF_INET) -> list[Neighbour]:
        """The neighbours on one link; those without a link-layer address are left out."""
        bodies = await self._dump(rtnetlink.dump_neighbours(link_index, family))
        return [found for body in bodies if (found := rtnetlink.decode_neighbour(body)) is not None]

    async def fdb(self, link_index: int) -> list[FdbEntry]:
        """The forwarding entries of one VXLAN link that lead to another VTEP."""
        bodies = await self._dump(rtnetlink.dump_fdb(link_index))
        return [found for body in bodies if (found := rtnetlink.decode_fdb_entry(body)) is not None]

    async def change(self, requests: Sequence[Request]) -> list[KernelError | None]:
        """Make these changes in order, each whatever becomes of the others.

        Returns for each why the kernel refused it, None where it did not.
        """
        return [error for error, _ in await self._ask(requests)]

    async def do(self, request: Request) -> None:
        """Make one change."""
        for error in await self.change([request]):
            if error is not None:
                raise error

    async def _dump(self, request: Request) -> list[bytes]:
        """The bodies of a dump's messages.  Raises KernelError when every reading was torn by a change."""
        for _ in range(_DUMP_TRIES):
            ((error, bodies),) = await self._ask([request])
            if error is None:
                return bodies
            if error.errno != errno.EINTR:
                raise error
        raise KernelError(request.operation, errno.EINTR, f"it changed during each of {_DUMP_TRIES} readings")

    async def _ask(self, requests: Sequence[Request]) -> list[tuple[KernelError | None, list[bytes]]]:
        """Send `requests`.  Returns for each what went wrong with it and the bodies of its answers."""
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
                await loop.sock_sendall(self._socket, batch)
                while len(errors) < len(requests):
                    for kind, flags, sequence, body in rtnetlink.messages(
                        await loop.sock_recv(self._socket, _READ_LEN)
                    ):
                        n = sequence - first
                        if not 0 <= n < len(requests):
                            continue  # a late answer to a batch that we gave up
                        if flags & rtnetlink.F_DUMP_INTR:
                            torn.add(n)
                        if kind == rtnetlink.DONE:
                            number, text = (errno.EINTR, "") if n in torn else rtnetlink.decode_done(body, flags)
                        elif kind == rtnetlink.ERROR:
                            number, text = rtnetlink.decode_error(body, flags)
                        else:
                            bodies[n].append(body)
                            continue
                        errors[n] = KernelError(requests[n].operation, number, text) if number else None
        except TimeoutError as exc:
            raise KernelError(requests[0].operation, errno.ETIMEDOUT, f"no answer in {_REPLY_LIMIT_S:.0f} s") from exc
        except OSError as exc:
            raise KernelError(requests[0].operation, exc.errno or 0) from exc
        return [(errors[n], bodies[n]) for n in range(len(requests))]


def _open() -> socket.socket:
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        opened = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
    except OSError as exc:
        raise KernelError("cannot open a netlink socket", exc.errno or 0) from exc
    try:
        # EXT_ACK: the kernel's own sentence in errors.  GET_STRICT_CHK: it obeys a dump's filters (Linux 4.20).
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            opened.setsockopt(_SOL_NETLINK, option, 1)
    except OSError as exc:
        opened.close()
        raise KernelError("cannot open a netlink socket", exc.errno or 0) from exc
    return opened

"""A conversation with the kernel in netlink: requests, and the answers that belong to them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Self

from udptun.core.errors import KernelError
from udptun.kernel import rtnetlink
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


class Conversation:
    """Is short: open it, look, change, close it.

    An async context manager for one task, which speaks to the network namespace of the thread that enters it.  Every
    method raises KernelError with the kernel's own words.
    """

    def __init__(self, protocol: int) -> None:
        """`protocol`: a protocol of AF_NETLINK (netlink(7))."""
        self._protocol = protocol

    async def __aenter__(self) -> Self:
        self._socket = _open(self._protocol)
        self._sequence = 0
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()

    async def change(self, requests: Sequence[Request]) -> list[KernelError | None]:
        """Make these changes in order, each whatever becomes of the others.

        Returns for each why the kernel refused it, None where it did not.
        """
        return [error for error, _ in await self.ask(requests)]

    async def do(self, request: Request) -> None:
        """Make one change."""
        for error in await self.change([request]):
            if error is not None:
                raise error

    async def dump(self, request: Request) -> list[bytes]:
        """The bodies of a dump's messages.  Raises KernelError when every reading was torn by a change."""
        for _ in range(_DUMP_TRIES):
            ((error, bodies),) = await self.ask([request])
            if error is None:
                return bodies
            if error.errno != errno.EINTR:
                raise error
        raise KernelError(request.operation, errno.EINTR, f"it changed during each of {_DUMP_TRIES} readings")

    async def ask(self, requests: Sequence[Request]) -> list[tuple[KernelError | None, list[bytes]]]:
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


def _open(protocol: int) -> socket.socket:
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        opened = socket.socket(socket.AF_NETLINK, flags, protocol)
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

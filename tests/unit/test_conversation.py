"""Which answers a conversation takes for whose, and when it believes a list.  A socket pair plays the kernel."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import pytest

from udptun.core.errors import KernelError
from udptun.core.network_state import Address
from udptun.kernel import conversation, rtnetlink
from udptun.kernel.link_messages import NEWADDR
from udptun.kernel.netlink import Netlink

T = TypeVar("T")
MULTI, INTERRUPTED = 0x2, 0x10
ADDRESS = struct.pack("=BBBBi", socket.AF_INET, 24, 0x80, 0, 7) + struct.pack("=HH4B", 8, 2, 192, 0, 2, 1)


def message(kind: int, sequence: int, body: bytes, flags: int = MULTI) -> bytes:
    return rtnetlink.HEADER.pack(rtnetlink.HEADER.size + len(body), kind, flags, sequence, 0) + body


def done(sequence: int, error: int = 0, flags: int = MULTI) -> bytes:
    return message(rtnetlink.DONE, sequence, struct.pack("=i", -error), flags)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The other end of the socket that the next conversation opens."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (ours, theirs):
        end.setblocking(False)
    monkeypatch.setattr(conversation, "_open", lambda protocol: ours)
    yield theirs
    theirs.close()


def ask(
    kernel: socket.socket,
    answers: Iterable[Callable[[int], bytes]],
    question: Callable[[Netlink], Coroutine[Any, Any, T]],
) -> T:
    """What `question` returns; each request is answered by the next of `answers`, given its sequence number."""

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        for give in answers:
            _, _, _, sequence, _ = rtnetlink.HEADER.unpack_from(await loop.sock_recv(kernel, 1 << 16))
            await loop.sock_sendall(kernel, give(sequence))

    async def converse() -> T:
        async with Netlink() as netlink:
            answering = asyncio.create_task(answer())
            try:
                return await question(netlink)
            finally:
                await answering

    return asyncio.run(converse())


def list_addresses(netlink: Netlink) -> Coroutine[Any, Any, list[Address]]:
    return netlink.addresses()


def test_a_dump_torn_by_a_change_is_asked_for_again(kernel: socket.socket) -> None:
    def torn(sequence: int) -> bytes:
        return message(NEWADDR, sequence, ADDRESS, MULTI | INTERRUPTED) + done(sequence)

    def torn_at_the_end(sequence: int) -> bytes:
        return message(NEWADDR, sequence, ADDRESS) + done(sequence, flags=MULTI | INTERRUPTED)

    def whole(sequence: int) -> bytes:
        return message(NEWADDR, sequence, ADDRESS) * 2 + done(sequence)

    assert len(ask(kernel, [torn, torn_at_the_end, whole], list_addresses)) == 2


def test_a_dump_that_is_always_torn_is_an_error(kernel: socket.socket) -> None:
    def torn(sequence: int) -> bytes:
        return done(sequence, flags=MULTI | INTERRUPTED)

    with pytest.raises(KernelError, match="cannot list addresses: EINTR; it changed during each of 5 readings"):
        ask(kernel, [torn] * 5, list_addresses)


def test_a_dump_that_the_kernel_breaks_off_is_an_error(kernel: socket.socket) -> None:
    """The reason stands in the last message.  It was not read, and what had come so far passed for all there is."""

    def broken_off(sequence: int) -> bytes:
        return message(NEWADDR, sequence, ADDRESS) + done(sequence, errno.ENOMEM)

    with pytest.raises(KernelError, match="cannot list addresses: ENOMEM"):
        ask(kernel, [broken_off], list_addresses)


def test_an_answer_to_an_earlier_request_is_passed_over(kernel: socket.socket) -> None:
    """A socket that pyroute2 had taken an overflow on answered a dump with nothing, and no error.

    An empty list is believed now because it ends with the DONE of this very request.
    """

    def late_and_then_right(sequence: int) -> bytes:
        return done(sequence - 1) + message(NEWADDR, sequence, ADDRESS) + done(sequence)

    assert len(ask(kernel, [late_and_then_right], list_addresses)) == 1


def test_an_empty_list_of_links_is_an_error(kernel: socket.socket) -> None:
    with pytest.raises(KernelError, match="cannot list links"):
        ask(kernel, [done], lambda netlink: netlink.links())

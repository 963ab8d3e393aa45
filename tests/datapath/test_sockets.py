"""The sockets of several workers on one port: who gets what comes, and who else may have the port."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from udptun.core.errors import KernelError
from udptun.datapath.sockets import bind_sockets, new_sockets, open_sockets, share_port

LOOPBACK = IPv4Address("127.0.0.1")
N_SOURCES = 256


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def opened(undo: ExitStack, n: int, beside: list[socket.socket] | None = None) -> list[socket.socket]:
    port = beside[0].getsockname()[1] if beside else 0
    if port == 0:
        # The kernel picks one for the first, and the others join it.
        (first,) = open_sockets(LOOPBACK, 0, 1)
        undo.enter_context(first)
        return [first, *opened(undo, n - 1, [first])] if n > 1 else [first]
    more = [undo.enter_context(udp) for udp in new_sockets(n)]
    bind_sockets(more, LOOPBACK, port, beside or ())
    return more


def received(sockets: list[socket.socket], undo: ExitStack) -> list[int]:
    """How many of N_SOURCES datagrams, each of a source of its own, each socket has got."""
    for _ in range(N_SOURCES):
        source = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        source.sendto(b"x", sockets[0].getsockname())
    counts = []
    for udp in sockets:
        n = 0
        try:
            while udp.recv(1):
                n += 1
        except BlockingIOError:
            counts.append(n)
    return counts


def test_every_worker_receives_when_there_are_several(undo: ExitStack) -> None:
    """The option that spreads datagrams was switched off after bind, and one of the sockets received everything."""
    counts = received(opened(undo, 4), undo)
    assert sum(counts) == N_SOURCES
    assert min(counts) >= N_SOURCES / 10, counts


def test_sockets_that_an_earlier_build_has_left_share_again(undo: ExitStack) -> None:
    sockets = opened(undo, 4)
    for udp in sockets:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    assert sorted(received(sockets, undo)) == [0, 0, 0, N_SOURCES]
    share_port(sockets, among_several=True)
    counts = received(sockets, undo)
    assert min(counts) >= N_SOURCES / 10, counts


def test_more_workers_share_with_those_that_were_there(undo: ExitStack) -> None:
    first = opened(undo, 1)
    counts = received([*first, *opened(undo, 3, first)], undo)
    assert min(counts) >= N_SOURCES / 10, counts


@pytest.mark.parametrize("is_sharing", [False, True])
def test_port_that_somebody_has_is_refused_even_if_he_would_share(undo: ExitStack, is_sharing: bool) -> None:
    stranger = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_sharing)
    stranger.bind((str(LOOPBACK), 0))
    with pytest.raises(KernelError, match="EADDRINUSE; `ss -ulpn` shows who has the port"):
        open_sockets(LOOPBACK, stranger.getsockname()[1], 4)


def test_nobody_joins_the_socket_of_a_single_worker(undo: ExitStack) -> None:
    (alone,) = opened(undo, 1)
    stranger = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with pytest.raises(OSError, match="Address already in use"):
        stranger.bind(alone.getsockname())

"""The sockets of several workers on one port: who gets what comes, and who else may have the port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address

import pytest

from tests.udp_sockets import n_waiting
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.offload import ALL, Offload
from udptun.datapath.sockets import (
    ReceiveQueue,
    bind_sockets,
    new_sockets,
    open_senders,
    open_sockets,
    receive_queue,
    set_offload,
    share_port,
    spread_over,
)

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
        if n == 1:
            return [first]
        sockets = [first, *opened(undo, n - 1, [first])]
        assert spread_over(sockets)
        return sockets
    more = [undo.enter_context(udp) for udp in new_sockets(n, Family.IPV4)]
    bind_sockets(more, LOOPBACK, port, beside or ())
    return more


def received(sockets: list[socket.socket], undo: ExitStack) -> list[int]:
    """How many of N_SOURCES datagrams, each of a source of its own, each socket has got."""
    for _ in range(N_SOURCES):
        source = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        source.sendto(b"x", sockets[0].getsockname())
    return [n_waiting(udp) for udp in sockets]


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
    assert spread_over(sockets)
    counts = received(sockets, undo)
    assert min(counts) >= N_SOURCES / 10, counts


def test_more_workers_get_nothing_until_they_are_told_to_share_with_those_that_were_there(undo: ExitStack) -> None:
    """What came to a new socket waited for a worker that was not there yet, and was overtaken by what came later."""
    first = opened(undo, 2)
    sockets = [*first, *opened(undo, 2, first)]
    counts = received(sockets, undo)
    assert counts[2:] == [0, 0]
    assert min(counts[:2]) >= N_SOURCES / 10, counts
    assert spread_over(sockets)
    counts = received(sockets, undo)
    assert min(counts) >= N_SOURCES / 10, counts


def test_a_single_worker_keeps_everything_when_others_join_it(undo: ExitStack) -> None:
    first = opened(undo, 1)
    assert received([*first, *opened(undo, 3, first)], undo) == [N_SOURCES, 0, 0, 0]


def test_a_worker_that_goes_gets_nothing_more_and_the_others_keep_what_they_had(undo: ExitStack) -> None:
    """The order of the sockets stays when the last are closed, so no flow that stays changes its worker."""
    sockets = opened(undo, 4)
    sources = [undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(N_SOURCES)]

    def by_source(over: list[socket.socket]) -> dict[int, int]:
        for source in sources:
            source.sendto(b"x", sockets[0].getsockname())
        found = {}
        for i, udp in enumerate(over):
            with suppress(BlockingIOError):
                while True:
                    found[udp.recvfrom(1)[1][1]] = i
        return found

    assert spread_over(sockets[:2])
    before = by_source(sockets)
    assert (len(before), set(before.values())) == (N_SOURCES, {0, 1})
    for udp in sockets[2:]:
        udp.close()
    assert by_source(sockets[:2]) == before


def test_without_the_program_the_kernel_shares_at_once(undo: ExitStack) -> None:
    first = opened(undo, 1)
    more = [undo.enter_context(udp) for udp in new_sockets(3, Family.IPV4)]
    bind_sockets(more, LOOPBACK, first[0].getsockname()[1], first, ALL & ~Offload.SPREAD)
    sockets = [*first, *more]
    assert set_offload(sockets, ALL) & Offload.SPREAD
    assert not set_offload(sockets, ALL & ~Offload.SPREAD) & Offload.SPREAD
    counts = received(sockets, undo)
    assert min(counts) >= N_SOURCES / 10, counts


@pytest.mark.parametrize("n", [2, 4, 16])
def test_as_many_source_ports_as_workers_give_each_worker_one(undo: ExitStack, n: int) -> None:
    """The kernel's hash gave all four of four ports to two of four workers as often as not."""
    sockets = opened(undo, n)
    senders = [undo.enter_context(udp) for udp in open_senders(LOOPBACK, 1)]
    # As when there were fewer workers before.
    senders += [undo.enter_context(udp) for udp in open_senders(LOOPBACK, n - 1, senders)]
    ports = [udp.getsockname()[1] for udp in senders]
    if ports != list(range(ports[0], ports[0] + n)):
        pytest.skip(f"another program has one of the ports that follow {ports[0]}")
    for udp in senders:
        udp.sendto(b"x", sockets[0].getsockname())
    assert [len(list(iter_waiting(udp))) for udp in sockets] == [1] * n


def iter_waiting(udp: socket.socket) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while True:
            yield udp.recv(1)


def test_queue_of_a_socket_says_what_waits_and_what_found_no_room(undo: ExitStack) -> None:
    (udp,) = opened(undo, 1)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert receive_queue(udp) == ReceiveQueue(0, udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        for _ in range(100):
            source.sendto(bytes(1000), udp.getsockname())
    queue = receive_queue(udp)
    assert 0 < queue.waiting_bytes <= queue.limit_bytes + 4096
    assert queue.drops == 100 - n_waiting(udp) > 0


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


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)")
def test_a_port_for_which_a_capability_is_missing_is_refused_with_its_name() -> None:
    """Before, the line asked whether the address was still on the interface."""
    program = (
        "from ipaddress import IPv4Address; from udptun.core.errors import KernelError;"
        "from udptun.datapath.sockets import open_sockets\n"
        "try: open_sockets(IPv4Address('127.0.0.1'), 53, 1)\nexcept KernelError as exc: print(exc)"
    )
    argv = ["setpriv", "--bounding-set=-all,+net_admin", sys.executable, "-c", program]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert said.startswith("cannot bind the tunnel's socket to 127.0.0.1 UDP port 53: EACCES")
    assert "CAP_NET_BIND_SERVICE" in said

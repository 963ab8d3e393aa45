"""What the kernel does with a program that chooses among the sockets of one port (SO_ATTACH_REUSEPORT_CBPF, 4.5).

The datapath leans on all of it when the number of workers changes: what arrives shall go to those that stay.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from udp_sockets import n_waiting

SO_ATTACH_REUSEPORT_CBPF, SO_DETACH_REUSEPORT_BPF = 51, 68
Instruction = tuple[int, int]
"""Code and operand (linux/filter.h)."""
RETURN_K, RETURN_A = 0x06, 0x16
LOAD_HALF, LOAD_WORD, MODULO_K = 0x28, 0x20, 0x94
NETWORK_HEADER = -0x100000
"""SKF_NET_OFF: where offsets into the IP header begin."""
SOURCE_ADDRESS, SOURCE_PORT = NETWORK_HEADER + 12, NETWORK_HEADER + 20


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def bound(undo: ExitStack, address: tuple[str, int] = ("127.0.0.1", 0), *, shared: bool = True) -> socket.socket:
    udp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.setblocking(False)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    udp.bind(address)
    return udp


def sender(undo: ExitStack, address: str = "127.0.0.1") -> socket.socket:
    """Without the option: with it the kernel may pick the port of the group for it, and it would receive as well."""
    return bound(undo, (address, 0), shared=False)


def join(undo: ExitStack, first: socket.socket, n: int) -> list[socket.socket]:
    return [bound(undo, first.getsockname()) for _ in range(n)]


def attach(udp: socket.socket, *program: Instruction) -> None:
    code = b"".join(struct.pack("=HBBi", op, 0, 0, k) for op, k in program)
    memory = ctypes.create_string_buffer(code, len(code))
    udp.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(program), ctypes.addressof(memory))
    )


def waiting(sockets: Sequence[socket.socket]) -> list[int]:
    return [n_waiting(udp) for udp in sockets]


def send(undo: ExitStack, target: socket.socket, n: int = 40) -> None:
    """From so many ports."""
    for _ in range(n):
        sender(undo).sendto(b"x", target.getsockname())


def test_the_index_counts_the_sockets_in_the_order_in_which_they_were_bound(undo: ExitStack) -> None:
    """reuseport_add_sock appends; run_bpf_filter takes the result as an index (net/core/sock_reuseport.c)."""
    first = bound(undo)
    sockets = [first, *join(undo, first, 3)]
    for index in (2, 0, 3, 1):
        attach(first, (RETURN_K, index))
        send(undo, first)
        assert waiting(sockets) == [40 * (i == index) for i in range(4)]


def test_a_program_serves_all_sockets_of_the_group_and_those_that_join_later(undo: ExitStack) -> None:
    """It belongs to the group (struct sock_reuseport), whichever socket it is attached to."""
    first = bound(undo)
    second = join(undo, first, 1)[0]
    attach(second, (RETURN_K, 0))
    sockets = [first, second, *join(undo, first, 2)]
    send(undo, first)
    assert waiting(sockets) == [40, 0, 0, 0]


def test_a_socket_bound_with_the_option_is_a_group_even_alone_and_one_without_is_none(undo: ExitStack) -> None:
    """So a program can be there before others join; for a socket bound without the option it is EINVAL."""
    alone = bound(undo)
    attach(alone, (RETURN_K, 0))
    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sockets = [alone, *join(undo, alone, 3)]
    send(undo, alone)
    assert waiting(sockets) == [40, 0, 0, 0]
    plain = bound(undo, shared=False)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with pytest.raises(OSError) as refused:
        attach(plain, (RETURN_K, 0))
    assert refused.value.errno == errno.EINVAL
    # The first that joins makes a group of both, with the older one in front.
    sockets = [plain, *join(undo, plain, 1)]
    attach(plain, (RETURN_K, 0))
    send(undo, plain)
    assert waiting(sockets) == [40, 0]


def test_the_last_socket_moves_into_the_place_of_one_that_is_closed(undo: ExitStack) -> None:
    """__reuseport_detach_sock: so only sockets at the end may go while the others shall keep their numbers."""
    first = bound(undo)
    sockets = [first, *join(undo, first, 3)]
    attach(first, (RETURN_K, 1))
    sockets[1].close()
    send(undo, first)
    assert waiting([first, sockets[2], sockets[3]]) == [0, 0, 40]
    attach(first, (RETURN_K, 2))
    send(undo, first)
    assert waiting([first, sockets[2], sockets[3]]) == [0, 40, 0]


def test_an_index_beyond_the_group_means_the_kernels_own_choice(undo: ExitStack) -> None:
    """reuseport_select_sock falls back to the hash, so a program for more sockets than there are loses nothing."""
    first = bound(undo)
    sockets = [first, *join(undo, first, 3)]
    attach(first, (RETURN_K, 4))
    send(undo, first, 200)
    got = waiting(sockets)
    assert sum(got) == 200
    assert min(got) > 0, got


def test_a_program_reads_the_source_from_the_headers_before_its_datagram(undo: ExitStack) -> None:
    """Offsets from SKF_NET_OFF reach the IP header; UDP's follows it where it has no options."""
    first = bound(undo)
    sockets = [first, *join(undo, first, 3)]
    attach(first, (LOAD_HALF, SOURCE_PORT), (MODULO_K, 4), (RETURN_A, 0))
    sources = [sender(undo) for _ in range(40)]
    for source in sources:
        source.sendto(b"x", first.getsockname())
    wanted = [sum(source.getsockname()[1] % 4 == i for source in sources) for i in range(4)]
    assert waiting(sockets) == wanted
    attach(first, (LOAD_WORD, SOURCE_ADDRESS), (MODULO_K, 4), (RETURN_A, 0))
    for i in range(8):
        sender(undo, f"127.0.0.{i + 1}").sendto(b"x", first.getsockname())
    assert waiting(sockets) == [2, 2, 2, 2]


def test_another_program_takes_the_place_of_the_first_at_once_and_without_one_it_is_the_hash(undo: ExitStack) -> None:
    first = bound(undo)
    sockets = [first, *join(undo, first, 3)]
    for index in (1, 2):
        attach(first, (RETURN_K, index))
        send(undo, first)
        assert waiting(sockets) == [40 * (i == index) for i in range(4)]
    # Linux 5.3.
    first.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    send(undo, first, 200)
    assert min(waiting(sockets)) > 0


def test_what_has_arrived_stays_where_it_is_when_the_program_changes(undo: ExitStack) -> None:
    """A datagram is given to a socket once; so the queue of one that is given up has to be read empty."""
    first = bound(undo)
    sockets = [first, *join(undo, first, 1)]
    attach(first, (RETURN_K, 1))
    send(undo, first, 10)
    attach(first, (RETURN_K, 0))
    send(undo, first, 10)
    assert waiting(sockets) == [10, 10]

"""Datagrams of strangers that the kernel keeps from the workers' sockets: who still gets in, and what is counted.

Peers and strangers are addresses of 127/8.  A test takes the part of the workers: it reads the sockets.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace

import pytest

from tests.udp_sockets import n_waiting
from udptun.core.family import Family
from udptun.core.offload import ALL, Offload
from udptun.core.tunnel import SourceCheck
from udptun.datapath import strangers
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.sockets import bind_sockets, new_sockets, open_sockets, set_offload, share_port, spread_over
from udptun.datapath.stats import Stats
from udptun.datapath.stranger_program import MAX_ADDRESSES
from udptun.datapath.strangers import StrangerFilter
from udptun.datapath.table import TableWriter

HERE = IPv4Address("127.0.0.1")
NETWORK = IPv4Network("10.0.0.0/8")
PEERS = [f"127.1.0.{i}" for i in range(1, 21)]
STRANGERS = [f"127.2.0.{i}" for i in range(1, 21)]
LATER_PEER = "127.2.0.5"
SO_RCVBUFFORCE = 33
N_EACH = 200


class Rig:
    """A table with PEERS published, and a filter for sockets that are there already."""

    def __init__(self, undo: ExitStack, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets
        self.table, self.stats = TableWriter.create(), Stats.create()
        undo.callback(self.table.close)
        undo.callback(self.stats.close)
        self.configure(SourceCheck.PEER)
        for i, address in enumerate(PEERS):
            self.add_peer(i, address)
        assert self.table.publish(self.stats)
        self.filter = StrangerFilter(self.table, self.stats, lambda: [self.sockets])
        undo.callback(self.filter.end)
        self.filter.allow(True)

    def configure(self, check: SourceCheck) -> None:
        own = IPv4Network("10.255.0.0/24")
        self.table.configure(PacketSettings(NETWORK, own, HERE, 1400, check))

    def add_peer(self, i: int, address: str) -> None:
        subnet = IPv4Network((f"10.{i >> 8}.{i & 255}.0", 24))
        self.table.set_peer(subnet, Remote(IPv4Address(address), 8285, True), 1400)

    def begin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as flood:
            flood.setattr(strangers, "FLOOD_PER_S", -1)
            self.filter.look()

    def received_of(self, addresses: Sequence[str], n_each: int = N_EACH) -> int:
        """How many of `n_each` datagrams of each address have come."""
        return received_of(self.sockets, addresses, n_each)


def received_of(sockets: Sequence[socket.socket], addresses: Sequence[str], n_each: int = N_EACH) -> int:
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            source.bind((address, 0))
            for _ in range(n_each):
                source.sendto(b"x", sockets[0].getsockname())
    return sum(map(n_waiting, sockets))


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def opened(undo: ExitStack, n: int) -> list[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((str(HERE), 0))
        port = free.getsockname()[1]
    return [undo.enter_context(udp) for udp in open_sockets(HERE, port, n)]


@pytest.fixture(params=[1, 4])
def rig(undo: ExitStack, request: pytest.FixtureRequest) -> Rig:
    return Rig(undo, opened(undo, request.param))


def sum_of(rig: Rig) -> int:
    rig.filter.look()
    return rig.stats.n_strangers


def test_peers_get_in_and_all_that_strangers_send_is_dropped_or_received(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rig.filter.state == "ready"
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert rig.received_of(PEERS) == len(PEERS) * N_EACH
    assert sum_of(rig) == 0
    n_received = rig.received_of(STRANGERS)
    assert sum_of(rig) + n_received == len(STRANGERS) * N_EACH
    # Of 4,000 some 16: how large the flood is, is not known yet.
    assert 0 < n_received < 100


def test_the_larger_the_flood_the_smaller_is_the_part_of_it_that_reaches_the_workers(
    undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in 256 did, which at 200,000 a second cost as much as a tenth of what 500 Mbit/s cost."""
    now_s = 100.0
    monkeypatch.setattr(strangers, "time", SimpleNamespace(monotonic=lambda: now_s))
    rig = Rig(undo, opened(undo, 1))
    now_s += 1
    rig.begin(monkeypatch)
    for elapsed_s, at_least, at_most in ((0.02, 0, 10), (2.0, 20, 200), (0.02, 0, 10)):
        rig.received_of(STRANGERS)
        now_s += elapsed_s
        rig.filter.look()
        assert at_least <= rig.received_of(STRANGERS) <= at_most
    assert rig.filter.state == "on"


def test_a_peer_keeps_its_worker_when_the_filter_comes_and_goes(
    undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(undo, opened(undo, 4))
    sources = [undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(40)]
    for i, source in enumerate(sources):
        source.bind((PEERS[i % len(PEERS)], 0))

    def workers() -> list[list[int]]:
        found = []
        for source in sources:
            source.sendto(b"x", rig.sockets[0].getsockname())
            found.append([n_waiting(udp) for udp in rig.sockets])
        return found

    before = workers()
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert workers() == before
    rig.filter.end()
    assert workers() == before


def test_what_a_full_buffer_loses_is_no_strangers(undo: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would be in one counter of the kernel, if the filter stood on the workers' sockets."""
    rig = Rig(undo, opened(undo, 1))
    rig.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    rig.begin(monkeypatch)
    assert rig.received_of(PEERS[:1], 1000) < 1000
    assert sum_of(rig) == 0
    assert rig.filter.state == "on"


def test_a_new_peer_gets_in_before_the_table_knows_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.begin(monkeypatch)
    rig.add_peer(500, LATER_PEER)
    rig.filter.follow()
    assert rig.received_of([LATER_PEER]) == N_EACH
    rig.table.remove_peer(IPv4Network("10.1.244.0/24"))
    rig.filter.follow()
    assert rig.received_of([LATER_PEER]) < N_EACH / 2


def test_a_control_plane_that_is_killed_leaves_a_port_that_takes_in_everything(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a version that knows nothing of the filter gets the packets of the peers that it adds."""
    ready, wake = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            rig.begin(monkeypatch)
            os.write(wake, rig.filter.state.encode())
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 100) == b"on"
        assert rig.received_of(STRANGERS) < N_EACH
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(wake)
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    # What any version does with sockets that it finds.
    n = len(rig.sockets)
    share_port(rig.sockets, among_several=n > 1)
    set_offload(rig.sockets, ALL & ~Offload.STRANGER_FILTER)
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    # And ours goes on.
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert rig.received_of(PEERS) == len(PEERS) * N_EACH


def test_the_sum_of_what_was_dropped_goes_on_when_the_control_plane_is_killed(
    undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began at 0 with each daemon, and every rate and sum of it went wrong."""
    rig = Rig(undo, opened(undo, 1))
    ready, wake = os.pipe()
    asked, ask = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            rig.begin(monkeypatch)
            for _ in range(2):
                os.write(wake, b"y")
                os.read(asked, 1)
                rig.filter.look()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.read(ready, 1)
    n_received = rig.received_of(STRANGERS)
    os.write(ask, b"y")
    os.read(ready, 1)
    n_dropped = rig.stats.n_strangers
    assert n_dropped + n_received == len(STRANGERS) * N_EACH
    os.write(ask, b"y")
    os.waitpid(child, 0)
    for fd in (ready, wake, asked, ask):
        os.close(fd)
    assert sum_of(rig) == n_dropped
    rig.begin(monkeypatch)
    n_received = rig.received_of(STRANGERS)
    rig.filter.end()
    assert rig.stats.n_strangers == n_dropped + len(STRANGERS) * N_EACH - n_received


@pytest.mark.parametrize(
    ("version", "expected"), [(5, 5 << 32), (6, 5 << 32), pytest.param(99, 0, id="not understood")]
)
def test_the_sum_of_what_was_dropped_goes_on_with_the_datapath_of_another_build(
    undo: ExitStack, version: int, expected: int
) -> None:
    theirs, ours = Stats.create(), Stats.create()
    for stats in (theirs, ours):
        undo.callback(stats.close)
    theirs.n_strangers = 5 << 32
    os.pwrite(theirs.fd, struct.pack("=I", version), 4)
    ours.continue_from(theirs.fd)
    assert ours.n_strangers == expected


def test_sockets_join_while_the_filter_pauses(undo: ExitStack, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.begin(monkeypatch)
    with rig.filter.paused():
        more = [undo.enter_context(udp) for udp in new_sockets(2, Family.IPV4)]
        bind_sockets(more, HERE, rig.sockets[0].getsockname()[1], rig.sockets)
        rig.begin(monkeypatch)
        assert rig.filter.state == "ready"
        rig.sockets = [*rig.sockets, *more]
        set_offload(rig.sockets, ALL)
        assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert rig.received_of(STRANGERS) < N_EACH
    assert rig.received_of(PEERS) == len(PEERS) * N_EACH
    # Before the sockets are closed.
    rig.filter.end()


def test_the_filter_ends_when_strangers_have_been_few_for_a_while(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.begin(monkeypatch)
    rig.filter.look()
    assert rig.filter.state == "on"
    monkeypatch.setattr(strangers, "_CALM_S", 0)
    rig.filter.look()
    assert rig.filter.state == "ready"
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH


def test_there_is_none_for_more_peers_than_fit_nor_where_sources_are_not_checked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(len(PEERS), MAX_ADDRESSES):
        rig.add_peer(i, str(IPv4Address("127.3.0.0") + i))
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert rig.received_of(PEERS) == len(PEERS) * N_EACH
    rig.add_peer(MAX_ADDRESSES, LATER_PEER)
    rig.filter.follow()
    assert rig.filter.state == "off: more than 2000 peers"
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    rig.table.remove_peer(IPv4Network("10.0.0.0/24"))
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    rig.configure(SourceCheck.OFF)
    rig.filter.follow()
    assert rig.filter.state == "off"
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH


def test_a_program_that_a_process_of_the_datapath_has_set_is_replaced_while_the_flood_lasts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.begin(monkeypatch)
    assert spread_over(rig.sockets)
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    # The workers, that is we, have counted nothing, which is no less than this.
    rig.begin(monkeypatch)
    assert rig.filter.state == "on"
    assert rig.received_of(STRANGERS) < N_EACH
    assert rig.received_of(PEERS) == len(PEERS) * N_EACH


def test_where_the_kernel_refuses_it_everything_comes_in_and_the_state_says_why(
    undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    alone.setblocking(False)
    alone.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    # Bound without the option, as the first builds did: no program can be attached.
    alone.bind((str(HERE), 0))
    rig = Rig(undo, [alone])
    rig.begin(monkeypatch)
    assert rig.filter.state == "off: the kernel refuses it: EINVAL"
    assert rig.received_of(STRANGERS) == len(STRANGERS) * N_EACH
    assert not alone.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_it_is_granted_with_the_program_that_spreads_and_not_without(undo: ExitStack) -> None:
    sockets = opened(undo, 2)
    assert Offload.STRANGER_FILTER in set_offload(sockets, ALL)
    for off in (Offload.SPREAD, Offload.STRANGER_FILTER):
        assert Offload.STRANGER_FILTER not in set_offload(sockets, ALL & ~off)

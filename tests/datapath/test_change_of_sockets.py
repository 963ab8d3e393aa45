"""A process takes over from one with more or fewer sockets while datagrams wait in them.

sources on 127.0.0.2 --> sockets on one port of 127.0.0.1 --> active process, then its successor --> [socketpair = TUN]
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP

from udptun.core.offload import Offload
from udptun.core.tunnel import SourceCheck
from udptun.datapath.protocol import Descriptors
from udptun.datapath.rings import new_events
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.sockets import bind_sockets, new_sockets, open_sockets
from udptun.datapath.stats import Stats
from udptun.datapath.supervision import Datapath, new_lock
from udptun.datapath.table import TableWriter

HERE, THERE = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
OWN, PEER = IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")
N_SOURCES, N_EACH = 12, 40


class Rig:
    """Sockets for up to 4 workers, which all write to the same TUN, and N_SOURCES flows to them."""

    def __init__(self, undo: ExitStack, n_sockets: int) -> None:
        self.tun, self._worker_tun = (undo.enter_context(end) for end in socket.socketpair(type=socket.SOCK_DGRAM))
        for end in (self.tun, self._worker_tun):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._undo = undo
        self.sockets = [undo.enter_context(udp) for udp in open_sockets(HERE, 0, n_sockets)]
        self.address = self.sockets[0].getsockname()
        self._sources = [undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(N_SOURCES)]
        for source in self._sources:
            source.bind((str(THERE), 0))
        self.table, self.stats = TableWriter.create(), Stats.create()
        self.lock, self.events = new_lock(), new_events()
        for close in (self.table.close, self.stats.close):
            undo.callback(close)
        for fd in (self.lock, *self.events):
            undo.callback(os.close, fd)
        network = IPv4Network("10.244.0.0/16")
        # One write a packet: what is put together has one header for all.
        self.table.configure(PacketSettings(network, OWN, HERE, 1472, SourceCheck.PEER, Offload.VNET_HDR))
        self.table.set_peer(PEER, Remote(THERE, 9, True), 1472)
        assert self.table.publish(self.stats)

    def descriptors(self, n: int) -> Descriptors:
        """For `n` workers; sockets that are missing are opened."""
        more = [self._undo.enter_context(udp) for udp in new_sockets(max(n - len(self.sockets), 0))]
        bind_sockets(more, HERE, self.address[1], self.sockets)
        self.sockets += more
        udp = tuple(it.fileno() for it in self.sockets[:n])
        queues = tuple(self._undo.enter_context(self._worker_tun.dup()).fileno() for _ in range(n))
        return Descriptors(self.table.fd, self.stats.fd, self.lock, queues, udp, events=self.events)

    def send(self, numbers: range) -> None:
        """A packet with each of these numbers in each flow."""
        for number in numbers:
            for flow, source in enumerate(self._sources):
                packet = IP(src=str(PEER[5]), dst=str(OWN[7]), id=number) / UDP(sport=1000 + flow, dport=53) / b"x"
                source.sendto(bytes(packet), self.address)

    async def received(self) -> dict[int, list[int]]:
        """The numbers of each flow, in the order in which the TUN got them, once all have come."""
        found: dict[int, list[int]] = defaultdict(list)
        async with asyncio.timeout(10):
            while sum(map(len, found.values())) < N_SOURCES * 2 * N_EACH:
                raw = await asyncio.get_running_loop().sock_recv(self.tun, 2000)
                packet = IP(raw[10:])
                found[packet[UDP].sport - 1000].append(packet.id)
        return found


def is_stopped(pid: int) -> bool:
    """Whether every thread of the process is; a signal is sent before they are."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.mark.parametrize(
    ("before", "after", "is_spread"),
    [(4, 3, True), (4, 1, True), (2, 4, True), (1, 4, True), (4, 2, False), (2, 4, False)],
    ids=lambda it: {True: "program", False: "hash"}[it] if isinstance(it, bool) else str(it),
)
async def test_what_waits_in_the_sockets_is_delivered_first_and_in_order(
    undo: ExitStack, tmp_path: Path, before: int, after: int, is_spread: bool
) -> None:
    """The new workers all began at once, and what waited for one that was no more was lost or overtaken.

    Without the program nothing is lost; the kernel's hash may give a flow that waits in one socket to another one.
    """
    rig = Rig(undo, before)
    datapath = Datapath(tmp_path, rig.descriptors(before), [])
    datapath.is_spread = is_spread
    await datapath.start()
    try:
        # It moves nothing more, so that everything waits.
        assert datapath.active is not None
        os.kill(datapath.active.pid, signal.SIGSTOP)
        # A thread that runs meanwhile could still take a packet, and it would be handed on twice.
        while not is_stopped(datapath.active.pid):
            await asyncio.sleep(0.001)
        rig.send(range(N_EACH))
        change = asyncio.create_task(datapath.replace(rig.descriptors(after)))
        for number in range(N_EACH, 2 * N_EACH):
            rig.send(range(number, number + 1))
            await asyncio.sleep(0.0005)
        received = await rig.received()
        await change
    finally:
        await datapath.stop()
    assert set(received) == set(range(N_SOURCES))
    for numbers in received.values():
        assert sorted(numbers) == list(range(2 * N_EACH))
        if is_spread:
            assert numbers == sorted(numbers)

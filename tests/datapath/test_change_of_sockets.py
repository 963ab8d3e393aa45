"""A process takes over from one with more or fewer sockets while datagrams wait in them.

sources on 127.0.0.2 --> sockets on one port of 127.0.0.1 --> active process, then its successor --> [socketpair = TUN]

Or sources and sockets are on ::1; then there may be sockets on 127.0.0.1 beside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path

import pytest

from tests.packets import ipv4, udp_segment
from udptun.core.family import Family
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
LOOPBACK_IPV6 = IPv6Address("::1")
PODS = str(PEER[5]), str(OWN[7])
N_SOURCES, N_EACH = 12, 40


def free_port() -> int:
    """One that no socket of either family has."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
        udp.bind(("::", 0))
        port: int = udp.getsockname()[1]
        return port


class Rig:
    """Sockets for up to 4 workers, which all write to the same TUN, and N_SOURCES flows to them.

    `outer`: "IPv4", "IPv6", or "both", and then the flows come over IPv6.
    """

    def __init__(self, undo: ExitStack, n_sockets: int, outer: str = "IPv4") -> None:
        self.tun, self._worker_tun = (undo.enter_context(end) for end in socket.socketpair(type=socket.SOCK_DGRAM))
        for end in (self.tun, self._worker_tun):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._undo = undo
        self.here, there = (HERE, THERE) if outer == "IPv4" else (LOOPBACK_IPV6, LOOPBACK_IPV6)
        self._has_both = outer == "both"
        port = free_port() if self._has_both else 0
        self.sockets = [undo.enter_context(udp) for udp in open_sockets(self.here, port, n_sockets)]
        self.ipv4: list[socket.socket] = []
        if self._has_both:
            self.ipv4 = [undo.enter_context(udp) for udp in open_sockets(HERE, port, n_sockets)]
        self.address = self.sockets[0].getsockname()
        family = self.sockets[0].family
        self._sources = [undo.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(N_SOURCES)]
        for source in self._sources:
            source.bind((str(there), 0))
        self.table, self.stats = TableWriter.create(), Stats.create()
        self.lock, self.events = new_lock(), new_events()
        for close in (self.table.close, self.stats.close):
            undo.callback(close)
        for fd in (self.lock, *self.events):
            undo.callback(os.close, fd)
        network = IPv4Network("10.244.0.0/16")
        # One write a packet: what is put together has one header for all.
        self.table.configure(PacketSettings(network, OWN, self.here, 1472, SourceCheck.PEER, Offload.VNET_HDR))
        self.table.set_peer(PEER, Remote(there, 9, True), 1472)
        assert self.table.publish(self.stats)

    def descriptors(self, n: int, outer: str | None = None) -> Descriptors:
        """For `n` workers; sockets that are missing are opened.  `outer`: those of this family alone, of both."""
        for sockets, address in ((self.sockets, self.here), (self.ipv4, HERE)):
            if sockets:
                missing = new_sockets(max(n - len(sockets), 0), Family(address.version))
                more = [self._undo.enter_context(udp) for udp in missing]
                bind_sockets(more, address, self.address[1], sockets)
                sockets += more
        udp, ipv4 = (tuple(it.fileno() for it in them[:n]) for them in (self.sockets, self.ipv4))
        queues = tuple(self._undo.enter_context(self._worker_tun.dup()).fileno() for _ in range(n))
        fds = (self.table.fd, self.stats.fd, self.lock, queues)
        if self._has_both and outer not in ("IPv4", "IPv6"):
            return Descriptors(*fds, ipv4, events=self.events, ipv6=udp)
        return Descriptors(*fds, ipv4 if self._has_both and outer == "IPv4" else udp, events=self.events)

    def send(self, numbers: range) -> None:
        """A packet with each of these numbers in each flow."""
        for number in numbers:
            for flow, source in enumerate(self._sources):
                segment = udp_segment(*PODS, b"x", ports=(1000 + flow, 53))
                source.sendto(ipv4(*PODS, segment, ident=number), self.address)

    async def received(self) -> dict[int, list[int]]:
        """The numbers of each flow, in the order in which the TUN got them, once all have come."""
        found: dict[int, list[int]] = defaultdict(list)
        async with asyncio.timeout(10):
            while sum(map(len, found.values())) < N_SOURCES * 2 * N_EACH:
                raw = await asyncio.get_running_loop().sock_recv(self.tun, 2000)
                identification, source_port = (int.from_bytes(raw[at : at + 2]) for at in (10 + 4, 10 + 20))
                found[source_port - 1000].append(identification)
        return found


def is_stopped(pid: int) -> bool:
    """Whether every thread of the process is; a signal is sent before they are."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


async def stop_active(datapath: Datapath) -> None:
    """It moves nothing more, so that everything waits."""
    assert datapath.active is not None
    os.kill(datapath.active.pid, signal.SIGSTOP)
    # A thread that runs meanwhile could still take a packet, and it would be handed on twice.
    while not is_stopped(datapath.active.pid):
        await asyncio.sleep(0.001)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.mark.parametrize(
    ("before", "after", "is_spread", "outer"),
    [
        (4, 3, True, "IPv4"),
        (4, 1, True, "IPv4"),
        (2, 4, True, "IPv4"),
        (1, 4, True, "IPv4"),
        (4, 2, False, "IPv4"),
        (2, 4, False, "IPv4"),
        (4, 2, True, "IPv6"),
        (4, 2, False, "IPv6"),
        (2, 4, True, "both"),
        (4, 1, True, "both"),
    ],
    ids=lambda it: {True: "program", False: "hash"}[it] if isinstance(it, bool) else str(it),
)
async def test_what_waits_in_the_sockets_is_delivered_first_and_in_order(
    undo: ExitStack, tmp_path: Path, before: int, after: int, is_spread: bool, outer: str
) -> None:
    """The new workers all began at once, and what waited for one that was no more was lost or overtaken.

    Without the program nothing is lost; the kernel's hash may give a flow that waits in one socket to another one.
    """
    rig = Rig(undo, before, outer)
    datapath = Datapath(tmp_path, rig.descriptors(before), [], "flannel0")
    datapath.is_spread = is_spread
    await datapath.start()
    try:
        await stop_active(datapath)
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


@pytest.mark.parametrize(
    ("before", "after", "there"),
    [("IPv6", "both", "127.0.0.2"), ("IPv4", "both", "::1"), ("IPv6", "IPv4", "127.0.0.2"), ("IPv4", "IPv6", "::1")],
)
async def test_what_waits_in_the_queue_for_a_host_of_a_new_family_leaves_from_a_new_socket(
    undo: ExitStack, tmp_path: Path, before: str, after: str, there: str
) -> None:
    """From IPv6 alone to both families, the successor sent to hosts of IPv4 from an old socket of IPv6: all was lost.

    So it was when the one family came in place of the other one.
    """
    rig = Rig(undo, 2, "both")
    peer = undo.enter_context(socket.socket(socket.AF_INET if "." in there else socket.AF_INET6, socket.SOCK_DGRAM))
    peer.bind((there, 0))
    peer.setblocking(False)
    rig.table.set_peer(PEER, Remote(ip_address(there), peer.getsockname()[1], True), 1400)
    assert rig.table.publish(rig.stats)
    datapath = Datapath(tmp_path, rig.descriptors(2, before), [], "flannel0")
    await datapath.start()
    try:
        await stop_active(datapath)
        packet = ipv4(*reversed(PODS), udp_segment(*reversed(PODS), b"x"))
        rig.tun.send(bytes(10) + packet)
        await datapath.replace(rig.descriptors(2, after))
        async with asyncio.timeout(10):
            sent = await asyncio.get_running_loop().sock_recv(peer, 2000)
    finally:
        await datapath.stop()
    assert sent[20:] == packet[20:]

"""What a killed process has left in flight, and who hands it on.

memory files, with what a killed worker leaves  -->  a new worker  -->  peer on 127.0.0.2, or the TUN (a socketpair)
"""

from __future__ import annotations

import mmap
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from bench.soak.checks import sum_problems
from tests.datapath.harness import of_packets
from udptun._fastpath import COUNTERS, FIELDS, LAYOUT, Worker
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

OWN = IPv4Network("10.244.1.0/24")
PEER = IPv4Network("10.244.2.0/24")
NETWORK_IPV6 = IPv6Network("2001:db8::/48")
OWN_IPV6, PEER_IPV6 = IPv6Network("2001:db8:0:1::/64"), IPv6Network("2001:db8:0:2::/64")


def outward(number: int) -> bytes:
    return bytes(IP(src="10.244.1.5", dst="10.244.2.7", ttl=64) / UDP() / struct.pack("=Q", number))


def inward(number: int) -> bytes:
    return bytes(IP(src="10.244.2.7", dst="10.244.1.5", ttl=64) / UDP() / struct.pack("=Q", number))


def outward_ipv6(number: int) -> bytes:
    return bytes(IPv6(src=str(OWN_IPV6[5]), dst=str(PEER_IPV6[7]), hlim=64) / UDP() / struct.pack("=Q", number))


def inward_ipv6(number: int) -> bytes:
    return bytes(IPv6(src=str(PEER_IPV6[7]), dst=str(OWN_IPV6[5]), hlim=64) / UDP() / struct.pack("=Q", number))


class Rig:
    """Memory files, the descriptors of a worker, and a peer."""

    def __init__(self) -> None:
        self.table, self.stats = TableWriter.create(), Stats.create()
        self.memory = memoryview(mmap.mmap(self.stats.fd, LAYOUT["stats"]))
        self.kernel, self.tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.udp, self.peer = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.udp.bind(("127.0.0.1", 0))
        self.peer.bind(("127.0.0.2", 0))
        for it in (self.kernel, self.tun, self.peer):
            it.setblocking(False)
        self.table.configure(
            PacketSettings(
                *(IPv4Network("10.244.0.0/16"), OWN, IPv4Address("127.0.0.1"), 1472, SourceCheck.PEER),
                network_ipv6=NETWORK_IPV6,
                own_subnet_ipv6=OWN_IPV6,
            )
        )
        for subnet in (PEER, PEER_IPV6):
            self.table.set_peer(subnet, Remote(IPv4Address("127.0.0.2"), self.peer.getsockname()[1], True), 1472)

    def publish(self) -> None:
        assert self.table.publish(self.stats)

    def worker(self, index: int, n_workers: int) -> Worker:
        return Worker(self.table.fd, self.stats.fd, index, self.tun.fileno(), self.udp.fileno(), n_workers=n_workers)

    def leave(self, index: int, *, read: bytes = b"", is_stepped: bool = False, received: bytes = b"") -> None:
        """As worker `index` would, killed in a turn in which it had read and received these packets."""
        worker = FIELDS["stats"]["worker"][0] + index * LAYOUT["worker"]
        self.put("Q", worker + FIELDS["worker"]["turns"][0], 1)
        self.put("Q", worker + FIELDS["worker"]["generation_seen"][0], 1)
        if read:
            at = 64
            self.put("I", self.in_flight(index, "n_reads"), 1)
            self.put("I", self.in_flight(index, "read") + FIELDS["read"]["at"][0], at)
            self.put("I", self.in_flight(index, "read") + FIELDS["read"]["is_stepped"][0], is_stepped)
            self.put(f"{len(read)}s", self.in_flight(index, "arena") + at, read)
        if received:
            self.put("I", self.in_flight(index, "n_messages"), 1)
            self.put("I", self.in_flight(index, "message_len"), len(received))
            source = struct.pack("=H", socket.AF_INET) + bytes(2) + IPv4Address("127.0.0.2").packed
            self.put(f"{len(source)}s", self.in_flight(index, "source"), source)
            self.put(f"{len(received)}s", self.in_flight(index, "train"), received)

    def count(self, index: int, counters: dict[str, int]) -> None:
        """As worker `index` has counted by the time it was killed."""
        first = FIELDS["stats"]["worker"][0] + index * LAYOUT["worker"] + FIELDS["worker"]["counter"][0]
        for name, n in counters.items():
            self.put("Q", first + 8 * COUNTERS.index(name), n)

    def in_flight(self, index: int, field: str) -> int:
        """Where in the memory a field of what worker `index` has in flight is."""
        return FIELDS["stats"]["in_flight"][0] + index * LAYOUT["in_flight"] + FIELDS["in_flight"][field][0]

    def put(self, code: str, offset: int, value: int | bytes) -> None:
        struct.pack_into(f"={code}", self.memory, offset, value)

    def close(self) -> None:
        self.memory.release()
        self.table.close()
        self.stats.close()
        for it in (self.kernel, self.tun, self.udp, self.peer):
            it.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with closing(Rig()) as rig:
        yield rig


def numbers(sock: socket.socket) -> list[int]:
    """The numbers of all packets that wait in the socket."""
    found = []
    try:
        while True:
            found += struct.unpack("=Q", sock.recv(2000)[-8:])
    except BlockingIOError:
        return found


def test_what_workers_that_are_no_more_had_in_flight_is_handed_on_by_those_that_are(rig: Rig) -> None:
    """Before, it was kept until there were as many workers again, and was sent then, however old it was."""
    rig.publish()
    for i in range(5):
        rig.leave(i, read=outward(i), received=inward(100 + i))
    for i in range(2):
        rig.worker(i, 2).turn()
        assert numbers(rig.peer) == ([0, 2, 4], [1, 3])[i]
        assert numbers(rig.kernel) == ([100, 102, 104], [101, 103])[i]
    counters = rig.stats.counters()
    assert (counters["encap_sent"], counters["decap_delivered"]) == (5, 5)
    # Nothing is left for later, and nobody waits for a worker that is no more.
    for i in range(5):
        rig.worker(i, 5).turn()
    assert (numbers(rig.peer), numbers(rig.kernel)) == ([], [])
    assert rig.stats.generations_seen()[:5] == [0] * 5


def test_ipv6_in_flight_is_handed_on_with_its_hop_limit_stepped_once(rig: Rig) -> None:
    rig.publish()
    rig.leave(0, read=outward_ipv6(1), received=inward_ipv6(2))
    rig.leave(1, read=outward_ipv6(3)[:7] + b"\x3f" + outward_ipv6(3)[8:], is_stepped=True)
    # It was written already: its first byte says so.
    rig.leave(2, received=b"\x06" + inward_ipv6(4)[1:])
    rig.worker(0, 1).turn()
    sent = [rig.peer.recv(2000) for _ in range(2)]
    assert [(packet[7], *struct.unpack("=Q", packet[-8:])) for packet in sent] == [(63, 1), (63, 3)]
    assert rig.kernel.recv(2000)[10 + 7] == 63
    assert (numbers(rig.peer), numbers(rig.kernel)) == ([], [])


def test_a_worker_moves_nothing_before_a_table_is_published(rig: Rig) -> None:
    """Before, it dropped all that came: it found no peer in the empty table of generation 0."""
    worker = rig.worker(0, 1)
    rig.kernel.send(bytes(10) + outward(7))
    rig.peer.sendto(inward(8), rig.udp.getsockname())
    assert not worker.turn()
    assert rig.stats.counters()["encap_packets"] == rig.stats.counters()["decap_packets"] == 0
    rig.publish()
    while worker.turn():
        pass
    assert (numbers(rig.peer), numbers(rig.kernel)) == ([7], [8])


@pytest.mark.parametrize("n_deaths", [1, 2, 3])
def test_what_was_in_flight_when_three_processes_died_is_dropped_and_counted(rig: Rig, n_deaths: int) -> None:
    """Before, what a process died of was handed on for ever, and no packet passed any more."""
    rig.publish()
    rig.leave(0, read=outward(1), received=inward(2))
    rig.leave(1, read=outward(3))
    for i in range(2):
        rig.put("Q", rig.in_flight(i, "n_handed_on"), n_deaths - 1)
    rig.worker(0, 1).turn()
    is_dropped = n_deaths == 3
    assert numbers(rig.peer) == ([] if is_dropped else [1, 3])
    assert numbers(rig.kernel) == ([] if is_dropped else [2])
    counters = rig.stats.counters()
    assert (counters["encap_packets"], counters["encap_drop_in_flight"]) == (2, 2 * is_dropped)
    assert (counters["decap_packets"], counters["decap_drop_in_flight"]) == (1, is_dropped)
    # The next batch begins with a clean slate.
    for i in range(2):
        rig.worker(i, 2).turn()
    assert rig.stats.counters() == counters
    rig.kernel.send(bytes(10) + outward(4))
    rig.worker(0, 2).turn()
    assert numbers(rig.peer) == [4]


WRITTEN = b"\x04" + inward(2)[1:]
MOMENTS = {
    "before any was counted": (outward(1), inward(2), {}, {"encap_sent": 1, "decap_delivered": 1}),
    "when they were counted": (
        outward(1), inward(2), {"encap_packets": 1, "decap_packets": 1}, {"encap_sent": 1, "decap_delivered": 1},
    ),
    "when a part was sent": (
        outward(1), b"", {"encap_packets": 9, "encap_sent": 6, "encap_drop_ttl": 2},
        {"encap_sent": 7, "encap_drop_ttl": 2},
    ),
    "when it was written and not counted": (
        b"", WRITTEN, {"decap_packets": 4, "decap_delivered": 2, "decap_punted": 1},
        {"decap_delivered": 3, "decap_punted": 1},
    ),
    "in the middle of counting an injected one": (
        b"", b"", {"inject_packets": 3, "inject_sent": 2}, {"inject_sent": 2, "inject_drop_in_flight": 1},
    ),
    "when an end was counted first": (
        b"", b"", {"decap_packets": 1, "decap_drop_ttl": 2, "icmp_sent": 5}, {"decap_drop_ttl": 2, "icmp_sent": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("index", [0, 1], ids=["of a worker", "of one that is no more"])
@pytest.mark.parametrize(("read", "received", "counted", "ends"), MOMENTS.values(), ids=MOMENTS)
def test_each_packet_has_one_end_whenever_a_process_was_killed(
    rig: Rig, read: bytes, received: bytes, counted: dict[str, int], ends: dict[str, int], index: int
) -> None:
    """A process that was killed between counting a packet and counting what became of it left one without an end."""
    rig.publish()
    rig.leave(index, read=read, received=received)
    rig.count(index, counted)
    rig.worker(0, 1).turn()
    counters = rig.stats.counters()
    assert sum_problems(counters) == []
    counted = {name: n for name, n in of_packets(counters).items() if n}
    assert {name: n for name, n in counted.items() if not name.endswith("_packets")} == ends

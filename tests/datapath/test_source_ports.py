"""From which of our ports a datagram leaves, and over which of the peer's workers the flows of one host spread.

test --feed--> [socketpair = TUN] --> Worker --> our port, or one of N_SENDERS others --> the peers' sockets
"""

from __future__ import annotations

import socket
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet

from udptun._fastpath import Worker
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.sockets import open_senders, open_sockets
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

HERE, THERE = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
OWN, ANY, PLAIN = (IPv4Network(f"10.244.{i}.0/24") for i in (1, 2, 3))
"""Our subnet; that of a peer that takes any source port; that of one that does not."""
OWN_IPV6, ANY_IPV6 = IPv6Network("fd00:244:0:1::/64"), IPv6Network("fd00:244:0:2::/64")
N_SENDERS, N_WORKERS, N_FLOWS, N_ROUNDS = 16, 4, 64, 8
UDP_GRO = 104


class Rig:
    """A worker with N_SENDERS sockets, and a peer with N_WORKERS sockets on one port that holds both subnets."""

    def __init__(self, undo: ExitStack) -> None:
        self._tun, worker_tun = (undo.enter_context(end) for end in socket.socketpair(type=socket.SOCK_DGRAM))
        for end in (self._tun, worker_tun):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        (ours,) = (undo.enter_context(udp) for udp in open_sockets(HERE, 0, 1))
        senders = [undo.enter_context(udp) for udp in open_senders(HERE, N_SENDERS)]
        self.port, *self.sender_ports = (udp.getsockname()[1] for udp in (ours, *senders))
        self.peer = [undo.enter_context(it) for it in open_sockets(THERE, 0, N_WORKERS)]
        port = self.peer[0].getsockname()[1]
        table, stats = TableWriter.create(), Stats.create()
        undo.callback(table.close)
        undo.callback(stats.close)
        network, network_ipv6 = IPv4Network("10.244.0.0/16"), IPv6Network("fd00:244::/48")
        ipv6 = {"network_ipv6": network_ipv6, "own_subnet_ipv6": OWN_IPV6}
        table.configure(PacketSettings(network, OWN, HERE, 1472, SourceCheck.PEER, **ipv6))
        for subnet in (ANY, PLAIN, ANY_IPV6):
            table.set_peer(subnet, Remote(THERE, port, True, takes_any_source_port=subnet != PLAIN), 1472)
        assert table.publish(stats)
        fds = [udp.fileno() for udp in senders]
        self._worker = Worker(table.fd, stats.fd, 0, worker_tun.fileno(), ours.fileno(), fds)

    def send(self, packet: Packet | bytes, vnet: bytes = bytes(10)) -> None:
        """What the kernel would give the worker; at most a few hundred before `run`."""
        self._tun.send(vnet + bytes(packet))

    def run(self) -> None:
        while self._worker.turn():
            pass

    def received(self, udp: socket.socket) -> Iterator[tuple[IP | IPv6, int]]:
        """Packets and the ports that they came from."""
        try:
            while True:
                payload, (_, port) = udp.recvfrom(1 << 16)
                yield (IPv6 if payload[0] >> 4 == 6 else IP)(payload), port
        except BlockingIOError:
            return


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        yield Rig(undo)


def interleaved(rig: Rig, to: IPv4Network) -> None:
    """N_ROUNDS packets of each of N_FLOWS flows, one of each flow after the other."""
    for i in range(N_ROUNDS):
        for flow in range(N_FLOWS):
            rig.send(IP(src=str(OWN[5]), dst=str(to[7]), id=i) / UDP(sport=2000 + flow, dport=53) / bytes(flow))
        rig.run()


def test_flows_to_a_peer_that_takes_any_port_spread_over_ours_and_over_its_workers(rig: Rig) -> None:
    interleaved(rig, ANY)
    ports: dict[int, set[int]] = defaultdict(set)
    ids: dict[int, list[int]] = defaultdict(list)
    per_worker = []
    for udp in rig.peer:
        got = list(rig.received(udp))
        per_worker.append(len(got))
        for packet, port in got:
            ports[packet[UDP].sport].add(port)
            ids[packet[UDP].sport].append(packet.id)
    assert sum(per_worker) == N_FLOWS * N_ROUNDS
    assert all(len(it) == 1 for it in ports.values()), "a flow leaves from one port"
    assert all(it == list(range(N_ROUNDS)) for it in ids.values()), "and in order"
    used = Counter(port for (port,) in ports.values())
    assert set(used) <= set(rig.sender_ports)
    assert len(used) > N_SENDERS / 2, used
    assert min(per_worker) >= N_FLOWS * N_ROUNDS / 10, per_worker


def test_everything_to_a_peer_that_wants_one_port_leaves_from_ours(rig: Rig) -> None:
    interleaved(rig, PLAIN)
    got = [list(rig.received(udp)) for udp in rig.peer]
    assert sorted(map(len, got)) == [0, 0, 0, N_FLOWS * N_ROUNDS]
    assert {port for it in got for _, port in it} == {rig.port}


def test_each_flow_of_ipv6_leaves_from_one_port_and_so_do_fragments(rig: Rig) -> None:
    header = IPv6(src=str(OWN_IPV6[5]), dst=str(ANY_IPV6[7]))
    for _ in range(2):
        for flow in range(N_FLOWS):
            rig.send(header / UDP(sport=2000 + flow, dport=53) / bytes(flow))
            rig.send(header / IPv6ExtHdrDestOpt() / UDP(sport=2000 + flow, dport=53) / bytes(flow))
        rig.run()
    ports: dict[int, set[int]] = defaultdict(set)
    for packet, port in (it for udp in rig.peer for it in rig.received(udp)):
        ports[packet[UDP].sport].add(port)
    assert len(ports) == N_FLOWS
    assert all(len(it) == 1 for it in ports.values()), "also what is behind extension headers"
    used = Counter(port for (port,) in ports.values())
    assert set(used) <= set(rig.sender_ports)
    assert len(used) > N_SENDERS / 2, used

    for offset, more in ((0, 1), (175, 1), (350, 0)):
        rig.send(header / IPv6ExtHdrFragment(offset=offset, m=more, nh=17, id=9) / bytes(1400 if more else 4))
    rig.run()
    got = [port for udp in rig.peer for _, port in rig.received(udp)]
    assert len(got) == 3
    assert len(set(got)) == 1


def test_fragments_of_a_packet_leave_from_one_port(rig: Rig) -> None:
    for flags, offset in (("MF", 0), ("MF", 1), (0, 2)):
        payload = UDP(sport=1, dport=2, len=20, chksum=0) if not offset else bytes(8 if flags else 4)
        rig.send(IP(src=str(OWN[5]), dst=str(ANY[7]), id=9, proto=17, flags=flags, frag=offset) / payload)
    rig.run()
    got = [port for udp in rig.peer for _, port in rig.received(udp)]
    assert len(got) == 3
    assert len(set(got)) == 1


def test_a_super_packet_leaves_as_one_message_from_the_port_of_its_flow(rig: Rig) -> None:
    """Grouping goes on to work: what is of one peer and one port is one message."""
    for udp in rig.peer:
        udp.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    header = IP(src=str(OWN[5]), dst=str(ANY[7]), flags="DF") / TCP(sport=3, dport=4, flags="A")
    super_packet = bytes(IP(bytes(header / bytes(10 * 1432))))
    for _ in range(2):
        rig.send(super_packet, struct.pack("=BBHHHH", 1, 1, 40, 1432, 20, 16))
    rig.run()
    got = [(len(packet), port) for udp in rig.peer for packet, port in rig.received(udp)]
    assert [n for n, _ in got] == [10 * 1472] * 2 or [n for n, _ in got] == [20 * 1472]
    assert len({port for _, port in got}) == 1
    assert got[0][1] in rig.sender_ports

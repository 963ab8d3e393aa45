"""Two workers with real devices: what the kernel makes of IPv6 packets and of the answers about them, beside IPv4.

    host 1: t0 -- worker -- u0, 192.0.2.1 ==== u0, 192.0.2.2 -- worker -- t0: host 2
            10.244.1.0, fd00:1::                                10.244.2.0, fd00:2::
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pytest
from namespace import Namespace, namespace, requires_netns, seconds_until

from tests.datapath.harness import of_packets
from udptun._fastpath import Worker
from udptun.core.offload import ALL, Offload
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.sockets import open_sockets, set_offload
from udptun.datapath.stats import Stats, WorkerState
from udptun.datapath.table import TableWriter
from udptun.kernel.tun import open_queues

pytestmark = [pytest.mark.netns, requires_netns]

MTU, NARROW = 1472, 1300
NETWORK, NETWORK_IPV6 = IPv4Network("10.244.0.0/16"), IPv6Network("fd00::/16")
PORT = 8285
UDP_SEGMENT = 103


class Host:
    """A namespace with a device, a worker and its table."""

    def __init__(self, ns: Namespace, number: int, undo: ExitStack) -> None:
        self.ns, self._number, self._undo = ns, number, undo
        self.ipv4, self.ipv6 = (str(subnet.network_address) for subnet in subnets(number))
        self.table, self.stats = TableWriter.create(), Stats.create()
        tun = ns.call(lambda: open_queues("t0", 1))
        (udp,) = ns.call(lambda: open_sockets(IPv4Address(f"192.0.2.{number}"), PORT, 1, ALL))
        for it in (self.table, self.stats, tun, udp):
            undo.callback(it.close)
        self.offload = tun.set_offload(ALL) | set_offload((udp,), ALL)
        own, own_ipv6 = subnets(number)
        self.table.configure(
            PacketSettings(
                *(NETWORK, own, IPv4Address(f"192.0.2.{number}"), MTU, SourceCheck.PEER, self.offload),
                network_ipv6=NETWORK_IPV6,
                own_subnet_ipv6=own_ipv6,
            )
        )
        self.set_peer(MTU)
        self._configure_device()
        worker = Worker(self.table.fd, self.stats.fd, 0, tun.fds[0], udp.fileno())
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert thread.ident
        self._worker_clock = time.pthread_getcpuclockid(thread.ident)
        undo.callback(thread.join)
        undo.callback(worker.stop)

    def set_peer(self, mtu: int, *, is_dead: bool = False) -> None:
        """`is_dead`: nothing has come from it since."""
        other = 3 - self._number
        remote = Remote(IPv4Address(f"192.0.2.{other}"), PORT, is_udptun=True)
        for subnet in subnets(other):
            index = self.table.set_peer(subnet, remote, mtu)
            if is_dead:
                self.table.set_peer(subnet, remote, mtu, is_dead=True, received=self.stats.received(index))
        while not self.table.publish(self.stats):
            time.sleep(0.001)

    def _configure_device(self) -> None:
        for name, value in (("ipv6/conf/t0/addr_gen_mode", "1"), ("ipv4/conf/t0/accept_local", "1")):
            self.ns.call(lambda name=name, value=value: Path(f"/proc/sys/net/{name}").write_text(value))
        self.ns.ip(f"link set t0 mtu {MTU} up")
        self.ns.ip(f"address add {self.ipv4}/32 dev t0")
        self.ns.add_ipv6(f"{self.ipv6}/128", "t0")
        self.ns.ip(f"route add {NETWORK} dev t0 src {self.ipv4}")
        self.ns.ip(f"-6 route add {NETWORK_IPV6} dev t0 src {self.ipv6}")

    def ping(self, *args: str) -> str:
        argv = ["ip", "netns", "exec", self.ns.name, "ping", "-c1", "-W5", *args]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout

    def datagram_socket(self, to: str) -> socket.socket:
        return self.ns.call(lambda: socket.socket(family_of(to), socket.SOCK_DGRAM))

    def traffic(self) -> dict[str, int]:
        """Bytes and packets that the device has handed over (tx) and taken (rx), each super-packet once."""
        argv = ["ip", "-n", self.ns.name, "-s", "-j", "link", "show", "t0"]
        (link,) = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=30).stdout)
        return {f"{way}_{what}": link["stats64"][way][what] for way in ("rx", "tx") for what in ("bytes", "packets")}

    def worker_s(self) -> float:
        """Processor time that the worker has used."""
        return time.clock_gettime(self._worker_clock)

    def counts(self) -> dict[str, int]:
        return {name: n for name, n in of_packets(self.stats.counters()).items() if n}


def subnets(number: int) -> tuple[IPv4Network, IPv6Network]:
    return IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:{number}::/64")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with ExitStack() as undo:
        spaces = [undo.enter_context(namespace()) for _ in range(2)]
        spaces[0].ip(f"link add u0 type veth peer name u0 netns {spaces[1].name}")
        for number, ns in enumerate(spaces, 1):
            ns.ip(f"address add 192.0.2.{number}/24 dev u0")
            ns.ip("link set u0 up")
        first, second = (Host(ns, number, undo) for number, ns in enumerate(spaces, 1))
        yield first, second


def stream(sender: Host, receiver: Host, address: str, n_bytes: int) -> tuple[str, str, float]:
    """Send over TCP; digests of what was sent and what came, and bytes per second."""
    listening = receiver.ns.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    sent, came = hashlib.sha256(), hashlib.sha256()

    def receive() -> None:
        connection, _ = listening.accept()
        with connection:
            while piece := connection.recv(1 << 20):
                came.update(piece)

    thread = threading.Thread(target=receive)
    thread.start()
    out = sender.ns.call(lambda: socket.create_connection(listening.getsockname()[:2], 10))
    piece = bytes(range(251)) * 4096
    start = time.monotonic()
    with listening, out:
        for _ in range(n_bytes // len(piece)):
            out.sendall(piece)
            sent.update(piece)
        out.shutdown(socket.SHUT_WR)
        thread.join(60)
    return sent.hexdigest(), came.hexdigest(), n_bytes / (time.monotonic() - start)


@contextmanager
def in_super_packets(sender: Host, receiver: Host) -> Iterator[None]:
    """Most of what crosses the devices in the block does so in super-packets."""
    before = sender.traffic(), receiver.traffic()
    yield
    after = sender.traffic(), receiver.traffic()
    for way, old, new in zip(("tx", "rx"), before, after, strict=True):
        n_bytes, n_packets = (new[f"{way}_{what}"] - old[f"{way}_{what}"] for what in ("bytes", "packets"))
        print(f"{way}: {n_bytes} bytes in {n_packets} packets")
        assert n_bytes / n_packets > 2 * MTU


def test_streams_of_both_families_arrive_whole_and_in_super_packets(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for address in (second.ipv4, second.ipv6):
        with in_super_packets(first, second):
            sent, came, _ = stream(first, second, address, 8 << 20)
        assert sent == came
    for host in hosts:
        assert not [name for name in host.counts() if "drop" in name]
        # The kernel refuses nothing: it cuts what we merge, of both families.
        assert not host.stats.refused(1)


def test_trains_of_datagrams_of_both_families_arrive_one_by_one(hosts: tuple[Host, Host]) -> None:
    """The device hands each train over as a super-packet, and takes what is merged of it as one."""
    first, second = hosts
    size, n = 1200, 20
    train = b"".join(bytes([i]) * size for i in range(n))
    for address in (second.ipv4, second.ipv6):
        ours, theirs = (host.datagram_socket(address) for host in hosts)
        with ours, theirs:
            theirs.bind((address, 0))
            theirs.settimeout(10)
            size_of_each = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))]
            # Kernels before 6.2 hand over and take datagrams one by one.
            can = Offload.USO in first.offload
            with in_super_packets(first, second) if can else nullcontext():
                ours.sendmsg([train], size_of_each, 0, theirs.getsockname())
                assert b"".join(theirs.recv(1 << 16) for _ in range(n)) == train

    def is_counted() -> bool:
        sent, delivered = first.counts().get("encap_sent", 0), second.counts().get("decap_delivered", 0)
        return sent == delivered >= 2 * n

    # The workers count after the call that sends or delivers.
    seconds_until(is_counted, 10)
    assert not second.stats.refused(1)


def test_datagrams_that_need_fragments_inside_pass(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for address in (second.ipv4, second.ipv6):
        assert "1 received" in first.ping("-s", "6000", address)


def test_the_kernel_believes_our_answers(hosts: tuple[Host, Host]) -> None:
    """Too big, no route, time exceeded and, of a dead peer, address unreachable: ping says what it has been told."""
    first, second = hosts
    for ping, no_route, expired in (
        ((second.ipv4,), "Destination Net Unreachable", "Time to live exceeded"),
        (("-6", second.ipv6), "Destination unreachable: No route", "Time exceeded: Hop limit"),
    ):
        nobody = "10.244.9.9" if len(ping) == 1 else "fd00:9::9"
        assert no_route in first.ping(*ping[:-1], nobody)
        assert expired in first.ping("-t1", *ping)
        # The other host's answer, through the tunnel.
        assert expired in first.ping("-t2", *ping)
    first.set_peer(MTU, is_dead=True)
    assert "Destination Host Unreachable" in first.ping(second.ipv4)
    assert "Destination unreachable: Address unreachable" in first.ping("-6", second.ipv6)
    first.set_peer(NARROW)
    size = str(MTU - 48)
    said = first.ping("-6", "-Mdo", "-s", size, second.ipv6)
    assert re.search(rf"Packet too big: mtu={NARROW}", said)
    # The kernel fragments from now on.
    assert "1 received" in first.ping("-6", "-s", size, second.ipv6)


def test_a_worker_does_not_spin_while_the_kernel_is_deleting_its_device(
    hosts: tuple[Host, Host], figure: Callable[..., None]
) -> None:
    """It did as soon as anything came from a peer: poll() returned at once, and the device read as empty."""
    first, second = hosts
    first.ns.make_slow_to_delete("t0")
    deletion = threading.Thread(target=first.ns.ip, args=("link delete t0",))
    with second.datagram_socket(first.ipv4) as sock:
        used, start = first.worker_s(), time.monotonic()
        deletion.start()
        while deletion.is_alive():
            sock.sendto(b"", (first.ipv4, 9))
            time.sleep(0.001)
        share = (first.worker_s() - used) / (time.monotonic() - start)
    figure("while its device is deleted, a worker uses of a processor", 100 * share, "%")
    assert first.stats.states(1) == [WorkerState.TUN_LOST]
    assert share < 0.2


@pytest.mark.alone
@pytest.mark.full
def test_ipv6_is_as_fast_as_ipv4(hosts: tuple[Host, Host], figure: Callable[..., None]) -> None:
    """Within 10 %, by the best of five interleaved streams."""
    first, second = hosts
    rates: dict[str, list[float]] = {second.ipv4: [], second.ipv6: []}
    for _ in range(5):
        for address, found in rates.items():
            sent, came, rate = stream(first, second, address, 256 << 20)
            assert sent == came
            found.append(rate * 8e-9)
    for address, found in rates.items():
        figure(f"TCP, 1 stream, {address}", found, "Gb/s")
    assert max(rates[second.ipv6]) > 0.9 * max(rates[second.ipv4])

"""Packets through the tunnel, end to end: real daemons, pods behind bridges, and the kernel's own tools as judges."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import packets
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP
from scapy.packet import Packet
from scapy.utils import rdpcap
from traffic import (
    has_shortcut,
    no_packet_errors,
    packet_errors,
    ping,
    read_status,
    socket_in,
    tcp_flow,
    tunnel_address,
    udp_flow,
    wait_for_peers,
)

from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, Lab, Offload

pytestmark = pytest.mark.netns

PORT = 8285
MTU = 1472
UNLEASED = "10.244.0.9"
"""The first subnet of Network is never leased (SubnetMin)."""

CONNECT = """
import errno, json, socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 80), timeout=20)
except OSError as exc:
    print(json.dumps([exc.errno and errno.errorcode[exc.errno], time.monotonic() - start]))
"""


def pods(lab: Lab) -> list[Pod]:
    return [pod for host in lab.hosts for pod in host.pods]


def features(place: Host | Pod, link: str, **wanted: str) -> None:
    """`ethtool -K`, with underscores for hyphens."""
    words = [word for name, value in wanted.items() for word in (name.replace("_", "-"), value)]
    place.run(["ethtool", "-K", link, *words])


@contextlib.contextmanager
def without_features(place: Host | Pod, link: str, *names: str) -> Iterator[None]:
    """With these features of the link switched off; all of them are on otherwise."""
    features(place, link, **dict.fromkeys(names, "off"))
    try:
        yield
    finally:
        features(place, link, **dict.fromkeys(names, "on"))


@pytest.fixture(params=["0", "1"])
def rp_filter(pair: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    """Both hosts with net.ipv4.conf.all.rp_filter at this value."""
    name = "net.ipv4.conf.all.rp_filter"
    before = [host.run(["sysctl", "-n", name]).stdout.strip() for host in pair.hosts]
    for host in pair.hosts:
        host.run(["sysctl", "-qw", f"{name}={request.param}"])
    yield
    for host, value in zip(pair.hosts, before, strict=True):
        host.run(["sysctl", "-qw", f"{name}={value}"])


def connect(place: Host | Pod, address: object) -> tuple[str, float]:
    """How a TCP connection to `address` fails, and after how many seconds."""
    name, seconds = json.loads(place.run([sys.executable, "-I", "-S", "-c", CONNECT, str(address)]).stdout)
    return name, seconds


def read_capture(path: Path) -> list[Packet]:
    return list(rdpcap(str(path))) if path.stat().st_size else []


def transport_is_right(packet: IP) -> bool:
    """Whether the TCP, UDP or ICMP checksum of a whole IPv4 packet, as it was captured, is the right one."""
    raw = bytes(packet)
    segment = raw[packet.ihl * 4 : packet.len]
    if packet.proto != 1:
        segment = raw[12:20] + struct.pack(">HH", packet.proto, len(segment)) + segment
    return bool(packets.internet_sum(segment) == 0xFFFF)


# --- reaching each other


def test_every_pod_reaches_every_other_and_every_hosts_tunnel_address_and_gateway(three_hosts: Lab) -> None:
    targets = [str(pod.address) for pod in pods(three_hosts)]
    targets += [str(address) for host in three_hosts.hosts for address in (tunnel_address(host), host.gateway.ip)]
    script = 'for a; do ping -q -c 1 -W 5 "$a" >/dev/null || echo "$a"; done'
    places: list[Host | Pod] = [*pods(three_hosts), *three_hosts.hosts]
    silent = {str(place): place.run(["sh", "-c", script, "-", *targets]).stdout.split() for place in places}
    print(f"{len(places)} places pinged {len(targets)} addresses each")
    assert {place: answers for place, answers in silent.items() if answers} == {}


@pytest.mark.parametrize("size", [MTU - 28, MTU - 27, 3000, 20_000])
def test_ping_of_any_size_is_answered_when_it_may_be_fragmented(three_hosts: Lab, size: int) -> None:
    ping(three_hosts.host(1).pod(1), three_hosts.host(2).pod(1).address, "-M", "dont", "-s", str(size))


def test_the_largest_unfragmented_ping_fills_the_mtu_exactly(three_hosts: Lab) -> None:
    one, two = three_hosts.host(1).pod(1), three_hosts.host(2).pod(1)
    ping(one, two.address, "-M", "do", "-s", str(MTU - 28))
    too_long = one.run(["ping", "-c", "1", "-M", "do", "-s", str(MTU - 27), str(two.address)], check=False)
    assert f"mtu={MTU}" in too_long.stdout + too_long.stderr


def test_streams_and_datagrams_arrive_byte_for_byte_between_all_hosts(three_hosts: Lab) -> None:
    hosts = three_hosts.hosts
    pairs = [(a.pod(1), b.pod(2)) for a, b in itertools.permutations(hosts, 2)]
    with no_packet_errors(*hosts, *pods(three_hosts)), contextlib.ExitStack() as flows:
        streams = [flows.enter_context(tcp_flow(a, b, 4e6, 5100 + i)) for i, (a, b) in enumerate(pairs)]
        datagrams = [flows.enter_context(udp_flow(a, b, 300, 5200 + i)) for i, (a, b) in enumerate(pairs)]
        datagrams[-1].wait_for_more(150)
    for stream in streams:
        stream.report.assert_exact()
    for flow in datagrams:
        assert (flow.report.lost, flow.report.n_duplicates, flow.report.n_spoilt) == ([], 0, 0)
    print(f"{sum(stream.report.received for stream in streams) / 1e6:.1f} MB compared")


@pytest.mark.parametrize("pod_offload", ["on", "off"])
@pytest.mark.parametrize("underlay", list(Offload), ids=lambda mode: mode.name.lower())
def test_iperf3_finds_no_faulty_packet_whatever_offloads_the_links_have(
    three_hosts: Lab, underlay: Offload, pod_offload: str
) -> None:
    one, two = three_hosts.host(1).pod(1), three_hosts.host(2).pod(1)
    with contextlib.ExitStack() as undo:
        three_hosts.set_offload(underlay)
        undo.callback(three_hosts.set_offload, Offload.FULL)
        for pod in (one, two):
            features(pod, "eth0", tx=pod_offload, tso=pod_offload, gso=pod_offload)
            undo.callback(features, pod, "eth0", tx="on", tso="on", gso="on")
        with no_packet_errors(three_hosts.host(1), three_hosts.host(2), one, two):
            tcp = iperf3(one, two, "-n", "32M")
            # 1 MiB of buffer, and 900 packets a second toward a device that holds 500: whoever does not get the
            # processor for half a second loses nothing.
            udp = iperf3(two, one, "-u", "-b", "10M", "-l", "1400", "-n", "1M", "-w", "1M")
            with tcp_flow(one, two, 2e7) as stream, udp_flow(two, one, 500) as datagrams:
                datagrams.wait_for_more(100)
    received = tcp["sum_received"]
    print(
        f"tcp {received['bits_per_second'] / 1e6:.0f} Mbit/s, {tcp['sum_sent']['retransmits']} retransmits; "
        f"udp {udp['sum']['packets']} packets, {udp['sum']['lost_packets']} lost"
    )
    # The client counts until it has sent its last byte, when 10 MB at most (tcp_wmem, tcp_rmem) are still on their way.
    assert received["bytes"] > 20e6
    assert udp["sum"]["lost_packets"] == 0
    stream.report.assert_exact()
    assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)


def iperf3(client: Pod, server: Pod, *options: str) -> Any:
    """iperf3's summary of one run from `client` to `server`."""
    listener = server.popen(["iperf3", "-s", "-1", "-p", "5301", "--forceflush"], stdout=subprocess.PIPE)
    with listener:
        try:
            assert listener.stdout is not None
            for line in listener.stdout:
                if "listening" in line:
                    break
            command = ["iperf3", "-c", str(server.address), "-p", "5301", "-J", *options]
            return json.loads(client.run(command).stdout)["end"]
        finally:
            listener.kill()


# --- on the wire


def test_the_underlay_carries_one_bare_ip_packet_per_datagram_and_nothing_else(two_hosts: Lab, tmp_path: Path) -> None:
    """Offloads are off at the senders: the capture shows checksums as a real network would carry them."""
    one, two = two_hosts.host(1).pod(1), two_hosts.host(2).pod(1)
    hosts = {str(host.underlay_address): host for host in two_hosts.hosts}
    two_hosts.set_offload(Offload.NONE)
    for host in two_hosts.hosts:
        features(host, "eth0", tx="off")
        features(host.pod(1), "eth0", tx="off", tso="off", gso="off")

    own = {str(tunnel_address(host)) for host in two_hosts.hosts}

    def n_echoes() -> int:
        inner = [IP(bytes(frame[UDP].payload)) for frame in read_capture(path) if UDP in frame]
        return sum(packet.proto == 1 and packet.src not in own for packet in inner)

    path = tmp_path / "wire.pcap"
    with two_hosts.capture(path):
        with tcp_flow(one, two, 1e6), udp_flow(two, one, 200) as flow:
            flow.wait_for_more(40)
        ping(one, two.address, "-s", "1444", count=3)
        ping(two, one.address, "-s", "3000", "-t", "33", count=1)
        wait_until("the capture to be complete", lambda: n_echoes() >= 6 + 6, 10)

    is_by_kernel = {address: has_shortcut(host) for address, host in hosts.items()}
    frames = read_capture(path)
    kinds = {1: 0, 6: 0, 17: 0}
    ttls = set()
    for frame in frames:
        if ARP in frame:
            continue
        outer = frame[IP]
        udp = outer[UDP]
        assert (outer.ihl, outer.tos, outer.ttl, str(outer.flags), outer.frag) == (5, 0, 64, "DF", 0)
        assert (udp.sport, udp.dport, outer.len, udp.len) == (PORT, PORT, 20 + udp.len, 8 + len(udp.payload))
        # Of the shortcut's datagrams none has one.
        assert udp.chksum != 0 or (outer.id >> 12 == 7 and is_by_kernel[outer.src])
        assert packets.internet_sum(bytes(outer)[:20]) == 0xFFFF
        assert udp.chksum == 0 or transport_is_right(outer)

        inner = IP(bytes(udp.payload))
        sender, receiver = hosts[outer.src], hosts[outer.dst]
        if inner.src in own:
            # The hosts probe each other, with echoes.
            ends = (str(tunnel_address(sender)), str(tunnel_address(receiver)), 1)
            assert (inner.src, inner.dst, inner.proto) == ends
            continue
        assert (inner.src, inner.dst) == (str(sender.pod(1).address), str(receiver.pod(1).address))
        assert inner.version == 4
        assert inner.len == len(udp.payload) <= MTU
        assert packets.internet_sum(bytes(inner)[: inner.ihl * 4]) == 0xFFFF
        if inner.frag == 0 and not inner.flags.MF:
            assert transport_is_right(inner)
        kinds[inner.proto] += 1
        ttls.add(inner.ttl)
    # One step by the host that forwards into flannel0, one by the datapath.
    assert ttls == {64 - 2, 33 - 2}
    print(f"{len(frames)} frames decoded; inner ICMP, TCP, UDP: {list(kinds.values())}")
    assert min(kinds.values()) >= 10


# --- answers from the tunnel


@pytest.mark.usefixtures("rp_filter")
def test_traceroute_shows_every_hop_through_the_tunnel(pair: Lab, figure: Callable[..., None]) -> None:
    """flannel's hops are holes: the kernel drops its ICMP as martian."""
    here, there = pair.hosts
    ping(here.pod(1), there.pod(1).address)

    def hops(source: Host | Pod) -> list[str]:
        command = ["traceroute", "-n", "-q", "1", "-w", "5", "-N", "1", str(there.pod(1).address)]
        lines = source.run(command).stdout.splitlines()[1:]
        print("\n".join(lines))
        return [line.split()[1] for line in lines]

    through = [tunnel_address(here), tunnel_address(there), tunnel_address(there), there.pod(1).address]
    seen = hops(here.pod(1))
    figure("hops that traceroute shows, of 5", len([hop for hop in seen if hop != "*"]))
    assert seen == [str(address) for address in (here.gateway.ip, *through)]
    assert hops(here) == [str(address) for address in through]


@pytest.mark.usefixtures("rp_filter")
def test_connecting_to_an_unleased_subnet_fails_at_once(pair: Lab, figure: Callable[..., None]) -> None:
    host = pair.host(1)
    before = read_status(host)["counters"]
    for place in (host.pod(1), host):
        name, seconds = connect(place, UNLEASED)
        figure(f"{name} for {'a pod' if isinstance(place, Pod) else 'a host'} after", seconds * 1000, "ms")
        assert name == "ENETUNREACH"
        assert seconds < 1
    counters = read_status(host)["counters"]
    n_refused, n_told = (counters[name] - before[name] for name in ("encap_drop_no_route", "icmp_sent"))
    assert n_refused == n_told >= 2


def test_a_smaller_mtu_on_the_way_is_told_to_senders_and_fragments_for_the_others(two_hosts: Lab) -> None:
    here, there = two_hosts.hosts
    one, two = here.pod(1), there.pod(1)
    # Both ways would fit 1,300 bytes of outer packet only; 28 of these are ours.
    path_mtu = 1300 - 28

    def ping_unfragmented(source: Host | Pod) -> str:
        command = ["ping", "-c", "3", "-i", "0.05", "-W", "5", "-M", "do", "-s", "1400", str(two.address)]
        result = source.run(command, check=False)
        assert result.returncode == 1
        return result.stdout + result.stderr

    with tcp_flow(one, two, 4e6) as stream, udp_flow(one, two, 200) as datagrams:
        datagrams.wait_for_more(50)
        here.machine.at().ip(f"route add {there.underlay_address} dev eth0 mtu 1300")
        datagrams.wait_for_more(100)
        # Paths are looked at where packets go, and what the kernel sends is counted a second later.
        wait_until("the workers to send", lambda: not read_status(here)["peers"][0]["shortcut"], 30)
        said = ping_unfragmented(one)
        assert re.search(rf"Frag needed and DF set \(mtu = {path_mtu}\)|mtu={path_mtu}", said), said
        assert f"mtu {path_mtu}" in one.run(["ip", "route", "get", str(two.address)]).stdout
        said = ping_unfragmented(here)
        assert re.search(rf"Frag needed and DF set \(mtu = {path_mtu}\)|mtu={path_mtu}", said), said
        ping(one, two.address, "-M", "dont", "-s", "1400", count=3)
        ping(one, two.address, "-M", "do", "-s", str(path_mtu - 28), count=1)
        datagrams.wait_for_more(50)
    stream.report.assert_exact()
    assert datagrams.report.lost == []
    counters = read_status(here)["counters"]
    print({name: n for name, n in counters.items() if n})
    assert counters["encap_drop_too_big"] >= 2
    assert counters["encap_drop_send"] == 0


# --- senders on virtual links


def outer_udp(payload: bytes) -> bytes:
    """A UDP segment from port to port of the tunnel, without the checksum that UDP may leave out."""
    return struct.pack(">HHHH", PORT, PORT, 8 + len(payload), 0) + payload


def send_from_the_tunnels_port(host: Host, peer: Host, payload: bytes) -> None:
    """Send a datagram of ours as if the datapath of `host` had, which has the port.

    Longer than the underlay's MTU, the kernels fragment and reassemble it: it reaches the peer's socket whole, as a
    super-packet on a virtual link does.
    """
    with socket_in(host, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        raw.sendto(outer_udp(payload), (str(peer.underlay_address), 0))


@pytest.fixture
def strict_pod(pair: Lab) -> Iterator[Pod]:
    """The pod of h2, behind a link that neither leaves checksums unfinished nor passes super-packets on.

    What reaches it has been finished by the kernel, and its own kernel verifies it.
    """
    here, there = pair.hosts
    ping(here.pod(1), there.pod(1).address)
    with without_features(there, "cni0-p1", "tx", "tso", "gso"):
        yield there.pod(1)


def test_a_datagram_whose_checksum_the_sender_left_unfinished_arrives(pair: Lab, strict_pod: Pod) -> None:
    here, there = pair.hosts
    source, destination = str(here.pod(1).address), str(strict_pod.address)
    with socket_in(strict_pod, socket.SOCK_DGRAM) as receiver, no_packet_errors(there, strict_pod):
        receiver.bind((destination, 53))
        receiver.settimeout(5)
        for check in (packets.PARTIAL, packets.FULL):
            payload = f"{check} checksum".encode()
            send_from_the_tunnels_port(here, there, packets.udp(source, destination, payload, check=check))
            assert receiver.recv(100) == payload


def test_a_datagram_with_a_wrong_checksum_is_left_to_the_receiver_to_refuse(pair: Lab, strict_pod: Pod) -> None:
    """The counterpart of the test above: its receiver does verify."""
    here, there = pair.hosts
    source, destination = str(here.pod(1).address), str(strict_pod.address)
    wrong = packets.udp(source, destination, b"wrong", check=0x1234)
    before = packet_errors(strict_pod)[f"{strict_pod} UdpInCsumErrors"]
    with socket_in(strict_pod, socket.SOCK_DGRAM) as receiver:
        receiver.bind((destination, 53))
        receiver.settimeout(5)
        send_from_the_tunnels_port(here, there, wrong)
        send_from_the_tunnels_port(here, there, packets.udp(source, destination, b"right"))
        assert receiver.recv(100) == b"right"
    assert packet_errors(strict_pod)[f"{strict_pod} UdpInCsumErrors"] == before + 1


def test_a_super_packet_reaches_the_pod_as_segments_that_fit_with_right_checksums(
    pair: Lab, strict_pod: Pod, tmp_path: Path
) -> None:
    here, there = pair.hosts
    source, destination = str(here.pod(1).address), str(strict_pod.address)
    content = bytes(range(256)) * 20
    packet = packets.tcp(source, destination, content, check=packets.PARTIAL)

    path = tmp_path / "pod.pcap"
    options = ["-i", "eth0", "-n", "-U", "--immediate-mode", "-Z", "root", "-w", str(path)]
    with strict_pod.popen(["tcpdump", *options, "tcp dst port 443"], stderr=subprocess.PIPE) as tcpdump:
        assert tcpdump.stderr is not None
        while "listening on" not in tcpdump.stderr.readline():
            assert tcpdump.poll() is None
        send_from_the_tunnels_port(here, there, packet)
        wait_until(
            "the whole content in the pod",
            lambda: sum(len(frame[TCP].payload) for frame in read_capture(path)) >= len(content),
            10,
        )
        tcpdump.terminate()

    segments = [frame[IP] for frame in read_capture(path)]
    print(f"{len(content)} bytes arrive in segments of {[len(segment[TCP].payload) for segment in segments]}")
    first = segments[0][TCP].seq
    received = bytearray(len(content))
    for segment in segments:
        assert segment.len <= MTU
        assert packets.internet_sum(bytes(segment)[:20]) == 0xFFFF
        assert transport_is_right(segment)
        data = bytes(segment)[segment.ihl * 4 + segment[TCP].dataofs * 4 : segment.len]
        received[segment[TCP].seq - first : segment[TCP].seq - first + len(data)] = data
    assert bytes(received) == content
    assert [len(segment[TCP].payload) for segment in segments[:-1]] == [MTU - 40] * (len(segments) - 1)
    assert read_status(there)["counters"]["decap_drop_oversize"] == 0


# --- the file store


@pytest.mark.parametrize("by_name", [False, True], ids=["by_address", "by_node"])
def test_two_hosts_connect_by_a_leases_file_alone(by_name: bool) -> None:
    leases = LAB_DIR / "leases.json"
    with Lab("t-file", store=f"file:{leases}") as lab:
        here, there = lab.hosts
        here.run([sys.executable, "-m", "udptun", "lease", "init", str(leases)])
        starter = here.path(leases).read_text()
        for host, example in ((here, "192.0.2.1"), (there, "192.0.2.2")):
            assert example in starter
            starter = starter.replace(example, str(host.underlay_address))
        here.path(leases).write_text(starter)
        for host, name in ((here, "alpha"), (there, "beta")):
            host.start_daemon(["--node", name] if by_name else [])
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        assert [str(host.subnet) for host in lab.hosts] == ["10.244.1.0/24", "10.244.2.0/24"]
        one, two = here.pod(1), there.pod(1)
        wait_for_peers(lab)
        ping(one, two.address)
        ping(two, tunnel_address(here))
        ping(two, one.address, "-s", "3000")
        with no_packet_errors(here, there, one, two):
            received = iperf3(one, two, "-n", "16M")["sum_received"]
            with tcp_flow(two, one, 2e7) as stream, udp_flow(one, two, 500) as datagrams:
                datagrams.wait_for_more(100)
        print(f"tcp {received['bits_per_second'] / 1e6:.0f} Mbit/s")
        stream.report.assert_exact()
        assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)

"""Hosts that have no IPv4 address, and then hosts with both families among them: the tunnel of Type udp over IPv6.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay (fd00:77::/64) -- eth0 [h2] flannel0 - cni0 -- pod h2/p1

The pods have both families.  The tests are in order: the last but one gives h2 and h3 IPv4 addresses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import packets
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.utils import rdpcap
from traffic import (
    REAL_TIME,
    assert_no_traceback,
    kill,
    no_packet_errors,
    peers,
    ping,
    read_status,
    seconds_until,
    tcp_flow,
    tunnel_address,
    udp_flow,
    wait_for_peers,
)

from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

CONF = {
    "Network": "10.244.0.0/16",
    "EnableIPv6": True,
    "IPv6Network": "fd00:244::/48",
    "Backend": {"Type": "udp"},
}
PORT, MTU, LESS = 8285, 1500 - 48, 20
STRANGER = "fd00:77::99"
SEND = """
import socket, sys
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], 0))
udp.sendto(bytes.fromhex(sys.argv[3]), (sys.argv[2], 8285))
"""


def start(host: Host) -> None:
    host.start_daemon([f"--public-ipv6={host.underlay_ipv6}"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"v{os.getpid()}", n_hosts=3, net_conf=CONF, ipv6=True, ipv4=False) as lab:
        lab.daemon_command[:0] = REAL_TIME
        for host in lab.hosts:
            start(host)
        for host in lab.hosts:
            host.wait_ready()
        for host in lab.hosts:
            host.add_pod()
        wait_for_peers(lab)
        yield lab
        assert_no_traceback(lab.hosts)


def public_ips(host: Host) -> set[str]:
    """Of the peers."""
    return set(peers(host).values())


def path_mtus(host: Host) -> dict[str, int | None]:
    """As they were measured."""
    return {peer["public_ip"]: peer["path_mtu"] for peer in read_status(host)["peers"]}


def test_hosts_are_known_by_their_ipv6_addresses_and_pods_reach_each_other(lab: Lab) -> None:
    for host in lab.hosts:
        status = read_status(host)
        assert status["problems"] == []
        assert status["lease"]["public_ip"] == status["underlay"]["address"] == str(host.underlay_ipv6)
        assert public_ips(host) == {str(it.underlay_ipv6) for it in lab.hosts if it is not host}
        assert status["backend"]["mtu"] == host.mtu == MTU
    for a, b in itertools.permutations(lab.hosts, 2):
        ping(a.pod(1), b.pod(1).address, "-M", "do", "-s", str(MTU - 28), count=1)
        ping(a.pod(1), b.pod(1).ipv6_address, "-M", "do", "-s", str(MTU - 48), count=1)
        ping(a, tunnel_address(b), count=1)
    text = lab.host(1).run([sys.executable, "-m", "udptun", "status"]).stdout
    assert f"public {lab.host(1).underlay_ipv6}" in text


def test_streams_and_datagrams_arrive_byte_for_byte_and_kill_9_loses_none(lab: Lab) -> None:
    one, two, three = lab.hosts
    with no_packet_errors(*lab.hosts, *(host.pod(1) for host in lab.hosts)), contextlib.ExitStack() as flows:
        streams = [
            flows.enter_context(tcp_flow(a.pod(1), b.pod(1), 4e6, 5100 + i, ipv6=i < 2))
            for i, (a, b) in enumerate([(one, two), (two, three), (three, one)])
        ]
        inwards = flows.enter_context(udp_flow(two.pod(1), one.pod(1), 1000, 5201))
        outwards = flows.enter_context(udp_flow(one.pod(1), three.pod(1), 1000, 5202, ipv6=True))
        inwards.wait_for_more(100)
        kill(one, read_status(one)["datapath"]["pid"])
        for flow in (inwards, outwards):
            flow.wait_for_more()
        wait_until("another process", lambda: read_status(one)["datapath"]["standby_pids"] != [], 20)
    for stream in streams:
        stream.report.assert_exact()
    assert inwards.report.lost == outwards.report.lost == []


def test_what_crosses_the_underlay_is_a_bare_packet_in_udp_over_ipv6(lab: Lab, tmp_path: Path) -> None:
    one, two = lab.host(1), lab.host(2)
    path = tmp_path / "underlay.pcap"
    # Otherwise the links leave the outer checksum to each other.
    for host in (one, two):
        host.run(["ethtool", "-K", "eth0", "tx", "off"])
    with lab.capture(path, f"udp port {PORT}"):
        ping(one.pod(1), two.pod(1).address, "-s", "100", "-Q", "0x02", count=1)
        wait_until("both packets", lambda: len(inner_packets(path, one, two)) >= 2, 10)
    for host in (one, two):
        host.run(["ethtool", "-K", "eth0", "tx", "on"])
    for outer, inner in inner_packets(path, one, two):
        assert (outer[UDP].sport, outer[UDP].dport, outer.nh) == (PORT, PORT, 17)
        assert outer.tc == inner.tos & 3
        datagram = bytes(outer[UDP])
        pseudo = bytes(outer)[8:40] + len(datagram).to_bytes(4) + bytes([0, 0, 0, 17])
        assert packets.internet_sum(pseudo + datagram) == 0xFFFF
        assert inner.ttl == 62


def inner_packets(path: Path, one: Host, two: Host) -> list[tuple[IPv6, IP]]:
    """The echo and its answer, with the outer packets."""
    captured = [frame[IPv6] for frame in rdpcap(str(path)) if IPv6 in frame] if path.stat().st_size else []
    pods = {str(one.pod(1).address), str(two.pod(1).address)}
    found = [(outer, IP(bytes(outer[UDP].payload))) for outer in captured]
    return [(outer, inner) for outer, inner in found if {inner.src, inner.dst} == pods]


def test_a_stranger_is_refused_and_named(lab: Lab) -> None:
    one, two = lab.host(1), lab.host(2)
    before = read_status(one)["counters"]["decap_drop_unknown_peer"]
    two.machine.at().ip(f"addr add {STRANGER}/128 dev eth0 nodad")
    spoofed = packets.udp(str(two.pod(1).address), str(one.pod(1).address), b"spoofed")
    two.run([sys.executable, "-c", SEND, STRANGER, str(one.underlay_ipv6), spoofed.hex()])
    wait_until("it to be counted", lambda: read_status(one)["counters"]["decap_drop_unknown_peer"] > before, 10)
    two.machine.at().ip(f"addr del {STRANGER}/128 dev eth0")
    (line,) = [line for line in read_status(one)["problems"] if STRANGER in line]
    assert f"start its daemon with --public-ipv6={STRANGER}" in line
    # The host is asked, and answers from its own address.
    assert [peer["learned"] for peer in read_status(one)["peers"]] == [[], []]


def test_hosts_that_get_ipv4_use_it_among_themselves_and_ipv6_to_the_others(lab: Lab) -> None:
    """The daemon begins again with both families, and its datapath goes on with the sockets that it had."""
    one, two, three = lab.hosts
    with udp_flow(one.pod(1), two.pod(1), 200, 5301) as flow:
        for host in (two, three):
            host.machine.at().ip(
                f"addr add {host.underlay_address}/{UNDERLAY.prefixlen} brd + dev eth0",
                f"route add default via {UNDERLAY[1]}",
            )
        two_ipv4, three_ipv4 = str(two.underlay_address), str(three.underlay_address)
        one_ipv6 = str(one.underlay_ipv6)
        seconds_until(lambda: public_ips(two) == {one_ipv6, three_ipv4}, "IPv4 between the two", 60)
        seconds_until(lambda: public_ips(three) == {one_ipv6, two_ipv4}, "IPv4 between the two", 60)
        seconds_until(lambda: len(public_ips(one)) == 2, "the third to know both", 60)
        flow.wait_for_more(50)
    assert flow.report.lost == []
    assert public_ips(one) == {str(two.underlay_ipv6), str(three.underlay_ipv6)}
    assert read_status(two)["backend"]["mtu"] == two.mtu == MTU + LESS
    # The pods' links were made with what they could have before.
    ping(two.pod(1), three.pod(1).address, "-M", "do", "-s", str(MTU - 28), count=1)
    # From the host, whose route to the pods over IPv6 is narrower than the device.
    ping(two, three.pod(1).address, "-M", "dont", "-s", str(MTU + LESS - 28), count=1)
    for address in (one.pod(1).address, one.pod(1).ipv6_address):
        ping(two, address, "-M", "dont", "-s", str(MTU + LESS - 28), count=1)
    wanted = {one_ipv6: MTU, three_ipv4: MTU + LESS}
    seconds_until(lambda: path_mtus(two) == wanted, "both paths to be measured", 30)
    route = two.run(["ip", "route", "get", str(one.pod(1).address)]).stdout
    assert f"mtu {MTU}" in route
    assert [line for line in read_status(two)["problems"] if "the path to" in line] == []


def test_a_host_with_both_families_spreads_flows_over_ports_of_each(lab: Lab, tmp_path: Path) -> None:
    """Before, all that it sent over IPv6 left from one port.  A daemon that adopts the datapath keeps the ports."""
    one, two, three = lab.hosts
    more = [f"--public-ipv6={two.underlay_ipv6}", "--source-ports=4"]

    def restart() -> None:
        two.stop_daemon()
        two.start_daemon(more)
        two.wait_ready()

    with contextlib.ExitStack() as flows:
        running = [
            flows.enter_context(udp_flow(two.pod(1), host.pod(1), 400, 5400 + i, from_many_ports=True))
            for i, host in enumerate((one, three))
        ]
        restart()
        found = []
        for i in range(2):
            path = tmp_path / f"{i}.pcap"
            hosts = f"(src host {two.underlay_ipv6} or src host {two.underlay_address})"
            with lab.capture(path, f"udp dst port {PORT} and {hosts}"):
                for flow in running:
                    flow.wait_for_more(100)
            found.append(outer_ports(path))
            restart()
    assert [flow.report.lost for flow in running] == [[], []]
    assert found[0] == found[1]
    assert [len(ports) for ports in found[0].values()] == [4, 4]


def outer_ports(path: Path) -> dict[int, set[int]]:
    """From which the datagrams of each outer version of IP come, but for our own, from which probes leave."""
    found: dict[int, set[int]] = {4: set(), 6: set()}
    for frame in rdpcap(str(path)):
        if UDP in frame and frame[UDP].sport != PORT:
            found[6 if IPv6 in frame else 4].add(frame[UDP].sport)
    return found

"""The userspace VTEP among nodes that use the kernel's VXLAN.

    h1   the kernel's VXLAN, set up by `ip` and `bridge` as flannel's vxlan backend does it
    h2   udptun, "Type": "vxlan", with the kernel's VXLAN
    h3   udptun with the same configuration, whose kernel says that it has no vxlan

    pod -- cni0 [h1] flannel.1 (vxlan) eth0 -- \\
    pod -- cni0 [h2] flannel.1 (vxlan) eth0 -- underlay -- eth0 flannel.1 (tun) [h3] cni0 -- pod
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from pathlib import Path
from typing import Any

import pytest
from packets import internet_sum
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet
from scapy.utils import rdpcap
from test_marks import carried, marking
from traffic import (
    REAL_TIME,
    datapath_pids,
    kill,
    no_packet_errors,
    peers,
    ping,
    read_status,
    seconds_until,
    tcp_flow,
    udp_flow,
)

from udptun.backends.vtep import N_SENDERS
from udptun.core.lease import LeaseAttrs, Subnets
from udptun.core.offload import ALL, names
from udptun.core.offload import Offload as KernelOffload
from udptun.lab.host import SUBNET_ENV, UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
MTU = 1450
PORT = 8472
EVERY = names(ALL & ~KernelOffload.VNET_HDR)
"""But the one that does not change while the device is there."""


CLAIM = """
import asyncio, ipaddress, pathlib, sys
from udptun.core.lease import LeaseAttrs, Subnets
from udptun.core.offload import ALL, names
from udptun.core.offload import Offload as KernelOffload
from udptun.stores.base import SubnetChoice
from udptun.stores.local.store import LocalStore

async def claim():
    store = LocalStore(pathlib.Path(sys.argv[1]), pathlib.Path("/net-conf.json"))
    subnets = Subnets(ipaddress.IPv4Network(sys.argv[3]))
    await store.claim(LeaseAttrs.from_json(sys.argv[2]), lambda leases: SubnetChoice(subnets))
    await store.aclose()

asyncio.run(claim())
"""
READ = """
import sqlite3, sys
print(sqlite3.connect(sys.argv[1]).execute("select value from leases where key = ?", sys.argv[2:]).fetchone()[0])
"""


PYTHON = [sys.executable, "-I", "-S", "-c"]
DATAGRAM = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", int(sys.argv[2])))
for _ in range(2):
    sock.sendto(bytes(64), (sys.argv[1], 9))
"""

N_FLOWS = 20
N_TRAINS, TRAIN = 100, 40
TRAIN_SENDER = f"""
import hashlib, socket, sys, time
address, size = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(17, 103, size)
for train in range({N_TRAINS}):
    numbers = [n.to_bytes(8) for n in range(train * {TRAIN}, (train + 1) * {TRAIN})]
    sock.sendto(b"".join(hashlib.shake_128(n).digest(size - 8) + n for n in numbers), (address, 5009))
    time.sleep(0.002)
"""
TRAIN_RECEIVER = f"""
import hashlib, json, socket, sys
size = int(sys.argv[2])
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)
sock.bind((sys.argv[1], 5009))
print("ready", flush=True)
spoilt = out_of_order = 0
last = -1
seen = set()
sock.settimeout(30)
try:
    while len(seen) < {N_TRAINS * TRAIN}:
        data = sock.recv(65536)
        sock.settimeout(3)
        number = int.from_bytes(data[-8:])
        spoilt += data[:-8] != hashlib.shake_128(data[-8:]).digest(size - 8)
        out_of_order += number < last
        last = number
        seen.add(number)
except TimeoutError:
    pass
print(json.dumps(dict(n=len(seen), spoilt=spoilt, out_of_order=out_of_order)))
"""


def udp_checksum_is_right(packet: IP) -> bool:
    raw = bytes(packet)
    datagram = raw[packet.ihl * 4 : packet.len]
    pseudo = raw[12:20] + struct.pack(">HH", 17, len(datagram))
    return bool(internet_sum(pseudo + datagram) == 0xFFFF)


def kernel_mac(host: Host) -> str:
    return f"0a:00:00:00:00:{host.index:02x}"


def kernel_subnet(host: Host) -> IPv4Network:
    return IPv4Network(f"10.244.{200 + host.index}.0/24")


def lease_kernel_node(host: Host) -> None:
    """What flanneld would write for a host on the kernel's VXLAN: its lease, and subnet.env."""
    subnet = kernel_subnet(host)
    data = {"VNI": 1, "VtepMAC": kernel_mac(host)}
    attrs = LeaseAttrs(host.underlay_address, backend_type="vxlan", backend_data=data)
    # In the host: SQLite resolves the path through /proc to one of ours.
    host.run([sys.executable, "-c", CLAIM, str(LEASES), attrs.to_json(), str(subnet)])
    env = host.path(SUBNET_ENV)
    env.parent.mkdir(parents=True, exist_ok=True)
    env.write_text(
        f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={subnet[1]}/24\nFLANNEL_MTU={MTU}\nFLANNEL_IPMASQ=false\n"
    )


def make_kernel_node(host: Host, peers: dict[Host, tuple[IPv4Network, str]]) -> None:
    """flannel.1 and, for each peer, neighbour, forwarding entry and route."""
    host.machine.at().ip(
        f"link add flannel.1 address {kernel_mac(host)} mtu {MTU}"
        f" type vxlan id 1 local {host.underlay_address} dev eth0 dstport {PORT} nolearning",
        f"addr add {kernel_subnet(host).network_address}/32 dev flannel.1",
        "link set flannel.1 up",
    )
    for peer, (subnet, mac) in peers.items():
        host.machine.at().ip(
            f"neigh replace {subnet.network_address} lladdr {mac} dev flannel.1 nud permanent",
            f"route add {subnet} via {subnet.network_address} dev flannel.1 onlink",
        )
        remote = str(peer.underlay_address)
        host.run(["bridge", "fdb", "append", mac, "dev", "flannel.1", "dst", remote, "self", "permanent"])


def own_lease(host: Host) -> dict[str, Any]:
    """The lease that the host's daemon has written."""
    gateway = host.ipv6_gateway
    key = Subnets(host.subnet, None if gateway is None else gateway.network).key
    return json.loads(host.run([sys.executable, "-c", READ, str(LEASES), key]).stdout)


def start_without_vxlan(host: Host) -> None:
    host.start_daemon(command=["env", "UDPTUN_PRETEND_NO_VXLAN=1", *host.lab.daemon_command])


@contextlib.contextmanager
def mixed_lab(name: str) -> Iterator[Lab]:
    with Lab(name, n_hosts=3, net_conf=CONF) as lab:
        one, two, three = lab.hosts
        lab.daemon_command[:0] = REAL_TIME
        lease_kernel_node(one)
        two.start_daemon()
        start_without_vxlan(three)
        for host in (two, three):
            host.wait_ready()
        make_kernel_node(one, {host: (host.subnet, own_lease(host)["BackendData"]["VtepMAC"]) for host in (two, three)})
        for host in lab.hosts:
            host.add_pod()
        yield lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with mixed_lab("t-vtep") as lab:
        yield lab


def pods(lab: Lab) -> list[Pod]:
    return [pod for host in lab.hosts for pod in host.pods]


def far_pairs(lab: Lab) -> list[tuple[Pod, Pod]]:
    """Both directions between the VTEP and a kernel node."""
    kernel, ours = lab.host(1).pod(1), lab.host(3).pod(1)
    return [(kernel, ours), (ours, kernel)]


@contextlib.contextmanager
def every_packet_explained(host: Host) -> Iterator[dict[str, int]]:
    """Fails when a datapath drops anything; what its counters grew by is there after the block."""
    before = counters(host)
    moved: dict[str, int] = {}
    yield moved
    moved.update({name: n - before[name] for name, n in counters(host).items() if n != before[name]})
    print(f"{host.name}: {moved}")
    # On a device that is new or has a new address the kernel reports its multicast groups, within a second or two.
    assert not [name for name in moved if "_drop_" in name and name != "ipv6 encap_drop_no_route"]


def counters(host: Host) -> dict[str, int]:
    """Of all datapaths."""
    status = read_status(host)
    of_ipv6 = {} if status["ipv6"] is None else status["ipv6"]["counters"]
    return {**status["counters"], **{f"ipv6 {name}": n for name, n in of_ipv6.items()}}


OF_THE_DEVICE = "no-help-from-the-vxlan-device"
LINKS = {
    "as-made": [],
    "checksums-complete": ["tx", "off"],
    "cut-by-the-sender": ["tso", "off", "gso", "off", "tx-udp-segmentation", "off"],
    "merged-by-the-receiver": ["tso", "off", "gso", "off", "tx-udp-segmentation", "off", "gro", "on"],
    OF_THE_DEVICE: ["tx", "off", "tso", "off", "gso", "off", "tx-udp-segmentation", "off", "gro", "off"],
    "no-help-at-all": ["tx", "off", "tso", "off", "gso", "off", "tx-udp-segmentation", "off", "gro", "off"],
}


@contextlib.contextmanager
def links_that(lab: Lab, what: str) -> Iterator[None]:
    """With eth0 of the VTEP's host and of a kernel node's, or the latter's VXLAN device, switched as LINKS has it."""
    places = [(lab.host(1), "flannel.1")] if what == OF_THE_DEVICE else [(lab.host(1), "eth0"), (lab.host(3), "eth0")]
    if words := LINKS[what]:
        for host, link in places:
            host.run(["ethtool", "-K", link, *words])
    try:
        yield
    finally:
        for host, link in places:
            host.run(["ethtool", "-K", link, "tx", "on", "gro", "on" if link == "flannel.1" else "off"])
            host.run(["ethtool", "-K", link, "tso", "on", "gso", "on", "tx-udp-segmentation", "on"])


@pytest.fixture(params=LINKS)
def links(lab: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    with links_that(lab, request.param):
        yield


# --- what it looks like


def test_lease_and_device_are_what_flannel_nodes_look_for(lab: Lab) -> None:
    host = lab.host(3)
    lease = own_lease(host)
    mac = lease["BackendData"]["VtepMAC"]
    assert list(lease["BackendData"])[:2] == ["VNI", "VtepMAC"]
    assert (lease["BackendType"], lease["BackendData"]["VNI"]) == ("vxlan", 1)
    assert lease["PublicIP"] == str(host.underlay_address)
    assert re.fullmatch(r"[0-9a-f][26ae](:[0-9a-f]{2}){5}", mac)
    assert host.mtu == MTU
    device = json.loads(host.run(["ip", "-j", "-d", "addr", "show", "flannel.1"]).stdout)[0]
    assert (device["linkinfo"]["info_kind"], device["mtu"]) == ("tun", MTU)
    assert [(it["local"], it["prefixlen"]) for it in device["addr_info"]] == [(str(host.subnet.network_address), 32)]
    # What hosts can lease leads into the device, and nothing else of Network: by default the first subnet is left out.
    leasable = summarize_address_range(IPv4Address("10.244.1.0"), IPv4Address("10.244.255.255"))
    routes = json.loads(host.run(["ip", "-j", "route", "show", "dev", "flannel.1"]).stdout)
    assert {route["dst"]: route.get("type", "unicast") for route in routes} == {
        str(prefix): "unicast" for prefix in leasable if prefix != host.subnet
    }
    assert "the kernel has no vxlan" in host.daemon_log()
    facts = read_status(host)["backend"]
    assert (facts["type"], facts["device"], facts["mtu"]) == ("vxlan", "flannel.1", MTU)


def test_captures_decode_as_vxlan_from_many_ports(lab: Lab, tmp_path: Path) -> None:
    """tcpdump, and scapy for what it does not print: the prefix to the bit, both checksums, the ports."""
    ours, kernel = lab.host(3), lab.host(1)
    macs = {
        ours.underlay_address: own_lease(ours)["BackendData"]["VtepMAC"],
        kernel.underlay_address: kernel_mac(kernel),
    }
    path = tmp_path / "vxlan.pcap"
    pairs = far_pairs(lab)

    def captured() -> list[Packet]:
        """All but our probes, which go to every host, and their answers."""
        own = str(ours.subnet.network_address)
        inner = [(packet, VXLAN(bytes(packet[UDP].payload))[IP]) for packet in rdpcap(str(path))]
        return [packet for packet, ip in inner if own not in (ip.src, ip.dst)]

    # Whole frames, and all checksums complete.
    with links_that(lab, "no-help-at-all"), lab.capture(path, f"udp port {PORT}"):
        for source, destination in pairs:
            for port in range(5100, 5100 + N_FLOWS):
                source.run([*PYTHON, DATAGRAM, str(destination.address), str(port)])
            ping(source, destination.address, "-s", "3000")
        expected = 2 * (2 * N_FLOWS + 2 * 2 * 3)
        wait_until("the capture", lambda: len(captured()) >= expected, 10)

    text = lab.switch.run(["tcpdump", "-n", "-T", "vxlan", "-r", str(path)]).stdout
    assert text.count("VXLAN, flags [I] (0x08), vni 1") >= expected
    sent = [packet for packet in captured() if packet[IP].src == str(ours.underlay_address)]
    received = [packet for packet in captured() if packet[IP].src == str(kernel.underlay_address)]
    for packets in (sent, received):
        for packet in packets:
            payload = bytes(packet[UDP].payload)[: packet[UDP].len - 8]
            inner = VXLAN(payload)
            assert payload[:8] == bytes.fromhex("0800000000000100")
            assert (inner[Ether].src, inner[Ether].dst) == tuple(
                macs[IPv4Address(address)] for address in (packet[IP].src, packet[IP].dst)
            )
            assert inner[Ether].type == 0x0800
            assert packet[UDP].dport == PORT
            assert udp_checksum_is_right(packet[IP]) or packet[UDP].chksum == 0
            ip = inner[IP]
            assert internet_sum(bytes(ip)[:20]) == 0xFFFF
            assert ip.proto != 17 or udp_checksum_is_right(ip)
    ports = {packet[UDP].sport for packet in sent}
    print(f"source ports of the VTEP: {sorted(ports)}, of the kernel: {len({it[UDP].sport for it in received})}")
    assert 3 <= len(ports) <= N_SENDERS
    assert PORT not in ports
    fragments = {
        packet[UDP].sport for packet in sent if (ip := VXLAN(bytes(packet[UDP].payload))[IP]).flags.MF or ip.frag
    }
    assert len(fragments) == 1


# --- reaching each other


def test_all_pods_reach_each_other(lab: Lab) -> None:
    for one, two in itertools.permutations(pods(lab), 2):
        ping(one, two.address)


@pytest.mark.parametrize("size", [MTU - 28, MTU - 27, 3000, 20_000, 65_507 - 20])
def test_pings_of_any_size_are_answered_between_all_kinds(lab: Lab, size: int) -> None:
    with every_packet_explained(lab.host(3)):
        for one, two in far_pairs(lab):
            ping(one, two.address, "-M", "dont", "-s", str(size))


def test_the_largest_unfragmented_ping_fills_the_mtu_exactly(lab: Lab) -> None:
    for one, two in far_pairs(lab):
        ping(one, two.address, "-M", "do", "-s", str(MTU - 28))
        too_long = one.run(["ping", "-c", "1", "-M", "do", "-s", str(MTU - 27), str(two.address)], check=False)
        assert f"mtu={MTU}" in (too_long.stdout + too_long.stderr).replace(" ", "")


def test_the_host_itself_is_reached_and_reaches(lab: Lab) -> None:
    ours, kernel = lab.host(3), lab.host(1)
    ping(ours, kernel.pod(1).address)
    ping(kernel, ours.pod(1).address)
    ping(kernel.pod(1), ours.subnet.network_address)
    ping(ours.pod(1), kernel_subnet(kernel).network_address)


def test_traceroute_from_a_kernel_node_shows_the_vtep(lab: Lab) -> None:
    """The answer to a packet whose TTL ends at our side goes back through the tunnel, as VXLAN."""
    source, ours = lab.host(1).pod(1), lab.host(3)
    command = ["traceroute", "-n", "-q", "1", "-w", "5", "-N", "1", str(ours.pod(1).address)]
    hops = [line.split()[1] for line in source.run(command).stdout.splitlines()[1:]]
    assert hops[-1] == str(ours.pod(1).address)
    assert str(ours.subnet.network_address) in hops


def test_marks_of_congestion_reach_the_pods_both_ways(lab: Lab) -> None:
    """The kernel's VXLAN has the inner packet's ECN field outside, and marks inside what is marked on the way."""
    for one, two in far_pairs(lab):
        assert [carried(one, two, field) for field in range(4)] == [0, 1, 2, 3]
        with marking(lab):
            assert [carried(one, two, field) for field in range(4)] == [0, 3, 3, 3]


# --- the kernel's offloads


def test_traffic_is_exact_whatever_the_links_do(lab: Lab, links: None) -> None:
    for source, destination in far_pairs(lab):
        with no_packet_errors(lab.host(1), lab.host(3), source, destination), every_packet_explained(lab.host(3)):
            with tcp_flow(source, destination, 200e6) as stream, udp_flow(destination, source, 500) as datagrams:
                datagrams.wait_for_more(150)
            stream.report.assert_exact()
            report = datagrams.report
            assert (report.lost, report.n_duplicates, report.n_spoilt, report.n_out_of_order) == ([], 0, 0, 0)


@pytest.mark.parametrize("size", [100, pytest.param(1000, marks=pytest.mark.full), MTU - 28])
def test_datagrams_that_a_pod_sends_as_one_are_received_one_by_one(lab: Lab, links: None, size: int) -> None:
    """UDP_SEGMENT in the pod: a kernel node hands us the inner super-packet whole, and we cut up what the TUN gives."""
    for source, destination in far_pairs(lab):
        assert_trains_arrive(lab, source, destination, size)


def assert_trains_arrive(lab: Lab, source: Pod, destination: Pod, size: int, *, ipv6: bool = False) -> None:
    words = [str(destination.ipv6_address if ipv6 else destination.address), str(size)]
    with (
        no_packet_errors(lab.host(1), lab.host(3), source, destination),
        every_packet_explained(lab.host(3)),
        destination.popen([*PYTHON, TRAIN_RECEIVER, *words], stdout=subprocess.PIPE) as receiver,
    ):
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        source.run([*PYTHON, TRAIN_SENDER, *words], timeout=60)
        got = json.loads(receiver.communicate(timeout=60)[0])
    assert got == {"n": N_TRAINS * TRAIN, "spoilt": 0, "out_of_order": 0}


@pytest.mark.parametrize("off", [EVERY, ["udp_gro"], ["tso", "uso"], ["write_tcp", "write_udp"]], ids="-".join)
def test_traffic_is_exact_with_offloads_of_ours_switched_off(lab: Lab, off: list[str]) -> None:
    host = lab.host(3)
    reload(host, {"Type": "vxlan", "OffloadDisabled": off})
    assert not set(off) & set(read_status(host)["backend"]["offloads"])
    for source, destination in far_pairs(lab):
        assert_trains_arrive(lab, source, destination, 500)
        with tcp_flow(source, destination, 100e6) as stream, udp_flow(destination, source, 500) as datagrams:
            datagrams.wait_for_more(100)
        stream.report.assert_exact()
        assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)
    reload(host, {"Type": "vxlan"})


def reload(host: Host, backend: dict[str, object]) -> None:
    host.path(NET_CONF).write_text(json.dumps(CONF | {"Backend": backend}))
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)
    host.wait_ready()


# --- faults


def test_a_deleted_device_comes_back_and_connections_survive(lab: Lab) -> None:
    host = lab.host(3)
    kernel, ours = lab.host(1).pod(1), host.pod(1)
    with tcp_flow(ours, kernel, 20e6) as stream, tcp_flow(kernel, ours, 20e6, port=5003) as back:
        for command in ("link delete flannel.1", "link set flannel.1 down", "addr flush dev flannel.1"):
            host.machine.at().ip(command)
            took = seconds_until(lambda: bool(ping(kernel, ours.address, "-W", "0.2", count=1)), "a ping", 5)
            print(f"{command}: repaired within {took:.2f} s")
    for flow in (stream, back):
        flow.report.assert_exact()


def test_changing_over_to_the_kernel_and_back_changes_nothing_for_the_peers(lab: Lab) -> None:
    host = lab.host(3)
    before = own_lease(host)
    kernel, ours = lab.host(1).pod(1), host.pod(1)
    for start, kind in ((host.start_daemon, "vxlan"), (lambda: start_without_vxlan(host), "tun")):
        assert host.stop_daemon() == 0
        start()
        host.wait_ready()
        device = json.loads(host.run(["ip", "-j", "-d", "link", "show", "flannel.1"]).stdout)[0]
        assert device["linkinfo"]["info_kind"] == kind
        assert own_lease(host) == before
        assert bool(datapath_pids(host)) == (kind == "tun")
        for one, two in ((kernel, ours), (ours, kernel)):
            ping(one, two.address, "-s", "3000")


def test_nothing_is_lost_when_datapath_and_daemon_are_killed(lab: Lab) -> None:
    host = lab.host(3)
    mac = own_lease(host)["BackendData"]["VtepMAC"]
    kernel, ours = lab.host(1).pod(1), host.pod(1)
    with (
        tcp_flow(ours, kernel, 20e6) as out,
        tcp_flow(kernel, ours, 20e6, port=5003) as into,
        udp_flow(ours, kernel, 1000) as datagrams,
        udp_flow(kernel, ours, 1000, port=5004) as back,
    ):
        datagrams.wait_for_more()
        for _ in range(5):
            kill(host, read_status(host)["datapath"]["pid"])
            wait_until("a datapath with a standby", lambda: is_full(host), 10)
            datagrams.wait_for_more(100)
        kill(host, read_status(host)["pid"])
        datagrams.wait_for_more(100)
        start_without_vxlan(host)
        host.wait_ready()
        datagrams.wait_for_more(100)
    for stream in (out, into):
        stream.report.assert_exact()
    for flow in (datagrams, back):
        assert (flow.report.lost, flow.report.n_spoilt) == ([], 0)
    assert own_lease(host)["BackendData"]["VtepMAC"] == mac
    assert "datapath adopted" in host.daemon_log()


@pytest.mark.full
def test_super_packets_in_hand_are_handed_on_whole_when_the_datapath_is_killed(lab: Lab) -> None:
    """A batch may come twice; nothing is lost, and no piece of a super-packet is taken for a packet."""
    host = lab.host(3)
    source, destination = far_pairs(lab)[0]
    gone = n_kills = 0
    for _ in range(20):
        # It waits longer and longer with the next start when processes die again and again.
        assert host.stop_daemon() == 0
        start_without_vxlan(host)
        host.wait_ready()
        with every_packet_explained(host):
            words = [str(destination.address), "1000"]
            with destination.popen([*PYTHON, TRAIN_RECEIVER, *words], stdout=subprocess.PIPE) as receiver:
                assert receiver.stdout is not None
                assert receiver.stdout.readline() == "ready\n"
                with source.popen([*PYTHON, TRAIN_SENDER, *words]) as sender:
                    while sender.poll() is None:
                        wait_until("a standby", lambda gone=gone: is_full(host, gone), 10)  # type: ignore[misc]
                        gone = read_status(host)["datapath"]["pid"]
                        kill(host, gone)
                        n_kills += 1
                got = json.loads(receiver.communicate(timeout=60)[0])
        assert (got["n"], got["spoilt"]) == (N_TRAINS * TRAIN, 0)
    print(f"{n_kills} kills")
    wait_until("a datapath with a standby", lambda: is_full(host, gone), 10)


def is_full(host: Host, gone: int = 0) -> bool:
    """Whether there is an active process, not `gone`, and a standby."""
    datapath = read_status(host)["datapath"]
    return datapath["pid"] not in (None, gone) and len(datapath["standby_pids"]) == 1


def test_leases_without_a_vtep_are_left_out_with_one_line_each(lab: Lab) -> None:
    host = lab.host(3)
    before = len(host.daemon_log())
    for number, data in enumerate(({"VNI": 1}, {"VNI": 1, "VtepMAC": "01:00:5e:00:00:01"}, None)):
        attrs = LeaseAttrs(UNDERLAY[200 + number], backend_type="" if data is None else "vxlan", backend_data=data)
        host.run([sys.executable, "-c", CLAIM, str(LEASES), attrs.to_json(), f"10.244.{220 + number}.0/24"])
    wait_until("the three to be skipped", lambda: len(read_status(host)["skipped"]) == 3, 10)
    skipped = read_status(host)["skipped"]
    print("\n".join(skipped))
    assert sum("VtepMAC" in line for line in skipped) == 2
    assert sum("BackendType is empty" in line for line in skipped) == 1
    assert host.daemon_log()[before:].count("10.244.22") == 3
    assert set(peers(host)) == {str(lab.host(1).subnet), str(lab.host(2).subnet)}

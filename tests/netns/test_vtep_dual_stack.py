"""Both families through userspace VTEPs, each over its own, among nodes that use the kernel's VXLAN.

    h1      the kernel's VXLAN of both families, set up by `ip` and `bridge` as flannel's vxlan backend does it
    h2, h3  udptun, "Type": "vxlan", whose kernels say that they have no vxlan

    pod -- cni0 [h1] flannel.1, flannel-v6.1 (vxlan) eth0 -- \\
    pod -- cni0 [h2] flannel.1, flannel-v6.1 (tun)   eth0 -- underlay -- eth0 [h3] -- pod
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.utils import rdpcap
from test_dual_stack_udp import ping_all
from test_vtep import (
    PORT,
    assert_trains_arrive,
    counters,
    every_packet_explained,
    links_that,
    own_lease,
    start_without_vxlan,
)
from traffic import (
    CLEANUP,
    REAL_TIME,
    assert_no_traceback,
    datapath_pids,
    ipv6_gateway,
    is_answered,
    kill,
    no_packet_errors,
    ping,
    problems,
    read_status,
    seconds_until,
    tcp_flow,
    udp_flow,
)

from udptun.core.lease import LeaseAttrs
from udptun.lab.host import SUBNET_ENV, UNDERLAY_IPV6, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

CONF = {
    "Network": "10.244.0.0/16",
    "SubnetMax": "10.244.99.0",
    "EnableIPv6": True,
    "IPv6Network": "fd00:244::/48",
    "IPv6SubnetMax": "fd00:244:0:99::",
    "Backend": {"Type": "vxlan"},
}
DEVICE, MTU = "flannel-v6.1", 1430
KERNEL_SUBNETS = IPv4Network("10.244.201.0/24"), IPv6Network("fd00:244:0:201::/64")
KERNEL_MACS = "0a:00:00:00:00:01", "0a:00:00:00:00:06"

CLAIM = """
import asyncio, ipaddress, pathlib, sys
from udptun.core.lease import LeaseAttrs, Subnets
from udptun.stores.base import SubnetChoice
from udptun.stores.local.store import LocalStore

async def claim():
    store = LocalStore(pathlib.Path(sys.argv[1]), pathlib.Path("/net-conf.json"))
    subnets = Subnets(*map(ipaddress.ip_network, sys.argv[3:]))
    await store.claim(LeaseAttrs.from_json(sys.argv[2]), lambda leases: SubnetChoice(subnets))
    await store.aclose()

asyncio.run(claim())
"""


def lease_kernel_node(host: Host) -> None:
    """What flanneld would write for a host on the kernel's VXLAN: its lease, and subnet.env."""
    data = [{"VNI": 1, "VtepMAC": mac} for mac in KERNEL_MACS]
    attrs = LeaseAttrs(host.underlay_address, host.underlay_ipv6, "vxlan", *data)
    subnet, subnet6 = KERNEL_SUBNETS
    host.run([sys.executable, "-c", CLAIM, str(LEASES), attrs.to_json(), str(subnet), str(subnet6)])
    env = host.path(SUBNET_ENV)
    env.parent.mkdir(parents=True, exist_ok=True)
    env.write_text(
        f"FLANNEL_NETWORK={CONF['Network']}\nFLANNEL_SUBNET={subnet[1]}/24\n"
        f"FLANNEL_IPV6_NETWORK={CONF['IPv6Network']}\nFLANNEL_IPV6_SUBNET={subnet6[1]}/64\n"
        f"FLANNEL_MTU={MTU}\nFLANNEL_IPMASQ=false\n"
    )


def make_kernel_node(host: Host, peers: list[Host]) -> None:
    """The two devices and, for each peer and family, neighbour, forwarding entry and route."""
    at = host.machine.at()
    for device, mtu, own, mac, local in (
        ("flannel.1", 1450, KERNEL_SUBNETS[0], KERNEL_MACS[0], host.underlay_address),
        (DEVICE, MTU, KERNEL_SUBNETS[1], KERNEL_MACS[1], host.underlay_ipv6),
    ):
        at.ip(
            f"link add {device} address {mac} mtu {mtu} type vxlan id 1 local {local} dev eth0 dstport {PORT} "
            "nolearning",
            f"addr add {own.network_address}/{own.max_prefixlen} dev {device}",
            f"link set {device} up",
        )
    for peer in peers:
        lease = own_lease(peer)
        for device, key, subnet, remote in (
            ("flannel.1", "BackendData", peer.subnet, peer.underlay_address),
            (DEVICE, "BackendV6Data", ipv6_gateway(peer).network, peer.underlay_ipv6),
        ):
            first, mac = subnet.network_address, lease[key]["VtepMAC"]
            at.ip(
                f"neigh replace {first} lladdr {mac} dev {device} nud permanent",
                f"route add {subnet} via {first} dev {device} onlink",
            )
            host.run(["bridge", "fdb", "append", mac, "dev", device, "dst", str(remote), "self", "permanent"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"v6{os.getpid()}", n_hosts=3, net_conf=CONF, ipv6=True) as lab:
        one, *others = lab.hosts
        lab.daemon_command[:0] = REAL_TIME
        lease_kernel_node(one)
        for host in others:
            start_without_vxlan(host)
        for host in others:
            host.wait_ready()
        make_kernel_node(one, others)
        for host in lab.hosts:
            host.add_pod()
        wait_until("all peers", lambda: all(n_peers(host) == (2, 2) for host in others), 50)
        yield lab
        assert_no_traceback(others)


def n_peers(host: Host) -> tuple[int, int]:
    status = read_status(host)
    return len(status["peers"]), len(status["ipv6"]["peers"])


def pairs(lab: Lab) -> list[tuple[Pod, Pod]]:
    """To a kernel's VXLAN, from there, and between two VTEPs."""
    kernel, one, other = (host.pod(1) for host in lab.hosts)
    return [(one, kernel), (kernel, one), (one, other)]


def n_dropped(host: Host) -> int:
    """Packets that found the queue of IPv6's device full."""
    (device,) = [it for it in read_status(host)["devices"] if it["name"] == DEVICE]
    return int(device["tx_dropped"])


def datapaths(host: Host) -> list[int]:
    """The pids of the active processes, IPv4's first; only with a standby each."""
    status = read_status(host)
    parts = [status["datapath"], status["ipv6"]["datapath"]]
    assert all(part["pid"] and len(part["standby_pids"]) == 1 for part in parts)
    return [part["pid"] for part in parts]


# --- what it looks like


def test_lease_devices_and_status_name_both_families(lab: Lab) -> None:
    host, status = lab.host(3), read_status(lab.host(3))
    lease = own_lease(host)
    assert lease["PublicIPv6"] == str(host.underlay_ipv6)
    assert (list(lease["BackendV6Data"]), lease["BackendV6Data"]["VNI"]) == (["VNI", "VtepMAC"], 1)
    assert lease["BackendV6Data"]["VtepMAC"] != lease["BackendData"]["VtepMAC"]
    (device,) = json.loads(host.run(["ip", "-j", "-d", "addr", "show", DEVICE]).stdout)
    assert (device["linkinfo"]["info_kind"], device["mtu"]) == ("tun", MTU)
    first = ipv6_gateway(host).network.network_address
    assert [(it["local"], it["prefixlen"]) for it in device["addr_info"]] == [(str(first), 128)]
    assert host.mtu == MTU
    assert (status["backend"]["device"], status["backend"]["mtu"]) == ("flannel.1", 1450)
    ipv6 = status["ipv6"]
    assert (ipv6["device"], ipv6["mtu"], status["problems"]) == (DEVICE, MTU, [])
    assert ipv6["datapath"].keys() == status["datapath"].keys()
    assert ipv6["counters"].keys() == status["counters"].keys()
    assert {peer["public_ip"] for peer in ipv6["peers"]} == {str(it.underlay_ipv6) for it in lab.hosts[:2]}
    text = host.run([sys.executable, "-m", "udptun", "status"]).stdout
    assert re.search(r"^datapath   up .*\n +for IPv6: up ", text, re.MULTILINE)


def test_captures_decode_as_vxlan_with_ethernet_frames_of_ipv6(lab: Lab, tmp_path: Path, slack: int) -> None:
    ours, kernel = lab.host(3), lab.host(1)
    macs = own_lease(ours)["BackendV6Data"]["VtepMAC"], KERNEL_MACS[1]
    path = tmp_path / "v6.pcap"

    def echoes() -> list[IPv6]:
        return [it[IPv6] for it in rdpcap(str(path)) if bytes(it[UDP].payload)[22 + 40] in (128, 129)]

    pod = ours.pod(1)
    with links_that(lab, "no-help-at-all"), lab.capture(path, f"ip6 and udp dst port {PORT}"):
        ping(pod, kernel.pod(1).ipv6_address)
        wait_until("the capture", lambda: sum(seen(it) == str(pod.ipv6_address) for it in echoes()) >= 2, 10 * slack)
    for outer in echoes():
        payload = bytes(outer[UDP].payload)
        frame = VXLAN(payload)[Ether]
        assert payload[:8] == bytes.fromhex("0800000000000100")
        is_ours = outer.src == str(ours.underlay_ipv6)
        if {outer.src, outer.dst} == {str(ours.underlay_ipv6), str(kernel.underlay_ipv6)}:
            assert (frame.src, frame.dst) == (macs if is_ours else macs[::-1])
        assert frame.type == 0x86DD
        # Summed over its pseudo-header, by scapy.
        right = IPv6(bytes(outer)[:40] + bytes(outer[UDP])[:6] + bytes(2) + bytes(outer[UDP])[8:])
        del right[UDP].chksum
        assert IPv6(bytes(right))[UDP].chksum == outer[UDP].chksum != 0


def seen(outer: IPv6) -> str:
    """The source of the packet inside."""
    return str(VXLAN(bytes(outer[UDP].payload))[IPv6].src)


# --- packets


def test_all_pods_reach_each_other_by_both_families(lab: Lab) -> None:
    ping_all(lab)
    for one, other in pairs(lab):
        assert is_answered(one, other.ipv6_address, MTU - 48)
        assert is_answered(one, other.address, MTU - 28)


def test_live_trace_shows_packets_of_both_families_with_their_devices(lab: Lab) -> None:
    host, kernel = lab.host(2), lab.host(1).pod(1)
    # Echoes, not the probes of the hosts, which have no pods' addresses.
    words = ("any", "any", "icmp", "--live", "400", "--seconds", "60", "--json")
    asked = host.popen([sys.executable, "-m", "udptun", "trace", *words], stdout=subprocess.PIPE)
    assert asked.stdout is not None
    assert json.loads(asked.stdout.readline())["devices"] == ["flannel.1", DEVICE]
    pod = host.pod(1)
    ends = [(str(kernel.address), str(pod.address)), (str(kernel.ipv6_address), str(pod.ipv6_address))]
    for _, destination in ends:
        ping(kernel, destination)
    found = []
    while len(found) < 8:
        it = json.loads(asked.stdout.readline())
        if (it["source"], it["destination"]) in ends or (it["destination"], it["source"]) in ends:
            found.append((it["device"], it["direction"], it["counter"], it["outer"]))
    asked.kill()
    asked.wait()
    for device, family in (("flannel.1", 4), (DEVICE, 6)):
        outer = str(lab.host(1).underlay_address if family == 4 else lab.host(1).underlay_ipv6)
        for it in ((device, "arriving", "decap_delivered", outer), (device, "outgoing", "encap_sent", outer)):
            assert found.count(it) == 2


def test_longer_packets_of_both_families_pass_in_fragments(lab: Lab) -> None:
    hosts = lab.hosts[1:]
    with no_packet_errors(*lab.hosts), every_packet_explained(hosts[0]), every_packet_explained(hosts[1]):
        ping_all(lab, "-s", "4000")
        for one, other in pairs(lab):
            ping(one, other.ipv6_address, "-s", "60000")


def test_streams_datagrams_and_trains_of_ipv6_arrive_byte_for_byte(lab: Lab) -> None:
    """The kernel hands us super-packets whole, as its card is virtual, and we hand it those that we put together."""
    for source, destination in pairs(lab)[:2]:
        before = n_dropped(lab.host(2))
        with no_packet_errors(*lab.hosts, source, destination), every_packet_explained(lab.host(2)):
            with (
                tcp_flow(source, destination, 100e6, ipv6=True) as stream,
                udp_flow(destination, source, 500, ipv6=True) as datagrams,
            ):
                datagrams.wait_for_more(100)
            stream.report.assert_exact()
            report = datagrams.report
            assert (report.n_duplicates, report.n_spoilt, report.n_out_of_order) == (0, 0, 0)
            # On a busy machine the stream fills the device's queue, and then the kernel drops what comes.
            assert len(report.lost) <= n_dropped(lab.host(2)) - before
        assert_trains_arrive(lab, source, destination, 1000, ipv6=True)


def test_traceroute_and_the_hosts_themselves_by_ipv6(lab: Lab) -> None:
    kernel, ours = lab.hosts[:2]
    first = ipv6_gateway(ours).network.network_address
    ping(kernel, ours.pod(1).ipv6_address)
    ping(ours, kernel.pod(1).ipv6_address)
    ping(kernel.pod(1), first)
    ping(ours.pod(1), KERNEL_SUBNETS[1].network_address)
    command = ["traceroute", "-6", "-n", "-q", "1", "-w", "5", "-N", "1", str(ours.pod(1).ipv6_address)]
    hops = [line.split()[1] for line in kernel.pod(1).run(command).stdout.splitlines()[1:]]
    assert hops[-1] == str(ours.pod(1).ipv6_address)
    assert str(first) in hops


def test_peers_are_found_alive_and_measured_by_each_family(lab: Lab, slack: int) -> None:
    host = lab.host(2)

    def measured() -> list[tuple[str, int]]:
        status = read_status(host)
        return [(it["liveness"], it["path_mtu"]) for it in (*status["peers"], *status["ipv6"]["peers"])]

    with contextlib.ExitStack() as undo:
        # Peers with traffic are looked at closely.
        for other in (lab.host(1).pod(1), lab.host(3).pod(1)):
            for address in (other.address, other.ipv6_address):
                pinging = undo.enter_context(host.pod(1).popen(["ping", "-q", "-i", "0.2", str(address)]))
                undo.callback(pinging.kill)
        wait_until("the measures", lambda: measured() == [("alive", 1450)] * 2 + [("alive", MTU)] * 2, 10 * slack)


def test_a_vtep_behind_a_nat_is_learned_by_ipv6(lab: Lab, slack: int) -> None:
    """Its datagrams come from another address than its PublicIPv6."""
    host, other, seen_as = lab.host(2), lab.host(3), UNDERLAY_IPV6[0xCC]
    host.machine.at().ip(f"addr add {seen_as}/128 dev lo")
    nat = f"oifname eth0 udp dport {PORT} snat to {seen_as}"
    chain = "add table ip6 nat6; add chain ip6 nat6 out { type nat hook postrouting priority srcnat; }"
    host.run(["nft", f"{chain}; add rule ip6 nat6 out {nat}"])
    other.machine.at().ip(f"route add {seen_as}/128 via {host.underlay_ipv6}")

    def learned() -> list[object]:
        return [it["learned"] for it in read_status(other)["ipv6"]["peers"] if it["learned"]]

    try:
        with host.pod(1).popen(["ping", "-q", "-i", "0.2", str(other.pod(1).ipv6_address)]) as pinging:
            expected = [[{"address": str(seen_as), "port": None}]]
            wait_until("the address", lambda: learned() == expected, 10 * slack)
            pinging.kill()
        assert is_answered(host.pod(1), other.pod(1).ipv6_address)
    finally:
        host.run(["nft", "delete table ip6 nat6"])


# --- changes and faults


def test_a_reload_changes_the_workers_of_both_and_nothing_is_lost(lab: Lab, slack: int) -> None:
    host, kernel = lab.host(2), lab.host(1).pod(1)

    def workers() -> list[int]:
        status = read_status(host)
        return [len(it["workers"]) for it in (status["datapath"], status["ipv6"]["datapath"])]

    assert host.daemon is not None
    with udp_flow(kernel, host.pod(1), 500, ipv6=True) as ipv6, udp_flow(kernel, host.pod(1), 500, port=5004) as ipv4:
        for n, keys in ((2, {"Workers": 2}), (1, {"Workers": 1})):
            host.path(NET_CONF).write_text(json.dumps({**CONF, "Backend": {"Type": "vxlan", **keys}}))
            host.daemon.send_signal(signal.SIGHUP)
            wait_until("the workers", lambda n=n: workers() == [n, n], 5 * slack)  # type: ignore[misc]
            ipv6.wait_for_more(100)
    assert (ipv6.report.lost, ipv4.report.lost) == ([], [])
    seconds_until(lambda: bool(datapaths(host)), "standbys", 5 * slack)


def test_nothing_is_lost_when_either_datapath_and_the_daemon_are_killed(lab: Lab, slack: int) -> None:
    host, kernel = lab.host(2), lab.host(1).pod(1)
    ours = host.pod(1)
    mac = own_lease(host)["BackendV6Data"]["VtepMAC"]
    with (
        tcp_flow(kernel, ours, 5e6, ipv6=True) as stream,
        udp_flow(ours, kernel, 500, ipv6=True) as ipv6,
        udp_flow(kernel, ours, 500, port=5004, ipv6=True) as ipv6_back,
        udp_flow(ours, kernel, 500, port=5005) as ipv4,
    ):
        ipv6.wait_for_more()
        for i in (1, 0):
            before = datapaths(host)
            kill(host, before[i])
            seconds_until(lambda before=before, i=i: datapaths(host)[i] != before[i], "a standby", 10 * slack)
            # The other one goes on as it was.
            assert datapaths(host)[1 - i] == before[1 - i]
            ipv6.wait_for_more(100)
        before, n_delivered = datapaths(host), counters(host)["ipv6 decap_delivered"]
        kill(host, read_status(host)["pid"])
        ipv6.wait_for_more(100)
        start_without_vxlan(host)
        host.wait_ready()
        seconds_until(lambda: bool(datapaths(host)), "standbys", 10 * slack)
        assert datapaths(host) == before
        assert counters(host)["ipv6 decap_delivered"] > n_delivered
        ipv6.wait_for_more(100)
    stream.report.assert_exact()
    for flow in (ipv6, ipv6_back, ipv4):
        assert (flow.report.lost, flow.report.n_spoilt) == ([], 0)
    assert own_lease(host)["BackendV6Data"]["VtepMAC"] == mac
    assert host.daemon_log().count("datapath adopted") == 2


def test_a_deleted_device_of_ipv6_comes_back_and_ipv4_does_not_notice(lab: Lab, slack: int) -> None:
    host, kernel = lab.host(2), lab.host(1).pod(1)
    with udp_flow(kernel, host.pod(1), 500) as ipv4:
        for command in (f"link delete {DEVICE}", f"link set {DEVICE} down", f"addr flush dev {DEVICE}"):
            host.machine.at().ip(command)
            seconds_until(lambda: is_answered(kernel, host.pod(1).ipv6_address), "IPv6", 5 * slack)
    assert ipv4.report.lost == []


@pytest.mark.parametrize("lost", ["IPv6", "IPv4"])
def test_a_host_that_loses_its_address_of_one_family_ends_that_datapath_and_takes_it_up_again(
    lab: Lab, lost: str, slack: int
) -> None:
    host, other = lab.host(3), lab.host(2).pod(1)
    ours, is_ipv6 = host.pod(1), lost == "IPv6"
    address, length = (host.underlay_ipv6, 64) if is_ipv6 else (host.underlay_address, 24)
    at = host.machine.at()
    kept = datapaths(host)[0 if is_ipv6 else 1]
    at.ip(f"addr del {address}/{length} dev eth0")
    lack = f"pods have no {lost} to other hosts: eth0 has no {lost} address that other hosts could send to; give it one"
    wait_until("the problem", lambda: lack in (problems(host) or ()), 5 * slack)
    left, gone = (other.address, other.ipv6_address) if is_ipv6 else (other.ipv6_address, other.address)
    wait_until("the other family", lambda: is_answered(ours, left), 5 * slack)
    assert read_status(host)["datapath"]["pid"] == kept
    wait_until("two processes", lambda: len(datapath_pids(host)) == 2, 5 * slack)
    device = DEVICE if is_ipv6 else "flannel.1"
    wait_until("no device", lambda: host.run(["ip", "link", "show", device], check=False).returncode != 0, 5 * slack)
    if is_ipv6:
        at.ip(f"addr add {address}/{length} dev eth0 nodad", f"route replace default via {UNDERLAY_IPV6[1]}")
    else:
        at.ip(f"addr add {address}/{length} brd + dev eth0", "route replace default via 192.168.77.1")
    wait_until("both families", lambda: problems(host) == [], 5 * slack)
    wait_until("the lost one", lambda: is_answered(ours, gone), 5 * slack)
    seconds_until(lambda: bool(datapaths(host)), "standbys", 5 * slack)
    assert kept in datapaths(host)


def test_changing_over_to_the_kernel_and_back_changes_nothing_for_the_peers(lab: Lab) -> None:
    host, kernel = lab.host(3), lab.host(1).pod(1)
    before = own_lease(host)
    for start, kind in ((host.start_daemon, "vxlan"), (lambda: start_without_vxlan(host), "tun")):
        assert host.stop_daemon() == 0
        start()
        host.wait_ready()
        (device,) = json.loads(host.run(["ip", "-j", "-d", "link", "show", DEVICE]).stdout)
        assert device["linkinfo"]["info_kind"] == kind
        assert own_lease(host) == before
        assert bool(datapath_pids(host)) == (kind == "tun")
        for one, two in itertools.permutations((kernel, host.pod(1))):
            ping(one, two.ipv6_address, "-s", "3000")


def test_cleanup_removes_both(lab: Lab, slack: int) -> None:
    host = lab.host(3)
    assert host.stop_daemon() == 0
    assert len(datapath_pids(host)) == 4
    lines = host.run(CLEANUP).stdout
    assert [f"deleted link {it}\n" in lines for it in ("flannel.1", DEVICE)] == [True, True]
    assert datapath_pids(host) == set()
    for version in ("-4", "-6"):
        assert host.run(["ip", version, "route", "show", "proto", "158"]).stdout == ""
    start_without_vxlan(host)
    host.wait_ready()
    wait_until("IPv6", lambda: is_answered(host.pod(1), lab.host(2).pod(1).ipv6_address), 10 * slack)

"""A path that takes less than both hosts' devices, with a router that says so or in silence: what flows get through.

pod h1/p1 -- flannel0 -- eth0 of h1 -- router, which forwards to -- eth0 of h2 -- flannel0 -- pod h2/p1
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv6Network
from statistics import mean

import pytest

from tests.netns.traffic import (
    REAL_TIME,
    is_answered,
    read_status,
    seconds_until,
    socket_in,
    tcp_flow,
    udp_flow,
    wait_for_peers,
)
from udptun.lab.host import DISTANT, FIRST_HOST, UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import SWITCH, Lab, Offload
from udptun.probing.path_mtu import GROW_S

pytestmark = pytest.mark.netns

NARROW_BYTES = 1300
"""Of an outer packet."""
DISTANT_IPV6 = IPv6Network("fd00:78::/64")
NARROW_LINK = f"{SWITCH}2"
"""The router's link to the second host."""


OF_BOTH_FAMILIES = {"EnableIPv6": True, "IPv6Network": "fd00:244::/48"}


@contextlib.contextmanager
def routed_lab(
    conf: dict[str, object],
    *,
    is_vxlan_missing: bool = False,
    net_conf: Mapping[str, object] | None = None,
    ipv4: bool = True,
) -> Iterator[Lab]:
    """Two hosts, each on a network of its own.  The second one is like any flannel host where vxlan is missing.

    `net_conf` with IPv6: the hosts have that too.  Without `ipv4` they have that alone.
    """
    net_conf = {"Network": "10.244.0.0/16", "Backend": conf, **(net_conf or {})}
    with Lab(f"narrow{os.getpid()}", net_conf=net_conf, ipv6="EnableIPv6" in net_conf, ipv4=ipv4) as lab:
        one, two = lab.hosts
        if ipv4:
            lab.relocate(two, DISTANT)
        else:
            relocate_by_ipv6(lab, two)
        without = ["env", "UDPTUN_PRETEND_NO_VXLAN=1"] * is_vxlan_missing
        one.start_daemon(command=[*without, *REAL_TIME, *lab.daemon_command])
        two.start_daemon(command=[*REAL_TIME, *lab.daemon_command])
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        wait_for_peers(lab)
        yield lab


def relocate_by_ipv6(lab: Lab, host: Host) -> None:
    """As `Lab.relocate`, of a host that has no IPv4."""
    lab.switch.at().ip(
        f"link add {NARROW_LINK} type bridge forward_delay 0 mcast_snooping 0",
        f"addr add {DISTANT_IPV6[1]}/64 dev {NARROW_LINK} nodad",
        f"link set {NARROW_LINK} up",
        f"link set {host.name} master {NARROW_LINK}",
    )
    before, host.underlay_ipv6 = host.underlay_ipv6, DISTANT_IPV6[FIRST_HOST + host.index]
    host.machine.at().ip(
        f"addr add {host.underlay_ipv6}/64 dev eth0 nodad",
        f"addr del {before}/64 dev eth0",
        f"route replace default via {DISTANT_IPV6[1]}",
    )


@pytest.fixture
def routed() -> Iterator[Lab]:
    with routed_lab({"Type": "udp"}) as lab:
        yield lab


def set_narrow(lab: Lab, n_bytes: int) -> None:
    """The router tells senders of packets that are too long."""
    lab.switch.run(["ip", "link", "set", NARROW_LINK, "mtu", str(n_bytes)])


def silence(lab: Lab) -> None:
    """The router tells nobody."""
    rule = "type filter hook output priority 0; }; add rule ip silence out icmp type destination-unreachable drop"
    lab.switch.run(["nft", f"add table ip silence; add chain ip silence out {{ {rule}"])


def path_mtu(host: Host) -> object:
    (peer,) = read_status(host)["peers"]
    return peer["path_mtu"]


def route_mtu(host: Host, peer: Host) -> int | None:
    """Of the route to the peer's subnet."""
    routes = json.loads(host.run(["ip", "-j", "route", "show", str(peer.subnet)]).stdout)
    return next((route["metrics"][0]["mtu"] for route in routes if "metrics" in route), None)


def believed_mtu(host: Host, peer: Host) -> int | None:
    """Of the underlay's path to the peer, by the kernel's memory of ICMP errors."""
    (route,) = json.loads(host.run(["ip", "-j", "route", "get", str(peer.underlay_address)]).stdout)
    return next((metrics["mtu"] for metrics in route.get("metrics", [])), None)


def forge_fragmentation_needed(to: Host, about: Host, mtu: int) -> None:
    """What the router would say of a datagram of the tunnel's, sent by somebody else."""
    udp = struct.pack(">4H", 8285, 8285, 1480, 0)
    quoted = struct.pack(">BBHHHBBH", 0x45, 0, 1500, 7, 0x4000, 63, socket.IPPROTO_UDP, 0)
    quoted += to.underlay_address.packed + about.underlay_address.packed + udp
    body = struct.pack(">BBHHH", 3, 4, 0, 0, mtu) + quoted
    total = sum(struct.unpack(f">{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = 0xFFFF ^ (total & 0xFFFF) + (total >> 16)
    message = body[:2] + struct.pack(">H", checksum) + body[4:]
    with socket_in(about, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(message, (str(to.underlay_address), 0))


def drop_long_packets(lab: Lab) -> None:
    """The router forwards nothing that is too long, as a firewall may.  Frames must cross one by one."""
    rule = f"type filter hook forward priority 0; }}; add rule ip narrow f ip length > {NARROW_BYTES} counter drop"
    lab.switch.run(["nft", f"add table ip narrow; add chain ip narrow f {{ {rule}"])


def narrow_in_silence(lab: Lab) -> None:
    silence(lab)
    set_narrow(lab, NARROW_BYTES)


def test_what_icmp_says_of_the_underlay_is_believed_when_probes_show_it(routed: Lab, slack: int) -> None:
    """Before, the kernel believed it for 10 minutes: a forged error cost everybody his full-size packets, and a path
    that was mended stayed narrow.
    """
    one, two = routed.hosts
    full, narrow = one.mtu, NARROW_BYTES - (1500 - one.mtu)
    seconds_until(lambda: path_mtu(one) == full, "the first measure", 5 * slack)
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        took_s = seconds_until(lambda: route_mtu(one, two) == narrow, "the measure", 3 * slack)
        time.sleep(0.5)
        forge_fragmentation_needed(one, two, 700)
        seconds_until(lambda: believed_mtu(one, two) == 700, "the kernel to believe it", 3 * slack)
        time.sleep(1.5)
        assert (path_mtu(one), route_mtu(one, two)) == (narrow, narrow)
    print(f"{narrow} bytes after {took_s:.2f} s")
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 2000 * slack
    assert read_status(one)["counters"]["encap_drop_send"] == 0


@pytest.mark.full
def test_a_path_that_is_mended_is_used_in_full_while_the_kernel_still_believes_an_old_icmp_error(routed: Lab) -> None:
    """Before, nothing longer left before the kernel had forgotten it, after 10 minutes."""
    one, two = routed.hosts
    seconds_until(lambda: path_mtu(one) == one.mtu, "the first measure", 5)
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        seconds_until(lambda: route_mtu(one, two) is not None, "the measure", 5)
        set_narrow(routed, 1500)
        took_s = seconds_until(lambda: route_mtu(one, two) is None, "full-size packets", GROW_S[0] + 5)
        assert believed_mtu(one, two) == NARROW_BYTES
        time.sleep(1)
    print(f"full size {took_s:.1f} s after the path was mended")
    assert path_mtu(one) == one.mtu
    flow.report.assert_exact()


def test_what_icmp_and_routes_say_counts_where_nothing_is_probed(routed: Lab, slack: int) -> None:
    one, two = routed.hosts
    around = 1500 - one.mtu
    one.stop_daemon()
    one.start_daemon(["--probe=false"])
    one.wait_ready()
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        took_s = seconds_until(lambda: route_mtu(one, two) == NARROW_BYTES - around, "the limit", 3 * slack)
        one.run(["ip", "route", "change", "default", "via", str(UNDERLAY[1]), "mtu", "1200"])
        seconds_until(lambda: route_mtu(one, two) == 1200 - around, "the route's limit", 3 * slack)
    print(f"{NARROW_BYTES - around} bytes after {took_s:.2f} s")
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 1500 * slack
    assert path_mtu(one) is None


def n_too_long(lab: Lab) -> int:
    """How many packets `drop_long_packets` has dropped."""
    table = json.loads(lab.switch.run(["nft", "-j", "list", "table", "ip", "narrow"]).stdout)
    (rule,) = (it["rule"] for it in table["nftables"] if "rule" in it)
    return next(int(it["counter"]["packets"]) for it in rule["expr"] if "counter" in it)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_is_started_again_still_knows_a_narrow_path_and_who_is_alive(
    routed: Lab, slack: int, ends: signal.Signals
) -> None:
    """Before, packets were of full size again for some 3 s, and all of those were lost."""
    one, two = routed.hosts
    narrow = NARROW_BYTES - (1500 - one.mtu)
    routed.set_offload(Offload.NONE)
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        drop_long_packets(routed)
        seconds_until(lambda: route_mtu(one, two) == narrow == route_mtu(two, one), "both measures", 5 * slack)
        time.sleep(1)
        before = n_too_long(routed)
        one.stop_daemon(ends)
        time.sleep(0.3)
        one.start_daemon()
        one.wait_ready()
        (peer,) = read_status(one)["peers"]
        assert (peer["liveness"], peer["path_mtu"]) == ("alive", narrow)
        time.sleep(2)
        assert n_too_long(routed) - before == 0
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 5000 * slack


def fits_in_fragments(lab: Lab, slack: int, narrow: int, inner: int) -> None:
    """`narrow`: bytes that the path takes; `inner`: of the inner packets of these."""
    one, two = lab.hosts
    here, there = one.pod(1), two.pod(1)
    lab.set_offload(Offload.NONE)
    wait_until("IPv6", lambda: is_answered(here, there.ipv6_address, 1280 - 48), 10 * slack)
    # A peer with traffic is looked at closely.
    with tcp_flow(here, there, 1e6, ipv6=True) as stream, tcp_flow(there, here, 1e6, port=5003, ipv6=True) as back:
        set_narrow(lab, narrow)
        seconds_until(lambda: path_mtu(one) == inner, "the measure", 5 * slack)
        for n_bytes in (inner - 48, inner + 1 - 48, 1280 - 48):
            assert is_answered(here, there.ipv6_address, n_bytes), n_bytes
        with udp_flow(here, there, 200, ipv6=True) as datagrams:
            datagrams.wait_for_more(50)
    assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)
    stream.report.assert_exact()
    back.report.assert_exact()
    (line,) = (it for it in read_status(one)["problems"] if "the path to" in it)
    assert f"takes packets of {inner} bytes" in line
    assert "; IPv6 packets of up to 1280 bytes, which every link has to take, go in fragments, " in line
    assert read_status(one)["counters"]["encap_drop_send"] == 0


def test_ipv6_packets_of_1280_bytes_get_through_a_path_of_1200(slack: int) -> None:
    """Before, they were lost, and all full-size packets of connections with them."""
    with routed_lab({"Type": "udp"}, net_conf=OF_BOTH_FAMILIES) as lab:
        silence(lab)
        fits_in_fragments(lab, slack, 1200, 1172)


@pytest.mark.full
def test_ipv6_packets_of_1280_bytes_get_through_a_path_of_1280_over_ipv6(slack: int) -> None:
    """Over IPv6 nobody but the sender makes fragments, so the router has to say what it takes."""
    with routed_lab({"Type": "udp"}, net_conf=OF_BOTH_FAMILIES, ipv4=False) as lab:
        fits_in_fragments(lab, slack, 1280, 1280 - 48)


RATE = "100mbit"
"""Of the first host's uplink, so that no processor is the limit."""
GOAL = 0.9
"""Of the goodput on the clean path."""


NARROWINGS = {
    "router-tells": lambda lab: set_narrow(lab, NARROW_BYTES),
    "router-is-silent": narrow_in_silence,
    "firewall-drops": drop_long_packets,
}


@contextlib.contextmanager
def shaped_lab(peer: str) -> Iterator[Lab]:
    is_vtep = peer == "kernel-vxlan"
    with routed_lab({"Type": "vxlan" if is_vtep else "udp"}, is_vxlan_missing=is_vtep) as lab:
        one, two = lab.hosts
        lab.set_offload(Offload.NONE)
        one.run(["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE, "burst", "32kb", "limit", "400kb"])
        if peer == "only-answers":
            two.stop_daemon()
            two.start_daemon(["--probe=false"])
            two.wait_ready()
        seconds_until(lambda: path_mtu(one) == one.mtu, "the first measure", 15)
        yield lab


@contextlib.contextmanager
def full_speed_flow(source: Pod, destination: Pod, seconds: int) -> Iterator[list[float]]:
    """One TCP connection; the list gets, at the end of the block, the received Mbit/s of each of these seconds."""
    server = destination.popen(["iperf3", "-s", "-1", "-J", "-i", "1"], stdout=subprocess.PIPE)
    wait_until("the server", lambda: ":5201" in destination.run(["ss", "-ltn"]).stdout, 10)
    client = source.popen(["iperf3", "-c", str(destination.address), "-t", str(seconds)], stdout=subprocess.DEVNULL)
    received: list[float] = []
    try:
        yield received
        client.wait(timeout=seconds + 20)
        report, _ = server.communicate(timeout=20)
        received += [interval["sum"]["bits_per_second"] / 1e6 for interval in json.loads(report)["intervals"]]
    finally:
        for process in (client, server):
            process.kill()
            process.wait()


@pytest.mark.full
@pytest.mark.parametrize("how", NARROWINGS)
@pytest.mark.parametrize("peer", ["udptun", "only-answers", "kernel-vxlan"])
def test_full_size_tcp_has_nine_tenths_of_the_clean_goodput_from_five_seconds_on(
    peer: str, how: str, figure: Callable[..., None]
) -> None:
    """One connection that was there when the path became narrow, and one that begins later."""
    with shaped_lab(peer) as lab:
        here, there = (host.pod(1) for host in lab.hosts)
        with full_speed_flow(here, there, 8) as clean:
            pass
        with full_speed_flow(here, there, 18) as before:
            time.sleep(2)
            NARROWINGS[how](lab)
            narrowed_s = time.monotonic()
            seconds_until(lambda: route_mtu(*lab.hosts) is not None, "the measure", 5)
            took_s = time.monotonic() - narrowed_s
        with full_speed_flow(here, there, 8) as later:
            pass
    goodput = mean(clean[2:8])
    shares = [mean(before[7:17]) / goodput, mean(later[2:8]) / goodput]
    print(f"clean {goodput:.1f} Mbit/s; by the second, narrow after 2: {' '.join(f'{mbit:.0f}' for mbit in before)}")
    figure("the path is measured after", took_s, "s")
    figure("of the clean goodput in the seconds 5 to 15 after", shares[0])
    figure("of the clean goodput, a new connection", shares[1])
    assert min(shares) >= GOAL

"""Hosts that die and paths that become narrow: how soon that is known, what senders are told, how soon all is well.

pod h1/p1 -- flannel0 -- eth0 of h1 -- switch -- eth0 of h2; nft drops what comes to either
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.netns.traffic import (
    REAL_TIME,
    is_answered,
    read_status,
    seconds_until,
    socket_in,
    tcp_flow,
    tunnel_address,
    udp_flow,
    wait_for_peers,
)
from udptun.lab.host import Host, Pod
from udptun.lab.topology import Lab, Offload

pytestmark = pytest.mark.netns


def known(host: Host) -> dict[str, object]:
    """What `host` says of its only peer."""
    (peer,) = read_status(host)["peers"]
    return {key: peer[key] for key in ("liveness", "rtt_ms", "path_mtu")}


def is_(host: Host, liveness: str) -> bool:
    return known(host)["liveness"] == liveness


@contextmanager
def parted(*hosts: Host, which: str = "meta l4proto udp") -> Iterator[None]:
    """No datagram reaches any of these hosts, or none of those that `which` of nft says.  Nobody is told."""
    table = "netdev faults"
    chain = f"add chain {table} in {{ type filter hook ingress device eth0 priority 0; }}"
    for host in hosts:
        host.run(["nft", f"add table {table}; {chain}; add rule {table} in {which} drop"])
    try:
        yield
    finally:
        for host in hosts:
            host.run(["nft", f"delete table {table}"])


@contextmanager
def a_vtep_and_a_kernel() -> Iterator[Lab]:
    """The first host has no vxlan in its kernel.  The second one is a VXLAN node like any other; it knows no probes."""
    conf = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
    with Lab(f"dead{os.getpid()}", net_conf=conf) as lab:
        one, two = lab.hosts
        one.start_daemon(command=["env", "UDPTUN_PRETEND_NO_VXLAN=1", *REAL_TIME, *lab.daemon_command])
        two.start_daemon(command=[*REAL_TIME, *lab.daemon_command])
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        wait_for_peers(lab)
        yield lab


@pytest.fixture(params=["udp", pytest.param("vtep", marks=pytest.mark.full)])
def pair(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two hosts, of which the first one has a datapath of ours."""
    if request.param == "udp":
        yield request.getfixturevalue("two_hosts")
    else:
        with a_vtep_and_a_kernel() as lab:
            yield lab


def test_a_dead_host_is_known_within_seconds_and_used_again_at_once(
    pair: Lab, slack: int, figure: Callable[..., None]
) -> None:
    """Before, its lease was all that was known of it: senders got no answer at all for 24 hours."""
    one, two = pair.hosts
    here, there = one.pod(1), two.pod(1)
    seconds_until(lambda: is_(one, "alive"), "the first answer", 5 * slack)
    with udp_flow(here, there, 100) as flow:
        flow.wait_for_more(100)
        with parted(one, two):
            took_s = seconds_until(lambda: is_(one, "dead"), "the verdict", 3 * slack)
            said = here.run(["ping", "-c1", "-W2", str(there.address)], check=False).stdout
            problems = read_status(one)["problems"]
            counters = read_status(one)["counters"]
        back_s = seconds_until(lambda: is_answered(here, there.address), "the way back", 3 * slack)
        figure("the host is known to be dead after", took_s, "s")
        figure("it is used again after", back_s, "s")
        seconds_until(lambda: is_(one, "alive"), "alive again", 3 * slack)
        flow.wait_for_more(100)
    assert "Destination Host Unreachable" in said
    assert counters["encap_drop_dead"] > 0
    assert any(f"the host of {two.subnet} at " in line and "does not any more" in line for line in problems)
    assert not any("does not any more" in line for line in read_status(one)["problems"])
    assert one.daemon_log().count("does not any more") == 1
    assert one.daemon_log().count(f"peer alive again subnet={two.subnet}") == 1
    assert 0 < float(str(known(one)["rtt_ms"])) < 1000


def test_a_host_whose_firewall_eats_echoes_is_unknown_and_never_cut_off(two_hosts: Lab) -> None:
    one, two = two_hosts.hosts
    two.run(["iptables", "-I", "INPUT", "-i", "flannel0", "-p", "icmp", "-j", "DROP"])
    for host in (one, two):
        host.stop_daemon()
        # It may have been answered before there was the rule.
        host.path("/run/udptun/probes.json").unlink(missing_ok=True)
        host.start_daemon()
        host.wait_ready()
    assert not is_answered(one, tunnel_address(two))
    with udp_flow(one.pod(1), two.pod(1), 100) as flow:
        flow.wait_for_more(400)
        assert known(one) == {"liveness": "unknown", "rtt_ms": None, "path_mtu": None}
    assert flow.report.lost == []
    assert read_status(one)["counters"]["inject_sent"] > 0
    assert read_status(one)["problems"] == []


def test_without_probes_nothing_is_sent_and_nobody_dead(two_hosts: Lab) -> None:
    """`--probe=false`; the other host goes on to probe, and gets its answers."""
    one, two = two_hosts.hosts
    one.stop_daemon()
    before = read_status(two)["counters"]["inject_sent"]
    sent = 0
    one.start_daemon(["--probe=false"])
    one.wait_ready()
    sent = read_status(one)["counters"]["inject_sent"]
    with udp_flow(two.pod(1), one.pod(1), 200) as flow:
        flow.wait_for_more(100)
    with parted(one, two), udp_flow_into_nothing(one, two):
        time.sleep(4)
        assert known(one)["liveness"] == "unknown"
        assert read_status(one)["counters"]["inject_sent"] == sent
        assert read_status(one)["counters"]["encap_drop_dead"] == 0
    assert read_status(two)["counters"]["inject_sent"] >= before


@contextmanager
def udp_flow_into_nothing(one: Host, two: Host) -> Iterator[None]:
    pings = one.pod(1).popen(["ping", "-i0.2", "-q", str(two.pod(1).address)])
    try:
        yield
    finally:
        pings.kill()
        pings.wait()


NARROW_BYTES = 1300
"""Of an outer packet."""
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0


def test_full_size_tcp_goes_on_soon_after_a_path_has_become_narrow_in_silence(
    pair: Lab, slack: int, figure: Callable[..., None]
) -> None:
    """Before, small packets passed and connections began, and then not a byte came."""
    one, two = pair.hosts
    here, there = one.pod(1), two.pod(1)
    # nft sees a train of datagrams as one packet.
    pair.set_offload(Offload.NONE)
    seconds_until(lambda: known(one)["path_mtu"] == one.mtu, "the first measure", 5 * slack)
    mtu = NARROW_BYTES - (1500 - one.mtu)
    with tcp_flow(here, there) as flow:
        time.sleep(0.5)
        with parted(one, two, which=f"ip length > {NARROW_BYTES}"):
            took_s = seconds_until(lambda: known(one)["path_mtu"] == mtu, "the measure", 5 * slack)
            time.sleep(3)
            problems = read_status(one)["problems"]
            told = here.run(["ip", "route", "get", str(there.address)]).stdout
            assert f"mtu {mtu}" in one.run(["ip", "route", "show", str(two.subnet)]).stdout
            assert_arrives_without_df(here, there, one.mtu)
    figure("the path is measured after", took_s, "s")
    figure("longest silence of the stream", flow.report.longest_silence_ms / 1000, "s")
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 5000 * slack
    assert f"mtu {mtu}" in told, "the sender is told"
    (line,) = [line for line in problems if "takes packets of" in line]
    assert line.startswith(f"the path to the host of {two.subnet} at ")
    assert f"takes packets of {mtu} bytes, {one.mtu - mtu} fewer than flannel" in line
    assert known(one)["liveness"] == "alive"
    # The next packet that is too long is answered without a loss on the way.
    said = here.run(["ping", "-c1", "-W2", "-Mdo", f"-s{mtu - 27}", str(there.address)], check=False)
    assert "Frag needed" in said.stdout + said.stderr or "too long" in said.stdout + said.stderr


def assert_arrives_without_df(here: Pod, there: Pod, n_bytes: int) -> None:
    """A packet of this length, which any router may fragment.  Before, it was lost on the narrow path."""
    with socket_in(there, socket.SOCK_DGRAM) as receiver, socket_in(here, socket.SOCK_DGRAM) as sender:
        receiver.bind((str(there.address), 5009))
        receiver.settimeout(10)
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        sender.sendto(bytes(n_bytes - 28), (str(there.address), 5009))
        assert len(receiver.recv(2000)) == n_bytes - 28


ID_OF_A_PROBE = """
import socket, struct, sys
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
raw.settimeout(20)
print("listening", flush=True)
got = raw.recv(2000)
while got[20] != 8 or got[12:16] != socket.inet_aton(sys.argv[1]):
    got = raw.recv(2000)
print(*struct.unpack_from(">H", got, 24))
"""
PING_WITH_ID = """
import socket, struct, sys
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
raw.settimeout(5)
data = struct.pack(">BBHHH", 8, 0, 0, int(sys.argv[2]), 1) + b"whoever it is "
total = sum(struct.unpack(f">{len(data) // 2}H", data))
total = (total & 0xffff) + (total >> 16)
raw.sendto(data[:2] + struct.pack(">H", 0xffff ^ total) + data[4:], (sys.argv[1], 0))
got = raw.recv(2000)
while not got.endswith(data[4:]) or got[20] != 0:
    got = raw.recv(2000)
print("answered")
"""


def test_somebody_who_pings_with_the_id_of_our_probes_gets_his_answer(two_hosts: Lab) -> None:
    """Echo replies with that id go to the daemon; what is not its own it gives back."""
    one, two = two_hosts.hosts
    one.stop_daemon()
    with two.popen(["python3", "-c", ID_OF_A_PROBE, str(tunnel_address(one))], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        one.start_daemon()
        one.wait_ready()
        number = listener.stdout.read().strip()
    done = one.run(["python3", "-c", PING_WITH_ID, str(tunnel_address(two)), number])
    assert done.stdout == "answered\n"
    assert read_status(one)["counters"]["inject_delivered"] == 1

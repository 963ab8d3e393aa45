"""Both address families through the udp backend: one device, one port, between addresses of either family.

    pod h1/p1 -- cni0 -- flannel0 [h1] eth0 -- underlay (192.168.77.0/24) -- eth0 [h2] flannel0 -- cni0 -- pod h2/p1

The third host has no IPv6 address on the underlay, which Type udp does not need.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from traffic import (
    CLEANUP,
    REAL_TIME,
    assert_no_traceback,
    datapath_pids,
    ipv6_gateway,
    is_answered,
    kill,
    no_packet_errors,
    problems,
    read_status,
    seconds_until,
    tcp_flow,
    udp_flow,
    wait_for_peers,
)

from udptun.lab.host import UNDERLAY_IPV6, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

NETWORK, IPV6_NETWORK = "10.244.0.0/16", "fd00:244::/48"
CONF: Mapping[str, object] = {
    "Network": NETWORK,
    "SubnetMax": "10.244.99.0",
    "EnableIPv6": True,
    "IPv6Network": IPV6_NETWORK,
    "IPv6SubnetMax": "fd00:244:0:99::",
    "Backend": {"Type": "udp"},
}
MTU = 1472


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"u6{os.getpid()}", n_hosts=3, net_conf=CONF, ipv6=True) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.daemon_command.append("--ip-masq")
        lab.host(3).run(["ip", "-6", "addr", "flush", "dev", "eth0"])
        lab.start()
        wait_for_peers(lab)
        yield lab
        assert_no_traceback(lab.hosts)


def ping_all(lab: Lab, *options: str) -> None:
    """Every pod pings every other one by both families, all at once."""
    pods = [host.pod(1) for host in lab.hosts]
    waiting = [
        (one, address, one.popen(["ping", "-c", "3", "-i", "0.1", "-W", "5", *options, str(address)]))
        for one, other in itertools.permutations(pods, 2)
        for address in (other.address, other.ipv6_address)
    ]
    failed = [f"{one} -> {address}" for one, address, process in waiting if process.wait(30)]
    assert failed == []


def wait_for_ipv6(lab: Lab) -> None:
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    wait_until("IPv6", lambda: is_answered(one, other.ipv6_address), 10)


# --- packets


def test_all_pods_reach_each_other_by_both_families(lab: Lab) -> None:
    ping_all(lab)
    one, other = lab.host(1).pod(1), lab.host(3).pod(1)
    assert {host.mtu for host in lab.hosts} == {MTU}
    assert is_answered(one, other.address, MTU - 28)
    assert is_answered(one, other.ipv6_address, MTU - 48)


def test_longer_packets_of_both_families_pass_in_fragments(lab: Lab) -> None:
    with no_packet_errors(*lab.hosts, *(host.pod(1) for host in lab.hosts)):
        ping_all(lab, "-s", "4000")


def test_streams_and_datagrams_of_ipv6_arrive_byte_for_byte(lab: Lab) -> None:
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    before = read_status(lab.host(1))["counters"]["encap_packets"]
    with (
        no_packet_errors(*lab.hosts, one, other),
        udp_flow(one, other, 500, ipv6=True) as datagrams,
        tcp_flow(other, one, 2e7, ipv6=True) as back,
        tcp_flow(one, other, 2e7, port=5003, ipv6=True) as forth,
    ):
        datagrams.wait_for_more(500)
    forth.report.assert_exact()
    back.report.assert_exact()
    assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)
    assert read_status(lab.host(1))["counters"]["encap_packets"] - before > 500


def test_traceroute_shows_the_hops_of_the_tunnel_by_ipv6(lab: Lab) -> None:
    here, there = lab.hosts[:2]
    path = [ipv6_gateway(here).ip, *(ipv6_gateway(host).network.network_address for host in (here, there))]
    expected = [*map(str, path), str(ipv6_gateway(there).ip), str(there.pod(1).ipv6_address)]
    # The kernel of the second host may answer for its flannel0 or its cni0.
    command = ["traceroute", "-6", "-n", "-q", "1", "-w", "5", "-N", "1", str(there.pod(1).ipv6_address)]
    hops = [line.split()[1] for line in here.pod(1).run(command).stdout.splitlines()[1:]]
    assert hops[-1] == expected[-1]
    assert hops[:3] == expected[:3]


def test_what_leaves_the_overlay_by_ipv6_is_masqueraded(lab: Lab) -> None:
    """The host outside has no route to pods, so it answers only what has the host's own address."""
    assert is_answered(lab.host(1).pod(1), UNDERLAY_IPV6[1])
    # Between pods nothing is: the other pod sees who asks.
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    script = (
        "import socket; s = socket.create_server(('::', 7777), family=socket.AF_INET6); print('ready', flush=True);"
        "print(s.accept()[1][0])"
    )
    with other.popen([sys.executable, "-c", script], stdout=-1) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        connect = f"import socket; socket.create_connection(('{other.ipv6_address}', 7777), 5)"
        one.run([sys.executable, "-c", connect])
        assert server.stdout.readline() == f"{one.ipv6_address}\n"


def test_a_host_reaches_pods_of_others_and_is_reached_by_its_tunnel_address(lab: Lab) -> None:
    one, two = lab.hosts[:2]
    command = ["ping", "-c", "1", "-W", "5"]
    one.run([*command, str(two.pod(1).ipv6_address)])
    two.pod(1).run([*command, str(ipv6_gateway(one).network.network_address)])
    # A pod that asks its own host for itself gets there by cni0, whatever the tunnel does.
    one.pod(1).run([*command, str(one.pod(1).ipv6_address)])


def test_subnets_that_nobody_leases_are_refused_and_never_leave_in_clear_text(lab: Lab) -> None:
    said = lab.host(1).pod(1).run(["ping", "-c", "1", "-W", "5", "fd00:244:0:fff0::1"], check=False).stdout
    own = ipv6_gateway(lab.host(1)).network.network_address
    assert re.search(rf"From {own} .*Destination unreachable: No route", said)


# --- the kernel


def test_status_and_subnet_env_name_both_families(lab: Lab) -> None:
    host, other = lab.host(1), lab.host(3)
    wait_until("IPv6", lambda: is_answered(host.pod(1), other.pod(1).ipv6_address), 10)
    env, status = host.subnet_env(), read_status(host)
    assert env["FLANNEL_IPV6_NETWORK"] == IPV6_NETWORK
    assert (env["FLANNEL_MTU"], env["FLANNEL_IPV6_SUBNET"]) == (str(MTU), str(ipv6_gateway(host)))
    ipv6 = status["ipv6"]
    assert [ipv6[key] for key in ("network", "subnet", "device", "mtu", "public_ip")] == [
        *(IPV6_NETWORK, str(ipv6_gateway(host).network), "flannel0", MTU, str(host.underlay_ipv6))
    ]
    assert read_status(other)["ipv6"]["public_ip"] is None
    peers = {peer["subnet"]: peer for peer in ipv6["peers"]}
    assert len(peers) == 2
    peer = peers[str(ipv6_gateway(other).network)]
    assert (peer["public_ip"], peer["port"]) == (str(other.underlay_address), 8285)
    assert peer["encap_packets"] > 0
    # Both are found out once a host.
    by_ipv4 = next(it for it in status["peers"] if it["subnet"] == str(other.subnet))
    assert peer.keys() == by_ipv4.keys() - {"ipv6_subnet", "udptun", "expires_at"}
    assert peer["subnet"] == by_ipv4["ipv6_subnet"]
    assert (peer["liveness"], peer["path_mtu"]) == (by_ipv4["liveness"], by_ipv4["path_mtu"])
    assert status["problems"] == []
    text = other.run([sys.executable, "-m", "udptun", "status"]).stdout
    assert f"IPv6       {ipv6_gateway(other).network} of {IPV6_NETWORK}, flannel0, MTU {MTU}\n" in text
    row = rf"^{host.subnet} +{host.underlay_address}:8285 .*  {ipv6_gateway(host).network}$"
    assert re.search(row, text, re.MULTILINE)


def picture(host: Host) -> dict[str, str]:
    """All of IPv6 that is kept, without what counts and times."""
    commands = (
        "ip -6 -o addr show dev flannel0 | cut -d: -f2-",
        "ip -6 route show",
        "ip6tables -t nat -S FLANNEL-POSTRTG",
        "cat /proc/sys/net/ipv6/conf/flannel0/addr_gen_mode /proc/sys/net/ipv6/conf/flannel0/disable_ipv6",
    )
    return {it: host.run(["sh", "-c", f"{it} 2>/dev/null; true"]).stdout for it in commands}


def test_the_device_has_the_tunnel_address_alone_and_all_of_ipv6network_leads_into_it(lab: Lab) -> None:
    host = lab.host(1)
    addresses, routes, rules, _ = picture(host).values()
    own = f"{ipv6_gateway(host).network.network_address}/128"
    assert re.findall(r"inet6 (\S+) scope (\S+)", addresses) == [(own, "global")]
    assert f"{IPV6_NETWORK} dev flannel0 proto 158 metric 1024 pref medium\n" in routes
    assert f"unreachable {IPV6_NETWORK} dev lo proto 158 metric 4294967295 " in routes
    assert f"-A FLANNEL-POSTRTG -s {IPV6_NETWORK} ! -d ff00::/8 " in rules


DAMAGES = {
    "routes": "ip -6 route flush proto 158",
    "address": "ip -6 addr flush dev flannel0",
    "device": "ip link del flannel0; ip -6 route flush proto 158",
    "IPv6 of the device": "sysctl -qw net.ipv6.conf.flannel0.disable_ipv6=1",
    # The kernel takes IPv6 from such a device, and gives it back with its own settings and a link-local address.
    "MTU": "ip link set flannel0 mtu 1279",
    "rules": "ip6tables -t nat -F FLANNEL-POSTRTG",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_somebody_removes_comes_back(lab: Lab, damage: str, slack: int) -> None:
    wait_for_ipv6(lab)
    host = lab.host(1)
    before = picture(host)
    host.run(["sh", "-c", damage])
    took_s = seconds_until(lambda: picture(host) == before, "the repair", 5 * slack)
    print(f"repaired after {took_s:.2f} s")
    assert took_s < slack
    wait_for_ipv6(lab)
    assert read_status(host)["problems"] == []


def test_the_kernel_sends_nothing_of_its_own_into_the_tunnel(lab: Lab, request: pytest.FixtureRequest) -> None:
    """No router solicitations and no neighbour discovery: each would be a packet that the datapath drops."""
    command = ["tcpdump", "-n", "-i", "flannel0", "ip6"]
    with lab.host(3).popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tcpdump:
        assert tcpdump.stderr is not None
        while "listening on" not in tcpdump.stderr.readline():
            assert tcpdump.poll() is None
        time.sleep(60 if request.config.getoption("--full") else 2)
        tcpdump.terminate()
        seen, summary = tcpdump.communicate(timeout=30)
    assert seen.strip() == ""
    assert re.search(r"^0 packets captured$", summary, re.MULTILINE)


# --- what fails


def test_nothing_of_ipv6_is_lost_when_the_datapath_and_the_daemon_are_killed(lab: Lab, slack: int) -> None:
    host = lab.host(2)
    with (
        udp_flow(lab.host(1).pod(1), host.pod(1), 1000, ipv6=True) as inwards,
        udp_flow(host.pod(1), lab.host(3).pod(1), 1000, port=5004, ipv6=True) as outwards,
    ):
        kill(host, read_status(host)["datapath"]["pid"])
        inwards.wait_for_more()
        wait_until("another standby", lambda: len(datapath_pids(host)) == 2, 10 * slack)
        assert host.stop_daemon(signal.SIGKILL) == -signal.SIGKILL
        inwards.wait_for_more()
        host.start_daemon()
        host.wait_ready(20)
        inwards.wait_for_more()
        assert host.stop_daemon() == 0
        host.start_daemon()
        host.wait_ready(20)
        outwards.wait_for_more()
    for flow in (inwards, outwards):
        assert (flow.report.lost, flow.report.n_spoilt) == ([], 0)
        # What was in flight in the process that was killed may come twice.
        assert flow.report.n_duplicates <= 256


@pytest.mark.full
def test_a_path_that_takes_less_is_narrow_for_both_families(lab: Lab, slack: int) -> None:
    """It is measured by IPv4 alone.  The switch drops what is too long, and tells nobody."""
    one, two = lab.hosts[:2]
    wait_for_ipv6(lab)
    subnet = ipv6_gateway(two).network

    def route_mtu() -> str:
        return "".join(re.findall(r" mtu (\d+)", one.run(["ip", "-6", "route", "show", str(subnet)]).stdout))

    lab.switch.run(["ip", "link", "set", two.name, "mtu", "1400"])
    try:
        with tcp_flow(one.pod(1), two.pod(1), 2e6, ipv6=True) as flow:
            wait_until("the narrow route", lambda: route_mtu() == "1372", 20 * slack)
            assert is_answered(one.pod(1), two.pod(1).ipv6_address, 1372 - 48)
            # The stream has had the error before, or this ping gets it.
            assert not is_answered(one.pod(1), two.pod(1).ipv6_address, 1372 - 47)
            learned = one.pod(1).run(["ip", "-6", "route", "get", str(two.pod(1).ipv6_address)]).stdout
            assert " mtu 1372 " in learned
        flow.report.assert_exact()
    finally:
        lab.switch.run(["ip", "link", "set", two.name, "mtu", "1500"])
        # It takes a minute until more is tried again.
        for host in (one, two):
            assert host.stop_daemon() == 0
            host.path("/run/udptun/probes.json").unlink(missing_ok=True)
            host.start_daemon()
        for host in (one, two):
            host.wait_ready(20)


@pytest.mark.full
def test_an_underlay_that_takes_too_little_for_ipv6_switches_it_off_until_it_takes_more(lab: Lab, slack: int) -> None:
    """IPv4 goes on with the smaller MTU, and its packets are carried while the daemon begins again."""
    host, two = lab.hosts[:2]
    one, other = host.pod(1), two.pod(1)
    wait_for_ipv6(lab)
    lack = (
        "pods have no IPv6 to other hosts: an underlay MTU of 1300 leaves 1272 bytes for the pods' packets; IPv6 needs "
        "1280, so the underlay needs 1308"
    )

    with udp_flow(one, other, 500) as flow:
        host.run(["ip", "link", "set", "eth0", "mtu", "1300"])
        wait_until("the problem", lambda: problems(host) == [lack], 10 * slack)
        said = one.run(["ping", "-c", "1", "-W", "1", str(other.ipv6_address)], check=False).stdout
        assert "Destination unreachable: No route" in said
        # The others do not send it any, either.
        key = f"{host.subnet.network_address}-24&{ipv6_gateway(host).network.network_address}-64"
        refused = f"{key}: its host does not take IPv6"
        wait_until("a refusal", lambda: any(it.startswith(refused) for it in read_status(two)["skipped"]), 10 * slack)
        host.run(["ip", "link", "set", "eth0", "mtu", "1500"])
        wait_until("its end", lambda: problems(host) == [], 10 * slack)
        wait_for_ipv6(lab)
        flow.wait_for_more()
    assert flow.report.lost == []
    wait_until("the peer", lambda: len(read_status(two)["ipv6"]["peers"]) == 2, 10 * slack)


def test_a_reload_with_another_mtu_switches_ipv6_off_and_on(lab: Lab, slack: int) -> None:
    """With a larger MTU the lease said that IPv6 is taken, and every packet of it that peers sent was dropped."""
    host, two = lab.hosts[:2]
    one, other = host.pod(1), two.pod(1)
    wait_for_ipv6(lab)
    text = host.path(NET_CONF).read_text()

    def reload(text: str) -> None:
        host.path(NET_CONF).write_text(text)
        assert host.daemon is not None
        host.daemon.send_signal(signal.SIGHUP)

    lack = (
        "pods have no IPv6 to other hosts: an underlay MTU of 1300 leaves 1272 bytes for the pods' packets; IPv6 needs "
        "1280, so the underlay needs 1308"
    )
    with udp_flow(one, other, 500) as flow:
        reload(json.dumps({**CONF, "Backend": {"Type": "udp", "MTU": 1300}}))
        wait_until("the problem", lambda: problems(host) == [lack], 10 * slack)
        assert host.mtu == 1272
        said = one.run(["ping", "-c", "1", "-W", "1", str(other.ipv6_address)], check=False).stdout
        assert "Destination unreachable: No route" in said
        reload(text)
        wait_until("its end", lambda: problems(host) == [] and host.mtu == MTU, 10 * slack)
        wait_for_ipv6(lab)
        wait_until("answers", lambda: is_answered(other, one.ipv6_address), 10 * slack)
        flow.wait_for_more()
    assert flow.report.lost == []


STRANGE_LEASES = """
import asyncio, sys
from ipaddress import *
from udptun.core.lease import LeaseAttrs, Subnets
from pathlib import Path
from udptun.stores.base import SubnetChoice
from udptun.stores.local.store import LocalStore

async def main():
    store = LocalStore(Path(sys.argv[1]), Path())
    for number, (ip, subnet, data) in enumerate(eval(sys.stdin.read())):
        subnets = Subnets(IPv4Network(f"10.244.{200 + number}.0/24"), IPv6Network(subnet))
        attrs = LeaseAttrs(IPv4Address(ip), backend_type="udp", backend_data=data)
        await store.claim(attrs, lambda leases: SubnetChoice(subnets))
    await store.aclose()

asyncio.run(main())
"""


def test_leases_that_are_no_peers_by_ipv6_harm_nobody(lab: Lab, slack: int) -> None:
    """flannel's udp drops IPv6, so nothing is sent to its hosts; and a lease may claim what is ours."""
    host, other = lab.host(1), lab.host(2)
    ours = {"Udptun": 1, "IPv6": True}
    leases = [
        ("192.168.77.240", "fd00:244:0:f001::/64", None),
        ("192.168.77.241", str(next(ipv6_gateway(other).network.subnets())), ours),
        ("192.168.77.242", "fd00:999::/64", ours),
        ("127.0.0.1", "fd00:244:0:f004::/64", ours),
        ("192.168.77.243", "fd00:244:0:f005::/64", {"Udptun": 1, "IPv6": "yes"}),
    ]
    python = [sys.executable, "-c", STRANGE_LEASES, str(LEASES)]
    host.run(python, input=repr(leases))
    wait_until("all of them", lambda: len(read_status(host)["skipped"]) >= 5, 10 * slack)
    status = read_status(host)
    reasons = sorted(line.split(": ", 1)[1] for line in status["skipped"] if "fd00:" in line)
    no_ipv6 = "its host does not take IPv6 in Type udp: it runs flannel, an earlier udptun, or cannot carry IPv6"
    assert [reason for reason in reasons if reason == no_ipv6] == [no_ipv6] * 2
    assert len(status["ipv6"]["peers"]) == 2
    ping_all(lab)
    said = host.pod(1).run(["ping", "-c", "1", "-W", "5", "fd00:244:0:f001::5"], check=False).stdout
    assert "Destination unreachable: No route" in said


def test_a_host_that_is_a_peer_by_ipv6_alone_is_probed_by_ipv6(lab: Lab, slack: int) -> None:
    """Its Network is another one, so its IPv4 subnet is none for the others, and nobody is asked there."""
    host = lab.add_host()
    conf = host.path(NET_CONF).with_name("other.json")
    conf.write_text(json.dumps({**CONF, "Network": "10.99.0.0/16", "SubnetMax": "10.99.99.0"}))
    command = [*lab.daemon_command]
    command[command.index(str(NET_CONF))] = str(NET_CONF.with_name("other.json"))
    host.start_daemon(command=command)
    host.wait_ready(20)
    pod, subnet = host.add_pod(), str(ipv6_gateway(host).network)
    wait_until("the peer", lambda: is_answered(lab.host(1).pod(1), pod.ipv6_address), 10 * slack)
    assert not is_answered(lab.host(1).pod(1), pod.address)

    def peer() -> Any:
        peers = read_status(lab.host(1))["ipv6"]["peers"]
        return next(it for it in peers if it["subnet"] == subnet)

    wait_until("an answer", lambda: (peer()["liveness"], peer()["path_mtu"]) == ("alive", MTU), 10 * slack)
    host.down()

    def says() -> str:
        return lab.host(1).pod(1).run(["ping", "-c", "1", "-W", "1", str(pod.ipv6_address)], check=False).stdout

    wait_until("refusals", lambda: "Destination unreachable: Address unreachable" in says(), 10 * slack)
    assert peer()["liveness"] == "dead"


def test_a_host_whose_network_has_ipv4_alone_stays_a_peer_by_ipv4(lab: Lab, slack: int) -> None:
    """Its configuration is of before, say.  Its lease has no IPv6 subnet, and it drops what comes of IPv6."""
    host = lab.add_host()
    conf = host.path(NET_CONF).with_name("ipv4.json")
    conf.write_text('{"Network": "10.244.0.0/16", "SubnetMax": "10.244.99.0", "Backend": {"Type": "udp"}}')
    command = [*lab.daemon_command]
    command[command.index(str(NET_CONF))] = str(NET_CONF.with_name("ipv4.json"))
    host.start_daemon(command=command)
    host.wait_ready(20)
    pod = host.add_pod()
    wait_until("the peer", lambda: is_answered(lab.host(1).pod(1), pod.address), 10 * slack)
    assert pod.ipv6_address is None
    peers = read_status(lab.host(1))["ipv6"]["peers"]
    assert str(host.underlay_address) not in [peer["public_ip"] for peer in peers]
    status = read_status(host)
    assert (status["ipv6"], status["problems"]) == (None, [])
    assert host.run(["sysctl", "-n", "net.ipv6.conf.flannel0.disable_ipv6"]).stdout == "1\n"
    assert host.stop_daemon() == 0
    removed = host.run([*CLEANUP[:-1], str(NET_CONF.with_name("ipv4.json"))]).stdout
    assert "deleted link flannel0\n" in removed


# --- other hosts, other pods

ALONE = {"EnableIPv4": False, **{key: value for key, value in CONF.items() if key not in ("Network", "SubnetMax")}}
KINDS = [
    pytest.param(ALONE, True, id="IPv6 alone over IPv4"),
    pytest.param(ALONE, False, id="IPv6 alone over IPv6", marks=pytest.mark.full),
    pytest.param(CONF, False, id="both over IPv6", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("conf", "ipv4"), KINDS)
def test_pods_and_hosts_may_have_other_families(conf: Mapping[str, object], ipv4: bool, slack: int) -> None:
    mtu = MTU if ipv4 else MTU - 20
    with Lab(f"o6{os.getpid()}", net_conf=conf, ipv6=True, ipv4=ipv4) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        wait_for_peers(lab)
        host = lab.host(1)
        one, other = host.pod(1), lab.host(2).pod(1)
        wait_for_ipv6(lab)
        assert is_answered(one, other.ipv6_address, mtu - 48)
        assert conf is ALONE or is_answered(one, other.address, mtu - 28)
        (peer,) = read_status(host)["ipv6"]["peers"]
        there = lab.host(2).underlay_address if ipv4 else lab.host(2).underlay_ipv6
        assert peer["public_ip"] == str(there)
        with udp_flow(one, other, 500, ipv6=True) as datagrams, tcp_flow(other, one, ipv6=True) as stream:
            assert host.stop_daemon(signal.SIGKILL) == -signal.SIGKILL
            host.start_daemon()
            host.wait_ready(20)
            datagrams.wait_for_more()
        stream.report.assert_exact()
        assert (datagrams.report.lost, datagrams.report.n_spoilt) == ([], 0)

        def measured() -> tuple[object, object]:
            (peer,) = read_status(host)["ipv6"]["peers"]
            return peer["liveness"], peer["path_mtu"]

        wait_until("a measure", lambda: measured() == ("alive", mtu), 10 * slack)
        assert read_status(host)["problems"] == []
        # A subnet that is shown among the peers is not shown again.
        text = host.run([sys.executable, "-m", "udptun", "status"]).stdout
        assert text.count(f"\n{ipv6_gateway(lab.host(2)).network} ") == 1

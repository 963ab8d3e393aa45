"""Two hosts behind one address, told apart by their ports, and two that nobody told apart.

    h1 172.30.0.11:8285 --\\
                           switch: 192.168.77.1, NAT -- underlay -- h3
    h2 172.30.0.12:8286 --/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from test_membership import FOLLOWS_S
from traffic import REAL_TIME, peers, ping, read_status, seconds_until, tcp_flow, udp_flow

from udptun.lab.host import UNDERLAY, Host
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

NAT = UNDERLAY[1]
PORTS = {1: 8285, 2: 8286}
STATUS = [sys.executable, "-m", "udptun", "status"]

RULES = """
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 192.168.77.1 udp dport 8285 dnat to 172.30.0.11:8285
        ip daddr 192.168.77.1 udp dport 8286 dnat to 172.30.0.12:8286
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 172.30.0.11 udp sport 8285 snat to 192.168.77.1:8285
        ip saddr 172.30.0.12 udp sport 8286 snat to 192.168.77.1:8286
    }
}
"""


def start(lab: Lab, number: int) -> Host:
    host = lab.host(number)
    behind = [] if number == 3 else ["--iface=eth0", f"--public-ip={NAT}", f"--port={PORTS[number]}"]
    host.start_daemon(behind)
    host.wait_ready()
    return host


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("t-nat", n_hosts=3, n_pods=1) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"])
        lab.switch.run(["sysctl", "-qw", "net.ipv4.conf.underlay.send_redirects=0"])
        lab.switch.run(["nft", "-f", "-"], input=RULES)
        lab.switch.at().ip("addr add 172.30.0.1/24 dev underlay")
        for number in PORTS:
            host = lab.host(number)
            host.machine.at().ip(
                f"addr del {host.underlay_address}/24 dev eth0",
                f"addr add 172.30.0.{10 + number}/24 brd + dev eth0",
                "route replace default via 172.30.0.1",
            )
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def test_hosts_behind_one_address_reach_each_other_and_those_outside(lab: Lab) -> None:
    for number in (1, 2, 3):
        start(lab, number)
    for host in lab.hosts:
        host.add_pod()
    one, two, three = lab.hosts
    for host in lab.hosts:
        seconds_until(lambda host=host: len(peers(host)) == 2, "two peers", FOLLOWS_S)
    seen = {peer["subnet"]: (peer["public_ip"], peer["port"]) for peer in read_status(three)["peers"]}
    assert seen == {str(one.subnet): (str(NAT), 8285), str(two.subnet): (str(NAT), 8286)}
    assert {peer["port"] for peer in read_status(one)["peers"]} == {8286, 8285}
    assert read_status(two)["lease"]["port"] == 8286
    assert "8286" in three.run(STATUS).stdout
    pods = [host.pod(1) for host in lab.hosts]
    for source in pods:
        for destination in pods:
            ping(source, destination.address)
    with udp_flow(pods[0], pods[1], 500) as flow, tcp_flow(pods[2], pods[1]) as stream:
        flow.wait_for_more(300)
    assert flow.report.lost == []
    stream.report.assert_exact()
    for host in lab.hosts:
        assert read_status(host)["problems"] == []
        assert read_status(host)["skipped"] == []
        drops = {name: n for name, n in read_status(host)["counters"].items() if "source" in name and n}
        assert drops == {}

    # Each finds its own lease again, and not the other's.
    subnets = [host.subnet for host in lab.hosts]
    for number in (2, 1):
        assert lab.host(number).stop_daemon() == 0
        start(lab, number)
    assert [host.subnet for host in lab.hosts] == subnets


def test_of_two_hosts_with_one_address_and_port_the_second_says_so_and_the_first_goes_on(lab: Lab) -> None:
    one, three = start(lab, 1), start(lab, 3)
    for host in (one, three):
        host.add_pod()
    subnet, node = str(one.subnet), read_status(one)["lease"]["node_id"]
    with udp_flow(one.pod(1), three.pod(1), 500) as flow:
        two = lab.host(2)
        two.start_daemon(["--iface=eth0", f"--public-ip={NAT}", f"--port={PORTS[1]}"])
        two.wait_ready()
        seconds_until(lambda: bool(read_status(two)["problems"]), "the second to say so", FOLLOWS_S)
        (problem,) = read_status(two)["problems"]
        print(problem)
        other = read_status(two)["lease"]["node_id"]
        assert f"{subnet}, which we took over, is {NAT}:8285 (node {node})'s again" in problem
        assert f"we are {NAT}:8285 (node {other})" in problem
        assert read_status(one)["problems"] == []
        assert str(one.subnet) == subnet
        flow.wait_for_more(200)
        n_lines = len(two.daemon_log().splitlines())
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert read_status(two)["problems"] == [problem]
            time.sleep(0.05)
        assert len(two.daemon_log().splitlines()) <= n_lines + 1, "it goes on about it"
        # Told another port, it gets a lease of its own.
        assert two.stop_daemon() == 0
        start(lab, 2)
        assert str(two.subnet) != subnet
        two.add_pod()
        ping(two.pod(1), three.pod(1).address)
        ping(two.pod(1), one.pod(1).address)
        flow.wait_for_more(50)
    assert flow.report.lost == []

"""Several source ports and workers: behind a stateful NAT, and while the number of workers changes.

h1 172.30.0.11 -- switch: 192.168.77.1, NAT -- underlay -- h2, h3
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from traffic import REAL_TIME, has_shortcut, ping, read_status, tcp_flow, udp_flow, wait_for_peers

from udptun.lab.host import UNDERLAY, Host, Pod
from udptun.lab.topology import DEFAULT_NET_CONF, NET_CONF, Lab

pytestmark = pytest.mark.netns

NAT = UNDERLAY[1]
N_PORTS, N_WORKERS, N_FLOWS = 8, 4, 64

MASQUERADE = """
table ip nat {
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 172.30.0.11 ip daddr != 172.30.0.0/24 masquerade
    }
}
table ip filter {
    chain forward {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        ct status dnat accept
        ip saddr { 172.30.0.11, 192.168.77.0/24 } ip daddr != 172.30.0.0/24 accept
    }
    chain input {
        type filter hook input priority filter
        udp dport 8285 drop
    }
}
"""
"""Lets in what answers, from the very port that was sent to, and what is let in by name."""
DNAT = """
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 192.168.77.1 udp sport 8285 udp dport 8285 dnat to 172.30.0.11:8285
    }
}
"""
SEND = """
import socket, sys
for port in range(int(sys.argv[2])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("", 20000 + port))
        for _ in range(10):
            udp.sendto(b"x", (sys.argv[1], 9))
"""


@pytest.fixture(params=[MASQUERADE, MASQUERADE + DNAT], ids=["masquerade", "dnat"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab("t-ports", n_hosts=3, n_pods=1) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"])
        lab.switch.run(["sysctl", "-qw", "net.ipv4.conf.underlay.send_redirects=0"])
        lab.switch.run(["nft", "-f", "-"], input=request.param)
        lab.switch.at().ip("addr add 172.30.0.1/24 dev underlay")
        one = lab.host(1)
        one.machine.at().ip(
            f"addr del {one.underlay_address}/24 dev eth0",
            "addr add 172.30.0.11/24 brd + dev eth0",
            "route replace default via 172.30.0.1",
        )
        for host in lab.hosts:
            behind = ["--iface=eth0", f"--public-ip={NAT}"] if host is one else []
            host.start_daemon([*behind, f"--source-ports={N_PORTS}", f"--workers={N_WORKERS}"])
            host.wait_ready()
            host.add_pod()
        wait_for_peers(lab)
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def send_many_flows(source: Pod, destination: Pod) -> None:
    source.run([sys.executable, "-I", "-S", "-c", SEND, str(destination.address), str(N_FLOWS)])


def n_delivered_by_worker(lab: Lab, number: int) -> list[int]:
    counters = read_status(lab.host(number))["datapath"]["worker_counters"]
    return [counts.get("decap_delivered", 0) for counts in counters]


def test_a_stateful_nat_loses_nothing_and_hosts_without_one_use_all_ports_and_workers(lab: Lab) -> None:
    one, two, three = lab.hosts
    ports = {
        host: {peer["subnet"]: peer["any_source_port"] for peer in read_status(host)["peers"]} for host in lab.hosts
    }
    assert ports[two] == {str(one.subnet): False, str(three.subnet): True}
    assert [read_status(host)["backend"]["source_ports"] for host in lab.hosts] == [1, N_PORTS, N_PORTS]
    pods = [host.pod(1) for host in lab.hosts]
    # The host behind the NAT speaks first, as with flannel.
    ping(pods[0], pods[1].address)
    with ExitStack() as flows:
        pairs = [(pods[0], pods[1]), (pods[1], pods[0]), (pods[1], pods[2])]
        running = [flows.enter_context(udp_flow(a, b, 500, 5100 + i)) for i, (a, b) in enumerate(pairs)]
        stream = flows.enter_context(tcp_flow(pods[1], pods[0]))
        send_many_flows(pods[1], pods[0])
        send_many_flows(pods[0], pods[1])
        for flow in running:
            flow.wait_for_more()
    for flow in running:
        assert flow.report.lost == []
        assert flow.report.n_out_of_order == 0
    stream.report.assert_exact()

    # What the kernel carries leaves from one port, and reaches no worker.
    if not has_shortcut(three):
        before = n_delivered_by_worker(lab, 3)
        send_many_flows(pods[1], pods[2])
        got = [now - was for now, was in zip(n_delivered_by_worker(lab, 3), before, strict=True)]
        print(f"{N_FLOWS} flows of one peer over the workers: {got}")
        assert sum(got) >= 10 * N_FLOWS
        assert sum(n > 0 for n in got) > 1
    for host in lab.hosts:
        drops = {name: n for name, n in read_status(host)["counters"].items() if "source" in name and n}
        assert drops == {}
        assert read_status(host)["problems"] == []


# --- a change of workers


def reload(host: Host, **keys: object) -> None:
    conf = dict(DEFAULT_NET_CONF) | {"Backend": {"Type": "udp", **keys}}
    host.path(NET_CONF).write_text(json.dumps(conf))
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)
    host.wait_ready(20)


@pytest.mark.parametrize("off", [[], ["spread"]], ids=["program", "hash"])
def test_a_change_of_workers_loses_and_reorders_nothing_of_many_flows(pair: Lab, off: list[str]) -> None:
    """Flows changed from one worker to another while packets waited for the first, and later ones overtook these.

    Without the program nothing is lost either, but the kernel's hash moves flows when a socket joins or goes.
    """
    one, two = pair.hosts
    reload(two, SourcePorts=4)
    with ExitStack() as stack:
        flows = [stack.enter_context(udp_flow(two.pod(1), one.pod(1), 1000, 5100 + i)) for i in range(4)]
        for n in (4, 3, 2, 4, 1):
            reload(one, Workers=n, OffloadDisabled=off)
            flows[0].wait_for_more(100)
            document = read_status(one)
            assert document["datapath"]["workers"] == ["running"] * n
            assert ("spread" in document["backend"]["offloads"]) == (not off)
    for host in (one, two):
        reload(host)
    assert [flow.report.lost for flow in flows] == [[]] * 4
    if not off:
        assert [flow.report.n_out_of_order for flow in flows] == [0] * 4

"""Hosts with unusual addresses and routes: a loopback address, an address inside Network, links without addresses.

pod h1/p1 -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import pytest
from traffic import ping, read_status, udp_flow

from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

NETWORK = "10.244.0.0/16"
UDP: Mapping[str, object] = {"Type": "udp"}
VXLAN: Mapping[str, object] = {"Type": "vxlan"}
VTEP: Mapping[str, object] = {"Type": "vxlan", "Userspace": True}
OVERHEADS = {"udp": 28, "vxlan": 50, "vtep": 50}


def lab_of(backend: Mapping[str, object], n_hosts: int = 2, **keys: object) -> Lab:
    return Lab(f"a{os.getpid()}", n_hosts=n_hosts, net_conf={"Network": NETWORK, "Backend": dict(backend), **keys})


def start(host: Host, *flags: str) -> None:
    """Start the host's daemon, wait until it is ready, and give the host a pod."""
    host.start_daemon(flags)
    host.wait_ready()
    host.add_pod()


def wait_for_answer(source: Pod | Host, destination: Pod, *flags: str) -> None:
    command = ["ping", "-c", "1", "-W", "1", *flags, str(destination.address)]
    wait_until(f"{destination} to answer {source}", lambda: source.run(command, check=False).returncode == 0, 10)


def log_line(host: Host, words: str) -> str:
    """The first line of the daemon's log with these words."""
    return next(line for line in host.daemon_log().splitlines() if words in line)


# --- an address on lo


@pytest.mark.parametrize("backend", [UDP, VXLAN, VTEP], ids=["udp", "vxlan", "vtep"])
@pytest.mark.parametrize("flags", [["--iface=lo"], ["--public-ip={}"]], ids=["iface", "public-ip"])
def test_addresses_on_lo_reach_each_other_by_the_routes(
    backend: Mapping[str, object], flags: Sequence[str], request: pytest.FixtureRequest
) -> None:
    """lo was taken for the underlay: its MTU made packets that no link took, and VXLAN sent them to lo."""
    with lab_of(backend) as lab:
        for host, other in (lab.hosts, lab.hosts[::-1]):
            host.machine.at().ip(
                f"address add 10.1.1.{host.index}/32 dev lo",
                f"route add 10.1.1.{other.index} via {other.underlay_address}",
            )
        for host in lab.hosts:
            start(host, *(flag.format(f"10.1.1.{host.index}") for flag in flags))
        one, two = lab.hosts
        wait_for_answer(one.pod(1), two.pod(1))
        overhead = OVERHEADS[request.node.callspec.id.split("-")[-1]]
        assert {host.mtu for host in lab.hosts} == {1500 - overhead}
        ping(one.pod(1), two.pod(1).address, "-M", "do", "-s", str(one.mtu - 28))
        status = read_status(one)
        assert status["underlay"] == {"interface": "eth0", "address": "10.1.1.1", "mtu": 1500}
        assert status["problems"] == []
        assert "it is on lo, and the routes to other hosts lead through eth0" in log_line(one, "underlay chosen")


# --- direct routes


def own_routes(host: Host) -> dict[str, str]:
    """The routes that the daemon has set, by their prefix; the unreachable ones left out."""
    lines = host.run(["ip", "-4", "route", "show", "proto", "158"]).stdout.splitlines()
    return {line.split()[0]: line for line in lines if not line.startswith("unreachable")}


@pytest.mark.parametrize("backend", [VXLAN, VTEP], ids=["vxlan", "vtep"])
def test_direct_routing_over_links_without_addresses_uses_the_tunnel(backend: Mapping[str, object]) -> None:
    """The router's IPv6 address was overlooked, the kernel refused the direct route, and the peer was cut off."""
    with lab_of({**backend, "DirectRouting": True}) as lab:
        for host, other in (lab.hosts, lab.hosts[::-1]):
            host.run(["sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"])
            host.machine.at().ip(
                f"address add fe80::{host.index}/64 dev eth0 nodad",
                f"address add 10.1.1.{host.index}/32 dev lo",
                f"route add 10.1.1.{other.index} via inet6 fe80::{other.index} dev eth0",
            )
        for host in lab.hosts:
            start(host, "--iface=lo")
        one, two = lab.hosts
        wait_for_answer(one.pod(1), two.pod(1))
        assert read_status(one)["problems"] == []
        assert {line.split(" dev ")[1].split()[0] for line in own_routes(one).values()} == {"flannel.1"}


@pytest.mark.alone  # counts lost packets, also through a datapath that needs a processor
@pytest.mark.parametrize("backend", [VXLAN, VTEP], ids=["vxlan", "vtep"])
def test_a_direct_route_that_the_kernel_refuses_leaves_the_tunnel(backend: Mapping[str, object]) -> None:
    """The peer was cut off for as long as the kernel refused the route."""
    with lab_of({**backend, "DirectRouting": True}) as lab:
        one, two = lab.hosts
        for host, other in ((one, two), (two, one)):
            host.machine.at().ip(
                f"address add 10.1.1.{host.index}/32 dev lo",
                f"route add 10.1.1.{other.index} via {other.underlay_address}",
            )
        # A gateway whose own route has the scope of routers is none: "Nexthop has invalid gateway".
        one.machine.at().ip("route replace 10.1.1.2 dev eth0 scope global")
        for host in lab.hosts:
            start(host, "--iface=lo")
        wait_for_answer(one.pod(1), two.pod(1))
        (problem,) = read_status(one)["problems"]
        assert problem.startswith(f"cannot add route {two.subnet}: ")
        assert problem.endswith("so its packets go through the tunnel, not straight to 10.1.1.2 (DirectRouting)")
        assert " dev flannel.1 " in one.run(["ip", "route", "get", str(two.pod(1).address)]).stdout

        # Each route that somebody adds or deletes may be the reason, so each time the direct route is tried again.
        with udp_flow(one.pod(1), two.pod(1), 200) as flow:
            for number in range(1, 6):
                one.machine.at().ip(f"route add 203.0.113.{number} dev eth0")
                time.sleep(0.2)
        assert (flow.report.lost, len(read_status(one)["problems"])) == ([], 1)

        one.machine.at().ip("route del 10.1.1.2", "route add 10.1.1.2 dev eth0 scope link")
        direct = f"{two.subnet} via 10.1.1.2 dev eth0 "
        wait_until("the direct route", lambda: own_routes(one).get(str(two.subnet), "").startswith(direct), 10)
        wait_for_answer(one.pod(1), two.pod(1))
        assert read_status(one)["problems"] == []

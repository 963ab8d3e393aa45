"""Hosts with unusual addresses and routes: a loopback address, an address inside Network, links without addresses.

pod h1/p1 -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence

import pytest
from traffic import REAL_TIME, datapath_pids, kill, ping, read_status, udp_flow

from udptun.lab.errors import LabError
from udptun.lab.host import SUBNET_ENV, UNDERLAY, Host, Pod
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


@pytest.mark.parametrize("backend", [VXLAN, VTEP], ids=["vxlan", "vtep"])
def test_a_direct_route_that_the_kernel_refuses_leaves_the_tunnel(backend: Mapping[str, object]) -> None:
    """The peer was cut off for as long as the kernel refused the route."""
    with lab_of({**backend, "DirectRouting": True}) as lab:
        lab.daemon_command[:0] = REAL_TIME
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
        wait_until("the problem", lambda: bool(read_status(one)["problems"]), 10)
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


# --- hosts inside Network

HOST_GW: Mapping[str, object] = {"Type": "host-gw"}
ALLOC: Mapping[str, object] = {"Type": "alloc"}
NOT_UDP = {"vxlan": VXLAN, "vtep": VTEP, "host-gw": HOST_GW, "alloc": ALLOC}
WIDE = {"Network": "192.168.0.0/16", "SubnetMin": "192.168.128.0", "SubnetMax": "192.168.191.0"}
"""The hosts and their router (192.168.77.0/24) are inside Network, and outside of what is leased."""
ROUTER = UNDERLAY[1]
BESIDE, AMONG = "192.168.250.1", "192.168.130.1"
"""Two addresses behind the router: one that cannot be leased, and one that can."""


def wide_lab(backend: Mapping[str, object]) -> Lab:
    return Lab(f"a{os.getpid()}", net_conf={**WIDE, "Backend": dict(backend)})


def reaches(place: Pod | Host, address: object) -> bool:
    return place.run(["ping", "-c", "1", "-W", "5", str(address)], check=False).returncode == 0


def way(host: Host, address: object) -> str:
    """What the kernel says of the route to the address; its error where it refuses."""
    result = host.run(["ip", "route", "get", str(address)], check=False)
    return result.stdout or result.stderr


@pytest.mark.parametrize("backend", NOT_UDP.values(), ids=NOT_UDP)
def test_hosts_inside_network_reach_each_other_and_all_that_they_did(backend: Mapping[str, object]) -> None:
    """The daemons ended with status 2; hosts outside lost all of Network, their name server among it."""
    with wide_lab(backend) as lab:
        one, two = lab.hosts
        lab.switch.at().ip(f"address add {BESIDE}/32 dev lo")
        wait_until("the network of the lab", lambda: reaches(one, BESIDE), 20)
        lab.start()
        if backend is not ALLOC:
            wait_for_answer(one.pod(1), two.pod(1))
            wait_for_answer(two, one.pod(1))
        for address in (BESIDE, two.underlay_address, ROUTER):
            assert reaches(one, address)
        assert read_status(one)["skipped"] == []
        assert read_status(one)["problems"] == []


def test_udp_inside_network_ends_with_the_ways_out() -> None:
    with wide_lab(UDP) as lab:
        one = lab.host(1)
        one.start_daemon()
        with pytest.raises(LabError, match="ended with status 2"):
            one.wait_ready()
        assert "udp backend leads all of Network into its device" in one.daemon_log()
        assert "SubnetMin (192.168.128.0) and SubnetMax (192.168.191.0)" in one.daemon_log()


@pytest.mark.parametrize("backend", [VXLAN, VTEP], ids=["vxlan", "vtep"])
def test_what_a_wider_route_leads_to_stays_and_no_leased_subnet_follows_it(backend: Mapping[str, object]) -> None:
    """All of Network was refused, whatever routes the host had; without that a lost device would leak pods' packets."""
    with wide_lab(backend) as lab:
        one, two = lab.hosts
        # They take what they had before, so what the test asks about is not leased.
        for number, host in enumerate(lab.hosts):
            host.path(SUBNET_ENV).parent.mkdir(parents=True)
            host.path(SUBNET_ENV).write_text(f"FLANNEL_SUBNET=192.168.{150 + number}.1/24\n")
        lab.switch.at().ip(f"address add {AMONG}/32 dev lo")
        one.machine.at().ip(f"route add 192.168.0.0/16 via {ROUTER}")
        wait_until("the network of the lab", lambda: reaches(one, AMONG), 20)
        lab.start()
        wait_for_answer(one.pod(1), two.pod(1))
        assert reaches(one, AMONG)
        unleased = "192.168.140.9"
        assert str(one.subnet) == "192.168.150.0/24"
        assert f"via {ROUTER} dev eth0" in way(one, unleased)

        # Routes come and go: without one around it, all that can be leased is guarded.
        one.machine.at().ip("route del 192.168.0.0/16")
        wait_until("the guard", lambda: "eth0" not in way(one, unleased), 10)
        one.machine.at().ip(f"route add 192.168.0.0/17 via {ROUTER}", f"route add 192.168.128.0/17 via {ROUTER}")
        wait_until("the way around", lambda: f"via {ROUTER} dev eth0" in way(one, unleased), 10)
        wait_for_answer(one.pod(1), two.pod(1))
        assert reaches(one, AMONG)

        # With daemon and device gone, the packets of all pods are refused, and those of nobody else.
        one.stop_daemon(signal.SIGKILL)
        if backend is VTEP:
            kill(one, *datapath_pids(one))
        one.machine.at().ip("link del flannel.1", "link del cni0")
        for address in (two.pod(1).address, one.pod(1).address, two.subnet.network_address):
            assert "eth0" not in way(one, address)
        assert reaches(one, AMONG)


def test_a_route_to_a_part_of_network_does_not_take_the_packets_of_udp() -> None:
    """They left in clear text, by another owner's route that is longer than the one into the device."""
    with lab_of(UDP) as lab:
        one, two = lab.hosts
        lab.start()
        wait_for_answer(one.pod(1), two.pod(1))
        around = two.subnet.supernet(new_prefix=20)
        one.machine.at().ip(f"route add {around} via {ROUTER}")
        wait_until("the peer's own route", lambda: "dev flannel0" in way(one, two.pod(1).address), 10)
        wait_for_answer(one.pod(1), two.pod(1))
        one.machine.at().ip(f"route del {around}")
        wait_until("no more than flannel's route", lambda: list(own_routes(one)) == [NETWORK], 10)
        wait_for_answer(one.pod(1), two.pod(1))

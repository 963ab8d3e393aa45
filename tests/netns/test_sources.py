"""Which sources a host's datagrams and packets have: PublicIP outside, and inside none of the receiver's addresses.

pod h1/p1 -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from traffic import is_answered, read_status, socket_in

from tests.packets import udp
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

FOLLOWS_S = 10
"""A change is followed within a fraction of a second; the machine may be busy."""

BACKENDS = {"udp": {"Type": "udp"}, "vtep": {"Type": "vxlan", "Userspace": True}}
PORTS = {"udp": 8285, "vtep": 8472}


@contextmanager
def lab_of(backend: str) -> Iterator[Lab]:
    """Two hosts, whose daemons must not have printed a traceback by the end."""
    net_conf = {"Network": "10.244.0.0/16", "Backend": BACKENDS[backend]}
    with Lab(f"s{os.getpid()}", n_hosts=2, net_conf=net_conf) as lab:
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def start(host: Host, public_ip: object, *flags: str) -> None:
    host.start_daemon(["--iface=eth0", f"--public-ip={public_ip}", *flags])
    host.wait_ready()


def restart(host: Host, public_ip: object, *flags: str) -> None:
    assert host.stop_daemon() == 0
    start(host, public_ip, *flags)


def answers(source: Host, destination: Host) -> bool:
    return is_answered(source.pod(1), destination.pod(1).address)


def bound_to(host: Host, port: int) -> set[str]:
    """The addresses that sockets of the port are bound to."""
    lines = host.run(["ss", "-Huan", f"sport = :{port}"]).stdout.splitlines()
    return {line.split()[3].rsplit(":", 1)[0] for line in lines}


# --- outside


@pytest.mark.parametrize("backend", BACKENDS)
def test_datagrams_leave_from_a_public_ip_that_is_another_address_of_the_host(backend: str) -> None:
    """They left from the interface's address, which was in no lease, and every peer dropped them."""
    with lab_of(backend) as lab:
        one, two = lab.hosts
        for host, other in ((one, two), (two, one)):
            host.machine.at().ip(
                f"address add 10.1.1.{host.index}/32 dev lo",
                f"route add 10.1.1.{other.index} via {other.underlay_address}",
            )
            start(host, f"10.1.1.{host.index}")
            host.add_pod()
        wait_until("an answer", lambda: answers(one, two), FOLLOWS_S)
        assert bound_to(one, PORTS[backend]) == {"10.1.1.1"}
        assert read_status(one)["underlay"] == {"interface": "eth0", "address": "10.1.1.1", "mtu": 1500}
        assert "we send from PublicIP, which is on lo" in one.daemon_log()

        # Without it the interface's address serves, and PublicIP again as soon as the host has it.
        one.machine.at().ip("address del 10.1.1.1/32 dev lo")
        address = str(one.underlay_address)
        wait_until("the way to the interface's", lambda: bound_to(one, PORTS[backend]) == {address}, FOLLOWS_S)
        one.machine.at().ip("address add 10.1.1.1/32 dev lo")
        wait_until("the way back", lambda: bound_to(one, PORTS[backend]) == {"10.1.1.1"}, FOLLOWS_S)
        wait_until("an answer", lambda: answers(one, two), FOLLOWS_S)
        assert read_status(one)["problems"] == []
        # Its own probes left from there meanwhile, and a line about them stays for half a minute.
        said = f"packets of {read_status(one)['lease']['subnet']} came from {address}, no host's PublicIP"
        assert [line for line in read_status(two)["problems"] if said not in line] == []


def test_a_nat_that_translates_only_destinations_is_named_at_the_receiver_with_the_remedy() -> None:
    """The counter decap_drop_unknown_peer grew, and nothing said which address, or whose packets.

    With a strict check no address is learned (test_learned_addresses.py).
    """
    strict = "--source-check=strict"
    with lab_of("udp") as lab:
        one, two = lab.hosts
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"])
        lab.switch.run(["sysctl", "-qw", "net.ipv4.conf.underlay.send_redirects=0"])
        rules = [f"ip daddr 203.0.113.{host.index} ip daddr set {host.underlay_address}" for host in lab.hosts]
        chain = "\n".join(["type filter hook prerouting priority raw", *rules])
        lab.switch.run(["nft", "-f", "-"], input=f"table ip t {{\nchain c {{\n{chain}\n}}\n}}\n")
        for host in lab.hosts:
            start(host, f"203.0.113.{host.index}", strict)
            host.add_pod()
        wait_until("peers", lambda: all(len(read_status(host)["peers"]) == 1 for host in lab.hosts), FOLLOWS_S)
        # The hosts' probes alone are enough, and may have been named by now.
        assert all("no host's PublicIP" in line for line in read_status(two)["problems"])
        assert not answers(one, two)
        (problem,) = read_status(two)["problems"]
        address = one.underlay_address
        assert re.fullmatch(
            rf"\d+ packets of {one.subnet} came from {address}, no host's PublicIP, and were dropped, because the host "
            rf"of {one.subnet} has the PublicIP 203\.0\.113\.1; if {address} is that host, start its daemon with "
            rf"--public-ip={address}, or .*",
            problem,
        )
        restart(one, address, strict)
        # The lease says so by now.
        wait_until("the end of the problem", lambda: read_status(two)["problems"] == [], FOLLOWS_S)
        restart(two, two.underlay_address, strict)
        wait_until("an answer", lambda: answers(one, two), FOLLOWS_S)
        assert [read_status(host)["problems"] for host in lab.hosts] == [[], []]


# --- inside


@pytest.fixture
def refused() -> Iterator[Callable[[str], bool]]:
    """Tells whether h2 refuses a packet that h1 sends from such a source, although its device accepts local ones."""
    with lab_of("udp") as lab:
        one, two = lab.hosts
        for host in lab.hosts:
            start(host, host.underlay_address)
        wait_until("a peer", lambda: len(read_status(two)["peers"]) == 1, FOLLOWS_S)
        with socket_in(one, socket.SOCK_DGRAM) as sender:
            sender.bind((str(one.underlay_address), 0))

            def is_refused(source: str) -> bool:
                before = read_status(two)["counters"]
                sender.sendto(udp(source, str(two.subnet[2])), (str(two.underlay_address), 8285))
                now = before
                while now["decap_packets"] == before["decap_packets"]:
                    now = read_status(two)["counters"]
                return bool(now["decap_drop_source_own"] > before["decap_drop_source_own"])

            is_refused.host = two  # type: ignore[attr-defined]
            yield is_refused


def test_packets_from_any_address_of_the_receiver_are_refused_as_the_addresses_come_and_go(
    refused: Callable[[str], bool],
) -> None:
    """Only the underlay's address was refused; accept_local let the others in, as if they came from the host."""
    two: Host = refused.host  # type: ignore[attr-defined]
    ip = two.machine.at().ip
    others = {"198.51.100.9": "dev lo", "198.51.100.10": "dev eth0"}
    assert refused(str(two.underlay_address))
    assert not any(map(refused, others))
    for address, where in others.items():
        ip(f"address add {address}/32 {where}")
    ip("route add local 198.51.100.32/28 dev lo")
    for address in (*others, "198.51.100.33", "198.51.100.47"):
        wait_until(f"packets from {address} to be refused", lambda it=address: refused(it), FOLLOWS_S)
    assert not refused("198.51.100.48")
    # A daemon that comes new to a datapath that runs knows them all before it writes its first table.
    assert two.stop_daemon() == 0
    start(two, two.underlay_address)
    assert all(map(refused, others))
    for address, where in others.items():
        ip(f"address del {address}/32 {where}")
    ip("route del local 198.51.100.32/28 dev lo")
    for address in (*others, "198.51.100.33"):
        wait_until(f"packets from {address} to be let in", lambda it=address: not refused(it), FOLLOWS_S)


def test_thousands_of_addresses_are_refused_and_the_daemon_goes_on_answering(refused: Callable[[str], bool]) -> None:
    """kube-proxy in ipvs mode gives each host the addresses of all services.  One look at 10,000 took half a second."""
    two: Host = refused.host  # type: ignore[attr-defined]
    addresses = [f"10.{96 + (i >> 8)}.{i & 255}.1" for i in range(5000)]
    batch = "".join(f"address add {address}/32 dev lo\n" for address in addresses)
    two.run(["ip", "-batch", "-"], input=batch)
    for address in (addresses[0], addresses[2500], addresses[-1]):
        wait_until(f"packets from {address} to be refused", lambda it=address: refused(it), FOLLOWS_S)
    assert not refused("10.95.0.1")
    assert read_status(two)["problems"] == []

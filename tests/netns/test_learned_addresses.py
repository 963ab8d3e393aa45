"""Hosts whose datagrams come from another address than their PublicIP, and somebody who would like to be one.

pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay, 192.168.77.1 [switch] -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
                             eth1, in the second part ^
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from traffic import is_answered, kill, read_status, socket_in, udp_flow

from tests.packets import icmp_message, ipv4, udp
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

LEARNED_S = 15
"""A stray is looked at within half a second."""
FLOOD_S = 60
"""During a flood few strays get through."""

BACKENDS = {"udp": {"Type": "udp"}, "vtep": {"Type": "vxlan", "Userspace": True}}
PORTS = {"udp": 8285, "vtep": 8472}
STRANGER = UNDERLAY[99]


@contextmanager
def lab_of(backend: str, *, ipv6: bool = False) -> Iterator[Lab]:
    net_conf: dict[str, object] = {"Network": "10.244.0.0/16", "Backend": BACKENDS[backend]}
    if ipv6:
        net_conf |= {"EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    with Lab(f"la{os.getpid()}", n_hosts=2, net_conf=net_conf, ipv6=ipv6) as lab:
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def start(host: Host, *flags: str) -> None:
    host.start_daemon(["--iface=eth0", *flags])
    host.wait_ready(20)


def nft(place: Any, hook: str, *rules: str) -> None:
    """Rules that rewrite addresses and remember nothing."""
    chain = "\n".join([f"type filter hook {hook}", *rules])
    place.run(["nft", "-f", "-"], input=f"table ip rewrite {{\nchain c {{\n{chain}\n}}\n}}\n")


def learned(host: Host) -> list[Any]:
    """Of its only peer."""
    (peer,) = read_status(host)["peers"]
    return list(peer["learned"])


def answers(source: Host, destination: Host) -> bool:
    return is_answered(source.pod(1), destination.pod(1).address)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hosts_behind_a_nat_that_translates_only_destinations_reach_each_other(backend: str) -> None:
    """Each dropped what came from the other one, the question where it sends from as well.

    With udp the pods have both families: what is learned by IPv4 holds for IPv6.
    """
    has_ipv6 = backend == "udp"
    with lab_of(backend, ipv6=has_ipv6) as lab:
        one, two = lab.hosts
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"])
        lab.switch.run(["sysctl", "-qw", "net.ipv4.conf.underlay.send_redirects=0"])
        rules = [f"ip daddr 203.0.113.{host.index} ip daddr set {host.underlay_address}" for host in lab.hosts]
        nft(lab.switch, "prerouting priority raw", *rules)
        for host in lab.hosts:
            start(host, f"--public-ip=203.0.113.{host.index}")
            host.add_pod()
        wait_until("answers", lambda: answers(one, two) and answers(two, one), LEARNED_S)
        port = PORTS[backend] if backend == "udp" else None
        for host, other in ((one, two), (two, one)):
            wait_until("both to be learned", lambda it=host: learned(it), LEARNED_S)
            assert learned(host) == [{"address": str(other.underlay_address), "port": port}]
            assert "peer sends from an address beside its PublicIP, as it has proved" in host.daemon_log()
        wait_until("the end of the lines", lambda: not read_status(one)["problems"], LEARNED_S)
        if has_ipv6:
            assert is_answered(one.pod(1), two.pod(1).ipv6_address)
            (peer,) = read_status(one)["ipv6"]["peers"]
            assert peer["learned"] == learned(one)

        with udp_flow(two.pod(1), one.pod(1), 200) as flow:
            # A daemon stops, is killed, and finds what was learned each time.
            assert one.stop_daemon(signal.SIGTERM) == 0
            start(one, "--public-ip=203.0.113.1")
            assert learned(one)
            kill(one, read_status(one)["pid"])
            wait_until("the end", lambda: one.daemon is not None and one.daemon.poll() is not None, LEARNED_S)
            flow.wait_for_more()
            start(one, "--public-ip=203.0.113.1")
            assert learned(one)
            flow.wait_for_more()
            assert not has_ipv6 or is_answered(one.pod(1), two.pod(1).ipv6_address)
        assert flow.report.lost == []

        # Another lease has nothing of it.
        assert two.stop_daemon() == 0
        start(two, f"--public-ip={two.underlay_address}")
        wait_until("its end", lambda: learned(one) == [], LEARNED_S)
        wait_until("an answer", lambda: answers(one, two), LEARNED_S)


def test_a_host_that_sends_by_its_other_interface_is_learned_and_an_attacker_is_not() -> None:
    """Packets from eth1's address were dropped.  During a flood, too, and whoever floods learns nothing."""
    with lab_of("udp") as lab:
        one, two = lab.hosts
        for host in lab.hosts:
            start(host)
            host.add_pod()
        wait_until("an answer", lambda: answers(one, two), LEARNED_S)
        lab.switch.at().ip("address add 10.9.0.1/24 dev underlay")
        two.machine.at().ip(
            f"address add {STRANGER}/32 dev eth0",
            "link add link eth0 name eth1 type macvlan mode bridge",
            "address add 10.9.0.2/24 dev eth1",
            "link set eth1 up",
        )
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        with attacker(one, two) as sent:
            wait_until("the filter", lambda: read_status(one)["datapath"]["stranger_filter"] == "on", LEARNED_S)
            assert learned(one) == []
            # From now on what h2 sends to h1 leaves by the other interface, with that one's address.
            two.machine.at().ip(f"route add {one.underlay_address} via 10.9.0.1 dev eth1")
            source = f"oifname eth1 ip saddr {two.underlay_address} ip saddr set 10.9.0.2"
            nft(two, "postrouting priority srcnat", source)
            wait_until("an answer", lambda: answers(two, one), FLOOD_S)
            assert learned(one) == [{"address": "10.9.0.2", "port": None}]
            with udp_flow(two.pod(1), one.pod(1), 200) as flow:
                flow.wait_for_more()
            assert flow.report.lost == []
            assert read_status(one)["datapath"]["stranger_filter"] == "on"
        assert sent["datagrams"] > 5000
        # Nothing came back to him, and h2 was asked a few times only.
        assert sent["got"] == 0
        assert learned(one) == [{"address": "10.9.0.2", "port": None}]
        lines = [line for line in one.daemon_log().splitlines() if "as it has proved" in line]
        assert len(lines) == 1
        assert read_status(two)["peers"][0]["liveness"] != "dead"


@contextmanager
def attacker(one: Host, two: Host) -> Iterator[dict[str, int]]:
    """Some 4,000 datagrams a second to h1 while the block runs, by somebody who has his own address only.

    They claim to be of h2: packets, questions, and answers of which he guesses id, sequence and nonce.
    """
    sent = {"datagrams": 0, "got": 0}
    ended = threading.Event()
    target, tunnel, own = (str(one.underlay_address), 8285), str(two.subnet[0]), str(one.subnet[0])
    packet = udp(str(two.subnet[2]), str(one.subnet[2]), b"from an attacker")

    def echo(kind: int, n: int) -> bytes:
        rest = struct.pack(">HH", n * 7919 & 0xFFFF, n * 104729 & 0xFFFF)
        return ipv4(tunnel, own, icmp_message(kind, rest=rest, data=n.to_bytes(8)), protocol=1)

    with socket_in(two, socket.SOCK_DGRAM) as source:
        source.bind((str(STRANGER), 0))
        source.setblocking(False)

        def run() -> None:
            while not ended.wait(0.01):
                for n in range(sent["datagrams"], sent["datagrams"] + 40):
                    source.sendto((packet, echo(0, n), echo(8, n))[n % 3], target)
                sent["datagrams"] += 40
                try:
                    while source.recv(2048):
                        sent["got"] += 1
                except BlockingIOError:
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield sent
        finally:
            time.sleep(0.1)
            ended.set()
            thread.join()

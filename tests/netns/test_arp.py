"""arp.py against the kernel: three hosts on a link.

one 192.0.2.1 -- v0 [one] v1 -- [two] 192.0.2.2 (answers), .3 (drops everything), .4 (says that no host is there)
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from namespace import Namespace, namespace, requires_netns

from udptun.kernel.arp import is_in_use

pytestmark = [pytest.mark.netns, requires_netns]


@pytest.fixture
def one() -> Iterator[Namespace]:
    with namespace() as one, namespace() as two:
        one.ip(f"link add v0 type veth peer name v1 netns {two.name}")
        two.ip("link set v1 up")
        two.ip("addr add 192.0.2.2/24 dev v1")
        two.ip("addr add 192.0.2.3/24 dev v1")
        two.ip("addr add 192.0.2.4/24 dev v1")
        for command in ("link set v0 up", "link set lo up", "addr add 192.0.2.1/24 dev v0"):
            one.ip(command)
        for rule in ("-d 192.0.2.3 -j DROP", "-d 192.0.2.4 -j REJECT --reject-with icmp-host-unreachable"):
            argv = ["ip", "netns", "exec", two.name, "iptables", "-w", "-A", "INPUT", *rule.split()]
            subprocess.run(argv, check=True, timeout=30)
        # So that the kernel gives up after 0.3 s instead of 3 s.
        argv = ["ip", "netns", "exec", one.name, "sysctl", "-qw", "net.ipv4.neigh.v0.retrans_time_ms=100"]
        subprocess.run(argv, check=True, timeout=30)
        yield one


@pytest.mark.parametrize(
    ("ip", "is_used"),
    [
        ("192.0.2.2", True),
        ("192.0.2.3", True),
        ("192.0.2.4", True),
        ("192.0.2.5", False),
        # our own, behind routers, behind a route that refuses, and on a link without ARP
        ("192.0.2.1", True),
        ("198.51.100.1", True),
        ("203.0.113.1", True),
        ("198.51.101.1", True),
        ("198.51.102.1", True),
    ],
)
def test_an_address_is_unused_only_when_arp_finds_nobody(one: Namespace, ip: str, is_used: bool) -> None:
    for command in (
        "route add default via 192.0.2.2",
        "route add 198.51.100.0/24 via 192.0.2.5",
        "route add unreachable 198.51.101.0/24",
        "tuntap add t0 mode tun",
        "link set t0 up",
        "route add 198.51.102.0/24 dev t0",
    ):
        one.ip(command)
    began = time.monotonic()
    assert one.call_async(lambda: is_in_use(IPv4Address(ip))) is is_used
    print(f"{ip}: {time.monotonic() - began:.2f} s")


def test_an_address_that_our_own_firewall_keeps_us_from_may_be_used(one: Namespace) -> None:
    one.ip("route add default via 192.0.2.2")
    assert not one.call_async(lambda: is_in_use(IPv4Address("192.0.2.5")))
    argv = ["ip", "netns", "exec", one.name, "iptables", "-w", "-A", "OUTPUT", "-d", "192.0.2.5", "-j", "REJECT"]
    subprocess.run(argv, check=True, timeout=30)
    assert one.call_async(lambda: is_in_use(IPv4Address("192.0.2.5")))


@pytest.mark.parametrize("fault", ["link set v0 down", "link set v0 address 02:00:00:00:00:01 arp off", "nobody"])
def test_an_address_may_be_used_where_no_host_on_the_link_answers(
    one: Namespace, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a link that is cut off nobody answers, whoever is alive on its other side."""
    monkeypatch.setattr("udptun.kernel.arp._PATIENCE_S", 1.0)
    if fault == "nobody":
        one.ip("route add default via 192.0.2.6")
    else:
        one.ip("route add default via 192.0.2.2")
        one.ip(fault)
    assert one.call_async(lambda: is_in_use(IPv4Address("192.0.2.5")))

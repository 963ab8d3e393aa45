"""A link that has its address and its default route by router advertisements, once the kernel forwards IPv6.

    v1 (a router) -- v0 (the host's own link)      cni0 (the pods')
"""

from __future__ import annotations

import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest
from namespace import Namespace, linked_namespace, requires_netns, seconds_until

from udptun.core.pod_path import PodPath
from udptun.kernel.ip_forward import find_forwarding_faults

pytestmark = [pytest.mark.netns, requires_netns]

PATH = PodPath(IPv6Network("fd00:244::/48"), IPv6Network("fd00:244:0:1::/64"), "flannel0")
_PREFIX = IPv6Address("2001:db8::")


def set_sysctl(ns: Namespace, path: str, value: int) -> None:
    ns.call(lambda: Path("/proc/sys/net/ipv6/conf", path).write_text(str(value)))


def advertise() -> None:
    """RFC 4861 section 4.2: a router for half an hour, and an address prefix (4.6.2) for as long."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as router:
        index = socket.if_nametoindex("v1")
        router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, 1800, 1800, 0, _PREFIX.packed)
        router.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix, ("ff02::1", 0, 0, index))


def has_default_route(ns: Namespace) -> bool:
    return bool(ns.show("-6 route show default dev v0"))


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """v0 has what v1 has advertised, and nothing is forwarded."""
    with linked_namespace() as ns:
        for link in ("v0", "v1"):
            set_sysctl(ns, f"{link}/disable_ipv6", 0)
            set_sysctl(ns, f"{link}/accept_dad", 0)
        set_sysctl(ns, "v0/accept_ra", 1)
        # The router is in the same namespace.
        set_sysctl(ns, "v0/accept_ra_from_local", 1)
        set_sysctl(ns, "v1/accept_ra", 0)
        for link in ("v0", "v1"):
            ns.ip(f"link set {link} down")
            ns.ip(f"link set {link} up")
        ns.ip("link add cni0 type bridge")
        set_sysctl(ns, "cni0/disable_ipv6", 0)
        ns.ip("-6 address add fd00:244:0:1::1/64 dev cni0 nodad")

        def is_taken() -> bool:
            try:
                ns.call(advertise)
            except OSError:
                return False  # v1 has no link-local address yet
            return has_default_route(ns) and bool(ns.show("-6 address show dev v0 scope global"))

        seconds_until(is_taken, 30)
        yield ns


def faults(ns: Namespace) -> list[str]:
    return ns.call_async(lambda: find_forwarding_faults(PATH))


def test_who_follows_the_line_about_forwarding_keeps_what_routers_advertise(ns: Namespace) -> None:
    """Before, the command switched forwarding on alone, and the host lost its IPv6 default route by it."""
    (line,) = faults(ns)
    assert line == (
        "net.ipv6.conf.all.forwarding is 0, so no IPv6 packet passes between pods here and other hosts; run `sysctl -w "
        "net/ipv6/conf/v0/accept_ra=2 net.ipv6.conf.all.forwarding=1` (without accept_ra=2 v0 would lose what routers "
        "advertise), and have /etc/sysctl.d keep it"
    )
    follow(ns, line)
    assert has_default_route(ns)
    assert faults(ns) == []


def test_a_link_that_loses_what_routers_advertise_is_named(ns: Namespace) -> None:
    """Before, its address ran out, a day later by default, and nobody had said why."""
    set_sysctl(ns, "all/forwarding", 1)
    assert not has_default_route(ns)
    (line,) = faults(ns)
    assert line == (
        "v0 heeds no router advertisements while net/ipv6/conf/v0/forwarding is 1, so it loses the default route and "
        "then the address that it has by them; run `sysctl -w net/ipv6/conf/v0/accept_ra=2`, and have /etc/sysctl.d "
        "keep it"
    )
    follow(ns, line)
    assert faults(ns) == []
    ns.call(advertise)
    seconds_until(lambda: has_default_route(ns), 30)


@pytest.mark.parametrize("how", ["address add 2001:db8:9::9/64 dev v0 nodad", "route add default via fe80::1 dev v0"])
def test_what_a_person_has_given_to_a_link_is_not_lost_and_not_named(ns: Namespace, how: str) -> None:
    ns.ip("-6 address flush dev v0 scope global")
    ns.ip("-6 route del default")
    ns.ip(f"-6 {how}")
    (line,) = faults(ns)
    assert "accept_ra" not in line
    set_sysctl(ns, "all/forwarding", 1)
    assert faults(ns) == []


def test_a_host_without_pods_has_nothing_to_lose_yet(ns: Namespace) -> None:
    ns.ip("link del cni0")
    assert faults(ns) == []


def follow(ns: Namespace, line: str) -> None:
    """Run what the line says."""
    (command,) = re.findall("`(.*)`", line)
    ns.call(lambda: subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL))

"""What the kernel does with routes, addresses and links, and what it tells about them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from namespace import Namespace, namespace, requires_netns, seconds_until

pytestmark = [pytest.mark.netns, requires_netns]

WORST = 4_294_967_295
"""The worst metric there is."""
_IP_MTU_DISCOVER, _IP_MTU = 10, 14
_IP_PMTUDISC_DONT, _IP_PMTUDISC_PROBE = 0, 3
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTM_NEWLINK, RTM_NEWROUTE, RTM_DELROUTE = 16, 24, 25


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.fixture
def ns(undo: ExitStack) -> Namespace:
    """v0 (192.0.2.1/24) -- v1 (up) in one namespace."""
    ns = undo.enter_context(namespace())
    ns.ip("link add v0 type veth peer name v1")
    ns.ip("link set v0 up")
    ns.ip("link set v1 up")
    ns.ip("address add 192.0.2.1/24 dev v0")
    return ns


def routes(ns: Namespace, to: str) -> list[tuple[str, int]]:
    """Kind and metric of the routes to exactly this prefix."""
    return [(route.get("type", "unicast"), route.get("metric", 0)) for route in ns.show(f"route show exact {to}")]


def refusal(ns: Namespace, address: str) -> int | None:
    """The errno with which a datagram to `address` is refused; None when it is sent."""

    def send() -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(b"x", (address, 9))
            except OSError as exc:
                return exc.errno
        return None

    return ns.call(send)


# --- routes beside each other


def test_routes_of_one_prefix_stand_beside_each_other_when_their_metrics_differ(ns: Namespace) -> None:
    """The best is used, and when its link goes the next one at once (fib_table_lookup).

    So an unreachable route of the worst metric refuses what our device carried, at the moment in which it is gone.
    """
    ns.ip("route add 10.244.0.0/16 dev v0")
    ns.ip(f"route add unreachable 10.244.0.0/16 metric {WORST}")
    assert refusal(ns, "10.244.9.9") is None
    ns.ip("link delete v0")
    assert routes(ns, "10.244.0.0/16") == [("unreachable", WORST)]
    assert refusal(ns, "10.244.9.9") == errno.EHOSTUNREACH


def test_a_blackhole_stands_behind_the_route_of_an_address_that_comes_later(ns: Namespace) -> None:
    """A connected route has metric 0 and the blackhole the worst, so neither refuses the other (fib_table_insert)."""
    ns.ip(f"route add blackhole 10.244.1.0/24 metric {WORST}")
    ns.ip("address add 10.244.1.1/24 dev v0")
    assert sorted(routes(ns, "10.244.1.0/24")) == [("blackhole", WORST), ("unicast", 0)]
    assert refusal(ns, "10.244.1.9") is None
    ns.ip("address delete 10.244.1.1/24 dev v0")
    assert refusal(ns, "10.244.1.9") == errno.EINVAL


def test_the_same_prefix_and_metric_is_refused_when_a_route_is_added_and_replaced_when_asked_to(ns: Namespace) -> None:
    """EEXIST whoever's it is (fib_table_insert); "replace" takes another owner's route.  So rtnetlink.py only adds."""
    ns.ip("route add 10.244.0.0/16 dev v0 proto 77")
    with pytest.raises(subprocess.CalledProcessError):
        ns.ip("route add 10.244.0.0/16 dev v1 proto 158")
    assert [route["protocol"] for route in ns.show("route show 10.244.0.0/16")] == ["77"]
    ns.ip("route replace 10.244.0.0/16 dev v1 proto 158")
    assert [route["protocol"] for route in ns.show("route show 10.244.0.0/16")] == ["158"]


# --- IPv6


def test_an_ipv6_route_without_a_metric_gets_one_and_a_second_of_that_metric_is_refused(ns: Namespace) -> None:
    """ip6_route_info_create makes 0 to IP6_RT_PRIO_USER, so desired.py says 1024 itself.

    With NLM_F_EXCL, which rtnetlink.py sets, fib6_add_rt2node refuses the second one instead of adding a next hop.
    """
    ns.ip("-6 route add fd00:244:0:2::/64 dev v0")
    assert [route["metric"] for route in ns.show("-6 route show fd00:244:0:2::/64")] == [1024]
    with pytest.raises(subprocess.CalledProcessError):
        ns.ip("-6 route add fd00:244:0:2::/64 dev v1 metric 1024")


def test_an_unreachable_ipv6_route_is_told_as_one_through_lo(ns: Namespace) -> None:
    """fib6_nh_init gives it the loopback device, and the dump names that.  So decode_route leaves it out."""
    ns.ip(f"-6 route add unreachable fd00:244::/48 metric {WORST}")
    (route,) = ns.show("-6 route show type unreachable")
    assert (route["dst"], route["dev"], route["metric"]) == ("fd00:244::/48", "lo", WORST)


def test_an_ipv6_address_can_be_used_at_once_only_without_duplicate_address_detection(ns: Namespace) -> None:
    """addrconf_dad_begin makes it tentative for a second; accept_dad 0 of the device, as vxlan.py sets it, does not."""
    for link, value in (("v0", "1"), ("v1", "0")):
        setting = Path(f"/proc/sys/net/ipv6/conf/{link}/accept_dad")
        ns.call(lambda setting=setting, value=value: setting.write_text(value))
        ns.ip(f"address add fd00:244:0:{value}::/128 dev {link}")
    shown = {it["ifname"]: it["addr_info"][0] for it in ns.show("-6 address show scope global") if it.get("addr_info")}
    assert {link: address.get("tentative", False) for link, address in shown.items()} == {"v0": True, "v1": False}


# --- devices


def test_the_alias_of_a_device_is_ignored_when_it_is_made(ns: Namespace) -> None:
    """rtnl_newlink_create does not look at IFLA_IFALIAS; do_setlink does.  So apply.py marks a device afterwards."""
    ns.ip("link add d0 alias mark type bridge")
    assert "ifalias" not in ns.show("link show d0")[0]
    ns.ip("link set d0 alias mark")
    assert ns.show("link show d0")[0]["ifalias"] == "mark"


def test_a_device_that_comes_up_with_ipv6_disabled_gets_no_address(ns: Namespace) -> None:
    """addrconf_notify looks at disable_ipv6 when the device comes up, so plan.py sets it before."""
    ns.ip("link add d0 type veth peer name d1")
    for link, value in (("d0", "1"), ("d1", "0")):
        ns.call(lambda link=link, value=value: Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").write_text(value))
        ns.ip(f"link set {link} up")
    seconds_until(lambda: ns.show("-6 address show dev d1 scope link")[0].get("addr_info"), 10)
    assert not any(link.get("addr_info") for link in ns.show("-6 address show dev d0"))


# --- what it tells


class Notices:
    """A socket that hears of links, addresses and routes."""

    def __init__(self, ns: Namespace, undo: ExitStack, n_bytes: int = 1 << 20) -> None:
        def make() -> socket.socket:
            sock = undo.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, n_bytes)
            sock.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
            sock.setblocking(False)
            return sock

        self._ns = ns
        self.socket = ns.call(make)

    def kinds(self) -> list[int]:
        """The kinds of all messages that wait."""
        found = []
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return found
            while data:
                length, kind = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
                found.append(kind)
                data = data[-(-length // 4) * 4 :]


def test_routes_that_go_with_their_link_are_not_told_of(ns: Namespace, undo: ExitStack) -> None:
    """fib_flush sends no RTM_DELROUTE for a link that goes down; before Linux 6.6 none for a deleted source address.

    So the reconciler looks at the routes after every notice of a link or an address.
    """
    ns.ip("route add 10.244.0.0/16 via 192.0.2.9")
    notices = Notices(ns, undo)
    ns.ip("link set v0 down")
    assert routes(ns, "10.244.0.0/16") == []
    told = notices.kinds()
    assert RTM_NEWLINK in told
    assert RTM_DELROUTE not in told


def test_an_overflow_is_told_once_and_then_nothing_until_all_is_read(ns: Namespace, undo: ExitStack) -> None:
    """ENOBUFS, and NETLINK_S_CONGESTED until the queue is empty (netlink_overrun in net/netlink/af_netlink.c).

    A listener that passes the overflow on before it has read everything misses the change that comes next.
    """
    notices = Notices(ns, undo, n_bytes=4096)
    for n in range(60):
        ns.ip(f"route add 10.9.{n}.0/24 dev v0")
    with pytest.raises(OSError, match="buffer space") as overflow:
        notices.socket.recv(1 << 16)
    assert overflow.value.errno == errno.ENOBUFS
    # There is room again after one read, and still nothing is queued.
    assert notices.socket.recv(1 << 16)
    ns.ip("link set v0 mtu 1400")
    assert set(notices.kinds()) == {RTM_NEWROUTE}
    ns.ip("link set v0 mtu 1300")
    assert RTM_NEWLINK in notices.kinds()


@pytest.fixture
def monitor(ns: Namespace, undo: ExitStack) -> Monitor:
    return Monitor(ns, undo)


class Monitor:
    """`nft monitor`, which is listening."""

    def __init__(self, ns: Namespace, undo: ExitStack) -> None:
        self._enter = ["ip", "netns", "exec", ns.name]
        self._child = undo.enter_context(subprocess.Popen([*self._enter, "nft", "monitor"], stdout=subprocess.PIPE))
        undo.callback(self._child.kill)
        self._seen = ""
        seconds_until(self._hears_a_sign, 20)

    def told_of(self, *command: str) -> str:
        """What the kernel tells of the command, which must succeed."""
        subprocess.run([*self._enter, *command], check=True)
        seconds_until(self._hears_a_sign, 20)
        told, _, _ = self._seen.partition("add table ip sign")
        self._seen = ""
        return told

    def _hears_a_sign(self) -> bool:
        for verb in ("add", "delete"):
            subprocess.run([*self._enter, "nft", verb, "table", "ip", "sign"], check=True)
        assert self._child.stdout is not None
        while select.select([self._child.stdout], [], [], 0.1)[0]:
            self._seen += os.read(self._child.stdout.fileno(), 1 << 16).decode()
        return "delete table ip sign" in self._seen


def test_a_change_of_nftables_is_told_and_flushing_what_is_empty_is_not(monitor: Monitor) -> None:
    """A transaction without a change is a new generation and nothing else (nf_tables_commit)."""
    monitor.told_of("true")
    # `add` on Linux 5.10.
    assert re.search(r"^(create|add) chain ip filter T$", monitor.told_of("iptables-nft", "-N", "T"), re.MULTILINE)
    assert "add rule ip filter T" in monitor.told_of("iptables-nft", "-A", "T", "-j", "RETURN")
    assert "delete rule ip filter T" in monitor.told_of("iptables-nft", "-F", "T")
    assert "rule" not in monitor.told_of("iptables-nft", "-F", "T")


def test_nothing_is_told_of_legacy_iptables(ns: Namespace, monitor: Monitor) -> None:
    """It has no notices at all (net/ipv4/netfilter/ip_tables.c): for its rules there is a timer alone."""
    if shutil.which("iptables-legacy") is None:
        pytest.skip("needs iptables-legacy")
    if subprocess.run(["ip", "netns", "exec", ns.name, "iptables-legacy", "-S"], capture_output=True).returncode:
        pytest.skip("needs a kernel with legacy iptables")
    monitor.told_of("true")
    assert "T" not in monitor.told_of("iptables-legacy", "-N", "T")


# --- the MTU of a route

MTU = 1272


@pytest.fixture
def pod_and_far(undo: ExitStack) -> tuple[Namespace, Namespace]:
    """pod 10.1.0.2 -- 10.1.0.1 host 10.2.0.1 -- 10.2.0.2 far

    The host's route to `far` has an mtu, its links take 1500 bytes.
    """
    host, pod, far = (undo.enter_context(namespace()) for _ in range(3))
    for n, near in ((1, pod), (2, far)):
        near.ip(f"link add e0 type veth peer name h{n} netns {host.name}")
        near.ip(f"address add 10.{n}.0.2/24 dev e0")
        near.ip("link set e0 up")
        host.ip(f"address add 10.{n}.0.1/24 dev h{n}")
        host.ip(f"link set h{n} up")
        near.ip(f"route add default via 10.{n}.0.1")
    host.ip(f"route add 10.2.0.2/32 dev h2 mtu {MTU}")
    host.call(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    return pod, far


@pytest.mark.parametrize("segment_size", [0, 1400], ids=["datagrams", "super-packet"])
def test_the_mtu_of_a_route_is_that_of_forwarded_packets_which_are_fragmented_without_df(
    pod_and_far: tuple[Namespace, Namespace], undo: ExitStack, segment_size: int
) -> None:
    """ip_dst_mtu_maybe_forward honours it when it forwards since Linux 5.10, and its stable versions of October 2020.

    So a route to a peer whose path is narrow does what RFC 791 asks of a router, also for super-packets.
    """
    pod, far = pod_and_far
    eth_p_ip, udp_segment = 0x0800, 103
    wire = undo.enter_context(
        far.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(eth_p_ip)))
    )
    udp = undo.enter_context(far.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    udp.bind(("10.2.0.2", 9))
    source = undo.enter_context(pod.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    how = [(socket.SOL_UDP, udp_segment, segment_size.to_bytes(2, "little"))] if segment_size else []
    source.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
    for _ in range(1 if segment_size else 3):
        source.sendmsg([bytes(1400 * (3 if segment_size else 1))], how, 0, ("10.2.0.2", 9))
    for got in (udp, wire):
        got.settimeout(10)
    assert [len(udp.recv(2000)) for _ in range(3)] == [1400] * 3
    lengths = [len(wire.recv(2000)) for _ in range(6)]
    assert lengths == [MTU - (MTU - 20) % 8, 20 + 1408 - (MTU - 20) // 8 * 8] * 3


def test_senders_of_forwarded_packets_with_df_are_told_the_mtu_of_the_route(
    pod_and_far: tuple[Namespace, Namespace],
) -> None:
    pod, _ = pod_and_far

    def told() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
            udp.connect(("10.2.0.2", 9))
            with contextlib.suppress(ConnectionRefusedError):
                udp.send(bytes(1400))
            return udp.getsockopt(socket.IPPROTO_IP, _IP_MTU)

    seconds_until(lambda: pod.call(told) == MTU, 10)

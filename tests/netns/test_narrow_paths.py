"""A path that takes less than both hosts' devices, with a router that says so or in silence: what flows get through.

    pod h1/p1 -- flannel0 -- eth0 of h1 -- router, which forwards to -- eth0 of h2 -- flannel0 -- pod h2/p1
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.netns.traffic import REAL_TIME, read_status, seconds_until, socket_in, tcp_flow, wait_for_peers
from udptun.lab.host import DISTANT, UNDERLAY, Host
from udptun.lab.topology import SWITCH, Lab
from udptun.probing.path_mtu import GROW_S

pytestmark = pytest.mark.netns

NARROW_BYTES = 1300
"""Of an outer packet."""
NARROW_LINK = f"{SWITCH}2"
"""The router's link to the second host."""


@contextlib.contextmanager
def routed_lab(conf: dict[str, object], *, is_vxlan_missing: bool = False) -> Iterator[Lab]:
    """Two hosts, each on a network of its own.  The second one is like any flannel host where vxlan is missing."""
    net_conf = {"Network": "10.244.0.0/16", "Backend": conf}
    with Lab(f"narrow{os.getpid()}", net_conf=net_conf) as lab:
        one, two = lab.hosts
        lab.relocate(two, DISTANT)
        without = ["env", "UDPTUN_PRETEND_NO_VXLAN=1"] * is_vxlan_missing
        one.start_daemon(command=[*without, *REAL_TIME, *lab.daemon_command])
        two.start_daemon(command=[*REAL_TIME, *lab.daemon_command])
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        wait_for_peers(lab)
        yield lab


@pytest.fixture
def routed() -> Iterator[Lab]:
    with routed_lab({"Type": "udp"}) as lab:
        yield lab


def set_narrow(lab: Lab, n_bytes: int) -> None:
    """The router tells senders of packets that are too long."""
    lab.switch.run(["ip", "link", "set", NARROW_LINK, "mtu", str(n_bytes)])


def silence(lab: Lab) -> None:
    """The router tells nobody."""
    rule = "type filter hook output priority 0; }; add rule ip silence out icmp type destination-unreachable drop"
    lab.switch.run(["nft", f"add table ip silence; add chain ip silence out {{ {rule}"])


def path_mtu(host: Host) -> object:
    (peer,) = read_status(host)["peers"]
    return peer["path_mtu"]


def route_mtu(host: Host, peer: Host) -> int | None:
    """Of the route to the peer's subnet."""
    routes = json.loads(host.run(["ip", "-j", "route", "show", str(peer.subnet)]).stdout)
    return next((route["metrics"][0]["mtu"] for route in routes if "metrics" in route), None)


def believed_mtu(host: Host, peer: Host) -> int | None:
    """Of the underlay's path to the peer, by the kernel's memory of ICMP errors."""
    (route,) = json.loads(host.run(["ip", "-j", "route", "get", str(peer.underlay_address)]).stdout)
    return next((metrics["mtu"] for metrics in route.get("metrics", [])), None)


def forge_fragmentation_needed(to: Host, about: Host, mtu: int) -> None:
    """What the router would say of a datagram of the tunnel's, sent by somebody else."""
    udp = struct.pack(">4H", 8285, 8285, 1480, 0)
    quoted = struct.pack(">BBHHHBBH", 0x45, 0, 1500, 7, 0x4000, 63, socket.IPPROTO_UDP, 0)
    quoted += to.underlay_address.packed + about.underlay_address.packed + udp
    body = struct.pack(">BBHHH", 3, 4, 0, 0, mtu) + quoted
    total = sum(struct.unpack(f">{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = 0xFFFF ^ (total & 0xFFFF) + (total >> 16)
    message = body[:2] + struct.pack(">H", checksum) + body[4:]
    with socket_in(about, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(message, (str(to.underlay_address), 0))


def test_what_icmp_says_of_the_underlay_is_believed_when_probes_show_it(routed: Lab, slack: int) -> None:
    """Before, the kernel believed it for 10 minutes: a forged error cost everybody his full-size packets, and a path
    that was mended stayed narrow.
    """
    one, two = routed.hosts
    full, narrow = one.mtu, NARROW_BYTES - (1500 - one.mtu)
    seconds_until(lambda: path_mtu(one) == full, "the first measure", 5 * slack)
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        took_s = seconds_until(lambda: route_mtu(one, two) == narrow, "the measure", 1.5 * slack)
        time.sleep(0.5)
        forge_fragmentation_needed(one, two, 700)
        seconds_until(lambda: believed_mtu(one, two) == 700, "the kernel to believe it", slack)
        time.sleep(1.5)
        assert (path_mtu(one), route_mtu(one, two)) == (narrow, narrow)
    print(f"{narrow} bytes after {took_s:.2f} s")
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 2000 * slack
    assert read_status(one)["counters"]["encap_drop_send"] == 0


@pytest.mark.full
def test_a_path_that_is_mended_is_used_in_full_while_the_kernel_still_believes_an_old_icmp_error(routed: Lab) -> None:
    """Before, nothing longer left before the kernel had forgotten it, after 10 minutes."""
    one, two = routed.hosts
    seconds_until(lambda: path_mtu(one) == one.mtu, "the first measure", 5)
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        seconds_until(lambda: route_mtu(one, two) is not None, "the measure", 5)
        set_narrow(routed, 1500)
        took_s = seconds_until(lambda: route_mtu(one, two) is None, "full-size packets", GROW_S[0] + 5)
        assert believed_mtu(one, two) == NARROW_BYTES
        time.sleep(1)
    print(f"full size {took_s:.1f} s after the path was mended")
    assert path_mtu(one) == one.mtu
    flow.report.assert_exact()


def test_what_icmp_and_routes_say_counts_where_nothing_is_probed(routed: Lab, slack: int) -> None:
    one, two = routed.hosts
    around = 1500 - one.mtu
    one.stop_daemon()
    one.start_daemon(["--probe=false"])
    one.wait_ready()
    with tcp_flow(one.pod(1), two.pod(1)) as flow:
        time.sleep(0.5)
        set_narrow(routed, NARROW_BYTES)
        took_s = seconds_until(lambda: route_mtu(one, two) == NARROW_BYTES - around, "the limit", slack)
        one.run(["ip", "route", "change", "default", "via", str(UNDERLAY[1]), "mtu", "1200"])
        seconds_until(lambda: route_mtu(one, two) == 1200 - around, "the route's limit", slack)
    print(f"{NARROW_BYTES - around} bytes after {took_s:.2f} s")
    flow.report.assert_exact()
    assert flow.report.longest_silence_ms < 1500 * slack
    assert path_mtu(one) is None

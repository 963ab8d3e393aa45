"""Two networks of Type udp on the same hosts, with a shortcut and a detour for super-packets each.

    p1 [h1] d-ua, flannel0 and d-ub, flannel1 ==== one underlay ==== the same [h2] p1

Their programs are on one underlay, their detours have one UDP port, and each pod is in both networks.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Any

import pytest
from shortcut_labs import ATTACHED_BY, WITHOUT_TCX, takes_and_sends
from test_networks import UDPTUN, Crowd, Daemon, Network, crowd_of
from traffic import AS_CONFIGURED, REAL_TIME, tcp_flow, udp_flow

from udptun.datapath.shortcut.programs import find_lack
from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import Offload

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(find_lack()), reason=find_lack())]

A = Network("ua", "10.14", {"Type": "udp", "Shortcut": "auto"}, "flannel0")
B = Network("ub", "10.15", {"Type": "udp", "Port": 8286, "Shortcut": "auto"}, "flannel1")
LIMIT_S = 30
FAST = 20e6
"""Bytes a second, which a sender hands over in super-packets."""


@pytest.fixture(scope="module", params=ATTACHED_BY)
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    udptun = [sys.executable, str(WITHOUT_TCX)] if request.param == "clsact" else UDPTUN
    with crowd_of([A, B], udptun=[*REAL_TIME, *AS_CONFIGURED, *udptun]) as crowd:
        crowd.lab.set_offload(Offload.FULL)
        for host in crowd.lab.hosts:
            add_pod(host, [it for it in crowd.daemons if it.host is host])
        wait_until("the shortcut everywhere", lambda: are_on(*crowd.daemons), LIMIT_S)
        yield crowd


def add_pod(host: Host, daemons: list[Daemon]) -> None:
    """One with a link in each network."""
    host.run(["ip", "netns", "add", "p1"])
    for it in daemons:
        pod = pod_of(it)
        host.attach(pod, f"d-{it.network.name}", it.network.name, it.gateway, pod.address, it.network.mtu)
        pod.ip(f"route add {it.network.network} via {it.gateway.ip}")


def pod_of(daemon: Daemon) -> Pod:
    """The host's pod, as the daemon's network knows it."""
    return Pod(daemon.host, 1, IPv4Address(int(daemon.gateway.ip) + 1))


def pods_of(crowd: Crowd, network: Network) -> tuple[Pod, Pod]:
    return pod_of(crowd.on(1, network)), pod_of(crowd.on(2, network))


def are_on(*daemons: Daemon) -> bool:
    return all(takes_and_sends(it.status()) for it in daemons)


def detour(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["datapath"]["shortcut_detour"]
    return found


def has_taken(daemon: Daemon, n: int) -> bool:
    """Whether so many super-packets have come by its detour since the programs were loaded."""
    found = detour(daemon)
    return bool(found["state"] == "on" and found["packets"] >= n)


def of_shortcut(host: Host, network: Network) -> set[str]:
    """What the host has of the network's shortcut: devices, and filters where programs are such."""
    links = re.findall(rf"{network.device}-\w+", host.run(["ip", "-o", "link"]).stdout)
    places = [("eth0", "ingress"), (str(network.device), "egress")]
    shown = [host.run(["tc", "filter", "show", "dev", *it], check=False).stdout for it in places]
    return {*links, *re.findall(rf"udptun {re.escape(network.network)} \w+", "".join(shown))}


def test_both_carry_super_packets_at_once_and_every_byte_arrives(crowd: Crowd) -> None:
    with ExitStack() as ending:
        flows = []
        for n, network in enumerate((A, B)):
            one, two = pods_of(crowd, network)
            flows += [ending.enter_context(tcp_flow(*it, FAST, 5010 + n)) for it in ((one, two), (two, one))]
        before = [detour(it)["packets"] for it in crowd.daemons]
        wait_until(
            "super-packets by all detours",
            lambda: all(has_taken(it, n + 200) for it, n in zip(crowd.daemons, before, strict=True)),
            LIMIT_S,
        )
    for flow in flows:
        flow.report.assert_exact()
    for daemon in crowd.daemons:
        # Each knows its own packets by their sign, and what the other's device gets is not on it.
        found = detour(daemon)
        assert (found["lost"], found["refused"]) == (0, 0)
        assert daemon.status()["problems"] == []


@pytest.mark.parametrize(("gone", "stays"), [(A, B), (B, A)], ids=["first", "second"])
def test_cleanup_of_one_leaves_the_others_alone(crowd: Crowd, gone: Network, stays: Network) -> None:
    daemon, other = crowd.on(1, gone), crowd.on(1, stays)
    host, pods = daemon.host, pods_of(crowd, stays)
    with tcp_flow(*reversed(pods), FAST) as supers, udp_flow(*pods, 500) as singles:
        wait_until("the detour", lambda: has_taken(other, 1), LIMIT_S)
        before, of_other, n = of_shortcut(host, gone), of_shortcut(host, stays), detour(other)["packets"]
        assert {f"{gone.device}-in", f"{gone.device}-gro"} <= before
        assert f"{stays.device}-gso" in of_other
        daemon.stop(signal.SIGKILL)
        print(daemon.cleanup())
        assert of_shortcut(host, gone) == set()
        assert of_shortcut(host, stays) == of_other
        singles.wait_for_more()
        wait_until("super-packets by the other's detour", lambda: has_taken(other, n + 200), LIMIT_S)
        assert are_on(other)
        daemon.start()
        daemon.wait_ready()
        wait_until("the shortcut again", lambda: are_on(*crowd.daemons), LIMIT_S)
    supers.report.assert_exact()
    assert not singles.report.lost
    assert not singles.report.n_spoilt
    assert other.status()["problems"] == []
    assert detour(other)["lost"] == 0
    there = crowd.on(2, gone)
    n = detour(there)["packets"]
    with tcp_flow(*pods_of(crowd, gone), FAST) as again:
        wait_until("the detour of the one that is back", lambda: has_taken(there, n + 1), LIMIT_S)
    again.report.assert_exact()

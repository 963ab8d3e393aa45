"""What `plan` decides, and in which order.  No kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.backends.base import Live, Situation
from udptun.backends.udp import Udp
from udptun.config import SourceCheck
from udptun.netstate import ROUTE_PROTOCOL, Address, Link, Route, RouteType, TunFlags
from udptun.offload import ALL
from udptun.reconcile import ActualState, DeleteRoute, ReviveDevice, conflicts, describe, plan
from udptun.underlay import Underlay

NETWORK = IPv4Network("10.244.0.0/16")
UNDERLAY = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
LIVE = Live(1472, 1, SourceCheck.PEER, ALL)
WANTED = Udp(8285).desired(Situation(NETWORK, UNDERLAY, IPv4Network("10.244.3.0/24"), LIVE))
LINK = Link(7, "flannel0", "tun", 1472, True, True, False, 500, TunFlags(False, True, True, True))
ADDRESS = Address(7, IPv4Address("10.244.3.0"), 32)
THROUGH = Route(NETWORK, oif=7)
GUARD = Route(NETWORK, type=RouteType.UNREACHABLE, metric=0xFFFFFFFF)
SETTINGS = {"net/ipv4/conf/flannel0/accept_local": "1", "net/ipv6/conf/flannel0/disable_ipv6": "1"}
GOOD = ActualState({"flannel0": LINK}, frozenset({"flannel0"}), (ADDRESS,), (THROUGH, GUARD), (), SETTINGS)
EMPTY = ActualState({"flannel0": None}, frozenset())


def said(actual: ActualState) -> list[str]:
    return [str(change) for change in plan(WANTED, actual)]


def test_plan_is_empty_when_all_is_as_wanted() -> None:
    assert plan(WANTED, GOOD) == []


def test_plan_guards_against_leaks_before_it_revives_the_device() -> None:
    assert said(EMPTY) == [
        "add route unreachable 10.244.0.0/16 metric 4294967295 proto 158",
        "revive device flannel0",
    ]


def test_plan_configures_a_new_device_sysctls_first_and_routes_last() -> None:
    fresh = replace(LINK, mtu=1500, is_up=False, tx_queue_len=10)
    actual = ActualState({"flannel0": fresh}, frozenset({"flannel0"}), (), (GUARD,))
    assert said(actual) == [
        "set sysctl net/ipv4/conf/flannel0/accept_local=1",
        "set sysctl net/ipv6/conf/flannel0/disable_ipv6=1",
        "set link flannel0 up mtu 1472 txqueuelen 500",
        "add address 10.244.3.0/32",
        "add route 10.244.0.0/16 dev if7 proto 158",
    ]


def test_plan_revives_a_device_that_our_queues_no_longer_reach() -> None:
    """The name is there, but it is somebody else's device: nothing on it may be touched."""
    actual = replace(GOOD, attached=frozenset())
    assert plan(WANTED, actual)[0] == ReviveDevice("flannel0")
    assert not any("link" in line or "sysctl" in line for line in said(actual))


def test_plan_leaves_a_longer_transmit_queue_alone() -> None:
    assert said(replace(GOOD, links={"flannel0": replace(LINK, tx_queue_len=5000)})) == []


def test_plan_adds_the_new_address_before_it_deletes_the_old_one() -> None:
    old = Address(7, IPv4Address("10.244.9.0"), 32)
    assert said(replace(GOOD, addresses=(old,))) == ["add address 10.244.3.0/32", "delete address 10.244.9.0/32"]


def test_plan_takes_the_right_address_with_the_wrong_length_for_another_one() -> None:
    wide = Address(7, IPv4Address("10.244.3.0"), 16)
    assert said(replace(GOOD, addresses=(wide,))) == ["add address 10.244.3.0/32", "delete address 10.244.3.0/16"]


def test_plan_deletes_leftovers_last() -> None:
    old = Route(IPv4Network("10.96.0.0/12"), type=RouteType.UNREACHABLE, metric=0xFFFFFFFF)
    changes = plan(WANTED, replace(GOOD, routes=(old,)))
    assert changes[-1] == DeleteRoute(old)
    assert len(changes) == 3


def test_plan_deletes_its_own_route_before_it_adds_another_in_its_place() -> None:
    """The kernel knows a route by prefix and metric: two of ours cannot stand side by side."""
    stale = Route(NETWORK, oif=3)
    assert said(replace(GOOD, routes=(GUARD, stale))) == [
        "delete route 10.244.0.0/16 dev if3 proto 158",
        "add route 10.244.0.0/16 dev if7 proto 158",
    ]


def test_plan_waits_while_a_foreign_route_holds_the_place_of_ours() -> None:
    foreign = Route(NETWORK, oif=2, protocol=4)
    assert said(replace(GOOD, routes=(GUARD,), foreign=(foreign,))) == []


@pytest.mark.parametrize(
    ("foreign", "line"),
    [
        (
            Route(NETWORK, IPv4Address("192.0.2.7"), 2, protocol=4),
            "route 10.244.0.0/16 via 192.0.2.7 dev eth0 proto 4 is not ours; it takes the traffic of our route;"
            " if nothing needs it, `ip route del 10.244.0.0/16 via 192.0.2.7 dev eth0 proto 4`",
        ),
        (
            Route(NETWORK, oif=2, protocol=3, metric=100),
            "route 10.244.0.0/16 dev eth0 metric 100 proto 3 is not ours; it takes over, in clear text, when our"
            " route is gone; if nothing needs it, `ip route del 10.244.0.0/16 dev eth0 metric 100 proto 3`",
        ),
        (
            Route(NETWORK, protocol=3, type=RouteType.BLACKHOLE, metric=100),
            "route blackhole 10.244.0.0/16 metric 100 proto 3 is not ours; it stands beside our own;"
            " if nothing needs it, `ip route del blackhole 10.244.0.0/16 metric 100 proto 3`",
        ),
    ],
)
def test_a_conflict_names_the_route_its_effect_and_the_remedy(foreign: Route, line: str) -> None:
    assert conflicts(WANTED, replace(GOOD, foreign=(foreign,)), {2: "eth0"}) == [line]


def test_describe_knows_no_name_for_an_unusual_type() -> None:
    assert describe(Route(NETWORK, type=11)) == f"type 11 10.244.0.0/16 proto {ROUTE_PROTOCOL}"


def test_udp_backend_wants_flannels_address_and_routes() -> None:
    assert [(a.link, str(a.ip), a.prefixlen) for a in WANTED.addresses] == [("flannel0", "10.244.3.0", 32)]
    assert [(str(r.dst), r.link, r.type, r.metric) for r in WANTED.routes] == [
        ("10.244.0.0/16", None, RouteType.UNREACHABLE, 4294967295),
        ("10.244.0.0/16", "flannel0", RouteType.UNICAST, 0),
    ]
    assert [(link.name, link.mtu, link.min_tx_queue_len) for link in WANTED.links] == [("flannel0", 1472, 500)]

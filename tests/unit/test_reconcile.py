"""What `plan` decides, and in which order.  No kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.backends.base import BackendInput, LiveSettings
from udptun.backends.udp import Udp
from udptun.backends.vxlan import KernelVxlan, VxlanKeys
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import (
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    Link,
    Neighbour,
    Route,
    RouteType,
    TunFlags,
    Vxlan,
    describe_route,
)
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.reconcile.plan import ActualState, conflicts, plan
from udptun.kernel.underlay import Underlay

NETWORK = IPv4Network("10.244.0.0/16")
UNDERLAY = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
LIVE = LiveSettings(1472, 1, SourceCheck.PEER, ALL)
WANTED = Udp(8285).desired(BackendInput(NETWORK, (NETWORK,), UNDERLAY, IPv4Network("10.244.3.0/24"), LIVE))
ALIAS = "udptun 10.244.0.0/16"
LINK = Link(7, "flannel0", "tun", 1472, True, True, False, 500, TunFlags(False, True, True, True), alias=ALIAS)
ADDRESS = Address(7, IPv4Address("10.244.3.0"), 32)
THROUGH = Route(NETWORK, oif=7)
GUARD = Route(NETWORK, type=RouteType.UNREACHABLE, metric=0xFFFFFFFF)
SETTINGS = {"net/ipv4/conf/flannel0/accept_local": "1", "net/ipv6/conf/flannel0/disable_ipv6": "1"}
GOOD = ActualState({"flannel0": LINK}, frozenset({"flannel0"}), (ADDRESS,), (THROUGH, GUARD), (), SETTINGS)
EMPTY = ActualState({"flannel0": None}, frozenset())


def said(actual: ActualState) -> list[str]:
    return [str(change) for change in plan(WANTED, actual, ALIAS)]


def test_plan_is_empty_when_all_is_as_wanted() -> None:
    assert plan(WANTED, GOOD, ALIAS) == []


def test_plan_guards_against_leaks_before_it_revives_the_device() -> None:
    assert said(EMPTY) == [
        "add route unreachable 10.244.0.0/16 metric 4294967295 proto 158",
        "revive device flannel0",
    ]


def test_plan_configures_a_new_device_sysctls_first_and_routes_last() -> None:
    fresh = replace(LINK, mtu=1500, is_up=False, tx_queue_len=10, alias="")
    actual = ActualState({"flannel0": fresh}, frozenset({"flannel0"}), (), (GUARD,))
    assert said(actual) == [
        "set sysctl net/ipv4/conf/flannel0/accept_local=1",
        "set sysctl net/ipv6/conf/flannel0/disable_ipv6=1",
        "set link flannel0 up mtu 1472 txqueuelen 500 alias 'udptun 10.244.0.0/16'",
        "add address 10.244.3.0/32",
        "add route 10.244.0.0/16 dev if7 proto 158",
    ]


def test_the_log_names_the_device_of_a_route() -> None:
    """It had the number of the device: `dev if7`."""
    fresh = replace(LINK, mtu=1500, is_up=False, tx_queue_len=10, alias="")
    *_, route = plan(WANTED, ActualState({"flannel0": fresh}, frozenset({"flannel0"}), (), (GUARD,)), ALIAS)
    assert route.describe({7: "flannel0"}) == "add route 10.244.0.0/16 dev flannel0 proto 158"


def test_plan_revives_a_device_that_our_queues_no_longer_reach() -> None:
    """The name is there, but it is somebody else's device: nothing on it may be touched."""
    actual = replace(GOOD, attached=frozenset())
    assert plan(WANTED, actual, ALIAS)[0] == Change(Verb.REVIVE, WANTED.links[0])
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
    changes = plan(WANTED, replace(GOOD, routes=(old,)), ALIAS)
    assert changes[-1] == Change(Verb.DELETE, old)
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


STRANGERS_ROUTES = [
    (Route(IPv4Network("0.0.0.0/0"), oif=7, protocol=16, metric=1003), True),
    (Route(IPv4Network("128.0.0.0/1"), oif=7, protocol=4), True),
    (Route(IPv4Network("169.254.0.0/16"), oif=7, protocol=3), True),
    (Route(IPv4Network("10.0.0.0/8"), oif=7, protocol=3), True),
    (Route(IPv4Network("10.244.7.0/24"), oif=7, protocol=4), False),
]


@pytest.mark.parametrize(("route", "goes"), STRANGERS_ROUTES, ids=lambda it: str(getattr(it, "dst", it)))
def test_plan_deletes_a_strangers_route_through_the_tun_device_that_leads_nowhere(route: Route, goes: bool) -> None:
    """A DHCP client's default route took the host's own traffic into the tunnel, which dropped it."""
    changes = plan(WANTED, replace(GOOD, foreign=(route,)), ALIAS)
    assert changes == ([Change(Verb.DELETE, route)] if goes else [])
    elsewhere = replace(route, oif=2)
    assert plan(WANTED, replace(GOOD, foreign=(elsewhere,)), ALIAS) == []


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
    assert describe_route(Route(NETWORK, type=11)) == f"type 11 10.244.0.0/16 proto {ROUTE_PROTOCOL}"


def test_udp_backend_wants_flannels_address_and_routes() -> None:
    assert [(a.link, str(a.ip), a.prefixlen) for a in WANTED.addresses] == [("flannel0", "10.244.3.0", 32)]
    assert [(str(r.dst), r.link, r.type, r.metric) for r in WANTED.routes] == [
        ("10.244.0.0/16", None, RouteType.UNREACHABLE, 4294967295),
        ("10.244.0.0/16", "flannel0", RouteType.UNICAST, 0),
    ]
    assert [(link.name, link.mtu, link.min_tx_queue_len) for link in WANTED.links] == [("flannel0", 1472, 500)]


def test_plan_marks_a_device_of_a_build_that_had_another_mark_and_leaves_it_otherwise_as_it_is() -> None:
    for alias in ("", "udptun"):
        assert said(replace(GOOD, links={"flannel0": replace(LINK, alias=alias)})) == [
            "set link flannel0 alias 'udptun 10.244.0.0/16'"
        ]


# --- a VXLAN device and what is there for each peer

PEER = IPv4Network("10.244.7.0/24")
LEASE = Lease(
    Subnets(PEER),
    LeaseAttrs(IPv4Address("192.0.2.7"), backend_type="vxlan", backend_data={"VtepMAC": "02:00:00:00:00:07"}),
)
VXLAN = KernelVxlan(VxlanKeys(), "02:00:00:00:00:01").desired(
    BackendInput(NETWORK, (NETWORK,), UNDERLAY, IPv4Network("10.244.3.0/24"), replace(LIVE, mtu=1450), (LEASE,))
)
ATTRIBUTES = Vxlan(1, UNDERLAY.address, 2, 8472, learning=False, gbp=False)
DEVICE = Link(
    *(8, "flannel.1", "vxlan", 1450, True, True, False, 1000),
    vxlan=ATTRIBUTES,
    mac="02:00:00:00:00:01",
    alias=ALIAS,
)
NEIGHBOUR = Neighbour(8, PEER.network_address, "02:00:00:00:00:07")
FDB = FdbEntry(8, "02:00:00:00:00:07", IPv4Address("192.0.2.7"))
WAY = Route(PEER, PEER.network_address, 8, onlink=True)
UP = ActualState(
    {"flannel.1": DEVICE},
    frozenset(),
    (Address(8, IPv4Address("10.244.3.0"), 32),),
    (GUARD, WAY),
    (),
    {"net/ipv6/conf/flannel.1/accept_ra": "0"},
    (NEIGHBOUR,),
    (FDB,),
)


def said_of_vxlan(**changes: object) -> list[str]:
    actual = replace(UP, **changes)  # type: ignore[arg-type]  # the test's own keywords
    return [str(change) for change in plan(VXLAN, actual, ALIAS)]


def test_plan_is_empty_when_device_and_peers_are_as_wanted() -> None:
    assert said_of_vxlan() == []


def test_plan_makes_a_missing_vxlan_device_and_waits_for_it() -> None:
    assert said_of_vxlan(links={"flannel.1": None}, routes=(), addresses=(), neighbours=(), fdb=()) == [
        "add route unreachable 10.244.0.0/16 metric 4294967295 proto 158",
        "create vxlan device flannel.1",
    ]


@pytest.mark.parametrize(
    "other",
    [
        replace(DEVICE, vxlan=replace(ATTRIBUTES, vni=2)),
        replace(DEVICE, vxlan=replace(ATTRIBUTES, port=4789)),
        replace(DEVICE, vxlan=replace(ATTRIBUTES, local=IPv4Address("192.0.2.9"))),
        replace(DEVICE, vxlan=replace(ATTRIBUTES, lower_index=3)),
        replace(DEVICE, vxlan=replace(ATTRIBUTES, gbp=True)),
        replace(DEVICE, vxlan=replace(ATTRIBUTES, l2miss=True)),
        replace(DEVICE, kind="bridge", vxlan=None),
    ],
)
def test_plan_makes_an_unfit_device_anew(other: Link) -> None:
    assert said_of_vxlan(links={"flannel.1": other})[:2] == ["delete link flannel.1", "create vxlan device flannel.1"]


def test_plan_sets_what_can_be_set_on_a_device_that_fits() -> None:
    foreign = replace(DEVICE, mac="02:00:00:00:00:99", alias="", mtu=1400, is_up=False)
    assert said_of_vxlan(links={"flannel.1": foreign}) == [
        "set link flannel.1 up mtu 1450 address 02:00:00:00:00:01 alias 'udptun 10.244.0.0/16'"
    ]


def test_plan_brings_back_what_a_peer_lacks_and_in_which_order() -> None:
    assert said_of_vxlan(neighbours=(), fdb=(), routes=(GUARD,)) == [
        "set neighbour 10.244.7.0 lladdr 02:00:00:00:00:07",
        "set fdb 02:00:00:00:00:07 dst 192.0.2.7",
        "add route 10.244.7.0/24 via 10.244.7.0 dev if8 onlink proto 158",
    ]


def test_plan_replaces_in_place_and_deletes_what_is_nobodys() -> None:
    wrong = replace(NEIGHBOUR, mac="02:00:00:00:00:66")
    nobodys = replace(NEIGHBOUR, ip=IPv4Address("10.244.9.0"))
    assert said_of_vxlan(neighbours=(wrong, nobodys)) == [
        "set neighbour 10.244.7.0 lladdr 02:00:00:00:00:07",
        "delete neighbour 10.244.9.0",
    ]
    elsewhere = replace(FDB, dst=IPv4Address("192.0.2.66"))
    stray = replace(FDB, mac="02:00:00:00:00:99")
    assert said_of_vxlan(fdb=(elsewhere, stray)) == [
        "set fdb 02:00:00:00:00:07 dst 192.0.2.7",
        "delete fdb 02:00:00:00:00:99 dst 192.0.2.7",
    ]
    assert said_of_vxlan(fdb=(FDB, elsewhere)) == ["delete fdb 02:00:00:00:00:07 dst 192.0.2.66"], "a second one"


def test_plan_leaves_what_the_kernel_has_learnt_by_itself() -> None:
    learnt = replace(NEIGHBOUR, ip=IPv4Address("10.244.9.0"), is_permanent=False)
    assert said_of_vxlan(neighbours=(NEIGHBOUR, learnt)) == []
    assert said_of_vxlan(fdb=(FDB, replace(FDB, mac="02:00:00:00:00:99", is_permanent=False))) == []


def test_plan_takes_over_routes_of_a_predecessor() -> None:
    """flanneld's: the same way, another owner; and one through our device to a peer that is gone."""
    theirs = replace(WAY, protocol=3)
    gone = replace(theirs, dst=IPv4Network("10.244.9.0/24"), gateway=IPv4Address("10.244.9.0"))
    assert said_of_vxlan(routes=(GUARD,), foreign=(theirs, gone)) == [
        "delete route 10.244.7.0/24 via 10.244.7.0 dev if8 onlink proto 3",
        "add route 10.244.7.0/24 via 10.244.7.0 dev if8 onlink proto 158",
        "delete route 10.244.9.0/24 via 10.244.9.0 dev if8 onlink proto 3",
    ]


def test_plan_deletes_a_device_that_another_backend_left_when_all_else_is_done() -> None:
    assert said_of_vxlan(stray_links=(LINK,), routes=(GUARD, WAY, THROUGH)) == [
        "delete route 10.244.0.0/16 dev if7 proto 158",
        "delete link flannel0",
    ]


def test_plan_goes_on_with_other_peers_while_a_foreign_route_holds_the_place_of_one() -> None:
    foreign = Route(PEER, IPv4Address("192.0.2.9"), 2, protocol=4)
    assert said_of_vxlan(routes=(GUARD,), foreign=(foreign,), neighbours=()) == [
        "set neighbour 10.244.7.0 lladdr 02:00:00:00:00:07"
    ]

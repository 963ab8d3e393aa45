"""What is kept from other owners' routes: all that is leased, and of what can be leased all that nobody reaches."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.core.desired import DesiredRoute, DesiredState, Pods, blackhole, guard
from udptun.core.network_state import RouteType

NETWORK = IPv4Network("10.0.0.0/8")
LEASABLE = tuple(map(IPv4Network, ("10.10.0.0/15", "10.12.0.0/14", "10.16.0.0/12", "10.32.0.0/11")))
OWN = IPv4Network("10.12.16.0/20")
INSIDE, OUTSIDE = IPv4Network("10.40.16.0/20"), IPv4Network("10.200.16.0/20")


def networks(text: str) -> list[IPv4Network]:
    return [IPv4Network(word) for word in text.split()]


def guards(state: DesiredState, others: str) -> list[IPv4Network]:
    routes = state.routes_beside(networks(others))
    found = [route.dst for route in routes if route.type is RouteType.UNREACHABLE]
    assert len(found) == len(set(found))
    return [dst for dst in found if isinstance(dst, IPv4Network)]


def kernel_vxlan(leased: Sequence[IPv4Network] = (INSIDE,), own: IPv4Network = OWN) -> DesiredState:
    return DesiredState(pods=Pods(NETWORK, LEASABLE, own, tuple(leased)))


def vtep(leased: Sequence[IPv4Network] = (INSIDE,), own: IPv4Network = OWN) -> DesiredState:
    return DesiredState(pods=Pods(NETWORK, LEASABLE, own, tuple(leased), "flannel.1"))


def udp(leased: Sequence[IPv4Network] = (INSIDE,)) -> DesiredState:
    routes = (guard(NETWORK), DesiredRoute(NETWORK, "flannel0"))
    return DesiredState(routes=routes, pods=Pods(NETWORK, (), OWN, tuple(leased), "flannel0"))


@pytest.mark.parametrize(
    ("others", "dropped", "single"),
    [
        # nothing there, or what does not lead to any of it
        ("", "", ""),
        ("10.0.0.0/24 192.0.2.0/24 172.16.0.0/12", "", ""),
        # a route around what can be leased: things may be reached by it
        ("10.0.0.0/8", "10.10.0.0/15 10.12.0.0/14 10.16.0.0/12 10.32.0.0/11", "10.40.16.0/20 10.12.16.0/20"),
        ("8.0.0.0/6", "10.10.0.0/15 10.12.0.0/14 10.16.0.0/12 10.32.0.0/11", "10.40.16.0/20 10.12.16.0/20"),
        ("10.0.0.0/10", "10.10.0.0/15 10.12.0.0/14 10.16.0.0/12 10.32.0.0/11", "10.40.16.0/20 10.12.16.0/20"),
        ("10.8.0.0/13", "10.10.0.0/15 10.12.0.0/14", "10.12.16.0/20"),
        # a route to a part of it is better than a guard, and takes what is leased there
        ("10.40.0.0/16", "", "10.40.16.0/20"),
        ("10.32.0.0/11", "10.32.0.0/11", "10.40.16.0/20"),
        ("10.41.0.0/16", "", ""),
        ("10.12.0.0/16", "", "10.12.16.0/20"),
        # the bridge of our own pods, and routes to some of a host's pods
        ("10.12.16.0/20", "", ""),
        ("10.12.16.7/32 10.40.16.9/32", "", ""),
    ],
)
def test_leased_subnets_are_guarded_and_what_others_reach_is_not(others: str, dropped: str, single: str) -> None:
    """All of Network was unreachable with vxlan, also what the host had reached until then."""
    whole = [prefix for prefix in LEASABLE if prefix not in networks(dropped)]
    assert guards(kernel_vxlan(), others) == [*whole, *networks(single)]


def test_leases_outside_of_what_can_be_leased_are_guarded_too() -> None:
    assert guards(kernel_vxlan([INSIDE, OUTSIDE], own=IPv4Network("10.9.0.0/20")), "") == [
        *LEASABLE,
        OUTSIDE,
        IPv4Network("10.9.0.0/20"),
    ]


def test_what_is_guarded_leads_into_the_device_where_one_route_leads_to_all_peers() -> None:
    state = vtep([INSIDE, OUTSIDE], own=LEASABLE[0])
    through = [route.dst for route in state.routes_beside(()) if route.link == "flannel.1"]
    # The way to our own pods is their bridge's.
    assert through == [*LEASABLE[1:], OUTSIDE]
    assert guards(state, "") == [*LEASABLE, OUTSIDE]


def test_another_owners_route_to_all_that_leads_into_the_device_stays_the_way_to_the_hosts_there() -> None:
    """The device would have the better metric, and take the packets for hosts that the route reaches."""
    wide = LEASABLE[3]
    through = [route.dst for route in vtep().routes_beside([wide]) if route.link == "flannel.1"]
    assert through == [*LEASABLE[:3], INSIDE]


def test_a_peer_that_another_owners_route_takes_from_the_device_has_a_route_of_its_own() -> None:
    """udp's packets for a peer followed another owner's route to a part of Network, in clear text."""
    for state in (udp(), vtep()):
        routes = state.routes_beside(networks("10.40.0.0/16"))
        assert DesiredRoute(INSIDE, state.pods.link) in routes  # type: ignore[union-attr]  # it has pods
        assert guard(INSIDE) in routes
    # Its own route to the same prefix would take the packets too, and is reported where it does.
    assert DesiredRoute(INSIDE, "flannel0") in udp().routes_beside([INSIDE])
    # One to all of Network as well, so that its packets do not depend on whose route was there first.
    assert DesiredRoute(INSIDE, "flannel0") in udp().routes_beside([NETWORK])
    for others in ("8.0.0.0/6", "10.50.0.0/16", "192.0.2.0/24"):
        assert udp().routes_beside(networks(others)) == udp().routes


def test_a_blackhole_for_our_own_pods_stands_for_their_guard() -> None:
    """The kernel takes no two routes of one prefix and metric."""
    pods = Pods(NETWORK, (OWN, *LEASABLE[2:]), OWN, (INSIDE,))
    routes = DesiredState(routes=(blackhole(OWN),), pods=pods).routes_beside(())
    assert [(route.dst, route.type) for route in routes if route.dst == OWN] == [(OWN, RouteType.BLACKHOLE)]


def test_no_packet_to_a_pod_follows_another_owners_route_whatever_there_is() -> None:
    """The kernel takes the longest prefix, then the better metric; here our devices and their routes are gone."""
    rng = random.Random(9)
    for _ in range(300):
        leased = [IPv4Network(((10 << 24) + (rng.randrange(1 << 12) << 12), 20)) for _ in range(6)]
        leased = list(dict.fromkeys(leased))
        lengths = [rng.randrange(4, 20) for _ in range(5)]
        base = int(leased[0].network_address)
        others = [IPv4Network((base ^ rng.randrange(1 << 24), length), strict=False) for length in lengths]
        for state in (kernel_vxlan(leased[1:], leased[0]), vtep(leased[1:], leased[0]), udp(leased)):
            refused = guards(state, " ".join(map(str, others)))
            for subnet in leased:
                ip = subnet[9]
                best = max((it.prefixlen for it in refused if ip in it), default=-1)
                assert best > max((it.prefixlen for it in others if ip in it), default=-1) or best >= 20


def test_pods_of_a_full_table_cost_little() -> None:
    many = [IPv4Network((int(IPv4Address("10.0.0.0")) + n * 256, 24)) for n in range(20_000)]
    pods = Pods(NETWORK, (NETWORK,), OWN, tuple(many))
    assert pods.prefixes([*ipaddress.ip_network("192.0.2.0/24").subnets(new_prefix=28)], ()) == [NETWORK]

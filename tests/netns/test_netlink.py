"""netlink.py against the kernel; `ip -j` is the second opinion."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any, TypeVar

import pytest
from namespace import Namespace, linked_namespace, open_fds, requires_netns

from udptun.core.errors import KernelError
from udptun.core.network_state import (
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    Link,
    LinkSettings,
    Neighbour,
    Route,
    RouteType,
    Scope,
    Vxlan,
    describe_route,
)
from udptun.kernel import rtnetlink
from udptun.kernel.link_messages import add_address, add_vxlan, delete_address, delete_link, set_link
from udptun.kernel.netlink import Netlink

pytestmark = [pytest.mark.netns, requires_netns]

T = TypeVar("T")
NETWORK = IPv4Network("10.244.0.0/16")


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """v0 (192.0.2.1/24, up) -- v1 (up) in one namespace."""
    with linked_namespace() as ns:
        yield ns


def ask(ns: Namespace, question: Callable[[Netlink], Coroutine[Any, Any, T]]) -> T:
    async def conversation() -> T:
        async with Netlink() as kernel:
            return await question(kernel)

    return ns.call_async(conversation)


def find(ns: Namespace, name: str) -> Link:
    link = ask(ns, lambda k: k.link(name))
    assert link is not None
    return link


def test_links_are_those_ip_shows(ns: Namespace) -> None:
    ns.ip("tuntap add tq mode tun multi_queue vnet_hdr")
    ns.ip("link set v0 mtu 1400 txqueuelen 77")
    links = {link.name: link for link in ask(ns, lambda k: k.links())}
    shown = {entry["ifname"]: entry for entry in ns.show("link show")}
    assert set(links) == set(shown) == {"lo", "v0", "v1", "tq"}
    for name, link in links.items():
        assert (link.index, link.mtu) == (shown[name]["ifindex"], shown[name]["mtu"])
        assert link.is_up == ("UP" in shown[name]["flags"])
        assert link.has_carrier == ("LOWER_UP" in shown[name]["flags"])
        assert link.tx_queue_len == shown[name]["txqlen"]
        assert link.kind == shown[name].get("linkinfo", {}).get("info_kind", "")
    assert links["lo"].is_loopback
    assert not links["v0"].is_loopback
    assert links["v0"].tun is None
    tun = links["tq"].tun
    assert tun is not None
    assert (tun.is_tap, tun.is_multi_queue, tun.has_vnet_hdr, tun.is_persistent) == (False, True, True, True)


def test_link_is_none_when_there_is_none(ns: Namespace) -> None:
    assert ask(ns, lambda k: k.link("nowhere")) is None
    found = ask(ns, lambda k: k.link("v0"))
    assert found is not None
    assert found.name == "v0"


def test_addresses_say_how_they_came_and_whose_end_they_are(ns: Namespace) -> None:
    ns.ip("address add 192.0.2.9/24 dev v0 valid_lft 100 preferred_lft 0")
    ns.ip("address add 198.51.100.1 peer 198.51.100.2/32 dev v0")
    ns.ip("address add 169.254.1.1/16 dev v1 scope link")
    every = {str(a.ip): a for a in ask(ns, lambda k: k.addresses())}
    assert every["127.0.0.1"].scope == Scope.HOST
    assert every["169.254.1.1"].scope == Scope.LINK
    assert every["192.0.2.1"].is_permanent
    assert not every["192.0.2.1"].is_deprecated
    assert not every["192.0.2.9"].is_permanent
    assert every["192.0.2.9"].is_deprecated
    assert every["198.51.100.1"].peer == IPv4Address("198.51.100.2")
    assert every["192.0.2.1"].peer is None
    v1 = ns.show("link show v1")[0]["ifindex"]
    assert [str(a.ip) for a in ask(ns, lambda k: k.addresses(v1))] == ["169.254.1.1"]


def test_addresses_are_added_and_deleted(ns: Namespace) -> None:
    index = ns.show("link show v0")[0]["ifindex"]
    address = Address(index, IPv4Address("10.244.3.0"), 32)
    ask(ns, lambda k: k.do(add_address(address)))
    info = {a["local"]: a for a in ns.show("address show dev v0")[0]["addr_info"]}
    assert (info["10.244.3.0"]["prefixlen"], info["10.244.3.0"]["scope"]) == (32, "global")
    ask(ns, lambda k: k.do(delete_address(address)))
    assert [a["local"] for a in ns.show("-4 address show dev v0")[0]["addr_info"]] == ["192.0.2.1"]


def test_an_address_with_a_peer_is_deleted(ns: Namespace) -> None:
    ns.ip("address add 198.51.100.1 peer 198.51.100.2/32 dev v0")
    (found,) = [a for a in ask(ns, lambda k: k.addresses()) if a.peer]
    ask(ns, lambda k: k.do(delete_address(found)))
    assert [a["local"] for a in ns.show("-4 address show dev v0")[0]["addr_info"]] == ["192.0.2.1"]


def test_routes_are_read_with_every_property(ns: Namespace) -> None:
    ns.ip("route add 10.1.0.0/16 via 192.0.2.7 dev v0 metric 5 mtu 1300 src 192.0.2.1 proto 99")
    ns.ip("route add blackhole 10.2.0.0/16")
    ns.ip("route add default nexthop via 192.0.2.7 nexthop via 192.0.2.8")
    ns.ip("route add 10.3.0.0/16 dev v0 table 100")
    index = ns.show("link show v0")[0]["ifindex"]
    routes = {str(r.dst): r for r in ask(ns, lambda k: k.routes())}
    gateway, own = IPv4Address("192.0.2.7"), IPv4Address("192.0.2.1")
    assert routes["10.1.0.0/16"] == Route(
        IPv4Network("10.1.0.0/16"), gateway, index, protocol=99, metric=5, prefsrc=own, mtu=1300
    )
    assert routes["10.2.0.0/16"].type == RouteType.BLACKHOLE
    assert (routes["0.0.0.0/0"].gateway, routes["0.0.0.0/0"].oif) == (gateway, index)
    assert "10.3.0.0/16" not in routes


def test_own_routes_are_told_from_others(ns: Namespace) -> None:
    index = ns.show("link show v0")[0]["ifindex"]
    ns.ip("route add 10.1.0.0/16 dev v0")
    through = Route(NETWORK, oif=index)
    guard = Route(NETWORK, type=RouteType.UNREACHABLE, metric=0xFFFFFFFF)
    ask(ns, lambda k: k.do(rtnetlink.add_route(through)))
    ask(ns, lambda k: k.do(rtnetlink.add_route(guard)))
    assert ask(ns, lambda k: k.routes(ROUTE_PROTOCOL)) == [through, guard]
    shown = ns.show(f"route show {NETWORK}")
    assert [(r["type"], r["protocol"], r.get("metric", 0)) for r in shown] == [
        ("unicast", str(ROUTE_PROTOCOL), 0),
        ("unreachable", str(ROUTE_PROTOCOL), 0xFFFFFFFF),
    ]
    assert shown[0]["scope"] == "global"
    for route in (through, guard):
        removal = rtnetlink.delete_route(route)
        ask(ns, lambda k, removal=removal: k.do(removal))  # type: ignore[misc]  # inferred lambda default
    assert ns.show(f"route show {NETWORK}") == []
    assert ns.show("route show 10.1.0.0/16")


def test_another_owners_route_is_neither_replaced_nor_deleted(ns: Namespace) -> None:
    ns.ip(f"route add {NETWORK} via 192.0.2.7 proto static")
    index = ns.show("link show v0")[0]["ifindex"]
    with pytest.raises(KernelError, match=r"cannot add route 10\.244\.0\.0/16: EEXIST"):
        ask(ns, lambda k: k.do(rtnetlink.add_route(Route(NETWORK, oif=index))))
    with pytest.raises(KernelError, match="ESRCH"):
        ask(ns, lambda k: k.do(rtnetlink.delete_route(Route(NETWORK, oif=index))))
    assert [r["gateway"] for r in ns.show(f"route show {NETWORK}")] == ["192.0.2.7"]


def test_route_get_names_link_and_source(ns: Namespace) -> None:
    route = ask(ns, lambda k: k.route_get(IPv4Address("192.0.2.200")))
    assert route.oif == ns.show("link show v0")[0]["ifindex"]
    assert route.prefsrc == IPv4Address("192.0.2.1")
    with pytest.raises(KernelError, match=r"no route to 203\.0\.113\.1: ENETUNREACH"):
        ask(ns, lambda k: k.route_get(IPv4Address("203.0.113.1")))


def test_set_link_changes_only_what_is_given(ns: Namespace) -> None:
    link = find(ns, "v0")
    ask(ns, lambda k: k.do(set_link(LinkSettings(link, mtu=1300, tx_queue_len=600))))
    shown = ns.show("link show v0")[0]
    assert (shown["mtu"], shown["txqlen"], "UP" in shown["flags"]) == (1300, 600, True)
    ask(ns, lambda k: k.do(set_link(LinkSettings(link, up=False))))
    shown = ns.show("link show v0")[0]
    assert (shown["mtu"], "UP" in shown["flags"]) == (1300, False)


def test_errors_carry_the_kernels_own_words(ns: Namespace) -> None:
    link = find(ns, "v0")
    with pytest.raises(KernelError) as refused:
        ask(ns, lambda k: k.do(set_link(LinkSettings(link, mtu=1))))
    assert str(refused.value) == "cannot set link v0 mtu 1: EINVAL; mtu less than device minimum"
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(KernelError, match="cannot delete link v0: ENODEV"):
        ask(ns, lambda k: k.do(delete_link(replace(link, index=4000))))


def test_addresses_of_a_link_that_is_gone_are_none(ns: Namespace) -> None:
    """The kernel answers ENODEV; the link went between two questions."""
    assert ask(ns, lambda k: k.addresses(4000)) == []


def test_conversations_leave_no_descriptor_open(ns: Namespace) -> None:
    async def many() -> tuple[int, int]:
        async def once() -> None:
            async with Netlink() as kernel:
                await kernel.links()

        await once()
        before = open_fds()
        for _ in range(50):
            await once()
        return before, open_fds()

    before, after = ns.call_async(many)
    assert after == before


# --- VXLAN, neighbours and fdb entries, many at once


VXLAN = Vxlan(7, IPv4Address("192.0.2.1"), 0, 4789, learning=False, gbp=True)


@pytest.fixture
def vxlan(ns: Namespace) -> Link:
    """flannel.7 over v0, up, as `add_vxlan` makes it."""
    lower = ns.show("link show v0")[0]["ifindex"]
    device = add_vxlan("flannel.7", replace(VXLAN, lower_index=lower), "02:00:00:00:00:07", 1400)
    ask(ns, lambda k: k.do(device))
    ns.ip("link set flannel.7 up")
    return find(ns, "flannel.7")


def test_a_vxlan_device_is_made_and_read_as_asked_for(ns: Namespace, vxlan: Link) -> None:
    (shown,) = ns.show("link show flannel.7")
    data = shown["linkinfo"]["info_data"]
    assert (data["id"], data["local"], data["link"], data["port"]) == (7, "192.0.2.1", "v0", 4789)
    assert (data["learning"], data["gbp"], shown["mtu"], shown["address"]) == (False, True, 1400, "02:00:00:00:00:07")
    assert vxlan.vxlan == replace(VXLAN, lower_index=ns.show("link show v0")[0]["ifindex"])
    assert vxlan.mac == "02:00:00:00:00:07"
    ask(ns, lambda k: k.do(set_link(LinkSettings(vxlan, alias="udptun", mac="02:00:00:00:00:08"))))
    again = find(ns, "flannel.7")
    assert (again.alias, again.mac) == ("udptun", "02:00:00:00:00:08")


def test_a_vxlan_device_made_by_ip_is_read_with_what_tells_it_apart(ns: Namespace) -> None:
    ns.ip("link add x9 type vxlan id 9 group 239.1.1.1 dev v0 l2miss dstport 8472")
    link = ask(ns, lambda k: k.link("x9"))
    assert link is not None
    assert link.vxlan is not None
    found = link.vxlan
    assert (found.vni, found.local, found.group, found.l2miss) == (9, None, IPv4Address("239.1.1.1"), True)
    assert (found.learning, found.gbp) == (True, False)


def test_many_changes_go_in_order_and_each_has_its_own_answer(ns: Namespace, vxlan: Link) -> None:
    """250 peers are more than one batch; the two bad ones in between spoil none of the others."""
    neighbours = [Neighbour(vxlan.index, NETWORK[256 * n], f"02:00:00:00:00:{n:02x}") for n in range(1, 251)]
    entries = [FdbEntry(vxlan.index, n.mac, IPv4Address(f"192.0.2.{1 + i}")) for i, n in enumerate(neighbours)]
    ways = [Route(IPv4Network((int(n.ip), 24)), IPv4Address(int(n.ip)), vxlan.index, onlink=True) for n in neighbours]
    bad = [rtnetlink.add_route(ways[0]), rtnetlink.add_route(Route(NETWORK, IPv4Address("203.0.113.1"), vxlan.index))]
    requests = [
        *map(rtnetlink.set_neighbour, neighbours),
        *map(rtnetlink.set_fdb, entries),
        *map(rtnetlink.add_route, ways),
    ]
    errors = ask(ns, lambda k: k.change([*requests, *bad, *map(rtnetlink.set_fdb, entries[:1])]))
    assert errors[:750] == [None] * 750
    assert [str(error) for error in errors[750:752]] == [
        "cannot add route 10.244.1.0/24: EEXIST",
        "cannot add route 10.244.0.0/16: ENETUNREACH; Nexthop has invalid gateway",
    ]
    assert errors[752] is None
    assert sorted(ask(ns, lambda k: k.neighbours(vxlan.index)), key=lambda n: int(n.ip)) == neighbours
    assert set(ask(ns, lambda k: k.fdb(vxlan.index))) == set(entries)
    assert ask(ns, lambda k: k.routes(ROUTE_PROTOCOL)) == ways
    shown = {n["dst"]: n for n in ns.show("neigh show dev flannel.7")}
    assert (shown["10.244.7.0"]["lladdr"], shown["10.244.7.0"]["state"]) == ("02:00:00:00:00:07", ["PERMANENT"])
    assert len(ns.show("route show dev flannel.7")) == 250

    removals = [*map(rtnetlink.delete_neighbour, neighbours), *map(rtnetlink.delete_fdb, entries)]
    assert ask(ns, lambda k: k.change(removals)) == [None] * 500
    assert ns.show("neigh show dev flannel.7") == []
    assert ask(ns, lambda k: k.fdb(vxlan.index)) == []


def test_what_is_on_the_link_is_told_from_what_is_behind_a_gateway(ns: Namespace) -> None:
    ns.ip("route add 198.51.100.0/24 via 192.0.2.9")
    ns.ip("route add blackhole 198.51.100.66/32")
    index = ns.show("link show v0")[0]["ifindex"]
    near, far, hole, nowhere = map(IPv4Address, ("192.0.2.7", "198.51.100.7", "198.51.100.66", "203.0.113.1"))
    assert ask(ns, lambda k: k.on_link([near, far, hole, nowhere])) == {near: index}


@pytest.mark.parametrize(
    ("route", "is_on_link"),
    [
        ("dev v0", True),
        ("via 192.0.2.9", False),
        ("via 203.0.113.7 dev v0 onlink", False),
        ("via inet6 fe80::1 dev v0", False),
        ("nexthop via inet6 fe80::1 dev v0 nexthop via inet6 fe80::2 dev v0", False),
        ("nhid 1", True),
        ("nhid 2", False),
        ("nhid 3", False),
        ("encap ip id 1 dst 192.0.2.9 dev v0", False),
        ("unreachable", False),
    ],
)
def test_a_way_through_a_router_is_never_taken_for_a_link(ns: Namespace, route: str, is_on_link: bool) -> None:
    """A router with an IPv6 address (RTA_VIA) was overlooked, and DirectRouting wanted a route that cannot be."""
    for nexthop in ("1 dev v0", "2 via 192.0.2.9 dev v0", "3 via fe80::1 dev v0"):
        ns.ip(f"nexthop add id {nexthop}")
    peer = IPv4Address("203.0.113.7")
    ns.ip(f"route add {'unreachable ' if route == 'unreachable' else ''}{peer}/32 {route.replace('unreachable', '')}")
    assert (peer in ask(ns, lambda k: k.on_link([peer]))) == is_on_link


def test_a_router_of_the_other_family_is_read_and_written(ns: Namespace) -> None:
    """It was read as no router at all."""
    ns.ip("route add 203.0.113.7 via inet6 fe80::1 dev v0 proto 99")
    ns.ip("-4 route add 0.0.0.0/0 nexthop via inet6 fe80::1 dev v0 nexthop via inet6 fe80::2 dev v0")
    routes = {str(r.dst): r for r in ask(ns, lambda k: k.routes())}
    found = routes["203.0.113.7/32"]
    assert (found.gateway, routes["0.0.0.0/0"].gateway) == (IPv6Address("fe80::1"), IPv6Address("fe80::1"))
    ask(ns, lambda k: k.do(rtnetlink.delete_route(found)))
    ask(ns, lambda k: k.do(rtnetlink.add_route(found)))
    (shown,) = ns.show("route show 203.0.113.7")
    assert shown["via"] == {"family": "inet6", "host": "fe80::1"}
    assert describe_route(found, {found.oif or 0: "v0"}) == "203.0.113.7/32 via inet6 fe80::1 dev v0 proto 99"

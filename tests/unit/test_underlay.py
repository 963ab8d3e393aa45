"""Which interface is chosen, and what is said when none is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from udptun.control.running import log_underlay
from udptun.core.errors import UsageError
from udptun.core.family import Family
from udptun.core.network_state import Address, Link, Route, RouteType, Scope
from udptun.kernel.interfaces import NoAddressError, UnderlayError
from udptun.kernel.underlay import Underlay, UnderlayOptions, pick, probe_address, refresh

LO = Link(1, "lo", "", 65536, True, True, True, 1000)
ETH0 = Link(2, "eth0", "", 1500, True, True, False, 1000)
ETH1 = Link(3, "eth1", "", 9000, True, True, False, 1000)
BARE = Link(4, "bare0", "", 1500, True, True, False, 1000)
LINKS = [LO, ETH0, ETH1, BARE]
ADDRESSES = [
    Address(1, IPv4Address("127.0.0.1"), 8, Scope.HOST),
    Address(2, IPv4Address("192.0.2.1"), 24),
    Address(2, IPv4Address("192.0.2.2"), 24),
    Address(3, IPv4Address("198.51.100.1"), 24),
]
DEFAULT = Route(IPv4Network("0.0.0.0/0"), IPv4Address("192.0.2.254"), 2, protocol=3)
ROUTES = [Route(IPv4Network("192.0.2.0/24"), oif=2, protocol=2), DEFAULT]


by_ipv4 = partial(pick, family=Family.IPV4)


def choose(reach: Route | None = None, **options: object) -> Underlay:
    return by_ipv4(UnderlayOptions(**options), LINKS, ADDRESSES, ROUTES, reach)  # type: ignore[arg-type]  # the test's own keywords


def test_the_default_routes_interface_is_taken_without_options() -> None:
    own = IPv4Address("192.0.2.1")
    assert choose() == Underlay("eth0", 2, 1500, own, own)


def test_the_first_default_route_that_leads_somewhere_counts() -> None:
    routes = [
        Route(IPv4Network("0.0.0.0/0"), type=RouteType.UNREACHABLE, protocol=3),
        replace(DEFAULT, oif=3),
        DEFAULT,
    ]
    assert by_ipv4(UnderlayOptions(), LINKS, ADDRESSES, routes).link_name == "eth1"


def test_without_a_default_route_the_error_says_so_and_what_there_is() -> None:
    with pytest.raises(UnderlayError) as refused:
        by_ipv4(UnderlayOptions(), LINKS, ADDRESSES, [])
    assert str(refused.value) == (
        "Failed to find any valid interface to use: failed to get default interface: unable to find default route;"
        " use --iface (there are: eth0 192.0.2.1 192.0.2.2, eth1 198.51.100.1, bare0)"
    )
    assert refused.value.exit_status == 1


def test_public_ip_alone_names_the_interface_that_owns_it() -> None:
    ip = IPv4Address("198.51.100.1")
    assert choose(public_ip=ip) == Underlay("eth1", 3, 9000, ip, ip)


def test_public_ip_alone_must_be_a_local_address() -> None:
    with pytest.raises(UnderlayError, match=r"No interface with given IP found: 203\.0\.113\.5"):
        choose(public_ip=IPv4Address("203.0.113.5"))


def test_public_ip_beside_an_interface_need_not_be_local() -> None:
    """A host behind NAT: the socket is bound to its own address, the lease carries the other."""
    found = choose(ifaces=("eth0",), public_ip=IPv4Address("203.0.113.5"))
    assert (str(found.address), str(found.public_ip)) == ("192.0.2.1", "203.0.113.5")


@pytest.mark.parametrize(
    ("public_ip", "owner"),
    [("192.0.2.2", None), ("198.51.100.1", "eth1"), ("203.0.113.5", "lo")],
    ids=["same", "other", "lo"],
)
def test_the_socket_is_bound_to_a_public_ip_that_the_host_has(public_ip: str, owner: str | None) -> None:
    """It was bound to the interface's first address, and the peers, who know only PublicIP, dropped what it sent."""
    ip = IPv4Address(public_ip)
    addresses = [*ADDRESSES, Address(1, IPv4Address("203.0.113.5"), 32)]
    found = by_ipv4(UnderlayOptions(ifaces=("eth0",), public_ip=ip), LINKS, addresses, ROUTES)
    assert found == Underlay("eth0", 2, 1500, ip, ip, owner)
    assert f"; we send from PublicIP, which is on {owner or 'eth0'}" in found.reason
    assert refresh(found, UnderlayOptions(), [LO, replace(ETH0, mtu=1400), ETH1], addresses) == replace(found, mtu=1400)
    assert refresh(found, UnderlayOptions(), LINKS, [address for address in addresses if address.ip != ip]) is None


@pytest.mark.parametrize(
    ("options", "link", "address"),
    [
        ({"ifaces": ("eth1",)}, "eth1", "198.51.100.1"),
        ({"ifaces": ("192.0.2.2",)}, "eth0", "192.0.2.2"),
        ({"ifaces": ("nope", "bare0", "eth1", "eth0")}, "eth1", "198.51.100.1"),
        ({"iface_regexes": (r"198\.51",)}, "eth1", "198.51.100.1"),
        ({"iface_regexes": (r"\.2$",)}, "eth0", "192.0.2.2"),
        ({"iface_regexes": ("th1",)}, "eth1", "198.51.100.1"),
        ({"iface_regexes": ("nope", "^eth")}, "eth0", "192.0.2.1"),
        # Addresses of every interface come before any name: "1" is in 192.0.2.1, not only in eth1.
        ({"iface_regexes": ("1",)}, "eth0", "192.0.2.1"),
        ({"ifaces": ("nope",), "iface_regexes": ("eth1",)}, "eth1", "198.51.100.1"),
        ({"ifaces": ("eth0",), "iface_regexes": ("eth1",)}, "eth0", "192.0.2.1"),
        ({"iface_regexes": ("^eth[[:digit:]]$",)}, "eth0", "192.0.2.1"),
        ({"iface_regexes": (r"(?i)ETH1\z",)}, "eth1", "198.51.100.1"),
    ],
)
def test_interfaces_are_tried_in_flannels_order(options: dict[str, object], link: str, address: str) -> None:
    found = choose(**options)  # type: ignore[arg-type]  # the test's own keywords
    assert (found.link_name, str(found.address)) == (link, address)


def test_can_reach_takes_the_routes_link_and_its_source() -> None:
    way = Route(IPv4Network("203.0.113.9/32"), oif=2, prefsrc=IPv4Address("192.0.2.2"))
    found = choose(way, can_reach=IPv4Address("203.0.113.9"))
    assert (found.link_name, str(found.address)) == ("eth0", "192.0.2.2")
    found = choose(replace(way, prefsrc=None, oif=3), can_reach=IPv4Address("203.0.113.9"))
    assert (found.link_name, str(found.address)) == ("eth1", "198.51.100.1")


def test_the_error_names_everything_that_was_tried() -> None:
    with pytest.raises(UnderlayError) as refused:
        choose(
            ifaces=("eth9", "203.0.113.5", "bare0"),
            iface_regexes=("^wlan",),
            can_reach=IPv4Address("203.0.113.9"),
        )
    assert str(refused.value) == (
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        " (--iface=eth9: error looking up interface eth9: no such interface;"
        " --iface=203.0.113.5: No interface with given IP found: 203.0.113.5;"
        " --iface=bare0: failed to find IPv4 address for interface bare0;"
        " --iface-regex=^wlan: could not match pattern ^wlan to any of the available network interfaces;"
        " --iface-can-reach=203.0.113.9: failed to get interface to reach 203.0.113.9: no route;"
        " there are: eth0 192.0.2.1 192.0.2.2, eth1 198.51.100.1, bare0)"
    )


@pytest.mark.parametrize("regex", ["(", "[[:nosuch:]]", r"\pN", "*a"])
def test_a_broken_regular_expression_needs_a_person(regex: str) -> None:
    with pytest.raises(UsageError, match="could not compile the IP address regex") as refused:
        choose(ifaces=("eth0",), iface_regexes=(regex,))
    assert refused.value.exit_status == 2


def test_an_interface_without_mtu_is_an_error() -> None:
    with pytest.raises(UnderlayError, match=r"failed to determine MTU for 192\.0\.2\.1 interface eth0"):
        by_ipv4(UnderlayOptions(), [replace(ETH0, mtu=0)], ADDRESSES, ROUTES)


def addresses_of_eth0(*addresses: Address) -> str:
    return str(by_ipv4(UnderlayOptions(ifaces=("eth0",)), LINKS, addresses, ROUTES).address)


A, B = Address(2, IPv4Address("192.0.2.1"), 24), Address(2, IPv4Address("192.0.2.2"), 24)


def test_the_address_order_is_flannels() -> None:
    link_local = Address(2, IPv4Address("169.254.1.1"), 16, Scope.LINK)
    assert addresses_of_eth0(A, B) == "192.0.2.1"
    assert addresses_of_eth0(link_local, B) == "192.0.2.2"
    assert addresses_of_eth0(link_local) == "169.254.1.1"
    assert addresses_of_eth0(replace(A, is_permanent=False), B) == "192.0.2.2"
    assert addresses_of_eth0(replace(A, is_permanent=False), link_local) == "192.0.2.1"
    assert addresses_of_eth0(replace(A, is_temporary=True), B) == "192.0.2.2"
    assert addresses_of_eth0(replace(A, is_temporary=True), replace(B, is_permanent=False)) == "192.0.2.1"


def test_a_deprecated_address_is_never_chosen() -> None:
    assert addresses_of_eth0(replace(A, is_deprecated=True), B) == "192.0.2.2"
    with pytest.raises(UnderlayError, match="failed to find IPv4 address for interface eth0"):
        addresses_of_eth0(replace(A, is_deprecated=True))


def test_loopback_is_not_an_interface_for_peers() -> None:
    with pytest.raises(UnderlayError, match="failed to find IPv4 address for interface lo"):
        choose(ifaces=("lo",))


def test_an_underlay_is_the_same_as_long_as_its_link_has_its_address() -> None:
    old = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.2"), IPv4Address("203.0.113.7"))
    assert refresh(old, UnderlayOptions(), [ETH0], ADDRESSES) == old
    assert refresh(old, UnderlayOptions(), [replace(ETH0, mtu=1400)], ADDRESSES) == replace(old, mtu=1400)
    assert refresh(old, UnderlayOptions(), [replace(ETH0, is_up=False)], ADDRESSES) == old
    assert refresh(old, UnderlayOptions(), [ETH0], ADDRESSES[:2]) is None
    assert refresh(old, UnderlayOptions(), [replace(ETH0, index=9)], ADDRESSES) is None
    assert refresh(old, UnderlayOptions(), [], []) is None


# --- several addresses: which one, why, and which others there were

FLOATING = Address(2, IPv4Address("192.0.2.100"), 32)
BY_DHCP = replace(A, is_permanent=False)
BEYOND = Route(IPv4Network("203.0.113.1/32"), IPv4Address("192.0.2.254"), 2, prefsrc=IPv4Address("192.0.2.1"))


def test_a_floating_address_is_not_taken_for_the_hosts_own() -> None:
    """The permanent address of a virtual IP came before the DHCP address that the default route names as its source.

    When the virtual IP moved to another host, that host leased with the same PublicIP.
    """
    for beyond, routes in ((BEYOND, ROUTES), (None, [replace(DEFAULT, prefsrc=IPv4Address("192.0.2.1"))])):
        found = by_ipv4(UnderlayOptions(), LINKS, [FLOATING, BY_DHCP], routes, beyond=beyond)
        assert str(found.address) == "192.0.2.1"
        assert found.reason == "the source of the default route"
        assert [str(ip) for ip in found.others] == ["192.0.2.100"]


@pytest.mark.parametrize(
    ("options", "addresses", "reason", "others"),
    [
        ({"ifaces": ("eth0",)}, [A], "the only address of eth0", []),
        ({"ifaces": ("eth0",)}, [A, B], "the first address of eth0", ["192.0.2.2"]),
        ({"ifaces": ("eth0",)}, [BY_DHCP, B], "the first permanent address of eth0", ["192.0.2.1"]),
        ({"ifaces": ("eth0",)}, [replace(A, is_temporary=True), B], "the first lasting address of eth0", ["192.0.2.1"]),
        ({"ifaces": ("192.0.2.1",)}, [A, B], "--iface names it", ["192.0.2.2"]),
        ({"iface_regexes": (r"\.2$",)}, [A, B], "--iface-regex matches it", ["192.0.2.1"]),
        ({"iface_regexes": ("^eth0",)}, [A, B], "the first address of eth0", ["192.0.2.2"]),
        ({"public_ip": IPv4Address("192.0.2.2")}, [A, B], "--public-ip names it", ["192.0.2.1"]),
        ({}, [A, B], "the first address of eth0", ["192.0.2.2"]),
    ],
)
def test_it_is_said_why_an_address_was_chosen(
    options: dict[str, object], addresses: list[Address], reason: str, others: list[str]
) -> None:
    found = by_ipv4(UnderlayOptions(**options), LINKS, addresses, ROUTES)  # type: ignore[arg-type]  # the test's own
    assert (found.reason, [str(ip) for ip in found.others]) == (reason, others)


def test_a_source_that_is_deprecated_is_passed_over() -> None:
    found = by_ipv4(UnderlayOptions(), LINKS, [replace(A, is_deprecated=True), B], ROUTES, beyond=BEYOND)
    assert str(found.address) == "192.0.2.2"


def test_the_probe_is_an_address_that_none_but_a_default_route_leads_to() -> None:
    documentation = [Route(IPv4Network(text), oif=2) for text in ("203.0.113.0/24", "198.51.100.1/32")]
    assert str(probe_address(ROUTES, Family.IPV4)) == "203.0.113.1"
    assert str(probe_address([*documentation, DEFAULT], Family.IPV4)) == "192.0.2.1"
    assert probe_address(documentation, Family.IPV4) is None
    halves = [Route(IPv4Network(text), oif=3) for text in ("0.0.0.0/1", "128.0.0.0/1")]
    assert probe_address([DEFAULT, *halves], Family.IPV4) is None


def test_a_host_that_can_reach_itself_does_not_send_through_lo() -> None:
    """The same --iface-can-reach on all hosts: on the one that has the address lo was chosen, with an MTU of 65536."""
    way = Route(IPv4Network("192.0.2.1/32"), oif=1, type=RouteType.LOCAL, prefsrc=IPv4Address("192.0.2.1"))
    found = choose(way, can_reach=IPv4Address("192.0.2.1"))
    assert (found.link_name, found.mtu, str(found.address)) == ("eth0", 1500, "192.0.2.1")
    assert found.reason == "--iface-can-reach names it"


# --- an address on a link that leads nowhere: routes lead to it, and from it to the others

DUMMY = Link(5, "dummy0", "dummy", 1500, True, True, False, 1000)
ON_LO = IPv4Address("198.51.100.9")


def on(link: Link) -> list[Address]:
    return [*ADDRESSES, Address(link.index, ON_LO, 32)]


@pytest.mark.parametrize("link", [LO, DUMMY], ids=lambda link: link.name)
@pytest.mark.parametrize(
    "options",
    [
        {"public_ip": ON_LO},
        {"ifaces": (str(ON_LO),)},
        {"ifaces": ("lo", "dummy0")},
        {"iface_regexes": (r"^198\.51\.100\.9$",)},
        {"can_reach": ON_LO},
    ],
    ids=str,
)
def test_an_address_on_lo_leaves_by_the_way_to_the_others(link: Link, options: dict[str, object]) -> None:
    """lo was taken for the underlay: pods got an MTU of 65508, and a VXLAN device on lo reached nobody."""
    reach = Route(IPv4Network("198.51.100.9/32"), oif=1, type=RouteType.LOCAL) if "can_reach" in options else None
    found = by_ipv4(UnderlayOptions(**options), [*LINKS, DUMMY], on(link), ROUTES, reach, BEYOND)  # type: ignore[arg-type]  # the test's own
    assert (found.link_name, found.link_index, found.mtu) == ("eth0", 2, 1500)
    assert (found.address, found.address_link, found.is_routed) == (ON_LO, link.name, True)
    assert found.reason.endswith(f"it is on {link.name}, and the routes to other hosts lead through eth0")


def test_without_a_default_route_the_way_is_the_widest_one_through_a_router() -> None:
    flannel0 = Link(6, "flannel0", "tun", 1472, True, True, False, 500)
    routes = [
        Route(IPv4Network("10.0.0.0/8"), IPv4Address("10.244.0.0"), 6),
        Route(IPv4Network("192.0.2.0/24"), oif=2, protocol=2),
        Route(IPv4Network("198.51.100.16/28"), IPv4Address("192.0.2.254"), 2),
        Route(IPv4Network("198.51.0.0/16"), IPv4Address("198.51.100.254"), 3),
    ]
    found = by_ipv4(UnderlayOptions(public_ip=ON_LO), [*LINKS, flannel0], on(LO), routes)
    assert (found.link_name, found.mtu) == ("eth1", 9000)


def test_a_lone_address_on_lo_is_taken_as_it_is() -> None:
    found = by_ipv4(UnderlayOptions(public_ip=ON_LO), LINKS, on(LO), [])
    assert (found.link_name, found.mtu, found.is_routed) == ("lo", 65536, False)


def test_a_default_route_without_addresses_on_its_link_uses_one_on_lo() -> None:
    """Unnumbered links: the error was "failed to find IPv4 address for interface bare0"."""
    beyond = Route(IPv4Network("203.0.113.1/32"), oif=4, prefsrc=ON_LO)
    found = by_ipv4(UnderlayOptions(), LINKS, on(LO), [replace(DEFAULT, gateway=None, oif=4)], beyond=beyond)
    assert (found.link_name, found.address, found.address_link, found.is_routed) == ("bare0", ON_LO, "lo", True)


def test_ways_to_the_peers_are_followed_where_routes_have_chosen() -> None:
    old = Underlay("eth0", 2, 1500, ON_LO, ON_LO, "lo", True)
    by_eth0, by_eth1 = Route(IPv4Network("203.0.113.7/32"), oif=2), Route(IPv4Network("203.0.113.8/32"), oif=3)
    to_self = Route(IPv4Network("203.0.113.9/32"), oif=1, type=RouteType.LOCAL)
    assert refresh(old, UnderlayOptions(), LINKS, on(LO), []) == old
    assert refresh(old, UnderlayOptions(), LINKS, on(LO), [by_eth1, by_eth0]) == old
    over_eth1 = replace(old, link_name="eth1", link_index=3, mtu=9000)
    assert refresh(old, UnderlayOptions(), LINKS, on(LO), [to_self, by_eth1]) == over_eth1
    small = [LO, ETH0, replace(ETH1, mtu=1300)]
    assert refresh(old, UnderlayOptions(), small, on(LO), [by_eth0, by_eth1]) == replace(old, mtu=1300)
    assert refresh(old, UnderlayOptions(), LINKS, ADDRESSES, [by_eth0]) is None
    assert refresh(old, UnderlayOptions(), [LO, ETH1], on(LO), []) is None


# --- IPv6


def ip6(text: str, index: int = 2, **more: object) -> Address:
    return Address(index, IPv6Address(text), 64, **more)  # type: ignore[arg-type]  # of the caller


GLOBAL, OTHER, LINK_LOCAL = ip6("2001:db8::1"), ip6("2001:db8::2"), ip6("fe80::1", scope=Scope.LINK)


def choose_dual(*ipv6: Address, **options: object) -> Underlay:
    asked = UnderlayOptions(families=tuple(Family), **options)  # type: ignore[arg-type]  # of the caller
    return by_ipv4(asked, LINKS, [*ADDRESSES, *ipv6], ROUTES)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([LINK_LOCAL, GLOBAL], "2001:db8::1"),
        ([OTHER, GLOBAL], "2001:db8::2"),
        ([replace(OTHER, is_temporary=True), GLOBAL], "2001:db8::1"),
        ([replace(OTHER, is_permanent=False), GLOBAL], "2001:db8::1"),
        ([replace(OTHER, is_deprecated=True), GLOBAL], "2001:db8::1"),
        ([ip6("2001:db8::3", 3), GLOBAL], "2001:db8::1"),
    ],
)
def test_the_ipv6_address_is_one_of_the_chosen_interface(there: list[Address], chosen: str) -> None:
    found = choose_dual(*there)
    assert (found.ipv6, found.public_ipv6, found.ipv6_problem) == (IPv6Address(chosen), IPv6Address(chosen), "")
    assert found.address == IPv4Address("192.0.2.1")


@pytest.mark.parametrize("there", [[], [LINK_LOCAL], [ip6("2001:db8::3", 3)]])
def test_an_interface_without_an_ipv6_address_has_ipv4_and_the_reason(there: list[Address]) -> None:
    found = choose_dual(*there)
    assert (found.address, found.ipv6, found.public_ipv6) == (IPv4Address("192.0.2.1"), None, None)
    assert found.ipv6_problem == "eth0 has no IPv6 address that other hosts could send to; give it one"


def test_an_address_that_cannot_be_used_is_named_with_the_reason() -> None:
    """`eth0 has no IPv6 address` was all that was said of an interface that shows one."""
    found = choose_dual(LINK_LOCAL, replace(GLOBAL, is_deprecated=True), replace(OTHER, is_tentative=True))
    which = "2001:db8::1 is deprecated, 2001:db8::2 is tentative, or another host has it"
    assert found.ipv6_problem == f"eth0 ({which}) has no IPv6 address that other hosts could send to; give it one"
    with pytest.raises(NoAddressError, match=r"IPv6 address for interface eth0 \(2001:db8::1 is deprecated\) \("):
        choose_ipv6(replace(GLOBAL, is_deprecated=True))


def test_nobody_looks_for_an_ipv6_address_unless_pods_have_ipv6() -> None:
    found = by_ipv4(UnderlayOptions(), LINKS, [*ADDRESSES, GLOBAL], ROUTES)
    assert (found.ipv6, found.public_ipv6, found.ipv6_problem) == (None, None, "")


def test_public_ipv6_is_what_peers_are_told_and_our_own_address_where_the_host_has_it() -> None:
    elsewhere, here = IPv6Address("2001:db8:9::9"), IPv6Address("2001:db8::3")
    behind_nat = choose_dual(GLOBAL, public_ipv6=elsewhere)
    assert (behind_nat.ipv6, behind_nat.public_ipv6) == (GLOBAL.ip, elsewhere)
    own = choose_dual(GLOBAL, ip6(str(here), 3), public_ipv6=here)
    assert (own.ipv6, own.public_ipv6) == (here, here)


def test_the_log_names_the_addresses_of_both_families(caplog: pytest.LogCaptureFixture) -> None:
    """A new address of IPv6 was logged as `underlay changed` with the addresses of IPv4, which had not changed."""
    caplog.set_level("INFO", "udptun")
    log_underlay("changed", choose_dual(GLOBAL, public_ipv6=IPv6Address("2001:db8:9::9")))
    log_underlay("changed", choose_ipv6(GLOBAL))
    both, alone = (record.getMessage() for record in caplog.records)
    assert " address=192.0.2.1,2001:db8::1 public_ip=192.0.2.1,2001:db8:9::9 mtu=1500 " in both
    assert " address=2001:db8::1 public_ip=2001:db8::1 mtu=1500 " in alone


def test_iface_may_be_an_ipv6_address() -> None:
    found = choose_dual(ip6("2001:db8::3", 3), ifaces=("2001:db8::3",))
    assert (found.link_name, found.address, found.ipv6) == (
        "eth1",
        IPv4Address("198.51.100.1"),
        IPv6Address("2001:db8::3"),
    )


def test_the_ipv6_address_that_iface_names_is_the_one_that_is_bound() -> None:
    """Before, it chose the interface alone, and the first IPv6 address there was bound."""
    found = choose_dual(GLOBAL, OTHER, ifaces=(str(OTHER.ip),))
    assert (found.link_name, found.ipv6, found.public_ipv6) == ("eth0", OTHER.ip, OTHER.ip)
    again = refresh(found, UnderlayOptions(families=tuple(Family)), LINKS, [*ADDRESSES, GLOBAL, OTHER])
    assert again == found


def test_iface_may_be_a_link_local_ipv6_address_and_finds_its_link() -> None:
    """Before, such an address was on no link."""
    there = ip6("fe80::3", 3, scope=Scope.LINK)
    found = choose_dual(there, ip6("2001:db8::3", 3), ifaces=("fe80::3",))
    assert (found.link_name, str(found.address), str(found.ipv6)) == ("eth1", "198.51.100.1", "2001:db8::3")
    alone = choose_ipv6(there, ip6("2001:db8::3", 3), ifaces=("fe80::3",))
    assert (alone.link_name, str(alone.ipv6)) == ("eth1", "2001:db8::3")


IPV6_DEFAULT = Route(IPv6Network("::/0"), IPv6Address("fe80::ff"), 2, protocol=3)
IPV6_ROUTES = [Route(IPv6Network("fe80::/64"), oif=3), Route(IPv6Network("2001:db8::/64"), oif=2), IPV6_DEFAULT]


def choose_ipv6(*ipv6: Address, reach: Route | None = None, **options: object) -> Underlay:
    asked = UnderlayOptions(families=(Family.IPV6,), **options)  # type: ignore[arg-type]  # of the caller
    return pick(asked, LINKS, [*ADDRESSES, *ipv6], IPV6_ROUTES, reach, family=Family.IPV6)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "eth0 2001:db8::1"),
        ({"ifaces": ("eth1",)}, "eth1 2001:db8:3::3"),
        ({"ifaces": ("192.0.2.1",)}, "eth0 2001:db8::1"),
        ({"ifaces": ("2001:db8::2",)}, "eth0 2001:db8::2"),
        ({"iface_regexes": ("2001:db8:3",)}, "eth1 2001:db8:3::3"),
        ({"public_ipv6": IPv6Address("2001:db8:3::3")}, "eth1 2001:db8:3::3"),
        (
            {
                "can_reach": IPv6Address("2001:db8:9::9"),
                "reach": Route(IPv6Network("2001:db8:9::9/128"), oif=3, prefsrc=IPv6Address("2001:db8:3::3")),
            },
            "eth1 2001:db8:3::3",
        ),
    ],
    ids=str,
)
def test_ipv6_alone_has_every_way_to_choose_and_no_ipv4_address(options: dict[str, object], chosen: str) -> None:
    found = choose_ipv6(GLOBAL, OTHER, ip6("2001:db8:3::3", 3), LINK_LOCAL, **options)
    assert f"{found.link_name} {found.ipv6}" == chosen
    assert found.public_ipv6 == found.host_address == found.first_address == found.ipv6
    assert (found.address, found.public_ip, found.ipv4_problem, found.is_behind_nat) == (None, None, "", False)
    options = UnderlayOptions(families=(Family.IPV6,))
    assert refresh(found, options, LINKS, [ip6(str(found.ipv6), found.link_index)]) == replace(found, others=())
    assert refresh(found, options, LINKS, ADDRESSES) is None


def test_ipv6_alone_without_an_address_or_a_default_route_says_so() -> None:
    with pytest.raises(UnderlayError, match="failed to find IPv6 address for interface eth0"):
        choose_ipv6(LINK_LOCAL, replace(GLOBAL, is_tentative=True))
    asked = UnderlayOptions(families=(Family.IPV6,))
    with pytest.raises(UnderlayError, match="unable to find default route; use --iface"):
        pick(asked, LINKS, [GLOBAL], IPV6_ROUTES[:2], family=Family.IPV6)


def test_an_address_of_the_overlay_is_not_taken_for_that_of_the_default_route() -> None:
    """The kernel takes one of another link where eth0 has lost its own.  That of flannel0, or of the pods' bridge, was
    chosen then, and the advice was to choose another IPv6Network.
    """
    overlay = IPv6Network("fd00:244:0:1::/64")
    options: dict[str, object] = {"leasable": (overlay,), "families": (Family.IPV6,)}
    asked, bridge = UnderlayOptions(**options), ip6(str(overlay[1]), 3)  # type: ignore[arg-type]  # of two fields
    beyond = Route(IPv6Network("2001:db8:9::9/128"), oif=2, prefsrc=overlay[1])
    there = [replace(GLOBAL, is_deprecated=True), bridge]
    with pytest.raises(NoAddressError, match=r"IPv6 address for interface eth0 \(2001:db8::1 is deprecated\)"):
        pick(asked, LINKS, there, IPV6_ROUTES, beyond=beyond, family=Family.IPV6)
    found = pick(asked, LINKS, [GLOBAL, bridge], IPV6_ROUTES, beyond=beyond, family=Family.IPV6)
    assert (found.link_name, found.ipv6) == ("eth0", GLOBAL.ip)
    # A host's own address there is refused later, with a line that says why.
    own = pick(asked, LINKS, [ip6(str(overlay[1]), 2)], IPV6_ROUTES, beyond=beyond, family=Family.IPV6)
    assert own.ipv6 == overlay[1]


def test_an_interface_chosen_by_ipv6_has_its_ipv4_address_too() -> None:
    """A host whose IPv4 has no default route."""
    asked = UnderlayOptions(families=tuple(Family))
    found = pick(asked, LINKS, [*ADDRESSES, GLOBAL], IPV6_ROUTES, family=Family.IPV6)
    assert (found.ipv6, found.address, found.public_ip) == (GLOBAL.ip, *[IPv4Address("192.0.2.1")] * 2)
    without = pick(asked, LINKS, [GLOBAL], IPV6_ROUTES, family=Family.IPV6)
    assert (without.address, without.ipv4_problem) == (
        None,
        "eth0 has no IPv4 address that other hosts could send to; give it one",
    )


def test_an_underlay_chosen_by_ipv6_is_recognised_by_that_address() -> None:
    """Before, that of IPv4, which is on another link, was looked for where the one of IPv6 is."""
    asked = UnderlayOptions(families=tuple(Family))
    addresses = [*ADDRESSES, ip6("2001:db8::1", 1)]
    beyond = Route(IPv6Network("2001:db8:9::9/128"), oif=2, prefsrc=IPv6Address("2001:db8::1"))
    found = pick(asked, LINKS, addresses, IPV6_ROUTES, beyond=beyond, family=Family.IPV6)
    assert (found.link_name, found.address_link, str(found.chosen_address)) == ("eth0", "lo", "2001:db8::1")
    assert (found.is_routed, str(found.address)) == (True, "192.0.2.1")
    assert refresh(found, asked, LINKS, addresses, [beyond]) == found


def test_ways_by_link_local_ipv4_routes_count() -> None:
    """Links between routers may have 169.254.0.0/16 and nothing else.  Before, no such route led anywhere."""
    route = Route(IPv4Network("169.254.0.0/16"), oif=3)
    found = by_ipv4(UnderlayOptions(public_ip=ON_LO), LINKS, on(LO), [route])
    assert (found.link_name, found.mtu) == ("eth1", 9000)


def test_only_the_want_of_an_address_or_a_default_route_is_another_familys_turn() -> None:
    for options, routes in ((UnderlayOptions(), []), (UnderlayOptions(ifaces=("bare0",)), ROUTES)):
        with pytest.raises(NoAddressError):
            by_ipv4(options, LINKS, ADDRESSES, routes)
    for options in (UnderlayOptions(public_ip=ON_LO), UnderlayOptions(ifaces=("eth9",))):
        with pytest.raises(UnderlayError) as refused:
            by_ipv4(options, LINKS, ADDRESSES, ROUTES)
        assert not isinstance(refused.value, NoAddressError)


def test_the_ipv6_address_stays_while_it_is_there_and_is_followed_when_it_goes() -> None:
    options = UnderlayOptions(families=tuple(Family))
    old = choose_dual(OTHER)
    assert refresh(old, options, [ETH0], [*ADDRESSES, GLOBAL, OTHER]) == old
    assert refresh(old, options, [ETH0], [*ADDRESSES, GLOBAL]) == replace(old, ipv6=GLOBAL.ip, public_ipv6=GLOBAL.ip)
    without = refresh(old, options, [ETH0], ADDRESSES)
    assert without is not None
    assert (without.address, without.ipv6, bool(without.ipv6_problem)) == (old.address, None, True)

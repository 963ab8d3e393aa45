"""Which interface is chosen, and what is said when none is."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.core.errors import UsageError
from udptun.core.network_state import Address, Link, Route, RouteType, Scope
from udptun.kernel.underlay import Underlay, UnderlayError, UnderlayOptions, pick, refresh

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


def choose(reach: Route | None = None, **options: object) -> Underlay:
    return pick(UnderlayOptions(**options), LINKS, ADDRESSES, ROUTES, reach)  # type: ignore[arg-type]  # the test's own keywords


def test_the_default_routes_interface_is_taken_without_options() -> None:
    own = IPv4Address("192.0.2.1")
    assert choose() == Underlay("eth0", 2, 1500, own, own)


def test_the_first_default_route_that_leads_somewhere_counts() -> None:
    routes = [
        Route(IPv4Network("0.0.0.0/0"), type=RouteType.UNREACHABLE, protocol=3),
        replace(DEFAULT, oif=3),
        DEFAULT,
    ]
    assert pick(UnderlayOptions(), LINKS, ADDRESSES, routes).link_name == "eth1"


def test_without_a_default_route_the_error_says_so_and_what_there_is() -> None:
    with pytest.raises(UnderlayError) as refused:
        pick(UnderlayOptions(), LINKS, ADDRESSES, [])
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
        pick(UnderlayOptions(), [replace(ETH0, mtu=0)], ADDRESSES, ROUTES)


def addresses_of_eth0(*addresses: Address) -> str:
    return str(pick(UnderlayOptions(ifaces=("eth0",)), LINKS, addresses, ROUTES).address)


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
    assert refresh(old, ETH0, ADDRESSES) == old
    assert refresh(old, replace(ETH0, mtu=1400), ADDRESSES) == replace(old, mtu=1400)
    assert refresh(old, replace(ETH0, is_up=False), ADDRESSES) == old
    assert refresh(old, ETH0, ADDRESSES[:2]) is None
    assert refresh(old, replace(ETH0, index=9), ADDRESSES) is None
    assert refresh(old, None, []) is None

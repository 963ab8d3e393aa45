"""Whose a device or a route is, on a host with several daemons."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.core.network_state import Address, Link, Route, TunFlags, Vxlan
from udptun.core.ownership import Ownership, alias_of, is_marked, marked_network

NETWORK, EARLIER, OTHER = (IPv4Network(text) for text in ("10.11.0.0/16", "10.5.0.0/16", "10.12.0.0/16"))
OURS = Ownership((NETWORK, EARLIER))
NOBODY = Ownership(())
TUN = Link(7, "flannel0", "tun", 1472, True, True, False, 500, TunFlags(False, True, True, True))
VXLAN = replace(
    TUN, name="flannel.1", tun=None, vxlan=Vxlan(1, IPv4Address("192.0.2.1"), 2, 8472, learning=False, gbp=False)
)


def address(ip: str, link: Link = TUN) -> Address:
    return Address(link.index, IPv4Address(ip), 32)


@pytest.mark.parametrize("link", [TUN, VXLAN])
def test_alias_says_whose_a_device_is_whatever_addresses_it_has(link: Link) -> None:
    for network, is_ours in ((NETWORK, True), (EARLIER, True), (OTHER, False), (IPv4Network("10.11.0.0/17"), False)):
        marked = replace(link, alias=alias_of(network))
        assert marked_network(marked) == network
        for addresses in ([], [address("10.11.3.0")], [address("10.12.3.0")]):
            assert OURS.owns_link(marked, addresses) is is_ours
            assert OURS.leaves_link(marked, addresses) is not is_ours
        assert NOBODY.leaves_link(marked, [])


@pytest.mark.parametrize("link", [TUN, replace(TUN, name="flannel1"), replace(VXLAN, alias="udptun")])
def test_address_says_whose_a_device_of_a_build_without_networks_in_its_marks_is(link: Link) -> None:
    assert OURS.owns_link(link, [])
    assert OURS.owns_link(link, [address("10.11.3.0", link)])
    assert OURS.owns_link(link, [address("10.5.3.0", link)])
    assert OURS.leaves_link(link, [address("10.12.3.0", link)])
    elsewhere = replace(address("10.12.3.0"), link_index=8)
    assert OURS.owns_link(link, [elsewhere])
    assert NOBODY.leaves_link(link, [])


def test_a_device_with_neither_alias_nor_address_is_no_stray_of_ours() -> None:
    """Of daemons that started at the same time, the first one deleted the device that the next one was making."""
    assert not OURS.has_made_link(TUN, [])
    assert OURS.has_made_link(TUN, [address("10.5.3.0")])
    assert not OURS.has_made_link(TUN, [address("10.12.3.0")])
    assert OURS.has_made_link(replace(TUN, alias=alias_of(EARLIER)), [])
    assert not OURS.has_made_link(replace(TUN, alias=alias_of(OTHER)), [])


@pytest.mark.parametrize(
    "link",
    [
        VXLAN,
        replace(VXLAN, alias="udptunnel 10.11.0.0/16"),
        replace(TUN, name="flannel"),
        replace(TUN, name="tun0"),
        replace(TUN, tun=TunFlags(False, True, False, True)),
        replace(TUN, tun=TunFlags(False, True, True, False)),
        replace(TUN, tun=TunFlags(True, True, True, True)),
        replace(TUN, tun=None),
    ],
)
def test_other_programs_devices_are_neither_ours_nor_another_daemons(link: Link) -> None:
    assert not is_marked(link)
    assert not OURS.owns_link(link, [])
    assert not OURS.leaves_link(link, [address("10.12.3.0")])


@pytest.mark.parametrize(
    "alias", ["udptun", "udptun ", "udptun 10.11.0.1/16", "udptun x/8", "udptun 10.11.0.0", "udptun 10"]
)
def test_alias_that_names_no_network_names_none(alias: str) -> None:
    assert marked_network(replace(TUN, alias=alias)) is None


def test_route_is_ours_when_it_leads_into_one_of_our_networks() -> None:
    for dst, is_ours in (
        ("10.11.0.0/16", True),
        ("10.11.7.0/24", True),
        ("10.5.7.0/24", True),
        ("10.12.7.0/24", False),
        ("10.0.0.0/8", False),
        ("0.0.0.0/0", False),
    ):
        assert OURS.owns_route(Route(IPv4Network(dst))) is is_ours
        assert not NOBODY.owns_route(Route(IPv4Network(dst)))
    assert not OURS.without_leftovers().owns_route(Route(IPv4Network("10.5.7.0/24")))

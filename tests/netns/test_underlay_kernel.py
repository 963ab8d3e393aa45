"""find_underlay and UnderlayWatch against the kernel, with `ip route get` as the second opinion."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from namespace import Namespace, namespace, requires_netns, seconds_until

from udptun.core.family import Family
from udptun.kernel.interfaces import NoAddressError, UnderlayError
from udptun.kernel.underlay import Underlay, UnderlayOptions
from udptun.kernel.underlay_watch import UnderlayWatch, find_underlay

pytestmark = [pytest.mark.netns, requires_netns]


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """v0 (192.0.2.1/24, mtu 1400, default route with metric 100), v1 (198.51.100.1/24)."""
    with namespace() as ns:
        ns.ip("link add v0 type veth peer name v1")
        ns.ip("link set v0 up mtu 1400")
        ns.ip("link set v1 up")
        ns.ip("address add 192.0.2.1/24 dev v0")
        ns.ip("address add 198.51.100.1/24 dev v1")
        ns.ip("route add default via 192.0.2.254 metric 100")
        yield ns


def choose(ns: Namespace, options: UnderlayOptions) -> Underlay:
    return ns.call_async(lambda: find_underlay(options))


def test_the_interface_is_the_one_the_kernel_would_use(ns: Namespace) -> None:
    own = IPv4Address("192.0.2.1")
    index = ns.show("link show v0")[0]["ifindex"]
    assert choose(ns, UnderlayOptions()) == Underlay("v0", index, 1400, own, own)
    (way,) = ns.show("route get 203.0.113.1")
    assert (way["dev"], way["prefsrc"]) == ("v0", "192.0.2.1")


def test_the_default_route_of_the_better_metric_wins(ns: Namespace) -> None:
    ns.ip("route add default via 198.51.100.254 metric 50")
    assert choose(ns, UnderlayOptions()).link_name == ns.show("route get 203.0.113.1")[0]["dev"] == "v1"


def test_a_public_ip_that_the_host_lacks_is_refused_where_ipv6_is_looked_for_too(ns: Namespace) -> None:
    """Before, IPv6 chose the interface, and the PublicIP was published as that of a NAT."""
    ns.ip("-6 address add 2001:db8::1/64 dev v0 nodad")
    ns.ip("-6 route add default via 2001:db8::ff dev v0")
    unusable = UnderlayOptions(public_ip=IPv4Address("203.0.113.5"), families=tuple(Family))
    with pytest.raises(UnderlayError, match=r"No interface with given IP found: 203\.0\.113\.5"):
        choose(ns, unusable)
    ns.ip("route del default")
    assert str(choose(ns, UnderlayOptions(families=tuple(Family))).chosen_address) == "2001:db8::1"


def test_where_no_family_leads_to_an_interface_each_ones_reason_is_said(ns: Namespace) -> None:
    """Before, a host of IPv6 alone was told that IPv4 has no default route, whatever --public-ipv6 named."""
    ns.ip("address flush dev v0")
    ns.ip("-6 address add 2001:db8::1/64 dev v0 nodad")
    wrong = UnderlayOptions(public_ipv6=IPv6Address("2001:db8::9"), families=tuple(Family))
    there = "(there are: v1 198.51.100.1, v0 2001:db8::1)"
    start = "Failed to find any valid interface to use:"
    with pytest.raises(NoAddressError) as refused:
        choose(ns, wrong)
    assert str(refused.value) == (
        f"by IPv4: {start} failed to get default interface: unable to find default route; use --iface {there}; "
        f"by IPv6: {start} No interface with given IP found: 2001:db8::9 {there}"
    )
    with pytest.raises(NoAddressError) as both:
        choose(ns, UnderlayOptions(families=tuple(Family)))
    assert str(both.value) == (
        f"{start} failed to get default interface: unable to find default route; use --iface {there}"
    )


def test_can_reach_follows_the_kernels_route(ns: Namespace) -> None:
    ns.ip("route add 203.0.113.0/24 via 198.51.100.254")
    found = choose(ns, UnderlayOptions(can_reach=IPv4Address("203.0.113.1")))
    assert (found.link_name, str(found.address)) == ("v1", "198.51.100.1")


def test_an_interface_that_appears_later_is_found_then(ns: Namespace) -> None:
    with pytest.raises(UnderlayError, match="no such interface"):
        choose(ns, UnderlayOptions(ifaces=("late0",)))
    ns.ip("link add late0 type bridge")
    ns.ip("address add 10.9.9.9/24 dev late0")
    assert str(choose(ns, UnderlayOptions(ifaces=("late0",))).address) == "10.9.9.9"


def test_an_expired_address_is_passed_over(ns: Namespace) -> None:
    ns.ip("address flush dev v1")
    ns.ip("address add 198.51.100.7/24 dev v1 valid_lft 1000 preferred_lft 0")
    ns.ip("address add 198.51.100.8/24 dev v1 valid_lft 1000 preferred_lft 900")
    assert str(choose(ns, UnderlayOptions(ifaces=("v1",))).address) == "198.51.100.8"


@pytest.mark.parametrize(
    "commands",
    [
        # a permanent floating address beside a DHCP address, which the default route names, or which its router is near
        [
            "address flush dev v0",
            "address add 192.0.2.9/32 dev v0",
            "address add 192.0.2.1/24 dev v0 valid_lft 3600 preferred_lft 3600",
            "route replace default via 192.0.2.254 src 192.0.2.1",
        ],
        [
            "address flush dev v0",
            "address add 10.0.0.9/24 dev v0",
            "address add 192.0.2.1/24 dev v0 valid_lft 3600 preferred_lft 3600",
            "route replace default via 192.0.2.254",
        ],
        ["address add 192.0.2.7/24 dev v0", "route change default via 192.0.2.254 src 192.0.2.7 metric 100"],
        # the probe's first choices are routed elsewhere
        ["route add 203.0.113.0/24 via 198.51.100.254 src 198.51.100.1", "route add 198.18.0.0/15 dev v1"],
        # unnumbered: v1 has no address, and its router has none of IPv4
        [
            "address flush dev v1",
            "link set v1 mtu 1400",
            "-4 route replace default via inet6 fe80::1 dev v1",
            "address add 10.1.1.1/32 dev lo",
        ],
        # a rule that sends what leaves the host by another table
        ["rule add from all lookup 100", "route add default via 198.51.100.254 table 100", "link set v1 mtu 1400"],
    ],
    ids=["floating", "near the router", "src", "probe", "unnumbered", "rule"],
)
def test_the_address_is_the_one_the_kernel_would_send_from(ns: Namespace, commands: list[str]) -> None:
    """The first permanent address was taken, whatever the kernel sends from: the peers saw another source."""
    for command in commands:
        ns.ip(command)
    found = choose(ns, UnderlayOptions())
    (way,) = ns.show("route get 9.9.9.9")
    assert way["dev"] == ("v1" if "link set v1 mtu 1400" in commands else "v0")
    assert (found.link_name, str(found.address), found.mtu) == (way["dev"], way["prefsrc"], 1400)


def test_can_reach_of_an_own_address_names_the_link_that_has_it(ns: Namespace) -> None:
    """`ip route get` says `local … dev lo`, and lo was chosen, with an MTU of 65536."""
    found = choose(ns, UnderlayOptions(can_reach=IPv4Address("192.0.2.1")))
    assert (found.link_name, found.mtu, str(found.address)) == ("v0", 1400, "192.0.2.1")


def test_an_address_on_lo_goes_the_way_of_the_peers(ns: Namespace) -> None:
    """lo was the underlay, with its MTU.  Now the default route counts at first, and the peers once they are known."""
    own, peer = IPv4Address("10.1.1.1"), IPv4Address("10.1.1.2")
    ns.ip(f"address add {own}/32 dev lo")
    ns.ip(f"route add {peer} via 198.51.100.254")
    options = UnderlayOptions(public_ip=own)
    found = choose(ns, options)
    assert (found.link_name, found.mtu, found.address, found.address_link) == ("v0", 1400, own, "lo")

    moves: list[Underlay] = []

    async def move(present: Underlay) -> None:
        moves.append(present)

    peers: list[IPv4Address] = []
    with ns.background(UnderlayWatch(options, found, move, lambda: peers).run):
        peers.append(peer)
        ns.ip("route add 10.1.1.3 via 198.51.100.254")
        seconds_until(lambda: moves, 10)
        assert (moves[0].link_name, moves[0].mtu, moves[0].address) == ("v1", 1500, own)
        ns.ip(f"route change {peer} via 192.0.2.254")
        seconds_until(lambda: len(moves) == 2, 10)
        assert (moves[1].link_name, moves[1].mtu, moves[1].address) == ("v0", 1400, own)

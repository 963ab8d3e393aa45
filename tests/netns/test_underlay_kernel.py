"""underlay.pick fed by the kernel, with `ip route get` as the second opinion."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from namespace import Namespace, namespace, requires_netns

from udptun.kernel.netlink import Netlink
from udptun.kernel.underlay import Underlay, UnderlayError, UnderlayOptions, pick

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
    async def look() -> Underlay:
        async with Netlink() as kernel:
            reach = await kernel.route_get(options.can_reach) if options.can_reach else None
            return pick(options, await kernel.links(), await kernel.addresses(), await kernel.routes(), reach)

    return ns.call_async(look)


def test_the_interface_is_the_one_the_kernel_would_use(ns: Namespace) -> None:
    own = IPv4Address("192.0.2.1")
    index = ns.show("link show v0")[0]["ifindex"]
    assert choose(ns, UnderlayOptions()) == Underlay("v0", index, 1400, own, own)
    (way,) = ns.show("route get 203.0.113.1")
    assert (way["dev"], way["prefsrc"]) == ("v0", "192.0.2.1")


def test_the_default_route_of_the_better_metric_wins(ns: Namespace) -> None:
    ns.ip("route add default via 198.51.100.254 metric 50")
    assert choose(ns, UnderlayOptions()).link_name == ns.show("route get 203.0.113.1")[0]["dev"] == "v1"


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

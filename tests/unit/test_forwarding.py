"""What forwarding makes and takes back.  No kernel."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from udptun.backends.base import LiveSettings
from udptun.backends.choice import BackendChoice
from udptun.backends.hostgw import HostGw
from udptun.config.service_manager import ServiceManager
from udptun.control import forwarding
from udptun.control.forwarding import Forwarding
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.control.routing import Routing
from udptun.core.family import Family
from udptun.core.lease import Subnets
from udptun.core.network_state import IPNetwork
from udptun.core.offload import ALL
from udptun.core.ownership import Ownership
from udptun.core.tunnel import SourceCheck
from udptun.kernel.underlay import Underlay

NETWORKS: dict[Family, IPNetwork] = {
    Family.IPV4: IPv4Network("10.244.0.0/16"),
    Family.IPV6: IPv6Network("fd00:244::/48"),
}
UNDERLAY = Underlay(
    *("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1")),
    ipv6=IPv6Address("2001:db8::1"),
    public_ipv6=IPv6Address("2001:db8::1"),
)
IPV4_ALONE = LiveSettings(1500, 1, SourceCheck.PEER, ALL, probe=False)
BOTH = replace(IPV4_ALONE, ipv6_mtu=1500)
IPV6_ALONE = replace(BOTH, has_ipv4=False)
LEASES = [
    pytest.param(Subnets(IPv4Network("10.244.1.0/24")), IPV4_ALONE, id="IPv4 alone"),
    pytest.param(Subnets(None, IPv6Network("fd00:244:0:1::/64")), IPV6_ALONE, id="IPv6 alone"),
]


@pytest.mark.parametrize(("own", "live"), LEASES)
def test_a_failed_start_takes_back_what_is_marked_with_the_network_of_a_family_without_a_subnet(
    own: Subnets, live: LiveSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of a tunnel has the mark of IPv4's Network, and stayed when the lease had an IPv6 subnet alone."""
    removed: list[IPNetwork] = []

    async def remove(ownership: Ownership, keep: str = "") -> list[str]:
        removed.append(ownership.network)
        return []

    async def start(*args: object, **how: object) -> None:
        pass

    monkeypatch.setattr(forwarding, "remove_ours", remove)
    monkeypatch.setattr(Routing, "start", start)
    backend = HostGw()
    routings = [Routing(backend, family, Ownership((it,)), (it,)) for family, it in NETWORKS.items()]
    kept = KeptDescriptors(ServiceManager(), lambda state, fds: None)
    choice = BackendChoice(backend, "of the test")
    parts = Forwarding(choice, routings, UNDERLAY, BOTH, tmp_path, None, kept, was_clean=True)

    async def fail() -> None:
        await parts.start(own, live, ())
        assert parts.families == live.families
        removed.clear()
        await parts.undo_failed_start()

    asyncio.run(fail())
    assert removed == [*NETWORKS.values()]

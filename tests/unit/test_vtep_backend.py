"""The userspace VTEP as data: what it desires, what it says of itself, whom it takes for a peer."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest

from udptun.backends.base import BackendInput, Encapsulation, LiveSettings
from udptun.backends.choice import KernelSupport, choose, describe
from udptun.backends.vtep import UserspaceVtep
from udptun.backends.vxlan import VxlanKeys
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import RouteType
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import Remote, Vtep, Where
from udptun.kernel.underlay import Underlay

MAC, MAC6 = "0a:1b:2c:3d:4e:5f", "0e:1b:2c:3d:4e:5f"
NETWORK, OWN = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.3.0/24")
LEASABLE = (IPv4Network("10.244.4.0/22"), IPv4Network("10.244.8.0/24"))
UNDERLAY = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.3"), IPv4Address("198.51.100.3"))
INPUT = BackendInput(NETWORK, LEASABLE, UNDERLAY, OWN, LiveSettings(1450, 2, SourceCheck.PEER, ALL))


def lease(data: Any, kind: str = "vxlan", *, ip: str = "192.0.2.7", subnet: str = "10.244.7.0/24") -> Lease:
    attrs = LeaseAttrs(IPv4Address(ip), backend_type=kind, backend_data=data)
    return Lease(Subnets(IPv4Network(subnet)), attrs)


def backend(**keys: Any) -> UserspaceVtep:
    chosen = choose(VxlanKeys(userspace=True, **keys), KernelSupport(), MAC, ipv6_mac=MAC6).backend
    assert isinstance(chosen, UserspaceVtep)
    return chosen


def encapsulation(family: Family = Family.IPV4, **keys: Any) -> Encapsulation:
    (found,) = (it for it in backend(**keys).encapsulations if family in it.families)
    return found


def test_vtep_stands_in_where_the_kernel_has_no_vxlan() -> None:
    lacking = KernelSupport(no_vxlan="EOPNOTSUPP")
    choice = choose(VxlanKeys(), lacking, MAC)
    assert isinstance(choice.backend, UserspaceVtep)
    assert choice.reason == "the kernel has no vxlan (EOPNOTSUPP): userspace VTEP"
    how = "userspace VTEP, to its peers like the kernel's, which this kernel does not have"
    assert ("vxlan", True, how) in describe(lacking)
    (row,) = [row for row in describe(KernelSupport("ENOENT", "EOPNOTSUPP")) if row[0] == "vxlan"]
    assert row[1] is False
    assert "TUN" in row[2]


def test_lease_says_what_flannels_says_and_then_what_flannel_ignores() -> None:
    value = json.loads(backend(vni=7).attrs(UNDERLAY, INPUT.live, "f" * 32).to_json())
    assert (value["PublicIP"], value["BackendType"]) == ("198.51.100.3", "vxlan")
    assert list(value["BackendData"].items()) == [
        ("VNI", 7),
        ("VtepMAC", MAC),
        ("NodeID", "f" * 32),
        ("Udptun", 1),
    ]


def test_device_has_flannels_name_and_one_route_leads_to_all_peers() -> None:
    state = backend(vni=7).desired(INPUT)
    assert [(link.name, link.mtu) for link in state.links] == [("flannel.7", 1450)]
    assert [(it.link, str(it.ip), it.prefixlen) for it in state.addresses] == [("flannel.7", "10.244.3.0", 32)]
    # Our own subnet is outside of what can be leased: it is guarded, and its packets are the bridge's.
    assert [(route.dst, route.link, route.type) for route in state.routes_beside(())] == [
        *((prefix, None, RouteType.UNREACHABLE) for prefix in (*LEASABLE, OWN)),
        *((prefix, "flannel.7", RouteType.UNICAST) for prefix in LEASABLE),
    ]


def test_direct_routing_prefers_a_plain_route_where_there_is_no_gateway() -> None:
    near, far = lease({"VtepMAC": MAC}), lease({"VtepMAC": MAC}, ip="203.0.113.9", subnet="10.244.8.0/24")
    inputs = replace(INPUT, peers=(near, far), direct={near.attrs.public_ip: 2})
    it = backend(direct_routing=True)
    assert it.asks_direct
    routes = [route for route in it.desired(inputs).routes_beside(()) if route.type is RouteType.UNICAST]
    assert [(route.dst, route.gateway, route.link, route.oif) for route in routes] == [
        (near.subnet, near.attrs.public_ip, None, 2),
        *((prefix, None, "flannel.1", None) for prefix in LEASABLE),
    ]
    assert not backend().asks_direct


def test_datapath_is_told_vni_addresses_and_port() -> None:
    it = encapsulation(vni=7, port=4789)
    settings = it.packet_settings({Family.IPV4: INPUT})
    assert settings.vtep == Vtep(7, bytes.fromhex("0a1b2c3d4e5f"))
    assert (settings.mtu, settings.underlay_address) == (1450, UNDERLAY.address)
    # Whatever port the lease names: with VXLAN all nodes have one.
    peer = lease({"VNI": 1, "VtepMAC": "02:00:00:00:00:07", "Port": 9999, "Udptun": 1})
    mac = bytes.fromhex("020000000007")
    assert it.remote(peer) == Remote(IPv4Address("192.0.2.7"), 4789, True, True, mac, carries_ecn=True)
    assert it.n_senders(UNDERLAY, INPUT.live) > 1


@pytest.mark.parametrize("mac", ["02:00:00:00:00:07", "A6:B5:C4:D3:E2:F1", "00:16:3e:00:00:01"])
def test_lease_with_a_vtep_mac_is_a_peer_whatever_its_vni(mac: str) -> None:
    peer = lease({"VNI": 99, "VtepMAC": mac})
    assert backend().refusal(peer) is None
    assert encapsulation().remote(peer).mac.hex(":") == mac.lower()


@pytest.mark.parametrize(
    "data",
    [
        None,
        "VtepMAC",
        [],
        {},
        {"VNI": 1},
        {"VtepMAC": None},
        {"VtepMAC": 7},
        {"VtepMAC": ""},
        {"VtepMAC": "02:00:00:00:00"},
        {"VtepMAC": "02:00:00:00:00:07:08"},
        {"VtepMAC": "02-00-00-00-00-07"},
        {"VtepMAC": "02:00:00:00:00:0g"},
        {"VtepMAC": "02:00:00:00:00:07\n"},
        {"VtepMAC": "00:00:00:00:00:00"},
        {"VtepMAC": "ff:ff:ff:ff:ff:ff"},
        {"VtepMAC": "01:00:5e:00:00:01"},
    ],
    ids=str,
)
def test_lease_without_a_usable_vtep_mac_is_refused_by_name(data: Any) -> None:
    reason = backend().refusal(lease(data))
    assert reason is not None
    assert "VtepMAC" in reason


@pytest.mark.parametrize("kind", ["", "udp", "host-gw", "VXLAN"])
def test_lease_of_another_backend_is_refused_by_name(kind: str) -> None:
    reason = backend().refusal(lease({"VNI": 1, "VtepMAC": MAC}, kind))
    assert reason is not None
    assert (kind or "empty") in reason


@pytest.mark.parametrize("vni", [0, 1, 7, (1 << 24) - 1])
def test_prefix_is_vxlan_and_inner_ethernet(vni: int) -> None:
    for version, ethertype in ((4, "08 00"), (6, "86 dd")):
        prefix = Vtep(vni, bytes.fromhex("0a1b2c3d4e5f")).prefix(bytes.fromhex("020000000007"), version).hex(" ")
        assert prefix == f"08 00 00 00 {vni.to_bytes(3).hex(' ')} 00 02 00 00 00 00 07 0a 1b 2c 3d 4e 5f {ethertype}"


NETWORK6, OWN6 = IPv6Network("fd00:244::/48"), IPv6Network("fd00:244:0:3::/64")
HERE6, THERE6 = IPv6Address("2001:db8::3"), IPv6Address("2001:db8::7")
DUAL = replace(UNDERLAY, ipv6=HERE6, public_ipv6=HERE6)
INPUT6 = BackendInput(
    NETWORK6, (NETWORK6,), DUAL, OWN6, replace(INPUT.live, ipv6_mtu=1430), family=Family.IPV6
)


def peer_of_both() -> Lease:
    subnets = Subnets(IPv4Network("10.244.7.0/24"), IPv6Network("fd00:244:0:7::/64"))
    data = ({"VNI": 1, "VtepMAC": "02:00:00:00:00:07"}, {"VNI": 1, "VtepMAC": "02:00:00:00:00:08"})
    return Lease(subnets, LeaseAttrs(IPv4Address("192.0.2.7"), THERE6, "vxlan", *data))


def test_each_family_has_a_device_and_a_datapath_of_its_own() -> None:
    """IPv6 was not carried.  Its lease, its device's name and its MTU are those of the kernel's."""
    it = backend(vni=7)
    assert [(of.device, of.families) for of in it.encapsulations] == [
        ("flannel.7", {Family.IPV4}),
        ("flannel-v6.7", {Family.IPV6}),
    ]
    assert it.attrs(DUAL, INPUT6.live, "n") == choose(
        VxlanKeys(vni=7), KernelSupport(), MAC, ipv6_mac=MAC6
    ).backend.attrs(DUAL, INPUT6.live, "n")
    state = it.desired(INPUT6)
    assert [(link.name, link.mtu) for link in state.links] == [("flannel-v6.7", 1430)]
    assert [(a.link, str(a.ip), a.prefixlen) for a in state.addresses] == [("flannel-v6.7", "fd00:244:0:3::", 128)]
    assert {route.link for route in state.routes_beside(()) if route.type is RouteType.UNICAST} == {"flannel-v6.7"}
    # Neither says anything of the other family.
    assert it.desired(replace(INPUT, live=INPUT6.live)).links[0].mtu == 1450


def test_the_datapath_of_ipv6_is_told_of_ipv6_alone() -> None:
    it = encapsulation(Family.IPV6, vni=7, port=4789)
    assert it.where(DUAL) == Where(HERE6, 4789)
    settings = it.packet_settings({Family.IPV6: INPUT6})
    assert settings.vtep == Vtep(7, bytes.fromhex("0e1b2c3d4e5f"))
    assert (settings.mtu, settings.underlay_address, settings.port) == (1430, HERE6, 4789)
    assert settings.tunnel_addresses == {6: OWN6.network_address}
    mac = bytes.fromhex("020000000008")
    assert it.remote(peer_of_both()) == Remote(THERE6, 4789, False, True, mac, carries_ecn=True)
    assert settings.less_for(it.remote(peer_of_both())) == 0


def test_a_lease_may_be_a_peer_by_one_family_alone() -> None:
    whole = peer_of_both()
    assert [backend().refusal(whole, family) for family in Family] == [None, None]
    without = replace(whole, attrs=replace(whole.attrs, backend_v6_data=None))
    assert backend().refusal(without) is None
    assert backend().refusal(without, Family.IPV6) == "its BackendV6Data has no VtepMAC that is a unicast MAC address"


def test_ipv6_peers_without_a_gateway_get_plain_routes() -> None:
    inputs = replace(INPUT6, peers=(peer_of_both(),), direct={THERE6: 2})
    (route,) = backend(direct_routing=True).desired(inputs).routes
    assert (route.dst, route.gateway, route.oif) == (IPv6Network("fd00:244:0:7::/64"), THERE6, 2)

"""What each backend says and desires, and which one a host gets.  No kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range

import pytest

from udptun.backends.alloc import Alloc, AllocKeys
from udptun.backends.base import Backend, BackendInput, LiveSettings
from udptun.backends.choice import BackendChoice, KernelSupport, choose, describe
from udptun.backends.hostgw import HostGw, HostGwKeys
from udptun.backends.udp import Udp, UdpKeys
from udptun.backends.vtep import UserspaceVtep
from udptun.backends.vxlan import Fallback, KernelVxlan, VxlanKeys
from udptun.config.net_conf import BackendKeys, replace_live_keys
from udptun.core.desired import DesiredFdb, DesiredNeighbour, DesiredRoute, DesiredState
from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.lease import Json, Lease, LeaseAttrs, Subnets
from udptun.core.network_state import RouteType, Vxlan
from udptun.core.offload import ALL
from udptun.core.tunnel import ShortcutMode, SourceCheck
from udptun.datapath.settings import Where
from udptun.kernel.underlay import Underlay

NETWORK = IPv4Network("10.244.0.0/16")
UNDERLAY = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
BEHIND_NAT = replace(UNDERLAY, public_ip=IPv4Address("203.0.113.7"))
LIVE = LiveSettings(1450, 1, SourceCheck.PEER, ALL)
MAC = "02:00:00:00:00:01"
NO_MAC = "its BackendData has no VtepMAC that is a unicast MAC address"
LEASABLE = tuple(summarize_address_range(IPv4Address("10.244.1.0"), IPv4Address("10.244.255.255")))


def lease(number: int, kind: str = "vxlan", data: Json = None) -> Lease:
    """Of 192.0.2.`number`, with the subnet and the MAC of that number."""
    data = data or {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{number:02X}"}
    attrs = LeaseAttrs(IPv4Address(f"192.0.2.{number}"), backend_type=kind, backend_data=data)
    return Lease(Subnets(IPv4Network(f"10.244.{number}.0/24")), attrs)


def inputs(*peers: Lease, **changes: object) -> BackendInput:
    return replace(BackendInput(NETWORK, LEASABLE, UNDERLAY, IPv4Network("10.244.1.0/24"), LIVE, peers), **changes)  # type: ignore[arg-type]  # of the caller


# --- vxlan


def test_vxlan_desires_flannels_device_and_three_things_for_each_peer() -> None:
    desired = KernelVxlan(VxlanKeys(), MAC).desired(inputs(lease(2), lease(3)))
    (link,) = desired.links
    assert (link.name, link.mtu, link.mac) == ("flannel.1", 1450, MAC)
    assert link.vxlan == Vxlan(1, IPv4Address("192.0.2.1"), 2, 8472, learning=False, gbp=False)
    assert [(sysctl.path, sysctl.value) for sysctl in link.sysctls] == [("net/ipv6/conf/flannel.1/accept_ra", "0")]
    assert [(str(a.ip), a.prefixlen) for a in desired.addresses] == [("10.244.1.0", 32)]
    second, third = IPv4Address("10.244.2.0"), IPv4Address("10.244.3.0")
    assert desired.neighbours == (
        DesiredNeighbour("flannel.1", second, "02:00:00:00:00:02"),
        DesiredNeighbour("flannel.1", third, "02:00:00:00:00:03"),
    )
    assert desired.fdb == (
        DesiredFdb("flannel.1", "02:00:00:00:00:02", IPv4Address("192.0.2.2")),
        DesiredFdb("flannel.1", "02:00:00:00:00:03", IPv4Address("192.0.2.3")),
    )
    assert desired.routes_beside(()) == (
        *(DesiredRoute(prefix, type=RouteType.UNREACHABLE, metric=0xFFFFFFFF) for prefix in LEASABLE),
        DesiredRoute(IPv4Network("10.244.2.0/24"), "flannel.1", gateway=second, onlink=True),
        DesiredRoute(IPv4Network("10.244.3.0/24"), "flannel.1", gateway=third, onlink=True),
    )


IPV6 = IPv6Address("2001:db8::1")
DUAL = replace(UNDERLAY, ipv6=IPV6, public_ipv6=IPV6)
IPV6_MAC = "02:00:00:00:06:01"


def ipv6_inputs(*numbers: int, **changes: object) -> BackendInput:
    """With the peers of these numbers, each with both families."""
    network = IPv6Network("fd00:244::/48")
    peers = [
        Lease(
            Subnets(lease(number).subnet, IPv6Network(f"fd00:244:0:{number}::/64")),
            replace(
                lease(number).attrs,
                public_ipv6=IPv6Address(f"2001:db8::{number}"),
                backend_v6_data={"VNI": 1, "VtepMAC": f"02:00:00:00:06:{number:02x}"},
            ),
        )
        for number in numbers
    ]
    own = IPv6Network("fd00:244:0:1::/64")
    live = replace(LIVE, ipv6_mtu=1430)
    inputs = BackendInput(network, (network,), DUAL, own, live, peers, family=Family.IPV6)
    return replace(inputs, **changes)  # type: ignore[arg-type]  # of the caller


def test_vxlan_desires_the_same_of_ipv6_on_a_second_device() -> None:
    desired = KernelVxlan(VxlanKeys(), MAC, IPV6_MAC).desired(ipv6_inputs(2))
    (link,) = desired.links
    assert (link.name, link.mtu, link.mac) == ("flannel-v6.1", 1430, IPV6_MAC)
    assert link.vxlan == Vxlan(1, IPV6, 2, 8472, learning=False, gbp=False)
    assert [(str(a.ip), a.prefixlen) for a in desired.addresses] == [("fd00:244:0:1::", 128)]
    second = IPv6Address("fd00:244:0:2::")
    assert desired.neighbours == (DesiredNeighbour("flannel-v6.1", second, "02:00:00:00:06:02"),)
    assert desired.fdb == (DesiredFdb("flannel-v6.1", "02:00:00:00:06:02", IPv6Address("2001:db8::2")),)
    assert desired.routes_beside(()) == (
        DesiredRoute(IPv6Network("fd00:244::/48"), type=RouteType.UNREACHABLE, metric=0xFFFFFFFF),
        DesiredRoute(IPv6Network("fd00:244:0:2::/64"), "flannel-v6.1", gateway=second, onlink=True),
    )


def test_a_peer_that_is_reached_directly_by_ipv6_gets_a_plain_route_alone() -> None:
    backend = KernelVxlan(VxlanKeys(direct_routing=True), MAC, IPV6_MAC)
    gateway = IPv6Address("2001:db8::2")
    desired = backend.desired(ipv6_inputs(2, 3, direct={gateway: 5}))
    assert desired.routes[0] == DesiredRoute(IPv6Network("fd00:244:0:2::/64"), gateway=gateway, oif=5)
    assert [str(e.dst) for e in desired.fdb] == ["2001:db8::3"]


def test_host_gw_has_each_peer_lead_to_its_ipv6_subnet() -> None:
    gateway = IPv6Address("2001:db8::2")
    assert HostGw().desired(ipv6_inputs(2)) == DesiredState(
        routes=(DesiredRoute(IPv6Network("fd00:244:0:2::/64"), gateway=gateway, oif=2),)
    )
    with pytest.raises(UdptunError, match=r"^your PublicIPv6 2001:db8::9 differs from the interface's 2001:db8::1, "):
        HostGw().attrs(replace(DUAL, public_ipv6=IPv6Address("2001:db8::9")), LIVE, "n" * 32)


def test_leases_of_both_families_are_flannels_key_for_key() -> None:
    attrs = KernelVxlan(VxlanKeys(), MAC, IPV6_MAC).attrs(DUAL, LIVE, "n" * 32)
    assert attrs.to_json() == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{MAC}","NodeID":"{"n" * 32}","Udptun":1}},'
        f'"BackendV6Data":{{"VNI":1,"VtepMAC":"{IPV6_MAC}"}}}}'
    )
    ipv6_alone = replace(DUAL, address=None, public_ip=None)
    assert KernelVxlan(VxlanKeys(), MAC, IPV6_MAC).attrs(ipv6_alone, LIVE, "n" * 32).to_json() == (
        '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"vxlan",'
        f'"BackendData":{{"NodeID":"{"n" * 32}","Udptun":1}},'
        f'"BackendV6Data":{{"VNI":1,"VtepMAC":"{IPV6_MAC}"}}}}'
    )
    assert HostGw().attrs(DUAL, LIVE, "n" * 32).public_ipv6 == IPV6
    assert Alloc().attrs(DUAL, LIVE, "n" * 32).public_ipv6 == IPV6


def test_a_vtep_without_a_mac_for_ipv6_is_a_peer_by_ipv4_alone() -> None:
    backend, (peer,) = KernelVxlan(VxlanKeys(), MAC, IPV6_MAC), ipv6_inputs(2).peers
    without = replace(peer, attrs=replace(peer.attrs, backend_v6_data=None))
    assert backend.refusal(without) is None
    assert backend.refusal(without, Family.IPV6) == (
        "its BackendV6Data has no VtepMAC that is a unicast MAC address"
    )
    assert backend.refusal(peer, Family.IPV6) is None


def test_vxlan_sends_from_the_interfaces_own_address_behind_a_nat() -> None:
    desired = KernelVxlan(VxlanKeys(), MAC).desired(inputs(underlay=BEHIND_NAT))
    assert desired.links[0].vxlan is not None
    assert desired.links[0].vxlan.local == UNDERLAY.address


def test_a_peer_that_is_reached_directly_gets_a_plain_route_alone() -> None:
    backend = KernelVxlan(VxlanKeys(direct_routing=True), MAC)
    desired = backend.desired(inputs(lease(2), lease(3), direct={IPv4Address("192.0.2.2"): 5}))
    assert backend.asks_direct
    assert desired.routes[0] == DesiredRoute(IPv4Network("10.244.2.0/24"), gateway=IPv4Address("192.0.2.2"), oif=5)
    assert [str(n.ip) for n in desired.neighbours] == ["10.244.3.0"]
    assert [str(e.dst) for e in desired.fdb] == ["192.0.2.3"]


def test_vxlan_leases_have_flannels_two_keys_first() -> None:
    for backend in (KernelVxlan(VxlanKeys(vni=7), MAC), UserspaceVtep(VxlanKeys(vni=7), MAC)):
        attrs = backend.attrs(BEHIND_NAT, LIVE, "n" * 32)
        assert (attrs.public_ip, attrs.backend_type) == (BEHIND_NAT.public_ip, "vxlan")
        assert list(attrs.backend_data.items())[:2] == [("VNI", 7), ("VtepMAC", MAC)]
        assert attrs.node_id == "n" * 32


def test_a_udp_lease_takes_any_source_port_unless_a_nat_is_before_the_host() -> None:
    here, behind_nat = (Udp(8285).attrs(it, LIVE, "n" * 32) for it in (UNDERLAY, BEHIND_NAT))
    assert list(here.backend_data) == ["Port", "NodeID", "Udptun", "AnySourcePort"]
    assert here.takes_any_source_port
    assert list(behind_nat.backend_data) == ["Port", "NodeID", "Udptun"]
    peers = [Lease(Subnets(IPv4Network("10.244.7.0/24")), attrs) for attrs in (here, behind_nat)]
    assert [Udp(8285).remote(peer).takes_any_source_port for peer in peers] == [True, False]
    assert not Udp(8285).remote(lease(2, "", {"x": 1})).takes_any_source_port


def test_a_udp_lease_says_that_the_kernel_takes_packets_only_while_it_does() -> None:
    wanted = replace(LIVE, shortcut=ShortcutMode.AUTO)
    here, off = (Udp(8285).attrs(UNDERLAY, replace(wanted, takes_shortcut=it), "n" * 32) for it in (True, False))
    assert list(here.backend_data) == ["Port", "NodeID", "Udptun", "AnySourcePort", "Shortcut"]
    peers = [Lease(Subnets(IPv4Network("10.244.7.0/24")), attrs) for attrs in (here, off)]
    assert [Udp(8285).remote(peer).takes_shortcut for peer in peers] == [True, False]


def test_a_udp_lease_says_that_marks_of_congestion_are_carried_on_where_all_of_them_are() -> None:
    here, deaf = (Udp(8285).attrs(UNDERLAY, replace(LIVE, carries_ecn=it), "n" * 32) for it in (True, False))
    assert list(here.backend_data) == ["Port", "NodeID", "Udptun", "AnySourcePort", "ECN"]
    assert (here.carries_ecn, deaf.carries_ecn) == (True, False)
    peers = [Lease(Subnets(IPv4Network("10.244.7.0/24")), attrs) for attrs in (here, deaf)]
    assert [Udp(8285).remote(peer).carries_ecn for peer in peers] == [True, False]
    of_ipv4, _of_ipv6 = UserspaceVtep(VxlanKeys(), MAC).encapsulations
    assert of_ipv4.remote(lease(2)).carries_ecn, "as the kernel does with VXLAN"


@pytest.mark.parametrize(("source_ports", "n_senders"), [(1, 0), (2, 2), (16, 16)])
def test_udp_sends_from_one_port_unless_more_are_asked_for_and_no_nat_wants_the_one(
    source_ports: int, n_senders: int
) -> None:
    live = replace(LIVE, source_ports=source_ports)
    assert Udp(8285).n_senders(UNDERLAY, live) == n_senders
    assert Udp(8285).n_senders(BEHIND_NAT, live) == 0


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lease(2, data={"VNI": 9, "VtepMAC": "02:00:00:00:00:02"}), None),
        (lease(2, "host-gw"), "its BackendType is host-gw, not vxlan"),
        (lease(2, "", {"Port": 8285}), "its BackendType is empty, not vxlan"),
        (lease(2, data={"VNI": 1}), NO_MAC),
        (lease(2, data=["x"]), NO_MAC),
        (lease(2, data={"VtepMAC": "01:00:5e:00:00:02"}), NO_MAC),
        (lease(2, data={"VtepMAC": "00:00:00:00:00:00"}), NO_MAC),
        (lease(2, data={"VtepMAC": "02:00:00:00:00:02\n"}), NO_MAC),
    ],
)
def test_which_leases_are_peers_of_a_vtep(other: Lease, reason: str | None) -> None:
    assert KernelVxlan(VxlanKeys(), MAC).refusal(other) == reason
    assert UserspaceVtep(VxlanKeys(), MAC).refusal(other) == reason


# --- the others


def test_udp_takes_any_lease_for_a_peer() -> None:
    for other in (lease(2), lease(2, "host-gw"), lease(2, "", {"Port": 9000})):
        assert Udp(8285).refusal(other) is None


def test_udp_takes_leases_whose_hosts_say_so_for_peers_by_ipv6() -> None:
    """flannel's udp, and udptun's of before, drop what they get of IPv6."""
    backend, live = Udp(8285), replace(LIVE, ipv6_mtu=1450)
    attrs = backend.attrs(UNDERLAY, live, "n" * 32)
    assert attrs.backend_data["IPv6"] is True
    assert (attrs.public_ipv6, attrs.backend_v6_data) == (None, None)
    assert "IPv6" not in backend.attrs(UNDERLAY, LIVE, "n" * 32).backend_data
    assert backend.outer(attrs, Family.IPV6) is Family.IPV4
    peer = replace(lease(2, "udp"), attrs=attrs)
    assert backend.refusal(peer, Family.IPV6) is None
    reason = "its host does not take IPv6 in Type udp: it runs flannel, an earlier udptun, or cannot carry IPv6"
    for other in (lease(2, ""), lease(2, "udp", {"Udptun": 1}), lease(2, "udp", {"Udptun": 1, "IPv6": "yes"})):
        assert backend.refusal(other, Family.IPV6) == reason


def test_udp_goes_to_a_host_by_ipv4_where_both_have_it_and_else_by_ipv6() -> None:
    ours, theirs = IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")
    dual_stack = replace(UNDERLAY, ipv6=ours, public_ipv6=ours)
    ipv6_alone = replace(dual_stack, address=None, public_ip=None)
    ipv4_attrs = lease(2).attrs
    both_attrs = replace(ipv4_attrs, public_ipv6=theirs)
    ipv6_attrs = replace(both_attrs, public_ip=None)
    first = UNDERLAY.address
    assert first is not None
    for underlay, where, overhead, reached in (
        (UNDERLAY, Where(first, 8285), 28, (ipv4_attrs.public_ip, ipv4_attrs.public_ip, None)),
        (dual_stack, Where(first, 8285, ours), 28, (ipv4_attrs.public_ip, ipv4_attrs.public_ip, theirs)),
        (ipv6_alone, Where(ours, 8285), 48, (None, theirs, theirs)),
    ):
        backend = Udp(8285, outer=underlay.families)
        assert (backend.where(underlay), backend.overhead, backend.ipv6_overhead) == (where, overhead, overhead)
        for attrs, address in zip((ipv4_attrs, both_attrs, ipv6_attrs), reached, strict=True):
            for family in Family:
                assert attrs.address(backend.outer(attrs, family)) == address
            if address is not None:
                assert backend.remote(replace(lease(2), attrs=attrs)).address == address
        said = backend.attrs(underlay, LIVE, "n" * 32)
        assert (said.public_ip, said.public_ipv6) == (underlay.public_ip, underlay.public_ipv6)


def test_datapath_is_told_of_the_families_that_are_carried() -> None:
    backend = Udp(8285)
    both = backend.packet_settings({Family.IPV4: inputs(), Family.IPV6: ipv6_inputs()})
    assert (both.network, both.network_ipv6) == (NETWORK, IPv6Network("fd00:244::/48"))
    assert both.tunnel_addresses == {4: IPv4Address("10.244.1.0"), 6: IPv6Address("fd00:244:0:1::")}
    assert backend.packet_settings({Family.IPV4: inputs()}).tunnel_addresses == {4: IPv4Address("10.244.1.0")}
    alone = backend.packet_settings({Family.IPV6: ipv6_inputs()})
    assert alone.tunnel_addresses == {6: IPv6Address("fd00:244:0:1::")}
    assert (alone.network, alone.own_subnet) == (None, None)


def test_udp_desires_the_same_of_both_families_on_one_device() -> None:
    backend, live = Udp(8285), replace(LIVE, ipv6_mtu=1450)
    ipv4, ipv6 = backend.desired(inputs(lease(2), live=live)), backend.desired(ipv6_inputs(2, live=live))
    assert ipv4.links == ipv6.links
    assert [(sysctl.path, sysctl.value) for sysctl in ipv6.links[0].sysctls] == [
        ("net/ipv4/conf/flannel0/accept_local", "1"),
        ("net/ipv6/conf/flannel0/addr_gen_mode", "1"),
        ("net/ipv6/conf/flannel0/accept_ra", "0"),
        ("net/ipv6/conf/flannel0/disable_ipv6", "0"),
    ]
    assert [(str(a.ip), a.prefixlen) for a in ipv6.addresses] == [("fd00:244:0:1::", 128)]
    network = IPv6Network("fd00:244::/48")
    assert ipv6.routes == (
        DesiredRoute(network, type=RouteType.UNREACHABLE, metric=0xFFFFFFFF),
        DesiredRoute(network, "flannel0"),
    )


def test_host_gw_desires_a_route_through_each_peer_and_nothing_else() -> None:
    desired = HostGw().desired(inputs(lease(2, "host-gw"), lease(3, "host-gw")))
    assert desired == DesiredState(
        routes=(
            DesiredRoute(IPv4Network("10.244.2.0/24"), gateway=IPv4Address("192.0.2.2"), oif=2),
            DesiredRoute(IPv4Network("10.244.3.0/24"), gateway=IPv4Address("192.0.2.3"), oif=2),
        )
    )
    assert HostGw().refusal(lease(2)) == "its BackendType is vxlan, not host-gw"
    assert HostGw().attrs(UNDERLAY, LIVE, "n").backend_type == "host-gw"
    with pytest.raises(UdptunError, match="your PublicIP differs from interface IP") as caught:
        HostGw().attrs(BEHIND_NAT, LIVE, "n")
    assert caught.value.exit_status == 1


def test_alloc_desires_nothing_and_its_lease_has_no_type() -> None:
    assert Alloc().desired(inputs(lease(2))) == DesiredState()
    assert Alloc().attrs(UNDERLAY, LIVE, "n").backend_type == ""


# --- the choice

ALL_SUPPORTED = KernelSupport()
NO_VXLAN = KernelSupport(no_vxlan="EOPNOTSUPP")


@pytest.mark.parametrize(
    ("conf", "support", "kind", "reason"),
    [
        (UdpKeys(), ALL_SUPPORTED, Udp, "as configured"),
        (HostGwKeys(), NO_VXLAN, HostGw, "as configured"),
        (AllocKeys(), ALL_SUPPORTED, Alloc, "as configured"),
        (VxlanKeys(), ALL_SUPPORTED, KernelVxlan, "the kernel has vxlan"),
        (VxlanKeys(), NO_VXLAN, UserspaceVtep, "the kernel has no vxlan (EOPNOTSUPP): userspace VTEP"),
        (VxlanKeys(userspace=True), ALL_SUPPORTED, UserspaceVtep, "Backend.Userspace is true: userspace VTEP"),
        (VxlanKeys(userspace=True, fallback=Fallback.UDP), ALL_SUPPORTED, UserspaceVtep, "Backend.Userspace"),
        (VxlanKeys(fallback=Fallback.UDP), ALL_SUPPORTED, KernelVxlan, "the kernel has vxlan"),
        (VxlanKeys(fallback=Fallback.UDP), NO_VXLAN, Udp, "the kernel has no vxlan (EOPNOTSUPP) and Backend."),
    ],
)
def test_the_choice_and_its_reason(conf: BackendKeys, support: KernelSupport, kind: type[Backend], reason: str) -> None:
    choice = choose(conf, support, MAC)
    assert type(choice.backend) is kind
    assert choice.reason.startswith(reason)


def test_without_a_fallback_there_is_no_vxlan_without_the_kernels() -> None:
    with pytest.raises(UdptunError, match=r"cannot create flannel\.3 \(vxlan id 3\): the kernel has no vxlan"):
        choose(VxlanKeys(vni=3, fallback=Fallback.NONE), NO_VXLAN, MAC)


def test_the_fallback_udp_listens_on_flannels_udp_port_not_on_vxlans() -> None:
    choice = choose(VxlanKeys(port=4789, fallback=Fallback.UDP), NO_VXLAN, MAC)
    assert isinstance(choice, BackendChoice)
    (encapsulation,) = choice.backend.encapsulations
    assert encapsulation.where(UNDERLAY).port == 8285


def test_what_a_host_can_do_is_described_type_by_type() -> None:
    assert [(name, works) for name, works, _ in describe(KernelSupport())] == [
        ("udp", True),
        ("vxlan", True),
        ("host-gw", True),
        ("alloc", True),
    ]
    bare = {name: (works, reason) for name, works, reason in describe(KernelSupport("ENOENT", "EOPNOTSUPP"))}
    assert not bare["udp"][0]
    assert not bare["vxlan"][0]
    assert "there is no TUN device (ENOENT)" in bare["vxlan"][1]
    assert bare["host-gw"][0]
    assert [reason[:14] for name, works, reason in describe(NO_VXLAN) if name == "vxlan"] == ["userspace VTEP"]


def test_only_keys_that_can_change_while_packets_flow_are_taken_over() -> None:
    old, new = VxlanKeys(vni=1, mtu=1500), VxlanKeys(vni=2, mtu=1400)
    assert replace_live_keys(old, new) == VxlanKeys(vni=1, mtu=1400)
    assert replace_live_keys(old, UdpKeys(mtu=1400)) == old

"""The vxlan backend: the kernel's VXLAN device, set up as flannel does (pkg/backend/vxlan).  Pure.

Each peer is a permanent neighbour (its tunnel address has its VTEP's MAC), a permanent fdb entry (that MAC is at its
PublicIP) and a route through its tunnel address.  With DirectRouting, a peer without a router in between is a plain
route instead.  IPv6 has a second device, `flannel-v6.<VNI>`, between the hosts' IPv6 addresses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from udptun.backends.base import BackendInput, LiveSettings, OverSameFamily, TunnelKeys
from udptun.config.go_json import boolean, choice, integer, key
from udptun.core.desired import (
    DesiredAddress,
    DesiredFdb,
    DesiredLink,
    DesiredNeighbour,
    DesiredRoute,
    DesiredState,
    Sysctl,
)
from udptun.core.errors import one_line
from udptun.core.family import Family
from udptun.core.lease import Json, Lease, LeaseAttrs, LeasePart
from udptun.core.network_state import Vxlan
from udptun.core.tunnel import PORTS
from udptun.kernel.underlay import Underlay

VXLAN_OVERHEAD = 50
"""IPv4 header 20 + UDP header 8 + VXLAN header 8 + inner Ethernet header 14 (RFC 7348; flannel vxlan/device.go)."""

VXLAN_IPV6_OVERHEAD = 70
"""The same with an IPv6 header, 40.  flannel leaves 50 bytes free for both, and then full-size packets do not fit."""

VNIS = range(1 << 24)
"""VXLAN network identifiers (RFC 7348)."""


class Fallback(Enum):
    """What stands in for `Type: vxlan` on a host whose kernel has none."""

    VTEP = "vtep"
    """A userspace VTEP, to the peers like any other."""
    UDP = "udp"
    """The udp backend; only peers that run udptun, and udp themselves, reach this host."""
    NONE = "none"
    """Nothing: fail, as flannel does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VxlanKeys(TunnelKeys):
    """`Backend` of Type vxlan (flannel, pkg/backend/vxlan/vxlan.go), and what a stand-in for the kernel's needs.

    The default `port` is that of the kernel (drivers/net/vxlan); IANA's is 4789.  `userspace`: use the userspace VTEP
    although the kernel has vxlan.
    """

    type: ClassVar[str] = "vxlan"
    vni: int = key("VNI", integer(VNIS), 1)
    port: int = key("Port", integer(PORTS, zero_is_unset=True), 8472)
    gbp: bool = key("GBP", boolean, False)
    learning: bool = key("Learning", boolean, False)
    direct_routing: bool = key("DirectRouting", boolean, False)
    userspace: bool = key("Userspace", boolean, False)
    fallback: Fallback = key("Fallback", choice({it.value: it for it in Fallback}), Fallback.VTEP)


class KernelVxlan(OverSameFamily):
    """See `Backend`."""

    type = VxlanKeys.type
    summary = "the kernel's VXLAN device"
    overhead = VXLAN_OVERHEAD
    ipv6_overhead = VXLAN_IPV6_OVERHEAD
    encapsulations = ()
    routes_network = False
    peer_types = frozenset((VxlanKeys.type,))
    needs_backend_data = True

    def __init__(self, keys: VxlanKeys, mac: str, ipv6_mac: str = "") -> None:
        """`mac` is our VTEP's (`aa:bb:cc:dd:ee:ff`), `ipv6_mac` that of IPv6.  Both stay the same from run to run."""
        self.asks_direct = keys.direct_routing
        self.ports = (keys.port, keys.port)
        self._keys = keys
        self._macs = {Family.IPV4: mac, Family.IPV6: ipv6_mac}

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        return lease_attrs(self._keys.vni, self._macs, underlay, node_id)

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        return refusal(lease, family)

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[DesiredLink]:
        keys, device = self._keys, device_name(self._keys.vni, family)
        # Not the PublicIP, which flannel takes since 0.27.4: behind a NAT that is another machine's address.
        # Where routes choose the interface there may be several; none is named then.
        lower_index = 0 if underlay.is_routed else underlay.link_index
        local = underlay.address_of(family)
        vxlan = Vxlan(keys.vni, local, lower_index, keys.port, keys.learning, keys.gbp)
        # All addresses and routes of the tunnel come from the leases.
        sysctls = [
            Sysctl(
                f"net/ipv6/conf/{device}/accept_ra",
                "0",
                "this host takes IPv6 addresses and routes that a peer advertises in the tunnel",
            )
        ]
        if family is Family.IPV6:
            sysctls.append(
                Sysctl(
                    f"net/ipv6/conf/{device}/accept_dad",
                    "0",
                    "the tunnel's own address can be used a second after the device is made, and not at once",
                )
            )
        return (DesiredLink(device, live.mtu_of(family), 0, tuple(sysctls), vxlan, self._macs[family]),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        device, own = device_name(self._keys.vni, inputs.family), inputs.own_subnet
        tunnelled = [part for part in inputs.parts if part.public_ip not in inputs.direct]
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live, inputs.family),
            addresses=(DesiredAddress(device, own.network_address, own.max_prefixlen),),
            routes=tuple(routes(device, inputs)),
            neighbours=tuple(DesiredNeighbour(device, part.subnet.network_address, mac_in(part)) for part in tunnelled),
            fdb=tuple(DesiredFdb(device, mac_in(part), part.public_ip) for part in tunnelled),
            pods=inputs.pods(inputs.leasable),
        )


def device_name(vni: int, family: Family = Family.IPV4) -> str:
    """flannel's."""
    return f"flannel.{vni}" if family is Family.IPV4 else f"flannel-v6.{vni}"


def lease_attrs(vni: int, macs: Mapping[Family, str], underlay: Underlay, node_id: str) -> LeaseAttrs:
    """What a VTEP's lease says: flannel's two keys, and then ours, which flannel ignores.

    `macs` has a MAC for each family that it carries.  Of a family without a public address the lease says nothing.
    """
    public = {Family.IPV4: underlay.public_ip, Family.IPV6: underlay.public_ipv6}
    data = {family: {"VNI": vni, "VtepMAC": mac} for family, mac in macs.items() if public[family] is not None}
    return LeaseAttrs(
        underlay.public_ip,
        underlay.public_ipv6 if Family.IPV6 in macs else None,
        VxlanKeys.type,
        {**data.get(Family.IPV4, {}), "NodeID": node_id, "Udptun": 1},
        data.get(Family.IPV6),
    )


def refusal(lease: Lease, family: Family = Family.IPV4) -> str | None:
    """Why a lease is not a peer of a VTEP.  Its VNI is not looked at, as in flannel."""
    if lease.attrs.backend_type != VxlanKeys.type:
        return one_line(f"its BackendType is {lease.attrs.backend_type or 'empty'}, not {VxlanKeys.type}")
    if _mac(lease.attrs.data(family)) is None:
        data = "BackendData" if family is Family.IPV4 else "BackendV6Data"
        return f"its {data} has no VtepMAC that is a unicast MAC address"
    return None


def mac_in(part: LeasePart) -> str:
    """The MAC of the peer's VTEP.  `refusal` has accepted the lease."""
    mac = _mac(part.data)
    assert mac is not None
    return mac


def _mac(data: Json) -> str | None:
    text = data.get("VtepMAC") if isinstance(data, Mapping) else None
    if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", text):
        return None
    mac = text.lower()
    return None if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00" else mac


def routes(device: str, inputs: BackendInput) -> list[DesiredRoute]:
    """A route for each peer: through `device`, or directly to a peer that the kernel reaches without a gateway."""
    found = []
    for part in inputs.parts:
        subnet, public_ip = part.subnet, part.public_ip
        oif = inputs.direct.get(public_ip)
        found.append(
            DesiredRoute(subnet, device, gateway=subnet.network_address, onlink=True)
            if oif is None
            else DesiredRoute(subnet, gateway=public_ip, oif=oif)
        )
    return found

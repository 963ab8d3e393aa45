"""The vxlan backend: the kernel's VXLAN device, set up as flannel does (pkg/backend/vxlan).  Pure.

Each peer is a permanent neighbour (its tunnel address has its VTEP's MAC), a permanent fdb entry (that MAC is at its
PublicIP) and a route through its tunnel address.  With DirectRouting, a peer without a router in between is a plain
route instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from udptun.backends.base import BackendInput, LiveSettings, TunnelKeys
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
from udptun.core.lease import Lease, LeaseAttrs
from udptun.core.network_state import Vxlan
from udptun.core.tunnel import PORTS
from udptun.kernel.underlay import Underlay

VXLAN_OVERHEAD = 50
"""IPv4 header 20 + UDP header 8 + VXLAN header 8 + inner Ethernet header 14 (RFC 7348; flannel vxlan/device.go)."""

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


class KernelVxlan:
    """See `Backend`."""

    type = VxlanKeys.type
    summary = "the kernel's VXLAN device"
    overhead = VXLAN_OVERHEAD
    encapsulation = None
    routes_network = False
    peer_types = frozenset((VxlanKeys.type,))
    needs_backend_data = True

    def __init__(self, keys: VxlanKeys, mac: str) -> None:
        """`mac` is our VTEP's (`aa:bb:cc:dd:ee:ff`).  It must stay the same from run to run."""
        self.device = device_name(keys.vni)
        self.asks_direct = keys.direct_routing
        self._keys = keys
        self._mac = mac

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        return lease_attrs(self._keys.vni, self._mac, underlay, node_id)

    def refusal(self, lease: Lease) -> str | None:
        return refusal(lease)

    def links(self, underlay: Underlay, live: LiveSettings) -> tuple[DesiredLink]:
        keys = self._keys
        # Not the PublicIP, which flannel takes since 0.27.4: behind a NAT that is another machine's address.
        # Where routes choose the interface there may be several; none is named then.
        lower_index = 0 if underlay.is_routed else underlay.link_index
        vxlan = Vxlan(keys.vni, underlay.address, lower_index, keys.port, keys.learning, keys.gbp)
        # The tunnel carries IPv4 alone, so no router's advertisement in it is for us.
        accept_ra = Sysctl(
            f"net/ipv6/conf/{self.device}/accept_ra",
            "0",
            "this host takes IPv6 addresses and routes that a peer advertises in the tunnel",
        )
        return (DesiredLink(self.device, live.mtu, 0, (accept_ra,), vxlan, self._mac),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        tunnelled = [lease for lease in inputs.peers if lease.attrs.public_ip not in inputs.direct]
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live),
            addresses=(DesiredAddress(self.device, inputs.own_subnet.network_address, 32),),
            routes=tuple(routes(self.device, inputs)),
            neighbours=tuple(
                DesiredNeighbour(self.device, lease.subnet.network_address, mac_of(lease)) for lease in tunnelled
            ),
            fdb=tuple(DesiredFdb(self.device, mac_of(lease), lease.attrs.public_ip) for lease in tunnelled),
            pods=inputs.pods(inputs.leasable),
        )


def device_name(vni: int) -> str:
    """flannel's."""
    return f"flannel.{vni}"


def lease_attrs(vni: int, mac: str, underlay: Underlay, node_id: str) -> LeaseAttrs:
    """What a VTEP's lease says: flannel's two keys, and then ours, which flannel ignores."""
    data = {"VNI": vni, "VtepMAC": mac, "NodeID": node_id, "Udptun": 1}
    return LeaseAttrs(underlay.public_ip, backend_type=VxlanKeys.type, backend_data=data)


def refusal(lease: Lease) -> str | None:
    """Why a lease is not a peer of a VTEP.  Its VNI is not looked at, as in flannel."""
    if lease.attrs.backend_type != VxlanKeys.type:
        return one_line(f"its BackendType is {lease.attrs.backend_type or 'empty'}, not {VxlanKeys.type}")
    if _mac(lease) is None:
        return "its BackendData has no VtepMAC that is a unicast MAC address"
    return None


def mac_of(lease: Lease) -> str:
    """The MAC of the peer's VTEP.  `refusal` has accepted the lease."""
    mac = _mac(lease)
    assert mac is not None
    return mac


def _mac(lease: Lease) -> str | None:
    data = lease.attrs.backend_data
    text = data.get("VtepMAC") if isinstance(data, Mapping) else None
    if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", text):
        return None
    mac = text.lower()
    return None if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00" else mac


def routes(device: str, inputs: BackendInput) -> list[DesiredRoute]:
    """A route for each peer: through `device`, or directly to a peer that the kernel reaches without a gateway."""
    found = []
    for lease in inputs.peers:
        subnet, public_ip = lease.subnet, lease.attrs.public_ip
        oif = inputs.direct.get(public_ip)
        found.append(
            DesiredRoute(subnet, device, gateway=subnet.network_address, onlink=True)
            if oif is None
            else DesiredRoute(subnet, gateway=public_ip, oif=oif)
        )
    return found

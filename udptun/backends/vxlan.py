"""The vxlan backend: the kernel's VXLAN device, set up as flannel does (pkg/backend/vxlan).  Pure.

Each peer is a permanent neighbour (its tunnel address has its VTEP's MAC), a permanent fdb entry (that MAC is at its
PublicIP) and a route through its tunnel address; or, with DirectRouting and no router in between, a plain route.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from udptun.backends.base import BackendInput, LiveSettings
from udptun.config.net_conf import VXLAN_OVERHEAD, VxlanBackend
from udptun.core.desired import (
    DesiredAddress,
    DesiredFdb,
    DesiredLink,
    DesiredNeighbour,
    DesiredRoute,
    DesiredState,
    Sysctl,
    guard,
)
from udptun.core.lease import Lease, LeaseAttrs
from udptun.core.network_state import Vxlan
from udptun.kernel.underlay import Underlay

TYPE = "vxlan"


class KernelVxlan:
    """See `Backend`."""

    type = TYPE
    overhead = VXLAN_OVERHEAD
    encapsulation = None

    def __init__(self, conf: VxlanBackend, mac: str) -> None:
        """`mac` is our VTEP's (`aa:bb:cc:dd:ee:ff`); it must stay the same from run to run."""
        self.device = device_name(conf.vni)
        self.asks_direct = conf.direct_routing
        self._conf = conf
        self._mac = mac

    def attrs(self, underlay: Underlay, node_id: str) -> LeaseAttrs:
        return lease_attrs(self._conf.vni, self._mac, underlay, node_id)

    def refusal(self, lease: Lease) -> str | None:
        return refusal(lease)

    def links(self, underlay: Underlay, live: LiveSettings) -> tuple[DesiredLink]:
        conf = self._conf
        # Not the PublicIP, as flannel has it since 0.27.4: behind a NAT that is an address of somebody else.
        vxlan = Vxlan(conf.vni, underlay.address, underlay.link_index, conf.port, conf.learning, conf.gbp)
        # The tunnel carries IPv4 alone, and a router's advertisement in it is none of ours.
        accept_ra = Sysctl(f"net/ipv6/conf/{self.device}/accept_ra", "0", is_optional=True)
        return (DesiredLink(self.device, live.mtu, 0, (accept_ra,), vxlan, self._mac),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        tunnelled = [lease for lease in inputs.peers if lease.attrs.public_ip not in inputs.direct]
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live),
            addresses=(DesiredAddress(self.device, inputs.own_subnet.network_address, 32),),
            routes=(guard(inputs.network), *routes(self.device, inputs)),
            neighbours=tuple(
                DesiredNeighbour(self.device, lease.subnet.network_address, mac_of(lease)) for lease in tunnelled
            ),
            fdb=tuple(DesiredFdb(self.device, mac_of(lease), lease.attrs.public_ip) for lease in tunnelled),
        )


def device_name(vni: int) -> str:
    """flannel's."""
    return f"flannel.{vni}"


def lease_attrs(vni: int, mac: str, underlay: Underlay, node_id: str) -> LeaseAttrs:
    """What a VTEP's lease says: flannel's two keys, then ours, which it ignores."""
    data = {"VNI": vni, "VtepMAC": mac, "NodeID": node_id, "Udptun": 1}
    return LeaseAttrs(underlay.public_ip, backend_type=TYPE, backend_data=data)


def refusal(lease: Lease) -> str | None:
    """Why a lease is no peer of a VTEP.  Its VNI is not looked at, as flannel does not."""
    if lease.attrs.backend_type != TYPE:
        return f"its BackendType is {lease.attrs.backend_type or 'empty'}, not {TYPE}"
    if _mac(lease) is None:
        return "its BackendData has no VtepMAC that is a unicast MAC address"
    return None


def mac_of(lease: Lease) -> str:
    """The peer's VTEP's MAC, of a lease that `refusal` has nothing against."""
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
    """A route for each peer: through `device`, or straight to a peer that the kernel reaches without a gateway."""
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

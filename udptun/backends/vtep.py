"""The userspace VTEP: VXLAN through the datapath and a TUN device.  Pure.

To its peers it is a flannel node like any other.  It stands in for the kernel's VTEP where that is missing.  Lease,
peers and the name of the device are the same (vxlan.py).  The device has no Ethernet: one route leads to all peers, and
the datapath looks up where a packet goes.
"""

from __future__ import annotations

from collections.abc import Mapping

from udptun.backends import vxlan
from udptun.backends.base import BackendInput, LiveSettings, OverSameFamily, packet_settings
from udptun.backends.udp import tun_link
from udptun.core.desired import DesiredAddress, DesiredLink, DesiredRoute, DesiredState
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs
from udptun.datapath.settings import PacketSettings, Remote, Vtep, Where
from udptun.kernel.underlay import Underlay

N_SENDERS = 4
"""The flows are spread over so many sockets.  Packets of different sockets cannot be sent together: eight TCP streams
reached 0.85 of the udp backend's throughput with 8 sockets, and 0.9 with 4 or with 1, on a machine of two cores."""


class UserspaceVtep(OverSameFamily):
    """See `Backend`; it is its own `Encapsulation`."""

    type = vxlan.VxlanKeys.type
    summary = "userspace VTEP, to its peers like the kernel's, which this kernel does not have"
    overhead = vxlan.VXLAN_OVERHEAD
    not_carried: Mapping[Family, str] = {
        Family.IPV6: "the VTEP in user space carries no IPv6; the kernel's vxlan, udp and host-gw do (Backend.Type)"
    }
    ipv6_overhead = 0
    routes_network = False
    peer_types = frozenset((vxlan.VxlanKeys.type,))
    needs_backend_data = True

    def __init__(self, keys: vxlan.VxlanKeys, mac: str) -> None:
        """`mac` is our VTEP's (`aa:bb:cc:dd:ee:ff`).  It must stay the same from run to run."""
        self.device = vxlan.device_name(keys.vni)
        self.port = keys.port
        self.asks_direct = keys.direct_routing
        self._vni = keys.vni
        self._mac = mac

    @property
    def encapsulation(self) -> UserspaceVtep:
        return self

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        return vxlan.lease_attrs(self._vni, {Family.IPV4: self._mac}, underlay, node_id)

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        return vxlan.refusal(lease)

    def where(self, underlay: Underlay) -> Where:
        assert underlay.address is not None
        return Where(underlay.address, self.port)

    def n_senders(self, underlay: Underlay, live: LiveSettings) -> int:
        return N_SENDERS

    def packet_settings(self, inputs: Mapping[Family, BackendInput]) -> PacketSettings:
        return packet_settings(inputs, self.port, Vtep(self._vni, _packed(self._mac)))

    def remote(self, lease: Lease) -> Remote:
        """All peers have the same port, as with flannel.

        With VXLAN all of them take any source port, and carry marks of congestion on, as the kernel does.
        """
        attrs, mac = lease.attrs, _packed(vxlan.mac_in(lease.part(Family.IPV4)))
        assert attrs.public_ip is not None
        return Remote(attrs.public_ip, self.port, attrs.is_udptun, True, mac, carries_ecn=True)

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[DesiredLink]:
        return (tun_link(self.device, live.mtu, with_ipv6=False),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        """As udp's, but only what can be leased leads into the device, as with flannel's vxlan, not all of Network.

        With DirectRouting a peer that is reached without a gateway gets a plain route of its own.
        """
        direct = [
            DesiredRoute(part.subnet, gateway=part.public_ip, oif=inputs.direct[part.public_ip])
            for part in inputs.parts
            if part.public_ip in inputs.direct
        ]
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live),
            addresses=(DesiredAddress(self.device, inputs.own_subnet.network_address, 32),),
            routes=tuple(direct),
            pods=inputs.pods(inputs.leasable, self.device),
        )


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))

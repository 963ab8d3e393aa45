"""The userspace VTEP: VXLAN through the datapath and a TUN device.  Pure.

To its peers it is a flannel node like any other.  It stands in for the kernel's VTEP where that is missing.  Lease,
peers and the names of the devices are the same (vxlan.py).  Each family has a device, a MAC and a datapath of its own,
as flannel has two devices.  The devices have no Ethernet: one route leads to all peers, and the datapath looks up where
a packet goes.
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
    """See `Backend`."""

    type = vxlan.VxlanKeys.type
    summary = "userspace VTEP, to its peers like the kernel's, which this kernel does not have"
    overhead = vxlan.VXLAN_OVERHEAD
    ipv6_overhead = vxlan.VXLAN_IPV6_OVERHEAD
    routes_network = False
    peer_types = frozenset((vxlan.VxlanKeys.type,))
    needs_backend_data = True

    def __init__(self, keys: vxlan.VxlanKeys, mac: str, ipv6_mac: str = "") -> None:
        """The MACs are as those of `KernelVxlan`."""
        self.asks_direct = keys.direct_routing
        self.ports = (keys.port, keys.port)
        self._vni = keys.vni
        self._macs = {Family.IPV4: mac, Family.IPV6: ipv6_mac}
        self.encapsulations = tuple(OneFamily(keys, family, it) for family, it in self._macs.items())

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        return vxlan.lease_attrs(self._vni, self._macs, underlay, node_id)

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        return vxlan.refusal(lease, family)

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[DesiredLink]:
        name = vxlan.device_name(self._vni, family)
        return (tun_link(name, live.mtu_of(family), with_ipv6=family is Family.IPV6),)

    def desired(self, inputs: BackendInput) -> DesiredState:
        """As udp's, but only what can be leased leads into the device, as with flannel's vxlan, not all of Network.

        With DirectRouting a peer that is reached without a gateway gets a plain route of its own.
        """
        device, own = vxlan.device_name(self._vni, inputs.family), inputs.own_subnet
        direct = [
            DesiredRoute(part.subnet, gateway=part.public_ip, oif=inputs.direct[part.public_ip])
            for part in inputs.parts
            if part.public_ip in inputs.direct
        ]
        return DesiredState(
            links=self.links(inputs.underlay, inputs.live, inputs.family),
            addresses=(DesiredAddress(device, own.network_address, own.max_prefixlen),),
            routes=tuple(direct),
            pods=inputs.pods(inputs.leasable, device),
        )


class OneFamily:
    """See `Encapsulation`: packets of one family in frames, between the hosts' addresses of that family."""

    def __init__(self, keys: vxlan.VxlanKeys, family: Family, mac: str) -> None:
        self.device = vxlan.device_name(keys.vni, family)
        self.families = frozenset((family,))
        self._family = family
        self._port = keys.port
        self._vni, self._mac = keys.vni, mac

    def where(self, underlay: Underlay) -> Where:
        address = underlay.address_of(self._family)
        assert address is not None
        return Where(address, self._port)

    def n_senders(self, underlay: Underlay, live: LiveSettings) -> int:
        return N_SENDERS

    def packet_settings(self, inputs: Mapping[Family, BackendInput]) -> PacketSettings:
        where = self.where(inputs[self._family].underlay)
        return packet_settings(inputs, where, Vtep(self._vni, _packed(self._mac)))

    def remote(self, lease: Lease) -> Remote:
        """All peers have the same port, as with flannel.

        With VXLAN all of them take any source port, and carry marks of congestion on, as the kernel does.
        """
        part = lease.part(self._family)
        mac = _packed(vxlan.mac_in(part))
        return Remote(part.public_ip, self._port, lease.attrs.is_udptun, True, mac, carries_ecn=True)


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))

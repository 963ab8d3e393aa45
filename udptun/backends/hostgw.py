"""The host-gw backend: each peer is the gateway to its own subnet (pkg/backend/hostgw).  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from udptun.backends.base import BackendInput, LiveSettings, OverSameFamily, ProbedKeys
from udptun.core.desired import DesiredRoute, DesiredState
from udptun.core.errors import UdptunError, one_line
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs
from udptun.kernel.underlay import Underlay


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGwKeys(ProbedKeys):
    """`Backend` of Type host-gw."""

    type: ClassVar[str] = "host-gw"


class HostGw(OverSameFamily):
    """See `Backend`."""

    type = HostGwKeys.type
    summary = "routes through the peers' addresses; they must be on one link with us"
    overhead = ipv6_overhead = 0
    encapsulations = ()
    ports = None
    routes_network = False
    peer_types = frozenset((HostGwKeys.type,))
    needs_backend_data = False
    asks_direct = False

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        if underlay.public_ip != underlay.address:
            raise UdptunError(
                "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not "
                f"supported by host-gw backend ({underlay.public_ip} is not {underlay.address} of "
                f"{underlay.link_name}); use Backend.Type vxlan or udp"
            )
        if underlay.public_ipv6 != underlay.ipv6:
            raise UdptunError(
                f"your PublicIPv6 {underlay.public_ipv6} differs from the interface's {underlay.ipv6}, and host-gw "
                "does not work through a NAT; use Backend.Type vxlan, or no --public-ipv6"
            )
        # flannel's has no BackendData, and it looks at none.
        data = {"NodeID": node_id, "Udptun": 1}
        return LeaseAttrs(underlay.public_ip, underlay.public_ipv6, self.type, data)

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> str | None:
        if lease.attrs.backend_type != self.type:
            return one_line(f"its BackendType is {lease.attrs.backend_type or 'empty'}, not {self.type}")
        return None

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[()]:
        return ()

    def desired(self, inputs: BackendInput) -> DesiredState:
        return DesiredState(
            routes=tuple(
                DesiredRoute(part.subnet, gateway=part.public_ip, oif=inputs.underlay.link_index)
                for part in inputs.parts
            )
        )

"""The alloc backend: a lease and subnet.env.  Somebody else carries the packets (pkg/backend/alloc).  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from udptun.backends.base import BackendInput, LiveSettings, OverSameFamily
from udptun.config.net_conf import BackendKeys
from udptun.core.desired import DesiredState
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs
from udptun.kernel.underlay import Underlay


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocKeys(BackendKeys):
    """`Backend` of Type alloc: a lease and subnet.env, no packets."""

    type: ClassVar[str] = "alloc"


class Alloc(OverSameFamily):
    """See `Backend`."""

    type = AllocKeys.type
    summary = "lease and subnet.env only"
    overhead = ipv6_overhead = 0
    encapsulations = ()
    ports = None
    routes_network = False
    peer_types = frozenset[str]()
    needs_backend_data = False
    asks_direct = False

    def attrs(self, underlay: Underlay, live: LiveSettings, node_id: str) -> LeaseAttrs:
        """It names no type, as flannel's does not."""
        return LeaseAttrs(underlay.public_ip, underlay.public_ipv6, backend_data={"NodeID": node_id, "Udptun": 1})

    def refusal(self, lease: Lease, family: Family = Family.IPV4) -> None:
        """No lease is refused, because nothing is done about any."""

    def links(self, underlay: Underlay, live: LiveSettings, family: Family = Family.IPV4) -> tuple[()]:
        return ()

    def desired(self, inputs: BackendInput) -> DesiredState:
        return DesiredState()

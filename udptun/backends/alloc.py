"""The alloc backend: a lease and subnet.env, and somebody else carries the packets (pkg/backend/alloc).  Pure."""

from __future__ import annotations

from udptun.backends.base import BackendInput, LiveSettings
from udptun.core.desired import DesiredState
from udptun.core.lease import Lease, LeaseAttrs
from udptun.kernel.underlay import Underlay


class Alloc:
    """See `Backend`."""

    type = "alloc"
    device = None
    overhead = 0
    encapsulation = None
    asks_direct = False

    def attrs(self, underlay: Underlay, node_id: str) -> LeaseAttrs:
        """Without a type, as flannel's."""
        return LeaseAttrs(underlay.public_ip, backend_data={"NodeID": node_id, "Udptun": 1})

    def refusal(self, lease: Lease) -> None:
        """Nothing is done about any lease."""

    def links(self, underlay: Underlay, live: LiveSettings) -> tuple[()]:
        return ()

    def desired(self, inputs: BackendInput) -> DesiredState:
        return DesiredState()

"""Two hosts with one address, or with one NodeID: which of them keeps the lease.

A lease with our PublicIP and port is taken over, as flannel does: it is nearly always our own of before.  If the host
that held it is alive, it writes the lease once more, which proves that.  The later one of the two then leaves the lease
alone: it goes on forwarding, says so, and needs an address or a port of its own.  Each host writes its lease once more
and then stops, so two hosts never overwrite each other for ever.

Clones of one machine have one NodeID between them, and are told apart the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from udptun.core.errors import LeaseLostError
from udptun.core.lease import EventType, Lease, LeaseEvent, Subnets, host_address
from udptun.membership.identity import Identity, Node
from udptun.stores.base import SubnetChoice

log = logging.getLogger(__name__)

PROOF_S = 60.0
"""We take our lease back from the same node once in so long.  Two nodes that both think they were first would otherwise
fight."""


class Doubles:
    """Who we are, and who may have our lease when another node looks like us.

    No I/O and no clock: `now_s` is time elapsed.  `me` is replaced when we move to another address.
    """

    def __init__(self, me: Identity, state_dir: Path) -> None:
        self.me = me
        self._state_dir = state_dir
        self._replaced: frozenset[Node] = frozenset()
        """Whose leases we took over at the start: we are the later one of us and them."""
        self._proofs: dict[Node, float] = {}
        """When we last took our lease back from a node that had taken it over."""

    def is_own(self, lease: Lease, own: Subnets) -> bool:
        """Whether no peer wrote the lease: it is at our address, or it is ours of `own` from before we moved."""
        return self.me.owns(lease) or (lease.subnets == own and lease.attrs.node_id == self.me.node_id)

    def refusal(self, lease: Lease) -> str | None:
        """Why a lease that is not ours is no peer all the same; None when it may be one."""
        if lease.node_name and self.me.is_at(lease):
            return f"the node {lease.node_name} publishes our own PublicIP {lease.attrs.host_address}"
        return None

    def took_over(self, leases: Iterable[Lease], own: Lease) -> None:
        """`own` has replaced these: a warning for each node that may think that its lease is still its own."""
        self._replaced = frozenset(
            self.me.node_of(lease) for lease in leases if not self.me.must_have_written(lease)
        )
        for node in self._replaced:
            log.warning(
                "the lease %s of another node is ours now: it was %s, we are %s; if that node is alive, %s",
                own.subnet,
                node,
                self.me.node_of(own),
                self.remedy(node),
            )

    def took_back(self, taker: Node, own: Lease, now_s: float) -> None:
        """We have written `own` again over what `taker` had written."""
        self._proofs[taker] = now_s
        log.warning(
            "our lease was taken over and is ours again subnet=%s: by %s, from %s; %s",
            own.subnet,
            taker,
            self.me.node_of(own),
            self.remedy(taker),
        )

    def may_take_back(self, node: Node, now_s: float) -> bool:
        """Whether our lease, which `node` has written, was ours first, and `node` has not been shown that we live."""
        if node in self._replaced:
            return False
        shown_s = self._proofs.get(node)
        return self.me.is_double(node) and (shown_s is None or now_s - shown_s >= PROOF_S)

    def choose_again(self, own: Lease, leases: Sequence[Lease], now_s: float) -> SubnetChoice:
        """The subnets of `own` once more.  Raises LeaseLostError when they are another node's now."""
        for lease in leases:
            if not lease.subnets.overlap(own.subnets) or self.me.must_have_written(lease):
                continue
            node = self.me.node_of(lease)
            if lease.subnets == own.subnets and self.may_take_back(node, now_s):
                continue
            if node in self._replaced:
                raise LeaseLostError(
                    f"{own.subnet}, which we took over, is {node}'s again, which so is alive; we are "
                    f"{self.me.node_of(own)} and leave it alone: {self.remedy(node)}"
                )
            raise LeaseLostError(
                f"{own.subnet} is leased to {host_address(node)} (node {node.node_id or 'without id'}) now; "
                "restart to lease another subnet"
            )
        return SubnetChoice(own.subnets)

    def remedy(self, other: Node) -> str:
        """What a person does so that `other` and we are told apart."""
        if other.node_id == self.me.node_id:
            return (
                f"one of the two is a copy of the other: stop it there, delete {self._state_dir}/node-id and the "
                "subnet.env, and start it again"
            )
        if not self.me.is_double(other):
            return "stop this daemon, delete its subnet.env, and start it again: it gets another subnet"
        flag = "--public-ipv6" if self.me.public_ip is None else "--public-ip"
        return f"start one of the two with another {flag}{' or Backend.Port' if self.me.port else ''}"


class Clones:
    """Peers with our NodeID: a warning and a problem line for each, until its lease goes."""

    def __init__(self, doubles: Doubles) -> None:
        self._doubles = doubles
        self._lines: dict[str, str] = {}

    @property
    def lines(self) -> Mapping[str, str]:
        """By the key of the peer's lease."""
        return self._lines

    def see(self, event: LeaseEvent) -> None:
        """A peer came, changed or went."""
        lease, me = event.lease, self._doubles.me
        self._lines.pop(lease.key, None)
        if event.type is EventType.ADDED and lease.attrs.node_id == me.node_id:
            node = me.node_of(lease)
            line = (
                f"the lease {lease.subnet} of {node} has our NodeID: it is our own of before we moved, or "
                f"{self._doubles.remedy(node)}"
            )
            self._lines[lease.key] = line
            log.warning("%s", line)

"""What is known of the peers of a backend whose packets the kernel carries; it is shown, and nothing else is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from udptun.backends.base import BackendInput
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.network_state import IPNetwork
from udptun.probing.carrier import Target
from udptun.probing.host import HostCarrier
from udptun.probing.liveness import Liveness
from udptun.probing.memory import Memory
from udptun.probing.prober import Prober

_IDLE_S = 60.0
"""Between two probes of a peer, and between two measures of its path.

The kernel does not say which peers have traffic, so each is taken for idle.  Where there are so many that this would be
too many probes, they come less often.
"""


class HostProbes:
    """Probes the peers by one family.  `device` is the one that packets to them go through, None: there is none."""

    def __init__(self, family: Family, device: str | None, memory: Memory) -> None:
        """`memory` has what the daemon before has found out."""
        self._family = family
        self._device = device
        self._prober = Prober(HostCarrier(device, family), _IDLE_S, _IDLE_S, memory=memory)

    def use(self, inputs: BackendInput) -> None:
        """Have these settings, and exactly these peers."""
        self._prober.switch(is_on=inputs.live.probe, mtu=inputs.live.mtu_of(self._family))
        self._prober.set_peers(self._targets(inputs.peers))

    def peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        removed = (event.lease for event in events if event.type is EventType.REMOVED)
        self._prober.remove_peers(lease.subnet_of(self._family) for lease in removed)
        self._prober.add_peers(self._targets(event.lease for event in events if event.type is EventType.ADDED))

    async def run(self) -> None:
        """Until cancelled."""
        await self._prober.run()

    @property
    def problems(self) -> tuple[str, ...]:
        """May be read on another thread."""
        return self._prober.problems

    @property
    def state(self) -> str:
        """See `Prober.state`."""
        return self._prober.state

    def document(self, lease: Lease) -> dict[str, object]:
        """The keys of docs/status.md about a peer."""
        return self._prober.document(lease.subnet_of(self._family))

    def liveness(self, lease: Lease) -> Liveness:
        return self._prober.liveness(lease.subnet_of(self._family))

    def _targets(self, leases: Iterable[Lease]) -> Mapping[IPNetwork, Target]:
        """Whom to ask, so that echoes go the way of packets to the pods.

        A peer has the first address of its subnet on the device.  Without one nothing of its subnet has to be there
        before its first pod; its PublicIP (PublicIPv6) is what packets to its pods go through.
        """
        found: dict[IPNetwork, Target] = {}
        for part in (lease.part(self._family) for lease in leases):
            address = part.public_ip if self._device is None else part.subnet.network_address
            found[part.subnet] = Target(address, part.public_ip, str(part.public_ip))
        return found

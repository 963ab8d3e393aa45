"""What the kernel has of one address family: leases in, and a reconciler that keeps devices, routes and neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from udptun.backends.base import Backend, BackendInput, LiveSettings, device_of
from udptun.core.desired import DesiredRoute, DesiredState, blackhole
from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.network_state import IPNetwork
from udptun.core.ownership import Ownership
from udptun.kernel.reconcile.apply import Device
from udptun.kernel.reconcile.reconciler import Reconciler
from udptun.kernel.underlay import Underlay


class Routing:
    """One family of a host.  It is used from `learn` on, and makes the kernel what is wanted from `start` on."""

    def __init__(
        self,
        backend: Backend,
        family: Family,
        ownership: Ownership,
        leasable: tuple[IPNetwork, ...],
        *,
        is_carried: bool = True,
        with_blackhole: bool = False,
    ) -> None:
        """`ownership` is that of the family's Network; `leasable`: see `SubnetPool`.

        A family that is not carried has no peers.  Its packets are refused, so that they do not leave in clear text.
        `with_blackhole`: the own subnet shall have a blackhole route behind all others (--ip-blackhole-route).
        """
        self.family = family
        self.ownership = ownership
        self._backend = backend
        self._leasable = leasable
        self.is_carried = is_carried
        self._with_blackhole = with_blackhole
        self._own_subnet: IPNetwork
        self._peers: dict[IPNetwork, Lease] = {}
        self._reconciler: Reconciler | None = None

    def learn(self, own_subnet: IPNetwork, peers: Iterable[Lease]) -> None:
        """Our subnet, and all peers."""
        self._own_subnet = own_subnet
        self._peers = {lease.subnet_of(self.family): lease for lease in peers}

    def change_peers(self, events: Sequence[LeaseEvent]) -> None:
        """Follow a change of the peers, as LeaseTable reports it."""
        for event in events:
            subnet = event.lease.subnet_of(self.family)
            if event.type is EventType.REMOVED:
                self._peers.pop(subnet, None)
            else:
                self._peers[subnet] = event.lease

    def inputs(self, underlay: Underlay, live: LiveSettings) -> BackendInput:
        """What the backend decides from.  Its peers are a view: they may come and go while somebody works with it."""
        network, peers = self.ownership.network, self._peers.values()
        return BackendInput(network, self._leasable, underlay, self._own_subnet, live, peers, family=self.family)

    def want(self, inputs: BackendInput, narrow: Mapping[IPNetwork, int]) -> None:
        """Have the kernel be as the backend desires with these inputs.  Ignored before `start`, which is given its own.

        `narrow` has the subnets whose paths take less than the device, and how much they take, bytes.
        """
        if self._reconciler is None:
            return
        inputs = replace(inputs, peers=tuple(inputs.peers))
        if self._backend.asks_direct:
            self._reconciler.set_decision(
                {part.public_ip for part in inputs.parts},
                lambda direct: self._desired(replace(inputs, direct=direct), narrow),
            )
        else:
            self._reconciler.set_desired(self._desired(inputs, narrow))

    async def start(
        self,
        device: Device | None,
        alias: str | None,
        inputs: BackendInput,
        narrow: Mapping[IPNetwork, int],
        *,
        is_first: bool,
    ) -> None:
        """Make the kernel so, as `want` says.  Raises UdptunError when that cannot be with the first family.

        With another one it is tried on, and `problems` say what is missing.  `device` is the datapath's with its
        `alias`, and stays the caller's; None: every device is the kernel's.
        """
        self._reconciler = Reconciler(DesiredState(), device, self.ownership, self.family, alias)
        self.want(inputs, narrow)
        outcome = await self._reconciler.converge()
        if outcome.is_broken and is_first:
            device_name = device_of(self._backend, inputs.underlay, inputs.live, self.family)
            what = device_name or f"the {self._backend.type} backend"
            raise UdptunError(f"cannot set up {what}: {'; '.join(outcome.failures)}")

    async def run(self) -> None:
        """Keep it so, until cancelled."""
        assert self._reconciler is not None
        await self._reconciler.run()

    @property
    def problems(self) -> tuple[str, ...]:
        return () if self._reconciler is None else self._reconciler.problems

    @property
    def changes(self) -> Mapping[tuple[str, bool], int]:
        """See `Reconciler.changes`."""
        return {} if self._reconciler is None else self._reconciler.changes

    def _desired(self, inputs: BackendInput, narrow: Mapping[IPNetwork, int]) -> DesiredState:
        if not self.is_carried:
            return DesiredState(pods=inputs.pods(self._leasable))
        desired = self._backend.desired(inputs)
        routes = [*desired.routes, *self._narrow_routes(desired, narrow)]
        if self._with_blackhole:
            routes.append(blackhole(inputs.own_subnet))
        return replace(desired, routes=tuple(routes))

    def _narrow_routes(self, desired: DesiredState, narrow: Mapping[IPNetwork, int]) -> list[DesiredRoute]:
        """A route to each peer whose path takes less than the device, so that the kernel keeps packets to it short.

        It tells senders of packets with DF, fragments those without (RFC 791), and has this host's own connections send
        shorter segments.  The datapath could do only the first of these.
        """
        # With DirectRouting some peers are not reached through the device.
        routed = {route.dst for route in desired.routes}
        link = None if desired.pods is None else desired.pods.link
        return [
            DesiredRoute(to, link, mtu=mtu)
            for to, mtu in narrow.items()
            if to.version == self.family.value and to not in routed
        ]

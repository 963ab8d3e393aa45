"""What carries packets on this host: the backend, the datapath where there is one, and the reconciler.

The daemon drives it with leases and settings, and does not know which backend it is:

    open (device and sockets) -> lease -> start (peers, processes, kernel state) -> run, peers_changed, apply
                                                                                 -> detach; packets go on
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udptun.backends.base import BackendInput, LiveSettings
from udptun.backends.choice import BackendChoice
from udptun.control.host_probes import HostProbes
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.core.desired import DesiredRoute, DesiredState, blackhole
from udptun.core.errors import UdptunError
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.ownership import Ownership
from udptun.core.pod_path import PodPath
from udptun.core.tunnel import Confinement
from udptun.datapath import processes
from udptun.kernel.reconcile.apply import create_missing_vxlans
from udptun.kernel.reconcile.ownership import delete_own_vxlan, is_anything_ours, mark_link, remove_ours
from udptun.kernel.reconcile.reconciler import Reconciler
from udptun.kernel.underlay import Underlay

if TYPE_CHECKING:
    from udptun.control.tunnelled import Tunnelled


class Forwarding:
    """Carries one host's packets as the chosen backend says.  It is made by `open`, and belongs to one event loop.

    `live` has the settings in force now.  `is_adopted`: a datapath already carried packets when we came, and we took
    it over.
    """

    def __init__(
        self,
        choice: BackendChoice,
        ownership: Ownership,
        leasable: tuple[IPv4Network, ...],
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        tunnel: Tunnelled | None,
        kept: KeptDescriptors,
        was_clean: bool,
        with_blackhole: bool,
    ) -> None:
        self.backend = choice.backend
        self._reason = choice.reason
        self.live = live
        self._ownership = ownership
        self._leasable = leasable
        self._underlay = underlay
        self._run_dir = run_dir
        self._tunnel = tunnel
        carries = bool(choice.backend.peer_types)
        self._probes = HostProbes(choice.backend.device) if tunnel is None and carries else None
        self._kept = kept
        self._was_clean = was_clean
        """Whether the kernel had nothing with our mark when we came."""
        self._with_blackhole = with_blackhole
        self._own_subnet: IPv4Network
        self._peers: dict[IPv4Network, Lease] = {}
        self._reconciler: Reconciler | None = None

    @classmethod
    async def open(
        cls,
        choice: BackendChoice,
        ownership: Ownership,
        leasable: tuple[IPv4Network, ...],
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        confinement: Confinement,
        kept: KeptDescriptors,
        *,
        with_blackhole: bool = False,
    ) -> Forwarding:
        """Make or adopt device and sockets: a host without them needs no lease.  Raises KernelError, DatapathError.

        `leasable`: see `NetConf`.  `confinement` is what a datapath's processes shall give up.  `kept` gets their
        descriptors.  `with_blackhole`: the own subnet shall have a blackhole route behind all others
        (--ip-blackhole-route).
        """
        was_clean = not await is_anything_ours(ownership)
        tunnel = None
        backend = choice.backend
        if kept.devices - {backend.device}:
            # The kernel or we may need their port.
            await kept.forget()
        if backend.encapsulation is not None:
            assert backend.device is not None
            # Here, because a run whose packets the kernel carries does not need the libraries.
            from udptun.control.tunnelled import Tunnelled

            await delete_own_vxlan(backend.device, ownership)
            how = (backend.encapsulation, run_dir, backend.device, underlay, live, confinement)
            tunnel = await Tunnelled.open(*how)
            await mark_link(backend.device, ownership)
        await create_missing_vxlans(backend.links(underlay, live), ownership.alias)
        return cls(choice, ownership, leasable, underlay, live, run_dir, tunnel, kept, was_clean, with_blackhole)

    @property
    def is_adopted(self) -> bool:
        return self._tunnel is not None and self._tunnel.tunnel.is_adopted

    def refusal(self, lease: Lease) -> str | None:
        """Why a valid lease is no peer of ours; None when it is one."""
        if self._underlay.address in lease.subnet:
            return f"this host's underlay address {self._underlay.address} lies in it"
        return self.backend.refusal(lease)

    async def start(self, own_subnet: IPv4Network, peers: Iterable[Lease]) -> None:
        """Carry packets from now on.  Raises UdptunError when that cannot be."""
        self._own_subnet = own_subnet
        self._peers = {lease.subnet: lease for lease in peers}
        if self._tunnel is not None:
            await self._tunnel.start(self._inputs())
            await self._keep_descriptors()
        else:
            # A datapath may be left of a run with another backend, and the kernel may need its port.
            await processes.end_all(await processes.find_running(self._run_dir))
            await self._kept.forget()
        if self._probes is not None:
            self._probes.use(self._inputs())
        device = None if self._tunnel is None else self._tunnel.tunnel.tun
        reconciler = self._reconciler = Reconciler(DesiredState(), device, self._ownership)
        if self._tunnel is not None:
            self._tunnel.tunnel.narrow_changed = lambda: self._update_desired(reconciler)
        self._update_desired(reconciler)
        outcome = await self._reconciler.converge()
        if outcome.is_broken:
            what = self.backend.device or f"the {self.backend.type} backend"
            raise UdptunError(f"cannot set up {what}: {'; '.join(outcome.failures)}")

    async def run(self) -> None:
        """Keep it so, until cancelled."""
        assert self._reconciler is not None
        if self._tunnel is not None:
            # Not before we are ready: a start that fails shall not take the datapath with it.
            await self._tunnel.tunnel.datapath.bring_here()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconciler.run(), name="reconcile")
            if self._tunnel is not None:
                tasks.create_task(self._tunnel.run(), name="datapath")
            if self._probes is not None:
                tasks.create_task(self._probes.run(), name="probes")

    async def peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        """Follow a change of the peers, as LeaseTable reports it.  Ignored before `start`, which is given all peers."""
        if self._reconciler is None:
            return
        for event in events:
            if event.type is EventType.REMOVED:
                self._peers.pop(event.lease.subnet, None)
            else:
                self._peers[event.lease.subnet] = event.lease
        if self._tunnel is not None:
            await self._tunnel.peers_changed(events)
        if self._probes is not None:
            self._probes.peers_changed(events)
        self._update_desired(self._reconciler)

    async def apply(self, underlay: Underlay, live: LiveSettings) -> None:
        """Change settings, or move to another address, while packets flow.

        A setting that cannot be changed stays, with a line in the log.  Raises UdptunError when the address cannot be
        had; then nothing has changed.
        """
        assert self._reconciler is not None
        # A view: peers may come and go while the change is made.
        inputs = replace(self._inputs(), underlay=underlay, live=live, peers=self._peers.values())
        if self._tunnel is not None:
            live = await self._tunnel.apply(self._inputs(), inputs)
            await self._keep_descriptors()
        self._underlay, self.live = underlay, live
        if self._probes is not None:
            self._probes.use(self._inputs())
        self._update_desired(self._reconciler)

    async def undo_failed_start(self) -> None:
        """Leave nothing behind that we made.  Raises UdptunError.

        A datapath that was adopted goes on.  What an earlier run left in the kernel stays too: it keeps packets from
        leaving in clear text.
        """
        if self.is_adopted:
            return
        if self._tunnel is not None:
            await self._tunnel.tunnel.datapath.stop()
            await self._kept.forget()
        if self._was_clean:
            await remove_ours(self._ownership)

    def detach(self) -> None:
        """Close what we hold of the datapath, which goes on."""
        if self._tunnel is not None:
            self._tunnel.tunnel.detach()

    @property
    def is_well(self) -> bool:
        """Whether the datapath, where there is one, works and is looked after; after `run` has begun."""
        return self._tunnel is None or self._tunnel.tunnel.datapath.is_well

    @property
    def problems(self) -> tuple[str, ...]:
        parts = (self._tunnel, self._probes, self._reconciler)
        return tuple(line for part in parts if part is not None for line in part.problems)

    @property
    def pod_path(self) -> PodPath | None:
        """Where packets between the pods here and those of other hosts pass; None when nothing of ours routes them."""
        device = self.backend.device
        if device is None:
            one_peer = replace(self._inputs(), peers=tuple(islice(self._peers.values(), 1)))
            device = self._underlay.link_name if self.backend.desired(one_peer).routes else None
        return None if device is None else PodPath(self._ownership.network, self._own_subnet, device)

    def document(self, leases: Sequence[Lease]) -> dict[str, Any]:
        """The keys of docs/status.md about carrying packets.  `leases` are the peers', in the order to show them in."""
        backend = {
            "type": self.backend.type,
            "reason": self._reason,
            "device": self.backend.device,
            "mtu": self.live.mtu,
        }
        peers = [_peer(lease) for lease in leases]
        if self._probes is not None:
            backend |= {"probes": self._probes.state}
            peers = [peer | self._probes.document(lease) for peer, lease in zip(peers, leases, strict=True)]
        if self._tunnel is None:
            return {"backend": backend, "datapath": None, "peers": peers, "counters": {}}
        own = self._tunnel.document(leases, self.live)
        return {
            "backend": backend | own["backend"],
            "datapath": own["datapath"],
            "peers": [peer | more for peer, more in zip(peers, own["peers"], strict=True)],
            "counters": own["counters"],
        }

    async def _keep_descriptors(self) -> None:
        if self._tunnel is not None:
            tunnel = self._tunnel.tunnel
            await self._kept.keep(tunnel.tun.name, tunnel.datapath.descriptors)

    def _update_desired(self, reconciler: Reconciler) -> None:
        """Tell the reconciler what the backend desires now."""
        inputs = self._inputs()
        if self.backend.asks_direct:
            reconciler.set_decision(
                {lease.attrs.public_ip for lease in inputs.peers},
                lambda direct: self._desired(replace(inputs, direct=direct)),
            )
        else:
            reconciler.set_desired(self._desired(inputs))

    def _desired(self, inputs: BackendInput) -> DesiredState:
        desired = self.backend.desired(inputs)
        routes = [*desired.routes, *self._narrow_routes(desired)]
        if self._with_blackhole:
            routes.append(blackhole(inputs.own_subnet))
        return replace(desired, routes=tuple(routes))

    def _narrow_routes(self, desired: DesiredState) -> list[DesiredRoute]:
        """A route to each peer whose path takes less than the device, so that the kernel keeps packets to it short.

        It tells senders of packets with DF, fragments those without (RFC 791), and has this host's own connections send
        shorter segments.  The datapath could do only the first of these.
        """
        if self._tunnel is None:
            return []
        # With DirectRouting some peers are not reached through the device.
        routed = {route.dst for route in desired.routes}
        narrow = self._tunnel.tunnel.narrow.items()
        return [DesiredRoute(to, self.backend.device, mtu=mtu) for to, mtu in narrow if to not in routed]

    def _inputs(self) -> BackendInput:
        network, peers = self._ownership.network, tuple(self._peers.values())
        return BackendInput(network, self._leasable, self._underlay, self._own_subnet, self.live, peers)


def _peer(lease: Lease) -> dict[str, Any]:
    return {
        "subnet": str(lease.subnet),
        "public_ip": str(lease.attrs.public_ip),
        "port": lease.attrs.port(0) or None,
        "udptun": lease.attrs.is_udptun,
        "expires_at": lease.expires_s,
    }

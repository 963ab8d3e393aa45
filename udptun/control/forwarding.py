"""What carries packets on this host: the backend, the datapath where there is one, and the reconciler.

The daemon drives it with leases and settings, and does not know which backend it is:

    open (device and sockets) -> lease -> start (peers, processes, kernel state) -> run, peers_changed, apply
                                                                                 -> detach; packets go on
"""

from __future__ import annotations

import asyncio
import logging
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from udptun.backends.base import BackendInput, Encapsulation, LiveSettings, device_of
from udptun.backends.choice import BackendChoice
from udptun.backends.paths import pod_path, tunnel_paths
from udptun.control.host_probes import HostProbes
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.control.routing import Routing
from udptun.control.run_dir import IPV6_PROBES_FILE, PROBES_FILE
from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseEvent, Subnets
from udptun.core.lease_table import LeaseTable
from udptun.core.network_state import IPNetwork
from udptun.core.ownership import Ownership
from udptun.core.pod_path import PodPath
from udptun.core.tunnel import Confinement
from udptun.core.tunnel_path import TunnelPath
from udptun.datapath import processes
from udptun.kernel.filters import remove_filters
from udptun.kernel.reconcile.apply import create_missing_vxlans
from udptun.kernel.reconcile.ownership import delete_own_vxlan, is_anything_ours, mark_link, remove_ours
from udptun.kernel.underlay import Underlay
from udptun.probing.liveness import Liveness
from udptun.probing.memory import Memory

if TYPE_CHECKING:
    from udptun.control.tunnelled import Tunnelled

log = logging.getLogger(__name__)


class Forwarding:
    """Carries one host's packets as the chosen backend says.  It is made by `open`, and belongs to one event loop.

    `live` has the settings in force now, and `reason` is why the backend is this one.  `is_adopted`: a datapath already
    carried packets when we came, and we took it over.
    """

    def __init__(
        self,
        choice: BackendChoice,
        routings: Sequence[Routing],
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        kept: KeptDescriptors,
        was_clean: bool,
    ) -> None:
        self.backend = choice.backend
        self.reason = choice.reason
        self.live = live
        self._routings = {routing.family: routing for routing in routings}
        self._ownerships = {routing.family: routing.ownership for routing in routings}
        """Of all families that are enabled."""
        self._underlay = underlay
        self._run_dir = run_dir
        self._tunnels: list[Tunnelled] = []
        """Of all families that are carried: one, or one for each; none where the kernel carries the packets."""
        self.probes: dict[Family, HostProbes] = {}
        """Of all families that are carried, where the kernel carries the packets to hosts that can be asked."""
        if not choice.backend.encapsulations and choice.backend.peer_types:
            for family in live.families:
                memory = Memory(run_dir / (PROBES_FILE if family is Family.IPV4 else IPV6_PROBES_FILE))
                self.probes[family] = HostProbes(family, self.device(family), memory)
        self._kept = kept
        self._was_clean = was_clean
        """Whether the kernel had nothing with our mark when we came."""
        self._has_started = False
        self.shortcut_switched: Callable[[], None] = lambda: None
        """Called when `takes_shortcut` is another one than before."""

    @classmethod
    async def open(
        cls,
        choice: BackendChoice,
        routings: Sequence[Routing],
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        confinement: Confinement,
        kept: KeptDescriptors,
    ) -> Forwarding:
        """Make or adopt devices and sockets: a host without them needs no lease.  Raises UdptunError.

        `routings` are of the families that are enabled, IPv4 first.  `confinement` is what a datapath's processes shall
        give up.  `kept` gets their descriptors.
        """
        # Those of a daemon that was killed.  What they take would be lost once its pair of devices is deleted.
        for left in await remove_filters([alias for routing in routings for alias in routing.ownership.aliases]):
            log.info("deleted filter name=%r reason=a daemon that was killed has left it", left.name)
        was_clean = not any([await is_anything_ours(routing.ownership) for routing in routings])
        forwarding = cls(choice, routings, underlay, live, run_dir, kept, was_clean)
        backend = choice.backend
        encapsulations = [it for it in backend.encapsulations if not it.families.isdisjoint(live.families)]
        # The kernel or we may need their port.
        await kept.forget(kept.devices - set(map(forwarding.device, live.families)))
        try:
            for it in encapsulations:
                await forwarding._open_tunnel(it, confinement)
            for routing in routings:
                if routing.is_carried:
                    await create_missing_vxlans(backend.links(underlay, live, routing.family), routing.ownership.alias)
        except BaseException:
            # What has failed says more than what then cannot be undone.
            try:
                with suppress(UdptunError, OSError):
                    await forwarding.undo_failed_start()
            finally:
                forwarding.detach()
            raise
        return forwarding

    async def _open_tunnel(self, encapsulation: Encapsulation, confinement: Confinement) -> None:
        # Here, because a run whose packets the kernel carries does not need the libraries.
        from udptun.control.tunnelled import Tunnelled

        ownership = self._ownership_of(encapsulation.families)
        await delete_own_vxlan(encapsulation.device, ownership)
        how = (encapsulation, self._run_dir, self._underlay, self.live, confinement, ownership.alias)
        self._tunnels.append(await Tunnelled.open(*how))
        await mark_link(encapsulation.device, ownership)

    def _ownership_of(self, families: Collection[Family]) -> Ownership:
        """Of the device that serves these: that of the first one that is enabled."""
        return next(it for family, it in self._ownerships.items() if family in families)

    def tunnel_of(self, family: Family) -> Tunnelled | None:
        """The datapath that carries the family, or could; None: the kernel does, or nobody."""
        return next((it for it in self._tunnels if family in it.families), None)

    @property
    def tunnels(self) -> Sequence[Tunnelled]:
        """The datapaths: one, or one for each family; none where the kernel carries the packets."""
        return self._tunnels

    @property
    def routings(self) -> Sequence[Routing]:
        """Of each family that is enabled and that our lease has a subnet of.  May be asked on another thread."""
        return list(self._routings.values())

    @property
    def families(self) -> Sequence[Family]:
        """Those that are carried, IPv4 first."""
        return self.live.families

    @property
    def ipv6_device(self) -> str | None:
        """The device that the pods' IPv6 packets to other hosts go through; None: there is none."""
        return self.device(Family.IPV6) if Family.IPV6 in self.families else None

    def device(self, family: Family) -> str | None:
        """The device that the pods' packets of a family that is carried go through; None: they go through none."""
        return device_of(self.backend, self._underlay, self.live, family)

    @property
    def takes_shortcut(self) -> bool | None:
        """Whether our kernel takes what a peer's has encapsulated; None: that is not known yet."""
        each = {it.shortcut.takes for it in self._tunnels}
        return True in each or (None if None in each else False)

    @property
    def is_adopted(self) -> bool:
        return any(it.tunnel.is_adopted for it in self._tunnels)

    def refusal(self, lease: Lease, family: Family) -> str | None:
        """Why a valid lease is no peer of ours by that family; None when it is one."""
        address, subnet = self._underlay.address_of(family), lease.subnets.of(family)
        if address is not None and subnet is not None and address in subnet:
            return f"this host's underlay address {address} lies in it"
        return self.backend.refusal(lease, family)

    async def start(self, own: Subnets, live: LiveSettings, tables: Iterable[LeaseTable]) -> None:
        """Carry packets from now on.  Raises UdptunError when that cannot be.

        `own` are the subnets of our lease, and `live` are the settings with these.  `tables` have the peers, one of
        each family that is carried.
        """
        self.live = live
        for it in [it for it in self._tunnels if it.families.isdisjoint(live.families)]:
            await self._end(it)
        peers = {table.family: table.peers.values() for table in tables}
        for family, routing in [*self._routings.items()]:
            own_subnet = own.of(family)
            if own_subnet is not None:
                routing.learn(own_subnet, peers.get(family, ()))
                continue
            # Where a store gives the subnets, it may give one of one family alone.
            del self._routings[family]
            # The datapath's device may carry the other family.
            tunnel = self.tunnel_of(family)
            await remove_ours(routing.ownership, keep="" if tunnel is None else tunnel.device)
        for it in self._tunnels:
            await it.start(self._carried_inputs(it.families))
        # A datapath may be left of a run with another backend or other families, and the kernel may need its port.
        devices = {it.device for it in self._tunnels}
        await processes.end_all(await processes.find_running(self._run_dir, others=devices))
        await self._kept.forget(self._kept.devices - devices)
        await self._keep_descriptors()
        # A family of which our lease has no subnet has no peers.
        self.probes = {family: probes for family, probes in self.probes.items() if family in self._routings}
        for family, probes in self.probes.items():
            probes.use(self._inputs(family))
        for it in self._tunnels:
            it.tunnel.narrow_changed = self._update_desired
            it.shortcut.switched = lambda: self.shortcut_switched()
        self._has_started = True
        narrow, first = self._narrow, self.families[0]
        for family, routing in self._routings.items():
            tunnel = self.tunnel_of(family)
            device = None if tunnel is None else tunnel.tunnel.tun
            alias = None if tunnel is None else self._ownership_of(tunnel.families).alias
            await routing.start(device, alias, self._inputs(family), narrow, is_first=family is first)

    async def run(self) -> None:
        """Keep it so, until cancelled."""
        for it in self._tunnels:
            # Not before we are ready: a start that fails shall not take the datapath with it.
            await it.tunnel.datapath.bring_here()
        async with asyncio.TaskGroup() as tasks:
            for routing in self._routings.values():
                tasks.create_task(routing.run(), name=f"reconcile {routing.family}")
            for it in self._tunnels:
                tasks.create_task(it.run(), name=f"datapath of {it.device}")
            for family, probes in self.probes.items():
                tasks.create_task(probes.run(), name=f"probes by {family}")

    async def peers_changed(self, family: Family, events: Sequence[LeaseEvent]) -> None:
        """Follow a change of the peers, as LeaseTable reports it.  Ignored before `start`, which is given all peers."""
        if not self._has_started:
            return
        self._routings[family].change_peers(events)
        if (tunnel := self.tunnel_of(family)) is not None:
            await tunnel.peers_changed(family, events)
        if family in self.probes:
            self.probes[family].peers_changed(events)
        self._update_desired()

    async def apply(self, underlay: Underlay, live: LiveSettings) -> None:
        """Change settings, or move to another address, while packets flow.

        A setting that cannot be changed stays, with a line in the log.  Raises UdptunError when an address cannot be
        had; then nothing has changed, as far as those before can still be had.
        """
        try:
            live = await self._apply_to_tunnels(underlay, live)
        except UdptunError:
            with suppress(UdptunError):
                await self._apply_to_tunnels(self._underlay, self.live)
            raise
        finally:
            await self._keep_descriptors()
        self._underlay, self.live = underlay, live
        for family, probes in self.probes.items():
            probes.use(self._inputs(family))
        self._update_desired()

    async def undo_failed_start(self) -> None:
        """Leave nothing behind that we made.  Raises UdptunError.

        A datapath that was adopted goes on.  What an earlier run left in the kernel stays too: it keeps packets from
        leaving in clear text.
        """
        new = [it for it in self._tunnels if not it.tunnel.is_adopted]
        for it in new:
            await it.tunnel.datapath.stop()
        await self._kept.forget([it.device for it in new])
        if self._was_clean and not self.is_adopted:
            for ownership in self._ownerships.values():
                await remove_ours(ownership)

    def detach(self) -> None:
        """Close what we hold of the datapaths, which go on."""
        for it in self._tunnels:
            it.tunnel.detach()

    async def _end(self, tunnel: Tunnelled) -> None:
        """Give up a datapath that is not needed."""
        self._tunnels.remove(tunnel)
        await tunnel.tunnel.datapath.stop()
        tunnel.tunnel.detach()

    @property
    def is_well(self) -> bool:
        """Whether every datapath that there is works and is looked after; after `run` has begun."""
        return all(it.tunnel.datapath.is_well for it in self._tunnels)

    @property
    def problems(self) -> tuple[str, ...]:
        parts: Iterable[Tunnelled | HostProbes | Routing]
        parts = (*self._tunnels, *self.probes.values(), *self._routings.values())
        # What is wrong with a device that both families use, both say.
        return tuple(dict.fromkeys(line for part in parts for line in part.problems))

    @property
    def pod_paths(self) -> Sequence[PodPath]:
        """Where packets between the pods here and those of other hosts pass, by each family that we route."""
        paths = (pod_path(self.backend, self._inputs(family)) for family in self.families)
        return [it for it in paths if it is not None]

    @property
    def tunnel_paths(self) -> Sequence[TunnelPath]:
        """Where the tunnel's own datagrams pass, by each family of the underlay."""
        return tunnel_paths(self.backend, [self._inputs(family) for family in self.families])

    def liveness(self, lease: Lease) -> Liveness:
        """What is known of a peer.  May be asked on another thread."""
        for family in self.families:
            if (subnet := lease.subnets.of(family)) is None:
                continue
            if (tunnel := self.tunnel_of(family)) is not None:
                return tunnel.liveness(subnet)
            if (probes := self.probes.get(family)) is not None:
                return probes.liveness(lease)
        return Liveness.UNKNOWN

    def busiest(self, leases: Sequence[Lease], n: int) -> Sequence[Lease]:
        """The `n` of these peers that the most bytes were exchanged with.  May be asked on another thread.

        Where the kernel carries the packets, which does not say it, they are the first ones.
        """
        if not self._tunnels or len(leases) <= n:
            return leases[:n]
        by_tunnel = [it.traffic(leases) for it in self._tunnels]
        n_bytes = [sum(of_one) for of_one in zip(*by_tunnel, strict=True)]
        return [leases[i] for i in sorted(range(len(leases)), key=lambda i: -n_bytes[i])[:n]]

    async def _apply_to_tunnels(self, underlay: Underlay, live: LiveSettings) -> LiveSettings:
        """Returns the settings that are then in force.  Raises UdptunError.

        They are the same for all, unless one can neither have what another has nor that what it has: then they are the
        last one's, and each has said in the log what stays.
        """
        while True:
            wanted = live
            for it in self._tunnels:
                live = await it.apply(underlay, live)
            if live == wanted:
                return live

    async def _keep_descriptors(self) -> None:
        await self._kept.keep({it.device: it.tunnel.datapath.descriptors for it in self._tunnels})

    def _update_desired(self) -> None:
        """Tell the reconcilers what the backend desires now."""
        narrow = self._narrow
        for family, routing in self._routings.items():
            routing.want(self._inputs(family), narrow)

    @property
    def _narrow(self) -> Mapping[IPNetwork, int]:
        """The peers whose path takes less than the device, and what it takes, bytes."""
        return ChainMap(*(it.tunnel.peers.narrow for it in self._tunnels))

    def _carried_inputs(self, families: Collection[Family]) -> dict[Family, BackendInput]:
        """Of those of `families` that are carried."""
        return {family: self._inputs(family) for family in self.families if family in families}

    def _inputs(self, family: Family) -> BackendInput:
        return self._routings[family].inputs(self._underlay, self.live)

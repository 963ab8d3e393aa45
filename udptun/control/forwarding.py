"""What carries packets on this host: the backend, the datapath where there is one, and the reconciler.

The daemon drives it with leases and settings, and does not know which backend it is:

    open (device and sockets) -> lease -> start (peers, processes, kernel state) -> run, peers_changed, apply
                                                                                 -> detach; packets go on
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udptun.backends.base import BackendInput, LiveSettings
from udptun.backends.choice import BackendChoice
from udptun.control.host_probes import HostProbes
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.control.routing import Routing
from udptun.control.run_dir import IPV6_PROBES_FILE, PROBES_FILE
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseEvent, LeasePart, Subnets
from udptun.core.lease_table import LeaseTable
from udptun.core.network_state import IPNetwork
from udptun.core.pod_path import PodPath
from udptun.core.tunnel import Confinement
from udptun.datapath import processes
from udptun.kernel.device_counters import read_device_counters
from udptun.kernel.reconcile.apply import create_missing_vxlans
from udptun.kernel.reconcile.change import OBJECTS
from udptun.kernel.reconcile.ownership import delete_own_vxlan, is_anything_ours, mark_link, remove_ours
from udptun.kernel.underlay import Underlay
from udptun.probing.liveness import Liveness
from udptun.probing.memory import Memory

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
        routings: Sequence[Routing],
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        tunnel: Tunnelled | None,
        kept: KeptDescriptors,
        was_clean: bool,
    ) -> None:
        self.backend = choice.backend
        self._reason = choice.reason
        self.live = live
        self._routings = {routing.family: routing for routing in routings}
        self._ownerships = [routing.ownership for routing in routings]
        """Of all families that are enabled.  The first is that of the datapath's device, which serves all of them."""
        self._underlay = underlay
        self._run_dir = run_dir
        self._tunnel = tunnel
        self._probes: dict[Family, HostProbes] = {}
        if tunnel is None and choice.backend.peer_types:
            for family in live.families:
                memory = Memory(run_dir / (PROBES_FILE if family is Family.IPV4 else IPV6_PROBES_FILE))
                self._probes[family] = HostProbes(family, self._device(family), memory)
        self._kept = kept
        self._was_clean = was_clean
        """Whether the kernel had nothing with our mark when we came."""
        self._has_started = False

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
        """Make or adopt device and sockets: a host without them needs no lease.  Raises KernelError, DatapathError.

        `routings` are of the families that are enabled, IPv4 first.  `confinement` is what a datapath's processes shall
        give up.  `kept` gets their descriptors.
        """
        was_clean = not any([await is_anything_ours(routing.ownership) for routing in routings])
        ownership = routings[0].ownership
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
        for routing in routings:
            if routing.is_carried:
                await create_missing_vxlans(backend.links(underlay, live, routing.family), routing.ownership.alias)
        return cls(choice, routings, underlay, live, run_dir, tunnel, kept, was_clean)

    @property
    def families(self) -> Sequence[Family]:
        """Those that are carried, IPv4 first."""
        return self.live.families

    @property
    def _first(self) -> Family:
        return self.families[0]

    @property
    def ipv6_device(self) -> str | None:
        """The device that the pods' IPv6 packets to other hosts go through; None: there is none."""
        return self._device(Family.IPV6) if Family.IPV6 in self.families else None

    def _device(self, family: Family) -> str | None:
        return next((link.name for link in self.backend.links(self._underlay, self.live, family)), None)

    @property
    def is_adopted(self) -> bool:
        return self._tunnel is not None and self._tunnel.tunnel.is_adopted

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
        device = None if self._tunnel is None else self._tunnel.tunnel.tun
        peers = {table.family: table.peers.values() for table in tables}
        for family, routing in [*self._routings.items()]:
            own_subnet = own.of(family)
            if own_subnet is not None:
                routing.learn(own_subnet, peers.get(family, ()))
                continue
            # Where a store gives the subnets, it may give one of one family alone.
            del self._routings[family]
            # The datapath's device carries the other family.
            await remove_ours(routing.ownership, keep="" if device is None else device.name)
        if self._tunnel is not None:
            await self._tunnel.start(self._carried_inputs())
            await self._keep_descriptors()
        else:
            # A datapath may be left of a run with another backend, and the kernel may need its port.
            await processes.end_all(await processes.find_running(self._run_dir))
            await self._kept.forget()
        # A family of which our lease has no subnet has no peers.
        self._probes = {family: probes for family, probes in self._probes.items() if family in self._routings}
        for family, probes in self._probes.items():
            probes.use(self._inputs(family))
        alias = None if self._tunnel is None else self._ownerships[0].alias
        if self._tunnel is not None:
            self._tunnel.tunnel.narrow_changed = self._update_desired
        self._has_started = True
        narrow, first = self._narrow, self._first
        for family, routing in self._routings.items():
            await routing.start(device, alias, self._inputs(family), narrow, is_first=family is first)

    async def run(self) -> None:
        """Keep it so, until cancelled."""
        if self._tunnel is not None:
            # Not before we are ready: a start that fails shall not take the datapath with it.
            await self._tunnel.tunnel.datapath.bring_here()
        async with asyncio.TaskGroup() as tasks:
            for routing in self._routings.values():
                tasks.create_task(routing.run(), name=f"reconcile {routing.family}")
            if self._tunnel is not None:
                tasks.create_task(self._tunnel.run(), name="datapath")
            for family, probes in self._probes.items():
                tasks.create_task(probes.run(), name=f"probes by {family}")

    async def peers_changed(self, family: Family, events: Sequence[LeaseEvent]) -> None:
        """Follow a change of the peers, as LeaseTable reports it.  Ignored before `start`, which is given all peers."""
        if not self._has_started:
            return
        self._routings[family].change_peers(events)
        if self._tunnel is not None:
            await self._tunnel.peers_changed(family, events)
        if family in self._probes:
            self._probes[family].peers_changed(events)
        self._update_desired()

    async def apply(self, underlay: Underlay, live: LiveSettings) -> None:
        """Change settings, or move to another address, while packets flow.

        A setting that cannot be changed stays, with a line in the log.  Raises UdptunError when the address cannot be
        had; then nothing has changed.
        """
        if self._tunnel is not None:
            live = await self._tunnel.apply(self._carried_inputs(), underlay, live)
            await self._keep_descriptors()
        self._underlay, self.live = underlay, live
        for family, probes in self._probes.items():
            probes.use(self._inputs(family))
        self._update_desired()

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
            for ownership in self._ownerships:
                await remove_ours(ownership)

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
        parts = (self._tunnel, *self._probes.values(), *self._routings.values())
        # What is wrong with a device that both families use, both say.
        return tuple(dict.fromkeys(line for part in parts if part is not None for line in part.problems))

    @property
    def pod_paths(self) -> Sequence[PodPath]:
        """Where packets between the pods here and those of other hosts pass, by each family that we route."""
        found = []
        for family in self.families:
            inputs = self._inputs(family)
            device = self._device(family)
            if device is None:
                one_peer = replace(inputs, peers=tuple(islice(inputs.peers, 1)))
                device = self._underlay.link_name if self.backend.desired(one_peer).routes else None
            if device is not None:
                found.append(PodPath(inputs.network, inputs.own_subnet, device))
        return found

    def document(self, leases: Sequence[Lease], parts: Sequence[LeasePart]) -> dict[str, Any]:
        """The keys of docs/status.md about carrying packets.

        `leases` are the peers' by the first family, in the order to show them in, and `parts` what each says of it.
        """
        backend = {
            "type": self.backend.type,
            "reason": self._reason,
            "device": self._device(self._first),
            "mtu": self.live.mtu,
        }
        common = {"devices": self._devices(), "changes": self._changes()}
        peers = [_peer(lease, part) for lease, part in zip(leases, parts, strict=True)]
        if (probes := self._probes.get(self._first)) is not None:
            backend |= {"probes": probes.state}
            peers = [peer | probes.document(lease) for peer, lease in zip(peers, leases, strict=True)]
        if self._tunnel is None:
            return {"backend": backend, "datapath": None, **common, "peers": peers, "counters": {}}
        own = self._tunnel.document(self.live)
        known = self._tunnel.peer_documents([part.subnet for part in parts], leases, self.live)
        return {
            "backend": backend | own["backend"],
            "datapath": own["datapath"],
            **common,
            "peers": [peer | more for peer, more in zip(peers, known, strict=True)],
            "counters": own["counters"],
        }

    def _devices(self) -> list[dict[str, Any]]:
        names = sorted({name for family in self.families if (name := self._device(family)) is not None})
        counters = read_device_counters(names)
        return [{"name": name, **asdict(it)} for name in names if (it := counters.get(name)) is not None]

    def _changes(self) -> list[dict[str, Any]]:
        return [
            {
                "family": f"ipv{family.value}",
                "object": thing,
                "desired": routing.changes.get((thing, False), 0),
                "repairs": routing.changes.get((thing, True), 0),
            }
            for family, routing in list(self._routings.items())
            for thing in sorted(set(OBJECTS.values()))
        ]

    def liveness(self, lease: Lease) -> Liveness:
        """What is known of a peer.  May be asked on another thread."""
        family = next(it for it in self.families if lease.subnets.of(it) is not None)
        if self._tunnel is not None:
            return self._tunnel.liveness(lease.subnet_of(family))
        probes = self._probes.get(family)
        return Liveness.UNKNOWN if probes is None else probes.liveness(lease)

    def busiest(self, leases: Sequence[Lease], n: int) -> Sequence[Lease]:
        """The `n` of these peers that the most bytes were exchanged with.  May be asked on another thread.

        Where the kernel carries the packets, which does not say it, they are the first ones.
        """
        if self._tunnel is None or len(leases) <= n:
            return leases[:n]
        traffic = self._tunnel.traffic(leases, self.live)
        return [leases[i] for i in sorted(range(len(leases)), key=lambda i: -traffic[i])[:n]]

    def ipv6_peers(self, leases: Sequence[Lease]) -> list[dict[str, Any]]:
        """What is known of these peers by IPv6 beside their leases: keys of docs/status.md."""
        if self._tunnel is None:
            probes = self._probes.get(Family.IPV6)
            return [{} if probes is None else probes.document(lease) for lease in leases]
        return self._tunnel.peer_documents([lease.subnet_of(Family.IPV6) for lease in leases], leases, self.live)

    async def _keep_descriptors(self) -> None:
        if self._tunnel is not None:
            tunnel = self._tunnel.tunnel
            await self._kept.keep(tunnel.tun.name, tunnel.datapath.descriptors)

    def _update_desired(self) -> None:
        """Tell the reconcilers what the backend desires now."""
        narrow = self._narrow
        for family, routing in self._routings.items():
            routing.want(self._inputs(family), narrow)

    @property
    def _narrow(self) -> Mapping[IPNetwork, int]:
        """The peers whose path takes less than the device, and what it takes, bytes."""
        return {} if self._tunnel is None else self._tunnel.tunnel.peers.narrow

    def _carried_inputs(self) -> dict[Family, BackendInput]:
        return {family: self._inputs(family) for family in self.families}

    def _inputs(self, family: Family) -> BackendInput:
        return self._routings[family].inputs(self._underlay, self.live)


def _peer(lease: Lease, part: LeasePart) -> dict[str, Any]:
    return {
        "subnet": str(part.subnet),
        "public_ip": str(part.public_ip),
        "port": lease.attrs.port(0) or None,
        "udptun": lease.attrs.is_udptun,
        "expires_at": lease.expires_s,
    }

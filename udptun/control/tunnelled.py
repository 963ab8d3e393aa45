"""Forwarding by a userspace datapath, which is told what the backend says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from udptun.backends.base import BackendInput, Encapsulation, LiveSettings
from udptun.control.run_dir import IPV6_PROBES_FILE, PROBES_FILE
from udptun.control.shortcut_switch import ShortcutSwitch
from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.network_state import IPNetwork
from udptun.core.offload import names as offload_names
from udptun.core.tunnel import Confinement, SourceCheck
from udptun.datapath.carrier import TunnelCarrier
from udptun.datapath.learner import Learner
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.stats import PEER_COUNTERS
from udptun.datapath.strays import StrayWatch
from udptun.datapath.tunnel import Tunnel
from udptun.kernel.local_addresses import LocalAddresses, LocalAddressWatch, find_local_addresses
from udptun.kernel.underlay import Underlay
from udptun.probing.carrier import Target
from udptun.probing.liveness import Liveness
from udptun.probing.memory import Memory
from udptun.probing.prober import Prober

log = logging.getLogger(__name__)


class Tunnelled:
    """A datapath of a run, and the `Encapsulation` that says what it is told.

    `families` is what it can carry, and `device` the device whose packets it carries.
    """

    def __init__(self, encapsulation: Encapsulation, tunnel: Tunnel, run_dir: Path, alias: str) -> None:
        """`alias`: that of our devices."""
        self.tunnel = tunnel
        self.families, self.device = encapsulation.families, encapsulation.device
        self._encapsulation = encapsulation
        self._learner = Learner(tunnel, lambda: tunnel.n_workers)
        self._strays = StrayWatch(tunnel.table, tunnel.stats, lambda: tunnel.n_workers, self._learner.explains)
        self._carrier = TunnelCarrier(tunnel)
        self.shortcut = ShortcutSwitch(tunnel, alias)
        probes_file = PROBES_FILE if Family.IPV4 in self.families else IPV6_PROBES_FILE
        self._prober = Prober(self._carrier, memory=Memory(run_dir / probes_file))
        self._leases: dict[Family, dict[IPNetwork, Lease]] = {}
        """Of the peers by each family that is carried, by their subnets."""
        self._local_watch: LocalAddressWatch | None = None
        self._not_refused = ""
        """Names addresses of this host that the table has no room for."""

    @classmethod
    async def open(
        cls,
        encapsulation: Encapsulation,
        run_dir: Path,
        underlay: Underlay,
        live: LiveSettings,
        confinement: Confinement,
        alias: str,
    ) -> Tunnelled:
        """Adopt device and sockets, or make them.  `alias`: that of our devices.  Raises KernelError, DatapathError."""
        where, n_senders = encapsulation.where(underlay), encapsulation.n_senders(underlay, live)
        how = (where, live.workers, live.offload, n_senders, confinement)
        return cls(encapsulation, await Tunnel.open(run_dir, encapsulation.device, *how), run_dir, alias)

    async def start(self, inputs: Mapping[Family, BackendInput]) -> None:
        """Carry packets of these families."""
        self._inputs = inputs
        settings, live = self._settings(inputs), _any(inputs).live
        self.tunnel.configure(settings)
        self._leases = {family: {it.subnet_of(family): it for it in of.peers} for family, of in inputs.items()}
        remotes = self._remotes(ChainMap(*self._leases.values()))
        self.tunnel.peers.set_all(remotes)
        self._follow(self._leases.get(Family.IPV6, ()))
        self._switch(settings, live)
        local = await find_local_addresses(inputs)
        self._set_local_addresses(local)
        await self._publish(remotes)
        await self.tunnel.start()
        self.tunnel.set_offload(live.offload)
        self._local_watch = LocalAddressWatch(tuple(inputs), local, self._use_local_addresses)
        self.shortcut.use(live.shortcut, _any(inputs).underlay.link_name, settings)

    async def run(self) -> None:
        """Keep the processes running and the table true to this host's addresses, until cancelled.  After `start`."""
        assert self._local_watch is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tunnel.datapath.supervise(), name="supervise datapath")
            tasks.create_task(self._local_watch.run(), name="local addresses")
            tasks.create_task(self._strays.run(), name="strays")
            tasks.create_task(self._prober.run(), name="probes")
            tasks.create_task(self._learner.run(), name="learning")
            tasks.create_task(self.tunnel.strangers.run(), name="strangers")
            tasks.create_task(self.shortcut.run(), name="shortcut")

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong right now.  May be read on another thread."""
        local = () if self._local_watch is None else self._local_watch.problems
        others = (*self._strays.problems, *self._prober.problems, *self.shortcut.problems)
        return (*self.tunnel.problems, *filter(None, [self._not_refused]), *local, *others)

    async def peers_changed(self, family: Family, events: Sequence[LeaseEvent]) -> None:
        leases = self._leases[family]
        removed = [event.lease.subnet_of(family) for event in events if event.type is EventType.REMOVED]
        added = {it.lease.subnet_of(family): it.lease for it in events if it.type is EventType.ADDED}
        for subnet in removed:
            leases.pop(subnet, None)
        leases.update(added)
        # What stands for another host than before is another peer to the prober.
        of_ipv6 = self._leases.get(Family.IPV6, {})
        ipv6 = [it for event in events if (it := event.lease.subnets.ipv6) is not None and it in of_ipv6]
        self._prober.remove_peers([*removed, *ipv6])
        self._learner.remove_peers([*removed, *ipv6])
        self.tunnel.peers.remove(removed)
        self.tunnel.peers.add(self._remotes(added))
        self._follow(ipv6)
        await self._publish(self._remotes({**added, **{subnet: of_ipv6[subnet] for subnet in ipv6}}))

    async def apply(self, underlay: Underlay, live: LiveSettings) -> LiveSettings:
        """Change to these, and return the settings that are then in force.

        Raises UdptunError when the address cannot be had; then nothing has changed.
        """
        how, before = self._encapsulation, _any(self._inputs)
        n_senders, where = how.n_senders(underlay, live), how.where(underlay)
        try:
            await self.tunnel.rebind(where, live.workers, n_senders)
        except UdptunError as exc:
            if where != how.where(before.underlay):
                raise
            live = replace(live, workers=before.live.workers, source_ports=before.live.source_ports)
            log.error("not reloaded, the workers stay %d: %s", live.workers, exc)
        if live.offload != before.live.offload:
            try:
                self.tunnel.set_offload(live.offload)
            except UdptunError as exc:
                live = replace(live, offload=before.live.offload)
                log.error("not reloaded, the offloads stay: %s", exc)
        settings_before = self._settings(self._inputs)
        self._inputs = {family: replace(it, underlay=underlay, live=live) for family, it in self._inputs.items()}
        settings = self._settings(self._inputs)
        if settings != settings_before:
            self.tunnel.configure(settings)
            remotes = self._remotes(ChainMap(*self._leases.values()))
            self.tunnel.peers.add(remotes)
            self._switch(settings, live)
            await self._publish(remotes)
        self.shortcut.use(live.shortcut, underlay.link_name, settings)
        return live

    def _switch(self, settings: PacketSettings, live: LiveSettings) -> None:
        """After `tunnel.configure`."""
        self._carrier.own_addresses = settings.tunnel_addresses
        self._prober.switch(is_on=live.probe, mtu=settings.mtu)
        is_learning = live.probe and live.source_check is SourceCheck.PEER
        self._learner.switch(is_on=is_learning, own_addresses=settings.tunnel_addresses, echo_id=settings.punt_id)

    def _settings(self, inputs: Mapping[Family, BackendInput]) -> PacketSettings:
        settings = self._encapsulation.packet_settings(inputs)
        return replace(settings, punt_id=self._carrier.echo_id if _any(inputs).live.probe else 0)

    async def _use_local_addresses(self, local: LocalAddresses) -> None:
        self._set_local_addresses(local)
        await self.tunnel.publish()

    def _set_local_addresses(self, local: LocalAddresses) -> None:
        """Refuse packets from these addresses of this host, from the next `publish` on."""
        n_left = self.tunnel.table.set_local_addresses(sorted(local.addresses, key=lambda ip: (ip.version, ip)))
        left = [f"{n_left} of this host's {len(local.addresses)} addresses"] * bool(n_left) + list(map(str, local.wide))
        said = self._not_refused
        commands = [
            f"`{'iptables' if version == 4 else 'ip6tables'} -t raw -A PREROUTING -i {self.device} -m addrtype "
            f"--src-type LOCAL ! -s {address} -j DROP`"
            for version, address in self._carrier.own_addresses.items()
        ]
        self._not_refused = (
            f"packets that peers send from {' and '.join(left)} are not refused, because so many do not fit; run "
            f"{' and '.join(commands)}"
            if left
            else ""
        )
        if self._not_refused != said:
            log.warning("%s", self._not_refused or "packets from all addresses of this host are refused again")

    def document(self, live: LiveSettings) -> dict[str, Any]:
        """The datapath's part of the keys of docs/status.md, without what it knows of each peer."""
        stats, datapath = self.tunnel.stats, self.tunnel.datapath
        active, n_workers = datapath.active, self.tunnel.n_workers
        usage = active.usage if active else None
        return {
            "backend": {
                "probes": self._prober.state,
                "source_check": live.source_check.value,
                "source_ports": self.tunnel.n_senders or 1,
                "offloads": offload_names(self.tunnel.granted_offload & ~stats.refused(n_workers)),
            },
            "datapath": {
                "pid": active.pid if active else None,
                "uptime_s": round((time.monotonic_ns() - active.started_ns) / 1e9, 1) if active else None,
                "started_at": round(active.started_s, 3) if active else None,
                "standby_pids": [process.pid for process in datapath.standbys],
                "stranger_filter": self.tunnel.strangers.state,
                **self.shortcut.document(),
                "confinement": active.confinement.value if active and active.confinement else None,
                "cpu_s": usage and usage.cpu_s,
                "memory_bytes": usage and usage.memory_bytes,
                "receive_queues": [
                    {"worker": worker, "family": f"ipv{family.value}", **asdict(queue)}
                    for worker, family, queue in self.tunnel.receive_queues
                ],
                "workers": [worker.name.lower() for worker in stats.states(n_workers)],
                "worker_counters": stats.worker_counters(n_workers),
            },
            "counters": {
                **stats.counters(),
                "inject_drop_full": self.tunnel.rings.n_refused,
                "drop_stranger": stats.n_strangers,
            },
        }

    def liveness(self, subnet: IPNetwork) -> Liveness:
        """What is known of a peer."""
        return self._prober.liveness(self.tunnel.peers.leader(subnet))

    def traffic(self, leases: Sequence[Lease]) -> list[int]:
        """How many bytes have been exchanged with each of these peers, by all families."""
        table, sums = self.tunnel.table, [0] * len(leases)
        at = [PEER_COUNTERS.index(name) for name in ("encap_bytes", "decap_bytes")]
        for family in list(self._leases):
            indexes = [None if (it := lease.subnets.of(family)) is None else table.index_of(it) for lease in leases]
            for i, row in enumerate(self.tunnel.stats.peers(indexes)):
                sums[i] += sum(row[column] for column in at)
        return sums

    def peer_documents(self, subnets: Sequence[IPNetwork], leases: Sequence[Lease]) -> list[dict[str, Any]]:
        """What the datapath knows of peers, which have these subnets by these leases: keys of docs/status.md."""
        table, leader = self.tunnel.table, self.tunnel.peers.leader
        strays = self._strays.packets
        counts = self.tunnel.stats.peers([table.index_of(subnet) for subnet in subnets])
        return [
            {
                "public_ip": str(remote.address),
                "port": remote.port,
                "any_source_port": remote.takes_any_source_port,
                "ecn": remote.carries_ecn,
                "shortcut": self.shortcut.is_sent_to(subnet),
                **dict(zip(PEER_COUNTERS, count, strict=True)),
                **self._prober.document(leader(subnet)),
                "learned": self._learner.document(subnet),
                "strays": strays.get(subnet, 0),
            }
            for subnet, remote, count in zip(subnets, map(self._encapsulation.remote, leases), counts, strict=True)
        ]

    def _remotes(self, leases: Mapping[IPNetwork, Lease]) -> dict[IPNetwork, Remote]:
        return {subnet: self._encapsulation.remote(lease) for subnet, lease in leases.items()}

    def _follow(self, subnets: Iterable[IPNetwork]) -> None:
        """Have these peers by IPv6 follow those of the same leases by IPv4, as far as there are any."""
        for subnet in subnets:
            lease = self._leases[Family.IPV6].get(subnet)
            if lease is None:
                continue
            leader: IPNetwork | None = lease.subnets.ipv4
            twin = None if leader is None else self._leases.get(Family.IPV4, {}).get(leader)
            if twin is None or twin.key != lease.key:
                leader = None
            self.tunnel.peers.follow(subnet, leader)

    async def _publish(self, remotes: Mapping[IPNetwork, Remote]) -> None:
        """Show the workers what was set.  Those of these peers that stand for their hosts are probed and asked."""
        # A host that takes the shortcut, or does not any more, is the same host with the same path to it.
        leaders = {
            subnet: replace(it, takes_shortcut=False)
            for subnet, it in remotes.items()
            if self.tunnel.peers.leader(subnet) == subnet
        }
        self._prober.add_peers(self._targets(leaders))
        self._learner.add_peers(leaders)
        await self.tunnel.publish()

    def _targets(self, remotes: Mapping[IPNetwork, Remote]) -> Mapping[IPNetwork, Target]:
        """A peer is asked at its tunnel address, which any kernel answers."""
        return {
            subnet: Target(
                subnet.network_address,
                it.address,
                f"{it.address} UDP port {it.port}",
                it,
                self.tunnel.peers.less_for(it),
            )
            for subnet, it in remotes.items()
        }


def _any(inputs: Mapping[Family, BackendInput]) -> BackendInput:
    """For what is the same in the inputs of all families."""
    return next(iter(inputs.values()))

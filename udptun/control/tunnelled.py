"""Forwarding by the userspace datapath, which is told what the backend says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from udptun.backends.base import BackendInput, Encapsulation, LiveSettings
from udptun.control.run_dir import PROBES_FILE
from udptun.core.errors import UdptunError
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
from udptun.probing.memory import Memory
from udptun.probing.prober import Prober

log = logging.getLogger(__name__)


class Tunnelled:
    """The datapath of a run, and the `Encapsulation` that says what it is told."""

    def __init__(self, encapsulation: Encapsulation, tunnel: Tunnel, run_dir: Path) -> None:
        self.tunnel = tunnel
        self._encapsulation = encapsulation
        self._learner = Learner(tunnel, lambda: len(tunnel.tun.fds))
        self._strays = StrayWatch(tunnel.table, tunnel.stats, lambda: len(tunnel.tun.fds), self._learner.explains)
        self._carrier = TunnelCarrier(tunnel)
        self._prober = Prober(self._carrier, memory=Memory(run_dir / PROBES_FILE))
        self._local_watch: LocalAddressWatch | None = None
        self._not_refused = ""
        """Names addresses of this host that the table has no room for."""

    @classmethod
    async def open(
        cls,
        encapsulation: Encapsulation,
        run_dir: Path,
        device: str,
        underlay: Underlay,
        live: LiveSettings,
        confinement: Confinement,
    ) -> Tunnelled:
        """Adopt device and sockets, or make them.  Raises KernelError, DatapathError."""
        assert underlay.address is not None
        where = (run_dir, device, underlay.address, encapsulation.port)
        n_senders = encapsulation.n_senders(underlay, live)
        tunnel = await Tunnel.open(*where, live.workers, live.offload, n_senders, confinement=confinement)
        return cls(encapsulation, tunnel, run_dir)

    async def start(self, inputs: BackendInput) -> None:
        settings = self._settings(inputs)
        self._tunnel_address = settings.tunnel_address
        self.tunnel.configure(settings)
        remotes = self._remotes(inputs.peers)
        self.tunnel.set_peers(remotes)
        self._switch(settings, inputs.live)
        self._prober.set_peers(_targets(remotes))
        self._learner.set_peers(remotes)
        local = await find_local_addresses()
        self._set_local_addresses(local)
        await self.tunnel.publish()
        await self.tunnel.start()
        self.tunnel.set_offload(inputs.live.offload)
        self._local_watch = LocalAddressWatch(local, self._use_local_addresses)

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

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong right now.  May be read on another thread."""
        local = () if self._local_watch is None else self._local_watch.problems
        others = (*self._strays.problems, *self._prober.problems)
        return (*self.tunnel.problems, *filter(None, [self._not_refused]), *local, *others)

    async def peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        removed = [_subnet(event.lease) for event in events if event.type is EventType.REMOVED]
        added = self._remotes(event.lease for event in events if event.type is EventType.ADDED)
        self._prober.remove_peers(removed)
        self._learner.remove_peers(removed)
        self.tunnel.remove_peers(removed)
        self.tunnel.add_peers(added)
        self._prober.add_peers(_targets(added))
        self._learner.add_peers(added)
        await self.tunnel.publish()

    async def apply(self, before: BackendInput, now: BackendInput) -> LiveSettings:
        """Change from `before` to `now`, and return the settings that are then in force.  Raises UdptunError."""
        how, live = self._encapsulation, now.live
        n_senders = how.n_senders(now.underlay, live)
        assert now.underlay.address is not None
        try:
            await self.tunnel.rebind(now.underlay.address, how.port, live.workers, n_senders)
        except UdptunError as exc:
            if now.underlay.address != before.underlay.address:
                raise
            live = replace(live, workers=before.live.workers, source_ports=before.live.source_ports)
            log.error("not reloaded, the workers stay %d: %s", live.workers, exc)
        if live.offload != before.live.offload:
            try:
                self.tunnel.set_offload(live.offload)
            except UdptunError as exc:
                live = replace(live, offload=before.live.offload)
                log.error("not reloaded, the offloads stay: %s", exc)
        now = replace(now, live=live)
        settings = self._settings(now)
        if settings != self._settings(before):
            self.tunnel.configure(settings)
            remotes = self._remotes(now.peers)
            self.tunnel.add_peers(remotes)
            self._switch(settings, live)
            self._prober.add_peers(_targets(remotes))
            self._learner.add_peers(remotes)
            await self.tunnel.publish()
        return live

    def _switch(self, settings: PacketSettings, live: LiveSettings) -> None:
        """After `tunnel.configure`."""
        self._carrier.own_address = settings.tunnel_address
        self._prober.switch(is_on=live.probe, mtu=settings.mtu)
        is_learning = live.probe and live.source_check is SourceCheck.PEER
        self._learner.switch(is_on=is_learning, own_address=settings.tunnel_address, echo_id=settings.punt_id)

    def _settings(self, inputs: BackendInput) -> PacketSettings:
        settings = self._encapsulation.packet_settings(inputs)
        return replace(settings, punt_id=self._carrier.echo_id if inputs.live.probe else 0)

    async def _use_local_addresses(self, local: LocalAddresses) -> None:
        self._set_local_addresses(local)
        await self.tunnel.publish()

    def _set_local_addresses(self, local: LocalAddresses) -> None:
        """Refuse packets from these addresses of this host, from the next `publish` on."""
        n_left = self.tunnel.table.set_local_addresses(sorted(local.addresses))
        left = [f"{n_left} of this host's {len(local.addresses)} addresses"] * bool(n_left) + list(map(str, local.wide))
        said, device = self._not_refused, self.tunnel.tun.name
        self._not_refused = (
            f"packets that peers send from {' and '.join(left)} are not refused, because so many do not fit; run "
            f"`iptables -t raw -A PREROUTING -i {device} -m addrtype --src-type LOCAL ! -s {self._tunnel_address} "
            "-j DROP`"
            if left
            else ""
        )
        if self._not_refused != said:
            log.warning("%s", self._not_refused or "packets from all addresses of this host are refused again")

    def document(self, leases: Sequence[Lease], live: LiveSettings) -> dict[str, Any]:
        """The datapath's part of the keys of docs/status.md; of each peer what the datapath knows of it."""
        table, stats, datapath = self.tunnel.table, self.tunnel.stats, self.tunnel.datapath
        counts = stats.peers([table.index_of(_subnet(lease)) for lease in leases], live.workers)
        active = datapath.active
        return {
            "backend": {
                "probes": self._prober.state,
                "source_check": live.source_check.value,
                "source_ports": self.tunnel.n_senders or 1,
                "offloads": offload_names(self.tunnel.granted_offload & ~stats.refused(live.workers)),
            },
            "datapath": {
                "pid": active.pid if active else None,
                "uptime_s": round((time.monotonic_ns() - active.started_ns) / 1e9, 1) if active else None,
                "standby_pids": [process.pid for process in datapath.standbys],
                "stranger_filter": self.tunnel.strangers.state,
                "confinement": active.confinement.value if active and active.confinement else None,
                "workers": [worker.name.lower() for worker in stats.states(live.workers)],
                "worker_counters": stats.worker_counters(live.workers),
            },
            "peers": [
                {
                    "port": remote.port,
                    "any_source_port": remote.takes_any_source_port,
                    "ecn": remote.carries_ecn,
                    **dict(zip(PEER_COUNTERS, count, strict=True)),
                    **self._prober.document(_subnet(lease)),
                    "learned": self._learner.document(_subnet(lease)),
                }
                for lease, remote, count in zip(leases, map(self._encapsulation.remote, leases), counts, strict=True)
            ],
            "counters": {
                **stats.counters(),
                "inject_drop_full": self.tunnel.rings.n_refused,
                "drop_stranger": stats.n_strangers,
            },
        }

    def _remotes(self, leases: Iterable[Lease]) -> Mapping[IPNetwork, Remote]:
        return {_subnet(lease): self._encapsulation.remote(lease) for lease in leases}


def _subnet(lease: Lease) -> IPv4Network:
    """The datapath carries IPv4 alone."""
    assert lease.subnets.ipv4 is not None
    return lease.subnets.ipv4


def _targets(remotes: Mapping[IPNetwork, Remote]) -> Mapping[IPv4Network, Target]:
    """A peer is asked at its tunnel address, which any kernel answers."""
    return {
        subnet: Target(subnet.network_address, remote.address, f"{remote.address} UDP port {remote.port}", remote)
        for subnet, remote in remotes.items()
        if isinstance(subnet, IPv4Network) and isinstance(remote.address, IPv4Address)
    }

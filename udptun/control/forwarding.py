"""What carries packets on this host: the backend, the datapath where there is one, and the reconciler.

The daemon drives it with leases and settings and knows of no backend what it is:

    open (device and sockets) -> lease -> start (peers, processes, kernel state) -> run, peers_changed, apply
                                                                                 -> detach; packets go on
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from udptun.backends.base import BackendInput, Encapsulation, LiveSettings
from udptun.backends.choice import BackendChoice
from udptun.core.desired import DesiredState, blackhole
from udptun.core.errors import UdptunError
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.offload import names as offload_names
from udptun.datapath import processes
from udptun.datapath.settings import Remote
from udptun.datapath.stats import PEER_COUNTERS
from udptun.datapath.tunnel import Tunnel
from udptun.kernel.reconcile.apply import create_missing_vxlans
from udptun.kernel.reconcile.ownership import delete_own_vxlan, is_anything_ours, remove_ours
from udptun.kernel.reconcile.reconciler import Reconciler
from udptun.kernel.underlay import Underlay

log = logging.getLogger(__name__)


class Forwarding:
    """One host's packets, carried as the chosen backend says.  Made by `open`; for one event loop.

    `live` is what is in force now; `is_adopted`: packets were being carried when we came, by what we now hold.
    """

    def __init__(
        self,
        choice: BackendChoice,
        network: IPv4Network,
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        tunnel: _Tunnelled | None,
        was_clean: bool,
        with_blackhole: bool,
    ) -> None:
        self.backend = choice.backend
        self._reason = choice.reason
        self.live = live
        self._network = network
        self._underlay = underlay
        self._run_dir = run_dir
        self._tunnel = tunnel
        self._was_clean = was_clean
        """Whether the kernel had nothing of ours when we came."""
        self._with_blackhole = with_blackhole
        self._own_subnet: IPv4Network
        self._peers: dict[IPv4Network, Lease] = {}
        self._reconciler: Reconciler | None = None

    @classmethod
    async def open(
        cls,
        choice: BackendChoice,
        network: IPv4Network,
        underlay: Underlay,
        live: LiveSettings,
        run_dir: Path,
        *,
        with_blackhole: bool = False,
    ) -> Forwarding:
        """Make, or adopt, what must be there before a lease is worth having.  Raises KernelError, DatapathError.

        `with_blackhole`: the own subnet shall have a blackhole route behind all others (--ip-blackhole-route).
        """
        was_clean = not await is_anything_ours()
        tunnel = None
        backend = choice.backend
        if backend.encapsulation is not None:
            assert backend.device is not None
            how = backend.encapsulation
            await delete_own_vxlan(backend.device)
            tunnel = _Tunnelled(
                how,
                await Tunnel.open(
                    run_dir,
                    backend.device,
                    underlay.address,
                    how.port,
                    live.workers,
                    live.offload,
                    how.n_senders,
                ),
            )
        await create_missing_vxlans(backend.links(underlay, live))
        return cls(choice, network, underlay, live, run_dir, tunnel, was_clean, with_blackhole)

    @property
    def is_adopted(self) -> bool:
        return self._tunnel is not None and self._tunnel.tunnel.is_adopted

    async def start(self, own_subnet: IPv4Network, peers: Iterable[Lease]) -> None:
        """Carry packets from now on.  Raises UdptunError when that cannot be."""
        self._own_subnet = own_subnet
        self._peers = {lease.subnet: lease for lease in peers}
        if self._tunnel is not None:
            await self._tunnel.start(self._inputs())
        else:
            # A datapath of an earlier run with another backend: the kernel may need its port.
            await processes.stop(await processes.find(self._run_dir))
        self._reconciler = Reconciler(DesiredState(), None if self._tunnel is None else self._tunnel.tunnel.tun)
        self._update_desired(self._reconciler)
        outcome = await self._reconciler.converge()
        if outcome.is_broken:
            what = self.backend.device or f"the {self.backend.type} backend"
            raise UdptunError(f"cannot set up {what}: {'; '.join(outcome.failures)}")

    async def run(self) -> None:
        """Keep it so, until cancelled."""
        assert self._reconciler is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconciler.run(), name="reconcile")
            if self._tunnel is not None:
                tasks.create_task(self._tunnel.tunnel.datapath.supervise(), name="supervise datapath")

    async def peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        """Go along with the difference that LeaseTable made out.  Before `start`: ignored, it is given all peers."""
        if self._reconciler is None:
            return
        for event in events:
            if event.type is EventType.REMOVED:
                self._peers.pop(event.lease.subnet, None)
            else:
                self._peers[event.lease.subnet] = event.lease
        if self._tunnel is not None:
            await self._tunnel.peers_changed(events)
        self._update_desired(self._reconciler)

    async def apply(self, underlay: Underlay, live: LiveSettings) -> None:
        """Change settings, or go over to another address, while packets flow.

        Settings that cannot be changed stay, with a line in the log.  Raises UdptunError, with nothing changed, when
        there is no having the address.
        """
        assert self._reconciler is not None
        # The peers as they come and go meanwhile, not as they are now.
        inputs = replace(self._inputs(), underlay=underlay, live=live, peers=self._peers.values())
        if self._tunnel is not None:
            live = await self._tunnel.apply(self._inputs(), inputs)
        self._underlay, self.live = underlay, live
        self._update_desired(self._reconciler)

    async def undo_failed_start(self) -> None:
        """Leave nothing behind that we made.  Raises UdptunError.

        What was adopted forwards on, and what an earlier run left goes on to keep packets from leaking.
        """
        if self.is_adopted:
            return
        if self._tunnel is not None:
            await self._tunnel.tunnel.datapath.stop()
        if self._was_clean:
            await remove_ours()

    def detach(self) -> None:
        """Let go of everything; packets are carried on."""
        if self._tunnel is not None:
            self._tunnel.tunnel.detach()

    @property
    def problems(self) -> tuple[str, ...]:
        return () if self._reconciler is None else self._reconciler.problems

    def document(self, leases: Sequence[Lease]) -> dict[str, Any]:
        """The keys of docs/status.md that are about carrying packets; `leases` are the peers' in the order wanted."""
        backend = {
            "type": self.backend.type,
            "reason": self._reason,
            "device": self.backend.device,
            "mtu": self.live.mtu,
        }
        if self._tunnel is None:
            return {
                "backend": backend,
                "datapath": None,
                "peers": [_peer(lease, lease.attrs.port(0) or None) for lease in leases],
                "counters": {},
            }
        own = self._tunnel.document(leases, self.live)
        return {**own, "backend": backend | own["backend"]}

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
        if not self._with_blackhole:
            return desired
        return replace(desired, routes=(*desired.routes, blackhole(inputs.own_subnet)))

    def _inputs(self) -> BackendInput:
        return BackendInput(self._network, self._underlay, self._own_subnet, self.live, tuple(self._peers.values()))


class _Tunnelled:
    """The datapath's part, told what the backend says."""

    def __init__(self, encapsulation: Encapsulation, tunnel: Tunnel) -> None:
        self.tunnel = tunnel
        self._encapsulation = encapsulation

    async def start(self, inputs: BackendInput) -> None:
        self.tunnel.configure(self._encapsulation.packet_settings(inputs))
        self.tunnel.set_peers(self._remotes(inputs.peers))
        await self.tunnel.publish()
        await self.tunnel.start()
        self.tunnel.set_offload(inputs.live.offload)

    async def peers_changed(self, events: Sequence[LeaseEvent]) -> None:
        self.tunnel.remove_peers(event.lease.subnet for event in events if event.type is EventType.REMOVED)
        self.tunnel.add_peers(self._remotes(event.lease for event in events if event.type is EventType.ADDED))
        await self.tunnel.publish()

    async def apply(self, before: BackendInput, now: BackendInput) -> LiveSettings:
        """Change from `before` to `now`; return the settings that are in force then.  Raises UdptunError."""
        how, live = self._encapsulation, now.live
        try:
            await self.tunnel.rebind(now.underlay.address, how.port, live.workers, how.n_senders)
        except UdptunError as exc:
            if now.underlay.address != before.underlay.address:
                raise
            live = replace(live, workers=before.live.workers)
            log.error("not reloaded, the workers stay %d: %s", live.workers, exc)
        if live.offload != before.live.offload:
            self.tunnel.set_offload(live.offload)
        settings = self._encapsulation.packet_settings(now)
        if settings != self._encapsulation.packet_settings(before):
            self.tunnel.configure(settings)
            self.tunnel.add_peers(self._remotes(now.peers))
            await self.tunnel.publish()
        return live

    def document(self, leases: Sequence[Lease], live: LiveSettings) -> dict[str, Any]:
        table, stats, datapath = self.tunnel.table, self.tunnel.stats, self.tunnel.datapath
        counts = stats.peers([table.index_of(lease.subnet) for lease in leases], live.workers)
        active = datapath.active
        return {
            "backend": {
                "source_check": live.source_check.value,
                "offloads": offload_names(self.tunnel.granted_offload & ~stats.refused(live.workers)),
            },
            "datapath": {
                "pid": active.pid if active else None,
                "uptime_s": round((time.monotonic_ns() - active.started_ns) / 1e9, 1) if active else None,
                "standby_pids": [process.pid for process in datapath.standbys],
                "workers": [worker.name.lower() for worker in stats.states(live.workers)],
            },
            "peers": [
                _peer(lease, self._encapsulation.remote(lease).port) | dict(zip(PEER_COUNTERS, count, strict=True))
                for lease, count in zip(leases, counts, strict=True)
            ],
            "counters": stats.counters(),
        }

    def _remotes(self, leases: Iterable[Lease]) -> Mapping[IPv4Network, Remote]:
        return {lease.subnet: self._encapsulation.remote(lease) for lease in leases}


def _peer(lease: Lease, port: int | None) -> dict[str, Any]:
    return {
        "subnet": str(lease.subnet),
        "public_ip": str(lease.attrs.public_ip),
        "port": port,
        "udptun": lease.attrs.is_udptun,
        "expires_at": lease.expires_s,
    }

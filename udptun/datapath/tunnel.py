"""Everything of the datapath that the control plane holds: memory files, TUN queues, sockets and processes.

`Tunnel.open` finds what an earlier control plane left running and goes on with it, or makes everything new.  From then
on the datapath needs nobody: `detach` changes nothing for the packets.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from udptun._fastpath import LAYOUT
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.lease import is_inside
from udptun.core.network_state import DEVICE_NAME
from udptun.core.offload import ALL, Offload, names
from udptun.core.tunnel import Confinement
from udptun.datapath import processes
from udptun.datapath.peer_entries import PeerEntries
from udptun.datapath.processes import Process
from udptun.datapath.protocol import Descriptors
from udptun.datapath.rebinding import Endpoints, Rebinding
from udptun.datapath.rings import Rings, new_events
from udptun.datapath.settings import PacketSettings, Where
from udptun.datapath.sockets import (
    ReceiveQueue,
    family_of,
    leave_paths_to_us,
    open_senders,
    open_sockets,
    receive_queue,
    set_offload,
    share_port,
)
from udptun.datapath.stats import Stats
from udptun.datapath.strangers import StrangerFilter
from udptun.datapath.supervision import Datapath, new_lock
from udptun.datapath.table import TableWriter
from udptun.datapath.tracing import Tracer
from udptun.kernel.tun import Tun, device_of, open_queues

log = logging.getLogger(__name__)

_PUBLISH_RETRY_S = 0.0005
_PUBLISH_PATIENCE_S = 1.0


class Tunnel:
    """One host's tunnel.  Made by `open`; not safe for use from more than one event loop."""

    def __init__(
        self,
        run_dir: Path,
        table: TableWriter,
        stats: Stats,
        lock_fd: int,
        events: tuple[int, ...],
        tun: Tun,
        endpoints: Endpoints,
        processes: list[Process],
        wanted: Offload,
        confinement: Confinement = Confinement.FULL,
    ) -> None:
        self.table = table
        self.stats = stats
        self.peers = PeerEntries(table, stats)
        self.rings = Rings(stats, events)
        self.tracer = Tracer(stats)
        self.strangers = StrangerFilter(table, stats, lambda: self._endpoints.sets)
        self.tun = tun
        self.is_adopted = bool(processes)
        """Whether a datapath was running already when we came."""
        self._lock_fd, self._events = lock_fd, events
        self._endpoints = endpoints
        self._asked: tuple[Where, int, int] | None = None
        """Where, and the workers and senders, that an adopted datapath gets with `start`."""
        self._rebinding: Rebinding | None = None
        """Built for that by `open`, and not yet carried out."""
        self._wanted_offload, self.granted_offload = wanted, Offload(0)
        self._publishing = asyncio.Lock()
        self.narrow_changed: Callable[[], None] = lambda: None
        """Called when `PeerEntries.narrow` says something else of a peer that stays."""
        self.publishing: Callable[[], None] = lambda: None
        """Called before the workers are shown another table."""
        self.datapath = Datapath(run_dir, self._descriptors(endpoints), processes, tun.name, confinement)
        self.datapath.is_spread = Offload.SPREAD in wanted
        self.datapath.signs_of_life = lambda: stats.signs_of_life(self.n_workers)

    @classmethod
    async def open(
        cls,
        run_dir: Path,
        device: str,
        where: Where,
        n_workers: int,
        wanted: Offload = ALL,
        n_senders: int = 0,
        confinement: Confinement = Confinement.FULL,
    ) -> Tunnel:
        """Go on with the datapath of the device in `run_dir`, or open queues, sockets and memory for a new one.

        What runs is left as it is until `start`, which gives it `where` and the number of workers.  A datapath that
        serves the device of another backend is ended.  `wanted` says whether a new device has virtio headers.
        `n_senders`: sockets to send from to peers that take any source port; 0: packets leave from the sockets that
        they come to.  `confinement` is what the processes shall give up.  No process is started yet.  Raises
        KernelError, DatapathError.
        """
        found = await processes.find_running(run_dir, device)
        if any(_serves_another(process.descriptors, device) for process in found if process.descriptors):
            await processes.end_all(found)
            found = []
        if not found:
            # Before the device, which is persistent: memory may be refused where there are no descriptors left.
            memory = _new_memory()
            tun, endpoints = _open_new(device, where, n_workers, wanted, n_senders)
            return cls(run_dir, *memory, tun, endpoints, [], wanted, confinement)
        found = await _end_unfinished(found)
        held = _take_one_set(found)
        log.info("datapath adopted pid=%s", ",".join(str(process.pid) for process in found))
        tun = Tun(device, held.tun)
        sets = (held.udp, held.senders, held.ipv6, held.ipv6_senders)
        endpoints = Endpoints(held.tun, *(tuple(socket.socket(fileno=fd) for fd in fds) for fds in sets))
        if found[0].layout_version == LAYOUT["version"]:
            table, stats = TableWriter(held.table), Stats(held.stats)
        else:
            # Its processes read on from theirs until `start` replaces them.
            table, stats = TableWriter.create(), Stats.create()
            stats.continue_from(held.stats)
            os.close(held.table)
            os.close(held.stats)
        # A build that had no rings has no events either.
        events = held.events or new_events()
        tunnel = cls(run_dir, table, stats, held.lock, events, tun, endpoints, found, wanted, confinement)
        if not tun.is_attached():
            tun.reattach()
        # An earlier build switched the option off, and one worker of its datapath receives everything.
        for them in endpoints.sets:
            share_port(them, among_several=len(them) > 1)
        tunnel._asked = where, n_workers, n_senders
        if endpoints.where != where:
            # A host that cannot have the address shall take no lease with it.
            tunnel._rebinding = tunnel._build(*tunnel._asked)
        return tunnel

    async def rebind(self, where: Where, n_workers: int, n_senders: int = 0) -> None:
        """Have `n_workers` workers there, as `open` says; nothing happens when it is so already.

        Raises KernelError, DatapathError: all is as it was.  A cancellation waits for the end of the change.
        """
        rebinding = self._build(where, n_workers, n_senders)
        if rebinding is not None:
            await _to_its_end(self._carry_out(rebinding))

    @property
    def n_workers(self) -> int:
        return len(self._endpoints.sockets)

    @property
    def n_senders(self) -> int:
        """How many sockets of a family there are to send from, besides those that receive."""
        return len(self._endpoints.senders)

    async def start(self) -> None:
        """Have an active process and a standby, with what `open` was asked for; a table must have been published."""
        if self._asked is not None:
            # On the address that it has, more sockets would take datagrams that nobody reads before now.
            rebinding = self._rebinding or self._build(*self._asked)
            self._asked = self._rebinding = None
            if rebinding is not None:
                await _to_its_end(self._carry_out(rebinding))
        await self.datapath.start()
        # An earlier build has left this to the kernel.
        leave_paths_to_us(self._endpoints.all_sockets)

    def _build(self, where: Where, n_workers: int, n_senders: int) -> Rebinding | None:
        """What a change to this needs, opened; None when it is so already.  Raises KernelError."""
        if self._endpoints.fits(where, n_workers, n_senders):
            return None
        how = (where, n_workers, n_senders, self._wanted_offload)
        return Rebinding.build(self.tun, self._endpoints, *how)

    async def _carry_out(self, rebinding: Rebinding) -> None:
        """Exchange the processes, then what we hold, then close what is left over.  When it fails, all is undone."""
        with self.strangers.paused():
            try:
                await self.datapath.replace(self._descriptors(rebinding.new), rebinding.switch)
            except BaseException:
                rebinding.undo()
                raise
            self._endpoints = rebinding.new
            rebinding.retire()
            # New sockets have no offloads yet.
            self._set_socket_offload(self._wanted_offload)

    def set_offload(self, wanted: Offload) -> None:
        """Have device and sockets do what `wanted` asks for and the kernel grants (`granted_offload`).

        Only once processes of this build run: another build may not understand a super-packet.  Raises KernelError:
        nothing has changed.
        """
        self.strangers.end()
        granted = self.tun.set_offload(wanted) | self._set_socket_offload(wanted)
        self._wanted_offload = wanted
        self.strangers.allow(Offload.STRANGER_FILTER in granted)
        self.datapath.is_spread = Offload.SPREAD in wanted
        if (Offload.VNET_HDR in granted) != (Offload.VNET_HDR in wanted):
            log.warning("%s keeps its virtio headers or lack of them until `udptun cleanup` and a start", self.tun.name)
        if granted != self.granted_offload:
            log.info("offloads in_use=%s refused=%s", ",".join(names(granted)), ",".join(names(wanted & ~granted)))
        self.granted_offload = granted

    def _set_socket_offload(self, wanted: Offload) -> Offload:
        """What the kernel grants for the sockets of every family."""
        granted = [set_offload(them, wanted) for them in self._endpoints.sets]
        return granted[0] & granted[-1]

    def configure(self, settings: PacketSettings) -> None:
        """Set what applies to all packets, from the next `publish` on; peers of another Network or VTEP go."""
        is_other = settings.vtep != self.table.vtep
        networks = [it for it in (settings.network, settings.network_ipv6) if it is not None]
        self.peers.remove(
            [it for it in self.table.subnets if is_other or not any(is_inside(it, network) for network in networks)]
        )
        # Whatever was wanted, the workers must know whether the device has virtio headers.
        offload = (settings.offload | Offload.VNET_HDR) & self.tun.supported
        self.table.configure(replace(settings, offload=offload))
        self.peers.mtu, self.peers.less_for = settings.mtu, settings.less_for

    @property
    def receive_queues(self) -> list[tuple[int, Family, ReceiveQueue]]:
        """Of each worker by each outer family.  May be read on another thread: a socket that was just closed lacks."""
        found = []
        for them in self._endpoints.sets:
            for worker, udp in enumerate(them):
                with suppress(OSError):
                    found.append((worker, family_of(udp), receive_queue(udp)))
        return found

    @property
    def where(self) -> Where:
        """The addresses and the port of the sockets."""
        return self._endpoints.where

    async def publish(self) -> None:
        """Show the workers what was set since the last time; returns when they can see it."""
        await self._publish()
        if self.peers.add_waiting():
            await self._publish()

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each thing that is wrong with the processes or the table.  May be read on another thread."""
        return (*self.datapath.problems, *self.peers.problems)

    async def _publish(self) -> None:
        async with self._publishing:
            impatient_at = time.monotonic() + _PUBLISH_PATIENCE_S
            while not self._publish_once():
                if all(process.is_gone for process in self.datapath.processes):
                    self.stats.forget_workers()
                if time.monotonic() > impatient_at:
                    impatient_at += 60
                    log.error("a datapath worker has not moved on to the last peer table; changes wait for it")
                await asyncio.sleep(_PUBLISH_RETRY_S)

    def _publish_once(self) -> bool:
        # Each time: peers may have been added while a worker kept us waiting.
        self.strangers.follow()
        self.publishing()
        return self.table.publish(self.stats)

    def detach(self) -> None:
        """Let go of processes and descriptors; the datapath forwards on."""
        self.datapath.detach()
        self.strangers.end()
        if self._rebinding is not None:
            self._rebinding.undo()
        for udp in self._endpoints.all_sockets:
            udp.close()
        self.tun.close()
        self.table.close()
        self.stats.close()
        for fd in (self._lock_fd, *self._events):
            os.close(fd)

    def _descriptors(self, endpoints: Endpoints) -> Descriptors:
        sets = (endpoints.sockets, endpoints.senders, endpoints.ipv6, endpoints.ipv6_senders)
        udp, senders, ipv6, ipv6_senders = (tuple(it.fileno() for it in them) for them in sets)
        fds = (self.table.fd, self.stats.fd, self._lock_fd)
        return Descriptors(*fds, endpoints.queues, udp, senders, self._events, ipv6, ipv6_senders)


async def _to_its_end(change: Coroutine[None, None, None]) -> None:
    """Await `change`.  A cancellation does not interrupt it, and is raised when it has come to its end."""
    task = asyncio.ensure_future(change)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("a change of the workers was not made before the end: %s", exc)
        raise


def _new_memory() -> tuple[TableWriter, Stats, int, tuple[int, int]]:
    """Table, statistics, lock and events of a new datapath.  Raises KernelError."""
    try:
        return TableWriter.create(), Stats.create(), new_lock(), new_events()
    except OSError as exc:
        hint = "raise the limit of open files (LimitNOFILE)" if exc.errno == errno.EMFILE else ""
        raise KernelError("cannot make the memory of a datapath", exc.errno or 0, hint) from exc


def _open_new(
    device: str, where: Where, n_workers: int, wanted: Offload, n_senders: int
) -> tuple[Tun, Endpoints]:
    """Queues and sockets for a datapath, as `Tunnel.open` says."""
    sets: list[tuple[socket.socket, ...]] = []
    try:
        addresses = [it for it in (where.address, where.ipv6) if it is not None]
        for address in addresses:
            sets.append(tuple(open_sockets(address, where.port, n_workers, wanted)))
            sets.append(tuple(open_senders(address, n_senders)))
        # Last: what it makes is persistent.
        tun = open_queues(device, n_workers, wanted)
    except BaseException:
        for udp in chain.from_iterable(sets):
            udp.close()
        raise
    return tun, Endpoints(tun.fds, *sets)


def _serves_another(held: Descriptors, device: str) -> bool:
    """Whether the queues belong to a device that another backend of ours has made."""
    name = device_of(held.tun[0])
    return name is not None and name != device and DEVICE_NAME.fullmatch(name) is not None


def _take_one_set(processes: list[Process]) -> Descriptors:
    """The descriptors of the first process; those that the others sent are the same ones, and closed here."""
    first, *others = processes
    for process in others:
        process.close_descriptors()
    return first.take_descriptors()


async def _end_unfinished(processes: list[Process]) -> list[Process]:
    """End the processes that have other sockets than the first one; the rest.

    A control plane that was killed in the middle of a change leaves such a one: it would go on with sockets that were
    never taken into use.
    """
    kept = []
    for process in processes:
        if _inodes(process) == _inodes(processes[0]):
            kept.append(process)
        else:
            log.info("datapath process ended pid=%d reason=it is left of a change that was not finished", process.pid)
            await process.stop()
            process.close_descriptors()
    return kept


def _inodes(process: Process) -> list[int]:
    assert process.descriptors is not None
    return [os.fstat(fd).st_ino for fd in (*process.descriptors.udp, *process.descriptors.ipv6)]

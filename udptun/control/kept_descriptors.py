"""The descriptors of each datapath, kept by the service manager (the descriptor store of systemd).

Daemon and datapaths end together when all of a unit's processes are killed, as for lack of memory.  The store has the
descriptors then: devices and sockets stay, and what arrives waits in the kernel's queues.  The next daemon is passed
them and starts a process of each datapath with them before all else, which goes on with the last table.  Then it adopts
these processes as it adopts any that it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from udptun._fastpath import LAYOUT
from udptun.config.service_manager import ServiceManager
from udptun.control import notify
from udptun.core.errors import DatapathError
from udptun.core.tunnel import Confinement
from udptun.datapath import shm
from udptun.datapath.protocol import Descriptors
from udptun.datapath.supervision import Datapath

log = logging.getLogger(__name__)


class KeptDescriptors:
    """What the service manager keeps for the daemon after us.

    `tell` sends a state and descriptors to it, and raises OSError (`notify.notify`).  Nothing here raises: a manager
    that does not do its part costs a line in the log.
    """

    def __init__(self, manager: ServiceManager, tell: Callable[[str, Sequence[int]], None]) -> None:
        self._is_on = manager.keeps_descriptors
        self._tell = tell
        self._passed: dict[str, int] = {}
        for name, fd in manager.passed:
            # One that is not there was named by mistake.
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
                if name.startswith("udptun/"):
                    self._passed[name] = fd
        self._names = set(self._passed)
        """Those under which it has something."""

    @property
    def devices(self) -> set[str]:
        """The devices whose queues it has."""
        return set(map(_device_in, self._names))

    async def bring_back(self, run_dir: Path, confinement: Confinement) -> None:
        """Start a process of each datapath of which something was passed to us, unless one lives.

        The caller has the run directory.
        """
        try:
            for device in sorted(self.devices):
                try:
                    await self._bring_back(device, run_dir, confinement)
                except (ValueError, DatapathError) as exc:
                    log.warning("descriptors that the service manager has kept are not used: %s", exc)
                    await self.forget([device])
        finally:
            for fd in self._passed.values():
                os.close(fd)
            self._passed = {}

    async def _bring_back(self, device: str, run_dir: Path, confinement: Confinement) -> None:
        """Raises ValueError, DatapathError."""
        descriptors = _whole_set({name: fd for name, fd in self._passed.items() if _device_in(name) == device})
        if is_locked(descriptors.lock):
            return
        if shm.version_of(descriptors.table, LAYOUT["table_magic"]) != LAYOUT["version"]:
            raise ValueError("they are of another version")
        await Datapath(run_dir, descriptors, [], device, confinement).revive()
        log.info("datapath brought back with descriptors that the service manager has kept")

    async def keep(self, descriptors: Mapping[str, Descriptors]) -> None:
        """Have it keep exactly these, by the devices whose queues are among them."""
        if not self._is_on:
            return
        names = {name: fd for device, of in descriptors.items() for name, fd in _names_of(device, of).items()}
        try:
            for name, fd in names.items():
                if name not in self._names:
                    await self._send(notify.store(name), [fd])
                    self._names.add(name)
        except OSError as exc:
            log.warning("the service manager does not keep our descriptors: %s", exc)
        await self._forget(self._names - names.keys())

    async def forget(self, devices: Collection[str]) -> None:
        """Have it keep nothing of these any more; returns when it has closed what it had, or does not answer."""
        names = {name for name in self._names if _device_in(name) in devices}
        if not names:
            return
        await self._forget(names)
        reader, writer = os.pipe()
        try:
            try:
                await self._send(notify.BARRIER, [writer])
            finally:
                os.close(writer)
            await _wait_for_end(reader)
        except OSError as exc:
            log.warning("the service manager does not say that it has let go of our descriptors: %s", exc)
        finally:
            os.close(reader)

    async def _forget(self, names: set[str]) -> None:
        try:
            for name in sorted(names):
                await self._send(notify.forget(name), [])
                self._names.discard(name)
        except OSError as exc:
            log.warning("the service manager goes on keeping descriptors that we have given up: %s", exc)

    async def _send(self, state: str, fds: Sequence[int]) -> None:
        """Raises OSError, also when the manager does not read."""
        await notify.patiently(lambda: self._tell(state, fds))


async def _wait_for_end(pipe: int) -> None:
    """Until nobody has the writing end any more.  Raises TimeoutError."""
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe, closed.set)
    try:
        async with asyncio.timeout(notify.PATIENCE_S):
            await closed.wait()
    except TimeoutError:
        raise TimeoutError(f"no answer for {notify.PATIENCE_S:g} s") from None
    finally:
        asyncio.get_running_loop().remove_reader(pipe)


def _names_of(device: str, descriptors: Descriptors) -> dict[str, int]:
    """`udptun/<device>/<inode of the lock>/<kind>/<index>/<inode>`: what has another name is another descriptor.

    systemd keeps one that it has already under its first name.  Queues of a device and eventfds have no inodes of their
    own, and are told apart by their index in a datapath with the same lock.
    """
    lineage = os.fstat(descriptors.lock).st_ino
    names = {}
    for kind, fds in (
        ("table", (descriptors.table,)),
        ("stats", (descriptors.stats,)),
        ("lock", (descriptors.lock,)),
        ("tun", descriptors.tun),
        ("udp", descriptors.udp),
        ("sender", descriptors.senders),
        ("event", descriptors.events),
        ("ipv6", descriptors.ipv6),
        ("ipv6-sender", descriptors.ipv6_senders),
    ):
        for i, fd in enumerate(fds):
            inode = 0 if kind in ("tun", "event") else os.fstat(fd).st_ino
            names[f"udptun/{device}/{lineage}/{kind}/{i}/{inode}"] = fd
    return names


def _device_in(name: str) -> str:
    return name.split("/")[1]


def _whole_set(passed: Mapping[str, int]) -> Descriptors:
    """Raises ValueError when something is missing or does not belong to the rest: a change was not finished."""
    kinds = ("table", "stats", "lock", "tun", "udp", "sender", "event", "ipv6", "ipv6-sender")
    found: dict[str, dict[int, int]] = {kind: {} for kind in kinds}
    lineages = set()
    for name, fd in passed.items():
        _, _device, lineage, kind, index, _inode = name.split("/")
        lineages.add(lineage)
        if kind not in found or found[kind].setdefault(int(index), fd) != fd:
            raise ValueError(f"there are two of {kind} {index}")
    lists = {kind: tuple(fds[i] for i in sorted(fds)) for kind, fds in found.items()}
    are_complete = all(sorted(fds) == list(range(len(fds))) for fds in found.values())
    counts = tuple(len(lists[kind]) for kind in ("table", "stats", "lock"))
    n = len(lists["udp"])
    is_whole = 0 < n <= len(lists["tun"]) and len(lists["ipv6"]) in (0, n)
    if not are_complete or len(lineages) != 1 or counts != (1, 1, 1) or not is_whole:
        raise ValueError("they are not all there")
    (table,), (stats,), (lock,) = lists["table"], lists["stats"], lists["lock"]
    return Descriptors(table, stats, lock, *(lists[kind] for kind in kinds[3:]))


def is_locked(lock_fd: int) -> bool:
    """Whether a datapath process lives: the active one holds the lock."""
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    fcntl.lockf(lock_fd, fcntl.LOCK_UN)
    return False

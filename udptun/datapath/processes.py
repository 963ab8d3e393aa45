"""The datapath's processes as the control plane sees them: start, find and stop them, keep one active and one asleep.

Every datapath process listens on a socket of its own in the run directory.  Whoever connects is handed all
descriptors, so that a new control plane goes on with what an earlier one, dead or replaced, has left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import udptun._fastpath as fastpath
from udptun.core.errors import DatapathError
from udptun.datapath import worker

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_SOCKET_GLOB = "datapath-*.sock"


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What a datapath process works with: memory files, the lock, a TUN queue and a UDP socket a worker, senders."""

    table: int
    stats: int
    lock: int
    tun: tuple[int, ...]
    udp: tuple[int, ...]
    senders: tuple[int, ...] = ()

    @classmethod
    def from_list(cls, fds: list[int], n_workers: int) -> Descriptors:
        """From the order in which HELLO carries them."""
        table, stats, lock, *rest = fds
        tun, udp, senders = rest[:n_workers], rest[n_workers : 2 * n_workers], rest[2 * n_workers :]
        return cls(table, stats, lock, tuple(tun), tuple(udp), tuple(senders))

    def as_list(self) -> list[int]:
        return [self.table, self.stats, self.lock, *self.tun, *self.udp, *self.senders]


def new_lock() -> int:
    """A memory file for the lock by which the datapath processes agree on the active one.

    The control plane never locks it.  The caller owns the descriptor.
    """
    return os.memfd_create("udptun-lock", os.MFD_CLOEXEC)


def build_id() -> str:
    """Tells one build of the datapath from another: 32 hexadecimal digits over its two files."""
    digest = hashlib.sha256()
    for file in (fastpath.__file__, worker.__file__):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:32]


class Process:
    """One datapath process, seen through our connection to it."""

    def __init__(self, connection: socket.socket, path: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        self.path = path
        # Not SO_PEERCRED: that names the process that made the listening socket, an earlier control plane.
        self.pid = 0 if child is None else child.pid
        self.is_active = False
        self.layout_version = 0
        self.started_ns = 0
        self.build_id = ""
        self.descriptors: Descriptors | None = None
        """Ours to close, from the first HELLO of a process that we did not start."""
        self._connection = connection
        self._child = child
        self._changed = asyncio.Event()
        self.is_gone = False
        self._observers: list[Callable[[], None]] = []
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection, self._readable)

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` whenever the process becomes active or is gone."""
        self._observers.append(observer)

    async def wait_hello(self) -> None:
        """Until it has introduced itself.  Raises DatapathError when it ends first or stays silent."""
        await self._wait(lambda: bool(self.build_id), "introduce itself")

    async def stop(self) -> None:
        """End the process and wait until it is gone."""
        with contextlib.suppress(OSError):
            self._connection.send(worker.STOP)
        await self._wait(lambda: self.is_gone, "stop")

    async def wait_active(self) -> None:
        await self._wait(lambda: self.is_active, "become active")

    def detach(self) -> None:
        """Let go of the connection; the process goes on."""
        if not self.is_gone:
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()

    async def _wait(self, reached: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                while not reached():
                    if self.is_gone:
                        raise DatapathError(f"the datapath process {self.pid} ended instead of going on to {what}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DatapathError(
                f"the datapath process {self.pid} did not {what} within {_HELLO_TIMEOUT_S:.0f} s; "
                f"if it is stopped, continue it (kill -CONT {self.pid}) or end it (kill -KILL {self.pid})"
            ) from None

    def _readable(self) -> None:
        most = 3 + 2 * fastpath.LAYOUT["max_workers"] + fastpath.LAYOUT["max_senders"]
        room = socket.CMSG_SPACE(4 * most)
        try:
            message, ancillary, _, _ = self._connection.recvmsg(worker.HELLO.size, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, ancillary = b"", []
        fds = [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4])]
        if len(message) == worker.HELLO.size:
            self._take_hello(message, fds)
        else:
            self.detach()
            self.is_gone = True
            self.path.unlink(missing_ok=True)
            if self._child is not None:
                # Its end of the connection is closed by its death: there is nothing to wait for but the status.
                self._child.wait()
        self._changed.set()
        for observer in self._observers:
            observer()

    def _take_hello(self, message: bytes, fds: list[int]) -> None:
        magic, self.layout_version, self.pid, active, n_workers, self.started_ns, build = worker.HELLO.unpack(message)
        if magic == worker.HELLO_MAGIC:
            self.is_active = bool(active)
            self.build_id = build.decode("ascii", "replace")
        if self.descriptors is None and self._child is None:
            self.descriptors = Descriptors.from_list(fds, n_workers)
        else:
            for fd in fds:
                os.close(fd)


async def find(run_dir: Path) -> list[Process]:
    """Every datapath process that listens in `run_dir`, the active one first.  Removes sockets of dead ones."""
    found = []
    for path in sorted(run_dir.glob(_SOCKET_GLOB)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            connection.close()
            path.unlink(missing_ok=True)
            continue
        found.append(Process(connection, path))
    for process in found:
        await process.wait_hello()
    return sorted(found, key=lambda process: not process.is_active)


async def stop(processes: Iterable[Process]) -> None:
    """End these processes, standbys first, so that none of them takes over, and close what they have handed us."""
    for process in sorted(processes, key=lambda process: process.is_active):
        await process.stop()
        if process.descriptors is not None:
            for fd in process.descriptors.as_list():
                os.close(fd)


class Datapath:
    """The datapath of this host: keeps one process active and one on standby.

    `run_dir` is where their sockets are.  Descriptors stay the caller's, who keeps them open: they are what a new
    process is started with.
    """

    def __init__(self, run_dir: Path, descriptors: Descriptors, processes: list[Process]) -> None:
        self._run_dir = run_dir
        self._build_id = build_id()
        self._wake = asyncio.Event()
        # Held while processes come and go on purpose, so that `supervise` does not take it for dying.
        self._changing = asyncio.Lock()
        self.descriptors = descriptors
        self.processes: list[Process] = []
        for process in processes:
            self._keep(process)

    @property
    def active(self) -> Process | None:
        return next((it for it in self.processes if it.is_active and not it.is_gone), None)

    @property
    def standbys(self) -> list[Process]:
        """Those that would go on at once; not one that is still starting."""
        return [it for it in self.processes if it.build_id and not it.is_active and not it.is_gone]

    async def start(self) -> None:
        """Have one active process and one standby of this build, with the present descriptors."""
        async with self._changing:
            old = [process.pid for process in self.processes if process.build_id != self._build_id]
            if old:
                log.info("datapath replaced pid=%s reason=another build", ",".join(map(str, old)))
                await self._succeed()
            await self._fill_up()

    async def replace(self, descriptors: Descriptors) -> None:
        """Have successors with other descriptors take over; without any process, just use them from now on.

        The predecessor reads until it is told to stop; what arrives between the two waits in the kernel's queues.
        """
        async with self._changing:
            self.descriptors = descriptors
            if self.processes:
                await self._succeed()
                await self._fill_up()

    async def supervise(self) -> None:
        """Start a process for each that dies, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            async with self._changing:
                for process in [process for process in self.processes if process.is_gone]:
                    self.processes.remove(process)
                    log.warning("datapath process gone pid=%d was=%s", process.pid, _role(process))
                try:
                    await self._fill_up()
                except DatapathError as exc:
                    log.error("%s; trying again in 1 s", exc)
                    await asyncio.sleep(1)
                    self._wake.set()

    async def stop(self) -> None:
        """End all processes, standbys first, so that none of them takes over."""
        async with self._changing:
            for process in sorted(self.processes, key=lambda process: process.is_active):
                await self._dismiss(process)

    def detach(self) -> None:
        """Let go of the processes; they go on."""
        for process in self.processes:
            process.detach()

    def _keep(self, process: Process) -> None:
        self.processes.append(process)
        process.observe(self._wake.set)

    async def _succeed(self) -> None:
        """Put one new process in the place of all that there are."""
        predecessors = sorted(self.processes, key=lambda process: process.is_active)
        # A standby would take over before the successor.
        for process in predecessors[:-1]:
            await self._dismiss(process)
        successor = await self._spawn()
        await self._dismiss(predecessors[-1])
        await successor.wait_active()

    async def _dismiss(self, process: Process) -> None:
        self.processes.remove(process)
        if not process.is_gone:
            await process.stop()

    async def _fill_up(self) -> None:
        while sum(not process.is_gone for process in self.processes) < 2:
            process = await self._spawn()
            if self.active is None:
                await process.wait_active()

    async def _spawn(self) -> Process:
        path = self._run_dir / f"datapath-{secrets.token_hex(4)}.sock"
        try:
            connection, child = self._launch(path)
        except OSError as exc:
            raise DatapathError(f"cannot start a datapath process at {path}: {exc.strerror or exc}") from exc
        process = Process(connection, path, child)
        self._keep(process)
        await process.wait_hello()
        log.info("datapath process started pid=%d", process.pid)
        return process

    def _launch(self, path: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """Start a process that listens at `path`, and connect to it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen(8)
            fds = self.descriptors
            child = subprocess.Popen(
                [
                    # -I -S: neither the environment nor site-packages; half the start-up time.
                    *(sys.executable, "-I", "-S", worker.__file__, fastpath.__file__, self._build_id),
                    *(str(fd) for fd in (listener.fileno(), fds.table, fds.stats, fds.lock)),
                    ",".join(map(str, fds.tun)),
                    ",".join(map(str, fds.udp)),
                    ",".join(map(str, fds.senders)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(listener.fileno(), *fds.as_list()),
                # Out of the reach of the terminal's ^C and of our process group's end.
                start_new_session=True,
                cwd="/",
            )
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(os.fspath(path))
        return connection, child


def _role(process: Process) -> str:
    return "active" if process.is_active else "standby"

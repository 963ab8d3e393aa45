"""The datapath's processes as the control plane sees them: start, find and stop them, keep one active and one asleep.

Every datapath process listens on a socket of its own in the run directory.  Whoever connects is handed all
descriptors, so that a new control plane goes on with what an earlier one, dead or replaced, has left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import udptun._fastpath as fastpath
from udptun.core.errors import DatapathError
from udptun.datapath import worker
from udptun.datapath.protocol import MAX_DESCRIPTORS, MAX_HELLO_BYTES, Descriptors, Hello

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_SOCKET_GLOB = "datapath-*.sock"


def new_lock() -> int:
    """A memory file with the lock that the active datapath process holds.

    The control plane never locks it.  The caller owns the descriptor.
    """
    return os.memfd_create("udptun-lock", os.MFD_CLOEXEC)


def build_id() -> str:
    """Tells one build of the datapath from another: 32 hexadecimal digits over its two files."""
    files = [Path(file).read_bytes() for file in (fastpath.__file__, worker.__file__)]
    # Nobody forges a build here, and hashlib brings OpenSSL: 4 MB.
    return "".join(f"{checksum(content):08x}" for content in files for checksum in (zlib.crc32, zlib.adler32))


class ProcessEndedError(DatapathError):
    """A datapath process ended while something was expected of it."""


class Process:
    """One datapath process, of whatever build, seen through our connection to it."""

    def __init__(self, connection: socket.socket, path: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        self.path = path
        # Not SO_PEERCRED: that names the process that made the listening socket, an earlier control plane.
        self.pid = 0 if child is None else child.pid
        self.is_active = False
        self.is_gone = False
        self.layout_version = 0
        self.started_ns = 0
        self.build_id = ""
        self.descriptors: Descriptors | None = None
        """Ours to close: what came with the first HELLO of a process that we did not start."""
        self._connection = connection
        self._child = child
        self._changed = asyncio.Event()
        self._not_understood = b""
        self._observers: list[Callable[[], None]] = []
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection, self._receive)

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` whenever the process becomes active or is gone."""
        self._observers.append(observer)

    async def wait_hello(self) -> None:
        """Until it has introduced itself.  Raises DatapathError when it ends first, stays silent or is no datapath."""
        await self._wait(lambda: bool(self.build_id), "introduce itself")

    async def wait_active(self) -> None:
        await self._wait(lambda: self.is_active, "become active")

    async def stop(self) -> None:
        """End the process and wait until it is gone."""
        with contextlib.suppress(OSError):
            self._connection.send(worker.STOP)
        await self._wait(lambda: self.is_gone, "stop")

    def detach(self) -> None:
        """Let go of the connection; the process goes on."""
        if not self.is_gone:
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()

    def take_descriptors(self) -> Descriptors:
        """What the process has handed us; from now on the caller's to close."""
        assert self.descriptors is not None
        taken, self.descriptors = self.descriptors, None
        return taken

    def close_descriptors(self) -> None:
        """Close what the process has handed us."""
        if self.descriptors is not None:
            for fd in self.take_descriptors().as_list():
                os.close(fd)

    async def _wait(self, reached: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                while not reached():
                    if self.is_gone:
                        message = f"the datapath process {self._who()} ended instead of going on to {what}"
                        raise ProcessEndedError(message)
                    if self._not_understood:
                        raise DatapathError(
                            f"cannot understand the datapath process {self._who()}, which says "
                            f"{self._not_understood[:32]!r} at {self.path}: it is of an unknown build; nothing was "
                            "touched; end it with the udptun that started it (`udptun cleanup`) or with kill, then "
                            "start again"
                        )
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DatapathError(
                f"the datapath process {self._who()} did not {what} within {_HELLO_TIMEOUT_S:.0f} s; "
                f"if it is stopped, continue it (kill -CONT {self._who()}) or end it (kill -KILL {self._who()})"
            ) from None

    def _who(self) -> str:
        """Its pid, or, where it has not told it, what /proc knows."""
        pids = [self.pid] if self.pid else _pids_listening_at(self.path)
        return " ".join(map(str, pids)) or f"at {self.path}"

    def _receive(self) -> None:
        """Take a message, or the end of the process, which is the end of the connection."""
        room = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
        try:
            message, ancillary, _, _ = self._connection.recvmsg(MAX_HELLO_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, ancillary = b"", []
        fds = [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4])]
        if message:
            self._take_hello(message, fds)
        else:
            self._end()
        self._changed.set()
        for observer in self._observers:
            observer()

    def _take_hello(self, message: bytes, fds: list[int]) -> None:
        hello = Hello.parse(message)
        is_first = not self.build_id
        kept: list[int] = []
        if hello is not None and is_first and self._child is None:
            try:
                self.descriptors = Descriptors.from_list(fds, hello)
            except ValueError:
                hello = None
            else:
                kept = self.descriptors.as_list()
        for fd in fds:
            if fd not in kept:
                os.close(fd)
        if hello is None:
            if is_first:
                self._not_understood = message
            return
        self.pid, self.is_active, self.started_ns = hello.pid, hello.is_active, hello.started_ns
        self.layout_version, self.build_id = hello.layout_version, hello.build_id

    def _end(self) -> None:
        self.detach()
        self.is_gone = True
        if self._child is not None:
            # Its end of the connection is closed by its death: there is nothing to wait for but the status.
            self._child.wait()
        if self._child is not None or self.build_id:
            self.path.unlink(missing_ok=True)


def _pids_listening_at(path: Path) -> list[int]:
    """The processes that hold the Unix socket at `path`: a datapath process that says nothing is found so, too."""
    with contextlib.suppress(OSError):
        lines = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        sockets = {f"socket:[{fields[6]}]" for fields in lines if len(fields) == 8 and fields[7] == os.fspath(path)}
        return sorted({int(fd.parts[2]) for fd in Path("/proc").glob("[0-9]*/fd/*") if _target(fd) in sockets})
    return []


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


async def find_running(run_dir: Path) -> list[Process]:
    """Every datapath process that listens in `run_dir`, the active one first.  Removes sockets of dead ones.

    Raises DatapathError when one of them cannot be understood or says nothing; they are all left as they are.
    """
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
    try:
        for process in found:
            with contextlib.suppress(ProcessEndedError):
                await process.wait_hello()
    except BaseException:
        for process in found:
            process.detach()
            process.close_descriptors()
        raise
    return sorted((it for it in found if not it.is_gone), key=lambda process: not process.is_active)


async def end_all(processes: Iterable[Process]) -> None:
    """End these processes, standbys first, so that none of them takes over, and close what they have handed us."""
    for process in sorted(processes, key=lambda process: process.is_active):
        await process.stop()
        process.close_descriptors()


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
            self._add(process)

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
                await self._replace_all()
            await self._start_missing()

    async def replace(self, descriptors: Descriptors) -> None:
        """Have successors with other descriptors take over; without any process, just use them from now on.

        The predecessor reads until it is told to stop; what arrives between the two waits in the kernel's queues.
        """
        async with self._changing:
            self.descriptors = descriptors
            if self.processes:
                await self._replace_all()
                await self._start_missing()

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
                    await self._start_missing()
                except DatapathError as exc:
                    log.error("%s; trying again in 1 s", exc)
                    await asyncio.sleep(1)
                    self._wake.set()

    async def stop(self) -> None:
        """End all processes, standbys first, so that none of them takes over."""
        async with self._changing:
            for process in sorted(self.processes, key=lambda process: process.is_active):
                await self._end(process)

    def detach(self) -> None:
        """Let go of the processes; they go on."""
        for process in self.processes:
            process.detach()

    def _add(self, process: Process) -> None:
        self.processes.append(process)
        process.observe(self._wake.set)

    async def _replace_all(self) -> None:
        """Put one new process in the place of all that there are."""
        predecessors = sorted(self.processes, key=lambda process: process.is_active)
        # A standby would take over before the successor.
        for process in predecessors[:-1]:
            await self._end(process)
        successor = await self._start_one()
        await self._end(predecessors[-1])
        await successor.wait_active()

    async def _end(self, process: Process) -> None:
        self.processes.remove(process)
        if not process.is_gone:
            await process.stop()

    async def _start_missing(self) -> None:
        while sum(not process.is_gone for process in self.processes) < 2:
            process = await self._start_one()
            if self.active is None:
                await process.wait_active()

    async def _start_one(self) -> Process:
        path = self._run_dir / f"datapath-{os.urandom(4).hex()}.sock"
        try:
            connection, child = self._launch(path)
        except OSError as exc:
            raise DatapathError(f"cannot start a datapath process at {path}: {exc.strerror or exc}") from exc
        process = Process(connection, path, child)
        self._add(process)
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

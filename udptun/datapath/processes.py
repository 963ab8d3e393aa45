"""The datapath's processes as the control plane sees them: find them, talk to them, end them.

Every datapath process listens on a socket of its own in the run directory.  Whoever connects is handed all
descriptors, so that a new control plane goes on with what an earlier one, dead or replaced, has left running.

A process may be stopped or hang.  So nothing here waits for one but with a deadline, and not in a system call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from udptun.core.errors import DatapathError
from udptun.core.tunnel import Confinement
from udptun.datapath import worker
from udptun.datapath.protocol import MAX_DESCRIPTORS, MAX_HELLO_BYTES, N_EVENTS, Descriptors, Hello
from udptun.kernel.process_usage import Usage, usage_of

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_STOP_PATIENCE_S = 2.0
"""A process that was told to stop and has not done so by then is killed."""
_LOOK_S = 1.0
"""After so long without an answer the process is looked at: one that is stopped is not waited for."""
_CONNECT_RETRY_S = 0.1
_REAP_PAUSES_S = (0.0005, 0.1)
_CREDENTIALS = struct.Struct("=iII")
"""struct ucred of unix(7): pid, uid, gid."""
_SOCKET_GLOB = "datapath-*.sock"
_OF_IPV6_DEVICE = "v6_"
"""In the sockets' names of a datapath whose device is `flannel-v6.<VNI>`: a host may have another one beside it.
Builds that know of one datapath a host find these too, and end them as left of a change."""


class ProcessEndedError(DatapathError):
    """A datapath process ended while something was expected of it."""


class Process:
    """One datapath process, of whatever build, seen through our connection to it (`new_connection`)."""

    def __init__(self, connection: socket.socket, path: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        self.path = path
        # Not SO_PEERCRED: that names the process that made the listening socket, an earlier control plane.
        self.pid = 0 if child is None else child.pid
        self.is_active = self.is_gone = False
        self.layout_version = 0
        self.started_ns, self.started_s = 0, 0.0
        """By CLOCK_MONOTONIC, and as Unix time, worked out once, when the first HELLO comes."""
        self.build_id = ""
        self.confinement: Confinement | None = None
        """What it has given up, or shall give up before it says so; None when nobody knows."""
        self.wanted_confinement: Confinement | None = None
        """What it was told to give up: more, where the kernel cannot do all of it.  None when nobody knows."""
        self.descriptors: Descriptors | None = None
        """Ours to close: what came with the first HELLO of a process that we did not start."""
        self._connection = connection
        self._child = child
        self._pid_here = self.pid
        """Its pid as the kernel tells it to us; 0 while unknown, and for a process that cannot be seen from here."""
        self._are_events_due = False
        self._n_behind_events: tuple[int, ...] = ()
        self._changed = asyncio.Event()
        self._not_understood = b""
        self._observers: list[Callable[[], None]] = []
        asyncio.get_running_loop().add_reader(connection, self._receive)

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` whenever the process becomes active or is gone."""
        self._observers.append(observer)

    async def wait_hello(self) -> None:
        """Until it has introduced itself.  Raises DatapathError when it ends first, stays silent or is no datapath."""
        await self._wait(lambda: bool(self.build_id) and not self._are_events_due, "introduce itself")

    async def stop(self) -> None:
        """End the process and wait until it is gone: it is told to, and killed when it does not obey.

        What a killed process had in flight its successor hands on.  Raises DatapathError when it cannot be killed.
        """
        with contextlib.suppress(OSError):
            self._connection.send(worker.STOP)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self.is_stopped else _STOP_PATIENCE_S):
                await self._reach(lambda: self.is_gone)
        if not self.is_gone:
            log.warning("datapath process killed, it does not obey pid=%s state=%s", self._who(), self._state() or "?")
            self._kill()
            await self._wait(lambda: self.is_gone, "stop")

    @property
    def has_failed(self) -> bool:
        """Whether it is gone by a failure of its own.  False when a signal has killed it, and when nobody knows."""
        return self._child is not None and (self._child.returncode or 0) > 0

    @property
    def cause_of_death(self) -> str:
        """How a process ended that is gone, in words."""
        status = None if self._child is None else self._child.returncode
        if status is None:
            return "in a way unknown to this daemon, which did not start it"
        if status < 0:
            return f"by signal {-status} ({signal.strsignal(-status)})"
        return f"with exit status {status}"

    @property
    def usage(self) -> Usage | None:
        """None where that cannot be seen."""
        return usage_of(self._pid_here) if self._pid_here else None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it lives in another pid namespace, as another container's, with which it ends."""
        if self._child is not None:
            return False
        try:
            return Path(f"/proc/{self._pid_here}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
        except OSError:
            return not self._pid_here

    @property
    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP) has stopped it: it does nothing until SIGCONT.  False when that cannot be seen."""
        return self._state() == "T"

    @property
    def is_traced(self) -> bool:
        """Whether a debugger holds it.  False when that cannot be seen."""
        return self._state() == "t"

    def detach(self) -> None:
        """Let go of the connection; the process goes on."""
        if self._connection.fileno() >= 0:
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
                        who = f"the datapath process {self._who()}"
                        raise ProcessEndedError(f"{who} ended {self.cause_of_death} instead of going on to {what}")
                    if self._not_understood:
                        raise DatapathError(
                            f"cannot understand the datapath process {self._who()}, which says "
                            f"{self._not_understood[:32]!r} at {self.path}: it is of an unknown build; nothing was "
                            "touched; end it with the udptun that started it (`udptun cleanup`) or with kill, then "
                            "start again"
                        )
                    self._changed.clear()
                    try:
                        async with asyncio.timeout(_LOOK_S):
                            await self._changed.wait()
                    except TimeoutError:
                        self._check_not_stopped(what)
        except TimeoutError:
            raise DatapathError(f"the datapath process {self._who()} did not {what}{_late(self._who())}") from None

    def _check_not_stopped(self, what: str) -> None:
        pids = [self._pid_here] if self._pid_here else _pids_listening_at(self.path)
        if pids and all(state_of(pid) == "T" for pid in pids):
            raise DatapathError(
                f"the datapath process {self._who()} did not {what}: it is stopped; {_remedy(self._who())}"
            )

    async def _reach(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._changed.clear()
            await self._changed.wait()

    def _who(self) -> str:
        """Its pid, or, where it has not told it, what /proc knows."""
        return str(self.pid) if self.pid else _who_listens_at(self.path)

    def _state(self) -> str:
        return "" if self.is_gone else state_of(self._pid_here)

    def _kill(self) -> None:
        """Send SIGKILL, which a stopped process obeys too; nothing when it cannot be seen from here."""
        if not self._pid_here:
            return
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self._pid_here)
            try:
                # While the connection is there the pid is still its own, and the pidfd is of this process.
                if not self._has_ended():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _has_ended(self) -> bool:
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _receive(self) -> None:
        """Take a message, or the end of the process, which is the end of the connection."""
        room = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS) + socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            message, ancillary, _, _ = self._connection.recvmsg(MAX_HELLO_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, ancillary = b"", []
        fds = []
        for _level, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds += [fd for (fd,) in struct.iter_unpack("=i", data[: len(data) // 4 * 4])]
            elif kind == socket.SCM_CREDENTIALS:
                self._pid_here, _uid, _gid = _CREDENTIALS.unpack_from(data)
        if message == worker.EVENTS:
            self._take_events(fds)
            self._tell()
        elif message:
            self._take_hello(message, fds)
            self._tell()
        else:
            self.detach()
            self._reap(_REAP_PAUSES_S[0])

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
                self._are_events_due = hello.has_events
                self._n_behind_events = hello.n_ipv6, hello.n_more_queues, hello.n_ipv6_senders
        for fd in fds:
            if fd not in kept:
                os.close(fd)
        if hello is None:
            if is_first:
                self._not_understood = message
                self.pid = self._pid_here
            return
        # A process in another pid namespace says what it is called there.
        self.pid = self._pid_here or hello.pid
        self.is_active, self.started_ns = hello.is_active, hello.started_ns
        self.started_s = self.started_s or hello.started_s
        self.layout_version, self.build_id = hello.layout_version, hello.build_id
        self.confinement, self.wanted_confinement = hello.confinement, hello.wanted_confinement
        if is_first and self._are_events_due:
            with contextlib.suppress(OSError):
                self._connection.send(worker.EVENTS)

    def _take_events(self, fds: list[int]) -> None:
        n_kept = 0
        # One alone is of no use, as where we had room for no more descriptors.
        if self._are_events_due and self.descriptors is not None and len(fds) >= N_EVENTS:
            # Each kind wholly or not at all, and none behind one that is missing.
            ends = tuple(accumulate(self._n_behind_events, initial=N_EVENTS))
            n_kept = max(end for end in ends if end <= len(fds))
            events, ipv6, queues, ipv6_senders = (
                tuple(fds[start : min(end, n_kept)]) for start, end in zip((0, *ends), ends, strict=False)
            )
            tun = (*self.descriptors.tun, *queues)
            self.descriptors = replace(self.descriptors, tun=tun, events=events, ipv6=ipv6, ipv6_senders=ipv6_senders)
        for fd in fds[n_kept:]:
            os.close(fd)
        self._are_events_due = False

    def _reap(self, pause_s: float) -> None:
        """It has closed its end of the connection.  It is gone when it has closed everything else too."""
        if self._child is not None and self._child.poll() is None:
            # A wait in the system call would hold up the daemon: the end of a process may wait for locks of the kernel.
            asyncio.get_running_loop().call_later(pause_s, self._reap, min(2 * pause_s, _REAP_PAUSES_S[1]))
            return
        self.is_gone = True
        if self._child is not None or self.build_id:
            self.path.unlink(missing_ok=True)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        for observer in self._observers:
            observer()


def new_connection() -> socket.socket:
    """A socket for `Process`.  It never blocks, and each message tells the sender's pid as it is here."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return connection


def state_of(pid: int) -> str:
    """The letter that proc(5) has for the state of the process: T when a signal has stopped it.  Empty when unknown."""
    with contextlib.suppress(OSError, IndexError):
        if pid:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _are_stopped(pids: list[int]) -> bool:
    return bool(pids) and all(state_of(pid) == "T" for pid in pids)


def _remedy(who: str) -> str:
    return f"continue it (kill -CONT {who}) or end it (kill -KILL {who})"


def _late(who: str) -> str:
    return f" within {_HELLO_TIMEOUT_S:.0f} s; if it is stopped, {_remedy(who)}"


def _who_listens_at(path: Path) -> str:
    return " ".join(map(str, _pids_listening_at(path))) or f"at {path}"


def _pids_listening_at(path: Path) -> list[int]:
    """The processes that hold the Unix socket at `path`: a datapath process that says nothing is found so, too."""
    pids: set[int] = set()
    with contextlib.suppress(OSError):
        lines = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        sockets = {f"socket:[{fields[6]}]" for fields in lines if len(fields) == 8 and fields[7] == os.fspath(path)}
        pids = {int(fd.parts[2]) for fd in Path("/proc").glob("[0-9]*/fd/*") if _target(fd) in sockets}
    return sorted(pids)


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def new_socket_path(run_dir: Path, device: str) -> Path:
    """Where a new process of the datapath that serves `device` shall listen."""
    return run_dir / f"datapath-{_kind_of(device)}{os.urandom(4).hex()}.sock"


def _kind_of(device: str) -> str:
    return _OF_IPV6_DEVICE if device.startswith("flannel-v6.") else ""


def _is_of(path: Path, device: str) -> bool:
    return path.name.startswith(f"datapath-{_OF_IPV6_DEVICE}") == bool(_kind_of(device))


async def find_running(run_dir: Path, device: str | None = None, others: Collection[str] = ()) -> list[Process]:
    """Every datapath process that listens in `run_dir`, the active ones first.  Removes sockets of dead ones.

    `device`: only those that may serve it, or another device in its place.  `others`: none of those that may serve
    these.

    Raises DatapathError when some of them cannot be understood or say nothing, and names these; they are all left as
    they are.
    """
    met: list[Process] = []
    paths = [
        path
        for path in sorted(run_dir.glob(_SOCKET_GLOB))
        if (device is None or _is_of(path, device)) and not any(_is_of(path, other) for other in others)
    ]
    try:
        failures = [it for it in await asyncio.gather(*(_meet(path, met) for path in paths)) if it is not None]
        if failures:
            raise DatapathError("; ".join(map(str, failures)))
    except BaseException:
        for process in met:
            process.detach()
            process.close_descriptors()
        raise
    return sorted((it for it in met if not it.is_gone), key=lambda process: (not process.is_active, process.path))


async def _meet(path: Path, met: list[Process]) -> DatapathError | None:
    """Connect to the process that listens at `path`, hear who it is, and add it to `met`.  Returns what went wrong."""
    try:
        connection = await _connect(path)
        if connection is None:
            path.unlink(missing_ok=True)
            return None
        process = Process(connection, path)
        met.append(process)
        with contextlib.suppress(ProcessEndedError):
            await process.wait_hello()
    except DatapathError as exc:
        return exc
    return None


async def _connect(path: Path) -> socket.socket | None:
    """A connection to the process that listens at `path`; None when there is none.  Raises DatapathError."""
    connection = new_connection()
    clock = asyncio.get_running_loop().time
    until_s, look_s = clock() + _HELLO_TIMEOUT_S, clock() + _LOOK_S
    try:
        while True:
            try:
                connection.connect(os.fspath(path))
                return connection
            except (ConnectionRefusedError, FileNotFoundError):
                connection.close()
                return None
            except BlockingIOError:
                # It has not accepted those who came before.  A connect() that blocks would wait for that for ever.
                await asyncio.sleep(_CONNECT_RETRY_S)
            if clock() >= look_s:
                look_s = clock() + _LOOK_S
                if _are_stopped(pids := _pids_listening_at(path)):
                    who = " ".join(map(str, pids))
                    raise DatapathError(
                        f"the datapath process {who} did not take our connection: it is stopped; {_remedy(who)}"
                    )
            if clock() >= until_s:
                who = _who_listens_at(path)
                raise DatapathError(f"the datapath process {who} did not take our connection{_late(who)}")
    except BaseException:
        connection.close()
        raise


async def end_all(processes: Iterable[Process]) -> None:
    """End these processes, standbys first, so that none of them takes over, and close what they have handed us."""
    for process in sorted(processes, key=lambda process: process.is_active):
        await process.stop()
        process.close_descriptors()

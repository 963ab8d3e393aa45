"""Keeps a datapath going: one process active, one on standby, and successors with other descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import udptun._fastpath as fastpath
from udptun.core.errors import DatapathError
from udptun.core.tunnel import Confinement
from udptun.datapath import worker
from udptun.datapath.hang import HangWatch
from udptun.datapath.processes import Process, ProcessEndedError, new_connection, new_socket_path
from udptun.datapath.protocol import CONFINEMENTS, Descriptors
from udptun.datapath.restarts import Restarts

log = logging.getLogger(__name__)

_ACTIVE_TIMEOUT_S = 5.0
_LOOK_S = 1.0
"""How often the processes are looked at: a signal may have stopped one."""
_STOPPED_PATIENCE_S = 1.0
"""An active process that is stopped for so long is replaced: nothing passes meanwhile."""
_IDLE_S = 15.0
"""After so long without a look that went well nobody takes care of the processes.  A look may take its 5 s twice."""


def new_lock() -> int:
    """A memory file with the lock that the active datapath process holds.

    The control plane locks it for no more than a moment, to see whether one lives.  The caller owns the descriptor.
    """
    return os.memfd_create("udptun-lock", os.MFD_CLOEXEC)


def build_id() -> str:
    """Tells one build of the datapath from another: 32 hexadecimal digits over its two files."""
    files = [Path(file).read_bytes() for file in (fastpath.__file__, worker.__file__)]
    # Nobody forges a build here, and hashlib brings OpenSSL: 4 MB.
    return "".join(f"{checksum(content):08x}" for content in files for checksum in (zlib.crc32, zlib.adler32))


class Datapath:
    """The datapath of a device: keeps one process active and one on standby.

    `run_dir` is where their sockets are, named after the `device`.  Descriptors stay the caller's, who keeps them open:
    they are what a new process is started with.

    `confinement` is what the processes shall give up.  One that fails under a filter of system calls, because the C
    library needs one that nobody has thought of, would be followed by others that fail: packets come first, and the
    next one is started without the filter.
    """

    def __init__(
        self,
        run_dir: Path,
        descriptors: Descriptors,
        processes: list[Process],
        device: str,
        confinement: Confinement = Confinement.FULL,
    ) -> None:
        self._run_dir, self._device = run_dir, device
        self._build_id = build_id()
        self._wake = asyncio.Event()
        """Set when `supervise` shall look whether a process is missing."""
        self._changed = asyncio.Event()
        """Set when a process has become active or is gone."""
        # Held while processes come and go on purpose, so that `supervise` does not take it for dying.
        self._changing = asyncio.Lock()
        self._restarts = Restarts()
        self._start_due_s = 0.0
        """When the next process may be started (time.monotonic())."""
        self._dying: tuple[str, ...] = ()
        self._stopped_since: dict[Process, float] = {}
        """The processes that a signal has stopped, with time.monotonic() of when that was seen."""
        self._hang_watch = HangWatch()
        self._well_s: float | None = None
        """time.monotonic() of the last look that has found or made the active process work; None before `supervise`."""
        self.signs_of_life: Callable[[], Sequence[Hashable | None]] = list
        """What `HangWatch` looks at: of each worker."""
        self._confinement = confinement
        self._failed_confined = ""
        """How a process has failed under the filter; while this says something others are started without."""
        self.descriptors = descriptors
        self.is_spread = True
        """Whether a successor shall direct what arrives to its sockets by a program (`Offload.SPREAD`)."""
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
            wanted = self._confinement
            for reason, old in (
                ("another build", [it for it in self.processes if it.build_id != self._build_id]),
                # Not what they have given up: where the kernel cannot do all of it, others would give up no more.
                ("another confinement", [it for it in self.processes if it.wanted_confinement is not wanted]),
            ):
                if old:
                    log.info("datapath replaced pid=%s reason=%s", ",".join(str(it.pid) for it in old), reason)
                    await self._replace_all(self.descriptors, lambda: None)
                    break
            await self._start_missing()

    async def revive(self) -> None:
        """Start one process and let go of it: it goes on where the last one has ended.  Raises DatapathError."""
        await self._start_one(self.descriptors)
        self.detach()

    async def bring_here(self) -> None:
        """Replace processes that live in another pid namespace: they would end with it.

        A container that is deleted takes its processes with it.  `supervise` starts the new standby.  Raises
        DatapathError.
        """
        async with self._changing:
            there = [process.pid for process in self.processes if process.is_elsewhere]
            if there:
                log.info("datapath replaced pid=%s reason=another pid namespace", ",".join(map(str, there)))
                await self._replace_all(self.descriptors, lambda: None)

    async def replace(self, descriptors: Descriptors, switch: Callable[[], None] = lambda: None) -> None:
        """Have a successor with other descriptors take over; without any process, just use them from now on.

        The successor is started first.  When it is ready, `switch` is called.  Then the predecessor is told to stop; it
        reads until then, and what arrives between the two waits in the kernel's queues.  The successor begins with what
        waits for the predecessor.  `supervise` starts the new standby.  Raises DatapathError and what `switch` raises:
        the predecessor goes on.
        """
        async with self._changing:
            if self.processes:
                await self._replace_all(descriptors, switch)
                self._wake.set()
            else:
                switch()
                self.descriptors = descriptors

    async def supervise(self) -> None:
        """For ever: start a process for each that dies, and have the standby go on when the active one is stopped."""
        while True:
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event.
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()
            async with self._changing:
                self._bury_the_dead()
                try:
                    await self._look_for_stopped()
                    await self._look_for_hung()
                    self._well_s = time.monotonic()
                    if time.monotonic() >= self._start_due_s:
                        await self._start_missing()
                except ProcessEndedError:
                    # It is buried with the next look.
                    self._wake.set()
                except DatapathError as exc:
                    self._note_death(str(exc))

    @property
    def is_well(self) -> bool:
        """Whether `supervise` has come round lately, and found or made the active process work."""
        return self._well_s is None or time.monotonic() - self._well_s < _IDLE_S

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each thing that is wrong.  May be read on another thread."""
        lines = [*self._dying, *map(_stopped_line, list(self._stopped_since))]
        failed = self._failed_confined
        if failed and any(it.confinement is Confinement.CAPABILITIES for it in list(self.processes)):
            lines.append(_unfiltered_line(failed))
        return tuple(lines)

    async def stop(self) -> None:
        """End all processes, standbys first, so that none of them takes over."""
        async with self._changing:
            for process in self._standbys_first():
                await self._end(process)

    def detach(self) -> None:
        """Let go of the processes; they go on."""
        for process in self.processes:
            process.detach()

    def _standbys_first(self) -> list[Process]:
        return sorted(self.processes, key=lambda process: process.is_active)

    def _add(self, process: Process) -> None:
        self.processes.append(process)
        process.observe(self._note_change)

    def _note_change(self) -> None:
        self._changed.set()
        self._wake.set()

    def _bury_the_dead(self) -> None:
        for process in [process for process in self.processes if process.is_gone]:
            self.processes.remove(process)
            self._note_failure(process)
            self._note_death(f"pid={process.pid} was={_role(process)}, {process.cause_of_death}")
        if self._dying and self._restarts.is_calm(time.monotonic()):
            self._dying = ()
            log.info("datapath processes live again")

    def _note_failure(self, process: Process) -> None:
        """When a process has failed, see to it that the next one is started the other way: with the filter, or without.
        """
        if not process.has_failed:
            return
        was_filtered = process.confinement is Confinement.FULL
        self._failed_confined = f"pid={process.pid}, {process.cause_of_death}" if was_filtered else ""
        if was_filtered:
            log.warning("datapath process failed under its filter of system calls %s", self._failed_confined)

    def _note_death(self, what: str) -> None:
        """`what` says which process died of what, or failed to start.  Sees to the next start, and to what is told."""
        death = self._restarts.note_death(time.monotonic())
        self._start_due_s = time.monotonic() + death.pause_s
        asyncio.get_running_loop().call_later(death.pause_s + 0.001, self._wake.set)
        if not death.is_a_problem:
            log.warning("datapath process gone: %s", what)
            return
        due = time.strftime("%H:%M:%S", time.localtime(time.time() + death.pause_s))
        self._dying = (
            f"the datapath's processes have died {death.number} times in {death.span_s:.0f} s, the last time: {what}; "
            f"another one is started at {due}, {death.pause_s:.2g} s later; the kernel's log (`dmesg`) has it when one "
            "was killed for lack of memory; a fault of udptun should be reported",
        )
        log.warning("%s", *self._dying)

    async def _look_for_stopped(self) -> None:
        """Name the processes that a signal has stopped.  When the active one is stopped for long, the standby goes on.

        Only the end of the active process gives up its lock, so it is killed, as one is that hangs.  Raises
        DatapathError.
        """
        now_s, before = time.monotonic(), self._stopped_since
        stopped = [process for process in self.processes if process.is_stopped]
        self._stopped_since = {process: before.get(process, now_s) for process in stopped}
        for process in stopped:
            if process not in before:
                log.warning("%s", _stopped_line(process))
        active = self.active
        if active is None or now_s - self._stopped_since.get(active, now_s) < _STOPPED_PATIENCE_S:
            return
        if all(process in stopped for process in self.processes):
            await self._start_one(self.descriptors)
        await self._end(active)
        del self._stopped_since[active]
        log.warning("datapath process ended, as it was stopped, and another goes on pid=%d", active.pid)
        await self._wait_active()

    async def _look_for_hung(self) -> None:
        """End the active process when a worker of it hangs: its standby goes on.  Raises DatapathError."""
        active = self.active
        is_hung = self._hang_watch.look(self.signs_of_life(), time.monotonic())
        # A debugger holds a process up for as long as a person thinks.
        if active is None or not is_hung or active.is_traced:
            return
        self._hang_watch = HangWatch()
        if not self.standbys:
            await self._start_one(self.descriptors)
        await self._end(active)
        self._note_death(f"pid={active.pid} was=active, a worker of it hung")
        await self._wait_active()

    async def _replace_all(self, descriptors: Descriptors, switch: Callable[[], None]) -> None:
        """Put one new process with these descriptors in the place of all that there are."""
        predecessors = self._standbys_first()
        successor = await self._start_one(descriptors, self.descriptors)
        try:
            # A standby would take over before the successor.
            for process in predecessors[:-1]:
                await self._end(process)
            switch()
            await self._end(predecessors[-1])
            await self._wait_active()
        except BaseException:
            with contextlib.suppress(DatapathError):
                await self._end(successor)
            # For a standby with the old descriptors.
            self._wake.set()
            raise
        self.descriptors = descriptors

    async def _end(self, process: Process) -> None:
        if not process.is_gone:
            await process.stop()
        self.processes.remove(process)

    async def _start_missing(self) -> None:
        """Start as many processes as are missing now; one that dies meanwhile waits for its time."""
        for _ in range(2 - sum(not process.is_gone for process in self.processes)):
            await self._start_one(self.descriptors)
            await self._wait_active()

    async def _wait_active(self) -> None:
        """Until one of the processes is active, whichever it is.  Raises DatapathError."""
        try:
            async with asyncio.timeout(_ACTIVE_TIMEOUT_S):
                while self.active is None:
                    if all(process.is_gone for process in self.processes):
                        pids = ", ".join(str(process.pid) for process in self.processes)
                        raise ProcessEndedError(f"the datapath processes {pids} ended before one was active")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            there = [process for process in self.processes if not process.is_gone]
            stopped = [str(process.pid) for process in there if process.is_stopped]
            advice = f"stopped: {', '.join(stopped)}; continue it (kill -CONT)" if stopped else "is the host too busy?"
            raise DatapathError(
                f"none of the datapath processes {', '.join(str(process.pid) for process in there)} became active "
                f"within {_ACTIVE_TIMEOUT_S:.0f} s; {advice}"
            ) from None

    async def _start_one(self, descriptors: Descriptors, old: Descriptors | None = None) -> Process:
        """Start a process; `old` are the descriptors of the one that it is to take over from with others."""
        path = new_socket_path(self._run_dir, self._device)
        confinement = Confinement.CAPABILITIES if self._failed_confined else self._confinement
        try:
            connection, child = self._launch(path, descriptors, old, confinement)
        except OSError as exc:
            path.unlink(missing_ok=True)
            raise DatapathError(f"cannot start a datapath process at {path}: {exc.strerror or exc}") from exc
        process = Process(connection, path, child)
        process.confinement = confinement
        self._add(process)
        try:
            await process.wait_hello()
        except ProcessEndedError:
            if process.has_failed and confinement is Confinement.FULL:
                self._note_failure(process)
                self.processes.remove(process)
                return await self._start_one(descriptors, old)
            raise
        except BaseException:
            with contextlib.suppress(DatapathError):
                await self._end(process)
            raise
        log.info("datapath process started pid=%d", process.pid)
        return process

    def _launch(
        self, path: Path, fds: Descriptors, old: Descriptors | None, confinement: Confinement
    ) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """Start a process that listens at `path`, and connect to it."""
        old_fds = ((), (), ()) if old is None else (old.tun, old.udp, old.ipv6)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen(8)
            connection = new_connection()
            try:
                # Before the start: nothing is to be undone when it fails.
                connection.connect(os.fspath(path))
                child = subprocess.Popen(
                    [
                        # -I -S: neither the environment nor site-packages; half the start-up time.
                        *(sys.executable, "-I", "-S", worker.__file__, fastpath.__file__, self._build_id),
                        *(str(fd) for fd in (listener.fileno(), fds.table, fds.stats, fds.lock)),
                        *(",".join(map(str, some)) for some in (fds.tun, fds.udp, fds.senders, fds.events)),
                        *(",".join(map(str, some)) for some in (fds.ipv6, *old_fds)),
                        str(int(self.is_spread)),
                        str(CONFINEMENTS.index(confinement)),
                        ",".join(map(str, fds.ipv6_senders)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds={listener.fileno(), *fds.as_list(), *(fd for some in old_fds for fd in some)},
                    # Out of the reach of the terminal's ^C and of our process group's end.
                    start_new_session=True,
                    cwd="/",
                )
            except BaseException:
                connection.close()
                raise
        return connection, child


def _role(process: Process) -> str:
    return "active" if process.is_active else "standby"


def _stopped_line(process: Process) -> str:
    what = "no packet passes until another takes its place" if process.is_active else "it cannot take over"
    return (
        f"the {_role(process)} datapath process {process.pid} is stopped by a signal, so {what}; continue it: "
        f"`kill -CONT {process.pid}`"
    )


def _unfiltered_line(failed: str) -> str:
    return (
        f"the datapath runs without its filter of system calls, as a process failed under it ({failed}); packets flow; "
        "report it as a fault of udptun with the version of the C library (`ldd --version`); the next start of the "
        "daemon tries the filter again"
    )

"""CPU time from /proc: of the machine, of single processes, and of all programs that no bench started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

SESSION_MARK = "UDPTUN_BENCH_SESSION"
"""In the environment of everything that a bench starts; a process without it is foreign."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """The machine's CPU time since boot, ticks summed over all cores (proc_stat(5)).

    `busy` includes `stolen`: what the hypervisor gave to others while we had something to do.
    """

    busy: int
    total: int
    stolen: int

    @classmethod
    def now(cls) -> CpuTimes:
        return cls.parse(Path("/proc/stat").read_text())

    @classmethod
    def parse(cls, text: str) -> CpuTimes:
        # user nice system idle iowait irq softirq steal; the two guest columns are in user and nice already.
        ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
        return cls(sum(ticks) - ticks[3] - ticks[4], sum(ticks), ticks[7])

    def busy_cores_since(self, before: CpuTimes) -> float:
        """How many cores were busy on average between the two."""
        total = self.total - before.total
        return (self.busy - before.busy) / total * (os.cpu_count() or 1) if total else 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Between two moments: seconds of CPU time, and of the clock.

    `system_s` is everything that the machine did, interrupts included, except for foreign programs.  `foreign_cores` is
    how many cores foreign programs and the hypervisor took meanwhile.
    """

    wall_s: float
    system_s: float
    tunnel_s: float
    foreign_cores: float

    @classmethod
    def none(cls) -> Usage:
        """Of a measurement that takes no time."""
        return cls(0.0, 0.0, 0.0, 0.0)

    @property
    def busy_cores(self) -> float:
        return self.system_s / self.wall_s


class Meter:
    """Measures from its creation until `read`; `pids` are the tunnel's processes."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        # Looking at all processes takes milliseconds, so it comes before what is measured.
        self._foreign_s = _foreign_seconds()
        self._tunnel_s = seconds_of(self._pids)
        self._machine = CpuTimes.now()
        self._start = time.monotonic()

    def read(self) -> Usage:
        wall_s = time.monotonic() - self._start
        machine, tunnel_s, foreign_s = CpuTimes.now(), seconds_of(self._pids), _foreign_seconds()
        stolen_s = (machine.stolen - self._machine.stolen) / _TICKS_PER_S
        busy_s = (machine.busy - self._machine.busy) / _TICKS_PER_S
        # The time of a foreign process that nobody waited for disappears with it: the difference may be below zero.
        others_s = max(0.0, foreign_s - self._foreign_s)
        return Usage(
            wall_s,
            max(0.0, busy_s - stolen_s - others_s),
            tunnel_s - self._tunnel_s,
            (others_s + stolen_s) / wall_s,
        )


def seconds_of(pids: Iterable[int]) -> float:
    """CPU time of the processes so far, without their children's.  Raises BenchError when one has ended."""
    try:
        return sum(_process_ticks(pid)[0] for pid in pids) / _TICKS_PER_S
    except OSError as exc:
        raise BenchError(f"a tunnel process has ended: {exc.filename}: {exc.strerror}") from exc


def _process_ticks(pid: int) -> tuple[int, int]:
    """CPU time of the process, and of its children that have ended (proc_pid_stat(5))."""
    # The command's name may hold anything, also blanks and parentheses.  It ends with the last parenthesis.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])


def _foreign_seconds() -> float:
    """CPU time of all foreign processes.

    Children that have ended count through their parents, so one that comes and goes between two calls is seen.
    """
    ticks = 0
    for pid in foreign_pids():
        with contextlib.suppress(OSError):
            ticks += sum(_process_ticks(pid))
    return ticks / _TICKS_PER_S


def foreign_pids() -> set[int]:
    """All processes that no bench started, without threads of the kernel and without our own ancestors.

    Zombies of a foreign process are in it, although they have no environment any more: when the parent waits for one,
    the CPU time of its whole life becomes the parent's.
    """
    mark = f"{SESSION_MARK}={os.environ.get(SESSION_MARK, '')}".encode()
    ours = _ancestors()
    found: set[int] = set()
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) not in ours:
            pid, environment = int(entry.name), b""
            # Threads of the kernel and zombies have none: an empty file, or ESRCH as on Linux 6.18.
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes()
            if not environment:
                with contextlib.suppress(OSError):
                    parents[pid] = _parent(pid)
            elif mark not in environment.split(b"\0"):
                found.add(pid)
    return found | {pid for pid, parent in parents.items() if parent in found}


def _ancestors() -> set[int]:
    """Our own pid and those of all ancestors.  Our children's time reaches them when we end."""
    pids = {os.getpid()}
    pid = os.getppid()
    while pid > 1:
        pids.add(pid)
        pid = _parent(pid)
    return pids


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

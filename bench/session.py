"""What every command here that makes a lab has in common: progress on screen, ^C, errors, and proof of a clean end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.cpu import SESSION_MARK, CpuTimes
from udptun.core.errors import UdptunError
from udptun.lab.errors import LabError
from udptun.lab.machine import wait_until

_END_TIMEOUT_S = 10
_IDLE_S = 1.0
BUSY_LIMIT = 0.1
"""Cores; what else runs then costs a two-core machine up to a twentieth of its throughput."""

_LINKS = ("flannel0", "cni0", "underlay", "h1", "h2", "plain", "vxlan", "vxlan.1")
_PATHS = ("/run/flannel", "/run/udptun", "/run/udptun-lab", "/var/lib/udptun", "/run/netns/p1")


class Screen:
    """Lines with the seconds since the start before them.  Bold on a terminal, plain text elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        self._is_line_open = False

    def step(self, text: str) -> None:
        """Say what is done from now on."""
        self.begin(text)
        self.add("\n")

    def begin(self, text: str) -> None:
        """As `step`, with the line left open for `add`."""
        self.end_line()
        self.add(f"[{time.monotonic() - self._start:5.1f} s] {text}")

    def add(self, text: str) -> None:
        """Go on in the open line."""
        print(text, end="", flush=True)
        self._is_line_open = not text.endswith("\n")

    def end_line(self) -> None:
        """End the line that was left open, if there is one."""
        if self._is_line_open:
            self.add("\n")

    def title(self, text: str) -> None:
        """What follows belongs to `text`."""
        self.end_line()
        self.add(f"\n\033[1m{text}\033[0m\n" if self._is_terminal else f"\n{text}\n")

    def show(self, text: str) -> None:
        """Output of something else, as it is, a little to the right."""
        self.add("".join(f"    {line}".rstrip() + "\n" for line in text.rstrip().splitlines()))


def run(screen: Screen, act: Callable[[], None]) -> int:
    """Run `act`, which makes a lab and leaves it; check that nothing of it remains.  Return the exit status.

    0; 1 when it failed or left something behind, with a line on stderr; 130 after ^C.
    """
    os.environ[SESSION_MARK] = f"{os.getpid()}-{time.time_ns()}"
    # A shell without job control starts us in the background with ^C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = _names()
    status = 0
    try:
        act()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        screen.step("interrupted; the lab is removed")
    except (UdptunError, subprocess.TimeoutExpired) as exc:
        status = 1
        screen.end_line()
        print(f"error: {exc}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(LabError):
        wait_until("the end of the lab", lambda: not _left(before), _END_TIMEOUT_S)
    if left := _left(before):
        print(f"error: left behind: {', '.join(left)}", file=sys.stderr, flush=True)
        return status or 1
    screen.step("nothing is left: no process, network namespace, link, mount or file of the lab")
    return status


@contextlib.contextmanager
def uninterrupted_end() -> Iterator[None]:
    """To be left before the lab is: from then on ^C waits for the lab's removal, which takes a fraction of a second."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_idle(screen: Screen) -> float:
    """How many cores are busy while we do nothing: the noise under every figure.  Warns when it is much."""
    screen.begin("idle check: ")
    before = CpuTimes.now()
    time.sleep(_IDLE_S)
    busy = CpuTimes.now().busy_cores_since(before)
    screen.add(f"{busy:.2f} cores busy{'; figures will suffer from what else runs here' * (busy >= BUSY_LIMIT)}\n")
    return busy


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """For argparse: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _left(before: set[str]) -> list[str]:
    return sorted(_names() - before) + _processes()


def _names() -> set[str]:
    """What a lab that was not cleaned up would show of itself outside its namespaces."""
    names = {f"link {name}" for name in _LINKS if Path("/sys/class/net", name).exists()}
    names |= {path for path in _PATHS if Path(path).exists()}
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return names | {f"mount on {path}" for path in _PATHS if path in mounts}


def _processes() -> list[str]:
    """Other processes of this session; a zombie is none."""
    mark = f"{SESSION_MARK}={os.environ[SESSION_MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {entry.name} ({command.strip()})")
    return found

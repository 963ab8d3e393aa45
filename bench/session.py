"""What all commands that make a lab have in common: progress on screen, ^C, errors, and proof of a clean end."""

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
"""Cores.  When other programs take as much, a machine of two cores loses up to a twentieth of its throughput."""

_LINKS = ("flannel0", "cni0", "underlay", "h1", "h2", "plain", "vxlan", "vxlan.1", "plain-v6", "vxlan-v6", "vxlan-v6.1")
_PATHS = ("/run/flannel", "/run/udptun", "/run/udptun-lab", "/var/lib/udptun", "/run/netns/p1")


class Screen:
    """Prints lines that begin with the seconds since the start.  Titles are bold on a terminal, plain elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        self._is_line_open = False

    def step(self, text: str) -> None:
        """Say what is done from now on."""
        self.begin(text)
        self.add("\n")

    def begin(self, text: str) -> None:
        """As `step`, but leave the line open for `add`."""
        self.end_line()
        self.add(f"[{time.monotonic() - self._start:5.1f} s] {text}")

    def add(self, text: str) -> None:
        """Continue the open line."""
        print(text, end="", flush=True)
        self._is_line_open = not text.endswith("\n")

    def end_line(self) -> None:
        """End the open line, if there is one."""
        if self._is_line_open:
            self.add("\n")

    def title(self, text: str) -> None:
        """Print `text` as the title of what follows."""
        self.end_line()
        self.add(f"\n\033[1m{text}\033[0m\n" if self._is_terminal else f"\n{text}\n")

    def show(self, text: str) -> None:
        """Print another program's output unchanged, indented."""
        self.add("".join(f"    {line}".rstrip() + "\n" for line in text.rstrip().splitlines()))


def run(screen: Screen, act: Callable[[], None]) -> int:
    """Run `act`, which makes a lab and removes it, and check that nothing remains.  Return the exit status.

    It is 0, or 1 with a line on stderr when `act` failed or left something behind, or 130 after ^C.
    """
    os.environ[SESSION_MARK] = f"{os.getpid()}-{time.time_ns()}"
    # A shell without job control starts background commands with SIGINT ignored.
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
    """From the end of the block, ignore ^C.  Enter it after the lab: then nothing interrupts the lab's removal."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_idle(screen: Screen) -> float:
    """How many cores are busy while the bench does nothing: the noise under every figure.  Warns when it is much."""
    screen.begin("idle check: ")
    before = CpuTimes.now()
    time.sleep(_IDLE_S)
    busy = CpuTimes.now().busy_cores_since(before)
    screen.add(f"{busy:.2f} cores busy{'; figures will suffer from what else runs here' * (busy >= BUSY_LIMIT)}\n")
    return busy


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _left(before: set[str]) -> list[str]:
    return sorted(_names() - before) + _processes()


def _names() -> set[str]:
    """Links, paths and mounts that a lab which was not cleaned up would show outside its namespaces."""
    names = {f"link {name}" for name in _LINKS if Path("/sys/class/net", name).exists()}
    names |= {path for path in _PATHS if Path(path).exists()}
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return names | {f"mount on {path}" for path in _PATHS if path in mounts}


def _processes() -> list[str]:
    """Other processes of this session.  A zombie has no environment and is none of them."""
    mark = f"{SESSION_MARK}={os.environ[SESSION_MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {entry.name} ({command.strip()})")
    return found

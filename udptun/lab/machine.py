"""One lab machine: its namespaces, and how a process gets into them."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from udptun._kabi import ffi, lib
from udptun.lab import holder
from udptun.lab.errors import CommandError, LabError

log = logging.getLogger(__name__)

File = int | IO[Any] | None
"""What subprocess takes for a standard stream."""

LAB_DIR = Path(holder.LAB_DIR)
"""Where every machine of a lab sees the directory they share: net-conf.json, lease database, daemons' logs."""

SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""The directory `import udptun` found us in: commands in a lab must find the same package."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command runs: inside a machine, or in one of its pods.

    `holder_pid` is the machine's PID 1 as seen from here.  `pod` None is the machine itself.
    """

    machine: str
    holder_pid: int
    pod: str | None = None

    def __str__(self) -> str:
        return self.machine if self.pod is None else f"{self.machine}/{self.pod}"

    @property
    def net_ns(self) -> Path:
        """The network namespace as a path in our own mount namespace (`ip link … netns PATH` takes it)."""
        return self.path(f"/run/netns/{self.pod}") if self.pod else Path(f"/proc/{self.holder_pid}/ns/net")

    def path(self, inside: str | Path) -> Path:
        """The file that the machine knows as the absolute path `inside`, as a path of ours."""
        return Path(f"/proc/{self.holder_pid}/root{inside}")

    def popen(
        self,
        command: Sequence[str],
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        env: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> subprocess.Popen[str]:
        """Start `command` in here, in our working directory, as our own child: signals, terminal and status are direct.

        The process dies with the machine; whoever called must wait for it, or the machine cannot finish dying.
        Raises LabError when the machine is down.
        """
        log.info("machine=%s command=%s", self, shlex.join(command))
        enter = [
            *("nsenter", f"--target={self.holder_pid}", "--mount", "--uts", f"--net={self.net_ns}"),
            # By the machine's own root: by ours, the command's working directory would be in no mount that it has.
            f"--wd={self.path(Path.cwd())}",
        ]
        try:
            with Path(f"/proc/{self.holder_pid}/ns/pid").open("rb") as pid_ns, _children_in(pid_ns.fileno()):
                # nsenter replaces itself by the command: no process stays between it and us.
                return subprocess.Popen(
                    [*enter, *command],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env=env,
                    start_new_session=new_session,
                    text=True,
                )
        except OSError as exc:
            # The fork into a namespace whose PID 1 has died says ENOMEM.
            raise LabError(f"cannot run `{shlex.join(command)}` in {self}: {exc}; is it down?") from exc

    def ip(self, *lines: str) -> None:
        """Run `ip` commands, one a line, in this network namespace.

        Only the network namespace is entered, so that `netns PATH` means a path of ours.  Stops at the first that
        fails and raises LabError.
        """
        batch = "\n".join(lines)
        for line in lines:
            log.info("machine=%s command=ip %s", self, line)
        result = subprocess.run(
            ["nsenter", f"--net={self.net_ns}", "ip", "-batch", "-"], input=batch, text=True, capture_output=True
        )
        if result.returncode:
            said = " / ".join(result.stderr.splitlines())
            raise LabError(f"cannot set up the network of {self}: {said} (of: {'; '.join(lines)})")


class Machine:
    """A running machine and everything of ours that runs in it.

    Not for threads: one thread at a time may call it.
    """

    def __init__(self, lab: str, name: str, base: Machine | None = None) -> None:
        """Start the holder process; `wait_made` says when the namespaces are there.

        `base` is the machine whose mounts this one starts from (see holder.py).
        """
        self.name = name
        self._children: list[subprocess.Popen[str]] = []
        owner_fd = os.pidfd_open(os.getpid())
        try:
            with _children_in_a_new_pid_namespace():
                self._holder = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "udptun.lab.holder", lab, name, str(owner_fd)),
                        *([] if base is None else [str(base.at().holder_pid)]),
                    ],
                    cwd=SOURCE_ROOT,
                    pass_fds=[owner_fd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    # ^C on our terminal must reach us, who tear down in order, and not PID 1 of every machine.
                    start_new_session=True,
                    text=True,
                )
        finally:
            os.close(owner_fd)

    def at(self, pod: str | None = None) -> Place:
        """The machine itself, or one of its pods, as a place to enter."""
        return Place(self.name, self._holder.pid, pod)

    def wait_made(self) -> None:
        """Wait until the namespaces are there.  Raises LabError with what the holder said."""
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            said = self._holder.stderr.read().strip().splitlines()
            raise LabError(f"cannot make the machine {self.name}: {said[-1] if said else 'its holder process ended'}")

    @property
    def is_up(self) -> bool:
        return self._holder.poll() is None

    def popen(
        self,
        command: Sequence[str],
        *,
        pod: str | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        env: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> subprocess.Popen[str]:
        """Start `command` in the machine or one of its pods; see `Place.popen`.

        The machine waits for the process when it goes down, so the caller need not.
        """
        self._children = [child for child in self._children if child.poll() is None]
        with signals_deferred():
            child = self.at(pod).popen(
                command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, new_session=new_session
            )
            self._children.append(child)
        return child

    def run(
        self,
        command: Sequence[str],
        *,
        pod: str | None = None,
        check: bool = True,
        timeout: float = 30,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end and return its output.

        Raises CommandError for a status other than 0 when `check`, subprocess.TimeoutExpired after `timeout` seconds
        (the command is killed).
        """
        child = self.popen(
            command,
            pod=pod,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with child:
            try:
                out, err = child.communicate(input, timeout)
            except BaseException:
                child.kill()
                raise
        result = subprocess.CompletedProcess(list(command), child.returncode, out, err)
        if check and child.returncode:
            raise CommandError(str(self.at(pod)), result)
        return result

    def down(self) -> None:
        """Cut the power: every process gets SIGKILL, the namespaces vanish.  Harmless when the machine is down."""
        self._holder.kill()
        # PID 1 can't finish dying before the children that are ours have been waited for.
        for child in self._children:
            child.wait()
        self._holder.wait()
        for stream in (self._holder.stdout, self._holder.stderr):
            if stream is not None:
                stream.close()


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float) -> None:
    """Poll `holds` until it is true.  Raises LabError naming `what` when it isn't after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.01)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Python's handlers of the signals that usually raise (^C, SIGTERM, a test's timeout) run after the block.

    A child that is started but forgotten, because the handler raised in between, would never be waited for, and its
    machine could never finish dying.  Blocking the signals instead would have the child inherit that.
    """
    arrived: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def _children_in(pid_ns_fd: int) -> Iterator[None]:
    """Processes that this thread starts inside the block belong to that PID namespace; we ourselves don't move.

    No thread can be started inside the block (pid_namespaces(7)).
    """
    with Path("/proc/thread-self/ns/pid").open("rb") as own:
        _check(lib.setns(pid_ns_fd, lib.CLONE_NEWPID))
        try:
            yield
        finally:
            _check(lib.setns(own.fileno(), lib.CLONE_NEWPID))


@contextlib.contextmanager
def _children_in_a_new_pid_namespace() -> Iterator[None]:
    """The first process that this thread starts inside the block is PID 1 of a new namespace."""
    with Path("/proc/thread-self/ns/pid").open("rb") as own:
        _check(lib.unshare(lib.CLONE_NEWPID))
        try:
            yield
        finally:
            _check(lib.setns(own.fileno(), lib.CLONE_NEWPID))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))

"""The run directory: the names of the daemon's files in it, the lock that lets one daemon use it, and who may write it.

A datapath process hands its descriptors to whoever connects to its socket, and a daemon goes on with what such a socket
hands to it.  So the directory is used only when nobody but root can put a socket there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import ConfigError, KernelError, UdptunError
from udptun.kernel.peer import peer_of

LOCK_FILE = "daemon.lock"
"""flock()ed by the daemon, whose pid it holds."""

PROBES_FILE, IPV6_PROBES_FILE = "probes.json", "probes-v6.json"
"""What the daemon knows of the peers by its probes, for the next one.  Where the kernel carries the packets, each
address family has its own."""

PROBES_FILES = re.compile(rf"\.?({re.escape(PROBES_FILE)}|{re.escape(IPV6_PROBES_FILE)})(\.new)?")
"""Their names, also while they are written."""

_OWN_FILE = re.compile(
    rf"{re.escape(SOCKET_NAME)}|{re.escape(LOCK_FILE)}|{PROBES_FILES.pattern}|datapath-\w+\.sock"
)


class RunDirInUseError(UdptunError):
    """Another daemon has the lock of the run directory."""


def lock_run_dir(run_dir: Path) -> int:
    """Be the only daemon of this run directory.  The descriptor returned holds the lock; the caller owns it.

    Raises RunDirInUseError naming the daemon that has it, and ConfigError as `check_run_dir` does.
    """
    check_run_dir(run_dir)
    _shut_to_others(run_dir)
    path = run_dir / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise KernelError(f"cannot open {path}", exc.errno or 0, "run as root?") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise RunDirInUseError(
            f"another udptun daemon ({_who(run_dir, pid)}) uses {run_dir}; "
            "stop it, or give this one a --run-dir, --state-dir and --subnet-file of its own"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _shut_to_others(run_dir: Path) -> None:
    """Let nobody but its owner look into a directory that is for the daemon alone: systemd and kubelet make it 0755.

    One that holds anything else, as /run does, stays as it is: the sockets have mode 0600 in any case.
    """
    with contextlib.suppress(OSError):
        if run_dir.stat().st_mode & 0o077 and all(_OWN_FILE.fullmatch(it.name) for it in run_dir.iterdir()):
            run_dir.chmod(0o700)


def _who(run_dir: Path, pid: str) -> str:
    """The daemon that has the lock, in words; `pid` is what it calls itself, which in another container is no pid here.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(os.fspath(run_dir / SOCKET_NAME))
            pid_here, _uid = peer_of(asking)
        except OSError:
            return f"pid {pid or 'unknown'}"
    return f"pid {pid_here}" if pid_here else f"pid {pid or 'unknown'} of another pid namespace"


def check_run_dir(run_dir: Path) -> None:
    """Raises ConfigError when somebody but root and ourselves can write there, or has left something in it.

    What is missing, or must not be looked at, is no fault here: whoever uses it next is told.
    """
    fault = fault_of_directory(run_dir)
    if not fault and (stranger := next(filter(_is_a_strangers, _entries(run_dir)), None)):
        fault = f"{stranger} belongs to uid {stranger.lstat().st_uid}; delete it"
    if fault:
        raise ConfigError(f"--run-dir: {run_dir} is not used: {fault}")


def fault_of_directory(directory: Path) -> str:
    """How somebody but root and ourselves can change what is in the directory, with the remedy; empty: nobody can."""
    return next(filter(None, _faults_on_the_way(directory.absolute())), "")


def _faults_on_the_way(path: Path) -> Iterator[str]:
    """A line, or an empty one, for each directory and symbolic link that decides what the path leads to."""
    for place in (*reversed(path.parents), path):
        yield _fault_of_owner(place)
        # In a sticky directory, such as /tmp, only its owner can replace an entry; but everybody can make new ones.
        yield _fault_of_mode(place, may_be_sticky=place != path)
        if place.is_symlink():
            target = place.parent / place.readlink()
            # What a link in /proc leads to is not what its text says.
            if _is_same(place, target):
                yield from _faults_on_the_way(target)


def _fault_of_owner(place: Path) -> str:
    if _is_a_strangers(place):
        what = "symbolic link" if place.is_symlink() else "directory"
        uid = place.lstat().st_uid
        return f"the {what} {place} belongs to uid {uid}; `chown -h root {place}`, or give another directory"
    return ""


def _fault_of_mode(place: Path, *, may_be_sticky: bool) -> str:
    try:
        mode = place.stat().st_mode
    except OSError:
        return ""
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not (may_be_sticky and mode & stat.S_ISVTX):
        text = f"{stat.S_IMODE(mode):04o}"
        return f"others may write to {place} (mode {text}); `chmod go-w {place}`, or give another directory"
    return ""


def _is_same(place: Path, other: Path) -> bool:
    try:
        return place.samefile(other)
    except OSError:
        return False


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_a_strangers(path: Path) -> bool:
    try:
        return path.lstat().st_uid not in (0, os.geteuid())
    except OSError:
        return False

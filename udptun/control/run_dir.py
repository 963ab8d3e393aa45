"""The run directory: the names of the daemon's files in it, and the lock that lets one daemon use it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from udptun.core.errors import KernelError, UdptunError

SOCKET_NAME = "udptun.sock"
"""Speaks HTTP; `udptun status` asks there."""

LOCK_FILE = "daemon.lock"
"""flock()ed by the daemon, whose pid it holds."""


def lock_run_dir(run_dir: Path) -> int:
    """Be the only daemon of this run directory.  The descriptor returned holds the lock; the caller owns it.

    Raises UdptunError naming the daemon that has it.
    """
    path = run_dir / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise KernelError(f"cannot open {path}", exc.errno or 0, "run as root?") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise UdptunError(
            f"another udptun daemon (pid {pid or 'unknown'}) uses {run_dir}; "
            "stop it, or give this one a --run-dir of its own"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd

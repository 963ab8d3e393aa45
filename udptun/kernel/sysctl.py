"""Kernel settings below /proc/sys."""

from __future__ import annotations

from pathlib import Path

from udptun.core.desired import Sysctl
from udptun.core.errors import KernelError

_PROC_SYS = Path("/proc/sys")


def read_sysctl(path: str) -> str | None:
    """The value; None when there is no such setting, or it cannot be read."""
    try:
        return (_PROC_SYS / path).read_text().strip()
    except OSError:
        return None


def write_sysctl(sysctl: Sysctl) -> None:
    """Raises KernelError."""
    path = _PROC_SYS / sysctl.path
    try:
        path.write_text(sysctl.value)
    except OSError as exc:
        raise KernelError(f"cannot write {sysctl.value} to {path}", exc.errno or 0) from exc

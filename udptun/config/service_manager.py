"""What the service manager (systemd) says in the environment.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_FD = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """`watchdog_s`: it wants to hear of us this often, seconds; None: never.

    `keeps_descriptors`: it keeps descriptors that it is sent, and passes them to the next daemon.  `passed` are those
    that it has passed to us, with their names.
    """

    watchdog_s: float | None = None
    keeps_descriptors: bool = False
    passed: tuple[tuple[str, int], ...] = ()


def service_manager(environ: Mapping[str, str], pid: int) -> ServiceManager:
    """As sd_watchdog_enabled(3), sd_listen_fds_with_names(3) and systemd.exec(5) have it; `pid` is our own.

    What is meant for another process, or makes no sense, counts as not said.  systemd sets FDSTORE since version 254;
    for earlier ones our unit sets it.
    """
    watchdog_us = _number(environ.get("WATCHDOG_USEC", ""))
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        watchdog_us = 0
    n_passed = _number(environ.get("LISTEN_FDS", "")) if environ.get("LISTEN_PID") == str(pid) else 0
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (n_passed - len(names))
    return ServiceManager(
        watchdog_us / 1e6 or None,
        _number(environ.get("FDSTORE", "")) > 0 and bool(environ.get("NOTIFY_SOCKET")),
        tuple((names[i], _FIRST_FD + i) for i in range(n_passed)),
    )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0

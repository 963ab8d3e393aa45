"""Names that one process at a time holds in the network namespace: how the daemons of one host learn of each other.

Daemons of one host share devices, routes and firewall rules.  They need not share anything else: each may have a /run,
mounts and process numbers of its own.  So a name is an abstract Unix socket, which belongs to the network namespace as
devices and routes do.  The kernel frees it when its process ends, however it ends.

Every user of the host may take such a name.  One that is held by a user other than ours is no daemon, and is ignored.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from udptun.kernel.peer import peer_of

log = logging.getLogger(__name__)

_PREFIX = "udptun "
_SOCKETS = Path("/proc/net/unix")
_ASKING = 128
"""How many processes may ask for the holder of a name; what they have asked is never read."""
_LOCK_RETRY_S = 0.02
_TAKE_TRIES = 5
_TAKE_RETRY_S = 0.001
"""A holder that has just ended, or that does not listen yet, is gone or there a moment later."""

UNKNOWN = -1
"""In the place of a pid: the holder could not be asked."""


class Claims:
    """The names that this process holds, until `close`."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def take(self, name: str) -> int | None:
        """Hold `name`.  Returns None, or what `find_holder` says of the process that holds it already."""
        for tries_left in reversed(range(_TAKE_TRIES)):
            holding = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                holding.bind(_address(name))
                holding.listen(_ASKING)
            except OSError as exc:
                holding.close()
                if exc.errno == errno.EADDRINUSE and (pid := find_holder(name)) is not None:
                    return pid
                if exc.errno != errno.EADDRINUSE or not tries_left:
                    log.warning("other daemons on this host cannot see a name of ours name=%r error=%s", name, exc)
                    break
                time.sleep(_TAKE_RETRY_S)
            else:
                self._sockets.append(holding)
                break
        return None

    def close(self) -> None:
        """Free all names.  A second call does nothing."""
        for holding in self._sockets:
            holding.close()
        self._sockets.clear()


def find_holder(name: str) -> int | None:
    """The pid of the process that holds `name`; None when no daemon holds it.

    0: it lives in another pid namespace, where it cannot be seen from here.  UNKNOWN: it could not be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as asking:
        asking.setblocking(False)
        try:
            asking.connect(_address(name))
        except BlockingIOError:
            # Too many have asked before.
            return UNKNOWN
        except OSError:
            return None
        pid, uid = peer_of(asking)
    return pid if uid == os.geteuid() else None


def describe_holder(pid: int) -> str:
    """What `find_holder` says, in words for a message."""
    if pid == UNKNOWN:
        return "pid unknown"
    return f"pid {pid}" if pid else "in another pid namespace, as another container's is"


def names_held(kind: str) -> list[str]:
    """The names that begin with `kind` and a blank, whoever holds them, without that beginning.

    Empty when the system does not say.
    """
    try:
        lines = _SOCKETS.read_text(errors="replace").splitlines()
    except OSError as exc:
        log.debug("cannot see which names are held error=%s", exc)
        return []
    # Num RefCount Protocol Flags Type St Inode Path; of an abstract name the first byte, 0, is printed as @.
    paths = [line.split(" ", 7)[7] for line in lines if f" @{_PREFIX}{kind} " in line]
    return sorted({path.removeprefix(f"@{_PREFIX}{kind} ") for path in paths})


@asynccontextmanager
async def locked(name: str, patience_s: float) -> AsyncGenerator[None, None]:
    """Hold `name` during the block; whoever has it first is waited for.

    After `patience_s` seconds the block runs all the same: a holder that is stopped shall not stop the others.
    """
    claims = Claims()
    deadline_s = asyncio.get_running_loop().time() + patience_s
    try:
        while (pid := claims.take(name)) is not None:
            if asyncio.get_running_loop().time() > deadline_s:
                log.warning("not waiting any longer for another daemon pid=%d name=%r", pid, name)
                break
            await asyncio.sleep(_LOCK_RETRY_S)
        yield
    finally:
        claims.close()


def _address(name: str) -> str:
    return f"\0{_PREFIX}{name}"

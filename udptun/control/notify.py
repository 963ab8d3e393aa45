"""Tell systemd how the daemon is doing (sd_notify(3)), with nothing but a datagram."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"
BARRIER = "BARRIER=1"
"""With the writing end of a pipe: closed when all that was sent before has been read."""

PATIENCE_S = 1.0
"""How long the manager may take to read what it is sent, seconds."""
_RETRY_S = 0.01


def reloading() -> str:
    """The state to send before a reload; READY ends the reload.  Type=notify-reload needs the time (systemd 253)."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def store(name: str) -> str:
    """The state to send with a descriptor that is to be kept under this name, whatever poll(2) says of it."""
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"


def forget(name: str) -> str:
    """The state to send when the descriptors of this name are to be kept no longer."""
    return f"FDSTOREREMOVE=1\nFDNAME={name}"


def notify(address: str, state: str, fds: Sequence[int] = ()) -> None:
    """Send `state`, and duplicates of `fds`, to `address`, the value of NOTIFY_SOCKET.  Nothing when it is empty.

    `address` is a path or, with a leading `@`, a name in the abstract namespace.  Raises OSError when the service
    manager does not listen there or does not read.  It never waits.
    """
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(sock, [state.encode()], list(fds))


async def patiently(tell: Callable[[], None]) -> None:
    """`tell` something, and wait for the manager to read what fills its queue, which may hold ten datagrams.

    Raises what `tell` raises, BlockingIOError only after PATIENCE_S.
    """
    clock = asyncio.get_running_loop().time
    until_s = clock() + PATIENCE_S
    while True:
        try:
            return tell()
        except BlockingIOError:
            if clock() > until_s:
                raise
        await asyncio.sleep(_RETRY_S)

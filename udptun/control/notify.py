"""Tell systemd how the daemon is doing (sd_notify(3)), with nothing but a datagram."""

from __future__ import annotations

import socket
import time

READY = "READY=1"
STOPPING = "STOPPING=1"


def reloading() -> str:
    """The state to send before a reload; READY ends the reload.  Type=notify-reload needs the time (systemd 253)."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def notify(address: str, state: str) -> None:
    """Send `state` to `address`, the value of NOTIFY_SOCKET.  Does nothing when it is empty.

    `address` is a path or, with a leading `@`, a name in the abstract namespace.  Raises OSError when the service
    manager does not listen there or does not read.  It never waits.
    """
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())

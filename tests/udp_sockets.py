"""What waits in a UDP socket."""

from __future__ import annotations

import socket


def n_waiting(udp: socket.socket) -> int:
    """How many datagrams wait in the non-blocking socket.  They are read, and none may be empty."""
    n = 0
    try:
        while udp.recv(1):
            n += 1
    except BlockingIOError:
        return n
    raise AssertionError("an empty datagram")

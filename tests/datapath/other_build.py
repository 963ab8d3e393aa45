"""A datapath process as an earlier or a later build would start it: it holds what it is given and moves no packet.

    python other_build.py <kind> <listen> <table> <stats> <lock> <tun> <udp> <events> ...

It hands out its descriptors, competes for the lock and ends when it is told to, as every build does.  What waits in
the queues is for its successor.  Kinds:

    first       HELLO of the first builds, 60 bytes without length and version
    later       HELLO with another layout version, fields that nobody here knows, and two descriptors more; one more
                beside the eventfds, too
    poor        as the later one, and it has only one eventfd left
    unknown     something else that only begins in the same way
    silent      nothing at all
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import threading

BUILD_ID = b"0123456789abcdef0123456789abcdef"
STARTED_NS = 123_456_789
LAYOUT_VERSION = 99


def hello(kind: str, is_active: bool) -> bytes:
    if kind == "first":
        return struct.pack("=4sIIIIQ32s", b"udpt", 5, os.getpid(), is_active, 1, STARTED_NS, BUILD_ID)
    if kind in ("later", "poor"):
        more = bytes(range(200))
        known = struct.pack("=IIQ32sIII", is_active, 1, STARTED_NS, BUILD_ID, os.getpid(), LAYOUT_VERSION, 0)
        return struct.pack("=4sII", b"udpt", 12 + len(known) + len(more), 8) + known + more
    return b"udpt" + bytes(90)


def main(kind: str, listen_fd: int, *fds: int) -> None:
    fds, events = fds[:5], fds[5:]
    listener, lock_fd = socket.socket(fileno=listen_fd), fds[2]
    if kind == "later":
        fds += os.pipe()
        events += (os.eventfd(0),)
    if kind == "poor":
        events = events[:1]
    active = threading.Event()
    woken, wake = os.pipe()

    def wait_for_lock() -> None:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX)
        active.set()
        os.write(wake, b"a")

    threading.Thread(target=wait_for_lock, daemon=True).start()
    connections: list[socket.socket] = []
    while True:
        readable, _, _ = select.select([listener, woken, *connections], [], [])
        greeted = []
        if listener in readable:
            connections.append(listener.accept()[0])
            greeted = connections[-1:]
        if woken in readable:
            os.read(woken, 1)
            greeted = connections[:]
        for connection in greeted:
            if kind != "silent":
                socket.send_fds(connection, [hello(kind, active.is_set())], list(fds))
        for connection in [connection for connection in connections if connection in readable]:
            message = connection.recv(64)
            if message == b"stop":
                os._exit(0)
            if message == b"events" and kind in ("later", "poor"):
                socket.send_fds(connection, [message], list(events))
            if not message:
                connections.remove(connection)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

"""The datapath process.

    python -I -S worker.py <_fastpath .so> <build id> <listen> <table> <stats> <lock> <tun,…> <udp,…> <senders,…>

It is started with its descriptors inherited, needs no file but these two and imports next to nothing, so that it
is ready in some 20 ms.  Any number of these processes may hold the same descriptors: the one that holds the lock
runs the workers, the others sleep until the kernel releases the lock because its holder died, and then go on where
it stopped.  The control plane keeps one such standby.

Whoever connects to the listening socket (SOCK_SEQPACKET, in the run directory) gets a HELLO message with all
descriptors attached; another when the process becomes the active one.  The message b"stop" ends the process.  That the
control plane goes away changes nothing here.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time

# Only for type checkers; `typing` would cost a third of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

HELLO = struct.Struct("=4sIIIIQ32s")
"""Magic, layout version, pid, 1 if active, number of workers, start (CLOCK_MONOTONIC ns), build id in ASCII.

The descriptors come in this order: table, statistics, lock, one TUN queue a worker, one UDP socket a worker, and the
sockets that all workers send from, if there are such.
"""
HELLO_MAGIC = b"udpt"
STOP = b"stop"


def load_fastpath(path: str) -> ModuleType:
    """The extension module at `path`, without a package around it."""
    import _imp
    from importlib.machinery import ExtensionFileLoader, ModuleSpec

    loader = ExtensionFileLoader("_fastpath", path)
    spec = ModuleSpec("_fastpath", loader, origin=path)
    module: ModuleType = _imp.create_dynamic(spec)
    _imp.exec_dynamic(module)
    return module


def main(argv: list[str]) -> None:
    fastpath_file, build_id, *numbers = argv
    listen_fd, table_fd, stats_fd, lock_fd = map(int, numbers[:4])
    tun_fds, udp_fds, sender_fds = ([int(fd) for fd in text.split(",") if fd] for text in numbers[4:])
    descriptors = [table_fd, stats_fd, lock_fd, *tun_fds, *udp_fds, *sender_fds]
    # A terminal's or an init system's signals are meant for the control plane.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    fastpath = load_fastpath(fastpath_file)
    workers = [
        fastpath.Worker(table_fd, stats_fd, i, tun_fd, udp_fd, sender_fds)
        for i, (tun_fd, udp_fd) in enumerate(zip(tun_fds, udp_fds, strict=True))
    ]
    started_ns = time.monotonic_ns()
    woken, wake = os.pipe()

    def wait_for_lock() -> None:
        # A record lock belongs to the process and goes with it, however it dies (fcntl(2)).
        fcntl.lockf(lock_fd, fcntl.LOCK_EX)
        for worker in workers:
            _thread.start_new_thread(worker.run, ())
        os.write(wake, b"a")

    _thread.start_new_thread(wait_for_lock, ())
    # What could be wrong with what we were given has shown by now.  The daemon's log, perhaps a pipe whose reader
    # waits for its end, shall not stay open for as long as we live.
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)
    facts = (HELLO_MAGIC, fastpath.LAYOUT["version"], len(workers), started_ns, build_id.encode())
    serve(socket.socket(fileno=listen_fd), descriptors, woken, facts)
    for worker in workers:
        worker.stop()
    # The lock goes with the process.  Python's own shutdown would wait for the thread that waits for it.
    os._exit(0)


def serve(
    listener: socket.socket, descriptors: list[int], woken: int, facts: tuple[bytes, int, int, int, bytes]
) -> None:
    """Answer the control plane until it says stop.  A byte from `woken` says that we are the active one now."""
    active = False
    connections: dict[int, socket.socket] = {}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(woken, select.POLLIN)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]
    magic, version, n_workers, started_ns, build_id = facts

    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                connection, _ = listener.accept()
                connection.setblocking(False)
                connections[connection.fileno()] = connection
                poller.register(connection, select.POLLIN)
                greeted = [connection]
            elif fd == woken:
                active = bool(os.read(woken, 1))
                greeted = list(connections.values())
            else:
                greeted = []
                try:
                    message = connections[fd].recv(64)
                except OSError:
                    message = b""
                if message == STOP:
                    return
                if not message:
                    poller.unregister(fd)
                    connections.pop(fd).close()
            for connection in greeted:
                try:
                    hello = HELLO.pack(magic, version, os.getpid(), active, n_workers, started_ns, build_id)
                    connection.sendmsg([hello], rights)
                except OSError:
                    # It has gone already; its end of file comes with the next poll.
                    continue


if __name__ == "__main__":
    main(sys.argv[1:])

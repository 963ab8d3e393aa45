"""The datapath process.

    python -I -S worker.py <_fastpath .so> <build id> <listen> <table> <stats> <lock> <tun,…> <udp,…> <senders,…>
                           <events,…> <ipv6,…> <old tun,…> <old udp,…> <old ipv6,…> <spread> <confinement>
                           <ipv6 senders,…>

It is started with its descriptors inherited, needs no file but these two and imports next to nothing, so that it
is ready in some 15 ms.  `socket` and `signal` would take half as long again: they make enums of what is in `_socket`
and `_signal`.

Any number of these processes may hold the same descriptors: the one that holds the lock runs the workers, the others
sleep until the kernel releases the lock because its holder died, and then go on where it stopped.  The control plane
keeps one such standby.

A process that takes over from one with other descriptors is given those too (`old`).  When its turn comes nobody reads
any of them, and everything that arrives waits.  It first moves what waits in the old ones, and only then starts its
workers.  So no packet of a flow that has changed its worker is overtaken (`empty_old`).

Once it holds all that, it gives up every capability and the system calls that it does without
(fastpath/csrc/confine.h).  So nothing here may open a file or import a module after `confine`.

Whoever connects to the listening socket (SOCK_SEQPACKET, in the run directory) gets a HELLO message with all
descriptors attached; another when the process becomes the active one.  The message b"stop" ends the process.  That the
control plane goes away changes nothing here.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed does not have it
import _socket
import _thread
import fcntl
import os
import select
import struct
import sys
import time

# Only for type checkers; `typing` would cost a third of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

HELLO = struct.Struct("=4sIIIIQ32sIII")
"""How a process introduces itself to a control plane.  All its descriptors are attached.

     0  magic, HELLO_MAGIC                  20  start, ns (CLOCK_MONOTONIC)
     4  length of the message, bytes        28  build id, 32 bytes of ASCII
     8  version, HELLO_VERSION              60  pid
    12  1 if this process is active         64  layout version of the memory files
    16  number of workers                   68  number of sockets that all workers send from
    Since version 2:
    72  what it has given up (`CONFINEMENTS` of protocol.py)
    Since version 4:
    76  what it was told to give up; not every kernel can do all of it
    Since version 5:
    80  number of UDP sockets of IPv6 that the workers have beside those of IPv4: one each, or none
    Since version 6:
    84  number of TUN queues beyond one a worker
    Since version 7:
    88  number of UDP sockets of IPv6 that all workers send from, beside those of IPv4

The descriptors: table, statistics, lock, a TUN queue for each worker, a UDP socket for each worker, the sockets that
all workers send from.  Numbers are in host order, because both ends are on one machine.

All this is frozen for good, and so are STOP, SOCK_SEQPACKET, that unknown messages are ignored and that a connection
ends with its process: any build must be able to stop any other and to go on with its descriptors.  A later build may
append fields and descriptors, and then raises length and version.  A reader takes what it knows and leaves the rest.
But the first builds take all descriptors at the end for sockets, so what is none must not be among them.

Version 3: the message b"events" is answered with the same word and two eventfds.  The first one wakes worker 0 for a
packet of the control plane's, the second one tells the control plane of packets for it (fastpath/ring.pxd).

Version 5: behind these two the answer has the UDP sockets of IPv6 that HELLO counts.  Readers of the versions before
take the first two and close the rest.

Version 6: behind those the answer has the TUN queues that HELLO counts.

Version 7: behind those the answer has the sockets to send from by IPv6 that HELLO counts.

The first builds had no length and no version: their HELLO has 60 bytes, with the layout version at 4, the pid at 8 and
the rest as here.  A control plane of such a build reads 60 bytes of ours.  It can adopt and stop us, too: it takes our
length for a layout version that it does not know, and makes new memory files.
"""
HELLO_CONFINEMENT, HELLO_IPV6, HELLO_QUEUES = struct.Struct("=II"), struct.Struct("=I"), struct.Struct("=I")
HELLO_IPV6_SENDERS = struct.Struct("=I")
HELLO_MAGIC = b"udpt"
HELLO_VERSION = 7
STOP = b"stop"
EVENTS = b"events"

NO_SOCKET = -1
MAX_OLD_TURNS = 128
"""So many turns of 64 datagrams empty a full buffer.  A socket that stays may go on receiving for ever."""
DISCARD_PORT = 9

CANNOT_GO_ON = 70
"""Exit status of a process whose turn had come and who could not start its workers."""

MAX_TURN_NS = 500_000_000
"""A worker that has not come to the end of its turn by then does not keep the process from ending."""


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
    lists = [[int(fd) for fd in text.split(",") if fd] for text in numbers[4:12]]
    tun_fds, udp_fds, sender_fds, event_fds, ipv6_fds, *old = lists
    with_program, wanted_confinement = numbers[12] == "1", int(numbers[13])
    # A daemon of an earlier build, below which the files were exchanged, gives none.
    ipv6_sender_fds = [int(fd) for text in numbers[14:] for fd in text.split(",") if fd]
    n = len(udp_fds)
    descriptors = [table_fd, stats_fd, lock_fd, *tun_fds[:n], *udp_fds, *sender_fds]
    # A terminal's or an init system's signals are meant for the control plane.
    for number in (_signal.SIGINT, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_IGN)
    fastpath = load_fastpath(fastpath_file)
    shared = (sender_fds, n, event_fds)
    workers = [
        fastpath.Worker(
            *(table_fd, stats_fd, i, tun_fds[i], udp_fd, *shared, ipv6_fd, tun_fds[i + n :: n]), ipv6_sender_fds
        )
        for i, (udp_fd, ipv6_fd) in enumerate(zip(udp_fds, ipv6_fds or [NO_SOCKET] * n, strict=True))
    ]
    started_ns = time.monotonic_ns()
    woken, wake = os.pipe()
    running: list[int] = []

    def run(i: int) -> None:
        workers[i].run()
        running.remove(i)

    def wait_for_lock() -> None:
        try:
            # A record lock belongs to the process and goes with it, however it dies (fcntl(2)).
            fcntl.lockf(lock_fd, fcntl.LOCK_EX)
            if old[0]:
                memory = (table_fd, stats_fd)
                senders = {"senders": sender_fds, "ipv6_senders": ipv6_sender_fds}
                empty_old(fastpath, memory, senders, [tun_fds, udp_fds, ipv6_fds], old, with_program)
            for i in range(len(workers)):
                running.append(i)
                _thread.start_new_thread(run, (i,))
            os.write(wake, b"a")
        except BaseException:
            # Who has the lock and no workers keeps the others from going on.
            os._exit(CANNOT_GO_ON)

    null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    # Before the first thread: each has capabilities of its own.
    confinement = fastpath.confine(wanted_confinement)
    _thread.start_new_thread(wait_for_lock, ())
    # What could be wrong with what we were given has shown by now.  The daemon's log, perhaps a pipe whose reader
    # waits for its end, shall not stay open for as long as we live.
    os.dup2(null_fd, 2)

    def hello(active: bool) -> bytes:
        build, layout_version = build_id.encode(), fastpath.LAYOUT["version"]
        counts = (os.getpid(), layout_version, len(sender_fds))
        more = HELLO_CONFINEMENT.pack(confinement, wanted_confinement)
        more += HELLO_IPV6.pack(len(ipv6_fds)) + HELLO_QUEUES.pack(len(tun_fds) - n)
        more += HELLO_IPV6_SENDERS.pack(len(ipv6_sender_fds))
        head = (HELLO_MAGIC, HELLO.size + len(more), HELLO_VERSION)
        return HELLO.pack(*head, active, len(workers), started_ns, build, *counts) + more

    with_events = [*event_fds, *ipv6_fds, *tun_fds[n:], *ipv6_sender_fds]
    serve(_socket.socket(fileno=listen_fd), descriptors, with_events, woken, hello)
    stop_workers(workers, running)
    # The lock goes with the process.  Python's own shutdown would wait for the thread that waits for it.
    os._exit(0)


def stop_workers(workers: list[Any], running: list[int]) -> None:
    """Have the workers end their turn, which takes microseconds; those that still do are in `running`.

    Between two turns nothing is in flight, which our successor would hand on once more.
    """
    for worker in workers:
        worker.stop()
    give_up_ns = time.monotonic_ns() + MAX_TURN_NS
    while running and time.monotonic_ns() < give_up_ns:
        time.sleep(0.0001)


def empty_old(
    fastpath: ModuleType,
    memory: tuple[int, int],
    senders: dict[str, list[int]],
    own: list[list[int]],
    old: list[list[int]],
    with_program: bool,
) -> None:
    """Move what waits for our predecessor, before anything that comes from now on, and close what is not ours.

    `own` and `old`, ours and the predecessor's: TUN queues, UDP sockets, and those of IPv6 beside them or none.
    """
    own_sets, (old_tun_fds, *old_sets) = own[1:], old
    kept = {fd for fds in own for fd in fds}
    n_workers, n_old = len(own_sets[0]), len(old_sets[0])
    last = n_old - 1
    families = list(zip(of_families(*old_sets), of_families(*own_sets), strict=True))

    def move_what_waits(i: int) -> None:
        queues = old_tun_fds[i::n_old]
        # What waits in the queue may be for a peer of a family that only the new sockets reach.
        fds = [theirs[i] if theirs else ours[i % n_workers] for theirs, ours in families if theirs or ours]
        udp_fd, ipv6_fd = (*fds, NO_SOCKET)[:2]
        rest = {"ipv6_fd": ipv6_fd, "more_queues": queues[1:], **senders}
        worker = fastpath.Worker(*memory, i % n_workers, queues[0], udp_fd, **rest)
        for _ in range(MAX_OLD_TURNS):
            if not worker.turn():
                break
        for fd in {udp_fd, ipv6_fd, *queues} - kept - {NO_SOCKET}:
            os.close(fd)

    # Each set, and that of ours on the same port: what comes to an old socket may go to a new one of its family.
    pairs = [(fds, next((it for it in own_sets if set(it) & set(fds)), [])) for fds in old_sets if fds]
    # All that comes gets into line in the last one, so that the others can be read empty.
    directed = [with_program and spread(fastpath, fds, ours, 1, last) for fds, ours in pairs]
    for (fds, ours), is_spread in zip(pairs, directed, strict=True):
        if not is_spread:
            close_out(fds, ours)
    for i in range(last):
        move_what_waits(i)
    for (fds, ours), is_spread in zip(pairs, directed, strict=True):
        if is_spread:
            # From now on it comes to where it belongs, and the last one can be read empty.
            spread(fastpath, ours, fds, len(ours))
    move_what_waits(last)


def of_families(udp_fds: list[int], ipv6_fds: list[int]) -> tuple[list[int], list[int]]:
    """The sockets of IPv4 and those of IPv6, which are the first ones where there are no others."""
    with_family = _socket.socket(fileno=os.dup(udp_fds[0]))
    is_ipv6 = with_family.family == _socket.AF_INET6
    with_family.close()
    return ([], udp_fds) if is_ipv6 else (udp_fds, ipv6_fds)


def spread(fastpath: ModuleType, over: list[int], others: list[int], n: int, first: int = 0) -> bool:
    """Have what arrives go to `n` sockets of `over` from `first` on, if the others are on the same port."""
    if not set(over) & set(others):
        return False
    try:
        fastpath.spread(over[0], n, first)
    except OSError:
        # A single socket shares with nobody; an old kernel cannot.
        return False
    return True


def close_out(old_udp_fds: list[int], udp_fds: list[int]) -> None:
    """Without a program, have nothing more come to those of the old sockets that are on our port and not ours."""
    if not set(old_udp_fds) & set(udp_fds):
        return
    for fd in set(old_udp_fds) - set(udp_fds):
        udp = _socket.socket(fileno=os.dup(fd))
        try:
            # The kernel picks none but unconnected sockets for the datagrams of the port.
            udp.connect((udp.getsockname()[0], DISCARD_PORT))
        except OSError:
            # The address has gone, and nothing arrives.
            continue
        finally:
            udp.close()


def serve(
    listener: _socket.socket,
    descriptors: list[int],
    event_fds: list[int],
    woken: int,
    hello: Callable[[bool], bytes],
) -> None:
    """Answer the control plane until it says stop.  A byte from `woken` says that we are the active one now."""
    active = False
    connections: dict[int, _socket.socket] = {}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(woken, select.POLLIN)

    def send(connection: _socket.socket, message: bytes, fds: list[int]) -> None:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))]
        try:
            connection.sendmsg([message], rights)
        except OSError:
            # It has gone already; its end of file comes with the next poll.
            return

    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                connection = _socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]  # typeshed
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
                if message == EVENTS:
                    send(connections[fd], EVENTS, event_fds)
                if not message:
                    poller.unregister(fd)
                    connections.pop(fd).close()
            for connection in greeted:
                send(connection, hello(active), descriptors)


if __name__ == "__main__":
    main(sys.argv[1:])

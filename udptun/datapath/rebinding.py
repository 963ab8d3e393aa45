"""A change of the tunnel's address or number of workers, in steps of which each can be undone until the last.

build       sockets on the new address, queues, senders; those that fit stay
(then       a process that holds them is started and waits for its turn: `Datapath.replace`)
switch      the new ones are bound and attached
(then       the processes are exchanged; the new one reads empty what waits in the old set, and has what arrives go to
            the new set alone, before its workers start; the tunnel takes the new set for its own)
retire      close what is given up; or, when something failed before, `undo`
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address

from udptun.core.offload import Offload
from udptun.datapath.sockets import bind_sockets, new_sockets, open_senders, open_sockets, share_port, spread_over
from udptun.kernel.tun import Tun, attach_queues, new_queues


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What the workers move packets between: a TUN queue and a UDP socket each, and sockets that all send from."""

    queues: tuple[int, ...]
    sockets: tuple[socket.socket, ...]
    senders: tuple[socket.socket, ...] = ()

    @property
    def address(self) -> tuple[IPv4Address, int]:
        """The address and port of all the sockets."""
        address, port = self.sockets[0].getsockname()
        return IPv4Address(address), port

    def fits(self, address: IPv4Address, port: int, n_workers: int, n_senders: int) -> bool:
        """Whether a tunnel of this shape needs no other endpoints."""
        there = (self.address, len(self.queues), len(self.senders))
        return there == ((address, port), n_workers, n_senders)


class Rebinding:
    """One change from `old` to `new`.  It owns what only one of them has, until `retire` or `undo` has closed it."""

    def __init__(self, tun: Tun, old: Endpoints, new: Endpoints, wanted: Offload) -> None:
        self.new = new
        self._wanted = wanted
        self._tun = tun
        self._old = old
        self._is_switched = False

    @classmethod
    def build(
        cls,
        tun: Tun,
        old: Endpoints,
        address: IPv4Address,
        port: int,
        n_workers: int,
        n_senders: int,
        wanted: Offload,
    ) -> Rebinding:
        """Open what is missing.  Nothing changes for what the old process reads.  Raises KernelError.

        Sockets on the same address as the old ones are bound by `switch`: without SPREAD in `wanted`, or a kernel that
        can do it, they take datagrams from these at once.
        """
        is_same = old.address == (address, port)
        sockets = old.sockets[:n_workers] if is_same else ()
        senders = old.senders[:n_senders] if old.address[0] == address else ()
        opened: list[socket.socket] = []
        try:
            if is_same:
                opened += new_sockets(n_workers - len(sockets))
            else:
                opened += open_sockets(address, port, n_workers, wanted)
            opened += open_senders(address, n_senders - len(senders), senders)
            queues = (*old.queues[:n_workers], *new_queues(n_workers - len(old.queues)))
        except BaseException:
            for udp in opened:
                udp.close()
            raise
        n_opened = n_workers - len(sockets)
        new = Endpoints(queues, (*sockets, *opened[:n_opened]), (*senders, *opened[n_opened:]))
        return cls(tun, old, new, wanted)

    def switch(self) -> None:
        """Bind the new sockets and attach the new queues.  Raises KernelError."""
        self._is_switched = True
        self._tun.attach_more(self._added_queues)
        # The Tun object stays, because others hold on to it.
        self._tun.fds = self.new.queues
        if self.new.sockets[0] in self._old.sockets:
            address, port = self._old.address
            added = _missing(self.new.sockets, self._old.sockets)
            bind_sockets(added, address, port, self._old.sockets, self._wanted)

    def retire(self) -> None:
        """Close what the old endpoints alone have: no process reads it any more."""
        for udp in (*self._left_sockets, *_missing(self._old.senders, self.new.senders)):
            udp.close()
        share_port(self.new.sockets, among_several=len(self.new.sockets) > 1)
        for fd in self._left_queues:
            os.close(fd)

    def undo(self) -> None:
        """Close what the new endpoints alone have, and have the old ones receive again: all is as it was.

        A socket that was to be given up and was connected (`close_out` in worker.py) stays so: its worker has nothing
        to read, and the others have it all.
        """
        for udp in (*_missing(self.new.sockets, self._old.sockets), *_missing(self.new.senders, self._old.senders)):
            udp.close()
        share_port(self._old.sockets, among_several=len(self._old.sockets) > 1)
        if Offload.SPREAD in self._wanted:
            spread_over(self._old.sockets)
        for fd in self._added_queues:
            os.close(fd)
        if self._is_switched:
            attach_queues(self._left_queues)
            self._tun.fds = self._old.queues

    @property
    def _left_sockets(self) -> list[socket.socket]:
        return _missing(self._old.sockets, self.new.sockets)

    @property
    def _left_queues(self) -> tuple[int, ...]:
        return self._old.queues[len(self.new.queues) :]

    @property
    def _added_queues(self) -> tuple[int, ...]:
        return self.new.queues[len(self._old.queues) :]


def _missing(these: tuple[socket.socket, ...], there: tuple[socket.socket, ...]) -> list[socket.socket]:
    """Those of `these` that are not `there`."""
    return [udp for udp in these if udp not in there]

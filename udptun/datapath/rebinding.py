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
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.offload import Offload
from udptun.datapath.settings import Where
from udptun.datapath.sockets import (
    address_of,
    bind_sockets,
    family_of,
    new_sockets,
    open_senders,
    open_sockets,
    share_port,
    spread_over,
)
from udptun.kernel.tun import Tun, new_queues

Sockets = tuple[socket.socket, ...]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What the workers move packets between: a TUN queue and a UDP socket each, and sockets that all send from.

    `queues`: more than workers after a time with more of these; the workers share them.  `ipv6`: where `sockets` are of
    IPv4, one of IPv6 for each worker beside them, or none; `ipv6_senders` are beside `senders` likewise.
    """

    queues: tuple[int, ...]
    sockets: tuple[socket.socket, ...]
    senders: tuple[socket.socket, ...] = ()
    ipv6: tuple[socket.socket, ...] = ()
    ipv6_senders: tuple[socket.socket, ...] = ()

    @property
    def where(self) -> Where:
        address, port = address_of(self.sockets[0])
        beside = address_of(self.ipv6[0])[0] if self.ipv6 else None
        assert not isinstance(beside, IPv4Address)
        return Where(address, port, beside)

    @property
    def sets(self) -> tuple[tuple[socket.socket, ...], ...]:
        """The sockets that receive, by family."""
        return (self.sockets, self.ipv6) if self.ipv6 else (self.sockets,)

    def of(self, family: Family) -> tuple[socket.socket, ...]:
        """The sockets of that family that receive."""
        return next((them for them in self.sets if family_of(them[0]) is family), ())

    @property
    def all_sockets(self) -> tuple[socket.socket, ...]:
        return (*self.sockets, *self.senders, *self.ipv6, *self.ipv6_senders)

    def fits(self, where: Where, n_workers: int, n_senders: int) -> bool:
        """Whether a tunnel of this shape needs no other endpoints."""
        counts = (len(self.sockets), len(self.senders), len(self.ipv6_senders))
        return (self.where, *counts) == (where, n_workers, n_senders, 0 if where.ipv6 is None else n_senders)


class Rebinding:
    """One change from `old` to `new`.  It owns what only one of them has, until `retire` or `undo` has closed it."""

    def __init__(self, tun: Tun, old: Endpoints, new: Endpoints, wanted: Offload) -> None:
        self.new = new
        self._wanted = wanted
        self._tun = tun
        self._old = old

    @classmethod
    def build(
        cls, tun: Tun, old: Endpoints, where: Where, n_workers: int, n_senders: int, wanted: Offload
    ) -> Rebinding:
        """Open what is missing.  Nothing changes for what the old process reads.  Raises KernelError.

        Sockets on the same address as the old ones are bound by `switch`: without SPREAD in `wanted`, or a kernel that
        can do it, they take datagrams from these at once.
        """
        opened: list[socket.socket] = []

        def sockets_of(family: Family) -> Sockets:
            address = where.of(family)
            if address is None:
                return ()
            there = old.of(family)
            if there and address_of(there[0]) == (address, where.port):
                added = new_sockets(n_workers - len(there), family)
            else:
                there, added = (), open_sockets(address, where.port, n_workers, wanted)
            opened.extend(added)
            return (*there[:n_workers], *added)

        def senders_at(address: IPAddress | None, before: IPAddress | None, there: Sockets) -> Sockets:
            if address is None:
                return ()
            kept = there[:n_senders] if address == before else ()
            added = open_senders(address, n_senders - len(kept), kept)
            opened.extend(added)
            return (*kept, *added)

        try:
            sets = [them for them in map(sockets_of, Family) if them]
            senders = senders_at(where.address, old.where.address, old.senders)
            ipv6_senders = senders_at(where.ipv6, old.where.ipv6, old.ipv6_senders)
            # All that the device has stay: the kernel throws away what is in a queue that it loses.
            queues = (*old.queues, *new_queues(n_workers - len(old.queues)))
        except BaseException:
            for udp in opened:
                udp.close()
            raise
        new = Endpoints(queues, sets[0], senders, *sets[1:])
        return cls(tun, old, replace(new, ipv6_senders=ipv6_senders), wanted)

    def switch(self) -> None:
        """Bind the new sockets and attach the new queues.  Raises KernelError."""
        self._tun.attach_more(self._added_queues)
        # The Tun object stays, because others hold on to it.
        self._tun.fds = self.new.queues
        for family in Family:
            old, new = self._old.of(family), self.new.of(family)
            if new and new[0] in old:
                bind_sockets(_missing(new, old), *address_of(new[0]), old, self._wanted)

    def retire(self) -> None:
        """Close what the old endpoints alone have: no process reads it any more."""
        for udp in _missing(self._old.all_sockets, self.new.all_sockets):
            udp.close()
        for them in self.new.sets:
            share_port(them, among_several=len(them) > 1)

    def undo(self) -> None:
        """Close what the new endpoints alone have, and have the old ones receive again: all is as it was.

        After `switch`, what the kernel has put into the new queues meanwhile is lost: no process that goes on has them.
        A socket that was to be given up and was connected (`close_out` in worker.py) stays so: its worker has nothing
        to read, and the others have it all.
        """
        for udp in _missing(self.new.all_sockets, self._old.all_sockets):
            udp.close()
        for them in self._old.sets:
            share_port(them, among_several=len(them) > 1)
            if Offload.SPREAD in self._wanted:
                spread_over(them)
        for fd in self._added_queues:
            os.close(fd)
        self._tun.fds = self._old.queues

    @property
    def _added_queues(self) -> tuple[int, ...]:
        return self.new.queues[len(self._old.queues) :]


def _missing(these: tuple[socket.socket, ...], there: tuple[socket.socket, ...]) -> list[socket.socket]:
    """Those of `these` that are not `there`."""
    return [udp for udp in these if udp not in there]

"""Packets that the control plane has the datapath send, and those that the datapath hands to it.

fastpath/ring.pxd says how the rings work, and what of them survives the end of either side.  This is the control
plane's half: the producer of the one, the consumer of the others.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from udptun._fastpath import LAYOUT, load_u64, store_u64
from udptun.core.network_state import IPAddress
from udptun.datapath import shm
from udptun.datapath.stats import Stats

_RING, _SLOT = shm.Structure("ring"), shm.Structure("ring_slot")
_SLOTS, _BYTES = LAYOUT["ring_slots"], LAYOUT["ring_bytes"]
_NUMBERS = 2**64
"""Numbers of packets begin anew after so many: never, unless somebody else writes to a ring."""
_HEAD = ("checksum", "result", "error", "time_ns", "sequence", "way", "length", "kept", "peer")
_OUTER = ("outer", "outer_port", "is_stray")
_FIELDS = _SLOT.packer(*_HEAD, *_OUTER, "packet")
_SUMMED, _PACKET = _SLOT.offset("sequence"), _SLOT.offset("packet")


class Result(Enum):
    """What became of an injected packet."""

    WAITS = LAYOUT["inject.waits"]
    DONE = LAYOUT["inject.done"]
    """The kernel has taken it."""
    MALFORMED = LAYOUT["inject.malformed"]
    """It was no packet of that length and of a family that is carried, or somebody else has written to the ring."""
    NO_ROUTE = LAYOUT["inject.no_route"]
    """No peer leases its destination."""
    REFUSED = LAYOUT["inject.refused"]
    """By the kernel."""
    IN_FLIGHT = LAYOUT["inject.in_flight"]
    """A datapath process was killed with it.  Perhaps it was sent."""


_RESULTS = {result.value: result for result in Result}


@dataclass(frozen=True, slots=True)
class Injected:
    """What became of a packet, when (ns, CLOCK_MONOTONIC), and the errno with which the kernel has refused it."""

    result: Result
    time_ns: int
    error: int


@dataclass(frozen=True, slots=True)
class Punt:
    """A packet from a peer for the control plane.

    `time_ns`: when a worker got it (CLOCK_MONOTONIC).  `peer`: index in the peer table of who leases its inner source,
    0 for nobody.  `outer`, `outer_port`: where its datagram came from.  `packet`: what it begins with; `length`: bytes
    in all.  `is_stray`: it only claims to be the peer's, which is not known to send from there (`TableWriter.ask`).
    """

    time_ns: int
    peer: int
    outer: IPAddress
    outer_port: int
    length: int
    packet: bytes
    is_stray: bool = False


class Rings:
    """The control plane's end of the rings in `stats`.

    There may be only one at a time.  `events` are the eventfds of the datapath's descriptors (`new_events`), or none,
    and stay the caller's: without them a worker that sleeps goes on sleeping, and nobody is told of punts.
    """

    def __init__(self, stats: Stats, events: tuple[int, ...]) -> None:
        self._wake_fd, self._punt_fd = events or (-1, -1)
        self.inject_ring = Ring(stats.inject_ring)
        self.punt_rings = [Ring(memory) for memory in stats.punt_rings]
        self.take_first: Callable[[Punt], bool] = lambda punt: False
        """Gets each packet before `take_punts` yields it, and says whether it was the caller's.  Nobody else gets a
        stray."""

    def inject(self, packet: bytes, length: int = 0, *, into_tun: bool = False) -> int | None:
        """Have worker 0 send a packet to the peer that leases its destination, or write it to the TUN.

        It goes as it is: TTL and checksums are the caller's matter.  `length`: so many bytes in all, with zeros after
        `packet`; 0: `packet` is all of it.  Returns its number, for `injected`; None when the ring is full.  Raises
        ValueError when `packet` does not fit into a slot.
        """
        if len(packet) > _BYTES:
            raise ValueError(f"a packet of {len(packet)} bytes: a slot has room for {_BYTES}")
        ring = self.inject_ring
        written = ring.load("written")
        number, n_waiting = (written + 1) % _NUMBERS, (written - ring.load("taken")) % _NUMBERS
        if n_waiting >= _SLOTS:
            ring.store("refused", (ring.load("refused") + 1) % _NUMBERS)
            if n_waiting > _SLOTS:
                # Somebody else has written to the ring, and the worker puts that right.
                self._wake()
            return None
        slot = ring.slot(number)
        way = LAYOUT["way.tun"] if into_tun else LAYOUT["way.peer"]
        head = (0, Result.WAITS.value, 0, 0, number, way, length or len(packet), len(packet), 0)
        _FIELDS.pack_into(slot, 0, *head, b"", 0, 0, packet)
        _SLOT.store(slot, "checksum", _checksum(slot, len(packet)))
        ring.store("written", number)
        self._wake()
        return number

    def _wake(self) -> None:
        """Have worker 0 look."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def injected(self, number: int) -> Injected | None:
        """What became of the packet that `inject` gave this number; None when its slot has another one by now."""
        slot = self.inject_ring.slot(number)
        if _SLOT.load(slot, "sequence") != number:
            return None
        if self.inject_ring.load("taken") < number:
            return Injected(Result.WAITS, 0, 0)
        # Any other number is not a worker's.
        result = _RESULTS.get(_SLOT.load(slot, "result"), Result.MALFORMED)
        return Injected(result, _SLOT.load(slot, "time_ns"), _SLOT.load(slot, "error"))

    @property
    def n_refused(self) -> int:
        """Packets that `inject` has found no room for, those of earlier control planes included."""
        return self.inject_ring.load("refused")

    def take_punts(self) -> Iterator[Punt]:
        """What the workers have handed over, oldest first of each.  What was taken is never handed to the next one."""
        for ring in self.punt_rings:
            # A worker may go on writing; the others shall have their turn.
            taken, written = ring.load("taken"), ring.load("written")
            n_waiting = (written - taken) % _NUMBERS
            if n_waiting > _SLOTS:
                # No worker has left it so, and it would find no room for ever; there is nothing to believe.
                ring.store("taken", written)
                continue
            for i in range(n_waiting):
                number = (taken + 1 + i) % _NUMBERS
                punt = _read_punt(ring.slot(number), number)
                ring.store("taken", number)
                if punt is not None and not self.take_first(punt) and not punt.is_stray:
                    yield punt

    def listen(self, take: Callable[[Punt], None]) -> None:
        """Call `take` in this event loop for each packet that is handed over, until `close`."""
        asyncio.get_running_loop().add_reader(self._punt_fd, self._hear, take)
        # What an earlier control plane has left wakes nobody.
        self._hear(take)

    def close(self) -> None:
        """Listen no more.  The rings stay as they are, for the next one."""
        asyncio.get_running_loop().remove_reader(self._punt_fd)

    def _hear(self, take: Callable[[Punt], None]) -> None:
        with suppress(BlockingIOError):
            # First: what is handed over from now on is announced anew.
            os.eventfd_read(self._punt_fd)
        for punt in self.take_punts():
            take(punt)


def new_events() -> tuple[int, int]:
    """Eventfds for `Descriptors.events`: one to wake worker 0, one to be told of punts.  The caller owns them."""
    flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
    return os.eventfd(0, flags), os.eventfd(0, flags)


class Ring:
    """One `struct ut_ring` in shared memory."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory[: _RING.offset("slot")].cast("Q")
        self._slots = memory[_RING.offset("slot") :]

    def load(self, field: str) -> int:
        return load_u64(self._words, _RING.offset(field) // 8)

    def store(self, field: str, value: int) -> None:
        store_u64(self._words, _RING.offset(field) // 8, value)

    def slot(self, number: int) -> memoryview:
        """Of the packet with this number."""
        return self._slots[(number - 1) % _SLOTS * _SLOT.size :][: _SLOT.size]


def _read_punt(slot: memoryview, number: int) -> Punt | None:
    """The packet in a slot; None unless it is what a worker has written there."""
    # A copy: what is not a worker's may change while we look at it.
    copy = memoryview(bytes(slot))
    checksum, _, _, time_ns, sequence, _, length, kept, peer, *where, packet = _FIELDS.unpack(copy)
    outer, outer_port, is_stray = where
    if sequence != number or not kept <= min(_BYTES, length) or checksum != _checksum(copy, kept):
        return None
    return Punt(time_ns, peer, shm.unmapped(outer), outer_port, length, packet[:kept], bool(is_stray))


def _checksum(slot: memoryview, kept: int) -> int:
    return zlib.adler32(slot[_SUMMED : _PACKET + kept])

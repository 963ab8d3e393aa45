"""Packets and their ends as the workers see them, while somebody watches.

fastpath/trace.pxd says how that works, and what it costs.  This is the control plane's half: it says which packets are
wanted, and for how long, and reads what the workers show.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from udptun._fastpath import COUNTERS, LAYOUT, load_u64, store_u64
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath import shm
from udptun.datapath.stats import Stats

if TYPE_CHECKING:
    from udptun.core.live_trace import LiveTraceRequest

_TRACE, _FILTER = shm.Structure("trace"), shm.Structure("trace_filter")
_RING, _ENTRY = shm.Structure("trace_ring"), shm.Structure("traced")
_SLOTS, _BYTES = LAYOUT["trace_slots"], LAYOUT["trace_bytes"]
_HEAD = ("number", "time_ns", "outer", "peer", "length", "counter", "outer_port", "kept", "n_segments", "n_dropped")
_FIELDS = _ENTRY.packer(*_HEAD, "is_answered", "packet")
_NUMBERS = 2**64
_NS = 10**9
_MOST = 256
"""Packets that are taken from a ring at a time: the event loop has other things to do."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A packet, or a super-packet that stands for `n_segments` of them, and the counter where it has ended.

    `time_ns`: CLOCK_MONOTONIC.  `outer`, `outer_port`: where its datagram goes to or came from; None: it has none.
    `peer`: index in the peer table of who gets it or leases its source, 0 for nobody.  `packet`: what is kept of it.
    `n_dropped`: how many of the segments were dropped.  `is_answered`: an ICMP error was sent about it.
    """

    is_outgoing: bool
    time_ns: int
    outer: IPAddress | None
    outer_port: int
    peer: int
    length: int
    counter: str
    n_segments: int
    n_dropped: int
    is_answered: bool
    packet: bytes


class Tracer:
    """The control plane's end of the traces in `stats`; there may be only one at a time."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._words = stats.trace[: _TRACE.offset("filter")].cast("Q")
        self._filter = stats.trace[_TRACE.offset("filter") :][: _FILTER.size]
        self._number = self._lost_before = 0
        # What a control plane that was killed has left on.
        self._store("number", 0)

    def start(self, asked: LiveTraceRequest, valid_s: float) -> None:
        """Have the workers show what is asked for, until `stop`, or until nobody has called `extend` for `valid_s`."""
        self.stop()
        for ring in self._rings():
            ring.store("taken", ring.load("written"))
        self._lost_before = self._lost()
        _write_filter(self._filter, asked)
        self.extend(valid_s)
        self._number = time.monotonic_ns()
        self._store("number", self._number)

    def extend(self, valid_s: float) -> None:
        """Let what was started go on for so long from now on."""
        self._store("until_ns", time.monotonic_ns() + int(valid_s * _NS))

    def stop(self) -> None:
        """Nothing is shown any more; what the workers have written is given back to the kernel."""
        self._store("number", 0)
        if self._number:
            self._number = 0
            self._stats.give_back_traces()

    @property
    def n_lost(self) -> int:
        """Packets since `start` that were asked for and found no room."""
        return (self._lost() - self._lost_before) % _NUMBERS

    def take(self) -> list[Traced]:
        """What the workers have shown since the last time, or a part of it; oldest first.  Nothing after `stop`."""
        if not self._number:
            return []
        found = [it for way in range(LAYOUT["trace_ways"]) for ring in self._rings(way) for it in self._take(ring, way)]
        return sorted(found, key=lambda it: it.time_ns)

    def _take(self, ring: _Ring, way: int) -> Iterator[Traced]:
        taken, written = ring.load("taken"), ring.load("written")
        n_waiting = (written - taken) % _NUMBERS
        if n_waiting > _SLOTS:
            # No worker has left it so, and it would find no room for ever; there is nothing to believe.
            ring.store("taken", written)
            return
        for i in range(min(n_waiting, _MOST)):
            entry = _read(ring.slot((taken + i) % _SLOTS), self._number, is_outgoing=way == LAYOUT["trace.encap"])
            ring.store("taken", (taken + i + 1) % _NUMBERS)
            if entry is not None:
                yield entry

    def _lost(self) -> int:
        return sum(ring.load("lost") for ring in self._rings())

    def _rings(self, way: int | None = None) -> list[_Ring]:
        """Of the workers that have run, of one way or all.  To look at those of others would cost memory."""
        ways = range(LAYOUT["trace_ways"]) if way is None else (way,)
        return [
            _Ring(self._stats.trace_rings[worker * LAYOUT["trace_ways"] + it])
            for worker in self._stats.workers_that_ran()
            for it in ways
        ]

    def _store(self, field: str, value: int) -> None:
        store_u64(self._words, _TRACE.offset(field) // 8, value)


class _Ring:
    """One `struct ut_trace_ring` in shared memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory[: _RING.offset("slot")].cast("Q")

    def load(self, field: str) -> int:
        return load_u64(self._words, _RING.offset(field) // 8)

    def store(self, field: str, value: int) -> None:
        store_u64(self._words, _RING.offset(field) // 8, value)

    def slot(self, number: int) -> memoryview:
        return self._memory[_RING.offset("slot") + number * _ENTRY.size :][: _ENTRY.size]


def _write_filter(memory: memoryview, asked: LiveTraceRequest) -> None:
    for field, prefix in (("source", asked.source), ("destination", asked.destination)):
        at = _FILTER.offset(field)
        memory[at : at + _FILTER.length(field)] = _prefix(prefix)
    _FILTER.store(memory, "family", asked.version or 0)
    _FILTER.store(memory, "protocol", LAYOUT["trace.any_protocol"] if asked.protocol is None else asked.protocol)
    _FILTER.store(memory, "port", asked.port or 0)
    _FILTER.store(memory, "is_both_ways", not asked.is_one_way)
    _FILTER.store(memory, "is_drops_alone", asked.is_drops_alone)
    _FILTER.store(memory, "snap_len", asked.snap_len)


def _prefix(network: IPNetwork | None) -> bytes:
    """A `struct ut_prefix`, in which all addresses lie for None."""
    if network is None:
        return bytes(32)
    first, length = shm.mapped_subnet(network)
    return first + ((1 << 128) - (1 << 128 - length)).to_bytes(16)


def _read(slot: memoryview, number: int, *, is_outgoing: bool) -> Traced | None:
    """The packet in a slot; None unless it is of the trace with this number."""
    its_number, time_ns, outer, peer, length, counter, port, kept, segments, dropped, answered, packet = (
        _FIELDS.unpack(bytes(slot))
    )
    if its_number != number or counter >= len(COUNTERS) or peer >= LAYOUT["max_peers"] or kept > min(_BYTES, length):
        return None
    where = shm.unmapped(outer) if any(outer) else None
    how = (COUNTERS[counter], segments, dropped, bool(answered), packet[:kept])
    return Traced(is_outgoing, time_ns, where, port, peer, length, *how)

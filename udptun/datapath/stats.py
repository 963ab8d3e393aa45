"""What the workers count, read by the control plane.

Each worker has a block of words and a row of counters for each peer, which it alone writes; reading is a sum over the
workers.  The counters live as long as the memory file: a process that takes over from another goes on counting.

What the kernel carries by the shortcut counts too: the control plane adds it to the last block, which then no worker
has (`count_beside`).
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from udptun._fastpath import COUNTERS, FIELDS, LAYOUT, store_u64
from udptun.core.network_state import IPAddress
from udptun.core.offload import Offload
from udptun.datapath import shm

OFFLOAD_BITS = {
    Offload.UDP_SEGMENT: LAYOUT["offloads.udp_segment"],
    Offload.WRITE_TCP: LAYOUT["offloads.write_tcp"],
    Offload.WRITE_UDP: LAYOUT["offloads.write_udp"],
    Offload.VNET_HDR: LAYOUT["offloads.vnet_hdr"],
    Offload.ECN: LAYOUT["offloads.ecn"],
}
"""The other offloads concern only the device and the sockets."""
PEER_COUNTERS = tuple(FIELDS["peer_stats"])
"""Inner packets and bytes exchanged with one peer since it was added; encap is towards it."""
MANY_PEERS = 4096
"""From here on numpy (`bulk.py`) is worth its import, 60 to 140 ms and 14 MB.

With 4,096 peers it sums their counters in 1 ms in place of 8.
"""

_STATS, _WORKER, _STRAY = shm.Structure("stats"), shm.Structure("worker"), shm.Structure("stray")
_STRAY_FIELDS = _STRAY.packer("outer", "inner", "peer", "last_s", "datagrams")
_N_WORKERS = LAYOUT["max_workers"]
MAX_WORKERS_BESIDE = _N_WORKERS - 1
"""So many workers leave a block for what others count."""
_N_PEER_COUNTERS = len(PEER_COUNTERS)
_EARLIER_BLOCK_BYTES = {**dict.fromkeys((5, 6, 7, 8, 9, 10), 512), 11: 576}
"""A worker's block, by earlier layout versions whose blocks begin where ours do, with the same counters first."""


class WorkerState(Enum):
    STOPPED = LAYOUT["state.stopped"]
    RUNNING = LAYOUT["state.running"]
    TUN_LOST = LAYOUT["state.tun_lost"]


_STATES = {state.value: state for state in WorkerState}


@dataclass(frozen=True, slots=True)
class Stray:
    """Datagrams that came from `outer` and were dropped, because not it but a peer leases their inner source.

    `inner` is the inner source of the last of them, which came at `last_s` (CLOCK_MONOTONIC).
    """

    outer: IPAddress
    inner: IPAddress
    datagrams: int
    last_s: int


class Stats:
    """Owns `fd`, the memory file of the statistics."""

    def __init__(self, fd: int) -> None:
        """Take over an existing file.  Raises ValueError when it is of another layout."""
        memory = self._memory = shm.map_whole(fd, _STATS.size, LAYOUT["stats_magic"], "statistics")
        workers = memory[_STATS.offset("worker") :]
        self.fd = fd
        # All numbers in both are u64.
        self._workers = [workers[i * _WORKER.size :][: _WORKER.size].cast("Q") for i in range(_N_WORKERS)]
        n_words = _N_WORKERS * LAYOUT["max_peers"] * _N_PEER_COUNTERS
        self._peers = memory[_STATS.offset("peer") :][: 8 * n_words].cast("Q")
        self._strays = memory[_STATS.offset("stray") :][: _N_WORKERS * LAYOUT["strays"] * _STRAY.size]
        self.inject_ring = memory[_STATS.offset("inject") :][: LAYOUT["ring"]]
        punts = memory[_STATS.offset("punt") :]
        self.punt_rings = [punts[i * LAYOUT["ring"] :][: LAYOUT["ring"]] for i in range(_N_WORKERS)]
        self.trace = memory[_STATS.offset("trace") :][: LAYOUT["trace"]]
        traces, n_traces = memory[_STATS.offset("traced") :], _N_WORKERS * LAYOUT["trace_ways"]
        self.trace_rings = [traces[i * LAYOUT["trace_ring"] :][: LAYOUT["trace_ring"]] for i in range(n_traces)]
        """Of each worker one for each way."""

    @classmethod
    def create(cls) -> Stats:
        """All zero, in a new memory file."""
        return cls(shm.create("udptun-stats", _STATS.size, LAYOUT["stats_magic"]))

    def close(self) -> None:
        """Let go of the descriptor; the mapping goes with the object."""
        os.close(self.fd)

    def continue_from(self, fd: int) -> None:
        """Begin with what the workers of another build have counted, if its counters are understood.

        Only while no worker counts here.  `fd` is the file of that build's statistics.
        """
        block_bytes = _EARLIER_BLOCK_BYTES.get(shm.version_of(fd, LAYOUT["stats_magic"]) or 0)
        if block_bytes is None:
            return
        # Builds that do not know this word have zeros in its place.
        self.n_strangers = int.from_bytes(os.pread(fd, 8, _STATS.offset("n_strangers")), sys.byteorder)
        first = _word("counter")
        # Those that these builds do not know are zero, as far as there is room for them.
        last = min(first + len(COUNTERS), block_bytes // 8)
        for i, worker in enumerate(self._workers):
            at = _STATS.offset("worker") + i * block_bytes
            worker[first:last] = memoryview(os.pread(fd, 8 * (last - first), at + 8 * first)).cast("Q")

    @property
    def n_strangers(self) -> int:
        """Datagrams that the kernel has kept from the workers, while any control plane counted them."""
        return _STATS.load(self._memory, "n_strangers")

    @n_strangers.setter
    def n_strangers(self, n: int) -> None:
        _STATS.store(self._memory, "n_strangers", n)

    def generations_seen(self) -> list[int]:
        """What each worker works with right now; 0 for those asleep or gone."""
        return self._words("generation_seen", _N_WORKERS)

    def signs_of_life(self, n_workers: int) -> list[tuple[int, ...] | None]:
        """Of each of the first `n_workers` workers numbers of which some change with each turn; None while it sleeps.
        """
        words = zip(*(self._words(name, n_workers) for name in ("generation_seen", "pid", "turns")), strict=True)
        return [
            (generation, pid, turns, sum(row)) if generation else None
            for (generation, pid, turns), row in zip(words, self._counter_rows(n_workers), strict=True)
        ]

    def forget_workers(self) -> None:
        """Say that no worker runs.  Only when every datapath process is known to be dead."""
        for worker in self._workers:
            store_u64(worker, _word("generation_seen"), 0)
            worker[_word("state")] = WorkerState.STOPPED.value
            worker[_word("pid")] = 0

    def states(self, n_workers: int) -> list[WorkerState]:
        """Of each; a worker whose word is none of these states has not written it, and counts as stopped."""
        return [_STATES.get(value, WorkerState.STOPPED) for value in self._words("state", n_workers)]

    def refused(self, n_workers: int) -> Offload:
        """What the kernel has refused to at least one of the workers."""
        refused = Offload(0)
        for bits in self._words("refused", n_workers):
            for offload, bit in OFFLOAD_BITS.items():
                if bits & bit:
                    refused |= offload
        return refused

    def counters(self) -> dict[str, int]:
        """Every counter of docs/wire-format.md, summed over the workers."""
        rows = self._counter_rows(_N_WORKERS)
        return dict(zip(COUNTERS, map(sum, zip(*rows, strict=True)), strict=True))

    def worker_counters(self, n_workers: int) -> list[dict[str, int]]:
        """The counters of each of the first `n_workers` workers that are not zero."""
        return [
            {name: n for name, n in zip(COUNTERS, row, strict=True) if n} for row in self._counter_rows(n_workers)
        ]

    def strays(self, n_workers: int, since_s: float) -> list[Stray]:
        """What the first `n_workers` workers have noted of which something has come since then, most datagrams first.

        Those of one outer source and one peer are one.
        """
        found: dict[tuple[bytes, int], Stray] = {}
        slots = self._strays[: n_workers * LAYOUT["strays"] * _STRAY.size]
        for outer, inner, peer, last_s, datagrams in _STRAY_FIELDS.iter_unpack(slots):
            if any(outer) and last_s >= since_s:
                before = found.get((outer, peer))
                n = datagrams + (before.datagrams if before else 0)
                found[outer, peer] = Stray(shm.unmapped(outer), shm.unmapped(inner), n, last_s)
        return sorted(found.values(), key=lambda stray: -stray.datagrams)

    def _counter_rows(self, n_workers: int) -> list[list[int]]:
        first = _word("counter")
        return [worker[first : first + len(COUNTERS)].tolist() for worker in self._workers[:n_workers]]

    def peers(self, indexes: Sequence[int | None]) -> list[list[int]]:
        """PEER_COUNTERS of each of the peers, summed over the workers; zeros for one without index.

        Workers that have been given up count too: the sums never fall while a peer stays.  Index 0 collects senders
        outside Network.
        """
        workers = self.workers_that_ran()
        if len(indexes) >= MANY_PEERS:
            from udptun.datapath.bulk import PeerStats

            return PeerStats(self._peers).sums(indexes, workers)
        return [[0] * _N_PEER_COUNTERS if index is None else self._sums(index, workers) for index in indexes]

    def received(self, index: int) -> int:
        """Packets from a peer that all workers have counted, as a worker sums them up."""
        column = PEER_COUNTERS.index("decap_packets")
        return sum(self._row(worker, index)[column] for worker in self.workers_that_ran())

    def peer_rows(self, top: int) -> list[tuple[int, memoryview]]:
        """Of each worker that has run the PEER_COUNTERS of all peers up to index `top`."""
        n, row_words = LAYOUT["max_peers"], _N_PEER_COUNTERS
        return [
            (worker, self._peers[worker * n * row_words : (worker * n + top + 1) * row_words])
            for worker in self.workers_that_ran()
        ]

    def give_back_traces(self) -> None:
        """Give the memory that the workers have written packets to back to the kernel, where it can take that."""
        slots = shm.Structure("trace_ring").offset("slot")
        for worker in self.workers_that_ran():
            for way in range(LAYOUT["trace_ways"]):
                at = _STATS.offset("traced") + (worker * LAYOUT["trace_ways"] + way) * LAYOUT["trace_ring"]
                shm.give_back(self._memory, at + slots, LAYOUT["trace_ring"] - slots)

    def workers_that_ran(self) -> list[int]:
        """A worker that has never run has counted nothing; its rows stay untouched, and cost no memory."""
        return [worker for worker, turns in enumerate(self._words("turns", _N_WORKERS)) if turns]

    def clear_peers(self, indexes: Sequence[int]) -> None:
        """Start the peers' counters at zero; only while no worker can count under their indexes."""
        workers = self.workers_that_ran()
        if len(indexes) >= MANY_PEERS:
            from udptun.datapath.bulk import PeerStats

            PeerStats(self._peers).clear(indexes, workers)
            return
        zeros = memoryview(bytes(8 * _N_PEER_COUNTERS)).cast("Q")
        for worker in workers:
            for index in indexes:
                self._row(worker, index)[:] = zeros

    def count_beside(self, counters: Mapping[str, int], peers: Mapping[int, Sequence[int]]) -> None:
        """Add what was counted elsewhere than by workers, of which there are MAX_WORKERS_BESIDE at most.

        `peers`: by their index PEER_COUNTERS.
        """
        block, first = self._workers[MAX_WORKERS_BESIDE], _word("counter")
        for name, n in counters.items():
            block[first + COUNTERS.index(name)] += n
        for index, row in peers.items():
            mine = self._row(MAX_WORKERS_BESIDE, index)
            for column, n in enumerate(row):
                mine[column] += n
        # Last: from now on the block is looked at.
        if peers and not block[_word("turns")]:
            block[_word("turns")] = 1

    def _sums(self, index: int, workers: Sequence[int]) -> list[int]:
        rows = [self._row(worker, index) for worker in workers]
        return [sum(row[column] for row in rows) for column in range(_N_PEER_COUNTERS)]

    def _row(self, worker: int, index: int) -> memoryview:
        first = (worker * LAYOUT["max_peers"] + index) * _N_PEER_COUNTERS
        return self._peers[first : first + _N_PEER_COUNTERS]

    def _words(self, field: str, n_workers: int) -> list[int]:
        i = _word(field)
        return [worker[i] for worker in self._workers[:n_workers]]


class PeerTraffic:
    """Which peers have exchanged packets since the last look.

    A look copies the counters and compares blocks of them.  So peers without traffic cost next to nothing.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._before: dict[int, bytes] = {}

    def look(self, top: int) -> dict[int, tuple[int, int]]:
        """By index in the peer table, `top` at most: packets sent and received since the last look.

        The first look finds nothing: what was counted before is no traffic of now.
        """
        found: dict[int, tuple[int, int]] = {}
        for worker, rows in self._stats.peer_rows(top):
            now = bytes(rows)
            kept = self._before.get(worker, now).ljust(len(now), b"\0")
            before, beyond = kept[: len(now)], kept[len(now) :]
            self._before[worker] = now + beyond
            if now != before:
                for index, n_sent, n_received in _differences(before, now):
                    sent, received = found.get(index, (0, 0))
                    found[index] = sent + n_sent, received + n_received
        return found


_PEER_ROW = struct.Struct(f"={_N_PEER_COUNTERS}Q")
_BLOCK_BYTES = 64 * _PEER_ROW.size


def _differences(before: bytes, now: bytes) -> Iterator[tuple[int, int, int]]:
    """Index of each row whose counters have grown, and by how many packets: sent, received."""
    sent, received = PEER_COUNTERS.index("encap_packets"), PEER_COUNTERS.index("decap_packets")
    for at in range(0, len(now), _BLOCK_BYTES):
        old, new = before[at : at + _BLOCK_BYTES], now[at : at + _BLOCK_BYTES]
        if old == new:
            continue
        rows = zip(_PEER_ROW.iter_unpack(old), _PEER_ROW.iter_unpack(new), strict=True)
        for index, (was, is_now) in enumerate(rows, at // _PEER_ROW.size):
            if was != is_now:
                # They begin at zero when another peer gets the row.
                base = was if all(map(int.__le__, was, is_now)) else (0,) * _N_PEER_COUNTERS
                yield index, is_now[sent] - base[sent], is_now[received] - base[received]


def _word(field: str) -> int:
    """Which word of a worker's block the field is."""
    return _WORKER.offset(field) // 8

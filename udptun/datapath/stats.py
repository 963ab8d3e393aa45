"""What the workers count, read by the control plane.

One block a worker and one row of per-peer counters a worker; only that worker writes them, so that reading is a sum.
The counters live as long as the memory file: a datapath process that takes over from a dead one counts on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from udptun._fastpath import COUNTERS, LAYOUT, store_u64
from udptun.core.offload import Offload
from udptun.datapath import shm

_WORKER = np.dtype(
    {
        "names": ["generation_seen", "pid", "state", "turns", "refused", "counter"],
        "formats": [np.uint64, np.uint64, np.uint64, np.uint64, np.uint64, (np.uint64, len(COUNTERS))],
        "offsets": [0, 8, 16, 24, 32, LAYOUT["worker.counter"]],
        "itemsize": LAYOUT["worker"],
    }
)
OFFLOAD_BITS = {Offload.UDP_SEGMENT: 1, Offload.WRITE_TCP: 2, Offload.WRITE_UDP: 4, Offload.VNET_HDR: 8}
"""UT_OFFLOAD_* of shm.h; the other offloads are the business of device and socket."""
PEER_COUNTERS = ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes")
"""Inner packets and bytes exchanged with one peer since it was added; encap is towards it."""


class WorkerState(Enum):
    STOPPED = 0
    RUNNING = 1
    TUN_LOST = 2


class Stats:
    """Owns `fd`, the memory file of the statistics."""

    def __init__(self, fd: int) -> None:
        """Take over an existing file.  Raises ValueError when it is of another layout."""
        memory = shm.map_whole(fd, LAYOUT["stats"], LAYOUT["stats_magic"], LAYOUT["version"], "statistics")
        n = LAYOUT["max_workers"]
        self.fd = fd
        self._workers: NDArray[np.void] = np.frombuffer(memory, _WORKER, n, LAYOUT["stats.worker"])
        words = np.frombuffer(memory, np.uint64, n * LAYOUT["worker"] // 8, LAYOUT["stats.worker"])
        self._first_words = words.reshape(n, -1)[:, 0]
        n_words = n * LAYOUT["max_peers"] * len(PEER_COUNTERS)
        self._peers = np.frombuffer(memory, np.uint64, n_words, LAYOUT["stats.peer"]).reshape(n, -1, len(PEER_COUNTERS))

    @classmethod
    def create(cls) -> Stats:
        """All zero, in a new memory file."""
        return cls(shm.create("udptun-stats", LAYOUT["stats"], LAYOUT["stats_magic"], LAYOUT["version"]))

    def close(self) -> None:
        """Let go of the descriptor; the mapping goes with the object."""
        os.close(self.fd)

    def generations_seen(self) -> list[int]:
        """What each worker works with right now; 0 for those asleep or gone."""
        words: list[int] = self._first_words.tolist()
        return words

    def forget_workers(self) -> None:
        """Say that no worker runs.  Only when every datapath process is known to be dead."""
        for i in range(len(self._first_words)):
            store_u64(self._first_words[i : i + 1], 0, 0)
        self._workers["state"] = WorkerState.STOPPED.value
        self._workers["pid"] = 0

    def states(self, n_workers: int) -> list[WorkerState]:
        return [WorkerState(value) for value in self._workers["state"][:n_workers].tolist()]

    def refused(self, n_workers: int) -> Offload:
        """What the kernel has refused one of the workers, and none of them does any more."""
        bits = int(np.bitwise_or.reduce(self._workers["refused"][:n_workers]))
        refused = Offload(0)
        for offload, bit in OFFLOAD_BITS.items():
            if bits & bit:
                refused |= offload
        return refused

    def counters(self) -> dict[str, int]:
        """Every counter of docs/wire-format.md, summed over the workers."""
        return dict(zip(COUNTERS, self._workers["counter"].sum(axis=0).tolist(), strict=True))

    def peers(self, indexes: Sequence[int | None], n_workers: int) -> list[list[int]]:
        """PEER_COUNTERS of each of the peers, summed over the first `n_workers` workers; zeros for one without index.

        Index 0 collects senders outside Network.
        """
        known = np.array([index or 0 for index in indexes], np.intp)
        sums = self._peers[:n_workers, known].sum(axis=0)
        sums[[index is None for index in indexes]] = 0
        rows: list[list[int]] = sums.tolist()
        return rows

    def clear_peers(self, indexes: Sequence[int]) -> None:
        """Start the peers' counters at zero; only while no worker can count under their indexes."""
        self._peers[:, np.array(indexes, np.intp)] = 0

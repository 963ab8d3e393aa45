"""What numpy does for counters of many peers.  Imported only for those: the import costs 60 to 140 ms and 14 MB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from udptun._fastpath import FIELDS, LAYOUT


class PeerStats:
    """The rows of counters of all peers, one a worker, in the shared memory `words` (u64)."""

    def __init__(self, words: memoryview) -> None:
        n_counters = len(FIELDS["peer_stats"])
        self._rows = np.frombuffer(words, np.uint64).reshape(LAYOUT["max_workers"], LAYOUT["max_peers"], n_counters)

    def sums(self, indexes: Sequence[int | None], workers: Sequence[int]) -> list[list[int]]:
        """Of each of the peers over these workers; zeros for one without index."""
        known = np.array([index or 0 for index in indexes], np.intp)
        sums = self._rows[np.array(workers, np.intp)[:, None], known].sum(axis=0)
        sums[[index is None for index in indexes]] = 0
        rows: list[list[int]] = sums.tolist()
        return rows

    def clear(self, indexes: Sequence[int], workers: Sequence[int]) -> None:
        """Set the peers' rows of these workers to zero."""
        for worker in workers:
            self._rows[worker, np.array(indexes, np.intp)] = 0

"""What the programs have counted, added to the counters of the workers.

They count per processor, in maps that are gone with the programs.  So every second what was added is added to the
statistics' memory file, where all counters are.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from udptun.datapath.stats import PEER_COUNTERS, Stats
from udptun.kernel.bpf import Map

COUNTS = (
    *("encap_packets", "encap_sent", "encap_drop_send", "udp_sent_bytes"),
    *("decap_packets", "decap_delivered", "decap_drop_tun", "tun_written_bytes"),
    *("encap_shape", "encap_peer", "encap_ttl", "encap_too_big", "encap_route", "encap_order", "encap_lapsed"),
    *("decap_lapsed", "decap_shape", "decap_checksum", "decap_sender", "decap_super", "decap_source"),
    *("decap_destination", "decap_ttl", "decap_too_big", "decap_mark"),
    *("detour_sent", "detour_arrived", "detour_refused", "detour_late"),
)
"""In the order of the enum of shortcut.bpf.c: counters of docs/wire-format.md, then why packets were passed on, then
those of `DetourCounts`."""
_N_SHARED, _N_DETOUR = 8, 4
"""How many of them are counters of docs/wire-format.md, and of the detour."""
_PEER_COUNTS = struct.Struct(f"={len(PEER_COUNTERS)}Q")
PEER_COUNTS_LEN = _PEER_COUNTS.size
_REST = 100
"""The peers' counters are read again after so many times as long as it took: tens of thousands of peers on many
processors are 30 MB."""
_ROWS = 64
"""So many are compared at once: most peers are silent."""


@dataclass(frozen=True, slots=True)
class DetourCounts:
    """Packets that have taken the detour, that came out, and of strangers that were dropped.

    `late`: how often nothing that a peer has sent came out.
    """

    sent: int = 0
    arrived: int = 0
    refused: int = 0
    late: int = 0


class Counts:
    """The counters of one load of the programs."""

    def __init__(
        self, counts: Map, peer_counts: Map, stats: Stats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds."""
        self._counts, self._peer_counts, self._stats, self._clock = counts, peer_counts, stats, clock
        self._before = dict.fromkeys(COUNTS, 0)
        self._peers_before = bytearray()
        self._n_lost = self._n_missing = 0
        self.n_lost_by_detour = 0
        """Packets that went in and did not come out."""
        self._n_refused: int | None = None
        self._rest_s = 0.0

    @property
    def passed(self) -> Mapping[str, int]:
        """How many packets were passed on to the worker, by the reason, as of the last `add`."""
        return {name: n for name, n in list(self._before.items())[_N_SHARED:-_N_DETOUR] if n}

    @property
    def detour(self) -> DetourCounts:
        """As of the last `add`."""
        return DetourCounts(*list(self._before.values())[-_N_DETOUR:])

    def add(self, top: int, n_lost: int, n_refused: int, *, is_last: bool = False) -> None:
        """Add what has come since the last time to the statistics.

        `top` is the highest index of a peer.  `n_lost`: how many packets the pair has dropped.  `n_refused`: grows with
        each that our device has dropped after it was delivered.  `is_last`: the programs end, so nothing is left for
        later.  Raises KernelError.
        """
        raw, step = self._counts.read_first(len(COUNTS)), self._counts.stored_len
        sums = [sum(memoryview(raw)[i * step : (i + 1) * step].cast("Q")) for i in range(len(COUNTS))]
        now = dict(zip(COUNTS, sums, strict=True))
        new = {name: now[name] - self._before[name] for name in COUNTS[:_N_SHARED]}
        refused = 0 if self._n_refused is None else n_refused - self._n_refused
        refused = min(max(refused, 0), new["decap_delivered"])
        new["decap_delivered"] -= refused
        new["decap_drop_tun"] += n_lost - self._n_lost + refused + self._new_of_detour(now, is_last=is_last)
        self._before, self._n_lost, self._n_refused = now, n_lost, n_refused
        self._stats.count_beside(new, self._new_of_peers(top, is_last=is_last))

    def _new_of_detour(self, now: Mapping[str, int], *, is_last: bool) -> int:
        """How many packets were lost there: those that are missing and were so before, or that nobody waits for."""
        missing = now["detour_sent"] - now["detour_arrived"]
        n_lost = max(self.n_lost_by_detour, missing if is_last else min(missing, self._n_missing))
        new, self._n_missing, self.n_lost_by_detour = n_lost - self.n_lost_by_detour, missing, n_lost
        return new

    def _new_of_peers(self, top: int, *, is_last: bool) -> dict[int, tuple[int, ...]]:
        """By index what was added since the last time; nothing where reading them would take too much of the time."""
        began_s = self._clock()
        if began_s < self._rest_s and not is_last:
            return {}
        rows = self._peer_counts.read_first(min(top + 1, self._peer_counts.n))
        before = self._rows_before(len(rows))
        found = dict(_differences(before, rows, self._peer_counts.stored_len))
        before[: len(rows)] = rows
        now_s = self._clock()
        self._rest_s = now_s + _REST * (now_s - began_s)
        return found

    def begin_peer(self, index: int) -> None:
        """Another peer has this index now: what was counted under it is not its own.  Raises KernelError."""
        step = self._peer_counts.stored_len
        at = index * step
        self._rows_before(at + step)[at : at + step] = self._peer_counts.read(index)

    def _rows_before(self, length: int) -> bytearray:
        """At least `length` bytes of what the peers' rows were."""
        self._peers_before.extend(bytes(max(0, length - len(self._peers_before))))
        return self._peers_before


def _differences(before: bytearray, now: bytes, step: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Index of each row that has changed, and what was added, summed over the processors."""
    if before[: len(now)] == now:
        return
    blocks = range(0, len(now), _ROWS * step)
    for start in (it for it in blocks if before[it : it + _ROWS * step] != now[it : it + _ROWS * step]):
        for at in range(start, min(start + _ROWS * step, len(now)), step):
            old, new = before[at : at + step], now[at : at + step]
            if old != new:
                sums = [list(map(sum, zip(*_PEER_COUNTS.iter_unpack(it), strict=True))) for it in (old, new)]
                yield at // step, tuple(after - was for was, after in zip(*sums, strict=True))

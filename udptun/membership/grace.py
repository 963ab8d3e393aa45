"""A moment of grace for peers whose leases are gone.

When a lease was deleted by mistake, or the store has lost all of them, the peer's own daemon writes the lease again at
once.  A peer that is kept for that moment loses no packet.  A new lease of exactly its subnet replaces it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from udptun.core.lease import EventType, LeaseEvent

GRACE_S = 0.5


class Grace:
    """Which peers are kept although their leases are gone, by key, and until when.

    Pure: `now_s` is time elapsed.
    """

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def hold_back(
        self, events: Iterable[LeaseEvent], is_peer: Callable[[str], bool], now_s: float
    ) -> list[LeaseEvent]:
        """What of the events is to be done now: all but the removal of a peer, which begins its grace."""
        to_do: list[LeaseEvent] = []
        for event in events:
            key = event.lease.key
            if event.type is EventType.REMOVED and is_peer(key):
                self._ends.setdefault(key, now_s + GRACE_S)
            else:
                self._ends.pop(key, None)
                to_do.append(event)
        return to_do

    def restart(self, gone: Iterable[str], now_s: float) -> None:
        """The store has all leases but those of the peers `gone`; one that was gone before keeps its end."""
        self._ends = {key: self._ends.get(key, now_s + GRACE_S) for key in gone}

    def next_end_s(self) -> float:
        """When the next grace ends; infinite when there is none."""
        return min(self._ends.values(), default=math.inf)

    def pop_ended(self, now_s: float, at_most: int) -> list[str]:
        """Take out peers whose grace is over: they are to be dropped."""
        ended = [key for key, end_s in self._ends.items() if end_s <= now_s][:at_most]
        for key in ended:
            del self._ends[key]
        return ended

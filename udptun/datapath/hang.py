"""Whether a worker hangs: it is in the middle of a turn, and nothing of it moves.  Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

LOOK_S = 1.0
"""Looks are at least so far apart, seconds."""
N_LOOKS = 5
"""A worker that looks the same so many times in a row hangs.  Looks and not seconds: a machine that was suspended has
not looked, either.  A turn takes microseconds."""


class HangWatch:
    """The workers of one datapath, look by look.  Time comes from the caller, in seconds."""

    def __init__(self) -> None:
        self._looked_s = float("-inf")
        self._seen: list[tuple[Hashable, int]] = []
        """Of each worker what the last look has seen, and how many looks in a row have seen that."""

    def look(self, signs: Sequence[Hashable | None], now_s: float) -> bool:
        """Whether one of them hangs.  `signs`: what changes of each while it works; None: it sleeps."""
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            before = [*self._seen, *[(None, 0)] * len(signs)]
            self._seen = [
                (sign, before[i][1] + 1 if sign is not None and sign == before[i][0] else 1)
                for i, sign in enumerate(signs)
            ]
        return any(sign is not None and n >= N_LOOKS for sign, n in self._seen)

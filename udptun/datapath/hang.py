"""Whether a worker hangs: it is in the middle of a turn, and nothing of it moves.  Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain, repeat

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
            before = chain(self._seen, repeat((None, 0)))
            self._seen = [
                (sign, n + 1 if sign is not None and sign == seen else 1)
                for sign, (seen, n) in zip(signs, before, strict=False)
            ]
        # Between two looks a process may have taken the place of the one that was seen.
        known = zip(signs, self._seen, strict=False)
        return any(sign is not None and sign == seen and n >= N_LOOKS for sign, (seen, n) in known)

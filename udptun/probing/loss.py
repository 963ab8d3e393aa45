"""How many of the probes of each peer were lost lately.  Pure: the time comes from the caller."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

WINDOW_S = 600.0
"""Counts are of this window and of the one before: of the last 10 to 20 minutes."""

K = TypeVar("K", bound=Hashable)


class Counts(NamedTuple):
    """Probes that asked whether a peer is alive, and how many of them were never answered."""

    n_probes: int = 0
    n_lost: int = 0


class _Windows(NamedTuple):
    """`began_s`: of the present window."""

    began_s: float
    present: Counts
    before: Counts

    def at(self, now_s: float) -> _Windows:
        passed_s = now_s - self.began_s
        if passed_s < WINDOW_S:
            return self
        if passed_s < 2 * WINDOW_S:
            return _Windows(self.began_s + WINDOW_S, Counts(), self.present)
        return _Windows(now_s, Counts(), Counts())


class Losses(Generic[K]):
    """Of all peers, by whatever the caller calls them.  `counts` may be asked on another thread."""

    def __init__(self) -> None:
        self._windows: dict[K, _Windows] = {}

    def note(self, key: K, now_s: float, *, is_lost: bool) -> None:
        """The answer to a probe has come, or will not come any more."""
        began_s, (n_probes, n_lost), before = self._windows.get(key, _Windows(now_s, Counts(), Counts())).at(now_s)
        self._windows[key] = _Windows(began_s, Counts(n_probes + 1, n_lost + is_lost), before)

    def remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._windows.pop(key, None)

    def counts(self, key: K, now_s: float) -> Counts:
        windows = self._windows.get(key)
        if windows is None:
            return Counts()
        _, present, before = windows.at(now_s)
        return Counts(present.n_probes + before.n_probes, present.n_lost + before.n_lost)

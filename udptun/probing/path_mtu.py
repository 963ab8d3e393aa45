"""How long a packet to each peer may be.  Pure: answers and the time come from the caller.

    full        what the device allows: the underlay's MTU less what is around a packet
    size        of a probe, an echo request with DF that the peer's kernel answers; bytes of inner packet
    round       probes of one or several sizes that are on the way at the same time
    check       a round of one probe, of the size that packets may have now
    search      rounds of several sizes between one that passes and one that does not, until the two follow each other

A path narrower than the device swallows full-size packets, in silence where a firewall eats the ICMP errors: small ones
pass, a TCP connection begins, and then nothing comes.  A peer with traffic is checked every CHECK_S.  When a probe of
the size is lost twice while something else is heard of the peer, the size is searched for.  From then on senders are
told (fragmentation needed).  Whether the path takes more again is tried after GROW_S, and then less and less often.
Where an ICMP error tells of a narrow path, the search begins at once, with what it said: it is believed when it is so.

The peer's answer is as long as the probe, so what is found is the smaller one of the two directions.  Where no size
above LEAST passes nothing is concluded: then it is no path that drops large packets, but somebody who drops echoes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

CHECK_S = 1.0
"""Between two checks of a peer that is watched closely."""
IDLE_CHECK_S = 1000.0
"""And of any other one, with an answer that it gives anyway."""
IDLE_PER_S = 8
"""Of these checks at most.  Those that are too many wait for the next answer of their peer."""
MOST_LOST = 2
N_SIZES = 12
"""Of one round: three rounds find one of 1,472 sizes."""
LEAST = 576
"""What every IPv4 host must take (RFC 791)."""
DISTRUST_S = 10.0
"""After somebody has told of a narrow path that is none.  Anybody can forge an ICMP error."""
GROW_S = 60.0, 600.0
"""First and longest time until more is tried; each is twice the one before."""

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Path:
    """Times are in seconds, of the caller's clock."""

    full: int
    """Of this path; see above."""
    size: int
    """Packets may be so long."""
    is_measured: bool = False
    check_due_s: float = 0.0
    checked_s: float = float("-inf")
    n_lost: int = 0
    grow_due_s: float = 0.0
    grow_pause_s: float = GROW_S[0]
    told: int = 0
    """What an ICMP error said, to be tried in the search; 0: nothing that is not known."""
    distrust_until_s: float = float("-inf")
    """What is told until then is not looked at: the last time it was not so."""
    passing: int = 0
    """In a search: a size that passes, and one that does not.  0: there is no search."""
    failing: int = 0
    waiting: frozenset[int] = frozenset()
    """Sizes of the round that is on the way.  All paths without one share the same empty set: others are 216 bytes."""
    answered: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()


class PathMtus(Generic[K]):
    """All peers, by whatever the caller calls them.  `idle_check_s`: see IDLE_CHECK_S."""

    def __init__(self, idle_check_s: float = IDLE_CHECK_S) -> None:
        self._idle_check_s = idle_check_s
        self._paths: dict[K, _Path] = {}
        self._busy: set[K] = set()
        """Those that have a round before them or on the way, whether they are watched or not."""
        self._changed: dict[K, int] = {}
        self._next_idle_s = float("-inf")

    def add(self, key: K, full: int) -> None:
        """Begin with a peer of which nothing is known, or begin with it anew.  `full`: see above."""
        self._paths[key] = _Path(full, full)
        self._busy.discard(key)
        self._changed.pop(key, None)

    def restore(self, key: K, size: int, now_s: float) -> None:
        """It was measured before, by somebody else.  Whether the path takes more is tried as after a measure."""
        path = self._paths[key]
        path.size, path.is_measured = size, True
        path.grow_due_s = now_s + path.grow_pause_s

    def remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._paths.pop(key, None)
            self._busy.discard(key)
            self._changed.pop(key, None)

    def give_up(self, key: K, now_s: float) -> None:
        """Forget the round that is on the way: a probe of it was not sent, or the peer is dead."""
        path = self._paths.get(key)
        if path is not None:
            self._end_round(path)
            path.passing = path.n_lost = path.told = 0
            path.check_due_s = now_s + CHECK_S
            self._busy.discard(key)

    def due(self, watched: Iterable[K], now_s: float) -> list[tuple[K, int]]:
        """Of the peers that are watched closely and answer: whom to probe now, with which size.

        Each probe is waited for: it ends with `note_answer`, `note_lost` or `give_up`.
        """
        found: list[tuple[K, int]] = []
        for key in {*watched, *self._busy}:
            path = self._paths.get(key)
            if path is not None and not path.waiting and now_s >= path.check_due_s:
                found += [(key, size) for size in self._begin_round(path, now_s)]
                self._busy.add(key)
        return found

    def due_with_answer(self, key: K, now_s: float) -> list[tuple[K, int]]:
        """Likewise, of a peer that has just answered a small probe."""
        path = self._paths.get(key)
        if path is None or now_s - path.checked_s < self._idle_check_s or now_s < self._next_idle_s:
            return []
        self._next_idle_s = now_s + 1 / IDLE_PER_S
        return self.due([key], now_s)

    def note_answer(self, key: K, size: int, now_s: float) -> None:
        """A probe of this size has come back."""
        path = self._paths.get(key)
        if path is not None and size in path.waiting:
            path.waiting -= {size}
            path.answered |= {size}
            self._end_round_if_over(key, path, now_s, is_heard=True)

    def note_lost(self, key: K, size: int, now_s: float, *, is_heard: bool) -> None:
        """It has not come back in time.  `is_heard`: something else of the peer has come, just now."""
        path = self._paths.get(key)
        if path is not None and size in path.waiting:
            path.waiting -= {size}
            path.lost |= {size}
            self._end_round_if_over(key, path, now_s, is_heard=is_heard)

    def note_told(self, key: K, size: int, now_s: float) -> None:
        """Somebody says that packets to the peer, which answers, may be so long.  Probes will show whether it is so."""
        path = self._paths.get(key)
        if path is None or not LEAST <= size < path.size or now_s < path.distrust_until_s:
            return
        path.told = size
        if not path.waiting and not path.passing:
            self._begin_search(path, now_s)
        self._busy.add(key)

    def take_changes(self) -> dict[K, int]:
        """Peers whose packets may have another length than before: how long they may be, bytes."""
        changed, self._changed = self._changed, {}
        return changed

    def measured(self, key: K) -> int | None:
        """How long packets to the peer may be, bytes; None while that is not known."""
        path = self._paths.get(key)
        return path.size if path is not None and path.is_measured else None

    def narrow(self) -> dict[K, int]:
        """The peers to which packets may not be as long as the device allows, with the length."""
        return {key: path.size for key, path in list(self._paths.items()) if path.size < path.full}

    def _begin_round(self, path: _Path, now_s: float) -> list[int]:
        if not path.passing and path.size < path.full and now_s >= path.grow_due_s and path.n_lost == 0:
            path.passing, path.failing = path.size, path.full + 1
        sizes = _between(path.passing, path.failing) if path.passing else [path.size]
        if path.passing < path.size:
            # In each round, also after it was lost: it tells a narrow path from an outage that is over.
            sizes = sorted({*sizes, path.size})
        if 0 < path.passing < path.told < path.failing:
            sizes = sorted({*sizes, path.told, min(path.told + 1, path.failing - 1)})
        path.checked_s = now_s
        path.waiting = frozenset(sizes)
        return sizes

    def _begin_search(self, path: _Path, now_s: float) -> None:
        path.n_lost = 0
        # The size itself once more: probes of it may have been lost by chance.
        path.passing, path.failing = LEAST - 1, path.size + 1
        path.check_due_s = now_s

    def _end_round_if_over(self, key: K, path: _Path, now_s: float, *, is_heard: bool) -> None:
        if path.waiting:
            return
        answered, lost = path.answered, path.lost
        self._end_round(path)
        if path.told and not path.passing:
            self._begin_search(path, now_s)
        elif path.passing and not answered and not is_heard:
            self.give_up(key, now_s)
        elif path.passing:
            self._go_on_searching(key, path, answered, lost, now_s)
        elif answered:
            path.is_measured, path.n_lost = True, 0
            path.check_due_s = now_s + CHECK_S
        elif not is_heard:
            # Nothing at all comes from the peer, small or large.
            path.check_due_s = now_s + CHECK_S / 2
        else:
            path.n_lost += 1
            path.check_due_s = now_s
            if path.n_lost >= MOST_LOST:
                self._begin_search(path, now_s)
        if not path.passing and not path.n_lost:
            self._busy.discard(key)

    def _go_on_searching(
        self, key: K, path: _Path, answered: frozenset[int], lost: frozenset[int], now_s: float
    ) -> None:
        path.passing = max(answered | {path.passing})
        failing = path.failing if path.failing > path.passing else path.size + 1
        path.failing = min({size for size in lost if size > path.passing} | {failing})
        path.check_due_s = now_s
        if path.failing - path.passing > 1:
            return
        found, path.passing = path.passing, 0
        if path.told and found > path.told:
            path.distrust_until_s = now_s + DISTRUST_S
        path.told = 0
        path.check_due_s = now_s + CHECK_S
        if found < LEAST:
            # Not even that passes.
            path.is_measured = False
            path.check_due_s = now_s + IDLE_CHECK_S
            return
        path.is_measured = True
        path.grow_pause_s = GROW_S[0] if found != path.size else min(2 * path.grow_pause_s, GROW_S[1])
        path.grow_due_s = now_s + path.grow_pause_s
        if found != path.size:
            path.size = found
            self._changed[key] = found

    def _end_round(self, path: _Path) -> None:
        path.waiting = path.answered = path.lost = frozenset()


def _between(passing: int, failing: int) -> list[int]:
    """Up to N_SIZES sizes between the two, evenly spread, the longest one included: it may pass again."""
    n = min(N_SIZES, failing - passing - 1)
    return [passing + (failing - 1 - passing) * (i + 1) // n for i in range(n)]

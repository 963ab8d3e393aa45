"""A store that is away: what the log says of it, and how long to wait before it is asked again."""

from __future__ import annotations

import asyncio
import logging
import random

from udptun.core.clock import Clock
from udptun.stores.base import reconnect_spread_s

log = logging.getLogger(__name__)

RECONNECT_S = (0.1, 0.5)
"""First and longest wait before the store is asked again.

A host alone follows the store again after the longest wait at most, once the store is back.  Each wait is up to a
third shorter by chance, and many hosts add what spreads them (`reconnect_spread_s`): 10,000 hosts come back within six
seconds, 2,000 of them a second."""

_SAY_AGAIN_S = (10.0, 3600.0)
"""A store that is still away is mentioned after the first time, then after six times as long each time, until it is the
second time after the mention before."""


class Outage:
    """Says in few lines that the store is away: each reason once, and now and then that it still is.

    `lack` is what there is not meanwhile, as the beginning of each line.
    """

    def __init__(self, lack: str, store_name: str, clock: Clock) -> None:
        self._lack = lack
        self._store_name = store_name
        self._clock = clock
        self._said: set[str] = set()
        self._began_s = self._say_again_s = 0.0
        self.reason = ""
        """Why the store does not answer; empty while it does."""
        self.answered_s: float | None = None
        """When it last answered, Unix seconds; None: not yet."""

    def goes_on(self, reason: str, doing: str) -> None:
        """It failed once more; `doing` says what we do meanwhile."""
        now_s = self._clock.elapsed_s()
        if not self.reason:
            self._began_s, self._say_again_s = now_s, _SAY_AGAIN_S[0]
        self.reason = reason
        away_s = now_s - self._began_s
        if reason not in self._said:
            self._said.add(reason)
            log.warning("%s, %s error=%r", self._lack, doing, reason)
        elif away_s >= self._say_again_s:
            log.warning("still %s, %s for_s=%.0f error=%r", self._lack, doing, away_s, reason)
        while away_s >= self._say_again_s:
            self._say_again_s += min(5 * self._say_again_s, _SAY_AGAIN_S[1])

    def end(self) -> None:
        """It answers."""
        self.answered_s = self._clock.unix_s()
        if self.reason:
            away_s = self._clock.elapsed_s() - self._began_s
            log.info("lease store answers again store=%s after_s=%.1f", self._store_name, away_s)
        self.reason = ""
        self._said.clear()


class Backoff:
    """Waits twice as long each time, and so long by chance as many hosts need; see RECONNECT_S."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._next_s, self._longest_s = RECONNECT_S

    async def sleep(self, n_hosts: int = 0) -> None:
        """Wait; `n_hosts` lost the store together, as far as we know."""
        await asyncio.sleep(self.next_s(n_hosts))

    def next_s(self, n_hosts: int) -> float:
        """The next wait."""
        wait_s = self._next_s * random.uniform(2 / 3, 1)
        self._next_s = min(2 * self._next_s, self._longest_s)
        return wait_s + random.uniform(0, reconnect_spread_s(n_hosts))

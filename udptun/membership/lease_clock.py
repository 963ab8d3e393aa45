"""The time of day as leases see it.

An expiry is compared with the time of day, which people and time servers set.  A lease does not get older by that.  So
before any expiry is looked at, all of them are moved by as much as the clock was set since the last look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from udptun.core.clock import Clock

log = logging.getLogger(__name__)

CHECK_S = 30.0
"""Sleep no longer than this towards a time of day: the clock may be set meanwhile."""

_SET_S = 2.0
"""A clock was set when its lead over the time elapsed has changed by more than this since the last look.  A smaller
change is ignored: a clock that is slewed goes 0.05 % wrong at most."""


class LeaseClock:
    """The time for whoever compares it with an expiry; `postpone` moves every expiry that is kept by so many seconds.

    Used in the event loop only.
    """

    def __init__(self, clock: Clock, postpone: Callable[[float], None]) -> None:
        self._clock = clock
        self._postpone = postpone
        self._ahead_s = self._lead_s()

    def look(self) -> None:
        """Move all expiries along when somebody has set the clock.  Call it before new ones join them."""
        ahead_s = self._lead_s()
        set_by_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        if abs(set_by_s) >= _SET_S:
            log.warning("the clock was set by %+.0f s: leases last as long as they would have", set_by_s)
            self._postpone(set_by_s)

    def now_s(self) -> float:
        """Unix seconds, after a `look`: read the expiry to compare with afterwards."""
        self.look()
        return self._clock.unix_s()

    def elapsed_s(self) -> float:
        """The time that has passed, which nobody sets."""
        return self._clock.elapsed_s()

    def _lead_s(self) -> float:
        return self._clock.unix_s() - self._clock.elapsed_s()

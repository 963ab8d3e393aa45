"""Two clocks: the time of day, which people and time servers set, and the time that has passed, which nobody sets."""

from __future__ import annotations

import time


class Clock:
    """Where `Membership` takes the time from."""

    def unix_s(self) -> float:
        """Seconds since 1970, as the clock is set."""
        return time.time()

    def elapsed_s(self) -> float:
        """Seconds since some fixed moment.  It goes on while the machine sleeps (CLOCK_BOOTTIME)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

"""When to start a datapath process in the place of one that has died.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

AT_ONCE = 2
"""So many deaths are made good at once: the active process and its standby may be killed together."""
PAUSES_S = (0.01, 30.0)
"""First and longest pause after further deaths; each is twice the one before."""
CALM_S = 60.0
"""After so long without a death all is well, and the next death is the first one.  More than the longest pause."""


@dataclass(frozen=True, slots=True)
class Death:
    """One of several: the `number`th within `span_s` seconds.  The next start is due after `pause_s`."""

    number: int
    span_s: float
    pause_s: float

    @property
    def is_a_problem(self) -> bool:
        return self.number > AT_ONCE


class Restarts:
    """The deaths of one datapath, as far as they are not forgotten.  Time comes from the caller, in seconds."""

    def __init__(self) -> None:
        self._number = 0
        self._first_s = self._last_s = 0.0

    def note_death(self, now_s: float) -> Death:
        if self.is_calm(now_s):
            self._number, self._first_s = 0, now_s
        self._number += 1
        self._last_s = now_s
        doublings = self._number - AT_ONCE - 1
        # A float has no room for 2 to the power of a day's deaths.
        pause_s = 0.0 if doublings < 0 else min(PAUSES_S[0] * 2.0 ** min(doublings, 32), PAUSES_S[1])
        return Death(self._number, now_s - self._first_s, pause_s)

    def is_calm(self, now_s: float) -> bool:
        """Whether no process has died for so long that the deaths are forgotten."""
        return not self._number or now_s - self._last_s >= CALM_S

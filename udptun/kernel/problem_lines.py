"""The lines of one part of the daemon about what is wrong right now."""

from __future__ import annotations

import logging
from collections.abc import Iterable


class ProblemLines:
    """`lines` are for the status document.  The log gets each of them when it comes up, and one line at the end."""

    def __init__(self, log: logging.Logger, all_well: str) -> None:
        """`all_well` is logged when there has been a line and there is none any more."""
        self._log = log
        self._all_well = all_well
        self.lines: tuple[str, ...] = ()

    def replace(self, lines: Iterable[str]) -> None:
        """These are the lines now.  Two that are equal are one."""
        now = tuple(dict.fromkeys(lines))
        for line in now:
            if line not in self.lines:
                self._log.warning("%s", line)
        if self.lines and not now:
            self._log.info("%s", self._all_well)
        self.lines = now

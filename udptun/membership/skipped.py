"""Leases in the store that are not used: the log names each once, and `udptun status` names all that there are."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence

log = logging.getLogger(__name__)

LOGGED = 200
"""So many lines are logged per change; `udptun status` has all."""

_LOGGED_CHARS = 300
"""What is wrong may be a megabyte long."""

_KEPT = 1000
"""How many of the store's lines are remembered from watches."""


class Skipped:
    """`refused` are the tables' views of the leases that they refuse: the reason by key.

    The log has nothing here about the keys that are `said_elsewhere`.
    """

    def __init__(self, refused: Sequence[Mapping[str, str]], said_elsewhere: Container[str] = ()) -> None:
        self._refused = refused
        self._said_elsewhere = said_elsewhere
        self._unreadable: tuple[str, ...] = ()
        """The store's lines about items that are no leases."""
        self._said: frozenset[str] = frozenset()

    @property
    def lines(self) -> tuple[str, ...]:
        """One for each lease, naming it and the reason.  May be read on another thread."""
        refused = (f"{key}: {reason}" for table in self._refused for key, reason in list(table.items()))
        return tuple(dict.fromkeys((*self._unreadable, *refused)))

    def replace(self, unreadable: Iterable[str]) -> None:
        """A snapshot's lines are all that the store has."""
        self._unreadable = tuple(unreadable)

    def change(self, unreadable: Iterable[str], mended: Iterable[str]) -> None:
        """A watch tells which lines are new, and which no longer hold."""
        lines = dict.fromkeys((*self._unreadable, *unreadable))
        for line in mended:
            lines.pop(line, None)
        self._unreadable = tuple(lines)[-_KEPT:]

    def say(self) -> None:
        """Log the lines that are new since the last time, and those that are gone."""
        if not self._unreadable and not any(self._refused) and not self._said:
            return
        reasons = (
            f"{key}: {reason}"
            for table in self._refused
            for key, reason in table.items()
            if key not in self._said_elsewhere
        )
        now = frozenset((*self._unreadable, *reasons))
        new, gone = sorted(now - self._said), sorted(self._said - now)
        for line in new[:LOGGED]:
            log.warning("lease skipped %s", line[:_LOGGED_CHARS])
        if len(new) > LOGGED:
            log.warning("leases skipped n_more=%d; `udptun status` names them", len(new) - LOGGED)
        for line in gone[:LOGGED]:
            log.info("lease no longer skipped %s", line[:_LOGGED_CHARS])
        if len(gone) > LOGGED:
            log.info("leases no longer skipped n_more=%d", len(gone) - LOGGED)
        self._said = now

"""Hosts whose lease is for another Backend.Type, as while a network changes its type: named until they are reached."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from udptun.core.errors import one_line
from udptun.core.lease import Lease

log = logging.getLogger(__name__)

_SHOWN = 20
"""So many hosts have a line in `udptun status`; of more only the number is said."""

_LOGGED = 200
"""So many lines are logged per change."""

_MEANING = "pods of the two do not reach each other; give both hosts one Backend.Type"


class OtherTypes:
    """`leases` is the table's view of them, by key.  `backend` is what this host carries."""

    def __init__(self, leases: Mapping[str, Lease], backend: str) -> None:
        self._leases = leases
        self._backend = backend
        self._said: frozenset[str] = frozenset()

    @property
    def leases(self) -> list[Lease]:
        """By subnet.  May be read on another thread."""
        return sorted(self._leases.values(), key=lambda lease: int(lease.subnet.network_address))

    @property
    def problems(self) -> list[str]:
        """May be read on another thread."""
        leases = self.leases
        lines = [f"{self._fact(lease)}: {_MEANING}" for lease in leases[:_SHOWN]]
        more = len(leases) - len(lines)
        return [*lines, f"{more} more peers have another Backend.Type than this host"] if more else lines

    def say(self) -> None:
        """Log the lines that are new since the last time, and those that are gone."""
        if not self._leases and not self._said:
            return
        now = frozenset(map(self._fact, self._leases.values()))
        new, gone = sorted(now - self._said), sorted(self._said - now)
        for line in new[:_LOGGED]:
            log.warning("%s: %s", line, _MEANING)
        if len(new) > _LOGGED:
            log.warning("peers with another Backend.Type n_more=%d", len(new) - _LOGGED)
        for line in gone[:_LOGGED]:
            log.info("resolved: %s", line)
        if len(gone) > _LOGGED:
            log.info("resolved: peers with another Backend.Type n_more=%d", len(gone) - _LOGGED)
        self._said = now

    def _fact(self, lease: Lease) -> str:
        # flannel's udp and alloc name no type.
        kind = lease.attrs.backend_type or "udp or alloc"
        fact = f"peer {lease.attrs.host_address} leases {lease.subnet} for {kind}, this node carries {self._backend}"
        return one_line(fact)

"""The other hosts: what the store tells of them, applied to the table, and the difference told to whoever forwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.core.lease_table import LeaseTable
from udptun.membership.doubles import Clones
from udptun.membership.grace import Grace
from udptun.membership.lease_clock import LeaseClock
from udptun.membership.other_types import OtherTypes
from udptun.membership.saved import SavedTable
from udptun.membership.skipped import Skipped
from udptun.stores.base import Snapshot, WatchBatch

log = logging.getLogger(__name__)

LEASES_AT_ONCE = 1000
"""So many leases are applied before other tasks get a turn; about 10 ms."""

CHANGE_AGAIN_S = (1.0, 60.0)
"""First and longest pause before a change that failed is tried again."""

_LOGGED_EVENTS = 20
"""So many peers that change at once are named in the log; of more only the number is logged."""

PeersChanged = Callable[[Family, Sequence[LeaseEvent]], Awaitable[None]]
"""Applies a difference among the peers by one family.  It is awaited before the next one is told."""


class Peers:
    """Keeps `tables`, one a family, and tells `on_change` each difference among the usable peers of each.

    The first table is that of the family which every lease has.  `update`, `reset` and `recall` are called by one task
    at a time.  `let_go`, `reconsider` and `change_again` run beside them.
    """

    def __init__(
        self,
        tables: Sequence[LeaseTable],
        backend: str,
        on_change: PeersChanged,
        clones: Clones,
        saved: SavedTable,
        clock: LeaseClock,
    ) -> None:
        """`backend` is the type that this host carries."""
        self.tables = tables
        self._of_no_table: dict[str, str] = {}
        """Leases that have no subnet of any table's family -> that."""
        refused = [*(table.refused for table in tables), self._of_no_table]
        self.skipped = Skipped(refused, self.table.of_other_type)
        self.other_types = OtherTypes(self.table.of_other_type, backend)
        self._on_change = on_change
        self._clones = clones
        self._saved = saved
        self._clock = clock
        self._grace = Grace()
        self._has_grace = asyncio.Event()
        self._failed: dict[tuple[Family, str], tuple[LeaseEvent, str]] = {}
        """What `on_change` has not taken, by family and the key of the lease: the event, and why."""
        self._has_failed = asyncio.Event()

    @property
    def table(self) -> LeaseTable:
        """The first one."""
        return self.tables[0]

    @property
    def usable(self) -> Mapping[str, Lease]:
        """The leases that are used in any of the tables, by key."""
        return {key: lease for table in self.tables for key, lease in table.peers.items()}

    def _is_peer(self, key: str) -> bool:
        return any(key in table.peers for table in self.tables)

    async def update(self, batch: WatchBatch) -> None:
        """Apply the events of a batch.  A peer whose lease is gone is kept for a moment, see grace.py."""
        self._clock.look()
        self.skipped.change(batch.skipped, batch.mended)
        self.skipped.say()
        events = self._grace.hold_back(batch.events, self._is_peer, self._clock.elapsed_s())
        if self._grace:
            self._has_grace.set()
        for event in events:
            self._of_no_table.pop(event.lease.key, None)
        self._note_of_no_table(event.lease for event in events if event.type is EventType.ADDED)
        for at in range(0, len(events), LEASES_AT_ONCE):
            for table in self.tables:
                await self._apply(table, table.update(events[at : at + LEASES_AT_ONCE]))

    async def reset(self, snapshot: Snapshot) -> None:
        """Take over all that the store has; peers that it no longer has are kept for the same moment."""
        self._clock.look()
        self.skipped.replace(snapshot.skipped)
        self.skipped.say()
        there = {lease.key for lease in snapshot.leases}
        gone = [lease for key, lease in self.usable.items() if key not in there]
        self._grace.restart((lease.key for lease in gone), self._clock.elapsed_s())
        if self._grace:
            self._has_grace.set()
        await self.recall((*snapshot.leases, *gone))

    async def recall(self, leases: Sequence[Lease]) -> None:
        """Take over these leases, and drop all others."""
        self._of_no_table.clear()
        self._note_of_no_table(leases)
        for table in self.tables:
            for events in table.reset_by_parts(leases, LEASES_AT_ONCE):
                await self._apply(table, events)
                await asyncio.sleep(0)

    def _note_of_no_table(self, leases: Iterable[Lease]) -> None:
        """Note those that no table takes."""
        if len(self.tables) == len(Family):
            # Every lease has a subnet of one of them.
            return
        family = self.table.family
        for lease in leases:
            if lease.subnets.of(family) is None:
                self._of_no_table[lease.key] = f"it has no {family} subnet, and pods of this host have {family} alone"

    async def reconsider(self) -> None:
        """Look at every lease anew: what the tables ask about them has other answers now."""
        for table in self.tables:
            keys = table.keys()
            for at in range(0, len(keys), LEASES_AT_ONCE):
                await self._apply(table, table.reconsider(keys[at : at + LEASES_AT_ONCE]))
                await asyncio.sleep(0)

    def has_expired(self, now_s: float) -> bool:
        """Whether any lease has expired by `now_s`, Unix seconds."""
        return any((next_s := table.next_expiry_s()) is not None and next_s <= now_s for table in self.tables)

    async def expire(self, now_s: float) -> None:
        """Drop what has expired by `now_s`, Unix seconds."""
        for table in self.tables:
            await self._apply(table, table.expire(now_s))

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each peer that is not as the table has it, or not reached.  May be read on another thread."""
        tables = {table.family: table for table in self.tables}
        failed = [
            (tables[family].part(event.lease), event, why)
            for (family, _), (event, why) in self._failed.copy().items()
        ]
        lines = [
            f"peer {part.subnet} at {part.public_ip} is not {event.type.value}: {why}; "
            "it is tried again, the log has more"
            for part, event, why in failed[:_LOGGED_EVENTS]
        ]
        more = len(failed) - len(lines)
        if more:
            lines.append(f"{more} more peers are not as the store has them")
        return (*lines, *self.other_types.problems)

    async def change_again(self) -> None:
        """Try once more what `on_change` has not taken, with growing pauses, until cancelled."""
        pause_s = CHANGE_AGAIN_S[0]
        while True:
            if not self._failed:
                self._has_failed.clear()
                await self._has_failed.wait()
                pause_s = CHANGE_AGAIN_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, CHANGE_AGAIN_S[1])
            for place, (event, _why) in list(self._failed.items()):
                # The store may have said something newer meanwhile.
                if event is self._failed.get(place, (None,))[0]:
                    await self._change_each(place[0], [event])

    async def let_go(self) -> None:
        """Drop the peers whose moment of grace is over, until cancelled."""
        while True:
            while not self._grace:
                self._has_grace.clear()
                await self._has_grace.wait()
            await asyncio.sleep(self._grace.next_end_s() - self._clock.elapsed_s())
            ended = self._grace.pop_ended(self._clock.elapsed_s(), LEASES_AT_ONCE)
            await self._drop(ended)

    async def _drop(self, keys: Iterable[str]) -> None:
        # Also from a table that refuses the lease: it is no peer by that family, and known there all the same.
        dropped = {key: table.peers[key] for key in keys for table in self.tables if key in table.peers}
        for table in self.tables:
            await self._apply(table, table.update(LeaseEvent(EventType.REMOVED, peer) for peer in dropped.values()))

    async def _apply(self, table: LeaseTable, events: list[LeaseEvent]) -> None:
        """Tell what the table has answered to a change."""
        family = table.family
        self.skipped.say()
        self.other_types.say()
        self._saved.note_expiries()
        if not events:
            return
        try:
            await self._on_change(family, events)
        except Exception:
            # One of them may be bad, and the others are not.
            await self._change_each(family, events)
        else:
            for event in events:
                self._failed.pop((family, event.lease.key), None)
        self._saved.note_change()
        if len(events) > _LOGGED_EVENTS:
            log.info("peers changed n_changes=%d n_peers=%d", len(events), len(table.peers))
        else:
            for event in events:
                part = table.part(event.lease)
                log.info("peer %s subnet=%s public_ip=%s", event.type.value, part.subnet, part.public_ip)
        if table is self.table:
            for event in events:
                self._clones.see(event)

    async def _change_each(self, family: Family, events: Sequence[LeaseEvent]) -> None:
        """Tell each by itself; those that `on_change` does not take are kept for `change_again`."""
        n_new = 0
        for event in events:
            key = event.lease.key
            try:
                await self._on_change(family, [event])
            except Exception as exc:
                why = str(exc) if isinstance(exc, UdptunError) else f"unexpected {type(exc).__name__}: {exc}"
                if self._failed.get((family, key)) != (event, why):
                    n_new += 1
                    if n_new <= _LOGGED_EVENTS:
                        # The first one shows where.
                        place = exc if n_new == 1 else None
                        log.error("peer cannot be changed key=%s error=%r", key, why, exc_info=place)
                self._failed[family, key] = (event, why)
                self._has_failed.set()
            else:
                self._failed.pop((family, key), None)

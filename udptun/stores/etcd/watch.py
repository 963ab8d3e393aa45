"""One watch of the etcd store: etcd's events, the ends of leases, and a check now and then that nothing is missing.

The watch folds what it reports into a table of its own.  From that it knows what a deleted key held and whose end is
unknown, and it can be compared with etcd.  A watch that begins at a revision whose table nobody knows has etcd tell
what was deleted, and its first check is a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

from udptun.core.errors import ConfigError, LeaseError
from udptun.core.lease import EventType, LeaseEvent
from udptun.stores.base import Snapshot, WatchBatch
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.client import RANGE, Client, Watch
from udptun.stores.etcd.etcd_leases import EtcdLeases
from udptun.stores.etcd.failures import RevisionGoneError
from udptun.stores.etcd.table import Known, LastTable, LeaseKeys, Table

log = logging.getLogger(__name__)

CHECK_S = 60.0
"""How often a watch is checked against etcd on average, seconds.  A tenth of a second a lease is added: each check
makes etcd look at every lease, and as many hosts ask as there are leases."""

EXPIRY_LOOKUPS_PER_S = 2000
"""How many expiries all hosts together ask etcd for, if each host has one lease.  100 hosts know them all after five
seconds, 10,000 hosts after 14 hours."""

_LOOKUPS_AT_ONCE = 100
"""Expiries are asked for one by one, and reported this many at a time."""

_LOOKUP_RETRY_S = 60.0

_LAST_REVISION = 2**63 - 1
"""Nothing can be asked for after it."""

_MIN_RESET_S = 0.5
"""A watch takes a snapshot no sooner than this after the one before."""


class _DoubtError(Exception):
    """What we have seen may not be all there is; the text says why."""


class LeaseWatch:
    """The batches of one `Store.watch` from revision `after`; the caller stops it.

    Its table is taken out of `last` at the beginning, and `stop` puts it back.  `snapshot` is the store's, and puts its
    table there.
    """

    def __init__(
        self,
        client: Client,
        keys: LeaseKeys,
        etcd_leases: EtcdLeases,
        last: LastTable,
        snapshot: Callable[[], Awaitable[Snapshot]],
        after: int,
    ) -> None:
        self._client = client
        self._keys = keys
        self._etcd_leases = etcd_leases
        self._last = last
        self._snapshot = snapshot
        self._after = after
        self._table: Table | None = last.take(after)
        self._watch: Watch | None = None
        self._reading: asyncio.Task[pb.WatchResponse] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[dict[int, float]] | None = None
        self._unknown: dict[int, None] = {}
        """etcd leases whose end nobody knows, in the order in which to ask."""
        self._reset_s = float("-inf")

    async def next(self) -> WatchBatch:
        """The next batch.  Raises what `Store.watch` raises."""
        while True:
            try:
                if self._watch is None:
                    await self._open()
                    # Empty.  It tells the caller that etcd answers, before anything changes.
                    return WatchBatch(self._after)
                batch = await self._next()
            except (_DoubtError, RevisionGoneError) as exc:
                await self._close()
                log.info("lease watch starts over with a snapshot reason=%r", str(exc))
                return await self._reset()
            if batch is not None:
                return batch

    async def stop(self) -> None:
        """Free what it holds, and leave its table to the next watch."""
        await self._close()
        if self._table is not None:
            self._last.put(self._table, self._after)
            self._table = None

    async def _reset(self) -> WatchBatch:
        now_s = asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, self._reset_s + _MIN_RESET_S - now_s))
        snapshot = await self._snapshot()
        self._reset_s = asyncio.get_running_loop().time()
        self._after, self._table = snapshot.revision, self._last.take(snapshot.revision)
        return WatchBatch(snapshot.revision, snapshot=snapshot)

    async def _open(self) -> None:
        if not 0 <= self._after < _LAST_REVISION:
            raise _DoubtError(f"{self._after} is a revision that no etcd comes to")
        request = pb.WatchCreateRequest(
            key=self._keys.first,
            range_end=self._keys.end,
            start_revision=self._after + 1,
            progress_notify=True,
            prev_kv=self._table is None,
        )
        self._watch = await self._client.watch(request, "watch the leases")
        created = await self._watch.read()
        if created.header.revision < self._after:
            raise _DoubtError(f"etcd is at revision {created.header.revision}, before our {self._after}")
        if self._last.cluster_id not in (0, created.header.cluster_id):
            raise _DoubtError("etcd is another cluster now")
        self._unknown = {it.etcd_lease: None for it in (self._table or {}).values() if self._is_unknown(it)}
        self._checking = asyncio.create_task(self._check())

    async def _close(self) -> None:
        tasks = [task for task in (self._reading, self._checking, self._asking) if task is not None]
        self._reading = self._checking = self._asking = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watch is not None:
            await self._watch.close()
            self._watch = None

    async def _next(self) -> WatchBatch | None:
        """The next batch, out of etcd's events or of what was asked about expiries."""
        assert self._watch is not None
        if self._reading is None:
            self._reading = asyncio.create_task(self._watch.read())
        if self._asking is None and self._unknown:
            self._asking = asyncio.create_task(self._ask())
        running = {task for task in (self._reading, self._checking, self._asking) if task is not None}
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if self._reading in done:
            response, self._reading = self._reading.result(), None
            return self._take(response)
        if self._checking in done:
            self._checking.result()
        if self._asking in done:
            expiries, self._asking = self._asking.result(), None
            return self._take_expiries(expiries)
        return None

    # ------------------------------------------------------------------------------------------- etcd's events

    def _take(self, response: pb.WatchResponse) -> WatchBatch:
        if not response.events:  # progress: nothing happened up to there
            self._after = max(self._after, response.header.revision)
            return WatchBatch(self._after)
        events: list[LeaseEvent] = []
        # Whether each line holds after the batch.
        problems: dict[str, bool] = {}
        for event in response.events:
            # The header's revision is etcd's present one: more events up to there may be on their way.
            self._after = max(self._after, event.kv.mod_revision)
            before = self._before(event)
            self._forget_expiry(event.kv.key)
            if before is not None and before.problem:
                problems[before.problem] = False
            if event.type == pb.Event.PUT:
                known = self._keys.read(event.kv)
                if self._table is not None:
                    self._table[event.kv.key] = known
                if self._is_unknown(known):
                    self._unknown[known.etcd_lease] = None
                if known.lease is not None:
                    events.append(LeaseEvent(EventType.ADDED, known.lease))
                    continue
                problems[known.problem] = True
            elif self._table is not None:
                self._table.pop(event.kv.key, None)
            if before is not None and before.lease is not None:
                events.append(LeaseEvent(EventType.REMOVED, before.lease))
        skipped = tuple(line for line, holds in problems.items() if holds)
        mended = tuple(line for line, holds in problems.items() if not holds)
        return WatchBatch(self._after, tuple(events), skipped=skipped, mended=mended)

    def _before(self, event: pb.Event) -> Known | None:
        """What was under the event's key."""
        if self._table is not None:
            return self._table.get(event.kv.key)
        if event.HasField("prev_kv"):
            return self._keys.read(event.prev_kv)
        if event.type == pb.Event.DELETE:
            raise _DoubtError(f"etcd no longer knows what {event.kv.key!r} was")
        return None

    # -------------------------------------------------------------------------------------- the ends of leases

    def _is_unknown(self, known: Known) -> bool:
        return known.lease is not None and self._etcd_leases.is_unknown(known.etcd_lease)

    def _forget_expiry(self, key: bytes) -> None:
        """The key goes on to another etcd lease, or to none.  Else each renewal of each host would leave one behind."""
        known = None if self._table is None else self._table.get(key)
        if known is not None:
            self._etcd_leases.forget(known.etcd_lease)

    async def _ask(self) -> dict[int, float]:
        """Ask for some of the unknown expiries, slowly enough for etcd when all hosts do; see EXPIRY_LOOKUPS_PER_S."""
        pause_s = len(self._table or ()) / EXPIRY_LOOKUPS_PER_S
        found: dict[int, float] = {}
        for etcd_lease in list(self._unknown)[:_LOOKUPS_AT_ONCE]:
            await asyncio.sleep(random.uniform(0, 2 * pause_s))
            try:
                found[etcd_lease] = await self._etcd_leases.look_up(etcd_lease)
            except (LeaseError, ConfigError) as exc:
                log.debug("cannot look up an expiry error=%r", str(exc))
                await asyncio.sleep(_LOOKUP_RETRY_S)
                break
            self._unknown.pop(etcd_lease, None)
        return found

    def _take_expiries(self, found: dict[int, float]) -> WatchBatch | None:
        if self._table is None:
            return None
        events: list[LeaseEvent] = []
        for key, known in self._table.items():
            # Leases that were replaced while we asked hang on other etcd leases.
            if known.lease is not None and known.etcd_lease in found:
                self._etcd_leases.remember(known.etcd_lease, found[known.etcd_lease])
                lease = replace(known.lease, expires_s=found[known.etcd_lease])
                self._table[key] = replace(known, lease=lease)
                events.append(LeaseEvent(EventType.ADDED, lease))
        return WatchBatch(self._after, tuple(events)) if events else None

    # ----------------------------------------------------------------------------------- whether anything is missing

    async def _check(self) -> None:
        """Compare table and etcd now and then, by number and highest revision.  Raises _DoubtError when they differ."""
        while True:
            mean_s = CHECK_S + len(self._table or ()) / 10
            await asyncio.sleep(random.uniform(0.5, 1.5) * mean_s)
            if self._table is None:
                raise _DoubtError("the first check")
            after = self._after
            ours = len(self._table), max((it.mod_revision for it in self._table.values()), default=0)
            try:
                etcds = await self._count_and_highest(after)
            except RevisionGoneError as exc:
                if "compacted" not in str(exc):
                    raise
                # Our revision is compacted, as nothing has come for long.  So the present state should be the same.
                etcds = await self._count_and_highest(0)
                if self._after != after:
                    continue
            if etcds != ours:
                raise _DoubtError(
                    f"etcd has {etcds[0]} leases, the last of revision {etcds[1]}; we have {ours[0]} and {ours[1]}"
                )
            log.debug("lease table checked n_leases=%d revision=%d", *ours)

    async def _count_and_highest(self, revision: int) -> tuple[int, int]:
        """How many keys etcd had at `revision` (0: has now), and the revision of the last one written."""
        request = pb.RangeRequest(
            key=self._keys.first,
            range_end=self._keys.end,
            revision=revision,
            limit=1,
            sort_target=pb.RangeRequest.MOD,
            sort_order=pb.RangeRequest.DESCEND,
            keys_only=True,
        )
        response = await self._client.call(RANGE, request, "check the leases")
        return response.count, max((kv.mod_revision for kv in response.kvs), default=0)

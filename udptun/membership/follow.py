"""Follow the store: a snapshot whenever the table may lack anything, and a watch from there on.

A store drops what has expired by itself and says so.  While it answers, its word alone counts, and no clock of ours
takes a peer away.  What happens while it is away depends on where it is.

A server that is down gives no subnet to anybody else, and its time may stand still (`Store.is_remote`).  Every peer
stays, so that an outage of a day, in which nobody can renew, does not end all traffic.

A store that is on this host is away from us alone: the other daemons may go on with it.  So what has expired is
dropped.  When the store answers again it is asked for all leases, because it may know a later expiry that it has not
told us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.membership.lease_clock import LeaseClock
from udptun.membership.outage import Backoff, Outage
from udptun.membership.own import OwnLease
from udptun.membership.peers import Peers
from udptun.stores.base import Snapshot, Store, WatchBatch

CALM_S = 15.0
"""A watch that has not failed for so long works, even with nothing to report (a locked file fails after 10 s)."""

EXPIRY_CHECK_S = 1.0
"""How often `expire` looks."""


class Follower:
    """Brings what the store says to our lease and to the peers, and keeps `outage` up to date.

    `confirm` is awaited before anything that the store says is believed, while our lease is provisional.
    `must_list`: whether the table may lack what the store has and would not tell again.
    """

    def __init__(
        self,
        store: Store,
        own: OwnLease,
        peers: Peers,
        outage: Outage,
        confirm: Callable[[], Awaitable[None]],
        asking: asyncio.Lock,
        clock: LeaseClock,
        *,
        must_list: bool,
    ) -> None:
        self._store = store
        self._own = own
        self._peers = peers
        self._outage = outage
        self._confirm = confirm
        self._asking = asking
        self._clock = clock
        self._must_list = must_list
        self._is_failing = False
        """Whether the store did not answer when it was asked last."""
        self._revision = 0

    async def run(self) -> None:
        """Follow the store and its failures, until cancelled."""
        backoff = Backoff()
        while True:
            calm = None
            try:
                if self._own.is_provisional:
                    await self._confirm()
                while self._must_list:
                    await self.list()
                self._is_failing = False
                # A watch is silent while nothing changes, so only time tells whether it works.
                calm = asyncio.get_running_loop().call_later(CALM_S, self._answers)
                async with aclosing(self._store.watch(self._revision)) as batches:
                    async for batch in batches:
                        backoff.reset()
                        self._answers()
                        await self._take(batch)
            except (StoreUnavailableError, ConfigError) as exc:
                self._is_failing = True
                self._outage.goes_on(str(exc), "forwarding on with the last table")
                await backoff.sleep(len(self._peers.table.peers) if self._store.is_remote else 0)
            except Exception:
                # Run again, we know no longer what of the store's answer was used.
                self._must_list = True
                raise
            finally:
                if calm is not None:
                    calm.cancel()

    async def list(self) -> None:
        """Take over the store's present state.  Raises what `Store.snapshot` raises."""
        self._must_list = False  # what expires from here on sets it again
        try:
            async with self._asking:
                snapshot = await self._store.snapshot()
        except BaseException:
            self._must_list = True
            raise
        self._answers()
        await self._take_snapshot(snapshot)

    async def expire(self) -> None:
        """Drop what has expired while the store, which would say so itself, is away; until cancelled."""
        while True:
            now_s = self._clock.now_s()
            if self._is_failing and self._peers.has_expired(now_s):
                # Set before anything is awaited: `run` looks at it once more before it watches.
                self._must_list = True
                await self._peers.expire(now_s)
            await asyncio.sleep(EXPIRY_CHECK_S)

    def _answers(self) -> None:
        if self._outage.reason:
            self._own.retry_now()
        self._outage.end()

    async def _take(self, batch: WatchBatch) -> None:
        if batch.snapshot is not None:
            await self._take_snapshot(batch.snapshot)
            return
        await self._peers.update(batch)
        self._revision = batch.revision
        self._own.see_events(batch.events)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        await self._peers.reset(snapshot)
        self._revision = snapshot.revision
        self._own.see_snapshot(snapshot.leases)

"""Our place among the hosts: hold our own lease, and follow everyone else's.

The store says what is; `LeaseTable` decides what of it can be used; whoever made us is told the difference.  The last
good table is kept in the state directory for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path

from udptun import state
from udptun.allocate import Identity
from udptun.config import NetConf
from udptun.errors import KernelError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseTable
from udptun.stores.base import Choice, Chooser, Snapshot, Store, WatchBatch

log = logging.getLogger(__name__)

_RENEW_RETRY_S = 60.0
"""After a renewal that failed (flannel's)."""
_CLOCK_CHECK_S = 30.0
"""Sleep no longer than this towards a time of day: the clock may be set meanwhile."""
_EXPIRY_CHECK_S = 1.0
_SAVE_DELAY_S = 1.0
"""Collect changes this long before the table is written to disk."""
_LOGGED_EVENTS = 20
"""Peers named one by one in the log per change; of more only the number is."""
_RECONNECT_S = (0.1, 5.0)
"""First and longest wait before the store is asked again."""

PeersChanged = Callable[[Sequence[LeaseEvent]], Awaitable[None]]


class Membership:
    """Holds `own`, our lease, and `table`, the peers; tells `on_change` what to do about the latter.

    `margin_s`: renew so long before the lease expires.  The store stays the caller's.
    """

    def __init__(
        self,
        store: Store,
        conf: NetConf,
        me: Identity,
        state_dir: Path,
        margin_s: float,
        on_change: PeersChanged,
    ) -> None:
        self._store = store
        self._conf = conf
        self._me = me
        self._state_dir = state_dir
        self._margin_s = margin_s
        self._on_change = on_change
        self._own: Lease | None = None
        self._dirty = asyncio.Event()
        self._skipped: tuple[str, ...] = ()
        self._said: frozenset[str] = frozenset()
        self._revision = 0
        self.table = LeaseTable(conf.network, self._is_own)

    @property
    def own(self) -> Lease:
        """Our lease; only after `join`."""
        if self._own is None:
            raise LeaseError("no lease is held yet")
        return self._own

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line for each lease in the store that is not used, naming it and the reason."""
        return (*self._skipped, *(f"{key}: {reason}" for key, reason in self.table.refused.items()))

    async def join(self, attrs: LeaseAttrs, choose: Chooser) -> None:
        """Get our lease: the one we had, or a new one."""
        self._own = await self._store.claim(attrs, choose)
        log.info("lease acquired subnet=%s public_ip=%s store=%s", self.own.subnet, attrs.public_ip, self._store.name)

    async def recall(self) -> None:
        """Start from the table of the last run, until the store has told its own."""
        found = state.load(self._state_dir, self._conf.network, time.time())
        if found.last is None:
            log.debug("no last lease table reason=%r", found.reason)
            return
        await self._apply(self.table.reset(found.last.peers))
        log.info("peers recalled from the last run n_peers=%d", len(self.table.peers))

    async def catch_up(self) -> None:
        """Take over the store's present state."""
        await self._take_snapshot(await self._store.snapshot())

    async def run(self) -> None:
        """Follow the store, renew our lease, expire the others' and save the table, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(), name="follow leases")
                tasks.create_task(self._renew(), name="renew lease")
                tasks.create_task(self._expire(), name="expire leases")
                tasks.create_task(self._keep_saved(), name="save leases")
        finally:
            if self._dirty.is_set():
                self._save()

    async def release(self) -> None:
        """Give our lease back."""
        await self._store.release(self.own)

    def _is_own(self, lease: Lease) -> bool:
        own = self._own
        return (own is not None and lease.subnets == own.subnets) or self._me.owns(lease, self._conf.backend.port)

    async def _follow(self) -> None:
        wait_s, longest_s = _RECONNECT_S
        told = ""
        while True:
            try:
                async with aclosing(self._store.watch(self._revision)) as batches:
                    async for batch in batches:
                        await self._take_batch(batch)
                        if told:
                            log.info("lease store answers again store=%s", self._store.name)
                        wait_s, told = _RECONNECT_S[0], ""
            except StoreUnavailableError as exc:
                if str(exc) != told:
                    told = str(exc)
                    log.warning("lease store unavailable, forwarding on with the last table error=%r", told)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, longest_s)

    async def _take_batch(self, batch: WatchBatch) -> None:
        if batch.snapshot is not None:
            await self._take_snapshot(batch.snapshot)
            return
        self._revision = batch.revision
        self._say_skipped(batch.skipped)
        await self._apply(self.table.update(batch.events))
        for event in batch.events:
            if event.lease.key == self.own.key:
                await self._check_own(event)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        self._revision = snapshot.revision
        self._say_skipped(snapshot.skipped)
        await self._apply(self.table.reset(snapshot.leases))
        mine = next((lease for lease in snapshot.leases if lease.key == self.own.key), None)
        await self._check_own(
            LeaseEvent(EventType.REMOVED, self.own) if mine is None else LeaseEvent(EventType.ADDED, mine)
        )

    async def _check_own(self, event: LeaseEvent) -> None:
        """See to our own lease when the store says that it changed."""
        if event.type is EventType.ADDED:
            if event.lease.attrs == self.own.attrs:
                self._own = event.lease
            else:
                log.error(
                    "our subnet is leased to another node now subnet=%s public_ip=%s node_id=%s; forwarding on; "
                    "restart to lease another subnet",
                    event.lease.subnet,
                    event.lease.attrs.public_ip,
                    event.lease.attrs.node_id,
                )
            return
        log.warning("our lease is gone from the store, taking it again subnet=%s", self.own.subnet)
        try:
            self._own = await self._store.claim(self.own.attrs, self._same_subnet_again)
        except LeaseError as exc:
            log.error("cannot take our lease again, forwarding on subnet=%s error=%r", self.own.subnet, str(exc))

    def _same_subnet_again(self, leases: Sequence[Lease]) -> Choice:
        holder = next(
            (it for it in leases if it.subnet.overlaps(self.own.subnet) and it.attrs != self.own.attrs), None
        )
        if holder is not None:
            raise LeaseLostError(f"{self.own.subnet} is leased to {holder.attrs.public_ip} now")
        return Choice(self.own.subnets)

    async def _apply(self, events: list[LeaseEvent]) -> None:
        self._say_skipped(self._skipped)
        if not events:
            return
        await self._on_change(events)
        self._dirty.set()
        for event in events[:_LOGGED_EVENTS]:
            log.info(
                "peer %s subnet=%s public_ip=%s", event.type.value, event.lease.subnet, event.lease.attrs.public_ip
            )
        if len(events) > _LOGGED_EVENTS:
            log.info("peers changed n_more=%d n_peers=%d", len(events) - _LOGGED_EVENTS, len(self.table.peers))

    def _say_skipped(self, skipped: Iterable[str]) -> None:
        """One line for each item that is newly refused."""
        self._skipped = tuple(skipped)
        now = frozenset(self.skipped)
        for line in sorted(now - self._said):
            log.warning("lease skipped %s", line)
        self._said = now

    async def _renew(self) -> None:
        while True:
            expires_s = self.own.expires_s
            due_s = _CLOCK_CHECK_S if expires_s is None else expires_s - self._margin_s - time.time()
            if due_s > 0 or expires_s is None:
                await asyncio.sleep(min(due_s, _CLOCK_CHECK_S))
                continue
            try:
                self._own = await self._store.renew(self.own)
                self._dirty.set()
                log.info("lease renewed subnet=%s", self.own.subnet)
            except LeaseLostError as exc:
                log.error("our lease cannot be renewed, forwarding on error=%r", str(exc))
                await asyncio.sleep(_RENEW_RETRY_S)
            except StoreUnavailableError as exc:
                log.warning("our lease is not renewed yet, trying again in %.0f s error=%r", _RENEW_RETRY_S, str(exc))
                await asyncio.sleep(_RENEW_RETRY_S)

    async def _expire(self) -> None:
        while True:
            next_s = self.table.next_expiry_s()
            if next_s is not None and next_s <= time.time():
                await self._apply(self.table.expire(time.time()))
            await asyncio.sleep(_EXPIRY_CHECK_S)

    async def _keep_saved(self) -> None:
        self._dirty.set()
        while True:
            await self._dirty.wait()
            await asyncio.sleep(_SAVE_DELAY_S)
            self._save()

    def _save(self) -> None:
        self._dirty.clear()
        last = state.LastLeases(self._conf.network, self.own, tuple(self.table.peers.values()))
        try:
            state.save(self._state_dir, last, time.time())
        except KernelError as exc:
            log.warning("the lease table is not saved error=%r", str(exc))

"""Our place among the hosts: hold our own lease, and follow everyone else's.

The store says what is; `LeaseTable` decides what of it can be used; whoever made us is told the difference.  The last
good table is kept in the state directory for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

from udptun import state
from udptun.allocate import Identity
from udptun.config import NetConf
from udptun.errors import ConfigError, KernelError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseTable, validate
from udptun.stores.base import Choice, Chooser, Snapshot, Store, WatchBatch

log = logging.getLogger(__name__)

_RENEW_RETRY_S = 60.0
"""After a renewal, or taking a lost lease again, that failed (flannel's)."""
_CLOCK_CHECK_S = 30.0
"""Sleep no longer than this towards a time of day: the clock may be set meanwhile."""
_EXPIRY_CHECK_S = 1.0
_SAVE_DELAY_S = 1.0
"""Collect changes this long before the table is written to disk."""
_LOGGED_EVENTS = 20
"""Peers named one by one in the log per change; of more only the number is."""
_RECONNECT_S = (0.1, 5.0)
"""First and longest wait before the store is asked again."""
_CALM_S = 15.0
"""A watch that has not failed for so long works, even with nothing to report (a locked file fails after 10 s)."""
_CLAIM_PATIENCE_S = 0.3
"""How long a claim that was interrupted may take to end."""
_KEPT_SKIPPED = 100
"""How many lines about skipped items of the store are remembered."""

PeersChanged = Callable[[Sequence[LeaseEvent]], Awaitable[None]]


class Membership:
    """Holds `own`, our lease, and (from `join` on) `table`, the peers; tells `on_change` what to do about the latter.

    `margin_s`: renew so long before the lease expires.  `refusal` is the backend's: why a lease is no peer of it.  The
    store stays the caller's.
    """

    table: LeaseTable

    def __init__(
        self,
        store: Store,
        conf: NetConf,
        me: Identity,
        state_dir: Path,
        margin_s: float,
        refusal: Callable[[Lease], str | None],
        on_change: PeersChanged,
    ) -> None:
        self._store = store
        self._conf = conf
        self._me = me
        self._state_dir = state_dir
        self._margin_s = margin_s
        self._refusal = refusal
        self._on_change = on_change
        self._own: Lease | None = None
        self._is_lost = False
        """Whether the store no longer has our lease as we hold it."""
        self._own_news = asyncio.Event()
        self._own_problem = ""
        self._store_problem = ""
        self._dirty = asyncio.Event()
        self._skipped: tuple[str, ...] = ()
        self._said: frozenset[str] = frozenset()
        self._revision = 0
        self._claim: asyncio.Task[Lease] | None = None
        """The one of `join`."""
        self._held_before: frozenset[str] = frozenset()
        """The keys that were taken when `join` chose."""

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

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong with our lease or with the store right now."""
        return tuple(filter(None, (self._own_problem, self._store_problem)))

    async def join(self, attrs: LeaseAttrs, choose: Chooser) -> None:
        """Get our lease: the one we had, or a new one.  Raises ConfigError when it cannot be used."""
        seen: list[Lease] = []

        def choose_and_remember(leases: Sequence[Lease]) -> Choice:
            # Asked again, as after a lost race: the last answer counts.
            seen[:] = leases
            self._held_before = frozenset(lease.key for lease in leases)
            return choose(leases)

        self._claim = asyncio.create_task(self._store.claim(attrs, choose_and_remember), name="claim lease")
        # Shielded: a claim that is cancelled may happen all the same, and then `leave_if_new` has to know of it.
        self._own = own = await asyncio.shield(self._claim)
        self.table = LeaseTable(self._conf.network, own.subnet, self._is_own, self._refusal)
        for lease in seen:
            if self._me.owns(lease) and not self._is_ours(lease):
                log.warning(
                    "the lease of another node with our public_ip=%s and port=%s is ours now subnet=%s "
                    "its_node_id=%s our_node_id=%s; if that node is alive, give one of the two a --public-ip or a "
                    "Backend.Port of its own",
                    self._me.public_ip,
                    self._me.port,
                    lease.subnet,
                    lease.attrs.node_id,
                    self._me.node_id,
                )
        if (reason := validate(own, self._conf.network)) is not None:
            raise ConfigError(f"our lease in {self._store.name} cannot be used: {reason}")
        log.info("lease acquired subnet=%s public_ip=%s store=%s", own.subnet, attrs.public_ip, self._store.name)

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
                tasks.create_task(self._hold(), name="hold lease")
                if not self._store.is_remote:
                    tasks.create_task(self._expire(), name="expire leases")
                tasks.create_task(self._keep_saved(), name="save leases")
        finally:
            if self._dirty.is_set():
                self._save()

    async def leave_if_new(self) -> None:
        """Give our lease back unless somebody, or we in an earlier run, had it before `join`.

        When `join` was interrupted, its claim gets a moment to end.
        """
        if self._claim is None:
            return
        await asyncio.wait([self._claim], timeout=_CLAIM_PATIENCE_S)
        if not self._claim.done():
            self._claim.cancel()
        elif self._claim.exception() is None and self._claim.result().key not in self._held_before:
            await self._store.release(self._claim.result())

    def _is_own(self, lease: Lease) -> bool:
        return lease.subnets == self.own.subnets or self._me.owns(lease)

    def _is_ours(self, lease: Lease) -> bool:
        """Whether no other node can have written the lease; flannel's have no NodeID."""
        return self._me.owns(lease) and lease.attrs.node_id in (None, self._me.node_id)

    async def _follow(self) -> None:
        wait_s, longest_s = _RECONNECT_S
        while True:
            # A watch is silent while nothing changes, so that only time tells whether it works.
            calm = asyncio.get_running_loop().call_later(_CALM_S, self._store_answers)
            try:
                async with aclosing(self._store.watch(self._revision)) as batches:
                    async for batch in batches:
                        wait_s = _RECONNECT_S[0]
                        self._store_answers()
                        await self._take_batch(batch)
            except (StoreUnavailableError, ConfigError) as exc:
                if str(exc) != self._store_problem:
                    self._store_problem = str(exc)
                    log.warning("lease store unavailable, forwarding on with the last table error=%r", str(exc))
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, longest_s)
            finally:
                calm.cancel()

    def _store_answers(self) -> None:
        if self._store_problem:
            self._store_problem = ""
            log.info("lease store answers again store=%s", self._store.name)

    async def _take_batch(self, batch: WatchBatch) -> None:
        if batch.snapshot is not None:
            await self._take_snapshot(batch.snapshot)
            return
        self._revision = batch.revision
        self._say_skipped(tuple(dict.fromkeys((*self._skipped, *batch.skipped)))[-_KEPT_SKIPPED:])
        await self._apply(self.table.update(batch.events))
        for event in batch.events:
            if event.lease.key == self.own.key:
                self._check_own(event)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        self._revision = snapshot.revision
        self._say_skipped(snapshot.skipped)
        await self._apply(self.table.reset(snapshot.leases))
        mine = next((lease for lease in snapshot.leases if lease.key == self.own.key), None)
        self._check_own(LeaseEvent(EventType.REMOVED, self.own) if mine is None else LeaseEvent(EventType.ADDED, mine))

    def _check_own(self, event: LeaseEvent) -> None:
        """See what the store says about our own lease; `_hold` does what there is to do."""
        self._is_lost = event.type is EventType.REMOVED or event.lease.attrs != self.own.attrs
        if not self._is_lost:
            self._own, self._own_problem = event.lease, ""
        elif event.type is EventType.REMOVED:
            log.warning("our lease is gone from the store, taking it again subnet=%s", self.own.subnet)
        self._own_news.set()

    async def _hold(self) -> None:
        """Renew our lease by margin, and take it again when the store has lost it."""
        while True:
            expires_s = self.own.expires_s
            due_s = _CLOCK_CHECK_S if expires_s is None else expires_s - self._margin_s - time.time()
            if due_s > 0 and not self._is_lost:
                await self._wait_for_own_news(min(due_s, _CLOCK_CHECK_S))
                continue
            was_lost = self._is_lost
            try:
                await (self._take_again() if was_lost else self._renew())
            except (LeaseError, ConfigError) as exc:
                if isinstance(exc, LeaseLostError) and not was_lost:
                    self._is_lost = True
                    continue
                if str(exc) != self._own_problem:
                    self._own_problem = str(exc)
                    attempt = "taken again" if was_lost else "renewed"
                    log.error("our lease cannot be %s, forwarding on error=%r", attempt, str(exc))
                await self._wait_for_own_news(_RENEW_RETRY_S)

    async def _wait_for_own_news(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._own_news.wait()
        self._own_news.clear()

    async def _renew(self) -> None:
        self._own = await self._store.renew(self.own)
        self._own_problem = ""
        self._dirty.set()
        log.info("lease renewed subnet=%s", self.own.subnet)

    async def _take_again(self) -> None:
        lease = await self._store.claim(self.own.attrs, self._same_subnet_again)
        if lease.subnets != self.own.subnets:
            raise LeaseLostError(
                f"{self._store.name} gives this host {lease.subnet} now, not {self.own.subnet}; restart to use it"
            )
        self._own, self._is_lost, self._own_problem = lease, False, ""
        self._dirty.set()
        log.info("lease taken again subnet=%s", self.own.subnet)

    def _same_subnet_again(self, leases: Sequence[Lease]) -> Choice:
        for lease in leases:
            if lease.subnet.overlaps(self.own.subnet) and not self._is_ours(lease):
                raise LeaseLostError(
                    f"{self.own.subnet} is leased to {lease.attrs.public_ip} (node "
                    f"{lease.attrs.node_id or 'without id'}) now; restart to lease another subnet"
                )
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

"""A lease store in memory.  It keeps the contract of `udptun.stores.base`, and a test decides each of its answers.

The hands (`put`, `remove`, `write`, `spoil`, `replace_all`) change it from outside any store, as an operator would, on
whatever thread.  The switches (`fail`, `claim_waits`, `gives` ...) make one store object behave as a test needs it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from udptun.core.errors import LeaseError, LeaseLostError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, Subnets
from udptun.stores.base import (
    LEASE_TTL_S,
    Chooser,
    HostsWithoutNames,
    Snapshot,
    SubnetChoice,
    WatchBatch,
    dropped_by,
    is_same_node,
    reservation,
)

CONFIG = '{"Network": "10.244.0.0/16", "SubnetMax": "10.244.9.0"}'


class _Place:
    """What the stores on one place share: the leases, the events of the past, and who watches."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.leases: dict[str, Lease] = {}
        self.skipped: tuple[str, ...] = ()
        self.revision = 0
        self.ends_leases = False
        self._history: list[WatchBatch] = []
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def change(
        self,
        put: Iterable[Lease] = (),
        remove: Iterable[Lease] = (),
        skipped: tuple[str, ...] = (),
        mended: tuple[str, ...] = (),
    ) -> None:
        """One revision; removals are told first."""
        with self.lock:
            revision = self.revision + 1
            written = [replace(lease, revision=revision) for lease in put]
            gone = [self.leases.pop(lease.key) for lease in remove]
            self.leases |= {lease.key: lease for lease in written}
            self.skipped = (*(line for line in self.skipped if line not in mended), *skipped)
            events = [LeaseEvent(EventType.REMOVED, lease) for lease in gone]
            events += [LeaseEvent(EventType.ADDED, lease) for lease in written]
            self.tell(WatchBatch(revision, tuple(events), skipped=skipped, mended=mended))

    def tell(self, batch: WatchBatch) -> None:
        self.revision = batch.revision
        self._history.append(batch)
        self.wake()

    def wake(self) -> None:
        """Have every watch look."""
        for changed, loop in list(self._watchers.items()):
            # A loop that has ended meanwhile has no watch.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._watchers[changed] = asyncio.get_running_loop()
        try:
            yield changed
        finally:
            del self._watchers[changed]

    def snapshot(self) -> Snapshot:
        with self.lock:
            return Snapshot(self.revision, tuple(self.leases.values()), self.skipped)

    def since(self, after: int) -> list[WatchBatch]:
        """What a watch that has seen `after` has to be told: a snapshot where the history does not reach back."""
        with self.lock:
            told = [batch for batch in self._history if batch.revision > after]
            if len(told) == self.revision - after:
                return told
            return [WatchBatch(self.revision, snapshot=self.snapshot())]

    def lose_history(self) -> None:
        with self.lock:
            self._history.clear()

    def expire(self) -> float | None:
        """Remove what has expired; seconds until there is more."""
        if not self.ends_leases:
            return None
        with self.lock:
            now_s = time.time()
            if expired := [lease for lease in self.leases.values() if lease.is_expired(now_s)]:
                self.change(remove=expired)
            ends_s = [lease.expires_s for lease in self.leases.values() if lease.expires_s is not None]
            return min(ends_s) - now_s if ends_s else None


class FakeStore(HostsWithoutNames):
    """See the module's text; `another` makes one more store on the same place.

    A lease ends when a test takes it out, or by itself with `ends_leases`.
    """

    def __init__(self, *leases: Lease, config: str = CONFIG, place: _Place | None = None) -> None:
        self.name = "fake"
        self.config_name = "fake/config"
        self.is_remote = self.is_config_remote = False
        self.keeps_backend_data = self.keeps_ipv6_alone = True
        self.config = config
        self.fail: Exception | None = None
        """What every reading call raises, and a watch that has begun (see `break_down`)."""
        self.fail_writes: Exception | None = None
        """What `claim` and `renew` raise."""
        self.claim_waits: asyncio.Event | None = None
        """`claim` and `renew` do nothing before it is set."""
        self.ttl_s: float | None = None
        """How long leases last, whatever is asked for."""
        self.gives: Subnets | None = None
        """As with a leases file, a claim gets these and the chooser is not asked."""
        self.claims = self.renewals = self.watches = 0
        """How often each was called."""
        self._place = place or _Place()
        if leases:
            self.put(*leases)

    def another(self) -> FakeStore:
        return FakeStore(config=self.config, place=self._place)

    # ------------------------------------------------------------------------------------------- the contract

    async def network_config(self) -> str:
        self._check(self.fail)
        return self.config

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        self._check(self.fail)
        self._place.expire()
        return self._place.snapshot()

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        self.watches += 1
        with self._place.watched() as changed:
            while True:
                self._check(self.fail)
                next_s = self._place.expire()
                changed.clear()
                for batch in self._place.since(after):
                    after = batch.revision
                    yield batch
                with suppress(TimeoutError):
                    async with asyncio.timeout(next_s):
                        await changed.wait()

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        self.claims += 1
        await self._may_write()
        with self._place.lock:
            self._place.expire()
            choice = SubnetChoice(self.gives) if self.gives else choose(tuple(self.leases.values()))
            dropped, is_reserved = dropped_by(choice, self.leases.values())
            return self._write(choice.subnets, attrs, None if is_reserved else ttl_s, dropped)

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        self.renewals += 1
        await self._may_write()
        with self._place.lock:
            self._place.expire()
            holder = self.leases.get(lease.key)
            if holder is None or not is_same_node(holder.attrs, lease.attrs):
                raise LeaseLostError(f"cannot renew {lease.subnet}")
            return self._write(lease.subnets, lease.attrs, ttl_s)

    async def release(self, lease: Lease) -> None:
        with self._place.lock:
            holder = self.leases.get(lease.key)
            if holder and not holder.is_reservation and is_same_node(holder.attrs, lease.attrs):
                self.remove(holder)

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        with self._place.lock:
            self.put(Lease(subnets, reservation(self.leases.values(), subnets, attrs)))
            return self.leases[subnets.key]

    async def delete(self, lease: Lease) -> None:
        with self._place.lock:
            holder = self.leases.get(lease.key)
            if holder is None or holder.revision != lease.revision:
                raise LeaseError(f"cannot delete {lease.subnet}: it has changed")
            self.remove(holder)

    async def aclose(self) -> None:
        pass

    async def _may_write(self) -> None:
        if self.claim_waits is not None:
            await self.claim_waits.wait()
        self._check(self.fail_writes)

    def _write(self, subnets: Subnets, attrs: LeaseAttrs, ttl_s: float | None, drop: Sequence[Lease] = ()) -> Lease:
        there = self.leases.get(subnets.key)
        is_reserved = ttl_s is None or (there is not None and there.is_reservation)
        expires_s = None if is_reserved else time.time() + (ttl_s if self.ttl_s is None else self.ttl_s)
        self._place.change(put=[Lease(subnets, attrs, expires_s)], remove=drop)
        return self.leases[subnets.key]

    @staticmethod
    def _check(error: Exception | None) -> None:
        if error is not None:
            raise error

    # --------------------------------------------------------------------------------------------------- hands

    @property
    def leases(self) -> dict[str, Lease]:
        """What is there, by key.  What a test changes in it nobody is told."""
        return self._place.leases

    @property
    def revision(self) -> int:
        """Grows by one with each change."""
        return self._place.revision

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the next snapshot says of items that are no leases."""
        return self._place.skipped

    @skipped.setter
    def skipped(self, lines: tuple[str, ...]) -> None:
        self._place.skipped = lines

    @property
    def ends_leases(self) -> bool:
        """Whether leases end by themselves when they have expired, for all stores of the place."""
        return self._place.ends_leases

    @ends_leases.setter
    def ends_leases(self, value: bool) -> None:
        self._place.ends_leases = value

    def has(self, lease: Lease) -> bool:
        """Whether it is there as a test made it, whatever its revision."""
        there = self.leases.get(lease.key)
        return there is not None and replace(there, revision=lease.revision) == lease

    def put(self, *leases: Lease) -> None:
        """Write them over whatever is there."""
        self._place.change(put=leases)

    def remove(self, lease: Lease) -> None:
        self._place.change(remove=[lease])

    def write(self, *leases: Lease) -> None:
        """Have these and no others, and tell the difference."""
        with self._place.lock:
            wanted = {lease.key for lease in leases}
            gone = [lease for key, lease in self.leases.items() if key not in wanted]
            put = [lease for lease in leases if not self.has(lease)]
            self._place.change(put=put, remove=gone, mended=self._place.skipped)

    def spoil(self, key: str, line: str) -> None:
        """Make no lease of what is under `key`; `line` says why it is none."""
        self._place.change(remove=[self.leases[key]], skipped=(line,))

    def replace_all(self, *leases: Lease) -> None:
        """Have these and no others, and tell it as a store does that has lost its history: by a snapshot."""
        with self._place.lock:
            revision = self._place.revision + 1
            self._place.leases = {lease.key: replace(lease, revision=revision) for lease in leases}
            whole = replace(self._place.snapshot(), revision=revision)
            self._place.tell(WatchBatch(revision, snapshot=whole))

    def lose_history(self) -> None:
        """A watch from an earlier revision gets a snapshot."""
        self._place.lose_history()

    def break_down(self, error: Exception | None) -> None:
        """Fail, the running watch too; with None work again."""
        self.fail = error
        self._place.wake()

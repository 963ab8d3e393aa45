"""The local store's operations on its SQLite file.

The store is for daemons in the namespaces of one machine: the lab, tests, a first try.  Every process opens the file by
itself, and SQLite's locks and shared memory do the rest.  So all must see the same *directory*, because the `-wal` and
`-shm` files beside the database belong to it, on a filesystem of this machine.

What makes it exact:

* Every change of a row is one revision and one event, whoever makes it (`schema.py`).
* A watcher reads the revision, and the events above the one it has seen.  When some of them were pruned, the watcher
  gets a snapshot, like after a compaction of etcd.
* Whoever looks (a watch, a snapshot, a claim) deletes what has expired.  That is one transaction, so there is one
  removal event.
* A change that was acknowledged survives kill -9 and power loss (`database.py`).

A row whose `expires` is NULL is a reservation: it never expires, and stays one when its host claims and renews it.  An
operator makes one with `udptun lease reserve`.

All SQLite calls run on one thread that the store owns.  The event loop must not wait for another process's lock.  With
one thread a connection needs no lock of ours.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

from udptun.core.errors import LeaseError, LeaseLostError
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.stores.base import (
    LEASE_TTL_S,
    Chooser,
    HostsWithoutNames,
    Snapshot,
    WatchBatch,
    dropped_by,
    is_same_node,
    read_network_config,
    reservation,
)
from udptun.stores.local import rows
from udptun.stores.local.database import Database, transaction

T = TypeVar("T")

POLL_S = 0.05
"""How often a watch looks whether anybody has written to the file, seconds."""

_READ_S = 1.0
"""How often a watch reads the revision all the same.  That takes 0.6 ms, most of it the way to the thread and back."""


class LocalStore(HostsWithoutNames):
    """See the module's text and `udptun.stores.base.Store`.

    Opens nothing before the first call.  `clock` gives Unix seconds; set back, it makes leases last longer and does no
    other harm.
    """

    def __init__(self, path: Path, net_config_path: Path, clock: Callable[[], float] = time.time) -> None:
        self.name = f"local:{path}"
        self.config_name = str(net_config_path)
        self.is_remote = self.is_config_remote = False
        self.keeps_backend_data = self.keeps_ipv6_alone = True
        self._net_config_path = net_config_path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lease-store")
        # Both are used on self._thread only.
        self._database = Database(path, clock)
        self._unreadable_at = 0
        """The revision of the last snapshot with rows that are no leases."""
        self._first_expiry_s = inf
        """When the next lease ends, as far as `_expire` has seen."""

    async def network_config(self) -> str:
        return read_network_config(self._net_config_path)

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        def work(db: sqlite3.Connection) -> Snapshot:
            self._expire(db)
            with transaction(db, "deferred"):
                return self._read_snapshot(db)

        return await self._run("list the leases", work)

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        now_s = asyncio.get_running_loop().time
        while True:
            traces, read_s = self._database.traces(), now_s()
            batch = await self._run("watch the leases", partial(self._changes, after))
            if batch is not None:
                after = batch.revision
                yield batch
                continue
            while True:
                await asyncio.sleep(POLL_S)
                if now_s() >= read_s + _READ_S or self._clock() >= self._first_expiry_s:
                    break
                if traces is None or self._database.traces() != traces:
                    break

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """As the contract says; `choose` is called once, on the store's thread, under the write lock."""

        def work(db: sqlite3.Connection) -> Lease:
            with transaction(db, "immediate"):
                now_s = self._clock()
                rows.delete_expired(db, now_s)
                leases, _ = rows.read_leases(db)
                choice = choose(leases)
                dropped, is_reserved = dropped_by(choice, leases)
                db.executemany("delete from leases where key = ?", [(lease.key,) for lease in dropped])
                return rows.write(db, choice.subnets, attrs, None if is_reserved else now_s + ttl_s)

        return await self._run("claim a subnet", work)

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        def work(db: sqlite3.Connection) -> Lease:
            with transaction(db, "immediate"):
                now_s = self._clock()
                holder = rows.holder(db, lease.key, now_s)
                if holder is None:
                    raise LeaseLostError(f"cannot renew {lease.subnet}: it is no longer in {self.name}; claim again")
                if not is_same_node(holder.attrs, lease.attrs):
                    raise LeaseLostError(
                        f"cannot renew {lease.subnet}: in {self.name} it belongs to {holder.attrs.host_address} "
                        f"(node {holder.attrs.node_id or 'without id'}); claim again"
                    )
                return rows.write(db, lease.subnets, lease.attrs, now_s + ttl_s)

        return await self._run(f"renew {lease.subnet}", work)

    async def release(self, lease: Lease) -> None:
        def work(db: sqlite3.Connection) -> None:
            with transaction(db, "immediate"):
                holder = rows.holder(db, lease.key, self._clock())
                if holder and not holder.is_reservation and is_same_node(holder.attrs, lease.attrs):
                    db.execute("delete from leases where key = ?", (lease.key,))

        await self._run(f"release {lease.subnet}", work)

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        def work(db: sqlite3.Connection) -> Lease:
            with transaction(db, "immediate"):
                rows.delete_expired(db, self._clock())
                leases, _ = rows.read_leases(db)
                return rows.write(db, subnets, reservation(leases, subnets, attrs), None)

        return await self._run(f"reserve {subnets.first}", work)

    async def delete(self, lease: Lease) -> None:
        def work(db: sqlite3.Connection) -> None:
            found = db.execute("delete from leases where key = ? and revision = ?", (lease.key, lease.revision))
            if not found.rowcount:
                raise LeaseError(f"cannot delete {lease.subnet} in {self.name}: it has changed; look again")

        await self._run(f"delete {lease.subnet}", work)

    async def aclose(self) -> None:
        self._database.is_closing = True
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        # shutdown() first: it lets run what was queued before, and afterwards nothing opens the file again.
        self._thread.shutdown(wait=True)
        self._database.close()

    async def _run(self, operation: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """`Database.run` on the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._database.run, operation, work)

    def _expire(self, db: sqlite3.Connection) -> None:
        """Delete what has expired; takes the write lock only when there is something to delete."""
        now_s = self._clock()
        self._first_expiry_s = rows.first_expiry(db)
        if self._first_expiry_s <= now_s:
            with transaction(db, "immediate"):
                rows.delete_expired(db, now_s)
            self._first_expiry_s = rows.first_expiry(db)

    def _changes(self, after: int, db: sqlite3.Connection) -> WatchBatch | None:
        """What has changed since revision `after`; None when nothing has."""
        self._expire(db)
        if rows.read_revision(db) == after:
            return None
        with transaction(db, "deferred"):
            revision = rows.read_revision(db)
            # An event does not say whether the row was unreadable before.
            events = None if after <= self._unreadable_at else rows.read_events(db, after, revision)
            if events is None:
                return WatchBatch(revision, snapshot=self._read_snapshot(db))
            return WatchBatch(revision, events)

    def _read_snapshot(self, db: sqlite3.Connection) -> Snapshot:
        snapshot = rows.read_snapshot(db)
        if snapshot.skipped:
            self._unreadable_at = snapshot.revision
        return snapshot

"""The `local` store: leases of one machine in one SQLite file.

For daemons in the namespaces of one machine: the lab, tests, a first try.  Every process opens the file by
itself; SQLite's locks and shared memory do the rest, so all must see the same *directory* (the `-wal` and
`-shm` files beside the database belong to it) on a filesystem of this machine.

What makes it exact:

* The schema's triggers turn every change of a row into one revision and one event, whoever makes it: a claim,
  an expiry, a person with the sqlite3 shell.  Change and event are one transaction.
* A watcher reads the revision, and the events above the one it has seen.  Events are numbered without gaps;
  when some are missing they were pruned (HISTORY), and the watcher gets a snapshot, like etcd after a
  compaction.
* Whoever looks (a watch, a snapshot, a claim) deletes what has expired: one transaction, hence one removal
  event.
* WAL mode with synchronous=FULL: a change that was acknowledged survives kill -9 and power loss.
* A new file starts at the Unix time in microseconds, not at 1: a file that was deleted and made anew never
  repeats a revision that a watcher has seen.

A row whose `expires` is NULL is a reservation: it never expires, and stays one when its host claims and
renews it. An operator makes one with `udptun lease reserve`.

All SQLite calls run on one thread that the store owns: a call may wait for another process's lock, and the
event loop must not; one thread, because a connection then needs no lock of ours.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from udptun.core.errors import ConfigError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseFormatError, Subnets
from udptun.stores.base import (
    LEASE_TTL_S,
    Chooser,
    Snapshot,
    WatchBatch,
    is_same_node,
    read_network_config,
    reason,
    reservation,
)

T = TypeVar("T")

POLL_S = 0.05
"""How often a watch looks for a new revision, seconds; a look takes 0.2 ms, nearly all of it the hop to the thread."""

BUSY_S = 10.0
"""How long a call waits for other processes' locks before it gives up, seconds."""

_BUSY_LOOK_S = 0.2
"""How often it looks meanwhile whether the store is being closed: nothing interrupts SQLite's own waiting."""

HISTORY = 10_000
"""How many events are kept for watchers that fall behind."""

_APPLICATION_ID = 0x75647074
"""SQLite's application_id: marks the file as ours ("udpt")."""

_SCHEMA_VERSION = 1

_LOG_CHANGE = """
        update meta set revision = revision + 1;
        insert into events select revision, {removed}, {row}.key, {row}.value, {row}.expires from meta;
        delete from events where revision <= (select revision from meta) - {history};"""

_SET_REVISION = "update leases set revision = (select revision from meta) where key = new.key;"

_SCHEMA = {
    "meta": "create table meta (revision integer not null)",
    "leases": """create table leases (
        key text primary key not null,      -- flannel's: 10.244.3.0-24
        value text not null,                -- flannel's JSON
        expires real,                       -- Unix seconds; null never expires
        revision integer not null default 0 -- set by the triggers
    )""",
    "leases_by_expiry": "create index leases_by_expiry on leases (expires)",
    "events": """create table events (
        revision integer primary key, removed integer not null, key text not null, value text not null,
        expires real
    )""",
    "lease_added": f"""create trigger lease_added after insert on leases begin
        {_LOG_CHANGE.format(removed=0, row="new", history=HISTORY)}
        {_SET_REVISION}
    end""",
    # Not fired by _SET_REVISION, which writes neither column.
    "lease_rewritten": f"""create trigger lease_rewritten after update of value, expires on leases begin
        {_LOG_CHANGE.format(removed=0, row="new", history=HISTORY)}
        {_SET_REVISION}
    end""",
    "lease_removed": f"""create trigger lease_removed after delete on leases begin
        {_LOG_CHANGE.format(removed=1, row="old", history=HISTORY)}
    end""",
    "lease_key_fixed": """create trigger lease_key_fixed before update of key on leases
        when new.key is not old.key begin
        select raise(abort, 'a lease keeps its key: delete the row and insert another');
    end""",
}

_COLUMNS = "key, value, expires, revision"

# In the conflict clause a bare column is the row that is there, `excluded` the one that was to be inserted.
_WRITE = """insert into leases (key, value, expires) values (?, ?, ?) on conflict (key) do update
    set value = excluded.value, expires = case when expires is null then null else excluded.expires end"""


class LocalStore:
    """See the module's text and `udptun.stores.base.Store`.

    Opens nothing before the first call, and creates the file (not its directory) when there is none.  A file
    that is damaged or not ours is never touched: ConfigError says what to do with it.  `clock` gives Unix
    seconds; set back, it makes leases last longer and does no other harm.
    """

    def __init__(self, path: Path, net_config_path: Path, clock: Callable[[], float] = time.time) -> None:
        self.name = f"local:{path}"
        self.config_name = str(net_config_path)
        self.is_remote = False
        self._path = path
        self._net_config_path = net_config_path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lease-store")
        self._is_closing = False  # read on self._thread
        self._db: sqlite3.Connection | None = None  # used on self._thread only
        self._file: tuple[int, int] | None = None  # device and inode that self._db has open

    async def network_config(self) -> str:
        return read_network_config(self._net_config_path)

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        def work(db: sqlite3.Connection) -> Snapshot:
            self._expire(db)
            with _transaction(db, "deferred"):
                return _read_snapshot(db)

        return await self._run("list the leases", work)

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        while True:
            batch = await self._run("watch the leases", partial(self._changes, after))
            if batch is None:
                await asyncio.sleep(POLL_S)
            else:
                after = batch.revision
                yield batch

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """As the contract says; `choose` is called once, on the store's thread, under the write lock."""

        def work(db: sqlite3.Connection) -> Lease:
            with _transaction(db, "immediate"):
                now_s = self._clock()
                _delete_expired(db, now_s)
                leases, _ = _read_leases(db)
                choice = choose(leases)
                db.executemany("delete from leases where key = ?", [(key,) for key in choice.drop])
                return _write(db, choice.subnets, attrs, now_s + ttl_s)

        return await self._run("claim a subnet", work)

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        def work(db: sqlite3.Connection) -> Lease:
            with _transaction(db, "immediate"):
                now_s = self._clock()
                holder = _holder(db, lease.key, now_s)
                if holder is None:
                    raise LeaseLostError(f"cannot renew {lease.subnet}: it is no longer in {self.name}; claim again")
                if not is_same_node(holder.attrs, lease.attrs):
                    raise LeaseLostError(
                        f"cannot renew {lease.subnet}: in {self.name} it belongs to {holder.attrs.public_ip} "
                        f"(node {holder.attrs.node_id or 'without id'}); claim again"
                    )
                return _write(db, lease.subnets, lease.attrs, now_s + ttl_s)

        return await self._run(f"renew {lease.subnet}", work)

    async def release(self, lease: Lease) -> None:
        def work(db: sqlite3.Connection) -> None:
            with _transaction(db, "immediate"):
                holder = _holder(db, lease.key, self._clock())
                if holder and holder.expires_s is not None and is_same_node(holder.attrs, lease.attrs):
                    db.execute("delete from leases where key = ?", (lease.key,))

        await self._run(f"release {lease.subnet}", work)

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        def work(db: sqlite3.Connection) -> Lease:
            with _transaction(db, "immediate"):
                _delete_expired(db, self._clock())
                leases, _ = _read_leases(db)
                return _write(db, subnets, reservation(leases, subnets, attrs), None)

        return await self._run(f"reserve {subnets.ipv4}", work)

    async def delete(self, lease: Lease) -> None:
        def work(db: sqlite3.Connection) -> None:
            found = db.execute("delete from leases where key = ? and revision = ?", (lease.key, lease.revision))
            if not found.rowcount:
                raise LeaseError(f"cannot delete {lease.subnet} in {self.name}: it has changed; look again")

        await self._run(f"delete {lease.subnet}", work)

    async def aclose(self) -> None:
        self._is_closing = True
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        # shutdown() first: what was queued before still runs, and nothing opens the file again afterwards.
        self._thread.shutdown(wait=True)
        self._disconnect()

    async def _run(self, operation: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on the store's thread; `operation` completes "cannot ..." in the message of a failure."""

        def guarded() -> T:
            deadline_s = time.monotonic() + BUSY_S
            while True:
                try:
                    return work(self._connection())
                except sqlite3.Error as exc:
                    if _primary_code(exc) == sqlite3.SQLITE_BUSY:
                        # `work` is one transaction, and none of it has happened.
                        if not self._is_closing and time.monotonic() < deadline_s:
                            continue
                    else:
                        self._disconnect()
                    raise _explain(exc, operation, self._path) from exc

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    def _connection(self) -> sqlite3.Connection:
        """The open file, opened anew when it was deleted or replaced since the last call."""
        file = _inspect(self._path)
        if self._db is not None and file == self._file:
            return self._db
        self._disconnect()
        # The connection is closed by whichever thread calls aclose(), after this one has ended.
        db = sqlite3.connect(self._path, timeout=_BUSY_LOOK_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, self._path, self._clock())
            self._file = _inspect(self._path)
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _expire(self, db: sqlite3.Connection) -> None:
        """Delete what has expired; takes the write lock only when there is something to delete."""
        now_s = self._clock()
        if db.execute("select 1 from leases where expires <= ? limit 1", (now_s,)).fetchone():
            with _transaction(db, "immediate"):
                _delete_expired(db, now_s)

    def _changes(self, after: int, db: sqlite3.Connection) -> WatchBatch | None:
        self._expire(db)
        if _read_revision(db) == after:
            return None
        with _transaction(db, "deferred"):
            revision = _read_revision(db)
            rows = db.execute(
                f"select removed, {_COLUMNS} from events where revision > ? order by revision",
                (after,),
            ).fetchall()
            if len(rows) != revision - after:  # pruned, or another file took this one's place
                return WatchBatch(revision, snapshot=_read_snapshot(db))
            try:
                events = [
                    LeaseEvent(EventType.REMOVED if removed else EventType.ADDED, _parse(*row))
                    for removed, *row in rows
                ]
            except LeaseFormatError:
                # Spoilt by hand: what it was when it was good is not in the event.
                return WatchBatch(revision, snapshot=_read_snapshot(db))
            return WatchBatch(revision, tuple(events))


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """`immediate` takes the write lock at once, waiting for it; `deferred` reads one state of the file."""
    db.execute(f"begin {kind}")
    try:
        yield
        db.execute("commit")
    finally:
        if db.in_transaction:
            db.rollback()


def _read_revision(db: sqlite3.Connection) -> int:
    row = db.execute("select revision from meta").fetchone()
    if row is None or not isinstance(row[0], int):
        raise sqlite3.DatabaseError("table meta holds no revision")
    return row[0]


def _read_leases(db: sqlite3.Connection) -> tuple[list[Lease], list[str]]:
    """Every lease, and a line for each row that is none; a spoilt row costs only itself."""
    leases: list[Lease] = []
    skipped: list[str] = []
    for row in db.execute(f"select {_COLUMNS} from leases order by key"):
        try:
            leases.append(_parse(*row))
        except LeaseFormatError as exc:
            skipped.append(f"lease {row[0]!r}: {exc}")
    return leases, skipped


def _read_snapshot(db: sqlite3.Connection) -> Snapshot:
    leases, skipped = _read_leases(db)
    return Snapshot(_read_revision(db), tuple(leases), tuple(skipped))


def _parse(key: object, value: object, expires: object, revision: object) -> Lease:
    """The lease in a row, whose columns hold whatever a hand has put there.  Raises LeaseFormatError."""
    if not isinstance(key, str) or not isinstance(value, str):
        raise LeaseFormatError("key and value must be text")
    if not (expires is None or isinstance(expires, int | float)):
        raise LeaseFormatError(f"expires is {expires!r}, not a Unix time in seconds")
    if not isinstance(revision, int):
        raise LeaseFormatError(f"revision is {revision!r}, not a whole number")
    return Lease(Subnets.from_key(key), LeaseAttrs.from_json(value), expires, revision)


def _delete_expired(db: sqlite3.Connection, now_s: float) -> None:
    db.execute("delete from leases where expires <= ?", (now_s,))


def _holder(db: sqlite3.Connection, key: str, now_s: float) -> Lease | None:
    """The valid lease under `key`; None when there is none or the row is unreadable."""
    _delete_expired(db, now_s)
    row = db.execute(f"select {_COLUMNS} from leases where key = ?", (key,)).fetchone()
    try:
        return None if row is None else _parse(*row)
    except LeaseFormatError:
        return None


def _write(db: sqlite3.Connection, subnets: Subnets, attrs: LeaseAttrs, expires_s: float | None) -> Lease:
    """Write the row and return it as it stands then: revision set, a reservation still without expiry."""
    db.execute(_WRITE, (subnets.key, attrs.to_json(), expires_s))
    expires, revision = db.execute("select expires, revision from leases where key = ?", (subnets.key,)).fetchone()
    return Lease(subnets, attrs, expires, revision)


def _inspect(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`, None when there is none yet.

    Raises ConfigError when SQLite could not use it: SQLite answers all of these with "unable to open database
    file", or opens the file for reading and fails later.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(
                f"cannot open the lease store {path}: there is no directory {path.parent}; create it"
            ) from None
        found = None
    except OSError as exc:
        raise ConfigError(
            f"cannot open the lease store {path}: {reason(exc)}; name a file in --store local:PATH"
        ) from exc
    else:
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"cannot open the lease store {path}: it is not a regular file; name a file in --store local:PATH"
            )
        found = (status.st_dev, status.st_ino)
    for place in [path.parent] if found is None else [path, path.parent]:
        if not os.access(place, os.R_OK | os.W_OK, effective_ids=True):
            raise ConfigError(
                f"cannot open the lease store {path}: {place} is not writable; SQLite must write the file "
                "and create others beside it: grant that, or name another place in --store local:PATH"
            )
    return found


def _prepare(db: sqlite3.Connection, path: Path, now_s: float) -> None:
    """Check that the file is sound and ours, give an empty one its schema; a foreign file is not changed."""
    # A hand may have put anything into a text column; one such row must not end a query.
    db.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    if _is_empty(db):
        _create(db, now_s)
    (application_id,) = db.execute("pragma application_id").fetchone()
    if application_id != _APPLICATION_ID:
        raise ConfigError(
            f"cannot open the lease store {path}: it is the SQLite database of another program "
            f"(application_id {application_id:#x}); name another file in --store local:PATH"
        )
    (version,) = db.execute("pragma user_version").fetchone()
    if version != _SCHEMA_VERSION:
        raise ConfigError(
            f"cannot open the lease store {path}: it has schema {version}, not {_SCHEMA_VERSION}; "
            "run the udptun that wrote it, or name another file in --store local:PATH"
        )
    present = {name for (name,) in db.execute("select name from sqlite_master")}
    missing = sorted(_SCHEMA.keys() - present)
    if missing:
        raise sqlite3.DatabaseError(f"the schema lacks {', '.join(missing)}")
    # SQLite reads only the pages a query needs; without this, damage would show in some later claim.
    (verdict,) = db.execute("pragma quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(" ".join(verdict.removeprefix("*** in database main ***").split()))
    _read_revision(db)
    db.execute("pragma synchronous = full")


def _is_empty(db: sqlite3.Connection) -> bool:
    """Whether the file is nobody's yet: new, or its maker was killed before the first commit."""
    if db.execute("pragma application_id").fetchone() != (0,):
        return False
    return db.execute("select 1 from sqlite_master limit 1").fetchone() is None


def _create(db: sqlite3.Connection, now_s: float) -> None:
    deadline_s = time.monotonic() + BUSY_S
    while True:
        try:
            (mode,) = db.execute("pragma journal_mode = wal").fetchone()
            break
        except sqlite3.OperationalError as exc:
            # The change of mode needs the file alone and does not wait for it: another process is at it, too.
            if _primary_code(exc) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise sqlite3.DatabaseError(f"the filesystem cannot do WAL mode (journal mode stays {mode})")
    with _transaction(db, "immediate"):
        if _is_empty(db):  # else the other process was first
            for statement in _SCHEMA.values():
                db.execute(statement)
            db.execute("insert into meta values (?)", (int(now_s * 1e6),))
            db.execute(f"pragma application_id = {_APPLICATION_ID}")
            db.execute(f"pragma user_version = {_SCHEMA_VERSION}")


def _primary_code(exc: sqlite3.Error) -> int | None:
    """SQLite's result code without its extension; None when Python raised the error by itself, or we did."""
    code: int | None = getattr(exc, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


_TRANSIENT = {
    sqlite3.SQLITE_BUSY: "another process holds it locked; trying again",
    sqlite3.SQLITE_LOCKED: "another process holds it locked; trying again",
    sqlite3.SQLITE_PROTOCOL: "another process holds it locked; trying again",
    sqlite3.SQLITE_FULL: "make room on its filesystem; trying again",
    sqlite3.SQLITE_IOERR: "look at the kernel's log for its disk; trying again",
    sqlite3.SQLITE_NOMEM: "out of memory; trying again",
    sqlite3.SQLITE_CANTOPEN: "it may be out of descriptors, or the file a link to nowhere; trying again",
}


def _explain(exc: sqlite3.Error, operation: str, path: Path) -> LeaseError | ConfigError:
    """What a failure of SQLite means to the caller (see `udptun.stores.base`), in one line."""
    name = getattr(exc, "sqlite_errorname", None)
    said = f"cannot {operation} in {path}: {exc}" + (f" ({name})" if name else "")
    code = _primary_code(exc)
    if name == "SQLITE_IOERR_SHMSIZE":  # how a full filesystem shows when the -shm file is to be made
        code = sqlite3.SQLITE_FULL
    if code in _TRANSIENT:
        return StoreUnavailableError(f"{said}; {_TRANSIENT[code]}")
    if code == sqlite3.SQLITE_READONLY:
        return ConfigError(f"{said}; make the file and its directory writable")
    return ConfigError(
        f"{said}; stop the daemons that use it, move it away with its -wal and -shm files and start them "
        "again: each host claims its subnet anew"
    )

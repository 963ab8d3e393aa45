"""The local store's SQLite file: found, made, checked, kept open, and what SQLite's errors mean.

WAL mode with synchronous=FULL: a change that was acknowledged survives kill -9 and power loss.  A new file begins at
the Unix time in microseconds instead of 1.  So a file that was deleted and made anew never repeats a revision that a
watcher has seen.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from udptun.core.errors import ConfigError, LeaseError, StoreUnavailableError
from udptun.stores.base import reason
from udptun.stores.local.rows import read_revision
from udptun.stores.local.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION

T = TypeVar("T")

BUSY_S = 10.0
"""How long a call waits for other processes' locks before it gives up, seconds."""

_SETTLED_NS = 100_000_000
"""A file that was written to longer ago than this has another time after the next write, nanoseconds."""

_BUSY_LOOK_S = 0.2
"""How often a waiting call looks whether the store is being closed: nothing interrupts SQLite's own waiting."""


class Database:
    """The open file.  One thread uses it; only `is_closing` may be set, and `close` called, from another one.

    Opens nothing before the first `run`, and makes the file (not its directory) when there is none.  A file that is
    damaged or not ours is never touched: ConfigError says what to do with it.  `clock` gives Unix seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.is_closing = False
        """A call that waits for a lock gives up once this is set."""
        self._path = path
        self._written = (path, path.with_name(f"{path.name}-wal"))
        """What a write changes; it may be in one of the two alone."""
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        """Device and inode that `_db` has open; None when the file was gone by then."""

    def run(self, operation: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work`, which is one transaction; `operation` completes "cannot ..." in the message of a failure."""
        deadline_s = time.monotonic() + BUSY_S
        while True:
            try:
                return work(self._connection())
            except sqlite3.Error as exc:
                if _primary_code(exc) == sqlite3.SQLITE_BUSY:
                    # None of `work` has happened.
                    if not self.is_closing and time.monotonic() < deadline_s:
                        continue
                else:
                    self.close()
                raise _explain(exc, operation, self._path) from exc

    def traces(self) -> tuple[object, ...] | None:
        """What is not the same any more when somebody has written to the file since; for any thread.

        None: that cannot be said, as somebody has just done so, and may do it again within a tick of the file system's
        clock.
        """
        found: list[object] = []
        for path in self._written:
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                if time.time_ns() - status.st_ctime_ns < _SETTLED_NS:
                    return None
                found += (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        return tuple(found)

    def close(self) -> None:
        """The next `run` opens the file anew."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _connection(self) -> sqlite3.Connection:
        """The open file, opened anew when it was deleted or replaced since the last call."""
        file = _inspect(self._path)
        if self._db is not None and file is not None and file == self._file:
            return self._db
        self.close()
        # The store is closed on another thread, after this one has ended.
        db = sqlite3.connect(self._path, timeout=_BUSY_LOOK_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, self._path, self._clock())
            self._file = _inspect(self._path)
        except BaseException:
            db.close()
            raise
        self._db = db
        return db


@contextmanager
def transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """`immediate` takes the write lock at once, waiting for it; `deferred` reads one state of the file."""
    db.execute(f"begin {kind}")
    try:
        yield
        db.execute("commit")
    finally:
        if db.in_transaction:
            db.rollback()


def _inspect(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`, None when there is none yet.

    Raises ConfigError when SQLite could not use it.  SQLite itself says no more than "unable to open database file", or
    it opens the file for reading and fails later.
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
            if not place.exists():
                # Somebody has deleted it since it was looked at.
                return _inspect(path)
            raise ConfigError(
                f"cannot open the lease store {path}: {place} is not writable; SQLite must write the file "
                "and create others beside it: grant that, or name another place in --store local:PATH"
            )
    return found


def _prepare(db: sqlite3.Connection, path: Path, now_s: float) -> None:
    """Check that the file is sound and ours, and give an empty one its schema.  A foreign file is not changed."""
    # A person may have put anything into a text column, and one such row must not end a query.
    db.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    if _is_empty(db):
        _create(db, now_s)
    (application_id,) = db.execute("pragma application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise ConfigError(
            f"cannot open the lease store {path}: it is the SQLite database of another program "
            f"(application_id {application_id:#x}); name another file in --store local:PATH"
        )
    (version,) = db.execute("pragma user_version").fetchone()
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"cannot open the lease store {path}: it has schema {version}, not {SCHEMA_VERSION}; "
            "run the udptun that wrote it, or name another file in --store local:PATH"
        )
    present = {name for (name,) in db.execute("select name from sqlite_master")}
    missing = sorted(SCHEMA.keys() - present)
    if missing:
        raise sqlite3.DatabaseError(f"the schema lacks {', '.join(missing)}")
    # SQLite reads only the pages that a query needs.  Without this, damage would show in some later claim.
    (verdict,) = db.execute("pragma quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(" ".join(verdict.removeprefix("*** in database main ***").split()))
    read_revision(db)
    db.execute("pragma synchronous = full")


def _is_empty(db: sqlite3.Connection) -> bool:
    """Whether the file is nobody's yet: it is new, or its maker was killed before the first commit."""
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
            # The change of mode needs the file for itself and does not wait: another process makes the file as well.
            if _primary_code(exc) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise sqlite3.DatabaseError(f"the filesystem cannot do WAL mode (journal mode stays {mode})")
    with transaction(db, "immediate"):
        if _is_empty(db):  # otherwise the other process was first
            for statement in SCHEMA.values():
                db.execute(statement)
            db.execute("insert into meta values (?)", (int(now_s * 1e6),))
            db.execute(f"pragma application_id = {APPLICATION_ID}")
            db.execute(f"pragma user_version = {SCHEMA_VERSION}")


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

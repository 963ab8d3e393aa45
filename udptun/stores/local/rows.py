"""Leases as rows of the local store's file.  Each function works in whatever transaction the caller has open."""

from __future__ import annotations

import sqlite3
from math import inf

from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseFormatError, Subnets
from udptun.stores.base import Snapshot

_COLUMNS = "key, value, expires, revision"

# In the conflict clause a bare column is the row that is there, `excluded` the row that was to be inserted.
_WRITE = """insert into leases (key, value, expires) values (?, ?, ?) on conflict (key) do update
    set value = excluded.value, expires = case when expires is null then null else excluded.expires end"""


def read_revision(db: sqlite3.Connection) -> int:
    """The revision of the last change."""
    row = db.execute("select revision from meta").fetchone()
    if row is None or not isinstance(row[0], int):
        raise sqlite3.DatabaseError("table meta holds no revision")
    return row[0]


def read_leases(db: sqlite3.Connection) -> tuple[list[Lease], list[str]]:
    """Every lease, and a line for each row that is none; a spoilt row costs only itself."""
    leases: list[Lease] = []
    skipped: list[str] = []
    for row in db.execute(f"select {_COLUMNS} from leases order by key"):
        try:
            leases.append(_parse(*row))
        except LeaseFormatError as exc:
            skipped.append(f"lease {row[0]!r}: {exc}")
    return leases, skipped


def read_snapshot(db: sqlite3.Connection) -> Snapshot:
    """The caller's transaction makes revision and leases belong together."""
    leases, skipped = read_leases(db)
    return Snapshot(read_revision(db), tuple(leases), tuple(skipped))


def read_events(db: sqlite3.Connection, after: int, revision: int) -> tuple[LeaseEvent, ...] | None:
    """The events after revision `after` up to the present `revision`; None when they cannot be told exactly."""
    rows = db.execute(
        f"select removed, {_COLUMNS} from events where revision > ? order by revision", (after,)
    ).fetchall()
    if len(rows) != revision - after:  # some were pruned, or another file took this one's place
        return None
    try:
        return tuple(
            LeaseEvent(EventType.REMOVED if removed else EventType.ADDED, _parse(*row)) for removed, *row in rows
        )
    except LeaseFormatError:
        # A row was spoilt by hand.  The event does not say what the lease was while it was good.
        return None


def first_expiry(db: sqlite3.Connection) -> float:
    """When `delete_expired` has something to do, Unix seconds; infinite: never."""
    (expires,) = db.execute("select min(expires) from leases").fetchone()
    # A person may have put a text there, which SQLite takes for greater than any number.
    return expires if isinstance(expires, int | float) else inf


def delete_expired(db: sqlite3.Connection, now_s: float) -> None:
    db.execute("delete from leases where expires <= ?", (now_s,))


def holder(db: sqlite3.Connection, key: str, now_s: float) -> Lease | None:
    """The lease under `key` that has not expired; None when there is none or the row is unreadable."""
    delete_expired(db, now_s)
    row = db.execute(f"select {_COLUMNS} from leases where key = ?", (key,)).fetchone()
    try:
        return None if row is None else _parse(*row)
    except LeaseFormatError:
        return None


def write(db: sqlite3.Connection, subnets: Subnets, attrs: LeaseAttrs, expires_s: float | None) -> Lease:
    """Write the row, and return it as it then is: with its revision, and without an expiry if it is a reservation."""
    db.execute(_WRITE, (subnets.key, attrs.to_json(), expires_s))
    expires, revision = db.execute("select expires, revision from leases where key = ?", (subnets.key,)).fetchone()
    return Lease(subnets, attrs, expires, revision)


def _parse(key: object, value: object, expires: object, revision: object) -> Lease:
    """The lease in a row; a person may have put anything into its columns.  Raises LeaseFormatError."""
    if not isinstance(key, str) or not isinstance(value, str):
        raise LeaseFormatError("key and value must be text")
    if not (expires is None or isinstance(expires, int | float)):
        raise LeaseFormatError(f"expires is {expires!r}, not a Unix time in seconds")
    if not isinstance(revision, int):
        raise LeaseFormatError(f"revision is {revision!r}, not a whole number")
    return Lease(Subnets.from_key(key), LeaseAttrs.from_json(value), expires, revision)

"""The SQL of the local store's file: tables, and triggers that turn each change of a row into a revision and an event.

The triggers fire whoever makes the change: a claim, an expiry, a person with the sqlite3 shell.  Change and event are
one transaction.  Events are numbered without gaps; HISTORY of them are kept.
"""

from __future__ import annotations

HISTORY = 10_000
"""How many events are kept for watchers that fall behind."""

APPLICATION_ID = 0x75647074
"""SQLite's application_id: marks the file as ours ("udpt")."""

SCHEMA_VERSION = 1

_LOG_CHANGE = """
        update meta set revision = revision + 1;
        insert into events select revision, {removed}, {row}.key, {row}.value, {row}.expires from meta;
        delete from events where revision <= (select revision from meta) - {history};"""

_SET_REVISION = "update leases set revision = (select revision from meta) where key = new.key;"

SCHEMA = {
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

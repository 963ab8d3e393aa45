"""What the `local` store does beyond the contract: processes, kill -9, damaged files, hands in the database."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_harness import DEADLINE_S, SUBNETS, LocalHarness, exactly, first_free, host, watching

import udptun
from udptun.core.errors import ConfigError, LeaseLostError, StoreUnavailableError
from udptun.core.lease import EventType
from udptun.stores.local import database
from udptun.stores.local import store as store_module
from udptun.stores.local.schema import HISTORY
from udptun.stores.local.store import LocalStore

CLAIMER = Path(__file__).with_name("claimer.py")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="unshare and seteuid need root")


@pytest.fixture
def harness(tmp_path: Path) -> LocalHarness:
    return LocalHarness(tmp_path)


@contextmanager
def claimers(path: Path, *jobs: tuple[int, int], within: tuple[str, ...] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each (first host, number of claims), run by the command `within`; none outlives the block."""
    environ = os.environ | {"PYTHONPATH": str(Path(udptun.__file__).parents[1])}
    running = [
        subprocess.Popen(
            [*within, sys.executable, str(CLAIMER), str(path), str(first), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for first, count in jobs
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def acknowledged(process: subprocess.Popen[str], count: int | None = None) -> list[tuple[str, int, str]]:
    """The next `count` claims that the process acknowledges, or all until it ends; a line cut by a kill is none."""
    assert process.stdout is not None
    found: list[tuple[str, int, str]] = []
    while count is None or len(found) < count:
        line = process.stdout.readline()
        if not line.endswith("\n"):
            break
        key, revision, public_ip = line.split()
        found.append((key, int(revision), public_ip))
    return found


def assert_sound(harness: LocalHarness, acks: list[tuple[str, int, str]]) -> None:
    """The file is whole, has every acknowledged claim, and counted each change once (there were only claims)."""
    db = sqlite3.connect(harness.path)
    assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
    rows = {
        (key, revision, value.split('"')[3])
        for key, value, revision in db.execute("select key, value, revision from leases")
    }
    assert set(acks) <= rows
    (n_events, first, last), (revision,) = (
        db.execute("select count(*), min(revision), max(revision) from events").fetchone(),
        db.execute("select revision from meta").fetchone(),
    )
    assert n_events == last - first + 1 == len(rows)
    assert last == revision
    db.close()


async def test_eight_processes_claim_distinct_subnets_when_some_are_killed_in_the_storm(harness: LocalHarness) -> None:
    store = harness.store()
    async with watching(store) as watcher:
        # The victims would go on for long, so that the kill always finds them claiming.
        jobs = [(2000 * n, 2000 if n < 3 else 50) for n in range(8)]
        with claimers(harness.path, *jobs) as running:
            acks: list[tuple[str, int, str]] = []
            for victim, after in zip(running[:3], (5, 15, 25), strict=True):
                acks += await asyncio.to_thread(acknowledged, victim, after)
                victim.send_signal(signal.SIGKILL)
            for process in running:
                acks += await asyncio.to_thread(acknowledged, process)
                status = await asyncio.to_thread(process.wait, DEADLINE_S)
                assert status == (-signal.SIGKILL if process in running[:3] else 0)
        assert len(acks) >= 5 * 50 + 5 + 15 + 25
        assert len({key for key, _, _ in acks}) == len({revision for _, revision, _ in acks}) == len(acks)
        assert_sound(harness, acks)
        snapshot = await store.snapshot()
        await watcher.until(lambda: watcher.revision == snapshot.revision)
        assert watcher.leases == {lease.key: lease for lease in snapshot.leases}
        seen = [lease.revision for lease in watcher.events(EventType.ADDED)]
        assert seen == sorted(set(seen))
        assert len(seen) == len(snapshot.leases)
    await store.aclose()


def test_nothing_acknowledged_is_lost_when_a_claimer_is_killed_again_and_again(harness: LocalHarness) -> None:
    acks: list[tuple[str, int, str]] = []
    for round_ in range(8):
        with claimers(harness.path, (1000 * round_, 900)) as (process,):
            acks += acknowledged(process, 3 + 7 * round_)
            process.send_signal(signal.SIGKILL)
            acks += acknowledged(process)
        assert_sound(harness, acks)
    revisions = [revision for _, revision, _ in acks]
    assert revisions == sorted(set(revisions))


@needs_root
async def test_a_claim_from_another_network_and_mount_namespace_reaches_the_watcher(harness: LocalHarness) -> None:
    within = ("unshare", "-n", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh")

    store = harness.store()
    async with watching(store) as watcher:
        with claimers(harness.path, (0, 5), (100, 5), within=within) as running:
            await watcher.until(lambda: len(watcher.leases) == 10)
            acks = [ack for process in running for ack in await asyncio.to_thread(acknowledged, process)]
        assert {key for key, _, _ in acks} == set(watcher.leases)
    await store.aclose()


async def test_a_busy_file_holds_up_neither_the_event_loop_nor_the_next_claim(
    harness: LocalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.3)

    store = harness.store()
    await store.claim(host(1), exactly(1))
    holder = sqlite3.connect(harness.path, isolation_level=None)
    holder.execute("begin immediate")
    claim = asyncio.create_task(store.claim(host(2), exactly(2)))
    turns = 0
    while not claim.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20  # 0.3 s of waiting, 1 ms a turn, with room for a loaded machine
    with pytest.raises(
        StoreUnavailableError, match=r"cannot claim a subnet in .*leases\.db: .*SQLITE_BUSY.*; another"
    ):
        claim.result()
    holder.rollback()
    holder.close()
    assert (await store.claim(host(2), exactly(2))).subnets == SUBNETS[2]
    await store.aclose()


async def test_a_clock_set_back_makes_leases_last_and_harms_nothing(harness: LocalHarness) -> None:
    now_s = [1_700_000_000.0]

    store = LocalStore(harness.path, harness.net_conf, clock=lambda: now_s[0])
    lease = await store.claim(host(1), exactly(1), ttl_s=100)
    assert lease.expires_s == now_s[0] + 100
    now_s[0] -= 86_400
    async with watching(store) as watcher:
        other = await store.claim(host(2), first_free, ttl_s=100)
        assert other.revision > lease.revision
        await watcher.until(lambda: watcher.numbers == {0, 1})
        renewed = await store.renew(lease, ttl_s=100)
        assert renewed.expires_s == now_s[0] + 100
        now_s[0] += 101
        await watcher.until(lambda: not watcher.leases)
    await store.aclose()


async def test_a_watch_leaves_sqlite_alone_until_somebody_writes_or_a_lease_expires(
    harness: LocalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the revision twenty times a second, which was four fifths of what an idle daemon took."""
    monkeypatch.setattr(store_module, "_READ_S", math.inf)
    n_reads, now_s = [0], [1_700_000_000.0]
    read_revision = store_module.rows.read_revision

    def counted(db: sqlite3.Connection) -> int:
        n_reads[0] += 1
        return read_revision(db)

    store = LocalStore(harness.path, harness.net_conf, clock=lambda: now_s[0])
    await store.claim(host(1), exactly(1), ttl_s=100)
    monkeypatch.setattr(store_module.rows, "read_revision", counted)
    async with watching(store) as watcher:
        async with asyncio.timeout(DEADLINE_S):
            n = -1
            while n != n_reads[0]:
                n = n_reads[0]
                await asyncio.sleep(4 * store_module.POLL_S)
        harness.sql(f"insert into leases (key, value) values ('{SUBNETS[2].key}', '{host(2).to_json()}')")
        await watcher.until(lambda: watcher.numbers == {1, 2})
        now_s[0] += 101
        await watcher.until(lambda: watcher.numbers == {2})
    await store.aclose()


async def test_the_event_log_is_pruned_and_a_watcher_from_before_gets_a_snapshot(harness: LocalHarness) -> None:
    harness.write([])
    rows = [(SUBNETS[number].key, host(number).to_json()) for number in range(HISTORY + 100)]

    store = harness.store()
    before = (await store.snapshot()).revision
    harness.sql("insert into leases (key, value) values (?, ?)", rows=rows)
    assert harness.sql("select count(*) from events") == [(HISTORY,)]
    async with watching(store, before) as watcher:
        await watcher.until(lambda: len(watcher.leases) == len(rows))
        assert watcher.batches[0].snapshot is not None
    async with watching(store, before + 100) as watcher:
        await watcher.until(lambda: len(watcher.leases) == HISTORY)
        assert watcher.batches[0].snapshot is None
    await store.aclose()


async def test_a_reservation_made_by_hand_is_kept_for_its_host_and_stays_one(harness: LocalHarness) -> None:
    harness.write([])
    key = SUBNETS[7].key
    harness.sql(f"""insert into leases (key, value) values ('{key}', '{{"PublicIP":"{host(7).public_ip}"}}')""")

    store = harness.store()
    (reserved,) = (await store.snapshot()).leases
    assert reserved.expires_s is None
    lease = await store.claim(host(7), exactly(7), ttl_s=100)
    assert lease.expires_s is None
    lease = await store.renew(lease, ttl_s=100)
    assert (lease.expires_s, lease.attrs) == (None, host(7))
    await store.release(lease)
    assert [kept.key for kept in (await store.snapshot()).leases] == [key]
    await store.aclose()


async def test_rows_spoilt_by_hand_are_each_skipped_with_one_line(harness: LocalHarness) -> None:
    harness.write([(0, 0)])
    good = host(1).to_json()
    spoilt: list[tuple[object, object, object]] = [
        ("10.1.2.0", good, None),
        ("10.1.2.1-24", good, None),
        ("10.1.2.300-24", good, None),
        ("10.1.3.0-24", "not JSON", None),
        ("10.1.4.0-24", "[]", None),
        ("10.1.5.0-24", "{}", None),
        ("10.1.3.128-25", "[" * 100_000, None),
        ("10.1.6.0-24", '{"PublicIP":"2001:db8::1"}', None),
        ("10.1.7.0-24", good, "tomorrow"),
        (b"10.1.8.0-24", good, None),
        ("10.1.9.0-24", b"\xff\xfe", None),
    ]
    harness.sql("insert into leases (key, value, expires) values (?, ?, ?)", rows=spoilt)
    harness.sql("insert into leases (key, value) values (cast(x'ff0a' as text), '{}')")

    store = harness.store()
    snapshot = await store.snapshot()
    assert [lease.subnets for lease in snapshot.leases] == [SUBNETS[0]]
    assert len(snapshot.skipped) == len(spoilt) + 1
    for line in snapshot.skipped:
        assert line.startswith("lease ")
        assert "\n" not in line
    # A claim is neither stopped nor misled by them.
    assert (await store.claim(host(2), first_free)).subnets == SUBNETS[1]
    await store.aclose()


# The database is the last to go: a daemon that misses it makes all three anew.
@pytest.mark.parametrize("names", [["leases.db-wal", "leases.db-shm", "leases.db"], ["leases.db"]])
async def test_a_file_deleted_under_running_daemons_is_made_anew_and_never_repeats_a_revision(
    harness: LocalHarness, names: list[str]
) -> None:
    stores = [harness.store(), harness.store()]
    lease = await stores[0].claim(host(1), exactly(1))
    async with watching(stores[1]) as watcher:
        assert watcher.numbers == {1}
        for name in names:
            harness.path.with_name(name).unlink()
        await watcher.until(lambda: not watcher.leases)
        with pytest.raises(LeaseLostError):
            await stores[0].renew(lease)
        again = await stores[0].claim(host(2), exactly(2))
        assert again.revision > lease.revision
        await watcher.until(lambda: watcher.leases == {again.key: again})
    for store in stores:
        await store.aclose()


async def test_a_file_deleted_between_two_calls_of_one_look_is_made_anew(
    harness: LocalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stat found it and access did not: "is not writable" ended the watch, or the start of a daemon."""
    store, other = harness.store(), harness.store()
    await store.claim(host(1), exactly(1))
    access = os.access

    def deleted_before(place: Path, mode: int, *, effective_ids: bool) -> bool:
        if place == harness.path:
            monkeypatch.setattr(os, "access", access)
            place.unlink()
        return access(place, mode, effective_ids=effective_ids)

    monkeypatch.setattr(os, "access", deleted_before)
    assert (await store.snapshot()).leases == ()
    again = await other.claim(host(2), exactly(2))
    assert (await store.snapshot()).leases == (again,)
    for each in (store, other):
        await each.aclose()


async def test_a_file_deleted_while_it_is_made_is_not_used_for_ever(
    harness: LocalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that had opened it did not see it at its second look, and took every later absence for the same file."""
    store, other = harness.store(), harness.store()
    inspect = database._inspect
    n_looks = itertools.count(1)

    def deleted_before(path: Path) -> tuple[int, int] | None:
        if next(n_looks) == 2:
            path.unlink()
        return inspect(path)

    monkeypatch.setattr(database, "_inspect", deleted_before)
    await store.snapshot()
    await store.claim(host(1), exactly(1))
    assert [lease.subnets for lease in (await other.snapshot()).leases] == [SUBNETS[1]]
    for each in (store, other):
        await each.aclose()


# Files that cannot be used


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        db = sqlite3.connect(path)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    return damage


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, keep(path.stat().st_size))


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def foreign(path: Path) -> None:
    path.unlink()
    sql("create table bookmarks (url text)")(path)


def parent_gone(path: Path) -> None:
    shutil.rmtree(path.parent)


def parent_is_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("")


AWAY = "move it away"
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "text": (content(b"leases: none yet\n" * 100), "file is not a database", AWAY),
    "short_text": (content(b"hello"), "file is not a database", AWAY),
    "json": (content(b'[{"Subnet": "10.244.1.0/24"}]' * 40), "file is not a database", AWAY),
    "random": (content(bytes(range(256)) * 64), "file is not a database", AWAY),
    "header_flipped": (overwrite(0, b"SQLITE FORMAT 3\0"), "file is not a database", AWAY),
    "header_zeroed": (overwrite(16, bytes(84)), "file is not a database", AWAY),
    "cut_in_half": (cut(lambda size: size // 2), "malformed", AWAY),
    "cut_to_one_page": (cut(lambda size: 4096), "malformed", AWAY),
    "cut_inside_a_page": (cut(lambda size: size - 1000), "malformed|on page", AWAY),
    "page_overwritten": (overwrite(2 * 4096, b"\xa5" * 4096), "malformed|[Pp]age", AWAY),
    "foreign_database": (foreign, "database of another program", "name another file"),
    "foreign_application_id": (sql("pragma application_id = 7"), "another program .*0x7", "name another file"),
    "newer_schema": (sql("pragma user_version = 2"), "has schema 2, not 1", "name another file"),
    "table_missing": (sql("drop table events"), "the schema lacks events", AWAY),
    "trigger_missing": (sql("drop trigger lease_added"), "the schema lacks lease_added", AWAY),
    "column_renamed": (sql("alter table leases rename column value to val"), "no such column: value", AWAY),
    "revision_missing": (sql("delete from meta"), "table meta holds no revision", AWAY),
    "revision_not_a_number": (sql("update meta set revision = 'many'"), "table meta holds no revision", AWAY),
    "directory": (instead(Path.mkdir), "not a regular file", "name a file"),
    "fifo": (instead(os.mkfifo), "not a regular file", "name a file"),
    "link_to_itself": (instead(lambda path: path.symlink_to(path)), "Too many levels of symbolic links", "name a file"),
    "directory_missing": (parent_gone, "there is no directory", "create it"),
    "directory_is_a_file": (parent_is_a_file, "Not a directory", "name a file"),
}


@pytest.mark.parametrize("kind", DAMAGES)
async def test_a_file_that_cannot_be_used_is_refused_in_one_clear_line_and_left_alone(
    kind: str, tmp_path: Path
) -> None:
    damage, reason, advice = DAMAGES[kind]
    directory = tmp_path / "state"
    directory.mkdir()
    harness = LocalHarness(directory)
    harness.write([(number, number) for number in range(200)])
    damage(harness.path)
    before = harness.path.read_bytes() if harness.path.is_file() else None

    store = harness.store()
    for call in (store.snapshot, lambda: store.claim(host(1), first_free), lambda: anext(store.watch(0))):
        with pytest.raises(ConfigError, match=reason) as caught:
            await call()
        assert str(harness.path) in str(caught.value)
        assert advice in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 2
    await store.aclose()
    assert before == (harness.path.read_bytes() if harness.path.is_file() else None)


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A directory that everybody may read, while this process acts as nobody."""
    with tempfile.TemporaryDirectory(prefix="uts-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        LocalHarness(directory).write([(1, 1)])
        for path in directory.iterdir():
            path.chmod(0o644)
        os.seteuid(65534)
        try:
            yield directory
        finally:
            os.seteuid(0)


@needs_root
@pytest.mark.parametrize("name", ["leases.db", "not-there-yet.db"])
async def test_a_place_that_may_not_be_written_to_is_refused_in_one_clear_line(name: str) -> None:
    with without_privileges() as directory:

        store = LocalStore(directory / name, directory / "net-conf.json")
        with pytest.raises(ConfigError, match=r"not writable; SQLite must write .*; grant|: grant that") as caught:
            await store.snapshot()
        assert str(directory / name) in str(caught.value)
        await store.aclose()
        assert not (directory / "not-there-yet.db").exists()


@needs_root
def test_a_file_on_a_read_only_filesystem_is_refused_in_one_clear_line(harness: LocalHarness) -> None:
    harness.write([(1, 1)])
    directory = harness.path.parent
    script = f'mount --bind "{directory}" "{directory}" && mount -o remount,bind,ro "{directory}" && exec "$@"'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, str(CLAIMER), str(harness.path), "5", "1"],
        env=os.environ | {"PYTHONPATH": str(Path(udptun.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert run.returncode == 1
    assert f"ConfigError: cannot open the lease store {harness.path}: {harness.path} is not writable" in run.stderr


async def test_a_file_damaged_while_it_is_in_use_is_reported_and_a_mended_one_taken_up(harness: LocalHarness) -> None:
    harness.write([(1, 1)])
    good = harness.path.read_bytes()

    store = harness.store()
    await store.snapshot()
    replacement = harness.path.with_name("new.db")
    replacement.write_bytes(b"rubbish" * 1000)
    replacement.replace(harness.path)
    with pytest.raises(ConfigError, match="file is not a database"):
        await store.snapshot()
    replacement.write_bytes(good)
    replacement.replace(harness.path)
    assert [lease.subnets for lease in (await store.snapshot()).leases] == [SUBNETS[1]]
    await store.aclose()


async def test_an_empty_file_left_by_a_killed_maker_is_filled(harness: LocalHarness) -> None:
    harness.path.touch()

    store = harness.store()
    assert (await store.claim(host(1), exactly(1))).subnets == SUBNETS[1]
    await store.aclose()


async def test_many_stores_may_make_the_file_at_once(harness: LocalHarness) -> None:
    stores = [harness.store() for _ in range(8)]
    revisions = {snapshot.revision for snapshot in await asyncio.gather(*(s.snapshot() for s in stores))}
    assert len(revisions) == 1
    for store in stores:
        await store.aclose()


@pytest.mark.alone
async def test_opening_costs_no_time_for_ten_thousand_leases(harness: LocalHarness) -> None:
    harness.write((number, number) for number in range(10_000))

    store = harness.store()
    used_s = time.process_time()
    await store.release(await store.claim(host(11_000), exactly(11_000)))
    assert time.process_time() - used_s < 2.5
    await store.aclose()

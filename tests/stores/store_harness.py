"""What the contract test needs from a store under test.

A harness makes store objects on one shared place, as separate daemons would, and has "hands": changes from outside
any store object (an operator, another tool).  It declares in `lacks` what its store cannot do, with the reason.  The
contract test does not ask for that, and the store's own test shows what the store does instead.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from udptun.core.lease import EventType, Lease, LeaseAttrs, Subnets
from udptun.stores.base import Snapshot, Store, SubnetChoice, WatchBatch
from udptun.stores.file import FileStore
from udptun.stores.local.store import LocalStore

NETWORK = IPv4Network("10.0.0.0/8")
NET_CONF = '{"Network": "10.0.0.0/8", "Backend": {"Type": "udp"}}'
SUBNETS = [Subnets(subnet) for subnet in islice(NETWORK.subnets(new_prefix=24), 12_000)]
WITH_IPV6 = ((12_000, 100_000), (12_001, 100_001))
"""Number of a subnet, and of its host: of both families, and of IPv6 alone."""
SUBNETS += [
    Subnets(IPv4Network("10.46.224.0/24"), IPv6Network("fd00:0:0:1::/64")),
    Subnets(None, IPv6Network("fd00:0:0:2::/64")),
]
DEADLINE_S = 30.0


def host(number: int, port: int = 8285) -> LeaseAttrs:
    """What host `number` writes into its lease."""
    (_, of_both), (_, alone) = WITH_IPV6
    has_ipv6 = number in (of_both, alone)
    return LeaseAttrs(
        None if number == alone else IPv4Address(0xC6120000 + number),  # 198.18.0.0/15, for benchmarks (RFC 2544)
        IPv6Address(f"fd99::{number & 0xFFFF:x}") if has_ipv6 else None,
        "udp",
        {"Port": port, "NodeID": f"{number:032x}", "Udptun": 1},
        {"VNI": number} if has_ipv6 else None,
    )


def first_free(leases: Sequence[Lease]) -> SubnetChoice:
    taken = {lease.key for lease in leases}
    return SubnetChoice(next(subnets for subnets in SUBNETS if subnets.key not in taken))


def exactly(number: int, *drop: str) -> Callable[[Sequence[Lease]], SubnetChoice]:
    return lambda leases: SubnetChoice(SUBNETS[number], drop)


class Can(Enum):
    ALLOCATE = "a claim takes what the chooser picks"
    EXPIRE = "leases end by themselves"
    RESUME = "a watch resumes exactly from an earlier revision, as long as the history is kept"
    SHARE = "what one store object writes, others see"
    KEEP_CONFIG_IN_A_FILE = "the network config is a file of this host"


class Harness(Protocol):
    name: str
    lacks: Mapping[Can, str]
    needs: Sequence[str]
    """What this machine lacks for it; with anything here its tests are skipped."""
    slack_descriptors: int
    """How many more the store's library may hold open at one time than at another."""

    def store(self, number: int = 1) -> Store:
        """One more store object on the same place, host `number`'s where the store knows hosts by name."""

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        """By hand: subnet number -> host number; replaces everything."""

    def spoil(self, number: int) -> str:
        """By hand: make the item of subnet `number` unreadable; returns what a `skipped` line must name."""

    def lose_history(self) -> None:
        """Forget old events (only where Can.RESUME)."""


class LocalHarness:
    name = "local"
    lacks: Mapping[Can, str] = {}
    needs: Sequence[str] = ()
    slack_descriptors = 0

    def __init__(self, directory: Path) -> None:
        self.path = directory / "leases.db"
        self.net_conf = directory / "net-conf.json"
        self.net_conf.write_text(NET_CONF)

    def store(self, number: int = 1) -> LocalStore:
        return LocalStore(self.path, self.net_conf)

    def sql(self, *statements: str, rows: Sequence[Sequence[Any]] | None = None) -> list[tuple[Any, ...]]:
        """As an operator with the sqlite3 shell; `rows` are the parameters of the last statement."""
        db = sqlite3.connect(self.path, timeout=DEADLINE_S, isolation_level=None)
        try:
            db.execute("begin immediate")
            for statement in statements[:-1]:
                db.execute(statement)
            if rows is not None:
                db.executemany(statements[-1], rows)
                answer = []
            else:
                answer = db.execute(statements[-1]).fetchall()
            db.execute("commit")
            return answer
        finally:
            db.close()

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        # The store makes its tables. In a thread, because the test may run in an event loop of its own.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, self._create()).result()
        self.sql(
            "delete from leases",
            "insert into leases (key, value) values (?, ?)",
            rows=[(SUBNETS[subnet].key, host(number).to_json()) for subnet, number in leases],
        )

    async def _create(self) -> None:
        store = self.store()
        await store.snapshot()
        await store.aclose()

    def spoil(self, number: int) -> str:
        key = SUBNETS[number].key
        self.sql(f"update leases set value = '{{\"PublicIP\":\"2001:db8::1\"}}' where key = '{key}'")
        return key

    def lose_history(self) -> None:
        self.sql("delete from events")


class FileHarness:
    name = "file"
    lacks: Mapping[Can, str] = {
        Can.ALLOCATE: "the file is the allocation",
        Can.EXPIRE: "what a person wrote stays until a person removes it",
        Can.RESUME: "only the last good reading is kept; the watch starts with a snapshot",
        Can.SHARE: "a store never writes the file",
    }
    needs: Sequence[str] = ()
    slack_descriptors = 0

    def __init__(self, directory: Path) -> None:
        self.path = directory / "leases.json"
        self.net_conf = directory / "net-conf.json"
        self.net_conf.write_text(NET_CONF)
        self.entries: dict[int, dict[str, Any]] = {}

    def store(self, number: int = 1) -> FileStore:
        return FileStore(self.path, self.net_conf)

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        self.entries = {subnet: self._entry(SUBNETS[subnet], host(number)) for subnet, number in leases}
        self._replace()

    def _entry(self, subnets: Subnets, attrs: LeaseAttrs) -> dict[str, Any]:
        fields = {"Subnet": subnets.ipv4, "PublicIP": attrs.public_ip}
        fields |= {"IPv6Subnet": subnets.ipv6, "PublicIPv6": attrs.public_ipv6}
        return {"Port": 8285, **{key: str(value) for key, value in fields.items() if value is not None}}

    def spoil(self, number: int) -> str:
        self.entries[number]["PublicIP"] = "2001:db8::1"
        self._replace()
        return f"entry {list(self.entries).index(number) + 1}"

    def lose_history(self) -> None:
        raise AssertionError("keeps none")

    def _replace(self) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(list(self.entries.values())))
        temporary.replace(self.path)


class Watcher:
    """Follows a store as a daemon does: a snapshot, then a watch from its revision, folded into one table."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.batches: list[WatchBatch] = []
        self.refused: set[str] = set()
        """What is said of items that are no leases, as it is now."""
        self.revision = -1
        self._changed = asyncio.Event()

    async def follow(self, store: Store, after: int | None) -> None:
        if after is None:
            snapshot = await store.snapshot()
            self._take_all(snapshot)
            after = snapshot.revision
        self.revision = after
        async with aclosing(store.watch(after)) as batches:
            async for batch in batches:
                assert batch.revision >= self.revision
                self.batches.append(batch)
                self.revision = batch.revision
                if batch.snapshot is not None:
                    self._take_all(batch.snapshot)
                assert not set(batch.skipped) & set(batch.mended)
                self.refused = (self.refused | set(batch.skipped)) - set(batch.mended)
                for event in batch.events:
                    if event.type is EventType.ADDED:
                        self.leases[event.lease.key] = event.lease
                    else:
                        self.leases.pop(event.lease.key, None)
                self._changed.set()

    def _take_all(self, snapshot: Snapshot) -> None:
        self.leases = {lease.key: lease for lease in snapshot.leases}
        self.refused = set(snapshot.skipped)
        self._changed.set()

    async def until(self, met: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not met():
                self._changed.clear()
                await self._changed.wait()

    @property
    def numbers(self) -> set[int]:
        """Which of SUBNETS are there."""
        return {_NUMBER[key] for key in self.leases}

    def events(self, kind: EventType) -> list[Lease]:
        return [event.lease for batch in self.batches for event in batch.events if event.type is kind]

    def skipped(self) -> list[str]:
        """Every line that a batch has told so far."""
        return [
            line
            for batch in self.batches
            for line in (*batch.skipped, *(batch.snapshot.skipped if batch.snapshot else ()))
        ]


_NUMBER = {subnets.key: number for number, subnets in enumerate(SUBNETS)}


@asynccontextmanager
async def watching(store: Store, after: int | None = None, known: Iterable[Lease] = ()) -> AsyncIterator[Watcher]:
    """A Watcher that is following `store`: from a snapshot of its own, or from revision `after`, knowing `known`."""
    watcher = Watcher()
    watcher.leases = {lease.key: lease for lease in known}
    task = asyncio.create_task(watcher.follow(store, after))
    try:
        while watcher.revision == -1 and not task.done():
            await asyncio.sleep(0.001)
        yield watcher
        if task.done():
            task.result()
    except TimeoutError:
        # What has ended the watch says more than that something was waited for in vain.
        if task.done():
            task.result()
        raise
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

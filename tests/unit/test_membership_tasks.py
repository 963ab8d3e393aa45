"""Holding our lease and following the others', against a store whose every answer the test decides."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from pathlib import Path

import pytest

from udptun import membership, state
from udptun.allocate import Identity, chooser
from udptun.config import parse_net_conf
from udptun.errors import ConfigError, LeaseLostError, StoreUnavailableError
from udptun.lease import EventType, Lease, LeaseAttrs, LeaseEvent, Subnets
from udptun.membership import Membership
from udptun.stores.base import LEASE_TTL_S, Chooser, Snapshot, WatchBatch

CONF = parse_net_conf('{"Network": "10.244.0.0/16", "SubnetMax": "10.244.9.0"}', "test")
ME = Identity(IPv4Address("192.0.2.1"), 8285, "1" * 32)
DEADLINE_S = 10.0


def attrs(ip: str, node_id: str | None = None) -> LeaseAttrs:
    data = {"Port": 8285, "NodeID": node_id, "Udptun": 1} if node_id else None
    return LeaseAttrs(IPv4Address(ip), backend_type="udp" if node_id else "", backend_data=data)


OWN_ATTRS = attrs("192.0.2.1", ME.node_id)


def lease(subnet: str, ip: str, node_id: str | None = None, expires_s: float | None = None) -> Lease:
    return Lease(Subnets(IPv4Network(subnet)), attrs(ip, node_id), expires_s)


PEER = lease("10.244.20.0/24", "192.0.2.20")


class FakeStore:
    """A store in memory; until it is None `fail` makes snapshot and watch raise, `fail_writes` claim and renew."""

    name = "fake"
    config_name = "net-conf.json"
    is_remote = False

    def __init__(self, *leases: Lease) -> None:
        self.leases = {one.key: one for one in leases}
        self.skipped: tuple[str, ...] = ()
        self.fail: Exception | None = None
        self.fail_writes: Exception | None = None
        self.claim_waits: asyncio.Event | None = None
        self.ttl_s: float = LEASE_TTL_S
        self.gives: Subnets | None = None
        """Like a leases file: a claim gets this, whatever is chosen."""
        self.claims = self.renewals = self.watches = 0
        self._news: list[WatchBatch] = []
        self._changed = asyncio.Event()
        self._revision = 0

    async def network_config(self) -> str:
        return "{}"

    async def snapshot(self) -> Snapshot:
        self._check()
        return Snapshot(self._revision, tuple(self.leases.values()), self.skipped)

    async def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        self.watches += 1
        while True:
            self._check()
            for batch in self._news:
                if batch.revision > after:
                    after = batch.revision
                    yield batch
            self._changed.clear()
            await self._changed.wait()

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        self.claims += 1
        if self.claim_waits is not None:
            await self.claim_waits.wait()
        if self.fail_writes is not None:
            raise self.fail_writes
        subnets = self.gives or choose(tuple(self.leases.values())).subnets
        made = Lease(subnets, attrs, time.time() + self.ttl_s)
        self.put(made)
        return made

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        self.renewals += 1
        if self.fail_writes is not None:
            raise self.fail_writes
        if lease.key not in self.leases:
            raise LeaseLostError(f"cannot renew {lease.subnet}")
        made = replace(lease, expires_s=time.time() + self.ttl_s)
        self.put(made)
        return made

    async def release(self, lease: Lease) -> None:
        self.remove(lease)

    async def aclose(self) -> None:
        pass

    def put(self, *leases: Lease) -> None:
        self.leases |= {one.key: one for one in leases}
        self._tell(tuple(LeaseEvent(EventType.ADDED, one) for one in leases))

    def remove(self, lease: Lease) -> None:
        self._tell((LeaseEvent(EventType.REMOVED, self.leases.pop(lease.key)),))

    def replace_all(self, *leases: Lease) -> None:
        """What a store tells that has lost its history."""
        self.leases = {one.key: one for one in leases}
        self._tell((), snapshot=True)

    def break_down(self, error: Exception | None) -> None:
        """Fail, the running watch too; with None work again."""
        self.fail = error
        self._changed.set()

    def _tell(self, events: tuple[LeaseEvent, ...], snapshot: bool = False) -> None:
        self._revision += 1
        whole = Snapshot(self._revision, tuple(self.leases.values()), self.skipped) if snapshot else None
        self._news.append(WatchBatch(self._revision, events, whole))
        self._changed.set()

    def _check(self) -> None:
        if self.fail is not None:
            raise self.fail


class Member:
    """A Membership on a fake store, and the peers that it has told of."""

    def __init__(self, store: FakeStore, directory: Path, margin_s: float = 3600) -> None:
        self.store = store
        self.peers: dict[str, str] = {}
        self.membership = Membership(store, CONF, ME, directory, margin_s, lambda lease: None, self._changed)

    async def _changed(self, events: Sequence[LeaseEvent]) -> None:
        for event in events:
            if event.type is EventType.ADDED:
                self.peers[str(event.lease.subnet)] = str(event.lease.attrs.public_ip)
            else:
                del self.peers[str(event.lease.subnet)]

    async def join(self) -> None:
        await self.membership.join(OWN_ATTRS, chooser(CONF, ME, None, random.Random(1)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.join()
        await self.membership.catch_up()
        task = asyncio.create_task(self.membership.run())
        try:
            yield
            assert not task.done(), "it ended by itself"
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(membership, "_RENEW_RETRY_S", 0.01)
    monkeypatch.setattr(membership, "_EXPIRY_CHECK_S", 0.005)
    monkeypatch.setattr(membership, "_SAVE_DELAY_S", 0.005)
    monkeypatch.setattr(membership, "_RECONNECT_S", (0.001, 0.004))
    caplog.set_level(logging.INFO, logger="udptun.membership")


def told(caplog: pytest.LogCaptureFixture, level: int, text: str = "") -> list[str]:
    return [record.message for record in caplog.records if record.levelno == level and text in record.message]


async def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def turns(n: int = 50) -> None:
    """Let everything that can happen happen."""
    for _ in range(n):
        await asyncio.sleep(0.001)


# --- joining


def test_joining_leaves_a_new_lease_when_the_start_fails_and_keeps_an_old_one(tmp_path: Path) -> None:
    async def main() -> None:
        store = FakeStore(PEER)
        new = Member(store, tmp_path)
        await new.join()
        assert len(store.leases) == 2
        await new.membership.leave_if_new()
        assert list(store.leases) == [PEER.key]
        old = lease("10.244.3.0/24", "192.0.2.1", ME.node_id)
        store.put(old)
        again = Member(store, tmp_path)
        await again.join()
        await again.membership.leave_if_new()
        assert set(store.leases) == {PEER.key, old.key}

    asyncio.run(main())


@pytest.mark.parametrize("ends", [True, False])
def test_joining_that_is_interrupted_leaves_the_lease_that_it_gets_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """A store works on a thread, which nobody cancels: the lease stayed."""
    monkeypatch.setattr(membership, "_CLAIM_PATIENCE_S", 10 if ends else 0.01)

    async def main() -> None:
        store = FakeStore(PEER)
        store.claim_waits = asyncio.Event()
        member = Member(store, tmp_path)
        joining = asyncio.create_task(member.join())
        await until(lambda: store.claims)
        joining.cancel()
        with suppress(asyncio.CancelledError):
            await joining
        leaving = asyncio.create_task(member.membership.leave_if_new())
        await asyncio.sleep(0)
        if ends:
            store.claim_waits.set()
        await leaving
        assert list(store.leases) == [PEER.key]

    asyncio.run(main())


def test_leaving_before_joining_does_no_harm(tmp_path: Path) -> None:
    asyncio.run(Member(FakeStore(), tmp_path).membership.leave_if_new())


@pytest.mark.parametrize(
    ("subnet", "reason"),
    [
        ("10.9.1.0/24", "subnet 10.9.1.0/24 is outside Network 10.244.0.0/16"),
        ("10.244.1.0/31", "prefix length 31 is outside 16..30"),
    ],
)
def test_joining_is_refused_when_our_own_lease_cannot_be_used(tmp_path: Path, subnet: str, reason: str) -> None:
    """A leases file's entry never passes the chooser."""

    async def main() -> None:
        store = FakeStore()
        store.gives = Subnets(IPv4Network(subnet))
        with pytest.raises(ConfigError) as caught:
            await Member(store, tmp_path).join()
        assert caught.value.problems == (f"our lease in fake cannot be used: {reason}",)

    asyncio.run(main())


@pytest.mark.parametrize(("node_id", "n_warnings"), [("2" * 32, 1), (ME.node_id, 0), (None, 0)])
def test_joining_names_both_nodes_when_another_has_our_address_and_port(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, node_id: str | None, n_warnings: int
) -> None:
    async def main() -> None:
        there = lease("10.244.3.0/24", "192.0.2.1", node_id)
        member = Member(FakeStore(there), tmp_path)
        await member.join()
        assert member.membership.own.key == there.key

    asyncio.run(main())
    warnings = told(caplog, logging.WARNING)
    assert len(warnings) == n_warnings
    for line in warnings:
        assert f"its_node_id={node_id} our_node_id={ME.node_id};" in line


# --- our own lease


def test_own_lease_is_taken_again_when_it_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = FakeStore(PEER)
        member = Member(store, tmp_path)
        async with member.running():
            own = member.membership.own
            store.remove(own)
            await until(lambda: own.key in store.leases)
            assert store.leases[own.key].attrs == OWN_ATTRS
            store.replace_all(PEER)
            await until(lambda: own.key in store.leases)
            await turns()
            assert store.claims == 3
            assert member.membership.problems == ()
            assert member.peers == {"10.244.20.0/24": "192.0.2.20"}

    asyncio.run(main())
    assert len(told(caplog, logging.WARNING, "our lease is gone from the store")) == 2
    assert len(told(caplog, logging.INFO, "lease taken again")) == 2
    assert told(caplog, logging.ERROR) == []


@pytest.mark.parametrize("node_id", ["2" * 32, None, ME.node_id], ids=["udptun", "flannel", "our_clone"])
def test_own_lease_that_another_took_is_one_error_and_no_fight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, node_id: str | None
) -> None:
    async def main() -> None:
        store = FakeStore(PEER)
        member = Member(store, tmp_path)
        async with member.running():
            own = member.membership.own
            thief = lease(str(own.subnet), "192.0.2.66", node_id)
            store.put(thief)
            await until(lambda: store.claims > 4)
            assert store.leases[own.key] == thief
            assert member.membership.own.attrs == OWN_ATTRS
            assert member.peers == {"10.244.20.0/24": "192.0.2.20"}
            (problem,) = member.membership.problems
            assert f"{own.subnet} is leased to 192.0.2.66 (node {node_id or 'without id'}) now" in problem
            store.remove(thief)
            await until(lambda: own.key in store.leases)
            await until(lambda: member.membership.problems == ())

    asyncio.run(main())
    assert len(told(caplog, logging.ERROR)) == 1


def test_own_lease_stays_when_the_store_gives_us_another_subnet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new subnet was taken in silence, with device, routes and table on the old one."""

    async def main() -> None:
        store = FakeStore()
        member = Member(store, tmp_path)
        async with member.running():
            own = member.membership.own
            store.gives = Subnets(IPv4Network("10.244.200.0/24"))
            store.remove(own)
            await until(lambda: member.membership.problems)
            assert member.membership.own.subnet == own.subnet
            assert member.membership.problems == (
                f"fake gives this host 10.244.200.0/24 now, not {own.subnet}; restart to use it",
            )

    asyncio.run(main())
    assert len(told(caplog, logging.ERROR)) == 1


@pytest.mark.parametrize("error", [StoreUnavailableError("locked"), ConfigError("no entry is ours")])
def test_own_lease_that_cannot_be_taken_again_yet_is_one_error_and_is_tried_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """ConfigError ended the daemon."""

    async def main() -> None:
        store = FakeStore()
        member = Member(store, tmp_path)
        async with member.running():
            own = member.membership.own
            store.fail_writes = error
            store.remove(own)
            await until(lambda: store.claims > 4)
            assert member.membership.problems == (str(error),)
            store.fail_writes = None
            await until(lambda: own.key in store.leases)

    asyncio.run(main())
    assert told(caplog, logging.ERROR) == [f"our lease cannot be taken again, forwarding on error={str(error)!r}"]


def test_own_lease_is_renewed_by_margin_and_not_before(tmp_path: Path) -> None:
    async def main() -> None:
        store = FakeStore()
        store.ttl_s = 0.4
        member = Member(store, tmp_path, margin_s=0.2)
        async with member.running():
            expiries = [member.membership.own.expires_s or 0]
            while len(expiries) < 4:
                await until(lambda: member.membership.own.expires_s != expiries[-1])
                expiries.append(member.membership.own.expires_s or 0)
        assert all(later - earlier >= 0.2 for earlier, later in pairwise(expiries))

    asyncio.run(main())


def test_own_lease_is_renewed_later_when_the_store_does_not_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store = FakeStore()
        store.ttl_s = 0.1
        member = Member(store, tmp_path, margin_s=0.1)
        async with member.running():
            store.fail_writes = StoreUnavailableError("locked")
            before = store.renewals
            await until(lambda: store.renewals > before + 4)
            store.ttl_s = 1000
            store.fail_writes = None
            await until(lambda: member.membership.problems == ())
            assert member.membership.own.expires_s is not None
            assert member.membership.own.expires_s > time.time() + 500

    asyncio.run(main())
    assert told(caplog, logging.ERROR) == ["our lease cannot be renewed, forwarding on error='locked'"]


def test_own_lease_that_is_gone_when_it_is_renewed_is_taken_again(tmp_path: Path) -> None:
    async def main() -> None:
        store = FakeStore()
        store.ttl_s = 0.05
        member = Member(store, tmp_path, margin_s=0.05)
        async with member.running():
            own = member.membership.own
            store.ttl_s = 1000
            # As a store does that has not told of it yet.
            store.leases.clear()
            await until(lambda: own.key in store.leases)
            assert member.membership.problems == ()

    asyncio.run(main())


# --- the others


def test_peers_follow_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        store = FakeStore(PEER)
        member = Member(store, tmp_path)
        async with member.running():
            assert member.peers == {"10.244.20.0/24": "192.0.2.20"}
            store.put(lease("10.244.21.0/24", "192.0.2.21"), lease("10.244.20.0/24", "192.0.2.99"))
            await until(lambda: member.peers == {"10.244.20.0/24": "192.0.2.99", "10.244.21.0/24": "192.0.2.21"})
            store.remove(PEER)
            await until(lambda: member.peers == {"10.244.21.0/24": "192.0.2.21"})

    asyncio.run(main())


def test_peer_that_overlaps_our_own_lease_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        store = FakeStore()
        member = Member(store, tmp_path)
        async with member.running():
            wide = lease("10.244.0.0/20", "192.0.2.66")
            store.put(wide, PEER)
            await until(lambda: member.peers)
            assert member.peers == {"10.244.20.0/24": "192.0.2.20"}
            assert member.membership.skipped == (
                f"{wide.key}: subnet 10.244.0.0/20 overlaps our own lease {member.membership.own.subnet}",
            )

    asyncio.run(main())


def test_peer_is_dropped_when_it_expires_though_the_store_is_silent(tmp_path: Path) -> None:
    async def main() -> None:
        soon = lease("10.244.20.0/24", "192.0.2.20", expires_s=time.time() + 0.1)
        store = FakeStore(soon, lease("10.244.21.0/24", "192.0.2.21"))
        member = Member(store, tmp_path)
        async with member.running():
            assert len(member.peers) == 2
            store.break_down(StoreUnavailableError("away"))
            await until(lambda: member.peers == {"10.244.21.0/24": "192.0.2.21"})

    asyncio.run(main())


def test_item_that_cannot_be_used_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = FakeStore()
        store.skipped = ("lease 'junk': not JSON",)
        outside = lease("10.9.0.0/24", "192.0.2.9")
        store.put(outside)
        member = Member(store, tmp_path)
        async with member.running():
            own = member.membership.own
            for _ in range(3):
                store.replace_all(own, outside)
                store.put(PEER)
                await until(lambda: member.peers)
                store.remove(PEER)
                await until(lambda: not member.peers)
            assert member.membership.skipped == (
                "lease 'junk': not JSON",
                f"{outside.key}: subnet 10.9.0.0/24 is outside Network 10.244.0.0/16",
            )
            store.skipped = ()
            store.replace_all(own)
            await until(lambda: member.membership.skipped == ())

    asyncio.run(main())
    assert len(told(caplog, logging.WARNING, "lease skipped lease 'junk'")) == 1
    assert len(told(caplog, logging.WARNING, "lease skipped 10.9.0.0-24")) == 1


# --- a store that fails


@pytest.mark.parametrize("kind", [StoreUnavailableError, ConfigError])
def test_store_that_fails_costs_one_line_for_each_reason_and_no_peer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    """A database damaged at run time, a ConfigError, ended the daemon."""

    async def main() -> None:
        store = FakeStore(PEER)
        member = Member(store, tmp_path)
        async with member.running():
            for reason in ("away", "broken"):
                before = store.watches
                store.break_down(kind(reason))
                await until(lambda before=before: store.watches > before + 5)
                assert member.membership.problems == (reason,)
            assert member.peers == {"10.244.20.0/24": "192.0.2.20"}
            store.break_down(None)
            store.put(lease("10.244.21.0/24", "192.0.2.21"))
            await until(lambda: len(member.peers) == 2)
            assert member.membership.problems == ()

    asyncio.run(main())
    assert [line.rpartition("error=")[2] for line in told(caplog, logging.WARNING)] == ["'away'", "'broken'"]
    assert told(caplog, logging.INFO, "answers again") == ["lease store answers again store=fake"]


def test_store_that_works_again_is_said_to_although_nothing_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_CALM_S", 0.05)

    async def main() -> None:
        store = FakeStore(PEER)
        member = Member(store, tmp_path)
        async with member.running():
            store.break_down(StoreUnavailableError("away"))
            await until(lambda: member.membership.problems)
            store.break_down(None)
            await until(lambda: member.membership.problems == ())

    asyncio.run(main())
    assert len(told(caplog, logging.INFO, "answers again")) == 1


def test_store_that_fails_is_asked_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async def main() -> None:
        store = FakeStore()
        member = Member(store, tmp_path)
        async with member.running():
            monkeypatch.setattr(membership, "_RECONNECT_S", (0.125, 1.0))
            monkeypatch.setattr(membership.asyncio, "sleep", recorded)
            store.break_down(StoreUnavailableError("away"))
            while sum(seconds in (0.125, 0.25, 0.5, 1.0) for seconds in slept) < 6:
                await sleep(0.001)

    monkeypatch.setattr(membership, "_RECONNECT_S", (0.125, 1.0))
    asyncio.run(main())
    assert [seconds for seconds in slept if seconds in (0.125, 0.25, 0.5, 1.0)][:6] == [0.125, 0.25, 0.5, 1.0, 1.0, 1.0]


# --- the last table


def test_last_table_is_saved_and_recalled_before_the_store_is_read(tmp_path: Path) -> None:
    async def main() -> None:
        first = Member(FakeStore(PEER), tmp_path)
        async with first.running():
            first.store.put(lease("10.244.21.0/24", "192.0.2.21"), lease("10.244.22.0/24", "192.0.2.22", expires_s=1))
            await until(lambda: len(first.peers) >= 2)
        assert state.load(tmp_path, CONF.network, time.time()).last is not None
        # Its lease is a new one, with the same subnet; what the store holds besides is not known yet.
        second = Member(FakeStore(first.membership.own), tmp_path)
        await second.join()
        await second.membership.recall()
        assert second.peers == {"10.244.20.0/24": "192.0.2.20", "10.244.21.0/24": "192.0.2.21"}
        await second.membership.catch_up()
        assert second.peers == {}

    asyncio.run(main())


def test_table_that_cannot_be_saved_costs_a_warning_and_no_peer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        member = Member(FakeStore(PEER), tmp_path / "none")
        async with member.running():
            await until(lambda: told(caplog, logging.WARNING, "the lease table is not saved"))
            assert len(member.peers) == 1

    asyncio.run(main())

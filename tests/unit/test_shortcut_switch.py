"""The shortcut is switched, and followed, whatever goes wrong: it says what it is, and is off where it cannot be on."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace
from typing import Any

import pytest

from udptun.control.shortcut_switch import ShortcutSwitch
from udptun.core.errors import KernelError
from udptun.core.tunnel import ShortcutMode
from udptun.datapath.shortcut import programs, shortcut
from udptun.datapath.shortcut.shortcut import Shortcut

LIMIT_S = 10


class FakeShortcut:
    """Says what was asked of it."""

    def __init__(self, *_of: object) -> None:
        self.n_running = 0
        self.wanted: list[tuple[object, str]] = []
        self.is_on = self.is_detour_wanted = False
        self.takes: bool | None = None
        self.objections: list[str | None] = []
        self.detour_problem = ""
        self.switched: Callable[[], None] = lambda: None
        self.detour_wanted: Callable[[], None] = lambda: None

    async def run(self) -> None:
        self.n_running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.n_running -= 1

    def want(self, settings: object, why: str) -> None:
        self.wanted.append((settings, why))

    def try_soon(self) -> None:
        """It is not tried at all."""

    def allow_detour(self, objection: str | None) -> None:
        self.objections.append(objection)

    @property
    def state(self) -> str:
        return f"off: {self.wanted[-1][1]}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeShortcut:
    made = FakeShortcut()
    monkeypatch.setattr(shortcut, "Shortcut", lambda *_of: made)
    return made


def packets() -> Any:
    return SimpleNamespace(own_subnet=None, underlay_address=IPv4Address("192.0.2.1"))


async def run_until(switch: ShortcutSwitch, is_done: Callable[[], bool]) -> None:
    """Run it until then, and cancel it."""
    async with asyncio.timeout(LIMIT_S):
        task = asyncio.create_task(switch.run())
        while not is_done():
            assert not task.done(), task.exception()
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_it_is_looked_after_again_when_forwarding_runs_again(fake: FakeShortcut) -> None:
    """After any failure beside it nobody did, and it said `on` for ever."""
    switch = ShortcutSwitch(SimpleNamespace(), "ours")  # type: ignore[arg-type]
    switch.use(ShortcutMode.AUTO, "eth0", packets())
    for n in (1, 2):
        await run_until(switch, lambda n=n: fake.n_running == 1 and len(fake.wanted) == n)  # type: ignore[misc]
        assert fake.n_running == 0


async def test_a_decision_that_fails_is_a_reason_to_be_off_and_ends_nothing(
    fake: FakeShortcut, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended all that forwards."""
    switch = ShortcutSwitch(SimpleNamespace(), "ours")  # type: ignore[arg-type]

    async def fail() -> None:
        raise ValueError("a listing that nobody has seen")

    monkeypatch.setattr(switch, "_decide", fail)
    monkeypatch.setattr("udptun.control.shortcut_switch._PERIOD_S", 0.01)
    switch.use(ShortcutMode.REQUIRE, "eth0", packets())
    await run_until(switch, lambda: len(fake.wanted) >= 3)
    assert fake.wanted[0] == (None, "unexpected ValueError: a listing that nobody has seen; the log has more")
    assert len([it for it in caplog.records if "stays off" in it.message]) == 1
    assert "a listing" in switch.problems[0]


async def test_the_firewall_is_asked_about_the_detour_once_it_is_wanted(
    fake: FakeShortcut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shortcut is required, since those packets pass the firewall; and an error is no consent.

    A rule about a fourth peer was not seen.
    """
    remotes = [SimpleNamespace(address=IPv4Address(f"192.0.2.{n}"), port=8285) for n in range(10, 20)]
    peers = SimpleNamespace(subnets=range(10), entry=lambda n: SimpleNamespace(remote=remotes[n]))
    switch = ShortcutSwitch(SimpleNamespace(peers=peers), "ours")  # type: ignore[arg-type]
    asked: list[Any] = []

    async def find_drop(path: Any) -> str:
        asked.append(path)
        if len(asked) == 1:
            return "a rule drops it"
        raise KernelError("cannot read the rules of nf_tables", errno.EPERM)

    async def decide() -> tuple[object, str]:
        return object(), ""

    monkeypatch.setattr("udptun.firewall.port_rules.find_drop", find_drop)
    monkeypatch.setattr(switch, "_decide", decide)
    switch.use(ShortcutMode.REQUIRE, "eth0", SimpleNamespace(**vars(packets()), port=8285))  # type: ignore[arg-type]

    def has_asked_twice() -> bool:
        if len(fake.objections) > len(asked):
            fake.is_detour_wanted = True
            fake.detour_wanted()
        return len(fake.objections) == 3

    await run_until(switch, has_asked_twice)
    assert fake.objections[:2] == [None, "a rule drops it"]
    assert str(fake.objections[2]).startswith("whether the firewall drops UDP port 18472 is not known: ")
    assert {(it.port, it.is_sent_back, it.looks_answered) for it in asked} == {(18472, False, False)}
    assert all(it.peers == tuple(remote.address for remote in remotes) for it in asked)


@pytest.fixture
def fresh_find_lack() -> Iterator[None]:
    programs._find_lasting_lack.cache_clear()
    yield
    programs._find_lasting_lack.cache_clear()


@pytest.mark.usefixtures("fresh_find_lack")
@pytest.mark.parametrize(
    ("error", "n_tries"), [(errno.ENOMEM, 2), (errno.EMFILE, 2), (errno.EPERM, 1)], ids=["memory", "files", "right"]
)
def test_a_passing_lack_is_not_remembered(monkeypatch: pytest.MonkeyPatch, error: int, n_tries: int) -> None:
    """One moment without memory, and it was off until the daemon began anew."""
    tries = 0

    def load(top: int, least: int) -> None:
        nonlocal tries
        tries += 1
        raise KernelError("cannot make the BPF map ut_peers", error)

    monkeypatch.setattr(programs.Programs, "load", load)
    for _ in range(2):
        assert errno.errorcode[error] in programs.find_lack()
    assert tries == n_tries


def test_room_is_for_the_peers_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """There was always room for 131,072, which is 12.6 MB, and as much again for the look whether it can be had."""
    rooms: dict[str, int] = {}

    def create(name: str, _type: object, _value_len: int, n: int) -> SimpleNamespace:
        rooms[name] = n
        return SimpleNamespace(fd=0, close=lambda: None)

    monkeypatch.setattr(programs.Map, "create", create)
    monkeypatch.setattr(programs, "_bytecode", dict)
    for top, room in ((0, 4096), (3000, 8192), (65_000, 131_072)):
        programs.Programs.load(top).close()
        assert rooms["ut_peers"] == rooms["ut_peer_counts"] == room
    programs.Programs.load(0, least=1).close()
    assert rooms["ut_peers"] <= 2


class Switched:
    """A shortcut that is on, with nothing of the kernel's; says in what order it is taken apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.dropped: int | None = 3
        self.failure: Exception | None = None
        self.lost: list[int] = []
        peers = SimpleNamespace(changed=self.end)
        table = SimpleNamespace(top=1)
        tun = SimpleNamespace(name="flannel0")
        stats = SimpleNamespace(worker_counters=lambda n: [])
        self.tunnel = SimpleNamespace(peers=peers, publishing=self.end, n_workers=1, table=table, tun=tun, stats=stats)
        self.shortcut = Shortcut(self.tunnel, "ours")  # type: ignore[arg-type]
        self.shortcut.switched = lambda: self.said.append("switched")
        counts = SimpleNamespace(add=self.add, passed={})
        own = IPv4Network("10.244.1.0/24")
        settings = programs.ShortcutSettings("eth0", IPv4Address("192.0.2.1"), 8285, own, 1472, True)
        on: Any = SimpleNamespace(
            programs=SimpleNamespace(stop=lambda: self.said.append("stop"), has_filters=True),
            counts=counts,
            end=self.end,
            settings=settings,
            n_lost=0,
            n_refused=0,
        )
        self.shortcut._on = on

        async def delete_pair(*_of: str) -> None:
            self.said.append("pair")

        async def remove_filters(_aliases: list[str]) -> list[str]:
            self.said.append("filters")
            return []

        monkeypatch.setattr(shortcut, "delete_pair", delete_pair)
        monkeypatch.setattr(shortcut, "remove_filters", remove_filters)
        monkeypatch.setattr(shortcut, "read_device_counters", self.read)

    def read(self, names: list[str]) -> dict[str, SimpleNamespace]:
        if self.failure is not None:
            raise self.failure
        return {} if self.dropped is None else {names[0]: SimpleNamespace(tx_dropped=self.dropped)}

    def add(self, _top: int, n_lost: int, _n_refused: int, *, is_last: bool) -> None:
        self.lost.append(n_lost)
        self.said.append("count")

    def end(self) -> None:
        self.said.append("end")


async def test_what_is_cancelled_while_it_is_switched_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs stayed loaded, the pair stayed, and the lease said that it is on."""
    it = Switched(monkeypatch)
    task = asyncio.create_task(it.shortcut._switch_off())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert it.said == ["stop", "count", "end", "filters", "pair"]
    assert it.shortcut.takes is None


async def test_counts_that_cannot_be_read_keep_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Switched(monkeypatch)
    it.failure = ValueError("no number")
    await it.shortcut._switch_off()
    assert it.said == ["stop", "end", "filters", "pair"]


async def test_what_is_off_for_a_moment_only_is_said_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another MTU, address or device, the lease was written twice, and all peers changed twice what they do."""
    monkeypatch.setattr(shortcut, "_RETRY_S", 0.0)
    it = Switched(monkeypatch)
    switched_on: Any = it.shortcut._on
    it.shortcut._on = None
    outcome: list[Exception | None] = [None, None, KernelError("cannot make it", errno.EEXIST), None]

    async def switch_on(_settings: object) -> None:
        if (failure := outcome.pop(0)) is not None:
            raise failure
        it.shortcut._on, it.shortcut._reason = switched_on, ""

    async def is_in_place(_on: object) -> bool:
        return False

    async def follow(_on: object) -> None:
        """No detour."""

    monkeypatch.setattr(it.shortcut, "_switch_on", switch_on)
    monkeypatch.setattr(it.shortcut, "_is_in_place", is_in_place)
    monkeypatch.setattr(it.shortcut, "_follow_detour", follow)
    switched_on.programs.keep_on = lambda: None
    it.shortcut.want(switched_on.settings)
    assert it.shortcut.takes is None
    said = []
    for _ in range(4):
        it.said.clear()
        await it.shortcut._look()
        said.append((it.shortcut.takes, it.said.count("stop"), it.said.count("switched")))
    assert said == [(True, 0, 1), (True, 1, 0), (False, 1, 1), (True, 0, 1)]


async def test_what_fails_is_tried_again_later_each_time_whatever_notices_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try makes devices, which brought a notice, and so the next try: six a second, for ever."""
    it = Switched(monkeypatch)
    settings: Any = it.shortcut._on.settings  # type: ignore[union-attr]
    it.shortcut._on = None
    now_s, tries = 1000.0, list[float]()

    async def switch_on(_settings: object) -> None:
        tries.append(now_s - 1000)
        raise KernelError("cannot attach a BPF program", errno.EOPNOTSUPP)

    monkeypatch.setattr(it.shortcut, "_switch_on", switch_on)
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    it.shortcut.want(settings)
    for _ in range(2000):
        await it.shortcut._look()
        # It is asked for again each minute.
        it.shortcut.want(settings)
        now_s += 0.125
    assert tries == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    it.shortcut.want(replace(settings, mtu=1400))
    await it.shortcut._look()
    assert len(tries) == 11
    # SIGHUP, with what was wanted before.
    it.shortcut.try_soon()
    await it.shortcut._look()
    assert len(tries) == 12


async def test_its_end_counts_once_more_and_nobody_follows_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end lost up to a second of counts, and what had ended said `on` and was still told of peers."""
    it = Switched(monkeypatch)

    async def fail() -> None:
        raise ValueError

    monkeypatch.setattr(it.shortcut._loop, "run", fail)
    with pytest.raises(ValueError):
        await it.shortcut.run()
    assert it.said == ["stop", "count", "end", "filters"]
    assert not it.shortcut.is_on
    assert it.tunnel.publishing != it.end
    assert it.tunnel.peers.changed != it.end


async def test_peers_that_change_while_filters_are_attached_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Switched(monkeypatch)
    noted: list[str] = []
    told: list[list[str]] = []

    async def attach(*_where: object) -> None:
        await asyncio.sleep(0)
        it.tunnel.peers.changed("a peer")

    kernel = SimpleNamespace(attach=attach)
    on: Any = SimpleNamespace(
        programs=kernel, links=None, note=noted.append, follow=lambda _tunnel: told.append(noted[:]), end=it.end
    )
    assert await it.shortcut._attach(on) is on
    assert told == [["a peer"]]


def test_what_a_deleted_pair_has_dropped_stays_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`decap_drop_tun` went back by all that the pair had dropped."""
    it = Switched(monkeypatch)
    on = it.shortcut._on
    assert on is not None
    it.shortcut._count(on)
    it.dropped = None
    it.shortcut._count(on)
    assert it.lost == [3, 3]

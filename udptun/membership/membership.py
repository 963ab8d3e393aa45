"""Our place among the hosts: hold our own lease, and follow everyone else's.

The store says what is; `LeaseTable` decides what of it can be used; whoever made us is told the difference.  The last
good table is kept in the state directory for the next start.

**When leases end.**  A store drops what has expired by itself and says so: while it answers, its word alone counts, and
no clock of ours takes a peer away.  While it is away, what is to be done depends on where it is.  A server that is down
gives no subnet to anybody else, and its time may stand still (`Store.is_remote`): every peer stays, so that an outage
of a day, in which nobody can renew, does not end all traffic.  A store that is on this host is away by itself only:
the other daemons may go on with it, so what has expired is dropped, and when it answers again it is asked for all
leases, because it may have had a later expiry that we were never told of.

A peer that goes is kept for a moment all the same (_GRACE_S): when its lease was deleted by mistake, or the store has
lost all, its own daemon writes it again at once, and no packet is lost over it.  Its successor on the same subnet
does not wait.

**Clocks.**  An expiry is compared with the time of day, and that may be set.  A lease does not get older by that:
before any expiry is looked at, every one is moved by as much as the clock was set since the last look.

**A store that is away at the start.**  The lease and the table of the last run are good until they expire, so packets
are carried at once.  When the store answers, our own lease is claimed again before anything else is believed.

**Two hosts with one address.**  A lease with our PublicIP and port is taken over, as flannel does: it is nearly always
our own of before.  When the host that held it is alive, it writes the lease once more, which says that it is; the
later one then leaves it alone.  It goes on forwarding, says so, and needs an address or a port of its own.  So each of
the two writes once, and neither fights.  Clones of one machine, with one NodeID between them, are told apart the same
way.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from udptun.config.net_conf import NetConf
from udptun.core.clock import Clock
from udptun.core.errors import ConfigError, KernelError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeaseTable, validate
from udptun.membership import saved
from udptun.membership.identity import Identity, Node
from udptun.membership.saved import LastLeases
from udptun.stores.base import Chooser, Snapshot, Store, SubnetChoice, WatchBatch

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""How long a store may take to answer at the start before the last run's table is used in its stead."""
_RENEW_RETRY_S = 60.0
"""After a renewal, or taking a lost lease again, that failed (flannel's)."""
_CLOCK_CHECK_S = 30.0
"""Sleep no longer than this towards a time of day: the clock may be set meanwhile."""
_CLOCK_SET_S = 2.0
"""A difference between the two clocks that changed by more than this since the last look was somebody's doing."""
_EXPIRY_CHECK_S = 1.0
_GRACE_S = 0.5
"""How long a peer is kept whose lease is gone, for its daemon to make it again."""
_SAVE_DELAY_S = 1.0
"""Collect changes this long before the table is written to disk."""
_SAVE_EXPIRIES_S = 60.0
"""The same when only expiries have changed: thousands of hosts renew all the time."""
_LEASES_AT_ONCE = 1000
"""So many leases are taken over before others get a turn; about 10 ms."""
_LOGGED_EVENTS = 20
"""So many peers that change at once are named one by one in the log; of more only the number is."""
_LOGGED_SKIPPED = 200
"""So many leases that cannot be used are named in the log per change; `udptun status` names all."""
_SKIPPED_CHARS = 300
"""What is wrong may be a megabyte long."""
_RECONNECT_S = (0.1, 0.5)
"""First and longest wait before the store is asked again.  The longest is what a host may be behind once it is back;
each wait is made up to a third shorter by chance, so that hosts don't ask all at once."""
_SAY_AGAIN_S = (10.0, 3600.0)
"""When a store that is away is mentioned again, first and at most; six times later each time."""
_CALM_S = 15.0
"""A watch that has not failed for so long works, even with nothing to report (a locked file fails after 10 s)."""
_CLAIM_PATIENCE_S = 0.3
"""How long a claim that was interrupted may take to end."""
_KEPT_SKIPPED = 1000
"""How many lines about skipped items of the store are remembered."""
_PROOF_S = 60.0
"""We show the same host that we are alive once in so long: two that both think they were first would fight."""

PeersChanged = Callable[[Sequence[LeaseEvent]], Awaitable[None]]
ParseNetConf = Callable[[str, str], NetConf]
"""Makes a configuration of a text and the name of its place, and knows the backends' keys.  Raises ConfigError."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Start:
    """What a daemon starts from: the text of net-conf.json and, when the store is away, what the last run knew."""

    config: str
    last: LastLeases | None = None


async def find_start(store: Store, state_dir: Path, clock: Clock, parse: ParseNetConf) -> Start:
    """The network config in the store or, while there is none to be had, that of the last run; without either it waits.

    Raises ConfigError when a person has to mend it, and that person is here: with a remote store it waits.
    """

    async def ask() -> str:
        try:
            text = await store.network_config()
            parse(text, store.config_name)
        except ConfigError as exc:
            if store.is_remote:
                raise StoreUnavailableError(str(exc)) from exc
            raise
        return text

    async def recall() -> saved.Remembered:
        return await asyncio.to_thread(saved.load, state_dir, None, clock.unix_s())

    answer = await _ask_or_recall("no network config", store, ask, recall, clock)
    return Start(answer) if isinstance(answer, str) else Start(answer.config, answer)


async def _ask_or_recall(
    lack: str,
    store: Store,
    ask: Callable[[], Coroutine[None, None, T]],
    recall: Callable[[], Awaitable[saved.Remembered]],
    clock: Clock,
) -> T | LastLeases:
    """What the store answers or, when it does not do so soon, what the last run knew; without either it waits.

    `lack` says, for the log, what there is not without an answer.
    """
    outage, pause = _Outage(lack, store.name, clock), _Pause()
    doing = ""
    while True:
        answer = asyncio.create_task(ask())
        try:
            await asyncio.wait([answer], timeout=_PATIENCE_S)
            if not doing and (problem := _unavailable(answer, store)):
                found = await recall()
                # Reading a large table takes a while, too.
                if found.last is not None and (problem := _unavailable(answer, store)):
                    log.warning("%s, beginning with the table of the last run error=%r", lack, problem)
                    return found.last
                doing = f"waiting for it, as there is no table of a last run to begin with: {found.reason}"
                if problem:
                    outage.goes_on(problem, doing)
            await asyncio.wait([answer])
            if not (problem := _unavailable(answer, store)):
                outage.end()
                return answer.result()
            outage.goes_on(problem, doing)
        finally:
            answer.cancel()
        await pause.sleep()


def _unavailable(answer: asyncio.Task[Any], store: Store) -> str:
    """Why there is no answer; empty when there is one."""
    if not answer.done():
        return f"{store.name} has not answered within {_PATIENCE_S:g} s"
    exc = answer.exception()
    return str(exc) if isinstance(exc, StoreUnavailableError) else ""


class _Outage:
    """Says in few lines that the store is away: each reason once, and now and then that it still is."""

    def __init__(self, lack: str, store_name: str, clock: Clock) -> None:
        self._lack = lack
        self._store_name = store_name
        self._clock = clock
        self._said: set[str] = set()
        self._began_s = self._say_again_s = 0.0
        self.reason = ""
        """Empty while it answers."""

    def goes_on(self, reason: str, doing: str) -> None:
        """It failed once more; `doing` says what we do meanwhile."""
        now_s = self._clock.elapsed_s()
        if not self.reason:
            self._began_s, self._say_again_s = now_s, _SAY_AGAIN_S[0]
        self.reason = reason
        away_s = now_s - self._began_s
        if reason not in self._said:
            self._said.add(reason)
            log.warning("%s, %s error=%r", self._lack, doing, reason)
        elif away_s >= self._say_again_s:
            log.warning("still %s, %s for_s=%.0f error=%r", self._lack, doing, away_s, reason)
        while away_s >= self._say_again_s:
            self._say_again_s += min(5 * self._say_again_s, _SAY_AGAIN_S[1])

    def end(self) -> None:
        """It answers."""
        if self.reason:
            away_s = self._clock.elapsed_s() - self._began_s
            log.info("lease store answers again store=%s after_s=%.1f", self._store_name, away_s)
        self.reason = ""
        self._said.clear()


class _Pause:
    """Waits twice as long each time, a little less by chance; see _RECONNECT_S."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._next_s, self._longest_s = _RECONNECT_S

    async def sleep(self) -> None:
        await asyncio.sleep(self._next_s * random.uniform(2 / 3, 1))
        self._next_s = min(2 * self._next_s, self._longest_s)


class Membership:
    """Holds `own`, our lease, and (from `join` on) `table`, the peers; tells `on_change` what to do about the latter.

    `start` is what `conf` was made of.  `margin_s`: renew so long before the lease expires.  `refusal` is the
    backend's: why a lease is no peer of it.  The store stays the caller's.
    """

    table: LeaseTable

    def __init__(
        self,
        store: Store,
        start: Start,
        conf: NetConf,
        me: Identity,
        state_dir: Path,
        margin_s: float,
        refusal: Callable[[Lease], str | None],
        on_change: PeersChanged,
        parse: ParseNetConf,
        clock: Clock,
    ) -> None:
        self._store = store
        self._config = start.config
        self._last = start.last
        self._conf = conf
        self._me = me
        self._state_dir = state_dir
        self._margin_s = margin_s
        self._refusal = refusal
        self._on_change = on_change
        self._parse = parse
        self._clock = clock
        self._clock_ahead_s = clock.unix_s() - clock.elapsed_s()
        self._own: Lease | None = None
        self._is_lost = False
        """Whether the store no longer has our lease as we hold it."""
        self._is_provisional = False
        """Whether our lease is the last run's, and the store has not been asked yet."""
        self._must_list = False
        """Whether the table may lack what the store has and would not tell again."""
        self._is_failing = False
        """Whether the store did not answer when it was asked last."""
        self._has_moved = False
        """Whether the store still has our lease with an address that we no longer have."""
        self._own_news = asyncio.Event()
        self._own_problem = ""
        self._outage = _Outage("lease store unavailable", store.name, clock)
        self._asking = asyncio.Lock()
        """Held while the store is asked for anything but the watch: one thing at a time (stores/base.py)."""
        self._dirty = asyncio.Event()
        self._is_saved = False
        """Whether the file has every expiry as the table has it."""
        self._saving: asyncio.Future[None] | None = None
        self._skipped: tuple[str, ...] = ()
        self._said: frozenset[str] = frozenset()
        self._clones: dict[str, str] = {}
        self._leaving: dict[str, float] = {}
        """The keys of peers that the store no longer has, and when they go (time elapsed)."""
        self._news_of_leaving = asyncio.Event()
        self._revision = 0
        self._claim: asyncio.Task[Lease] | None = None
        """The one of `join`."""
        self._held_before: frozenset[str] = frozenset()
        """The keys that were taken when `join` chose."""
        self._replaced: frozenset[Node] = frozenset()
        """Whose leases `join` took over: the later one of us and them is us."""
        self._taker: Node | None = None
        """Who wrote our lease last, when it was not us."""
        self._proofs: dict[Node, float] = {}
        """When we last took our lease back from a host that had taken it over (time elapsed)."""

    @property
    def own(self) -> Lease:
        """Our lease; only after `join`."""
        if self._own is None:
            raise LeaseError("no lease is held yet")
        return self._own

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line for each lease in the store that is not used, naming it and the reason."""
        return (*self._skipped, *(f"{key}: {reason}" for key, reason in list(self.table.refused.items())))

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong with our lease or with the store right now."""
        expired = ""
        if self._outage.reason and self.own.is_expired(self._clock.unix_s()):
            expired = f"our lease {self.own.subnet} has expired, and another host may get it, while the store is away"
        return tuple(filter(None, (self._own_problem, expired, self._outage.reason, *self._clones.values())))

    async def join(self, attrs: LeaseAttrs, choose: Chooser) -> None:
        """Get our lease: the one we had, or a new one.  Raises ConfigError when it cannot be used.

        While the store is away it is the last run's, or, when that is over, we wait.
        """
        seen: list[Lease] = []
        dropped: list[str] = []

        def choose_and_remember(leases: Sequence[Lease]) -> SubnetChoice:
            # Asked again, as after a lost race: the last answer counts.
            choice = choose(leases)
            seen[:], dropped[:] = leases, choice.drop
            self._held_before = frozenset(lease.key for lease in leases)
            return choice

        async def claim() -> Lease:
            self._claim = asyncio.create_task(self._store.claim(attrs, choose_and_remember), name="claim lease")
            # Shielded: a claim that is cancelled may happen all the same, and then `leave_if_new` has to know of it.
            return await asyncio.shield(self._claim)

        got: Lease | LastLeases
        if self._last is not None and self._is_usable(self._last):
            got = self._last
        else:
            got = await _ask_or_recall("no lease", self._store, claim, self._recall, self._clock)
        if isinstance(got, Lease):
            own = got
        else:
            if self._claim is not None:
                self._claim.cancel()
            own = replace(got.own, attrs=attrs)
            self._is_provisional = self._must_list = True
        self._own, self._last = own, None if isinstance(got, Lease) else got
        self.table = LeaseTable(self._conf.network, own.subnet, self._is_own, self._refusal)
        self._replaced = self._who_held([lease for lease in seen if lease.key in (own.key, *dropped)])
        if (reason := validate(own, self._conf.network)) is not None:
            raise ConfigError(f"our lease in {self._store.name} cannot be used: {reason}")
        if self._is_provisional:
            log.warning("lease of the last run in use, the store will be asked subnet=%s", own.subnet)
        else:
            log.info("lease acquired subnet=%s public_ip=%s store=%s", own.subnet, attrs.public_ip, self._store.name)

    async def catch_up(self) -> None:
        """Take over the store's present state or, while it is away, that of the last run."""
        if self._last is None:
            try:
                await self._list()
                return
            except StoreUnavailableError as exc:
                self._outage.goes_on(str(exc), "beginning with the table of the last run")
                self._last = (await self._recall()).last
        if self._last is not None:
            await self._reset(self._last.peers)
            log.info("peers recalled from the last run n_peers=%d", len(self.table.peers))
            self._last = None

    def move(self, me: Identity, attrs: LeaseAttrs) -> None:
        """Be at another address from now on, with the same subnet; `run` tells the store at once, until it knows."""
        self._me = me
        self._own = replace(self.own, attrs=attrs)
        self._has_moved = True
        self._own_news.set()

    async def run(self) -> None:
        """Follow the store, renew our lease, expire the others' and save the table, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(), name="follow leases")
                tasks.create_task(self._hold(), name="hold lease")
                tasks.create_task(self._let_go(), name="let peers go")
                if not self._store.is_remote:
                    tasks.create_task(self._expire(), name="expire leases")
                tasks.create_task(self._keep_saved(), name="save leases")
        finally:
            if self._saving is not None:
                await self._saving
            if self._dirty.is_set() or not self._is_saved:
                self._save(self._to_save())

    async def leave_if_new(self) -> None:
        """Give our lease back unless somebody, or we in an earlier run, had it before `join`.

        When `join` was interrupted, its claim gets a moment to end.
        """
        if self._claim is None:
            return
        await asyncio.wait([self._claim], timeout=_CLAIM_PATIENCE_S)
        if not self._claim.done():
            self._claim.cancel()
        elif self._claim.cancelled() or self._claim.exception() is not None:
            return
        elif self._claim.result().key not in self._held_before:
            await self._store.release(self._claim.result())

    # ---------------------------------------------------------------------------------------- who is who

    def _is_own(self, lease: Lease) -> bool:
        """Whether a lease is none of a peer's: it is at our address, or is our own of before we moved."""
        return self._me.owns(lease) or (
            lease.subnets == self.own.subnets and lease.attrs.node_id == self._me.node_id
        )

    def _who_held(self, leases: Iterable[Lease]) -> frozenset[Node]:
        """Of leases that are ours now: who else may think that they are theirs, with a line for each."""
        found = frozenset(self._me.node_of(lease) for lease in leases if not self._me.must_have_written(lease))
        for writer in found:
            log.warning(
                "the lease %s of another node is ours now: it was %s, we are %s; if that node is alive, %s",
                self.own.subnet,
                writer,
                self._me.node_of(self.own),
                self._remedy(writer),
            )
        return found

    def _remedy(self, other: Node) -> str:
        if other.node_id == self._me.node_id:
            return (
                f"one of the two is a copy of the other: stop it there, delete {self._state_dir}/node-id and the "
                "subnet.env, and start it again"
            )
        return f"start one of the two with another --public-ip{' or Backend.Port' if self._me.port else ''}"

    def _may_take_back(self, writer: Node) -> bool:
        """Whether our lease, which `writer` has written, was ours first, and it has not been shown that we live."""
        if writer in self._replaced:
            return False
        shown_s = self._proofs.get(writer)
        return self._me.is_double(writer) and (shown_s is None or self._clock.elapsed_s() - shown_s >= _PROOF_S)

    # ---------------------------------------------------------------------------------------- the others

    async def _follow(self) -> None:
        pause = _Pause()
        while True:
            calm = None
            try:
                if self._is_provisional:
                    await self._confirm()
                while self._must_list:
                    await self._list()
                self._is_failing = False
                # A watch is silent while nothing changes, so that only time tells whether it works.
                calm = asyncio.get_running_loop().call_later(_CALM_S, self._store_answers)
                async with aclosing(self._store.watch(self._revision)) as batches:
                    async for batch in batches:
                        pause.reset()
                        self._store_answers()
                        await self._take_batch(batch)
            except (StoreUnavailableError, ConfigError) as exc:
                self._is_failing = True
                self._outage.goes_on(str(exc), "forwarding on with the last table")
                await pause.sleep()
            finally:
                if calm is not None:
                    calm.cancel()

    def _store_answers(self) -> None:
        if self._outage.reason:
            # Whoever waits to write our lease need wait no longer.
            self._own_news.set()
        self._outage.end()

    async def _confirm(self) -> None:
        """Claim the lease that we began with."""
        config = await self._store.network_config()
        network = self._parse(config, self._store.name).network
        if network != self._conf.network:
            raise ConfigError(f"Network is {network} in {self._store.name}, not {self._conf.network}; restart to move")
        if config != self._config:
            log.warning("network config changed since the last run; SIGHUP applies it, as far as that goes")
        try:
            await self._take_again()
        except LeaseLostError as exc:
            self._is_lost = True
            self._say_own_problem("confirmed", exc)
        self._is_provisional = False
        self._own_news.set()

    async def _list(self) -> None:
        self._must_list = False  # what expires from here on sets it again
        try:
            async with self._asking:
                snapshot = await self._store.snapshot()
        except BaseException:
            self._must_list = True
            raise
        self._store_answers()
        await self._take_snapshot(snapshot)

    async def _take_batch(self, batch: WatchBatch) -> None:
        if batch.snapshot is not None:
            await self._take_snapshot(batch.snapshot)
            return
        self._mind_the_clock()
        self._say_skipped(tuple(dict.fromkeys((*self._skipped, *batch.skipped)))[-_KEPT_SKIPPED:])
        events = self._hold_back(batch.events)
        for at in range(0, len(events), _LEASES_AT_ONCE):
            await self._apply(self.table.update(events[at : at + _LEASES_AT_ONCE]))
        self._revision = batch.revision
        for event in batch.events:
            # What was written before we wrote it last no longer matters.
            if event.lease.key == self.own.key and event.lease.revision >= self.own.revision:
                self._check_own(event)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        self._mind_the_clock()
        self._say_skipped(snapshot.skipped)
        there = {lease.key for lease in snapshot.leases}
        gone = [lease for key, lease in self.table.peers.items() if key not in there]
        self._leaving = {lease.key: self._leaving.get(lease.key, self._goes_at()) for lease in gone}
        self._news_of_leaving.set()
        await self._reset((*snapshot.leases, *gone))
        self._revision = snapshot.revision
        mine = next((lease for lease in snapshot.leases if lease.key == self.own.key), None)
        self._check_own(LeaseEvent(EventType.REMOVED, self.own) if mine is None else LeaseEvent(EventType.ADDED, mine))

    def _hold_back(self, events: Iterable[LeaseEvent]) -> list[LeaseEvent]:
        """What of the events is to be done now: all but the end of a peer."""
        now: list[LeaseEvent] = []
        for event in events:
            key = event.lease.key
            if event.type is EventType.REMOVED and key in self.table.peers:
                self._leaving.setdefault(key, self._goes_at())
                self._news_of_leaving.set()
            else:
                self._leaving.pop(key, None)
                now.append(event)
        return now

    def _goes_at(self) -> float:
        return self._clock.elapsed_s() + _GRACE_S

    async def _let_go(self) -> None:
        """Drop the peers whose moment of grace is over."""
        while True:
            if not self._leaving:
                self._news_of_leaving.clear()
                await self._news_of_leaving.wait()
            await asyncio.sleep(min(self._leaving.values(), default=0) - self._clock.elapsed_s())
            now_s = self._clock.elapsed_s()
            over = [key for key, at_s in self._leaving.items() if at_s <= now_s][:_LEASES_AT_ONCE]
            for key in over:
                del self._leaving[key]
            peers = [self.table.peers[key] for key in over if key in self.table.peers]
            await self._apply(self.table.update(LeaseEvent(EventType.REMOVED, peer) for peer in peers))

    async def _reset(self, leases: Sequence[Lease]) -> None:
        for events in self.table.reset_by_parts(leases, _LEASES_AT_ONCE):
            await self._apply(events)
            await asyncio.sleep(0)

    async def _apply(self, events: list[LeaseEvent]) -> None:
        self._say_skipped(self._skipped)
        self._is_saved = False
        if not events:
            return
        await self._on_change(events)
        self._dirty.set()
        if len(events) > _LOGGED_EVENTS:
            log.info("peers changed n_changes=%d n_peers=%d", len(events), len(self.table.peers))
        else:
            for event in events:
                subnet, attrs = event.lease.subnet, event.lease.attrs
                log.info("peer %s subnet=%s public_ip=%s", event.type.value, subnet, attrs.public_ip)
        for event in events:
            if event.lease.attrs.node_id == self._me.node_id or event.lease.key in self._clones:
                self._look_for_a_clone(event)

    def _look_for_a_clone(self, event: LeaseEvent) -> None:
        self._clones.pop(event.lease.key, None)
        if event.type is EventType.ADDED and event.lease.attrs.node_id == self._me.node_id:
            writer = self._me.node_of(event.lease)
            line = (
                f"the lease {event.lease.subnet} of {writer} has our NodeID: it is our own of before we moved, or "
                f"{self._remedy(writer)}"
            )
            self._clones[event.lease.key] = line
            log.warning("%s", line)

    def _say_skipped(self, skipped: Iterable[str]) -> None:
        """One line for each item that is newly refused."""
        self._skipped = tuple(skipped)
        if not self._skipped and not self.table.refused and not self._said:
            return
        now = frozenset(self.skipped)
        new = sorted(now - self._said)
        for line in new[:_LOGGED_SKIPPED]:
            log.warning("lease skipped %s", line[:_SKIPPED_CHARS])
        if len(new) > _LOGGED_SKIPPED:
            log.warning("leases skipped n_more=%d; `udptun status` names them", len(new) - _LOGGED_SKIPPED)
        self._said = now

    async def _expire(self) -> None:
        """Drop what has expired while the store is away, which would say so itself (see the module's text)."""
        while True:
            self._mind_the_clock()
            now_s = self._clock.unix_s()
            next_s = self.table.next_expiry_s()
            if self._is_failing and next_s is not None and next_s <= now_s:
                self._must_list = True
                await self._apply(self.table.expire(now_s))
            await asyncio.sleep(_EXPIRY_CHECK_S)

    def _mind_the_clock(self) -> None:
        """Move all expiries along when somebody has set the clock."""
        ahead_s = self._clock.unix_s() - self._clock.elapsed_s()
        # A clock that is slewed goes 0.05 % wrong at most: that is left to add up.
        set_by_s, self._clock_ahead_s = ahead_s - self._clock_ahead_s, ahead_s
        if abs(set_by_s) < _CLOCK_SET_S:
            return
        log.warning("the clock was set by %+.0f s: leases last as long as they would have", set_by_s)
        self.table.postpone(set_by_s)
        if self._own is not None and self._own.expires_s is not None:
            self._own = replace(self._own, expires_s=self._own.expires_s + set_by_s)
        self._dirty.set()

    # ---------------------------------------------------------------------------------------- our own

    def _check_own(self, event: LeaseEvent) -> None:
        """See what the store says about our own lease; `_hold` does what there is to do."""
        if self._has_moved:
            return
        self._is_lost = event.type is EventType.REMOVED or event.lease.attrs != self.own.attrs
        self._taker = None
        if not self._is_lost:
            self._own, self._own_problem = event.lease, ""
        elif event.type is EventType.REMOVED:
            log.warning("our lease is gone from the store, taking it again subnet=%s", self.own.subnet)
        else:
            self._taker = self._me.node_of(event.lease)
        self._own_news.set()

    async def _hold(self) -> None:
        """Renew our lease by margin, and take it again when the store has lost it."""
        retry_s = 0.0
        while True:
            self._mind_the_clock()
            expires_s = self.own.expires_s
            due_s = _CLOCK_CHECK_S if expires_s is None else expires_s - self._margin_s - self._clock.unix_s()
            if self._is_provisional or (due_s > 0 and not self._is_lost and not self._has_moved):
                await self._wait_for_own_news(_CLOCK_CHECK_S if self._is_provisional else min(due_s, _CLOCK_CHECK_S))
                continue
            was_lost = self._is_lost
            try:
                await (self._take_again() if was_lost else self._renew())
                retry_s = 0.0
            except (LeaseError, ConfigError) as exc:
                if isinstance(exc, LeaseLostError) and not was_lost:
                    self._is_lost = True
                    continue
                self._say_own_problem("taken again" if was_lost else "renewed", exc)
                # Nobody else has it: the sooner it is in the store again, the better.
                is_urgent = (was_lost or self._has_moved) and not isinstance(exc, LeaseLostError)
                retry_s = min(max(1.0, 2 * retry_s), _RENEW_RETRY_S) if is_urgent else _RENEW_RETRY_S
                await self._wait_for_own_news(retry_s)

    def _say_own_problem(self, attempt: str, exc: LeaseError | ConfigError) -> None:
        if str(exc) != self._own_problem:
            self._own_problem = str(exc)
            log.error("our lease cannot be %s, forwarding on error=%r", attempt, str(exc))

    async def _wait_for_own_news(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._own_news.wait()
        self._own_news.clear()

    async def _renew(self) -> None:
        asked = self.own
        async with self._asking:
            renewed = await self._store.renew(asked)
        self._has_moved = self.own.attrs != asked.attrs  # once more, meanwhile
        self._own = replace(renewed, attrs=self.own.attrs) if self._has_moved else renewed
        self._own_problem = ""
        self._dirty.set()
        log.info("lease renewed subnet=%s", self.own.subnet)

    async def _take_again(self) -> None:
        async with self._asking:
            lease = await self._store.claim(self.own.attrs, self._same_subnet_again)
        if lease.subnets != self.own.subnets:
            raise LeaseLostError(
                f"{self._store.name} gives this host {lease.subnet} now, not {self.own.subnet}; restart to use it"
            )
        taker, self._taker = self._taker, None
        self._own, self._is_lost, self._own_problem, self._has_moved = lease, False, "", False
        self._dirty.set()
        if taker is None or taker == self._me.node_of(lease):
            log.info("lease taken again subnet=%s", self.own.subnet)
            return
        self._proofs[taker] = self._clock.elapsed_s()
        log.warning(
            "our lease was taken over and is ours again subnet=%s: by %s, from %s; %s",
            self.own.subnet,
            taker,
            self._me.node_of(lease),
            self._remedy(taker),
        )

    def _same_subnet_again(self, leases: Sequence[Lease]) -> SubnetChoice:
        for lease in leases:
            if not lease.subnet.overlaps(self.own.subnet) or self._me.must_have_written(lease):
                continue
            writer = self._me.node_of(lease)
            if lease.subnets == self.own.subnets and self._may_take_back(writer):
                continue
            if writer in self._replaced:
                raise LeaseLostError(
                    f"{self.own.subnet}, which we took over, is {writer}'s again, which so is alive; we are "
                    f"{self._me.node_of(self.own)} and leave it alone: {self._remedy(writer)}"
                )
            raise LeaseLostError(
                f"{self.own.subnet} is leased to {writer.public_ip} (node {writer.node_id or 'without id'}) now; "
                "restart to lease another subnet"
            )
        return SubnetChoice(self.own.subnets)

    # ---------------------------------------------------------------------------------------- the last table

    async def _recall(self) -> saved.Remembered:
        """What the last run knew, if it can be used now."""
        found = await asyncio.to_thread(saved.load, self._state_dir, self._conf.network, self._clock.unix_s())
        if found.last is not None and not self._is_usable(found.last):
            return saved.Remembered(None, f"it is of {self._me.node_of(found.last.own)}, not of {self._me.node_id}")
        return found

    def _is_usable(self, last: LastLeases) -> bool:
        """Whether it was this node's; its address may have changed since."""
        return last.own.attrs.node_id == self._me.node_id

    async def _keep_saved(self) -> None:
        self._dirty.set()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAVE_EXPIRIES_S):
                    await self._dirty.wait()
            if self._is_saved and not self._dirty.is_set():
                continue
            await asyncio.sleep(_SAVE_DELAY_S)
            # In a thread: thousands of leases are text and on the disk only after a while.  `run` waits for it.
            self._saving = asyncio.get_running_loop().run_in_executor(None, self._save, self._to_save())
            await asyncio.shield(self._saving)

    def _to_save(self) -> LastLeases | None:
        """The table as it is; None when our lease is not ours, and nothing to begin with."""
        self._mind_the_clock()
        self._dirty.clear()
        self._is_saved = True
        if self._is_lost:
            return None
        return LastLeases(self._config, self._conf.network, self.own, tuple(self.table.peers.values()))

    def _save(self, last: LastLeases | None) -> None:
        try:
            if last is None:
                saved.forget(self._state_dir)
            else:
                saved.save(self._state_dir, last, self._clock.unix_s())
                log.debug("lease table saved n_peers=%d", len(last.peers))
        except KernelError as exc:
            log.warning("the lease table is not saved error=%r", str(exc))

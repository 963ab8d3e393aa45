"""Our place among the hosts: hold our own lease, and follow everyone else's.

    store --claim--> start            the first lease, from the store or from the last run
    store <--renew-- own              our lease, kept in the store; doubles.py knows when another node may have it
    store --watch--> follow --> peers --difference--> whoever made us
                                  |
                                saved                 the table, for the next start

Each of these modules has an object with its own few attributes, and `Membership` joins them.  The store says what is,
and `LeaseTable` decides what of it can be used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from udptun.config.net_conf import NetConf
from udptun.core.clock import Clock
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, Subnets, validate
from udptun.core.lease_table import LeaseTable
from udptun.core.network_state import IPNetwork
from udptun.kernel.supervisor import Supervisor
from udptun.membership.allocate import left_reservations
from udptun.membership.doubles import Clones, Doubles
from udptun.membership.follow import Follower
from udptun.membership.former import FormerLease, UndecidedError
from udptun.membership.identity import Identity
from udptun.membership.lease_clock import LeaseClock
from udptun.membership.outage import Outage
from udptun.membership.own import OwnLease
from udptun.membership.peers import Peers, PeersChanged
from udptun.membership.saved import LastLeases, Remembered, SavedTable
from udptun.membership.start import FirstClaim, ParseNetConf, Start, ask_or_recall, is_ours, recall
from udptun.stores.base import Chooser, Store

log = logging.getLogger(__name__)


class Membership:
    """Holds `own`, our lease, and `tables`, the peers, and tells `on_change` each difference among the latter.

    `join`, `catch_up` and `run` are called in this order; the other members may be used from `join` on, and
    `leave_if_new` always.  `start` is what `conf` was made of.  `margin_s`: renew so long before the lease expires.
    No host's address may lie in what the backend has `claimed`, which names each family that is carried, IPv4 first.
    `refusal` is the backend's: why a lease is no peer of it; `peer_types` and `outer` as well.  The store stays the
    caller's.
    """

    def __init__(
        self,
        store: Store,
        start: Start,
        conf: NetConf,
        me: Identity,
        state_dir: Path,
        margin_s: float,
        claimed: Mapping[Family, Collection[IPNetwork]],
        refusal: Callable[[Lease, Family], str | None],
        on_change: PeersChanged,
        parse: ParseNetConf,
        clock: Clock,
        peer_types: Collection[str] = (),
        *,
        outer: Callable[[LeaseAttrs, Family], Family],
    ) -> None:
        self._store = store
        self._config = start.config
        self._last = start.last
        self._conf = conf
        self._state_dir = state_dir
        self._margin_s = margin_s
        self._families = tuple(claimed)
        self._claimed = [*chain.from_iterable(claimed.values())]
        self._refusal = refusal
        self._peer_types = peer_types
        self._outer = outer
        self._on_change = on_change
        self._parse = parse
        self._clock = clock
        self._lease_clock = LeaseClock(clock, self._postpone)
        self._doubles = Doubles(me, state_dir)
        self._clones = Clones(self._doubles)
        store.want_families(conf.families)
        self._outage = Outage("lease store unavailable", store.name, clock)
        self._first_claim = FirstClaim(store)
        self._saved = SavedTable(state_dir, self._to_save, clock)
        self._must_reconsider = asyncio.Event()
        self._supervisor = Supervisor()
        # Made by `join`.
        self._own: OwnLease
        self._peers: Peers
        self._follower: Follower

    @property
    def own(self) -> Lease:
        """Our lease."""
        return self._own.lease

    @property
    def table(self) -> LeaseTable:
        """The peers by the first family: IPv4 where that is carried."""
        return self._peers.table

    @property
    def tables(self) -> Sequence[LeaseTable]:
        """The peers by each family that is carried, and that our lease has a subnet of."""
        return self._peers.tables

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line for each lease in the store that is not used, naming it and the reason."""
        return self._peers.skipped.lines

    @property
    def of_other_type(self) -> list[Lease]:
        """By subnet, of the hosts that are not reached because of their BackendType."""
        return self._peers.other_types.leases

    @property
    def store_answers(self) -> bool:
        """Whether the store is not away."""
        return not self._outage.reason

    @property
    def store_answered_s(self) -> float | None:
        """When the store last answered or told of a change, Unix seconds; None: not yet in this run."""
        return self._outage.answered_s

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong with our lease or with the store right now."""
        expired = ""
        # The bare clock: status asks on another thread.
        if self._outage.reason and self.own.is_expired(self._clock.unix_s()):
            expired = f"our lease {self.own.subnet} has expired, and another host may get it, while the store is away"
        lines = (self._own.problem, expired, self._outage.reason, *self._clones.lines.values(), *self._peers.problems)
        lines += self._store.problems
        return (*filter(None, lines), *self._supervisor.problems)

    async def join(self, attrs: LeaseAttrs, choose: Chooser, former: FormerLease | None = None) -> None:
        """Get our lease: the one we had, or a new one.  Raises ConfigError when it cannot be used.

        While the store is away it is the last run's, or, when that is over, we wait.  `former` is the chooser's.
        """
        got = await self._ask_or_recall(attrs, choose)
        if isinstance(got, LastLeases):
            lease, self._last = replace(got.own, attrs=attrs), got
        else:
            lease, self._last = got, None
        if all(lease.subnets.of(family) is None for family in self._families):
            families = " or ".join(map(str, self._families))
            raise ConfigError(f"our lease in {self._store.name} has no subnet of {families}, only {lease.subnet}")
        self._make_parts(lease, attrs, is_provisional=self._last is not None)
        seen = self._first_claim.take_seen()
        dropped = [other for other in seen if self._first_claim.is_dropped(other)]
        self._doubles.took_over([*dropped, *(other for other in seen if other.key == lease.key)], lease)
        for family in self._families:
            if lease.subnets.of(family) is None:
                continue
            network, outer = self._conf.pool(family).network, self._outer(lease.attrs, family)
            if (reason := validate(lease, family, network, self._claimed, outer)) is not None:
                raise ConfigError(f"our lease in {self._store.name} cannot be used: {reason}")
        if self._last is not None:
            log.warning("lease of the last run in use, the store will be asked subnet=%s", lease.subnet)
        else:
            where = self._store.name
            log.info("lease acquired subnet=%s public_ip=%s store=%s", lease.subnets, attrs.host_address, where)
            for other in dropped:
                log.info("lease given up subnet=%s instead=%s", other.subnets, lease.subnets)
            for line in left_reservations(self._conf, self._doubles.me, seen, lease):
                log.warning("%s", line)
            if former is not None and (line := former.left_alone(seen, lease)):
                log.warning("%s", line)

    async def catch_up(self) -> None:
        """Take over the store's present state or, while it is away, that of the last run."""
        if self._last is None:
            try:
                await self._follower.list()
                return
            except StoreUnavailableError as exc:
                self._outage.goes_on(str(exc), "beginning with the table of the last run")
                self._last = (await self._recall()).last
        if self._last is not None:
            await self._peers.recall(self._last.peers)
            log.info("peers recalled from the last run n_peers=%d", len(self.table.peers))
            self._last = None

    def move(self, me: Identity, attrs: LeaseAttrs) -> None:
        """Be at another address from now on, or say something else of us, with the same subnet.

        `run` tells the store at once, until it knows.
        """
        self._own.move(me, attrs)
        self.reconsider()

    def reconsider(self) -> None:
        """`refusal` has other answers from now on; `run` looks at every lease anew."""
        self._must_reconsider.set()

    async def run(self) -> None:
        """Follow the store, renew our lease, expire the others' and save the table, until cancelled."""
        try:
            keep = self._supervisor.keep
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(keep("follow leases", self._follower.run))
                tasks.create_task(keep("hold lease", self._own.hold))
                tasks.create_task(keep("let peers go", self._peers.let_go))
                tasks.create_task(keep("change peers again", self._peers.change_again))
                tasks.create_task(keep("reconsider leases", self._reconsider))
                if not self._store.is_remote:
                    tasks.create_task(keep("expire leases", self._follower.expire))
                tasks.create_task(keep("save leases", self._saved.keep))
        finally:
            await self._saved.finish()

    async def given_instead(self) -> None:
        """Return when the store has given this host other subnets, for which the daemon has to begin again."""
        await self._own.given_instead.wait()

    async def leave_if_new(self) -> None:
        """Give our lease back unless somebody, or we in an earlier run, had it before `join`."""
        await self._first_claim.undo()

    async def _reconsider(self) -> None:
        """After each move: a lease at our old address may be a peer's, and one at the new address is none's."""
        while True:
            await self._must_reconsider.wait()
            self._must_reconsider.clear()
            await self._peers.reconsider()

    async def _ask_or_recall(self, attrs: LeaseAttrs, choose: Chooser) -> Lease | LastLeases:
        """A lease from the store, or the last run's while it is away."""
        if self._last is not None and is_ours(self._last, self._doubles.me):
            return self._last
        while True:
            try:
                got = await ask_or_recall(
                    "no lease", self._store, lambda: self._first_claim.make(attrs, choose), self._recall, self._clock
                )
                break
            except UndecidedError as exc:
                # Out here, because the time that it takes says nothing about the store.
                await exc.find_out()
        if isinstance(got, LastLeases):
            self._first_claim.cancel()
        return got

    async def _recall(self) -> Remembered:
        return await recall(self._state_dir, self._conf.network, self._doubles.me, self._clock)

    def _make_parts(self, lease: Lease, asked: LeaseAttrs, *, is_provisional: bool) -> None:
        asking = asyncio.Lock()
        self._own = OwnLease(
            self._store,
            lease,
            asked,
            self._doubles,
            self._margin_s,
            asking,
            self._lease_clock,
            self._saved.note_change,
            is_provisional=is_provisional,
        )
        tables = [
            self._make_table(family, own_subnet, lease.subnets)
            for family in self._families
            if (own_subnet := lease.subnets.of(family)) is not None
        ]
        self._peers = Peers(tables, asked.backend_type, self._on_change, self._clones, self._saved, self._lease_clock)
        self._follower = Follower(
            self._store,
            self._own,
            self._peers,
            self._outage,
            self._confirm,
            asking,
            self._lease_clock,
            must_list=is_provisional,
        )

    def _make_table(self, family: Family, own_subnet: IPNetwork, own: Subnets) -> LeaseTable:
        return LeaseTable(
            family,
            self._conf.pool(family).network,
            self._claimed,
            own_subnet,
            lambda other: self._doubles.is_own(other, own),
            lambda other: self._doubles.refusal(other) or self._refusal(other, family),
            self._peer_types,
            outer=lambda attrs: self._outer(attrs, family),
        )

    async def _confirm(self) -> None:
        """Claim the lease of the last run, unless the store is about another Network now: ConfigError."""
        config = await self._store.network_config()
        network = self._parse(config, self._store.name).network
        if network != self._conf.network:
            raise ConfigError(f"Network is {network} in {self._store.name}, not {self._conf.network}; restart to move")
        if config != self._config:
            log.warning("network config changed since the last run; SIGHUP applies it, as far as that goes")
        await self._own.confirm()

    def _to_save(self) -> LastLeases | None:
        """The table as it is; None when our lease is not ours, and nothing to begin with."""
        self._lease_clock.look()
        if self._own.is_lost:
            return None
        return LastLeases(self._config, self._conf.network, self.own, tuple(self._peers.usable.values()))

    def _postpone(self, seconds: float) -> None:
        """The clock was set, see lease_clock.py."""
        for table in self.tables:
            table.postpone(seconds)
        self._own.postpone(seconds)
        self._saved.note_change()

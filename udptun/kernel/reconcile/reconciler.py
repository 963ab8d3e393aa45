"""Make the kernel what the backend wants, and keep it so.

Look, compare (plan.py), apply the difference (apply.py), look again: the same way sets up, repairs and changes.  A
deleted device, a flushed address or route, a link set down and another MTU are all the same case.

What is ours is recognised by its mark and by our Network: routes by their protocol number and destination; devices by
their alias (`udptun.core.ownership`); addresses, neighbours and fdb entries by being on our device.  Nothing else is
ever changed, so a host can have several daemons, each for its Network.  Another owner's route to one of our prefixes is
reported, and stays.  A VXLAN device that fits is taken over with all that is on it; that is how a host changes over
from flanneld.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain

from udptun.core.desired import DesiredState, Pods, Sysctl
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import ROUTE_PROTOCOL, IPAddress, IPNetwork, Link, Route, RouteType
from udptun.core.ownership import Ownership
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.reconcile.apply import Device, apply
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.reconcile.contest import Contests, find_undone
from udptun.kernel.reconcile.direct import Decide, DirectRoutes
from udptun.kernel.reconcile.ownership import stray_links
from udptun.kernel.reconcile.plan import ActualState, conflicts, plan
from udptun.kernel.sysctl import read_sysctl
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.02, max_settle_s=0.15, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""One `ip link del` brings several notices within 20 ms.  150 ms bounds both the cost of the looks in a storm of
notices and the time to a repair.  Some changes (sysctls) bring no notice; the timer finds them."""
_ROUNDS = 5
"""Looks per repair.  Set-up takes three: revive the device, configure it, find nothing left to do."""
_KERNEL_PROTOCOL = 2
"""RTPROT_KERNEL: of the routes that come and go with an address."""
_MAX_NAMED = 20
"""Of the changes, and of the problems, of one repair: so many are named one by one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one repair did and could not do.

    `failures` are tried again soon.  `refusals` are settings that packets flow without.  `conflicts` and `quarrels`
    wait for a person (or another program) to give way.  `is_broken`: a failure concerns not one peer but all of them.
    `is_unfinished`: the last round still changed something, so more may be left to do.
    """

    changes: tuple[Change, ...] = ()
    failures: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    quarrels: tuple[str, ...] = ()
    is_broken: bool = False
    is_unfinished: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        return self.failures + self.refusals + self.conflicts + self.quarrels


class Reconciler:
    """Keeps the kernel at the desired state of one address family while `run` is running.

    A host with both families has two, and one may be as wanted while the other is not.  Addresses, routes and
    neighbours of the other family are not looked at, also where they are on our devices.  A device that serves both
    families is kept by both reconcilers, which want the same of it.

    All methods belong to one event loop, whose thread stays in the network namespace that is looked after.
    """

    def __init__(
        self,
        desired: DesiredState,
        device: Device | None,
        ownership: Ownership,
        family: Family = Family.IPV4,
        alias: str | None = None,
    ) -> None:
        """`device` stays the caller's; it is asked and revived, never closed.  None: every device is the kernel's.

        What `ownership` says is ours and is not desired is removed.  `alias` marks the devices; None: that of
        `ownership` does.
        """
        self._desired = desired
        self._ownership = ownership
        self._alias = alias or ownership.alias
        self._family = family
        self._device = device
        self._direct = DirectRoutes()
        self._own_links: Mapping[int, str] = {}
        """The names of our devices by their indexes, at the last look."""
        self._vxlan_indexes: frozenset[int] = frozenset()
        """Those of them that are VXLAN devices."""
        self._may_have_strays = True
        """Whether there may be devices of ours that are not desired any more."""
        self._foreign: tuple[Route, ...] = ()
        self._prefix_lengths: set[int] = set()
        self._others: frozenset[IPNetwork] = frozenset()
        """What other owners' routes in and around Network lead to."""
        # Other owners' routes are found in the whole routing table.  Thousands of routes take long to read, so it is
        # read only when something says so, and every period.
        self._must_read_foreign = True
        self._foreign_due_s = 0.0
        self._contests = Contests()
        self._busy = asyncio.Lock()
        self._loop = WatchLoop("kernel state", self._relevant_notices, self._look, _PACE)
        self.last = Outcome()
        self.changes: Counter[tuple[str, bool]] = Counter()
        """How many have been made, by object, and whether as a repair: nobody has wanted anything else meanwhile."""
        self._n_wishes = 1
        """How often something else was wanted, the first time included."""
        self._n_fulfilled = 0
        """The wish that was last carried out, but for what cannot be done."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as wanted, a line each."""
        return (*self.last.problems, *self._direct.problems, *filter(None, [self._loop.problem]))

    def set_desired(self, desired: DesiredState) -> None:
        """Want something else from now on; `run` (or the next converge) changes what differs."""
        self._desired = desired
        self._n_wishes += 1
        self._direct.set_decision((), None)
        self._look_again()

    def set_decision(self, gateways: Collection[IPAddress], decide: Decide) -> None:
        """Want from now on what `decide` says about those of `gateways` that can be reached directly.

        It is asked again whenever they change.
        """
        self._desired = self._direct.set_decision(gateways, decide) or self._desired
        self._n_wishes += 1
        self._look_again()

    def _look_again(self) -> None:
        self._must_read_foreign = True
        self._loop.wake()

    async def run(self) -> None:
        """Converge now, after every notice and every 30 s, until cancelled."""
        await self._loop.run()

    async def converge(self) -> Outcome:
        """Look and repair until there is nothing left to do, or nothing that can be done now.

        Never raises for what the kernel refuses: that is in the outcome.
        """
        async with self._busy:
            rounds: list[list[Change]] = []
            failures: tuple[str, ...] = ()
            refusals: tuple[str, ...] = self.last.refusals
            is_broken = is_unfinished = False
            conflict_lines = self.last.conflicts
            for _ in range(_ROUNDS):
                try:
                    async with Netlink() as kernel:
                        actual = await self._read_actual(kernel)
                        conflict_lines = await self._describe_conflicts(kernel, actual)
                        now_s, wish = asyncio.get_running_loop().time(), self._n_wishes
                        planned = plan(self._desired, actual, self._alias)
                        done, failed = await apply(kernel, self._device, self._contests.allow(planned, now_s))
                        self._contests.note(done, now_s)
                except KernelError as exc:
                    failures, is_broken = (str(exc),), True
                    break
                rounds.append(done)
                self.changes.update((change.object, wish == self._n_fulfilled) for change in done)
                self._note_foreign(done, failed)
                if (without := self._direct.note_refused(failed)) is not None:
                    self._desired = without
                    self._n_wishes += 1
                    continue
                refusals = tuple(_refusals(failed))
                failed = [(change, error) for change, error in failed if not isinstance(change.thing, Sysctl)]
                failures = tuple(f"{change}: {error}" for change, error in failed)
                is_broken = not all(change.is_per_peer for change, _ in failed)
                if not done:
                    self._n_fulfilled = wish
                    break
            else:
                is_unfinished = True
                failures += tuple(_describe_undone(find_undone(rounds)))
            if not failures:
                # From now on another daemon may have the Networks of our earlier runs.
                self._ownership = self._ownership.without_leftovers()
            quarrels = tuple(self._contests.problems(self._own_links))
            changes = tuple(chain.from_iterable(rounds))
            self._record(Outcome(changes, failures, refusals, conflict_lines, quarrels, is_broken, is_unfinished))
            return self.last

    async def _look(self) -> bool:
        outcome = await self.converge()
        return not (outcome.failures or outcome.is_unfinished or self._contests.has_put_off)

    def _record(self, outcome: Outcome) -> None:
        """Keep the outcome; say what was done, in one line, and what is new in its problems."""
        if outcome.changes:
            log.info("kernel state changed changes=%r", "; ".join(_first_of(outcome.changes, self._own_links)))
        known = set(self.last.problems)
        for problem in _first_of([problem for problem in outcome.problems if problem not in known]):
            log.warning("kernel state is not as wanted problem=%r", problem)
        if self.last.problems and not outcome.problems:
            log.info("kernel state is as wanted again")
        self.last = outcome

    # ---------------------------------------------------------------------------------------------- notices

    async def _relevant_notices(self) -> AsyncGenerator[frozenset[Notice], None]:
        has_neighbours = any(link.vxlan is not None for link in self._desired.links)
        async with aclosing(watch(self._family, neighbours=has_neighbours)) as batches:
            async for notices in batches:
                is_relevant = False
                for notice in notices:
                    is_relevant |= self._heed(notice)
                if is_relevant:
                    yield notices

    def _heed(self, notice: Notice) -> bool:
        """Whether to look again.  Most of a routing daemon's thousands of routes cannot be ours."""
        if notice.kind is NoticeKind.NEIGHBOUR and notice.link_index not in self._vxlan_indexes:
            return False
        is_foreign_route = notice.kind is NoticeKind.ROUTE and notice.protocol != ROUTE_PROTOCOL
        if is_foreign_route or notice.kind not in (NoticeKind.ROUTE, NoticeKind.NEIGHBOUR):
            self._direct.expect_better()
        if is_foreign_route and _may_hide_pods(notice.prefixlen, notice.dst, self._desired.pods):
            self._must_read_foreign = True
        elif is_foreign_route and notice.prefixlen not in self._prefix_lengths:
            # It may be the way to one of the gateways.
            return self._direct.is_asked
        # Another owner's route that goes together with its link has no notice of its own.
        if is_foreign_route or notice.kind is NoticeKind.OVERFLOW or self._foreign:
            self._must_read_foreign = True
        return True

    # ----------------------------------------------------------------------------------------- actual state

    async def _read_actual(self, kernel: Netlink) -> ActualState:
        if (decided := await self._direct.look(kernel)) is not None:
            self._desired = decided
            self._n_wishes += 1
        desired = self._desired
        links = {wanted.name: await kernel.link(wanted.name) for wanted in desired.links}
        family = self._family
        # The kernel gives each device a link-local IPv6 address by itself.  On the datapath's nobody needs it, and the
        # kernel would solicit routers from it.
        addresses = [
            a
            for link in links.values()
            if link
            for a in await kernel.addresses(link.index, family)
            if a.ip.version == 4 or link.vxlan is None or not a.ip.is_link_local
        ]
        vxlan = [link.index for link in links.values() if link is not None and link.vxlan is not None]
        self._own_links = {link.index: name for name, link in links.items() if link is not None}
        self._vxlan_indexes = frozenset(vxlan)
        if self._must_read_foreign or asyncio.get_running_loop().time() >= self._foreign_due_s:
            await self._read_foreign(kernel, desired)
        return ActualState(
            links,
            frozenset([self._device.name] if self._device is not None and self._device.is_attached() else []),
            tuple(addresses),
            tuple(filter(self._ownership.owns_route, await kernel.routes(ROUTE_PROTOCOL, family))),
            self._foreign,
            {s.path: read_sysctl(s.path) for wanted in desired.links for s in wanted.sysctls},
            tuple([n for index in vxlan for n in await kernel.neighbours(index, family)]),
            tuple([e for index in vxlan for e in await kernel.fdb(index)]),
            await self._stray_links(kernel, links),
            self._others,
        )

    async def _read_foreign(self, kernel: Netlink, desired: DesiredState) -> None:
        """Find other owners' routes to desired prefixes, through our devices, and in and around Network."""
        # Cleared first, so that what comes up during the reading asks for another one.
        self._must_read_foreign = False
        try:
            routes = await kernel.routes(family=self._family)
        except KernelError:
            self._must_read_foreign = True
            raise
        self._foreign_due_s = asyncio.get_running_loop().time() + _PACE.period_s
        self._others = frozenset(
            route.dst
            for route in routes
            if route.protocol != ROUTE_PROTOCOL
            and route.type == RouteType.UNICAST
            and route.oif not in self._own_links
            and _may_hide_pods(route.dst.prefixlen, int(route.dst.network_address), desired.pods)
        )
        prefixes = {route.dst for route in desired.routes_beside(self._others)}
        # 0: a default route may lead through our device.
        self._prefix_lengths = {0, *(prefix.prefixlen for prefix in prefixes)}
        self._foreign = tuple(
            route
            for route in routes
            if route.protocol not in (ROUTE_PROTOCOL, _KERNEL_PROTOCOL)
            and (route.dst in prefixes or route.oif in self._own_links)
        )

    def _note_foreign(self, done: Sequence[Change], failed: Sequence[tuple[Change, KernelError]]) -> None:
        """Have other owners' routes read again when a change says that what we know of them is out of date."""
        has_met = any(error.errno == errno.EEXIST for _, error in failed)
        has_deleted = any(
            change.verb is Verb.DELETE and isinstance(change.thing, Route) and change.thing.protocol != ROUTE_PROTOCOL
            for change in done
        )
        self._must_read_foreign |= has_met or has_deleted

    async def _stray_links(self, kernel: Netlink, wanted: Collection[str]) -> tuple[Link, ...]:
        """Devices of ours that an earlier run with another backend has left."""
        if not self._may_have_strays:
            return ()
        strays = await stray_links(kernel, self._ownership, wanted)
        self._may_have_strays = bool(strays)
        return strays

    async def _describe_conflicts(self, kernel: Netlink, actual: ActualState) -> tuple[str, ...]:
        if not actual.foreign:
            return ()
        names = {link.index: link.name for link in await kernel.links()}
        return tuple(conflicts(self._desired, actual, names))


def _may_hide_pods(prefixlen: int, first: int, pods: Pods | None) -> bool:
    """Whether a route to this prefix, whose first address is `first`, could take packets that are meant for pods."""
    if pods is None or not 0 < prefixlen <= pods.longest:
        return False
    shorter = min(prefixlen, pods.network.prefixlen)
    return (first ^ int(pods.network.network_address)) >> (pods.network.max_prefixlen - shorter) == 0


def _refusals(failed: Iterable[tuple[Change, KernelError]]) -> Iterator[str]:
    """A line for each setting that cannot be set, saying what is the case without it."""
    for change, error in failed:
        if isinstance(change.thing, Sysctl) and error.errno != errno.ENOENT:
            it = change.thing
            reason = errno.errorcode.get(error.errno, str(error.errno))
            yield (
                f"sysctl {it.path} cannot be set to {it.value} ({reason}), so {it.without}; "
                f"run `sysctl -w {it.path}={it.value}` on the host, or give the container a /proc/sys that it can write"
            )


def _describe_undone(undone: Sequence[Change]) -> Iterator[str]:
    if undone:
        yield (
            f"another program undoes {'; '.join(_first_of(undone))}; `ip monitor` shows when, have that program leave "
            "our devices and routes alone"
        )


def _first_of(items: Sequence[Change | str], link_names: Mapping[int, str] | None = None) -> list[str]:
    """The items as text.  Of very many only the first ones, and how many more there are."""
    more = len(items) - _MAX_NAMED
    named = [it if isinstance(it, str) else it.describe(link_names or {}) for it in items[:_MAX_NAMED]]
    return [*named, *([f"and {more} more"] if more > 0 else [])]

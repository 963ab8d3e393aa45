"""Make the kernel what the backend wants, and keep it so.

`plan` compares and `Reconciler` applies: one way to set up, to repair and to change.  A deleted device, a flushed
address or route, a link set down and another MTU are all the same case: look, find the difference, undo it.

What is ours is recognised by its mark: routes by their protocol number; devices by their flags (TUN) or their alias
(VXLAN); addresses, neighbours and fdb entries by being on our device.  Nothing else is ever changed; another owner's
route to one of our prefixes is reported, and stays.  A VXLAN device that fits is taken over with all that is on it:
so one changes over from flanneld.

There may be some of these for each of thousands of peers: a look reads only what is ours, `plan` costs what it is
given, not its square, and changes go to the kernel in batches.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from itertools import groupby
from pathlib import Path
from typing import Protocol

from udptun.core.desired import DesiredAddress, DesiredLink, DesiredState, Sysctl
from udptun.core.errors import KernelError
from udptun.core.network_state import (
    DEVICE_NAME,
    LINK_ALIAS,
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    IPNetwork,
    Link,
    LinkSettings,
    Neighbour,
    Route,
    RouteType,
    Vxlan,
)
from udptun.kernel import link_messages, rtnetlink
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.rtnetlink import Request
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.02, max_settle_s=0.15, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""One `ip link del` brings several notices within 20 ms.  150 ms bounds both the cost of the looks in a storm of
notices and the time to a repair.  Some changes (sysctls) bring no notice; the timer finds them."""
_ROUNDS = 5
"""Looks per repair.  Set-up takes three: revive the device, configure it, find nothing left to do."""
_PROC_SYS = Path("/proc/sys")
_KERNEL_PROTOCOL = 2
"""RTPROT_KERNEL: of the routes that come and go with an address."""
_SHOWN = 20
"""Of the changes, and of the problems, of one repair: so many are named one by one."""

Decide = Callable[[Mapping[IPv4Address, int]], DesiredState]
"""From the PublicIPs that the kernel reaches without a gateway, each with the link's index, to what is wanted."""


class Device(Protocol):
    """The device that packets go through (`udptun.kernel.tun.Tun`)."""

    name: str

    def is_attached(self) -> bool:
        """Whether its queues still reach a device of this name."""

    def reattach(self) -> None:
        """Bring a deleted device back.  Raises KernelError."""


@dataclass(frozen=True, slots=True)
class SetLink:
    link: Link
    up: bool | None = None
    mtu: int | None = None
    tx_queue_len: int | None = None
    mac: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        parts = [] if self.up is None else ["up" if self.up else "down"]
        parts += [] if self.mtu is None else [f"mtu {self.mtu}"]
        parts += [] if self.tx_queue_len is None else [f"txqueuelen {self.tx_queue_len}"]
        parts += [] if self.mac is None else [f"address {self.mac}"]
        parts += [] if self.alias is None else [f"alias {self.alias}"]
        return f"set link {self.link.name} {' '.join(parts)}"


@dataclass(frozen=True, slots=True)
class CreateVxlan:
    name: str
    vxlan: Vxlan
    mac: str
    mtu: int

    def __str__(self) -> str:
        return f"create vxlan device {self.name}"


@dataclass(frozen=True, slots=True)
class DeleteLink:
    link: Link

    def __str__(self) -> str:
        return f"delete link {self.link.name}"


@dataclass(frozen=True, slots=True)
class ReviveDevice:
    name: str

    def __str__(self) -> str:
        return f"revive device {self.name}"


@dataclass(frozen=True, slots=True)
class SetSysctl:
    sysctl: Sysctl

    def __str__(self) -> str:
        return f"set sysctl {self.sysctl.path}={self.sysctl.value}"


@dataclass(frozen=True, slots=True)
class AddAddress:
    address: Address

    def __str__(self) -> str:
        return f"add address {self.address.ip}/{self.address.prefixlen}"


@dataclass(frozen=True, slots=True)
class DeleteAddress:
    address: Address

    def __str__(self) -> str:
        return f"delete address {self.address.ip}/{self.address.prefixlen}"


@dataclass(frozen=True, slots=True)
class AddRoute:
    route: Route

    def __str__(self) -> str:
        return f"add route {describe(self.route)}"


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    route: Route

    def __str__(self) -> str:
        return f"delete route {describe(self.route)}"


@dataclass(frozen=True, slots=True)
class SetNeighbour:
    neighbour: Neighbour

    def __str__(self) -> str:
        return f"set neighbour {self.neighbour.ip} lladdr {self.neighbour.mac}"


@dataclass(frozen=True, slots=True)
class DeleteNeighbour:
    neighbour: Neighbour

    def __str__(self) -> str:
        return f"delete neighbour {self.neighbour.ip}"


@dataclass(frozen=True, slots=True)
class SetFdb:
    entry: FdbEntry

    def __str__(self) -> str:
        return f"set fdb {self.entry.mac} dst {self.entry.dst}"


@dataclass(frozen=True, slots=True)
class DeleteFdb:
    entry: FdbEntry

    def __str__(self) -> str:
        return f"delete fdb {self.entry.mac} dst {self.entry.dst}"


_Batched = AddRoute | DeleteRoute | SetNeighbour | DeleteNeighbour | SetFdb | DeleteFdb
"""Of these there may be one for each peer."""
_Single = SetLink | CreateVxlan | DeleteLink | ReviveDevice | SetSysctl | AddAddress | DeleteAddress
Change = _Batched | _Single


@dataclass(frozen=True, slots=True)
class ActualState:
    """What there is of the desired things, and all that carries our mark.

    `links` and `sysctls` hold None for what is missing.  `foreign` are other owners' routes to desired prefixes or
    through our VXLAN devices.  `stray_links` are our own that are not desired.
    """

    links: Mapping[str, Link | None]
    attached: frozenset[str]
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    foreign: tuple[Route, ...] = ()
    sysctls: Mapping[str, str | None] = field(default_factory=dict)
    neighbours: tuple[Neighbour, ...] = ()
    fdb: tuple[FdbEntry, ...] = ()
    stray_links: tuple[Link, ...] = ()


def plan(desired: DesiredState, actual: ActualState) -> list[Change]:
    """What to change, in the order to do it: first what keeps packets from leaking, last what removes leftovers.

    A missing device is only made here; what belongs on it follows from the next look.
    """
    usable: dict[str, Link] = {}
    on_links: list[Change] = []
    for wanted in desired.links:
        link = actual.links.get(wanted.name)
        if wanted.vxlan is not None:
            if link is not None and link.vxlan != wanted.vxlan:
                on_links.append(DeleteLink(link))
                link = None
            if link is None:
                on_links.append(CreateVxlan(wanted.name, wanted.vxlan, wanted.mac, wanted.mtu))
                continue
        elif link is None or wanted.name not in actual.attached:
            on_links.append(ReviveDevice(wanted.name))
            continue
        usable[wanted.name] = link
        on_links += _plan_link(wanted, link, actual)

    on_links += _plan_addresses(desired.addresses, usable, actual.addresses)
    on_links += _plan_neighbours(desired, usable, actual)
    on_links += _plan_fdb(desired, usable, actual)

    guards = [route.on(None) for route in desired.routes if route.type is not RouteType.UNICAST]
    through = [
        route.on(route.oif if route.link is None else usable[route.link].index)
        for route in desired.routes
        if route.type is RouteType.UNICAST and (route.link is None or route.link in usable)
    ]
    routes = _Routes(guards + through, actual, {link.index for link in usable.values() if link.vxlan is not None})
    return [
        *routes.add(guards),
        *on_links,
        *routes.add(through),
        *routes.delete_leftovers(),
        *(DeleteLink(link) for link in actual.stray_links),
    ]


def _plan_link(wanted: DesiredLink, link: Link, actual: ActualState) -> list[Change]:
    # Sysctls first: the kernel acts on disable_ipv6 when the device comes up.
    changes: list[Change] = [
        SetSysctl(sysctl) for sysctl in wanted.sysctls if actual.sysctls.get(sysctl.path) != sysctl.value
    ]
    change = SetLink(
        link,
        up=None if link.is_up else True,
        mtu=None if link.mtu == wanted.mtu else wanted.mtu,
        tx_queue_len=None if link.tx_queue_len >= wanted.min_tx_queue_len else wanted.min_tx_queue_len,
        mac=None if link.mac == wanted.mac or wanted.vxlan is None else wanted.mac,
        alias=None if link.alias == LINK_ALIAS or wanted.vxlan is None else LINK_ALIAS,
    )
    if change != SetLink(link):
        changes.append(change)
    return changes


def _plan_addresses(
    desired: Iterable[DesiredAddress], usable: Mapping[str, Link], have: Sequence[Address]
) -> list[Change]:
    wanted = [(usable[a.link].index, a.ip, a.prefixlen) for a in desired if a.link in usable]
    present = [(a.link_index, a.ip, a.prefixlen) for a in have]
    # A new address comes before the old one goes: with the last address all routes of the device go too.
    return [
        *(AddAddress(Address(*key)) for key in wanted if key not in present),
        *(DeleteAddress(a) for a, key in zip(have, present, strict=True) if key not in wanted),
    ]


def _plan_neighbours(desired: DesiredState, usable: Mapping[str, Link], actual: ActualState) -> list[Change]:
    wanted = [Neighbour(usable[n.link].index, n.ip, n.mac) for n in desired.neighbours if n.link in usable]
    present = set(actual.neighbours)
    places = {(n.link_index, n.ip) for n in wanted}
    return [
        *(SetNeighbour(n) for n in wanted if n not in present),
        *(DeleteNeighbour(n) for n in actual.neighbours if n.is_permanent and (n.link_index, n.ip) not in places),
    ]


def _plan_fdb(desired: DesiredState, usable: Mapping[str, Link], actual: ActualState) -> list[Change]:
    # Two peers of one MAC: the later lease has it, as it would with flannel.
    wanted = {
        (usable[e.link].index, e.mac): FdbEntry(usable[e.link].index, e.mac, e.dst)
        for e in desired.fdb
        if e.link in usable
    }
    present = set(actual.fdb)
    missing = [entry for entry in wanted.values() if entry not in present]
    # Setting replaces one destination of a MAC; a second one, if there is, goes with the next look.
    replaced = {(entry.link_index, entry.mac) for entry in missing}
    stale = [
        entry
        for entry in actual.fdb
        if entry.is_permanent
        and (entry.link_index, entry.mac) not in replaced
        and wanted.get((entry.link_index, entry.mac)) != entry
    ]
    return [*map(SetFdb, missing), *map(DeleteFdb, stale)]


class _Routes:
    """Which routes to add and delete; the kernel knows a route by its place, prefix and metric."""

    def __init__(self, wanted: Sequence[Route], actual: ActualState, own_indexes: Collection[int]) -> None:
        """`own_indexes`: of the VXLAN devices that all is ours on, whoever has put it there."""
        wanted_set = set(wanted)
        self._present = set(actual.routes)
        self._leftovers: dict[tuple[IPNetwork, int], list[Route]] = {}
        self._blocked: set[tuple[IPNetwork, int]] = set()
        same = {_way(route) for route in wanted}
        for route in actual.routes:
            if route not in wanted_set:
                self._leftovers.setdefault(_place(route), []).append(route)
        for route in actual.foreign:
            if route.oif in own_indexes or _way(route) in same:
                self._leftovers.setdefault(_place(route), []).append(route)
            else:
                self._blocked.add(_place(route))

    def add(self, wanted: Iterable[Route]) -> list[Change]:
        """Add what is missing, after what stands in its place; nothing where another owner's route does."""
        changes: list[Change] = []
        for route in wanted:
            if route not in self._present and _place(route) not in self._blocked:
                changes += map(DeleteRoute, self._leftovers.pop(_place(route), ()))
                changes.append(AddRoute(route))
        return changes

    def delete_leftovers(self) -> list[Change]:
        """Once all is added."""
        return [DeleteRoute(route) for routes in self._leftovers.values() for route in routes]


def _place(route: Route) -> tuple[IPNetwork, int]:
    return route.dst, route.metric


def _way(route: Route) -> Route:
    """The route without its owner."""
    return replace(route, protocol=0)


def conflicts(desired: DesiredState, actual: ActualState, link_names: Mapping[int, str]) -> list[str]:
    """One line for each route of another owner to a prefix that is ours, saying what it does."""
    best: dict[IPNetwork, int] = {}
    for wanted in desired.routes:
        # A blackhole route is for what no other route takes: cni0's stands before it, and well.
        if wanted.type != RouteType.BLACKHOLE:
            best[wanted.dst] = min(wanted.metric, best.get(wanted.dst, wanted.metric))
    lines = []
    for route in actual.foreign:
        if route.dst not in best:
            continue
        ours = best[route.dst]
        text = describe(route, link_names)
        effect = (
            "it takes the traffic of our route"
            if route.metric <= ours
            else "it takes over, in clear text, when our route is gone"
            if route.type == RouteType.UNICAST
            else "it stands beside our own"
        )
        lines.append(f"route {text} is not ours; {effect}; if nothing needs it, `ip route del {text}`")
    return lines


def describe(route: Route, link_names: Mapping[int, str] | None = None) -> str:
    """The route as `ip route` takes it."""
    parts = [] if route.type == RouteType.UNICAST else [_type_name(route.type)]
    parts.append(str(route.dst))
    if route.gateway is not None:
        parts.append(f"via {route.gateway}")
    if route.oif is not None:
        parts.append(f"dev {(link_names or {}).get(route.oif, f'if{route.oif}')}")
    if route.onlink:
        parts.append("onlink")
    if route.metric:
        parts.append(f"metric {route.metric}")
    parts.append(f"proto {route.protocol}")
    return " ".join(parts)


def _type_name(number: int) -> str:
    try:
        return RouteType(number).name.lower()
    except ValueError:
        return f"type {number}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one repair did and could not do.

    `failures` are tried again by themselves; `conflicts` wait for a person (or another program) to give way.
    `is_broken`: a failure concerns not one peer but all of them.
    """

    changes: tuple[Change, ...] = ()
    failures: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    is_broken: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        return self.failures + self.conflicts


class Reconciler:
    """Keeps the kernel at `desired` while `run` is running.

    All methods belong to one event loop, whose thread stays in the network namespace that is looked after.
    """

    def __init__(self, desired: DesiredState, device: Device | None) -> None:
        """`device` stays the caller's; it is asked and revived, never closed.  None: the kernel has all."""
        self._desired = desired
        self._device = device
        self._gateways: tuple[IPv4Address, ...] = ()
        self._decide: Decide | None = None
        self._direct: Mapping[IPv4Address, int] = {}
        self._own_indexes: frozenset[int] = frozenset()
        """Of the VXLAN devices, at the last look."""
        self._sweep = True
        """Whether devices of ours that nobody wants any more may be about."""
        self._loop = WatchLoop("kernel state", self._relevant_notices, self._repair, _PACE)
        self._busy = asyncio.Lock()
        self._foreign: tuple[Route, ...] = ()
        self._prefix_lengths: set[int] = set()
        # Reading the whole routing table for other owners' routes is dear on a host with thousands: only when due.
        self._survey = True
        self._survey_due_s = 0.0
        self.last = Outcome()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as wanted, a line each."""
        return (*self.last.problems, *filter(None, [self._loop.problem]))

    def set_desired(self, desired: DesiredState) -> None:
        """Want something else from now on; `run` (or the next converge) changes what differs."""
        self._desired = desired
        self._decide = None
        self._gateways = ()
        self._look_again()

    def set_decision(self, gateways: Collection[IPv4Address], decide: Decide) -> None:
        """Want what `decide` says, from now on, about those of `gateways` that the kernel reaches without another one.

        It is asked again whenever that changes.
        """
        self._gateways = tuple(gateways)
        self._decide = decide
        self._desired = decide(self._direct)
        self._look_again()

    def _look_again(self) -> None:
        self._survey = True
        self._loop.wake()

    async def converge(self) -> Outcome:
        """Look and repair until there is nothing left to do, or nothing that can be done now.

        Never raises for what the kernel refuses: that is in the outcome.
        """
        async with self._busy:
            changes: list[Change] = []
            failures: tuple[str, ...] = ()
            is_broken = False
            conflict_lines = self.last.conflicts
            for _ in range(_ROUNDS):
                try:
                    async with Netlink() as kernel:
                        actual = await self._look(kernel)
                        conflict_lines = await self._conflicts(kernel, actual)
                        todo = plan(self._desired, actual)
                        done, failed = await self._apply(kernel, todo)
                except KernelError as exc:
                    failures, is_broken = (str(exc),), True
                    break
                failures = tuple(f"{change}: {error}" for change, error in failed)
                is_broken = any(isinstance(change, _Single) for change, _ in failed)
                changes += done
                if not done:
                    break
            else:
                failures = (*failures, f"not as wanted after {_ROUNDS} rounds: another program undoes our changes")
            self._settle(Outcome(tuple(changes), failures, conflict_lines, is_broken))
            return self.last

    async def run(self) -> None:
        """Converge now, after every notice and every 30 s, until cancelled."""
        await self._loop.run()

    async def _repair(self) -> bool:
        return not (await self.converge()).failures

    async def _relevant_notices(self) -> AsyncGenerator[frozenset[Notice], None]:
        has_neighbours = any(link.vxlan is not None for link in self._desired.links)
        async with aclosing(watch(neighbours=has_neighbours)) as batches:
            async for notices in batches:
                is_relevant = False
                for notice in notices:
                    is_relevant |= self._heed(notice)
                if is_relevant:
                    yield notices

    def _heed(self, notice: Notice) -> bool:
        """Whether to look again.  Most of a routing daemon's thousands of routes cannot be ours."""
        if notice.kind is NoticeKind.NEIGHBOUR and notice.link_index not in self._own_indexes:
            return False
        is_foreign_route = notice.kind is NoticeKind.ROUTE and notice.protocol != ROUTE_PROTOCOL
        if is_foreign_route and notice.prefixlen not in self._prefix_lengths:
            # It may be the way to one of the gateways.
            return bool(self._gateways)
        # Another owner's route that goes together with its link has no notice of its own.
        if is_foreign_route or notice.kind is NoticeKind.OVERFLOW or self._foreign:
            self._survey = True
        return True

    async def _look(self, kernel: Netlink) -> ActualState:
        if self._decide is not None:
            asked, direct = None, self._direct
            while asked is not self._gateways:  # others may be asked about while the kernel answers
                asked = self._gateways
                direct = await kernel.on_link(asked)
            if direct != self._direct:
                self._direct = direct
                self._desired = self._decide(direct)
        desired = self._desired
        links = {wanted.name: await kernel.link(wanted.name) for wanted in desired.links}
        addresses = [a for link in links.values() if link for a in await kernel.addresses(link.index)]
        vxlan = [link.index for link in links.values() if link is not None and link.vxlan is not None]
        self._own_indexes = frozenset(vxlan)
        clock = asyncio.get_running_loop().time
        if self._survey or clock() >= self._survey_due_s:
            # Cleared first: what comes up during the reading asks for another one.
            self._survey = False
            try:
                routes = await kernel.routes()
            except KernelError:
                self._survey = True
                raise
            self._survey_due_s = clock() + _PACE.period_s
            prefixes = {route.dst for route in desired.routes}
            self._prefix_lengths = {prefix.prefixlen for prefix in prefixes}
            self._foreign = tuple(
                r
                for r in routes
                if r.protocol not in (ROUTE_PROTOCOL, _KERNEL_PROTOCOL) and (r.dst in prefixes or r.oif in vxlan)
            )
        return ActualState(
            links,
            frozenset([self._device.name] if self._device is not None and self._device.is_attached() else []),
            tuple(addresses),
            tuple(await kernel.routes(ROUTE_PROTOCOL)),
            self._foreign,
            {s.path: _read_sysctl(s.path) for wanted in desired.links for s in wanted.sysctls},
            tuple([n for index in vxlan for n in await kernel.neighbours(index)]),
            tuple([e for index in vxlan for e in await kernel.fdb(index)]),
            await self._stray_links(kernel, links),
        )

    async def _stray_links(self, kernel: Netlink, wanted: Collection[str]) -> tuple[Link, ...]:
        """Ours that an earlier run with another backend has left."""
        if not self._sweep:
            return ()
        strays = tuple(link for link in await kernel.links() if _is_ours(link) and link.name not in wanted)
        self._sweep = bool(strays)
        return strays

    async def _conflicts(self, kernel: Netlink, actual: ActualState) -> tuple[str, ...]:
        if not actual.foreign:
            return ()
        names = {link.index: link.name for link in await kernel.links()}
        return tuple(conflicts(self._desired, actual, names))

    async def _apply(
        self, kernel: Netlink, todo: Sequence[Change]
    ) -> tuple[list[Change], list[tuple[Change, KernelError]]]:
        """Do what can be done; return that, and the rest with the reasons."""
        done: list[Change] = []
        failed: list[tuple[Change, KernelError]] = []
        for is_batch, group in groupby(todo, lambda change: isinstance(change, _Batched)):
            changes = list(group)
            if is_batch:
                errors = await kernel.change([_request(change) for change in changes])
            else:
                errors = [await self._attempt(kernel, change) for change in changes]
            for change, error in zip(changes, errors, strict=True):
                if error is None:
                    done.append(change)
                elif isinstance(change, SetSysctl) and change.sysctl.is_optional:
                    log.debug("optional setting refused change=%r error=%s", str(change), error)
                else:
                    failed.append((change, error))
                    # Somebody else's route has come in between: find it.
                    self._survey = self._survey or error.errno == errno.EEXIST
        if any(isinstance(change, DeleteRoute) and change.route.protocol != ROUTE_PROTOCOL for change in done):
            self._survey = True
        return done, failed

    async def _attempt(self, kernel: Netlink, change: Change) -> KernelError | None:
        try:
            await self._apply_one(kernel, change)
        except KernelError as exc:
            return exc
        return None

    async def _apply_one(self, kernel: Netlink, change: Change) -> None:
        match change:
            case ReviveDevice():
                assert self._device is not None
                self._device.reattach()
            case CreateVxlan(name, vxlan, mac, mtu):
                await _make_vxlan(kernel, name, vxlan, mac, mtu)
            case DeleteLink(link):
                await kernel.do(link_messages.delete_link(link))
            case SetSysctl(sysctl):
                _write_sysctl(sysctl)
            case SetLink(link, up, mtu, tx_queue_len, wanted_mac, alias):
                await kernel.do(
                    link_messages.set_link(
                        LinkSettings(link, up=up, mtu=mtu, tx_queue_len=tx_queue_len, mac=wanted_mac, alias=alias)
                    )
                )
            case AddAddress(address):
                await kernel.do(link_messages.add_address(address))
            case DeleteAddress(address):
                await kernel.do(link_messages.delete_address(address))

    def _settle(self, outcome: Outcome) -> None:
        """Keep the outcome; say what was done, in one line, and what is new in its problems."""
        if outcome.changes:
            log.info("kernel state changed changes=%r", "; ".join(_first_ones(outcome.changes)))
        known = set(self.last.problems)
        for problem in _first_ones([problem for problem in outcome.problems if problem not in known]):
            log.warning("kernel state is not as wanted problem=%r", problem)
        if self.last.problems and not outcome.problems:
            log.info("kernel state is as wanted again")
        self.last = outcome


def _request(change: Change) -> Request:
    match change:
        case AddRoute(route):
            return rtnetlink.add_route(route)
        case DeleteRoute(route):
            return rtnetlink.delete_route(route)
        case SetNeighbour(neighbour):
            return rtnetlink.set_neighbour(neighbour)
        case DeleteNeighbour(neighbour):
            return rtnetlink.delete_neighbour(neighbour)
        case SetFdb(entry):
            return rtnetlink.set_fdb(entry)
        case DeleteFdb(entry):
            return rtnetlink.delete_fdb(entry)
    raise AssertionError(change)


def _first_ones(items: Sequence[object]) -> list[str]:
    """As text; of very many the last item is how many there are more."""
    more = len(items) - _SHOWN
    return [*map(str, items[:_SHOWN]), *([f"and {more} more"] if more > 0 else [])]


async def make_missing(links: Iterable[DesiredLink]) -> None:
    """Make the VXLAN devices that are not there yet, and nothing else.  Raises KernelError."""
    async with Netlink() as kernel:
        for link in links:
            if link.vxlan is not None and await kernel.link(link.name) is None:
                await _make_vxlan(kernel, link.name, link.vxlan, link.mac, link.mtu)


async def _make_vxlan(kernel: Netlink, name: str, vxlan: Vxlan, mac: str, mtu: int) -> None:
    """Make the device and put our mark on it, which the kernel does not take with the making."""
    await kernel.do(link_messages.add_vxlan(name, vxlan, mac, mtu))
    if (link := await kernel.link(name)) is not None:
        await kernel.do(link_messages.set_link(LinkSettings(link, alias=LINK_ALIAS)))


async def make_way(name: str) -> None:
    """Delete the VXLAN device of ours that has the name of a TUN device to be made.  Raises KernelError."""
    async with Netlink() as kernel:
        link = await kernel.link(name)
        if link is not None and link.vxlan is not None and link.alias == LINK_ALIAS:
            await kernel.do(link_messages.delete_link(link))
            log.info("deleted link %s reason=the userspace VTEP takes its place", name)


async def is_anything_ours() -> bool:
    """Whether the kernel has a device or a route with our mark.  Raises KernelError."""
    async with Netlink() as kernel:
        return any(map(_is_ours, await kernel.links())) or bool(await kernel.routes(ROUTE_PROTOCOL))


async def remove() -> list[str]:
    """Take out everything of ours: every device and every route with our mark.

    Returns a line for each thing removed, and for each device left alone because it only has a name like ours.
    Removing nothing is no error.  Raises KernelError when the kernel refuses.
    """
    lines: list[str] = []
    async with Netlink() as kernel:
        for link in await kernel.links():
            if _is_ours(link):
                await kernel.do(link_messages.delete_link(link))
                lines.append(f"deleted link {link.name}")
            elif DEVICE_NAME.fullmatch(link.name):
                lines.append(f"left {link.name} alone: it is not a device of udptun")
        for route in await kernel.routes(ROUTE_PROTOCOL):
            await kernel.do(rtnetlink.delete_route(route))
            lines.append(f"deleted route {describe(route)}")
    return lines


def _is_ours(link: Link) -> bool:
    """Whether we have made the device; nobody else makes a TUN device of these flags under such a name."""
    tun = link.tun
    return link.alias == LINK_ALIAS or (
        DEVICE_NAME.fullmatch(link.name) is not None
        and tun is not None
        and not tun.is_tap
        and tun.is_multi_queue
        and tun.is_persistent
    )


def _read_sysctl(path: str) -> str | None:
    try:
        return (_PROC_SYS / path).read_text().strip()
    except OSError:
        return None


def _write_sysctl(sysctl: Sysctl) -> None:
    path = _PROC_SYS / sysctl.path
    try:
        path.write_text(sysctl.value)
    except OSError as exc:
        raise KernelError(f"cannot write {sysctl.value} to {path}", exc.errno or 0) from exc

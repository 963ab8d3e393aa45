"""Make the kernel what the backend wants, and keep it so.

`plan` compares and `Reconciler` applies: one way to set up, to repair and to change.  A deleted device, a flushed
address or route, a link set down and another MTU are all the same case: look, find the difference, undo it.

What is ours is recognised by its mark: routes by their protocol number, addresses by being on our device.  Nothing
else is ever changed; another owner's route to one of our prefixes is reported, and stays.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from udptun.backends.base import DesiredAddress, DesiredLink, DesiredState, Sysctl
from udptun.errors import KernelError
from udptun.netlink import Netlink, Notice, NoticeKind, watch
from udptun.netstate import DEVICE_NAME, ROUTE_PROTOCOL, Address, Link, Route, RouteType

log = logging.getLogger(__name__)

_SETTLE_S = 0.02
"""Wait after a notice before looking: one `ip link del` brings several."""
_MAX_SETTLE_S = 0.15
"""The same in a storm of notices; bounds both the cost of the looks and the time to a repair."""
_STORM_S = 1.0
"""Looks closer together than this are one storm."""
_PERIOD_S = 30.0
"""Look this often without any notice: some changes (sysctls) send none."""
_RETRY_S = 1.0
"""First wait after a failed repair; doubled up to the period."""
_ROUNDS = 5
"""Looks per repair.  Set-up takes three: revive the device, configure it, find nothing left to do."""
_PROC_SYS = Path("/proc/sys")


class Device(Protocol):
    """The device that packets go through (`udptun.tun.Tun`)."""

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

    def __str__(self) -> str:
        parts = [] if self.up is None else ["up" if self.up else "down"]
        parts += [] if self.mtu is None else [f"mtu {self.mtu}"]
        parts += [] if self.tx_queue_len is None else [f"txqueuelen {self.tx_queue_len}"]
        return f"set link {self.link.name} {' '.join(parts)}"


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


Change = SetLink | ReviveDevice | SetSysctl | AddAddress | DeleteAddress | AddRoute | DeleteRoute


@dataclass(frozen=True, slots=True)
class ActualState:
    """What there is of the desired things, and all that carries our mark.

    `links` and `sysctls` hold None for what is missing.  `foreign` are other owners' routes to desired prefixes.
    """

    links: Mapping[str, Link | None]
    attached: frozenset[str]
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    foreign: tuple[Route, ...] = ()
    sysctls: Mapping[str, str | None] = field(default_factory=dict)


def plan(desired: DesiredState, actual: ActualState) -> list[Change]:
    """What to change, in the order to do it: first what keeps packets from leaking, last what removes leftovers.

    A missing device is only revived here; what belongs on it follows from the next look.
    """
    usable: dict[str, Link] = {}
    on_links: list[Change] = []
    for wanted in desired.links:
        link = actual.links.get(wanted.name)
        if link is None or wanted.name not in actual.attached:
            on_links.append(ReviveDevice(wanted.name))
            continue
        usable[wanted.name] = link
        on_links += _plan_link(wanted, link, actual)

    on_links += _plan_addresses(desired.addresses, usable, actual.addresses)

    guards = [route.on(None) for route in desired.routes if route.link is None]
    through = [route.on(usable[route.link].index) for route in desired.routes if route.link in usable]
    leftovers = [route for route in actual.routes if route not in guards and route not in through]
    return [
        *_plan_routes(guards, leftovers, actual),
        *on_links,
        *_plan_routes(through, leftovers, actual),
        *(DeleteRoute(route) for route in leftovers),
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


def _plan_routes(wanted: Sequence[Route], leftovers: list[Route], actual: ActualState) -> list[Change]:
    """Add what is missing; take from `leftovers`, and delete first, what stands in the way."""
    changes: list[Change] = []
    blocked = {(route.dst, route.metric) for route in actual.foreign}
    for route in wanted:
        if route in actual.routes or (route.dst, route.metric) in blocked:
            continue
        for old in [old for old in leftovers if (old.dst, old.metric) == (route.dst, route.metric)]:
            leftovers.remove(old)
            changes.append(DeleteRoute(old))
        changes.append(AddRoute(route))
    return changes


def conflicts(desired: DesiredState, actual: ActualState, link_names: Mapping[int, str]) -> list[str]:
    """One line for each route of another owner to a prefix that is ours, saying what it does."""
    lines = []
    for route in actual.foreign:
        ours = min(r.metric for r in desired.routes if r.dst == route.dst)
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
    """

    changes: tuple[Change, ...] = ()
    failures: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

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
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()
        self._foreign: tuple[Route, ...] = ()
        # Reading the whole routing table for other owners' routes is dear on a host with thousands: only when due.
        self._survey = True
        self.last = Outcome()

    def set_desired(self, desired: DesiredState) -> None:
        """Want something else from now on; `run` (or the next converge) changes what differs."""
        self._desired = desired
        self._survey = True
        self._wake.set()

    async def converge(self) -> Outcome:
        """Look and repair until there is nothing left to do, or nothing that can be done now.

        Never raises for what the kernel refuses: that is in the outcome.
        """
        async with self._busy:
            changes: list[Change] = []
            failures: tuple[str, ...] = ()
            conflict_lines = self.last.conflicts
            for _ in range(_ROUNDS):
                try:
                    async with Netlink() as kernel:
                        actual = await self._look(kernel)
                        conflict_lines = await self._conflicts(kernel, actual)
                        todo = plan(self._desired, actual)
                        done, failures = await self._apply(kernel, todo)
                except KernelError as exc:
                    failures = (str(exc),)
                    break
                changes += done
                if not done:
                    break
            else:
                failures = (*failures, f"not as wanted after {_ROUNDS} rounds: another program undoes our changes")
            self._settle(Outcome(tuple(changes), failures, conflict_lines))
            return self.last

    async def run(self) -> None:
        """Converge now, after every notice and every 30 s, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(), name="netlink notices")
            await self._keep()

    async def _keep(self) -> None:
        clock = asyncio.get_running_loop().time
        settle, retry = _SETTLE_S, _RETRY_S
        while True:
            self._wake.clear()
            outcome = await self.converge()
            looked = clock()
            wait = retry if outcome.failures else _PERIOD_S
            retry = min(2 * retry, _PERIOD_S) if outcome.failures else _RETRY_S
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                self._survey = True
                continue
            settle = min(2 * settle, _MAX_SETTLE_S) if clock() - looked < _STORM_S else _SETTLE_S
            await asyncio.sleep(settle)

    async def _listen(self) -> None:
        while True:
            try:
                async with aclosing(watch()) as batches:
                    async for notices in batches:
                        for notice in notices:
                            self._heed(notice)
            except KernelError as exc:
                log.warning("no netlink notices, looking every %d s only error=%s", _PERIOD_S, exc)
            await asyncio.sleep(_RETRY_S)

    def _heed(self, notice: Notice) -> None:
        """Look again, unless it is one of a routing daemon's thousands of routes that cannot be ours."""
        is_foreign_route = notice.kind is NoticeKind.ROUTE and notice.protocol != ROUTE_PROTOCOL
        if is_foreign_route and all(r.dst.prefixlen != notice.prefixlen for r in self._desired.routes):
            return
        # Another owner's route that goes together with its link has no notice of its own.
        if is_foreign_route or notice.kind is NoticeKind.OVERFLOW or self._foreign:
            self._survey = True
        self._wake.set()

    async def _look(self, kernel: Netlink) -> ActualState:
        links = {wanted.name: await kernel.link(wanted.name) for wanted in self._desired.links}
        addresses = [a for link in links.values() if link for a in await kernel.addresses(link.index)]
        if self._survey:
            # Cleared first: what comes up during the reading asks for another one.
            self._survey = False
            try:
                routes = await kernel.routes()
            except KernelError:
                self._survey = True
                raise
            prefixes = {route.dst for route in self._desired.routes}
            self._foreign = tuple(r for r in routes if r.dst in prefixes and r.protocol != ROUTE_PROTOCOL)
        return ActualState(
            links,
            frozenset([self._device.name] if self._device is not None and self._device.is_attached() else []),
            tuple(addresses),
            tuple(await kernel.routes(ROUTE_PROTOCOL)),
            self._foreign,
            {s.path: _read_sysctl(s.path) for wanted in self._desired.links for s in wanted.sysctls},
        )

    async def _conflicts(self, kernel: Netlink, actual: ActualState) -> tuple[str, ...]:
        if not actual.foreign:
            return ()
        names = {link.index: link.name for link in await kernel.links()}
        return tuple(conflicts(self._desired, actual, names))

    async def _apply(self, kernel: Netlink, todo: Sequence[Change]) -> tuple[list[Change], tuple[str, ...]]:
        """Do what can be done; return that and the reasons for the rest."""
        done: list[Change] = []
        failures: list[str] = []
        for change in todo:
            try:
                await self._apply_one(kernel, change)
            except KernelError as exc:
                if isinstance(change, SetSysctl) and change.sysctl.is_optional:
                    log.debug("optional setting refused change=%r error=%s", str(change), exc)
                    continue
                failures.append(f"{change}: {exc}")
                # Somebody else's route has come in between: find it.
                self._survey = self._survey or exc.errno == errno.EEXIST
            else:
                done.append(change)
        return done, tuple(failures)

    async def _apply_one(self, kernel: Netlink, change: Change) -> None:
        match change:
            case ReviveDevice():
                assert self._device is not None
                self._device.reattach()
            case SetSysctl(sysctl):
                _write_sysctl(sysctl)
            case SetLink(link, up, mtu, tx_queue_len):
                await kernel.set_link(link.index, up=up, mtu=mtu, tx_queue_len=tx_queue_len)
            case AddAddress(address):
                await kernel.add_address(address)
            case DeleteAddress(address):
                await kernel.delete_address(address)
            case AddRoute(route):
                await kernel.add_route(route)
            case DeleteRoute(route):
                await kernel.delete_route(route)

    def _settle(self, outcome: Outcome) -> None:
        """Keep the outcome; say what was done, in one line, and what is new in its problems."""
        if outcome.changes:
            log.info("kernel state changed changes=%r", "; ".join(map(str, outcome.changes)))
        for problem in outcome.problems:
            if problem not in self.last.problems:
                log.warning("kernel state is not as wanted problem=%r", problem)
        if self.last.problems and not outcome.problems:
            log.info("kernel state is as wanted again")
        self.last = outcome


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
                await kernel.delete_link(link.index)
                lines.append(f"deleted link {link.name}")
            elif DEVICE_NAME.fullmatch(link.name):
                lines.append(f"left {link.name} alone: it is not a device of udptun")
        for route in await kernel.routes(ROUTE_PROTOCOL):
            await kernel.delete_route(route)
            lines.append(f"deleted route {describe(route)}")
    return lines


def _is_ours(link: Link) -> bool:
    """Whether we have made the device; nobody else makes a TUN device of these flags under such a name."""
    tun = link.tun
    return (
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

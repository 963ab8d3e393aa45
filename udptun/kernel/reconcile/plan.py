"""What differs between the desired and the actual state, and in which order to change it.  Pure.

There may be thousands of peers: `plan` costs what it is given, not its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from udptun.core.desired import DesiredAddress, DesiredLink, DesiredState
from udptun.core.network_state import (
    Address,
    FdbEntry,
    IPNetwork,
    Link,
    LinkSettings,
    Neighbour,
    Route,
    RouteType,
    describe_route,
)
from udptun.kernel.reconcile.change import Change, Thing, Verb


@dataclass(frozen=True, slots=True)
class ActualState:
    """What the kernel has of the desired things, and everything that carries our mark.

    `links` and `sysctls` hold None for what is missing.  `attached` names the devices that our queues still reach.
    `foreign` are other owners' routes to desired prefixes or through our devices.  `stray_links` are devices of
    ours that are not desired.  `others` are the prefixes in and around Network that other owners' routes lead to.
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
    others: frozenset[IPNetwork] = frozenset()


def plan(desired: DesiredState, actual: ActualState, alias: str) -> list[Change]:
    """What to change, in the order to do it: first what keeps packets from leaking, last what removes leftovers.

    `alias` marks our devices.  A missing device is only made here; what belongs on it follows from the next look.
    """
    usable: dict[str, Link] = {}
    on_links: list[Change] = []
    for wanted in desired.links:
        link = actual.links.get(wanted.name)
        if wanted.vxlan is not None:
            if link is not None and link.vxlan != wanted.vxlan:
                on_links.append(Change(Verb.DELETE, link))
                link = None
            if link is None:
                on_links.append(Change(Verb.CREATE, wanted))
                continue
        elif link is None or wanted.name not in actual.attached:
            on_links.append(Change(Verb.REVIVE, wanted))
            continue
        usable[wanted.name] = link
        on_links += _plan_link(wanted, link, actual, alias)

    on_links += _plan_addresses(desired.addresses, usable, actual.addresses)
    on_links += _plan_neighbours(desired, usable, actual)
    on_links += _plan_fdb(desired, usable, actual)

    desired_routes = desired.routes_beside(actual.others)
    guards = [route.on(None) for route in desired_routes if route.type is not RouteType.UNICAST]
    through = [
        route.on(route.oif if route.link is None else usable[route.link].index)
        for route in desired_routes
        if route.type is RouteType.UNICAST and (route.link is None or route.link in usable)
    ]
    routes = _Routes(guards + through, actual, usable.values())
    return [
        *routes.add(guards),
        *on_links,
        *routes.add(through),
        *routes.delete_leftovers(),
        *_each(Verb.DELETE, actual.stray_links),
    ]


def conflicts(desired: DesiredState, actual: ActualState, link_names: Mapping[int, str]) -> list[str]:
    """One line for each route of another owner to a prefix that is ours, saying what it does."""
    best: dict[IPNetwork, int] = {}
    for wanted in desired.routes_beside(actual.others):
        # What refuses or swallows packets does so behind all other routes.
        if wanted.type is RouteType.UNICAST:
            best[wanted.dst] = min(wanted.metric, best.get(wanted.dst, wanted.metric))
    lines = []
    for route in actual.foreign:
        if route.dst not in best:
            continue
        ours = best[route.dst]
        text = describe_route(route, link_names)
        effect = (
            "it takes the traffic of our route"
            if route.metric <= ours
            else "it takes over, in clear text, when our route is gone"
            if route.type == RouteType.UNICAST
            else "it stands beside our own"
        )
        lines.append(f"route {text} is not ours; {effect}; if nothing needs it, `ip route del {text}`")
    return lines


def _each(verb: Verb, things: Iterable[Thing]) -> list[Change]:
    return [Change(verb, thing) for thing in things]


def _plan_link(wanted: DesiredLink, link: Link, actual: ActualState, alias: str) -> list[Change]:
    # Sysctls first: the kernel acts on disable_ipv6 when the device comes up.
    changes = _each(Verb.SET, [s for s in wanted.sysctls if actual.sysctls.get(s.path) != s.value])
    settings = LinkSettings(
        link,
        up=None if link.is_up else True,
        mtu=None if link.mtu == wanted.mtu else wanted.mtu,
        tx_queue_len=None if link.tx_queue_len >= wanted.min_tx_queue_len else wanted.min_tx_queue_len,
        mac=None if link.mac == wanted.mac or wanted.vxlan is None else wanted.mac,
        alias=None if link.alias == alias else alias,
    )
    if settings != LinkSettings(link):
        changes.append(Change(Verb.SET, settings))
    return changes


def _plan_addresses(
    desired: Iterable[DesiredAddress], usable: Mapping[str, Link], have: Sequence[Address]
) -> list[Change]:
    wanted = [(usable[a.link].index, a.ip, a.prefixlen) for a in desired if a.link in usable]
    present = [(a.link_index, a.ip, a.prefixlen) for a in have]
    # The new address is added before the old one is deleted.  With its last address a device loses all its routes too.
    return [
        *_each(Verb.ADD, [Address(*key) for key in wanted if key not in present]),
        *_each(Verb.DELETE, [a for a, key in zip(have, present, strict=True) if key not in wanted]),
    ]


def _plan_neighbours(desired: DesiredState, usable: Mapping[str, Link], actual: ActualState) -> list[Change]:
    wanted = [Neighbour(usable[n.link].index, n.ip, n.mac) for n in desired.neighbours if n.link in usable]
    present = set(actual.neighbours)
    places = {(n.link_index, n.ip) for n in wanted}
    stale = [n for n in actual.neighbours if n.is_permanent and (n.link_index, n.ip) not in places]
    return [*_each(Verb.SET, [n for n in wanted if n not in present]), *_each(Verb.DELETE, stale)]


def _plan_fdb(desired: DesiredState, usable: Mapping[str, Link], actual: ActualState) -> list[Change]:
    # When two peers have one MAC, the later lease gets the entry, as with flannel.
    wanted = {
        (usable[e.link].index, e.mac): FdbEntry(usable[e.link].index, e.mac, e.dst)
        for e in desired.fdb
        if e.link in usable
    }
    present = set(actual.fdb)
    missing = [entry for entry in wanted.values() if entry not in present]
    # SET replaces one destination of a MAC.  A second destination is deleted after the next look.
    replaced = {(entry.link_index, entry.mac) for entry in missing}
    stale = [
        entry
        for entry in actual.fdb
        if entry.is_permanent
        and (entry.link_index, entry.mac) not in replaced
        and wanted.get((entry.link_index, entry.mac)) != entry
    ]
    return [*_each(Verb.SET, missing), *_each(Verb.DELETE, stale)]


class _Routes:
    """Which routes to add and delete.

    The kernel tells routes apart by prefix and metric, here called the place: two routes cannot have the same place.
    """

    def __init__(self, wanted: Sequence[Route], actual: ActualState, own_links: Iterable[Link]) -> None:
        """Every route through a VXLAN device of `own_links` is ours, whoever added it.

        So is a route through a TUN device of ours to where no route of ours through it leads: the datapath drops what
        it carries.
        """
        own = {link.index: link for link in own_links}
        carried: dict[int, list[IPNetwork]] = {}
        for route in wanted:
            if route.oif in own:
                carried.setdefault(route.oif, []).append(route.dst)
        wanted_set = set(wanted)
        self._present = set(actual.routes)
        self._leftovers: dict[tuple[IPNetwork, int], list[Route]] = {}
        self._blocked: set[tuple[IPNetwork, int]] = set()
        same = {_without_owner(route) for route in wanted}
        for route in actual.routes:
            if route not in wanted_set:
                self._leftovers.setdefault(_place(route), []).append(route)
        for route in actual.foreign:
            is_on_ours = route.oif in own and (
                own[route.oif].vxlan is not None
                or not any(_is_within(route.dst, it) for it in carried.get(route.oif, ()))
            )
            if is_on_ours or _without_owner(route) in same:
                self._leftovers.setdefault(_place(route), []).append(route)
            else:
                self._blocked.add(_place(route))

    def add(self, wanted: Iterable[Route]) -> list[Change]:
        """Add what is missing, after deleting a leftover in its place.  Another owner's route blocks the place."""
        changes: list[Change] = []
        for route in wanted:
            if route not in self._present and _place(route) not in self._blocked:
                changes += _each(Verb.DELETE, self._leftovers.pop(_place(route), ()))
                changes.append(Change(Verb.ADD, route))
        return changes

    def delete_leftovers(self) -> list[Change]:
        """Delete the leftovers whose place nobody needed.  To be called once all is added."""
        return [change for routes in self._leftovers.values() for change in _each(Verb.DELETE, routes)]


def _place(route: Route) -> tuple[IPNetwork, int]:
    return route.dst, route.metric


def _is_within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return inner.prefixlen >= outer.prefixlen and inner.network_address in outer


def _without_owner(route: Route) -> Route:
    return replace(route, protocol=0)

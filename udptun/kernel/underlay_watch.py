"""Find the underlay interface, and notice when it becomes another one: its MTU, its address, itself."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from itertools import islice

from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.network_state import Address, IPAddress, Route, RouteType
from udptun.kernel.interfaces import NoAddressError, UnderlayError
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.underlay import Underlay, UnderlayOptions, pick, probe_address, refresh
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.05, max_settle_s=0.2, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""An address that is replaced is gone for a moment; 50 ms let the new one come."""
_MAX_ASKED = 64
"""The kernel is asked for the ways to so many peers: they show which interfaces lead to the others."""


async def find_underlay(options: UnderlayOptions) -> Underlay:
    """The interface that `options` describe.  Raises UdptunError.

    The first family that leads to one chooses it: IPv4 where that is looked for.  One that has no address or no default
    route leaves that to the next, unless a flag names its public address.
    """
    first, *others = options.families
    try:
        return await _find_underlay(options, first)
    except NoAddressError as exc:
        whys = {first: str(exc)}
    for family in () if options.public(first) else others:
        try:
            return await _find_underlay(options, family)
        except UnderlayError as exc:
            whys[family] = str(exc)
    # Where one answer is that of all, or of the only one, the family says nothing.
    if len(set(whys.values())) == 1:
        raise NoAddressError(whys[first])
    raise NoAddressError("; ".join(f"by {family}: {why}" for family, why in whys.items()))


async def _find_underlay(options: UnderlayOptions, family: Family) -> Underlay:
    async with Netlink() as kernel:
        links, addresses = await kernel.links(), await _addresses(kernel, options)
        routes = await kernel.routes(family=family)
        beyond = probe_address(routes, family)
        ways = await kernel.routes_to(ip for ip in (options.can_reach, beyond) if ip is not None)
        reach = None if options.can_reach is None else ways.get(options.can_reach)
        way_beyond = None if beyond is None else ways.get(beyond)
        return pick(options, links, addresses, routes, reach, way_beyond, family=family)


async def _addresses(kernel: Netlink, options: UnderlayOptions, link_index: int = 0) -> list[Address]:
    return [
        address
        for family in Family
        if family in options.families or options.ifaces
        for address in await kernel.addresses(link_index, family)
    ]


class UnderlayWatch:
    """Calls `move` with what the underlay is now when that differs from `current`, until the move succeeds.

    The interface stays the chosen one as long as it has the address that we use, whatever else fits `options` by now.
    Where routes have chosen it, because the address is on lo, it is the one that leads to the peers.  PublicIP becomes
    the address as soon as this host has it.
    """

    def __init__(
        self,
        options: UnderlayOptions,
        current: Underlay,
        move: Callable[[Underlay], Awaitable[None]],
        peers: Callable[[], Iterable[IPAddress]],
    ) -> None:
        """`move` raises UdptunError, and has changed nothing, when it cannot go over.  It is then called again.

        `peers` returns the peers' addresses.
        """
        self._options = options
        self._current = current
        self._move = move
        self._peers = peers
        self._families = options.families
        self._problem = ""
        self._loop = WatchLoop("underlay", self._relevant_notices, self._follow, _PACE)

    @property
    def problem(self) -> str:
        """What is wrong right now; empty when nothing is."""
        return self._problem or self._loop.problem

    async def run(self) -> None:
        """Look after every notice that may be about the underlay and every 30 s, until cancelled."""
        await self._loop.run()

    async def _relevant_notices(self) -> AsyncGenerator[frozenset[Notice], None]:
        async with aclosing(watch(*self._families)) as batches:
            async for notices in batches:
                # Routes matter only while an interface is looked for, or where they have chosen it.
                if (
                    self._problem
                    or self._current.is_routed
                    or any(notice.kind is not NoticeKind.ROUTE for notice in notices)
                ):
                    yield notices

    async def _follow(self) -> bool:
        """Whether we are on the underlay as it is now."""
        try:
            present = await self._present()
            if present != self._current:
                await self._move(present)
                self._current = present
        except UdptunError as exc:
            if str(exc) != self._problem:
                log.error("the underlay has changed and cannot be followed, going on as before error=%r", str(exc))
            self._problem = str(exc)
            return False
        self._problem = ""
        return True

    async def _on_public_ip(self) -> Underlay | None:
        """The underlay with PublicIP as its address, where this host has got that only now."""
        options, current = self._options, self._current
        wanted = options.public(current.chosen_by)
        if wanted is None or wanted == current.chosen_address:
            return None
        async with Netlink() as kernel:
            way = (await kernel.routes_to([wanted])).get(wanted)
        if way is None or way.type != RouteType.LOCAL:
            return None
        found = await find_underlay(self._options)
        return found if found.chosen_address == wanted else None

    async def _present(self) -> Underlay:
        current = self._current
        if (found := await self._on_public_ip()) is not None:
            return found
        names = dict.fromkeys((current.link_name, current.address_link or current.link_name))
        ways: Iterable[Route] = ()
        async with Netlink() as kernel:
            if current.is_routed:
                links = await kernel.links()
                ways = (await kernel.routes_to(islice(self._peers(), _MAX_ASKED))).values()
            else:
                links = [link for name in names if (link := await kernel.link(name)) is not None]
            addresses = [
                a for link in links if link.name in names for a in await _addresses(kernel, self._options, link.index)
            ]
        return refresh(current, self._options, links, addresses, ways) or await find_underlay(self._options)

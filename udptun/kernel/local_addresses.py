"""The addresses that this host has, on all its links: no peer may send packets from one of them.

The kernel would refuse such packets by itself, but `accept_local` of our device lets them in.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from udptun.core.errors import KernelError
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.problem_lines import ProblemLines
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.02, max_settle_s=1.0, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""kube-proxy sets thousands of addresses in a row; they are not read again for each of them."""
_WIDEST = 20
"""Prefix length, 4,096 addresses.  A wider local route is not taken apart into its addresses."""


@dataclass(frozen=True, slots=True)
class LocalAddresses:
    """Without 127/8, which nobody may send from anyway.  `wide`: local routes too wide to list their addresses."""

    addresses: frozenset[IPv4Address]
    wide: tuple[IPv4Network, ...] = ()


async def find_local_addresses() -> LocalAddresses:
    """Those of all links, and those that somebody has made local by a route, as some clouds' agents do.

    Raises KernelError.
    """
    async with Netlink() as kernel:
        addresses, routes = await kernel.local_addresses(), await kernel.local_routes()
    routes = [route for route in routes if not route.is_loopback]
    for route in routes:
        if route.prefixlen >= _WIDEST:
            addresses.update(route)
    wide = sorted(route for route in routes if route.prefixlen < _WIDEST)
    return LocalAddresses(frozenset(ip for ip in addresses if not ip.is_loopback), tuple(wide))


class LocalAddressWatch:
    """Calls `use` with the addresses whenever they are other ones than before.  For one event loop."""

    def __init__(self, known: LocalAddresses, use: Callable[[LocalAddresses], Awaitable[None]]) -> None:
        """`known` is what is in use already."""
        self._known = known
        self._use = use
        self._lines = ProblemLines(log, "the addresses of this host are read again")
        self._loop = WatchLoop("local addresses", _relevant_notices, self._look, _PACE)

    @property
    def problems(self) -> tuple[str, ...]:
        """A line while the addresses cannot be read."""
        return (*self._lines.lines, *filter(None, [self._loop.problem]))

    async def run(self) -> None:
        """Look now and whenever it is due, until cancelled."""
        await self._loop.run()

    async def _look(self) -> bool:
        try:
            found = await find_local_addresses()
        except KernelError as exc:
            self._lines.replace(
                [f"packets from new addresses of this host are not refused, as these are unknown: {exc}"]
            )
            return False
        self._lines.replace(())
        if found != self._known:
            await self._use(found)
            self._known = found
        return True


async def _relevant_notices() -> AsyncGenerator[frozenset[Notice], None]:
    async with aclosing(watch()) as batches:
        async for notices in batches:
            if any(it.is_local or it.kind in (NoticeKind.ADDRESS, NoticeKind.OVERFLOW) for it in notices):
                yield notices

"""The addresses that this host has, on all its links: no peer may send packets from one of them.

The kernel would refuse such packets of IPv4 by itself, but `accept_local` of our device lets them in.  It never refuses
those of IPv6.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.problem_lines import ProblemLines
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.02, max_settle_s=1.0, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""kube-proxy sets thousands of addresses in a row; they are not read again for each of them."""
_WIDEST = 4096
"""Addresses.  A wider local route is not taken apart into them."""


@dataclass(frozen=True, slots=True)
class LocalAddresses:
    """Without those that nobody may send from anyway: 127/8, ::1 and fe80::/10.

    `wide`: local routes too wide to list their addresses.
    """

    addresses: frozenset[IPAddress]
    wide: tuple[IPNetwork, ...] = ()


async def find_local_addresses(families: Iterable[Family]) -> LocalAddresses:
    """Those of all links, and those that somebody has made local by a route, as some clouds' agents do.

    Raises KernelError.
    """
    addresses: set[IPAddress] = set()
    wide: list[IPNetwork] = []
    async with Netlink() as kernel:
        for family in families:
            addresses |= await kernel.local_addresses(family)
            for route in await kernel.local_routes(family):
                if route.is_loopback:
                    continue
                if route.num_addresses <= _WIDEST:
                    addresses.update(route)
                else:
                    wide.append(route)
    wide.sort(key=lambda route: (route.version, int(route.network_address), route.prefixlen))
    return LocalAddresses(frozenset(filter(_may_send, addresses)), tuple(wide))


def _may_send(ip: IPAddress) -> bool:
    return not ip.is_loopback and (ip.version == 4 or not ip.is_link_local)


class LocalAddressWatch:
    """Calls `use` with the addresses whenever they are other ones than before.  For one event loop."""

    def __init__(
        self,
        families: Collection[Family],
        known: LocalAddresses,
        use: Callable[[LocalAddresses], Awaitable[None]],
    ) -> None:
        """`known` is what is in use already."""
        self._families = families
        self._known = known
        self._use = use
        self._lines = ProblemLines(log, "the addresses of this host are read again")
        self._loop = WatchLoop("local addresses", self._relevant_notices, self._look, _PACE)

    @property
    def problems(self) -> tuple[str, ...]:
        """A line while the addresses cannot be read."""
        return (*self._lines.lines, *filter(None, [self._loop.problem]))

    async def run(self) -> None:
        """Look now and whenever it is due, until cancelled."""
        await self._loop.run()

    async def _look(self) -> bool:
        try:
            found = await find_local_addresses(self._families)
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

    async def _relevant_notices(self) -> AsyncGenerator[frozenset[Notice], None]:
        async with aclosing(watch(*self._families)) as batches:
            async for notices in batches:
                if any(it.is_local or it.kind in (NoticeKind.ADDRESS, NoticeKind.OVERFLOW) for it in notices):
                    yield notices

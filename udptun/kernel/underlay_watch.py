"""Find the underlay interface, and notice when it becomes another one: its MTU, its address, itself."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress

from udptun.core.errors import KernelError, UdptunError
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import Notice, NoticeKind, watch
from udptun.kernel.underlay import Underlay, UnderlayOptions, pick, refresh
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.05, max_settle_s=0.2, storm_s=1.0, period_s=30.0, retry_s=1.0)
"""An address that is replaced is gone for a moment; 50 ms let the new one come."""


async def find_underlay(options: UnderlayOptions) -> Underlay:
    """The interface that `options` describe.  Raises UdptunError."""
    async with Netlink() as kernel:
        reach = None
        if options.can_reach is not None:
            with suppress(KernelError):
                reach = await kernel.route_get(options.can_reach)
        links, routes = await kernel.links(), await kernel.routes()
        return pick(options, links, await kernel.addresses(), routes, reach)


class UnderlayWatch:
    """Calls `move` with what the underlay is now when that differs from `current`, until the move succeeds.

    The interface stays the chosen one as long as it has the address that we use, whatever else fits `options` by now.
    """

    def __init__(
        self, options: UnderlayOptions, current: Underlay, move: Callable[[Underlay], Awaitable[None]]
    ) -> None:
        """`move` raises UdptunError, and has changed nothing, when it cannot go over.  It is then called again."""
        self._options = options
        self._current = current
        self._move = move
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
        async with aclosing(watch()) as batches:
            async for notices in batches:
                # Routes matter only while an interface is looked for.
                if self._problem or any(notice.kind is not NoticeKind.ROUTE for notice in notices):
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

    async def _present(self) -> Underlay:
        async with Netlink() as kernel:
            link = await kernel.link(self._current.link_name)
            addresses = [] if link is None else await kernel.addresses(link.index)
        return refresh(self._current, link, addresses) or await find_underlay(self._options)

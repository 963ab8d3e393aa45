"""Find the underlay interface, and notice when it becomes another one: its MTU, its address, itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress

from udptun.core.errors import KernelError, UdptunError
from udptun.kernel.netlink import Netlink
from udptun.kernel.notices import NoticeKind, watch
from udptun.kernel.underlay import Underlay, Wish, pick, refresh

log = logging.getLogger(__name__)

_SETTLE_S = 0.05
"""Wait after a notice before looking: an address that is replaced is gone for a moment."""
_RETRY_S = 1.0


async def find(wish: Wish) -> Underlay:
    """The interface that `wish` describes.  Raises UdptunError."""
    async with Netlink() as kernel:
        reach = None
        if wish.can_reach is not None:
            with suppress(KernelError):
                reach = await kernel.route_get(wish.can_reach)
        links, routes = await kernel.links(), await kernel.routes()
        return pick(wish, links, await kernel.addresses(), routes, reach)


class UnderlayWatch:
    """Calls `move` with what has become of `current`, until that succeeds.

    As long as the interface has the address that we use it is the one, whatever else would fit `wish` by now.
    """

    def __init__(self, wish: Wish, current: Underlay, move: Callable[[Underlay], Awaitable[None]]) -> None:
        """`move` raises UdptunError, with nothing changed, when there is no going over."""
        self._wish = wish
        self._current = current
        self._move = move
        self.problem = ""
        """What is wrong right now."""

    async def run(self) -> None:
        """Look after every notice that may be about the underlay, until cancelled."""
        while True:
            try:
                async with aclosing(watch()) as batches:
                    async for notices in batches:
                        # Routes matter only while an interface is looked for.
                        if self.problem or any(notice.kind is not NoticeKind.ROUTE for notice in notices):
                            await asyncio.sleep(_SETTLE_S)
                            await self._look()
            except KernelError as exc:
                log.debug("no netlink notices about the underlay error=%s", exc)
            await asyncio.sleep(_RETRY_S)

    async def _look(self) -> None:
        try:
            present = await self._present()
            if present != self._current:
                await self._move(present)
                self._current = present
        except UdptunError as exc:
            if str(exc) != self.problem:
                log.error("the underlay has changed and cannot be followed, going on as before error=%r", str(exc))
            self.problem = str(exc)
        else:
            self.problem = ""

    async def _present(self) -> Underlay:
        async with Netlink() as kernel:
            link = await kernel.link(self._current.link_name)
            addresses = [] if link is None else await kernel.addresses(link.index)
        return refresh(self._current, link, addresses) or await find(self._wish)

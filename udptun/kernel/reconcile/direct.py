"""Which peers a packet reaches without a router, for the backends that then send it without a tunnel.

The kernel says whether a peer's address is on a link.  It may refuse the route through that address all the same, such
as where the route to it is of scope global.  Such a peer keeps its tunnel, and the route is tried again: beside the one
that carries the packets, with a metric that no packet follows.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from udptun.core.desired import WORST_METRIC, DesiredState
from udptun.core.errors import KernelError
from udptun.core.network_state import IPAddress, Route
from udptun.kernel.netlink import Netlink
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.rtnetlink import add_route, delete_route

log = logging.getLogger(__name__)

_RETRY_S = 30.0
_TRIAL_METRIC = WORST_METRIC - 1

Decide = Callable[[Mapping[IPAddress, int]], DesiredState]
"""From the gateways that the kernel reaches directly, each with its link's index, to the desired state."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A direct route that the kernel refused; it is tried again at `due_s`, a time of the event loop."""

    route: Route
    error: KernelError
    due_s: float

    def __str__(self) -> str:
        gateway = self.route.gateway
        return f"{self.error}; so its packets go through the tunnel, not straight to {gateway} (DirectRouting)"


class DirectRoutes:
    """What `decide` says about those of `gateways` that can be reached directly.  For one event loop."""

    def __init__(self) -> None:
        self._gateways: tuple[IPAddress, ...] = ()
        self._decide: Decide | None = None
        self._direct: Mapping[IPAddress, int] = {}
        """Those that the kernel reached directly at the last look, without the refused ones."""
        self._refused: dict[IPAddress, _Refusal] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each peer that could be reached directly and is not."""
        return tuple(map(str, self._refused.values()))

    @property
    def is_asked(self) -> bool:
        """Whether any gateway matters: then every change of a route may."""
        return bool(self._gateways)

    def set_decision(self, gateways: Collection[IPAddress], decide: Decide | None) -> DesiredState | None:
        """Decide about these from now on; returns what is desired as far as is known.

        `decide` None: nothing depends on it any more.
        """
        self._gateways = tuple(gateways)
        self._decide = decide
        return None if decide is None else decide(self._direct)

    def expect_better(self) -> None:
        """Try what was refused again at the next look: something has changed that may be the reason."""
        self._refused = {gateway: replace(refusal, due_s=0.0) for gateway, refusal in self._refused.items()}

    async def look(self, kernel: Netlink) -> DesiredState | None:
        """What is desired now, if that has changed since the last look.  Raises KernelError."""
        asked: tuple[IPAddress, ...] | None = None
        found: Mapping[IPAddress, int] = {}
        while asked is not self._gateways:  # set_decision may name others while the kernel answers
            asked = self._gateways
            found = await kernel.on_link(asked)
            await self._retry(kernel, found)
        direct = {gateway: oif for gateway, oif in found.items() if gateway not in self._refused}
        if self._decide is None or direct == self._direct:
            return None
        self._direct = direct
        return self._decide(direct)

    def note_refused(self, failed: Iterable[tuple[Change, KernelError]]) -> DesiredState | None:
        """Give up the direct routes among what the kernel has refused; returns what is desired then, if that differs.

        A route whose place another one has is not given up: the way through the tunnel would need the same place.
        """
        due_s = asyncio.get_running_loop().time() + _RETRY_S
        before = len(self._refused)
        for change, error in failed:
            route = change.thing
            if change.verb is Verb.ADD and isinstance(route, Route) and error.errno != errno.EEXIST:
                gateway = route.gateway
                if gateway is not None and self._direct.get(gateway) == route.oif:
                    self._refused[gateway] = _Refusal(route, error, due_s)
                    log.warning("direct route refused problem=%r", str(self._refused[gateway]))
        if self._decide is None or len(self._refused) == before:
            return None
        self._direct = {gateway: oif for gateway, oif in self._direct.items() if gateway not in self._refused}
        return self._decide(self._direct)

    async def _retry(self, kernel: Netlink, found: Mapping[IPAddress, int]) -> None:
        """Take back what is refused no longer, or is not on that link any more."""
        now_s = asyncio.get_running_loop().time()
        for gateway, refusal in [*self._refused.items()]:
            if found.get(gateway) != refusal.route.oif:
                del self._refused[gateway]
            elif refusal.due_s <= now_s:
                trial = replace(refusal.route, metric=_TRIAL_METRIC)
                (error,) = await kernel.change([add_route(trial)])
                if error is None or error.errno == errno.EEXIST:
                    await kernel.change([delete_route(trial)])
                    del self._refused[gateway]
                    log.info("direct route possible again subnet=%s gateway=%s", trial.dst, gateway)
                else:
                    self._refused[gateway] = replace(refusal, error=error, due_s=now_s + _RETRY_S)

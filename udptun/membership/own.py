"""Our own lease: renewed by margin, written again when we move, and taken again when the store has lost it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from udptun.core.errors import ConfigError, LeaseError, LeaseLostError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent
from udptun.membership import lease_clock
from udptun.membership.doubles import Doubles
from udptun.membership.identity import Identity, Node
from udptun.membership.lease_clock import LeaseClock
from udptun.stores.base import Store

log = logging.getLogger(__name__)

RENEW_RETRY_S = 60.0
"""After a renewal, or taking a lost lease again, that failed (flannel's)."""


def renewal_due_in_s(lease: Lease, margin_s: float, now_s: float) -> float:
    """In how long the lease has to be renewed: `margin_s` before it expires, never if it does not.  Pure."""
    return math.inf if lease.expires_s is None else lease.expires_s - margin_s - now_s


def retry_in_s(last_s: float, is_urgent: bool) -> float:
    """How long to wait after a failure; `last_s` is the wait before, 0 after a success.  Pure.

    `is_urgent`: the store does not have our lease, or has it with an address that is no longer ours, and nobody else
    has it.  The sooner it is written again, the better.
    """
    return min(max(1.0, 2 * last_s), RENEW_RETRY_S) if is_urgent else RENEW_RETRY_S


class OwnLease:
    """Our lease, `lease`, with which we forward: it stays what it is whatever the store says.

    `hold` keeps it in the store; `see_events` and `see_snapshot` tell it what the store has.  `on_change` is called
    when it was written.  `asking` is held while the store is asked: one thing at a time (stores/base.py).

    `asked` is what we say of ourselves.  The store may have it otherwise in `lease`, see `Store.claim`.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        asked: LeaseAttrs,
        doubles: Doubles,
        margin_s: float,
        asking: asyncio.Lock,
        clock: LeaseClock,
        on_change: Callable[[], None],
        *,
        is_provisional: bool,
    ) -> None:
        self.lease = lease
        self.is_provisional = is_provisional
        """Whether it is the last run's, and the store has not been asked yet."""
        self.is_lost = False
        """Whether the store no longer has it as we hold it."""
        self.problem = ""
        """Why the store does not have it as we hold it; empty when there is nothing to say."""
        self.given_instead = asyncio.Event()
        """Set when the store has given this host, which it knows by name, other subnets."""
        self._store = store
        self._asked = asked
        self._doubles = doubles
        doubles.me = doubles.me.named(lease.node_name)
        self._margin_s = margin_s
        self._asking = asking
        self._clock = clock
        self._on_change = on_change
        self._has_moved = False
        """Whether the store still has it with an address, or other words, that are no longer ours."""
        self._taker: Node | None = None
        """Who wrote it last, when it was not us."""
        self._news = asyncio.Event()

    def move(self, me: Identity, attrs: LeaseAttrs) -> None:
        """We are at another address, or our lease has to say something else.

        `hold` tells the store at once, and again until the store has it.
        """
        self._doubles.me = me.named(self._doubles.me.node_name)
        self._asked = attrs
        self.lease = replace(self.lease, attrs=attrs)
        self._has_moved = True
        self._news.set()

    def postpone(self, seconds: float) -> None:
        """Move the expiry (see lease_clock.py)."""
        if self.lease.expires_s is not None:
            self.lease = replace(self.lease, expires_s=self.lease.expires_s + seconds)

    def retry_now(self) -> None:
        """The store answers again: `hold` need not wait longer."""
        self._news.set()

    def see_events(self, events: Iterable[LeaseEvent]) -> None:
        """The store tells what has changed."""
        for event in events:
            # What was written before we wrote it last no longer matters.
            if self._is_about_us(event.lease) and event.lease.revision >= self.lease.revision:
                self._see(event.lease if event.type is EventType.ADDED else None)
            elif event.type is EventType.ADDED:
                self._see_other(event.lease)

    def see_snapshot(self, leases: Iterable[Lease]) -> None:
        """The store tells all that it has."""
        there = None
        for lease in leases:
            if self._is_about_us(lease):
                there = lease
            else:
                self._see_other(lease)
        self._see(there)

    def _is_about_us(self, lease: Lease) -> bool:
        name = self._doubles.me.node_name
        return lease.key == self.lease.key and (not name or lease.node_name == name)

    def _see_other(self, lease: Lease) -> None:
        """A lease of other subnets: is it for this host?"""
        if lease.node_name and lease.node_name == self._doubles.me.node_name:
            self.given_instead.set()

    def _see(self, there: Lease | None) -> None:
        """`there` is what the store has of it; None: nothing."""
        if self._has_moved:
            return
        self.is_lost = there is None or there.attrs != self.lease.attrs
        self._taker = None
        if there is None:
            log.warning("our lease is gone from the store, taking it again subnet=%s", self.lease.subnet)
        elif self.is_lost:
            self._taker = self._doubles.me.node_of(there)
        else:
            self.lease, self.problem = there, ""
        self._news.set()

    async def confirm(self) -> None:
        """Claim the lease of the last run, with which we began.

        Raises what `Store.claim` raises, but for LeaseLostError: the lease is lost then, and `hold` goes on trying.
        """
        try:
            await self._take_again()
        except LeaseLostError as exc:
            self.is_lost = True
            self._say_problem("confirmed", exc)
        self.is_provisional = False
        self._news.set()

    async def hold(self) -> None:
        """Renew it by margin, and take it again when the store has lost it, until cancelled."""
        retry_s = 0.0
        while True:
            due_in_s = self._due_in_s()
            if due_in_s > 0:
                await self._wait_for_news(min(due_in_s, lease_clock.CHECK_S))
                continue
            was_lost = self.is_lost
            try:
                await (self._take_again() if was_lost else self._renew())
                retry_s = 0.0
            except (LeaseError, ConfigError) as exc:
                if isinstance(exc, LeaseLostError) and not was_lost:
                    self.is_lost = True
                    continue
                self._say_problem("taken again" if was_lost else "renewed", exc)
                is_urgent = (was_lost or self._has_moved) and not isinstance(exc, LeaseLostError)
                retry_s = retry_in_s(retry_s, is_urgent)
                await self._wait_for_news(retry_s)

    def _due_in_s(self) -> float:
        """In how long the store has to be written to; infinite while `confirm` is still to come."""
        now_s = self._clock.now_s()
        if self.is_provisional:
            return math.inf
        if self.is_lost or self._has_moved:
            return 0.0
        return renewal_due_in_s(self.lease, self._margin_s, now_s)

    async def _wait_for_news(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    async def _renew(self) -> None:
        asked = self._asked
        async with self._asking:
            renewed = await self._store.renew(replace(self.lease, attrs=asked))
        self._take(asked, renewed)
        # flannel has an info line for it.  Here a healthy day logs nothing; a renewal that fails is a problem line.
        log.debug("lease renewed subnet=%s", self.lease.subnet)

    async def _take_again(self) -> None:
        asked = self._asked
        async with self._asking:
            lease = await self._store.claim(
                asked,
                lambda leases: self._doubles.choose_again(self.lease, leases, self._clock.elapsed_s()),
            )
        self._doubles.me = self._doubles.me.named(lease.node_name)
        if lease.subnets != self.lease.subnets:
            self._see_other(lease)
            raise LeaseLostError(
                f"{self._store.name} gives this host {lease.subnet} now, not {self.lease.subnet}; restart to use it"
            )
        taker, self._taker = self._taker, None
        self.is_lost = False
        self._take(asked, lease)
        if taker is None or taker == self._doubles.me.node_of(lease):
            log.info("lease taken again subnet=%s", self.lease.subnet)
        else:
            self._doubles.took_back(taker, lease, self._clock.elapsed_s())

    def _take(self, asked: LeaseAttrs, written: Lease) -> None:
        """The store has it as `written` after we `asked`, which lacks a move that came meanwhile."""
        self._has_moved = self._asked != asked
        self.lease = replace(written, attrs=self._asked) if self._has_moved else written
        self.problem = ""
        self._on_change()

    def _say_problem(self, attempt: str, exc: LeaseError | ConfigError) -> None:
        if str(exc) != self.problem:
            self.problem = str(exc)
            log.error("our lease cannot be %s, forwarding on error=%r", attempt, str(exc))

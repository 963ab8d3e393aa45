"""Begin with what the store says or, while it does not answer, with what the last run has saved.

The lease and the table of the last run are good until they expire, so packets are carried at once.  When the store
answers, our own lease is claimed again before anything else is believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from udptun.config.net_conf import NetConf
from udptun.core.clock import Clock
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.core.lease import Lease, LeaseAttrs
from udptun.core.network_state import IPNetwork
from udptun.membership import saved
from udptun.membership.identity import Identity
from udptun.membership.outage import Backoff, Outage
from udptun.membership.saved import LastLeases, Remembered
from udptun.stores.base import Chooser, PublicAddresses, Store, SubnetChoice

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""How long a store may take to answer at the start before the last run's table is used instead."""

CLAIM_PATIENCE_S = 0.3
"""How long a claim that was interrupted may take to end."""

ParseNetConf = Callable[[str, str], NetConf]
"""Makes a configuration of a text and the name of its place, and knows the backends' keys.  Raises ConfigError."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Start:
    """What a daemon starts from: the text of net-conf.json and, when the store is away, what the last run saved."""

    config: str
    last: LastLeases | None = None


async def find_start(store: Store, state_dir: Path, clock: Clock, parse: ParseNetConf) -> Start:
    """The network config in the store or, while there is none to be had, that of the last run; without either it waits.

    Raises ConfigError for a config that a person on this host has to mend.  One in a remote store is mended elsewhere,
    for all hosts at once, so it is waited for.
    """

    async def ask() -> str:
        try:
            text = await store.network_config()
            parse(text, store.config_name)
        except ConfigError as exc:
            if store.is_config_remote:
                raise StoreUnavailableError(str(exc)) from exc
            raise
        return text

    async def recall() -> Remembered:
        return await asyncio.to_thread(saved.load, state_dir, None, clock.unix_s())

    answer = await ask_or_recall("no network config", store, ask, recall, clock)
    return Start(answer) if isinstance(answer, str) else Start(answer.config, answer)


async def find_public_addresses(store: Store) -> PublicAddresses:
    """What an operator has set in the store as this host's addresses; nothing while the store is away."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await store.public_addresses()
    except (TimeoutError, StoreUnavailableError) as exc:
        reason = str(exc) or f"{store.name} has not answered within {PATIENCE_S:g} s"
        log.warning("beginning without asking the store for a PublicIP of this host error=%r", reason)
        return PublicAddresses()


async def ask_or_recall(
    lack: str,
    store: Store,
    ask: Callable[[], Coroutine[None, None, T]],
    recall: Callable[[], Awaitable[Remembered]],
    clock: Clock,
) -> T | LastLeases:
    """What the store answers or, when it does not do so soon, what the last run saved; without either it waits.

    `lack` is what there is not without an answer, for the log.
    """
    outage, backoff = Outage(lack, store.name, clock), Backoff()
    doing = ""
    while True:
        answer = asyncio.create_task(ask())
        try:
            await asyncio.wait([answer], timeout=PATIENCE_S)
            if not doing and (problem := _unavailable(answer, store)):
                found = await recall()
                # Reading a large table takes a while, so the store may have answered meanwhile.
                if found.last is not None and (problem := _unavailable(answer, store)):
                    log.warning("%s, beginning with the table of the last run error=%r", lack, problem)
                    return found.last
                doing = f"waiting for it, as there is no table of a last run to begin with: {found.reason}"
                if problem:
                    outage.goes_on(problem, doing)
            await asyncio.wait([answer])
            if not (problem := _unavailable(answer, store)):
                outage.end()
                return answer.result()
            outage.goes_on(problem, doing)
        finally:
            answer.cancel()
        await backoff.sleep()


def _unavailable(answer: asyncio.Task[Any], store: Store) -> str:
    """Why there is no answer; empty when there is one."""
    if not answer.done():
        return f"{store.name} has not answered within {PATIENCE_S:g} s"
    exc = answer.exception()
    return str(exc) if isinstance(exc, StoreUnavailableError) else ""


async def recall(state_dir: Path, network: IPNetwork, me: Identity, clock: Clock) -> Remembered:
    """What the last run saved, if it is about `network` and this node's."""
    found = await asyncio.to_thread(saved.load, state_dir, network, clock.unix_s())
    if found.last is not None and not is_ours(found.last, me):
        return Remembered(None, f"it is of {me.node_of(found.last.own)}, not of {me.node_id}")
    return found


def is_ours(last: LastLeases, me: Identity) -> bool:
    """Whether this node saved it; its address may have changed since."""
    return last.own.attrs.node_id == me.node_id


class FirstClaim:
    """The claim of a start, and what it found, so that a start that fails can undo it.

    A store may work on a thread, which nobody can cancel: a claim that was interrupted may happen all the same.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._task: asyncio.Task[Lease] | None = None
        self._seen: tuple[Lease, ...] = ()
        """The leases that there were when the subnet was chosen, until `take_seen`."""
        self._held_before: frozenset[str] = frozenset()
        """Their keys."""
        self._dropped: tuple[str, ...] = ()

    async def make(self, attrs: LeaseAttrs, choose: Chooser) -> Lease:
        """Claim a lease.  May be repeated after it failed."""

        def choose_and_remember(leases: Sequence[Lease]) -> SubnetChoice:
            choice = choose(leases)
            # It is asked again after a lost race: the last answer counts.
            self._seen, self._dropped = tuple(leases), choice.drop
            self._held_before = frozenset(lease.key for lease in leases)
            return choice

        self._task = asyncio.create_task(self._store.claim(attrs, choose_and_remember), name="claim lease")
        return await asyncio.shield(self._task)

    def take_seen(self) -> tuple[Lease, ...]:
        """The leases that there were when the subnet was chosen.  Asked once: they are forgotten then."""
        seen, self._seen = self._seen, ()
        return seen

    def is_dropped(self, lease: Lease) -> bool:
        """Whether the claim has deleted it: it was ours, and another one is now."""
        return lease.key in self._dropped

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._task is not None:
            self._task.cancel()

    async def undo(self) -> None:
        """Give the lease back unless somebody, or we in an earlier run, had it before.

        A claim that was interrupted gets a moment to end.
        """
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=CLAIM_PATIENCE_S)
        if not self._task.done():
            self._task.cancel()
        elif self._task.cancelled() or self._task.exception() is not None:
            return
        elif self._task.result().key not in self._held_before:
            await self._store.release(self._task.result())

"""A host as the lease tests see it: membership on a real store, without packets, under a clock that a test sets."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from udptun.backends.choice import parse_net_conf
from udptun.core.clock import Clock
from udptun.core.family import Family
from udptun.core.lease import EventType, LeaseAttrs, LeaseEvent
from udptun.membership.allocate import chooser
from udptun.membership.identity import Identity
from udptun.membership.membership import Membership
from udptun.membership.start import Start
from udptun.stores.base import Store

CONFIG = '{"Network": "10.0.0.0/16"}'
CONF = parse_net_conf(CONFIG, "test")
DEADLINE_S = 20.0


class Member:
    """Number `number`, with its state in `directory`.  `removals` counts the peers that it has lost."""

    def __init__(self, store: Store, directory: Path, number: int, clock: Clock, margin_s: float = 3600.0) -> None:
        self.store = store
        self.peers: set[str] = set()
        self.removals = 0
        node_id = f"{number:032x}"
        self._attrs = LeaseAttrs(
            IPv4Address(f"192.0.2.{number}"),
            backend_type="udp",
            backend_data={"Port": 8285, "NodeID": node_id, "Udptun": 1},
        )
        self._me = Identity(self._attrs.public_ip, 8285, node_id, node_name=store.node_name)
        state_dir = directory / str(number)
        state_dir.mkdir(exist_ok=True)
        self.membership = Membership(
            *(store, Start(CONFIG), CONF, self._me, state_dir, margin_s),
            *({Family.IPV4: (CONF.network,)}, lambda lease, family: None, self._changed, parse_net_conf, clock),
            outer=lambda attrs, family: family,
        )
        self.running: asyncio.Task[None] | None = None

    async def _changed(self, family: Family, events: Sequence[LeaseEvent]) -> None:
        for event in events:
            if event.type is EventType.ADDED:
                self.peers.add(event.lease.key)
            else:
                self.peers.remove(event.lease.key)
                self.removals += 1

    async def start(self) -> None:
        await self.membership.join(self._attrs, chooser(CONF, self._me, None, random.Random(self._me.node_id)))
        await self.membership.catch_up()
        self.running = asyncio.create_task(self.membership.run())

    async def die(self) -> None:
        """As by kill -9: nothing is given back."""
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.store.aclose()


async def holds(condition: Callable[[], object], what: str) -> float:
    """Wait for it, DEADLINE_S at most.  Returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < DEADLINE_S, what
        await asyncio.sleep(0.01)
    return time.monotonic() - began

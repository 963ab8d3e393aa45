"""etcd's own leases: the timers on which keys hang.  Granted, revoked, and asked when they end.

The lists and watches of etcd say on which etcd lease a key hangs, but not when that one ends.  Asking costs a request
for each.  So the end of another host's lease begins as the time of looking, and the watch asks at leisure (see
`Store.is_remote`).  Nobody removes a lease by the clock: etcd reports its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

from udptun.core.errors import ConfigError, LeaseError
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.client import GRANT, REVOKE, TIME_TO_LIVE, Client

_CONCURRENT_LOOKUPS = 64
"""How many requests an exact snapshot has under way."""


class EtcdLeases:
    """Grants and revokes etcd leases, and knows when they end as far as anybody has told us.

    `clock` gives Unix seconds, as do all results.  An etcd lease is its number; 0 is none.
    """

    def __init__(self, client: Client, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._granted: dict[int, float] = {}
        """When those end that we were granted."""
        self._found: dict[int, float] = {}
        """When those end that we have asked about."""

    def expiry(self, etcd_lease: int) -> float | None:
        """The earliest end that is known of what hangs on it; None when that never ends."""
        if not etcd_lease:
            return None
        return self._granted.get(etcd_lease) or self._found.get(etcd_lease) or self._clock()

    def is_unknown(self, etcd_lease: int) -> bool:
        """Whether nobody has told us when it ends."""
        return bool(etcd_lease) and etcd_lease not in self._granted and etcd_lease not in self._found

    async def grant(self, ttl_s: int, operation: str) -> tuple[int, float]:
        """A new one and when it ends, known from before any key hangs on it: the watch may report the key at once."""
        now_s = self._clock()
        self._granted = {it: expiry for it, expiry in self._granted.items() if expiry > now_s}
        granted = await self._client.call(GRANT, pb.LeaseGrantRequest(TTL=ttl_s), operation)
        self._granted[granted.ID] = now_s + granted.TTL
        return granted.ID, self._granted[granted.ID]

    async def revoke_unused(self, etcd_leases: Iterable[int]) -> None:
        """Revoke those on which no key hangs.  A failure is ignored: etcd ends them by itself within 24 hours."""
        operation = "revoke an unused etcd lease"
        for etcd_lease in {*etcd_leases} - {0}:
            self._granted.pop(etcd_lease, None)
            with suppress(LeaseError, ConfigError):
                request = pb.LeaseTimeToLiveRequest(ID=etcd_lease, keys=True)
                found = await self._client.call(TIME_TO_LIVE, request, operation)
                if found.TTL >= 0 and not found.keys:
                    await self._client.call(REVOKE, pb.LeaseRevokeRequest(ID=etcd_lease), operation)

    async def look_up(self, etcd_lease: int) -> float:
        """Ask when it ends; the answer may be a second too early.  It is now when there is no such etcd lease."""
        now_s = self._clock()
        request = pb.LeaseTimeToLiveRequest(ID=etcd_lease)
        response = await self._client.call(TIME_TO_LIVE, request, "look up when a lease expires")
        return now_s + max(response.TTL, 0)

    async def look_up_unknown(self, etcd_leases: Collection[int]) -> None:
        """Ask about all of these that are unknown, and remember the answers."""
        wanted = iter({it for it in etcd_leases if self.is_unknown(it)})

        async def some(ids: Iterator[int]) -> None:
            for etcd_lease in ids:
                self._found[etcd_lease] = await self.look_up(etcd_lease)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(_CONCURRENT_LOOKUPS):
                    tasks.create_task(some(wanted))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    def remember(self, etcd_lease: int, expires_s: float) -> None:
        """Keep what `look_up` answered, until `forget` or `keep_only`."""
        self._found[etcd_lease] = expires_s

    def forget(self, etcd_lease: int) -> None:
        """Nothing of the table hangs on it any more."""
        self._found.pop(etcd_lease, None)

    def keep_only(self, in_use: Collection[int]) -> None:
        """Forget what was asked about all others."""
        self._found = {it: expiry for it, expiry in self._found.items() if it in in_use}

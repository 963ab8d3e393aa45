"""Follow a store as a daemon does: through its failures, asking again after 0.1 s, one line for each change of reason.

As a program, `follower.py FLAG...` follows what the flags name and prints a line of JSON at each change: the monotonic
time, the names of the leases' keys and the errors so far.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.core.lease import EventType, Lease, LeaseEvent
from udptun.stores.base import Store

RETRY_S = 0.1
DEADLINE_S = 30.0


class Follower:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.leases: dict[str, Lease] = {}
        self.skipped: tuple[str, ...] = ()
        self.events: list[LeaseEvent] = []
        self.n_snapshots = 0
        """How many the watch gave."""
        self.errors: list[str] = []
        """Each once while it stays the same."""
        self.revision = -1
        self.changed = asyncio.Event()

    async def run(self) -> None:
        last = ""
        while True:
            try:
                if self.revision < 0:
                    snapshot = await self.store.snapshot()
                    self.leases = {lease.key: lease for lease in snapshot.leases}
                    self.revision, self.skipped = snapshot.revision, snapshot.skipped
                    self.changed.set()
                async with aclosing(self.store.watch(self.revision)) as batches:
                    async for batch in batches:
                        last = ""
                        self.revision = batch.revision
                        if batch.snapshot is not None:
                            self.n_snapshots += 1
                            self.leases = {lease.key: lease for lease in batch.snapshot.leases}
                        self.events += batch.events
                        for event in batch.events:
                            if event.type is EventType.ADDED:
                                self.leases[event.lease.key] = event.lease
                            else:
                                self.leases.pop(event.lease.key, None)
                        self.changed.set()
            except (StoreUnavailableError, ConfigError) as exc:
                if str(exc) != last:
                    last = str(exc)
                    self.errors.append(last)
                    self.changed.set()
                await asyncio.sleep(RETRY_S)

    async def until(self, holds: Callable[[], bool]) -> float:
        """Wait for it.  Returns how long that took, seconds."""
        began_s = time.monotonic()
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()
        return time.monotonic() - began_s

    async def until_keys(self, *names: str) -> float:
        return await self.until(lambda: self.leases.keys() == {*names})

    async def until_error(self, text: str) -> str:
        """The first line from now on, or the last one so far, that has it."""
        await self.until(lambda: any(text in line for line in self.errors))
        return next(line for line in self.errors if text in line)


@asynccontextmanager
async def following(store: Store) -> AsyncIterator[Follower]:
    """A Follower that runs, on a store that is closed at the end."""
    follower = Follower(store)
    task = asyncio.create_task(follower.run())
    try:
        yield follower
        assert not task.done() or task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.aclose()


async def main(flags: list[str]) -> None:
    from udptun.config.flags import parse_daemon_flags
    from udptun.stores.etcd.store import EtcdStore

    async with following(EtcdStore(parse_daemon_flags(flags, {}).etcd)) as follower:
        while True:
            await follower.changed.wait()
            follower.changed.clear()
            now = {"at_s": time.monotonic(), "keys": sorted(follower.leases), "errors": follower.errors}
            print(json.dumps(now), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))

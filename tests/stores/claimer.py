"""A process that claims: `claimer.py DB FIRST_HOST COUNT`; a line "KEY REVISION PUBLIC_IP" acknowledges each claim."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from store_harness import first_free, host

from udptun.stores.local.store import LocalStore


async def main(path: Path, first: int, count: int) -> None:
    store = LocalStore(path, path.with_name("net-conf.json"))
    for number in range(first, first + count):
        lease = await store.claim(host(number), first_free)
        print(lease.key, lease.revision, lease.attrs.public_ip, flush=True)
    await store.aclose()


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

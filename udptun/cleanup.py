"""`udptun cleanup`: leave the host as it was, so that another overlay daemon can start.

A flannel0 that is left behind makes flanneld create flannel1 beside it and lose traffic in silence.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from udptun import reconcile, state
from udptun.daemon import LOCK_FILE, lock_run_dir, open_store
from udptun.datapath import client
from udptun.options import Options
from udptun.status import SOCKET_NAME
from udptun.tun import TUN_NAME


def cleanup(options: Options, release: bool) -> int:
    """Stop the datapath; remove device, routes and files, and with `release` give the lease back.

    Prints a line for each thing done.  Raises UdptunError while a daemon runs: it would make it all anew.
    """
    if not options.run_dir.exists():
        # Nothing to stop, but a device or a route may be left of a run directory that is gone.
        asyncio.run(_remove_kernel_state())
    else:
        lock_fd = lock_run_dir(options.run_dir)
        try:
            asyncio.run(_stop_and_remove(options.run_dir))
        finally:
            os.close(lock_fd)
    if release:
        asyncio.run(_release(options))
    for path in (options.subnet_file, options.run_dir / SOCKET_NAME, options.run_dir / LOCK_FILE):
        _delete(path)
    for path in state.files(options.state_dir, with_identity=release):
        _delete(path)
    with suppress(OSError):
        # Stays when somebody else keeps something in it, or when it never was.
        options.run_dir.rmdir()
    return 0


async def _stop_and_remove(run_dir: Path) -> None:
    # Standbys first: none of them shall take over.
    for process in reversed(await client.find(run_dir)):
        await process.stop()
        print(f"stopped datapath process {process.pid}")
    await _remove_kernel_state()


async def _remove_kernel_state() -> None:
    for line in await reconcile.remove([TUN_NAME]):
        print(line)


async def _release(options: Options) -> None:
    """Give back every lease with our NodeID."""
    me = state.node_id(options.state_dir)
    store = open_store(options)
    try:
        for lease in (await store.snapshot()).leases:
            if lease.attrs.node_id == me:
                await store.release(lease)
                print(f"released the lease {lease.subnet} in {store.name}")
    finally:
        await store.aclose()


def _delete(path: Path) -> None:
    if path.exists():
        path.unlink()
        print(f"deleted {path}")

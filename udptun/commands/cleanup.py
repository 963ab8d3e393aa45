"""`udptun cleanup`: leave the host as it was, so that another overlay daemon can start.

When a flannel0 is left behind, flanneld creates flannel1 beside it and loses traffic in silence.  What belongs to the
daemons of other Networks stays, and is named.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from udptun.config import subnet_env
from udptun.config.flags import Options
from udptun.control.instance import NETWORKS_FILE, claim_files, claim_leftovers, starting
from udptun.control.node_status import path_beside
from udptun.control.run_dir import IPV6_PROBES_FILE, LOCK_FILE, PROBES_FILE, lock_run_dir
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import FirewallError
from udptun.core.ownership import Ownership
from udptun.datapath import processes
from udptun.firewall.reconciler import remove_rules
from udptun.kernel.claims import Claims
from udptun.kernel.reconcile.ownership import remove_ours
from udptun.membership import identity, saved
from udptun.stores.open import open_store


def cleanup(options: Options, release: bool) -> int:
    """Stop the datapath; remove device, routes, firewall rules and files, and with `release` give the lease back.

    Prints a line for each thing done.  Raises UdptunError while a daemon runs, which would make everything again; at
    the end, when all else is gone, for firewall rules that could not be removed.
    """
    with ExitStack() as undo:
        # All is held until the end: a daemon that starts meanwhile would lose its files.
        if options.run_dir.exists():
            undo.callback(os.close, lock_run_dir(options.run_dir))
        claims = Claims()
        undo.callback(claims.close)
        claim_files(claims, options)
        ownership = claim_leftovers(claims, options)
        asyncio.run(_clean_up(options, ownership, release))
    for directory in (options.run_dir, options.state_dir, options.subnet_file.parent):
        with suppress(OSError):
            # It fails when others keep something there, or when there is no such directory.
            directory.rmdir()
    return 0


async def _clean_up(options: Options, ownership: Ownership, release: bool) -> None:
    # Standbys first, so that none takes over.  Without the run directory no process can be found, but a device or a
    # route may be left.
    for process in reversed(await processes.find_running(options.run_dir)):
        await process.stop()
        print(f"stopped datapath process {process.pid}")
    async with starting():
        lines = await remove_ours(ownership)
    removed, left = await remove_rules(ownership.networks, subnet_env.read_networks(options.subnet_file))
    lines += removed
    for line in lines:
        print(line)
    if lines and not ownership.networks:
        directories = f"{options.run_dir}, {options.state_dir} and {options.subnet_file}"
        print(f"no daemon with {directories} has left anything; give the directories of the one whose things shall go")
    if release and identity.has_node_id(options.state_dir):
        await _release(options)
    written = subnet_env.read_networks(options.subnet_file)
    if written is None or written[0] in ownership.networks:
        _delete(options.subnet_file)
        _delete(path_beside(options.subnet_file))
    else:
        print(f"left {options.subnet_file} alone: it is about {written[0]}")
    for path in (
        options.state_dir / NETWORKS_FILE,
        options.state_dir / saved.FILE,
        # Without these files the host would be another node.
        *(identity.files(options.state_dir) if release else ()),
        options.run_dir / SOCKET_NAME,
        options.run_dir / LOCK_FILE,
        options.run_dir / PROBES_FILE,
        options.run_dir / IPV6_PROBES_FILE,
    ):
        _delete(path)
    if left:
        raise FirewallError("; ".join(left))


async def _release(options: Options) -> None:
    """Give back every lease with our NodeID."""
    me = identity.node_id(options.state_dir)
    store = open_store(options)
    try:
        for lease in (await store.snapshot()).leases:
            if lease.attrs.node_id == me:
                if lease.node_name:
                    print(f"left the lease {lease.subnet} in {store.name}: it is the podCIDR of {lease.node_name}")
                    continue
                if lease.is_reservation:
                    print(f"left the reservation {lease.subnet} in {store.name}; `udptun lease release` deletes it")
                    continue
                await store.release(lease)
                print(f"released the lease {lease.subnets} in {store.name}")
    finally:
        await store.aclose()


def _delete(path: Path) -> None:
    if path.exists():
        path.unlink()
        print(f"deleted {path}")

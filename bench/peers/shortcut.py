"""The datapath of Type udp with one peer and the shortcut, without daemon and store.

    python shortcut.py RUN-DIR DEVICE LOCAL-ADDRESS PORT REMOTE-ADDRESS NETWORK OWN-SUBNET PEER-SUBNET MTU UNDERLAY

Makes DEVICE and carries NETWORK's packets between the two subnets until it is killed, over the link UNDERLAY.
"""

from __future__ import annotations

import asyncio
import os
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck, default_workers
from udptun.datapath.settings import PacketSettings, Remote, Where
from udptun.datapath.shortcut.programs import ShortcutSettings
from udptun.datapath.shortcut.shortcut import Shortcut
from udptun.datapath.tunnel import Tunnel


async def main(words: list[str]) -> None:
    directory, device, local, port, remote, network, own, peer, mtu, underlay = words
    here, there = IPv4Address(local), IPv4Address(remote)
    own_subnet = IPv4Network(own)
    run_dir = Path(directory)
    run_dir.mkdir(parents=True)
    n_workers = default_workers(len(os.sched_getaffinity(0)))
    tunnel = await Tunnel.open(run_dir, device, Where(here, int(port)), n_workers, ALL)
    tunnel.configure(
        PacketSettings(IPv4Network(network), own_subnet, here, int(mtu), SourceCheck.PEER, ALL, port=int(port))
    )
    tunnel.peers.set_all(
        {IPv4Network(peer): Remote(there, int(port), True, carries_ecn=True, takes_shortcut=True)}
    )
    await tunnel.publish()
    await tunnel.start()
    tunnel.set_offload(ALL)
    shortcut = Shortcut(tunnel, f"udptun {network}")
    shortcut.want(ShortcutSettings(underlay, here, int(port), own_subnet, int(mtu), carries_ecn=True))
    shortcut.allow_detour("")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tunnel.datapath.supervise())
        tasks.create_task(shortcut.run())


asyncio.run(main(sys.argv[1:]))

"""The datapath as a userspace VTEP with one peer, without daemon and store.

    python vtep.py RUN-DIR DEVICE LOCAL-ADDRESS PORT REMOTE-ADDRESS NETWORK OWN-SUBNET PEER-SUBNET MTU

Makes DEVICE and carries NETWORK's packets between the two subnets until it is killed.  All addresses are of one family.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from udptun.backends.vtep import N_SENDERS
from udptun.core.network_state import IPAddress
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck, default_workers
from udptun.datapath.settings import PacketSettings, Remote, Vtep, Where
from udptun.datapath.tunnel import Tunnel

_VNI = 2


def _mac(address: IPAddress) -> bytes:
    return b"\x0a\0" + address.packed[-4:]


async def main(words: list[str]) -> None:
    directory, device, local, port, remote, network, own, peer, mtu = words
    here, there = ip_address(local), ip_address(remote)
    run_dir = Path(directory)
    run_dir.mkdir(parents=True)
    n_workers = default_workers(len(os.sched_getaffinity(0)))
    tunnel = await Tunnel.open(run_dir, device, Where(here, int(port)), n_workers, ALL, N_SENDERS)
    vtep, how = Vtep(_VNI, _mac(here)), (here, int(mtu), SourceCheck.PEER, ALL)
    if here.version == 4:
        settings = PacketSettings(IPv4Network(network), IPv4Network(own), *how, vtep)
    else:
        of_ipv6 = PacketSettings(None, None, *how, vtep)
        settings = replace(of_ipv6, network_ipv6=IPv6Network(network), own_subnet_ipv6=IPv6Network(own))
    tunnel.configure(settings)
    tunnel.peers.set_all({ip_network(peer): Remote(there, int(port), True, True, _mac(there))})
    await tunnel.publish()
    await tunnel.start()
    tunnel.set_offload(ALL)
    await tunnel.datapath.supervise()


asyncio.run(main(sys.argv[1:]))

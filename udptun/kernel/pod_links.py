"""Where the pods of this host are: the links that have an address in its subnet."""

from __future__ import annotations

import socket

from udptun.core.pod_path import PodPath
from udptun.kernel.netlink import Netlink


async def find_pod_links(path: PodPath) -> tuple[str, ...]:
    """The names of the links behind which there are pods, such as cni0 or docker0.  Raises KernelError.

    A host that routes to each pod by itself, without an address on the link, has none that we know of.
    """
    async with Netlink() as kernel:
        addresses = await kernel.addresses(family=path.family)
    indexes = {address.link_index for address in addresses if address.ip in path.subnet}
    names = set()
    for index in indexes:
        try:
            names.add(socket.if_indextoname(index))
        except OSError:
            # It has gone meanwhile.
            continue
    return tuple(sorted(names - {path.device, "lo"}))

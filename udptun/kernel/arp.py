"""Whether another host on one of our links has an address."""

from __future__ import annotations

import asyncio
import logging
import socket
from ipaddress import IPv4Address

from udptun.core.errors import KernelError
from udptun.core.network_state import NUD_FAILED, NUD_INCOMPLETE, NUD_REACHABLE
from udptun.kernel.netlink import Netlink

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
"""The kernel asks three times, once a second, before it gives up (net.ipv4.neigh.DEV.mcast_solicit, retrans_time)."""

_LOOK_S = 0.05
"""How often to look what it has found."""

_DISCARD_PORT = 9
"""RFC 863: whoever listens there throws away what comes."""


async def is_in_use(ip: IPv4Address) -> bool:
    """Whether a host has `ip`, or may have it.

    False only where `ip` is on a link of ours, without a router in between, and nobody there answers ARP for it while
    some other host there does.  A host answers whatever its firewall drops or refuses.  Takes as long as the kernel
    asks, usually 3 s, when the answer is no, and up to `_PATIENCE_S` when there is none.
    """
    try:
        async with Netlink() as kernel:
            index = (await kernel.on_link([ip])).get(ip)
            if index is None or not _send_to(ip):
                return True
            # A link that is cut off, or plugged in at the wrong place, would have nobody have any address.
            for gateway in {route.gateway for route in await kernel.routes() if route.oif == index}:
                if isinstance(gateway, IPv4Address):
                    _send_to(gateway)
            return not await _is_known_to_be_free(kernel, index, ip)
    except KernelError as exc:
        log.warning("cannot find out whether a host has %s, so it may have: %s", ip, exc)
        return True


def _send_to(ip: IPv4Address) -> bool:
    """Have the kernel look for the neighbour; False when a firewall of ours keeps us from it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.sendto(b"", (str(ip), _DISCARD_PORT))
        except OSError:
            return False
    return True


async def _is_known_to_be_free(kernel: Netlink, link_index: int, ip: IPv4Address) -> bool:
    """Whether the kernel's search ends with nobody, on a link where others are found."""
    for _ in range(round(_PATIENCE_S / _LOOK_S)):
        states = await kernel.neighbour_states(link_index)
        state = states.get(ip, 0)
        if state not in (NUD_INCOMPLETE, NUD_FAILED):
            return False
        if state == NUD_FAILED and NUD_REACHABLE in states.values():
            return True
        await asyncio.sleep(_LOOK_S)
    return False

"""What in the kernel is ours, and taking it out."""

from __future__ import annotations

import logging

from udptun.core.network_state import DEVICE_NAME, LINK_ALIAS, ROUTE_PROTOCOL, Link, describe_route
from udptun.kernel.link_messages import delete_link
from udptun.kernel.netlink import Netlink
from udptun.kernel.rtnetlink import delete_route

log = logging.getLogger(__name__)


def is_ours(link: Link) -> bool:
    """Whether we have made the device.

    A VXLAN device carries our alias.  A TUN device is ours by its name and flags: nobody else makes one like it.
    """
    tun = link.tun
    return link.alias == LINK_ALIAS or (
        DEVICE_NAME.fullmatch(link.name) is not None
        and tun is not None
        and not tun.is_tap
        and tun.is_multi_queue
        and tun.is_persistent
    )


async def is_anything_ours() -> bool:
    """Whether the kernel has a device or a route of ours.  Raises KernelError."""
    async with Netlink() as kernel:
        return any(map(is_ours, await kernel.links())) or bool(await kernel.routes(ROUTE_PROTOCOL))


async def delete_own_vxlan(name: str) -> None:
    """Delete the VXLAN device of this name if it is ours, so that a TUN device can have the name.

    Raises KernelError.
    """
    async with Netlink() as kernel:
        link = await kernel.link(name)
        if link is not None and link.vxlan is not None and link.alias == LINK_ALIAS:
            await kernel.do(delete_link(link))
            log.info("deleted link %s reason=the userspace VTEP takes its place", name)


async def remove_ours() -> list[str]:
    """Take out every device and every route of ours.

    Returns a line for each thing removed, and for each device that has a name like ours but is not ours.
    Removing nothing is no error.  Raises KernelError when the kernel refuses.
    """
    lines: list[str] = []
    async with Netlink() as kernel:
        for link in await kernel.links():
            if is_ours(link):
                await kernel.do(delete_link(link))
                lines.append(f"deleted link {link.name}")
            elif DEVICE_NAME.fullmatch(link.name):
                lines.append(f"left {link.name} alone: it is not a device of udptun")
        for route in await kernel.routes(ROUTE_PROTOCOL):
            await kernel.do(delete_route(route))
            lines.append(f"deleted route {describe_route(route)}")
    return lines

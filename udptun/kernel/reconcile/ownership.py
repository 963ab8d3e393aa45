"""What in the kernel belongs to us and to other daemons of ours, found and taken out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.network_state import (
    DEVICE_NAME,
    ROUTE_PROTOCOL,
    Address,
    IPNetwork,
    Link,
    LinkSettings,
    Route,
    describe_route,
)
from udptun.core.ownership import Ownership, is_marked, marked_network
from udptun.kernel.detour_device import is_half_made_detour
from udptun.kernel.filters import remove_filters
from udptun.kernel.link_messages import delete_address, delete_link, set_link
from udptun.kernel.netlink import Netlink
from udptun.kernel.rtnetlink import delete_route
from udptun.kernel.veth import is_half_made_pair

log = logging.getLogger(__name__)

_MAX_NAMED = 3
"""Of the routes of other daemons: so many are named, the others are counted."""


async def is_anything_ours(ownership: Ownership) -> bool:
    """Whether the kernel has a device or a route of ours.  Raises KernelError."""
    async with Netlink() as kernel:
        links, addresses = await _marked_links(kernel)
        return any(ownership.owns_link(link, addresses) for link in links) or any(
            map(ownership.owns_route, await _marked_routes(kernel))
        )


async def own_links(kernel: Netlink, ownership: Ownership) -> list[Link]:
    """The devices of ours that there are.  Raises KernelError."""
    links, addresses = await _marked_links(kernel)
    return [link for link in links if ownership.owns_link(link, addresses)]


async def stray_links(kernel: Netlink, ownership: Ownership, desired: Collection[str]) -> tuple[Link, ...]:
    """The devices that this daemon has made for certain and whose names are not desired.  Raises KernelError."""
    links, addresses = await _marked_links(kernel)
    return tuple(link for link in links if link.name not in desired and ownership.has_made_link(link, addresses))


async def marked_networks() -> dict[str, IPNetwork]:
    """The Network in the alias of each device that has one, by the device's name.  Raises KernelError."""
    async with Netlink() as kernel:
        return {link.name: found for link in await kernel.links() if (found := marked_network(link)) is not None}


async def check_device(name: str, ownership: Ownership, remedy: str) -> None:
    """Raise UdptunError when the device of this name is another daemon's; `remedy` says what to do about it."""
    async with Netlink() as kernel:
        links, addresses = await _marked_links(kernel)
    for link in links:
        if link.name == name and ownership.leaves_link(link, addresses):
            raise UdptunError(f"{name} {_owner_of(link, addresses)}; {remedy}")


async def find_tun_name(ownership: Ownership) -> str:
    """The name of our TUN device: that of the one there is, or flannel0, flannel1, …: the first that no daemon has.

    A device of that name that is nobody's of ours is no reason for another name.  It would go on taking the packets, or
    belong to a daemon that takes them from us.  Raises KernelError.
    """
    async with Netlink() as kernel:
        links, addresses = await _marked_links(kernel)
    tuns = {link.name: link for link in links if link.tun is not None}
    names = [f"flannel{n}" for n in range(len(links) + 1)]
    ours = [name for name in names if name in tuns and ownership.owns_link(tuns[name], addresses)]
    return ours[0] if ours else next(name for name in names if name not in {link.name for link in links})


async def mark_link(name: str, ownership: Ownership) -> None:
    """Give the device our alias, so that no other daemon takes it for its own.  Raises KernelError."""
    async with Netlink() as kernel:
        link = await kernel.link(name)
        if link is not None and link.alias != ownership.alias:
            await kernel.do(set_link(LinkSettings(link, alias=ownership.alias)))


async def delete_own_vxlan(name: str, ownership: Ownership) -> None:
    """Delete the VXLAN device of this name if it is ours, so that a TUN device can have the name.

    Raises KernelError.
    """
    async with Netlink() as kernel:
        for link in await own_links(kernel, ownership):
            if link.name == name and link.vxlan is not None:
                await kernel.do(delete_link(link))
                log.info("deleted link %s reason=the userspace VTEP takes its place", name)


async def remove_ours(ownership: Ownership, keep: str = "") -> list[str]:
    """Take out every filter, device and route of ours.  Of the device `keep` only the addresses go that are ours.

    Devices of the shortcut that a killed daemon has half made go too, whosever they were: they have no mark yet.
    Returns a line for each thing removed, and for what was left: other daemons' devices and routes, and devices that
    have a name like ours.  Removing nothing is no error.  Raises KernelError when the kernel refuses.
    """
    # First what sends packets into the devices.
    lines = [f"deleted filter {it.name}" for it in await remove_filters(ownership.aliases, with_clsact=True)]
    async with Netlink() as kernel:
        addresses = await kernel.addresses()
        for link in await kernel.links():
            if link.name == keep:
                here = [address for family in Family for address in await kernel.addresses(link.index, family)]
                for address in here:
                    if any(address.ip in network for network in ownership.networks):
                        await kernel.do(delete_address(address))
                        lines.append(f"deleted address {address.ip} of {keep}")
            elif ownership.owns_link(link, addresses) or is_half_made_pair(link) or is_half_made_detour(link):
                await kernel.do(delete_link(link))
                lines.append(f"deleted link {link.name}")
            elif is_marked(link):
                lines.append(f"left {link.name} alone: it {_owner_of(link, addresses)}")
            elif DEVICE_NAME.fullmatch(link.name):
                lines.append(f"left {link.name} alone: it is not a device of udptun")
        left = []
        for route in await _marked_routes(kernel):
            if ownership.owns_route(route):
                await kernel.do(delete_route(route))
                lines.append(f"deleted route {describe_route(route)}")
            else:
                left.append(route)
    return lines + _describe_left(left)


async def _marked_routes(kernel: Netlink) -> list[Route]:
    """The routes of both families that daemons of ours have made."""
    return [route for family in Family for route in await kernel.routes(ROUTE_PROTOCOL, family)]


async def _marked_links(kernel: Netlink) -> tuple[list[Link], list[Address]]:
    """The devices that daemons of ours have made, and the addresses of all devices."""
    links = [link for link in await kernel.links() if is_marked(link)]
    return links, await kernel.addresses() if links else []


def _owner_of(link: Link, addresses: Iterable[Address]) -> str:
    """Whose the device is, for a sentence that begins with its name."""
    network = marked_network(link)
    if network is not None:
        return f"belongs to the udptun daemon of {network}"
    ips = [str(address.ip) for address in addresses if address.link_index == link.index]
    return "was made by an older udptun" + (f" for another Network, with the address {ips[0]}" if ips else "")


def _describe_left(routes: list[Route]) -> list[str]:
    named = ", ".join(str(route.dst) for route in routes[:_MAX_NAMED])
    more = f" and {len(routes) - _MAX_NAMED} more" if len(routes) > _MAX_NAMED else ""
    return [f"left the routes of other udptun daemons alone: {named}{more}"] if routes else []

"""A VXLAN device that super-packets from peers pass, so that the kernel forgets that they were encapsulated.

Nobody can use it to get in or out: it sends to nobody, learns nothing, asks and answers no ARP, and has no addresses
and no IPv6.  A program at its ingress takes what is ours and drops all else.  While there is no such program, as after
the end of a daemon that was killed, the kernel drops what the device receives: no route leads back by it (rp_filter),
and IPv6 is off on it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from udptun.core.desired import Sysctl
from udptun.core.errors import KernelError
from udptun.core.network_state import Link, LinkSettings, Vxlan
from udptun.kernel.link_messages import add_vxlan, set_link
from udptun.kernel.netlink import Netlink
from udptun.kernel.own_link import delete_own_link
from udptun.kernel.sysctl import read_sysctl, write_sysctl

_SUFFIX = "-gso"
_MAC = "02:75:74"
"""The first half of its MAC address.  The others are chosen by chance: strangers do not know them."""


def detour_name(device: str) -> str:
    """Of the detour that belongs to a TUN device."""
    return device + _SUFFIX


async def make_detour(device: str, port: int, vni: int, mtu: int, alias: str) -> Link:
    """Make it and switch it on, in place of one that is left over.  Raises KernelError: there is none then.

    EEXIST: the name is taken by a link that is not ours, which stays.  EADDRINUSE: the UDP port is.  EOPNOTSUPP: the
    kernel has no VXLAN.
    """
    name = detour_name(device)
    await delete_detour(device, alias)
    # `secrets` has the same bytes, and loads OpenSSL for the daemons without a shortcut as well.
    mac = ":".join([_MAC, *(f"{byte:02x}" for byte in os.urandom(3))])
    async with Netlink() as kernel:
        await kernel.do(add_vxlan(name, Vxlan(vni, None, 0, port, learning=False, gbp=False), mac, mtu))
        try:
            link = await kernel.link(name)
            if link is None:
                raise KernelError(f"cannot find {name}, which was just made", errno.ENODEV)
            # All before it is up.
            _close(name)
            await kernel.do(set_link(LinkSettings(link, alias=alias, has_arp=False)))
            await kernel.do(set_link(LinkSettings(link, up=True)))
        except BaseException:
            with suppress(KernelError):
                await delete_detour(device, alias)
            raise
        return link


async def delete_detour(device: str, alias: str) -> None:
    """There may be none.  Raises KernelError, EEXIST when the link of that name is not ours, which stays."""
    await delete_own_link(detour_name(device), alias, is_half_made_detour)


def is_half_made_detour(link: Link) -> bool:
    """Whether it is a detour that a daemon, killed while it made the device, has left without an alias."""
    is_like_it = link.name.endswith(_SUFFIX) and link.vxlan is not None and link.mac.startswith(_MAC)
    return is_like_it and not link.alias


def _close(name: str) -> None:
    """Have the kernel drop what no program takes, by both families.  Raises KernelError.

    What cannot be set, as in a container with a read-only /proc/sys, may be right already.
    """
    rp_filter, disable_ipv6 = f"net/ipv4/conf/{name}/rp_filter", f"net/ipv6/conf/{name}/disable_ipv6"
    try:
        write_sysctl(Sysctl(rp_filter, "1", ""))
    except KernelError:
        # The greater one of the two holds, and both values but 0 are right for a device without addresses.
        if not {read_sysctl(rp_filter), read_sysctl("net/ipv4/conf/all/rp_filter")} & {"1", "2"}:
            raise
    try:
        write_sysctl(Sysctl(disable_ipv6, "1", ""))
    except KernelError:
        # A kernel without IPv6 has no such setting.  That /proc/sys can be read was seen above.
        if read_sysctl(disable_ipv6) not in (None, "1"):
            raise

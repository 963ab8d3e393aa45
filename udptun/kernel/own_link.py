"""Links of ours that carry packets between programs: whether one is in order, and how it is deleted by its name.

Ours is one with our alias, or one that a killed daemon has left half made.

The kernel gives no alias to a link in the message that makes it (rtnl_create_link in net/core/rtnetlink.c).  So for a
moment a link is ours without one, and is known by what else is special about it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from udptun.core.errors import KernelError
from udptun.core.network_state import Link
from udptun.kernel.link_messages import delete_link
from udptun.kernel.netlink import Netlink


async def is_in_order(name: str, index: int, mtu: int) -> bool:
    """Whether that is still this link, and is up and takes packets of `mtu` bytes.  Raises KernelError.

    Anybody may change it, and one that is down loses all that it gets.
    """
    async with Netlink() as kernel:
        link = await kernel.link(name)
    return link is not None and link.index == index and link.is_up and link.mtu >= mtu


async def delete_own_link(name: str, alias: str, is_half_made: Callable[[Link], bool]) -> None:
    """There may be none.  Raises KernelError, EEXIST when the link of that name is not ours, which stays."""
    async with Netlink() as kernel:
        link = await kernel.link(name)
        if link is None:
            return
        if link.alias != alias and not is_half_made(link):
            hint = "it is a link of somebody else; rename or delete it"
            raise KernelError(f"cannot make {name}: the name is taken", errno.EEXIST, hint)
        await kernel.do(delete_link(link))

"""Deletes a link of ours by its name: one with our alias, or one that a killed daemon has left half made.

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

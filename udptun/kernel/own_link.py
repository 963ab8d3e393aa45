"""Links of ours that carry packets between programs: whether one is in order, and how it is deleted by its name.

Ours is one with our alias, or one that a killed daemon has left half made.

The kernel gives no alias to a link in the message that makes it (rtnl_create_link in net/core/rtnetlink.c).  So for a
moment a link is ours without one, and is known by what else is special about it.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable

from udptun.core.errors import KernelError
from udptun.core.network_state import Link
from udptun.kernel.link_messages import delete_link
from udptun.kernel.netlink import Netlink

# include/uapi/linux/sockios.h and if.h: struct ifreq, of which these give one number.
_SIOCGIFFLAGS, _SIOCGIFMTU, _SIOCGIFINDEX = 0x8913, 0x8921, 0x8933
_NUMBER, _FLAGS = struct.Struct("16si20x"), struct.Struct("16sh22x")
_IFF_UP = 1


def is_in_order(name: str, index: int, mtu: int) -> bool:
    """Whether that is still this link, and is up and takes packets of `mtu` bytes.

    Anybody may change it, and one that is down loses all that it gets.  Not by netlink, which may have to wait for
    rtnl_lock for seconds.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:

        def ask(command: int, answer: struct.Struct) -> int:
            return int(answer.unpack(fcntl.ioctl(sock, command, answer.pack(name.encode(), 0)))[1])

        try:
            return (
                ask(_SIOCGIFINDEX, _NUMBER) == index
                and bool(ask(_SIOCGIFFLAGS, _FLAGS) & _IFF_UP)
                and ask(_SIOCGIFMTU, _NUMBER) >= mtu
            )
        except OSError:
            return False


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

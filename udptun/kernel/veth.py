"""A veth pair whose far end merges packets (GRO): what goes in singly comes out as super-packets.

    near end    packets are sent into it.  Its TCP segmentation is off: only then does veth merge what others have sent
                (veth_skb_is_eligible_for_gro in drivers/net/veth.c)
    far end     receives them by NAPI, with GRO
    queues      one for each processor: what a card has received by one of its queues goes on by the same one of these
                (skb_tx_hash in net/core/dev.c), and so on the processor that received it.  A single queue would have
                one processor at a time receive for all, and now one, now another

Nobody else has business on it: no addresses, no IPv6.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from udptun.core.desired import Sysctl
from udptun.core.errors import KernelError
from udptun.core.network_state import Link, LinkSettings
from udptun.kernel.link_messages import add_pair, set_link
from udptun.kernel.netlink import Netlink
from udptun.kernel.own_link import delete_own_link
from udptun.kernel.sysctl import write_sysctl

# include/uapi/linux/sockios.h and ethtool.h; the same on every architecture.
_SIOCETHTOOL, _ETHTOOL_STSO, _ETHTOOL_SGRO = 0x8946, 0x1F, 0x2C

_MAX_QUEUES = 64
"""More queues of a card than these share some."""
_MACS = ("02:75:74:00:00:01", "02:75:74:00:00:02")
"""Of the near and the far end; shortcut.bpf.c writes them before the packets."""


@dataclass(frozen=True, slots=True)
class MergingPair:
    """The links of the two ends."""

    near: Link
    far: Link


def pair_names(device: str) -> tuple[str, str]:
    """Of the near and the far end of the pair that belongs to a TUN device."""
    return f"{device}-in", f"{device}-gro"


async def make_pair(device: str, mtu: int, alias: str) -> MergingPair:
    """Make it and switch it on, in place of one that is left over.  Raises KernelError: there is none then.

    EEXIST: one of the names is taken by a link that is not ours, which stays.
    """
    names = pair_names(device)
    await delete_pair(device, alias)
    async with Netlink() as kernel:
        await kernel.do(add_pair(names, _MACS, mtu, min(os.cpu_count() or 1, _MAX_QUEUES)))
        try:
            links = []
            for name in names:
                link = await kernel.link(name)
                if link is None:
                    raise KernelError(f"cannot find {name}, which was just made", errno.ENODEV)
                # Before it is up: the kernel would solicit routers.  A kernel without IPv6 has no such setting.
                with suppress(KernelError):
                    write_sysctl(Sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1", ""))
                links.append(link)
            near, far = links
            _set_feature(near.name, _ETHTOOL_STSO, is_on=False)
            _set_feature(far.name, _ETHTOOL_SGRO, is_on=True)
            await kernel.do(set_link(LinkSettings(far, up=True)))
            # One alias is enough: the far end goes with the near one.
            await kernel.do(set_link(LinkSettings(near, alias=alias, up=True)))
        except BaseException:
            with suppress(KernelError):
                await delete_pair(device, alias)
            raise
        return MergingPair(near, far)


async def delete_pair(device: str, alias: str) -> None:
    """There may be none.  Raises KernelError, EEXIST when the link of that name is not ours, which stays."""
    await delete_own_link(pair_names(device)[0], alias, is_half_made_pair)


def is_half_made_pair(link: Link) -> bool:
    """Whether it is the near end of a pair that a daemon, killed while it made the pair, has left without an alias."""
    return not link.alias and link.kind == "veth" and link.mac == _MACS[0]


def _set_feature(name: str, command: int, *, is_on: bool) -> None:
    value = array.array("B", struct.pack("II", command, is_on))
    request = struct.pack("16sP16x", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError as exc:
            raise KernelError(f"cannot switch an offload of {name}", exc.errno or 0) from exc

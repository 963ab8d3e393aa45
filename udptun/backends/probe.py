"""What the kernel of this host can do for a backend.  It is tried out: version numbers do not tell."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from udptun.backends.choice import BackendChoice, KernelSupport, choose
from udptun.backends.udp import UdpKeys
from udptun.backends.vxlan import VxlanKeys, device_name
from udptun.config.net_conf import BackendKeys
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import Vxlan
from udptun.core.ownership import Ownership
from udptun.kernel.link_messages import add_vxlan, delete_link
from udptun.kernel.netlink import Netlink
from udptun.kernel.reconcile.ownership import check_device, find_tun_name
from udptun.membership import identity

_NAME = "utprobe{}"
"""With our pid: 15 characters at most."""
_VNI, _PORT = 0xFFFFFF, 65535
"""Of the device that is made to try.  The kernel refuses a pair that another device has; nobody should use this one."""

_MAC, _MTU = "02:00:00:00:00:01", 1450

_LACKING = {errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOSYS}


async def choose_backend(
    keys: BackendKeys,
    ownerships: Mapping[Family, Ownership],
    state_dir: Path,
    outer: frozenset[Family],
    *,
    pretend_no_vxlan: bool,
) -> BackendChoice:
    """`choice.choose` with what it has to know of this host.  `ownerships`: of each family that is enabled.

    Raises UdptunError, also when another daemon of this host has the device that `keys` name.
    """
    # The device for both families may be one that a run with the other family alone has made.
    ownership = Ownership(tuple(network for it in ownerships.values() for network in it.networks))
    if isinstance(keys, UdpKeys):
        return choose(keys, KernelSupport(), "", await find_tun_name(ownership), outer=outer)
    if not isinstance(keys, VxlanKeys):
        return choose(keys, KernelSupport(), "")
    macs = {}
    for family, of_family in ownerships.items():
        name = device_name(keys.vni, family)
        await check_device(name, of_family, "give each Network of this host a Backend.VNI of its own")
        async with Netlink() as kernel:
            link = await kernel.link(name)
        # A VXLAN device that flanneld has left: the peers know its MAC and need not learn another.
        first = link.mac if link is not None and link.vxlan is not None else ""
        macs[family] = identity.vtep_mac(state_dir, first, family)
    support = await kernel_support(pretend_no_vxlan=pretend_no_vxlan)
    mac, ipv6_mac = macs.get(Family.IPV4, ""), macs.get(Family.IPV6, "")
    return choose(keys, support, mac, await find_tun_name(ownership), ipv6_mac, outer)


async def kernel_support(*, pretend_no_vxlan: bool) -> KernelSupport:
    """Try a TUN device and a VXLAN device.

    `pretend_no_vxlan`: answer as a kernel without vxlan does, for the tests.
    """
    return KernelSupport(why_no_tun(), "EOPNOTSUPP, pretended" if pretend_no_vxlan else await _no_vxlan())


def why_no_tun() -> str:
    """The name of the error with which /dev/net/tun cannot be opened; empty when it can."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc))
    return ""


async def _no_vxlan() -> str:
    """The error with which the kernel refuses a VXLAN device; asked for one, it loads its module if there is one."""
    name = _NAME.format(os.getpid())
    async with Netlink() as kernel:
        try:
            await kernel.do(add_vxlan(name, Vxlan(_VNI, None, 0, _PORT, learning=False, gbp=False), _MAC, _MTU))
        except KernelError as exc:
            if exc.errno == errno.EPERM:
                raise KernelError(
                    "cannot find out whether the kernel has vxlan", exc.errno, "run as root or with CAP_NET_ADMIN"
                ) from exc
            # Any other error comes from a kernel that knows vxlan.  The real device will then fail with it and say so.
            return errno.errorcode[exc.errno] if exc.errno in _LACKING else ""
        if (link := await kernel.link(name)) is not None:
            await kernel.do(delete_link(link))
    return ""

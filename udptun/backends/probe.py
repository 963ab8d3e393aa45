"""What the kernel of this host can do for a backend: found out by trying, not from version numbers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from udptun.backends.choice import BackendChoice, KernelSupport, choose
from udptun.backends.vxlan import VxlanKeys, device_name
from udptun.config.net_conf import BackendKeys
from udptun.core.errors import KernelError
from udptun.core.network_state import Vxlan
from udptun.kernel.link_messages import add_vxlan, delete_link
from udptun.kernel.netlink import Netlink
from udptun.membership import identity

_NAME = "utprobe{}"
"""With our pid: 15 characters at most."""
_VNI, _PORT = 0xFFFFFF, 65535
"""Of the throw-away device; the kernel lets no two devices have the same pair, so that ones in use are unlikely."""

_MAC, _MTU = "02:00:00:00:00:01", 1450

_LACKING = {errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOSYS}


async def choose_backend(keys: BackendKeys, state_dir: Path, *, pretend_no_vxlan: bool) -> BackendChoice:
    """`choice.choose`, with what it needs to know of this host.  Raises UdptunError."""
    if not isinstance(keys, VxlanKeys):
        return choose(keys, KernelSupport(), "")
    found = await kernel_support(pretend_no_vxlan=pretend_no_vxlan)
    async with Netlink() as kernel:
        link = await kernel.link(device_name(keys.vni))
    # A device of flanneld's: its peers know the MAC, and need not learn another.
    first = link.mac if link is not None and link.vxlan is not None else ""
    return choose(keys, found, identity.vtep_mac(state_dir, first))


async def kernel_support(*, pretend_no_vxlan: bool) -> KernelSupport:
    """Try a TUN device and a VXLAN device.

    `pretend_no_vxlan`: answer as a kernel without vxlan does, for the tests.
    """
    return KernelSupport(_no_tun(), "EOPNOTSUPP, pretended" if pretend_no_vxlan else await _no_vxlan())


def _no_tun() -> str:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc))
    return ""


async def _no_vxlan() -> str:
    """The kernel loads the module, if there is one, when it is asked for a device."""
    name = _NAME.format(os.getpid())
    async with Netlink() as kernel:
        try:
            await kernel.do(add_vxlan(name, Vxlan(_VNI, None, 0, _PORT, learning=False, gbp=False), _MAC, _MTU))
        except KernelError as exc:
            if exc.errno == errno.EPERM:
                raise KernelError(
                    "cannot find out whether the kernel has vxlan", exc.errno, "run as root or with CAP_NET_ADMIN"
                ) from exc
            # Whatever else it is, a kernel that knows vxlan said it, and setting up the real device will say it again.
            return errno.errorcode[exc.errno] if exc.errno in _LACKING else ""
        if (link := await kernel.link(name)) is not None:
            await kernel.do(delete_link(link))
    return ""

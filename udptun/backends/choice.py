"""Which backend a configuration gets on this host, and why.  Pure: the caller has asked the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from udptun.backends.alloc import Alloc
from udptun.backends.base import Backend
from udptun.backends.hostgw import HostGw
from udptun.backends.udp import Udp
from udptun.backends.vtep import UserspaceVtep
from udptun.backends.vxlan import KernelVxlan
from udptun.config.net_conf import AllocBackend, BackendConf, Fallback, HostGwBackend, UdpBackend, VxlanBackend
from udptun.core.errors import UdptunError


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What the kernel of this host lacks, each as the error that it answers with; empty: it has it."""

    no_tun: str = ""
    no_vxlan: str = ""


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """`reason` is one short line for people."""

    backend: Backend
    reason: str


_TUN_HINT = "`modprobe tun`, or let the container have /dev/net/tun"
_CARRIED: Mapping[type, str] = {
    Udp: "userspace tunnel, flannel's udp wire format",
    KernelVxlan: "the kernel's VXLAN device",
    UserspaceVtep: "userspace VTEP, to its peers like the kernel's, which this kernel does not have",
    HostGw: "routes through the peers' addresses; they must be on one link with us",
    Alloc: "lease and subnet.env only",
}


def choose(conf: BackendConf, support: KernelSupport, mac: str) -> BackendChoice:
    """The backend for `conf` on a host whose kernel has `support`; `mac` is what a VTEP of ours has.

    Raises UdptunError when vxlan can be had in no way that `conf` allows.  A missing TUN device is no matter here:
    opening it says more.
    """
    match conf:
        case UdpBackend():
            return BackendChoice(Udp(conf.port, conf.own_port), "as configured")
        case HostGwBackend():
            return BackendChoice(HostGw(), "as configured")
        case AllocBackend():
            return BackendChoice(Alloc(), "as configured")
        case VxlanBackend():
            return _choose_vxlan(conf, support, mac)


def describe(support: KernelSupport) -> list[tuple[str, bool, str]]:
    """Each type of `Backend` with its defaults: its name, whether it works there, and how or why not."""
    rows = []
    for conf in (UdpBackend(), VxlanBackend(), HostGwBackend(), AllocBackend()):
        try:
            choice = choose(conf, support, "02:00:00:00:00:01")
        except UdptunError as exc:
            rows.append((conf.type, False, str(exc)))
            continue
        if choice.backend.encapsulation is not None and support.no_tun:
            rows.append((conf.type, False, f"there is no TUN device ({support.no_tun}); {_TUN_HINT}"))
        else:
            rows.append((conf.type, True, _CARRIED[type(choice.backend)]))
    return rows


def _choose_vxlan(conf: VxlanBackend, support: KernelSupport, mac: str) -> BackendChoice:
    if not conf.userspace and not support.no_vxlan:
        return BackendChoice(KernelVxlan(conf, mac), "the kernel has vxlan")
    reason = "Backend.Userspace is true" if conf.userspace else f"the kernel has no vxlan ({support.no_vxlan})"
    match Fallback.VTEP if conf.userspace else conf.fallback:
        case Fallback.VTEP:
            return BackendChoice(UserspaceVtep(conf, mac), f"{reason}: userspace VTEP")
        case Fallback.UDP:
            return BackendChoice(Udp(UdpBackend().port), f"{reason} and Backend.Fallback is udp")
        case Fallback.NONE:
            raise UdptunError(
                f"cannot create flannel.{conf.vni} (vxlan id {conf.vni}): {reason} and Backend.Fallback is none; load "
                'the module vxlan, or set Backend.Fallback to "vtep"'
            )

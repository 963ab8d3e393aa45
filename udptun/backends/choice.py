"""Which backends there are, the configuration with the keys of all of them, and which one a host gets.  Pure.

The caller has asked the kernel what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from udptun.backends.alloc import Alloc, AllocKeys
from udptun.backends.base import Backend
from udptun.backends.hostgw import HostGw, HostGwKeys
from udptun.backends.udp import TUN_NAME, Udp, UdpKeys
from udptun.backends.vtep import UserspaceVtep
from udptun.backends.vxlan import Fallback, KernelVxlan, VxlanKeys, device_name
from udptun.config import net_conf
from udptun.config.net_conf import BackendKeys, NetConf
from udptun.core.errors import UdptunError
from udptun.core.family import Family

KINDS: Mapping[str, type[BackendKeys]] = {kind.type: kind for kind in (UdpKeys, VxlanKeys, HostGwKeys, AllocKeys)}
"""The keys of each `Backend.Type` there is."""


def parse_net_conf(text: str, source: str) -> NetConf:
    """`net_conf.parse`, with the keys of every backend there is."""
    return net_conf.parse(text, source, KINDS)


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What the kernel of this host lacks, as the name of the error that it answers with; empty: it has it."""

    no_tun: str = ""
    no_vxlan: str = ""


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """`reason` is one short line for people."""

    backend: Backend
    reason: str


_TUN_HINT = "`modprobe tun`, or let the container have /dev/net/tun"


def choose(
    keys: BackendKeys,
    support: KernelSupport,
    mac: str,
    tun_name: str = TUN_NAME,
    ipv6_mac: str = "",
    outer: frozenset[Family] = frozenset((Family.IPV4,)),
) -> BackendChoice:
    """The backend for `keys` on a host whose kernel has `support`.  `mac` is our VTEP's, and `ipv6_mac` that of IPv6.

    `tun_name` is what the device of the udp backend is called, and `outer` are the families of this host's addresses
    that it sends from.  Raises UdptunError when there is no way to do vxlan
    that `keys` allow.  A missing TUN device is not looked at here: the failure to open it says more.
    """
    match keys:
        case UdpKeys():
            return BackendChoice(Udp(keys.port, keys.own_port, tun_name, outer), "as configured")
        case VxlanKeys():
            return _choose_vxlan(keys, support, mac, tun_name, ipv6_mac, outer)
        case HostGwKeys():
            return BackendChoice(HostGw(), "as configured")
        case AllocKeys():
            return BackendChoice(Alloc(), "as configured")
    raise AssertionError(f"no backend has the keys {keys}")


def describe(support: KernelSupport) -> list[tuple[str, bool, str]]:
    """A line for each type of `Backend` with its defaults: the name, whether it works, and how, or why it does not."""
    rows = []
    for name, kind in KINDS.items():
        try:
            backend = choose(kind(), support, "02:00:00:00:00:01").backend
        except UdptunError as exc:
            rows.append((name, False, str(exc)))
            continue
        if backend.encapsulations and support.no_tun:
            rows.append((name, False, f"there is no TUN device ({support.no_tun}); {_TUN_HINT}"))
        else:
            rows.append((name, True, backend.summary))
    return rows


def _choose_vxlan(
    keys: VxlanKeys, support: KernelSupport, mac: str, tun_name: str, ipv6_mac: str, outer: frozenset[Family]
) -> BackendChoice:
    if not keys.userspace and not support.no_vxlan:
        return BackendChoice(KernelVxlan(keys, mac, ipv6_mac), "the kernel has vxlan")
    reason = "Backend.Userspace is true" if keys.userspace else f"the kernel has no vxlan ({support.no_vxlan})"
    match Fallback.VTEP if keys.userspace else keys.fallback:
        case Fallback.VTEP:
            return BackendChoice(UserspaceVtep(keys, mac, ipv6_mac), f"{reason}: userspace VTEP")
        case Fallback.UDP:
            udp = Udp(UdpKeys().port, device=tun_name, outer=outer)
            return BackendChoice(udp, f"{reason} and Backend.Fallback is udp")
        case Fallback.NONE:
            raise UdptunError(
                f"cannot create {device_name(keys.vni)} (vxlan id {keys.vni}): {reason} and Backend.Fallback is none; "
                'load the module vxlan, or set Backend.Fallback to "vtep"'
            )

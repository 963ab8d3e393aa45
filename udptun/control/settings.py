"""What this host's flags make of the network configuration, which is for all hosts."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv6Address

from udptun.backends.base import Backend, LiveSettings, ProbedKeys, TunnelKeys, claimed, mtu_for
from udptun.backends.choice import parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.config.flags import Options
from udptun.config.net_conf import LogLevel, NetConf
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address
from udptun.core.lease import Subnets
from udptun.core.network_state import IPAddress
from udptun.core.offload import ALL, corrupted_by, tells_marks
from udptun.core.tunnel import AS_MANY_AS_WORKERS, IPV6_MTU_MIN, ShortcutMode, default_workers
from udptun.firewall.reconciler import FirewallSettings
from udptun.kernel.sysctl import read_sysctl
from udptun.kernel.underlay import Underlay, UnderlayOptions
from udptun.stores.base import Store

log = logging.getLogger(__name__)


def read_config(text: str, source: str, options: Options) -> NetConf:
    """The configuration that `text` holds, with --port; what is odd about it is logged.  Raises ConfigError."""
    conf = parse_net_conf(text, source)
    for note in conf.notes:
        log.warning("%s", note)
    if not isinstance(conf.backend, UdpKeys):
        for name in ("port", "source-ports", "shortcut"):
            value = getattr(options, name.replace("-", "_"))
            if value is not None:
                log.warning("--%s has no effect with Backend.Type %s", name, conf.backend.type)
        return conf
    if options.port is None:
        return conf
    return replace(conf, backend=replace(conf.backend, own_port=options.port))


def live_settings(
    options: Options, conf: NetConf, underlay: Underlay, backend: Backend, own: Subnets | None
) -> LiveSettings:
    """A flag says it for this host, the configuration for all, and the interface or the machine when neither does.

    `own` are the subnets of our lease; None: they are not known yet.  Raises ConfigError when the MTU is too small for
    IPv4, when nothing at all can be carried, and when a shortcut is required that cannot be had.
    """
    keys = conf.backend
    tunnel = keys if isinstance(keys, TunnelKeys) else TunnelKeys()
    probed = keys if isinstance(keys, ProbedKeys) else tunnel
    workers = options.workers or tunnel.workers or default_workers(len(os.sched_getaffinity(0)))
    source_ports, shortcut = 1, ShortcutMode.OFF
    if isinstance(keys, UdpKeys):
        shortcut = options.shortcut or keys.shortcut
        _check_shortcut(shortcut)
        source_ports = keys.source_ports if options.source_ports is None else options.source_ports
    release = os.uname().release
    offload = tunnel.offload if options.offload_disabled is None else ALL & ~options.offload_disabled
    offload &= ~corrupted_by(release)
    underlay_mtu = _underlay_mtu(options, conf, underlay)
    lacks = {family: lack(options, conf, underlay, backend, own, family) for family in conf.families}
    if all(lacks.values()):
        raise ConfigError("; ".join(f"pods have no {family} to other hosts: {why}" for family, why in lacks.items()))
    carried = {}
    if lacks.get(Family.IPV4) == "":
        carried[Family.IPV4] = mtu_for(underlay_mtu, backend.overhead)
    if lacks.get(Family.IPV6) == "":
        carried[Family.IPV6] = underlay_mtu - backend.ipv6_overhead
    return LiveSettings(
        next(iter(carried.values())),
        workers,
        options.source_check or tunnel.source_check,
        offload,
        workers if source_ports == AS_MANY_AS_WORKERS else source_ports,
        probed.probe if options.probe is None else options.probe,
        tells_marks(offload, release),
        carried.get(Family.IPV6),
        Family.IPV4 in carried,
        shortcut,
    )


def _check_shortcut(mode: ShortcutMode) -> None:
    """Raise ConfigError when it is required and cannot be had."""
    if mode is not ShortcutMode.REQUIRE:
        return
    # Here, because a host without it does not need the module.
    from udptun.datapath.shortcut.programs import find_lack

    if why := find_lack():
        raise ConfigError(f"Shortcut: it is required, and this host cannot have it: {why}; set it to auto or off")


def _underlay_mtu(options: Options, conf: NetConf, underlay: Underlay) -> int:
    configured = conf.backend.mtu if isinstance(conf.backend, TunnelKeys) else None
    return options.mtu or configured or underlay.mtu


def lack(
    options: Options, conf: NetConf, underlay: Underlay, backend: Backend, own: Subnets | None, family: Family
) -> str:
    """Why that family is not carried; empty when it is, or nobody has enabled it.  `own` as in `live_settings`."""
    if family not in conf.families:
        return ""
    if family is Family.IPV6 and read_sysctl("net/ipv6/conf/all/disable_ipv6") is None:
        return "this kernel has no IPv6; boot it without ipv6.disable=1"
    if backend.needs_same_family and underlay.address_of(family) is None:
        link = underlay.link_name
        if family is Family.IPV6 and read_sysctl(f"net/ipv6/conf/{link}/disable_ipv6") == "1":
            return (
                f"net/ipv6/conf/{link}/disable_ipv6 is 1, so {link} has no IPv6 address; `sysctl -w "
                f"net/ipv6/conf/{link}/disable_ipv6=0`, and give it one"
            )
        return underlay.problem_of(family)
    if family is Family.IPV6 and (why := _ipv6_lack(options, conf, underlay, backend)):
        return why
    if own is not None and own.of(family) is None:
        return f"our lease has no {family} subnet; give this host one, as a second podCIDR where Kubernetes does"
    return ""


def _ipv6_lack(options: Options, conf: NetConf, underlay: Underlay, backend: Backend) -> str:
    for address in filter(None, (underlay.ipv6, underlay.public_ipv6)):
        if (prefix := next((it for it in claimed(backend, conf, Family.IPV6) if address in it), None)) is not None:
            return (
                f"this host's {address} lies in {prefix}, where hosts lease their subnets; choose another IPv6Network"
            )
    underlay_mtu = _underlay_mtu(options, conf, underlay)
    if underlay_mtu - backend.ipv6_overhead < IPV6_MTU_MIN:
        return (
            f"an underlay MTU of {underlay_mtu} leaves {underlay_mtu - backend.ipv6_overhead} bytes for the pods' "
            f"packets; IPv6 needs {IPV6_MTU_MIN}, so the underlay needs {IPV6_MTU_MIN + backend.ipv6_overhead}"
        )
    return ""


def check_store(store: Store, conf: NetConf, backend: Backend) -> None:
    """Raise ConfigError when the leases of `store` cannot say what `backend` has to know of a peer, or what pods have.
    """
    if conf.ipv4 is None and not store.keeps_ipv6_alone:
        raise ConfigError(
            f"EnableIPv4: IPv6 alone does not work with the store {store.name}: the keys of flannel's leases begin "
            "with an IPv4 subnet; set EnableIPv4 to true and give a Network, or use Kubernetes (--kube-subnet-mgr) or "
            "--store file:PATH"
        )
    if backend.needs_backend_data and not store.keeps_backend_data:
        raise ConfigError(
            f"Backend.Type: {backend.type} does not work with the store {store.name}, which has no place for what each "
            "host says of itself (its VtepMAC): no host would find a peer; use --store etcd, or Backend.Type udp or "
            "host-gw"
        )


def set_log_level(options: Options, configured: LogLevel | None) -> None:
    """How much is logged: as `Backend.LogLevel` says, else as -v does."""
    # Not the root logger's level: pyroute2 would print every netlink message.
    by_flag = LogLevel.DEBUG if options.v >= 1 else LogLevel.INFO
    logging.getLogger("udptun").setLevel((configured or by_flag).value)


def underlay_options(options: Options, conf: NetConf) -> UnderlayOptions:
    """An address of each family that the pods have is looked for.

    The tunnel of Type udp carries both over either.  So it looks for IPv4 in any case, and for IPv6 also where a flag
    names an address of that family.
    """
    is_udp = isinstance(conf.backend, UdpKeys)
    named = (options.public_ipv6, options.iface_can_reach, *map(_address_or_none, options.iface))
    wanted = set(conf.families)
    if is_udp:
        wanted |= {Family.IPV4, *(Family.IPV6 for it in named if isinstance(it, IPv6Address))}
    return UnderlayOptions(
        options.iface,
        options.iface_regex,
        options.iface_can_reach,
        options.public_ip,
        options.public_ipv6,
        tuple(family for family in Family if family in wanted),
        tuple(network for family in conf.families for network in conf.pool(family).leasable),
    )


def _address_or_none(iface: str) -> IPAddress | None:
    """What --iface names may be an address."""
    with suppress(ValueError):
        return ip_address(iface)
    return None


def firewall_settings(options: Options, conf: NetConf) -> FirewallSettings:
    return FirewallSettings(
        masquerade=options.ip_masq,
        forward=options.iptables_forward_rules,
        random_fully=not options.ip_masq_fully_random_disable,
        nftables=conf.enable_nftables,
        resync_s=options.iptables_resync,
    )

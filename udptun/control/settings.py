"""What this host's flags make of the network configuration, which is for all hosts."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from udptun.backends.base import Backend, LiveSettings, ProbedKeys, TunnelKeys, mtu_for
from udptun.backends.choice import parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.config.flags import Options
from udptun.config.net_conf import BackendKeys, LogLevel, NetConf
from udptun.core.errors import ConfigError
from udptun.core.offload import ALL, corrupted_by, tells_marks
from udptun.core.tunnel import AS_MANY_AS_WORKERS, default_workers
from udptun.firewall.reconciler import FirewallSettings
from udptun.kernel.underlay import UnderlayOptions
from udptun.stores.base import Store

log = logging.getLogger(__name__)


def read_config(text: str, source: str, options: Options) -> NetConf:
    """The configuration that `text` holds, with --port; what is odd about it is logged.  Raises ConfigError."""
    conf = parse_net_conf(text, source)
    for note in conf.notes:
        log.warning("%s", note)
    if not isinstance(conf.backend, UdpKeys):
        for name, value in (("port", options.port), ("source-ports", options.source_ports)):
            if value is not None:
                log.warning("--%s has no effect with Backend.Type %s", name, conf.backend.type)
        return conf
    if options.port is None:
        return conf
    return replace(conf, backend=replace(conf.backend, own_port=options.port))


def live_settings(options: Options, keys: BackendKeys, underlay_mtu: int, overhead: int) -> LiveSettings:
    """A flag says it for this host, the configuration for all, and the interface or the machine when neither does.

    `underlay_mtu` is the interface's, `overhead` the backend's, bytes.  Raises ConfigError when the MTU is too small.
    """
    tunnel = keys if isinstance(keys, TunnelKeys) else TunnelKeys()
    probed = keys if isinstance(keys, ProbedKeys) else tunnel
    workers = options.workers or tunnel.workers or default_workers(len(os.sched_getaffinity(0)))
    source_ports = 1
    if isinstance(keys, UdpKeys):
        source_ports = keys.source_ports if options.source_ports is None else options.source_ports
    release = os.uname().release
    offload = tunnel.offload if options.offload_disabled is None else ALL & ~options.offload_disabled
    offload &= ~corrupted_by(release)
    return LiveSettings(
        mtu_for(options.mtu or tunnel.mtu or underlay_mtu, overhead),
        workers,
        options.source_check or tunnel.source_check,
        offload,
        workers if source_ports == AS_MANY_AS_WORKERS else source_ports,
        probed.probe if options.probe is None else options.probe,
        tells_marks(offload, release),
    )


def check_store(store: Store, backend: Backend) -> None:
    """Raise ConfigError when the leases of `store` cannot say what `backend` has to know of a peer."""
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


def underlay_options(options: Options) -> UnderlayOptions:
    return UnderlayOptions(options.iface, options.iface_regex, options.iface_can_reach, options.public_ip)


def firewall_settings(options: Options, conf: NetConf) -> FirewallSettings:
    return FirewallSettings(
        masquerade=options.ip_masq,
        forward=options.iptables_forward_rules,
        random_fully=not options.ip_masq_fully_random_disable,
        nftables=conf.enable_nftables,
        resync_s=options.iptables_resync,
    )

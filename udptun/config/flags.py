"""The daemon's flags and environment.  Pure: argv and environ in, Options or UsageError out.

`Options` is the table of the flags: each field has the kind, default and help of its flag.  go_flags.py says how flags
are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TypeVar

from udptun.config.go_flags import (
    Flag,
    Given,
    boolean,
    flag,
    flag_without_effect,
    flags_of,
    help_text,
    integer,
    integer_in,
    list_flag,
    nonempty_path,
    settled_flag,
)
from udptun.config.go_regex import compile_go
from udptun.config.old_units import environment_warnings, ignored_words_warning
from udptun.config.store_flags import (
    ETCD_FLAGS,
    ETCD_TOPIC,
    KUBE_FLAGS,
    KUBE_TOPIC,
    EtcdOptions,
    KubeOptions,
    StoreKind,
    StoreSpec,
    check_etcd,
    check_kube,
    etcd_options,
    kube_options,
    parse_store,
)
from udptun.core.daemon_socket import DEFAULT_RUN_DIR
from udptun.core.errors import UsageError, one_line
from udptun.core.ip_text import ip_address, ipv6_address
from udptun.core.offload import Offload
from udptun.core.offload import parse as parse_offloads
from udptun.core.tunnel import (
    AS_MANY_AS_WORKERS,
    PORTS,
    SOURCE_PORTS,
    UNDERLAY_MTUS,
    WORKERS,
    Confinement,
    ShortcutMode,
    SourceCheck,
)

ENVIRONMENT_PREFIX = "FLANNELD_"
RENEW_MARGINS_MIN = range(1, 1440)
"""What --subnet-lease-renew-margin may be, minutes: a lease lasts 24 h (flannel main.go)."""

METRICS_PEERS = range(65537)
"""What --metrics-peers may be."""

RESYNC_S = range(1, 86401)
"""What --iptables-resync may be, seconds."""

_OLD_LOG = "accepted as old flannel's; no effect: the log goes to stderr"

LEASES = "Leases"
_HOST, _TUNNEL, _RUNNING, _FIREWALL = "This host", "Tunnel", "Running", "Firewall"


_Choice = TypeVar("_Choice", bound=Enum)


class LogFormat(StrEnum):
    """What --log-format may be."""

    TEXT = "text"
    JSON = "json"


def _ipv4_or_none(text: str) -> IPv4Address | None:
    """An empty address counts as none, as to flannel: manifests pass variables that may be empty."""
    try:
        return IPv4Address(text) if text else None
    except ValueError:
        raise ValueError("must be an IPv4 address") from None


def _address_or_none(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text) if text else None
    except ValueError:
        raise ValueError("must be an IP address") from None


def _ipv6_or_none(text: str) -> IPv6Address | None:
    try:
        return ipv6_address(text) if text else None
    except ValueError:
        raise ValueError("must be an IPv6 address") from None


def _regex(text: str) -> str:
    try:
        compile_go(text)
    except ValueError as exc:
        raise ValueError(f"must be a regular expression ({exc})") from None
    return text


def _one_of(choices: type[_Choice]) -> Callable[[str], _Choice]:
    """By its value, as it is written in the configuration."""

    def parse(text: str) -> _Choice:
        try:
            return choices(text)
        except ValueError:
            *words, last = (str(choice.value) for choice in choices)
            raise ValueError(f"must be {', '.join(words)} or {last}") from None

    return parse


def _source_ports(text: str) -> int:
    if text == "auto":
        return AS_MANY_AS_WORKERS
    try:
        return integer_in(SOURCE_PORTS)(text)
    except ValueError:
        raise ValueError(f"must be {SOURCE_PORTS.start}..{SOURCE_PORTS.stop - 1} or auto") from None


def _offloads(text: str) -> Offload:
    return parse_offloads([] if text == "none" else text.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line and the environment say.

    `subnet_lease_renew_margin` is in minutes, `iptables_resync` in seconds, and `mtu` is the underlay's in bytes.  None
    means "not given".  It stands where the configuration, or what the host can do, decides when the flag does not.
    """

    iface: tuple[str, ...] = list_flag(
        _HOST, str, "IFACE", "interface to the other hosts, name or address; tried in order"
    )
    iface_regex: tuple[str, ...] = list_flag(_HOST, _regex, "REGEX", "regular expression for it, tried after --iface")
    iface_can_reach: IPv4Address | IPv6Address | None = flag(
        _HOST, _address_or_none, None, "IP", "the interface that reaches this address, tried last"
    )
    public_ip: IPv4Address | None = flag(
        _HOST, _ipv4_or_none, None, "IP", "address that the other hosts send to, if not the interface's"
    )
    public_ipv6: IPv6Address | None = flag(_HOST, _ipv6_or_none, None, "IP", "the same for IPv6")
    node: str = flag(_HOST, str, "", "NAME", "this host's NodeName in a leases file (--store file)")

    store: StoreSpec = settled_flag(
        LEASES,
        parse_store,
        None,
        "STORE",
        "where leases live: local[:PATH], file:PATH, etcd (as any --etcd-* flag says), kube (--kube-subnet-mgr)",
    )
    subnet_lease_renew_margin: int = flag(
        LEASES, integer, 60, "MINUTES", "renew this long before the lease expires, 1..1439"
    )
    net_config_path: Path = flag(
        LEASES,
        nonempty_path,
        Path("/etc/kube-flannel/net-conf.json"),
        "FILE",
        "network configuration, for every store but etcd",
    )
    subnet_file: Path = flag(
        LEASES, nonempty_path, Path("/run/flannel/subnet.env"), "FILE", "where to write the subnet and MTU in use"
    )

    mtu: int | None = flag(
        _TUNNEL,
        integer_in(UNDERLAY_MTUS),
        None,
        "BYTES",
        "the underlay's MTU, over Backend.MTU and the interface's",
    )
    port: int | None = flag(
        _TUNNEL,
        integer_in(PORTS),
        None,
        "N",
        "UDP port of this host, over Backend.Port, where several share a public IP (Type udp)",
    )
    workers: int | None = flag(_TUNNEL, integer_in(WORKERS), None, "N", "datapath threads, over Backend.Workers")
    source_ports: int | None = flag(
        _TUNNEL,
        _source_ports,
        None,
        "N",
        "UDP ports to send from to peers that take any, or auto: as many as workers; over Backend.SourcePorts",
    )
    source_check: SourceCheck | None = flag(
        _TUNNEL, _one_of(SourceCheck), None, "WHICH", "off, peer or strict, over Backend.SourceCheck"
    )
    shortcut: ShortcutMode | None = flag(
        _TUNNEL,
        _one_of(ShortcutMode),
        None,
        "WHICH",
        "off, auto or require: the kernel carries what needs no thought; over Backend.Shortcut (Type udp)",
    )
    offload_disabled: Offload | None = flag(
        _TUNNEL,
        _offloads,
        None,
        "NAMES",
        "offloads to do without, as tso,uso, or none; over Backend.OffloadDisabled",
    )
    probe: bool | None = flag(
        _TUNNEL, boolean, None, "", "probe the peers, so that dead ones are known; over Backend.Probe, default true"
    )
    datapath_confinement: Confinement = flag(
        _TUNNEL,
        _one_of(Confinement),
        Confinement.FULL,
        "WHICH",
        "what the datapath gives up: full (capabilities and system calls), capabilities or off",
    )

    run_dir: Path = flag(_RUNNING, nonempty_path, Path(DEFAULT_RUN_DIR), "DIR", "sockets")
    state_dir: Path = flag(
        _RUNNING, nonempty_path, Path("/var/lib/udptun"), "DIR", "what outlives a reboot: node id, last leases"
    )
    healthz_ip: str = flag(_RUNNING, str, "0.0.0.0", "IP", "address of /healthz, /readyz and /metrics")
    healthz_port: int = flag(_RUNNING, integer_in(range(PORTS.stop)), 0, "PORT", "their TCP port; 0: do not serve them")
    metrics: bool = flag(
        _RUNNING, boolean, True, "", "serve /metrics at the health port; false: at the daemon's socket alone"
    )
    metrics_peers: int = flag(
        _RUNNING, integer_in(METRICS_PEERS), 100, "N", "of how many peers /metrics has series, the busiest ones"
    )
    mesh_port: int = flag(
        _RUNNING,
        integer_in(range(PORTS.stop)),
        0,
        "PORT",
        "TCP port of the tunnel address where other hosts may ask for this one's view of the mesh; 0: none",
    )
    take_over: bool = flag(
        _RUNNING, boolean, False, "", "ask a daemon that runs with this --run-dir to step back, and go on in its place"
    )
    v: int = flag(_RUNNING, integer, 0, "LEVEL", "log level; 1 and more: debug")
    log_format: LogFormat = flag(
        _RUNNING, _one_of(LogFormat), LogFormat.TEXT, "FORM", "text, or json: an object a line, its fields as keys"
    )
    vmodule: str = flag_without_effect(_RUNNING, str, "", "PATTERNS", "accepted as flannel's; no effect")
    log_backtrace_at: str = flag_without_effect(
        _RUNNING, str, "", "LINE", "accepted as flannel's; no effect", name="log_backtrace_at"
    )
    logtostderr: bool = flag_without_effect(_RUNNING, boolean, True, "", _OLD_LOG)
    alsologtostderr: bool = flag_without_effect(_RUNNING, boolean, True, "", _OLD_LOG)
    stderrthreshold: str = flag_without_effect(_RUNNING, str, "", "LEVEL", _OLD_LOG)
    log_dir: str = flag_without_effect(_RUNNING, str, "", "DIR", _OLD_LOG, name="log_dir")
    version: bool = flag(_RUNNING, boolean, False, "", "print the version and exit")
    """With this or `help` set, print that and do nothing else."""

    ip_masq: bool = flag(_FIREWALL, boolean, False, "", "masquerade what leaves the overlay")
    ip_masq_fully_random_disable: bool = flag(_FIREWALL, boolean, False, "", "do without random source ports for it")
    # flannel's default is true.  None tells the default from an explicit true, which must be done or refused.
    iptables_forward_rules: bool | None = flag(
        _FIREWALL, boolean, None, "", "accept overlay traffic in FORWARD; default true, where the host can"
    )
    iptables_resync: int = flag(
        _FIREWALL, integer_in(RESYNC_S), 5, "SECONDS", "look for changed firewall rules this often"
    )
    ip_blackhole_route: bool = flag(
        _FIREWALL, boolean, False, "", "drop packets to pods that do not exist, by a blackhole route"
    )

    etcd: EtcdOptions
    kube: KubeOptions
    store_is_named: bool
    """False: nobody chose a store, and `store` is the local one; see `store_warning`."""
    pretend_no_vxlan: bool
    """UDPTUN_PRETEND_NO_VXLAN is set: probe as on a kernel without vxlan.  For the tests, which have no such kernel."""
    notify_socket: str
    """NOTIFY_SOCKET of systemd, empty without it."""
    warnings: tuple[str, ...]
    """What was given and is ignored, a line each, for the log."""
    help: bool
    said: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Each flag that was given, by its name: as `--name`, or as its variable."""

    @property
    def store_warning(self) -> str | None:
        """The line to log loudly when the store was not chosen but assumed."""
        if self.store_is_named:
            return None
        return (
            f"no --store named: using {self.store}, which serves this one machine only; other hosts will not be reached"
        )


_OPTIONS_FLAGS = flags_of(Options)

_ALL_FLAGS = (*_OPTIONS_FLAGS.values(), *ETCD_FLAGS.values(), *KUBE_FLAGS.values())

FLAGS: Mapping[str, tuple[Flag, ...]] = {
    topic: tuple(it for it in _ALL_FLAGS if it.topic == topic)
    for topic in (_HOST, LEASES, _TUNNEL, _RUNNING, _FIREWALL, ETCD_TOPIC, KUBE_TOPIC)
}
"""Every flag, under the heading that the help puts it."""


def values_of(options: Options) -> Iterator[tuple[Flag, object]]:
    """Every flag with its value in force."""
    for kind, flags in ((options, _OPTIONS_FLAGS), (options.etcd, ETCD_FLAGS), (options.kube, KUBE_FLAGS)):
        yield from ((it, getattr(kind, field_name)) for field_name, it in flags.items())


def parse_daemon_flags(argv: Sequence[str], environ: Mapping[str, str], *, as_flanneld: bool = False) -> Options:
    """The options of `udptun daemon`, or of `flanneld` with `as_flanneld`; `argv` begins after the command.

    Two things differ.  With no store named, flannel means etcd on this host, and `udptun daemon` the local store.
    Words that are no flags, and all behind the first of them, are ignored as flannel does; to `udptun daemon` they are
    an error.  Raises UsageError with one line.
    """
    given = given_flags(argv, environ, ends_at_word=as_flanneld)
    if not _is_question(given):
        given.warnings += environment_warnings(environ, argv, given.said)
    return options_of(given, environ, as_flanneld=as_flanneld, is_daemon=True)


def daemon_help() -> str:
    """What `udptun daemon --help` says about the flags."""
    return help_text(FLAGS, ENVIRONMENT_PREFIX)


def given_flags(
    argv: Sequence[str], environ: Mapping[str, str], *more: Flag, n_words: int = 0, ends_at_word: bool = False
) -> Given:
    """The daemon's flags, and `more`, as argv and the environment give them.  Raises UsageError."""
    given = Given({it.name: it for it in (*_ALL_FLAGS, *more)}, argv, n_words, ends_at_word=ends_at_word)
    if given.rest:
        given.warnings.append(ignored_words_warning(given.rest))
    if not _is_question(given):
        given.read_environment(environ, ENVIRONMENT_PREFIX)
    return given


def _is_question(given: Given) -> bool:
    """Whether only the help or the version is asked for: then nothing else matters."""
    return given.is_help or bool(given.values["version"])


def options_of(
    given: Given, environ: Mapping[str, str], *, as_flanneld: bool = False, is_daemon: bool = False
) -> Options:
    """Settle what no flag can settle alone.  Raises UsageError."""
    is_question = _is_question(given)
    if not is_question:
        _check_renew_margin(given.values["subnet-lease-renew-margin"])
    kind, path = _choose_store(given, as_flanneld)
    etcd = etcd_options(given)
    if kind is StoreKind.ETCD and not is_question:
        check_etcd(etcd, given)
    kube = kube_options(given, environ)
    if kind is StoreKind.KUBE and not is_question:
        check_kube(kube, given, is_daemon=is_daemon)
    values = given.fields_of(_OPTIONS_FLAGS)
    is_named = kind is not StoreKind.LOCAL or values["store"] is not None
    values["store"] = StoreSpec(kind, path or values["state_dir"] / "leases.db")
    return Options(
        **values,
        etcd=etcd,
        kube=kube,
        store_is_named=is_named,
        pretend_no_vxlan=bool(environ.get("UDPTUN_PRETEND_NO_VXLAN")),
        notify_socket=environ.get("NOTIFY_SOCKET", ""),
        warnings=tuple(map(one_line, given.warnings)),
        help=given.is_help,
        said=given.said,
    )


def _check_renew_margin(minutes: int) -> None:
    if minutes not in RENEW_MARGINS_MIN:
        raise UsageError(
            "Invalid subnet-lease-renew-margin option, out of acceptable range: "
            f"{minutes} is not in {RENEW_MARGINS_MIN.start}..{RENEW_MARGINS_MIN.stop - 1}"
        )


def _choose_store(given: Given, as_flanneld: bool) -> tuple[StoreKind, Path | None]:
    named: tuple[StoreKind, Path | None] | None = given.values["store"]
    said_etcd = [given.said[it.name] for it in ETCD_FLAGS.values() if it.name in given.said and given.values[it.name]]
    if given.values["kube-subnet-mgr"]:
        if named is not None and named[0] is not StoreKind.KUBE and not _is_question(given):
            said = given.said["kube-subnet-mgr"]
            raise UsageError(f"{said} means kube, and {given.said['store']} names another store; leave one out")
        return StoreKind.KUBE, None
    if named is None:
        return (StoreKind.ETCD if said_etcd or as_flanneld else StoreKind.LOCAL), None
    if named[0] not in (StoreKind.ETCD, StoreKind.KUBE) and said_etcd and not _is_question(given):
        raise UsageError(f"{said_etcd[0]} means etcd, and {given.said['store']} names another store; leave one out")
    return named

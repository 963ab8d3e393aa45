"""The daemon's flags and environment.  Pure: argv and environ in, Options or UsageError out.

FLAGS is the whole truth: name, kind, default, help and whether what it asks for is built.  The syntax is that
of Go's flag package: `-x` and `--x` alike, `--x=v` or `--x v` (the next word is the value whatever it looks
like), a boolean takes its value only after `=`, the last of several wins unless the flag is a list.  A flag that
the command line lacks is read from FLANNELD_<NAME>, by flannel's rules: an empty variable counts as unset, a bad
one costs a warning and leaves the default, a list gets one element.
"""

from __future__ import annotations

import posixpath
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from udptun.core.errors import UsageError, did_you_mean
from udptun.core.tunnel import PORTS, UNDERLAY_MTUS, WORKERS, SourceCheck

DEFAULT_RUN_DIR = Path("/run/udptun")
ENVIRONMENT_PREFIX = "FLANNELD_"
RENEW_MARGINS_MIN = range(1, 1440)
"""What --subnet-lease-renew-margin may be, minutes: a lease lasts 24 h (flannel main.go)."""


RESYNC_S = range(1, 86401)
"""What --iptables-resync may be, seconds."""


class StoreKind(Enum):
    """The stores that are built."""

    LOCAL = "local"
    FILE = "file"
    ETCD = "etcd"


_ETCD, _KUBE = "etcd", "Kubernetes"
_UNBUILT_STORES = ("kube",)
_BUILT_STORES = "built: local, file, etcd (--store local[:PATH], --store file:PATH or the --etcd-* flags)"
_ETCD_PORT = 2379


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server of an etcd cluster, as a URL says."""

    host: str
    port: int
    is_tls: bool

    @property
    def address(self) -> str:
        """`host:port`, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.address}"


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """What the --etcd-* flags say.  The endpoints are all TLS or none is; the prefix has no slash at its end."""

    endpoints: tuple[Endpoint, ...]
    prefix: str
    keyfile: Path | None
    certfile: Path | None
    cafile: Path | None
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Where the leases live: --store KIND:PATH, or etcd."""

    kind: StoreKind
    path: Path

    def __str__(self) -> str:
        return self.kind.value if self.kind is StoreKind.ETCD else f"{self.kind.value}:{self.path}"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line and the environment say.  A field has its flag's name, with `_` for `-`.

    `subnet_lease_renew_margin` is in minutes, `iptables_resync` in seconds, `mtu` is the underlay's in bytes.  None
    means "not given" where a default would hide that somebody else may decide: the configuration, or what the host can.
    """

    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: IPv4Address | None
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None
    subnet_file: Path
    subnet_lease_renew_margin: int
    net_config_path: Path
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    iptables_forward_rules: bool | None
    iptables_resync: int
    ip_blackhole_route: bool
    healthz_ip: str
    healthz_port: int
    v: int
    store: StoreSpec
    mtu: int | None
    port: int | None
    workers: int | None
    source_check: SourceCheck | None
    run_dir: Path
    state_dir: Path
    node: str
    etcd: EtcdOptions

    store_is_named: bool
    """False: nobody chose a store, and `store` is the local one; see `store_warning`."""
    pretend_no_vxlan: bool
    """UDPTUN_PRETEND_NO_VXLAN is set: probe as on a kernel without vxlan.  For the tests, which have no such kernel."""
    notify_socket: str
    """NOTIFY_SOCKET of systemd, empty without it."""
    warnings: tuple[str, ...]
    """Environment variables that were ignored, a line each, for the log."""
    help: bool
    version: bool
    """With either set, print that and do nothing else."""

    @property
    def store_warning(self) -> str | None:
        """The line to log loudly when the store was not chosen but assumed."""
        if self.store_is_named:
            return None
        return (
            f"no --store named: using {self.store}, which serves this one machine only; other hosts will not be reached"
        )


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.  `parse` turns its text into the value or raises ValueError with the reason.

    A flag that is not `built` may be given as long as it asks for nothing: false, or an empty text.
    """

    name: str
    parse: Callable[[str], object]
    default: object
    value_name: str
    help: str
    repeatable: bool = False
    built: bool = True

    @property
    def is_boolean(self) -> bool:
        return self.parse is _boolean

    @property
    def variable(self) -> str:
        """The environment variable that stands in for the flag."""
        return ENVIRONMENT_PREFIX + self.name.upper().replace("-", "_")


_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


def _boolean(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return text in _TRUE


def _integer(text: str) -> int:
    """Go's strconv.ParseInt with base 0: decimal, 0x, 0o, 0b, and a leading 0 for octal."""
    try:
        return int(text, 8) if re.fullmatch(r"[+-]?0[0-9_]+", text) else int(text, 0)
    except ValueError:
        raise ValueError("must be an integer") from None


def _integer_in(allowed: range) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _integer(text)
        if value not in allowed:
            raise ValueError(f"must be {allowed.start}..{allowed.stop - 1}")
        return value

    return parse


def _path(text: str) -> Path:
    if not text:
        raise ValueError("must be a path")
    return Path(text)


def _ipv4_or_none(text: str) -> IPv4Address | None:
    """To flannel an empty address is none given: manifests pass variables that may be empty."""
    try:
        return IPv4Address(text) if text else None
    except ValueError:
        raise ValueError("must be an IPv4 address") from None


def _ipv6_or_none(text: str) -> IPv6Address | None:
    try:
        return IPv6Address(text) if text else None
    except ValueError:
        raise ValueError("must be an IPv6 address") from None


def _regex(text: str) -> str:
    try:
        with warnings.catch_warnings():
            # Python wonders about [[:alpha:]], which is good Go.
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(text)
    except re.error as exc:
        raise ValueError(f"must be a regular expression ({exc})") from None
    return text


def _source_check(text: str) -> SourceCheck:
    try:
        return SourceCheck(text)
    except ValueError:
        raise ValueError("must be off, peer or strict") from None


def _store(text: str) -> tuple[StoreKind, Path | None]:
    """Kind and path; the path of a bare `local` is settled once --state-dir is known."""
    kind, colon, path = text.partition(":")
    if kind in _UNBUILT_STORES:
        raise UsageError(f"--store {kind} is not built yet; {_BUILT_STORES}")
    if kind not in [known.value for known in StoreKind]:
        raise ValueError("must be local[:PATH], file:PATH or etcd")
    if kind == StoreKind.ETCD.value and colon:
        raise ValueError("takes no path; see --etcd-endpoints and --etcd-prefix")
    if path:
        return StoreKind(kind), Path(path)
    if colon or kind == StoreKind.FILE.value:
        raise ValueError(f"needs a path: {kind}:PATH")
    return StoreKind(kind), None


_DEFAULT_ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"
"""flannel's."""

_ENDPOINT = re.compile(r"(?:(https?)://)?(\[[0-9A-Fa-f:.]+\]|[^/:@\[\]\s]+)(?::(\d{1,5}))?/?")


def _endpoints(text: str, is_tls: bool = False) -> tuple[Endpoint, ...]:
    """Comma-separated URLs; `is_tls` is for one without a scheme."""
    if "@" in text:
        # Not quoted: there may be a password in it.
        raise UsageError("--etcd-endpoints takes no user and password; use --etcd-username and --etcd-password")
    endpoints = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = _ENDPOINT.fullmatch(part)
        if match is None or not 0 < int(match[3] or _ETCD_PORT) < 65536:
            raise ValueError(f"{part!r} is not http://HOST:PORT or https://HOST:PORT")
        scheme, host, port = match.groups()
        with_tls = is_tls if scheme is None else scheme == "https"
        endpoints.append(Endpoint(host.strip("[]"), int(port or _ETCD_PORT), with_tls))
    if not endpoints:
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT, or several with commas")
    return tuple(dict.fromkeys(endpoints))


def _endpoints_text(text: str) -> str:
    """Checked here and kept as text: what no scheme means is not known before all flags are."""
    _endpoints(text)
    return text


def _prefix(text: str) -> str:
    """As Go's path.Join makes of it."""
    if not text:
        raise ValueError("must be a path such as /coreos.com/network")
    return posixpath.normpath(re.sub("^/+", "/", text)).rstrip("/")


def _path_or_none(text: str) -> Path | None:
    return Path(text) if text else None


FLAGS: Mapping[str, tuple[Flag, ...]] = {
    "This host": (
        Flag(
            "iface",
            str,
            (),
            "IFACE",
            "interface to the other hosts, name or address; tried in order",
            repeatable=True,
        ),
        Flag(
            "iface-regex",
            _regex,
            (),
            "REGEX",
            "regular expression for it, tried after --iface",
            repeatable=True,
        ),
        Flag(
            "iface-can-reach",
            _ipv4_or_none,
            None,
            "IP",
            "the interface that reaches this address, tried last",
        ),
        Flag(
            "public-ip",
            _ipv4_or_none,
            None,
            "IP",
            "address that the other hosts send to, if not the interface's",
        ),
        Flag("public-ipv6", _ipv6_or_none, None, "IP", "the same for IPv6"),
        Flag("node", str, "", "NAME", "this host's NodeName in a leases file (--store file)"),
    ),
    "Leases": (
        Flag(
            "store",
            _store,
            None,
            "STORE",
            "where leases live: local[:PATH], file:PATH, etcd (as any --etcd-* flag says); not built yet: kube",
        ),
        Flag(
            "subnet-lease-renew-margin",
            _integer,
            60,
            "MINUTES",
            "renew this long before the lease expires, 1..1439",
        ),
        Flag(
            "net-config-path",
            _path,
            Path("/etc/kube-flannel/net-conf.json"),
            "FILE",
            "network configuration, for the local and file stores",
        ),
        Flag(
            "subnet-file",
            _path,
            Path("/run/flannel/subnet.env"),
            "FILE",
            "where to write the subnet and MTU in use",
        ),
    ),
    "Tunnel": (
        Flag(
            "mtu",
            _integer_in(UNDERLAY_MTUS),
            None,
            "BYTES",
            "the underlay's MTU, over Backend.MTU and the interface's",
        ),
        Flag(
            "port",
            _integer_in(PORTS),
            None,
            "N",
            "UDP port of this host, over Backend.Port, where several share a public IP (Type udp)",
        ),
        Flag("workers", _integer_in(WORKERS), None, "N", "datapath threads, over Backend.Workers"),
        Flag("source-check", _source_check, None, "WHICH", "off, peer or strict, over Backend.SourceCheck"),
    ),
    "Running": (
        Flag("run-dir", _path, DEFAULT_RUN_DIR, "DIR", "sockets"),
        Flag("state-dir", _path, Path("/var/lib/udptun"), "DIR", "what outlives a reboot: node id, last leases"),
        Flag("healthz-ip", str, "0.0.0.0", "IP", "address of /healthz and /readyz"),
        Flag("healthz-port", _integer_in(range(PORTS.stop)), 0, "PORT", "their TCP port; 0: do not serve them"),
        Flag("v", _integer, 0, "LEVEL", "log level; 1 and more: debug"),
        Flag("vmodule", str, "", "PATTERNS", "accepted as flannel's; no effect"),
        Flag("log_backtrace_at", str, "", "LINE", "accepted as flannel's; no effect"),
        Flag("version", _boolean, False, "", "print the version and exit"),
    ),
    "Firewall": (
        Flag("ip-masq", _boolean, False, "", "masquerade what leaves the overlay"),
        Flag("ip-masq-fully-random-disable", _boolean, False, "", "do without random source ports for it"),
        # True is flannel's default; None tells it from a person's wish, which must be fulfilled or refused.
        Flag(
            "iptables-forward-rules",
            _boolean,
            None,
            "",
            "accept overlay traffic in FORWARD; default true, where the host can",
        ),
        Flag("iptables-resync", _integer_in(RESYNC_S), 5, "SECONDS", "look for changed firewall rules this often"),
        Flag("ip-blackhole-route", _boolean, False, "", "drop packets to pods that do not exist, by a blackhole route"),
    ),
    _ETCD: (
        Flag(
            "etcd-endpoints",
            _endpoints_text,
            _DEFAULT_ENDPOINTS,
            "URLS",
            "comma-separated; another when one fails",
        ),
        Flag("etcd-prefix", _prefix, "/coreos.com/network", "PREFIX", "of the keys config and subnets/..."),
        Flag("etcd-cafile", _path_or_none, None, "FILE", "CA of the servers' certificates; default the system's"),
        Flag("etcd-certfile", _path_or_none, None, "FILE", "our certificate, where etcd asks clients for one"),
        Flag("etcd-keyfile", _path_or_none, None, "FILE", "its key"),
        Flag("etcd-username", str, "", "NAME", "user, where etcd's authentication is enabled"),
        Flag("etcd-password", str, "", "PASSWORD", "better in the environment, which other users cannot read"),
    ),
    _KUBE: (
        Flag("kube-subnet-mgr", _boolean, False, "", "leases as node annotations", built=False),
        Flag("kube-api-url", str, "", "URL", "", built=False),
        Flag("kubeconfig-file", str, "", "FILE", "", built=False),
        Flag("kube-annotation-prefix", str, "flannel.alpha.coreos.com", "PREFIX", "", built=False),
        Flag("set-node-network-unavailable", _boolean, True, "", "no effect outside Kubernetes"),
    ),
}
"""Every flag, under the heading that the help puts it."""

_RELEASE = Flag("release", _boolean, False, "", "give the lease back too; without it the host finds it again")


_JSON = Flag("json", _boolean, False, "", "for programs")
_LEASE_TOPICS = ("Leases", _ETCD)
"""What the help of `udptun lease` is about."""


def parse_daemon_flags(argv: Sequence[str], environ: Mapping[str, str], *, as_flanneld: bool = False) -> Options:
    """The options of `udptun daemon`, or of `flanneld` with `as_flanneld`; `argv` begins after the command.

    The one difference: with no store named, flannel means etcd on this host, and `udptun daemon` the local store.
    Raises UsageError with one line.
    """
    return _Given(argv, environ, _by_name()).options(as_flanneld)


def parse_cleanup_flags(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Options, bool]:
    """The options of `udptun cleanup`, which takes every flag of the daemon, and whether --release is given."""
    given = _Given(argv, environ, _by_name() | {_RELEASE.name: _RELEASE})
    return given.options(as_flanneld=False), given.values[_RELEASE.name]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """The arguments of `udptun lease list`, `show`, `reserve` or `release`."""

    options: Options
    words: tuple[str, ...]
    json: bool


def parse_lease_flags(argv: Sequence[str], environ: Mapping[str, str], n_words: int) -> LeaseRequest:
    """What `udptun lease` takes: every flag of the daemon, --json, and up to `n_words` words."""
    given = _Given(argv, environ, _by_name() | {_JSON.name: _JSON}, n_words)
    return LeaseRequest(given.options(as_flanneld=False), tuple(given.words), given.values[_JSON.name])


def lease_help() -> str:
    """What `udptun lease --help` says about the flags."""
    return flag_help({"": (_JSON,), **{topic: FLAGS[topic] for topic in _LEASE_TOPICS}})


def cleanup_help() -> str:
    """What `udptun cleanup --help` says about the flags."""
    return flag_help({"": (_RELEASE,), **FLAGS})


def flag_help(topics: Mapping[str, Sequence[Flag]] = FLAGS) -> str:
    """What `--help` says about flags under their headings."""
    lines = []
    for topic, flags in topics.items():
        lines += ["", f"{topic}:"] if topic else []
        for flag in flags:
            lines.append(f"  --{flag.name}{' ' if flag.value_name else ''}{flag.value_name}")
            default = str(flag.default or "").lower() if flag.is_boolean else str(flag.default or "")
            remarks = [
                flag.help,
                "" if flag.built else "not built yet",
                "may be repeated" if flag.repeatable else "",
                f"default {default}" if default not in ("", "false") else "",
            ]
            lines.append(f"        {'; '.join(remark for remark in remarks if remark)}")
    return "\n".join(
        [
            *lines,
            "",
            "Flags are written -x or --x, with =VALUE or VALUE as the next word; booleans as --x or --x=false.",
            f"Each can be given as {ENVIRONMENT_PREFIX}<NAME> instead, as in {ENVIRONMENT_PREFIX}SUBNET_FILE.",
        ]
    )


def _by_name() -> dict[str, Flag]:
    return {flag.name: flag for topic in FLAGS.values() for flag in topic}


class _Given:
    """What argv and the environment give: a value per flag, and where it was said."""

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], flags: Mapping[str, Flag], n_words: int = 0
    ) -> None:
        self._flags = flags
        self._n_words = n_words
        self.words: list[str] = []
        """Arguments that are no flags; more than `n_words` are refused."""
        self._environ = environ
        self.values: dict[str, Any] = {name: flag.default for name, flag in flags.items()}  # each flag's own type
        self._said: dict[str, str] = {}
        self._warnings: list[str] = []
        self._help = False
        for flag, text in self._scan(argv):
            try:
                self._take(flag, text, f"--{flag.name}")
            except ValueError as exc:
                raise UsageError(f"--{flag.name}={text}: {exc}") from None
        for name, flag in flags.items():
            text = environ.get(flag.variable, "")
            if text and name not in self._said and not self._is_question:
                try:
                    self._take(flag, text, flag.variable)
                except ValueError as exc:
                    self._warnings.append(f"{flag.variable}={text}: {exc}; ignored, as flannel does")

    @property
    def _is_question(self) -> bool:
        """Only help or the version is wanted: nothing else matters then."""
        return self._help or bool(self.values["version"])

    def _take(self, flag: Flag, text: str, said: str) -> None:
        value = flag.parse(text)
        if flag.repeatable:
            value = self.values[flag.name] + ((value,) if text else ())
        self.values[flag.name] = value
        self._said[flag.name] = said

    def _scan(self, argv: Sequence[str]) -> Iterator[tuple[Flag, str]]:
        """Flags with their texts, in order, by the rules of Go's flag.Parse."""
        words = iter(argv)
        for word in words:
            if word == "--":
                for rest in words:
                    raise UsageError(_unexpected(rest))
                return
            match = re.fullmatch(r"--?([^-=][^=]*)(=.*)?", word, re.DOTALL)
            if match is None and not word.startswith("-") and len(self.words) < self._n_words:
                self.words.append(word)
                continue
            if match is None:
                raise UsageError(_unexpected(word))
            name, text = match.groups()
            if name in ("h", "help"):
                self._help = True
                return
            flag = self._flags.get(name)
            if flag is None:
                raise UsageError(f"unknown flag --{name}{did_you_mean(name, self._flags, '--')}")
            if text is not None:
                yield flag, text[1:]
            elif flag.is_boolean:
                yield flag, "true"
            else:
                value = next(words, None)
                if value is None:
                    raise UsageError(f"--{name} needs a value: {flag.value_name}")
                yield flag, value

    def options(self, as_flanneld: bool) -> Options:
        """Check what no flag can check alone."""
        values = self.values
        if not self._is_question:
            self._refuse_unbuilt()
            margin = values["subnet-lease-renew-margin"]
            if margin not in RENEW_MARGINS_MIN:
                raise UsageError(
                    "Invalid subnet-lease-renew-margin option, out of acceptable range: "
                    f"{margin} is not in {RENEW_MARGINS_MIN.start}..{RENEW_MARGINS_MIN.stop - 1}"
                )
        kind, path = self._choose_store(as_flanneld)
        etcd = self._etcd_options(kind)
        return Options(
            iface=values["iface"],
            iface_regex=values["iface-regex"],
            iface_can_reach=values["iface-can-reach"],
            public_ip=values["public-ip"],
            public_ipv6=values["public-ipv6"],
            subnet_file=values["subnet-file"],
            subnet_lease_renew_margin=values["subnet-lease-renew-margin"],
            net_config_path=values["net-config-path"],
            ip_masq=values["ip-masq"],
            ip_masq_fully_random_disable=values["ip-masq-fully-random-disable"],
            iptables_forward_rules=values["iptables-forward-rules"],
            iptables_resync=values["iptables-resync"],
            ip_blackhole_route=values["ip-blackhole-route"],
            healthz_ip=values["healthz-ip"],
            healthz_port=values["healthz-port"],
            v=values["v"],
            store=StoreSpec(kind, path or values["state-dir"] / "leases.db"),
            mtu=values["mtu"],
            port=values["port"],
            workers=values["workers"],
            source_check=values["source-check"],
            run_dir=values["run-dir"],
            state_dir=values["state-dir"],
            node=values["node"],
            etcd=etcd,
            store_is_named=kind is not StoreKind.LOCAL or values["store"] is not None,
            pretend_no_vxlan=bool(self._environ.get("UDPTUN_PRETEND_NO_VXLAN")),
            notify_socket=self._environ.get("NOTIFY_SOCKET", ""),
            warnings=tuple(self._warnings),
            help=self._help,
            version=values["version"],
        )

    def _choose_store(self, as_flanneld: bool) -> tuple[StoreKind, Path | None]:
        named: tuple[StoreKind, Path | None] | None = self.values["store"]
        wanted = [self._said[flag.name] for flag in FLAGS[_ETCD] if flag.name in self._said and self.values[flag.name]]
        if named is None:
            return (StoreKind.ETCD if wanted or as_flanneld else StoreKind.LOCAL), None
        if named[0] is not StoreKind.ETCD and wanted and not self._is_question:
            raise UsageError(f"{wanted[0]} means etcd, and {self._said['store']} names another store; leave one out")
        return named

    def _etcd_options(self, kind: StoreKind) -> EtcdOptions:
        values = self.values
        certfile, keyfile, cafile = (values[f"etcd-{which}"] for which in ("certfile", "keyfile", "cafile"))
        username, password = values["etcd-username"], values["etcd-password"]
        endpoints = _endpoints(values["etcd-endpoints"], is_tls=bool(certfile or cafile))
        if kind is StoreKind.ETCD and not self._is_question:
            if len({endpoint.is_tls for endpoint in endpoints}) > 1:
                raise UsageError("--etcd-endpoints mixes http:// and https://; all must be one or the other")
            if (certfile is None) != (keyfile is None):
                raise UsageError("--etcd-certfile and --etcd-keyfile go together; give both or none")
            if bool(username) != bool(password):
                raise UsageError("--etcd-username and --etcd-password go together; give both or none")
            if (certfile or cafile) and not endpoints[0].is_tls:
                # flannel 0.18 to 0.20.0 asked for the files even where nothing was encrypted.
                self._warnings.append(
                    f"--etcd-cafile, --etcd-certfile and --etcd-keyfile are not used: {endpoints[0]} is not encrypted; "
                    "write https:// if it can be"
                )
        return EtcdOptions(endpoints, values["etcd-prefix"], keyfile, certfile, cafile, username, password)

    def _refuse_unbuilt(self) -> None:
        for flag in self._flags.values():
            said = self._said.get(flag.name)
            if said is not None and self.values[flag.name] and not flag.built:
                # Without the value: it may be a password.
                raise UsageError(f"{said} is not built yet; {_BUILT_STORES}")


def _unexpected(word: str) -> str:
    if word.startswith("-") and word.strip("-"):
        return f"bad flag syntax: {word}"
    if word in _TRUE + _FALSE:
        return f"unexpected argument {word!r}; a boolean takes its value after =, as in --ip-masq={word}"
    return f"unexpected argument {word!r}; the daemon takes flags only"

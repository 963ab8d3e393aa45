"""The network configuration (net-conf.json).  Pure: text in, frozen dataclasses or ConfigError out.

The file is flannel's and is read by Go's rules (encoding/json): key names match in any letter case, null is
"not given", unknown keys are ignored, an integer has neither fraction nor exponent.  Defaults and checks are
those of flannel's pkg/subnet/config.go (CheckNetworkConfig) with its wording; on top of them we refuse what
flannel lets pass and then black-holes.  All problems of a file are reported together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import ClassVar, TypeVar

from udptun.core.errors import ConfigError
from udptun.core.offload import ALL as ALL_OFFLOADS
from udptun.core.offload import Offload
from udptun.core.offload import parse as parse_offloads

UDP_OVERHEAD = 28
"""Bytes around an inner packet: IPv4 header 20 + UDP header 8 (flannel udp_network_amd64.go)."""

VXLAN_OVERHEAD = 50
"""IPv4 header 20 + UDP header 8 + VXLAN header 8 + inner Ethernet header 14 (RFC 7348; flannel vxlan/device.go)."""

MTU_MIN = 68
"""The smallest MTU, bytes, that IPv4 allows (RFC 791)."""

UNDERLAY_MTUS = range(MTU_MIN + UDP_OVERHEAD, 65536)
"""Underlay MTUs, bytes, that leave a device an MTU that IPv4 allows, with the least overhead there is."""

WORKERS = range(1, 17)
"""How many datapath threads may be asked for."""

PORTS = range(1, 65536)

VNIS = range(1 << 24)
"""VXLAN network identifiers (RFC 7348)."""


def default_workers(n_cpus: int) -> int:
    """How many datapath threads serve a machine of so many processors.

    With two or three, more than one only gets in the way of itself and of the pods.
    """
    return 1 if n_cpus < 4 else min(4, n_cpus // 2)


_FLANNEL_BACKENDS = ("ipip", "ipsec", "wireguard", "extension", "tencent-vpc", "ali-vpc", "aws-vpc", "gce")

_UNUSABLE = (
    (IPv4Network("0.0.0.0/8"), "this-network"),
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved"),
)
"""Ranges whose addresses the datapath drops as martian (docs/wire-format.md); no Network may touch them."""


class SourceCheck(Enum):
    """Which senders the decap side accepts; docs/wire-format.md names the rows that each one switches."""

    OFF = "off"
    """Any outer source."""
    PEER = "peer"
    """Outer source is a peer; an inner source inside Network lies in that peer's subnet."""
    STRICT = "strict"
    """As PEER, and every inner source lies in that peer's subnet."""


class LogLevel(Enum):
    """How much the daemon says; the values are those of the `logging` module."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class Fallback(Enum):
    """What stands in for `Type: vxlan` on a host whose kernel has none."""

    VTEP = "vtep"
    """A userspace VTEP, to the peers like any other."""
    UDP = "udp"
    """The udp backend; only peers that run udptun, and udp themselves, reach this host."""
    NONE = "none"
    """Nothing: fail, as flannel does."""


@dataclass(frozen=True, slots=True)
class DatapathKeys:
    """The keys of `Backend` that are the userspace tunnel's.  `workers` None: `default_workers`."""

    workers: int | None = None
    source_check: SourceCheck = SourceCheck.PEER
    offload: Offload = ALL_OFFLOADS
    """What may be used where the kernel grants it: all but Backend.OffloadDisabled."""


@dataclass(frozen=True, slots=True)
class UdpBackend:
    """`Backend` of Type udp.

    Of this and the following: `mtu` is the underlay's, bytes; None: take the interface's.  `log_level` None: the -v
    flag decides.
    """

    type: ClassVar[str] = "udp"
    port: int = 8285
    mtu: int | None = None
    log_level: LogLevel | None = None
    datapath: DatapathKeys = DatapathKeys()
    own_port: int | None = None
    """This host's where it differs, by the --port flag; never in net-conf.json, which is for all."""


@dataclass(frozen=True, slots=True)
class VxlanBackend:
    """`Backend` of Type vxlan (flannel, pkg/backend/vxlan/vxlan.go), and what a stand-in for the kernel's needs.

    `userspace`: use the VTEP of `fallback` although the kernel could.
    """

    type: ClassVar[str] = "vxlan"
    vni: int = 1
    port: int = 8472
    """The kernel's own default (drivers/net/vxlan); IANA's is 4789."""
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    mtu: int | None = None
    userspace: bool = False
    fallback: Fallback = Fallback.VTEP
    log_level: LogLevel | None = None
    datapath: DatapathKeys = DatapathKeys()


@dataclass(frozen=True, slots=True)
class HostGwBackend:
    """`Backend` of Type host-gw."""

    type: ClassVar[str] = "host-gw"
    mtu: ClassVar[None] = None
    log_level: LogLevel | None = None


@dataclass(frozen=True, slots=True)
class AllocBackend:
    """`Backend` of Type alloc: a lease and subnet.env, no packets."""

    type: ClassVar[str] = "alloc"
    mtu: ClassVar[None] = None
    log_level: LogLevel | None = None


BackendConf = UdpBackend | VxlanBackend | HostGwBackend | AllocBackend


@dataclass(frozen=True, slots=True)
class NetConf:
    """A valid configuration, defaults filled in.

    A lease takes a subnet of `subnet_len` whose address lies in `subnet_min`..`subnet_max`, both included.
    The `ipv6_` fields are all set when `enable_ipv6` is, else all None.  `notes` are lines worth a warning:
    keys that were ignored, and what they were perhaps meant to be.
    """

    enable_ipv4: bool
    enable_ipv6: bool
    enable_nftables: bool
    network: IPv4Network
    subnet_min: IPv4Address
    subnet_max: IPv4Address
    subnet_len: int
    ipv6_network: IPv6Network | None
    ipv6_subnet_min: IPv6Address | None
    ipv6_subnet_max: IPv6Address | None
    ipv6_subnet_len: int | None
    backend: BackendConf
    notes: tuple[str, ...] = ()


def parse_net_conf(text: str, source: str) -> NetConf:
    """The configuration that `text` holds.

    `source` names it in every message (a path, an etcd key).  Raises ConfigError with one line per problem,
    each naming `source`, the key and the reason.
    """
    report = _Report(source)
    top = _Fields.of_text(text, report)
    enable_ipv4 = top.boolean("EnableIPv4", default=True)
    enable_ipv6 = top.boolean("EnableIPv6", default=False)
    enable_nftables = top.boolean("EnableNFTables", default=False)
    network, ipv6_network = top.ipv4_network("Network"), top.ipv6_network("IPv6Network")
    ipv4 = _Asked(
        network,
        top.integer("SubnetLen", zero_is_unset=True),
        top.ipv4_address("SubnetMin"),
        top.ipv4_address("SubnetMax"),
    )
    ipv6 = _Asked(
        ipv6_network,
        top.integer("IPv6SubnetLen", zero_is_unset=True),
        top.ipv6_address("IPv6SubnetMin"),
        top.ipv6_address("IPv6SubnetMax"),
    )
    backend = _backend(top, report)

    if not enable_ipv4 and not enable_ipv6:
        report.problem("EnableIPv4", "none defined stack: set EnableIPv4 or EnableIPv6 to true")
    elif not enable_ipv4:
        report.problem("EnableIPv4", "cannot be false: every backend carries IPv4; IPv6 alone is not built yet")
    for enabled, key in ((enable_ipv4, "Network"), (enable_ipv6, "IPv6Network")):
        if enabled and top.raw(key) is None:
            report.problem(key, f"please define a correct {key} parameter in the flannel config")
    ipv4_plan = _plan(_IPV4, ipv4, report) if enable_ipv4 else None
    ipv6_plan = _plan(_IPV6, ipv6, report) if enable_ipv6 else None
    if enable_ipv4 and network is not None:
        _check_usable(network, ipv4_plan, report)
    if enable_ipv6:
        report.note(
            f"EnableIPv6: the {backend.type} backend carries no IPv6 traffic; only the lease and subnet.env name it"
        )

    report.raise_problems()
    # No problem was reported, so what follows is there.
    assert network is not None
    assert ipv4_plan is not None
    return NetConf(
        enable_ipv4=enable_ipv4,
        enable_ipv6=enable_ipv6,
        enable_nftables=enable_nftables,
        network=network,
        subnet_min=IPv4Address(ipv4_plan.first),
        subnet_max=IPv4Address(ipv4_plan.last),
        subnet_len=ipv4_plan.length,
        ipv6_network=ipv6_network if ipv6_plan else None,
        ipv6_subnet_min=IPv6Address(ipv6_plan.first) if ipv6_plan else None,
        ipv6_subnet_max=IPv6Address(ipv6_plan.last) if ipv6_plan else None,
        ipv6_subnet_len=ipv6_plan.length if ipv6_plan else None,
        backend=backend,
        notes=tuple(report.notes),
    )


def check_underlay(conf: NetConf, address: IPv4Address) -> None:
    """Raise ConfigError when Network contains this host's underlay address.

    The route to Network would then send the tunnel's own datagrams into the tunnel.
    """
    if address in conf.network:
        raise ConfigError(
            f"Network: {conf.network} contains this host's underlay address {address}; "
            "choose a Network that no host's own address lies in"
        )


def mtu_for(underlay_mtu: int, overhead: int) -> int:
    """Largest inner IPv4 packet (bytes) that fits one outer one with so many bytes of `overhead`.

    Raises ConfigError below 68, the smallest MTU IPv4 allows (RFC 791).
    """
    mtu = underlay_mtu - overhead
    if mtu < MTU_MIN:
        raise ConfigError(
            f"MTU: an underlay MTU of {underlay_mtu} leaves {mtu} bytes for the pods' packets; "
            f"IPv4 needs {MTU_MIN}, so the underlay needs {MTU_MIN + overhead}"
        )
    return mtu


def keys_that_need_a_restart(old: NetConf, new: NetConf) -> list[str]:
    """The keys of net-conf.json that differ and that cannot change while packets flow."""
    changed = [
        key
        for key in TOP_KEYS
        if key != "Backend" and getattr(old, _field_of(NetConf, key)) != getattr(new, _field_of(NetConf, key))
    ]
    if old.backend.type != new.backend.type:
        return [*changed, "Backend.Type"]
    live = {"Type", "LogLevel", "MTU", *_DATAPATH_KEYS}
    names = {key: _field_of(type(old.backend), key) for key in _BACKEND_KEYS[old.backend.type] if key not in live}
    return changed + [
        f"Backend.{key}" for key, name in names.items() if getattr(old.backend, name) != getattr(new.backend, name)
    ]


def replace_live_keys(old: BackendConf, new: BackendConf) -> BackendConf:
    """`old` with those keys of `new` that can change while packets flow; `old` when they are of different types."""
    if type(old) is not type(new):
        return old
    names = {field.name for field in fields(old)} & {"mtu", "log_level", "datapath"}
    return replace(old, **{name: getattr(new, name) for name in names})


def _field_of(kind: type[NetConf | BackendConf], key: str) -> str:
    """The name of the field that holds `key`."""
    return next(field.name for field in fields(kind) if field.name.replace("_", "") == key.lower())


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` for the one of `known` that looks like `word` in any letter case, else nothing."""
    import difflib  # only needed once something is wrong

    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1)
    return f"; did you mean {prefix}{by_fold[close[0]]}?" if close else ""


class _Report:
    """Gathers what is wrong with one file, and what is merely odd."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, key: str, reason: str) -> None:
        self._problems.append(f"{self._source}: {key}: {reason}")

    def note(self, text: str) -> None:
        self.notes.append(f"{self._source}: {text}")

    def raise_problems(self) -> None:
        if self._problems:
            raise ConfigError(*self._problems)


@dataclass(frozen=True, slots=True)
class _JsonObject:
    """A JSON object as it was written: in order, with its duplicates."""

    pairs: Sequence[tuple[str, object]]


TOP_KEYS = (
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "IPv6Network",
    "SubnetMin",
    "SubnetMax",
    "SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "IPv6SubnetLen",
    "Backend",
)
"""The keys of net-conf.json; a field of NetConf has the name of its key."""
_DATAPATH_KEYS = ("Workers", "SourceCheck", "OffloadDisabled")
_BACKEND_KEYS: Mapping[str, tuple[str, ...]] = {
    "udp": ("Type", "LogLevel", "Port", "MTU", *_DATAPATH_KEYS),
    "vxlan": (
        *("Type", "LogLevel", "VNI", "Port", "GBP", "Learning", "DirectRouting", "MTU", "Userspace", "Fallback"),
        *_DATAPATH_KEYS,
    ),
    "host-gw": ("Type", "LogLevel"),
    "alloc": ("Type", "LogLevel"),
}
"""The keys of each type of `Backend` there is; of flannel's those that are not here are flannel's alone."""


_Choice = TypeVar("_Choice", bound=Enum)


class _Fields:
    """The values of one JSON object, under the names that Go would give its keys.

    Each getter reports a value of the wrong kind and then returns what it returns for an absent one.
    """

    def __init__(self, json_object: _JsonObject, known: Sequence[str], path: str, report: _Report) -> None:
        self._path = path
        self._report = report
        self._values: dict[str, object] = {}
        by_fold = {name.casefold(): name for name in known}
        written: dict[str, str] = {}
        for key, value in json_object.pairs:
            name = by_fold.get(key.casefold(), key)
            if name in written:
                other = "" if written[name] == key else f" (as {written[name]} and {key})"
                report.problem(path + name, f"given twice{other}; keep one")
                continue
            written[name] = key
            self._values[name] = value

    @classmethod
    def of_text(cls, text: str, report: _Report) -> _Fields:
        """The top level of a file.  Raises ConfigError at once when it is not a JSON object."""
        try:
            value = json.loads(text, object_pairs_hook=_JsonObject, parse_constant=_refuse_constant)
        except json.JSONDecodeError as exc:
            report.problem("not JSON", f"line {exc.lineno} column {exc.colno}: {exc.msg}")
        except (ValueError, RecursionError) as exc:
            report.problem("not JSON", str(exc))
        else:
            if isinstance(value, _JsonObject):
                fields = cls(value, TOP_KEYS, "", report)
                fields.note_unknown(TOP_KEYS)
                return fields
            report.problem("not a configuration", f"a JSON object is needed, not {_shown(value)}")
        report.raise_problems()
        raise AssertionError("unreachable: a problem was reported")

    def note_unknown(self, known: Sequence[str]) -> None:
        """Leave a note for each key that is none of `known`."""
        for name in self._values:
            if name not in known:
                hint = did_you_mean(name, known, self._path)
                self._report.note(f"{self._path}{name}: unknown key, ignored{hint}")

    def has(self, key: str) -> bool:
        """Whether the key is there at all, null included."""
        return key in self._values

    def raw(self, key: str) -> object:
        """The value; None when it is absent or null."""
        return self._values.get(key)

    def wrong(self, key: str, wanted: str) -> None:
        self._report.problem(self._path + key, f"{wanted}, not {_shown(self.raw(key))}")

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, "must be true or false")
            return default
        return value

    def integer(self, key: str, allowed: range | None = None, *, zero_is_unset: bool = False) -> int | None:
        """A number of `allowed`, or any from 0 up; with `zero_is_unset` 0 is the same as absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self.wrong(key, "must be a JSON integer")
        elif value == 0 and zero_is_unset:
            return None
        elif allowed is not None and value not in allowed:
            self.wrong(key, f"must be {allowed.start}..{allowed.stop - 1}")
        elif value < 0:
            self.wrong(key, "must not be negative")
        else:
            return value
        return None

    def choice(self, key: str, choices: Mapping[str, _Choice]) -> _Choice | None:
        """One of `choices`, whose names are in lower case; matched in any case."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, str) and value.lower() in choices:
            return choices[value.lower()]
        *others, last = (f'"{name}"' for name in choices)
        self.wrong(key, f"must be {', '.join(others)} or {last}")
        return None

    def offloads(self, key: str) -> Offload:
        """A list of their names; none when the key is absent."""
        value = self.raw(key)
        if value is None:
            return Offload(0)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.wrong(key, "must be a list of offload names")
            return Offload(0)
        try:
            return parse_offloads(value)
        except ValueError as exc:
            self.wrong(key, str(exc))
            return Offload(0)

    def ipv4_network(self, key: str) -> IPv4Network | None:
        value = self.raw(key)
        if value is None:
            return None
        # Only address/length: Python alone would also take a netmask, or no length at all.
        if isinstance(value, str) and re.fullmatch(r"[0-9.]+/[0-9]{1,2}", value):
            try:
                return IPv4Network(value, strict=False)
            except ValueError:
                pass
        self.wrong(key, "invalid IPv4 CIDR format: must be like 10.244.0.0/16")
        return None

    def ipv6_network(self, key: str) -> IPv6Network | None:
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"[0-9A-Fa-f:.]+/[0-9]{1,3}", value):
            try:
                return IPv6Network(value, strict=False)
            except ValueError:
                pass
        self.wrong(key, "invalid IPv6 CIDR format: must be like fd00:244::/48")
        return None

    def ipv4_address(self, key: str) -> IPv4Address | None:
        value = self.raw(key)
        if value is None:
            return None
        try:
            if isinstance(value, str):
                return IPv4Address(value)
        except ValueError:
            pass
        self.wrong(key, "must be an IPv4 address like 10.244.1.0")
        return None

    def ipv6_address(self, key: str) -> IPv6Address | None:
        value = self.raw(key)
        if value is None:
            return None
        try:
            if isinstance(value, str) and "%" not in value:
                return IPv6Address(value)
        except ValueError:
            pass
        self.wrong(key, "must be an IPv6 address like fd00:244:0:1::")
        return None


def _refuse_constant(name: str) -> object:
    """Python's json takes NaN and Infinity; JSON has neither."""
    raise ValueError(f"{name} is not a JSON value")


def _shown(value: object) -> str:
    """A value as the file's author would recognise it, on one short line."""
    if isinstance(value, _JsonObject):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _backend(top: _Fields, report: _Report) -> BackendConf:
    """`Backend`: udp when it is absent; present, it must name a Type (flannel, parseBackendType)."""
    if not top.has("Backend"):
        return UdpBackend()
    value = top.raw("Backend")
    if value is None:
        value = _JsonObject(())  # flannel: null names the empty type, as {} does
    if not isinstance(value, _JsonObject):
        top.wrong("Backend", "error decoding Backend property of config: must be an object")
        return UdpBackend()
    every_key = {key: None for keys in _BACKEND_KEYS.values() for key in keys}
    fields = _Fields(value, tuple(every_key), "Backend.", report)
    kind = fields.raw("Type")
    if kind is not None and not isinstance(kind, str):
        fields.wrong("Type", "error decoding Backend property of config: must be a string")
        return UdpBackend()
    kind = "" if kind is None else kind.lower()
    if kind not in _BACKEND_KEYS:
        report.problem("Backend.Type", _not_built(kind))
        return UdpBackend()
    fields.note_unknown(_BACKEND_KEYS[kind])
    match kind:
        case "udp":
            port = fields.integer("Port", PORTS)
            return UdpBackend(
                port=UdpBackend().port if port is None else port,
                mtu=fields.integer("MTU", UNDERLAY_MTUS, zero_is_unset=True),
                log_level=_log_level(fields),
                datapath=_datapath_keys(fields),
            )
        case "vxlan":
            vni = fields.integer("VNI", VNIS)
            return VxlanBackend(
                vni=VxlanBackend().vni if vni is None else vni,
                port=fields.integer("Port", PORTS, zero_is_unset=True) or VxlanBackend().port,
                gbp=fields.boolean("GBP", default=False),
                learning=fields.boolean("Learning", default=False),
                direct_routing=fields.boolean("DirectRouting", default=False),
                mtu=fields.integer("MTU", UNDERLAY_MTUS, zero_is_unset=True),
                userspace=fields.boolean("Userspace", default=False),
                fallback=fields.choice("Fallback", {choice.value: choice for choice in Fallback})
                or VxlanBackend().fallback,
                log_level=_log_level(fields),
                datapath=_datapath_keys(fields),
            )
        case "host-gw":
            return HostGwBackend(_log_level(fields))
        case _:
            return AllocBackend(_log_level(fields))


def _log_level(fields: _Fields) -> LogLevel | None:
    return fields.choice("LogLevel", {level.name.lower(): level for level in LogLevel})


def _datapath_keys(fields: _Fields) -> DatapathKeys:
    return DatapathKeys(
        workers=fields.integer("Workers", WORKERS),
        source_check=fields.choice("SourceCheck", {choice.value: choice for choice in SourceCheck})
        or DatapathKeys().source_check,
        offload=ALL_OFFLOADS & ~fields.offloads("OffloadDisabled"),
    )


def _not_built(kind: str) -> str:
    built = ", ".join(_BACKEND_KEYS)
    if kind in _FLANNEL_BACKENDS:
        return f"backend type {kind} is flannel's alone; built: {built}"
    if not kind:
        return f'unknown backend type: "" (name one, or leave Backend out to get udp); built: {built}'
    hint = did_you_mean(kind, (*_BACKEND_KEYS, *_FLANNEL_BACKENDS))
    return f"unknown backend type: {kind}{hint}" if hint else f"unknown backend type: {kind}; built: {built}"


@dataclass(frozen=True, slots=True)
class _Family:
    """flannel's numbers for one address family; `prefix` is what its keys begin with."""

    prefix: str
    bits: int
    longest_subnet: int
    usual_subnet: int
    smallest_network: int

    def text(self, address: int) -> str:
        return str(IPv4Address(address) if self.bits == 32 else IPv6Address(address))


_IPV4 = _Family("", 32, longest_subnet=30, usual_subnet=24, smallest_network=28)
_IPV6 = _Family("IPv6", 128, longest_subnet=126, usual_subnet=64, smallest_network=124)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One family's keys as given; None where the key is absent or unreadable."""

    network: IPv4Network | IPv6Network | None
    length: int | None
    first: IPv4Address | IPv6Address | None
    last: IPv4Address | IPv6Address | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """Subnets of `length` at the addresses `first`..`last`, both included."""

    first: int
    last: int
    length: int


def _plan(family: _Family, asked: _Asked, report: _Report) -> _Plan | None:
    """Defaults and checks of flannel's CheckNetworkConfig; None when Network or SubnetLen is no use."""
    network_key, len_key, min_key, max_key = (
        family.prefix + key for key in ("Network", "SubnetLen", "SubnetMin", "SubnetMax")
    )
    network = asked.network
    length = asked.length or 0
    if length > family.longest_subnet:
        report.problem(len_key, f"SubnetLen must be less than /{family.longest_subnet + 1}, not /{length}")
        return None
    if network is None:
        return None
    if length == 0 and network.prefixlen > family.smallest_network:
        report.problem(
            network_key,
            f"{'IPv6Network' if family.prefix else 'network'} is too small. "
            f"Minimum useful network prefix is /{family.smallest_network}, not /{network.prefixlen}",
        )
        return None
    if 0 < length < network.prefixlen + 2:
        report.problem(
            len_key,
            f"network must be able to accommodate at least four subnets: {network} takes "
            f"SubnetLen {network.prefixlen + 2} or more, not {length}",
        )
        return None
    length = length or max(family.usual_subnet, network.prefixlen + 2)

    size = 1 << (family.bits - length)
    base = int(network.network_address)
    # The first subnet is left out: its address is Network's own.  An address of all zeros is "not given".
    first = int(asked.first or 0) or base + size
    last = int(asked.last or 0) or base + network.num_addresses - size
    wrong = [
        (key, reason)
        for key, address in ((min_key, first), (max_key, last))
        if (reason := _misplaced(family, key, address, network, length))
    ]
    if not wrong and first > last:
        wrong = [(min_key, f"{family.text(first)} is above {max_key} {family.text(last)}, so no subnet is left")]
    for key, reason in wrong:
        report.problem(key, reason)
    return _Plan(first, last, length)


def _misplaced(family: _Family, key: str, address: int, network: IPv4Network | IPv6Network, length: int) -> str | None:
    """Why no subnet of `length` inside `network` begins at `address`."""
    base = int(network.network_address)
    if not base <= address < base + network.num_addresses:
        return f"{key} is not in the range of the {family.prefix}Network: {family.text(address)} in {network}"
    if address % (1 << (family.bits - length)):
        return f"{key} is not on a SubnetLen boundary: {family.text(address)} for /{length}"
    return None


def _check_usable(network: IPv4Network, plan: _Plan | None, report: _Report) -> None:
    """What flannel accepts and our datapath cannot carry."""
    for unusable, what in _UNUSABLE:
        if network.overlaps(unusable):
            report.problem("Network", f"{network} overlaps {unusable} ({what} addresses), which no host can route")
    if network.prefixlen < 8:
        report.problem("Network", f"{network} is wider than /8, the most that the datapath's direct index covers")
    if plan is not None and plan.length < 16:
        report.problem(
            "SubnetLen",
            f"/{plan.length} is shorter than /16, the largest subnet that the datapath's direct index takes",
        )

"""The network configuration (net-conf.json).  Pure: text in, a frozen dataclass or ConfigError out.

The file is flannel's; go_json.py has the rules by which it is read.  Defaults and checks are those of flannel's
pkg/subnet/config.go (CheckNetworkConfig) with its wording.  On top of them we refuse what flannel lets pass and then
loses packets with.  All problems of a file are reported together.

The keys inside `Backend` are each backend's own (backends/): `parse` is given a dataclass of keys for each Type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range
from typing import ClassVar, Generic, TypeVar

from udptun.config.go_json import JsonFields, JsonObject, Report, boolean, choice, integer, key, keys_of, read_keys
from udptun.core.errors import did_you_mean
from udptun.core.family import Family
from udptun.core.ip_text import ip_address

_DEFAULT_BACKEND = "udp"
"""flannel's, when there is no `Backend` (parseBackendType)."""

_FLANNEL_BACKENDS = ("ipip", "ipsec", "wireguard", "extension", "tencent-vpc", "ali-vpc", "aws-vpc", "gce")

_UNUSABLE = (
    (IPv4Network("0.0.0.0/8"), "this-network"),
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved"),
)
"""Ranges whose addresses the datapath drops as martian (docs/wire-format.md); no Network may touch them."""

_UNUSABLE_IPV6 = (
    (IPv6Network("::/96"), "loopback and IPv4-compatible"),
    (IPv6Network("::ffff:0:0/96"), "IPv4-mapped"),
    (IPv6Network("fe80::/10"), "link-local"),
    (IPv6Network("ff00::/8"), "multicast"),
)
"""The same of IPv6.  They are so few of its addresses that an IPv6Network may touch them where its subnets do not."""


class LogLevel(Enum):
    """How much the daemon says; the values are those of the `logging` module."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendKeys:
    """What `Backend` says; the class of each Type adds its own keys.  `log_level` None: the -v flag decides."""

    type: ClassVar[str]
    log_level: LogLevel | None = key(
        "LogLevel", choice({level.name.lower(): level for level in LogLevel}), None, is_live=True
    )


NetworkT = TypeVar("NetworkT", IPv4Network, IPv6Network)
AddressT = TypeVar("AddressT", IPv4Address, IPv6Address)


@dataclass(frozen=True, slots=True)
class SubnetPool(Generic[NetworkT, AddressT]):
    """The subnets of one address family that hosts may lease.

    They are those of `subnet_len` whose address lies in `subnet_min`..`subnet_max`, both included.
    """

    network: NetworkT
    subnet_min: AddressT
    subnet_max: AddressT
    subnet_len: int

    @property
    def subnet_size(self) -> int:
        """Addresses in one of them."""
        return 1 << (self.network.max_prefixlen - self.subnet_len)

    @property
    def leasable(self) -> tuple[NetworkT, ...]:
        """The addresses of all of them, as the fewest prefixes."""
        found = summarize_address_range(self.subnet_min, self.subnet_max + (self.subnet_size - 1))
        return tuple(type(self.network)((int(it.network_address), it.prefixlen)) for it in found)


@dataclass(frozen=True, slots=True)
class NetConf:
    """A valid configuration, defaults filled in.

    `ipv4` or `ipv6` None: that family is not enabled; one of them always is.  `notes` are lines worth a warning: keys
    that were ignored, and what they were perhaps meant to be.
    """

    enable_nftables: bool
    ipv4: SubnetPool[IPv4Network, IPv4Address] | None
    ipv6: SubnetPool[IPv6Network, IPv6Address] | None
    backend: BackendKeys
    notes: tuple[str, ...] = ()

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """That of the first family."""
        return self.pool(self.families[0]).network

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that are enabled, IPv4 first."""
        pools = ((Family.IPV4, self.ipv4), (Family.IPV6, self.ipv6))
        return tuple(family for family, pool in pools if pool is not None)

    def pool(self, family: Family) -> SubnetPool[IPv4Network, IPv4Address] | SubnetPool[IPv6Network, IPv6Address]:
        """That of a family which is enabled."""
        pool = self.ipv4 if family is Family.IPV4 else self.ipv6
        assert pool is not None, f"{family} is not enabled"
        return pool


def parse(text: str, source: str, kinds: Mapping[str, type[BackendKeys]]) -> NetConf:
    """The configuration that `text` holds; `kinds` has the keys of each Type of `Backend` there is.

    `source` names the text in every message (a path, an etcd key).  Raises ConfigError with one line per problem,
    each naming `source`, the key and the reason.
    """
    report = Report(source)
    top = JsonFields.of_text(text, _TOP_KEYS, report)
    top.note_unknown(_TOP_KEYS)
    enable_ipv4 = top.get("EnableIPv4", boolean, True)
    enable_ipv6 = top.get("EnableIPv6", boolean, False)
    enable_nftables = top.get("EnableNFTables", boolean, False)
    asked_ipv4, asked_ipv6 = _IPV4.read(top), _IPV6.read(top)
    backend = _read_backend(top, kinds, report)

    if not enable_ipv4 and not enable_ipv6:
        report.problem("EnableIPv4", "none defined stack: set EnableIPv4 or EnableIPv6 to true")
    for enabled, name in ((enable_ipv4, _IPV4.key("Network")), (enable_ipv6, _IPV6.key("Network"))):
        if enabled and top.raw(name) is None:
            report.problem(name, f"please define a correct {name} parameter in the flannel config")
    ipv4 = _pool(_IPV4, asked_ipv4, report) if enable_ipv4 else None
    ipv6 = _pool(_IPV6, asked_ipv6, report) if enable_ipv6 else None
    if enable_ipv4 and asked_ipv4.network is not None:
        _check_usable(asked_ipv4.network, ipv4, report)
    if ipv6 is not None:
        _check_usable_ipv6(ipv6, report)
    for enabled, family in ((enable_ipv4, _IPV4), (enable_ipv6, _IPV6)):
        if not enabled:
            _note_unused(family, top, report)
    report.raise_problems()
    # No problem was reported, so what follows is there.
    assert backend is not None
    return NetConf(enable_nftables, ipv4, ipv6, backend, tuple(report.notes))


def keys_given(text: str) -> frozenset[str]:
    """The keys that `text`, a valid configuration, gives a value: their names, as `backend.mtu`, casefolded."""
    top = JsonFields.of_text(text, _TOP_KEYS, Report(""))
    given = [name for name in top.names() if top.raw(name) is not None]
    backend = top.raw("Backend")
    if isinstance(backend, JsonObject):
        given += [f"Backend.{name}" for name, value in backend.pairs if value is not None]
    return frozenset(map(str.casefold, given))


def keys_that_need_a_restart(old: NetConf, new: NetConf) -> list[str]:
    """The keys of net-conf.json that differ and that cannot change while packets flow."""
    was, is_now = values_of(old), values_of(new)
    changed = [name for name in _TOP_KEYS if name in was and was[name] != is_now[name]]
    if type(old.backend) is not type(new.backend):
        return [*changed, "Backend.Type"]
    return changed + [
        f"Backend.{it.name}"
        for field_name, it in keys_of(old.backend).items()
        if not it.is_live and getattr(old.backend, field_name) != getattr(new.backend, field_name)
    ]


def replace_live_keys(old: BackendKeys, new: BackendKeys) -> BackendKeys:
    """`old` with those keys of `new` that can change while packets flow; `old` when they are of different types."""
    if type(old) is not type(new):
        return old
    live = [field_name for field_name, it in keys_of(old).items() if it.is_live]
    return replace(old, **{field_name: getattr(new, field_name) for field_name in live})


# -------------------------------------------------------------------------------------------------- address families


@dataclass(frozen=True, slots=True)
class _Asked(Generic[NetworkT, AddressT]):
    """One family's keys as given; None where the key is absent or unreadable."""

    network: NetworkT | None
    subnet_min: AddressT | None
    subnet_max: AddressT | None
    subnet_len: int | None


@dataclass(frozen=True, slots=True)
class _Family(Generic[NetworkT, AddressT]):
    """flannel's numbers for one address family; `prefix` is what its keys begin with.

    The lengths are prefix lengths.  `sample_network` and `sample_address` show in messages what a value must look like.
    """

    name: str
    prefix: str
    network_type: type[NetworkT]
    address_type: type[AddressT]
    longest_subnet: int
    usual_subnet: int
    smallest_network: int
    sample_network: str
    sample_address: str

    def key(self, name: str) -> str:
        """`Network`, `SubnetMin`, ... as this family's key is called."""
        return self.prefix + name

    def read(self, top: JsonFields) -> _Asked[NetworkT, AddressT]:
        return _Asked(
            top.get(self.key("Network"), self._read_network, None),
            top.get(self.key("SubnetMin"), self._read_address, None),
            top.get(self.key("SubnetMax"), self._read_address, None),
            top.get(self.key("SubnetLen"), integer(zero_is_unset=True), None),
        )

    def _read_network(self, value: object) -> NetworkT:
        # Only address/length: Python alone would also take a netmask, or no length at all.
        if isinstance(value, str) and re.fullmatch(r"[0-9A-Fa-f:.]+/[0-9]{1,3}", value):
            try:
                return self.network_type(value, strict=False)
            except ValueError:
                pass
        raise ValueError(f"invalid {self.name} CIDR format: must be like {self.sample_network}")

    def _read_address(self, value: object) -> AddressT:
        try:
            if isinstance(value, str) and isinstance(found := ip_address(value), self.address_type):
                return found
        except ValueError:
            pass
        raise ValueError(f"must be an {self.name} address like {self.sample_address}")


_IPV4 = _Family("IPv4", "", IPv4Network, IPv4Address, 30, 24, 28, "10.244.0.0/16", "10.244.1.0")
_IPV6 = _Family("IPv6", "IPv6", IPv6Network, IPv6Address, 126, 64, 124, "fd00:244::/48", "fd00:244:0:1::")

_TOP_KEYS = (
    *("EnableIPv4", "EnableIPv6", "EnableNFTables"),
    *(it.key(name) for it in (_IPV4, _IPV6) for name in ("Network", "SubnetMin", "SubnetMax", "SubnetLen")),
    "Backend",
)


def values_of(conf: NetConf) -> dict[str, object]:
    """The values in force by the names of their keys, but for `Backend`; None: of a family that is not enabled."""
    values: dict[str, object] = {
        "EnableIPv4": conf.ipv4 is not None,
        "EnableIPv6": conf.ipv6 is not None,
        "EnableNFTables": conf.enable_nftables,
    }
    for family, pool in ((_IPV4, conf.ipv4), (_IPV6, conf.ipv6)):
        values |= {
            family.key("Network"): None if pool is None else pool.network,
            family.key("SubnetMin"): None if pool is None else pool.subnet_min,
            family.key("SubnetMax"): None if pool is None else pool.subnet_max,
            family.key("SubnetLen"): None if pool is None else pool.subnet_len,
        }
    return values


def _note_unused(
    family: _Family[IPv4Network, IPv4Address] | _Family[IPv6Network, IPv6Address], top: JsonFields, report: Report
) -> None:
    """Leave a note about the keys of a family that is not enabled."""
    names = [name for it in ("Network", "SubnetMin", "SubnetMax", "SubnetLen") if top.has(name := family.key(it))]
    if names:
        report.note(f"{', '.join(names)}: not used without Enable{family.name}; set that to true, or leave this out")


def _pool(
    family: _Family[NetworkT, AddressT], asked: _Asked[NetworkT, AddressT], report: Report
) -> SubnetPool[NetworkT, AddressT] | None:
    """Defaults and checks of flannel's CheckNetworkConfig; None when Network or SubnetLen is no use."""
    network, length = asked.network, _subnet_len(family, asked, report)
    if network is None or length is None:
        return None
    size = 1 << (network.max_prefixlen - length)
    base = int(network.network_address)
    # The first subnet is left out: its address is Network's own.  An address of all zeros is "not given".
    first = family.address_type(int(asked.subnet_min or 0) or base + size)
    last = family.address_type(int(asked.subnet_max or 0) or base + network.num_addresses - size)
    min_key, max_key = family.key("SubnetMin"), family.key("SubnetMax")
    wrong = False
    for name, address in ((min_key, first), (max_key, last)):
        if not base <= int(address) < base + network.num_addresses:
            report.problem(name, f"{name} is not in the range of the {family.prefix}Network: {address} in {network}")
            wrong = True
        elif int(address) % size:
            report.problem(name, f"{name} is not on a SubnetLen boundary: {address} for /{length}")
            wrong = True
    if not wrong and int(first) > int(last):
        report.problem(min_key, f"{first} is above {max_key} {last}, so no subnet is left")
    return SubnetPool(network, first, last, length)


def _subnet_len(family: _Family[NetworkT, AddressT], asked: _Asked[NetworkT, AddressT], report: Report) -> int | None:
    """The length of the subnets in `asked.network`; None when the two don't fit, or there is no network."""
    network = asked.network
    network_key, len_key = family.key("Network"), family.key("SubnetLen")
    length = asked.subnet_len or 0
    if length > family.longest_subnet:
        report.problem(len_key, f"SubnetLen must be less than /{family.longest_subnet + 1}, not /{length}")
        return None
    if network is None:
        return None
    if length == 0 and network.prefixlen > family.smallest_network:
        report.problem(
            network_key,
            f"{network_key if family.prefix else 'network'} is too small. "
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
    return length or max(family.usual_subnet, network.prefixlen + 2)


def _check_usable(network: IPv4Network, pool: SubnetPool[IPv4Network, IPv4Address] | None, report: Report) -> None:
    """Report what flannel accepts and our datapath cannot carry."""
    for unusable, what in _UNUSABLE:
        if network.overlaps(unusable):
            report.problem("Network", f"{network} overlaps {unusable} ({what} addresses), which no host can route")
    if network.prefixlen < 8:
        report.problem("Network", f"{network} is wider than /8, the most that the datapath's direct index covers")
    if pool is not None and pool.subnet_len < 16:
        report.problem(
            "SubnetLen",
            f"/{pool.subnet_len} is shorter than /16, the largest subnet that the datapath's direct index takes",
        )


def _check_usable_ipv6(pool: SubnetPool[IPv6Network, IPv6Address], report: Report) -> None:
    """Report a range of subnets whose addresses are all of a kind that no host routes."""
    for unusable, what in _UNUSABLE_IPV6:
        if pool.subnet_min in unusable and pool.subnet_max + (pool.subnet_size - 1) in unusable:
            report.problem("IPv6Network", f"{pool.network}: {what} addresses ({unusable}), which no host can route")


# ----------------------------------------------------------------------------------------------------------- Backend


def _read_backend(top: JsonFields, kinds: Mapping[str, type[BackendKeys]], report: Report) -> BackendKeys | None:
    """`Backend`: udp when it is absent; present, it must name a Type (flannel, parseBackendType).

    None when no problem with a key can be looked for, because another was reported.
    """
    if not top.has("Backend"):
        return kinds[_DEFAULT_BACKEND]()
    value = top.raw("Backend")
    if value is None:
        value = JsonObject(())  # flannel: null names the empty type, as {} does
    if not isinstance(value, JsonObject):
        top.wrong("Backend", "error decoding Backend property of config: must be an object")
        return None
    every_key = dict.fromkeys(("Type", *(it.name for kind in kinds.values() for it in keys_of(kind).values())))
    fields = JsonFields(value, tuple(every_key), "Backend.", report)
    name = fields.raw("Type")
    if name is not None and not isinstance(name, str):
        fields.wrong("Type", "error decoding Backend property of config: must be a string")
        return None
    kind = kinds.get("" if name is None else name.lower())
    if kind is None:
        report.problem("Backend.Type", _not_built("" if name is None else name.lower(), tuple(kinds)))
        return None
    own = [it.name for it in keys_of(kind).values()]
    for key_name in fields.names():
        others = [it.type for it in kinds.values() if key_name in [key.name for key in keys_of(it).values()]]
        if others and key_name not in own:
            report.note(f"Backend.{key_name}: is for Type {', '.join(others)}; Type {kind.type} ignores it")
    fields.note_unknown(tuple(every_key))
    return read_keys(kind, fields)


def _not_built(name: str, kinds: Sequence[str]) -> str:
    built = f"built: {', '.join(kinds)}"
    if name in _FLANNEL_BACKENDS:
        return f"backend type {name} is flannel's alone; {built}"
    if not name:
        return f'unknown backend type: "" (name one, or leave Backend out to get udp); {built}'
    return f"unknown backend type: {name}{did_you_mean(name, (*kinds, *_FLANNEL_BACKENDS)) or f'; {built}'}"

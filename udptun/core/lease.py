"""Leases and their text forms.  Pure: no I/O, no clock.

A lease says that one host owns one subnet of the overlay network until it expires.  The text forms here are
flannel's: the key of a lease (`10.244.3.0-24`, with `&<v6>-<len>` appended in dual stack) and its JSON value
(`{"PublicIP":…,"PublicIPv6":…,"BackendType":…,"BackendData":…}`), in flannel's field order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Protocol

from udptun.core.errors import one_line
from udptun.core.family import Family
from udptun.core.ip_text import ipv6_address
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.text_cache import TextCache

Json = Any
"""A value as `json.loads` returns it; BackendData belongs to the backend that wrote it."""


_REMEMBERED_BYTES = 16 << 20
"""So many bytes of text are not parsed again, those of 60,000 leases.  A start reads every lease twice, to choose a
subnet and to follow, and a watch that lost its place reads them all once more.  One text gives one object, and an
object equals itself without a look inside.
"""


_DEEPEST = 100
"""Arrays and objects within one another in what others have written.  What can be read must be good to write, to
compare and to copy, and each of these ends at some depth, which nobody else's lease may choose."""


class LeaseFormatError(ValueError):
    """A lease key or value that is not flannel's form; the text says in one line what is wrong with it."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


def load_json(text: str) -> Json:
    """The JSON value that another host has written.  Raises ValueError for what Go's encoding/json would not read.

    Python alone takes NaN and Infinity, and makes Infinity of a number that is too large.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(_TOO_DEEP)
    return value


_TOO_DEEP = f"more than {_DEEPEST} arrays and objects within one another"


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _depth(value: Json) -> int:
    depth, level = 0, [value]
    while level := [it for it in level if isinstance(it, (dict, list))]:
        depth += 1
        level = [inner for it in level for inner in (it.values() if isinstance(it, dict) else it)]
    return depth


@dataclass(frozen=True, slots=True)
class Subnets:
    """The prefix or, in dual stack, the pair of prefixes that one lease covers.  One of the two is there always.

    `key` is flannel's: `10.244.3.0-24`, in dual stack `10.244.3.0-24&fd00:1::-64`.  It has none for IPv6 alone; ours is
    `fd00:1::-64`.
    """

    ipv4: IPv4Network | None
    ipv6: IPv6Network | None = None
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Made once: the table asks for it several times for each of thousands of leases.
        key = "" if self.ipv4 is None else f"{self.ipv4.network_address}-{self.ipv4.prefixlen}"
        if self.ipv6 is not None:
            key = f"{key}{'&' if key else ''}{self.ipv6.network_address}-{self.ipv6.prefixlen}"
        object.__setattr__(self, "key", key)

    def __str__(self) -> str:
        """All of it, for the log: `10.244.3.0/24,fd00:1::/64`."""
        return ",".join(map(str, filter(None, (self.ipv4, self.ipv6))))

    @property
    def first(self) -> IPNetwork:
        """That of IPv4, without one that of IPv6: what people call the lease by."""
        first = self.ipv4 or self.ipv6
        assert first is not None, "a lease has a subnet of one family at least"
        return first

    def overlap(self, other: Subnets) -> bool:
        """Whether any address is in both."""
        return any(
            ours is not None and theirs is not None and overlap(ours, theirs)
            for ours, theirs in ((self.ipv4, other.ipv4), (self.ipv6, other.ipv6))
        )

    def of(self, family: Family) -> IPNetwork | None:
        """The prefix of that family; None when the lease has none."""
        return self.ipv4 if family is Family.IPV4 else self.ipv6

    @classmethod
    def from_key(cls, key: str) -> Subnets:
        """The inverse of `key`.  Raises LeaseFormatError for all else, as host bits or another form of an address."""
        return _SUBNETS.get(key, cls._parse)

    @classmethod
    def _parse(cls, key: str) -> Subnets:
        match = _KEY.fullmatch(key)
        if match is None:
            raise LeaseFormatError(
                f"{key!r} is not of the form <IPv4>-<length>, <IPv6>-<length> or <IPv4>-<length>&<IPv6>-<length>"
            )
        v4, v4_len, v6, v6_len, alone, alone_len = match.groups()
        v6, v6_len = v6 or alone, v6_len or alone_len
        try:
            subnets = cls(
                None if v4 is None else IPv4Network((v4, int(v4_len))),
                None if v6 is None else IPv6Network((v6, int(v6_len))),
            )
        except ValueError as exc:
            raise LeaseFormatError(f"{key!r}: {exc}") from exc
        if subnets.key != key:
            # Under two keys it would be two leases to the store, and one to everybody else.
            raise LeaseFormatError(f"{key!r} is written {subnets.key!r}")
        return subnets


_SUBNETS = TextCache[Subnets](_REMEMBERED_BYTES)

_IPV6_KEY = r"([0-9a-f:]+)-(0|[1-9]\d{0,2})"
_KEY = re.compile(rf"(\d+\.\d+\.\d+\.\d+)-(0|[1-9]\d?)(?:&{_IPV6_KEY})?|{_IPV6_KEY}")

NO_ADDRESS = IPv4Address(0)


class HostAddresses(Protocol):
    """By what a host is known among others: an address of one family at least."""

    @property
    def public_ip(self) -> IPv4Address | None: ...

    @property
    def public_ipv6(self) -> IPv6Address | None: ...


def host_address(host: HostAddresses) -> IPAddress:
    """PublicIP, without one PublicIPv6: what the host is called by."""
    address = host.public_ip or host.public_ipv6
    assert address is not None, "a host names an address of one family at least"
    return address


def is_same_host(a: HostAddresses, b: HostAddresses) -> bool:
    """Whether both are at one address: by PublicIP where both have one, else by PublicIPv6."""
    if a.public_ip is not None and b.public_ip is not None:
        return a.public_ip == b.public_ip
    return a.public_ipv6 is not None and a.public_ipv6 == b.public_ipv6


@dataclass(frozen=True, slots=True)
class LeaseAttrs:
    """What a host says about itself in its lease.  It names an address of one family at least.

    A PublicIP of 0.0.0.0 beside a PublicIPv6 is flannel's for none.
    """

    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: Json = None
    backend_v6_data: Json = None

    def __post_init__(self) -> None:
        if self.public_ipv6 is not None and self.public_ip == NO_ADDRESS:
            object.__setattr__(self, "public_ip", None)

    @property
    def is_udptun(self) -> bool:
        """Whether udptun wrote the lease (flannel never sets the key)."""
        return isinstance(self.backend_data, Mapping) and "Udptun" in self.backend_data

    @property
    def node_id(self) -> str | None:
        """The writer's NodeID; None in a lease that flannel wrote."""
        value = self.backend_data.get("NodeID") if isinstance(self.backend_data, Mapping) else None
        return value if isinstance(value, str) else None

    @property
    def takes_any_source_port(self) -> bool:
        """Whether datagrams reach the host whatever port they come from; flannel and NATs may want the usual one."""
        return isinstance(self.backend_data, Mapping) and self.backend_data.get("AnySourcePort") is True

    @property
    def carries_ecn(self) -> bool:
        """Whether the host carries on the marks of congestion that datagrams to it get on the way (RFC 6040)."""
        return isinstance(self.backend_data, Mapping) and self.backend_data.get("ECN") is True

    @property
    def takes_shortcut(self) -> bool:
        """Whether the host's kernel takes what another one's has encapsulated (docs/shortcut.md)."""
        return isinstance(self.backend_data, Mapping) and self.backend_data.get("Shortcut") is True

    @property
    def host_address(self) -> IPAddress:
        """See the function."""
        return host_address(self)

    @property
    def carries_ipv6(self) -> bool:
        """Whether the host takes IPv6 packets in datagrams of Type udp, which flannel's udp drops."""
        return isinstance(self.backend_data, Mapping) and self.backend_data.get("IPv6") is True

    def address(self, family: Family) -> IPAddress | None:
        """PublicIP or PublicIPv6; None when the host has named none."""
        return self.public_ip if family is Family.IPV4 else self.public_ipv6

    def data(self, family: Family) -> Json:
        """What the backend says for that family: BackendData or BackendV6Data."""
        return self.backend_data if family is Family.IPV4 else self.backend_v6_data

    def port(self, default: int) -> int:
        """The UDP port the host listens on; `default` where the lease names none, as flannel's never do."""
        value = self.backend_data.get("Port") if isinstance(self.backend_data, Mapping) else None
        # True is an int to Python, and 1.
        return value if type(value) is int and 0 < value < 65536 else default

    def to_json(self) -> str:
        """flannel's lease value: its field order, `PublicIPv6` always there, the backend's fields only when set.

        Without a PublicIP it is 0.0.0.0, which is flannel's.
        """
        fields: dict[str, Json] = {
            "PublicIP": str(self.public_ip or NO_ADDRESS),
            "PublicIPv6": None if self.public_ipv6 is None else str(self.public_ipv6),
        }
        if self.backend_type:
            fields["BackendType"] = self.backend_type
        if self.backend_data is not None:
            fields["BackendData"] = self.backend_data
        if self.backend_v6_data is not None:
            fields["BackendV6Data"] = self.backend_v6_data
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LeaseAttrs:
        """The inverse of `to_json`; unknown fields are ignored.  Raises LeaseFormatError."""
        return _ATTRS.get(text, cls._parse)

    @classmethod
    def _parse(cls, text: str) -> LeaseAttrs:
        try:
            value = load_json(text)
        except ValueError as exc:
            raise LeaseFormatError(f"not JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise LeaseFormatError(f"a lease is a JSON object, not {type(value).__name__}")
        try:
            v4, v6 = value.get("PublicIP"), value.get("PublicIPv6")
            public_ipv6 = None if v6 is None else ipv6_address(_text(value, "PublicIPv6"))
            may_lack = v4 is None and public_ipv6 is not None
            public_ip = None if may_lack else IPv4Address(_text(value, "PublicIP"))
        except ValueError as exc:
            raise LeaseFormatError(str(exc)) from exc
        backend_type = value.get("BackendType", "")
        if not isinstance(backend_type, str):
            raise LeaseFormatError("BackendType is not a string")
        return cls(public_ip, public_ipv6, backend_type, value.get("BackendData"), value.get("BackendV6Data"))


_ATTRS = TextCache[LeaseAttrs](_REMEMBERED_BYTES)


def _text(value: Mapping[str, Json], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise LeaseFormatError(f"{key} is missing or not a string")
    return text


@dataclass(frozen=True, slots=True)
class Lease:
    """One host's subnet.

    `expires_s` is Unix time in seconds; None never expires (a reservation, or a line of a leases file).
    `revision` is the store's revision that last wrote the lease, 0 where the store has none.  `node_name` is what the
    store calls the host, empty where it knows a host by its PublicIP or NodeID alone.
    """

    subnets: Subnets
    attrs: LeaseAttrs
    expires_s: float | None = None
    revision: int = 0
    node_name: str = ""

    @property
    def key(self) -> str:
        return self.subnets.key

    @property
    def subnet(self) -> IPNetwork:
        """See `Subnets.first`."""
        return self.subnets.first

    def subnet_of(self, family: Family) -> IPNetwork:
        """The subnet of a family of which the lease has one, as the peers of a table have."""
        subnet = self.subnets.of(family)
        assert subnet is not None
        return subnet

    def part(self, family: Family, outer: Family | None = None) -> LeasePart:
        """What it says of one family, which it has a subnet of.

        `outer`: see `validate`; None: the family itself.  The lease has an address of it, as a table's peers have.
        """
        public_ip = self.attrs.address(outer or family)
        assert public_ip is not None
        return LeasePart(self.subnet_of(family), public_ip, self.attrs.data(family))

    @property
    def is_reservation(self) -> bool:
        """Whether it never expires: an operator has made it, and only an operator deletes it."""
        return self.expires_s is None

    def is_expired(self, now_s: float) -> bool:
        return self.expires_s is not None and self.expires_s <= now_s


@dataclass(frozen=True, slots=True)
class LeasePart:
    """What a lease says of one address family.  `data` belongs to the backend that wrote it.

    `public_ip` is where its packets go, which need not be an address of that family.
    """

    subnet: IPNetwork
    public_ip: IPAddress
    data: Json


class EventType(Enum):
    ADDED = "added"
    """The lease is new, or its content changed: the event's lease replaces what was known under its key."""
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    """One change.  A removal carries the last known lease, so that consumers need not remember it."""

    type: EventType
    lease: Lease


def validate(
    lease: Lease,
    family: Family,
    network: IPNetwork,
    claimed: Collection[IPNetwork],
    outer: Family,
) -> str | None:
    """Why the part of a lease, our own or a peer's, that is of `family` cannot be used inside `network`; None: it can.

    The lease has a subnet of the family.  Its packets travel between addresses of the family `outer`.  A wrong address
    here would send pod traffic to loopback, to a multicast group or to nobody.  What goes to `claimed` prefixes goes
    into the tunnel, and so would the tunnel's own datagrams to such a host.
    """
    subnet, ip = lease.subnet_of(family), lease.attrs.address(outer)
    if not is_inside(subnet, network):
        return f"subnet {subnet} is outside {_NETWORK_KEY[family]} {network}"
    shortest, longest = _SUBNET_LENGTHS[family]
    if not shortest <= subnet.prefixlen <= longest:
        return f"prefix length {subnet.prefixlen} is outside {shortest}..{longest}"
    name = _PUBLIC_KEY[outer]
    if ip is None:
        return f"it has no {name}"
    if not _is_unicast(ip):
        return f"{name} {ip} is not a unicast address"
    if ip in network or outer is not family:
        for prefix in claimed:
            if ip in prefix:
                is_whole = prefix == network
                where = f"inside {_NETWORK_KEY[family]} {network}" if is_whole else f"in {prefix}, which is for pods"
                return f"{name} {ip} lies {where}"
        if ip in subnet:
            return f"{name} {ip} lies inside the lease's own subnet"
    return None


_NETWORK_KEY = {Family.IPV4: "Network", Family.IPV6: "IPv6Network"}
_PUBLIC_KEY = {Family.IPV4: "PublicIP", Family.IPV6: "PublicIPv6"}
_SUBNET_LENGTHS = {Family.IPV4: (16, 30), Family.IPV6: (1, 126)}
"""The shortest and the longest prefix of a host: the datapath's index takes no shorter one of IPv4."""


def _is_unicast(ip: IPAddress) -> bool:
    """Whether it can be a host's address on a network.  A link-local IPv6 address says nothing without its link."""
    if isinstance(ip, IPv4Address):
        return int(ip) >> 24 not in (0, 127) and int(ip) >> 29 != 0b111
    return not (ip.is_unspecified or ip.is_loopback or ip.is_multicast or ip.is_link_local or ip.ipv4_mapped)


def is_inside(subnet: IPNetwork, network: IPNetwork) -> bool:
    """The same as `subnet.subnet_of(network)`, which takes 11 µs: for a full table that is most of a second.

    Networks of different families are not inside each other.
    """
    return subnet.prefixlen >= network.prefixlen and overlap(subnet, network)


def overlap(a: IPNetwork, b: IPNetwork) -> bool:
    """The same as `a.overlaps(b)`, which makes an object for both ends of each; False for different families."""
    if a.version != b.version:
        return False
    shorter = min(a.prefixlen, b.prefixlen)
    return (int(a.network_address) ^ int(b.network_address)) >> (a.max_prefixlen - shorter) == 0

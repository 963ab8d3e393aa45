"""The rules of nf_tables as values: expressions load registers, compare them and give a verdict.  Pure.

What a register holds is in the byte order of the rule's comparison: of the network for addresses, of the host for
marks, states and the indexes of links.
"""

from __future__ import annotations

import operator
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from udptun.core.family import Family
from udptun.firewall.obstacles.nft_messages import (
    SetContents,
    expressions,
    handle_of,
    number_of,
    text_of,
    value_of,
    verdict_of,
)
from udptun.firewall.obstacles.ruleset import (
    ALL,
    AddressIn,
    Condition,
    Field,
    LinkIs,
    MarkIs,
    Other,
    Ranges,
    Rule,
    Side,
    State,
    Traffic,
    Verdict,
    agreed,
    difference,
)
from udptun.firewall.obstacles.xtables import (
    MARKING_TARGETS,
    address_condition,
    match_condition,
    target_verdict,
)
from udptun.firewall.rules import NFPROTO
from udptun.kernel.rtnetlink import attributes


def decode_rules(
    bodies: Iterable[bytes],
    sets: Mapping[str, SetContents],
    link_names: Mapping[int, str],
    traffic: Traffic,
    *,
    is_iptables: bool,
) -> list[Rule]:
    """The rules of one chain, in order, as that traffic meets them.

    A verdict map makes a rule of each of its elements.

    `sets` has the sets that `set_names` asks for; one that is missing is not known.  `link_names`: of the links that
    matter, by index.
    """
    rules: list[Rule] = []
    for place, body in enumerate(bodies, 1):
        rules += _RuleReader(sets, link_names, traffic).read(body, place if is_iptables else handle_of(body))
    return rules


def set_names(bodies: Iterable[bytes]) -> set[str]:
    """The names of the sets that these rules look something up in."""
    return {text_of(found[1]) for body in bodies for name, found in expressions(body) if name == "lookup"}


@dataclass(frozen=True, slots=True)
class _AddressLoad:
    """The first `n` bytes of an address, under a mask."""

    field: Field
    n: int
    family: Family
    mask: int

    @property
    def size(self) -> int:
        """Bytes of the whole address."""
        return self.family.bits // 8

    @property
    def is_whole(self) -> bool:
        return self.n == self.size and self.mask == self.family.all_ones

    def number(self, raw: bytes) -> int:
        """The number of an address of which the first bytes are given."""
        return int.from_bytes(raw[: self.size].ljust(self.size, b"\0"))


@dataclass(frozen=True, slots=True)
class _LinkLoad:
    """The name of a link, 16 bytes with zeros at the end, or its index."""

    side: Side
    is_index: bool


@dataclass(frozen=True, slots=True)
class _MarkLoad:
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _ValueLoad:
    """Something that is the same in all our packets, or is one of a few values of one length."""

    values: tuple[bytes, ...]

    @property
    def size(self) -> int:
        return len(self.values[0])


_Load = _AddressLoad | _LinkLoad | _MarkLoad | _ValueLoad | None
"""None: something that we cannot judge."""

_META_LOADS: Mapping[int, _Load] = {
    3: _MarkLoad(),
    4: _LinkLoad(Side.IN, is_index=True),
    5: _LinkLoad(Side.OUT, is_index=True),
    6: _LinkLoad(Side.IN, is_index=False),
    7: _LinkLoad(Side.OUT, is_index=False),
}
_META_MARK, _META_PROTOCOL, _META_NFPROTO, _META_L4PROTO = 3, 1, 15, 16
_ETHER_TYPES = {Family.IPV4: b"\x08\x00", Family.IPV6: b"\x86\xdd"}
_CT_STATE, _CT_DIRECTION, _CT_STATUS = 0, 1, 2
_ADDRESSES_AT = {Family.IPV4: (12, 16), Family.IPV6: (8, 24)}
"""Source and destination in the header."""
_PROTOCOL_AT = {Family.IPV4: 9, Family.IPV6: 6}
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
"""NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER."""
_DESTINATION_PORT_AT = (2, 2)
"""Place and length in the header of UDP."""
_EQUAL, _NOT_EQUAL, _LESS, _LESS_OR_EQUAL, _GREATER, _GREATER_OR_EQUAL = range(6)
_COMPARISONS = dict(enumerate((operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)))
"""Of registers as bytes, as the kernel does it (memcmp)."""
_PASSING = {"counter", "log", "notrack", "last", "dup", "flow_offload"}
"""Expressions that neither ask nor decide."""
_ASKING = {"limit", "quota", "connlimit", "objref", "dynset"}
"""Expressions that a packet may fail."""
_LOADING = {"byteorder", "exthdr", "fib", "hash", "inner", "numgen", "osf", "rt", "socket", "tunnel", "xfrm"}
"""Expressions that load what we cannot judge, or write it to the packet."""


class _RuleReader:
    """Reads the expressions of one rule, in order."""

    def __init__(self, sets: Mapping[str, SetContents], link_names: Mapping[int, str], traffic: Traffic) -> None:
        self._sets = sets
        self._link_names = link_names
        self._traffic = traffic
        self._registers: dict[int, _Load] = {}
        self._conditions: list[Condition] = []
        self._verdict, self._target, self._marks = Verdict.NONE, "", False
        self._map: list[tuple[tuple[Condition, ...], Verdict, str]] | None = None

    def read(self, body: bytes, number: int) -> list[Rule]:
        for name, found in expressions(body):
            self._take(name, found)
        rule = Rule(number, tuple(self._conditions), self._verdict, self._target, self._marks)
        if self._map is None:
            return [rule]
        return [
            replace(rule, conditions=rule.conditions + more, verdict=verdict, target=target)
            for more, verdict, target in self._map
        ]

    def _take(self, name: str, found: Mapping[int, bytes]) -> None:
        match name:
            case "immediate":
                self._take_immediate(found)
            case "payload" if 1 in found:
                self._load(found[1], _payload_load(found, self._traffic))
            case "payload":
                if _writes_addresses(found, self._traffic.family):
                    self._verdict = Verdict.UNKNOWN
            case "meta" if 1 in found:
                self._load(found[1], self._meta(number_of(found[2])))
            case "meta":
                self._marks |= number_of(found[2]) == _META_MARK
            case "ct" if 1 in found:
                # Attribute 3: an address or port of the connection.
                self._load(found[1], None if 3 in found else _ct_load(number_of(found[2]), self._traffic))
            case "ct":
                pass  # sets something of the connection
            case "bitwise":
                self._load(found[2], _masked(self._loaded(found[1]), found))
            case "cmp":
                self._ask(self._comparison(self._loaded(found[1]), number_of(found[2]), value_of(found[3])))
            case "range":
                self._ask(_range_condition(self._loaded(found[1]), found))
            case "lookup":
                self._take_lookup(found)
            case "match":
                self._ask(match_condition(text_of(found[1]), number_of(found.get(2)), found.get(3, b""), self._traffic))
            case "target":
                self._verdict = target_verdict(text_of(found[1]))
                self._marks |= text_of(found[1]) in MARKING_TARGETS
            case "reject":
                self._verdict = Verdict.REJECT
            case _ if name in _PASSING:
                pass
            case _ if name in _LOADING:
                self._registers.clear()
            case _:
                self._ask(Other.PERHAPS)
                if name not in _ASKING:
                    self._verdict = Verdict.UNKNOWN

    def _meta(self, key: int) -> _Load:
        family = self._traffic.family
        if key == _META_PROTOCOL:
            return _ValueLoad((_ETHER_TYPES[family],))
        if key == _META_NFPROTO:
            return _ValueLoad((bytes([NFPROTO[family]]),))
        return _protocol_load(self._traffic) if key == _META_L4PROTO else _META_LOADS.get(key)

    def _take_immediate(self, found: Mapping[int, bytes]) -> None:
        register = _register(found[1])
        if register == 0:
            self._verdict, self._target = verdict_of(dict(attributes(found[2], 0))[2])
        else:
            self._registers[register] = _ValueLoad((value_of(found[2]),))

    def _take_lookup(self, found: Mapping[int, bytes]) -> None:
        load, contents = self._loaded(found[2]), self._sets.get(text_of(found[1]))
        if 3 not in found:
            self._ask(self._membership(load, contents, is_not=bool(number_of(found.get(5)) & 1)))
        elif _register(found[3]) != 0:
            # A map of values: what is found there is compared later.
            self._load(found[3], None)
            self._ask(self._membership(load, contents, is_not=False))
        elif contents is None:
            self._ask(Other.PERHAPS)
            self._verdict = Verdict.UNKNOWN
        else:
            self._map = [
                (self._key_conditions(load, contents, key), verdict, target)
                for key, verdict, target in contents.verdicts
            ]

    def _load(self, register: bytes, load: _Load) -> None:
        self._registers[_register(register)] = load

    def _loaded(self, register: bytes) -> _Load:
        return self._registers.get(_register(register))

    def _ask(self, condition: Condition | None) -> None:
        """None: every packet of ours fits."""
        if condition is not None:
            self._conditions.append(condition)

    def _comparison(self, load: _Load, operation: int, data: bytes) -> Condition | None:
        is_not = operation == _NOT_EQUAL
        if isinstance(load, _AddressLoad):
            return _address_comparison(load, operation, data)
        if isinstance(load, _ValueLoad) and len(data) <= load.size:
            return agreed([_COMPARISONS[operation](value[: len(data)], data) for value in load.values])
        if operation not in (_EQUAL, _NOT_EQUAL):
            return Other.PERHAPS
        match load:
            case _LinkLoad():
                return LinkIs(load.side, frozenset({self._link_name(load, data)}), is_not)
            case _MarkLoad() if len(data) == 4:
                return MarkIs(_native(data), load.mask, is_not)
        return Other.PERHAPS

    def _link_name(self, load: _LinkLoad, data: bytes) -> str:
        if load.is_index:
            return self._link_names.get(_native(data), f"#{_native(data)}")
        # Without a zero at the end it is the beginning of a name.
        return text_of(data) if b"\0" in data else f"{text_of(data)}*"

    def _key_conditions(self, load: _Load, contents: SetContents, key: bytes) -> tuple[Condition, ...]:
        if contents.ranges is not None:
            return (Other.PERHAPS,)
        condition = self._membership(load, SetContents(contents.key_len, frozenset({key})), is_not=False)
        return () if condition is None else (condition,)

    def _membership(self, load: _Load, contents: SetContents | None, *, is_not: bool) -> Condition | None:
        """Whether what was loaded is in the set."""
        if contents is None:
            return Other.PERHAPS
        match load:
            case _AddressLoad() if load.is_whole and contents.key_len == load.size:
                ranges = contents.ranges
                if ranges is None:
                    ranges = tuple(sorted((int.from_bytes(key), int.from_bytes(key)) for key in contents.keys))
                return AddressIn(load.field, difference(ALL[load.family], ranges) if is_not else ranges)
            case _LinkLoad() if contents.ranges is None and contents.key_len == (4 if load.is_index else 16):
                return LinkIs(load.side, frozenset(self._link_name(load, key) for key in contents.keys), is_not)
            case _ValueLoad() if contents.key_len == load.size:
                return agreed([contents.has(value) is not is_not for value in load.values])
        return Other.PERHAPS


def _payload_load(found: Mapping[int, bytes], traffic: Traffic) -> _Load:
    base, offset, length = (number_of(found.get(key)) for key in (2, 3, 4))
    family, port = traffic.family, traffic.destination_port
    source_at, destination_at = _ADDRESSES_AT[family]
    if base == _TRANSPORT_HEADER and (offset, length) == _DESTINATION_PORT_AT and port is not None:
        return _ValueLoad((port.to_bytes(2),))
    if base == _NETWORK_HEADER and (offset, length) == (_PROTOCOL_AT[family], 1):
        return _protocol_load(traffic)
    if base == _NETWORK_HEADER and offset in (source_at, destination_at) and length <= destination_at - source_at:
        field = Field.SOURCE if offset == source_at else Field.DESTINATION
        return _AddressLoad(field, length, family, family.all_ones)
    return None


def _protocol_load(traffic: Traffic) -> _Load:
    return None if traffic.protocol is None else _ValueLoad((bytes([traffic.protocol]),))


def _ct_load(key: int, traffic: Traffic) -> _Load:
    if key == _CT_STATE:
        return _ValueLoad(tuple(struct.pack("=I", state) for state in sorted(traffic.states)))
    if State.ESTABLISHED in traffic.states:
        return None
    # A new connection goes in the original direction, and no NAT is known of it.
    return {_CT_DIRECTION: _ValueLoad((b"\0",)), _CT_STATUS: _ValueLoad((bytes(4),))}.get(key)


def _writes_addresses(found: Mapping[int, bytes], family: Family) -> bool:
    base, offset, length = (number_of(found.get(key)) for key in (2, 3, 4))
    source_at, destination_at = _ADDRESSES_AT[family]
    return base == _NETWORK_HEADER and offset < 2 * destination_at - source_at and offset + length > source_at


def _masked(load: _Load, found: Mapping[int, bytes]) -> _Load:
    if number_of(found.get(6)) or 4 not in found or 5 not in found:
        return None  # a shift, or an operation on two registers
    mask, xor = value_of(found[4]), value_of(found[5])
    if isinstance(load, _ValueLoad) and len(mask) == load.size:
        masked = (bytes(a & b ^ c for a, b, c in zip(value, mask, xor, strict=True)) for value in load.values)
        return _ValueLoad(tuple(masked))
    if any(xor):
        return None
    if isinstance(load, _AddressLoad):
        return replace(load, mask=load.mask & load.number(mask))
    if isinstance(load, _MarkLoad) and len(mask) == 4:
        return _MarkLoad(load.mask & _native(mask))
    return None


def _address_comparison(load: _AddressLoad, operation: int, data: bytes) -> Condition:
    value = load.number(data)
    if operation in (_EQUAL, _NOT_EQUAL):
        n_host_bits = 8 * (load.size - min(load.n, len(data)))
        mask = load.mask >> n_host_bits << n_host_bits
        return address_condition(load.field, value, mask, load.family, is_not=operation == _NOT_EQUAL)
    if not load.is_whole:
        return Other.PERHAPS
    low, high = {
        _LESS: (0, value - 1),
        _LESS_OR_EQUAL: (0, value),
        _GREATER: (value + 1, load.family.all_ones),
        _GREATER_OR_EQUAL: (value, load.family.all_ones),
    }[operation]
    return AddressIn(load.field, ((low, high),) if low <= high else ())


def _range_condition(load: _Load, found: Mapping[int, bytes]) -> Condition | None:
    if isinstance(load, _ValueLoad):
        first, last = (value_of(found[key]) for key in (3, 4))
        is_not = number_of(found.get(2)) == 1
        return agreed([(first <= value <= last) is not is_not for value in load.values])
    if not isinstance(load, _AddressLoad) or not load.is_whole:
        return Other.PERHAPS
    ranges: Ranges = ((load.number(value_of(found[3])), load.number(value_of(found[4]))),)
    return AddressIn(load.field, difference(ALL[load.family], ranges) if number_of(found.get(2)) == 1 else ranges)


def _register(number: bytes) -> int:
    """Where a register begins, in words of 4 bytes; 0 is the one for the verdict.

    The registers 1 to 4 have 16 bytes each, and those from 8 on are the same ones in pieces of 4 bytes.
    """
    n = number_of(number)
    return 8 + 4 * (n - 1) if 1 <= n <= 4 else n


def _native(raw: bytes) -> int:
    return int.from_bytes(raw, sys.byteorder)

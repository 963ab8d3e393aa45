"""What the extensions of iptables ask and do, and the tables of legacy iptables, out of the kernel's structures.  Pure.

An extension's structure is the same in legacy iptables and, inside an nftables rule, in iptables-nft
(include/uapi/linux/netfilter/xt_*.h).  The tables are those of linux/netfilter_ipv4/ip_tables.h and
linux/netfilter_ipv6/ip6_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from udptun.core.family import Family
from udptun.firewall.obstacles.ruleset import ALL as ALL_ADDRESSES
from udptun.firewall.obstacles.ruleset import (
    AddressIn,
    BaseChain,
    Condition,
    Field,
    LinkIs,
    MarkIs,
    Other,
    Ranges,
    Rule,
    Side,
    Tool,
    Traffic,
    Verdict,
    agreed,
    difference,
)

_CONNTRACK_MASKS = struct.Struct("=4H")
"""match_flags, invert_flags, state_mask and status_mask of struct xt_conntrack_mtinfo2 and 3."""
_CONNTRACK_MASKS_AT = 146
_CONNTRACK_STATE, _CONNTRACK_STATE_ALIAS = 1, 1 << 13
"""In match_flags.  The second one says that somebody wrote `-m state`."""
_MARK = struct.Struct("=IIB")
"""struct xt_mark_mtinfo1: mark, mask, invert."""
_U32 = struct.Struct("=I")
_UDP_PORTS = struct.Struct("=4HB")
"""struct xt_udp: first and last source port, first and last destination port, invflags."""
_INVERT_DESTINATION_PORT = 2
_ALL_PORTS = (0, 0xFFFF)
_MULTIPORT = struct.Struct("=2B15H15BB")
"""struct xt_multiport_v1: flags, count, ports, pflags, invert.  A port with a pflag begins a range that the next ends.
"""
_MULTIPORT_DESTINATION = 1

_PASSING_TARGETS = {
    *("LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "CT", "NOTRACK", "TCPMSS", "CLASSIFY", "DSCP", "TOS", "SET"),
    *("CHECKSUM", "TTL", "HL", "IDLETIMER", "LED"),
}
"""Targets after which the packet goes on to the next rule."""
MARKING_TARGETS = {"MARK", "CONNMARK"}
"""Targets after which the packet may have a mark, and goes on."""


def match_condition(name: str, revision: int, info: bytes, traffic: Traffic) -> Condition | None:
    """What the match asks of a packet; None when every packet of ours fits."""
    match name:
        case "comment":
            return None
        case "conntrack" if revision >= 2 and len(info) >= _CONNTRACK_MASKS_AT + _CONNTRACK_MASKS.size:
            asks, inverted, states, _ = _CONNTRACK_MASKS.unpack_from(info, _CONNTRACK_MASKS_AT)
            if asks & ~(_CONNTRACK_STATE | _CONNTRACK_STATE_ALIAS):
                return Other.PERHAPS
            is_not = bool(inverted & _CONNTRACK_STATE)
            return agreed([bool(states & state) is not is_not for state in traffic.states])
        case "state" if len(info) >= _U32.size:
            (states,) = _U32.unpack_from(info)
            return agreed([bool(states & state) for state in traffic.states])
        case "mark" if revision == 1 and len(info) >= _MARK.size:
            value, mask, is_not = _MARK.unpack_from(info)
            return MarkIs(value, mask, bool(is_not))
        case "udp" if traffic.destination_port is not None and len(info) >= _UDP_PORTS.size:
            *sources, first, last, inverted = _UDP_PORTS.unpack_from(info)
            if tuple(sources) != _ALL_PORTS:
                return Other.PERHAPS
            is_inside = first <= traffic.destination_port <= last
            return agreed([is_inside is not bool(inverted & _INVERT_DESTINATION_PORT)])
        case "multiport" if traffic.destination_port is not None and revision == 1 and len(info) >= _MULTIPORT.size:
            return _multiport_condition(info, traffic.destination_port)
    return Other.PERHAPS


def _multiport_condition(info: bytes, port: int) -> Condition | None:
    kind, count, *more, is_not = _MULTIPORT.unpack_from(info)
    if kind != _MULTIPORT_DESTINATION:
        return Other.PERHAPS
    ports, begins = more[:count], more[15 : 15 + count]
    lasts = [ports[i + 1] if begins[i] and i + 1 < count else it for i, it in enumerate(ports)]
    is_inside = any(first <= port <= last for first, last in zip(ports, lasts, strict=True))
    return agreed([is_inside is not bool(is_not)])


def target_verdict(name: str) -> Verdict:
    """What the target does with a packet, but for the built-in targets."""
    if name == "REJECT":
        return Verdict.REJECT
    return Verdict.NONE if name in _PASSING_TARGETS | MARKING_TARGETS else Verdict.UNKNOWN


# --- legacy tables

LEGACY_TABLES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""The tables in which packets can be dropped, with their priorities (enum nf_ip_hook_priorities)."""

_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
"""The built-in chains, by the number of their hook (NF_INET_PRE_ROUTING and so on)."""

INFO = struct.Struct("=32sI5I5III")
"""struct ipt_getinfo: name, valid_hooks, hook_entry, underflow, num_entries, size."""
ENTRIES_AT = 40
"""Where the entries begin in struct ipt_get_entries: after name, size and padding."""

_ENTRIES = {
    Family.IPV4: struct.Struct("=4s4s4s4s16s16s16s16sHBBIHHI16x"),
    Family.IPV6: struct.Struct("=16s16s16s16s16s16s16s16sHxBB3xIHHI4x16x"),
}
"""struct ipt_entry and ip6t_entry: source, destination, their masks, two names and their masks, protocol, flags,
inverted flags, nfcache, target_offset, next_offset, comefrom and two counters.  Addresses are in network byte order."""
_EXTENSION = struct.Struct("=H29sB")
"""struct xt_entry_match and xt_entry_target: size of all, name, revision."""
_VERDICT = struct.Struct("=i")
_GOTO_FLAGS = {Family.IPV4: 2, Family.IPV6: 4}
"""IPT_F_GOTO and IP6T_F_GOTO.  The other flags ask for more of the packet, but for IP6T_F_PROTO."""
_IPV6_PROTOCOL_FLAG = 1
_INVERT_IN, _INVERT_OUT, _INVERT_SOURCE, _INVERT_DESTINATION, _INVERT_PROTOCOL = 1, 2, 8, 0x10, 0x40
_INVERT_OTHERS = 0x24
_STANDARD_VERDICTS = {-1: Verdict.DROP, -2: Verdict.ACCEPT, -5: Verdict.RETURN}
"""-NF_DROP - 1, -NF_ACCEPT - 1, XT_RETURN.  Numbers from 0 on are the place of the chain to jump to."""


@dataclass(frozen=True, slots=True)
class _Entry:
    at: int
    next_at: int
    conditions: tuple[Condition, ...]
    target: str
    """Empty: the built-in target with `verdict`."""
    verdict: int
    is_goto: bool
    chain_begins: str
    """The name of the chain that begins behind this entry; empty: none does."""


def decode_legacy_table(table: str, info: bytes, entries: bytes, traffic: Traffic) -> list[BaseChain]:
    """The built-in chains of a table that this traffic passes, with the rules as it meets them.

    `info` is what IPT_SO_GET_INFO answers, `entries` what IPT_SO_GET_ENTRIES does, from its ENTRIES_AT on.
    """
    _, valid_hooks, *numbers, _n_entries, _size = INFO.unpack(info)
    begins = {numbers[hook]: name for hook, name in enumerate(_BUILT_IN) if valid_hooks & 1 << hook}
    policies = {numbers[5 + hook]: name for hook, name in enumerate(_BUILT_IN) if valid_hooks & 1 << hook}
    built_in = tuple(begins.values())
    found = list(_entries(entries, traffic))
    begins.update({entry.next_at: entry.chain_begins for entry in found[:-1] if entry.chain_begins})

    chains: dict[str, list[Rule]] = {name: [] for name in begins.values()}
    is_policy_drop = dict.fromkeys(built_in, False)
    chain = ""
    for entry in found:
        chain = begins.get(entry.at, chain)
        if entry.at in policies:
            is_policy_drop[policies[entry.at]] = _STANDARD_VERDICTS.get(entry.verdict) is Verdict.DROP
        elif not entry.chain_begins and chain:
            verdict, target = _legacy_verdict(entry, begins)
            rule = Rule(len(chains[chain]) + 1, entry.conditions, verdict, target, entry.target in MARKING_TARGETS)
            chains[chain].append(rule)
    tool = Tool.IPTABLES_LEGACY if traffic.family is Family.IPV4 else Tool.IP6TABLES_LEGACY
    name = traffic.family.nft_name
    return [
        BaseChain(tool, name, table, hook.name, hook, LEGACY_TABLES[table], is_policy_drop[hook.name], chains)
        for hook in traffic.hooks
        if hook.name in built_in
    ]


def _legacy_verdict(entry: _Entry, begins: dict[int, str]) -> tuple[Verdict, str]:
    if entry.target:
        return target_verdict(entry.target), ""
    if entry.verdict < 0:
        return _STANDARD_VERDICTS.get(entry.verdict, Verdict.UNKNOWN), ""
    if entry.verdict == entry.next_at:
        return Verdict.NONE, ""
    return Verdict.GOTO if entry.is_goto else Verdict.JUMP, begins.get(entry.verdict, "")


def _entries(data: bytes, traffic: Traffic) -> Iterator[_Entry]:
    family = traffic.family
    at, form = 0, _ENTRIES[family]
    goto_flag = _GOTO_FLAGS[family]
    harmless = goto_flag | (_IPV6_PROTOCOL_FLAG if family is Family.IPV6 else 0)
    while at + form.size <= len(data):
        *head, protocol, flags, inverted, _, target_offset, next_offset, _ = form.unpack_from(data, at)
        if next_offset < form.size:
            return
        conditions = list(_address_conditions(head[:4], inverted, family))
        conditions += _link_conditions(head[4:8], inverted)
        if flags & ~harmless or inverted & _INVERT_OTHERS:
            conditions.append(Other.PERHAPS)
        if protocol and traffic.protocol is None:
            conditions.append(Other.PERHAPS)
        elif protocol and (protocol == traffic.protocol) is bool(inverted & _INVERT_PROTOCOL):
            conditions.append(Other.NEVER)
        place = at + form.size
        while place + _EXTENSION.size <= at + target_offset:
            size, name, revision = _EXTENSION.unpack_from(data, place)
            condition = match_condition(_text(name), revision, data[place + _EXTENSION.size : place + size], traffic)
            if condition is not None:
                conditions.append(condition)
            place += max(size, _EXTENSION.size)
        _, name, _ = _EXTENSION.unpack_from(data, at + target_offset)
        content = at + target_offset + _EXTENSION.size
        target = _text(name)
        # The head of a user's chain is an entry with this target; so is the end of the table.
        chain_begins = _text(data[content : content + 30]) if target == "ERROR" else ""
        verdict = 0 if target else _VERDICT.unpack_from(data, content)[0]
        yield _Entry(at, at + next_offset, tuple(conditions), target, verdict, bool(flags & goto_flag), chain_begins)
        at += next_offset


def _address_conditions(addresses: list[bytes], inverted: int, family: Family) -> Iterator[Condition]:
    source, destination, source_mask, destination_mask = map(int.from_bytes, addresses)
    for field, value, mask, bit in (
        (Field.SOURCE, source, source_mask, _INVERT_SOURCE),
        (Field.DESTINATION, destination, destination_mask, _INVERT_DESTINATION),
    ):
        if mask or inverted & bit:
            yield address_condition(field, value, mask, family, is_not=bool(inverted & bit))


def address_condition(field: Field, value: int, mask: int, family: Family, *, is_not: bool) -> Condition:
    """The address's bits under `mask` are `value`, or are not."""
    host_bits = ~mask & family.all_ones
    if host_bits & (host_bits + 1):
        # Not one range.
        return Other.PERHAPS
    ranges: Ranges = ((value & mask, value & mask | host_bits),)
    return AddressIn(field, difference(ALL_ADDRESSES[family], ranges) if is_not else ranges)


def _link_conditions(names: list[bytes], inverted: int) -> Iterator[Condition]:
    in_name, out_name, in_mask, out_mask = names
    for side, name, mask, bit in ((Side.IN, in_name, in_mask, _INVERT_IN), (Side.OUT, out_name, out_mask, _INVERT_OUT)):
        # The mask covers the name and the zero behind it, or the name alone where any ending will do.
        n_compared = len(mask.rstrip(b"\0"))
        if n_compared:
            compared = name[:n_compared]
            text = _text(compared) if b"\0" in compared else f"{_text(compared)}*"
            yield LinkIs(side, frozenset({text}), bool(inverted & bit))


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")

"""nf_tables in netlink: what to ask for, and its chains and sets as values.  Pure.

iptables-nft keeps its rules there too.  The layouts are in include/uapi/linux/netfilter/nf_tables.h.  Numbers in
attributes are in network byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

from udptun.firewall.obstacles.ruleset import Ranges, Verdict
from udptun.kernel.rtnetlink import F_DUMP, Request, attribute, attributes

_SUBSYSTEM = 10 << 8
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS = 1, 4, 7, 10, 13
_HEAD = struct.Struct("!BBH")
"""struct nfgenmsg: family, version, resource id."""
_U32, _I32 = struct.Struct("!I"), struct.Struct("!i")

INET = 1
"""NFPROTO_INET: its chains see forwarded packets of both address families."""

_DORMANT = 1
_SET_INTERVAL, _ELEMENT_END = 4, 1
_VERDICTS = {0: Verdict.DROP, 1: Verdict.ACCEPT, -3: Verdict.JUMP, -4: Verdict.GOTO, -5: Verdict.RETURN}
_GOING_ON = (-1, -2)
"""NFT_CONTINUE and NFT_BREAK."""


@dataclass(frozen=True, slots=True)
class ChainHead:
    """A chain without its rules.

    `hook` None: only other chains lead into it.  `type` is "filter", "nat" or "route".  `devices`: what it stands at,
    where that is a link's ingress or egress; a name that ends with * is the beginning of several.
    """

    family: int
    table: str
    name: str
    hook: int | None
    priority: int
    type: str
    is_policy_drop: bool
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetContents:
    """The elements of a set or map, each key of `key_len` bytes.

    `ranges` are the elements of an interval set as numbers; other sets have `keys`.  `verdicts` are those of a verdict
    map: key, verdict and the chain that it leads to.
    """

    key_len: int
    keys: frozenset[bytes] = frozenset()
    ranges: Ranges | None = None
    verdicts: tuple[tuple[bytes, Verdict, str], ...] = ()

    def has(self, key: bytes) -> bool:
        if self.ranges is None:
            return key in self.keys
        return any(low <= int.from_bytes(key) <= high for low, high in self.ranges)


def dump_tables() -> Request:
    return Request("cannot list nftables tables", _SUBSYSTEM | _GET_TABLE, F_DUMP, _HEAD.pack(0, 0, 0))


def dump_chains() -> Request:
    return Request("cannot list nftables chains", _SUBSYSTEM | _GET_CHAIN, F_DUMP, _HEAD.pack(0, 0, 0))


def dump_rules(family: int, table: str, chain: str) -> Request:
    body = _body(family, table, chain)
    return Request(f"cannot list nftables chain {chain}", _SUBSYSTEM | _GET_RULE, F_DUMP, body)


def get_set(family: int, table: str, name: str) -> Request:
    return Request(f"cannot get nftables set {name}", _SUBSYSTEM | _GET_SET, 0, _body(family, table, name))


def dump_elements(family: int, table: str, name: str) -> Request:
    body = _body(family, table, name)
    return Request(f"cannot list nftables set {name}", _SUBSYSTEM | _GET_ELEMENTS, F_DUMP, body)


def decode_dormant_table(body: bytes) -> tuple[int, str] | None:
    """Family and name of a table that is switched off; None for any other."""
    found = dict(attributes(body, _HEAD.size))
    return (body[0], text_of(found[1])) if number_of(found.get(2)) & _DORMANT else None


def decode_chain(body: bytes) -> ChainHead:
    found = dict(attributes(body, _HEAD.size))
    hook = dict(attributes(found.get(4, b""), 0))
    return ChainHead(
        body[0],
        text_of(found[1]),
        text_of(found[3]),
        number_of(hook[1]) if hook else None,
        _I32.unpack(hook[2])[0] if hook else 0,
        text_of(found.get(7, b"")),
        5 in found and number_of(found[5]) == 0,
        (*_device_names(hook),),
    )


def _device_names(hook: Mapping[int, bytes]) -> Iterator[str]:
    """NFTA_HOOK_DEVS, each with NFTA_DEVICE_NAME or, since Linux 6.17, NFTA_DEVICE_PREFIX; or NFTA_HOOK_DEV alone."""
    for kind, name in attributes(hook.get(4, b""), 0):
        yield text_of(name) + "*" * (kind == 2)
    if 3 in hook and 4 not in hook:
        yield text_of(hook[3])


def decode_set(head: bytes, bodies: Iterable[bytes]) -> SetContents:
    """From the answer about the set itself, and those about its elements."""
    about = dict(attributes(head, _HEAD.size))
    elements = [
        dict(attributes(element, 0))
        for body in bodies
        for _, element in attributes(dict(attributes(body, _HEAD.size)).get(3, b""), 0)
    ]
    keys = [(value_of(element.get(1, b"")), bool(number_of(element.get(3)) & _ELEMENT_END)) for element in elements]
    is_interval = bool(number_of(about.get(3)) & _SET_INTERVAL)
    key_len = number_of(about.get(5))
    return SetContents(
        key_len,
        frozenset() if is_interval else frozenset(key for key, _ in keys),
        _ranges([(int.from_bytes(key), is_end) for key, is_end in keys], key_len) if is_interval else None,
        tuple(
            (key, *verdict_of(verdict))
            for (key, _), element in zip(keys, elements, strict=True)
            if (verdict := dict(attributes(element.get(2, b""), 0)).get(2)) is not None
        ),
    )


def _ranges(keys: Iterable[tuple[int, bool]], key_len: int) -> Ranges:
    """The ranges between `keys`, each of `key_len` bytes: one marked as an end is the first number after a range."""
    ranges: list[tuple[int, int]] = []
    begin: int | None = None
    # An end comes before the beginning of the next range at the same number.
    for number, is_end in sorted(sorted(keys, key=itemgetter(1), reverse=True), key=itemgetter(0)):
        if begin is not None:
            ranges.append((begin, number - 1))
        begin = None if is_end else number
    if begin is not None:
        ranges.append((begin, (1 << 8 * key_len) - 1))
    return tuple(ranges)


def expressions(rule: bytes) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Name and attributes of each expression of a rule, in order."""
    for _, element in attributes(dict(attributes(rule, _HEAD.size)).get(4, b""), 0):
        found = dict(attributes(element, 0))
        yield text_of(found.get(1, b"")), dict(attributes(found.get(2, b""), 0))


def handle_of(rule: bytes) -> int:
    return int.from_bytes(dict(attributes(rule, _HEAD.size)).get(3, b""))


def verdict_of(data: bytes) -> tuple[Verdict, str]:
    """The verdict in nested attributes (NFTA_VERDICT_*), and the chain that it leads to."""
    found = dict(attributes(data, 0))
    (code,) = _I32.unpack(found[1])
    if code in _GOING_ON:
        return Verdict.NONE, ""
    return _VERDICTS.get(code, Verdict.UNKNOWN), text_of(found.get(2, b""))


def value_of(nested: bytes) -> bytes:
    """The bytes in nested attributes (NFTA_DATA_VALUE)."""
    return dict(attributes(nested, 0)).get(1, b"")


def text_of(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")


def number_of(raw: bytes | None) -> int:
    """0 when the attribute is missing."""
    return 0 if raw is None else int(_U32.unpack(raw)[0])


def _body(family: int, table: str, name: str) -> bytes:
    """The table is attribute 1 in all these messages, and the chain or set attribute 2."""
    names = [text.encode() + b"\0" for text in (table, name)]
    return _HEAD.pack(family, 0, 0) + attribute(1, names[0]) + attribute(2, names[1])

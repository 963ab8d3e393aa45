"""Rules of any packet filter as values, and what they certainly do to the overlay's packets.  Pure.

A rule says yes, no or perhaps to a packet: a condition that we cannot judge (a limit, a set of another kind) is a
"perhaps".  A false alarm is worse than silence.  So a drop counts only when its packets certainly reach it and fit
it, and what an earlier rule may have accepted does not count.

What all packets of one kind have in common is `Traffic`.  Nobody has marked them before they come to the first chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from udptun.core.family import Family
from udptun.core.network_state import IPNetwork

Ranges = tuple[tuple[int, int], ...]
"""Addresses as numbers: first and last of each range, sorted and apart from each other."""

ALL: Mapping[Family, Ranges] = {family: ((0, family.all_ones),) for family in Family}
_MAX_DEPTH = 16
"""How deep jumps may go (NFT_JUMP_STACK_SIZE); the kernel refuses more."""


def ranges_of(network: IPNetwork) -> Ranges:
    return ((int(network.network_address), int(network.broadcast_address)),)


def intersection(a: Ranges, b: Ranges) -> Ranges:
    both = ((max(low, first), min(high, last)) for low, high in a for first, last in b)
    return tuple((low, high) for low, high in both if low <= high)


def difference(a: Ranges, b: Ranges) -> Ranges:
    for first, last in b:
        parts = (part for low, high in a for part in ((low, min(high, first - 1)), (max(low, last + 1), high)))
        a = tuple((low, high) for low, high in parts if low <= high)
    return a


class Verdict(Enum):
    """What a rule does with a packet that fits."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    NONE = "none"
    """Go on."""
    UNKNOWN = "unknown"
    """Anything; it may accept."""


class Side(Enum):
    IN = "in"
    OUT = "out"


class Field(Enum):
    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class AddressIn:
    field: Field
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class LinkIs:
    """The packet's link has one of these names.  A name that ends with `*` stands for all that begin so."""

    side: Side
    names: frozenset[str]
    is_not: bool = False

    def fits(self, link: str) -> bool:
        found = any(link.startswith(name[:-1]) if name.endswith("*") else link == name for name in self.names)
        return found is not self.is_not


@dataclass(frozen=True, slots=True)
class MarkIs:
    """The mark's bits under `mask` are `value`."""

    value: int
    mask: int
    is_not: bool = False


class Other(Enum):
    """Conditions that need no more than their name."""

    NEVER = "never"
    """No packet of ours fits."""
    PERHAPS = "perhaps"
    """A packet of ours may fit."""


Condition = AddressIn | LinkIs | MarkIs | Other


def agreed(cases: Collection[bool]) -> Condition | None:
    """The condition that holds or not in each of the cases that there may be.  None: it holds in all of them."""
    if all(cases):
        return None
    return Other.PERHAPS if any(cases) else Other.NEVER


@dataclass(frozen=True, slots=True)
class Rule:
    """`number` is how a person finds it: its place in the chain (from 1) with iptables, its handle with nft."""

    number: int
    conditions: tuple[Condition, ...]
    verdict: Verdict
    target: str = ""
    """The chain of a JUMP or GOTO."""
    marks: bool = False
    """A packet that fits may have a mark afterwards."""


class Tool(Enum):
    """What a table is managed with."""

    NFT = "nft"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"
    IP6TABLES_NFT = "ip6tables-nft"
    IP6TABLES_LEGACY = "ip6tables-legacy"


class Hook(IntEnum):
    """Where the kernel calls a chain, in the order in which a packet comes by."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


class State(IntEnum):
    """What connection tracking says of a packet, as a bit of a mask: of xt_conntrack and of nftables alike."""

    INVALID = 1
    ESTABLISHED = 2
    RELATED = 4
    NEW = 8
    UNTRACKED = 64


@dataclass(frozen=True, slots=True)
class Traffic:
    """What packets have in common, beside their addresses and links.  None: they differ in it.

    They pass the chains of `hooks`, and connection tracking says one of `states` of each.
    """

    family: Family
    hooks: tuple[Hook, ...]
    states: frozenset[State]
    protocol: int | None = None
    destination_port: int | None = None


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that the kernel calls by itself, with the chains that its rules lead to.

    At one hook the chain with the lower `priority` comes first.  `chains` has it too, by its `name`.  A chain that is
    missing there is not known, and may accept everything.
    """

    tool: Tool
    family: str
    table: str
    name: str
    hook: Hook
    priority: int
    is_policy_drop: bool
    chains: Mapping[str, Sequence[Rule]]


@dataclass(frozen=True, slots=True)
class Flow:
    """Packets from any of the sources to any of the destinations, which come in and leave by these links.

    A link is None where it is not known, and where there is none.
    """

    in_link: str | None
    out_link: str | None
    sources: Ranges
    destinations: Ranges


@dataclass(frozen=True, slots=True)
class Drop:
    """Packets of a flow are certainly dropped: by this rule of `chain`, or by the policy of `base` (`rule` None).

    `is_partial`: not all packets of the flow.
    """

    base: BaseChain
    chain: str
    rule: Rule | None
    is_partial: bool


_KNOWS_IN_LINK = (Hook.PREROUTING, Hook.INPUT, Hook.FORWARD)
_KNOWS_OUT_LINK = (Hook.FORWARD, Hook.OUTPUT, Hook.POSTROUTING)


def find_drops(bases: Iterable[BaseChain], flow: Flow) -> list[Drop]:
    """Of each chain the first thing that certainly drops packets of the flow."""
    found = []
    is_unmarked = True
    for base in sorted(bases, key=lambda base: (base.hook, base.priority)):
        walk = _Walk(base, flow, is_unmarked)
        walk.run()
        is_unmarked = walk.is_unmarked
        if walk.drop is not None:
            found.append(walk.drop)
    return found


@dataclass(frozen=True, slots=True)
class _Box:
    """Packets from any of these sources to any of these destinations."""

    sources: Ranges
    destinations: Ranges

    def __bool__(self) -> bool:
        return bool(self.sources and self.destinations)

    def __and__(self, other: _Box) -> _Box:
        both = zip((self.sources, self.destinations), (other.sources, other.destinations), strict=True)
        return _Box(*(intersection(mine, others) for mine, others in both))

    def is_within(self, other: _Box) -> bool:
        return not (difference(self.sources, other.sources) or difference(self.destinations, other.destinations))

    def at_most_without(self, part: _Box) -> _Box:
        """What is left without `part`, or less where that is no box."""
        if not difference(self.destinations, part.destinations):
            return _Box(difference(self.sources, part.sources), self.destinations)
        return _Box(self.sources, difference(self.destinations, part.destinations))

    def at_least_without(self, part: _Box) -> _Box:
        """What is left without `part`, or more where that is no box."""
        is_box = not (difference(self.sources, part.sources) and difference(self.destinations, part.destinations))
        return self.at_most_without(part) if is_box else self


class _Walk:
    """Follows packets through the chains of one table."""

    def __init__(self, base: BaseChain, flow: Flow, is_unmarked: bool) -> None:
        self.drop: Drop | None = None
        self.is_unmarked = is_unmarked
        """Whether no packet can have a mark by now."""
        self._base = base
        # A chain is not told of both links everywhere.
        self._in_link = flow.in_link if base.hook in _KNOWS_IN_LINK else None
        self._out_link = flow.out_link if base.hook in _KNOWS_OUT_LINK else None
        self._everything = _Box(flow.sources, flow.destinations)

    def run(self) -> None:
        kept = self._follow(self._base.name, self._everything, self._everything, 0)
        if self.drop is None and self._base.is_policy_drop and kept:
            self.drop = Drop(self._base, self._base.name, None, kept != self._everything)

    def _follow(self, name: str, may_come: _Box, comes: _Box, depth: int) -> _Box:
        """Send packets through a chain: those that may come, and among them those that certainly come.

        Returns packets of `may_come` that the chain certainly does not accept.
        """
        if name not in self._base.chains or depth > _MAX_DEPTH:
            return _Box((), ())
        kept = may_come
        for rule in self._base.chains[name]:
            part, fits = self._fit(rule, may_come)
            if not part:
                continue
            self.is_unmarked &= not rule.marks
            match rule.verdict:
                case Verdict.DROP | Verdict.REJECT if fits and comes & part:
                    self.drop = Drop(self._base, name, rule, comes & part != self._everything)
                case Verdict.ACCEPT | Verdict.UNKNOWN:
                    kept, comes = kept.at_most_without(part), comes.at_most_without(part)
                case Verdict.RETURN:
                    comes = comes.at_most_without(part)
                case Verdict.JUMP | Verdict.GOTO:
                    left = self._follow(rule.target, part, comes & part if fits else _Box((), ()), depth + 1)
                    if left != part:
                        kept, comes = (
                            it & left if it.is_within(part) else it.at_most_without(part) for it in (kept, comes)
                        )
                    if rule.verdict is Verdict.GOTO:
                        comes = comes.at_most_without(part)
            if self.drop is not None:
                break
            if fits and rule.verdict in (Verdict.ACCEPT, Verdict.RETURN, Verdict.GOTO):
                may_come = may_come.at_least_without(part)
        return kept

    def _fit(self, rule: Rule, box: _Box) -> tuple[_Box, bool]:
        """The packets of the box that may fit the rule, and whether they certainly do."""
        sources, destinations, is_certain = box.sources, box.destinations, True
        for condition in rule.conditions:
            match condition:
                case AddressIn(Field.SOURCE, ranges):
                    sources = intersection(sources, ranges)
                case AddressIn(Field.DESTINATION, ranges):
                    destinations = intersection(destinations, ranges)
                case LinkIs():
                    link = self._in_link if condition.side is Side.IN else self._out_link
                    if link is None:
                        is_certain = False
                    elif not condition.fits(link):
                        return _Box((), ()), False
                case MarkIs() if self.is_unmarked:
                    if (condition.value == 0) is condition.is_not:
                        return _Box((), ()), False
                case Other.NEVER:
                    return _Box((), ()), False
                case _:
                    is_certain = False
        return _Box(sources, destinations), is_certain

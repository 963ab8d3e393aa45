"""What is said to be dropped is dropped, whatever the conditions are that we cannot judge."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from udptun.core.errors import KernelError
from udptun.firewall.obstacles import kernel_rules
from udptun.firewall.obstacles.ruleset import (
    AddressIn,
    BaseChain,
    Condition,
    Field,
    Flow,
    Hook,
    LinkIs,
    MarkIs,
    Other,
    Ranges,
    Rule,
    Side,
    Tool,
    Verdict,
    difference,
    find_drops,
    intersection,
)
from udptun.firewall.obstacles.watch import find_lines

N = 4
"""Addresses are 0 to 3."""
FLOW = Flow("in0", "out0", ((1, 3),), ((0, 2),))

RANGES = st.lists(st.integers(0, N - 1), unique=True).map(lambda found: tuple((n, n) for n in sorted(found)))
CONDITIONS: st.SearchStrategy[Condition] = st.one_of(
    st.builds(AddressIn, st.sampled_from(Field), RANGES),
    st.builds(LinkIs, st.sampled_from(Side), st.sampled_from([frozenset({"in*"}), frozenset({"x0"})]), st.booleans()),
    st.builds(MarkIs, st.sampled_from([0, 1]), st.just(1), st.booleans()),
    st.sampled_from(Other),
)
RULES = st.builds(
    Rule,
    st.just(0),
    st.lists(CONDITIONS, max_size=2).map(tuple),
    st.sampled_from(Verdict),
    st.sampled_from(["a", "b"]),
    st.booleans(),
)
CHAIN = st.lists(RULES, max_size=4)


def chains(base: Sequence[Rule], a: Sequence[Rule], b: Sequence[Rule]) -> Mapping[str, Sequence[Rule]]:
    """Jumps lead from the base to `a` and `b`, and from `a` to `b`: nowhere in circles, as the kernel sees to it."""
    return {
        "base": base,
        "a": [replace(rule, target="b") for rule in a],
        "b": [rule for rule in b if rule.verdict not in (Verdict.JUMP, Verdict.GOTO)],
    }


class _Packet:
    """One packet on its way.  `choices` say yes or no wherever we say perhaps, in the order in which it comes by."""

    def __init__(self, source: int, destination: int, choices: Sequence[bool]) -> None:
        self.ends = {Field.SOURCE: source, Field.DESTINATION: destination}
        self.choices = iter(choices)
        self.mark = 0

    def fits(self, condition: Condition) -> bool:
        match condition:
            case AddressIn():
                return any(low <= self.ends[condition.field] <= high for low, high in condition.ranges)
            case LinkIs():
                return condition.fits(FLOW.in_link if condition.side is Side.IN else FLOW.out_link)
            case MarkIs():
                return (self.mark & condition.mask == condition.value) is not condition.is_not
            case Other.PERHAPS:
                return next(self.choices)
        return False

    def is_dropped(self, base: BaseChain) -> bool:
        verdict = self._pass(base, base.name)
        return verdict is Verdict.DROP or (verdict is not Verdict.ACCEPT and base.is_policy_drop)

    def _pass(self, base: BaseChain, name: str) -> Verdict:
        for rule in base.chains[name]:
            if not all(self.fits(condition) for condition in rule.conditions):
                continue
            if rule.marks:
                self.mark = int(next(self.choices))
            match rule.verdict:
                case Verdict.DROP | Verdict.REJECT:
                    return Verdict.DROP
                case Verdict.ACCEPT:
                    return Verdict.ACCEPT
                case Verdict.UNKNOWN if next(self.choices):
                    return Verdict.ACCEPT
                case Verdict.RETURN:
                    return Verdict.RETURN
                case Verdict.JUMP | Verdict.GOTO:
                    found = self._pass(base, rule.target)
                    if found in (Verdict.DROP, Verdict.ACCEPT) or rule.verdict is Verdict.GOTO:
                        return found
        return Verdict.RETURN


def ways(base: BaseChain, source: int, destination: int) -> Iterator[bool]:
    """Whether the packet is dropped, for every way in which what we cannot judge may turn out."""
    waiting: list[list[bool]] = [[]]
    while waiting:
        choices = waiting.pop()
        try:
            yield _Packet(source, destination, choices).is_dropped(base)
        except (StopIteration, RuntimeError):
            waiting += [[*choices, False], [*choices, True]]


@settings(max_examples=500, deadline=None)
@given(base=CHAIN, a=CHAIN, b=CHAIN, is_policy_drop=st.booleans())
@example(
    base=[
        Rule(0, (AddressIn(Field.SOURCE, ((1, 1),)),), Verdict.ACCEPT),
        Rule(0, (AddressIn(Field.DESTINATION, ((0, 1),)),), Verdict.ACCEPT),
        Rule(0, (), Verdict.DROP),
    ],
    a=[],
    b=[],
    is_policy_drop=False,
)
def test_what_is_found_to_be_dropped_is_dropped_whatever_happens(
    base: list[Rule], a: list[Rule], b: list[Rule], is_policy_drop: bool
) -> None:
    chain = BaseChain(Tool.NFT, "inet", "t", "base", Hook.FORWARD, 0, is_policy_drop, chains(base, a, b))
    certain = [all(ways(chain, source, to)) for source, to in product(range(1, 4), range(3))]
    for drop in find_drops([chain], FLOW):
        assert any(certain)
        assert drop.is_partial or all(certain)


@given(RANGES, RANGES)
def test_ranges_are_sets_of_addresses(a: Ranges, b: Ranges) -> None:
    def members(ranges: Ranges) -> set[int]:
        return {n for low, high in ranges for n in range(low, high + 1)}

    assert members(intersection(a, b)) == members(a) & members(b)
    assert members(difference(a, b)) == members(a) - members(b)


async def test_rules_of_legacy_iptables_are_judged_where_the_kernel_has_no_nf_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The doctor could not look there.  What else keeps rules from being read is said."""
    answer = errno.EPROTONOSUPPORT

    async def refuse(_links: object, _traffics: object) -> None:
        raise KernelError("dump tables", answer)

    monkeypatch.setattr(kernel_rules, "read_nft", refuse)
    monkeypatch.setattr(kernel_rules, "read_legacy", lambda traffics: {it: ["a chain"] for it in traffics})

    class OneWay:
        traffics, links = ("forwarded",), frozenset[str]()

        def judge(self, chains: dict[str, list[str]]) -> list[str]:
            return [f"{traffic}: {found}" for traffic, found in chains.items()]

    assert await find_lines([OneWay()]) == ["forwarded: ['a chain']"]  # type: ignore[list-item]  # a stand-in
    answer = errno.EINTR
    with pytest.raises(KernelError):
        await find_lines([OneWay()])  # type: ignore[list-item]  # a stand-in

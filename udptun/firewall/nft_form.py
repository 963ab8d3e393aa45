"""The rules in flannel's nftables form: a table of its own.  Pure.

Our form is a translation of the iptables form.  flannel's own (pkg/trafficmngr/nftables) differs from it in two rules.
It compares the whole mark instead of the bits under the mask.  Its fourth rule says "not from our subnet" instead of
"not from the network", so the last rule is never reached: packets from a host's own addresses arrive at remote pods
unmasqueraded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from udptun.core.family import Family
from udptun.core.network_state import IPNetwork
from udptun.firewall.rules import MARK, DesiredRules, PresentRules, Rule, Verdict, network_or_none

TABLES: Mapping[int, tuple[str, str]] = {it.value: (it.nft_name, f"flannel-ipv{it.value}") for it in Family}
"""Family and name of flannel's tables, by IP version.  flannel makes both tables whatever its configuration says."""


_NAT_CHAIN, _FORWARD_CHAIN = "postrtg", "forward"


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain of flannel's table and the hook that it is attached to.  `priority` is a number and its name."""

    name: str
    comment: str
    type: str
    hook: str
    priority: tuple[int, str]
    rules: tuple[Rule, ...]


def nft_chains(desired: DesiredRules) -> tuple[BaseChain, ...]:
    """The chains that the table shall have."""
    chains = (
        BaseChain(
            _NAT_CHAIN,
            "chain to manage traffic masquerading by flannel",
            "nat",
            "postrouting",
            (100, "srcnat"),
            desired.masquerade,
        ),
        BaseChain(
            _FORWARD_CHAIN,
            "chain to accept flannel traffic",
            "filter",
            "forward",
            (0, "filter"),
            desired.forward,
        ),
    )
    return tuple(chain for chain in chains if chain.rules)


def nft_present(version: int, listed: Sequence[Mapping[str, Any]]) -> PresentRules:
    """The rules in what `nft -j list table` prints."""
    return PresentRules(_rules(version, _NAT_CHAIN, listed), _rules(version, _FORWARD_CHAIN, listed))


def _rules(version: int, chain: str, listed: Sequence[Mapping[str, Any]]) -> list[Rule | None]:
    family = TABLES[version][0]
    bodies = [item["rule"] for item in listed if "rule" in item]
    return [_rule(family, body.get("expr", ())) for body in bodies if body["chain"] == chain]


def nft_removal(family: str, table: str) -> str:
    """The input of `nft -f` that removes the table, or does nothing when there is none."""
    return f"add table {family} {table}\ndelete table {family} {table}\n"


def nft_script(version: int, chains: Iterable[BaseChain]) -> str:
    """The input of `nft -f` that replaces the whole table in one transaction."""
    family, table = TABLES[version]
    lines = [f"table {family} {table} {{", f'\tcomment "rules for {table}"']
    for chain in chains:
        lines += [
            f"\tchain {chain.name} {{",
            f'\t\tcomment "{chain.comment}"',
            f"\t\ttype {chain.type} hook {chain.hook} priority {chain.priority[1]}; policy accept;",
            *(f"\t\t{_nft_rule(family, rule)}" for rule in chain.rules),
            "\t}",
        ]
    return nft_removal(family, table) + "".join(f"{line}\n" for line in [*lines, "}"])


def _nft_rule(family: str, rule: Rule) -> str:
    words = [f"meta mark & {MARK:#010x} == {MARK:#010x}"] if rule.marked else []
    for field, network, is_not in _addresses(rule):
        words.append(f"{family} {field} {'!= ' if is_not else ''}{network}")
    return " ".join([*words, rule.verdict.value, *(["fully-random"] if rule.random_fully else [])])


def nft_findings(version: int, chains: Sequence[BaseChain], listed: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What in the table is not as desired, in words.

    `listed` are the objects that `nft -j list table` prints; no objects mean that there is no table.  Comments are not
    compared, because not every version of nft prints them.
    """
    family, table = TABLES[version]
    have = [_without_handle(item) for item in listed if "metainfo" not in item]
    if not have:
        return (f"missing table {family} {table}",)
    findings = []
    if {"table": {"family": family, "name": table}} not in have:
        findings.append(f"other flags of table {family} {table}")
    for chain in chains:
        head = {
            "family": family,
            "table": table,
            "name": chain.name,
            "type": chain.type,
            "hook": chain.hook,
            "prio": chain.priority[0],
            "policy": "accept",
        }
        if {"chain": head} not in have:
            findings.append(f"missing or changed chain {chain.name}")
        bodies = [item["rule"] for item in have if "rule" in item]
        rules = [[_bare(part) for part in body.get("expr", ())] for body in bodies if body["chain"] == chain.name]
        if rules != [_nft_json(family, rule) for rule in chain.rules]:
            findings.append(f"other rules in chain {chain.name}")
    names = {chain.name for chain in chains}
    others = [
        item for item in have if not {"table", "rule"} & item.keys() and item.get("chain", {}).get("name") not in names
    ]
    if others:
        findings.append(f"other objects in table {family} {table}")
    return tuple(findings)


def _without_handle(item: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: {k: v for k, v in body.items() if k not in ("handle", "comment")} for kind, body in item.items()}


def _bare(expression: Mapping[str, Any]) -> Mapping[str, Any]:
    """The expression with a single flag taken out of the list that some versions of nft put it in."""
    match expression:
        case {"masquerade": {"flags": [flag]}}:
            return {"masquerade": {"flags": flag}}
    return expression


def _nft_json(family: str, rule: Rule) -> list[dict[str, Any]]:
    """The rule's expressions as nft lists them (libnftables-json(5))."""
    expressions: list[dict[str, Any]] = []
    if rule.marked:
        bits = {"&": [{"meta": {"key": "mark"}}, MARK]}
        expressions.append({"match": {"op": "==", "left": bits, "right": MARK}})
    for field, network, is_not in _addresses(rule):
        left = {"payload": {"protocol": family, "field": field}}
        right = {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
        expressions.append({"match": {"op": "!=" if is_not else "==", "left": left, "right": right}})
    flags = {"flags": "fully-random"} if rule.random_fully else None
    return [*expressions, {rule.verdict.value: flags}]


def _rule(family: str, expressions: Sequence[Mapping[str, Any]]) -> Rule | None:
    """The inverse of `_nft_json`, with or without the mask of the mark, which flannel leaves out."""
    words: dict[str, Any] = {}
    for expression in map(_bare, expressions):
        match expression:
            case {"match": {"op": op, "left": {"payload": {"field": field}}, "right": {"prefix": prefix}}}:
                end = {"saddr": "source", "daddr": "destination"}.get(field, field)
                words[end] = network_or_none(f"{prefix.get('addr')}/{prefix.get('len')}")
                words[f"not_{end}"] = op == "!="
            case {"match": {"op": "==", "left": {"meta": {"key": "mark"}} | {"&": [{"meta": {"key": "mark"}}, _]}}}:
                words["marked"] = True
            case {"accept": _} | {"return": _} | {"masquerade": _}:
                (verdict,) = expression
                words["verdict"] = Verdict(verdict)
                words["random_fully"] = expression[verdict] is not None
            case _:
                return None
    try:
        rule = Rule(**words)
    except TypeError:
        return None
    unmasked = [_unmasked(expression) for expression in _nft_json(family, rule)]
    return rule if unmasked == [_unmasked(_bare(expression)) for expression in expressions] else None


def _unmasked(expression: Mapping[str, Any]) -> Mapping[str, Any]:
    match expression:
        case {"match": {"op": "==", "left": {"&": [left, _]}, "right": right}}:
            return {"match": {"op": "==", "left": left, "right": right}}
    return expression


def _addresses(rule: Rule) -> list[tuple[str, IPNetwork, bool]]:
    fields = [("saddr", rule.source, rule.not_source), ("daddr", rule.destination, rule.not_destination)]
    return [(field, network, is_not) for field, network, is_not in fields if network is not None]

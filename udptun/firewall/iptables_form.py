"""The rules in flannel's iptables form: chains of its own in nat and filter, and a jump to each.  Pure.

Source: flannel pkg/trafficmngr/iptables.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from udptun.core.network_state import IPNetwork
from udptun.firewall.rules import MARK, MULTICAST, DesiredRules, PresentRules, Repair, Rule, Verdict, network_or_none

_NAT_CHAIN, _FILTER_CHAIN = "FLANNEL-POSTRTG", "FLANNEL-FWD"
_RULE = re.compile(
    r"(?:(?P<not_source>! )?-s (?P<source>\S+) )?(?:(?P<not_destination>! )?-d (?P<destination>\S+) )?"
    rf"(?P<marked>-m mark --mark {MARK:#x}/{MARK:#x} )?-m comment --comment (?P<comment>flanneld (?:masq|forward)) "
    r"-j (?P<verdict>ACCEPT|RETURN|MASQUERADE)(?P<random_fully> --random-fully)?"
)
"""A rule of flannel's, as its words with a blank between them."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of flannel's: its table, the rule in `parent` that jumps to it, and its own rules.

    Rules are texts as `iptables -S` prints them, without the `-A CHAIN` in front.  No rules: the chain shall not exist.
    """

    table: str
    name: str
    parent: str
    jump: str
    rules: tuple[str, ...]


def iptables_chains(desired: DesiredRules) -> tuple[Chain, Chain]:
    """Both of flannel's chains, with the rules that they shall have."""
    return (
        _chain("nat", _NAT_CHAIN, "POSTROUTING", "flanneld masq", desired.masquerade),
        _chain("filter", _FILTER_CHAIN, "FORWARD", "flanneld forward", desired.forward),
    )


def rules_of_table(table: str, desired: DesiredRules) -> DesiredRules:
    """Those of the desired rules that belong into nat, or into filter."""
    return DesiredRules(masquerade=desired.masquerade) if table == "nat" else DesiredRules(forward=desired.forward)


def _chain(table: str, name: str, parent: str, comment: str, rules: Iterable[Rule]) -> Chain:
    return Chain(
        table,
        name,
        parent,
        f'-m comment --comment "{comment}" -j {name}',
        tuple(_iptables_rule(rule, f' -m comment --comment "{comment}"') for rule in rules),
    )


def _iptables_rule(rule: Rule, comment: str) -> str:
    words = []
    if rule.source is not None:
        words.append(f"{'! ' if rule.not_source else ''}-s {rule.source}")
    if rule.destination is not None:
        words.append(f"{'! ' if rule.not_destination else ''}-d {rule.destination}")
    if rule.marked:
        words.append(f"-m mark --mark {MARK:#x}/{MARK:#x}")
    target = f"-j {rule.verdict.name}{' --random-fully' if rule.random_fully else ''}"
    return f"{' '.join(words)}{comment} {target}"


def iptables_present(nat: str, filter_: str) -> PresentRules:
    """The rules in what `iptables -S` prints of both chains."""
    return PresentRules(_rules(_NAT_CHAIN, nat), _rules(_FILTER_CHAIN, filter_))


def _rules(chain: str, listed: str) -> list[Rule | None]:
    begin = f"-A {chain} "
    return [_rule(line.removeprefix(begin)) for line in listed.splitlines() if line.startswith(begin)]


def _rule(text: str) -> Rule | None:
    found = _RULE.fullmatch(" ".join(_words(text)))
    if found is None:
        return None
    source, destination = (network_or_none(found[it] or "") for it in ("source", "destination"))
    rule = Rule(
        Verdict[found["verdict"]],
        source,
        destination,
        bool(found["not_source"]),
        bool(found["not_destination"]),
        bool(found["marked"]),
        bool(found["random_fully"]),
    )
    # What cannot be written as it is printed would never be as desired.
    return rule if _words(_iptables_rule(rule, f' -m comment --comment "{found["comment"]}"')) == _words(text) else None


def iptables_repair(chains: Sequence[Chain], listed: Mapping[str, str]) -> Repair:
    """The input of `iptables-restore --noflush` that makes the chains as desired.

    `listed` holds, by table, what `iptables -S` prints.  For a chain with rules it has to hold the chain and its
    parent; for a chain that exists and shall not, all chains of the table.  Of the rules in a parent only our jumps are
    looked at.  The owner of the host decides where a jump stands among the other rules.
    """
    parts: list[str] = []
    findings: list[str] = []
    for chain in chains:
        script, found = _repair_chain(chain, listed[chain.table])
        if script:
            parts += [f"*{chain.table}", *script, "COMMIT"]
            findings += found
    is_new = not any(_exists(chain, listed[chain.table]) for chain in chains)
    return Repair("".join(f"{line}\n" for line in parts), tuple(findings), is_new)


def _exists(chain: Chain, listed: str) -> bool:
    return f"-N {chain.name}" in listed.splitlines()


def _repair_chain(chain: Chain, listed: str) -> tuple[list[str], list[str]]:
    declared = f":{chain.name} - [0:0]"  # makes the chain, or empties it
    lines = listed.splitlines()
    exists = _exists(chain, listed)
    if not chain.rules:
        if not exists:
            return [], []
        # Every rule that leads into the chain, whoever added it: the kernel keeps the chain while there is one.
        jumps = [line for line in lines if line.endswith((f" -j {chain.name}", f" -g {chain.name}"))]
        return [*(f"-D{line[2:]}" for line in jumps), declared, f"-X {chain.name}"], [f"leftover chain {chain.name}"]

    findings: list[str] = []
    if not exists:
        findings.append(f"missing chain {chain.name}")
    elif [_words(line) for line in lines if line.startswith(f"-A {chain.name} ")] != [
        _words(f"-A {chain.name} {rule}") for rule in chain.rules
    ]:
        findings.append(f"other rules in chain {chain.name}")
    script = [declared, *(f"-A {chain.name} {rule}" for rule in chain.rules)] if findings else []
    jump = _words(f"-A {chain.parent} {chain.jump}")
    n_jumps = sum(_words(line) == jump for line in lines if chain.name in line)
    if n_jumps == 0:
        findings.append(f"missing jump in {chain.parent}")
        script.append(f"-A {chain.parent} {chain.jump}")
    elif n_jumps > 1:
        findings.append(f"{n_jumps} jumps in {chain.parent}")
        script += [f"-D {chain.parent} {chain.jump}"] * (n_jumps - 1)
    return script, findings


def iptables_leftovers(listed: Mapping[str, str], network: IPNetwork, subnet: IPNetwork) -> Repair:
    """The input of `iptables-restore --noflush` that removes the rules of flannel before 0.20.

    These rules stand in POSTROUTING and FORWARD themselves and have no comment, so any single one might be somebody
    else's.  They are removed only when all four of nat are there, for the network and subnet of an earlier run.
    `listed` holds what `iptables -S` prints of the two chains, by table.
    """
    for target in ("MASQUERADE --random-fully", "MASQUERADE"):
        old = [
            f"POSTROUTING -s {network} -d {network} -j RETURN",
            f"POSTROUTING -s {network} ! -d {MULTICAST[network.version]} -j {target}",
            f"POSTROUTING ! -s {network} -d {subnet} -j RETURN",
            f"POSTROUTING ! -s {network} -d {network} -j {target}",
        ]
        if _has_all(listed["nat"], old):
            break
    else:
        return Repair()
    script = ["*nat", *(f"-D {rule}" for rule in old), "COMMIT"]
    accepts = [f"FORWARD -s {network} -j ACCEPT", f"FORWARD -d {network} -j ACCEPT"]
    if _has_all(listed["filter"], accepts):
        script += ["*filter", *(f"-D {rule}" for rule in accepts), "COMMIT"]
    return Repair("".join(f"{line}\n" for line in script), (f"leftover rules of an older flannel for {network}",))


def _has_all(listed: str, rules: Iterable[str]) -> bool:
    lines = listed.splitlines()
    return all(f"-A {rule}" in lines for rule in rules)


def _words(line: str) -> list[str]:
    """The words of a rule.  Versions of iptables differ in how they quote them."""
    try:
        return shlex.split(line)
    except ValueError:
        # Not one of ours, which can all be split.
        return [line]

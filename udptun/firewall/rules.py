"""flannel's firewall rules as data, in both forms that flannel has for them.  Pure.

`masquerade` and `forward` make one list of rules.  It is written in the iptables form (pkg/trafficmngr/iptables: chains
of its own in nat and filter, and a jump to each) and in the nftables form (pkg/trafficmngr/nftables: a table of its
own).

Our nftables form is a translation of the iptables form.  flannel's own nftables form differs from it in two rules.  It
compares the whole mark instead of the bits under the mask.  Its fourth rule says "not from our subnet" instead of "not
from the network", so the last rule is never reached: packets from a host's own addresses arrive at remote pods
unmasqueraded.

Networks may be of either family.  Every name that depends on the family follows from theirs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_network
from typing import Any

from udptun.core.network_state import IPNetwork

MARK = 0x4000
"""kube-proxy's KUBE-MARK-MASQ.  kube-proxy masquerades packets with this mark itself, later in POSTROUTING."""

_MULTICAST: Mapping[int, IPNetwork] = {4: ip_network("224.0.0.0/4"), 6: ip_network("ff00::/8")}


class Verdict(Enum):
    """What happens to a packet that fits the rule.  The values are the nftables statements."""

    ACCEPT = "accept"
    RETURN = "return"
    MASQUERADE = "masquerade"


@dataclass(frozen=True, slots=True)
class Rule:
    """Packets from `source` to `destination` get the verdict.

    None fits every address.  `not_source` and `not_destination` turn the condition around.
    `marked`: only packets with MARK among the bits of their mark.
    """

    verdict: Verdict
    source: IPNetwork | None = None
    destination: IPNetwork | None = None
    not_source: bool = False
    not_destination: bool = False
    marked: bool = False
    random_fully: bool = False
    """Masquerade with ports that nobody can guess (NF_NAT_RANGE_PROTO_RANDOM_FULLY)."""


def masquerade(network: IPNetwork, subnet: IPNetwork, random_fully: bool) -> tuple[Rule, ...]:
    """The rules of --ip-masq: packets that leave `network` or enter it get our address as their source.

    Packets that stay inside keep their source.  So do packets from outside to our own pods in `subnet`: the pods answer
    through us anyway.
    """
    multicast = _MULTICAST[network.version]
    return (
        Rule(Verdict.RETURN, marked=True),
        Rule(Verdict.RETURN, subnet, network),
        Rule(Verdict.RETURN, network, subnet),
        Rule(Verdict.RETURN, network, subnet, not_source=True),
        Rule(Verdict.MASQUERADE, network, multicast, not_destination=True, random_fully=random_fully),
        Rule(Verdict.MASQUERADE, network, network, not_source=True, random_fully=random_fully),
    )


def forward(network: IPNetwork) -> tuple[Rule, ...]:
    """The rules of --iptables-forward-rules: forward packets from and to `network` whatever the chain's policy says."""
    return (Rule(Verdict.ACCEPT, source=network), Rule(Verdict.ACCEPT, destination=network))


@dataclass(frozen=True, slots=True)
class DesiredRules:
    """The rules that a host shall have.  An empty tuple means that it shall have none of that kind."""

    masquerade: tuple[Rule, ...] = ()
    forward: tuple[Rule, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.masquerade or self.forward)


# --- the iptables form


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
        _chain("nat", "FLANNEL-POSTRTG", "POSTROUTING", "flanneld masq", desired.masquerade),
        _chain("filter", "FLANNEL-FWD", "FORWARD", "flanneld forward", desired.forward),
    )


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


@dataclass(frozen=True, slots=True)
class Repair:
    """What has to be done, as input for the tool, and what was found, in words.  False when nothing has to be done.

    `is_new`: no rules of flannel's were there.
    """

    script: str = ""
    findings: tuple[str, ...] = ()
    is_new: bool = False

    def __bool__(self) -> bool:
        return bool(self.findings)


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
            f"POSTROUTING -s {network} ! -d {_MULTICAST[network.version]} -j {target}",
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


# --- the nftables form

TABLES: Mapping[int, tuple[str, str]] = {4: ("ip", "flannel-ipv4"), 6: ("ip6", "flannel-ipv6")}
"""Family and name of flannel's tables, by IP version.  flannel makes both tables whatever its configuration says."""


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
            "postrtg",
            "chain to manage traffic masquerading by flannel",
            "nat",
            "postrouting",
            (100, "srcnat"),
            desired.masquerade,
        ),
        BaseChain("forward", "chain to accept flannel traffic", "filter", "forward", (0, "filter"), desired.forward),
    )
    return tuple(chain for chain in chains if chain.rules)


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


def _addresses(rule: Rule) -> list[tuple[str, IPNetwork, bool]]:
    fields = [("saddr", rule.source, rule.not_source), ("daddr", rule.destination, rule.not_destination)]
    return [(field, network, is_not) for field, network, is_not in fields if network is not None]

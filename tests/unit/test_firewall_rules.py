"""The firewall's rules as text, and what is done about a host that has others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest

from udptun.firewall.iptables_form import iptables_chains, iptables_leftovers, iptables_present, iptables_repair
from udptun.firewall.nft_form import TABLES, nft_chains, nft_findings, nft_present, nft_script
from udptun.firewall.rules import DesiredRules, Repair, Rule, forward, masquerade

NETWORK, SUBNET = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.7.0/24")
WANTED = DesiredRules(masquerade(NETWORK, SUBNET, True), forward(NETWORK))
CHAINS = iptables_chains(WANTED)

# What `iptables -S` prints where flannel, kube-proxy and Docker have been.
NAT = """\
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N FLANNEL-POSTRTG
-N KUBE-POSTROUTING
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.7.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"""
FILTER = """\
-P INPUT ACCEPT
-P FORWARD DROP
-P OUTPUT ACCEPT
-N FLANNEL-FWD
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
"""
EMPTY = {"nat": "-P POSTROUTING ACCEPT\n", "filter": "-P FORWARD ACCEPT\n"}
NAT_JUMP = '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n'


def nat_rules(saved: str) -> list[str]:
    return [line.split(" ", 2)[2] for line in saved.splitlines() if line.startswith("-A FLANNEL-")]


# --- the iptables form


def test_iptables_rules_are_flannels_word_by_word_and_in_its_order() -> None:
    nat, filter_ = CHAINS
    assert (nat.table, nat.parent, nat.name) == ("nat", "POSTROUTING", "FLANNEL-POSTRTG")
    assert list(nat.rules) == nat_rules(NAT)
    assert nat.jump == '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
    assert (filter_.table, filter_.parent, filter_.name) == ("filter", "FORWARD", "FLANNEL-FWD")
    assert list(filter_.rules) == nat_rules(FILTER)
    assert filter_.jump == '-m comment --comment "flanneld forward" -j FLANNEL-FWD'


def test_masquerading_without_random_ports_differs_in_nothing_else() -> None:
    plain = iptables_chains(DesiredRules(masquerade(NETWORK, SUBNET, False)))[0]
    assert plain.rules == tuple(rule.removesuffix(" --random-fully") for rule in CHAINS[0].rules)


def test_ipv6_rules_are_the_same_with_its_multicast() -> None:
    network, subnet = IPv6Network("fd00:244::/48"), IPv6Network("fd00:244:0:7::/64")
    nat = iptables_chains(DesiredRules(masquerade(network, subnet, True)))[0]
    assert nat.rules[1] == '-s fd00:244:0:7::/64 -d fd00:244::/48 -m comment --comment "flanneld masq" -j RETURN'
    assert nat.rules[4] == (
        '-s fd00:244::/48 ! -d ff00::/8 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully'
    )
    script = nft_script(6, nft_chains(DesiredRules(masquerade(network, subnet, True))))
    assert "table ip6 flannel-ipv6 {" in script
    assert "ip6 saddr fd00:244::/48 ip6 daddr != ff00::/8 masquerade fully-random" in script


def test_nothing_is_done_about_rules_that_are_as_wanted() -> None:
    repair = iptables_repair(CHAINS, {"nat": NAT, "filter": FILTER})
    assert repair == Repair()
    assert not repair


def test_an_empty_host_gets_each_table_in_one_transaction() -> None:
    repair = iptables_repair(CHAINS, EMPTY)
    assert repair.is_new
    assert repair.script == (
        "*nat\n:FLANNEL-POSTRTG - [0:0]\n"
        + "".join(f"-A FLANNEL-POSTRTG {rule}\n" for rule in CHAINS[0].rules)
        + NAT_JUMP
        + "COMMIT\n*filter\n:FLANNEL-FWD - [0:0]\n"
        + "".join(f"-A FLANNEL-FWD {rule}\n" for rule in CHAINS[1].rules)
        + '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD\nCOMMIT\n'
    )
    assert repair.findings == (
        "missing chain FLANNEL-POSTRTG",
        "missing jump in POSTROUTING",
        "missing chain FLANNEL-FWD",
        "missing jump in FORWARD",
    )


REWRITE = "*nat\n:FLANNEL-POSTRTG - [0:0]\n" + "".join(f"-A FLANNEL-POSTRTG {rule}\n" for rule in CHAINS[0].rules)
RULE_2 = NAT.splitlines(keepends=True)[11]


def drop(line: str) -> Callable[[str], str]:
    return lambda saved: saved.replace(line, "", 1)


@pytest.mark.parametrize(
    ("change", "script", "found"),
    [
        (drop(RULE_2), REWRITE + "COMMIT\n", "other rules in chain FLANNEL-POSTRTG"),
        (lambda s: s.replace(RULE_2, RULE_2 * 2), REWRITE + "COMMIT\n", "other rules in chain FLANNEL-POSTRTG"),
        (
            lambda s: s.replace(RULE_2, "") + RULE_2,
            REWRITE + "COMMIT\n",
            "other rules in chain FLANNEL-POSTRTG",
        ),
        (
            lambda s: s + "-A FLANNEL-POSTRTG -j ACCEPT\n",
            REWRITE + "COMMIT\n",
            "other rules in chain FLANNEL-POSTRTG",
        ),
        (
            lambda s: s.replace("10.244.7.0/24", "10.244.9.0/24"),
            REWRITE + "COMMIT\n",
            "other rules in chain FLANNEL-POSTRTG",
        ),
        (drop(NAT_JUMP), f"*nat\n{NAT_JUMP}COMMIT\n", "missing jump in POSTROUTING"),
        (
            lambda s: s.replace(NAT_JUMP, NAT_JUMP * 3),
            f"*nat\n{NAT_JUMP.replace('-A', '-D') * 2}COMMIT\n",
            "3 jumps in POSTROUTING",
        ),
    ],
    ids=["missing", "twice", "out of order", "foreign", "old subnet", "no jump", "three jumps"],
)
def test_each_difference_is_found_and_set_right(change: Callable[[str], str], script: str, found: str) -> None:
    repair = iptables_repair(CHAINS, {"nat": change(NAT), "filter": FILTER})
    assert (repair.script, repair.findings, repair.is_new) == (script, (found,), False)


def test_a_jump_stays_wherever_it_stands_among_the_others() -> None:
    first = NAT.replace(NAT_JUMP, "").replace(
        '-A POSTROUTING -m comment --comment "kube', NAT_JUMP + '-A POSTROUTING -m comment --comment "kube'
    )
    assert first.index("flanneld") < first.index("kubernetes")
    assert not iptables_repair(CHAINS, {"nat": first, "filter": FILTER})


def test_unwanted_chains_go_with_every_rule_that_leads_into_them() -> None:
    other = '-A POSTROUTING -o "it\\"s" -m comment --comment "to FLANNEL-POSTRTG, odd" -j FLANNEL-POSTRTG\n'
    mention = '-A POSTROUTING -m comment --comment "not -j FLANNEL-POSTRTG" -j RETURN\n'
    saved = NAT.replace(NAT_JUMP, NAT_JUMP + other + mention)
    repair = iptables_repair(iptables_chains(DesiredRules()), {"nat": saved, "filter": EMPTY["filter"]})
    assert repair.script == (
        f"*nat\n{NAT_JUMP.replace('-A', '-D')}{other.replace('-A', '-D')}"
        ":FLANNEL-POSTRTG - [0:0]\n-X FLANNEL-POSTRTG\nCOMMIT\n"
    )
    assert repair.findings == ("leftover chain FLANNEL-POSTRTG",)
    assert not iptables_repair(iptables_chains(DesiredRules()), EMPTY)
    assert not iptables_repair(iptables_chains(DesiredRules()), {"nat": "", "filter": ""})


OLD_NAT = """\
-A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN
-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE
-A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.9.0/24 -j RETURN
-A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE
"""
OLD_FILTER = "-A FORWARD -s 10.5.0.0/16 -j ACCEPT\n-A FORWARD -d 10.5.0.0/16 -j ACCEPT\n"
OLD = IPv4Network("10.5.0.0/16"), IPv4Network("10.5.9.0/24")


@pytest.mark.parametrize("target", ["MASQUERADE", "MASQUERADE --random-fully"])
def test_rules_of_flannel_before_0_20_go_one_by_one(target: str) -> None:
    old_nat = OLD_NAT.replace("MASQUERADE", target)
    saved = {
        "nat": NAT + old_nat,
        "filter": FILTER + OLD_FILTER,
    }
    repair = iptables_leftovers(saved, *OLD)
    assert repair.script == (
        "*nat\n" + old_nat.replace("-A", "-D") + "COMMIT\n*filter\n" + OLD_FILTER.replace("-A", "-D") + "COMMIT\n"
    )
    assert repair.findings == ("leftover rules of an older flannel for 10.5.0.0/16",)
    saved["filter"] = FILTER
    assert iptables_leftovers(saved, *OLD).script == "*nat\n" + old_nat.replace("-A", "-D") + "COMMIT\n"


def test_rules_that_might_be_somebody_elses_stay() -> None:
    for line in OLD_NAT.splitlines(keepends=True):
        saved = {"nat": NAT + OLD_NAT.replace(line, ""), "filter": FILTER + OLD_FILTER}
        assert not iptables_leftovers(saved, *OLD)
    saved = {"nat": NAT + OLD_NAT, "filter": FILTER}
    assert not iptables_leftovers(saved, NETWORK, SUBNET)
    assert not iptables_leftovers({"nat": "", "filter": ""}, *OLD)
    odd = "-A POSTROUTING -m comment --comment FLANNEL-POSTRTG's -j RETURN\n"
    assert not iptables_repair(CHAINS, {"nat": NAT + odd, "filter": FILTER})


# --- several daemons on a host

OTHER, OTHERS_SUBNET = IPv4Network("10.12.0.0/16"), IPv4Network("10.12.9.0/24")
OTHERS = DesiredRules(masquerade(OTHER, OTHERS_SUBNET, False), forward(OTHER))


def listing(*blocks: DesiredRules) -> dict[str, str]:
    """What `iptables -S` prints of both chains with these blocks of rules and a jump to each."""
    text = {"nat": "-N FLANNEL-POSTRTG\n" + NAT_JUMP, "filter": "".join(FILTER.splitlines(keepends=True)[:5])}
    for block in blocks:
        for chain in iptables_chains(block):
            text[chain.table] += "".join(f"-A {chain.name} {rule}\n" for rule in chain.rules)
    return text


def desired_beside(listed: dict[str, str], ours: DesiredRules = WANTED) -> DesiredRules:
    return iptables_present(listed["nat"], listed["filter"]).with_ours(ours, [NETWORK])


def added(first: DesiredRules, second: DesiredRules) -> DesiredRules:
    return DesiredRules((*first.masquerade, *second.masquerade), (*first.forward, *second.forward))


@pytest.mark.parametrize("blocks", [(WANTED, OTHERS), (OTHERS, WANTED)], ids=["first", "second"])
def test_rules_of_two_daemons_stand_beside_each_other_in_either_order(
    blocks: tuple[DesiredRules, DesiredRules],
) -> None:
    """Each of them took the other's for foreign rules and removed them, for ever."""
    listed = listing(*blocks)
    present = iptables_present(listed["nat"], listed["filter"])
    for ours, network in ((WANTED, NETWORK), (OTHERS, OTHER)):
        desired = present.with_ours(ours, [network])
        assert desired == added(*blocks)
        assert not iptables_repair(iptables_chains(desired), listed)
        assert present.networks_of_others([network]) == {NETWORK, OTHER} - {network}


def test_block_is_written_beside_the_others_and_replaced_in_its_place() -> None:
    assert desired_beside(listing(OTHERS)) == added(OTHERS, WANTED)
    assert not iptables_present(*listing(OTHERS).values()).has_ours([NETWORK])
    old = DesiredRules(masquerade(NETWORK, IPv4Network("10.244.9.0/24"), True), forward(NETWORK))
    assert desired_beside(listing(old, OTHERS)) == added(WANTED, OTHERS)
    assert iptables_present(*listing(old, OTHERS).values()).has_ours([NETWORK])


@pytest.mark.parametrize(
    "foreign",
    [
        "-A FLANNEL-FWD -j ACCEPT\n",
        '-A FLANNEL-FWD -m comment --comment "flanneld forward" -j ACCEPT\n',
        "-A FLANNEL-FWD -d 10.12.0.0/16 -j ACCEPT\n",
        '-A FLANNEL-FWD -d 10.12.0.1/32 -m comment --comment "flanneld forward" -j ACCEPT\n',
        '-A FLANNEL-FWD -d 10.12.0.0/16 -p tcp -m comment --comment "flanneld forward" -j ACCEPT\n',
        '-A FLANNEL-FWD -s 10.244.0.0/16 -d 10.12.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT\n',
        '-A FLANNEL-FWD -d 10.0.0.0/8 -m comment --comment "flanneld forward" -j ACCEPT\n',
        '-A FLANNEL-FWD -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld forward" -j RETURN\n',
    ],
)
def test_rule_that_is_no_other_daemons_goes(foreign: str) -> None:
    listed = listing(OTHERS, WANTED)
    listed["filter"] += foreign
    assert desired_beside(listed) == added(OTHERS, WANTED)
    repair = iptables_repair(iptables_chains(desired_beside(listed)), listed)
    assert repair.findings == ("other rules in chain FLANNEL-FWD",)


def test_other_daemons_rule_that_is_damaged_is_left_for_that_daemon_to_repair() -> None:
    for n in range(len(OTHERS.masquerade)):
        damaged = DesiredRules(OTHERS.masquerade[:n] + OTHERS.masquerade[n + 1 :], OTHERS.forward)
        for blocks in ((WANTED, damaged), (damaged, WANTED)):
            listed = listing(*blocks)
            assert not iptables_repair(iptables_chains(desired_beside(listed)), listed)
            theirs = iptables_present(*listed.values()).with_ours(OTHERS, [OTHER])
            assert theirs.masquerade in (
                (*WANTED.masquerade, *OTHERS.masquerade),
                (*OTHERS.masquerade, *WANTED.masquerade),
            )


def test_rules_of_one_daemon_go_and_the_chains_stay_for_the_other() -> None:
    listed = listing(WANTED, OTHERS)
    left = desired_beside(listed, DesiredRules())
    assert left == OTHERS
    repair = iptables_repair(iptables_chains(left), listed)
    assert "-X" not in repair.script
    assert "10.244." not in repair.script
    alone = listing(WANTED)
    assert "-X FLANNEL-FWD" in iptables_repair(iptables_chains(desired_beside(alone, DesiredRules())), alone).script


def test_nftables_rules_are_read_back_as_they_are_written() -> None:
    both = added(WANTED, OTHERS)
    items = nft_listing(both)
    present = nft_present(4, items)
    for ours, network in ((WANTED, NETWORK), (OTHERS, OTHER)):
        assert present.with_ours(ours, [network]) == both
        assert present.networks_of_others([network]) == {NETWORK, OTHER} - {network}
    assert nft_findings(4, nft_chains(both), items) == ()
    assert present.with_ours(DesiredRules(), [NETWORK]) == OTHERS


def test_flannels_own_nftables_rules_are_another_daemons_too() -> None:
    """Its rule about the mark has no mask."""
    items = nft_listing(OTHERS)
    marks = [item["rule"]["expr"][0] for item in items if "rule" in item and item["rule"]["chain"] == "postrtg"]
    marks[0]["match"]["left"] = {"meta": {"key": "mark"}}
    assert nft_present(4, items).with_ours(WANTED, [NETWORK]) == added(OTHERS, WANTED)


@pytest.mark.parametrize(
    "expressions",
    [
        [{"accept": None}],
        [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.0.0.1"}}],
        [{"counter": {"packets": 0, "bytes": 0}}, {"accept": None}],
        [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}, {"accept": None}],
        [{"jump": {"target": "x"}}],
        [],
    ],
)
def test_nftables_rule_that_is_no_other_daemons_goes(expressions: list[dict[str, Any]]) -> None:
    items = nft_listing(added(OTHERS, WANTED))
    rule = {"family": "ip", "table": "flannel-ipv4", "chain": "forward", "expr": expressions}
    assert nft_present(4, [*items, {"rule": rule}]).with_ours(WANTED, [NETWORK]) == added(OTHERS, WANTED)


def nft_listing(rules: DesiredRules) -> list[dict[str, Any]]:
    """What nft lists of a table with these rules."""
    table = {"family": "ip", "table": "flannel-ipv4"}
    items: list[dict[str, Any]] = [{"table": {"family": "ip", "name": "flannel-ipv4"}}]
    heads = {"postrtg": ("nat", "postrouting", 100), "forward": ("filter", "forward", 0)}
    for chain, of_chain in (("postrtg", rules.masquerade), ("forward", rules.forward)):
        kind, hook, priority = heads[chain]
        head = {"name": chain, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}
        items.append({"chain": {**table, **head}})
        items += [{"rule": {**table, "chain": chain, "expr": nft_expressions(rule)}} for rule in of_chain]
    return items


def nft_expressions(rule: Rule) -> list[dict[str, Any]]:
    mark = {"&": [{"meta": {"key": "mark"}}, 0x4000]}
    found = [{"match": {"op": "==", "left": mark, "right": 0x4000}}] if rule.marked else []
    for field, network, is_not in (
        ("saddr", rule.source, rule.not_source),
        ("daddr", rule.destination, rule.not_destination),
    ):
        found += [match(field, str(network), "!=" if is_not else "==")] if network else []
    return [*found, {rule.verdict.value: {"flags": "fully-random"} if rule.random_fully else None}]


# --- the nftables form


def test_nftables_rules_are_flannels_with_its_two_mistakes_put_right() -> None:
    assert (
        nft_script(4, nft_chains(WANTED))
        == """\
add table ip flannel-ipv4
delete table ip flannel-ipv4
table ip flannel-ipv4 {
	comment "rules for flannel-ipv4"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.244.7.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.7.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.7.0/24 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}
	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
}
"""
    )


def test_nftables_table_has_only_the_chains_that_are_wanted() -> None:
    assert [chain.name for chain in nft_chains(DesiredRules(forward=WANTED.forward))] == ["forward"]
    assert [chain.name for chain in nft_chains(DesiredRules(WANTED.masquerade))] == ["postrtg"]
    assert nft_chains(DesiredRules()) == ()


def match(field: str, network: str, op: str = "==") -> dict[str, Any]:
    address, length = network.split("/")
    right = {"prefix": {"addr": address, "len": int(length)}}
    return {"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": field}}, "right": right}}


def listed() -> list[dict[str, Any]]:
    """What nft 1.0.6 lists of a table with the forward chain alone."""
    table = {"family": "ip", "table": "flannel-ipv4"}
    chain = {"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}
    return [
        {"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
        {"table": {"family": "ip", "name": "flannel-ipv4", "handle": 2}},
        {"chain": {**table, "name": "forward", "handle": 1, **chain}},
        *(
            {
                "rule": {
                    **table,
                    "chain": "forward",
                    "handle": 3,
                    "expr": [match(field, "10.244.0.0/16"), {"accept": None}],
                }
            }
            for field in ("saddr", "daddr")
        ),
    ]


FORWARD = nft_chains(DesiredRules(forward=WANTED.forward))


def test_nothing_is_found_in_a_table_that_is_as_wanted_with_or_without_comments() -> None:
    assert nft_findings(4, FORWARD, listed()) == ()
    newer = listed()
    newer[1]["table"]["comment"] = "rules for flannel-ipv4"
    newer[2]["chain"]["comment"] = "chain to accept flannel traffic"
    assert nft_findings(4, FORWARD, newer) == ()


@pytest.mark.parametrize("flags", ["fully-random", ["fully-random"]])
def test_masquerade_flags_may_stand_in_a_list_or_not(flags: object) -> None:
    table = {"family": "ip", "table": "flannel-ipv4"}
    mark = {"&": [{"meta": {"key": "mark"}}, 0x4000]}
    network, subnet = str(NETWORK), str(SUBNET)
    masquerade_it = {"masquerade": {"flags": flags}}
    rules: list[list[dict[str, Any]]] = [
        [{"match": {"op": "==", "left": mark, "right": 0x4000}}, {"return": None}],
        [match("saddr", subnet), match("daddr", network), {"return": None}],
        [match("saddr", network), match("daddr", subnet), {"return": None}],
        [match("saddr", network, "!="), match("daddr", subnet), {"return": None}],
        [match("saddr", network), match("daddr", "224.0.0.0/4", "!="), masquerade_it],
        [match("saddr", network, "!="), match("daddr", network), masquerade_it],
    ]
    hook = {"name": "postrtg", "type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}
    items = [
        {"table": {"family": "ip", "name": "flannel-ipv4"}},
        {"chain": {**table, **hook}},
        *({"rule": {**table, "chain": "postrtg", "expr": rule}} for rule in rules),
    ]
    assert nft_findings(4, nft_chains(DesiredRules(WANTED.masquerade)), items) == ()
    assert nft_findings(4, nft_chains(DesiredRules(masquerade(NETWORK, SUBNET, False))), items) != ()


def swap_rules(items: list[dict[str, Any]]) -> None:
    items[3], items[4] = items[4], items[3]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda items: items.clear(), "missing table ip flannel-ipv4"),
        (lambda items: items[1]["table"].update(flags=["dormant"]), "other flags of table ip flannel-ipv4"),
        (lambda items: items[2]["chain"].update(policy="drop"), "missing or changed chain forward"),
        (lambda items: items[2]["chain"].update(prio=5), "missing or changed chain forward"),
        (lambda items: items.pop(), "other rules in chain forward"),
        (lambda items: items.append(copy.deepcopy(items[-1])), "other rules in chain forward"),
        (swap_rules, "other rules in chain forward"),
        (lambda items: items[4]["rule"]["expr"].insert(0, {"counter": {}}), "other rules in chain forward"),
        (
            lambda items: items.append({"chain": {"family": "ip", "table": "flannel-ipv4", "name": "postrtg"}}),
            "other objects in table ip flannel-ipv4",
        ),
        (
            lambda items: items.append({"set": {"family": "ip", "table": "flannel-ipv4", "name": "forward"}}),
            "other objects in table ip flannel-ipv4",
        ),
    ],
)
def test_each_difference_of_the_table_is_found(change: Callable[[list[dict[str, Any]]], object], found: str) -> None:
    items = listed()
    change(items)
    assert nft_findings(4, FORWARD, items) == (found,)


def test_the_tables_are_those_of_flannel() -> None:
    assert TABLES == {4: ("ip", "flannel-ipv4"), 6: ("ip6", "flannel-ipv6")}

"""Which rules of others are named because they drop the overlay's packets, and which are not.

    pods -- cni0 [namespace] flannel0 -- other hosts

The rules are set with the tools that people use, and read from the kernel.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import pytest
from namespace import Namespace, namespace, requires_netns

from udptun.core.pod_path import PodPath
from udptun.core.tunnel_path import TunnelPath
from udptun.firewall.obstacles import kernel_rules
from udptun.firewall.obstacles.watch import Obstacles

pytestmark = [pytest.mark.netns, requires_netns]

NETWORK = IPv4Network("10.244.0.0/16")
PATH = PodPath(NETWORK, IPv4Network("10.244.1.0/24"), "flannel0")
IPV6_NETWORK = IPv6Network("fd00:244::/48")
IPV6_PATH = PodPath(IPV6_NETWORK, IPv6Network("fd00:244:0:1::/64"), "flannel0")

BOTH = "between pods here and other hosts"
OUT = "from pods here to other hosts"
IN = "from other hosts to pods here"
DOCKERS = 'if Docker has set it, `"allow-direct-routing": true` in daemon.json ends it; else delete the rule'

ACCEPT = f"-s {NETWORK} -j ACCEPT\n-A FORWARD -d {NETWORK} -j ACCEPT"


ETH0 = "192.0.2.1", "2001:db8::1"


@pytest.fixture(scope="module")
def _world() -> Iterator[Namespace]:
    with namespace() as ns:
        for link, address in (("cni0", "10.244.1.1/24"), ("docker0", "172.17.0.1/16")):
            ns.ip(f"link add {link} type bridge")
            ns.ip(f"address add {address} dev {link}")
        ns.ip("link add flannel0 type veth peer name other0")
        ns.ip("link add eth0 type bridge")
        run(ns, "sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0")
        ns.ip("address add fd00:244:0:1::1/64 dev cni0 nodad")
        ns.ip(f"address add {ETH0[0]}/24 dev eth0")
        ns.ip(f"address add {ETH0[1]}/64 dev eth0 nodad")
        ns.ip("address add 192.0.2.200/32 dev lo")
        yield ns


CHAINS = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "raw": ("PREROUTING", "OUTPUT"),
}
"""The built-in chains of each table."""


@pytest.fixture
def world(_world: Namespace) -> Namespace:
    """A namespace without any rule."""
    run(_world, "nft flush ruleset")
    for program, names in (("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")):
        tables = _world.call(lambda names=names: Path(f"/proc/thread-self/net/{names}").read_text().split())
        if tables:
            empty = [f"*{table}\n" + "".join(f":{it} ACCEPT [0:0]\n" for it in CHAINS[table]) for table in tables]
            restore(_world, program, "".join(empty))
    return _world


def run(ns: Namespace, script: str) -> None:
    subprocess.run(["ip", "netns", "exec", ns.name, "sh", "-ec", script], check=True, timeout=30)


def restore(ns: Namespace, program: str, text: str) -> None:
    """`text` in the form of iptables-save; COMMITs and the filter table go without saying."""
    if not text.startswith("*"):
        text = f"*filter\n{text}"
    text = re.sub(r"\n\*", "\nCOMMIT\n*", text) + "\nCOMMIT\n"
    argv = ["ip", "netns", "exec", ns.name, f"{program}-restore"]
    subprocess.run(argv, input=text, text=True, check=True, timeout=30)


def problems(ns: Namespace, *paths: PodPath, tunnel: Sequence[TunnelPath] = ()) -> tuple[str, ...]:
    """Of the pods' IPv4 where no path is given."""

    async def look() -> tuple[str, ...]:
        obstacles = Obstacles(lambda: paths or ([] if tunnel else [PATH]), lambda: tunnel)
        await obstacles.look()
        return obstacles.problems

    return ns.call_async(look)


IPTABLES = ["iptables-nft", "iptables-legacy"]

LOUD = {
    "REJECT in FORWARD": (
        f"-A FORWARD -j REJECT\n-A FORWARD {ACCEPT}",
        "rule 1 of FORWARD ({}, table filter) rejects",
        BOTH,
    ),
    "as RHEL's iptables-services": (
        "-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT\n"
        "-A FORWARD -j REJECT --reject-with icmp-host-prohibited",
        "rule 2 of FORWARD ({}, table filter) rejects",
        BOTH,
    ),
    "behind rules of kube-proxy": (
        ":KUBE-FORWARD - [0:0]\n"
        '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD\n'
        "-A FORWARD -j DROP\n"
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n"
        "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n"
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "rule 2 of FORWARD ({}, table filter) drops",
        BOTH,
    ),
    "policy": (":FORWARD DROP [0:0]", "the policy of FORWARD ({}, table filter) drops", BOTH),
    "policy, one direction accepted": (
        f":FORWARD DROP [0:0]\n-A FORWARD -s {NETWORK} -i cni0 -j ACCEPT",
        "the policy of FORWARD ({}, table filter) drops",
        IN,
    ),
    "by the pods' link": ("-A FORWARD -i cni+ -j DROP", "rule 1 of FORWARD ({}, table filter) drops", OUT),
    "by other links": ("-A FORWARD ! -i docker0 -o cni0 -j DROP", "rule 1 of FORWARD ({}, table filter) drops", IN),
    "in Docker's chain for users": (
        ":DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -i flannel0 -j DROP",
        "rule 1 of DOCKER-USER ({}, table filter) drops",
        IN,
    ),
    "a published port before Docker's drop": (
        ":DOCKER - [0:0]\n-A FORWARD -o cni0 -j DOCKER\n"
        "-A DOCKER -d 10.244.1.2/32 ! -i cni0 -o cni0 -p tcp -m tcp --dport 80 -j ACCEPT\n"
        "-A DOCKER ! -i cni0 -o cni0 -j DROP",
        "rule 2 of DOCKER ({}, table filter) drops some",
        IN,
    ),
    "Docker's raw rule for a container": (
        "*raw\n-A PREROUTING -d 10.244.1.2/32 ! -i cni0 -j DROP",
        "rule 1 of PREROUTING ({}, table raw) drops some",
        IN,
    ),
    "a part of the overlay": (
        "-A FORWARD -s 10.244.0.0/17 -d 10.0.0.0/8 -j DROP",
        "rule 1 of FORWARD ({}, table filter) drops",
        BOTH,
    ),
    "one host of the overlay": (
        "-A FORWARD -s 10.244.7.0/24 -j DROP",
        "rule 1 of FORWARD ({}, table filter) drops some",
        IN,
    ),
    "all but strangers": ("-A FORWARD ! -s 10.9.0.0/16 -j DROP", "rule 1 of FORWARD ({}, table filter) drops", BOTH),
    "mangle": ("*mangle\n-A PREROUTING -j DROP", "rule 1 of PREROUTING ({}, table mangle) drops", BOTH),
    "behind goto and return": (
        ":A - [0:0]\n:B - [0:0]\n-A FORWARD -j A\n-A FORWARD -j DROP\n"
        "-A A -s 10.9.0.0/16 -j RETURN\n-A A -g B\n-A A -j ACCEPT\n-A B -m limit --limit 1/s -j LOG",
        "rule 2 of FORWARD ({}, table filter) drops",
        BOTH,
    ),
    "a mark that nobody sets": (
        "-A FORWARD -m mark --mark 1 -j ACCEPT\n-A FORWARD -j DROP",
        "rule 2 of FORWARD ({}, table filter) drops",
        BOTH,
    ),
}
"""Rules, and the beginning and end of the line up to the remedy."""


@pytest.mark.parametrize("program", IPTABLES)
@pytest.mark.parametrize("what", LOUD)
def test_rule_of_iptables_that_drops_is_named(world: Namespace, what: str, program: str) -> None:
    """Pods reached nobody, and `udptun status` said that all was well."""
    rules, begin, direction = LOUD[what]
    restore(world, program, rules)
    (line,) = problems(world)
    assert line.partition("; ")[0] == f"{begin.format(program)} packets {direction}"


SILENT = {
    "no rules": "-A INPUT -j DROP",
    "flannel's rules": f":FORWARD DROP [0:0]\n-A FORWARD {ACCEPT}",
    "flannel's rules, then REJECT": f"-A FORWARD {ACCEPT}\n-A FORWARD -j REJECT",
    "Docker beside a CNI plugin": (
        ":FORWARD DROP [0:0]\n:DOCKER - [0:0]\n:ISOLATION-1 - [0:0]\n:ISOLATION-2 - [0:0]\n:DOCKER-USER - [0:0]\n"
        "-A FORWARD -j DOCKER-USER\n-A FORWARD -j ISOLATION-1\n-A FORWARD -o docker0 -j DOCKER\n"
        f"-A FORWARD -i docker0 -j ACCEPT\n-A FORWARD {ACCEPT}\n"
        "-A ISOLATION-1 -i docker0 ! -o docker0 -j ISOLATION-2\n-A ISOLATION-2 -o br-1 -j DROP\n"
        "-A DOCKER ! -i docker0 -o docker0 -j DROP\n"
        "*raw\n-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP"
    ),
    "a policy by marks, as kube-router's": (
        ":POD - [0:0]\n:NETPOL - [0:0]\n-A FORWARD -d 10.244.1.5/32 -j POD\n"
        "-A POD -j NETPOL\n-A POD -m mark ! --mark 0x10000/0x10000 -j REJECT\n"
        "-A NETPOL -p tcp --dport 80 -j MARK --set-xmark 0x10000/0x10000"
    ),
    "a policy by marks, as Calico's": (
        ":cali-fw - [0:0]\n:cali-po - [0:0]\n-A FORWARD -i cni+ -j cali-fw\n-A cali-fw -j cali-po\n"
        "-A cali-fw -m mark --mark 0x10000/0x10000 -j RETURN\n-A cali-fw -j DROP\n"
        "-A cali-po -p tcp -j MARK --set-xmark 0x10000/0x10000"
    ),
    "marks set before": "-A FORWARD -m mark ! --mark 1 -j DROP\n*mangle\n-A PREROUTING -p tcp -j MARK --set-mark 1",
    "ports that are accepted": "-A FORWARD -p tcp --dport 443 -j ACCEPT\n-A FORWARD -j DROP",
    "ports that are dropped": f"-A FORWARD -s {NETWORK} -p tcp --dport 25 -j DROP",
    "a limit": "-A FORWARD -m limit --limit 10/s -j DROP",
    "a state of connections that go on": "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "another network": "-A FORWARD -s 10.9.0.0/16 -j DROP\n-A FORWARD -d 192.168.0.0/16 -j REJECT",
    "another link": "-A FORWARD -i eth0 -j DROP\n-A FORWARD -o docker+ -j DROP",
    "between pods of this host": "-A FORWARD -i cni0 -o cni0 -j DROP",
    "a target that we do not know": "-A FORWARD -j NFQUEUE --queue-num 1\n-A FORWARD -j DROP",
    "accepted in two halves": (
        "-A FORWARD -s 0.0.0.0/1 -j ACCEPT\n-A FORWARD -s 128.0.0.0/1 -j ACCEPT\n-A FORWARD -j DROP"
    ),
    "accepted in a part that may be the one": "-A FORWARD -s 10.244.7.0/24 -j ACCEPT\n-A FORWARD -s 10.244.7.8 -j DROP",
}


@pytest.mark.parametrize("program", IPTABLES)
@pytest.mark.parametrize("what", SILENT)
def test_rule_of_iptables_that_need_not_drop_is_not_named(world: Namespace, what: str, program: str) -> None:
    restore(world, program, SILENT[what])
    assert problems(world) == ()


BASE = "type filter hook forward priority 0; policy {};"


def nft(ns: Namespace, text: str) -> None:
    """`text` are the tables as `nft list ruleset` shows them."""
    argv = ["ip", "netns", "exec", ns.name, "nft", "-f", "-"]
    subprocess.run(argv, input=text, text=True, check=True, timeout=30)


def table(*rules: str, policy: str = "accept", more: str = "", name: str = "inet t", hook: str = BASE) -> str:
    lines = "\n".join(rules)
    return f"table {name} {{\n{more}\nchain c {{\n{hook.format(policy)}\n{lines}\n}}\n}}"


LOUD_NFT = {
    "policy": (table(policy="drop"), "the policy of chain c (nft, table inet t) drops packets", BOTH),
    "policy, all but our packets accepted": (
        table(
            "ct state { established, related } accept",
            "ct state established,related accept",
            "ct state vmap { invalid : drop, established : accept }",
            "ct status dnat accept",
            'iifname "lo" accept',
            'iif "lo" accept',
            'iifname { "docker0", "eth0" } accept',
            'iifname "eth*" oifname != "cni0" accept',
            "meta nfproto ipv6 accept",
            "meta protocol ip6 accept",
            "ip6 saddr fd00::/8 accept",
            "ip saddr 10.9.0.0/16 accept",
            "ip saddr { 10.9.0.0/16, 192.168.1.0-192.168.7.255 } accept",
            "ip daddr @others accept",
            "ip daddr != 10.0.0.0/8 accept",
            "ip daddr > 11.0.0.0 accept",
            "meta mark & 0xff == 0x1 accept",
            "counter",
            'log prefix "x"',
            policy="drop",
            more="set others { type ipv4_addr; flags interval; elements = { 172.16.0.0/12 }; }",
        ),
        "the policy of chain c (nft, table inet t) drops packets",
        BOTH,
    ),
    "rule": (
        table("ip daddr 10.244.0.0/16 drop"),
        "the rule with handle 2 of chain c (nft, table inet t) drops packets",
        BOTH,
    ),
    "a part, behind a map of links": (
        table(
            'iifname vmap { "flannel0" : jump from_others, "eth0" : drop }',
            more="chain from_others { ip saddr 10.244.7.0/24 reject; }",
            name="ip t",
            hook="type filter hook prerouting priority -300; policy {};",
        ),
        "the rule with handle 3 of chain from_others (nft, table ip t) rejects some packets",
        IN,
    ),
    "a set of ours": (
        table("ip saddr @bad drop", more="set bad { type ipv4_addr; flags interval; elements = { 10.244.7.0/24 }; }"),
        "the rule with handle 3 of chain c (nft, table inet t) drops some packets",
        IN,
    ),
}


@pytest.mark.parametrize("what", LOUD_NFT)
def test_chain_of_nftables_that_drops_is_named(world: Namespace, what: str) -> None:
    """iptables does not show such a table, so nobody looked there."""
    text, begin, direction = LOUD_NFT[what]
    nft(world, text)
    (line,) = problems(world)
    assert line.partition("; ")[0] == f"{begin} {direction}"


SILENT_NFT = {
    "accepted by set": table(
        "ip saddr @net accept",
        policy="drop",
        more="set net { type ipv4_addr; flags interval; elements = { 10.240.0.0/12 }; }",
    ),
    "accepted by link": table(
        "iifname cni0 oifname flannel0 accept", 'iif . oif { "flannel0" . "cni0" } accept', policy="drop"
    ),
    "accepted by a pair that we cannot judge": table(
        "ip saddr . ip daddr { 10.244.7.1 . 10.244.1.2 } accept", policy="drop"
    ),
    "accepted by address as numbers": table("ip saddr >= 10.244.0.0 ip saddr < 10.245.0.0 accept", policy="drop"),
    "accepted behind a map": table(
        "ip saddr vmap { 10.244.0.0/16 : jump ours }", policy="drop", more="chain ours { accept; }"
    ),
    "strict reverse path": table(
        "fib saddr . iif oif missing drop", hook="type filter hook prerouting priority -150; policy {};"
    ),
    "dormant": table(policy="drop", more="flags dormant;"),
    "input": table("drop", hook="type filter hook input priority 0; policy {};"),
    "only IPv6": table(policy="drop", name="ip6 t"),
    "only frames": table(policy="drop", name="bridge t"),
    "addresses rewritten": table(
        "ip daddr set 10.9.0.1", "drop", hook="type filter hook prerouting priority -300; policy {};"
    ),
    "marked by itself": table("meta mark set 1", "meta mark 1 accept", policy="drop"),
}


@pytest.mark.parametrize("what", SILENT_NFT)
def test_chain_of_nftables_that_need_not_drop_is_not_named(world: Namespace, what: str) -> None:
    nft(world, SILENT_NFT[what])
    assert problems(world) == ()


IP6TABLES = ["ip6tables-nft", "ip6tables-legacy"]
LOUD_IPV6 = {
    "REJECT": ("-A FORWARD -j REJECT", "rule 1 of FORWARD ({}, table filter) rejects IPv6", BOTH),
    "policy": (":FORWARD DROP [0:0]", "the policy of FORWARD ({}, table filter) drops IPv6", BOTH),
    "one host of the overlay": (
        "-A FORWARD -s fd00:244:0:8::/64 -p udp -j ACCEPT\n-A FORWARD -s fd00:244:0:7::/64 -j DROP",
        "rule 2 of FORWARD ({}, table filter) drops some IPv6",
        IN,
    ),
    "by the pods' link": ("-A FORWARD -i cni+ -j DROP", "rule 1 of FORWARD ({}, table filter) drops IPv6", OUT),
    "Docker's raw rule for a container": (
        "*raw\n-A PREROUTING -d fd00:244:0:1::2/128 ! -i cni0 -j DROP",
        "rule 1 of PREROUTING ({}, table raw) drops some IPv6",
        IN,
    ),
    "behind goto and return": (
        ":A - [0:0]\n:B - [0:0]\n-A FORWARD -j A\n-A FORWARD -j DROP\n"
        "-A A -s 2001:db8::/32 -j RETURN\n-A A -g B\n-A A -j ACCEPT\n-A B -m hl --hl-gt 9 -j LOG",
        "rule 2 of FORWARD ({}, table filter) drops IPv6",
        BOTH,
    ),
    "all but strangers": (
        "-A FORWARD ! -d 2001:db8::/32 -j DROP",
        "rule 1 of FORWARD ({}, table filter) drops IPv6",
        BOTH,
    ),
}


@pytest.mark.parametrize("program", IP6TABLES)
@pytest.mark.parametrize("what", LOUD_IPV6)
def test_rule_of_ip6tables_that_drops_is_named(world: Namespace, what: str, program: str) -> None:
    """Pods had no IPv6 to other hosts, and `udptun status` said that all was well."""
    rules, begin, direction = LOUD_IPV6[what]
    restore(world, program, rules)
    (line,) = problems(world, PATH, IPV6_PATH)
    assert line.partition("; ")[0] == f"{begin.format(program)} packets {direction}"


SILENT_IPV6 = {
    "flannel's rules": f":FORWARD DROP [0:0]\n-A FORWARD {ACCEPT}".replace(str(NETWORK), str(IPV6_NETWORK)),
    "some packets": "-A FORWARD -p tcp -j DROP\n-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "input": ":INPUT DROP [0:0]\n-A INPUT -j DROP",
    "accepted by a part of each": (
        ":FORWARD DROP [0:0]\n-A FORWARD -s fd00:244::/32 -d fd00::/8 -j ACCEPT\n-A FORWARD -j DROP"
    ),
}


@pytest.mark.parametrize("program", IP6TABLES)
@pytest.mark.parametrize("what", SILENT_IPV6)
def test_rule_of_ip6tables_that_need_not_drop_is_not_named(world: Namespace, what: str, program: str) -> None:
    restore(world, program, SILENT_IPV6[what])
    assert problems(world, PATH, IPV6_PATH) == ()


LOUD_IPV6_NFT = {
    "a table of both families": (
        table("meta nfproto ipv6 drop"),
        "handle 2 of chain c (nft, table inet t) drops IPv6",
        BOTH,
    ),
    "what accepts IPv4 alone": (
        table("ip saddr 0.0.0.0/0 accept", "meta protocol ip accept", policy="drop"),
        "policy of chain c (nft, table inet t) drops IPv6",
        BOTH,
    ),
    "a set without an end": (
        table(
            "ip6 saddr @bad drop",
            more="set bad { type ipv6_addr; flags interval; elements = { fd00:244:0:7::-ffff::, 1::/16 }; }",
            name="ip6 t",
        ),
        "handle 3 of chain c (nft, table ip6 t) drops some IPv6",
        IN,
    ),
    "a part of the address": (
        table("ip6 daddr & ffff:ffff:ffff:ffff:: == fd00:244:0:7:: drop"),
        "handle 2 of chain c (nft, table inet t) drops some IPv6",
        OUT,
    ),
}


@pytest.mark.parametrize("what", LOUD_IPV6_NFT)
def test_chain_of_nftables_that_drops_ipv6_is_named(world: Namespace, what: str) -> None:
    text, begin, direction = LOUD_IPV6_NFT[what]
    nft(world, text)
    (line,) = problems(world, PATH, IPV6_PATH)
    assert begin in line
    assert line.partition("; ")[0].endswith(f" packets {direction}")


SILENT_IPV6_NFT = {
    "IPv4 alone": table("ip saddr 0.0.0.0/0 accept", "meta nfproto ipv4 drop", "ip daddr 10.0.0.0/8 drop"),
    "accepted by set": table(
        "ip6 saddr @net accept",
        policy="drop",
        more="set net { type ipv6_addr; flags interval; elements = { fd00::/8 }; }",
        name="ip6 t",
    ),
    "accepted by numbers": table("ip6 saddr >= fd00:: ip6 saddr < fe00:: accept", policy="drop", name="ip6 t"),
    "addresses rewritten": table(
        "ip6 daddr set fd99::1", "drop", hook="type filter hook prerouting priority -300; policy {};", name="ip6 t"
    ),
}


@pytest.mark.parametrize("what", SILENT_IPV6_NFT)
def test_chain_of_nftables_that_need_not_drop_ipv6_is_not_named(world: Namespace, what: str) -> None:
    nft(world, SILENT_IPV6_NFT[what])
    assert problems(world, IPV6_PATH) == ()


REMEDIES = [
    (
        "iptables-nft -A FORWARD -j DROP",
        ["iptables-nft -I FORWARD -s 10.244.0.0/16 -j ACCEPT", "iptables-nft -I FORWARD -d 10.244.0.0/16 -j ACCEPT"],
    ),
    (
        "iptables-legacy -t mangle -A FORWARD -j DROP",
        [
            "iptables-legacy -t mangle -I FORWARD -s 10.244.0.0/16 -j ACCEPT",
            "iptables-legacy -t mangle -I FORWARD -d 10.244.0.0/16 -j ACCEPT",
        ],
    ),
    (
        "iptables-legacy -P FORWARD DROP",
        [
            "iptables-legacy -A FORWARD -s 10.244.0.0/16 -j ACCEPT",
            "iptables-legacy -A FORWARD -d 10.244.0.0/16 -j ACCEPT",
        ],
    ),
    (
        "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; policy drop; }'",
        [
            "nft insert rule inet t c ip saddr 10.244.0.0/16 accept",
            "nft insert rule inet t c ip daddr 10.244.0.0/16 accept",
        ],
    ),
]


@pytest.mark.parametrize(("fault", "remedy"), REMEDIES, ids=[fault.split(" -")[0] for fault, _ in REMEDIES])
def test_remedy_that_the_line_names_is_one(world: Namespace, fault: str, remedy: Sequence[str]) -> None:
    run(world, fault)
    (line,) = problems(world)
    assert f"`{remedy[0]}`" in line
    run(world, "; ".join(remedy))
    assert problems(world) == ()


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [(fault.replace("iptables", "ip6tables").replace("inet", "ip6"), remedy) for fault, remedy in REMEDIES],
    ids=[fault.split(" -")[0] for fault, _ in REMEDIES],
)
def test_remedy_for_ipv6_is_one_too(world: Namespace, fault: str, remedy: Sequence[str]) -> None:
    run(world, fault)
    (line,) = problems(world, PATH, IPV6_PATH)
    for old, new in (("iptables", "ip6tables"), ("inet t c ip ", "ip6 t c ip6 "), (str(NETWORK), str(IPV6_NETWORK))):
        remedy = [command.replace(old, new) for command in remedy]
    assert f"`{remedy[0]}`" in line
    run(world, "; ".join(remedy))
    assert problems(world, PATH, IPV6_PATH) == ()


async def nothing_carried() -> tuple[str, ...]:
    obstacles = Obstacles(list, list)
    await obstacles.look()
    return obstacles.problems


def test_nothing_is_said_where_there_are_no_pods_or_nothing_is_carried(world: Namespace) -> None:
    run(world, "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; policy drop; }'")
    assert problems(world) != ()
    assert world.call_async(nothing_carried) == ()
    assert problems(world, PodPath(NETWORK, IPv4Network("10.244.2.0/24"), "flannel0")) == ()


def test_a_line_does_not_outlive_its_cause_where_a_reading_waits_for_the_processor(
    world: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules were not read again for 100 times as long as that took: for 20 s on a busy machine, where it took 0.2 s."""
    read = kernel_rules.read_nft

    async def read_slowly(*about: Any) -> Any:
        await asyncio.sleep(0.3)
        return await read(*about)

    async def look_before_and_after() -> tuple[tuple[str, ...], float]:
        obstacles = Obstacles(lambda: [PATH], list)
        await obstacles.look()
        before, healed_s = obstacles.problems, time.monotonic()
        await asyncio.to_thread(run, world, "nft delete table inet t")
        obstacles.note(None)
        while obstacles.problems:
            await obstacles.look()
            await asyncio.sleep(0.05)
        return before, time.monotonic() - healed_s

    monkeypatch.setattr(kernel_rules, "read_nft", read_slowly)
    run(world, "nft add table inet t; nft 'add chain inet t c { type filter hook forward priority 0; policy drop; }'")
    before, seconds = world.call_async(look_before_and_after)
    assert before != ()
    assert seconds < 15


def test_chain_with_very_many_rules_is_not_judged(world: Namespace) -> None:
    rules = "".join(f"-A FORWARD -s 10.9.{n >> 8}.{n & 255} -j ACCEPT\n" for n in range(3000))
    for program in IPTABLES:
        restore(world, program, f"{rules}-A FORWARD -j DROP")
    assert problems(world) == ()


# --- the tunnel's own datagrams

PEERS = ("192.0.2.7", "192.0.2.9"), ("2001:db8::7", "2001:db8::9")


def tunnel(version: int = 4, port: int = 8285, **changes: Any) -> TunnelPath:
    """Of a host with two peers."""
    i = (4, 6).index(version)
    peers = tuple(map(ip_address, PEERS[i]))
    return replace(TunnelPath("eth0", ip_address(ETH0[i]), port, peers, port, looks_answered=True), **changes)


UDP = tunnel()
VXLAN = tunnel(port=8472, looks_answered=False)
STATEFUL = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
INSIDE, OUTSIDE = "of peers to UDP port 8285 here", "from here to UDP port 8285 of peers"

TUNNEL_LOUD = {
    "the port": ("-A INPUT -p udp -m udp --dport 8285 -j DROP", "rule 1 of INPUT ({}, table filter) drops", INSIDE),
    "a range of ports": (
        "-A INPUT -p udp -m udp --dport 53 -j DROP\n-A INPUT -p udp -m udp --dport 8000:9000 -j REJECT",
        "rule 2 of INPUT ({}, table filter) rejects",
        INSIDE,
    ),
    "one of several ports": (
        "-A INPUT -p udp -m multiport --dports 53,8000:8300 -j DROP",
        "rule 1 of INPUT ({}, table filter) drops",
        INSIDE,
    ),
    "all that is not accepted": (
        ":INPUT DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n"
        "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n-A INPUT -p udp -m multiport --dports 53,67 -j ACCEPT",
        "the policy of INPUT ({}, table filter) drops",
        INSIDE,
    ),
    "all but TCP": ("-A INPUT ! -p tcp -j DROP", "rule 1 of INPUT ({}, table filter) drops", INSIDE),
    "before conntrack": (
        "*raw\n-A PREROUTING -i eth0 -p udp -m udp --dport 8285 -j DROP",
        "rule 1 of PREROUTING ({}, table raw) drops",
        INSIDE,
    ),
    "another zone's link": (
        "-A INPUT ! -i docker0 -p udp -j DROP",
        "rule 1 of INPUT ({}, table filter) drops",
        INSIDE,
    ),
    "one of the peers": ("-A INPUT -s {peer} -j DROP", "rule 1 of INPUT ({}, table filter) drops some", INSIDE),
    "behind what remembers connections": (
        f":INPUT DROP [0:0]\n-A INPUT {STATEFUL}",
        "the policy of INPUT ({}, table filter) drops",
        f"{INSIDE} unless this host has just sent to them",
    ),
    "out": ("-A OUTPUT -p udp -m udp --dport 8285 -j DROP", "rule 1 of OUTPUT ({}, table filter) drops", OUTSIDE),
    "out by the link": ("-A OUTPUT -o eth+ -j DROP", "rule 1 of OUTPUT ({}, table filter) drops", OUTSIDE),
    "out to one peer, late": (
        "*mangle\n-A POSTROUTING -d {peer} -j DROP",
        "rule 1 of POSTROUTING ({}, table mangle) drops some",
        OUTSIDE,
    ),
    "out, but for answers": (
        f":OUTPUT DROP [0:0]\n-A OUTPUT {STATEFUL}",
        "the policy of OUTPUT ({}, table filter) drops",
        f"{OUTSIDE} unless they have just sent to this host",
    ),
}
"""Rules, and the beginning and end of the line up to the remedy."""


def packets(version: int) -> str:
    return "packets" if version == 4 else "IPv6 packets"


@pytest.mark.parametrize(
    ("program", "version"), [*((it, 4) for it in IPTABLES), *((it, 6) for it in ("ip6tables-nft", "ip6tables-legacy"))]
)
@pytest.mark.parametrize("what", TUNNEL_LOUD)
def test_rule_that_drops_the_tunnels_own_datagrams_is_named(
    world: Namespace, what: str, program: str, version: int
) -> None:
    """A host whose own firewall lacked the port had peers that did not answer, and nothing said why."""
    rules, begin, direction = TUNNEL_LOUD[what]
    restore(world, program, rules.replace("{peer}", PEERS[version == 6][0]))
    (line,) = problems(world, tunnel=[tunnel(version)])
    assert line.partition("; ")[0] == f"{begin.format(program)} {packets(version)} {direction}"


TUNNEL_SILENT = {
    "the port is accepted": ":INPUT DROP [0:0]\n-A INPUT -p udp -m udp --dport 8285 -j ACCEPT",
    "one of several ports": ":INPUT DROP [0:0]\n-A INPUT -p udp -m multiport --dports 8285,8472 -j ACCEPT",
    "the peers are accepted": ":INPUT DROP [0:0]\n-A INPUT -s 192.0.2.0/24 -j ACCEPT",
    "the link is accepted": ":INPUT DROP [0:0]\n-A INPUT -i eth0 -j ACCEPT",
    "new ones are accepted": f":INPUT DROP [0:0]\n-A INPUT {STATEFUL}\n-A INPUT -p udp -j ACCEPT",
    "other ports": "-A INPUT -p udp -m udp ! --dport 8285 -j DROP\n-A INPUT -p udp -m multiport --dports 53 -j DROP",
    "other protocols": "-A INPUT -p tcp -j DROP\n-A INPUT -p icmp -j DROP",
    "other links": "-A INPUT -i docker0 -j DROP\n-A OUTPUT -o lo -j DROP",
    "others": "-A INPUT -s 198.51.100.0/24 -j DROP\n-A OUTPUT -d 198.51.100.0/24 -j DROP",
    "forwarded": ":FORWARD DROP [0:0]\n-A FORWARD -j DROP",
    "from a port that need not be ours": "-A INPUT -p udp -m udp --sport 1000:9000 -j DROP",
    "a flood": "-A INPUT -p udp -m udp --dport 8285 -m limit --limit 5/s -j DROP",
    "a user": "-A OUTPUT -m owner --uid-owner 1000 -j DROP",
    "broken connections": "-A INPUT -m conntrack --ctstate INVALID -j DROP",
}


@pytest.mark.parametrize("program", IPTABLES)
@pytest.mark.parametrize("what", TUNNEL_SILENT)
def test_rule_that_need_not_drop_the_tunnels_datagrams_is_not_named(world: Namespace, what: str, program: str) -> None:
    restore(world, program, TUNNEL_SILENT[what])
    assert problems(world, tunnel=[UDP]) == ()


IN_BASE = "type filter hook input priority 0; policy {};"
OUT_BASE = "type filter hook output priority 0; policy {};"
FIREWALL = ("ct state vmap { established : accept, related : accept, invalid : drop }", 'iifname "lo" accept')

TUNNEL_NFT = {
    "a usual firewall": (
        table(*FIREWALL, "tcp dport { 22, 443 } accept", policy="drop", hook=IN_BASE),
        UDP,
        [f"the policy of chain c (nft, table inet t) drops packets {INSIDE} unless this host has just sent to them"],
    ),
    "a usual firewall before VXLAN, of which no datagram looks like an answer": (
        table("ct state { established, related } accept", "udp dport 1-8471 accept", policy="drop", hook=IN_BASE),
        VXLAN,
        ["the policy of chain c (nft, table inet t) drops packets of peers to UDP port 8472 here"],
    ),
    "the port": (
        table("udp dport 8285 drop", hook=IN_BASE),
        UDP,
        [f"the rule with handle 2 of chain c (nft, table inet t) drops packets {INSIDE}"],
    ),
    "ports by numbers": (
        table("udp dport != 8285 accept", "udp dport 8000-9000 drop", hook=IN_BASE),
        UDP,
        [f"the rule with handle 3 of chain c (nft, table inet t) drops packets {INSIDE}"],
    ),
    "a set of ports": (
        table(
            "udp dport @bad drop",
            hook=IN_BASE,
            more="set bad { type inet_service; flags interval; elements = { 1-9000 }; }",
        ),
        UDP,
        [f"the rule with handle 3 of chain c (nft, table inet t) drops packets {INSIDE}"],
    ),
    "what the tunnel's link leads to": (
        table(
            "iifname vmap { eth0 : jump public, docker0 : accept }",
            hook=IN_BASE,
            more="chain public { ip protocol udp reject; }",
        ),
        UDP,
        [f"the rule with handle 3 of chain public (nft, table inet t) rejects packets {INSIDE}"],
    ),
    "out": (
        table("meta l4proto { tcp, icmp } accept", "th dport 53 accept", policy="drop", hook=OUT_BASE),
        UDP,
        [f"the policy of chain c (nft, table inet t) drops packets {OUTSIDE}"],
    ),
    "IPv6": (
        table("meta nfproto ipv6 meta l4proto udp drop", hook=IN_BASE),
        tunnel(6),
        [f"the rule with handle 2 of chain c (nft, table inet t) drops IPv6 packets {INSIDE}"],
    ),
    "IPv4 where the tunnel is IPv6": (
        table("ip protocol udp drop", "ip6 nexthdr tcp drop", hook=IN_BASE),
        tunnel(6),
        [],
    ),
    "the port accepted": (table(*FIREWALL, "udp dport 8285 accept", policy="drop", hook=IN_BASE), UDP, []),
    "the port accepted, of VXLAN without a state": (
        table("ct state untracked udp dport 8472 accept", policy="drop", hook=IN_BASE),
        VXLAN,
        [],
    ),
    "the port accepted in a set": (
        table("meta l4proto udp th dport { 53, 8285 } accept", policy="drop", hook=IN_BASE),
        UDP,
        [],
    ),
    "the port accepted in a pair that we cannot judge": (
        table("meta l4proto . th dport { udp . 8285 } accept", policy="drop", hook=IN_BASE),
        UDP,
        [],
    ),
    "a peer's port that differs": (
        table("udp dport 9999 drop", hook=OUT_BASE),
        tunnel(peer_port=None),
        [],
    ),
    "a link that is not known": (table("iifname eth0 udp dport 8285 drop", hook=IN_BASE), tunnel(link=None), []),
    "an address of another link, to which datagrams come in by any": (
        table("iifname eth1 accept", policy="drop", hook=IN_BASE),
        tunnel(address=ip_address("192.0.2.200")),
        [],
    ),
}


@pytest.mark.parametrize("what", TUNNEL_NFT)
def test_chain_of_nftables_before_the_tunnel_is_judged(world: Namespace, what: str) -> None:
    text, path, begins = TUNNEL_NFT[what]
    nft(world, text)
    assert [line.partition("; ")[0] for line in problems(world, tunnel=[path])] == begins


TUNNEL_REMEDIES = [
    ("iptables-nft -A INPUT -j DROP", "iptables-nft -I INPUT -p udp --dport 8285 -j ACCEPT"),
    ("iptables-legacy -P INPUT DROP", "iptables-legacy -A INPUT -p udp --dport 8285 -j ACCEPT"),
    (
        "iptables-legacy -t mangle -A OUTPUT -p udp -j DROP",
        "iptables-legacy -t mangle -I OUTPUT -p udp --dport 8285 -j ACCEPT",
    ),
    (
        "nft add table inet t; nft 'add chain inet t c { type filter hook input priority 0; policy drop; }'",
        "nft insert rule inet t c udp dport 8285 accept",
    ),
    (
        "nft add table ip t; nft 'add chain ip t c { type filter hook output priority 0; policy drop; }'",
        "nft insert rule ip t c udp dport 8285 accept",
    ),
]


@pytest.mark.parametrize(("fault", "remedy"), TUNNEL_REMEDIES, ids=[fault for fault, _ in TUNNEL_REMEDIES])
def test_remedy_for_the_tunnel_is_one(world: Namespace, fault: str, remedy: str) -> None:
    run(world, fault)
    (line,) = problems(world, tunnel=[UDP])
    assert f"`{remedy}`" in line
    run(world, remedy)
    assert problems(world, tunnel=[UDP]) == ()


FOREIGN_FIREWALLS = [
    (
        ":INPUT DROP [0:0]\n:ufw-before-input - [0:0]\n-A INPUT -j ufw-before-input\n"
        "-A ufw-before-input -i lo -j ACCEPT",
        "`ufw allow in 8285/udp`",
    ),
    (":OUTPUT DROP [0:0]\n:ufw-user-output - [0:0]\n-A OUTPUT -j ufw-user-output", "`ufw allow out 8285/udp`"),
]


@pytest.mark.parametrize(("rules", "remedy"), FOREIGN_FIREWALLS)
def test_remedy_is_a_command_of_the_program_that_has_set_the_rules(world: Namespace, rules: str, remedy: str) -> None:
    restore(world, "iptables-nft", rules)
    (line,) = problems(world, tunnel=[UDP])
    assert line.endswith(remedy)


def test_remedy_for_firewalld_is_a_command_of_it(world: Namespace) -> None:
    nft(world, table("ct state established accept", "reject", name="inet firewalld", hook=IN_BASE))
    (line,) = problems(world, tunnel=[VXLAN])
    assert line.endswith("`firewall-cmd --permanent --add-port=8472/udp`, then `firewall-cmd --reload`")


def test_nothing_is_said_of_a_tunnel_without_peers(world: Namespace) -> None:
    run(world, "iptables-nft -A INPUT -j DROP")
    assert problems(world, tunnel=[tunnel(peers=())]) == ()
    assert len(problems(world, PATH, tunnel=[UDP])) == 1

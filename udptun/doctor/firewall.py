"""Packet filters: those of others that drop our packets, and the tools that our own rules are set with."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from udptun.core.errors import FirewallError
from udptun.core.family import Family
from udptun.core.pod_path import PodPath
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.firewall import tool
from udptun.firewall.iptables_programs import programs
from udptun.firewall.obstacles.judge import judge
from udptun.firewall.obstacles.kernel_rules import read_legacy, read_nft
from udptun.kernel.pod_links import find_pod_links


async def packet_filters(facts: Facts) -> list[Finding]:
    """As the daemon looks at them (`udptun/firewall/obstacles/`)."""
    links = {path: await find_pod_links(path) for path in facts.paths}
    if not any(links.values()):
        raise NotHereError("no pods are here yet, so nothing is forwarded")
    lines = []
    for path, pod_links in links.items():
        if pod_links:
            chains, _ = await read_nft(_by_index(path, pod_links), path.family)
            lines += judge(path, pod_links, [*chains, *read_legacy(path.family)])
    return [Finding.of_line(Severity.ERROR, line) for line in lines]


def _by_index(path: PodPath, pod_links: tuple[str, ...]) -> Mapping[int, str]:
    wanted = {path.device, *pod_links}
    return {index: name for index, name in socket.if_nameindex() if name in wanted}


async def firewall_tools(facts: Facts) -> list[Finding]:
    options = facts.options
    if not options.ip_masq and options.iptables_forward_rules is False:
        raise NotHereError("no rules are wanted (--ip-masq, --iptables-forward-rules)")
    if facts.conf is not None and facts.conf.enable_nftables:
        if tool.is_installed("nft"):
            return []
        cause, remedy = "EnableNFTables is set, and there is no program nft", "install the package nftables"
        return [Finding(Severity.ERROR, "nft", cause, remedy)]
    try:
        found = await programs()
    except FirewallError as exc:
        return [Finding.of_line(Severity.WARNING, str(exc))]
    if found:
        return [] if Family.IPV6 not in _families(facts) else _missing_ip6tables(found[0].is_legacy)
    cause = "there is no program iptables, so the rules for masquerading and forwarding cannot be set"
    remedy = 'install the package iptables, or set "EnableNFTables": true in the network config'
    return [Finding(Severity.ERROR if options.ip_masq else Severity.WARNING, "iptables", cause, remedy)]


def _families(facts: Facts) -> set[Family]:
    return {path.family for path in facts.paths}


def _missing_ip6tables(is_legacy: bool) -> list[Finding]:
    names = ("ip6tables-restore", f"ip6tables-{'legacy' if is_legacy else 'nft'}-restore")
    if any(map(tool.is_installed, names)):
        return []
    cause = "there is iptables and no ip6tables, so the rules for IPv6 cannot be set"
    return [Finding(Severity.WARNING, "ip6tables", cause, "install the whole package iptables")]

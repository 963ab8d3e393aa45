"""Packet filters: those of others that drop our packets, and the tools that our own rules are set with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from udptun.backends.udp import UdpKeys
from udptun.backends.vxlan import VxlanKeys
from udptun.core.errors import FirewallError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address
from udptun.core.network_state import IPAddress
from udptun.core.tunnel_path import TunnelPath
from udptun.doctor.daemon import severity_of
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.sample import sample
from udptun.firewall import tool
from udptun.firewall.iptables_programs import programs
from udptun.firewall.obstacles.watch import find_lines, find_ways
from udptun.firewall.port_rules import find_objection
from udptun.kernel.ipsec import find_policy, read_policies


async def packet_filters(facts: Facts) -> list[Finding]:
    """As the daemon looks at them (`udptun/firewall/obstacles/`)."""
    ways = await find_ways(facts.paths, tunnel_paths(facts))
    if not ways:
        raise NotHereError("there are neither pods nor peers yet, as far as is known here, so nothing passes")
    lines = await find_lines(ways)
    return [*(Finding.of_line(severity_of(line), line) for line in lines), *await rules_passed_by(facts)]


async def rules_passed_by(facts: Facts) -> list[Finding]:
    """Rules and policies about the tunnel's datagrams that the shortcut passes by, where it is on in spite of them."""
    datapath = None if facts.document is None else facts.document["datapath"]
    port = _tunnel_port(facts)
    # A daemon of an earlier version does not say it.
    if datapath is None or datapath.get("shortcut", "off") != "on" or port is None:
        return []
    found = []
    remedy = 'set "Shortcut" to "auto" or "off" in the network config where such rules matter'
    if objection := await find_objection(port, facts.underlay):
        cause = f"the shortcut is on, and passes by what this host's rules say of the tunnel's packets: {objection}"
        found.append(Finding(Severity.NOTE, "shortcut", cause, remedy))
    policies = await read_policies()
    # Of all peers: a policy may name a single one.
    if policy := next(filter(None, (find_policy(policies, it) for it in tunnel_paths(facts, to_all=True))), ""):
        cause = f"the shortcut is on, and sends and takes in clear text whatever IPsec says: {policy}"
        found.append(Finding(Severity.WARNING, "shortcut", cause, remedy))
    return [*found, *_detour_lacking(datapath)]


def _detour_lacking(datapath: Mapping[str, Any]) -> Iterator[Finding]:
    """Where super-packets come and there is no detour for them."""
    detour = datapath.get("shortcut_detour")
    if detour is not None and detour["state"] != "on" and datapath["shortcut_passed"].get("decap_super"):
        why = detour["state"].removeprefix("off: ")
        cause = f"super-packets of peers go through the workers, which is slower than through the kernel: {why}"
        yield Finding(Severity.NOTE, "shortcut", cause, "nothing is lost; for speed, mend what stands there")


def tunnel_paths(facts: Facts, *, to_all: bool = False) -> list[TunnelPath]:
    """Where the tunnel's own datagrams to some peers, or to all, pass, by each family of the underlay.

    As far as that is known.
    """
    port = _tunnel_port(facts)
    if port is None:
        return []
    found = []
    for link, address in _own_ends(facts):
        peers = [it for it in facts.peers if it.public_ip.version == address.version]
        ends = [(it.public_ip, it.port or port) for it in (peers if to_all else sample(peers).chosen)]
        found.append(TunnelPath.to_peers(link, address, port, ends, facts.backend_type == UdpKeys.type))
    return found


def _tunnel_port(facts: Facts) -> int | None:
    """The UDP port that peers send to; None: there is none, or it is not known."""
    if facts.document is not None and facts.document["lease"]["port"] is not None:
        return int(facts.document["lease"]["port"])
    keys = None if facts.conf is None else facts.conf.backend
    if isinstance(keys, UdpKeys):
        return facts.options.port or keys.port
    # With DirectRouting peers may be reached without the tunnel.
    return None if isinstance(keys, VxlanKeys) and keys.direct_routing else facts.vxlan_port


def _own_ends(facts: Facts) -> list[tuple[str | None, IPAddress]]:
    """The addresses that peers send to, by the daemon or else by the store, and the links by which they come in."""
    if facts.document is not None:
        ipv6 = (facts.document.get("ipv6") or {}).get("address")
        addresses = {ip_address(it) for it in (facts.document["underlay"]["address"], ipv6) if it}
        return [(facts.underlay, it) for it in sorted(addresses, key=lambda it: it.version)]
    links = {it.ip: facts.link_name(it.link_index) for it in facts.addresses}
    leases = () if facts.store.snapshot is None else facts.store.snapshot.leases
    ours = {it.attrs.host_address for it in leases} & set(links)
    return [(links[it], it) for it in sorted(ours, key=lambda it: it.version)]


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

"""What drops the overlay's packets, in words with a remedy.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from udptun.core.family import Family
from udptun.core.pod_path import PodPath
from udptun.firewall.obstacles.ruleset import (
    BaseChain,
    Drop,
    Flow,
    Hook,
    Tool,
    Verdict,
    difference,
    find_drops,
    ranges_of,
)

_MAX_POD_LINKS = 4
"""Where each pod has a link of its own, so many of them stand for all."""


def judge(path: PodPath, pod_links: Sequence[str], bases: Sequence[BaseChain]) -> list[str]:
    """A line for each rule or policy that certainly drops packets between the pods here and other hosts."""
    drops = [
        (number, drop)
        for number, flows in enumerate(_flows(path, pod_links))
        for flow in flows
        for drop in find_drops(bases, flow)
    ]
    return list(_describe(path, drops))


def _flows(path: PodPath, pod_links: Sequence[str]) -> tuple[list[Flow], list[Flow]]:
    """The overlay's packets: those from pods here, and those to pods here."""
    own = ranges_of(path.subnet)
    others = difference(ranges_of(path.network), own)
    links = pod_links[:_MAX_POD_LINKS]
    return (
        [Flow(link, path.device, own, others) for link in links],
        [Flow(path.device, link, others, own) for link in links],
    )


_DIRECTIONS = ("from pods here to other hosts", "from other hosts to pods here", "between pods here and other hosts")


def _describe(path: PodPath, drops: Sequence[tuple[int, Drop]]) -> Iterator[str]:
    """A line for each rule or policy.  `drops` come with the number of their direction."""
    together: dict[str, list[tuple[int, Drop]]] = {}
    for number, drop in drops:
        together.setdefault(_place(drop), []).append((number, drop))
    for place, same in together.items():
        directions = {number for number, _ in same}
        direction = _DIRECTIONS[2 if len(directions) == 2 else directions.pop()]
        _, drop = same[0]
        what = "rejects" if drop.rule is not None and drop.rule.verdict is Verdict.REJECT else "drops"
        packets = "packets" if path.family is Family.IPV4 else "IPv6 packets"
        which = f"some {packets}" if all(drop.is_partial for _, drop in same) else packets
        yield f"{place} {what} {which} {direction}; {_remedy(drop, path)}"


def _place(drop: Drop) -> str:
    base, rule = drop.base, drop.rule
    if base.tool is Tool.NFT:
        of = f"chain {drop.chain} (nft, table {base.family} {base.table})"
        return f"the policy of {of}" if rule is None else f"the rule with handle {rule.number} of {of}"
    of = f"{drop.chain} ({base.tool.value}, table {base.table})"
    return f"the policy of {of}" if rule is None else f"rule {rule.number} of {of}"


def _remedy(drop: Drop, path: PodPath) -> str:
    base, network = drop.base, path.network
    if base.table == "firewalld":
        return f"`firewall-cmd --permanent --zone=trusted --add-source={network}`, then `firewall-cmd --reload`"
    if base.tool is Tool.NFT:
        header = "ip" if path.family is Family.IPV4 else "ip6"
        command = f"nft insert rule {base.family} {base.table} {base.name} {header}"
        return f"accept the overlay there: `{command} saddr {network} accept`, and the same with daddr"
    if drop.rule is None:
        return (
            f"flannel's rules are not there (--iptables-forward-rules): `{_iptables(base)} -A {base.name} "
            f"-s {network} -j ACCEPT`, and the same with -d"
        )
    if base.hook is Hook.PREROUTING or (drop.chain.startswith("DOCKER") and drop.chain != "DOCKER-USER"):
        return 'if Docker has set it, `"allow-direct-routing": true` in daemon.json ends it; else delete the rule'
    return (
        f"delete it, or accept the overlay before it: `{_iptables(base)} -I {drop.chain} -s {network} -j ACCEPT`, and "
        "the same with -d"
    )


def _iptables(base: BaseChain) -> str:
    return base.tool.value if base.table == "filter" else f"{base.tool.value} -t {base.table}"

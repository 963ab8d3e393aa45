"""flannel's firewall rules as data.  Pure.

`masquerade` and `forward` make one list of rules.  iptables_form.py and nft_form.py write it in the two forms that
flannel has for them, and read it back.

Several daemons of a host, each for a Network of its own, have their rules in the same chains, as several flannelds do.
Each daemon keeps a block of rules and leaves the others' blocks as they are (`PresentRules`).

Networks may be of either family.  Every name that depends on the family follows from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network

from udptun.core.family import Family
from udptun.core.ip_text import ip_network
from udptun.core.network_state import IPNetwork

MARK = 0x4000
"""kube-proxy's KUBE-MARK-MASQ.  kube-proxy masquerades packets with this mark itself, later in POSTROUTING."""

NFPROTO: Mapping[Family, int] = {Family.IPV4: 2, Family.IPV6: 10}
"""NFPROTO_IPV4 and NFPROTO_IPV6 (include/uapi/linux/netfilter.h): the chains of their tables see one family alone."""

MULTICAST: Mapping[int, IPNetwork] = {4: IPv4Network("224.0.0.0/4"), 6: IPv6Network("ff00::/8")}

_MIN_ADDRESSES = 4
"""Of a host's subnet: the longest prefix is /30."""


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

    @property
    def networks(self) -> list[IPNetwork]:
        """The Networks and subnets that it is about."""
        return [it for it in (self.source, self.destination) if it is not None and it not in MULTICAST.values()]


def network_or_none(text: str) -> IPNetwork | None:
    """The network that `text` says; None when it says none, or one that is too small for flannel."""
    try:
        found = ip_network(text)
    except ValueError:
        return None
    return found if found.num_addresses >= _MIN_ADDRESSES else None


def masquerade(network: IPNetwork, subnet: IPNetwork, random_fully: bool) -> tuple[Rule, ...]:
    """The rules of --ip-masq: packets that leave `network` or enter it get our address as their source.

    Packets that stay inside keep their source.  So do packets from outside to our own pods in `subnet`: the pods answer
    through us anyway.
    """
    multicast = MULTICAST[network.version]
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


@dataclass(frozen=True, slots=True)
class Repair:
    """What has to be done, as input for the tool, and what was found, in words.  False when nothing has to be done.

    `is_new`: no rules of ours were there.  `others`: the Networks whose rules were there, and stay.
    """

    script: str = ""
    findings: tuple[str, ...] = ()
    is_new: bool = False
    others: frozenset[IPNetwork] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.findings)


_Present = Sequence[Rule | None]


@dataclass(frozen=True, slots=True)
class PresentRules:
    """The rules that stand in flannel's chains; None for one that is no rule of flannel's.

    A rule is another daemon's when it is flannel's and about none of our Networks.  The rule about the mark names no
    Network; it belongs to the rule that follows it.
    """

    masquerade: _Present
    forward: _Present

    def with_ours(self, desired: DesiredRules, networks: Sequence[IPNetwork]) -> DesiredRules:
        """The rules as they shall be: the desired ones, which are all about `networks`, beside the others'."""
        return DesiredRules(
            _with_block(self.masquerade, desired.masquerade, networks),
            _with_block(self.forward, desired.forward, networks),
        )

    def has_ours(self, networks: Sequence[IPNetwork]) -> bool:
        """Whether there are rules about `networks`, or of nobody."""
        return not all((*_are_others(self.masquerade, networks), *_are_others(self.forward, networks)))

    def networks_of_others(self, networks: Sequence[IPNetwork]) -> frozenset[IPNetwork]:
        """The Networks of the other daemons that have rules there."""
        named = {
            it
            for rules in (self.masquerade, self.forward)
            for rule, is_others in zip(rules, _are_others(rules, networks), strict=True)
            if rule is not None and is_others
            for it in rule.networks
        }
        # A daemon has rules about its Network and about the host's subnet in it.
        return frozenset(
            it for it in named if not any(wide.prefixlen < it.prefixlen and _overlap(wide, it) for wide in named)
        )


def _with_block(present: _Present, own: tuple[Rule, ...], networks: Sequence[IPNetwork]) -> tuple[Rule, ...]:
    """`own` as one block where the first of our rules stands, or at the end, among the rules of others."""
    others = _are_others(present, networks)
    place = others.index(False) if False in others else len(present)
    kept = [rule if is_others else None for rule, is_others in zip(present, others, strict=True)]
    return tuple(rule for rule in (*kept[:place], *own, *kept[place:]) if rule is not None)


def _are_others(present: _Present, networks: Sequence[IPNetwork]) -> list[bool]:
    """For each of the rules whether it is another daemon's."""
    found: list[bool] = []
    is_others = False
    for rule in reversed(present):
        if rule is None or rule.networks or not rule.marked:
            about = [] if rule is None else rule.networks
            is_others = bool(about) and not any(_overlap(it, ours) for it in about for ours in networks)
        found.append(is_others)
    return found[::-1]


def _overlap(a: IPNetwork, b: IPNetwork) -> bool:
    return a.version == b.version and a.overlaps(b)

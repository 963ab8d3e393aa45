"""flannel's firewall rules as data.  Pure.

`masquerade` and `forward` make one list of rules.  iptables_form.py and nft_form.py write it in the two forms that
flannel has for them.

Networks may be of either family.  Every name that depends on the family follows from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_network

from udptun.core.network_state import IPNetwork

MARK = 0x4000
"""kube-proxy's KUBE-MARK-MASQ.  kube-proxy masquerades packets with this mark itself, later in POSTROUTING."""

MULTICAST: Mapping[int, IPNetwork] = {4: ip_network("224.0.0.0/4"), 6: ip_network("ff00::/8")}


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

    `is_new`: no rules of flannel's were there.
    """

    script: str = ""
    findings: tuple[str, ...] = ()
    is_new: bool = False

    def __bool__(self) -> bool:
        return bool(self.findings)

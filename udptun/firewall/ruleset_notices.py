"""The kernel's notices of changed nftables rules, in which iptables-nft keeps its own rules too.

The kernel sends no notices about the rules of legacy iptables.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from udptun.kernel import rtnetlink
from udptun.kernel.notices import datagrams

# linux/netlink.h, linux/netfilter/nfnetlink.h and nf_tables.h.
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFGENMSG_LEN = 4
"""struct nfgenmsg: family, version, two bytes of res_id."""
_NEW_CHAIN = _NFNL_SUBSYS_NFTABLES << 8 | 3
_NFTA_CHAIN_HOOK = 4
_NFTA_TABLE = 1
"""The attribute with the table's name, the same in messages about tables, chains and rules."""
_CHAIN_ATTRIBUTE = {
    _NFNL_SUBSYS_NFTABLES << 8 | message: attribute
    # NFT_MSG_NEWTABLE, DELTABLE; NEWCHAIN, DELCHAIN with NFTA_CHAIN_NAME; NEWRULE, DELRULE with NFTA_RULE_CHAIN.
    for message, attribute in ((0, 0), (2, 0), (3, 3), (5, 3), (6, 2), (8, 2))
}
"""The messages that are reported, and the attribute with the chain's name in each (0: none has it)."""


@dataclass(frozen=True, slots=True)
class RulesetNotice:
    """Something changed in this chain of an nftables table; `chain` None: in the table as a whole.

    `family` is NFPROTO_IPV4 (2) and the like.  `is_base`: the chain is made or changed, and the kernel calls it.
    """

    family: int
    table: str
    chain: str | None
    is_base: bool = False


async def watch_ruleset() -> AsyncGenerator[frozenset[RulesetNotice] | None, None]:
    """Yield the notices as they come; those that arrive together are one set.  Never ends by itself.

    None comes first, once the socket listens, and again whenever notices were lost.  Raises KernelError when no socket
    can be opened.
    """
    async with aclosing(datagrams(_NETLINK_NETFILTER, 1 << (_NFNLGRP_NFTABLES - 1))) as received:
        async for data in received:
            yield None if data is None else _decode(data)


def _decode(data: bytes) -> frozenset[RulesetNotice]:
    notices: set[RulesetNotice] = set()
    for kind, _flags, _sequence, body in rtnetlink.messages(data):
        if kind in _CHAIN_ATTRIBUTE:
            names = {number: value.rstrip(b"\0") for number, value in rtnetlink.attributes(body, _NFGENMSG_LEN)}
            chain = names.get(_CHAIN_ATTRIBUTE[kind])
            table = names.get(_NFTA_TABLE, b"").decode(errors="replace")
            name = None if chain is None else chain.decode(errors="replace")
            notices.add(RulesetNotice(body[0], table, name, kind == _NEW_CHAIN and _NFTA_CHAIN_HOOK in names))
    return frozenset(notices)

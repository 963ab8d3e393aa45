"""flannel's nftables table through `nft`.  Every change replaces the whole table in one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from udptun.core.errors import FirewallError
from udptun.core.network_state import IPNetwork
from udptun.firewall import tool
from udptun.firewall.nft_form import TABLES, nft_chains, nft_findings, nft_present, nft_removal, nft_script
from udptun.firewall.rules import DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.firewall.tool import UnreadableError


class NftRules:
    """The rules in the nftables form, for one IP version: both kinds in one table.

    Implements `Rules` of `udptun.firewall.attempt`.
    """

    def __init__(self, desired: DesiredRules, networks: Sequence[IPNetwork], version: int = 4) -> None:
        """`desired` is all that there shall be about `networks`."""
        self.tool = "nft"
        self.desired = desired
        self._networks = networks
        self.version = version

    async def compare(self) -> Repair:
        family, table = TABLES[self.version]
        try:
            listed = await _list(family, table)
        except UnreadableError:
            # Whatever it holds, it is our own table, and a new one replaces it whole.  Other daemons then bring back
            # their rules.
            own = nft_chains(self.desired)
            script = nft_script(self.version, own) if own else nft_removal(family, table)
            return Repair(script, (f"unreadable table {family} {table}",))
        present = nft_present(self.version, listed)
        chains = nft_chains(present.with_ours(self.desired, self._networks))
        if not chains:
            return Repair(nft_removal(family, table), (f"leftover table {family} {table}",)) if listed else Repair()
        findings = nft_findings(self.version, chains, listed)
        return Repair(
            nft_script(self.version, chains) if findings else "",
            findings,
            is_new=not present.has_ours(self._networks),
            others=present.networks_of_others(self._networks),
        )

    async def apply(self, script: str) -> None:
        await tool.run("nft", "-f", "-", script=script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return notice.table == TABLES[self.version][1]


async def _list(family: str, table: str) -> list[dict[str, Any]]:
    """The objects of the table.  Empty when there is no such table.

    Raises UnreadableError when nft prints something else than JSON: nft 1.0.6 does so for a dormant table, whose flags
    it takes from memory that nobody has written.
    """
    try:
        printed = await tool.run("nft", "-j", "list", "table", family, table)
    except FirewallError as exc:
        if "No such file or directory" in str(exc):
            return []
        raise
    try:
        listed: list[dict[str, Any]] = json.loads(printed)["nftables"]
    except (ValueError, LookupError, TypeError) as exc:
        raise UnreadableError(f"nft does not list table {family} {table} as JSON: {printed[:80]!r}") from exc
    return listed

"""flannel's nftables table through `nft`.  Every change replaces the whole table in one transaction."""

from __future__ import annotations

import json
from typing import Any

from udptun.core.errors import FirewallError
from udptun.firewall import tool
from udptun.firewall.nft_form import TABLES, nft_chains, nft_findings, nft_removal, nft_script
from udptun.firewall.rules import DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice


class _UnreadableError(FirewallError):
    """The table exists, and nft cannot say what is in it."""


class NftRules:
    """The rules in the nftables form, for one IP version.  Implements `Rules` of `udptun.firewall.reconciler`."""

    def __init__(self, desired: DesiredRules, version: int = 4) -> None:
        self._version = version
        self._chains = nft_chains(desired)

    async def compare(self) -> Repair:
        family, table = TABLES[self._version]
        try:
            listed = await _list(family, table)
        except _UnreadableError:
            # Whatever it holds, it is our own table, and a new one replaces it whole.
            script = nft_script(self._version, self._chains) if self._chains else nft_removal(family, table)
            return Repair(script, (f"unreadable table {family} {table}",))
        if not self._chains:
            return Repair(nft_removal(family, table), (f"leftover table {family} {table}",)) if listed else Repair()
        findings = nft_findings(self._version, self._chains, listed)
        return Repair(nft_script(self._version, self._chains) if findings else "", findings, is_new=not listed)

    async def apply(self, script: str) -> None:
        await tool.run("nft", "-f", "-", script=script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return notice.table == TABLES[self._version][1]


async def _list(family: str, table: str) -> list[dict[str, Any]]:
    """The objects of the table.  Empty when there is no such table.

    Raises _UnreadableError when nft prints something else than JSON: nft 1.0.6 does so for a dormant table, whose flags
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
        raise _UnreadableError(f"nft does not list table {family} {table} as JSON: {printed[:80]!r}") from exc
    return listed

"""flannel's chains through iptables-save and iptables-restore: every change is one transaction per table.

Two programs are called iptables, "nft" and "legacy"; the kernel runs the rules of both and neither sees the other's.
udptun sets its own with the one that `iptables` is on the host, and removes flannel's from the other.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from udptun.errors import FirewallError
from udptun.masq import tool
from udptun.masq.rules import Repair, Wanted, iptables_chains, iptables_leftovers, iptables_repair
from udptun.netlink import RulesetNotice
from udptun.netstate import IPNetwork

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_NFPROTO_IPV4 = 2
_CHAINS = iptables_chains(Wanted())


@dataclass(frozen=True, slots=True)
class Program:
    """One iptables: `name` is what its commands begin with."""

    name: str
    is_legacy: bool

    async def save(self, table: str, *, may_load: bool) -> str:
        """What iptables-save prints of `table`.

        Legacy iptables makes a table by looking at it, which then costs every packet something: without `may_load` a
        table that does not exist is not looked at.
        """
        if self.is_legacy and not may_load and table not in _legacy_tables():
            return ""
        return await tool.run(f"{self.name}-save", "-t", table)

    async def restore(self, script: str) -> None:
        # -w: wait for the lock that legacy iptables holds.  Known since 1.6.2, as --random-fully.
        await tool.run(f"{self.name}-restore", "--noflush", "-w", script=script)


async def programs() -> tuple[Program, ...]:
    """The host's iptables, then the other one if that is installed too; none at all where there is no iptables."""
    if shutil.which("iptables-save") is None:
        return ()
    is_legacy = "nf_tables" not in await tool.run("iptables", "--version")
    other = Program("iptables-nft" if is_legacy else "iptables-legacy", not is_legacy)
    mine = Program("iptables", is_legacy)
    return (mine, other) if shutil.which(f"{other.name}-save") is not None else (mine,)


class IptablesRules:
    """The rules in the iptables form, kept by one program.  A `Rules` of `udptun.masq.firewall`."""

    def __init__(self, program: Program, wanted: Wanted, *, only_against_drop: bool = False) -> None:
        """`only_against_drop`: the forward rules are wanted only where FORWARD drops what no rule accepts."""
        self._program = program
        self._wanted = wanted
        self._only_against_drop = only_against_drop

    async def look(self) -> Repair:
        wanted = self._wanted
        try:
            saved = await _save(self._program, wanted)
        except FirewallError:
            if self._only_against_drop:
                # An iptables that does not work here drops nothing.
                return Repair()
            raise
        if self._only_against_drop and "\n:FORWARD DROP " not in saved["filter"]:
            wanted = Wanted(wanted.masquerade)
        return iptables_repair(iptables_chains(wanted), saved)

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return notice.family == _NFPROTO_IPV4 and any(
            notice.table == chain.table and notice.chain in (None, chain.name, chain.parent) for chain in _CHAINS
        )


class OldIptablesRules:
    """The rules that flannel before 0.20 set for these two, which nobody wants any more.  A `Rules` too."""

    def __init__(self, program: Program, network: IPNetwork, subnet: IPNetwork) -> None:
        self._program = program
        self._network, self._subnet = network, subnet

    async def look(self) -> Repair:
        return iptables_leftovers(await _save(self._program, Wanted()), self._network, self._subnet)

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return False


async def _save(program: Program, wanted: Wanted) -> dict[str, str]:
    return {
        chain.table: await program.save(chain.table, may_load=bool(chain.rules)) for chain in iptables_chains(wanted)
    }


def _legacy_tables() -> list[str]:
    try:
        return _LEGACY_TABLES.read_text().split()
    except OSError:
        return []

"""flannel's chains through iptables and iptables-restore: every change is one transaction per table.

Two programs are called iptables, "nft" and "legacy"; the kernel runs the rules of both and neither sees the other's.
udptun sets its own with the one that `iptables` is on the host, and removes flannel's from the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from udptun.core.errors import FirewallError
from udptun.core.network_state import IPNetwork
from udptun.firewall import tool
from udptun.firewall.rules import Chain, Repair, Wanted, iptables_chains, iptables_leftovers, iptables_repair
from udptun.firewall.ruleset_notices import RulesetNotice

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_NFPROTO_IPV4 = 2
_UNWANTED = iptables_chains(Wanted())
_NO_SUCH_CHAIN = ("No chain/target/match by that name", "is incompatible, use 'nft' tool")
"""The second is how iptables-nft 1.8.9 says it, and of a chain with rules that it cannot express."""


@dataclass(frozen=True, slots=True)
class Program:
    """One iptables: `name` is what its commands begin with."""

    name: str
    is_legacy: bool

    async def list(self, table: str, chain: str = "", *, may_load: bool = False) -> str:
        """What `iptables -S` prints of the chain, or of the whole table; nothing when there is no such chain.

        Not iptables-save: with the 20,000 rules of a large cluster that takes a second, and one chain 3 ms.  Legacy
        iptables makes a table by looking at it, which then costs every packet something: without `may_load` a table
        that does not exist is not looked at.
        """
        if self.is_legacy and not may_load and table not in _legacy_tables():
            return ""
        try:
            return await tool.run(self.name, "-w", "-t", table, "-S", *filter(None, [chain]))
        except FirewallError as exc:
            # A built-in chain is always there: what it holds is unknown then, and must not be guessed at.
            if chain.startswith("FLANNEL-") and any(words in str(exc) for words in _NO_SUCH_CHAIN):
                return ""
            raise

    async def restore(self, script: str) -> None:
        # -w: wait for the lock that legacy iptables holds.  Known since 1.6.2, as --random-fully.
        await tool.run(f"{self.name}-restore", "--noflush", "-w", script=script)


async def programs() -> tuple[Program, ...]:
    """The host's iptables, then the other one if that is installed too; none at all where there is no iptables."""
    if shutil.which("iptables-restore") is None:
        return ()
    is_legacy = "nf_tables" not in await tool.run("iptables", "--version")
    other = Program("iptables-nft" if is_legacy else "iptables-legacy", not is_legacy)
    mine = Program("iptables", is_legacy)
    return (mine, other) if shutil.which(f"{other.name}-restore") is not None else (mine,)


class IptablesRules:
    """The rules in the iptables form, kept by one program.  A `Rules` of `udptun.firewall.firewall`."""

    def __init__(self, program: Program, wanted: Wanted, *, only_against_drop: bool = False) -> None:
        """`only_against_drop`: the forward rules are wanted only where FORWARD drops what no rule accepts."""
        self._program = program
        self._wanted = wanted
        self._only_against_drop = only_against_drop

    async def look(self) -> Repair:
        chains = iptables_chains(self._wanted)
        try:
            listed = await self._list(chains)
        except FirewallError:
            if self._only_against_drop:
                # An iptables that does not work here drops nothing.
                return Repair()
            raise
        if self._only_against_drop and "-P FORWARD DROP" not in listed["filter"].splitlines():
            chains = _UNWANTED
            listed = await self._list(chains)
        return iptables_repair(chains, listed)

    async def _list(self, chains: Iterable[Chain]) -> dict[str, str]:
        listed: dict[str, str] = {}
        for chain in chains:
            may_load = bool(chain.rules) and not self._only_against_drop
            own = await self._program.list(chain.table, chain.name, may_load=may_load)
            if chain.rules:
                listed[chain.table] = own + await self._program.list(chain.table, chain.parent, may_load=may_load)
            else:
                # What leads into a chain that is to go may stand anywhere.
                listed[chain.table] = own and await self._program.list(chain.table)
        return listed

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return notice.family == _NFPROTO_IPV4 and any(
            notice.table == chain.table and notice.chain in (None, chain.name, chain.parent) for chain in _UNWANTED
        )


class OldIptablesRules:
    """The rules that flannel before 0.20 set for these two, which nobody wants any more.  A `Rules` too."""

    def __init__(self, program: Program, network: IPNetwork, subnet: IPNetwork) -> None:
        self._program = program
        self._network, self._subnet = network, subnet

    async def look(self) -> Repair:
        listed = {chain.table: await self._program.list(chain.table, chain.parent) for chain in _UNWANTED}
        return iptables_leftovers(listed, self._network, self._subnet)

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return False


def _legacy_tables() -> list[str]:
    try:
        return _LEGACY_TABLES.read_text().split()
    except OSError:
        return []

"""flannel's chains through iptables and iptables-restore.  Every change is one transaction per table.

There are two iptables (iptables_programs.py).  udptun sets its rules with one and removes flannel's from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from udptun.core.errors import FirewallError
from udptun.core.family import Family
from udptun.core.network_state import IPNetwork
from udptun.firewall import tool
from udptun.firewall.iptables_form import (
    Chain,
    iptables_chains,
    iptables_leftovers,
    iptables_present,
    iptables_repair,
    rules_of_table,
)
from udptun.firewall.rules import NFPROTO, DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.firewall.tool import TimedOutError, UnreadableError

_LEGACY_TABLES = {4: Path("/proc/thread-self/net/ip_tables_names"), 6: Path("/proc/thread-self/net/ip6_tables_names")}
_UNWANTED = iptables_chains(DesiredRules())
_INCOMPATIBLE = "is incompatible, use 'nft' tool"
"""iptables-nft 1.8.9 says so about a chain or table with rules that it cannot express, which nft has set."""
_NO_SUCH_CHAIN = ("No chain/target/match by that name", _INCOMPATIBLE)
"""The second one is about a missing chain, too, where the table holds such rules."""


@dataclass(frozen=True, slots=True)
class Program:
    """One iptables, or ip6tables: `name` is what its commands begin with, `version` that of IP."""

    name: str
    is_legacy: bool
    version: int = 4

    @property
    def for_ipv6(self) -> Program:
        """The same for IPv6.  Both come in one package."""
        return Program(self.name.replace("iptables", "ip6tables", 1), self.is_legacy, 6)

    async def list(self, table: str, chain: str = "", *, may_load: bool = False) -> str:
        """What `iptables -S` prints of the chain, or of the whole table; nothing when there is no such chain.

        iptables-save is not used: it takes a second with the 20,000 rules of a large cluster, and one chain takes 3 ms.
        Legacy iptables creates a table by looking at it, and every packet then goes through it.  Without `may_load` a
        table that does not exist is not looked at.

        Raises FirewallError; UnreadableError where rules that nft has set hide those of iptables.
        """
        if self.is_legacy and not may_load and table not in legacy_tables(self.version):
            return ""
        try:
            return await self._run(self.name, "-w", "-t", table, "-S", *filter(None, [chain]))
        except FirewallError as exc:
            # A built-in chain always exists.  When it cannot be listed, its rules are unknown, not missing.
            if chain.startswith("FLANNEL-") and any(words in str(exc) for words in _NO_SUCH_CHAIN):
                return ""
            if _INCOMPATIBLE in str(exc):
                raise UnreadableError(
                    f"{exc}; rules set with nft hide those of iptables there: give the table of nft another name than "
                    f"{table}, or set EnableNFTables in net-conf.json"
                ) from exc
            raise

    async def restore(self, script: str) -> None:
        """Run the script, a transaction per table.  Raises FirewallError."""
        await self._run(f"{self.name}-restore", "--noflush", "-w", script=script)

    async def _run(self, *command: str, script: str = "") -> str:
        # -w: wait for the lock that legacy iptables holds.  Known since 1.6.2, as --random-fully.
        try:
            return await tool.run(*command, script=script)
        except TimedOutError as exc:
            if not self.is_legacy:
                raise
            raise TimedOutError(
                f"{exc}; another program may hold the lock of iptables, `lslocks | grep xtables.lock` names it"
            ) from exc


class IptablesRules:
    """The rules of one table in the iptables form, kept by one program.

    Implements `Rules` of `udptun.firewall.attempt`.
    """

    def __init__(
        self,
        program: Program,
        table: str,
        desired: DesiredRules,
        networks: Sequence[IPNetwork],
        *,
        only_against_drop: bool = False,
    ) -> None:
        """The rules of `desired` that belong into `table` are all that there shall be about `networks`.

        `only_against_drop`: have the forward rules only where the policy of FORWARD is to drop.
        """
        self.tool, self.version = program.name, program.version
        self.desired = rules_of_table(table, desired)
        self._program = program
        self._table = table
        self._networks = networks
        self._only_against_drop = only_against_drop
        chain = _chain_of(table, self.desired)
        self._chains_concerned = (None, chain.name, chain.parent)

    async def compare(self) -> Repair:
        desired, table, program = self.desired, self._table, self._program
        may_load = not self._only_against_drop
        if self._only_against_drop:
            try:
                forward = await program.list(table, "FORWARD")
            except TimedOutError:
                raise
            except FirewallError:
                # An iptables that does not work on this host drops nothing either.
                return Repair(is_new=True)
            if "-P FORWARD DROP" not in forward.splitlines():
                desired = DesiredRules()
        chain = _chain_of(table, desired)
        listed = {table: await program.list(table, chain.name, may_load=bool(chain.rules) and may_load)}
        present = iptables_present(listed.get("nat", ""), listed.get("filter", ""))
        chain = _chain_of(table, present.with_ours(desired, self._networks))
        if chain.rules:
            listed[table] += await program.list(table, chain.parent, may_load=may_load)
        elif listed[table]:
            # The rules that lead into a chain may be in any chain of the table.
            listed[table] = await program.list(table)
        return replace(
            iptables_repair([chain], listed),
            is_new=not present.has_ours(self._networks),
            others=present.networks_of_others(self._networks),
        )

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        is_ours = notice.family == NFPROTO[Family(self.version)] and notice.table == self._table
        return is_ours and notice.chain in self._chains_concerned


def iptables_rules(program: Program, desired: DesiredRules, networks: Sequence[IPNetwork]) -> list[IptablesRules]:
    """The rules of both tables."""
    return [IptablesRules(program, chain.table, desired, networks) for chain in _UNWANTED]


class OldIptablesRules:
    """The rules that flannel before 0.20 set for this network and subnet; none shall exist.  Implements `Rules`."""

    def __init__(self, program: Program, network: IPNetwork, subnet: IPNetwork) -> None:
        self.tool, self.version = program.name, program.version
        self.desired = DesiredRules()
        self._program = program
        self._network, self._subnet = network, subnet

    async def compare(self) -> Repair:
        listed = {}
        for chain in _UNWANTED:
            try:
                listed[chain.table] = await self._program.list(chain.table, chain.parent)
            except UnreadableError:
                # Those who set rules of nft there have not left flannel's of old beside them.
                listed[chain.table] = ""
        return iptables_leftovers(listed, self._network, self._subnet)

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return False


def _chain_of(table: str, desired: DesiredRules) -> Chain:
    (chain,) = (it for it in iptables_chains(desired) if it.table == table)
    return chain


def legacy_tables(version: int) -> list[str]:
    """The tables of legacy iptables that there are in this network namespace, for that version of IP."""
    try:
        return _LEGACY_TABLES[version].read_text().split()
    except OSError:
        return []

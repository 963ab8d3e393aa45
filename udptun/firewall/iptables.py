"""flannel's chains through iptables and iptables-restore.  Every change is one transaction per table.

Two programs are called iptables, "nft" and "legacy".  The kernel runs the rules of both, and neither program sees the
rules of the other.  udptun sets its rules with the one that `iptables` is on the host, and removes flannel's rules from
the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from udptun.core.errors import FirewallError
from udptun.core.network_state import IPNetwork
from udptun.firewall import tool
from udptun.firewall.iptables_form import iptables_chains, iptables_leftovers, iptables_present, iptables_repair
from udptun.firewall.rules import DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_NFPROTO_IPV4 = 2
_UNWANTED = iptables_chains(DesiredRules())
_NO_SUCH_CHAIN = ("No chain/target/match by that name", "is incompatible, use 'nft' tool")
"""iptables-nft 1.8.9 says the second one, also about a chain with rules that it cannot express."""


@dataclass(frozen=True, slots=True)
class Program:
    """One iptables: `name` is what its commands begin with."""

    name: str
    is_legacy: bool

    async def list(self, table: str, chain: str = "", *, may_load: bool = False) -> str:
        """What `iptables -S` prints of the chain, or of the whole table; nothing when there is no such chain.

        iptables-save is not used: it takes a second with the 20,000 rules of a large cluster, and one chain takes 3 ms.
        Legacy iptables creates a table by looking at it, and every packet then goes through it.  Without `may_load` a
        table that does not exist is not looked at.
        """
        if self.is_legacy and not may_load and table not in _legacy_tables():
            return ""
        try:
            return await tool.run(self.name, "-w", "-t", table, "-S", *filter(None, [chain]))
        except FirewallError as exc:
            # A built-in chain always exists.  When it cannot be listed, its rules are unknown, not missing.
            if chain.startswith("FLANNEL-") and any(words in str(exc) for words in _NO_SUCH_CHAIN):
                return ""
            raise

    async def restore(self, script: str) -> None:
        # -w: wait for the lock that legacy iptables holds.  Known since 1.6.2, as --random-fully.
        await tool.run(f"{self.name}-restore", "--noflush", "-w", script=script)


async def programs() -> tuple[Program, ...]:
    """The host's iptables, then the other one if it is installed too.  Empty when there is no iptables."""
    if not tool.is_installed("iptables-restore"):
        return ()
    is_legacy = "nf_tables" not in await tool.run("iptables", "--version")
    other = Program("iptables-nft" if is_legacy else "iptables-legacy", not is_legacy)
    mine = Program("iptables", is_legacy)
    return (mine, other) if tool.is_installed(f"{other.name}-restore") else (mine,)


class IptablesRules:
    """The rules in the iptables form, kept by one program.  Implements `Rules` of `udptun.firewall.reconciler`."""

    def __init__(
        self,
        program: Program,
        desired: DesiredRules,
        networks: Sequence[IPNetwork],
        *,
        only_against_drop: bool = False,
    ) -> None:
        """`desired` is all that there shall be about `networks`.

        `only_against_drop`: have the forward rules only where the policy of FORWARD is to drop.
        """
        self._program = program
        self._desired = desired
        self._networks = networks
        self._only_against_drop = only_against_drop

    async def compare(self) -> Repair:
        desired = self._desired
        if self._only_against_drop:
            try:
                forward = await self._program.list("filter", "FORWARD")
            except FirewallError:
                # An iptables that does not work on this host drops nothing either.
                return Repair()
            if "-P FORWARD DROP" not in forward.splitlines():
                desired = DesiredRules()
        listed = {
            chain.table: await self._program.list(
                chain.table, chain.name, may_load=bool(chain.rules) and not self._only_against_drop
            )
            for chain in iptables_chains(desired)
        }
        present = iptables_present(listed["nat"], listed["filter"])
        chains = iptables_chains(present.with_ours(desired, self._networks))
        for chain in chains:
            if chain.rules:
                listed[chain.table] += await self._program.list(
                    chain.table, chain.parent, may_load=not self._only_against_drop
                )
            elif listed[chain.table]:
                # The rules that lead into a chain may be in any chain of the table.
                listed[chain.table] = await self._program.list(chain.table)
        return replace(
            iptables_repair(chains, listed),
            is_new=not present.has_ours(self._networks),
            others=present.networks_of_others(self._networks),
        )

    async def apply(self, script: str) -> None:
        await self._program.restore(script)

    def concerns(self, notice: RulesetNotice) -> bool:
        return notice.family == _NFPROTO_IPV4 and any(
            notice.table == chain.table and notice.chain in (None, chain.name, chain.parent) for chain in _UNWANTED
        )


class OldIptablesRules:
    """The rules that flannel before 0.20 set for this network and subnet; none shall exist.  Implements `Rules`."""

    def __init__(self, program: Program, network: IPNetwork, subnet: IPNetwork) -> None:
        self._program = program
        self._network, self._subnet = network, subnet

    async def compare(self) -> Repair:
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

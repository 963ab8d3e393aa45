"""Which of the programs called iptables the rules are set with.

Two programs are called iptables, "nft" and "legacy".  The kernel runs the rules of both, and neither program sees the
rules of the other.  On a host, `iptables` is the one that its administrator has chosen.  An image cannot know on which
hosts it will run.  So ours has `iptables-nft` and `iptables-legacy`, and no `iptables`, and the one is taken in which
the host's rules stand.
"""

from __future__ import annotations

from udptun.core.errors import FirewallError
from udptun.firewall import tool
from udptun.firewall.iptables import Program
from udptun.firewall.tool import AbsentError, TimedOutError

_OF_KUBELET = ("-N KUBE-IPTABLES-HINT", "-N KUBE-KUBELET-CANARY")
"""kubelet makes these chains in the table mangle, so that containers see which iptables the host has."""


async def programs() -> tuple[Program, ...]:
    """The iptables to set rules with, then the other one if it is installed too.  Empty when there is none.

    Raises FirewallError.
    """
    flavours = (Program("iptables-nft", is_legacy=False), Program("iptables-legacy", is_legacy=True))
    installed = [it for it in flavours if tool.is_installed(f"{it.name}-restore")]
    if tool.is_installed("iptables-restore"):
        is_legacy = "nf_tables" not in await tool.run("iptables", "--version")
        return (Program("iptables", is_legacy), *(it for it in installed if it.is_legacy != is_legacy))
    if len(installed) < 2:
        return tuple(installed)
    nft, legacy = installed
    return (legacy, nft) if await _is_legacy_in_use(nft, legacy) else (nft, legacy)


async def _is_legacy_in_use(nft: Program, legacy: Program) -> bool:
    """Whether the host's rules are those of legacy iptables: kubelet's hint says so, or there are more of them.

    Our own rules do not count: they may have been set before the host's were there.
    """
    try:
        await nft.list("mangle")
    except AbsentError:
        # The kernel has no nf_tables.
        return True
    except FirewallError:
        # The kernel has nf_tables, and in them a rule that iptables-nft cannot express.
        pass
    for program in (nft, legacy):
        if _has_hint(await _list(program, "mangle")):
            return program.is_legacy
    n_nft, n_legacy = [
        sum([_n_of_others(await _list(program, table)) for table in ("filter", "mangle", "nat")])
        for program in (nft, legacy)
    ]
    return n_legacy > n_nft


async def _list(program: Program, table: str) -> str:
    """The rules of the table; nothing where they cannot be read.

    So it is with rules that nft has set and iptables-nft cannot express, and with those of legacy iptables without
    NET_RAW.  Raises TimedOutError.
    """
    try:
        return await program.list(table)
    except TimedOutError:
        raise
    except FirewallError:
        return ""


def _has_hint(listed: str) -> bool:
    return any(line in _OF_KUBELET for line in listed.splitlines())


def _n_of_others(listed: str) -> int:
    """How many rules there are, without flannel's."""
    return sum(line.startswith("-A") and "FLANNEL-" not in line for line in listed.splitlines())

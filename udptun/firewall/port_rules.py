"""Whether rules of packet filters mean the tunnel's own datagrams.

What the kernel carries by the shortcut passes none of the host's own chains, nor those at the underlay's ingress and
egress (nft).  So where somebody has written rules about the port or at the underlay, or drops all but a few, they mean
to decide.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from textwrap import shorten

from udptun.core.errors import FirewallError
from udptun.core.tunnel_path import TunnelPath
from udptun.firewall import tool
from udptun.firewall.iptables import legacy_tables
from udptun.firewall.iptables_programs import programs
from udptun.firewall.obstacles.kernel_rules import find_chain_at
from udptun.firewall.obstacles.watch import find_lines, find_ways
from udptun.firewall.tool import AbsentError

_TABLES = ("raw", "mangle", "nat", "filter", "security")
_SHOWN = 200
"""So many characters of a rule are shown: a set may have a megabyte of elements."""
_NAMES = re.compile(r"\b[ds]ports?\b|\belements = ")
_PORTS = re.compile(r"\b(?:[ds]ports?|elements =)\s*(?:vmap\s*|!=\s*)*(?:\{(?P<set>[^}]*)\}|(?P<list>[-\d,: ]+))")
_RANGE = re.compile(r"\b(\d+)(?:[-:](\d+))?\b")
_ADDRESS = re.compile(r"\b\d+(\.\d+){3}(/\d+)?|[0-9a-fA-F]*:[0-9a-fA-F:]*:[0-9a-fA-F]*(/\d+)?")


async def find_objection(port: int, link: str | None) -> str:
    """What rules are about the port, or at the link, or why that cannot be known; empty when none are.

    `link`: the underlay; None: it is not known.  Raises KernelError.
    """
    if link is not None and (chain := await find_chain_at(link)) is not None:
        return f"the chain {chain.name} of nft (table {chain.table}) stands at {link}"
    try:
        async for listing in _listings():
            # In a thread: a hundred thousand rules take seconds.
            if line := await asyncio.to_thread(find_rule, listing, port):
                return f"a firewall rule names UDP port {port}: `{shorten(line, _SHOWN)}`"
    except FirewallError as exc:
        return f"the firewall's rules cannot be read: {exc}"
    return ""


def find_rule(listing: str, port: int) -> str:
    """The first rule or set of the listing that names the port; empty when none does."""
    return next((line for line in joined(listing.splitlines()) if names_port(line, port)), "")


async def find_drop(path: TunnelPath) -> str:
    """What drops the tunnel's datagrams, whatever port the rules name; empty when nothing certainly does.

    Raises KernelError where the rules cannot be read.
    """
    return next(iter(await find_lines(await find_ways((), (path,)))), "")


async def _listings() -> AsyncIterator[str]:
    """All rules that there are.  Raises FirewallError when some cannot be read."""
    has_nft = tool.is_installed("nft")
    if has_nft:
        # Absent: the kernel has none of these.
        with suppress(AbsentError):
            yield await tool.run("nft", "-s", "-n", "list", "ruleset")
    found = await programs()
    if not has_nft and not any(not it.is_legacy for it in found):
        raise FirewallError("there is neither nft nor an iptables that reads nf_tables")
    legacy = legacy_tables(4)
    if legacy and not any(it.is_legacy for it in found):
        raise FirewallError(f"legacy iptables has the tables {', '.join(legacy)}, and there is no iptables-legacy")
    for program in found:
        # nft shows what iptables-nft has set.
        if program.is_legacy or not has_nft:
            for table in _TABLES:
                with suppress(AbsentError):
                    yield await program.list(table)


def joined(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a listing, those of a set that goes over several as one."""
    parts: list[str] = []
    depth = 0
    for line in map(str.strip, lines):
        parts.append(line)
        depth += line.count("{") - line.count("}")
        if depth > 0 and (len(parts) > 1 or _NAMES.search(line)):
            continue
        yield " ".join(filter(None, parts))
        parts, depth = [], 0
    if parts:
        yield " ".join(filter(None, parts))


def names_port(line: str, port: int) -> bool:
    """Whether a rule or the elements of a set name the UDP port: alone, in a list or map, or in a range."""
    if re.search(r"\btcp [ds]port\b|-p tcp\b", line):
        return False
    for found in _PORTS.finditer(line):
        # Of addresses in a set only what looks like a port of its own.
        for first, last in _RANGE.findall(_ADDRESS.sub(" ", found["set"] or found["list"] or "")):
            if int(first) <= port <= int(last or first):
                return True
    return False

"""Whether rules of packet filters mean the tunnel's own datagrams.

What the kernel carries by the shortcut passes none of the host's own chains.  So where somebody has written rules about
the port, or drops all but a few, they mean to decide.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from udptun.core.errors import FirewallError, KernelError
from udptun.core.tunnel_path import TunnelPath
from udptun.firewall import tool
from udptun.firewall.iptables_programs import programs
from udptun.firewall.obstacles.kernel_rules import read_legacy, read_nft
from udptun.firewall.obstacles.watch import find_link_names, find_ways
from udptun.firewall.tool import AbsentError

_TABLES = ("raw", "mangle", "nat", "filter", "security")
_LEGACY_TABLES = Path("/proc/thread-self/net/ip_tables_names")
"""The tables of legacy iptables that there are in this network namespace."""
_NAMES = re.compile(r"\b[ds]ports?\b|\belements = ")
_PORTS = re.compile(r"\b(?:[ds]ports?|elements =)\s*(?:vmap\s*|!=\s*)*(?:\{(?P<set>[^}]*)\}|(?P<list>[-\d,: ]+))")
_RANGE = re.compile(r"\b(\d+)(?:[-:](\d+))?\b")
_ADDRESS = re.compile(r"\b\d+(\.\d+){3}(/\d+)?|[0-9a-fA-F]*:[0-9a-fA-F:]*:[0-9a-fA-F]*(/\d+)?")


async def find_objection(port: int) -> str:
    """That a rule names the port, or why that cannot be known; empty when no rule does, of whatever chain."""
    try:
        async for listing in _listings():
            for line in joined(listing.splitlines()):
                if names_port(line, port):
                    return f"a firewall rule names UDP port {port}: `{line}`"
    except FirewallError as exc:
        return f"the firewall's rules cannot be read: {exc}"
    return ""


async def find_drop(path: TunnelPath) -> str:
    """What drops the tunnel's datagrams, whatever port the rules name; empty when nothing certainly does."""
    ways = await find_ways((), (path,))
    traffics = list(dict.fromkeys(traffic for way in ways for traffic in way.traffics))
    try:
        nft, _ = await read_nft(find_link_names(ways), traffics)
    except KernelError:
        # The kernel has no nf_tables.
        nft = {}
    legacy = read_legacy(traffics)
    chains = {traffic: [*nft.get(traffic, ()), *legacy[traffic]] for traffic in traffics}
    return next((line for way in ways for line in way.judge(chains)), "")


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
    legacy = _legacy_tables()
    if legacy and not any(it.is_legacy for it in found):
        raise FirewallError(f"legacy iptables has the tables {', '.join(legacy)}, and there is no iptables-legacy")
    for program in found:
        # nft shows what iptables-nft has set.
        if program.is_legacy or not has_nft:
            for table in legacy if program.is_legacy else _TABLES:
                with suppress(AbsentError):
                    yield await program.list(table)


def _legacy_tables() -> list[str]:
    try:
        return _LEGACY_TABLES.read_text().split()
    except OSError:
        # The kernel has no legacy iptables.
        return []


def joined(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a listing, those of a set that goes over several as one."""
    whole = ""
    for line in lines:
        whole = f"{whole} {line.strip()}".strip()
        if _NAMES.search(whole) and whole.count("{") > whole.count("}"):
            continue
        yield whole
        whole = ""
    if whole:
        yield whole


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

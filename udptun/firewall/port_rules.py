"""Whether rules of packet filters name a UDP port.

What the kernel carries by the shortcut passes none of the host's own chains.  So where somebody has written rules about
the port, they mean to decide.
"""

from __future__ import annotations

import re

from udptun.core.errors import FirewallError
from udptun.firewall import tool

_LISTINGS = (
    ("nft", "-s", "-n", "list", "ruleset"),
    ("iptables-save",),
    ("iptables-nft-save",),
    ("iptables-legacy-save",),
)
"""nft shows the rules of iptables-nft too; what it cannot express, iptables-save does."""
_PORTS = re.compile(r"\b[ds]ports?\b(?P<numbers>[^a-z\"]*)|^\s*elements = (?P<elements>.*)$")
_RANGE = re.compile(r"\b(\d+)(?:[-:](\d+))?\b")


async def find_port_rule(port: int) -> str:
    """A rule that names it, of whatever chain; empty when there is none.  What cannot be read has none."""
    for command, *arguments in _LISTINGS:
        if not tool.is_installed(command):
            continue
        try:
            listing = await tool.run(command, *arguments)
        except FirewallError:
            continue
        for line in listing.splitlines():
            if names_port(line, port):
                return line.strip()
    return ""


def names_port(line: str, port: int) -> bool:
    """Whether a line of such a listing names the UDP port, alone, in a list, a set or a range."""
    if re.search(r"\btcp dport\b|\btcp sport\b|-p tcp\b", line):
        return False
    for found in _PORTS.finditer(line):
        numbers = found["numbers"] or found["elements"] or ""
        # Of addresses in a set only what looks like a port of its own.
        for first, last in _RANGE.findall(re.sub(r"\d+(\.\d+){3}(/\d+)?", "", numbers)):
            if int(first) <= port <= int(last or first):
                return True
    return False

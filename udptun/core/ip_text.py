"""Addresses and subnets in text that others have written.  Pure.

`ipaddress` takes an IPv6 zone (`fe80::1%eth0`), and any characters as its name.  A zone says something to the host that
wrote it alone, so nothing here takes one.  Each function raises ValueError for text that it does not take.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udptun.core.network_state import IPAddress, IPNetwork


def ip_address(text: str) -> IPAddress:
    """Of either family."""
    return ipaddress.ip_address(_without_zone(text))


def ip_network(text: str, *, strict: bool = True) -> IPNetwork:
    """Of either family; `strict`: host bits are refused."""
    return ipaddress.ip_network(_without_zone(text), strict)


def ipv6_address(text: str) -> IPv6Address:
    """Of IPv6 alone.  IPv4Address does as much for IPv4."""
    return IPv6Address(_without_zone(text))


def ipv6_network(text: str, *, strict: bool = True) -> IPv6Network:
    """Of IPv6 alone; `strict` as in `ip_network`."""
    return IPv6Network(_without_zone(text), strict)


def _without_zone(text: str) -> str:
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    return text

"""The links of this host, and how one of them is found by a name, an address or a route.  Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network

from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address
from udptun.core.network_state import DEVICE_NAME, Address, IPAddress, IPNetwork, Link, Route, RouteType

EVERYWHERE: tuple[IPNetwork, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


class UnderlayError(UdptunError):
    """No interface fits.  The exit status is 1, not 2, because the interface or its address may appear later."""


class NoAddressError(UnderlayError):
    """The family has no usable address or no default route here: another one may have."""


@dataclass(frozen=True, slots=True)
class Found:
    """An address, the link that owns it, and the link by which its datagrams leave: most often the same one.

    `named` is an address of the other family that a flag has found the link by.
    """

    link: Link
    owner: Link
    address: IPAddress
    reason: str
    named: IPAddress | None = None


class Interfaces:
    """The links of this host and the ways to find one, by addresses of `family`."""

    def __init__(
        self,
        links: Sequence[Link],
        addresses: Sequence[Address],
        family: Family,
        leasable: Collection[IPNetwork] = (),
    ) -> None:
        """`leasable`: where hosts lease their subnets.  An address there is our device's or the pods' bridge's."""
        self.family = family
        self._leasable = leasable
        self._links = links
        self._addresses = addresses
        self._by_index = {link.index: link for link in links}
        self._ranked = {
            (family, link.index): _rank(link, addresses, family) for family in Family for link in links
        }

    def addresses_of(self, link: Link, family: Family | None = None) -> list[IPAddress]:
        """The usable addresses, the best first; of `family`, which is by default the one to find a link by."""
        return [ip for _, ip in self._usable(link, family or self.family)]

    def _usable(self, link: Link, family: Family) -> list[_Ranked]:
        """A link-local address of IPv6 finds its link, but says nothing to other hosts' routes and fdb entries."""
        return [it for it in self._ranked[family, link.index] if it[1].version == 4 or not it[1].is_link_local]

    def owner(self, ip: IPAddress, said_by: str) -> Found:
        link = self.owner_of(ip)
        if link is None:
            raise UnderlayError(f"No interface with given IP found: {ip}")
        if ip not in self.addresses_of(link):
            return replace(self._first_address(link), named=ip)
        return Found(link, link, ip, f"{said_by} names it")

    def on_default_route(self, routes: Sequence[Route], beyond: Route | None) -> Found:
        for route in [*([] if beyond is None or beyond.type != RouteType.UNICAST else [beyond]), *routes]:
            if route is beyond or is_default(route):
                link = self._link(route.oif)
                return self._source(link, route, "the default route") or self._first_address(link)
        raise NoAddressError("failed to get default interface: unable to find default route; use --iface")

    def named(self, iface: str) -> Found:
        try:
            return self.owner(ip_address(iface), "--iface")
        except ValueError:
            pass
        link = self.called(iface)
        if link is None:
            raise UnderlayError(f"error looking up interface {iface}: no such interface")
        return self._first_address(link)

    def matching(self, text: str, pattern: re.Pattern[str]) -> Found:
        for link in self._links:
            for ip in self.addresses_of(link):
                if pattern.search(str(ip)):
                    return Found(link, link, ip, "--iface-regex matches it")
        for link in self._links:
            if pattern.search(link.name):
                return self._first_address(link)
        raise NoAddressError(f"could not match pattern {text} to any of the available network interfaces")

    def towards(self, ip: IPAddress, reach: Route | None) -> Found:
        if reach is None or reach.oif is None:
            raise UnderlayError(f"failed to get interface to reach {ip}: no route")
        if reach.type == RouteType.LOCAL:
            # The kernel sends to itself through lo, whichever link has the address.
            return self.owner(ip, "--iface-can-reach")
        link = self._link(reach.oif)
        return self._source(link, reach, f"the route to {ip}") or self._first_address(link)

    def called(self, name: str) -> Link | None:
        return next((link for link in self._links if link.name == name), None)

    def leading(self, ways: Iterable[Route]) -> list[Link]:
        """The links by which these routes leave the host.  Our own devices do not count: they are the overlay."""
        found = []
        for way in ways:
            link = None if way.oif is None else self._by_index.get(way.oif)
            if way.type == RouteType.UNICAST and link is not None and not leads_nowhere(link):
                found.append(link)
        return [link for link in found if not DEVICE_NAME.fullmatch(link.name)]

    def inventory(self) -> str:
        """Every link but lo with its usable addresses of both families, for error messages."""
        links = [link for link in self._links if not link.is_loopback]
        ips = {link: [ip for family in Family for ip in self.addresses_of(link, family)] for link in links}
        return ", ".join(" ".join([link.name, *map(str, ips[link])]) for link in links) or "none"

    def useless(self, link: Link, family: Family | None = None) -> str:
        """In brackets the addresses that the link has and nobody may use now, with the reasons; empty without any."""
        whys = [
            f"{it.ip} is {'deprecated' if it.is_deprecated else 'tentative, or another host has it'}"
            for it in self._addresses
            if it.link_index == link.index and it.ip.version == (family or self.family).value and _is_useless(it)
        ]
        return f" ({', '.join(whys)})" if whys else ""

    def _source(self, link: Link, route: Route, name: str) -> Found | None:
        """The source address that the kernel gives to packets on this route; None when it is none for us.

        Where the link has none the kernel takes one of another link, also of the overlay.
        """
        ip = route.prefsrc
        owner = None if ip is None else self.owner_of(ip)
        if ip is None or owner is None or ip not in self.addresses_of(owner):
            return None
        if owner.index != link.index and any(ip in it for it in self._leasable):
            return None
        return Found(link, owner, ip, f"the source of {name}")

    def _first_address(self, link: Link) -> Found:
        ranked = self._usable(link, self.family)
        if not ranked:
            raise NoAddressError(f"failed to find {self.family} address for interface {link.name}{self.useless(link)}")
        (rank, ip), *others = ranked
        if not others:
            return Found(link, link, ip, f"the only address of {link.name}")
        kind = next((name for name, ours, next_ in zip(_RANKS, rank, others[0][0], strict=True) if ours != next_), "")
        return Found(link, link, ip, f"the first {kind}address of {link.name}")

    def owner_of(self, ip: IPAddress) -> Link | None:
        """The link that has the address."""
        family = Family(ip.version)
        return next((link for link in self._links if ip in (it for _, it in self._ranked[family, link.index])), None)

    def _link(self, index: int | None) -> Link:
        if index is None or index not in self._by_index:
            raise UnderlayError(f"interface {index} of that route is gone")
        return self._by_index[index]


class Ways:
    """Where routes lead to other hosts, for an address on a link that leads nowhere.  The peers are not known yet."""

    def __init__(self, interfaces: Interfaces, routes: Sequence[Route], asked: Sequence[Route]) -> None:
        """`asked` are what the kernel says of addresses that it was asked about; they come before `routes`."""
        self._interfaces = interfaces
        self._routes = routes
        self._asked = asked

    def first(self) -> Link | None:
        """The link that most of the others are likely to be behind; None when no route leads anywhere."""
        # Without a default route: what leads through a router, and of that what leads to most.
        routes = (it for it in self._routes if it.dst.version == 4 or not it.dst.is_link_local)
        by_width = sorted(routes, key=lambda it: (it.gateway is None, it.dst.prefixlen))
        return next(iter(self._interfaces.leading([*self._asked, *by_width])), None)


def is_default(route: Route) -> bool:
    return route.dst in EVERYWHERE and route.type == RouteType.UNICAST and route.oif is not None


def leads_nowhere(link: Link) -> bool:
    """Whether no other host is behind the link: it is there to hold addresses that routes lead to."""
    return link.is_loopback or link.kind == "dummy"


_RANKS = ("global ", "permanent ", "lasting ")

_Ranked = tuple[tuple[bool, bool, bool], IPAddress]
"""What `_RANKS` is false of, and the address."""


def _rank(link: Link, addresses: Sequence[Address], family: Family) -> list[_Ranked]:
    """The link's addresses: global before link-local, permanent before dynamic, lasting before temporary.

    Deprecated addresses are left out, as they are not for new connections (RFC 4862 5.5.4), and so are tentative,
    loopback and multicast addresses.
    """
    usable = [
        ((a.ip.is_link_local, not a.is_permanent, a.is_temporary), a.ip)
        for a in addresses
        if a.link_index == link.index
        and a.ip.version == family.value
        and not _is_useless(a)
        and not (a.ip.is_loopback or a.ip.is_multicast or a.ip.is_unspecified)
    ]
    return sorted(usable, key=lambda it: it[0])


def _is_useless(address: Address) -> bool:
    return address.is_deprecated or address.is_tentative

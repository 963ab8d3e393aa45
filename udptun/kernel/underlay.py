"""Choose the interface that carries the outer packets, as flannel does (pkg/ipmatch/match.go, main.go).

Pure: the caller says which links, addresses and routes exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from udptun.config.go_regex import compile_go
from udptun.core.errors import UdptunError, UsageError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address
from udptun.core.network_state import DEVICE_NAME, Address, IPAddress, IPNetwork, Link, Route, RouteType

_EVERYWHERE: tuple[IPNetwork, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

_PROBES: Mapping[Family, Sequence[IPAddress]] = {
    Family.IPV4: tuple(
        map(IPv4Address, ("203.0.113.1", "198.51.100.1", "192.0.2.1", "198.18.0.1", "1.1.1.1", "9.9.9.9"))
    ),
    Family.IPV6: tuple(map(IPv6Address, ("2001:db8::1", "2001:2::1", "2606:4700:4700::1111", "2620:fe::9"))),
}
"""Addresses far away.  The first ones are for documentation and benchmarks (RFC 5737, 2544, 3849, 5180): nobody routes
them."""


class UnderlayError(UdptunError):
    """No interface fits.  The exit status is 1, not 2, because the interface or its address may appear later."""


@dataclass(frozen=True, slots=True)
class UnderlayOptions:
    """What --iface, --iface-regex, --iface-can-reach, --public-ip and --public-ipv6 say.

    `with_ipv4` and `with_ipv6`: an address of which families is looked for on the interface.
    """

    ifaces: tuple[str, ...] = ()
    iface_regexes: tuple[str, ...] = ()
    can_reach: IPAddress | None = None
    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    with_ipv4: bool = True
    with_ipv6: bool = False

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that are looked for, IPv4 first."""
        return (Family.IPV4,) * self.with_ipv4 + (Family.IPV6,) * self.with_ipv6


@dataclass(frozen=True, slots=True)
class Underlay:
    """The chosen interface.  Our socket binds to `address`; our lease tells the peers `public_ip`.

    The two are the same where this host has `public_ip`, on whichever link: peers shall see what our lease says.
    `address_link`: the interface that has `address`, where that is another one; None: the chosen one has it.
    `is_routed`: routes have chosen the interface, because `address` is on one that leads nowhere, such as lo.
    `mtu` is then the smallest of all ways to the peers, and a datagram may leave by any of them.
    `reason` says why this address, and `others` are those of the interface that could have been chosen too.

    `ipv6` and `public_ipv6` are the same for IPv6.  Those of a family are None where nobody asked for them, and where
    the interface has no usable address; `ipv4_problem` or `ipv6_problem` says why then.  One of the two families has
    them always.
    """

    link_name: str
    link_index: int
    mtu: int
    address: IPv4Address | None
    public_ip: IPv4Address | None
    address_link: str | None = None
    is_routed: bool = False
    reason: str = field(default="", compare=False)
    others: tuple[IPAddress, ...] = field(default=(), compare=False)
    ipv6: IPv6Address | None = None
    public_ipv6: IPv6Address | None = None
    ipv6_problem: str = ""
    ipv4_problem: str = ""

    @property
    def first_address(self) -> IPAddress:
        """What sockets are bound to: `address`, without one `ipv6`."""
        address = self.address or self.ipv6
        assert address is not None
        return address

    @property
    def families(self) -> frozenset[Family]:
        """Those that it has an address of."""
        return frozenset(family for family in Family if self.address_of(family) is not None)

    @property
    def host_address(self) -> IPAddress:
        """What the peers know this host by: PublicIP, without one PublicIPv6."""
        address = self.public_ip or self.public_ipv6
        assert address is not None
        return address

    def problem_of(self, family: Family) -> str:
        """Why there is no address of that family."""
        return self.ipv4_problem if family is Family.IPV4 else self.ipv6_problem

    def address_of(self, family: Family) -> IPAddress | None:
        """What our sockets and tunnels of that outer family are bound to."""
        return self.address if family is Family.IPV4 else self.ipv6

    @property
    def is_behind_nat(self) -> bool:
        """Whether the peers send to another address than the one that our sockets are bound to."""
        return self.public_ip != self.address or self.public_ipv6 != self.ipv6


def pick(
    options: UnderlayOptions,
    links: Sequence[Link],
    addresses: Sequence[Address],
    routes: Sequence[Route],
    reach: Route | None = None,
    beyond: Route | None = None,
    family: Family = Family.IPV4,
) -> Underlay:
    """The interface that `options` describe, chosen by addresses and routes of `family`.

    `routes` is the family's main table in the kernel's order.  `reach` is the kernel's route to `options.can_reach`,
    and `beyond` its route to `probe_address`; None where it has none.  Without options it is the interface of the
    default route, with the source address that the kernel gives to packets there, or the one that owns `public_ip`
    (`public_ipv6`).

    Raises UnderlayError, which names everything that was tried; UsageError for a regular expression that is none.
    """
    interfaces = _Interfaces(links, addresses, family)
    ways = _Ways(interfaces, routes, [way for way in (reach, beyond) if way is not None])
    public = options.public_ip if family is Family.IPV4 else options.public_ipv6
    if not (options.ifaces or options.iface_regexes or options.can_reach):
        try:
            if public:
                found = interfaces.owner(public, "--public-ip" if family is Family.IPV4 else "--public-ipv6")
            else:
                found = interfaces.on_default_route(routes, beyond)
            return _underlay(found, options, interfaces, ways)
        except UnderlayError as exc:
            raise UnderlayError(
                f"Failed to find any valid interface to use: {exc} (there are: {interfaces.inventory()})"
            ) from None

    patterns = [(text, _compiled(text)) for text in options.iface_regexes]
    tried: list[str] = []
    for iface in options.ifaces:
        try:
            return _underlay(interfaces.named(iface), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append(f"--iface={iface}: {exc}")
    for text, pattern in patterns:
        try:
            return _underlay(interfaces.matching(text, pattern), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append(f"--iface-regex={text}: {exc}")
    if options.can_reach is not None:
        try:
            return _underlay(interfaces.towards(options.can_reach, reach), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append(f"--iface-can-reach={options.can_reach}: {exc}")
    raise UnderlayError(
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        f" ({'; '.join(tried)}; there are: {interfaces.inventory()})"
    )


def probe_address(routes: Iterable[Route], family: Family = Family.IPV4) -> IPAddress | None:
    """An address that of `routes`, the family's main table, none but a default route leads to; None: there is none.

    Nothing is sent to it.  The kernel's route to it has the source address that the default route uses.
    """
    unicast = [route for route in routes if route.dst.version == family.value]
    if not any(_is_default(route) for route in unicast):
        return None
    longer = [route.dst for route in unicast if route.dst not in _EVERYWHERE]
    return next((ip for ip in _PROBES[family] if not any(ip in dst for dst in longer)), None)


def refresh(
    old: Underlay,
    options: UnderlayOptions,
    links: Sequence[Link],
    addresses: Sequence[Address],
    ways: Iterable[Route] = (),
) -> Underlay | None:
    """`old` as it is now.  The address of the other family than the first stays as long as it is there.

    None when a link of this name is another one, or when the address is gone from where it was.  `ways` are the
    kernel's routes to peers; they matter only for an underlay that `is_routed`.
    """
    first = Family.IPV6 if old.address is None else Family.IPV4
    interfaces = _Interfaces(links, addresses, first)
    link = interfaces.called(old.link_name)
    owner = link if old.address_link is None else interfaces.called(old.address_link)
    if owner is None or old.first_address not in interfaces.addresses_of(owner):
        return None
    old = _with_other(old, options, interfaces, [owner, *filter(None, [link])])
    if old.is_routed:
        leading = interfaces.leading(ways)
        if leading:
            # As long as some peer is reached through the link that it was, it stays that one.
            here = next((it for it in leading if it.index == old.link_index), leading[0])
            return replace(old, link_name=here.name, link_index=here.index, mtu=min(it.mtu for it in leading))
    if link is None or link.index != old.link_index:
        return None
    return replace(old, mtu=link.mtu)


@dataclass(frozen=True, slots=True)
class _Found:
    """An address, the link that owns it, and the link by which its datagrams leave: most often the same one."""

    link: Link
    owner: Link
    address: IPAddress
    reason: str


def _underlay(found: _Found, options: UnderlayOptions, interfaces: _Interfaces, ways: _Ways) -> Underlay:
    link, owner, address, reason = found.link, found.owner, found.address, found.reason
    if _leads_nowhere(link):
        link = ways.first() or link
    is_routed = owner.index != link.index
    if link.mtu == 0:
        raise UnderlayError(f"failed to determine MTU for {found.address} interface {link.name}")
    if is_routed:
        reason = f"{reason}; it is on {owner.name}, and the routes to other hosts lead through {link.name}"
    public = options.public_ip if isinstance(address, IPv4Address) else options.public_ipv6
    if public is not None and public != address and (public_owner := interfaces.owner_of(public)):
        owner, address = public_owner, public
        reason = f"{reason}; we send from PublicIP, which is on {owner.name}"
    ipv4 = address if isinstance(address, IPv4Address) else None
    ipv6 = address if isinstance(address, IPv6Address) else None
    underlay = Underlay(
        link.name,
        link.index,
        link.mtu,
        ipv4,
        ipv4 and (options.public_ip or ipv4),
        owner.name if owner.index != link.index else None,
        is_routed,
        reason,
        tuple(ip for ip in interfaces.addresses_of(owner) if ip != address),
        ipv6,
        ipv6 and (options.public_ipv6 or ipv6),
    )
    return _with_other(underlay, options, interfaces, [owner, link])


def _with_other(
    underlay: Underlay, options: UnderlayOptions, interfaces: _Interfaces, links: Sequence[Link]
) -> Underlay:
    """With what it has of the other family than the one that has chosen it.

    That is the address of `links`, the first of them first; the one that it has as long as that is there.  PublicIP,
    or PublicIPv6, where this host has that.
    """
    other = Family.IPV4 if interfaces.family is Family.IPV6 else Family.IPV6
    if other not in options.families:
        return underlay
    public: IPAddress | None = options.public_ip if other is Family.IPV4 else options.public_ipv6
    usable = [ip for link in links for ip in interfaces.addresses_of(link, other)]
    used, problem = underlay.address_of(other), ""
    if public is not None and interfaces.owner_of(public) is not None:
        address: IPAddress | None = public
    elif usable:
        address = used if used in usable else usable[0]
        public = public or address
    else:
        names = " and ".join(dict.fromkeys(link.name for link in links))
        address = public = None
        problem = f"{names} has no {other} address that other hosts could send to; give it one"
    if other is Family.IPV4:
        assert not isinstance(address, IPv6Address)
        assert not isinstance(public, IPv6Address)
        return replace(underlay, address=address, public_ip=public, ipv4_problem=problem)
    assert not isinstance(address, IPv4Address)
    assert not isinstance(public, IPv4Address)
    return replace(underlay, ipv6=address, public_ipv6=public, ipv6_problem=problem)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return compile_go(text)
    except ValueError as exc:
        raise UsageError(f"could not compile the IP address regex '{text}': {exc}") from exc


class _Interfaces:
    """The links of this host and the ways to find one, by addresses of `family`."""

    def __init__(self, links: Sequence[Link], addresses: Sequence[Address], family: Family) -> None:
        self.family = family
        self._links = links
        self._by_index = {link.index: link for link in links}
        self._ranked = {
            (family, link.index): _rank(link, addresses, family) for family in Family for link in links
        }

    def addresses_of(self, link: Link, family: Family | None = None) -> list[IPAddress]:
        """The usable addresses, the best first; of `family`, which is by default the one to find a link by."""
        return [ip for _, ip in self._ranked[family or self.family, link.index]]

    def owner(self, ip: IPAddress, said_by: str) -> _Found:
        link = self.owner_of(ip)
        if link is None:
            raise UnderlayError(f"No interface with given IP found: {ip}")
        if ip.version != self.family.value:
            return self._first_address(link)
        return _Found(link, link, ip, f"{said_by} names it")

    def on_default_route(self, routes: Sequence[Route], beyond: Route | None) -> _Found:
        for route in [*([] if beyond is None or beyond.type != RouteType.UNICAST else [beyond]), *routes]:
            if route is beyond or _is_default(route):
                link = self._link(route.oif)
                return self._source(link, route, "the default route") or self._first_address(link)
        raise UnderlayError("failed to get default interface: unable to find default route; use --iface")

    def named(self, iface: str) -> _Found:
        try:
            return self.owner(ip_address(iface), "--iface")
        except ValueError:
            pass
        link = self.called(iface)
        if link is None:
            raise UnderlayError(f"error looking up interface {iface}: no such interface")
        return self._first_address(link)

    def matching(self, text: str, pattern: re.Pattern[str]) -> _Found:
        for link in self._links:
            for ip in self.addresses_of(link):
                if pattern.search(str(ip)):
                    return _Found(link, link, ip, "--iface-regex matches it")
        for link in self._links:
            if pattern.search(link.name):
                return self._first_address(link)
        raise UnderlayError(f"could not match pattern {text} to any of the available network interfaces")

    def towards(self, ip: IPAddress, reach: Route | None) -> _Found:
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
            if way.type == RouteType.UNICAST and link is not None and not _leads_nowhere(link):
                found.append(link)
        return [link for link in found if not DEVICE_NAME.fullmatch(link.name)]

    def inventory(self) -> str:
        """Every link but lo with its usable addresses, for error messages."""
        links = [link for link in self._links if not link.is_loopback]
        return ", ".join(" ".join([link.name, *map(str, self.addresses_of(link))]) for link in links) or "none"

    def _source(self, link: Link, route: Route, name: str) -> _Found | None:
        """The source address that the kernel gives to packets on this route; None when it is none for us."""
        ip = route.prefsrc
        owner = None if ip is None or ip.version != self.family.value else self.owner_of(ip)
        if ip is None or owner is None:
            return None
        return _Found(link, owner, ip, f"the source of {name}")

    def _first_address(self, link: Link) -> _Found:
        ranked = self._ranked[self.family, link.index]
        if not ranked:
            raise UnderlayError(f"failed to find {self.family} address for interface {link.name}")
        (rank, ip), *others = ranked
        if not others:
            return _Found(link, link, ip, f"the only address of {link.name}")
        kind = next((name for name, ours, next_ in zip(_RANKS, rank, others[0][0], strict=True) if ours != next_), "")
        return _Found(link, link, ip, f"the first {kind}address of {link.name}")

    def owner_of(self, ip: IPAddress) -> Link | None:
        """The link that has the address."""
        family = Family(ip.version)
        return next((link for link in self._links if ip in (it for _, it in self._ranked[family, link.index])), None)

    def _link(self, index: int | None) -> Link:
        if index is None or index not in self._by_index:
            raise UnderlayError(f"interface {index} of that route is gone")
        return self._by_index[index]


class _Ways:
    """Where routes lead to other hosts, for an address on a link that leads nowhere.  The peers are not known yet."""

    def __init__(self, interfaces: _Interfaces, routes: Sequence[Route], asked: Sequence[Route]) -> None:
        """`asked` are what the kernel says of addresses that it was asked about; they come before `routes`."""
        self._interfaces = interfaces
        self._routes = routes
        self._asked = asked

    def first(self) -> Link | None:
        """The link that most of the others are likely to be behind; None when no route leads anywhere."""
        # Without a default route: what leads through a router, and of that what leads to most.
        routes = (it for it in self._routes if not it.dst.is_link_local)
        by_width = sorted(routes, key=lambda it: (it.gateway is None, it.dst.prefixlen))
        return next(iter(self._interfaces.leading([*self._asked, *by_width])), None)


def _is_default(route: Route) -> bool:
    return route.dst in _EVERYWHERE and route.type == RouteType.UNICAST and route.oif is not None


def _leads_nowhere(link: Link) -> bool:
    """Whether no other host is behind the link: it is there to hold addresses that routes lead to."""
    return link.is_loopback or link.kind == "dummy"


_RANKS = ("global ", "permanent ", "lasting ")


def _rank(
    link: Link, addresses: Sequence[Address], family: Family
) -> list[tuple[tuple[bool, bool, bool], IPAddress]]:
    """The link's usable addresses: global before link-local, permanent before dynamic, lasting before temporary.

    Deprecated addresses are left out, as they are not for new connections (RFC 4862 5.5.4), and so are loopback and
    multicast addresses, and link-local ones of IPv6, which say nothing to other hosts' routes and fdb entries.
    """
    usable = [
        ((a.ip.is_link_local, not a.is_permanent, a.is_temporary), a.ip)
        for a in addresses
        if a.link_index == link.index
        and a.ip.version == family.value
        and not (a.is_deprecated or a.is_tentative or (a.ip.version == 6 and a.ip.is_link_local))
        and not (a.ip.is_loopback or a.ip.is_multicast or a.ip.is_unspecified)
    ]
    return sorted(usable, key=lambda it: it[0])

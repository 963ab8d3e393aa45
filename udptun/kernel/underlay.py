"""Choose the interface that carries the outer packets, as flannel does (pkg/ipmatch/match.go, main.go).

Pure: the caller says which links, addresses and routes exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address

from udptun.config.go_regex import compile_go
from udptun.core.errors import UsageError
from udptun.core.family import Family
from udptun.core.network_state import Address, IPAddress, IPNetwork, Link, Route
from udptun.kernel.interfaces import (
    EVERYWHERE,
    Found,
    Interfaces,
    NoAddressError,
    UnderlayError,
    Ways,
    is_default,
    leads_nowhere,
)

_PROBES: Mapping[Family, Sequence[IPAddress]] = {
    Family.IPV4: tuple(
        map(IPv4Address, ("203.0.113.1", "198.51.100.1", "192.0.2.1", "198.18.0.1", "1.1.1.1", "9.9.9.9"))
    ),
    Family.IPV6: tuple(map(IPv6Address, ("2001:db8::1", "2001:2::1", "2606:4700:4700::1111", "2620:fe::9"))),
}
"""Addresses far away.  The first ones are for documentation and benchmarks (RFC 5737, 2544, 3849, 5180): nobody routes
them."""


@dataclass(frozen=True, slots=True)
class UnderlayOptions:
    """What --iface, --iface-regex, --iface-can-reach, --public-ip and --public-ipv6 say.

    `families`: an address of which ones is looked for on the interface, IPv4 first.  `leasable`: where hosts lease
    their subnets, see `Interfaces`.
    """

    ifaces: tuple[str, ...] = ()
    iface_regexes: tuple[str, ...] = ()
    can_reach: IPAddress | None = None
    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    families: tuple[Family, ...] = (Family.IPV4,)
    leasable: tuple[IPNetwork, ...] = ()

    def public(self, family: Family) -> IPAddress | None:
        """--public-ip or --public-ipv6."""
        return self.public_ip if family is Family.IPV4 else self.public_ipv6


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
    them always.  `chosen_by` is the family whose address and routes have chosen the interface.
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
    chosen_by: Family = Family.IPV4

    @property
    def chosen_address(self) -> IPAddress:
        """The address of the family that has chosen the interface: the one that `reason` is about."""
        address = self.address_of(self.chosen_by)
        assert address is not None, "an interface is chosen by an address"
        return address

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
    *,
    family: Family,
) -> Underlay:
    """The interface that `options` describe, chosen by addresses and routes of `family`.

    `routes` is the family's main table in the kernel's order.  `reach` is the kernel's route to `options.can_reach`,
    and `beyond` its route to `probe_address`; None where it has none.  Without options it is the interface of the
    default route, with the source address that the kernel gives to packets there, or the one that owns `public_ip`
    (`public_ipv6`).

    Raises UnderlayError, which names everything that was tried: NoAddressError where the family lacks what it takes.
    UsageError for a regular expression that is none.
    """
    interfaces = Interfaces(links, addresses, family, options.leasable)
    ways = Ways(interfaces, routes, [way for way in (reach, beyond) if way is not None])
    public = options.public(family)
    if not (options.ifaces or options.iface_regexes or options.can_reach):
        try:
            if public:
                found = interfaces.owner(public, "--public-ip" if family is Family.IPV4 else "--public-ipv6")
            else:
                found = interfaces.on_default_route(routes, beyond)
            return _underlay(found, options, interfaces, ways)
        except UnderlayError as exc:
            raise type(exc)(
                f"Failed to find any valid interface to use: {exc} (there are: {interfaces.inventory()})"
            ) from None

    patterns = [(text, _compiled(text)) for text in options.iface_regexes]
    tried: list[tuple[str, UnderlayError]] = []
    for iface in options.ifaces:
        try:
            return _underlay(interfaces.named(iface), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append((f"--iface={iface}", exc))
    for text, pattern in patterns:
        try:
            return _underlay(interfaces.matching(text, pattern), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append((f"--iface-regex={text}", exc))
    if options.can_reach is not None:
        try:
            return _underlay(interfaces.towards(options.can_reach, reach), options, interfaces, ways)
        except UnderlayError as exc:
            tried.append((f"--iface-can-reach={options.can_reach}", exc))
    kind = NoAddressError if any(isinstance(exc, NoAddressError) for _, exc in tried) else UnderlayError
    raise kind(
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        f" ({'; '.join(f'{flag}: {exc}' for flag, exc in tried)}; there are: {interfaces.inventory()})"
    )


def probe_address(routes: Iterable[Route], family: Family) -> IPAddress | None:
    """An address that of `routes`, the family's main table, none but a default route leads to; None: there is none.

    Nothing is sent to it.  The kernel's route to it has the source address that the default route uses.
    """
    unicast = [route for route in routes if route.dst.version == family.value]
    if not any(is_default(route) for route in unicast):
        return None
    longer = [route.dst for route in unicast if route.dst not in EVERYWHERE]
    return next((ip for ip in _PROBES[family] if not any(ip in dst for dst in longer)), None)


def refresh(
    old: Underlay,
    options: UnderlayOptions,
    links: Sequence[Link],
    addresses: Sequence[Address],
    ways: Iterable[Route] = (),
) -> Underlay | None:
    """`old` as it is now.  The address of the family that has not chosen it stays as long as it is there.

    None when a link of this name is another one, or when the address is gone from where it was.  `ways` are the
    kernel's routes to peers; they matter only for an underlay that `is_routed`.
    """
    interfaces = Interfaces(links, addresses, old.chosen_by)
    link = interfaces.called(old.link_name)
    owner = link if old.address_link is None else interfaces.called(old.address_link)
    if owner is None or old.chosen_address not in interfaces.addresses_of(owner):
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


def _underlay(found: Found, options: UnderlayOptions, interfaces: Interfaces, ways: Ways) -> Underlay:
    link, owner, address, reason = found.link, found.owner, found.address, found.reason
    if leads_nowhere(link):
        link = ways.first() or link
    is_routed = owner.index != link.index
    if link.mtu == 0:
        raise UnderlayError(f"failed to determine MTU for {found.address} interface {link.name}")
    if is_routed:
        reason = f"{reason}; it is on {owner.name}, and the routes to other hosts lead through {link.name}"
    public = options.public(interfaces.family)
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
        chosen_by=interfaces.family,
    )
    return _with_other(underlay, options, interfaces, [owner, link], found.named)


def _with_other(
    underlay: Underlay,
    options: UnderlayOptions,
    interfaces: Interfaces,
    links: Sequence[Link],
    named: IPAddress | None = None,
) -> Underlay:
    """With what it has of the other family than the one that has chosen it.

    That is the address of `links`, the first of them first; `named`, or the one that it has, as long as that is there.
    PublicIP, or PublicIPv6, where this host has that.
    """
    other = Family.IPV4 if interfaces.family is Family.IPV6 else Family.IPV6
    if other not in options.families:
        return underlay
    public = options.public(other)
    usable = [ip for link in links for ip in interfaces.addresses_of(link, other)]
    used, problem = named or underlay.address_of(other), ""
    if public is not None and interfaces.owner_of(public) is not None:
        address: IPAddress | None = public
    elif usable:
        address = used if used in usable else usable[0]
        public = public or address
    else:
        names = " and ".join({link.name: f"{link.name}{interfaces.useless(link, other)}" for link in links}.values())
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

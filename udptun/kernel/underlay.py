"""Choose the interface that carries the outer packets, as flannel does (pkg/ipmatch/match.go, main.go).

Pure: the caller says which links, addresses and routes exist.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network

from udptun.core.errors import UdptunError, UsageError
from udptun.core.network_state import Address, Link, Route, RouteType

_EVERYWHERE = IPv4Network("0.0.0.0/0")


class UnderlayError(UdptunError):
    """No interface fits.  The exit status is 1, not 2, because the interface or its address may appear later."""


@dataclass(frozen=True, slots=True)
class UnderlayOptions:
    """What --iface, --iface-regex, --iface-can-reach and --public-ip say."""

    ifaces: tuple[str, ...] = ()
    iface_regexes: tuple[str, ...] = ()
    can_reach: IPv4Address | None = None
    public_ip: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class Underlay:
    """The chosen interface.  Our socket binds to `address`; our lease tells the peers `public_ip`."""

    link_name: str
    link_index: int
    mtu: int
    address: IPv4Address
    public_ip: IPv4Address


def pick(
    options: UnderlayOptions,
    links: Sequence[Link],
    addresses: Sequence[Address],
    routes: Sequence[Route],
    reach: Route | None = None,
) -> Underlay:
    """The interface that `options` describe.

    `routes` is the main table in the kernel's order; `reach` is the kernel's route to `options.can_reach`, None where
    it has none.  Without options it is the interface of the default route, or the one that owns `public_ip`.

    Raises UnderlayError, which names everything that was tried; UsageError for a regular expression that is none.
    """
    interfaces = _Interfaces(links, addresses)
    if not (options.ifaces or options.iface_regexes or options.can_reach):
        try:
            found = interfaces.owner(options.public_ip) if options.public_ip else interfaces.on_default_route(routes)
            return _underlay(found, options)
        except UnderlayError as exc:
            raise UnderlayError(
                f"Failed to find any valid interface to use: {exc} (there are: {interfaces.inventory()})"
            ) from None

    patterns = [(text, _go_regex(text)) for text in options.iface_regexes]
    tried: list[str] = []
    for iface in options.ifaces:
        try:
            return _underlay(interfaces.named(iface), options)
        except UnderlayError as exc:
            tried.append(f"--iface={iface}: {exc}")
    for text, pattern in patterns:
        try:
            return _underlay(interfaces.matching(text, pattern), options)
        except UnderlayError as exc:
            tried.append(f"--iface-regex={text}: {exc}")
    if options.can_reach is not None:
        try:
            return _underlay(interfaces.towards(options.can_reach, reach), options)
        except UnderlayError as exc:
            tried.append(f"--iface-can-reach={options.can_reach}: {exc}")
    raise UnderlayError(
        "Failed to find interface to use that matches the interfaces and/or regexes provided"
        f" ({'; '.join(tried)}; there are: {interfaces.inventory()})"
    )


def refresh(old: Underlay, link: Link | None, addresses: Sequence[Address]) -> Underlay | None:
    """`old` as it is now; None when a link of this name is another one, or no longer has our address."""
    if link is None or link.index != old.link_index or old.address not in _usable(link, addresses):
        return None
    return replace(old, mtu=link.mtu)


def _underlay(found: tuple[Link, IPv4Address], options: UnderlayOptions) -> Underlay:
    link, address = found
    if link.mtu == 0:
        raise UnderlayError(f"failed to determine MTU for {address} interface {link.name}")
    return Underlay(link.name, link.index, link.mtu, address, options.public_ip or address)


class _Interfaces:
    """The links of this host and the ways to find one.  Each returns the link and our address on it."""

    def __init__(self, links: Sequence[Link], addresses: Sequence[Address]) -> None:
        self._links = links
        self._addresses = {link.index: _usable(link, addresses) for link in links}

    def owner(self, ip: IPv4Address) -> tuple[Link, IPv4Address]:
        for link in self._links:
            if ip in self._addresses[link.index]:
                return link, ip
        raise UnderlayError(f"No interface with given IP found: {ip}")

    def on_default_route(self, routes: Sequence[Route]) -> tuple[Link, IPv4Address]:
        for route in routes:
            if route.dst == _EVERYWHERE and route.type == RouteType.UNICAST and route.oif is not None:
                return self._first_address(self._by_index(route.oif))
        raise UnderlayError("failed to get default interface: unable to find default route; use --iface")

    def named(self, iface: str) -> tuple[Link, IPv4Address]:
        try:
            return self.owner(IPv4Address(iface))
        except ValueError:
            pass
        for link in self._links:
            if link.name == iface:
                return self._first_address(link)
        raise UnderlayError(f"error looking up interface {iface}: no such interface")

    def matching(self, text: str, pattern: re.Pattern[str]) -> tuple[Link, IPv4Address]:
        for link in self._links:
            for ip in self._addresses[link.index]:
                if pattern.search(str(ip)):
                    return link, ip
        for link in self._links:
            if pattern.search(link.name):
                return self._first_address(link)
        raise UnderlayError(f"could not match pattern {text} to any of the available network interfaces")

    def towards(self, ip: IPv4Address, reach: Route | None) -> tuple[Link, IPv4Address]:
        if reach is None or reach.oif is None:
            raise UnderlayError(f"failed to get interface to reach {ip}: no route")
        link = self._by_index(reach.oif)
        if isinstance(reach.prefsrc, IPv4Address):
            return link, reach.prefsrc
        return self._first_address(link)

    def _first_address(self, link: Link) -> tuple[Link, IPv4Address]:
        addresses = self._addresses[link.index]
        if not addresses:
            raise UnderlayError(f"failed to find IPv4 address for interface {link.name}")
        return link, addresses[0]

    def _by_index(self, index: int) -> Link:
        for link in self._links:
            if link.index == index:
                return link
        raise UnderlayError(f"interface {index} of that route is gone")

    def inventory(self) -> str:
        """Every link but lo with its usable addresses, for error messages."""
        links = [link for link in self._links if not link.is_loopback]
        return ", ".join(" ".join([link.name, *map(str, self._addresses[link.index])]) for link in links) or "none"


def _usable(link: Link, addresses: Sequence[Address]) -> list[IPv4Address]:
    """The link's usable addresses: global before link-local, permanent before dynamic, lasting before temporary.

    Deprecated addresses are left out, as they are not for new connections (RFC 4862 5.5.4), and so are loopback and
    multicast addresses.
    """
    candidates = [
        (a.ip.is_link_local, not a.is_permanent, a.is_temporary, position, a.ip)
        for position, a in enumerate(addresses)
        if a.link_index == link.index
        and isinstance(a.ip, IPv4Address)
        and not (a.is_deprecated or a.ip.is_loopback or a.ip.is_multicast or a.ip.is_unspecified)
    ]
    return [candidate[-1] for candidate in sorted(candidates)]


_POSIX_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r"\t ",
    "digit": "0-9",
    "lower": "a-z",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\s",
    "upper": "A-Z",
    "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}


def _go_regex(text: str) -> re.Pattern[str]:
    """Compile a regular expression of Go's RE2 syntax.

    Three differences matter for names and addresses.  RE2 has POSIX classes, which Python would misread without an
    error.  RE2 has `\\z`.  The classes of RE2 are ASCII.  What only RE2 refuses (backreferences) is accepted.
    """

    def posix(match: re.Match[str]) -> str:
        name = match[1]
        if name not in _POSIX_CLASSES:
            raise UsageError(f"could not compile the IP address regex '{text}': no character class [:{name}:]")
        return _POSIX_CLASSES[name]

    try:
        with warnings.catch_warnings():
            # Python warns about [[, which means the same in both.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(re.sub(r"\[:(\w+):\]", posix, text).replace(r"\z", r"\Z"), re.ASCII)
    except re.error as exc:
        raise UsageError(f"could not compile the IP address regex '{text}': {exc}") from exc

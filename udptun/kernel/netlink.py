"""What the kernel is asked about its links, addresses, routes, neighbours and fdb entries.

The messages are written and read by link_messages.py (links and addresses, with pyroute2) and rtnetlink.py (routes,
neighbours and fdb entries).

Whatever differs by family takes it as a parameter.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import (
    LOCAL_TABLE,
    MAIN_TABLE,
    Address,
    FdbEntry,
    IPAddress,
    IPNetwork,
    Link,
    Neighbour,
    Route,
    RouteType,
)
from udptun.kernel import link_messages, rtnetlink
from udptun.kernel.conversation import Conversation

AddressT = TypeVar("AddressT", IPv4Address, IPv6Address, IPAddress)


class Netlink(Conversation):
    """A conversation about the network.  See `Conversation` for how it is used.

    A kernel without IPv6 answers a question about it with what it has of IPv4 (rtnl_dump_all), which is left out.
    """

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    async def links(self) -> list[Link]:
        """Every link.  There is always one (lo), so an empty answer is an error."""
        bodies = await self.dump(link_messages.dump_links())
        if not bodies:
            raise KernelError("cannot list links", errno.ENODATA, "the kernel sent an empty list")
        return [link_messages.decode_link(body) for body in bodies]

    async def link(self, name: str) -> Link | None:
        """The link called `name`, None when there is none."""
        ((error, bodies),) = await self.ask([link_messages.get_link(name)])
        if error is not None:
            if error.errno == errno.ENODEV:
                return None
            raise error
        return link_messages.decode_link(bodies[0])

    async def addresses(self, link_index: int = 0, family: Family = Family.IPV4) -> list[Address]:
        """The addresses of one link, or of all (0).  A link that is gone has none."""
        try:
            bodies = await self.dump(link_messages.dump_addresses(link_index, family))
        except KernelError as exc:
            if exc.errno == errno.ENODEV:
                return []
            raise
        addresses = map(link_messages.decode_address, bodies)
        return [address for address in addresses if address.ip.version == family.value]

    async def local_addresses(self, family: Family) -> set[IPAddress]:
        """Our end of every address, and no more than that.  10,000 take 0.1 s."""
        bodies = await self.dump(link_messages.dump_addresses(0, family))
        return {ip for ip in map(link_messages.decode_local_address, bodies) if ip.version == family.value}

    async def local_routes(self, family: Family) -> list[IPNetwork]:
        """What somebody has made local with a route instead of an address (`ip route add local …`)."""
        try:
            bodies = await self.dump(rtnetlink.dump_routes(family, LOCAL_TABLE, 0))
        except KernelError as exc:
            if exc.errno == errno.ENOENT:
                # The table comes with the first address.
                return []
            raise
        routes = map(rtnetlink.decode_local_route, bodies)
        return [route for route in routes if route is not None and route.version == family.value]

    async def routes(self, protocol: int = 0, family: Family = Family.IPV4) -> list[Route]:
        """The main table in the kernel's order (of equal prefixes the best metric first).

        `protocol` limits it to one owner's routes.  The kernel filters, so other routes cost nothing.
        """
        bodies = await self.dump(rtnetlink.dump_routes(family, MAIN_TABLE, protocol))
        return [route for route in map(rtnetlink.decode_route, bodies) if route.dst.version == family.value]

    async def route_get(
        self, ip: IPAddress, source: IPAddress | None = None, from_link: int = 0, *, as_configured: bool = False
    ) -> Route:
        """How the kernel would send to `ip` now.  `prefsrc` is the source address it would choose.

        The others are as `rtnetlink.get_route` has them.
        """
        asked = rtnetlink.get_route(ip, source=source, from_link=from_link, as_configured=as_configured)
        ((error, bodies),) = await self.ask([asked])
        if error is not None:
            raise error
        return rtnetlink.decode_route(bodies[0])

    async def routes_to(self, ips: Iterable[AddressT], *, as_configured: bool = False) -> dict[AddressT, Route]:
        """`route_get` for each; those that the kernel has no route to are left out.

        `as_configured`: the routes themselves, without what ICMP has changed.
        """
        asked = list(ips)
        answers = await self.ask([rtnetlink.get_route(ip, as_configured=as_configured) for ip in asked])
        return {
            ip: rtnetlink.decode_route(bodies[0])
            for ip, (error, bodies) in zip(asked, answers, strict=True)
            if error is None
        }

    async def on_link(self, ips: Iterable[AddressT]) -> dict[AddressT, int]:
        """Those that the kernel reaches without a gateway, each with the index of the link that leads there."""
        return {
            ip: route.oif
            for ip, route in (await self.routes_to(ips)).items()
            if route.gateway is None
            and route.oif is not None
            and route.type == RouteType.UNICAST
            and not route.is_encapsulated
        }

    async def neighbours(self, link_index: int, family: Family = Family.IPV4) -> list[Neighbour]:
        """The neighbours on one link; those without a link-layer address are left out."""
        bodies = await self.dump(rtnetlink.dump_neighbours(link_index, family))
        return [found for body in bodies if (found := rtnetlink.decode_neighbour(body)) is not None]

    async def neighbour_states(self, link_index: int) -> dict[IPAddress | None, int]:
        """The NUD_* states of the IPv4 neighbours on one link, also of those without a link-layer address."""
        bodies = await self.dump(rtnetlink.dump_neighbours(link_index, Family.IPV4))
        return dict(map(rtnetlink.decode_neighbour_state, bodies))

    async def fdb(self, link_index: int) -> list[FdbEntry]:
        """The forwarding entries of one VXLAN link that lead to another VTEP."""
        bodies = await self.dump(rtnetlink.dump_fdb(link_index))
        return [found for body in bodies if (found := rtnetlink.decode_fdb_entry(body)) is not None]

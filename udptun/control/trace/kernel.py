"""What the kernel does with a packet before and after the tunnel, by its routes of this moment."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.network_state import IPAddress, Link, Route, RouteType, describe_route
from udptun.core.trace_request import UDP, TraceRequest
from udptun.kernel.netlink import Netlink

_NOWHERE = {
    RouteType.BLACKHOLE: "a blackhole route",
    RouteType.UNREACHABLE: "an unreachable route",
    RouteType.PROHIBIT: "a prohibit route",
}
_REFUSALS = {
    errno.ENETUNREACH: "it has no route",
    errno.EHOSTUNREACH: "an unreachable route, or it forwards no packets of that device (ip_forward)",
    errno.EACCES: "a prohibit route",
    errno.EINVAL: "a blackhole route, or a source address that it takes from nobody",
    errno.EXDEV: "it does not expect the source address on that device (rp_filter)",
}
_IPV4_HEADER, _IPV6_FRAGMENT_HEADERS = 20, 48


@dataclass(frozen=True, slots=True)
class Way:
    """What the kernel does with a packet.  `refusal` says why it goes nowhere; empty: it does.

    `from_device`: where it has come from; None: it is this host's own.  `mtu` is that of the way, bytes.
    `packet` is what leaves: with the TTL of then, and of several fragments the longest.
    """

    packet: TraceRequest
    from_device: str | None = None
    route: Route | None = None
    device: str | None = None
    mtu: int | None = None
    refusal: str = ""
    text: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is for this host itself."""
        return self.route is not None and self.route.type == RouteType.LOCAL

    def document(self) -> dict[str, Any]:
        return {
            "from_device": self.from_device,
            "route": self.text or None,
            "device": self.device,
            "gateway": None if self.route is None or self.route.gateway is None else str(self.route.gateway),
            "mtu": self.mtu,
            "ttl": self.packet.ttl,
            "bytes": self.packet.length,
            "refusal": self.refusal or None,
        }


class KernelView:
    """The kernel's routes and links, asked while `netlink` is open."""

    def __init__(self, netlink: Netlink, links: Mapping[int, Link]) -> None:
        self._netlink = netlink
        self._links = links
        self._names = {index: link.name for index, link in links.items()}

    @classmethod
    async def of(cls, netlink: Netlink) -> Self:
        """Raises KernelError."""
        return cls(netlink, {link.index: link for link in await netlink.links()})

    async def is_of_this_host(self, address: IPAddress) -> bool:
        route = await self._route(address)
        return route is not None and route.type == RouteType.LOCAL

    async def from_here(self, packet: TraceRequest, tunnel_device: str | None) -> Way:
        """Of a packet that this host, or a pod or another machine behind one of its devices, sends."""
        back = await self._route(packet.source)
        if back is not None and back.type == RouteType.LOCAL:
            return await self._way(packet, packet.source, 0)
        if back is None or back.oif is None or self._names.get(back.oif) == tunnel_device:
            # Nobody knows by which device it would come.
            return await self._way(packet, None, 0)
        return await self._way(packet, packet.source, back.oif)

    async def from_tunnel(self, packet: TraceRequest, tunnel_device: str | None) -> Way:
        """Of a packet that has come out of the tunnel's device; None: one of the underlay's."""
        index = next((it for it, name in self._names.items() if name == tunnel_device), 0)
        if not index:
            back = await self._route(packet.source)
            index = 0 if back is None else back.oif or 0
        return await self._way(packet, packet.source, index)

    async def of_datagram(self, source: IPAddress, destination: IPAddress) -> Way:
        """Of a datagram of the tunnel, whatever its length.  `mtu` is the device's, which alone limits it."""
        way = await self._way(TraceRequest(source, destination, UDP, None, 0), source, 0)
        link = None if way.route is None or way.route.oif is None else self._links.get(way.route.oif)
        return way if link is None else replace(way, mtu=link.mtu)

    async def mac_of(self, device: str, ip: IPAddress) -> str | None:
        """Of a neighbour that is known on the link; None: it is not.  Raises KernelError."""
        known = await self._netlink.neighbours(self._index(device), Family(ip.version))
        return next((it.mac for it in known if it.ip == ip), None)

    async def vtep_of(self, device: str, mac: str) -> IPAddress | None:
        """Where a VXLAN device sends frames for a MAC; None: nowhere.  Raises KernelError."""
        return next((it.dst for it in await self._netlink.fdb(self._index(device)) if it.mac == mac), None)

    def _index(self, device: str) -> int:
        index = next((it for it, name in self._names.items() if name == device), None)
        if index is None:
            raise KernelError(f"cannot find the device {device}", errno.ENODEV, "it has gone meanwhile; ask again")
        return index

    async def _route(self, ip: IPAddress, source: IPAddress | None = None, from_link: int = 0) -> Route | None:
        try:
            return await self._netlink.route_get(ip, source, from_link)
        except KernelError:
            return None

    async def _way(self, packet: TraceRequest, source: IPAddress | None, from_link: int) -> Way:
        from_device = self._names.get(from_link)
        if from_link and packet.destination.is_multicast:
            return Way(packet, from_device, refusal="it forwards no multicast packets")
        try:
            route = await self._netlink.route_get(packet.destination, source, from_link)
        except KernelError as exc:
            return Way(packet, from_device, refusal=_REFUSALS.get(exc.errno, str(exc)))
        if route.type in _NOWHERE:
            return Way(packet, from_device, route, refusal=_NOWHERE[RouteType(route.type)])
        link = None if route.oif is None else self._links.get(route.oif)
        try:
            configured = await self._netlink.route_get(packet.destination, source, from_link, as_configured=True)
        except KernelError:
            # Multicast of IPv4 has no entry in a table.
            configured = route
        way = Way(
            packet,
            from_device,
            route,
            None if link is None else link.name,
            route.mtu or (None if link is None else link.mtu),
            text=describe_route(configured, self._names),
        )
        if way.is_local:
            return way
        if link is not None and not link.is_up:
            return replace(way, refusal=f"{link.name} is down")
        return _forwarded(way) if from_link else _shortened(way)


def _forwarded(way: Way) -> Way:
    """After a router's step of the TTL."""
    packet = replace(way.packet, ttl=way.packet.ttl - 1)
    if packet.ttl <= 0:
        return replace(way, refusal="its TTL or hop limit is used up on this host")
    return _shortened(replace(way, packet=packet))


def _shortened(way: Way) -> Way:
    """As long as the way takes it: in fragments, or not at all."""
    packet, mtu = way.packet, way.mtu
    if mtu is None or packet.length <= mtu:
        return way
    is_ipv6 = packet.destination.version == 6
    if packet.has_df or (is_ipv6 and way.from_device is not None):
        return replace(way, refusal=f"it has more than {mtu} bytes and must not be fragmented")
    headers = _IPV6_FRAGMENT_HEADERS if is_ipv6 else _IPV4_HEADER
    return replace(way, packet=packet.with_length(headers + (mtu - headers) // 8 * 8))

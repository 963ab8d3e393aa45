"""What in the kernel belongs to one daemon of the host, and what to another one.  Pure.

There may be several daemons on a host, each for a Network of its own, and Networks do not overlap.  So a mark says that
udptun has made something, and the Network says which daemon:

    route     our protocol number; its destination lies in the Network
    device    our alias, `udptun <Network>`
    filter    its name begins with that alias
    rule      it stands in flannel's chains; its addresses lie in the Network

Builds that knew one daemon a host made devices with less: VXLAN devices with the alias `udptun`, TUN devices without
one.  There the address of the device says whose it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from udptun.core.ip_text import ip_network
from udptun.core.lease import is_inside
from udptun.core.network_state import DEVICE_NAME, Address, IPNetwork, Link, Route

_MARK = "udptun"


def alias_of(network: IPNetwork) -> str:
    """The alias (IFLA_IFALIAS) of the devices that belong to the daemon of `network`."""
    return f"{_MARK} {network}"


def marked_network(link: Link) -> IPNetwork | None:
    """The Network in the device's alias; None when the alias is not ours or names none."""
    mark, _, network = link.alias.partition(" ")
    try:
        return ip_network(network) if mark == _MARK and "/" in network else None
    except ValueError:
        return None


def is_marked(link: Link) -> bool:
    """Whether some daemon of ours has made the device.

    A TUN device is ours by its name and flags as well: nobody else makes one like it.
    """
    tun = link.tun
    return (
        link.alias == _MARK
        or marked_network(link) is not None
        or (
            DEVICE_NAME.fullmatch(link.name) is not None
            and tun is not None
            and not tun.is_tap
            and tun.is_multi_queue
            and tun.is_persistent
        )
    )


@dataclass(frozen=True, slots=True)
class Ownership:
    """What belongs to the daemon that has or had these Networks.

    The first Network is the present one.  Things of the others are leftovers of this daemon's earlier runs, also of one
    with another family.  Without any Network nothing belongs to it.
    """

    networks: tuple[IPNetwork, ...]

    @property
    def network(self) -> IPNetwork:
        return self.networks[0]

    @property
    def alias(self) -> str:
        """See `alias_of`."""
        return alias_of(self.network)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Of all that is this daemon's, leftovers included."""
        return tuple(map(alias_of, self.networks))

    def with_leftovers(self, networks: Iterable[IPNetwork]) -> Ownership:
        """What belongs to it where earlier runs had these Networks, too."""
        return Ownership((*self.networks, *networks))

    def without_leftovers(self) -> Ownership:
        """What belongs to it once everything of its earlier runs is gone."""
        return Ownership(self.networks[:1])

    def owns_route(self, route: Route) -> bool:
        """Whether a route with our protocol number is this daemon's."""
        return any(is_inside(route.dst, it) for it in self.networks)

    def owns_link(self, link: Link, addresses: Iterable[Address]) -> bool:
        """Whether the device is this daemon's.  `addresses` are at least those of the device."""
        return is_marked(link) and bool(self.networks) and self._has_marked(link, addresses)

    def has_made_link(self, link: Link, addresses: Iterable[Address]) -> bool:
        """Whether the device is this daemon's for certain.

        One without a Network in its alias and without an address may be a device that another daemon makes right now:
        the kernel knows it a moment before its alias.
        """
        has_owner = marked_network(link) is not None or any(it.link_index == link.index for it in addresses)
        return has_owner and self.owns_link(link, addresses)

    def leaves_link(self, link: Link, addresses: Iterable[Address]) -> bool:
        """Whether the device is another daemon's.  `addresses` are at least those of the device."""
        return is_marked(link) and not self.owns_link(link, addresses)

    def _has_marked(self, link: Link, addresses: Iterable[Address]) -> bool:
        network = marked_network(link)
        if network is not None:
            return network in self.networks
        here = [address.ip for address in addresses if address.link_index == link.index]
        # A device that has no address yet, or has lost it, may be taken over.
        return not here or any(ip in it for ip in here for it in self.networks)

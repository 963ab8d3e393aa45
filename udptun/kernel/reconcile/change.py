"""What the reconciler can do in the kernel, as values.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from udptun.core.desired import DesiredLink, Sysctl
from udptun.core.network_state import Address, FdbEntry, Link, LinkSettings, Neighbour, Route, describe_route

_PerPeer = Route | Neighbour | FdbEntry
Thing = _PerPeer | Address | Link | LinkSettings | DesiredLink | Sysctl


OBJECTS: Mapping[type, str] = {
    Route: "route",
    Address: "address",
    Neighbour: "neighbour",
    FdbEntry: "fdb",
    LinkSettings: "link",
    Link: "device",
    DesiredLink: "device",
    Sysctl: "sysctl",
}
"""What a thing is called, where changes are counted."""


class Verb(Enum):
    ADD = "add"
    CREATE = "create"
    DELETE = "delete"
    REVIVE = "revive"
    SET = "set"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to do.

    | thing                        | verbs       |
    |------------------------------|-------------|
    | Route, Address               | ADD, DELETE |
    | Neighbour, FdbEntry          | SET, DELETE |
    | LinkSettings, Sysctl         | SET         |
    | DesiredLink, a VXLAN device  | CREATE      |
    | DesiredLink, the datapath's  | REVIVE      |
    | Link                         | DELETE      |
    """

    verb: Verb
    thing: Thing

    @property
    def is_per_peer(self) -> bool:
        """Whether there may be one of these for each peer.  Without it that peer is cut off, and no other."""
        return isinstance(self.thing, _PerPeer)

    @property
    def object(self) -> str:
        """One of the words in OBJECTS."""
        return OBJECTS[type(self.thing)]

    def __str__(self) -> str:
        """For problems."""
        return self.describe({})

    def describe(self, link_names: Mapping[int, str]) -> str:
        """For log lines, with these names of links by their indexes."""
        return f"{self.verb.value} {self._object(link_names)}"

    def _object(self, link_names: Mapping[int, str]) -> str:
        match self.thing:
            case Route() as route:
                return f"route {describe_route(route, link_names)}"
            case Address() as address:
                return f"address {address.ip}/{address.prefixlen}"
            case Neighbour() as neighbour:
                mac = f" lladdr {neighbour.mac}" if self.verb is Verb.SET else ""
                return f"neighbour {neighbour.ip}{mac}"
            case FdbEntry() as entry:
                return f"fdb {entry.mac} dst {entry.dst}"
            case LinkSettings() as settings:
                return f"link {settings}"
            case Link() as link:
                return f"link {link.name}"
            case DesiredLink() as desired:
                return f"{'device' if desired.vxlan is None else 'vxlan device'} {desired.name}"
            case Sysctl() as sysctl:
                return f"sysctl {sysctl.path}={sysctl.value}"

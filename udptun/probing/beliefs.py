"""How long packets to peers may be by what the kernel believes, and by what was measured.  Pure.

The kernel believes what ICMP errors say for 10 minutes, and anybody can forge one.  So where a peer answers probes, the
probes show whether it is so.  Elsewhere what the kernel believes counts.  An `mtu` that somebody has given the route
always counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Beliefs(Generic[K]):
    """About peers, by whatever the caller calls them.  `full`: how long packets may be by the device; all in bytes."""

    def __init__(self, full: int) -> None:
        self._full = full
        self._believed: dict[K, int] = {}
        """Only what is less than `full`."""
        self._routes: dict[K, int] = {}
        """Likewise, by the `mtu` of routes."""
        self._new: set[K] = set()

    def __contains__(self, key: K) -> bool:
        """Whether packets to the peer may not be as long as the device allows, as the kernel believes."""
        return key in self._believed

    @property
    def peers(self) -> list[K]:
        """Those that are in it."""
        return list(self._believed)

    def note(self, believed: Mapping[K, int]) -> None:
        """The kernel believes this now."""
        for key, mtu in believed.items():
            if min(mtu, self._full) != self._believed.pop(key, self._full):
                self._new.add(key)
            if mtu < self._full:
                self._believed[key] = mtu

    def take_new(self) -> set[K]:
        """Peers of which the kernel believes something else than before; who has said it is for `note_routes`."""
        new, self._new = self._new, set()
        return new

    def note_routes(self, keys: Iterable[K], mtus: Mapping[K, int]) -> dict[K, int]:
        """The `mtu` of the routes to these peers, for those that have one.  Returns what ICMP has said beyond that."""
        said = {}
        for key in keys:
            route_mtu = min(mtus.get(key, self._full), self._full)
            self._routes.pop(key, None)
            if route_mtu < self._full:
                self._routes[key] = route_mtu
            if self._believed.get(key, self._full) < route_mtu:
                said[key] = self._believed[key]
        return said

    def remove(self, key: K) -> None:
        self._believed.pop(key, None)
        self._routes.pop(key, None)
        self._new.discard(key)

    def path_mtu(self, key: K, measured: int | None) -> int:
        """How long packets to the peer may be; `measured` None: no probe can tell."""
        mtu = self._believed.get(key, self._full) if measured is None else measured
        return min(mtu, self._routes.get(key, self._full))

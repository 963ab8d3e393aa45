"""Leases and the table of them.  Pure: no I/O, no clock.

A lease says that one host owns one subnet of the overlay network until it expires.  The text forms here are
flannel's: the key of a lease (`10.244.3.0-24`, with `&<v6>-<len>` appended in dual stack) and its JSON value
(`{"PublicIP":…,"PublicIPv6":…,"BackendType":…,"BackendData":…}`), in flannel's field order.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from enum import Enum
from functools import lru_cache
from heapq import heapify, heappop, heappush
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import chain
from typing import Any

from udptun.core.frozen import dataclass

Json = Any
"""A value as `json.loads` returns it; BackendData belongs to the backend that wrote it."""


_REMEMBERED = 65_536
"""So many texts are not parsed again: a start reads every lease twice, to choose and to follow, and a watch that lost
its place reads them all once more.  What comes of one text is one object, which equals itself without a look inside."""

_STALE_EXPIRIES = 1000
"""So many entries that say nothing any more are left in the list of expiries before it is made anew."""


class LeaseFormatError(ValueError):
    """A lease key or value that is not flannel's form; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Subnets:
    """The prefix or, in dual stack, the pair of prefixes that one lease covers.

    `key` is flannel's: `10.244.3.0-24`, in dual stack `10.244.3.0-24&fd00:1::-64`.
    """

    ipv4: IPv4Network
    ipv6: IPv6Network | None = None
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Made once: the table asks for it several times for each of thousands of leases.
        key = f"{self.ipv4.network_address}-{self.ipv4.prefixlen}"
        if self.ipv6 is not None:
            key = f"{key}&{self.ipv6.network_address}-{self.ipv6.prefixlen}"
        object.__setattr__(self, "key", key)

    @classmethod
    @lru_cache(_REMEMBERED)
    def from_key(cls, key: str) -> Subnets:
        """The inverse of `key`.  Raises LeaseFormatError; host bits are an error, not masked away."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise LeaseFormatError(f"{key!r} is not of the form <IPv4>-<length> or <IPv4>-<length>&<IPv6>-<length>")
        v4, v4_len, v6, v6_len = match.groups()
        try:
            return cls(
                IPv4Network((v4, int(v4_len))),
                None if v6 is None else IPv6Network((v6, int(v6_len))),
            )
        except ValueError as exc:
            raise LeaseFormatError(f"{key!r}: {exc}") from exc


_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(0|[1-9]\d?)(?:&([0-9a-f:]+)-(0|[1-9]\d{0,2}))?")


@dataclass(frozen=True, slots=True)
class LeaseAttrs:
    """What a host says about itself in its lease."""

    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: Json = None
    backend_v6_data: Json = None

    @property
    def is_udptun(self) -> bool:
        """Whether udptun wrote the lease (flannel never sets the key)."""
        return isinstance(self.backend_data, Mapping) and "Udptun" in self.backend_data

    @property
    def node_id(self) -> str | None:
        """The writer's NodeID; None in a lease that flannel wrote."""
        value = self.backend_data.get("NodeID") if isinstance(self.backend_data, Mapping) else None
        return value if isinstance(value, str) else None

    def port(self, default: int) -> int:
        """The UDP port the host listens on; `default` where the lease names none, as flannel's never do."""
        value = self.backend_data.get("Port") if isinstance(self.backend_data, Mapping) else None
        # True is an int to Python, and 1.
        return value if type(value) is int and 0 < value < 65536 else default

    def to_json(self) -> str:
        """flannel's lease value: its field order, `PublicIPv6` always there, the backend's fields only when set."""
        fields: dict[str, Json] = {
            "PublicIP": str(self.public_ip),
            "PublicIPv6": None if self.public_ipv6 is None else str(self.public_ipv6),
        }
        if self.backend_type:
            fields["BackendType"] = self.backend_type
        if self.backend_data is not None:
            fields["BackendData"] = self.backend_data
        if self.backend_v6_data is not None:
            fields["BackendV6Data"] = self.backend_v6_data
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    @lru_cache(_REMEMBERED)
    def from_json(cls, text: str) -> LeaseAttrs:
        """The inverse of `to_json`; unknown fields are ignored.  Raises LeaseFormatError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise LeaseFormatError(f"not JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise LeaseFormatError(f"a lease is a JSON object, not {type(value).__name__}")
        try:
            public_ip = IPv4Address(_text(value, "PublicIP"))
            v6 = value.get("PublicIPv6")
            public_ipv6 = None if v6 is None else IPv6Address(_text(value, "PublicIPv6"))
        except ValueError as exc:
            raise LeaseFormatError(str(exc)) from exc
        backend_type = value.get("BackendType", "")
        if not isinstance(backend_type, str):
            raise LeaseFormatError("BackendType is not a string")
        return cls(public_ip, public_ipv6, backend_type, value.get("BackendData"), value.get("BackendV6Data"))


def _text(value: Mapping[str, Json], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise LeaseFormatError(f"{key} is missing or not a string")
    return text


@dataclass(frozen=True, slots=True)
class Lease:
    """One host's subnet.

    `expires_s` is Unix time in seconds; None never expires (a reservation, or a line of a leases file).
    `revision` is the store's revision that last wrote the lease, 0 where the store has none.
    """

    subnets: Subnets
    attrs: LeaseAttrs
    expires_s: float | None = None
    revision: int = 0

    @property
    def key(self) -> str:
        return self.subnets.key

    @property
    def subnet(self) -> IPv4Network:
        return self.subnets.ipv4

    @property
    def is_reservation(self) -> bool:
        """Whether it never expires: an operator has made it, and only an operator deletes it."""
        return self.expires_s is None

    def is_expired(self, now_s: float) -> bool:
        return self.expires_s is not None and self.expires_s <= now_s


class EventType(Enum):
    ADDED = "added"
    """The lease is new, or its content changed: the event's lease replaces what was known under its key."""
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    """One change.  A removal carries the last known lease, so that consumers need not remember it."""

    type: EventType
    lease: Lease


def validate(lease: Lease, network: IPv4Network) -> str | None:
    """Why a lease, our own or a peer's, cannot be used inside `network`; None when it can.

    A wrong address here would send pod traffic to loopback, to a multicast group or to nobody.
    """
    if not is_inside(lease.subnet, network):
        return f"subnet {lease.subnet} is outside Network {network}"
    if not 16 <= lease.subnet.prefixlen <= 30:
        return f"prefix length {lease.subnet.prefixlen} is outside 16..30"
    ip = lease.attrs.public_ip
    if int(ip) >> 24 in (0, 127) or int(ip) >> 29 == 0b111:
        return f"PublicIP {ip} is not a unicast address"
    if ip in network:
        return f"PublicIP {ip} lies inside Network {network}"
    return None


class LeaseTable:
    """The peers this host should reach: what the store says, without our own lease and without what is unusable.

    Fed with snapshots and events, each update returns the difference a backend has to apply, removals first.  A
    lease that cannot be used is left out alone, under `refused` (key -> reason), and never costs another lease its
    place; the first of two overlapping leases keeps the ground until it goes, and `own_subnet` is nobody else's.
    An update costs what it touches, not what the table holds.

    `is_own` (whether packets for the lease would come back to us) and `refusal` (why the backend has no use for a valid
    lease) must depend on nothing but the lease's subnets and attrs.
    """

    def __init__(
        self,
        network: IPv4Network,
        own_subnet: IPv4Network,
        is_own: Callable[[Lease], bool],
        refusal: Callable[[Lease], str | None],
    ) -> None:
        self._network = network
        self._own_subnet = own_subnet
        self._is_own = is_own
        self._refusal = refusal
        self._known: dict[str, Lease] = {}
        self._used: dict[str, Lease] = {}
        self._ground = _Ground()
        self._waiting: dict[str, Lease] = {}
        """Refused only because another lease has their ground."""
        self._expiries = _Expiries()
        self.refused: dict[str, str] = {}

    @property
    def peers(self) -> Mapping[str, Lease]:
        """Usable leases by key: a live view, good until the next update."""
        return self._used

    def update(self, events: Iterable[LeaseEvent]) -> list[LeaseEvent]:
        """Apply events in order; return what changed among the usable peers."""
        touched: dict[str, None] = {}
        for event in events:
            touched[event.lease.key] = None
            if event.type is EventType.ADDED:
                self._known[event.lease.key] = event.lease
                self._expiries.add(event.lease)
            else:
                self._known.pop(event.lease.key, None)
        if len(self._expiries) > 2 * len(self._known) + _STALE_EXPIRIES:
            self._expiries.rebuild(self._known.values())
        return self._settle(touched)

    def reset(self, snapshot: Iterable[Lease]) -> list[LeaseEvent]:
        """Replace all state (the watch fell behind); return the difference by full content."""
        return list(chain.from_iterable(self.reset_by_parts(snapshot, sys.maxsize)))

    def reset_by_parts(self, snapshot: Iterable[Lease], size: int) -> Iterator[list[LeaseEvent]]:
        """`reset`, `size` leases a step, so that others get a turn between: a million would take seconds.

        What one step returns is to be applied before the next.  Other calls may come between two steps; the table
        keeps its promises throughout, but holds all of the snapshot only after the last one.
        """
        before = self._known
        self._known = {lease.key: lease for lease in snapshot}
        self._expiries.rebuild(self._known.values())
        yield self._settle([key for key in before if key not in self._known])
        # In the order of their addresses: every host gives the same one of two that overlap the ground.
        keys = sorted(self._known, key=lambda key: _order(self._known[key]))
        for at in range(0, len(keys), size):
            yield self._settle(keys[at : at + size])

    def expire(self, now_s: float) -> list[LeaseEvent]:
        """Drop what has expired by `now_s` (Unix seconds), whether or not the store has said so yet."""
        expired = []
        while (soonest := self._expiries.next(self._known)) is not None and soonest[0] <= now_s:
            del self._known[soonest[1]]
            expired.append(soonest[1])
        return self._settle(expired)

    def next_expiry_s(self) -> float | None:
        """When `expire` will next have something to do, Unix seconds."""
        soonest = self._expiries.next(self._known)
        return None if soonest is None else soonest[0]

    def postpone(self, seconds: float) -> None:
        """Move every expiry: the clock was set by so much, and none of the leases has become older by it."""
        self._known = {key: _postponed(lease, seconds) for key, lease in self._known.items()}
        self._used = {key: self._known.get(key, lease) for key, lease in self._used.items()}
        self._waiting = {key: self._known.get(key, lease) for key, lease in self._waiting.items()}
        self._expiries.rebuild(self._known.values())

    def _unusable(self, lease: Lease) -> str | None:
        if self._is_own(lease):
            return f"PublicIP {lease.attrs.public_ip} is our own"
        if _overlap(lease.subnet, self._own_subnet):
            return f"subnet {lease.subnet} overlaps our own lease {self._own_subnet}"
        return validate(lease, self._network) or self._refusal(lease)

    def _settle(self, touched: Iterable[str]) -> list[LeaseEvent]:
        """Bring the usable set in line with what is known of the keys `touched`; return the difference."""
        removed: list[Lease] = []
        added: list[Lease] = []
        newcomers: list[Lease] = []
        for key in touched:
            old, new = self._used.get(key), self._known.get(key)
            if new is not None and _same(old, new):
                self._used[key] = new  # a later expiry or revision, nothing to do
                continue
            self.refused.pop(key, None)
            self._waiting.pop(key, None)
            if new is not None and new.subnet == self._own_subnet and self._is_own(new):
                new = None
            if new is not None and (reason := self._unusable(new)) is not None:
                self.refused[key] = reason
                new = None
            if new is not None and old is not None:
                self._used[key] = new  # the same key is the same subnet: it keeps its ground
                added.append(new)
            elif new is not None:
                newcomers.append(new)
            elif old is not None:
                del self._used[key]
                self._ground.free(old)
                removed.append(old)
        if removed:
            newcomers += self._waiting.values()
        for lease in sorted(newcomers, key=_order):
            other = self._ground.claim(lease)
            if other is None:
                self._used[lease.key] = lease
                self.refused.pop(lease.key, None)
                self._waiting.pop(lease.key, None)
                added.append(lease)
            else:
                self.refused[lease.key] = f"subnet {lease.subnet} overlaps the lease {other.key}"
                self._waiting[lease.key] = lease
        return [LeaseEvent(EventType.REMOVED, lease) for lease in removed] + [
            LeaseEvent(EventType.ADDED, lease) for lease in added
        ]


def _same(old: Lease | None, new: Lease) -> bool:
    """Whether a backend would do the same for both, which have one key: everything but expiry and revision is equal."""
    return old is not None and old.attrs == new.attrs


def _order(lease: Lease) -> tuple[int, int]:
    """By address, the wider subnet first."""
    return int(lease.subnet.network_address), lease.subnet.prefixlen


def _postponed(lease: Lease, seconds: float) -> Lease:
    return lease if lease.expires_s is None else replace(lease, expires_s=lease.expires_s + seconds)


def is_inside(subnet: IPv4Network, network: IPv4Network) -> bool:
    """`subnet.subnet_of(network)`, which takes 11 µs: as many leases as a table holds are most of a second."""
    return subnet.prefixlen >= network.prefixlen and _overlap(subnet, network)


def _overlap(a: IPv4Network, b: IPv4Network) -> bool:
    """Whether the two share an address.  The same as `a.overlaps(b)`, which makes an object for every end of both."""
    shorter = min(a.prefixlen, b.prefixlen)
    return (int(a.network_address) ^ int(b.network_address)) >> (32 - shorter) == 0


def _span(subnet: IPv4Network) -> tuple[int, int]:
    """First and last address."""
    first = int(subnet.network_address)
    return first, first | 0xFFFFFFFF >> subnet.prefixlen


class _Ground:
    """Which addresses are taken: disjoint subnets, sorted by their first address."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._holder: dict[int, Lease] = {}

    def claim(self, lease: Lease) -> Lease | None:
        """Take the lease's subnet; the lease that is in the way when it overlaps one already taken."""
        first, last = _span(lease.subnet)
        # Of disjoint subnets only the last one that begins before our end can reach into us.
        place = bisect_right(self._firsts, last)
        if place:
            other = self._holder[self._firsts[place - 1]]
            if _span(other.subnet)[1] >= first:
                return other
        self._firsts.insert(place, first)
        self._holder[first] = lease
        return None

    def free(self, lease: Lease) -> None:
        """Give back what `claim` took."""
        first = int(lease.subnet.network_address)
        del self._holder[first]
        del self._firsts[bisect_left(self._firsts, first)]


class _Expiries:
    """When leases expire, soonest first.

    A lease that is renewed or goes leaves its old entry behind, which says nothing once it comes to the front; so
    a change costs little, and a look at the front nearly nothing.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, lease: Lease) -> None:
        if lease.expires_s is not None:
            heappush(self._heap, (lease.expires_s, lease.key))

    def rebuild(self, leases: Iterable[Lease]) -> None:
        """Forget everything but `leases`."""
        self._heap = [(lease.expires_s, lease.key) for lease in leases if lease.expires_s is not None]
        heapify(self._heap)

    def next(self, known: Mapping[str, Lease]) -> tuple[float, str] | None:
        """The soonest of those `known`: when, and its key."""
        while self._heap:
            expires_s, key = self._heap[0]
            lease = known.get(key)
            if lease is not None and lease.expires_s == expires_s:
                return self._heap[0]
            heappop(self._heap)
        return None

    def __len__(self) -> int:
        return len(self._heap)

"""Which leases are usable peers, and what changes about that.  Pure: no I/O, no clock."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import NamedTuple

from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, LeasePart, overlap, validate
from udptun.core.network_state import IPAddress, IPNetwork

_STALE_EXPIRIES = 1000
"""So many outdated entries may stay in the list of expiries before it is made anew."""


class LeaseTable:
    """The peers this host should reach by one address family: what the store says, without our own lease and without
    what is unusable.  A lease that has no subnet of the family is none to the table, and is nowhere in it.

    It is fed with snapshots and events.  Each update returns the difference that a backend has to apply, removals
    first, and takes as long as what it touches, however many leases the table holds.

    A lease that cannot be used is in `refused` (key -> reason), and costs no other lease its place.  Of two leases that
    overlap, the first keeps the addresses until it goes; the same holds where one's subnet has the other's PublicIP.
    `own_subnet` is nobody else's.  In `claimed` prefixes, of whichever family, there may be no PublicIP, see
    `validate`.  `outer` says by which of a host's addresses its packets travel.

    `of_other_type` has the valid leases whose BackendType is none of `peer_types`, whether the backend refuses them or
    not.  Reservations that wait for their host are left out.  Without `peer_types` there are none.

    `is_own` says whether packets for a lease would come back to us, and `refusal` why the backend has no use for a
    valid lease.  Both must depend on nothing but the lease's subnets and attrs.  When their answers change, as those of
    `is_own` do when we move to another address, `reconsider` has to be called for every key.
    """

    def __init__(
        self,
        family: Family,
        network: IPNetwork,
        claimed: Collection[IPNetwork],
        own_subnet: IPNetwork,
        is_own: Callable[[Lease], bool],
        refusal: Callable[[Lease], str | None],
        peer_types: Collection[str] = (),
        *,
        outer: Callable[[LeaseAttrs], Family],
    ) -> None:
        self.family = family
        self._outer = outer
        self._network = network
        self._claimed = claimed
        self._own_subnet = own_subnet
        self._is_own = is_own
        self._refusal = refusal
        self._peer_types = peer_types
        self._known: dict[str, Lease] = {}
        self._used: dict[str, Lease] = {}
        self._space = _AddressSpace(network)
        self._waiting: dict[str, Lease] = {}
        """Refused only because of another lease."""
        self._expiries = _Expiries()
        self.refused: dict[str, str] = {}
        self.of_other_type: dict[str, Lease] = {}

    @property
    def peers(self) -> Mapping[str, Lease]:
        """Usable leases by key: a live view, good until the next update."""
        return self._used

    def is_first_address(self, address: IPAddress) -> bool:
        """Whether the subnet of a usable lease begins with it, as that of a peer does with its tunnel address."""
        return address.version == self.family.value and self._space.is_first(int(address))

    def part(self, lease: Lease) -> LeasePart:
        """What a usable lease says of the table's family."""
        return lease.part(self.family, self._outer(lease.attrs))

    def update(self, events: Iterable[LeaseEvent]) -> list[LeaseEvent]:
        """Apply events in order; return what changed among the usable peers."""
        touched: dict[str, None] = {}
        for event in events:
            if event.lease.subnets.of(self.family) is None:
                continue
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
        """As `reset`, but `size` leases a step: a million take seconds, and others get a turn between the steps.

        What one step returns is to be applied before the next.  Other calls may come between two steps.  The table
        keeps its promises throughout, but holds all of the snapshot only after the last step.
        """
        before = self._known
        self._known = {lease.key: lease for lease in snapshot if lease.subnets.of(self.family) is not None}
        self._expiries.rebuild(self._known.values())
        yield self._settle([key for key in before if key not in self._known])
        # In the order of their addresses, so that of two that overlap every host uses the same one.
        keys = sorted(self._known, key=lambda key: self._order(self._known[key]))
        for at in range(0, len(keys), size):
            yield self._settle(keys[at : at + size])

    def keys(self) -> list[str]:
        """Of every lease that is known, usable or not."""
        return list(self._known)

    def reconsider(self, keys: Iterable[str]) -> list[LeaseEvent]:
        """Look at these leases anew; return the difference."""
        known = [(key, self._known[key]) for key in keys if key in self._known]
        return self._settle([key for key, lease in known if self._unusable(lease) != self.refused.get(key)], anew=True)

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
        """Move every expiry, because the clock was set by so much: no lease has become older by that."""
        self._known = {key: _postponed(lease, seconds) for key, lease in self._known.items()}
        self._used = {key: self._known.get(key, lease) for key, lease in self._used.items()}
        self._waiting = {key: self._known.get(key, lease) for key, lease in self._waiting.items()}
        self._expiries.rebuild(self._known.values())

    def _unusable(self, lease: Lease) -> str | None:
        return self._fault(lease) or self._refusal(lease)

    def _fault(self, lease: Lease) -> str | None:
        """Why the lease would be of no use to any backend here."""
        if self._is_own(lease):
            return f"PublicIP {lease.attrs.host_address} is our own"
        subnet, outer = lease.subnet_of(self.family), self._outer(lease.attrs)
        ip = lease.attrs.address(outer)
        if overlap(subnet, self._own_subnet):
            return f"subnet {subnet} overlaps our own lease {self._own_subnet}"
        if ip is not None and ip in self._own_subnet:
            return f"PublicIP {ip} lies inside our own lease {self._own_subnet}"
        return validate(lease, self.family, self._network, self._claimed, outer)

    def _addresses(self, lease: Lease) -> _Addresses:
        """Those of a lease that has no fault."""
        subnet, public_ip = lease.subnet_of(self.family), lease.attrs.address(self._outer(lease.attrs))
        assert public_ip is not None
        return _Addresses(*_span(subnet), subnet, public_ip)

    def _order(self, lease: Lease) -> tuple[int, int]:
        """By address, the wider subnet first."""
        subnet = lease.subnet_of(self.family)
        return int(subnet.network_address), subnet.prefixlen

    def _settle(self, touched: Iterable[str], *, anew: bool = False) -> list[LeaseEvent]:
        """Bring the usable set in line with what is known of the keys `touched`; return the difference.

        `anew`: also where what is known is the same as before.
        """
        removed: list[Lease] = []
        added: list[Lease] = []
        newcomers: list[Lease] = []
        has_moved = False
        for key in touched:
            old, new = self._used.get(key), self._known.get(key)
            if new is not None and not anew and _same(old, new):
                self._used[key] = new  # a later expiry or revision, nothing to do
                continue
            self.refused.pop(key, None)
            self._waiting.pop(key, None)
            self.of_other_type.pop(key, None)
            if new is not None and new.subnet_of(self.family) == self._own_subnet and self._is_own(new):
                new = None
            if new is not None and (reason := self._unusable(new)) is not None:
                self.refused[key] = reason
                if self._fault(new) is None:
                    self._note_type(new)
                new = None
            before = None if old is None else self._addresses(old)
            if new is not None and before is not None and self._space.move(before, now := self._addresses(new)):
                self._used[key] = new  # the same key is the same subnet: it keeps its addresses
                self._note_type(new)
                added.append(new)
                has_moved |= before != now
                continue
            if old is not None and before is not None:
                del self._used[key]
                self._space.free(before)
                removed.append(old)
            if new is not None:
                newcomers.append(new)
        if removed or has_moved:
            newcomers += self._waiting.values()
        for lease in sorted(newcomers, key=self._order):
            reason = self._space.claim(lease.key, self._addresses(lease))
            if reason is None:
                self._used[lease.key] = lease
                self.refused.pop(lease.key, None)
                self._waiting.pop(lease.key, None)
                self._note_type(lease)
                added.append(lease)
            else:
                self.refused[lease.key] = reason
                self._waiting[lease.key] = lease
        return [LeaseEvent(EventType.REMOVED, lease) for lease in removed] + [
            LeaseEvent(EventType.ADDED, lease) for lease in added
        ]

    def _note_type(self, lease: Lease) -> None:
        kind = lease.attrs.backend_type
        # A reservation names no type before its host takes it, and never expires.  A node of Kubernetes has a name.
        is_reservation = not kind and lease.expires_s is None and not lease.node_name
        if self._peer_types and kind not in self._peer_types and not is_reservation:
            self.of_other_type[lease.key] = lease


def _same(old: Lease | None, new: Lease) -> bool:
    """Whether a backend would do the same for two leases of one key: all but expiry and revision is equal."""
    return old is not None and old.attrs == new.attrs


def _postponed(lease: Lease, seconds: float) -> Lease:
    return lease if lease.expires_s is None else replace(lease, expires_s=lease.expires_s + seconds)


def _span(subnet: IPNetwork) -> tuple[int, int]:
    """First and last address."""
    first = int(subnet.network_address)
    return first, first | (1 << subnet.max_prefixlen - subnet.prefixlen) - 1


class _Addresses(NamedTuple):
    """What a lease takes: its subnet, which is also `first` to `last`, and its PublicIP."""

    first: int
    last: int
    subnet: IPNetwork
    public_ip: IPAddress


class _AddressSpace:
    """Which addresses of a family are taken: disjoint subnets, by their first address, and PublicIPs between them."""

    def __init__(self, network: IPNetwork) -> None:
        """All subnets lie inside `network`, so PublicIPs outside need no look."""
        self._version = network.version
        self._network = _span(network)
        self._firsts: list[int] = []
        self._holders: dict[int, tuple[int, str]] = {}
        """By the first address of a subnet: the last one, and the key of its lease."""
        self._public_ips: list[int] = []
        """Those inside Network, sorted; hosts that share an address have it there more than once."""

    def claim(self, key: str, wanted: _Addresses) -> str | None:
        """Take subnet and PublicIP of the lease `key`.  Where one is taken, take nothing and return the reason."""
        other = self._reaching(wanted.first, wanted.last)
        if other is not None:
            return f"subnet {wanted.subnet} overlaps the lease {other}"
        reason = self._reason_against(wanted)
        if reason is not None:
            return reason
        insort(self._firsts, wanted.first)
        self._holders[wanted.first] = wanted.last, key
        self._add_public_ip(wanted.public_ip)
        return None

    def move(self, old: _Addresses, new: _Addresses) -> bool:
        """Go from the PublicIP of `old` to that of `new`, which has the same subnet; False: that one is taken."""
        if old.public_ip == new.public_ip:
            return True
        if self._reason_against(new) is not None:
            return False
        self._remove_public_ip(old.public_ip)
        self._add_public_ip(new.public_ip)
        return True

    def free(self, taken: _Addresses) -> None:
        """Give back what `claim` took."""
        del self._holders[taken.first]
        del self._firsts[bisect_left(self._firsts, taken.first)]
        self._remove_public_ip(taken.public_ip)

    def is_first(self, address: int) -> bool:
        return address in self._holders

    def _reason_against(self, wanted: _Addresses) -> str | None:
        """Why packets for the lease, or for a host whose address lies in it, would go round in circles."""
        first, last, subnet, ip = wanted
        place = bisect_left(self._public_ips, first)
        if place < len(self._public_ips) and self._public_ips[place] <= last:
            theirs = type(subnet.network_address)(self._public_ips[place])
            return f"subnet {subnet} has the PublicIP of another host in it, {theirs}"
        other = self._reaching(int(ip), int(ip)) if self._is_inside(ip) else None
        return None if other is None else f"PublicIP {ip} lies inside the lease {other}"

    def _reaching(self, first: int, last: int) -> str | None:
        """The key of the lease whose subnet has any of these addresses."""
        # Of disjoint subnets only the last one that begins before our end can reach into us.
        place = bisect_right(self._firsts, last)
        if place:
            end, key = self._holders[self._firsts[place - 1]]
            if end >= first:
                return key
        return None

    def _is_inside(self, ip: IPAddress) -> bool:
        first, last = self._network
        return ip.version == self._version and first <= int(ip) <= last

    def _add_public_ip(self, ip: IPAddress) -> None:
        if self._is_inside(ip):
            insort(self._public_ips, int(ip))

    def _remove_public_ip(self, ip: IPAddress) -> None:
        if self._is_inside(ip):
            del self._public_ips[bisect_left(self._public_ips, int(ip))]


class _Expiries:
    """When leases expire, soonest first.

    A lease that is renewed or goes leaves its old entry in the list; `next` drops the entry when it comes to the front.
    So a change costs little, and a look at the front nearly nothing.
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

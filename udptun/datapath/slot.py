"""One picture of the overlay in memory: `struct ut_slot` of shm.h, with its hash tables and the remotes in it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from socket import AF_INET, AF_INET6
from struct import Struct
from typing import TypeVar

from udptun._fastpath import LAYOUT
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath import shm

SLOT = shm.Structure("slot")
PEER = shm.Structure("peer")
_SUBNET = PEER.packer("subnet")
_PEER_WAY = PEER.packer("subnet", "subnet_len", "remote", "mtu", "flags")
LEARNED = shm.Structure("learned").packer("outer", "peer", "port")
LENGTH = shm.Structure("length").packer("mask", "subnet_len")
REMOTE = shm.Structure("remote")
_REMOTE_FIELDS = REMOTE.packer("where", "where_len")
_SOCKADDR_IN, _SOCKADDR_IN6 = Struct("=H2s4s8x"), Struct("=H2s4x16s4x")
"""Family, port and address."""
_HALVES = Struct("=2Q")
_ADDRESS_BYTES = _HALVES.size
_UPPER, _LOWER, _BOTH, _LESS = LAYOUT["hash_upper"], LAYOUT["hash_lower"], LAYOUT["hash_both"], (1 << 64) - 1

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class PublishedPeer:
    """A peer's entry: what it leases, where it is, the largest packet to it (bytes), and whether it was found dead."""

    subnet: IPNetwork
    address: IPAddress
    port: int
    mtu: int
    is_dead: bool


class Slot:
    """One `struct ut_slot` in memory, shared or not.

    Its numbers by their names.  Arrays of numbers and of structures are views: of numbers, or of bytes.
    """

    def __init__(self, memory: memoryview) -> None:
        def view(field: str) -> memoryview:
            return memory[SLOT.offset(field) :][: SLOT.length(field)]

        self._memory = memory
        self._head = memory[: SLOT.offset("l1")]
        self.own_mac = view("own_mac")
        self.network_ipv6, self.own_subnet_ipv6 = view("network_ipv6"), view("own_subnet_ipv6")
        self.tunnel_address_ipv6 = view("tunnel_address_ipv6")
        self.lengths = view("lengths")
        self.l1 = view("l1").cast("I")
        self.remotes = view("remotes")
        self.remote_hash, self.peer_hash = view("remote_hash").cast("I"), view("peer_hash").cast("I")
        self.local, self.local_ipv6 = view("local").cast("I"), view("local_ipv6")
        self.learned = view("learned")
        self.peers = view("peers")
        self.l2 = view("l2").cast("I")

    def __getitem__(self, field: str) -> int:
        return SLOT.load(self._memory, field)

    def __setitem__(self, field: str, value: int) -> None:
        SLOT.store(self._memory, field, value)

    def set_local(self, addresses: Iterable[IPAddress]) -> None:
        """Have these addresses of the host, hashed as the reader looks for them."""
        ipv4, ipv6 = [], []
        for address in addresses:
            if isinstance(address, IPv4Address):
                ipv4.append(int(address))
            else:
                ipv6.append(address.packed)
        entries = _hashed(ipv4, lambda address: (address * LAYOUT["hash"] & 0xFFFFFFFF) >> 16)
        self.local[: len(entries)] = array("I", [entry or 0 for entry in entries])
        self["local_mask"] = len(entries) - 1
        found = _hashed(ipv6, hash_address)
        self.local_ipv6[: len(found) * _ADDRESS_BYTES] = b"".join(entry or bytes(_ADDRESS_BYTES) for entry in found)
        self["local_ipv6_mask"] = len(found) - 1

    def peer(self, index: int) -> PublishedPeer:
        """What the entry of a peer says."""
        first, length, remote, mtu, flags = _PEER_WAY.unpack_from(self.peers, index * PEER.size)
        where = _remote(self, remote)
        port = int.from_bytes(_SOCKADDR_IN.unpack_from(where)[1])
        return PublishedPeer(
            shm.unmapped_subnet(first, length),
            shm.unmapped(remote_address(self, remote)),
            port,
            mtu,
            bool(flags & LAYOUT["flags.dead"]),
        )

    def copy(self, other: Slot, n_pages: int) -> None:
        """Become the same as `other`, of which the first `n_pages` pages of l2 are in use."""

        def copy(ours: memoryview, theirs: memoryview, n: int) -> None:
            ours[:n] = theirs[:n]

        copy(self._head, other._head, len(self._head))
        copy(self.l1, other.l1, other["n_l1"])
        copy(self.remotes, other.remotes, other["n_remotes"] * REMOTE.size)
        copy(self.remote_hash, other.remote_hash, other["remote_hash_mask"] + 1)
        copy(self.peer_hash, other.peer_hash, other["peer_hash_mask"] + 1)
        copy(self.local, other.local, other["local_mask"] + 1)
        copy(self.local_ipv6, other.local_ipv6, (other["local_ipv6_mask"] + 1) * _ADDRESS_BYTES)
        copy(self.learned, other.learned, other["n_learned"] * LEARNED.size)
        copy(self.peers, other.peers, other["n_peers"] * PEER.size)
        copy(self.l2, other.l2, n_pages * LAYOUT["l2_entries"])


class IndexHash:
    """`peer_hash` or `remote_hash` of a slot: indices of what has an address, as the workers look for them.

    `key_of` gives the `struct ut_address` of an index in the slot.  Several may have the same one.
    """

    def __init__(self, slot: Slot, name: str, key_of: Callable[[Slot, int], bytes]) -> None:
        self._slot, self._mask_field = slot, f"{name}_mask"
        self._entries: memoryview = getattr(slot, name)
        self._key_of = key_of
        self.load()

    def load(self) -> None:
        """Go on with what the slot has."""
        self._mask = self._slot[self._mask_field]
        self._n = self._mask + 1 - self._entries[: self._mask + 1].tolist().count(0)

    def candidates(self, key: bytes) -> Iterator[int]:
        """All indices that have this address, and perhaps others."""
        i = hash_address(key) & self._mask
        while index := self._entries[i]:
            yield index
            i = (i + 1) & self._mask

    def add(self, index: int, key: bytes) -> None:
        if 2 * (self._n + 1) > self._mask + 1:
            self._grow()
        self._put(index, key)
        self._n += 1

    def remove(self, index: int) -> None:
        """While `key_of` still knows it."""
        i = hash_address(self._key_of(self._slot, index)) & self._mask
        while self._entries[i] != index:
            i = (i + 1) & self._mask
        self._entries[i] = 0
        self._n -= 1
        # What follows without a gap may have been put there because this entry was taken.
        i = (i + 1) & self._mask
        while moved := self._entries[i]:
            self._entries[i] = 0
            self._put(moved, self._key_of(self._slot, moved))
            i = (i + 1) & self._mask

    def _put(self, index: int, key: bytes) -> None:
        i = hash_address(key) & self._mask
        while self._entries[i]:
            i = (i + 1) & self._mask
        self._entries[i] = index

    def _grow(self) -> None:
        indices = [index for index in self._entries[: self._mask + 1].tolist() if index]
        n_entries = min(max(16, 2 * (self._mask + 1)), LAYOUT["index_entries"])
        self._entries[:n_entries] = memoryview(bytes(4 * n_entries)).cast("I")
        self._mask = self._slot[self._mask_field] = n_entries - 1
        for index in indices:
            self._put(index, self._key_of(self._slot, index))


class Remotes:
    """`remotes` of a slot: where the peers are.  Those of one address and port share an index."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._hash = IndexHash(slot, "remote_hash", remote_address)
        self._users = array("I", [0])
        """By index: how many peers there are."""
        self._free: list[int] = []

    def load(self, of_peers: Iterable[int]) -> None:
        """Go on with what the slot has, and the index of each of its peers."""
        self._hash.load()
        self._users = array("I", bytes(4 * max(self._slot["n_remotes"], 1)))
        for index in of_peers:
            self._users[index] += 1
        self._free = [index for index, n in enumerate(self._users) if index and not n]

    def take(self, address: IPAddress, port: int) -> int:
        """The index of an address and port for one more peer."""
        entry, key = _entry(address, port), shm.mapped(address)
        index = next((it for it in self._hash.candidates(key) if self.entry(it) == entry), 0)
        if not index:
            index = self._free.pop() if self._free else len(self._users)
            if index == len(self._users):
                self._users.append(0)
            self._slot.remotes[index * REMOTE.size :][: REMOTE.size] = entry
            self._hash.add(index, key)
        self._users[index] += 1
        return index

    def is_at(self, index: int, address: IPAddress, port: int) -> bool:
        """Whether the index stands for this address and port; 0 stands for none."""
        return self.entry(index) == _entry(address, port)

    def leave(self, index: int) -> None:
        """One peer less is there."""
        self._users[index] -= 1
        if not self._users[index]:
            self._hash.remove(index)
            self._slot.remotes[index * REMOTE.size :][: REMOTE.size] = bytes(REMOTE.size)
            self._free.append(index)

    def entry(self, index: int) -> bytes:
        """The `struct ut_remote`."""
        return _remote(self._slot, index)

    def address(self, index: int) -> IPAddress:
        return shm.unmapped(remote_address(self._slot, index))

    def has(self, address: IPAddress) -> bool:
        """Whether some peer is there."""
        key = shm.mapped(address)
        return any(remote_address(self._slot, index) == key for index in self._hash.candidates(key))

    def addresses(self) -> set[IPAddress]:
        """Where there are peers."""
        return {self.address(index) for index, n in enumerate(self._users) if n}

    def __len__(self) -> int:
        return len(self._users) - 1 - len(self._free)

    @property
    def n_entries(self) -> int:
        """How many are in use, the unused ones between them included."""
        return len(self._users)


def subnet_address(slot: Slot, index: int) -> bytes:
    """The first address that a peer leases, as a `struct ut_address`."""
    first: bytes
    (first,) = _SUBNET.unpack_from(slot.peers, index * PEER.size)
    return first


def remote_address(slot: Slot, index: int) -> bytes:
    """The public IP of a remote, likewise."""
    entry = _remote(slot, index)
    family, _, address = _SOCKADDR_IN.unpack_from(entry)
    if family == AF_INET:
        return shm.MAPPED + bytes(address)
    _, _, address = _SOCKADDR_IN6.unpack_from(entry)
    return bytes(address)


def _remote(slot: Slot, index: int) -> bytes:
    at = index * REMOTE.size
    return slot.remotes[at : at + REMOTE.size].tobytes()


def socket_address_bytes(address: IPAddress, port: int) -> bytes:
    """A `struct sockaddr_in` or `sockaddr_in6`."""
    if isinstance(address, IPv4Address):
        return _SOCKADDR_IN.pack(AF_INET, port.to_bytes(2), address.packed)
    return _SOCKADDR_IN6.pack(AF_INET6, port.to_bytes(2), address.packed)


def hash_address(packed: bytes) -> int:
    """`ut_hash_address` of shm.h."""
    upper, lower = _HALVES.unpack(packed)
    mixed: int = upper * _UPPER + lower * _LOWER & _LESS
    return ((mixed ^ mixed >> 32) * _BOTH & _LESS) >> 32


def _hashed(keys: Collection[K], hash_of: Callable[[K], int]) -> Sequence[K | None]:
    """An open-addressed table of `keys`.

    It is four times as large as they need, if it can be, so that few others begin at a taken entry.
    """
    n_entries = min(max(16, 1 << (4 * len(keys) - 1).bit_length()), LAYOUT["local_entries"])
    entries: list[K | None] = [None] * n_entries
    for key in keys:
        i = hash_of(key) & n_entries - 1
        while entries[i] not in (None, key):
            i = (i + 1) & n_entries - 1
        entries[i] = key
    return entries


def _entry(address: IPAddress, port: int) -> bytes:
    """A `struct ut_remote`."""
    where = socket_address_bytes(address, port)
    return _REMOTE_FIELDS.pack(where, len(where))

"""The peer table that workers read: the control plane's, and only its, side.

Layout: csrc/shm.h.  Reader: `lookup` in fastpath/shm.pxd.  Changes are made to a private copy; `publish` writes them
as a whole into the slot that no worker uses and moves the generation on.  Nothing is ever locked.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from socket import AF_INET

from udptun._fastpath import LAYOUT, load_u64, store_u64
from udptun.core.errors import DatapathError
from udptun.core.tunnel import SourceCheck
from udptun.datapath import shm
from udptun.datapath.settings import PacketSettings, Remote, Vtep
from udptun.datapath.stats import MANY_PEERS, OFFLOAD_BITS, Stats

_TABLE, _SLOT, _PEER = shm.Structure("table"), shm.Structure("slot"), shm.Structure("peer")
_PEER_FIELDS = _PEER.packer("family", "port_be", "address_be", "subnet", "mask", "mtu", "flags", "prefix", "received")
_PEER_REMOTE = _PEER.packer("family", "address_be")
_PEER_SUBNET = _PEER.packer("subnet", "mask")
_PEER_LEASE = _PEER.packer("address_be", "subnet", "mask")
_PEER_IDENTITY = _PEER.packer("port_be", "address_be", "flags", "prefix")
_LEARNED = shm.Structure("learned").packer("outer", "peer", "port")
_NO_PEER = bytes(_PEER.size)
_FLAG_UDPTUN, _FLAG_ANY_SOURCE_PORT = LAYOUT["flags.udptun"], LAYOUT["flags.any_source_port"]
_FLAG_DEAD, _FLAG_ECN = LAYOUT["flags.dead"], LAYOUT["flags.ecn"]
_SOURCE_CHECKS = {check: LAYOUT[f"source_check.{check.value}"] for check in SourceCheck}


class TableWriter:
    """Owns `fd`, the memory file of the table, and the copy in which the next table is made."""

    def __init__(self, fd: int) -> None:
        """Take over an existing file, or a new one of `create`.  Raises ValueError when it is of another layout.

        What is published stays so until the next `publish`, and is what changes are made to.
        """
        memory = shm.map_whole(fd, _TABLE.size, LAYOUT["table_magic"], "peer table")
        self.fd = fd
        self._generation = memory[_TABLE.offset("generation") :][:8]
        slots = memory[_TABLE.offset("slot") :]
        self._slots = [_Slot(slots[: _SLOT.size]), _Slot(slots[_SLOT.size :])]
        self._next = _Slot(shm.private(_SLOT.size))
        self._underlay_address = 0
        self._local: tuple[int, ...] = ()
        self._index: dict[IPv4Network, int] = {}
        self._learned: dict[int, dict[int, int]] = {}
        """By the index of a peer: the addresses that it sends from beside its public IP, and the port; 0: any."""
        self._learned_beside: bytes | None = None
        """The public IPs with which it was last written; None: it has changed since."""
        self._let_in: tuple[int, ...] = ()
        # Highest number first, so that the lowest is taken first and what is in use stays dense.  A list of so many
        # numbers would be 2.5 MB.
        self._free = array("I", range(LAYOUT["max_peers"] - 1, 0, -1))
        # Freed since the last flip: a worker may still count packets under them.
        self._resting: list[int] = []
        self._fresh: list[int] = []
        self._free_pages: list[int] = []
        self._n_pages = 0
        self._top = 0
        if self.generation:
            self._load(self._slots[self.generation & 1])

    @classmethod
    def create(cls) -> TableWriter:
        """A new table in a new memory file, with nothing published."""
        return cls(shm.create("udptun-table", _TABLE.size, LAYOUT["table_magic"]))

    def close(self) -> None:
        """Let go of the descriptor; the mapping goes with the object."""
        os.close(self.fd)

    @property
    def generation(self) -> int:
        """Of the published table; 0: none yet."""
        return load_u64(self._generation, 0)

    def configure(self, settings: PacketSettings) -> None:
        """Set what applies to all packets, from the next `publish` on.

        Raises DatapathError when `settings` are of another Network or VTEP and there still are peers of the old.
        """
        network, own, vtep = settings.network, settings.own_subnet, settings.vtep
        first, n_l1 = int(network.network_address), max(1, network.num_addresses >> 8)
        slot = self._next
        if self._index and (first, n_l1) != (slot["network"], slot["n_l1"]):
            raise DatapathError(f"cannot move the peer table to {network}: it has peers of another network")
        if self._index and vtep != self.vtep:
            raise DatapathError("cannot change the encapsulation of the peer table: it has peers of the old one")
        slot["network"], slot["network_mask"] = first, int(network.netmask)
        slot["own_subnet"], slot["own_mask"] = int(own.network_address), int(own.netmask)
        slot["tunnel_address"] = int(settings.tunnel_address)
        slot["mtu"] = settings.mtu
        slot["source_check"] = _SOURCE_CHECKS[settings.source_check]
        slot["offloads"] = sum(bit for offload, bit in OFFLOAD_BITS.items() if offload in settings.offload)
        slot["n_l1"] = n_l1
        slot["prefix_len"] = 0 if vtep is None else LAYOUT["prefix"]
        slot["vni"] = 0 if vtep is None else vtep.vni
        slot["punt_id"] = settings.punt_id
        slot["port"] = settings.port
        if settings.source_check is not SourceCheck.PEER or not settings.punt_id:
            self._learned.clear()
            self._learned_beside = None
        slot.own_mac[:] = bytes(6) if vtep is None else vtep.mac
        self._underlay_address = int(settings.underlay_address)
        slot.set_local((self._underlay_address, *self._local))

    def set_local_addresses(self, addresses: Iterable[IPv4Address]) -> int:
        """Set what of `addresses` the table has room for as this host's, from the next `publish` on.

        Returns how many did not fit.  That of our UDP socket always belongs to them.
        """
        asked = tuple(map(int, dict.fromkeys(addresses)))
        self._local = asked[: LAYOUT["max_local"] - 1]
        self._next.set_local((self._underlay_address, *self._local))
        return len(asked) - len(self._local)

    @property
    def vtep(self) -> Vtep | None:
        """What we are by the last settings, an earlier control plane's included."""
        slot = self._next
        return Vtep(slot["vni"], bytes(slot.own_mac)) if slot["prefix_len"] else None

    def set_peer(
        self, subnet: IPv4Network, remote: Remote, mtu: int, *, is_dead: bool = False, received: int = 0
    ) -> int:
        """Add the peer that leases `subnet`, or change where it is; return its index, which it keeps while it stays.

        `subnet` lies in Network, has a prefix length of 16 to 30 and overlaps no other peer's: LeaseTable sees to
        it.  `mtu`: largest inner packet, bytes.  Nothing is sent to a peer that `is_dead` as long as the workers have
        counted `received` packets from it.  Raises DatapathError when the table is full.
        """
        vtep = self.vtep
        index = self._index.get(subnet)
        before = None if index is None else self._identity(index)
        if index is None:
            if not self._free:
                raise DatapathError(f"cannot add the peer {subnet}: the table holds {LAYOUT['max_peers'] - 1} at most")
            index = self._free.pop()
            self._index[subnet] = index
            self._fresh.append(index)
            self._top = max(self._top, index)
            self._point(subnet, index)
        _PEER_FIELDS.pack_into(
            self._next.peers,
            index * _PEER.size,
            AF_INET,
            remote.port.to_bytes(2),
            remote.address.packed,
            int(subnet.network_address),
            int(subnet.netmask),
            mtu,
            _FLAG_UDPTUN * remote.is_udptun
            | _FLAG_ANY_SOURCE_PORT * remote.takes_any_source_port
            | _FLAG_DEAD * is_dead
            | _FLAG_ECN * remote.carries_ecn,
            b"" if vtep is None else vtep.prefix(remote.mac),
            received,
        )
        if before != self._identity(index):
            # Another host, or one that has moved.
            self._forget_learned(index)
        return index

    def remove_peer(self, subnet: IPv4Network) -> None:
        """Forget the peer of `subnet`, if there is one."""
        index = self._index.pop(subnet, None)
        if index is None:
            return
        self._point(subnet, 0)
        self._forget_learned(index)
        self._next.peers[index * _PEER.size :][: _PEER.size] = _NO_PEER
        self._resting.append(index)

    def set_learned(self, subnet: IPv4Network, sources: Mapping[IPv4Address, int]) -> None:
        """Let a peer send from these addresses too, each with the UDP port, or 0 for any; from the next `publish` on.

        An address that is the public IP of a peer is left out.  They are forgotten with the peer, when it is somewhere
        else, and where SourceCheck is not `peer`.
        """
        index = self._index.get(subnet)
        if index is None or self._next["source_check"] != _SOURCE_CHECKS[SourceCheck.PEER]:
            return
        self._forget_learned(index)
        if sources and self.n_learned + len(sources) <= LAYOUT["max_learned"]:
            self._learned[index] = {int(address): port for address, port in sources.items()}
            self._learned_beside = None

    def learned(self, subnet: IPv4Network) -> dict[IPv4Address, int]:
        """What `set_learned` has set, perhaps in an earlier control plane, and holds."""
        index = self._index.get(subnet)
        sources = {} if index is None else self._learned.get(index, {})
        return {IPv4Address(address): port for address, port in sources.items()}

    @property
    def n_learned(self) -> int:
        """How many addresses were learned, those of several peers more than once."""
        return sum(map(len, list(self._learned.values())))

    def ask(self, learn_id: int, let_in: Collection[IPv4Address] = ()) -> None:
        """Hand over answers with this ICMP id and sequence, also those from strangers; 0: none.  From `publish` on.

        `let_in`: strangers from whom answers may come, for `next_sources`.
        """
        self._next["learn_id"] = learn_id
        self._let_in = tuple(map(int, let_in))

    def next_sources(self, limit: int) -> memoryview:
        """From where datagrams may come by the next table, ascending, each once: public IPs, and what was learned.

        Those that `ask` lets in are among them as long as they are not more than `limit` in all.
        """
        remotes = self.next_remotes()
        if not self._learned and not self._let_in:
            return remotes
        sources = {*remotes, *(address for sources in self._learned.values() for address in sources)}
        if len(sources) + len(self._let_in) <= limit:
            sources.update(self._let_in)
        return memoryview(array("I", sorted(sources)))

    @property
    def has_room(self) -> bool:
        """Whether one more peer can be added before the next `publish`."""
        return bool(self._free)

    @property
    def subnets(self) -> Collection[IPv4Network]:
        """Of all peers."""
        return self._index.keys()

    def index_of(self, subnet: IPv4Network) -> int | None:
        """The peer's index, for its statistics."""
        return self._index.get(subnet)

    def peer_of(self, address: IPv4Address) -> tuple[IPv4Network, IPv4Address] | None:
        """The subnet and the public IP of the peer that leases an inner address; None: nobody does."""
        slot = self._next
        entry = (int(address) - slot["network"]) >> 8
        if not 0 <= entry < slot["n_l1"]:
            return None
        index = slot.l1[entry]
        if index & LAYOUT["l2_flag"]:
            index = slot.l2[(index & ~LAYOUT["l2_flag"]) * LAYOUT["l2_entries"] + (int(address) & 255)]
        if not index:
            return None
        public_ip, subnet, mask = _PEER_LEASE.unpack_from(slot.peers, index * _PEER.size)
        return IPv4Network((subnet, mask.bit_count())), IPv4Address(public_ip)

    def has_remote(self, address: IPv4Address) -> bool:
        """Whether `address` is the public IP of a peer that is published."""
        n = self._next["n_remotes"]
        i = bisect_left(self._next.remotes, int(address), 0, n)
        return i < n and self._next.remotes[i] == int(address)

    @property
    def checks_sources(self) -> bool:
        """Whether it matters from which address a peer's packets come."""
        return self._next["source_check"] != _SOURCE_CHECKS[SourceCheck.OFF]

    def next_remotes(self) -> memoryview:
        """The public IPs of all peers of the next table, ascending, each once."""
        used = self._next.peers[: (self._top + 1) * _PEER.size]
        if self._top >= MANY_PEERS:
            from udptun.datapath import bulk

            return bulk.remotes(used)
        addresses = {address for family, address in _PEER_REMOTE.iter_unpack(used) if family}
        return memoryview(array("I", [int.from_bytes(address) for address in sorted(addresses)]))

    def publish(self, stats: Stats, n_workers: int = LAYOUT["max_workers"]) -> bool:
        """Make the changes visible to all of the first `n_workers` workers at once.

        False when a worker is still in the slot to be written (a batch takes microseconds): try again shortly.
        """
        generation = self.generation
        if any(seen not in (0, generation) for seen in stats.generations_seen()[:n_workers]):
            return False
        stats.clear_peers(self._fresh)
        self._fresh.clear()
        remotes = self.next_remotes()
        self._next["n_remotes"] = len(remotes)
        self._next.remotes[: len(remotes)] = remotes
        self._write_learned(remotes)
        self._slots[(generation + 1) & 1].copy(self._next, self._top + 1, self._n_pages)
        store_u64(self._generation, 0, generation + 1)
        self._free.extend(reversed(self._resting))
        self._resting.clear()
        return True

    def _load(self, slot: _Slot) -> None:
        """Continue from what an earlier control plane published: peers keep their indexes, and so their counters."""
        flag, n_entries = LAYOUT["l2_flag"], LAYOUT["l2_entries"]
        entries = set(slot.l1[: slot["n_l1"]].tolist())
        pages = {entry & ~flag for entry in entries if entry & flag}
        indexes = {entry for entry in entries if not entry & flag}
        for page in pages:
            indexes.update(slot.l2[page * n_entries : (page + 1) * n_entries].tolist())
        indexes.discard(0)
        self._n_pages = max(pages, default=-1) + 1
        self._free_pages = [page for page in range(self._n_pages) if page not in pages]
        self._top = max(indexes, default=0)
        self._next.copy(slot, self._top + 1, self._n_pages)
        for index in indexes:
            subnet, mask = _PEER_SUBNET.unpack_from(slot.peers, index * _PEER.size)
            self._index[IPv4Network((subnet, mask.bit_count()))] = index
        for outer, index, port in _LEARNED.iter_unpack(slot.learned[: slot["n_learned"] * _LEARNED.size]):
            self._learned.setdefault(index, {})[outer] = port
        self.ask(0)
        self._free = array("I", (index for index in self._free if index not in indexes))

    def _identity(self, index: int) -> tuple[bytes, bytes, int, bytes]:
        """What of a peer's entry says which host it is."""
        port_be, address_be, flags, prefix = _PEER_IDENTITY.unpack_from(self._next.peers, index * _PEER.size)
        return port_be, address_be, flags & ~_FLAG_DEAD, prefix

    def _write_learned(self, remotes: memoryview) -> None:
        """Into the next table.  What has become the public IP of a peer is no longer learned."""
        if self._learned_beside == bytes(remotes):
            return
        self._learned_beside = bytes(remotes)
        rows = [(outer, index, port) for index, of in self._learned.items() for outer, port in of.items()]
        if rows:
            taken = set(remotes)
            for index in {index for outer, index, _ in rows if outer in taken}:
                kept = {outer: port for outer, port in self._learned[index].items() if outer not in taken}
                self._learned[index] = kept
            rows = sorted(row for row in rows if row[0] not in taken)
        self._next["n_learned"] = len(rows)
        self._next.learned[: len(rows) * _LEARNED.size] = b"".join(_LEARNED.pack(*row) for row in rows)

    def _forget_learned(self, index: int) -> None:
        if self._learned.pop(index, None):
            self._learned_beside = None

    def _point(self, subnet: IPv4Network, index: int) -> None:
        """Point every address of `subnet` at the peer `index`; at none, if that is 0."""
        offset = int(subnet.network_address) - self._next["network"]
        entry = offset >> 8
        if subnet.prefixlen <= 24:
            n = 1 << (24 - subnet.prefixlen)
            self._next.l1[entry : entry + n] = array("I", [index]) * n
            return
        page = self._page(entry)
        # By the address itself, as the reader does: a Network longer than /24 need not begin at 0.
        low = int(subnet.network_address) & 255
        addresses = self._next.l2[page * LAYOUT["l2_entries"] :][: LAYOUT["l2_entries"]]
        addresses[low : low + subnet.num_addresses] = array("I", [index]) * subnet.num_addresses
        if not index and not any(addresses):
            self._next.l1[entry] = 0
            self._free_pages.append(page)

    def _page(self, entry: int) -> int:
        """The second-level page of an entry of the first level, made when there is none."""
        flag = LAYOUT["l2_flag"]
        if self._next.l1[entry] & flag:
            return self._next.l1[entry] & ~flag
        if self._free_pages:
            page = self._free_pages.pop()
        else:
            page = self._n_pages
            self._n_pages += 1
        self._next.l1[entry] = flag | page
        return page


class _Slot:
    """One `struct ut_slot` in memory, shared or not.  Its numbers by their names; arrays as views, `peers` in bytes."""

    def __init__(self, memory: memoryview) -> None:
        def view(field: str, length: int) -> memoryview:
            return memory[_SLOT.offset(field) :][:length]

        self._memory = memory
        self._head = memory[: _SLOT.offset("l1")]
        self.own_mac = view("own_mac", 6)
        self.l1 = view("l1", 4 * LAYOUT["l1_entries"]).cast("I")
        self.remotes = view("remotes", 4 * LAYOUT["max_peers"]).cast("I")
        self.local = view("local", 4 * LAYOUT["local_entries"]).cast("I")
        self.learned = view("learned", _LEARNED.size * LAYOUT["max_learned"])
        self.peers = view("peers", _PEER.size * LAYOUT["max_peers"])
        self.l2 = view("l2", 4 * LAYOUT["l2_pages"] * LAYOUT["l2_entries"]).cast("I")

    def __getitem__(self, field: str) -> int:
        return _SLOT.load(self._memory, field)

    def __setitem__(self, field: str, value: int) -> None:
        _SLOT.store(self._memory, field, value)

    def set_local(self, addresses: Collection[int]) -> None:
        """Hash these addresses of the host as the reader looks for them (`ut_hash` of shm.h).

        The table is four times as large as they need, if it can be, so that few others begin at a taken entry.
        """
        n_entries = min(max(16, 1 << (4 * len(addresses) - 1).bit_length()), LAYOUT["local_entries"])
        mask, multiplier = n_entries - 1, LAYOUT["hash"]
        entries = array("I", bytes(4 * n_entries))
        for address in addresses:
            i = (address * multiplier & 0xFFFFFFFF) >> 16 & mask
            while entries[i] not in (0, address):
                i = (i + 1) & mask
            entries[i] = address
        self.local[:n_entries] = entries
        self["local_mask"] = mask

    def copy(self, other: _Slot, n_peers: int, n_pages: int) -> None:
        """Become the same as `other`, of which the first `n_peers` peers and `n_pages` pages are in use."""
        n_l1, n_remotes, n_l2 = other["n_l1"], other["n_remotes"], n_pages * LAYOUT["l2_entries"]
        n_local = other["local_mask"] + 1
        self._head[:] = other._head
        self.l1[:n_l1] = other.l1[:n_l1]
        self.remotes[:n_remotes] = other.remotes[:n_remotes]
        self.local[:n_local] = other.local[:n_local]
        n_learned = other["n_learned"] * _LEARNED.size
        self.learned[:n_learned] = other.learned[:n_learned]
        self.peers[: n_peers * _PEER.size] = other.peers[: n_peers * _PEER.size]
        self.l2[:n_l2] = other.l2[:n_l2]

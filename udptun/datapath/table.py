"""The peer table that workers read: the control plane's, and only its, side.

Layout: csrc/shm.h.  Reader: `lookup` in fastpath/shm.pxd.  Changes are made to a private copy; `publish` writes them
as a whole into the slot that no worker uses and moves the generation on.  Nothing is ever locked.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from udptun._fastpath import LAYOUT, load_u64, store_u64
from udptun.core.errors import DatapathError
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.tunnel import SourceCheck
from udptun.datapath import shm
from udptun.datapath.settings import PacketSettings, Remote, Vtep
from udptun.datapath.slot import LEARNED, LENGTH, PEER, SLOT, IndexHash, Remotes, Slot, subnet_address
from udptun.datapath.stats import OFFLOAD_BITS, Stats

_TABLE = shm.Structure("table")
_PEER_FIELDS = PEER.packer("subnet", "subnet_len", "remote", "mtu", "flags", "prefix", "received")
_PEER_KEY = PEER.packer("subnet", "subnet_len", "remote")
_PEER_IDENTITY = PEER.packer("remote", "flags", "prefix")
_NO_PEER = bytes(PEER.size)
_FLAG_UDPTUN, _FLAG_ANY_SOURCE_PORT = LAYOUT["flags.udptun"], LAYOUT["flags.any_source_port"]
_FLAG_DEAD, _FLAG_ECN = LAYOUT["flags.dead"], LAYOUT["flags.ecn"]
_NO_IPV4 = IPv4Network("0.0.0.0/32")
"""In the place of Network and of our subnet where IPv4 is not carried: no packet is for it."""
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
        self._slots = [Slot(slots[: SLOT.size]), Slot(slots[SLOT.size :])]
        self._next = Slot(shm.private(SLOT.size))
        self._remotes = Remotes(self._next)
        self._peer_hash = IndexHash(self._next, "peer_hash", subnet_address)
        self._underlay_address: IPAddress = IPv4Address(0)
        self._local: tuple[IPAddress, ...] = ()
        self._index: dict[IPNetwork, int] = {}
        self._subnet_at: dict[int, IPNetwork] = {}
        """The same the other way round."""
        self._lengths: Counter[tuple[int, int]] = Counter()
        """By IP version and prefix length: how many peers there are."""
        self._learned: dict[int, dict[IPAddress, int]] = {}
        """By the index of a peer: the addresses that it sends from beside its public IP, and the port; 0: any."""
        self._is_learned_written = True
        self._let_in: tuple[IPAddress, ...] = ()
        # Up to `top`.  They are taken before a higher one, the last of them first, so that what is in use stays dense.
        self._free: list[int] = []
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

    @property
    def published(self) -> Slot:
        """What the workers read now, until the next `publish`."""
        return self._slots[self.generation & 1]

    def configure(self, settings: PacketSettings) -> None:
        """Set what applies to all packets, from the next `publish` on.

        Raises DatapathError when `settings` are of another Network or VTEP and there still are peers of the old.
        """
        network, own, vtep = settings.network or _NO_IPV4, settings.own_subnet or _NO_IPV4, settings.vtep
        first, n_l1 = int(network.network_address), max(1, network.num_addresses >> 8)
        slot = self._next
        has_ipv4 = any(version == 4 for version, _ in self._lengths)
        if has_ipv4 and (first, n_l1) != (slot["network"], slot["n_l1"]):
            raise DatapathError(f"cannot move the peer table to {network}: it has peers of another network")
        if self._index and vtep != self.vtep:
            raise DatapathError("cannot change the encapsulation of the peer table: it has peers of the old one")
        slot["network"], slot["network_mask"] = first, int(network.netmask)
        slot["own_subnet"], slot["own_mask"] = int(own.network_address), int(own.netmask)
        addresses = settings.tunnel_addresses
        slot["tunnel_address"] = int(addresses[4]) if 4 in addresses else 0
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
            self._is_learned_written = False
        slot.own_mac[:] = bytes(6) if vtep is None else vtep.mac
        slot.network_ipv6[:] = _prefix(settings.network_ipv6)
        slot.own_subnet_ipv6[:] = _prefix(settings.own_subnet_ipv6)
        slot.tunnel_address_ipv6[:] = addresses[6].packed if 6 in addresses else bytes(16)
        self._underlay_address = settings.underlay_address
        slot.set_local((self._underlay_address, *self._local))

    def set_local_addresses(self, addresses: Iterable[IPAddress]) -> int:
        """Set what of `addresses` the table has room for as this host's, from the next `publish` on.

        Returns how many did not fit: there is room for as many of each family.  `underlay_address` of the settings
        always belongs to them.
        """
        asked = tuple(dict.fromkeys(addresses))
        left = {4: LAYOUT["max_local"] - 1, 6: LAYOUT["max_local"] - 1}
        fitting = []
        for address in asked:
            if left[address.version]:
                left[address.version] -= 1
                fitting.append(address)
        self._local = tuple(fitting)
        self._next.set_local((self._underlay_address, *self._local))
        return len(asked) - len(self._local)

    @property
    def local_addresses(self) -> tuple[IPAddress, ...]:
        """What packets are refused from as this host's own."""
        return (self._underlay_address, *self._local)

    @property
    def vtep(self) -> Vtep | None:
        """What we are by the last settings, an earlier control plane's included."""
        slot = self._next
        return Vtep(slot["vni"], bytes(slot.own_mac)) if slot["prefix_len"] else None

    def set_peer(
        self, subnet: IPNetwork, remote: Remote, mtu: int, *, is_dead: bool = False, received: int = 0
    ) -> int:
        """Add the peer that leases `subnet`, or change where it is; return its index, which it keeps while it stays.

        `subnet` overlaps no other peer's.  One of IPv4 lies in Network and has a prefix length of 16 to 30: LeaseTable
        sees to it.  `mtu`: largest inner packet, bytes.  Nothing is sent to a peer that `is_dead` as long as the
        workers have counted `received` packets from it.  Raises DatapathError when the table is full.
        """
        vtep = self.vtep
        index = self._index.get(subnet)
        before = None if index is None else self._identity(index)
        was_at = 0 if index is None else self._remote_of(index)
        if index is None:
            if not self.has_room:
                raise DatapathError(f"cannot add the peer {subnet}: the table holds {LAYOUT['max_peers'] - 1} at most")
            index = self._free.pop() if self._free else self._top + 1
            self._index[subnet], self._subnet_at[index] = index, subnet
            self._fresh.append(index)
            self._top = max(self._top, index)
        _PEER_FIELDS.pack_into(
            self._next.peers,
            index * PEER.size,
            *shm.mapped_subnet(subnet),
            self._take_remote(remote, was_at),
            mtu,
            _FLAG_UDPTUN * remote.is_udptun
            | _FLAG_ANY_SOURCE_PORT * remote.takes_any_source_port
            | _FLAG_DEAD * is_dead
            | _FLAG_ECN * remote.carries_ecn,
            b"" if vtep is None else vtep.prefix(remote.mac, subnet.version),
            received,
        )
        if before is None:
            self._enter(subnet, index)
        elif before != self._identity(index):
            # Another host, or one that has moved.
            self._forget_learned(index)
        return index

    def remove_peer(self, subnet: IPNetwork) -> None:
        """Forget the peer of `subnet`, if there is one."""
        index = self._index.pop(subnet, None)
        if index is None:
            return
        del self._subnet_at[index]
        self._leave(subnet, index)
        self._remotes.leave(self._remote_of(index))
        self._forget_learned(index)
        self._next.peers[index * PEER.size :][: PEER.size] = _NO_PEER
        self._resting.append(index)

    def set_learned(self, subnet: IPNetwork, sources: Mapping[IPAddress, int]) -> None:
        """Let a peer send from these addresses too, each with the UDP port, or 0 for any; from the next `publish` on.

        An address that is the public IP of a peer is left out.  They are forgotten with the peer, when it is somewhere
        else, and where SourceCheck is not `peer`.
        """
        index = self._index.get(subnet)
        if index is None or self._next["source_check"] != _SOURCE_CHECKS[SourceCheck.PEER]:
            return
        self._forget_learned(index)
        if sources and self.n_learned + len(sources) <= LAYOUT["max_learned"]:
            self._learned[index] = dict(sources)
            self._is_learned_written = False

    def learned(self, subnet: IPNetwork) -> dict[IPAddress, int]:
        """What `set_learned` has set, perhaps in an earlier control plane, and holds."""
        index = self._index.get(subnet)
        return {} if index is None else dict(self._learned.get(index, {}))

    @property
    def n_learned(self) -> int:
        """How many addresses were learned, those of several peers more than once."""
        return sum(map(len, list(self._learned.values())))

    def ask(self, learn_id: int, let_in: Collection[IPAddress] = ()) -> None:
        """Hand over answers with this ICMP id and sequence, also those from strangers; 0: none.  From `publish` on.

        `let_in`: strangers from whom answers may come, for `next_sources`.
        """
        self._next["learn_id"] = learn_id
        self._let_in = tuple(let_in)

    def next_sources(self, limit: int) -> Set[IPAddress]:
        """From where datagrams may come by the next table: public IPs, and what was learned.

        Those that `ask` lets in are among them as long as they are not more than `limit` in all.
        """
        sources = self._remotes.addresses()
        sources.update(address for of in self._learned.values() for address in of)
        if len(sources) + len(self._let_in) <= limit:
            sources.update(self._let_in)
        return sources

    @property
    def n_remotes(self) -> int:
        """How many addresses and ports the peers have."""
        return len(self._remotes)

    @property
    def has_room(self) -> bool:
        """Whether one more peer can be added before the next `publish`."""
        return bool(self._free) or self._top < LAYOUT["max_peers"] - 1

    @property
    def subnets(self) -> Collection[IPNetwork]:
        """Of all peers."""
        return self._index.keys()

    def index_of(self, subnet: IPNetwork) -> int | None:
        """The peer's index, for its statistics."""
        return self._index.get(subnet)

    @property
    def top(self) -> int:
        """No peer has a higher index."""
        return self._top

    def subnet_at(self, index: int) -> IPNetwork | None:
        """The subnet of the peer that has this index; None: no peer has it."""
        return self._subnet_at.get(index)

    def peer_of(self, address: IPAddress) -> tuple[IPNetwork, IPAddress] | None:
        """The subnet and the public IP of the peer that leases an inner address; None: nobody does."""
        for version, length in list(self._lengths):
            if version == address.version:
                subnet = _subnet_of(address, length)
                if index := self._index.get(subnet):
                    return subnet, self._remotes.address(self._remote_of(index))
        return None

    def has_remote(self, address: IPAddress) -> bool:
        """Whether `address` is the public IP of a peer."""
        return self._remotes.has(address)

    @property
    def checks_sources(self) -> bool:
        """Whether it matters from which address a peer's packets come."""
        return self._next["source_check"] != _SOURCE_CHECKS[SourceCheck.OFF]

    def publish(self, stats: Stats, n_workers: int = LAYOUT["max_workers"]) -> bool:
        """Make the changes visible to all of the first `n_workers` workers at once.

        False when a worker is still in the slot to be written (a batch takes microseconds): try again shortly.
        """
        generation = self.generation
        if any(seen not in (0, generation) for seen in stats.generations_seen()[:n_workers]):
            return False
        stats.clear_peers(self._fresh)
        self._fresh.clear()
        self._next["n_peers"], self._next["n_remotes"] = self._top + 1, self._remotes.n_entries
        self._write_learned()
        self._slots[(generation + 1) & 1].copy(self._next, self._n_pages)
        store_u64(self._generation, 0, generation + 1)
        self._free.extend(reversed(self._resting))
        self._resting.clear()
        return True

    def _load(self, slot: Slot) -> None:
        """Continue from what an earlier control plane published: peers keep their indexes, and so their counters."""
        flag = LAYOUT["l2_flag"]
        pages = {entry & ~flag for entry in slot.l1[: slot["n_l1"]].tolist() if entry & flag}
        self._n_pages = max(pages, default=-1) + 1
        self._free_pages = [page for page in range(self._n_pages) if page not in pages]
        self._next.copy(slot, self._n_pages)
        remotes = []
        peers = slot.peers[: slot["n_peers"] * PEER.size]
        for index, (first, length, remote) in enumerate(_PEER_KEY.iter_unpack(peers)):
            if length:
                subnet = shm.unmapped_subnet(first, length)
                self._index[subnet], self._subnet_at[index] = index, subnet
                self._lengths[subnet.version, subnet.prefixlen] += 1
                remotes.append(remote)
        self._top = max(self._subnet_at, default=0)
        self._remotes.load(remotes)
        self._peer_hash.load()
        for outer, index, port in LEARNED.iter_unpack(slot.learned[: slot["n_learned"] * LEARNED.size]):
            self._learned.setdefault(index, {})[shm.unmapped(outer)] = port
        self.ask(0)
        self._free = [index for index in range(self._top, 0, -1) if index not in self._subnet_at]

    def _identity(self, index: int) -> tuple[bytes, int, bytes]:
        """What of a peer's entry says which host it is."""
        remote, flags, prefix = _PEER_IDENTITY.unpack_from(self._next.peers, index * PEER.size)
        return self._remotes.entry(remote), flags & ~_FLAG_DEAD, prefix

    def _remote_of(self, index: int) -> int:
        """Where the peer is, as an index."""
        remote: int = _PEER_KEY.unpack_from(self._next.peers, index * PEER.size)[2]
        return remote

    def _take_remote(self, remote: Remote, was_at: int) -> int:
        """Where a peer is now, as an index; it was at `was_at`, or nowhere, which is 0."""
        if self._remotes.is_at(was_at, remote.address, remote.port):
            return was_at
        if was_at:
            self._remotes.leave(was_at)
        n_before = len(self._remotes)
        index = self._remotes.take(remote.address, remote.port)
        if len(self._remotes) > n_before:
            # It may have been learned.
            self._is_learned_written = False
        return index

    def _write_learned(self) -> None:
        """Into the next table.  What has become the public IP of a peer is no longer learned."""
        if self._is_learned_written:
            return
        self._is_learned_written = True
        for index, sources in self._learned.items():
            self._learned[index] = {outer: port for outer, port in sources.items() if not self._remotes.has(outer)}
        rows = sorted(
            (shm.mapped(outer), index, port) for index, of in self._learned.items() for outer, port in of.items()
        )
        self._next["n_learned"] = len(rows)
        self._next.learned[: len(rows) * LEARNED.size] = b"".join(LEARNED.pack(*row) for row in rows)

    def _forget_learned(self, index: int) -> None:
        if self._learned.pop(index, None):
            self._is_learned_written = False

    def _enter(self, subnet: IPNetwork, index: int) -> None:
        """Have the workers find the peer."""
        self._lengths[subnet.version, subnet.prefixlen] += 1
        if isinstance(subnet, IPv4Network):
            self._point(subnet, index)
        else:
            self._peer_hash.add(index, subnet.network_address.packed)
            self._write_lengths()

    def _leave(self, subnet: IPNetwork, index: int) -> None:
        """Have them find it no more, while its entry still stands."""
        self._lengths[subnet.version, subnet.prefixlen] -= 1
        if not self._lengths[subnet.version, subnet.prefixlen]:
            del self._lengths[subnet.version, subnet.prefixlen]
        if isinstance(subnet, IPv4Network):
            self._point(subnet, 0)
        else:
            self._peer_hash.remove(index)
            self._write_lengths()

    def _write_lengths(self) -> None:
        lengths = sorted((length for version, length in self._lengths if version == 6), reverse=True)
        rows = b"".join(LENGTH.pack(IPv6Network((0, length)).netmask.packed, length) for length in lengths)
        self._next.lengths[: len(rows)] = rows
        self._next["n_lengths"] = len(lengths)

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


def _prefix(network: IPNetwork | None) -> bytes:
    """A `struct ut_prefix`."""
    return bytes(32) if network is None else network.network_address.packed + network.netmask.packed


def _subnet_of(address: IPAddress, length: int) -> IPNetwork:
    """The subnet of this prefix length that the address lies in."""
    if isinstance(address, IPv4Address):
        return IPv4Network((address, length), strict=False)
    return IPv6Network((address, length), strict=False)

"""The peer table that workers read: the control plane's, and only its, side.

Layout and reader: csrc/shm.h and the top of _fastpath.pyx.  Changes are made to a private copy; `publish` writes them
as a whole into the slot that no worker uses and flips the generation.  Nothing is ever locked.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from ipaddress import IPv4Network
from mmap import mmap
from socket import AF_INET
from typing import Any

import numpy as np
from numpy.typing import NDArray

from udptun._fastpath import LAYOUT, load_u64, store_u64
from udptun.core.errors import DatapathError
from udptun.core.tunnel import SourceCheck
from udptun.datapath import shm
from udptun.datapath.settings import PacketSettings, Remote, Vtep
from udptun.datapath.stats import OFFLOAD_BITS, Stats

_SETTINGS = np.dtype(
    [
        (name, np.uint32)
        for name in (
            "network",
            "network_mask",
            "own_subnet",
            "own_mask",
            "tunnel_address",
            "underlay_address",
            "mtu",
            "source_check",
            "n_l1",
            "n_remotes",
            "offloads",
            "prefix_len",
            "vni",
        )
    ]
    + [("own_mac", np.uint8, 6)]
)
_PEER = np.dtype(
    {
        "names": ["family", "port_be", "address_be", "subnet", "mask", "mtu", "flags", "prefix"],
        "formats": [np.uint16, ">u2", ">u4", np.uint32, np.uint32, np.uint32, np.uint32, (np.uint8, LAYOUT["prefix"])],
        "offsets": [0, 2, 4, 16, 20, 24, 28, 32],
        "itemsize": LAYOUT["peer"],
    }
)
_FLAG_UDPTUN = 1
_SOURCE_CHECKS = {SourceCheck.OFF: 0, SourceCheck.PEER: 1, SourceCheck.STRICT: 2}


class TableWriter:
    """Owns `fd`, the memory file of the table, and the copy in which the next table is made."""

    def __init__(self, fd: int) -> None:
        """Take over an existing file, or a new one of `create`.  Raises ValueError when it is of another layout.

        What is published stays so until the next `publish`, and is what changes are made to.
        """
        memory = shm.map_whole(fd, LAYOUT["table"], LAYOUT["table_magic"], LAYOUT["version"], "peer table")
        self.fd = fd
        self._memory = memory
        self._generation = np.frombuffer(memory, np.uint64, 1, LAYOUT["table.generation"])
        self._slots = [_Slot(memory, LAYOUT["table.slot"] + i * LAYOUT["slot"]) for i in (0, 1)]
        self._settings = np.zeros((), _SETTINGS)
        self._l1 = np.zeros(LAYOUT["l1_entries"], np.uint32)
        # Zero pages of the kernel's: only those in use cost memory.
        self._l2 = np.zeros((LAYOUT["l2_pages"], LAYOUT["l2_entries"]), np.uint32)
        self._peers = np.zeros(LAYOUT["max_peers"], _PEER)
        self._index: dict[IPv4Network, int] = {}
        # Highest number first, so that the lowest is taken first and what is in use stays dense.
        self._free = list(range(LAYOUT["max_peers"] - 1, 0, -1))
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
        return cls(shm.create("udptun-table", LAYOUT["table"], LAYOUT["table_magic"], LAYOUT["version"]))

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
        network = int(settings.network.network_address)
        new = self._settings.copy()
        new["network"] = network
        new["network_mask"] = int(settings.network.netmask)
        new["own_subnet"] = int(settings.own_subnet.network_address)
        new["own_mask"] = int(settings.own_subnet.netmask)
        new["tunnel_address"] = int(settings.tunnel_address)
        new["underlay_address"] = int(settings.underlay_address)
        new["mtu"] = settings.mtu
        new["source_check"] = _SOURCE_CHECKS[settings.source_check]
        new["offloads"] = sum(bit for offload, bit in OFFLOAD_BITS.items() if offload in settings.offload)
        new["n_l1"] = max(1, settings.network.num_addresses >> 8)
        new["prefix_len"] = 0 if settings.vtep is None else LAYOUT["prefix"]
        new["vni"] = 0 if settings.vtep is None else settings.vtep.vni
        new["own_mac"] = list(bytes(6) if settings.vtep is None else settings.vtep.mac)
        if self._index and (new["network"], new["n_l1"]) != (self._settings["network"], self._settings["n_l1"]):
            raise DatapathError(f"cannot move the peer table to {settings.network}: it has peers of another network")
        if self._index and settings.vtep != self.vtep:
            raise DatapathError("cannot change the encapsulation of the peer table: it has peers of the old one")
        self._settings = new

    @property
    def vtep(self) -> Vtep | None:
        """What we are by the last settings, an earlier control plane's included."""
        if not self._settings["prefix_len"]:
            return None
        return Vtep(int(self._settings["vni"]), self._settings["own_mac"].tobytes())

    def set_peer(self, subnet: IPv4Network, remote: Remote, mtu: int) -> int:
        """Add the peer that leases `subnet`, or change where it is; return its index, which it keeps while it stays.

        `subnet` lies in Network, has a prefix length of 16 to 30 and overlaps no other peer's: LeaseTable sees to
        it.  `mtu`: largest inner packet, bytes.  Raises DatapathError when the table is full.
        """
        vtep = self.vtep
        index = self._index.get(subnet)
        if index is None:
            if not self._free:
                raise DatapathError(f"cannot add the peer {subnet}: the table holds {LAYOUT['max_peers'] - 1} at most")
            index = self._free.pop()
            self._index[subnet] = index
            self._fresh.append(index)
            self._top = max(self._top, index)
            self._fill(subnet, index)
        # As one: field by field takes three times as long, and there may be 65,535 of them.
        self._peers[index] = (
            AF_INET,
            remote.port,
            int(remote.address),
            int(subnet.network_address),
            int(subnet.netmask),
            mtu,
            _FLAG_UDPTUN if remote.is_udptun else 0,
            0 if vtep is None else list(vtep.prefix(remote.mac)),
        )
        return index

    def remove_peer(self, subnet: IPv4Network) -> None:
        """Forget the peer of `subnet`, if there is one."""
        index = self._index.pop(subnet, None)
        if index is None:
            return
        self._fill(subnet, 0)
        self._peers[index] = np.zeros((), _PEER)
        self._resting.append(index)

    @property
    def subnets(self) -> Collection[IPv4Network]:
        """Of all peers."""
        return self._index.keys()

    def index_of(self, subnet: IPv4Network) -> int | None:
        """The peer's index, for its statistics."""
        return self._index.get(subnet)

    def publish(self, stats: Stats, n_workers: int = LAYOUT["max_workers"]) -> bool:
        """Make the changes visible to all of the first `n_workers` workers at once.

        False when a worker is still in the slot to be written (a batch takes microseconds): try again shortly.
        """
        generation = self.generation
        if any(seen not in (0, generation) for seen in stats.generations_seen()[:n_workers]):
            return False
        stats.clear_peers(self._fresh)
        self._fresh.clear()
        slot = self._slots[(generation + 1) & 1]
        n_l1 = int(self._settings["n_l1"])
        used = self._peers[: self._top + 1]
        remotes = np.unique(used["address_be"][used["family"] != 0].astype(np.uint32))
        self._settings["n_remotes"] = remotes.size
        slot.settings[0] = self._settings
        slot.l1[:n_l1] = self._l1[:n_l1]
        slot.remotes[: remotes.size] = remotes
        slot.peers[: used.size] = used
        slot.l2[: self._n_pages] = self._l2[: self._n_pages]
        store_u64(self._generation, 0, generation + 1)
        self._free.extend(reversed(self._resting))
        self._resting.clear()
        return True

    def _load(self, slot: _Slot) -> None:
        """Continue from what an earlier control plane published: peers keep their indexes, and so their counters."""
        self._settings = slot.settings[0].copy()
        self._l1[:] = slot.l1
        flag = LAYOUT["l2_flag"]
        used_pages = {int(entry) & ~flag for entry in self._l1[self._l1 & flag != 0]}
        self._n_pages = max(used_pages, default=-1) + 1
        self._free_pages = [page for page in range(self._n_pages) if page not in used_pages]
        self._l2[: self._n_pages] = slot.l2[: self._n_pages]
        indexes = np.flatnonzero(slot.peers["family"]).tolist()
        self._top = max(indexes, default=0)
        self._peers[: self._top + 1] = slot.peers[: self._top + 1]
        for index in indexes:
            peer = self._peers[index]
            length = int(peer["mask"]).bit_count()
            self._index[IPv4Network((int(peer["subnet"]), length))] = index
        taken = set(indexes)
        self._free = [index for index in self._free if index not in taken]

    def _fill(self, subnet: IPv4Network, index: int) -> None:
        """Point every address of `subnet` at the peer `index`; 0 clears."""
        offset = int(subnet.network_address) - int(self._settings["network"])
        first = offset >> 8
        if subnet.prefixlen <= 24:
            self._l1[first : first + (1 << (24 - subnet.prefixlen))] = index
            return
        page = self._page(first)
        # By the address itself, as the reader does: a Network longer than /24 need not begin at 0.
        low = int(subnet.network_address) & 255
        self._l2[page, low : low + subnet.num_addresses] = index
        if not index and not self._l2[page].any():
            self._l1[first] = 0
            self._free_pages.append(page)

    def _page(self, first: int) -> int:
        """The second-level page of L1 entry `first`, made when there is none."""
        entry = int(self._l1[first])
        if entry & LAYOUT["l2_flag"]:
            return entry & ~LAYOUT["l2_flag"]
        if self._free_pages:
            page = self._free_pages.pop()
        else:
            page = self._n_pages
            self._n_pages += 1
        self._l1[first] = LAYOUT["l2_flag"] | page
        return page


class _Slot:
    """numpy's view of one `struct ut_slot`."""

    def __init__(self, memory: mmap, offset: int) -> None:
        def view(name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
            return np.frombuffer(memory, dtype, count, offset + LAYOUT[f"slot.{name}"])

        word = np.dtype(np.uint32)
        self.settings: NDArray[Any] = np.frombuffer(memory, _SETTINGS, 1, offset)
        self.l1 = view("l1", word, LAYOUT["l1_entries"])
        self.remotes = view("remotes", word, LAYOUT["max_peers"])
        self.peers = view("peers", _PEER, LAYOUT["max_peers"])
        self.l2 = view("l2", word, LAYOUT["l2_pages"] * LAYOUT["l2_entries"]).reshape(-1, LAYOUT["l2_entries"])

"""Which peers the kernel knows, and what it is told of each: the difference since the last time.  Pure.

    key       the first address of a subnet: the programs find a peer by the first bits of an inner address
    blocked   keys of subnets that hold a PublicIP or an address of this host, whose packets need the worker's checks
              (loops, own addresses)

Left to the worker are peers with a subnet of another length than ours, those over IPv6, dead ones and blocked ones.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv4Network

from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath.peer_entries import PeerEntry

PEER = struct.Struct("=4s4s2sHIIxxxxQQQ")
"""struct peer of shortcut.bpf.c: key, remote and port (network byte order), flags, index, and what is the kernel's."""
_EGRESS, _ECN = 1, 2


class KernelPeers:
    """The peers as the kernel has them, of one own subnet."""

    def __init__(self, own_subnet: IPv4Network, mtu: int) -> None:
        """`mtu` is that of the device, bytes: a peer that takes less gets its packets from the worker."""
        self._mask = int(own_subnet.netmask)
        self._length = own_subnet.prefixlen
        self._mtu = mtu
        self._entries: dict[int, PeerEntry] = {}
        """Of the peers whose subnets have the right length."""
        self._remote_keys: dict[IPNetwork, int] = {}
        """Of each peer the key of its PublicIP."""
        self._blocked: Counter[int] = Counter()
        self._local: frozenset[int] = frozenset()
        self._changed: set[int] = set()
        self._known: dict[int, bytes] = {}
        """What `changes` has told."""

    def set_local(self, addresses: Collection[IPAddress]) -> None:
        """The addresses of this host."""
        local = frozenset(int(it) & self._mask for it in addresses if isinstance(it, IPv4Address))
        self._changed |= local ^ self._local
        self._local = local

    def set_peer(self, subnet: IPNetwork, entry: PeerEntry | None) -> None:
        """What the table has of it now; None: it is gone."""
        self._unblock(subnet)
        if entry is not None and isinstance(entry.remote.address, IPv4Address):
            key = self._remote_keys[subnet] = int(entry.remote.address) & self._mask
            self._blocked[key] += 1
            self._changed.add(key)
        if isinstance(subnet, IPv4Network) and subnet.prefixlen == self._length:
            key = int(subnet.network_address)
            self._changed.add(key)
            if entry is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = entry

    def changes(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Key and value of each entry that is another one than at the last call; None: it goes."""
        changed, self._changed = self._changed, set()
        for key in changed:
            value = self._value(key)
            if value != self._known.get(key):
                if value is None:
                    del self._known[key]
                else:
                    self._known[key] = value
                yield key.to_bytes(4), value

    def is_sent_to(self, subnet: IPNetwork) -> bool:
        """Whether packets to the peer leave by the kernel.  May be asked on any thread."""
        if not isinstance(subnet, IPv4Network) or subnet.prefixlen != self._length:
            return False
        value = self._known.get(int(subnet.network_address))
        return value is not None and bool(PEER.unpack(value)[3] & _EGRESS)

    def _value(self, key: int) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None or entry.is_dead or key in self._local or self._blocked[key]:
            return None
        remote = entry.remote
        if remote.address.version != 4:
            return None
        flags = _EGRESS * (remote.takes_shortcut and entry.mtu >= self._mtu) | _ECN * remote.carries_ecn
        there = (remote.address.packed, remote.port.to_bytes(2))
        return PEER.pack(key.to_bytes(4), *there, flags, entry.index, 0, 0, 0, 0)

    def _unblock(self, subnet: IPNetwork) -> None:
        key = self._remote_keys.pop(subnet, None)
        if key is not None:
            self._blocked[key] -= 1
            if not self._blocked[key]:
                del self._blocked[key]
            self._changed.add(key)

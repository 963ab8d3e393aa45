"""The peers in the table: where each is, which are dead, and how long packets to them may be.

A host that leases a subnet of each family is two peers.  One of them, the leader, stands for the host: what is found
out about it holds for the other one, its follower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from udptun.core.network_state import IPAddress, IPNetwork
from udptun.core.tunnel import IPV6_MTU_MIN
from udptun.datapath.settings import Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerEntry:
    """What the peer table has of a peer.  `mtu`: the longest packet to it, bytes."""

    remote: Remote
    index: int
    mtu: int
    is_dead: bool


class PeerEntries:
    """The peers of one tunnel.  All that is set here takes effect with the next `TableWriter.publish`."""

    def __init__(self, table: TableWriter, stats: Stats) -> None:
        self._table = table
        self._stats = stats
        self.mtu = 0
        """How long packets may be by the device, bytes.  Who changes this or the next one adds the peers again."""
        self.less_for: Callable[[Remote], int] = lambda remote: 0
        """How many bytes fewer it is to that remote (`PacketSettings.less_for`)."""
        self.changed: Callable[[IPNetwork], None] = lambda subnet: None
        """Called for each peer that is set again or forgotten."""
        self._waiting: dict[IPNetwork, Remote] = {}
        """Peers for which the table has no room."""
        self._remotes: dict[IPNetwork, Remote] = {}
        """Of the peers in the table."""
        self._leaders: dict[IPNetwork, IPNetwork] = {}
        """Of the followers."""
        self._followers: dict[IPNetwork, IPNetwork] = {}
        """Of the leaders."""
        self._dead: set[IPNetwork] = set()
        """Without followers, as the next one."""
        self._path_mtus: dict[IPNetwork, int] = {}
        """As they were found, of peers to which packets may not be as long as the device allows, bytes."""
        self._longer_headed: set[IPNetwork] = set()
        """Those to which packets may not be so long because of the outer header."""

    def set_all(self, peers: Mapping[IPNetwork, Remote]) -> None:
        """Have exactly these peers."""
        self.remove([subnet for subnet in (*self._table.subnets, *self._waiting) if subnet not in peers])
        self.add(peers)

    def add(self, peers: Mapping[IPNetwork, Remote]) -> None:
        """Add peers, or change where they are."""
        for subnet, remote in peers.items():
            if self._table.has_room or self._table.index_of(subnet) is not None:
                self._set(subnet, remote)
                self._waiting.pop(subnet, None)
            else:
                if not self._waiting:
                    log.error("the peer table is full, more peers are not reached subnet=%s", subnet)
                self._waiting[subnet] = remote

    def add_waiting(self) -> bool:
        """Add those for which there was no room, if there is some now."""
        if not self._waiting or not self._table.has_room:
            return False
        self.add(dict(self._waiting))
        return True

    def remove(self, subnets: Iterable[IPNetwork]) -> None:
        """Forget peers.  A follower that stays stands for itself from then on."""
        for subnet in subnets:
            self._waiting.pop(subnet, None)
            self._remotes.pop(subnet, None)
            self._dead.discard(subnet)
            self._path_mtus.pop(subnet, None)
            self._longer_headed.discard(subnet)
            self._unfollow(subnet)
            if (follower := self._followers.get(subnet)) is not None:
                self.follow(follower, None)
            self._table.remove_peer(subnet)
            self.changed(subnet)

    def follow(self, subnet: IPNetwork, leader: IPNetwork | None) -> None:
        """Have a peer be the only follower of another one, or stand for itself again.

        It is dead and narrow as its leader, and let in from the same learned addresses.
        """
        self._unfollow(subnet)
        if leader is not None:
            self._leaders[subnet], self._followers[leader] = leader, subnet
            self._dead.discard(subnet)
            self._path_mtus.pop(subnet, None)
            self._table.set_learned(subnet, self._table.learned(leader))
        self._set_again(subnet)

    def leader(self, subnet: IPNetwork) -> IPNetwork:
        """The peer that stands for the host of this one, which may be itself."""
        return self._leaders.get(subnet, subnet)

    def _unfollow(self, subnet: IPNetwork) -> None:
        if (leader := self._leaders.pop(subnet, None)) is not None:
            del self._followers[leader]

    def set_dead(self, leader: IPNetwork, *, is_dead: bool) -> None:
        """Refuse packets to the host until something comes from it, or send them again."""
        if leader not in self._remotes:
            return
        self._dead.discard(leader)
        if is_dead:
            self._dead.add(leader)
        self._set_again(leader)

    def set_path_mtu(self, leader: IPNetwork, mtu: int | None) -> None:
        """Let packets to the host be so long, or as long as the device allows."""
        if leader not in self._remotes:
            return
        self._path_mtus.pop(leader, None)
        if mtu is not None and mtu < self.mtu:
            self._path_mtus[leader] = mtu
        self._set_again(leader)

    def set_learned(self, leader: IPNetwork, sources: Mapping[IPAddress, int]) -> None:
        """Let the host send from these addresses too, see `TableWriter.set_learned`."""
        for subnet in self._host(leader):
            self._table.set_learned(subnet, sources)

    @property
    def narrow(self) -> dict[IPNetwork, int]:
        """The peers to which packets may not be as long as the device allows, with the length in bytes."""
        narrow = {subnet for leader in self._path_mtus for subnet in self._host(leader)} | self._longer_headed
        # The kernel's routes to IPv6 subnets have no less, and nobody need send less (RFC 8200 5).
        mtus = {it: max(self._mtu_to(it), IPV6_MTU_MIN if it.version == 6 else 0) for it in narrow}
        return {subnet: mtu for subnet, mtu in mtus.items() if mtu < self.mtu}

    @property
    def problems(self) -> tuple[str, ...]:
        """A line when the table is too small.  May be read on another thread."""
        waiting = list(self._waiting.copy())
        if not waiting:
            return ()
        return (
            f"the peer table holds {len(self._table.subnets)} peers at most, so {len(waiting)} more are not reached, "
            f"as {waiting[0]}; have fewer hosts in the Network, or release leases that nobody uses",
        )

    def _host(self, leader: IPNetwork) -> tuple[IPNetwork, ...]:
        """All peers that are this host."""
        follower = self._followers.get(leader)
        return (leader,) if follower is None else (leader, follower)

    def _mtu_to(self, subnet: IPNetwork) -> int:
        """How long packets to the peer may be without being fragmented outside, bytes."""
        less = self.less_for(self._remotes[subnet]) if subnet in self._longer_headed else 0
        return min(self.mtu - less, self._path_mtus.get(self.leader(subnet), self.mtu))

    def _set_again(self, subnet: IPNetwork) -> None:
        """Into the table, after something has changed about its host."""
        for it in self._host(subnet):
            if (remote := self._remotes.get(it)) is not None:
                self._set(it, remote)

    def _set(self, subnet: IPNetwork, remote: Remote) -> None:
        self._remotes[subnet] = remote
        (self._longer_headed.add if self.less_for(remote) else self._longer_headed.discard)(subnet)
        index = self._table.index_of(subnet)
        is_dead = self.leader(subnet) in self._dead
        received = self._stats.received(index) if is_dead and index is not None else 0
        self._table.set_peer(subnet, remote, self._mtu_to(subnet), is_dead=is_dead, received=received)
        if index is None and (leader := self._leaders.get(subnet)) is not None:
            # It has waited for room.
            self._table.set_learned(subnet, self._table.learned(leader))
        self.changed(subnet)

    def entry(self, subnet: IPNetwork) -> PeerEntry | None:
        """What stands in the table of a peer; None: nothing."""
        remote, index = self._remotes.get(subnet), self._table.index_of(subnet)
        if remote is None or index is None:
            return None
        return PeerEntry(remote, index, self._mtu_to(subnet), self.leader(subnet) in self._dead)

    @property
    def subnets(self) -> Collection[IPNetwork]:
        """Of the peers in the table."""
        return self._remotes.keys()

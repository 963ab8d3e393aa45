"""What stands in the table for hosts with a subnet of each family, for hosts that are dead, and for narrow paths."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import cast

import pytest

from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath.peer_entries import PeerEntries
from udptun.datapath.settings import Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

MTU = 1472
ONE, TWO = IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")
ONE_V6, TWO_V6 = IPv6Network("fd00:244:0:1::/64"), IPv6Network("fd00:244:0:2::/64")
HERE, THERE = Remote(IPv4Address("192.0.2.1"), 8285, True), Remote(IPv4Address("192.0.2.2"), 8285, True)


class FakeTable:
    """As much of `TableWriter` as is used.  `entries` has the remote, the MTU, and whether the peer is dead."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.entries: dict[IPNetwork, tuple[Remote, int, bool]] = {}
        self.sources: dict[IPNetwork, Mapping[IPAddress, int]] = {}

    @property
    def has_room(self) -> bool:
        return len(self.entries) < self.room

    @property
    def subnets(self) -> list[IPNetwork]:
        return list(self.entries)

    def index_of(self, subnet: IPNetwork) -> int | None:
        return 1 if subnet in self.entries else None

    def set_peer(self, subnet: IPNetwork, remote: Remote, mtu: int, *, is_dead: bool, received: int) -> None:
        assert received == (7 if is_dead and subnet in self.entries else 0)
        self.entries[subnet] = (remote, mtu, is_dead)

    def remove_peer(self, subnet: IPNetwork) -> None:
        self.entries.pop(subnet, None)
        self.sources.pop(subnet, None)

    def set_learned(self, subnet: IPNetwork, sources: Mapping[IPAddress, int]) -> None:
        if subnet in self.entries:
            self.sources[subnet] = sources

    def learned(self, subnet: IPNetwork) -> Mapping[IPAddress, int]:
        return self.sources.get(subnet, {})


class FakeStats:
    def received(self, index: int) -> int:
        return 7


@pytest.fixture
def table() -> FakeTable:
    return FakeTable(room=9)


@pytest.fixture
def peers(table: FakeTable) -> PeerEntries:
    """Two hosts with both families."""
    peers = PeerEntries(cast(TableWriter, table), cast(Stats, FakeStats()))
    peers.mtu = MTU
    peers.set_all({ONE: HERE, TWO: THERE, ONE_V6: HERE, TWO_V6: THERE})
    peers.follow(ONE_V6, ONE)
    peers.follow(TWO_V6, TWO)
    return peers


def test_a_host_is_dead_by_both_families_and_alive_again(table: FakeTable, peers: PeerEntries) -> None:
    peers.set_dead(ONE, is_dead=True)
    assert {subnet for subnet, (_, _, is_dead) in table.entries.items() if is_dead} == {ONE, ONE_V6}
    peers.set_dead(ONE, is_dead=False)
    assert not any(is_dead for _, _, is_dead in table.entries.values())


def test_a_path_is_narrow_for_both_families_but_ipv6_keeps_its_1280_bytes(
    table: FakeTable, peers: PeerEntries
) -> None:
    peers.set_path_mtu(ONE, 1372)
    assert peers.narrow == {ONE: 1372, ONE_V6: 1372}
    peers.set_path_mtu(ONE, 1000)
    assert peers.narrow == {ONE: 1000, ONE_V6: 1280}
    # What is longer than that is fragmented outside, up to those 1280 bytes.
    assert [mtu for _, mtu, _ in table.entries.values()] == [1000, MTU, 1000, MTU]
    peers.set_path_mtu(ONE, None)
    assert peers.narrow == {}


def test_learned_addresses_are_those_of_both_families(table: FakeTable, peers: PeerEntries) -> None:
    sources: dict[IPAddress, int] = {IPv4Address("203.0.113.9"): 8285}
    peers.set_learned(ONE, sources)
    assert (table.sources[ONE], table.sources[ONE_V6]) == (sources, sources)
    peers.remove([ONE_V6])
    peers.add({ONE_V6: HERE})
    peers.follow(ONE_V6, ONE)
    assert table.sources[ONE_V6] == sources


def test_who_comes_to_a_dead_host_is_dead_and_who_stays_without_its_leader_is_not(
    table: FakeTable, peers: PeerEntries
) -> None:
    peers.remove([ONE_V6])
    peers.set_dead(ONE, is_dead=True)
    peers.set_path_mtu(ONE, 1372)
    peers.add({ONE_V6: HERE})
    peers.follow(ONE_V6, ONE)
    assert table.entries[ONE_V6] == (HERE, 1372, True)
    peers.remove([ONE])
    assert table.entries[ONE_V6] == (HERE, MTU, False)
    assert peers.leader(ONE_V6) == ONE_V6
    peers.set_dead(ONE_V6, is_dead=True)
    assert table.entries[ONE_V6] == (HERE, MTU, True)
    assert peers.narrow == {}


def test_peers_without_room_wait_and_are_named(table: FakeTable, peers: PeerEntries) -> None:
    table.room = 4
    more = IPv4Network("10.244.3.0/24")
    peers.add({more: HERE})
    assert more not in table.entries
    (line,) = peers.problems
    assert line.startswith(f"the peer table holds 4 peers at most, so 1 more are not reached, as {more}; ")
    assert not peers.add_waiting()
    peers.remove([TWO_V6])
    assert peers.add_waiting()
    assert more in table.entries
    assert peers.problems == ()


def test_who_has_waited_for_room_is_dead_narrow_and_let_in_as_its_leader(table: FakeTable, peers: PeerEntries) -> None:
    """It came alive, and its packets from the learned address were dropped, until something changed about its host."""
    sources: dict[IPAddress, int] = {IPv4Address("203.0.113.9"): 8285}
    peers.remove([ONE_V6])
    peers.set_dead(ONE, is_dead=True)
    peers.set_path_mtu(ONE, 1372)
    peers.set_learned(ONE, sources)
    table.room = 3
    peers.add({ONE_V6: HERE})
    peers.follow(ONE_V6, ONE)
    assert ONE_V6 not in table.entries
    table.room = 4
    assert peers.add_waiting()
    assert table.entries[ONE_V6] == (HERE, 1372, True)
    assert table.sources[ONE_V6] == sources

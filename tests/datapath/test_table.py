"""The shared peer table: what a worker finds in it, and that it never sees half of a change."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import numpy as np
import pytest

from udptun._fastpath import COUNTERS, FIELDS, LAYOUT, TableReader
from udptun.core.errors import DatapathError
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck
from udptun.datapath import stats as stats_module
from udptun.datapath import table as table_module
from udptun.datapath.rebinding import Endpoints
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter
from udptun.datapath.tunnel import Tunnel
from udptun.kernel.tun import Tun

NETWORK = IPv4Network("10.0.0.0/8")
NETWORK_IPV6 = IPv6Network("2001:db8::/40")
HERE = IPv4Address("192.0.2.1")

N = TypeVar("N", IPv4Network, IPv6Network)


def settings(network: IPv4Network = NETWORK) -> PacketSettings:
    own = next(network.subnets(new_prefix=max(24, network.prefixlen)))
    return PacketSettings(network, own, HERE, 1472, SourceCheck.PEER)


@pytest.fixture
def stats() -> Iterator[Stats]:
    stats = Stats.create()
    yield stats
    stats.close()


@pytest.fixture
def table(stats: Stats) -> Iterator[TableWriter]:
    table = TableWriter.create()
    table.configure(settings())
    yield table
    table.close()


def remote(n: int) -> Remote:
    return Remote(IPv4Address(0xC6120000 + n), 8285, True)


def look_up(
    table: TableWriter, stats: Stats, addresses: Sequence[IPv4Address] | Sequence[IPv6Address]
) -> list[IPv4Address | None]:
    """Where a worker would send to these addresses of one family; None: nowhere."""
    asked = np.frombuffer(b"".join(it.packed for it in addresses), np.uint32)
    if isinstance(addresses[0], IPv4Address):
        asked = asked.byteswap()
    peers, remotes = (np.zeros(len(addresses), np.uint32) for _ in range(2))
    TableReader(table.fd, stats.fd, 0).lookup(asked, peers, remotes)
    return [
        IPv4Address(int(where)) if peer else None
        for peer, where in zip(peers.tolist(), remotes.byteswap().tolist(), strict=True)
    ]


def come_and_go(table: TableWriter, leases: dict[N, Remote], gone: list[N]) -> list[N]:
    """Set all leases, remove those of `gone`, and set every second one of them anew; `leases` follows."""
    for subnet, where in leases.items():
        table.set_peer(subnet, where, 1472)
    for subnet in gone:
        table.remove_peer(subnet)
        del leases[subnet]
    for subnet in gone[::2]:
        leases[subnet] = remote(1000 + len(leases))
        table.set_peer(subnet, leases[subnet], 1472)
    return gone


def edges(subnets: Sequence[N]) -> list[Any]:
    """The first, middle and last address of each, and its neighbours; none is the first or the last of the family."""
    return [
        address
        for subnet in subnets
        for first, last in [(subnet[0], subnet[-1])]
        for address in (first - 1, first, first + (int(last) - int(first)) // 2, last, last + 1)
    ]


def test_lookup_agrees_with_ipaddress_for_leases_of_every_allowed_length(table: TableWriter, stats: Stats) -> None:
    rng = random.Random(7)
    leases: dict[IPv4Network, Remote] = {}
    for i, block in enumerate(rng.sample(list(NETWORK.subnets(new_prefix=16)), 40)):
        length = 16 + i % 15
        for subnet in rng.sample(list(block.subnets(new_prefix=length)), min(6, 1 << (length - 16))):
            leases[subnet] = remote(len(leases))
    # So pages of the second level become free and are used again.
    gone = come_and_go(table, leases, rng.sample(list(leases), len(leases) // 3))
    assert table.publish(stats)
    addresses = [IPv4Address(rng.randrange(1 << 32)) for _ in range(2000)] + edges([*leases, *gone])
    expected = [next((leases[s].address for s in leases if address in s), None) for address in addresses]
    assert look_up(table, stats, addresses) == expected


def test_lookup_agrees_with_ipaddress_for_ipv6_leases_of_any_length(table: TableWriter, stats: Stats) -> None:
    rng = random.Random(8)
    leases: dict[IPv6Network, Remote] = {}
    for i, block in enumerate(rng.sample(list(NETWORK_IPV6.subnets(new_prefix=48)), 40)):
        for n in {rng.randrange(1 << min(i * 2, 16)) for _ in range(6)}:
            leases[IPv6Network((block.network_address + (n << (80 - i * 2)), 48 + i * 2))] = remote(len(leases))
    leases[IPv6Network("2001:db8:ff00::1/128")] = remote(len(leases))
    # So some prefix lengths do so too, and the table of hashes is moved about.
    gone = come_and_go(table, leases, rng.sample(list(leases), len(leases) // 2))
    assert table.publish(stats)
    addresses = [IPv6Address(rng.randrange(1 << 128)) for _ in range(500)] + edges([*leases, *gone])
    expected = [next((leases[s].address for s in leases if address in s), None) for address in addresses]
    assert look_up(table, stats, addresses) == expected
    assert [it and it[1] for it in map(table.peer_of, addresses)] == expected


def test_families_are_apart_although_they_share_indexes_and_remotes(table: TableWriter, stats: Stats) -> None:
    """An IPv4 address stands in the table as the mapped one, which nobody may reach with an IPv6 packet."""
    ipv4, ipv6 = IPv4Network("10.1.0.0/24"), IPv6Network("2001:db8:1::/64")
    assert table.set_peer(ipv4, remote(1), 1472) != table.set_peer(ipv6, remote(1), 1472)
    assert table.n_remotes == 1
    assert table.publish(stats)
    assert look_up(table, stats, [ipv4[5]]) == look_up(table, stats, [ipv6[5]]) == [remote(1).address]
    mapped = IPv6Address(f"::ffff:{ipv4[5]}")
    assert look_up(table, stats, [mapped]) == [None]
    assert table.peer_of(mapped) is None
    table.remove_peer(ipv4)
    assert table.has_remote(remote(1).address)
    table.remove_peer(ipv6)
    assert not table.has_remote(remote(1).address)
    assert table.n_remotes == 0


def test_remotes_stay_true_while_peers_come_go_and_move(table: TableWriter, stats: Stats) -> None:
    """Several peers at an address, and several ports; each change in a table that an heir takes over."""
    rng = random.Random(9)
    subnets = [*IPv4Network("10.1.0.0/18").subnets(new_prefix=24), *IPv6Network("2001:db8::/58").subnets(new_prefix=64)]
    places: list[IPv4Address | IPv6Address] = [IPv4Address(f"192.0.2.{n}") for n in range(1, 30)]
    places += [IPv6Address(f"2001:db8:ffff::{n:x}") for n in range(1, 30)]
    now: dict[IPv4Network | IPv6Network, Remote] = {}
    for step in range(2000):
        subnet = rng.choice(subnets)
        if subnet in now and rng.random() < 0.4:
            table.remove_peer(subnet)
            del now[subnet]
        else:
            now[subnet] = Remote(rng.choice(places), rng.choice((8285, 8286)), True)
            table.set_peer(subnet, now[subnet], 1472)
        if step % 100 == 99:
            assert table.publish(stats)
            heir = TableWriter(os.dup(table.fd))
            for it in (table, heir):
                assert {place for place in places if it.has_remote(place)} == {where.address for where in now.values()}
                assert it.n_remotes == len({(where.address, where.port) for where in now.values()})
                found = {subnet: it.peer_of(subnet[3]) for subnet in subnets}
                assert {of: lease for of, lease in found.items() if lease} == {
                    subnet: (subnet, where.address) for subnet, where in now.items()
                }
            heir.close()


def test_peer_of_an_address_is_the_one_that_a_worker_finds(table: TableWriter, stats: Stats) -> None:
    leases = {IPv4Network(text): remote(i) for i, text in enumerate(("10.1.0.0/24", "10.2.0.0/16", "10.3.0.64/26"))}
    for subnet, where in leases.items():
        table.set_peer(subnet, where, 1472)
    assert table.publish(stats)
    for subnet, where in leases.items():
        assert table.peer_of(subnet[-1]) == table.peer_of(subnet[0]) == (subnet, where.address)
        assert table.has_remote(where.address)
    for nobody in ("10.1.1.0", "10.3.0.63", "10.3.0.128", "9.255.255.255", "11.0.0.0"):
        assert table.peer_of(IPv4Address(nobody)) is None
    assert not table.has_remote(remote(3).address)
    assert not table.has_remote(IPv4Address("0.0.0.0"))


def ran(stats: Stats, worker: int) -> None:
    """Say that the worker has."""
    at = FIELDS["stats"]["worker"][0] + worker * LAYOUT["worker"] + FIELDS["worker"]["turns"][0]
    os.pwrite(stats.fd, b"\1", at)


def test_numpy_sums_and_clears_the_counters_of_a_large_table_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted, in the memory files themselves."""
    subnets = [
        subnet for block in ("10.1.0.0/16", "10.2.0.0/23") for subnet in IPv4Network(block).subnets(new_prefix=27)
    ]
    made: list[list[list[int]]] = []
    for many in (len(subnets) + 1, 1):
        monkeypatch.setattr(stats_module, "MANY_PEERS", many)
        table, stats = TableWriter.create(), Stats.create()
        table.configure(settings())
        # The first worker has run, and counted for earlier peers where the new ones' counters will be.
        ran(stats, 0)
        os.pwrite(stats.fd, b"\1" * 4096, FIELDS["stats"]["peer"][0])
        for i, subnet in enumerate(subnets):
            # Some hosts hold several subnets; the numbers are not in order.
            table.set_peer(subnet, remote(i * 7919 % 1000), 1472)
        for subnet in subnets[::3]:
            table.remove_peer(subnet)
        assert table.publish(stats)
        assert stats.peers([table.index_of(subnets[1])]) == [[0] * 4]
        ran(stats, 1)
        for worker in range(3):
            at = worker * LAYOUT["max_peers"] * LAYOUT["peer_stats"]
            numbers = array("Q", range(worker, worker + 4 * len(subnets)))
            os.pwrite(stats.fd, numbers, FIELDS["stats"]["peer"][0] + at)
        counts = stats.peers([None, 0, *(table.index_of(subnet) for subnet in subnets)])
        made.append(counts)
        table.close()
        stats.close()
    assert made[0] == made[1]
    assert made[0][:3] == [[0] * 4, [1, 3, 5, 7], [0] * 4]


def test_another_network_of_ipv4_leaves_the_peers_by_ipv6_as_they_are(stats: Stats) -> None:
    """The daemon did not start when Network had changed and IPv6Network had not."""
    table, subnet = TableWriter.create(), IPv6Network("fd00:244:0:2::/64")
    table.configure(settings())
    index = table.set_peer(subnet, remote(1), 1472)
    table.configure(settings(IPv4Network("10.9.0.0/16")))
    assert table.index_of(subnet) == index
    ipv4 = IPv4Network("10.9.1.0/24")
    table.set_peer(ipv4, remote(1), 1472)
    with pytest.raises(DatapathError, match="peers of another network"):
        table.configure(settings())
    table.remove_peer(ipv4)
    table.configure(settings())


def test_a_peer_that_stays_where_it_is_does_not_have_all_learned_addresses_sorted_again(
    table: TableWriter, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host that was found dead, or whose path was narrow, left its remote and took it again as if it were new."""
    subnets = list(IPv4Network("10.1.0.0/22").subnets(new_prefix=24))
    own = IPv4Network("10.255.0.0/24")
    table.configure(PacketSettings(NETWORK, own, HERE, 1472, SourceCheck.PEER, punt_id=1))
    for i, subnet in enumerate(subnets):
        table.set_peer(subnet, remote(i), 1472)
        table.set_learned(subnet, {remote(1000 + i).address: 8285})
    n_sorted = Mock(side_effect=sorted)
    monkeypatch.setattr(table_module, "sorted", n_sorted, raising=False)
    assert table.publish(stats)
    for mtu, is_dead in ((1472, True), (1400, False)):
        for i, subnet in enumerate(subnets):
            table.set_peer(subnet, remote(i), mtu, is_dead=is_dead)
        assert table.publish(stats)
    assert n_sorted.call_count == 1
    # What has become a public IP is learned no more.
    table.set_peer(subnets[0], remote(1001), 1472)
    assert table.publish(stats)
    assert n_sorted.call_count == 2
    assert table.learned(subnets[1]) == {}
    assert table.learned(subnets[2]) == {remote(1002).address: 8285}
    assert table.n_remotes == len(subnets)


@pytest.mark.parametrize("network", ["10.244.0.0/16", "10.244.8.0/22", "10.244.8.0/24", "10.244.8.128/25"])
def test_addresses_outside_a_small_network_lead_nowhere(network: str, stats: Stats) -> None:
    inside = IPv4Network(network)
    table = TableWriter.create()
    table.configure(settings(inside))
    subnet = list(inside.subnets(new_prefix=30))[-1]
    table.set_peer(subnet, remote(1), 1472)
    assert table.publish(stats)
    first, last = int(inside.network_address), int(inside.broadcast_address)
    outside = [IPv4Address(n) for n in (first - 1, first - 256, last + 1, last + 256, 0, 0xFFFFFFFF)]
    assert look_up(table, stats, [*outside, subnet.network_address]) == [None] * 6 + [remote(1).address]
    table.close()


def test_where_ipv4_is_not_carried_no_address_of_it_leads_anywhere(stats: Stats) -> None:
    table = TableWriter.create()
    own = IPv6Network("2001:db8:0:100::/56")
    table.configure(
        PacketSettings(*(None, None, HERE, 1472, SourceCheck.PEER), network_ipv6=NETWORK_IPV6, own_subnet_ipv6=own)
    )
    table.set_peer(IPv6Network("2001:db8:0:200::/56"), remote(1), 1472)
    assert table.publish(stats)
    asked = [IPv4Address(address) for address in (0, 1, 1 << 24, 0xFFFFFFFF)]
    assert look_up(table, stats, asked) == [None] * 4
    assert look_up(table, stats, [IPv6Address("2001:db8:0:200::1")]) == [remote(1).address]
    table.close()


def test_peer_keeps_its_index_while_others_come_and_go(table: TableWriter, stats: Stats) -> None:
    subnets = list(IPv4Network("10.1.0.0/16").subnets(new_prefix=24))
    for i, subnet in enumerate(subnets):
        table.set_peer(subnet, remote(i), 1472)
    index = table.index_of(subnets[9])
    for subnet in subnets[:9]:
        table.remove_peer(subnet)
    table.set_peer(subnets[9], remote(77), 1400)
    assert table.publish(stats)
    assert table.index_of(subnets[9]) == index


def test_index_of_a_removed_peer_rests_until_no_worker_can_count_under_it(table: TableWriter, stats: Stats) -> None:
    a, b, c = list(IPv4Network("10.1.0.0/16").subnets(new_prefix=24))[:3]
    index = table.set_peer(a, remote(1), 1472)
    assert table.publish(stats)
    table.remove_peer(a)
    assert table.set_peer(b, remote(2), 1472) != index
    assert table.publish(stats)
    assert table.set_peer(c, remote(3), 1472) == index


@pytest.mark.parametrize("n_free", [2000, pytest.param(LAYOUT["max_peers"] - 1, marks=pytest.mark.full)])
def test_table_refuses_more_peers_than_it_holds_and_keeps_the_others(
    n_free: int, table: TableWriter, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greatest index is in use, with all others or with few."""
    monkeypatch.setattr(table, "_top", LAYOUT["max_peers"] - 1 - n_free)
    n_ipv4 = n_free // 2
    first, second = NETWORK.subnets(new_prefix=24), IPv6Network("2001:db8::/47").subnets(new_prefix=64)
    subnets = [*islice(first, n_ipv4), *islice(second, n_free - n_ipv4)]
    indexes = {table.set_peer(subnet, remote(i), 1472) for i, subnet in enumerate(subnets)}
    assert (len(indexes), max(indexes)) == (n_free, LAYOUT["max_peers"] - 1)
    with pytest.raises(DatapathError, match="holds 131071 at most"):
        table.set_peer(next(second), remote(0), 1472)
    assert table.publish(stats)
    assert look_up(table, stats, [subnets[0][0], subnets[n_ipv4 - 1][1]]) == [
        remote(0).address,
        remote(n_ipv4 - 1).address,
    ]
    assert look_up(table, stats, [subnets[n_ipv4][0], subnets[-1][1]]) == [
        remote(n_ipv4).address,
        remote(n_free - 1).address,
    ]


def test_peers_for_which_the_table_has_no_room_are_named_and_added_when_others_go(
    tmp_path: Path, table: TableWriter, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the lease of one host too many ended the daemon of every host, and each start again."""
    monkeypatch.setattr(table, "_top", LAYOUT["max_peers"] - 1 - 3)
    subnets = [IPv4Network((NETWORK.network_address + 256 * n, 24)) for n in range(1, 7)]

    async def main() -> None:
        tun = Mock(spec=Tun, fds=[])
        tun.name = "flannel0"
        tunnel = Tunnel(tmp_path, table, stats, -1, (), tun, Endpoints((), ()), [], ALL)
        tunnel.peers.set_all({subnet: remote(n) for n, subnet in enumerate(subnets[:5])})
        await tunnel.publish()
        assert set(table.subnets) == set(subnets[:3])
        (problem,) = tunnel.problems
        assert problem.startswith(f"the peer table holds 3 peers at most, so 2 more are not reached, as {subnets[3]}; ")
        tunnel.peers.add({subnets[0]: remote(7), subnets[5]: remote(5)})
        tunnel.peers.remove([subnets[1], subnets[4]])
        await tunnel.publish()
        assert set(table.subnets) == {subnets[0], subnets[2], subnets[3]}
        assert tunnel.problems[0].startswith("the peer table holds 3 peers at most, so 1 more are")
        tunnel.peers.set_all({subnet: remote(1) for subnet in subnets[2:4]})
        await tunnel.publish()
        assert tunnel.problems == ()

    asyncio.run(main())


def test_next_control_plane_goes_on_with_the_published_peers_and_their_indexes(stats: Stats) -> None:
    first = TableWriter.create()
    first.configure(settings())
    subnets = [IPv4Network(text) for text in ("10.1.0.0/24", "10.2.0.0/16", "10.3.0.0/26", "10.3.0.64/26")]
    ipv6 = [IPv6Network(text) for text in ("2001:db8:1::/64", "2001:db8:2::/56")]
    indexes_ipv6 = [first.set_peer(subnet, remote(i), 1472) for i, subnet in enumerate(ipv6)]
    indexes = [first.set_peer(subnet, remote(i), 1472) for i, subnet in enumerate(subnets)]
    assert first.publish(stats)
    first.set_peer(IPv4Network("10.9.0.0/24"), remote(9), 1472)  # never published: it died with its writer

    second = TableWriter(first.fd)
    assert [second.index_of(subnet) for subnet in subnets] == indexes
    assert [second.index_of(subnet) for subnet in ipv6] == indexes_ipv6
    assert set(second.subnets) == {*subnets, *ipv6}
    assert [second.subnet_at(index) for index in (*indexes, second.top + 1)] == [*subnets, None]
    assert second.top == max(indexes + indexes_ipv6)
    second.remove_peer(subnets[2])
    assert second.subnet_at(indexes[2]) is None
    second.remove_peer(ipv6[0])
    second.set_peer(IPv6Network("2001:db8:3::/56"), remote(7), 1472)
    second.set_peer(IPv4Network("10.4.0.128/25"), remote(8), 1472)
    assert second.publish(stats)
    asked = [subnet.network_address for subnet in subnets] + [IPv4Address("10.4.0.200"), IPv4Address("10.9.0.1")]
    expected = [remote(0).address, remote(1).address, None, remote(3).address, remote(8).address, None]
    assert look_up(second, stats, asked) == expected
    asked_ipv6 = [ipv6[0][1], ipv6[1][1], IPv6Address("2001:db8:3::1")]
    assert look_up(second, stats, asked_ipv6) == [None, remote(1).address, remote(7).address]
    second.close()


@pytest.mark.parametrize(
    ("versions", "n_known", "block"),
    [
        # Those builds had room for 56 counters in a block, and knew 51 at most.
        pytest.param(range(5, 11), 51, 512, id="5 to 10"),
        pytest.param(range(11, 12), 59, 576, id="11"),
    ],
)
def test_statistics_of_another_layout_go_on_counting_where_the_counters_are_understood(
    versions: range, n_known: int, block: int
) -> None:
    """An upgrade would begin to count at zero."""
    first = Stats.create()
    counts = array("Q", range(1, 1 + n_known))
    for worker in (0, 3):
        at = FIELDS["stats"]["worker"][0] + worker * block
        os.pwrite(first.fd, array("Q", [99] * 8), at)
        os.pwrite(first.fd, counts, at + FIELDS["worker"]["counter"][0])
    others = [(4, 0), (LAYOUT["version"] + 1, 0)]
    for version, factor in [*((version, 2) for version in versions), *others]:
        os.pwrite(first.fd, version.to_bytes(4, sys.byteorder), 4)
        second = Stats.create()
        second.continue_from(first.fd)
        assert list(second.counters().values()) == [*(factor * n for n in counts), *[0] * (len(COUNTERS) - n_known)]
        second.close()
    first.close()


def test_writer_waits_while_a_worker_is_in_the_slot_to_be_written(table: TableWriter, stats: Stats) -> None:
    table.set_peer(IPv4Network("10.1.0.0/24"), remote(1), 1472)
    assert table.publish(stats)
    asked = np.full(20_000_000, int(IPv4Address("10.1.0.1")), np.uint32)
    peers, remotes = np.zeros_like(asked), np.zeros_like(asked)
    reader = TableReader(table.fd, stats.fd, 3)
    thread = threading.Thread(target=reader.lookup, args=(asked, peers, remotes))
    thread.start()
    while not any(stats.generations_seen()):
        assert thread.is_alive(), "the reader was done before the writer looked; make `asked` longer"
    table.set_peer(IPv4Network("10.1.0.0/24"), remote(2), 1472)
    # The other slot is free.  The next to write would be the one that the reader is in.
    assert table.publish(stats)
    assert not table.publish(stats)
    thread.join()
    assert table.publish(stats)
    assert set(remotes.byteswap().tolist()) == {int(remote(1).address)}


def read_batches(table_fd: int, stats_fd: int, n_peers: int, seconds: float, result: Connection) -> None:
    """In another process: look all peers up again and again; count batches, and those that mix two tables."""
    asked = np.arange(n_peers, dtype=np.uint32) * 256 + np.uint32(int(NETWORK.network_address))
    peers, remotes = np.zeros_like(asked), np.zeros_like(asked)
    reader = TableReader(table_fd, stats_fd, 1)
    seen: set[int] = set()
    batches = torn = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        reader.lookup(asked, peers, remotes)
        batches += 1
        torn += bool((remotes != remotes[0]).any())
        seen.add(int(remotes[0]))
    result.send((batches, torn, len(seen)))


@pytest.mark.parametrize("seconds", [1.5, pytest.param(20.0, marks=pytest.mark.full)])
def test_no_batch_is_torn_under_a_writer_in_another_process_at_full_rate(
    seconds: float, table: TableWriter, stats: Stats
) -> None:
    n_peers = 64
    subnets = [IPv4Network((int(NETWORK.network_address) + 256 * i, 24)) for i in range(n_peers)]

    def write(number: int) -> bool:
        for subnet in subnets:
            table.set_peer(subnet, remote(number), 1472)
        return table.publish(stats)

    assert write(0)
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("fork").Process(
        target=read_batches, args=(table.fd, stats.fd, n_peers, seconds, theirs)
    )
    reader.start()
    flips = refused = 0
    while reader.is_alive():
        if write(flips % 200):
            flips += 1
        else:
            refused += 1
    reader.join()
    batches, torn, different = ours.recv()
    print(f"{batches} batches of {n_peers}, {flips} flips, waited {refused}, {different} tables seen, {torn} torn")
    assert torn == 0
    # Else nothing has been tried; on an idle machine it is many times as much.
    assert flips > 20
    assert different > 5

"""The addresses of this host in the shared table: what the worker takes for ours, however many there are."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

import pytest

from tests.datapath.harness import FastDatapath
from tests.packets import LOCALS, NEAR, POD, UNDERLAY, udp
from udptun._fastpath import FIELDS, LAYOUT
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

OWN_NETWORK = IPv4Network("198.18.0.0/15")
"""Of the addresses in this test; the peers' packets may have such sources, too."""
MOST = LAYOUT["max_local"] - 1
"""One is our UDP socket's."""


def some_addresses(n: int, seed: int = 7) -> list[IPv4Address]:
    """At random, as different ones as there are; half of them follow each other, as those of services do."""
    first = int(OWN_NETWORK.network_address)
    offsets = random.Random(seed).sample(range(1 << 16), n - n // 2)
    return [IPv4Address(first + offset) for offset in (*offsets, *range(1 << 16, (1 << 16) + n // 2))]


def refused(fast: FastDatapath, addresses: Collection[IPv4Address]) -> set[IPv4Address]:
    """Which of these the worker takes for addresses of ours, when a peer's packets have them as their source."""
    found = set()
    for address in addresses:
        counts = fast.decap_batch([(udp(str(address), POD), NEAR)]).counts
        if "decap_drop_source_own" in counts:
            found.add(address)
    return found


def published(table: TableWriter) -> set[IPv4Address]:
    """The addresses in the slot that workers use."""
    slot = FIELDS["table"]["slot"][0] + (table.generation & 1) * LAYOUT["slot"]
    (mask,) = struct.unpack("=I", os.pread(table.fd, 4, slot + FIELDS["slot"]["local_mask"][0]))
    entries = os.pread(table.fd, 4 * (mask + 1), slot + FIELDS["slot"]["local"][0])
    return {IPv4Address(entry) for (entry,) in struct.iter_unpack("=I", entries) if entry}


@pytest.fixture
def fast() -> Iterator[FastDatapath]:
    with FastDatapath() as datapath:
        yield datapath


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 17, 1000, MOST])
def test_a_worker_finds_every_address_and_no_other(fast: FastDatapath, n: int) -> None:
    ours = some_addresses(n)
    fast.configure(local_addresses=frozenset(ours))
    asked = {*islice(ours, 500), *ours[-500:], *some_addresses(600, seed=8), IPv4Address(UNDERLAY)}
    assert refused(fast, asked) == asked & {*ours, IPv4Address(UNDERLAY)}


def test_addresses_come_and_go_in_both_slots_of_the_table(fast: FastDatapath) -> None:
    """A table that shrinks leaves entries of before behind, which mean nothing."""
    addresses = some_addresses(300)
    for ours in (addresses, addresses[:3], addresses[3:6], addresses[100:], [], addresses[:1]):
        fast.configure(local_addresses=frozenset(ours))
        assert refused(fast, addresses) == set(ours)
    fast.configure(source_check="strict")
    assert refused(fast, addresses) == set(addresses[:1])


def test_addresses_that_do_not_fit_are_counted_and_the_others_used(fast: FastDatapath) -> None:
    ours = some_addresses(MOST + 20)
    assert fast.set_local_addresses(ours) == 20
    assert refused(fast, {*ours[:50], *ours[-21:]}) == {*ours[:50], ours[-21]}
    assert fast.set_local_addresses(ours[:MOST]) == 0


def test_next_control_plane_leaves_the_published_addresses_until_it_knows_them() -> None:
    stats, first = Stats.create(), TableWriter.create()
    network = IPv4Network("10.0.0.0/8")
    own = next(network.subnets(new_prefix=24))
    first.configure(PacketSettings(network, own, IPv4Address(UNDERLAY), 1472, SourceCheck.PEER))
    first.set_local_addresses(map(IPv4Address, LOCALS))
    assert first.publish(stats)
    assert published(first) == {*map(IPv4Address, (UNDERLAY, *LOCALS))}
    second = TableWriter(first.fd)
    assert second.publish(stats)
    assert published(second) == published(first)
    assert second.generation == 2
    second.close()
    stats.close()

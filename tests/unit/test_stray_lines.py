"""What the operator reads about peers' packets from other addresses than their leases say."""

from __future__ import annotations

import asyncio
import logging
from ipaddress import IPv4Address, IPv4Network
from unittest.mock import Mock

import pytest
import virtual_time

from udptun.datapath.stats import Stats, Stray
from udptun.datapath.strays import StrayWatch
from udptun.datapath.table import TableWriter

HERE, OTHER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
LEASES = {IPv4Network(f"10.244.{n}.0/24"): IPv4Address(f"203.0.113.{n}") for n in range(1, 10)}


class Rig:
    """A watch over what the test says that the workers have seen."""

    def __init__(self) -> None:
        self.strays: list[Stray] = []
        self.leases = dict(LEASES)
        self.learned: set[tuple[IPv4Network, IPv4Address]] = set()
        table = Mock(spec=TableWriter, checks_sources=True)
        table.peer_of = lambda inner: next((it for it in self.leases.items() if inner in it[0]), None)
        table.has_remote = lambda address: address in self.leases.values()
        self.table = table
        stats = Mock(spec=Stats)
        stats.strays = lambda n_workers, since_s: [it for it in self.strays if it.last_s >= 0][: n_workers * 64]
        self.watch = StrayWatch(table, stats, lambda: 1, lambda subnet, outer, last_s: (subnet, outer) in self.learned)

    def see(self, outer: IPv4Address, number: int, datagrams: int = 7) -> None:
        """Packets of lease `number` from this address."""
        self.strays.append(Stray(outer, IPv4Address(f"10.244.{number}.9"), datagrams, 0))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_line_names_address_subnet_number_and_remedy(rig: Rig) -> None:
    rig.see(HERE, 1)
    rig.see(LEASES[IPv4Network("10.244.2.0/24")], 3)
    assert rig.watch.problems == (
        "7 packets of 10.244.1.0/24 came from 192.0.2.1, no host's PublicIP, and were dropped, because the host of "
        "10.244.1.0/24 has the PublicIP 203.0.113.1; if 192.0.2.1 is that host, start its daemon with "
        "--public-ip=192.0.2.1, or have the NAT on the way translate the source of what it sends to 203.0.113.1; "
        "with SourceCheck off packets may come from anywhere",
        rig.watch.problems[1],
    )
    assert "came from 203.0.113.2, the PublicIP of another host, and were" in rig.watch.problems[1]


def test_no_line_when_the_lease_has_changed_is_gone_or_nothing_is_checked(rig: Rig) -> None:
    rig.see(HERE, 1)
    for subnet in LEASES:
        rig.leases[subnet] = HERE
    assert rig.watch.problems == ()
    rig.leases.clear()
    assert rig.watch.problems == ()
    rig.leases.update(LEASES)
    assert len(rig.watch.problems) == 1
    rig.table.checks_sources = False
    assert rig.watch.problems == ()


def test_whoever_spoofs_sources_gets_four_lines(rig: Rig) -> None:
    for n in range(64):
        rig.see(HERE + n, 1 + n % 9, datagrams=64 - n)
    assert [line.split()[0] for line in rig.watch.problems] == ["64", "63", "62", "61", "60"]
    assert rig.watch.problems[4] == "60 more addresses send packets of other hosts' subnets, dropped likewise"


def test_log_gets_a_line_a_minute_each_once_and_one_at_the_end(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        task = asyncio.create_task(rig.watch.run())
        # Seen once only: a host that moved, before its lease has followed.
        rig.see(HERE, 1)
        await asyncio.sleep(1)
        rig.strays.clear()
        await asyncio.sleep(60)
        assert caplog.messages == []
        for n in range(3):
            rig.see(OTHER + n, 1)
        await asyncio.sleep(11)
        assert len(caplog.messages) == 1
        await asyncio.sleep(130)
        assert [it.split()[6].rstrip(",") for it in caplog.messages] == [str(OTHER + n) for n in range(3)]
        await asyncio.sleep(600)
        assert len(caplog.messages) == 3
        rig.strays.clear()
        await asyncio.sleep(600)
        assert caplog.messages[3:] == ["no packets any more from addresses that no lease explains"]
        task.cancel()

    virtual_time.run(main())

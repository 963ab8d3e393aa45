"""Leases of seconds on a real etcd, renewed and ended by real time, under clocks that are set meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from etcd_harness import NEEDS, EtcdHarness

from udptun import membership
from udptun.allocate import Identity, chooser
from udptun.clock import Clock
from udptun.config import parse_net_conf
from udptun.lease import EventType, Lease, LeaseAttrs, LeaseEvent
from udptun.membership import Membership, Start
from udptun.options import parse_daemon_flags
from udptun.stores.base import Chooser
from udptun.stores.etcd import EtcdStore

pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"needs {', '.join(NEEDS)}")

CONFIG = '{"Network": "10.0.0.0/16"}'
CONF = parse_net_conf(CONFIG, "test")

TTL_S = 3
"""etcd grants no less than two seconds."""
MARGIN_S = 1.5
DEADLINE_S = 20.0


class SetClock(Clock):
    """This host's clock, which a test sets."""

    set_by_s = 0.0

    def unix_s(self) -> float:
        return super().unix_s() + self.set_by_s


class ShortLived(EtcdStore):
    """Leases of TTL_S."""

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = TTL_S) -> Lease:
        return await super().claim(attrs, choose, ttl_s)

    async def renew(self, lease: Lease, ttl_s: int = TTL_S) -> Lease:
        return await super().renew(lease, ttl_s)


class Host:
    """What a daemon has of membership."""

    def __init__(self, harness: EtcdHarness, number: int, directory: Path) -> None:
        self.clock = SetClock()
        self.peers: set[str] = set()
        self.removals = 0
        self._attrs = LeaseAttrs(
            IPv4Address(f"192.0.2.{number}"),
            backend_type="udp",
            backend_data={"Port": 8285, "NodeID": f"{number:032x}", "Udptun": 1},
        )
        self._me = Identity(self._attrs.public_ip, 8285, f"{number:032x}")
        self._store = ShortLived(parse_daemon_flags(harness.flags(), {}).etcd, self.clock.unix_s)
        directory.mkdir()
        self.membership = Membership(
            *(self._store, Start(CONFIG), CONF, self._me, directory, MARGIN_S),
            *(lambda lease: None, self._changed, self.clock),
        )
        self.running: asyncio.Task[None] | None = None

    async def _changed(self, events: Sequence[LeaseEvent]) -> None:
        for event in events:
            if event.type is EventType.ADDED:
                self.peers.add(event.lease.key)
            else:
                self.peers.remove(event.lease.key)
                self.removals += 1

    async def start(self) -> None:
        await self.membership.join(self._attrs, chooser(CONF, self._me, None, random.Random(self._me.node_id)))
        await self.membership.catch_up()
        self.running = asyncio.create_task(self.membership.run())

    async def die(self) -> None:
        """As by kill -9: nothing is given back."""
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self._store.aclose()


async def holds(condition: Callable[[], object], what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < DEADLINE_S, what
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def ends_in_history(harness: EtcdHarness, key: str) -> int:
    """How often the key began to be: its version starts at 1 after each end."""
    found = json.loads(harness.etcdctl("get", harness.key(key), "-w", "json"))["kvs"][0]
    return int(found["create_revision"])


def test_short_leases_are_renewed_for_ever_and_end_with_their_host_whatever_the_clocks_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_CLOCK_CHECK_S", 0.2)
    caplog.set_level(logging.INFO, logger="udptun.membership")

    async def main() -> None:
        harness = EtcdHarness(tmp_path)
        harness.etcdctl("put", f"{harness.prefix}/config", CONFIG)
        hosts = [Host(harness, number, tmp_path / str(number)) for number in (1, 2, 3)]
        for host in hosts:
            await host.start()
        keys = [host.membership.own.key for host in hosts]
        await holds(lambda: all(len(host.peers) == 2 for host in hosts), "two peers each")
        made = [await asyncio.to_thread(ends_in_history, harness, key) for key in keys]
        began = time.monotonic()
        for set_by_s in (0, 30 * 86_400, -30 * 86_400):
            hosts[0].clock.set_by_s = set_by_s
            await asyncio.sleep(TTL_S * 0.8)
        print(f"{time.monotonic() - began:.1f} s with leases of {TTL_S} s")
        # None of the keys was ever gone, and nobody lost a peer.
        assert [await asyncio.to_thread(ends_in_history, harness, key) for key in keys] == made
        assert [host.removals for host in hosts] == [0, 0, 0]

        await hosts[2].die()
        seconds = await holds(lambda: all(keys[2] not in host.peers for host in hosts[:2]), "the dead one to be gone")
        print(f"a dead host's lease of {TTL_S} s was gone everywhere after {seconds:.1f} s")
        assert [host.peers for host in hosts[:2]] == [{keys[1]}, {keys[0]}]
        assert all(host.running is not None and not host.running.done() for host in hosts[:2])
        for host in hosts[:2]:
            await host.die()

    asyncio.run(main())
    said = [record.message for record in caplog.records]
    assert sum("lease renewed" in line for line in said) >= 6
    assert sum("the clock was set by" in line for line in said) == 2
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)
    assert not any("our lease is gone" in line for line in said)

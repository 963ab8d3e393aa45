"""Leases of seconds on a real etcd, renewed and ended by real time, under clocks that are set meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

import pytest
from etcd_harness import NEEDS, EtcdHarness
from member import CONFIG, Member, holds
from virtual_time import SetClock

from udptun.config.flags import parse_daemon_flags
from udptun.core.lease import Lease, LeaseAttrs
from udptun.membership import lease_clock
from udptun.stores.base import Chooser
from udptun.stores.etcd.store import EtcdStore

pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"needs {', '.join(NEEDS)}")

TTL_S = 3
"""etcd grants no less than two seconds."""
MARGIN_S = 1.5


class ShortLived(EtcdStore):
    """Leases of TTL_S."""

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = TTL_S) -> Lease:
        return await super().claim(attrs, choose, ttl_s)

    async def renew(self, lease: Lease, ttl_s: int = TTL_S) -> Lease:
        return await super().renew(lease, ttl_s)


def host(harness: EtcdHarness, directory: Path, number: int) -> tuple[Member, SetClock]:
    clock = SetClock()
    store = ShortLived(parse_daemon_flags(harness.flags(), {}).etcd, clock.unix_s)
    return Member(store, directory, number, clock, MARGIN_S), clock


def made_at(harness: EtcdHarness, key: str) -> int:
    """The revision at which the key came into being; it is another one when the key was gone meanwhile."""
    found = json.loads(harness.etcdctl("get", harness.key(key), "-w", "json"))["kvs"][0]
    return int(found["create_revision"])


async def test_short_leases_are_renewed_for_ever_and_end_with_their_host_whatever_the_clocks_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_clock, "CHECK_S", 0.2)
    caplog.set_level(logging.DEBUG, logger="udptun.membership")

    harness = EtcdHarness(tmp_path)
    harness.etcdctl("put", f"{harness.prefix}/config", CONFIG)
    made_members = [host(harness, tmp_path, number) for number in (1, 2, 3)]
    hosts, clock = [member for member, _ in made_members], made_members[0][1]
    for member in hosts:
        await member.start()
    keys = [member.membership.own.key for member in hosts]
    await holds(lambda: all(len(member.peers) == 2 for member in hosts), "two peers each")
    made = [await asyncio.to_thread(made_at, harness, key) for key in keys]
    began = time.monotonic()
    for set_by_s in (0, 30 * 86_400, -30 * 86_400):
        clock.set_by_s = set_by_s
        await asyncio.sleep(TTL_S * 0.8)
    print(f"{time.monotonic() - began:.1f} s with leases of {TTL_S} s")
    # None of the keys was ever gone, and nobody lost a peer.
    assert [await asyncio.to_thread(made_at, harness, key) for key in keys] == made
    assert [member.removals for member in hosts] == [0, 0, 0]

    await hosts[2].die()
    left = hosts[:2]
    seconds = await holds(lambda: all(keys[2] not in member.peers for member in left), "the dead one to be gone")
    print(f"a dead host's lease of {TTL_S} s was gone everywhere after {seconds:.1f} s")
    assert [member.peers for member in left] == [{keys[1]}, {keys[0]}]
    assert all(member.running is not None and not member.running.done() for member in left)
    for member in left:
        await member.die()
    said = [record.message for record in caplog.records]
    assert sum("lease renewed" in line for line in said) >= 6
    assert sum("the clock was set by" in line for line in said) == 2
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)
    assert not any("our lease is gone" in line for line in said)

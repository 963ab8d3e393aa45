"""Hosts on one local store whose machine's clock is set.  Its rows hold times of day, so all of them end at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from member import Member, holds
from virtual_time import SetClock

from udptun.stores.local.store import LocalStore


@pytest.mark.parametrize("set_by_s", [30 * 86_400, -30 * 86_400])
async def test_setting_the_machines_clock_costs_no_host_its_lease_or_a_peer(tmp_path: Path, set_by_s: float) -> None:
    """When it is set forward every row has expired, and whoever looks first deletes them all."""

    clock = SetClock()
    stores = [LocalStore(tmp_path / "leases.db", tmp_path / "net-conf.json", clock.unix_s) for _ in range(4)]
    watching, members = stores[3], [Member(stores[i], tmp_path, i + 1, clock) for i in range(3)]
    for member in members:
        await member.start()
    await holds(lambda: all(len(member.peers) == 2 for member in members), "two peers each")
    keys = {member.membership.own.key for member in members}
    revision = (await watching.snapshot()).revision
    clock.set_by_s = set_by_s
    while set_by_s > 0 and (await watching.snapshot()).revision < revision + 6:
        await asyncio.sleep(0.01)  # each row is deleted and written again
    await asyncio.sleep(1)  # twice the moment of grace of a peer that goes
    leases = (await watching.snapshot()).leases
    assert {lease.key for lease in leases} == keys
    assert all(lease.expires_s is not None and lease.expires_s > clock.unix_s() for lease in leases)
    assert [member.removals for member in members] == [0, 0, 0]
    assert [member.membership.problems for member in members] == [(), (), ()]
    for member in members:
        await member.die()
    await watching.aclose()

"""What the `file` store does beyond the contract: entries, the own one, edits good and bad."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_harness import NET_CONF, first_free, host, watching

from udptun.core.errors import ConfigError, LeaseLostError
from udptun.core.lease import EventType, LeaseAttrs
from udptun.stores.base import Snapshot
from udptun.stores.file import FileStore, parse, write_starter

A = {"Subnet": "10.244.1.0/24", "PublicIP": "198.18.0.1", "Port": 8285, "Node": "a"}
B = {"Subnet": "10.244.2.0/24", "PublicIP": "198.18.0.2", "Port": 8285, "Node": "b"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "net-conf.json").write_text(NET_CONF)
    return tmp_path / "leases.json"


def store_at(path: Path, node: str | None = None) -> FileStore:
    return FileStore(path, path.with_name("net-conf.json"), node)


def put(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def snapshot_of(path: Path) -> Snapshot:
    return asyncio.run(store_at(path).snapshot())


# Reading


def test_an_entry_may_have_both_families_or_ipv6_alone() -> None:
    both = {**A, "IPv6Subnet": "fd00:0:0:1::/64", "PublicIPv6": "fd99::1"}
    alone = {"IPv6Subnet": "fd00:0:0:2::/64", "PublicIPv6": "fd99::2"}
    overlapping = {**B, "IPv6Subnet": "fd00:0:0:2:8000::/65"}
    found = parse(json.dumps([both, alone, overlapping, B]))
    assert [entry.lease.key for entry in found.entries] == [
        "10.244.1.0-24&fd00:0:0:1::-64",
        "fd00:0:0:2::-64",
        "10.244.2.0-24",
    ]
    assert [str(entry.lease.attrs.public_ipv6) for entry in found.entries] == ["fd99::1", "fd99::2", "None"]
    assert found.skipped == ("entry 3: subnet fd00:0:0:2:8000::/65 overlaps entry 2",)


def test_keys_are_matched_without_case_and_port_and_node_may_be_absent() -> None:
    (entry,) = parse('[{"subnet": "10.244.1.0/24", "publicip": "192.0.2.1"}]').entries
    assert entry.lease.key == "10.244.1.0-24"
    assert entry.lease.attrs.to_json() == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"udp","BackendData":{"Udptun":1}}'
    )
    assert entry.lease.attrs.port(4000) == 4000
    assert entry.lease.expires_s is None
    assert entry.node is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "not a JSON object"),
        (["10.244.3.0/24"], "not a JSON object"),
        ({}, "Subnet is missing, and so is IPv6Subnet"),
        ({"Subnet": "10.244.3.0/24"}, "PublicIP is missing, and so is PublicIPv6"),
        ({"IPv6Subnet": "fd00::/64"}, "PublicIP is missing, and so is PublicIPv6"),
        ({**A, "IPv6Subnet": ""}, "IPv6Subnet is empty"),
        ({**A, "IPv6Subnet": "fd00::/129"}, 'IPv6Subnet "fd00::/129": \'129\' is not a valid netmask'),
        ({**A, "Subnet": 10}, "Subnet 10 is not a text"),
        ({**A, "Subnet": "10.244.3.0"}, "has no prefix length"),
        ({**A, "Subnet": "10.244.3.1/24"}, "has host bits set"),
        ({**A, "Subnet": "fd00::/64"}, 'Subnet "fd00::/64": Expected 4 octets'),
        ({**A, "PublicIP": "2001:db8::1"}, 'PublicIP "2001:db8::1": Expected 4 octets'),
        ({**A, "PublicIP": "host-a"}, "Expected 4 octets"),
        ({**A, "Port": 0}, "Port 0 is not a whole number from 1 to 65535"),
        ({**A, "Port": 65536}, "Port 65536 is not"),
        ({**A, "Port": "8285"}, 'Port "8285" is not'),
        ({**A, "Port": True}, "Port true is not"),
        ({**A, "Port": 8285.0}, "Port 8285.0 is not"),
        ({**A, "Node": 3}, "Node 3 is not a text"),
        ({**A, "Prot": 8285}, "unknown key 'Prot'; known are Subnet, PublicIP, IPv6Subnet, PublicIPv6, Port, Node"),
        ({**A, "port": 9000}, "Port is there twice"),
        ({**A, "IPv6Subnet": "fd00::"}, "IPv6Subnet fd00:: has no prefix length; write it as fd00:244:0:1::/64"),
        ({**A, "IPv6Subnet": "10.244.3.0/24"}, 'IPv6Subnet "10.244.3.0/24": At least 3 parts expected'),
        ({"IPv6Subnet": "fd00::/64", "PublicIPv6": "192.0.2.7"}, 'PublicIPv6 "192.0.2.7": At least 3 parts expected'),
        ({**A, "PublicIPv6": "fe80::1%eth0"}, "'fe80::1%eth0' has a zone"),
        ({**A, "IPv6Subnet": "fd00::%eth0/64"}, "'fd00::%eth0/64' has a zone"),
        (B, "subnet 10.244.2.0/24 overlaps entry 1"),
        ({**A, "Subnet": "10.244.0.0/16"}, "subnet 10.244.0.0/16 overlaps entry 1"),
        ({**A, "Subnet": "10.244.2.128/25"}, "subnet 10.244.2.128/25 overlaps entry 1"),
    ],
)
def test_a_bad_entry_is_refused_by_its_number_and_costs_no_other(entry: object, reason: str) -> None:
    after = {"Subnet": "10.244.9.0/24", "PublicIP": "192.0.2.9"}
    leases = parse(json.dumps([B, entry, after]))
    assert [used.number for used in leases.entries] == [1, 3]
    (line,) = leases.skipped
    assert line.startswith("entry 2: ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 column 1: Expecting value"),
        ("[\n{]", "line 2 column 2"),
        ('[{"Subnet": "10.244.1.0/24", "PublicIP"', "line 1 column 40"),
        ('{"leases": []}', "not a JSON list"),
        ("null", "not a JSON list"),
        ("[" * 100_000, "not usable JSON"),
        ("[" + "9" * 10_000 + "]", "not usable JSON"),
    ],
)
def test_a_file_that_is_no_list_is_refused_as_a_whole(path: Path, text: str, reason: str) -> None:
    put(path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        snapshot_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_what_to_do(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no leases file .*; write a starter with: udptun lease init .*"):
        snapshot_of(path)
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read the leases file .*: Is a directory"):
        snapshot_of(path)
    path.rmdir()
    path.write_bytes(b'[{"Node": "\xff"}]')
    with pytest.raises(ConfigError, match=r"cannot use the leases file .*: not UTF-8 at byte 11"):
        snapshot_of(path)


def test_a_byte_order_mark_is_no_error(path: Path) -> None:
    path.write_text(json.dumps([A]), encoding="utf-8-sig")
    assert len(snapshot_of(path).leases) == 1


# The own entry


def claim(path: Path, attrs: LeaseAttrs, node: str | None = None) -> str:
    return asyncio.run(store_at(path, node).claim(attrs, first_free)).key


def test_the_own_entry_is_found_by_address(path: Path) -> None:
    put(path, [A, B])
    assert claim(path, host(2)) == "10.244.2.0-24"


def test_the_own_entry_is_found_by_port_when_hosts_share_an_address(path: Path) -> None:
    put(path, [A, {**B, "PublicIP": A["PublicIP"], "Port": 9000}])
    assert claim(path, host(1, port=9000)) == "10.244.2.0-24"
    assert claim(path, host(1, port=8285)) == "10.244.1.0-24"


def test_the_own_entry_is_found_by_name_whatever_the_address(path: Path) -> None:
    put(path, [A, B])
    assert claim(path, host(77), node="b") == "10.244.2.0-24"


@pytest.mark.parametrize(
    ("entries", "node", "message"),
    [
        ([B], None, r'has no usable entry with PublicIP 198\.18\.0\.1: add one with "PublicIP": "198\.18\.0\.1"'),
        ([{**A, "Port": 0}, B], None, r"no usable entry .* \(entry 1: Port 0 is not .*\): add one"),
        ([A, B], "c", 'has no usable entry with Node \'c\': add one with "Node": "c" for this host'),
        ([A, {**B, "PublicIP": A["PublicIP"]}], None, "entries 1, 2 all have .*: which is this host's"),
        ([A, {**B, "Node": "a"}], "a", "entries 1, 2 all have Node 'a'"),
        ([{**A, "Port": 9000}], None, "entry 1 says Port 9000 for .* this daemon listens on 8285"),
    ],
)
def test_a_claim_says_what_to_write_when_the_own_entry_is_not_plain(
    path: Path, entries: list[object], node: str | None, message: str
) -> None:
    put(path, entries)
    with pytest.raises(ConfigError, match=message) as caught:
        claim(path, host(1), node)
    assert "\n" not in str(caught.value)


async def test_the_file_decides_and_the_chooser_is_not_asked(path: Path) -> None:
    put(path, [A])
    asked: list[object] = []

    store = store_at(path)
    lease = await store.claim(host(1), asked.append, ttl_s=5)  # type: ignore[arg-type]
    assert (lease.key, lease.expires_s) == ("10.244.1.0-24", None)
    before = path.read_bytes()
    await store.release(lease)
    assert path.read_bytes() == before
    assert asked == []


@pytest.mark.parametrize("kind", ["udp", "host-gw", ""])
async def test_the_others_have_the_backend_that_is_claimed_with(path: Path, kind: str) -> None:
    """Every entry was an udp lease: with host-gw each host skipped all others, and said that it was ready."""
    put(path, [A, B])

    store = store_at(path)
    own = await store.claim(replace(host(1), backend_type=kind), first_free)
    (other,) = [lease for lease in (await store.snapshot()).leases if lease.key != own.key]
    assert (other.attrs.backend_type, other.attrs.port(0)) == (kind, 8285)
    async with watching(store) as watcher:
        put(path, [A, {**B, "PublicIP": "198.18.0.9"}])
        await watcher.until(lambda: str(watcher.leases[other.key].attrs.public_ip) == "198.18.0.9")
        assert watcher.leases[other.key].attrs.backend_type == kind


async def test_renewing_follows_the_own_entry_to_another_subnet_as_a_lost_lease(path: Path) -> None:
    put(path, [A, B])

    store = store_at(path)
    lease = await store.claim(host(1), first_free)
    put(path, [{**A, "Subnet": "10.244.5.0/24"}, B])
    with pytest.raises(
        LeaseLostError, match=r"cannot keep 10\.244\.1\.0/24: .* now gives this host 10\.244\.5\.0/24"
    ):
        await store.renew(lease)
    assert (await store.claim(host(1), first_free)).key == "10.244.5.0-24"


# Edits while it is in use


async def test_a_bad_edit_keeps_the_last_good_leases_and_says_why_once(path: Path) -> None:
    put(path, [A, B])

    store = store_at(path)
    async with watching(store) as watcher:
        both = dict(watcher.leases)
        put(path, "[{")
        await watcher.until(lambda: len(watcher.skipped()) == 1)
        put(path, "[ {")
        await watcher.until(lambda: len(watcher.skipped()) == 2)
        path.unlink()
        await watcher.until(lambda: len(watcher.skipped()) == 3)
        # A new file with nothing new in it is no news; the next one is.
        put(path, [A, B])
        put(path, [A])
        await watcher.until(lambda: len(watcher.leases) == 1)
        assert [lease.key for lease in watcher.events(EventType.REMOVED)] == ["10.244.2.0-24"]
        assert watcher.refused == set()
        first, second, third = watcher.skipped()
        assert "line 1 column 3" in first
        assert "line 1 column 4" in second
        assert "there is no leases file" in third
        assert all(line.endswith("; the last good leases stay in force") for line in (first, second, third))
        assert [event for batch in watcher.batches[:3] for event in batch.events] == []
        assert len(both) == 2


async def test_a_claim_and_a_snapshot_use_the_last_good_leases_when_the_file_is_bad(path: Path) -> None:
    put(path, [A, B])

    store = store_at(path)
    before = await store.snapshot()
    put(path, "")
    after = await store.snapshot()
    assert (after.leases, after.revision) == (before.leases, before.revision)
    assert len(after.skipped) == 1
    assert (await store.claim(host(1), first_free)).key == "10.244.1.0-24"


async def test_an_entry_going_bad_is_told_once_and_removes_its_own_lease_only(path: Path) -> None:
    put(path, [A, B])

    store = store_at(path)
    async with watching(store) as watcher:
        put(path, [A, {**B, "Port": 0}])
        await watcher.until(lambda: len(watcher.leases) == 1)
        put(path, [{**A, "Port": 9000}, {**B, "Port": 0}])
        await watcher.until(lambda: watcher.leases["10.244.1.0-24"].attrs.port(0) == 9000)
        assert watcher.skipped() == ["entry 2: Port 0 is not a whole number from 1 to 65535"]


async def test_edits_of_the_same_length_within_one_clock_tick_are_all_seen(path: Path) -> None:
    put(path, [A])

    store = store_at(path)
    for number in range(300):
        put(path, [{**A, "Port": 8000 + number}])
        (lease,) = (await store.snapshot()).leases
        assert lease.attrs.port(0) == 8000 + number


async def test_an_edit_is_seen_when_the_editor_sets_the_time_and_length_back(path: Path) -> None:
    put(path, [A])
    status = path.stat()

    store = store_at(path)
    async with watching(store) as watcher:
        put(path, [{**A, "Port": 9285}])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        await watcher.until(lambda: watcher.leases["10.244.1.0-24"].attrs.port(0) == 9285)


# udptun lease init


def test_the_starter_is_a_valid_file_of_two_hosts_and_is_never_overwritten(path: Path) -> None:
    write_starter(path)
    leases = parse(path.read_text())
    assert [(str(entry.lease.subnet), str(entry.lease.attrs.public_ip)) for entry in leases.entries] == [
        ("10.244.1.0/24", "192.0.2.1"),
        ("10.244.2.0/24", "192.0.2.2"),
    ]
    assert leases.skipped == ()
    starter = path.read_text()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already and was left as it is"):
        write_starter(path)
    assert path.read_text() == "mine"
    write_starter(path, force=True)
    assert path.read_text() == starter
    with pytest.raises(ConfigError, match=r"cannot write the leases file .*: No such file or directory"):
        write_starter(path.parent / "missing" / "leases.json")

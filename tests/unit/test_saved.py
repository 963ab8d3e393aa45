"""The last good lease table, in the state directory."""

from __future__ import annotations

import asyncio
import json
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from udptun.core.errors import KernelError
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.membership import saved
from udptun.membership.child_writer import ChildWriter
from udptun.membership.saved import LastLeases, load, load_own, parse, render

NETWORK = IPv4Network("10.244.0.0/16")
NOW_S = 1_700_000_000.0


def lease(number: int, expires_s: float | None = NOW_S + 100) -> Lease:
    attrs = LeaseAttrs(IPv4Address(f"192.0.2.{number}"), backend_type="udp", backend_data={"Port": 8285, "Udptun": 1})
    return Lease(Subnets(IPv4Network(f"10.244.{number}.0/24")), attrs, expires_s)


def save(directory: Path, last: LastLeases, now_s: float) -> None:
    asyncio.run(saved.save(ChildWriter(), directory, last, now_s))


def forget(directory: Path) -> None:
    asyncio.run(saved.forget(ChildWriter(), directory))


CONFIG = '{"Network": "10.244.0.0/16"}'

LAST = LastLeases(CONFIG, NETWORK, lease(1), (lease(2), lease(3, NOW_S + 10), lease(4, None)))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, LAST, NOW_S)
    found = load(tmp_path, NETWORK, NOW_S)
    assert (found.last, found.reason) == (LAST, "")
    assert [path.name for path in tmp_path.iterdir()] == ["last-leases.json"]


def test_what_is_saved_is_loaded_without_knowing_its_network(tmp_path: Path) -> None:
    """The store, which may be where the network config is, does not answer."""
    save(tmp_path, LAST, NOW_S)
    assert load(tmp_path, None, NOW_S).last == LAST


def test_our_own_lease_is_loaded_alone_until_it_has_expired(tmp_path: Path) -> None:
    assert load_own(tmp_path, NOW_S) is None
    save(tmp_path, LAST, NOW_S)
    assert load_own(tmp_path, NOW_S) == LAST.own
    assert load_own(tmp_path, NOW_S + 101) is None
    # Not a look at the peers: thousands of them take a second.
    whole = (tmp_path / "last-leases.json").read_text()
    (tmp_path / "last-leases.json").write_text(whole.splitlines()[0] + "\nno leases")
    assert load_own(tmp_path, NOW_S) == LAST.own


def test_what_is_forgotten_is_not_loaded(tmp_path: Path) -> None:
    forget(tmp_path)
    save(tmp_path, LAST, NOW_S)
    forget(tmp_path)
    assert load(tmp_path, NETWORK, NOW_S).last is None


def test_only_unexpired_peers_are_loaded(tmp_path: Path) -> None:
    save(tmp_path, LAST, NOW_S)
    found = load(tmp_path, NETWORK, NOW_S + 10)
    assert found.last is not None
    assert found.last.peers == (lease(2), lease(4, None))


def test_nothing_is_used_when_the_own_lease_has_expired() -> None:
    found = parse(render(LAST, NOW_S), NETWORK, NOW_S + 100)
    assert (found.last, found.reason) == (None, "our lease 10.244.1.0/24 in it has expired")


def test_nothing_is_used_of_another_network() -> None:
    found = parse(render(LAST, NOW_S), IPv4Network("10.0.0.0/8"), NOW_S)
    assert (found.last, found.reason) == (None, "it is about Network 10.244.0.0/16, not 10.0.0.0/8")


def test_nothing_is_used_when_the_clock_is_far_behind_the_time_of_saving() -> None:
    text = render(LAST, NOW_S)
    assert parse(text, NETWORK, NOW_S - 60).last == LAST
    found = parse(text, NETWORK, 1000.0)
    assert found.last is None
    assert "in the future: the clock is wrong" in found.reason


CONTENT = json.loads(render(LAST, NOW_S))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        "last leases",
        {**CONTENT, "schema": 3},
        {**CONTENT, "config": {}},
        {**CONTENT, "saved_at": "yesterday"},
        {**CONTENT, "saved_at": float("nan")},
        {**CONTENT, "network": 10},
        {**CONTENT, "network": "fd00::/48"},
        {**CONTENT, "own": None},
        {**CONTENT, "own": {**CONTENT["own"], "key": 7}},
        {**CONTENT, "own": {**CONTENT["own"], "key": "10.244.1.7-24"}},
        {**CONTENT, "own": {**CONTENT["own"], "value": {}}},
        {**CONTENT, "own": {**CONTENT["own"], "value": "{}"}},
        {**CONTENT, "own": {**CONTENT["own"], "expires": "never"}},
        {**CONTENT, "peers": 3},
        {**CONTENT, "peers": [{}]},
        {**CONTENT, "peers": [CONTENT["own"], 7]},
    ],
)
def test_damaged_content_is_ignored_with_one_line(tmp_path: Path, content: Any) -> None:
    (tmp_path / "last-leases.json").write_text(json.dumps(content).replace('"peers": [', '"peers": [\n'))
    found = load(tmp_path, NETWORK, NOW_S)
    assert found.last is None
    assert found.reason.startswith(f"ignoring {tmp_path}/last-leases.json: ")
    assert "\n" not in found.reason
    assert load_own(tmp_path, NOW_S) in (None, LAST.own)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, render(LAST, NOW_S).encode()[:-20]])
def test_a_file_that_is_no_json_is_ignored_with_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "last-leases.json").write_bytes(data)
    found = load(tmp_path, NETWORK, NOW_S)
    assert found.last is None
    assert "last-leases.json" in found.reason
    assert "\n" not in found.reason


def test_a_missing_file_is_a_reason_and_no_error(tmp_path: Path) -> None:
    found = load(tmp_path, NETWORK, NOW_S)
    assert found.last is None
    assert "No such file" in found.reason


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save(tmp_path, LAST, NOW_S)
    (tmp_path / "last-leases.json").unlink()
    (tmp_path / "last-leases.json").mkdir()
    with pytest.raises(KernelError, match=r"cannot write .*last-leases\.json: EISDIR; a restart will wait"):
        save(tmp_path, LAST, NOW_S)
    assert [path.name for path in tmp_path.iterdir()] == ["last-leases.json"]
    with pytest.raises(KernelError, match="ENOENT"):
        save(tmp_path / "missing", LAST, NOW_S)

"""Everything in bad_data.py: one line each, no other harm."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from bad_data import CONFIGS, GOOD, LEASES, SUBNET_ENVS

from udptun.backends.choice import parse_net_conf
from udptun.config import subnet_env
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError, Subnets
from udptun.core.lease_table import LeaseTable

NETWORK = IPv4Network("10.244.0.0/16")
OWN = IPv4Network("10.244.3.0/24")
OWN_IP = IPv4Address("192.0.2.3")
GOOD_KEY = "10.244.200.0-24"


def table() -> LeaseTable:
    found = LeaseTable(
        *(Family.IPV4, NETWORK, (NETWORK,), OWN, lambda lease: lease.attrs.public_ip == OWN_IP, lambda lease: None),
        outer=lambda attrs: Family.IPV4,
    )
    found.reset([Lease(Subnets.from_key(GOOD_KEY), LeaseAttrs.from_json(GOOD))])
    return found


def what_is_said(peers: LeaseTable, key: str, value: str) -> list[str]:
    """The lines about one item of a store: of the store's reading, or of the table."""
    try:
        lease = Lease(Subnets.from_key(key), LeaseAttrs.from_json(value))
    except LeaseFormatError as exc:
        return [f"lease {key!r}: {exc}"]
    known = list(peers.peers.values())
    peers.reset([*known, lease])
    return [f"{key}: {reason}" for key, reason in peers.refused.items()]


def test_there_are_enough_of_them(figure: Callable[..., None]) -> None:
    figure("kinds of bad leases, configs and subnet.env, a line each", len(LEASES) + len(CONFIGS) + len(SUBNET_ENVS))
    assert len(LEASES) + len(CONFIGS) + len(SUBNET_ENVS) >= 100
    assert len({key for key, _, _ in LEASES}) > 40


@pytest.mark.parametrize(("key", "value", "reason"), LEASES, ids=range(len(LEASES)))
def test_a_bad_lease_is_one_line_and_costs_no_peer(key: str, value: str, reason: str) -> None:
    peers = table()
    (line,) = what_is_said(peers, key, value)
    assert reason in line
    assert "\n" not in line
    assert set(peers.peers) == {GOOD_KEY}


@pytest.mark.parametrize(
    ("key", "public_ip", "reason"),
    [
        ("10.244.3.0-25", "192.0.2.9", "subnet 10.244.3.0/25 overlaps our own lease 10.244.3.0/24"),
        ("10.244.0.0-20", "192.0.2.9", "subnet 10.244.0.0/20 overlaps our own lease 10.244.3.0/24"),
        ("10.244.9.0-24", str(OWN_IP), "PublicIP 192.0.2.3 is our own"),
        ("10.244.200.128-25", "192.0.2.9", "subnet 10.244.200.128/25 overlaps the lease 10.244.200.0-24"),
    ],
)
def test_a_lease_that_gets_in_the_way_is_one_line_and_costs_no_peer(key: str, public_ip: str, reason: str) -> None:
    peers = table()
    assert what_is_said(peers, key, GOOD.replace("192.0.2.200", public_ip)) == [f"{key}: {reason}"]
    assert set(peers.peers) == {GOOD_KEY}


def test_our_own_lease_is_no_peer_and_nothing_to_speak_of() -> None:
    peers = table()
    assert what_is_said(peers, "10.244.3.0-24", GOOD.replace("192.0.2.200", str(OWN_IP))) == []
    assert set(peers.peers) == {GOOD_KEY}


def test_all_bad_leases_at_once_are_a_line_each() -> None:
    peers = table()
    lines = [line for key, value, _ in LEASES for line in what_is_said(peers, key, value)[-1:]]
    assert len(lines) == len(LEASES)
    assert set(peers.peers) == {GOOD_KEY}


@pytest.mark.parametrize(("text", "reason"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_bad_config_is_a_line_for_each_problem(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_net_conf(text, "net-conf.json")
    assert reason in caught.value.problems[0]
    assert len(caught.value.problems) == 1
    assert all("\n" not in line and len(line) < 400 for line in caught.value.problems)


@pytest.mark.parametrize(("content", "reason"), SUBNET_ENVS, ids=range(len(SUBNET_ENVS)))
def test_a_bad_subnet_env_is_one_line_and_no_previous_subnet(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(content)
    previous, wrong = subnet_env.read_previous(path)
    assert previous is None
    assert wrong.startswith(f"{path}: ")
    assert reason in wrong
    assert "\n" not in wrong
    assert len(wrong) < 400

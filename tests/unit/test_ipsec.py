"""Which IPsec policies mean the tunnel's datagrams."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.core.tunnel_path import TunnelPath
from udptun.kernel.ipsec import Policy, decode_policy, find_policy

OWN, PEER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
PATH = TunnelPath("eth0", OWN, 8285, (PEER, IPv4Address("198.51.100.7")), 8286, looks_answered=True)
ANY, ANY_PORT = "0.0.0.0/0", (0, 0)
TEMPLATE = struct.pack("=HH64s", 68, 5, b"")


def body(*, direction: int, action: int = 0, family: int = 2, of: bytes = TEMPLATE) -> bytes:
    """Of a policy from 192.0.2.1 port 8285 to 192.0.2.0/24 by UDP."""
    selector = struct.pack("!16s16s4H", bytes([192, 0, 2, 0]), OWN.packed, 0, 0, 8285, 0xFFFF)
    selector += struct.pack("=HBBBxxxiI", family, 24, 32, 17, 0, 0)
    return selector + bytes(104) + bytes([direction, action]) + bytes(6) + of


def test_a_policy_is_read_by_its_direction() -> None:
    own, other = IPv4Network("192.0.2.1/32"), IPv4Network("192.0.2.0/24")
    assert decode_policy(body(direction=1)) == Policy("out", own, other, 17, (8285, 0xFFFF), ANY_PORT)
    assert decode_policy(body(direction=0)) == Policy("in", other, own, 17, ANY_PORT, (8285, 0xFFFF))
    assert decode_policy(body(direction=1, action=1, of=b"")) == decode_policy(body(direction=1))


@pytest.mark.parametrize(
    "ignored",
    [body(direction=2), body(direction=4), body(direction=1, family=10), body(direction=1, of=b"")],
    ids=["forwarded", "of a socket", "IPv6", "lets all pass"],
)
def test_policies_that_mean_other_packets_are_left_out(ignored: bytes) -> None:
    assert decode_policy(ignored) is None


@pytest.mark.parametrize(
    ("own", "other", "protocol", "own_port", "other_port", "is_found"),
    [
        (ANY, ANY, 0, ANY_PORT, ANY_PORT, True),
        ("192.0.2.1/32", "192.0.2.2/32", 17, (8285, 0xFFFF), (8286, 0xFFFF), True),
        (ANY, "198.51.100.0/24", 17, (0x2000, 0xF000), ANY_PORT, True),
        (ANY, "203.0.113.0/24", 0, ANY_PORT, ANY_PORT, False),
        ("192.0.2.9/32", ANY, 0, ANY_PORT, ANY_PORT, False),
        (ANY, ANY, 6, ANY_PORT, ANY_PORT, False),
        (ANY, ANY, 17, (53, 0xFFFF), ANY_PORT, False),
        (ANY, ANY, 17, ANY_PORT, (53, 0xFFFF), False),
    ],
    ids=["all", "exactly", "a range", "other hosts", "another address", "TCP", "another port", "another port there"],
)
def test_a_policy_covers_the_tunnel_by_addresses_protocol_and_ports(
    own: str, other: str, protocol: int, own_port: tuple[int, int], other_port: tuple[int, int], is_found: bool
) -> None:
    policy = Policy("out", IPv4Network(own), IPv4Network(other), protocol, own_port, other_port)
    assert bool(find_policy([policy], PATH)) is is_found
    if is_found:
        line = f"the IPsec policy `src {own} dst {other} dir out` covers packets of the tunnel"
        assert find_policy([policy], PATH) == line

"""Messages there and back: what is encoded for a change reads like what the kernel sends in a dump."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from udptun.core.network_state import FdbEntry, Neighbour, Route, RouteType
from udptun.kernel import rtnetlink

SUBNET = IPv4Network("10.244.3.0/24")


@pytest.mark.parametrize(
    "route",
    [
        Route(SUBNET, oif=7),
        Route(SUBNET, IPv4Address("10.244.3.0"), 7, onlink=True),
        Route(SUBNET, IPv4Address("192.0.2.3"), 2, metric=5, prefsrc=IPv4Address("192.0.2.1"), mtu=1400),
        Route(IPv4Network("10.244.0.0/16"), type=RouteType.UNREACHABLE, metric=0xFFFFFFFF),
        Route(IPv4Network("0.0.0.0/0"), IPv4Address("192.0.2.254"), 2, table=1000),
        Route(IPv4Network("203.0.113.7/32"), IPv6Address("fe80::1"), 2),
        Route(IPv6Network("fd00:244::/64"), oif=7),
    ],
)
def test_a_route_reads_as_it_was_written(route: Route) -> None:
    assert rtnetlink.decode_route(rtnetlink.add_route(route).body) == route


def test_a_neighbour_and_an_fdb_entry_read_as_they_were_written() -> None:
    neighbour = Neighbour(7, IPv4Address("10.244.3.0"), "02:00:00:00:00:03")
    entry = FdbEntry(7, "02:00:00:00:00:03", IPv4Address("192.0.2.3"))
    assert rtnetlink.decode_neighbour(rtnetlink.set_neighbour(neighbour).body) == neighbour
    assert rtnetlink.decode_fdb_entry(rtnetlink.set_fdb(entry).body) == entry


def test_a_neighbour_without_a_mac_and_an_fdb_entry_without_a_destination_are_none() -> None:
    head = struct.pack("=BxxxiHBB", 2, 7, 0x01, 0, 0)
    assert rtnetlink.decode_neighbour(head + struct.pack("=HH4s", 8, 1, bytes([10, 244, 3, 0]))) is None
    assert rtnetlink.decode_fdb_entry(head + struct.pack("=HH6sxx", 10, 2, bytes(6))) is None


def test_the_first_of_several_next_hops_counts() -> None:
    """`nexthop via 192.0.2.7 dev if2 nexthop via 192.0.2.8 dev if3`."""
    hops = b"".join(
        struct.pack("=HBBi", 16, 0, 0, oif) + struct.pack("=HH4s", 8, 5, bytes([192, 0, 2, last]))
        for oif, last in ((2, 7), (3, 8))
    )
    body = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("=HH", 4 + len(hops), 9) + hops
    found = rtnetlink.decode_route(body)
    assert (found.gateway, found.oif, found.dst) == (IPv4Address("192.0.2.7"), 2, IPv4Network("0.0.0.0/0"))


def test_messages_of_one_datagram_are_told_apart_by_their_sequence_numbers() -> None:
    requests = [rtnetlink.add_route(Route(SUBNET, oif=n)) for n in (1, 2, 3)]
    data = b"".join(request.encode(10 + n) for n, request in enumerate(requests))
    found = list(rtnetlink.messages(data))
    assert [sequence for _, _, sequence, _ in found] == [10, 11, 12]
    assert [rtnetlink.decode_route(body).oif for _, _, _, body in found] == [1, 2, 3]
    assert all(flags & rtnetlink.F_ACK for _, flags, _, _ in found)
    assert list(rtnetlink.messages(bytes(16))) == [], "a length of nothing ends it"


def test_a_refusal_has_the_kernels_number_and_words() -> None:
    """struct nlmsgerr: the error, the header of what was asked, and with NETLINK_CAP_ACK no more of it."""
    asked = rtnetlink.HEADER.pack(60, rtnetlink.NEWROUTE, 0x605, 1, 0)
    text = b"Nexthop has invalid gateway\0"
    words = struct.pack("=HH", 4 + len(text), 1) + text
    body = struct.pack("=i", -101) + asked + words
    assert rtnetlink.decode_error(body, 0x300) == (101, "Nexthop has invalid gateway")
    assert rtnetlink.decode_error(struct.pack("=i", -17) + asked, 0x100) == (17, "")
    assert rtnetlink.decode_error(struct.pack("=i", 0) + asked, 0x100) == (0, "")

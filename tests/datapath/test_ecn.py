"""Marks of congestion through the tunnel (RFC 6040), field by field, and what must not be put together because of them.

The tables here are the RFC's, written down once more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.datapath.harness import Datapath, FastDatapath, Message, assert_same_packets, trains
from tests.datapath.test_coalesce import part
from tests.datapath.test_super_packets import Super
from tests.packets import (
    DEAF_POD,
    GSO_ECN,
    GSO_TCPV4,
    MTU,
    NARROW,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    PARTIAL,
    POD,
    TCP_ACK,
    TCP_CWR,
    icmp_answer_to_peer,
    ipv4,
    pattern,
    stepped,
    tcp_segment,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from udptun.core.offload import Offload

NOT_ECT, ECT_1, ECT_0, CE = range(4)
FIELDS = pytest.mark.parametrize("inner", range(4), ids=("not-ect", "ect1", "ect0", "ce"))

DELIVERED = {
    # Inner field: what comes out of an outer packet that is Not-ECT, ECT(1), ECT(0), CE (RFC 6040, figure 4).
    NOT_ECT: (NOT_ECT, NOT_ECT, NOT_ECT, None),
    ECT_0: (ECT_0, ECT_1, ECT_0, CE),
    ECT_1: (ECT_1, ECT_1, ECT_1, CE),
    CE: (CE, CE, CE, CE),
}
DSCP = 0xB8


def inward(ecn: int, *, dscp: int = DSCP, ident: int = 1, ttl: int = 64) -> bytes:
    segment = udp_segment(NEAR_POD, POD, b"from a peer")
    return ipv4(NEAR_POD, POD, segment, tos=dscp | ecn, ident=ident, ttl=ttl)


def outward(ecn: int, destination: str = NEAR_POD, *, number: int = 0, n_bytes: int = 100) -> bytes:
    segment = udp_segment(POD, destination, pattern(n_bytes, number))
    return NO_VNET_HDR + ipv4(POD, destination, segment, tos=DSCP | ecn, ident=number)


@FIELDS
@pytest.mark.parametrize("outer", range(4), ids=("outer-not-ect", "outer-ect1", "outer-ect0", "outer-ce"))
def test_a_mark_on_the_way_reaches_the_packet_inside(datapath: Datapath, inner: int, outer: int) -> None:
    """It was lost with the outer header: the flow went on as fast until the queue that had marked it was full."""
    packet = inward(inner)
    batch = datapath.decap_messages([Message(packet, NEAR, ecn=outer)])
    expected = DELIVERED[inner][outer]
    if expected is None:
        assert batch.counts == {"decap_packets": 1, "decap_drop_ce": 1}
        assert batch.writes == []
        return
    delivered = with_header_checksum(packet[:1] + bytes([DSCP | expected]) + packet[2:])
    assert batch.writes == [NO_VNET_HDR + stepped(delivered)]


@pytest.mark.parametrize("ident", [0, 1, 0xFFFE, 0xFFFF, *range(0xE9A0, 0xE9C0)])
def test_the_header_checksum_is_right_after_a_mark_whatever_it_was(datapath: Datapath, ident: int) -> None:
    packet = inward(ECT_0, ident=ident)
    batch = datapath.decap_messages([Message(packet, NEAR, ecn=CE)])
    assert batch.writes == [NO_VNET_HDR + stepped(inward(CE, ident=ident))]


def test_what_is_dropped_for_its_ttl_is_quoted_as_the_peer_sent_it(datapath: Datapath) -> None:
    packet = inward(ECT_0, ttl=1)
    batch = datapath.decap_messages([Message(packet, NEAR, ecn=CE)])
    assert batch.counts == {"decap_packets": 1, "decap_drop_ttl": 1, "icmp_sent": 1}
    assert list(batch.sends.values()) == [[icmp_answer_to_peer(11, 0, packet, source=OWN)]]


@FIELDS
def test_the_outer_packet_has_the_inner_field_only_on_the_way_to_a_peer_that_carries_marks_on(
    fast: FastDatapath, inner: int
) -> None:
    """NARROW does not, but with VXLAN all do.  The DSCP stays inside."""
    assert fast.encap_tos([outward(inner)]) == [inner]
    assert fast.encap_tos([outward(inner, NARROW_POD)], NARROW) == [NOT_ECT if fast.table.vtep is None else inner]


def test_every_segment_of_a_super_packet_has_its_field_outside(fast: FastDatapath) -> None:
    raw = Super(5000, 1000, ip=(("tos", DSCP | ECT_0),)).raw
    assert fast.encap_tos([raw]) == [ECT_0] * 5


def test_packets_of_one_outer_tos_leave_in_one_message_and_others_beside_it(fast: FastDatapath) -> None:
    """A message has one TOS.  Only the outer one counts: to a peer that carries no marks on all go together."""
    fields = [ECT_0] * 10 + [NOT_ECT] * 5 + [ECT_0] * 3
    raws = [outward(field, number=n) for n, field in enumerate(fields)]
    assert [n for n, _size in fast.encap_trains(raws)] == [10, 5, 3]
    if fast.table.vtep is None:
        narrow = [outward(field, NARROW_POD, number=n) for n, field in enumerate(fields)]
        assert [n for n, _size in fast.encap_trains(narrow, NARROW)] == [18]


def test_packets_that_differ_in_their_marks_are_not_merged(fast: FastDatapath) -> None:
    packets = [part(n, ip={"tos": ECT_0}) for n in range(9)]
    messages = [
        Message(b"".join(packets[at : at + 3]), NEAR, len(packets[0]), ecn)
        for at, ecn in ((0, ECT_0), (3, CE), (6, ECT_0))
    ]
    batch = fast.decap_at_once(messages)
    fields = [ECT_0] * 3 + [CE] * 3 + [ECT_0] * 3
    expected = [NO_VNET_HDR + stepped(part(n, ip={"tos": field})) for n, field in enumerate(fields)]
    assert_same_packets(batch.writes, expected)
    assert [write[11] & 3 for write in batch.writes] == [ECT_0, CE, ECT_0]


def test_a_mark_on_a_whole_super_packet_is_on_all_that_it_stands_for(fast: FastDatapath) -> None:
    """A sender on a virtual link hands it over uncut, and the router has marked it as one."""
    segment = tcp_segment(NEAR_POD, POD, pattern(3 * MTU), flags=TCP_ACK, check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, tos=ECT_0)
    batch = fast.decap_messages([Message(packet, NEAR, ecn=CE)])
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=MTU - 40, start=20, offset=16)
    assert batch.writes == [header + stepped(ipv4(NEAR_POD, POD, segment, protocol=6, tos=CE))]


def test_a_whole_super_packet_with_cwr_is_told_to_the_device_as_one(datapath: Datapath) -> None:
    """CWR belongs to the first segment alone; a device that cannot do that leaves the cutting to the kernel."""
    segment = tcp_segment(NEAR_POD, POD, pattern(3 * MTU), flags=TCP_ACK | TCP_CWR, check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, tos=ECT_0)
    (write,) = datapath.decap_messages([Message(packet, NEAR)]).writes
    assert write[1] == GSO_TCPV4 | GSO_ECN


def test_a_route_that_refuses_says_nothing_about_marks(fast: FastDatapath) -> None:
    """Both say EINVAL.  What goes nowhere without a TOS either has not been refused for it."""
    fast.encap_batch([outward(ECT_0, DEAF_POD, number=n) for n in range(3)])
    assert not fast.refused & Offload.ECN


def test_trains_are_told_apart_by_their_marks(datapath: Datapath) -> None:
    """The mark of a message is that of all its datagrams, and of no others."""
    packets = [inward(ECT_0, ident=n) for n in range(12)]
    plain, marked = (trains([(packet, NEAR) for packet in some]) for some in (packets[:6], packets[6:]))
    marked = [replace(message, ecn=CE) for message in marked]
    batch = datapath.decap_messages([*plain, *marked])
    expected = [*packets[:6], *(inward(CE, ident=n) for n in range(6, 12))]
    assert_same_packets(batch.writes, [NO_VNET_HDR + stepped(packet) for packet in expected])

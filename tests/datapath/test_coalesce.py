"""Which packets of a flow the fast path writes to the TUN as one, and which it must not put together.

The kernel cuts such a write up again.  Here `assert_same_packets` does, and compares the packets with what went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.datapath.cases import DECAP, GOOD_DECAP, Bad
from tests.datapath.harness import Batch, FastDatapath, Message, ReferenceDatapath, assert_same_packets, trains
from tests.packets import (
    GSO_TCPV4,
    GSO_UDP_L4,
    MTU,
    NEAR,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    PARTIAL,
    POD,
    TCP_ACK,
    TCP_CWR,
    TCP_ECE,
    TCP_FIN,
    TCP_PSH,
    TCP_RST,
    TCP_SYN,
    TCP_URG,
    TWIN,
    TWIN_POD,
    ipv4,
    pattern,
    stepped,
    tcp_segment,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)

TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")


def part(
    number: int, n_bytes: int = 100, *, ip: dict[str, Any] | None = None, at: int | None = None, **tcp: Any
) -> bytes:
    """Packet `number` of a TCP flow whose packets carry 100 bytes each; `at` is where its data begins, if elsewhere."""
    sequence = 1000 + (number * 100 if at is None else at)
    segment = tcp_segment(NEAR_POD, POD, pattern(n_bytes, number), sequence=sequence, **tcp)
    return ipv4(NEAR_POD, POD, segment, **{"protocol": 6, "ident": 500 + number, **(ip or {})})


def datagram(number: int, n_bytes: int = 100, *, ip: dict[str, Any] | None = None, **udp: Any) -> bytes:
    """Packet `number` of a UDP flow."""
    segment = udp_segment(NEAR_POD, POD, pattern(n_bytes, number), **udp)
    return ipv4(NEAR_POD, POD, segment, **{"ident": 500 + number, **(ip or {})})


def corrupted(packet: bytes, at: int = -1) -> bytes:
    """`packet` with a byte of its transport part changed, and its transport checksum as it was."""
    data = bytearray(packet)
    data[at] ^= 0x40
    return bytes(data)


def decapped(fast: FastDatapath, packets: Sequence[bytes], *, source: str = NEAR) -> list[bytes]:
    """What the fast path writes for `packets` that it finds in its socket together.

    Asserts that it is those packets, delivered and counted one by one.
    """
    return written(fast, [Message(packet, source) for packet in packets])


def written(fast: FastDatapath, messages: Sequence[Message]) -> list[bytes]:
    packets = [packet for message in messages for packet in message.cut]
    batch = fast.decap_at_once(messages)
    assert batch.counts == {"decap_packets": len(packets), "decap_delivered": len(packets)}
    assert batch.sends == {}
    assert_same_packets(batch.writes, [NO_VNET_HDR + stepped(packet) for packet in packets])
    return batch.writes


# --------------------------------------------------------------------------------------------- what is merged


def test_a_merged_write_of_tcp_is_what_a_network_card_would_have_merged(fast: FastDatapath) -> None:
    packets = [part(0), part(1), part(2, 30, flags=TCP_ACK | TCP_PSH)]
    data = b"".join(packet[40:] for packet in packets)
    segment = tcp_segment(NEAR_POD, POD, data, sequence=1000, flags=TCP_ACK | TCP_PSH, check=PARTIAL)
    whole = ipv4(NEAR_POD, POD, segment, protocol=6, ident=500, ttl=63)
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=100, start=20, offset=16)
    assert decapped(fast, packets) == [header + whole]


def test_a_merged_write_of_udp_is_what_a_network_card_would_have_merged(fast: FastDatapath) -> None:
    packets = [datagram(0), datagram(1), datagram(2, 1)]
    data = b"".join(packet[28:] for packet in packets)
    whole = ipv4(NEAR_POD, POD, udp_segment(NEAR_POD, POD, data, check=PARTIAL), ident=500, ttl=63)
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_UDP_L4, hdr_len=28, gso_size=100, start=20, offset=6)
    assert decapped(fast, packets) == [header + whole]


DF = {"flags": "DF"}

MERGED = {
    "two": [part(0), part(1)],
    "of-one-byte": [part(n, 1, at=n) for n in range(5)],
    "of-odd-length": [part(n, 99, at=n * 99) for n in range(5)],
    "as-long-as-the-mtu": [part(n, MTU - 40, at=n * (MTU - 40)) for n in range(20)],
    "the-last-shorter": [part(0), part(1), part(2, 99)],
    "the-last-with-push": [part(0), part(1), part(2, flags=TCP_ACK | TCP_PSH)],
    "with-options": [part(n, options=TIMESTAMPS) for n in range(3)],
    "with-40-bytes-of-options": [part(n, options=b"\1" * 40) for n in range(3)],
    "with-tos-and-ecn": [part(n, ip={"tos": 0xBB}) for n in range(3)],
    "with-ttl-2": [part(n, ip={"ttl": 2}) for n in range(3)],
    "with-df-and-any-ids": [part(n, ip={**DF, "ident": n * 7919 & 0xFFFF}) for n in range(9)],
    "with-df-and-one-id": [part(n, ip={**DF, "ident": 0}) for n in range(3)],
    "id-wraps": [part(n, ip={"ident": (0xFFFE + n) & 0xFFFF}) for n in range(4)],
    "sequence-wraps": [part(n, at=0xFFFFFFFF - 1150 + n * 100) for n in range(4)],
    "with-a-reserved-tcp-bit": [part(n, flags=TCP_ACK | 0x100) for n in range(3)],
    "with-an-urgent-pointer-that-means-nothing": [part(n, urgent=7) for n in range(3)],
    "64": [part(n) for n in range(64)],
    "udp": [datagram(0), datagram(1)],
    "udp-of-one-byte": [datagram(n, 1) for n in range(5)],
    "udp-the-last-shorter": [datagram(0), datagram(1), datagram(2, 99)],
    "udp-with-df": [datagram(n, ip={**DF, "ident": 0}) for n in range(5)],
    "udp-with-tos": [datagram(n, ip={"tos": 0xB8}) for n in range(5)],
    "udp-64": [datagram(n) for n in range(64)],
}


@pytest.mark.parametrize("name", MERGED)
def test_packets_in_sequence_are_written_at_once(fast: FastDatapath, name: str) -> None:
    assert len(decapped(fast, MERGED[name])) == 1


@pytest.mark.parametrize("name", MERGED)
def test_packets_in_a_train_are_written_at_once(fast: FastDatapath, name: str) -> None:
    messages = trains([(packet, NEAR) for packet in MERGED[name]], longest=64)
    assert len(messages) < len(MERGED[name])
    assert len(written(fast, messages)) == 1


def test_no_write_has_more_than_64_packets(fast: FastDatapath) -> None:
    for make in (part, datagram):
        messages = trains([(make(n), NEAR) for n in range(130)], longest=50)
        assert len(written(fast, messages)) == 3


def test_no_write_is_longer_than_an_ip_packet(fast: FastDatapath) -> None:
    size = MTU - 40
    fits = (65_535 - 40) // size
    packets = [part(n, size, at=n * size) for n in range(fits + 1)]
    writes = decapped(fast, packets)
    assert [len(write) for write in writes] == [10 + 40 + fits * size, 10 + MTU]
    # To the last byte.
    rest = 65_535 - 40 - fits * size
    for n_bytes, n_writes in ((rest, 1), (rest + 1, 2)):
        packets[-1] = part(fits, n_bytes, at=fits * size)
        assert len(decapped(fast, packets)) == n_writes


# ----------------------------------------------------------------------------------------- what is not merged

PUSH, FIN = TCP_ACK | TCP_PSH, TCP_ACK | TCP_FIN

APART = {
    "another-ttl": [part(0), part(1, ip={"ttl": 63})],
    "another-tos": [part(0), part(1, ip={"tos": 0x10})],
    "congestion-experienced": [part(0, ip={"tos": 2}), part(1, ip={"tos": 3})],
    "df-on-the-second": [part(0), part(1, ip=DF)],
    "df-on-the-first": [part(0, ip=DF), part(1)],
    "id-repeated-without-df": [part(0), part(1, ip={"ident": 500})],
    "id-skipped-without-df": [part(0), part(1, ip={"ident": 502})],
    "ip-options-on-both": [part(n, ip={"options": b"\1" * 4}) for n in range(2)],
    "ip-options-on-the-second": [part(0), part(1, ip={"options": b"\1" * 4})],
    "first-fragments": [part(n, ip={"flags": "MF"}) for n in range(2)],
    "second-a-first-fragment": [part(0), part(1, ip={"flags": "MF"})],
    "second-a-last-fragment": [part(0), part(1, ip={"offset": 8})],
    "another-protocol": [part(0), datagram(1)],
    "neither-tcp-nor-udp": [part(n, ip={"protocol": 132}) for n in range(2)],
    "another-source-port": [part(0), part(1, ports=(40001, 443))],
    "another-destination-port": [part(0), part(1, ports=(40000, 444))],
    "another-acknowledgement": [part(0), part(1, acknowledgement=3)],
    "another-window": [part(0), part(1, window=64241)],
    "another-urgent-pointer": [part(0), part(1, urgent=1)],
    "other-options": [part(0, options=TIMESTAMPS), part(1, options=TIMESTAMPS[:-1] + b"\3")],
    "other-options-at-the-first-byte": [part(0, options=b"\1" * 4), part(1, options=b"\0\1\1\1")],
    "options-on-the-second": [part(0), part(1, options=TIMESTAMPS)],
    "options-on-the-first": [part(0, options=TIMESTAMPS), part(1)],
    "data-offset-as-if-data-were-options": [part(0), part(1, data_offset=6)],
    "reserved-bit-on-the-second": [part(0), part(1, flags=TCP_ACK | 0x100)],
    **{
        f"{name}-on-the-{which}": [
            part(0, flags=TCP_ACK | flag * (which == "first")),
            part(1, flags=TCP_ACK | flag * (which == "second")),
        ]
        for name, flag in (
            ("syn", TCP_SYN),
            ("fin", TCP_FIN),
            ("rst", TCP_RST),
            ("urg", TCP_URG),
            ("ece", TCP_ECE),
            ("cwr", TCP_CWR),
        )
        for which in ("first", "second")
    },
    "ece-on-both": [part(n, flags=TCP_ACK | TCP_ECE) for n in range(2)],
    "no-ack-on-both": [part(n, flags=0) for n in range(2)],
    "push-on-the-first": [part(0, flags=PUSH), part(1)],
    "push-on-both": [part(0, flags=PUSH), part(1, flags=PUSH)],
    "sequence-gap": [part(0), part(1, at=101)],
    "sequence-overlap": [part(0), part(1, at=99)],
    "sent-twice": [part(0), part(1, at=0)],
    "out-of-order": [part(1), part(0)],
    "larger-than-the-first": [part(0), part(1, 101)],
    "without-data": [part(0), part(1, 0)],
    "first-without-data": [part(0, 0), part(1, at=0)],
    "both-without-data": [part(0, 0), part(1, 0, at=0)],
    "checksum-of-the-first-wrong": [corrupted(part(0)), part(1)],
    "checksum-of-the-second-wrong": [part(0), corrupted(part(1))],
    "checksum-of-both-wrong": [corrupted(part(0)), corrupted(part(1))],
    "checksum-of-the-second-zero": [part(0), part(1, check=0)],
    "corruption-in-a-header": [part(0), corrupted(part(1), 47 - 20)],
    "udp-another-ttl": [datagram(0), datagram(1, ip={"ttl": 63})],
    "udp-another-tos": [datagram(0), datagram(1, ip={"tos": 1})],
    "udp-another-df": [datagram(0), datagram(1, ip=DF)],
    "udp-id-repeated": [datagram(0), datagram(1, ip={"ident": 500})],
    "udp-another-source-port": [datagram(0), datagram(1, ports=(5354, 53))],
    "udp-another-destination-port": [datagram(0), datagram(1, ports=(5353, 54))],
    "udp-larger-than-the-first": [datagram(0), datagram(1, 101)],
    "udp-without-data": [datagram(0), datagram(1, 0)],
    "udp-both-without-data": [datagram(0, 0), datagram(1, 0)],
    "udp-without-a-checksum": [datagram(0), datagram(1, check=0)],
    "udp-first-without-a-checksum": [datagram(0, check=0), datagram(1)],
    "udp-both-without-a-checksum": [datagram(n, check=0) for n in range(2)],
    "udp-checksum-of-the-first-wrong": [corrupted(datagram(0)), datagram(1)],
    "udp-checksum-of-the-second-wrong": [datagram(0), corrupted(datagram(1))],
    "udp-length-shorter-than-the-packet": [datagram(n, length=107) for n in range(2)],
    "udp-length-longer-than-the-packet": [datagram(n, length=109) for n in range(2)],
    "udp-fragments": [datagram(n, 96, ip={"flags": "MF"}) for n in range(2)],
    "udp-ip-options": [datagram(n, ip={"options": b"\1" * 4}) for n in range(2)],
}


@pytest.mark.parametrize("name", APART)
def test_packets_that_differ_are_written_as_they_came(fast: FastDatapath, name: str) -> None:
    first, second = (NO_VNET_HDR + stepped(packet) for packet in APART[name])
    assert decapped(fast, APART[name]) == [first, second]


def test_datagrams_without_a_checksum_stay_without_even_if_theirs_would_be_zero(fast: FastDatapath) -> None:
    packets = []
    for n in range(2):
        # The data are chosen so that the right checksum of this packet is zero.
        data = udp_segment(NEAR_POD, POD, bytes(2))[6:8]
        transport = udp_segment(NEAR_POD, POD, data)
        assert transport[6:8] == b"\xff\xff"
        packets.append(ipv4(NEAR_POD, POD, transport[:6] + bytes(2) + data, ident=500 + n))
    assert decapped(fast, packets) == [NO_VNET_HDR + stepped(packet) for packet in packets]


def test_packets_of_other_addresses_are_written_apart(fast: FastDatapath) -> None:
    other_source, other_destination = "10.244.2.11", "10.244.1.11"
    for source, destination in ((other_source, POD), (NEAR_POD, other_destination)):
        segment = tcp_segment(source, destination, pattern(100, 1), sequence=1100)
        assert len(decapped(fast, [part(0), ipv4(source, destination, segment, protocol=6, ident=501)])) == 2


RUNS = {
    "after-a-shorter-one": ([part(0), part(1, 50), part(2, at=150)], [2, 1]),
    "after-a-shorter-one-of-its-size": ([part(0), part(1, 50), part(2, 50, at=150), part(3, 50, at=200)], [2, 2]),
    "after-a-push": ([part(0), part(1, flags=PUSH), part(2), part(3)], [2, 2]),
    "each-with-a-push": ([part(n, flags=PUSH) for n in range(4)], [1, 1, 1, 1]),
    "wrong-checksum-first": ([corrupted(part(0)), part(1), part(2)], [1, 2]),
    "wrong-checksum-second": ([part(0), corrupted(part(1)), part(2), part(3)], [1, 1, 2]),
    "wrong-checksum-third": ([part(0), part(1), corrupted(part(2)), part(3), part(4)], [2, 1, 2]),
    "wrong-checksum-last": ([part(0), part(1), corrupted(part(2))], [2, 1]),
    "all-wrong": ([corrupted(part(n)) for n in range(4)], [1, 1, 1, 1]),
    "fin-at-the-end": ([part(0), part(1), part(2, flags=FIN)], [2, 1]),
    "gap-in-the-middle": ([part(0), part(1), part(3), part(4)], [2, 2]),
    "lost-one-comes-late": ([part(0), part(2), part(1), part(3)], [1, 1, 1, 1]),
    "larger-from-the-middle-on": ([part(0, 50), part(1, 50, at=50), part(1), part(2)], [2, 2]),
    "udp-after-a-shorter-one": ([datagram(0), datagram(1, 50), datagram(2)], [2, 1]),
    "udp-wrong-checksum-second": ([datagram(0), corrupted(datagram(1)), datagram(2), datagram(3)], [1, 1, 2]),
    "udp-wrong-checksum-third": ([datagram(0), datagram(1), corrupted(datagram(2)), datagram(3)], [2, 1, 1]),
    "udp-no-checksum-between": ([datagram(0), datagram(1), datagram(2, check=0), datagram(3), datagram(4)], [2, 1, 2]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_packet_that_does_not_follow_begins_another_write(fast: FastDatapath, name: str) -> None:
    packets, expected = RUNS[name]
    assert [n_packets(write) for write in decapped(fast, packets)] == expected


def n_packets(write: bytes) -> int:
    gso_size = int.from_bytes(write[4:6], "little")
    if gso_size == 0:
        return 1
    return -(-(len(write) - 10 - int.from_bytes(write[2:4], "little")) // gso_size)


@pytest.mark.parametrize("at", [*range(20, 40), 40, 99, 139])
def test_corruption_of_any_byte_comes_out_as_it_went_in(fast: FastDatapath, at: int) -> None:
    packets = [part(n) for n in range(5)]
    packets[2] = corrupted(packets[2], at)
    writes = decapped(fast, packets)
    assert NO_VNET_HDR + stepped(packets[2]) in writes


# ------------------------------------------------------------------------------------------------------ order

BETWEEN = {
    "fin": part(2, 0, flags=FIN),
    "rst": part(2, 0, flags=TCP_RST),
    "pure-ack": part(2, 0),
    "window-update": part(2, 0, window=1),
    "urgent": part(2, flags=TCP_ACK | TCP_URG, urgent=1),
    "sent-again": part(0),
    "wrong-checksum": corrupted(part(2)),
    "first-fragment": part(2, ip={"flags": "MF"}),
    "last-fragment": part(2, ip={"offset": 8}),
    "ip-options": part(2, ip={"options": b"\1" * 4}),
    "no-ports": ipv4(NEAR_POD, POD, b"\0\1", protocol=6),
    "no-ports-udp": ipv4(NEAR_POD, POD, b"", protocol=17),
    "short-tcp": ipv4(NEAR_POD, POD, part(2)[20:30], protocol=6),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_nothing_overtakes_a_packet_that_cannot_be_merged(fast: FastDatapath, name: str) -> None:
    # Without the packet in the middle all six would be merged.
    packets = [part(0), part(1), part(2), BETWEEN[name], part(3), part(4), part(5)]
    assert [n_packets(write) for write in decapped(fast, packets)] == [3, 1, 3]


def test_nothing_overtakes_a_packet_whose_checksum_is_left_to_the_kernel(fast: FastDatapath) -> None:
    partial = part(2, check=PARTIAL)
    batch = fast.decap_at_once([Message(packet, NEAR) for packet in (part(0), part(1), partial, part(2), part(3))])
    assert [n_packets(write) for write in batch.writes] == [2, 1, 2]
    assert batch.writes[1] == vnet_hdr(flags=NEEDS_CSUM, start=20, offset=16) + stepped(partial)


def test_packets_of_other_flows_do_not_part_a_flow(fast: FastDatapath) -> None:
    echo = ipv4(NEAR_POD, POD, b"\x08\0\0\0" + bytes(20), protocol=1)
    others = [datagram(0), echo, part(0, ports=(1, 2)), datagram(1), part(1, ports=(1, 2)), echo]
    packets = [packet for n in range(6) for packet in (part(n), others[n])]
    assert [n_packets(write) for write in decapped(fast, packets)] == [6, 2, 1, 2, 1]


@pytest.mark.parametrize("n_flows", [2, 16, 17, 20])
def test_flows_that_alternate_are_put_together_up_to_16_of_them(fast: FastDatapath, n_flows: int) -> None:
    packets = [part(n, ports=(flow, 443)) for n in range(3) for flow in range(1, n_flows + 1)]
    writes = decapped(fast, packets)
    if n_flows <= 16:
        assert [n_packets(write) for write in writes] == [3] * n_flows
    else:
        assert sum(map(n_packets, writes)) == 3 * n_flows


def test_a_new_flow_takes_the_place_of_the_oldest(fast: FastDatapath) -> None:
    flows = [[part(n, ports=(flow, 443)) for n in range(3)] for flow in range(1, 19)]
    packets = [packet for flow in flows for packet in flow]
    assert [n_packets(write) for write in decapped(fast, packets)] == [3] * 18


def test_more_writes_than_a_batch_holds_keep_their_order(fast: FastDatapath) -> None:
    packets = [datagram(n, check=0) if n % 7 else datagram(n) for n in range(400)]
    messages = trains([(packet, NEAR) for packet in packets], longest=64)
    assert written(fast, messages) == [NO_VNET_HDR + stepped(packet) for packet in packets]


def test_a_flow_across_a_full_batch_stays_in_order(fast: FastDatapath) -> None:
    packets = [datagram(n, check=0) for n in range(127)]
    packets += [part(n) for n in range(60)]
    packets += [datagram(n, check=0) for n in range(140)]
    packets += [part(n) for n in range(60, 120)]
    writes = written(fast, trains([(packet, NEAR) for packet in packets], longest=64))
    assert len(writes) < len(packets) - 100


def test_one_flow_from_two_peers_is_told_apart_by_the_source_check(fast: FastDatapath) -> None:
    batch = fast.decap_at_once([Message(part(n), TWIN if n == 1 else NEAR) for n in range(3)])
    assert batch.counts == {"decap_packets": 3, "decap_delivered": 2, "decap_drop_source_spoofed": 1}
    assert batch.writes == [NO_VNET_HDR + stepped(part(0)), NO_VNET_HDR + stepped(part(2))]


# --------------------------------------------------------------------------------------------------- counters


def test_every_packet_of_a_write_that_the_tun_refuses_is_counted(fast: FastDatapath) -> None:
    fast.break_tun()
    batch = fast.decap_at_once([Message(part(n), NEAR) for n in range(5)] + [Message(datagram(0), NEAR)])
    assert batch.counts == {"decap_packets": 6, "decap_drop_tun": 6}


def test_dropped_packets_between_those_of_a_flow_are_counted_and_do_not_part_it(fast: FastDatapath) -> None:
    bad = [Message(case.packet, case.source) for case in DECAP if case.counter == "decap_drop_source_spoofed"][:2]
    bad += [Message(with_header_checksum(part(9), 1), NEAR), Message(b"", NEAR)]
    messages = [message for n in range(4) for message in (Message(part(n), NEAR), bad[n])]
    batch = fast.decap_at_once(messages)
    assert batch.counts == {
        "decap_packets": 8,
        "decap_delivered": 4,
        "decap_drop_source_spoofed": 2,
        "decap_drop_checksum": 1,
        "decap_drop_empty": 1,
    }
    assert [n_packets(write) for write in batch.writes] == [4]


# ----------------------------------------------------------------------------------------------------- trains


def both(fast: FastDatapath, message: Message) -> tuple[Batch, Batch]:
    model = ReferenceDatapath()
    model.table = fast.table
    return fast.decap_messages([message]), model.decap_messages([message])


def trebled(packet: bytes, source: str) -> Message:
    return Message(packet * 3, source, len(packet))


@pytest.mark.parametrize(
    "case", [case for case in DECAP if 0 < len(case.packet) < 21_000], ids=lambda case: case.slug
)
def test_a_train_of_bad_packets_is_dropped_one_by_one(fast: FastDatapath, case: Bad) -> None:
    fast.configure(source_check=case.source_check)
    got, expected = both(fast, trebled(case.packet, case.source))
    assert got == expected
    assert (got.counts["decap_packets"], got.counts[case.counter]) == (3, 3)


@pytest.mark.parametrize("name", GOOD_DECAP)
def test_a_train_of_good_packets_is_delivered_one_by_one(fast: FastDatapath, name: str) -> None:
    got, expected = both(fast, trebled(*GOOD_DECAP[name]))
    assert got.counts == expected.counts == {"decap_packets": 3, "decap_delivered": 3}
    assert_same_packets(got.writes, expected.writes)


def test_a_train_for_a_socket_without_gro_arrives_cut(is_vxlan: bool) -> None:
    with FastDatapath(has_gro=False, is_vxlan=is_vxlan) as fast:
        messages = trains([(part(n), NEAR) for n in range(64)], longest=64)
        assert len(messages) == 1
        assert len(written(fast, messages)) == 1


def test_long_trains_of_several_peers_arrive_whole_and_in_order(fast: FastDatapath) -> None:
    size = 1400
    for _ in range(3):
        near = [part(n, size, at=n * size) for n in range(44)]
        twin = [
            ipv4(TWIN_POD, POD, udp_segment(TWIN_POD, POD, pattern(size, n)), ident=n, flags="DF") for n in range(44)
        ]
        messages = trains([(packet, NEAR) for packet in near], 64) + trains([(packet, TWIN) for packet in twin], 64)
        assert len(messages) == 2
        assert [n_packets(write) for write in written(fast, messages)] == [44, 44]


# ------------------------------------------------------------------------------- super-packets that nobody cut


def whole_udp(n_bytes: int, check: str | int = PARTIAL, options: bytes = b"") -> bytes:
    return ipv4(NEAR_POD, POD, udp_segment(NEAR_POD, POD, pattern(n_bytes), check=check), options=options)


@pytest.mark.parametrize(
    ("n_bytes", "size", "options"),
    [
        pytest.param(5000, 1000, b"", id="longer than the MTU"),
        pytest.param(60_000, MTU - 28, b"", id="segments as long as the MTU"),
        pytest.param(4000, MTU - 32, b"\1" * 4, id="with IP options"),
        pytest.param(200, 100, b"", id="shorter than the MTU"),
        pytest.param(3, 2, b"", id="of three bytes"),
    ],
)
def test_a_whole_udp_super_packet_is_written_with_the_size_that_the_kernel_tells(
    fast: FastDatapath, n_bytes: int, size: int, options: bytes
) -> None:
    packet = whole_udp(n_bytes, options=options)
    got, expected = both(fast, Message(packet, NEAR, size))
    header_len = 20 + len(options)
    header = vnet_hdr(
        flags=NEEDS_CSUM, gso_type=GSO_UDP_L4, hdr_len=header_len + 8, gso_size=size, start=header_len, offset=6
    )
    assert got == expected == Batch({"decap_packets": 1, "decap_delivered": 1}, {}, [header + stepped(packet)])


@pytest.mark.parametrize(
    ("packet", "size", "counter", "header"),
    [
        pytest.param(whole_udp(5000), MTU - 27, "decap_drop_oversize", None, id="segments longer than the MTU"),
        pytest.param(whole_udp(5000, "full"), 1000, "decap_drop_oversize", None, id="complete checksum, too long"),
        pytest.param(whole_udp(500, "full"), 100, "decap_delivered", NO_VNET_HDR, id="complete checksum"),
        pytest.param(
            whole_udp(500), 500, "decap_delivered", vnet_hdr(flags=1, start=20, offset=6), id="one segment after all"
        ),
        pytest.param(
            part(0, 5000, check=PARTIAL),
            1000,
            "decap_delivered",
            vnet_hdr(flags=1, gso_type=1, hdr_len=40, gso_size=MTU - 40, start=20, offset=16),
            id="TCP is cut by the MTU",
        ),
        pytest.param(part(0, 5000), 1000, "decap_drop_oversize", None, id="TCP with a complete checksum"),
        pytest.param(
            ipv4(NEAR_POD, POD, pattern(5000), protocol=50), 1000, "decap_drop_oversize", None, id="another protocol"
        ),
    ],
)
def test_a_message_that_is_one_packet_is_never_cut(
    fast: FastDatapath, packet: bytes, size: int, counter: str, header: bytes | None
) -> None:
    got, expected = both(fast, Message(packet, NEAR, size))
    writes = [] if header is None else [header + stepped(packet)]
    assert got == expected == Batch({"decap_packets": 1, counter: 1}, {}, writes)


def test_a_message_that_is_one_packet_but_for_a_byte_is_cut(fast: FastDatapath) -> None:
    got, expected = both(fast, Message(whole_udp(500) + b"\0", NEAR, 100))
    assert got == expected
    assert got.counts["decap_packets"] == 6


def test_the_answer_about_a_whole_super_packet_quotes_its_beginning(fast: FastDatapath) -> None:
    packet = ipv4(NEAR_POD, OWN, udp_segment(NEAR_POD, OWN, pattern(5000), check=PARTIAL), ttl=1)
    got, expected = both(fast, Message(packet, NEAR, 1000))
    assert got == expected
    assert got.counts == {"decap_packets": 1, "decap_drop_ttl": 1, "icmp_sent": 1}

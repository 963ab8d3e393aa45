"""The executable specification itself: arithmetic over all values, ICMP answers, and what the kernel refuses.

What becomes of each kind of packet is tested in tests/datapath, over the reference and the fast path alike.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    RouterAlert,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet, Raw

from tests import reference, reference_ip
from tests.packets import (
    DESTINATION_OPTIONS,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    MTU,
    NARROW_MTU,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    NO_VNET_HDR,
    OUTSIDE6,
    OWN,
    OWN6,
    PARTIAL,
    POD,
    POD6,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_POD,
    UNLEASED,
    icmp_answer,
    internet_checksum,
    internet_sum,
    ipv4,
    ipv6,
    options_header,
    overlay,
    pattern,
    stepped,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.reference import Outcome
from udptun._fastpath import COUNTERS

TABLE = overlay()
NEAR_REMOTE = TABLE.peers[0].remote
WIRE_FORMAT = Path(__file__).parents[2] / "docs" / "wire-format.md"


# ---------------------------------------------------------------------------------------------------- the TTL step


def test_the_ttl_step_equals_a_recomputation_for_every_ttl_and_protocol() -> None:
    for word in range(0x0100, 0x10000):
        packet = ipv4(POD, NEAR_POD, ttl=word >> 8, protocol=word & 0xFF)
        assert reference_ip.step_ttl(packet) == stepped(packet)


@pytest.mark.parametrize("ttl", [1, 2, 64, 128, 255])
def test_the_ttl_step_equals_a_recomputation_for_every_checksum(ttl: int) -> None:
    # The ident moves the checksum through all values but one of its two zeros.
    packet = ipv4(POD, NEAR_POD, ttl=ttl)
    seen = set()
    for ident in range(0x10000):
        header = packet[:4] + ident.to_bytes(2) + packet[6:]
        header = with_header_checksum(header)
        seen.add(header[10:12])
        assert reference_ip.step_ttl(header) == stepped(header)
    assert len(seen) == 0xFFFF


def test_the_ttl_step_keeps_every_wrong_checksum_wrong_by_the_same_amount() -> None:
    packet = udp(POD, NEAR_POD)
    before, after = int.from_bytes(packet[10:12]), int.from_bytes(stepped(packet)[10:12])
    for check in range(0x10000):
        got = reference_ip.step_ttl(packet[:10] + check.to_bytes(2) + packet[12:])
        assert (int.from_bytes(got[10:12]) - after - (check - before)) % 0xFFFF == 0
        assert internet_sum(got[:20]) == 0xFFFF or (check - before) % 0xFFFF


def test_the_ttl_step_changes_nothing_but_ttl_and_checksum() -> None:
    packet = ipv4(POD, NEAR_POD, b"payload", tos=0xB9, flags="DF", options=b"\1" * 8)
    got = reference_ip.step_ttl(packet)
    assert (got[:8], got[9:10], got[12:]) == (packet[:8], packet[9:10], packet[12:])
    assert got[8] == packet[8] - 1


@given(st.binary(max_size=200))
def test_the_sum_with_carries_equals_arithmetic_modulo_65535(data: bytes) -> None:
    assert reference_ip.fold_sum(data) == internet_sum(data)


# ----------------------------------------------------------------------------------------------------------- ICMP


@pytest.mark.parametrize("n_bytes", [0, 1, 7, 8, 519, 520, 521, 1400])
@pytest.mark.parametrize("reason", [(3, 0), (3, 4), (11, 0)])
def test_icmp_error_is_what_scapy_builds(n_bytes: int, reason: tuple[int, int]) -> None:
    offender = udp(POD, NEAR_POD, bytes(i & 0xFF for i in range(n_bytes)), ttl=1)
    mtu = 1372 if reason == (3, 4) else 0
    answer = reference_ip.icmp_error(IPv4Address(OWN), offender, reason, mtu)
    assert answer == icmp_answer(*reason, offender, source=OWN, next_hop_mtu=mtu)


def test_icmp_error_is_no_longer_than_every_host_must_take_and_sums_up() -> None:
    answer = reference_ip.icmp_error(IPv4Address(OWN), udp(POD, NEAR_POD, bytes(1400)), (11, 0))
    assert len(answer) == int.from_bytes(answer[2:4]) == 576
    assert internet_checksum(answer[:20]) == internet_checksum(answer[20:]) == 0


# ------------------------------------------------------------------------------------------ what the kernel refuses


@pytest.mark.parametrize(
    ("n_bytes", "flags", "counter"),
    [
        (1000 - 28, "DF", "encap_sent"),
        (1000 - 27, "DF", "encap_drop_too_big"),
        (1000 - 27, "", "encap_sent"),
        (MTU, "DF", "encap_drop_too_big"),
        (MTU, "", "encap_sent"),
    ],
)
def test_encap_respects_the_path_mtu_only_for_packets_with_df(n_bytes: int, flags: str, counter: str) -> None:
    packet = ipv4(POD, NEAR_POD, bytes(n_bytes - 20), flags=flags)
    (outcome,) = reference.encap(TABLE, NO_VNET_HDR + packet, path_mtu=1000)
    if counter == "encap_sent":
        assert outcome == Outcome(counter, sends=((NEAR_REMOTE, stepped(packet)),))
    else:
        answer = NO_VNET_HDR + icmp_answer(3, 4, packet, source=OWN, next_hop_mtu=1000 - 28)
        assert outcome == Outcome(counter, writes=(answer,), icmp="icmp_sent")


def test_encap_names_the_peers_mtu_when_both_it_and_the_path_are_too_small() -> None:
    packet = ipv4(POD, NARROW_POD, bytes(MTU - 20), flags="DF")
    (outcome,) = reference.encap(TABLE, NO_VNET_HDR + packet, path_mtu=1000)
    answer = NO_VNET_HDR + icmp_answer(3, 4, packet, source=OWN, next_hop_mtu=NARROW_MTU)
    assert outcome == Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")


def test_encap_counts_a_refused_datagram_and_answers_nobody() -> None:
    (outcome,) = reference.encap(TABLE, NO_VNET_HDR + udp(POD, NEAR_POD), is_refused=True)
    assert outcome == Outcome("encap_drop_send")


def test_encap_suppresses_an_answer_that_the_tun_refuses() -> None:
    (outcome,) = reference.encap(TABLE, NO_VNET_HDR + udp(POD, UNLEASED), is_refused=True)
    assert outcome == Outcome("encap_drop_no_route", icmp="icmp_suppressed")


def test_decap_counts_a_refused_write() -> None:
    outcome = reference.decap(TABLE, udp(NEAR_POD, POD), IPv4Address(NEAR), is_refused=True)
    assert outcome == Outcome("decap_drop_tun")


# --------------------------------------------------------------------------------------- super-packets and trains


def test_segments_of_a_plain_packet_are_the_packet_without_trailing_bytes() -> None:
    packet = udp(POD, NEAR_POD, b"data", check=0)
    assert reference.segments(NO_VNET_HDR + packet + b"trailing") == [packet]


@given(n_bytes=st.integers(1, 3000), size=st.integers(1, 65_535), sequence=st.integers(0, 0xFFFFFFFF))
def test_segments_of_tcp_hold_the_data_once_and_in_sequence(n_bytes: int, size: int, sequence: int) -> None:
    data = pattern(n_bytes)
    raw = vnet_hdr(flags=1, gso_type=GSO_TCPV4, gso_size=size) + tcp(POD, NEAR_POD, data, sequence=sequence)
    got = reference.segments(raw)
    if n_bytes > 2048 * size:
        assert got == []
        return
    pieces = [data[at : at + size] for at in range(0, n_bytes, size)]
    assert [packet[40:] for packet in got] == pieces
    for i, packet in enumerate(got):
        one = tcp_segment(POD, NEAR_POD, pieces[i], sequence=sequence + i * size)
        assert packet == ipv4(POD, NEAR_POD, one, protocol=6, ident=0x1234 + i)


def test_datagrams_of_a_train_are_all_of_the_gro_size_but_the_last() -> None:
    assert reference.datagrams(b"aaabbbc", 3) == [(b"aaa", 0), (b"bbb", 0), (b"c", 0)]
    assert reference.datagrams(b"aaabbb", 3) == [(b"aaa", 0), (b"bbb", 0)]


@pytest.mark.parametrize("gro_size", [0, 7, 8, 65_535])
def test_a_message_of_one_datagram_is_that_datagram(gro_size: int) -> None:
    assert reference.datagrams(b"aaabbbc", gro_size) == [(b"aaabbbc", 0)]
    assert reference.datagrams(b"", gro_size) == [(b"", 0)]


def test_a_message_that_is_one_packet_is_not_cut() -> None:
    packet = udp(NEAR_POD, POD, bytes(100))
    assert reference.datagrams(packet, 40) == [(packet, 40)]
    assert len(reference.datagrams(packet + b"\0", 40)) == 4
    assert len(reference.datagrams(b"\x65" + packet[1:], 40)) == 4


# ----------------------------------------------------------------------------------------------------------- table


def test_leasing_finds_the_peer_whose_subnet_holds_the_address() -> None:
    found = {pod: TABLE.leasing(IPv4Address(pod)) for pod in (NEAR_POD, TWIN_POD, TWIN_OTHER_POD, UNLEASED, POD)}
    assert {pod: peer and peer.index for pod, peer in found.items()} == {
        NEAR_POD: 1,
        TWIN_POD: 3,
        TWIN_OTHER_POD: 4,
        UNLEASED: None,
        POD: None,
    }


def test_a_public_ip_is_known_whichever_of_its_leases_is_asked_for() -> None:
    assert TABLE.has_public_ip(IPv4Address(TWIN))
    assert not TABLE.has_public_ip(IPv4Address("127.0.0.1"))


# ------------------------------------------------------------------------------------------------------- the whole


@given(st.binary(max_size=120) | st.binary(max_size=110).map((NO_VNET_HDR + b"\x45").__add__))
def test_every_packet_of_every_read_of_the_tun_ends_in_one_known_counter(raw: bytes) -> None:
    outcomes = reference.encap(TABLE, raw)
    assert outcomes
    for outcome in outcomes:
        assert outcome.counter in COUNTERS
        assert outcome.counter.startswith("encap_")
        assert len(outcome.sends) == (outcome.counter == "encap_sent")


@given(st.binary(max_size=120).map(lambda data: b"\x45" + data) | st.binary(max_size=120))
def test_every_datagram_ends_in_one_known_counter(payload: bytes) -> None:
    outcome = reference.decap(TABLE, payload, IPv4Address(NEAR))
    assert outcome.counter in COUNTERS
    assert outcome.counter.startswith("decap_")
    assert len(outcome.writes) == (outcome.counter == "decap_delivered")


def test_the_counters_are_those_that_the_contract_names() -> None:
    named = re.findall(r"`((?:encap|decap|icmp|inject|tun|udp)_[a-z_0-9]+)`", WIRE_FORMAT.read_text())
    # The workers do not count what they never got.
    assert set(named) == {*COUNTERS, "inject_drop_full"}
    assert len(set(COUNTERS)) == len(COUNTERS)


def test_the_drops_are_in_the_order_of_the_contract() -> None:
    rows = re.findall(r"^\|.*`((?:encap|decap|inject)_drop_[a-z_0-9]+)`", WIRE_FORMAT.read_text(), re.MULTILINE)
    drops = [name for name in COUNTERS if "_drop_" in name]
    assert list(dict.fromkeys(rows)) == drops


# ----------------------------------------------------------------------------------------------------------- IPv6

TABLE6 = overlay(has_ipv6=True)


@pytest.mark.parametrize("n_bytes", [0, 1, 8, 1231, 1232, 1233, 1400])
@pytest.mark.parametrize("reason", [(1, 0), (1, 3), (2, 0), (3, 0)])
def test_icmpv6_error_is_what_scapy_builds(n_bytes: int, reason: tuple[int, int]) -> None:
    offender = ipv6(POD6, NEAR_POD6, pattern(n_bytes), ttl=1)
    mtu = 70_000 if reason == (2, 0) else 0
    answer = reference_ip.icmp_error(IPv6Address(OWN6), offender, reason, mtu)
    assert answer == icmp_answer(*reason, offender, source=OWN6, next_hop_mtu=mtu)
    assert len(answer) <= 1280


@pytest.mark.parametrize(
    ("headers", "kinds"),
    [
        ([], ()),
        ([IPv6ExtHdrHopByHop(options=[RouterAlert()])], (0,)),
        ([IPv6ExtHdrDestOpt(options=[PadN(optdata=b"x" * 200)])], (60,)),
        ([IPv6ExtHdrRouting(type=2, addresses=[OUTSIDE6], segleft=0)], (43,)),
        ([IPv6ExtHdrFragment(offset=0, m=0)], (44,)),
        ([AH(payloadlen=4, icv=b"x" * 12)], (51,)),
        ([IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment(m=1), IPv6ExtHdrDestOpt()], (0, 60, 44, 60)),
    ],
)
@pytest.mark.parametrize("transport", [TCP(dport=443) / Raw(b"12345678901234567890"), UDP() / Raw(b"12345678")])
def test_what_scapy_builds_is_read_as_it_was_meant(headers: list[Packet], kinds: tuple[int, ...],
                                                   transport: Packet) -> None:  # fmt: skip
    protocol = 6 if TCP in transport else 17
    packet = IPv6(src=NEAR_POD6, dst=POD6, hlim=7, tc=0xB9, fl=0xABCDE)
    for header in headers:
        packet /= header
    if AH in packet:
        # scapy fills this in for the other headers.
        packet[AH].nh = protocol
    data, n_transport = bytes(packet / transport), len(bytes(transport))
    read = reference_ip.read_header(data)
    assert (read.total_len, read.header_len) == (len(data), len(data) - n_transport)
    assert (read.protocol, read.ttl, read.tos) == (protocol, 7, 0xB9)
    assert read.is_whole == (not {44, 51} & {*kinds})
    assert (str(read.source), str(read.destination)) == (NEAR_POD6, POD6)
    assert reference_ip.ipv6_problem(data) is None


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize(("n_bytes", "size"), [(1, 1), (999, 1000), (1000, 1000), (1001, 1000), (5000, 999)])
def test_segments_of_ipv6_are_packets_with_lengths_and_checksums_of_their_own(
    protocol: int, n_bytes: int, size: int
) -> None:
    data, headers = pattern(n_bytes), [options_header(DESTINATION_OPTIONS)]

    def packet(piece: bytes, at: int, **check: str) -> bytes:
        if protocol == 6:
            transport = tcp_segment(POD6, NEAR_POD6, piece, sequence=1 + at, **check)
        else:
            transport = udp_segment(POD6, NEAR_POD6, piece, **check)
        return ipv6(POD6, NEAR_POD6, transport, protocol=protocol, headers=headers)

    gso_type, offset = (GSO_TCPV6, 16) if protocol == 6 else (GSO_UDP_L4, 6)
    raw = vnet_hdr(flags=1, gso_type=gso_type, gso_size=size, start=48, offset=offset) + packet(data, 0, check=PARTIAL)
    assert reference.segments(raw) == [packet(data[at : at + size], at) for at in range(0, n_bytes, size)]


def test_a_message_that_is_one_ipv6_packet_is_not_cut() -> None:
    packet = udp(NEAR_POD6, POD6, bytes(100))
    assert reference.datagrams(packet, 40) == [(packet, 40)]
    assert len(reference.datagrams(packet + b"\0", 40)) == 4
    assert len(reference.datagrams(packet[:39], 38)) == 2


@pytest.mark.parametrize(
    ("n_bytes", "path_mtu", "told"),
    [
        (1280, 1000, None),
        (1281, 1000, 1280),
        (1400, 1428, None),
        (1401, 1428, 1400),
    ],
)
def test_ipv6_is_told_no_less_than_every_path_must_take(n_bytes: int, path_mtu: int, told: int | None) -> None:
    packet = ipv6(POD6, NEAR_POD6, bytes(n_bytes - 40))
    (outcome,) = reference.encap(TABLE6, NO_VNET_HDR + packet, path_mtu=path_mtu)
    if told is None:
        assert outcome == Outcome("encap_sent", sends=((NEAR_REMOTE, stepped(packet)),))
    else:
        answer = NO_VNET_HDR + icmp_answer(2, 0, packet, source=OWN6, next_hop_mtu=told)
        assert outcome == Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")


@pytest.mark.parametrize("packet", [udp(POD6, NEAR_POD6), udp(POD6, NEAR_POD6)[:20]])
def test_ipv6_is_dropped_whole_or_cut_where_it_is_not_carried(packet: bytes) -> None:
    assert reference.encap(TABLE, NO_VNET_HDR + packet) == [Outcome("encap_drop_ipv6")]
    assert reference.decap(TABLE, packet, IPv4Address(NEAR)) == Outcome("decap_drop_ipv6")
    assert reference.inject(TABLE, packet) == Outcome("inject_drop_malformed")


@st.composite
def chains(draw: st.DrawFn) -> bytes:
    """Bytes behind an IPv6 header that often are extension headers."""
    kinds = draw(st.lists(st.sampled_from((0, 43, 44, 51, 60, 6, 17, 58, 59)), min_size=1, max_size=10))
    data = b"".join(
        bytes([kind, draw(st.sampled_from((0, 0, 1, 255))), *draw(st.tuples(*[st.integers(0, 9)] * 6))])
        for kind in kinds
    )
    return bytes.fromhex("60000000") + len(data).to_bytes(2) + bytes([kinds[-1], 64]) + draw(
        st.sampled_from((ADDRESSES_IN, ADDRESSES_OUT))
    ) + data + draw(st.binary(max_size=9))  # fmt: skip


ADDRESSES_IN = IPv6Address(NEAR_POD6).packed + IPv6Address(POD6).packed
ADDRESSES_OUT = IPv6Address(POD6).packed + IPv6Address(NEAR_POD6).packed


@given(chains() | st.binary(max_size=60).map(b"\x60".__add__))
def test_every_packet_of_ipv6_ends_in_one_known_counter(data: bytes) -> None:
    (out,) = reference.encap(TABLE6, NO_VNET_HDR + data)
    into = reference.decap(TABLE6, data, IPv4Address(NEAR))
    assert {out.counter, into.counter} <= {*COUNTERS}
    assert len(out.sends) == (out.counter == "encap_sent")
    assert len(into.writes) == (into.counter == "decap_delivered")

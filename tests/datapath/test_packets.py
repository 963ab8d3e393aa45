"""Every row of the two tables in docs/wire-format.md, over both implementations."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address

import pytest

from tests.datapath.cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP, Bad
from tests.datapath.harness import Datapath, FastDatapath, assert_every_packet_is_counted, remote_of
from tests.packets import (
    DEAF_POD,
    MTU,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NO_VNET_HDR,
    OUTSIDE,
    OWN,
    PARTIAL,
    POD,
    STRANGER,
    TCP_ACK,
    TCP_FIN,
    TCP_PSH,
    TWIN_OTHER_POD,
    TWIN_POD,
    UNLEASED,
    WIDE_POD,
    icmp_answer,
    icmp_answer_to_peer,
    ipv4,
    stepped,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.reference import Outcome, Remote

OUT = udp(POD, NEAR_POD, b"a good packet")
IN = udp(NEAR_POD, POD, b"a good packet")


def assert_good_packets_pass(datapath: Datapath) -> None:
    out, into = datapath.encap(NO_VNET_HDR + OUT), datapath.decap(IN, NEAR)
    assert out == Outcome("encap_sent", sends=((remote_of(datapath, NEAR_POD), stepped(OUT)),))
    assert into == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(IN),))


def expected_answer(case: Bad) -> bytes:
    assert case.answer is not None
    type_, code, mtu = case.answer
    return icmp_answer(type_, code, case.quoted or case.packet, source=OWN, next_hop_mtu=mtu)


@pytest.mark.parametrize("case", ENCAP, ids=lambda case: case.slug)
def test_encap_drops_a_bad_packet_under_its_own_counter_and_goes_on(datapath: Datapath, case: Bad) -> None:
    outcome = datapath.encap(NO_VNET_HDR + case.packet)
    writes = (NO_VNET_HDR + expected_answer(case),) if case.answer else ()
    assert outcome == Outcome(case.counter, writes=writes, icmp=case.icmp)  # type: ignore[arg-type]
    assert_good_packets_pass(datapath)
    assert_every_packet_is_counted(datapath)


@pytest.mark.parametrize("case", DECAP, ids=lambda case: case.slug)
def test_decap_drops_a_bad_packet_under_its_own_counter_and_goes_on(datapath: Datapath, case: Bad) -> None:
    datapath.configure(source_check=case.source_check)
    outcome = datapath.decap(case.packet, case.source)
    sends: tuple[tuple[Remote, bytes], ...] = ()
    if case.answer:
        type_, code, _mtu = case.answer
        answer = icmp_answer_to_peer(type_, code, case.quoted or case.packet, source=OWN)
        sends = ((remote_of(datapath, str(IPv4Address(case.packet[12:16]))), answer),)
    assert outcome == Outcome(case.counter, sends=sends, icmp=case.icmp)  # type: ignore[arg-type]
    assert_good_packets_pass(datapath)
    assert_every_packet_is_counted(datapath)


@pytest.mark.parametrize("name", GOOD_ENCAP)
def test_encap_sends_a_good_packet_as_it_is_but_for_the_ttl(datapath: Datapath, name: str) -> None:
    packet = GOOD_ENCAP[name]
    destination = str(IPv4Address(packet[16:20]))
    outcome = datapath.encap(NO_VNET_HDR + packet)
    assert outcome == Outcome("encap_sent", sends=((remote_of(datapath, destination), stepped(packet)),))


@pytest.mark.parametrize("name", GOOD_DECAP)
def test_decap_delivers_a_good_packet_as_it_is_but_for_the_ttl(datapath: Datapath, name: str) -> None:
    packet, source = GOOD_DECAP[name]
    outcome = datapath.decap(packet, source)
    assert outcome == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))


@pytest.mark.parametrize("n_bytes", range(1, 10))
def test_encap_counts_a_read_without_a_whole_virtio_header_as_short(datapath: Datapath, n_bytes: int) -> None:
    assert datapath.encap(bytes(n_bytes)) == Outcome("encap_drop_short")


@pytest.mark.parametrize("n_bytes", range(1, len(OUT)))
def test_every_truncation_of_a_good_packet_is_dropped_both_ways(datapath: Datapath, n_bytes: int) -> None:
    encap = "encap_drop_short" if n_bytes < 20 else "encap_drop_malformed"
    decap = "decap_drop_short" if n_bytes < 20 else "decap_drop_length"
    assert datapath.encap(NO_VNET_HDR + OUT[:n_bytes]) == Outcome(encap)
    assert datapath.decap(IN[:n_bytes], NEAR) == Outcome(decap)


@pytest.mark.parametrize("trailing", [b"\0", b"\xff" * 7, bytes(1000)], ids=len)
def test_bytes_after_the_total_length_are_cut_off_both_ways(datapath: Datapath, trailing: bytes) -> None:
    assert datapath.encap(NO_VNET_HDR + OUT + trailing).sends == ((remote_of(datapath, NEAR_POD), stepped(OUT)),)
    assert datapath.decap(IN + trailing, NEAR).writes == (NO_VNET_HDR + stepped(IN),)


def test_trailing_bytes_do_not_make_a_datagram_oversize(datapath: Datapath) -> None:
    packet = ipv4(NEAR_POD, POD, bytes(MTU - 20))
    assert datapath.decap(packet + bytes(3000), NEAR).writes == (NO_VNET_HDR + stepped(packet),)


@pytest.mark.parametrize("checksum", [0x0000, 0x0001, 0xFEFE, 0xFEFF, 0xFF00, 0xFFFE, 0xFFFF])
def test_encap_keeps_a_wrong_header_checksum_wrong_by_the_same_amount(datapath: Datapath, checksum: int) -> None:
    packet = with_header_checksum(OUT, checksum)
    (_remote, sent), *rest = datapath.encap(NO_VNET_HDR + packet).sends
    assert not rest
    right_before, right_after = (int.from_bytes(p[10:12]) for p in (OUT, stepped(OUT)))
    (got,) = struct.unpack_from(">H", sent, 10)
    # Ones' complement numbers are equal when they are equal modulo 65,535.
    assert (got - right_after) % 0xFFFF == (checksum - right_before) % 0xFFFF
    assert sent[:10] + sent[12:] == stepped(OUT)[:10] + stepped(OUT)[12:]


def test_decap_takes_both_forms_of_a_zero_header_checksum(datapath: Datapath) -> None:
    # The ident that brings the checksum to 0x0000; 0xFFFF is the other zero of ones' complement.
    ident = int.from_bytes(ipv4(NEAR_POD, POD, bytes(8), ident=0)[10:12])
    packet = ipv4(NEAR_POD, POD, bytes(8), ident=ident)
    assert packet[10:12] == b"\0\0"
    for zero in (0x0000, 0xFFFF):
        outcome = datapath.decap(with_header_checksum(packet, zero), NEAR)
        assert outcome == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))


def test_encap_counts_a_datagram_that_the_kernel_refuses_and_sends_those_around_it(datapath: Datapath) -> None:
    refused = udp(POD, DEAF_POD)
    batch = datapath.encap_batch([NO_VNET_HDR + packet for packet in (OUT, refused, OUT, refused, refused, OUT)])
    assert batch.counts == {"encap_packets": 6, "encap_sent": 3, "encap_drop_send": 3}
    assert batch.sends == {remote_of(datapath, NEAR_POD): [stepped(OUT)] * 3}
    assert batch.writes == []


def test_decap_counts_a_packet_that_the_tun_refuses(datapath: Datapath) -> None:
    datapath.break_tun()
    assert datapath.decap(IN, NEAR) == Outcome("decap_drop_tun")
    assert_every_packet_is_counted(datapath)


# ------------------------------------------------------------------------------------------------ source check


@pytest.mark.parametrize("source_check", ["off", "peer", "strict"])
def test_decap_takes_a_peers_pod_from_that_peer_whatever_the_source_check(
    datapath: Datapath, source_check: str
) -> None:
    datapath.configure(source_check=source_check)
    assert datapath.decap(IN, NEAR).counter == "decap_delivered"


@pytest.mark.parametrize("inner", [NEAR_POD, UNLEASED, OUTSIDE])
def test_decap_takes_any_other_source_from_a_stranger_when_the_source_check_is_off(
    datapath: Datapath, inner: str
) -> None:
    datapath.configure(source_check="off")
    packet = udp(inner, POD)
    assert datapath.decap(packet, STRANGER) == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))


def test_decap_answers_the_leaseholder_and_not_the_sender_when_the_source_check_is_off(datapath: Datapath) -> None:
    datapath.configure(source_check="off")
    packet = udp(NEAR_POD, POD, ttl=1)
    answer = icmp_answer_to_peer(11, 0, packet, source=OWN)
    expected = Outcome("decap_drop_ttl", sends=((remote_of(datapath, NEAR_POD), answer),), icmp="icmp_sent")
    assert datapath.decap(packet, STRANGER) == expected


def test_decap_counts_an_answer_that_the_kernel_refuses_as_suppressed(datapath: Datapath) -> None:
    datapath.configure(source_check="off")
    outcome = datapath.decap(udp(DEAF_POD, POD, ttl=1), STRANGER)
    assert outcome == Outcome("decap_drop_ttl", icmp="icmp_suppressed")


def test_a_change_of_the_source_check_holds_for_the_next_packet(datapath: Datapath) -> None:
    packet = udp(OUTSIDE, POD)
    assert datapath.decap(packet, NEAR).counter == "decap_delivered"
    datapath.configure(source_check="strict")
    assert datapath.decap(packet, NEAR).counter == "decap_drop_source_outside"
    datapath.configure(source_check="off")
    assert datapath.decap(packet, STRANGER).counter == "decap_delivered"


# ------------------------------------------------------------------------------------------ offloaded senders


@pytest.mark.parametrize("n_options", [0, 4, 40])
def test_a_partial_tcp_checksum_is_left_to_the_kernel(datapath: Datapath, n_options: int) -> None:
    segment = tcp_segment(NEAR_POD, POD, b"odd", check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, options=b"\1" * n_options)
    expected = vnet_hdr(flags=1, start=20 + n_options, offset=16) + stepped(packet)
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(expected,))


@pytest.mark.parametrize("data", [b"", b"odd", bytes(MTU - 28)], ids=len)
def test_a_partial_udp_checksum_is_left_to_the_kernel(datapath: Datapath, data: bytes) -> None:
    packet = udp(NEAR_POD, POD, data, check=PARTIAL)
    expected = vnet_hdr(flags=1, start=20, offset=6) + stepped(packet)
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(expected,))


def test_a_partial_checksum_is_one_over_the_packet_without_its_trailing_bytes(datapath: Datapath) -> None:
    packet = udp(NEAR_POD, POD, b"data", check=PARTIAL)
    expected = vnet_hdr(flags=1, start=20, offset=6) + stepped(packet)
    assert datapath.decap(packet + bytes(5), NEAR) == Outcome("decap_delivered", writes=(expected,))


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(tcp(NEAR_POD, POD, bytes(20), data_offset=4, check=PARTIAL), id="data offset below 5"),
        pytest.param(tcp(NEAR_POD, POD, bytes(19), data_offset=10, check=PARTIAL), id="data offset past the end"),
        pytest.param(
            ipv4(NEAR_POD, POD, tcp_segment(NEAR_POD, POD, check=PARTIAL), protocol=132), id="another protocol"
        ),
        pytest.param(
            ipv4(NEAR_POD, POD, udp_segment(NEAR_POD, POD, bytes(8), check=PARTIAL), flags="MF"), id="first fragment"
        ),
        pytest.param(
            ipv4(NEAR_POD, POD, udp_segment(NEAR_POD, POD, check=PARTIAL), offset=8), id="last fragment"
        ),
        pytest.param(
            ipv4(NEAR_POD, POD, udp_segment(POD, NARROW_POD, check=PARTIAL)), id="of other addresses"
        ),
    ],
)
def test_what_only_resembles_a_partial_checksum_is_delivered_plain(datapath: Datapath, packet: bytes) -> None:
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))


@pytest.mark.parametrize("n_bytes", [MTU - 39, 3000, 60_000, 65_507 - 22 - 40])
@pytest.mark.parametrize("flags", [TCP_ACK, TCP_ACK | TCP_PSH, TCP_ACK | TCP_FIN])
def test_a_tcp_super_packet_is_written_for_the_kernel_to_cut(datapath: Datapath, n_bytes: int, flags: int) -> None:
    packet = tcp(NEAR_POD, POD, bytes(n_bytes), flags=flags, check=PARTIAL)
    header = vnet_hdr(flags=1, gso_type=1, hdr_len=40, gso_size=MTU - 40, start=20, offset=16)
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(header + stepped(packet),))


def test_the_headers_of_a_super_packet_are_counted_with_their_options(datapath: Datapath) -> None:
    segment = tcp_segment(NEAR_POD, POD, bytes(5000), options=b"\1" * 12, check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, options=b"\1" * 8)
    header = vnet_hdr(flags=1, gso_type=1, hdr_len=60, gso_size=MTU - 60, start=28, offset=16)
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(header + stepped(packet),))


@pytest.mark.parametrize(
    ("mtu", "n_options", "counter"),
    [
        pytest.param(120, 40, "decap_drop_oversize", id="headers as long as the MTU"),
        pytest.param(119, 40, "decap_drop_oversize", id="headers longer than the MTU"),
        pytest.param(121, 40, "decap_delivered", id="one byte of payload a segment"),
    ],
)
def test_a_super_packet_is_cut_only_when_a_segment_can_carry_payload(
    datapath: Datapath, mtu: int, n_options: int, counter: str
) -> None:
    datapath.configure(mtu=mtu)
    segment = tcp_segment(NEAR_POD, POD, b"data", options=b"\1" * n_options, check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, options=b"\1" * n_options)
    outcome = datapath.decap(packet, NEAR)
    header = vnet_hdr(flags=1, gso_type=1, hdr_len=120, gso_size=mtu - 120 if mtu > 120 else 0, start=60, offset=16)
    writes = (header + stepped(packet),) if counter == "decap_delivered" else ()
    assert outcome == Outcome(counter, writes=writes)


def test_an_oversize_packet_of_tcp_headers_alone_is_dropped(datapath: Datapath) -> None:
    datapath.configure(mtu=100)
    segment = tcp_segment(NEAR_POD, POD, options=b"\1" * 40, check=PARTIAL)
    packet = ipv4(NEAR_POD, POD, segment, protocol=6, options=b"\1" * 40)
    assert datapath.decap(packet, NEAR) == Outcome("decap_drop_oversize")


# ----------------------------------------------------------------------------------------------------- batches


def test_a_batch_out_keeps_its_order_towards_each_peer(datapath: Datapath) -> None:
    pods = (NEAR_POD, TWIN_POD, WIDE_POD, TWIN_OTHER_POD)
    packets = [udp(POD, pods[i * i % 4], bytes([i]) * (i % 7)) for i in range(200)]
    mixed: list[bytes] = []
    for i, packet in enumerate(packets):
        mixed.append(NO_VNET_HDR + packet)
        if i % 10 == 0:
            mixed.append(NO_VNET_HDR + ENCAP[i % len(ENCAP)].packet)
        if i % 25 == 0:
            mixed.append(NO_VNET_HDR + udp(POD, UNLEASED, bytes([i])))
    batch = datapath.encap_batch(mixed)
    expected: dict[Remote, list[bytes]] = {}
    for packet in packets:
        destination = str(IPv4Address(packet[16:20]))
        expected.setdefault(remote_of(datapath, destination), []).append(stepped(packet))
    assert batch.sends == expected
    quoted = [udp(POD, UNLEASED, bytes([i])) for i in range(0, 200, 25)]
    answers = [NO_VNET_HDR + icmp_answer(3, 0, packet, source=OWN) for packet in quoted]
    assert [write for write in batch.writes if write in answers] == answers
    assert batch.counts["encap_packets"] == len(mixed)
    assert_every_packet_is_counted(datapath)


def test_a_batch_in_keeps_its_order_across_peers(datapath: Datapath) -> None:
    good = list(GOOD_DECAP.values())
    mixed: list[tuple[bytes, str]] = []
    for i, (packet, source) in enumerate(good * 4):
        mixed.append((packet, source))
        if i % 3 == 0:
            mixed.append((DECAP[i % len(DECAP)].packet, STRANGER))
    batch = datapath.decap_batch(mixed)
    assert batch.writes == [NO_VNET_HDR + stepped(packet) for packet, _source in good * 4]
    assert batch.sends == {}
    assert batch.counts["decap_packets"] == len(mixed)
    assert_every_packet_is_counted(datapath)


def test_a_batch_of_nothing_but_bad_packets_leaves_no_trace_but_counters(datapath: Datapath) -> None:
    silent = [case for case in ENCAP if case.answer is None and not case.is_suppressed]
    batch = datapath.encap_batch([NO_VNET_HDR + case.packet for case in silent])
    assert batch.counts == counts("encap_packets", [case.counter for case in silent])
    assert (batch.sends, batch.writes) == ({}, [])
    silent = [
        case for case in DECAP if case.answer is None and not case.is_suppressed and case.source_check == "peer"
    ]
    batch = datapath.decap_batch([(case.packet, case.source) for case in silent])
    assert batch.counts == counts("decap_packets", [case.counter for case in silent])
    assert (batch.sends, batch.writes) == ({}, [])


def counts(packets: str, ends: Sequence[str]) -> dict[str, int]:
    return {packets: len(ends)} | {name: ends.count(name) for name in ends}


# --------------------------------------------------------------------------------------------- other overlays


@pytest.mark.parametrize(
    ("network", "own", "lease"),
    [
        pytest.param("10.244.7.64/26", "10.244.7.64/28", "10.244.7.80/28", id="Network longer than a /24"),
        pytest.param("10.244.7.128/25", "10.244.7.160/27", "10.244.7.192/27", id="Network a /25"),
        pytest.param("10.0.0.0/8", "10.1.0.0/16", "10.255.0.0/16", id="widest Network, shortest lease"),
        pytest.param("10.244.0.0/22", "10.244.0.4/30", "10.244.3.252/30", id="longest lease"),
    ],
)
def test_lookup_is_exact_at_the_edges_of_a_lease(datapath: Datapath, network: str, own: str, lease: str) -> None:
    near = datapath.table.peers[0]
    datapath.set_overlay(network, own, [(lease, near)])
    base, last = (int(IPv4Address(text)) for text in edges(lease))
    pod = str(IPv4Address(int(IPv4Address(edges(own)[0])) + 1))
    for inside in (base, base + 1, last):
        packet = udp(pod, str(IPv4Address(inside)))
        outcome = datapath.encap(NO_VNET_HDR + packet)
        assert outcome == Outcome("encap_sent", sends=((near.remote, stepped(packet)),))
        packet = udp(str(IPv4Address(inside)), pod)
        outcome = datapath.decap(packet, NEAR)
        assert outcome == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))
    for outside in (base - 1, last + 1, base ^ 1 << 24):
        assert datapath.encap(NO_VNET_HDR + udp(pod, str(IPv4Address(outside)))).counter == "encap_drop_no_route"


def edges(prefix: str) -> tuple[str, str]:
    """First and last address of a prefix."""
    base, length = prefix.split("/")
    last = int(IPv4Address(base)) + (1 << (32 - int(length))) - 1
    return base, str(IPv4Address(last))


def test_an_overlay_without_peers_drops_everything(datapath: Datapath) -> None:
    datapath.set_overlay("10.244.0.0/16", "10.244.1.0/24", [])
    assert datapath.encap(NO_VNET_HDR + OUT).counter == "encap_drop_no_route"
    assert datapath.decap(IN, NEAR).counter == "decap_drop_unknown_peer"
    datapath.configure(source_check="off")
    assert datapath.decap(IN, STRANGER).counter == "decap_delivered"


# --------------------------------------------------------------------------------------------- fast path alone


def test_the_statistics_have_the_counters_of_the_fast_path_in_its_order(fast: FastDatapath) -> None:
    """That these are the names and the order of docs/wire-format.md is seen to in tests/unit/test_reference.py."""
    from udptun import _fastpath

    assert tuple(fast.stats.counters()) == _fastpath.COUNTERS


def test_system_calls_are_counted_with_what_they_carry(fast: FastDatapath) -> None:
    """Per call, and not per packet: five packets are five reads, one message of five datagrams, and one call."""

    def calls() -> dict[str, int]:
        return {name: n for name, n in fast.stats.counters().items() if name.startswith(("tun_", "udp_")) and n}

    sent = fast.encap_batch([NO_VNET_HDR + OUT] * 5)
    assert sent.counts == {"encap_packets": 5, "encap_sent": 5}
    expected = {"tun_reads": 5, "udp_send_calls": 1, "udp_send_messages": 1, "udp_sent_bytes": 5 * len(OUT)}
    assert calls() == expected
    fast.decap_batch([(IN, NEAR)] * 5)
    received = {name: n for name, n in calls().items() if name not in expected}
    assert received.pop("tun_written_bytes") == 5 * len(IN)
    assert received.pop("udp_receive_messages") == 5
    assert 1 <= received.pop("udp_receive_calls") <= 5
    assert 1 <= received.pop("tun_writes") <= 5
    assert received == {}
    assert fast.encap(NO_VNET_HDR + udp(POD, UNLEASED, b"dropped")).counter == "encap_drop_no_route"
    assert calls()["tun_reads"] == 6
    assert calls()["udp_send_calls"] == 1

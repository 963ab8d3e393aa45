"""Random and mutated packets: the fast path does what the reference does, packet for packet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from tests.datapath.cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP
from tests.datapath.harness import Batch, FastDatapath, ReferenceDatapath
from tests.packets import (
    DEAF_POD,
    FULL,
    MTU,
    NARROW,
    NARROW_MTU,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NO_VNET_HDR,
    OUTSIDE,
    OWN,
    PARTIAL,
    POD,
    STRANGER,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_POD,
    UNDERLAY,
    UNLEASED,
    WIDE,
    WIDE_POD,
    icmp_message,
    ipv4,
    tcp_segment,
    udp_segment,
    with_header_checksum,
)

PEER_PODS = (NEAR_POD, NARROW_POD, TWIN_POD, TWIN_OTHER_POD, WIDE_POD, DEAF_POD)
INNER = st.sampled_from(
    (*PEER_PODS, *PEER_PODS, POD, POD, POD, OWN, UNLEASED, OUTSIDE, UNDERLAY, "0.0.0.0", "127.0.0.1", "224.0.0.1")
) | st.integers(0, 0xFFFFFFFF).map(lambda value: str(IPv4Address(value)))
OUTER = st.sampled_from((NEAR, NEAR, NEAR, NARROW, TWIN, WIDE, STRANGER))
OPTIONS = st.sampled_from(("", "", "", "01010100", "07070400000000" "00", "83070400000000" "00", "44ff0500")).map(
    bytes.fromhex
) | st.integers(0, 10).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
FLAGS = st.sampled_from(("", "", "", "DF", "MF", "DF+MF"))
OFFSET = st.sampled_from((0, 0, 0, 8, 1480, 65528))
TTL = st.sampled_from((64, 64, 64, 255, 2, 1, 0))
CHECK: st.SearchStrategy[str | int] = st.sampled_from((FULL, PARTIAL, 0))
DATA_LEN = st.sampled_from((0, 1, 7, 8, 64, MTU - 40, MTU - 39, NARROW_MTU - 40, 3000)) | st.integers(0, 200)
WRONG = st.none() | st.none() | st.none() | st.integers(0, 15)


@st.composite
def ip_packets(draw: st.DrawFn) -> bytes:
    """Whole packets, most of them well formed."""
    source, destination = draw(INNER), draw(INNER)
    data = bytes(draw(DATA_LEN))
    protocol = draw(st.sampled_from((1, 6, 6, 6, 17, 17, 50)))
    if protocol == 6:
        flags = draw(st.sampled_from((0x10, 0x18, 0x11)) | st.integers(0, 255))
        options = bytes(4 * draw(st.sampled_from((0, 0, 3, 10))))
        check = draw(CHECK)
        wrong = draw(WRONG)
        payload = tcp_segment(
            source, destination, data, flags=flags, options=options, data_offset=wrong, check=check
        )
    elif protocol == 17:
        payload = udp_segment(source, destination, data, check=draw(CHECK))
    elif protocol == 1:
        payload = icmp_message(draw(st.sampled_from((0, 3, 8, 11, 13, 14))), data=data)
    else:
        payload = data
    payload = payload[: draw(st.none() | st.none() | st.integers(0, 24))]
    return ipv4(
        source,
        destination,
        payload,
        protocol=protocol,
        ttl=draw(TTL),
        tos=draw(st.sampled_from((0, 0xB8, 1, 2, 3))),
        flags=draw(FLAGS),
        offset=draw(OFFSET),
        options=draw(OPTIONS),
        ihl=draw(WRONG),
        version=draw(st.sampled_from((4,) * 12 + (6, 0, 15))),
    )


@st.composite
def mutated(draw: st.DrawFn, packets: st.SearchStrategy[bytes]) -> bytes:
    """Packets with bytes changed, cut off and added; the header checksum mended or left wrong."""
    packet = bytearray(draw(packets))
    for _ in range(draw(st.sampled_from((0, 0, 1, 3)))):
        if packet:
            packet[draw(st.integers(0, min(len(packet), 60) - 1))] = draw(st.integers(0, 255))
    data = bytes(packet)
    if len(data) >= 20 and draw(st.booleans()):
        data = with_header_checksum(data)
    data = data[: draw(st.none() | st.none() | st.none() | st.integers(0, 80))]
    return data + bytes(draw(st.sampled_from((0, 0, 0, 1, 9))))


ANY_PACKET = mutated(
    ip_packets()
    | st.sampled_from([case.packet for case in (*ENCAP, *DECAP) if len(case.packet) <= 4000])
    | st.sampled_from([*GOOD_ENCAP.values(), *(packet for packet, _source in GOOD_DECAP.values())])
) | st.binary(max_size=100)

ENCAP_BATCHES = st.lists(ANY_PACKET.map(NO_VNET_HDR.__add__), min_size=5, max_size=40)
DECAP_BATCHES = st.lists(st.tuples(ANY_PACKET, OUTER), min_size=5, max_size=40)
SOURCE_CHECKS = st.sampled_from(("off", "peer", "peer", "strict"))

QUICK = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
FULL_RUN = settings(QUICK, max_examples=10_000, derandomize=False)


@pytest.fixture
def pair(fast: FastDatapath) -> Iterator[tuple[FastDatapath, ReferenceDatapath]]:
    """Both, with the same table; their counters agree at the end too."""
    model = ReferenceDatapath()
    model.table = fast.table
    yield fast, model
    assert fast.counters == model.counters


def assert_equal(fast: Batch, model: Batch) -> None:
    assert fast.counts == model.counts
    assert fast.sends == model.sends
    assert fast.writes == model.writes
    for name in model.counts:
        event(name)


def check_encap(pair: tuple[FastDatapath, ReferenceDatapath], how: settings) -> None:
    fast, model = pair

    @how
    @given(raws=ENCAP_BATCHES)
    def equal(raws: list[bytes]) -> None:
        assert_equal(fast.encap_batch(raws), model.encap_batch(raws))

    equal()


def check_decap(pair: tuple[FastDatapath, ReferenceDatapath], how: settings) -> None:
    fast, model = pair

    @how
    @given(datagrams=DECAP_BATCHES, source_check=SOURCE_CHECKS)
    def equal(datagrams: list[tuple[bytes, str]], source_check: str) -> None:
        if source_check != fast.table.source_check:
            fast.configure(source_check=source_check)
            model.table = fast.table
        assert_equal(fast.decap_batch(datagrams), model.decap_batch(datagrams))

    equal()


def test_encap_equals_the_reference_over_random_batches(pair: tuple[FastDatapath, ReferenceDatapath]) -> None:
    check_encap(pair, QUICK)
    assert pair[1].counters["encap_packets"] > 1000


def test_decap_equals_the_reference_over_random_batches(pair: tuple[FastDatapath, ReferenceDatapath]) -> None:
    check_decap(pair, QUICK)
    assert pair[1].counters["decap_packets"] > 1000


@pytest.mark.full
@pytest.mark.timeout(900)
def test_encap_equals_the_reference_over_very_many_random_batches(
    pair: tuple[FastDatapath, ReferenceDatapath],
) -> None:
    check_encap(pair, FULL_RUN)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_decap_equals_the_reference_over_very_many_random_batches(
    pair: tuple[FastDatapath, ReferenceDatapath],
) -> None:
    check_decap(pair, FULL_RUN)


def test_both_agree_on_every_value_of_every_byte_of_the_header(pair: tuple[FastDatapath, ReferenceDatapath]) -> None:
    out, into = GOOD_ENCAP["options"], GOOD_DECAP["timestamp"][0]
    fast, model = pair
    for at in range(32):
        raws = [NO_VNET_HDR + out[:at] + bytes([value]) + out[at + 1 :] for value in range(256)]
        assert_equal_plainly(fast.encap_batch(raws), model.encap_batch(raws))
        changed = [into[:at] + bytes([value]) + into[at + 1 :] for value in range(256)]
        datagrams = [(with_header_checksum(packet), NEAR) for packet in changed]
        assert_equal_plainly(fast.decap_batch(datagrams), model.decap_batch(datagrams))


def assert_equal_plainly(fast: Batch, model: Batch) -> None:
    assert dataclasses.asdict(fast) == dataclasses.asdict(model)

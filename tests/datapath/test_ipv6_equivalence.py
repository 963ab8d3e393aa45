"""Random and mutated packets of both families: the fast path does what the reference does, packet for packet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv6Address

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from tests.datapath.cases import GOOD_DECAP as IPV4_GOOD_DECAP
from tests.datapath.cases import GOOD_ENCAP as IPV4_GOOD_ENCAP
from tests.datapath.harness import skip_unless_built
from tests.datapath.ipv6_cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP, MALFORMED_READS
from tests.datapath.test_equivalence import (
    CHECK,
    ENDS,
    FULL_RUN,
    OUTER,
    QUICK,
    TTL,
    WRONG,
    Ends,
    Pair,
    assert_equal_plainly,
    both,
    check_decap,
    check_encap,
    check_streams,
    check_wire,
    reads,
    streams,
    wire_messages,
)
from tests.packets import (
    AUTHENTICATION,
    DEAF_POD6,
    DESTINATION_OPTIONS,
    HOP_BY_HOP,
    LOCALS6,
    MTU,
    NARROW_POD6,
    NEAR,
    NEAR_POD6,
    NO_VNET_HDR,
    OUTSIDE6,
    OWN6,
    POD6,
    PORT,
    SLIM_MTU,
    SLIM_POD6,
    TWIN_OTHER_POD6,
    TWIN_POD6,
    UNLEASED6,
    authentication_header,
    fragment_header,
    icmpv6_message,
    ipv6,
    options_header,
    routing_header,
    tcp_segment,
    udp_segment,
    vxlan,
)

PEER_PODS = (NEAR_POD6, NARROW_POD6, TWIN_POD6, TWIN_OTHER_POD6, SLIM_POD6, DEAF_POD6)
MARTIANS = ("::", "::1", "::ffff:10.244.2.10", "::10.244.2.10", "fe80::1", "ff02::1")
EDGES = ("fd00:244::", "fd00:244:0:1::ffff", "fd00:244:0:5:7fff::", "fd00:244:0:20::", "fd00:244:1::")
INNER = st.sampled_from(
    (*PEER_PODS, *PEER_PODS, *PEER_PODS, *(POD6,) * 6, OWN6, UNLEASED6, OUTSIDE6, *LOCALS6, *MARTIANS, *EDGES)
) | st.integers(0, (1 << 128) - 1).map(lambda value: str(IPv6Address(value)))
BETWEEN: dict[str, Sequence[Ends]] = {
    "encap": [(POD6, it) for it in (NEAR_POD6, *PEER_PODS)],
    "decap": [*[(NEAR_POD6, POD6)] * 6, (NEAR_POD6, OWN6), (TWIN_POD6, POD6), (TWIN_OTHER_POD6, POD6)],
}
TABLED = {
    "encap": [*(case.packet for case in ENCAP), *GOOD_ENCAP.values()],
    "decap": [
        *(case.packet for case in DECAP if len(case.packet) <= 4000),
        *(packet for packet, _source in GOOD_DECAP.values()),
    ],
}
OF_IPV4 = [*IPV4_GOOD_ENCAP.values(), *(packet for packet, _source in IPV4_GOOD_DECAP.values())]
RARELY = st.sampled_from((False,) * 9 + (True,))
DATA_LEN = st.sampled_from(
    (0, 1, 7, 8, 64, MTU - 60, MTU - 59, SLIM_MTU - 40, SLIM_MTU - 39, 1240, 1241, 3000)
) | st.integers(0, 200)
OPTIONS = st.sampled_from(("010400000000", "000000000000", "050200000100", "c20400010000", "010500000000",
                           "de02beefc000", "00000000001e", "01ff00000000")).map(bytes.fromhex)  # fmt: skip
MOSTLY_RIGHT = st.sampled_from((None,) * 8 + (0, 1, 2, 255))


@st.composite
def extensions(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Extension headers, none of them most of the time, and most of them such as a packet may have."""
    headers = []
    for kind in draw(st.lists(st.sampled_from("hddrfga"), max_size=draw(st.sampled_from((0, 0, 0, 1, 1, 3, 10))))):
        if kind in ("h", "d"):
            which = HOP_BY_HOP if kind == "h" else DESTINATION_OPTIONS
            headers.append(options_header(which, draw(OPTIONS), length=draw(MOSTLY_RIGHT)))
        elif kind == "r":
            headers.append(routing_header(*draw(st.sampled_from(((4, 0), (2, 0), (2, 1), (0, 0), (0, 1))))))
        elif kind == "a":
            headers.append(authentication_header(length=draw(MOSTLY_RIGHT)))
        elif kind == "f":
            headers.append(fragment_header(more=True))
        else:
            offset = draw(st.sampled_from((0, 8, 1400, 65528)))
            headers.append(fragment_header(offset, more=draw(st.booleans()), reserved=draw(st.integers(0, 255))))
    return headers


@st.composite
def ip_packets(draw: st.DrawFn, direction: str) -> bytes:
    """Whole packets, most of them well formed."""
    source, destination = draw(st.sampled_from(BETWEEN[direction]))
    if draw(RARELY):
        source = draw(INNER)
    if draw(RARELY):
        destination = draw(INNER)
    data = bytes(draw(DATA_LEN))
    protocol = draw(st.sampled_from((58, 6, 6, 6, 17, 17, 50, 59)))
    if protocol == 6:
        flags = draw(st.sampled_from((0x10, 0x18, 0x11)) | st.integers(0, 255))
        options = bytes(4 * draw(st.sampled_from((0, 0, 3, 10))))
        check, wrong = draw(CHECK), draw(WRONG)
        payload = tcp_segment(source, destination, data, flags=flags, options=options, data_offset=wrong, check=check)
    elif protocol == 17:
        ports = draw(st.sampled_from(((5353, 53), (PORT, PORT))))
        payload = udp_segment(source, destination, data, ports=ports, check=draw(CHECK))
    elif protocol == 58:
        kind = draw(st.sampled_from((1, 2, 3, 128, 129, 135, 137)))
        payload = icmpv6_message(source, destination, kind, data=data)
    else:
        payload = data
    return ipv6(
        source,
        destination,
        payload[: draw(st.integers(0, 24)) if draw(RARELY) else None],
        protocol=protocol,
        ttl=draw(TTL),
        tos=draw(st.sampled_from((0, 0xB8, 1, 2, 3))),
        flow_label=draw(st.sampled_from((0, 0x12345, 0xFFFFF))),
        headers=draw(extensions()),
        version=draw(st.sampled_from((6,) * 20 + (4, 0, 15))),
    )


@st.composite
def mutated(draw: st.DrawFn, packet: bytearray) -> bytes:
    """`packet` with bytes changed, cut off and added; the payload length mended or left wrong."""
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 1, 3)))):
        if packet:
            at = draw(st.integers(0, min(len(packet), 100) - 1))
            packet[at] = draw(st.integers(0, 255) | st.sampled_from((0, 43, 44, AUTHENTICATION, 60)))
    data = bytes(packet)[: draw(st.integers(0, 120)) if draw(RARELY) else None]
    if len(data) >= 40 and draw(st.booleans()):
        data = data[:4] + (len(data) - 40).to_bytes(2) + data[6:]
    return data + bytes(draw(st.sampled_from((0, 0, 0, 1, 9))))


@st.composite
def mixed(draw: st.DrawFn, direction: str) -> bytes:
    """Random packets and tabled ones, some of IPv4, so that the families mix, and now and then what nobody means."""
    kind = draw(st.sampled_from("rrrrrrt4b"))
    if kind == "4":
        return draw(st.sampled_from(OF_IPV4))
    if kind == "b":
        return b"\x60" + draw(st.binary(max_size=100))
    packet = draw(st.sampled_from(TABLED[direction]) if kind == "t" else ip_packets(direction))
    return draw(mutated(bytearray(packet)))


@st.composite
def mixed_reads(draw: st.DrawFn) -> bytes:
    return draw(st.sampled_from([*MALFORMED_READS.values()])) if draw(RARELY) else draw(reads(mixed("encap")))


ENCAP_BATCHES = st.lists(mixed_reads(), min_size=5, max_size=40)
DECAP_BATCHES = st.lists(st.tuples(mixed("decap"), OUTER), min_size=5, max_size=40)
_PREFIXES = (*(vxlan(b"", ethertype=0x86DD),) * 5, vxlan(b""))
WIRE_BATCHES = wire_messages(mixed("decap"), prefixes=((b"",) * 6 + (b"\x60", b"\0") + _PREFIXES))
FLOWS: tuple[Ends, ...] = (
    *((NEAR_POD6, POD6),) * 4, *((TWIN_POD6, POD6),) * 2, ("fd00:244:0:2::11", POD6), *ENDS[:2]
)  # fmt: skip
STREAM_BATCHES = streams(FLOWS)

KINDS = ("udp-gro", "udp-bare", "vxlan-gro")


@pytest.fixture
def pairs() -> Iterator[dict[str, Pair]]:
    """All kinds, for the same packets."""
    skip_unless_built()
    with ExitStack() as undo:
        yield {kind: undo.enter_context(both(kind, has_ipv6=True)) for kind in KINDS}


def test_encap_equals_the_reference_over_random_batches(pairs: dict[str, Pair]) -> None:
    check_encap(pairs, settings(QUICK, max_examples=40), ENCAP_BATCHES)


def test_decap_equals_the_reference_over_random_batches(pairs: dict[str, Pair]) -> None:
    check_decap(pairs, settings(QUICK, max_examples=40), DECAP_BATCHES)


def test_decap_equals_the_reference_over_whatever_anybody_sends(pairs: dict[str, Pair]) -> None:
    check_wire(pairs, settings(QUICK, max_examples=25), WIRE_BATCHES)


def test_merged_flows_come_out_as_the_reference_delivers_them(pairs: dict[str, Pair]) -> None:
    check_streams(pairs, settings(QUICK, max_examples=40), STREAM_BATCHES)


def test_both_agree_on_every_value_of_every_byte_of_the_headers(pairs: dict[str, Pair]) -> None:
    fast, model = pairs["udp-gro"]
    headers = [options_header(HOP_BY_HOP), fragment_header(more=True)]
    out = ipv6(POD6, NEAR_POD6, udp_segment(POD6, NEAR_POD6, bytes(8)), headers=headers)
    into = ipv6(NEAR_POD6, POD6, udp_segment(NEAR_POD6, POD6, bytes(8)), headers=headers)
    for at in (*range(8), 8, 14, 15, 16, 23, 24, 30, 31, 32, 39, *range(40, 64)):
        raws = [NO_VNET_HDR + out[:at] + bytes([value]) + out[at + 1 :] for value in range(256)]
        assert_equal_plainly(fast.encap_batch(raws), model.encap_batch(raws))
        datagrams = [(into[:at] + bytes([value]) + into[at + 1 :], NEAR) for value in range(256)]
        assert_equal_plainly(fast.decap_batch(datagrams), model.decap_batch(datagrams))


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_encap_equals_the_reference_over_very_many_random_batches(pairs: dict[str, Pair]) -> None:
    check_encap(pairs, FULL_RUN, ENCAP_BATCHES)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_decap_equals_the_reference_over_very_many_random_batches(pairs: dict[str, Pair]) -> None:
    check_decap(pairs, FULL_RUN, DECAP_BATCHES)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_decap_equals_the_reference_over_very_much_of_what_anybody_sends(pairs: dict[str, Pair]) -> None:
    check_wire(pairs, FULL_RUN, WIRE_BATCHES)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_very_many_merged_flows_come_out_as_the_reference_delivers_them(pairs: dict[str, Pair]) -> None:
    check_streams(pairs, FULL_RUN, STREAM_BATCHES)

"""Random and mutated packets: the fast path does what the reference does, packet for packet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from tests.datapath.cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP
from tests.datapath.harness import (
    ICMP_BURST,
    Batch,
    FastDatapath,
    Message,
    ReferenceDatapath,
    assert_same_packets,
    skip_unless_built,
    trains,
)
from tests.packets import (
    DEAF_POD,
    DESTINATION_OPTIONS,
    FULL,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    LEARNED,
    LOCALS,
    MTU,
    NARROW,
    NARROW_MTU,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OUTSIDE,
    OWN,
    PARTIAL,
    POD,
    PORT,
    STRANGER,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_POD,
    TWIN_POD6,
    UNDERLAY,
    UNLEASED,
    WIDE,
    WIDE_POD,
    fragment_header,
    icmp_message,
    ipv4,
    ipv6,
    options_header,
    pattern,
    routing_header,
    tcp_segment,
    udp_segment,
    vnet_hdr,
    vxlan,
    with_header_checksum,
)
from tests.reference_ip import IPV6, read_header

PEER_PODS = (NEAR_POD, NARROW_POD, TWIN_POD, TWIN_OTHER_POD, WIDE_POD, DEAF_POD)
MARTIANS = ("0.0.0.0", "127.0.0.1", "224.0.0.1")
INNER = st.sampled_from(
    (*PEER_PODS, *PEER_PODS, POD, POD, POD, OWN, UNLEASED, OUTSIDE, UNDERLAY, *LOCALS, *MARTIANS, NEAR)
) | st.integers(0, 0xFFFFFFFF).map(lambda value: str(IPv4Address(value)))
OUTER = st.sampled_from((NEAR, NEAR, NEAR, NARROW, TWIN, WIDE, STRANGER, LEARNED))
OPTIONS = st.sampled_from(("", "", "", "01010100", "0707040000000000", "8307040000000000", "44ff0500")).map(
    bytes.fromhex
) | st.integers(0, 10).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
FLAGS = st.sampled_from(("", "", "", "DF", "MF", "DF+MF"))
OFFSET = st.sampled_from((0, 0, 0, 8, 1480, 65528))
TTL = st.sampled_from((64, 64, 64, 255, 2, 1, 0))
CHECK: st.SearchStrategy[str | int] = st.sampled_from((FULL, PARTIAL, 0))
DATA_LEN = st.sampled_from((0, 1, 7, 8, 64, MTU - 40, MTU - 39, NARROW_MTU - 40, 3000)) | st.integers(0, 200)
ECN = st.sampled_from((0, 1, 2, 3))
MOSTLY_UNMARKED = st.sampled_from((0,) * 20 + (1, 2, 3))
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
        payload = tcp_segment(source, destination, data, flags=flags, options=options, data_offset=wrong, check=check)
    elif protocol == 17:
        ports = draw(st.sampled_from(((5353, 53), (PORT, PORT))))
        payload = udp_segment(source, destination, data, ports=ports, check=draw(CHECK))
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


@st.composite
def reads(draw: st.DrawFn, packets: st.SearchStrategy[bytes] | None = None) -> bytes:
    """What the TUN gives: a packet, and a virtio header that often asks for something and often fits the packet."""
    packet = draw(ANY_PACKET if packets is None else packets)
    kind = draw(st.sampled_from(("plain", "gso", "checksum", "any")))
    if kind == "plain":
        return NO_VNET_HDR + packet
    if kind == "any":
        return draw(st.binary(min_size=10, max_size=10)) + packet
    is_ipv6, protocol, start = False, 0, 0
    if packet and len(packet) >= (40 if packet[0] >> 4 == 6 else 20):
        header = read_header(packet)
        is_ipv6, protocol, start = header.family is IPV6, header.protocol, header.header_len
    offset = 16 if protocol == 6 else 6
    if kind == "checksum":
        start, offset = draw(st.sampled_from(((start, offset), (start, 0), (start, len(packet) - start - 2 & 0xFFFF))))
        return vnet_hdr(flags=NEEDS_CSUM, start=start, offset=offset) + packet
    fitting = GSO_UDP_L4 if protocol != 6 else GSO_TCPV6 if is_ipv6 else GSO_TCPV4
    gso_type = draw(st.sampled_from((fitting,) * 6 + (GSO_TCPV4, GSO_UDP_L4, GSO_TCPV6, 3)))
    gso_type |= draw(st.sampled_from((0, 0, 0, GSO_ECN)))
    size = draw(st.sampled_from((0, 1, 2, 7, 100, 536, NARROW_MTU - 40, MTU - 40, MTU - 39, 65_535)))
    start += draw(st.sampled_from((0,) * 15 + (8,)))
    return vnet_hdr(flags=NEEDS_CSUM, gso_type=gso_type, gso_size=size, start=start, offset=offset) + packet


@dataclass
class Sender:
    """One inner flow and how far it has come."""

    protocol: int
    source: str
    port: int
    size: int
    ip_flags: str
    options: bytes
    sequence: int
    ident: int
    tos: int
    destination: str = POD
    sent: int = 0

    @property
    def perturbations(self) -> dict[str, dict[str, dict[str, Any]]]:
        return PERTURBATIONS if self.destination == POD else PERTURBATIONS_IPV6

    def packet(self, n_bytes: int, how: str) -> bytes:
        """The next packet, perturbed in the way that `how` names."""
        ip: dict[str, Any] = {"tos": self.tos}
        if self.destination == POD:
            ip.update(flags=self.ip_flags, ident=self.ident)
        tcp: dict[str, Any] = {"flags": 0x10, "options": self.options, "sequence": self.sequence}
        udp: dict[str, Any] = {}
        self.ident = (self.ident + 1) & 0xFFFF
        self.sent += 1
        data = pattern(0 if how == "empty" else n_bytes, self.sent)
        self.sequence += len(data)
        for name, fields in (("ip", ip), ("tcp", tcp), ("udp", udp)):
            fields.update(self.perturbations[how].get(name, {}))
        if how in ("skipped", "repeated"):
            tcp["sequence"] += 1 if how == "skipped" else -len(data)
        if self.protocol == 6:
            transport = tcp_segment(self.source, self.destination, data, ports=(self.port, 443), **tcp)
        else:
            transport = udp_segment(self.source, self.destination, data, ports=(self.port, 53), **udp)
        make, header_len = (ipv4, 20) if self.destination == POD else (ipv6, 40)
        packet = make(self.source, self.destination, transport, protocol=self.protocol, **ip)
        if how == "corrupted" and len(packet) > header_len + 20:
            at = header_len + self.sent % (len(packet) - header_len)
            packet = packet[:at] + bytes([packet[at] ^ 0x10]) + packet[at + 1 :]
        return packet + (b"trailing" if how == "trailing" else b"")


PERTURBATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "empty": {},
    "corrupted": {},
    "skipped": {},
    "repeated": {},
    "trailing": {},
    "push": {"tcp": {"flags": 0x18}},
    "fin": {"tcp": {"flags": 0x11}},
    "syn": {"tcp": {"flags": 0x12}},
    "rst": {"tcp": {"flags": 0x14}},
    "ece": {"tcp": {"flags": 0x50}},
    "cwr": {"tcp": {"flags": 0x90}},
    "urgent": {"tcp": {"flags": 0x30, "urgent": 5}},
    "acknowledgement": {"tcp": {"acknowledgement": 77}},
    "window": {"tcp": {"window": 7}},
    "options": {"tcp": {"options": b"\1\1\1\0"}},
    "data-offset": {"tcp": {"data_offset": 7}},
    "partial": {"tcp": {"check": PARTIAL}, "udp": {"check": PARTIAL}},
    "no-checksum": {"tcp": {"check": 0}, "udp": {"check": 0}},
    "udp-length": {"udp": {"length": 9}},
    "ttl": {"ip": {"ttl": 9}},
    "ttl-1": {"ip": {"ttl": 1}},
    "tos": {"ip": {"tos": 3}},
    "ident": {"ip": {"ident": 9}},
    "df": {"ip": {"flags": "DF"}},
    "fragment": {"ip": {"offset": 8}},
    "ip-options": {"ip": {"options": b"\1" * 4}},
    "ip-checksum": {"ip": {"checksum": 7}},
}

PERTURBATIONS_IPV6: dict[str, dict[str, dict[str, Any]]] = {
    **{how: fields for how, fields in PERTURBATIONS.items() if "ip" not in fields},
    "ttl": {"ip": {"ttl": 9}},
    "ttl-1": {"ip": {"ttl": 1}},
    "tos": {"ip": {"tos": 3}},
    "traffic-class": {"ip": {"tos": 0x10}},
    "flow-label": {"ip": {"flow_label": 0x12344}},
    "flow-label-above": {"ip": {"flow_label": 0x22345}},
    "fragment": {"ip": {"headers": [fragment_header(8)]}},
    "atomic-fragment": {"ip": {"headers": [fragment_header()]}},
    "destination-options": {"ip": {"headers": [options_header(DESTINATION_OPTIONS)]}},
    "routing-header": {"ip": {"headers": [routing_header()]}},
    "payload-length": {"ip": {"payload_len": 9}},
}

HOW = st.sampled_from(("",) * 60 + tuple(PERTURBATIONS))
HOW_IPV6 = st.sampled_from(("",) * 60 + tuple(PERTURBATIONS_IPV6))
SIZES = (1, 2, 99, 100, 100, 536, MTU - 60)
SIZE_OF = {size: st.sampled_from((size,) * 12 + (size - 1, size + 1, 1)) for size in SIZES}
AT_A_TIME = st.sampled_from((1, 1, 2, 3, 10))


Ends = tuple[str, str]
"""Source and destination of a flow."""
ENDS: tuple[Ends, ...] = ((NEAR_POD, POD), (NEAR_POD, POD), ("10.244.2.11", POD), (TWIN_POD, POD))


@st.composite
def streams(draw: st.DrawFn, ends: Sequence[Ends] = ENDS) -> list[Message]:
    """Flows of some peers, mixed, most of their packets in sequence, in trains of any length."""
    flows = [
        Sender(
            protocol=draw(st.sampled_from((6, 6, 17))),
            source=(between := draw(st.sampled_from(ends)))[0],
            destination=between[1],
            port=draw(st.integers(1, 4)) * 0x101,
            size=draw(st.sampled_from(SIZES)),
            ip_flags=draw(st.sampled_from(("", "DF"))),
            options=draw(st.sampled_from((b"", bytes.fromhex("0101080a0000000100000002")))),
            sequence=draw(st.sampled_from((1, 0x7FFFFFFF, 0xFFFFFF00))),
            ident=draw(st.sampled_from((0, 0x1234, 0xFFFC))),
            tos=draw(st.sampled_from((0, 2))),
        )
        for _ in range(draw(st.sampled_from((1, 1, 2, 3, 18, 24))))
    ]
    datagrams: list[tuple[bytes, str]] = []
    for _ in range(draw(st.integers(1, 40))):
        flow = flows[draw(st.integers(0, len(flows) - 1))]
        for _ in range(draw(AT_A_TIME)):
            packet = flow.packet(draw(SIZE_OF[flow.size]), draw(HOW if flow.destination == POD else HOW_IPV6))
            datagrams.append((packet, TWIN if flow.source in (TWIN_POD, TWIN_POD6) else NEAR))
    messages = trains(datagrams, longest=draw(st.sampled_from((1, 2, 3, 10, 50))))
    return [replace(message, ecn=draw(MOSTLY_UNMARKED)) for message in messages]


@st.composite
def wire_messages(
    draw: st.DrawFn,
    packets: st.SearchStrategy[bytes] | None = None,
    prefixes: Sequence[bytes] = (b"",) + (vxlan(b""),) * 5,
) -> list[Message]:
    """What anybody may send: packets with and without a prefix, most of them changed, in trains of any size."""
    messages = []
    for _ in range(draw(st.integers(1, 8))):
        payload = b""
        for _ in range(draw(st.integers(1, 5))):
            piece = bytearray(draw(st.sampled_from(prefixes)) + draw(ANY_PACKET if packets is None else packets))
            for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
                at = draw(st.integers(0, 41))
                piece[at : at + 1] = draw(st.binary(max_size=2))
            payload += piece
        payload = payload[:60_000]
        smallest = -(-len(payload) // ICMP_BURST) or 1
        size = draw(st.just(0) | st.integers(smallest, max(smallest, len(payload))))
        messages.append(Message(payload, draw(OUTER), size if size < len(payload) else 0, draw(ECN)))
    return messages


ENCAP_BATCHES = st.lists(reads(), min_size=5, max_size=40)
DECAP_BATCHES = st.lists(st.tuples(ANY_PACKET, OUTER), min_size=5, max_size=40)
WIRE_BATCHES = wire_messages()
STREAM_BATCHES = streams()
SOURCE_CHECKS = st.sampled_from(("off", "peer", "peer", "strict"))

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
FULL_RUN = settings(QUICK, max_examples=10_000, derandomize=False)


Pair = tuple[FastDatapath, ReferenceDatapath]

KINDS = ("udp-plain", "udp-gro", "udp-cut", "udp-bare", "vxlan-gro", "vxlan-cut")
"""udp, vxlan: the encapsulation. plain: peers send one datagram at a time; gro: trains, which arrive whole; cut:
trains, which the kernel cuts up; bare: as gro, with a TUN that knows no virtio headers."""


@contextmanager
def both(kind: str, *, has_ipv6: bool = False) -> Iterator[Pair]:
    """Both, with the same table; their counters agree at the end too."""
    encapsulation, name = kind.split("-")
    how = {
        "has_gro": name in ("gro", "bare"),
        "is_in_trains": name != "plain",
        "has_vnet_hdr": name != "bare",
        "is_vxlan": encapsulation == "vxlan",
        "has_ipv6": has_ipv6,
    }
    model = ReferenceDatapath(**how)
    with FastDatapath(**how) as fast:
        model.table = fast.table
        yield fast, model
        assert fast.counters == model.counters


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One kind."""
    skip_unless_built()
    with both(request.param) as pair:
        yield pair


@pytest.fixture
def pairs() -> Iterator[dict[str, Pair]]:
    """All kinds, for the same packets: making them up costs more than carrying them."""
    skip_unless_built()
    with ExitStack() as undo:
        yield {kind: undo.enter_context(both(kind)) for kind in KINDS}


def each(pairs: dict[str, Pair]) -> Iterator[tuple[str, FastDatapath, ReferenceDatapath]]:
    """One kind after the other; a failure says which it was."""
    for kind, (fast, model) in pairs.items():
        note(f"kind: {kind}")
        yield kind, fast, model


def assert_equal(fast: Batch, model: Batch) -> int:
    """Returns how many writes are merged ones."""
    assert fast.counts == model.counts
    assert fast.sends == model.sends
    for name in model.counts:
        event(name)
    return assert_same_packets(fast.writes, model.writes)


def check_encap(
    pairs: dict[str, Pair], how: settings, batches: st.SearchStrategy[list[bytes]] = ENCAP_BATCHES
) -> None:
    @how
    @given(raws=batches)
    def equal(raws: list[bytes]) -> None:
        bare = [NO_VNET_HDR + raw[len(NO_VNET_HDR) :] for raw in raws]
        for _, fast, model in each(pairs):
            given_raws = raws if fast.has_vnet_hdr else bare
            assert_equal(fast.encap_batch(given_raws), model.encap_batch(given_raws))

    equal()


def check_decap(
    pairs: dict[str, Pair], how: settings, batches: st.SearchStrategy[list[tuple[bytes, str]]] = DECAP_BATCHES
) -> None:
    @how
    @given(datagrams=batches, source_check=SOURCE_CHECKS, ecn=ECN)
    def equal(datagrams: list[tuple[bytes, str]], source_check: str, ecn: int) -> None:
        for _, fast, model in each(pairs):
            if source_check != fast.table.source_check:
                fast.configure(source_check=source_check)
                model.table = fast.table
            assert_equal(fast.decap_batch(datagrams, ecn), model.decap_batch(datagrams, ecn))

    equal()


def check_wire(
    pairs: dict[str, Pair], how: settings, batches: st.SearchStrategy[list[Message]] = WIRE_BATCHES
) -> None:
    @how
    @given(messages=batches)
    def equal(messages: list[Message]) -> None:
        for _, fast, model in each(pairs):
            assert_equal(fast.decap_wire(messages), model.decap_wire(messages))

    equal()


def check_streams(
    pairs: dict[str, Pair], how: settings, batches: st.SearchStrategy[list[Message]] = STREAM_BATCHES
) -> None:
    n_merged, n_written = Counter[str](), Counter[str]()

    @how
    @given(messages=batches)
    def equal(messages: list[Message]) -> None:
        for kind, fast, model in each(pairs):
            got = fast.decap_messages(messages)
            n_merged[kind] += assert_equal(got, model.decap_messages(messages))
            n_written[kind] += len(got.writes)

    equal()
    for kind, (fast, _) in pairs.items():
        if fast.has_vnet_hdr:
            # A good part is merged, and a good part is not.
            assert n_written[kind] / 10 < n_merged[kind] < n_written[kind] * 9 / 10
        else:
            assert n_merged[kind] == 0


def test_encap_equals_the_reference_over_random_batches(pairs: dict[str, Pair]) -> None:
    check_encap(pairs, QUICK)
    assert all(model.counters["encap_packets"] > 500 for _, model in pairs.values())


def test_decap_equals_the_reference_over_random_batches(pairs: dict[str, Pair]) -> None:
    check_decap(pairs, QUICK)
    assert all(model.counters["decap_packets"] > 500 for _, model in pairs.values())


def test_decap_equals_the_reference_over_whatever_anybody_sends(pairs: dict[str, Pair]) -> None:
    check_wire(pairs, settings(QUICK, max_examples=60))


def test_merged_flows_come_out_as_the_reference_delivers_them(pairs: dict[str, Pair]) -> None:
    check_streams(pairs, QUICK)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_very_many_merged_flows_come_out_as_the_reference_delivers_them(pairs: dict[str, Pair]) -> None:
    check_streams(pairs, FULL_RUN)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_decap_equals_the_reference_over_very_much_of_what_anybody_sends(pairs: dict[str, Pair]) -> None:
    check_wire(pairs, FULL_RUN)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_encap_equals_the_reference_over_very_many_random_batches(pairs: dict[str, Pair]) -> None:
    check_encap(pairs, FULL_RUN)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_decap_equals_the_reference_over_very_many_random_batches(pairs: dict[str, Pair]) -> None:
    check_decap(pairs, FULL_RUN)


def test_both_agree_on_every_value_of_every_byte_of_the_header(pair: Pair) -> None:
    out, into = GOOD_ENCAP["options"], GOOD_DECAP["timestamp"][0]
    fast, model = pair
    for at in range(32):
        raws = [NO_VNET_HDR + out[:at] + bytes([value]) + out[at + 1 :] for value in range(256)]
        assert_equal_plainly(fast.encap_batch(raws), model.encap_batch(raws))
        changed = [into[:at] + bytes([value]) + into[at + 1 :] for value in range(256)]
        datagrams = [(with_header_checksum(packet), NEAR) for packet in changed]
        assert_equal_plainly(fast.decap_batch(datagrams), model.decap_batch(datagrams))


def assert_equal_plainly(fast: Batch, model: Batch) -> None:
    assert (fast.counts, fast.sends) == (model.counts, model.sends)
    assert_same_packets(fast.writes, model.writes)

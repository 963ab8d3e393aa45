"""What only VXLAN has: the checks of the prefix, the sockets that flows leave from, and what a kernel may hand over.

Everything else in this directory runs over both encapsulations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.datapath.cases import DECAP_VXLAN, Bad
from tests.datapath.harness import Datapath, FastDatapath, Message, implementation, skip_unless_built
from tests.packets import (
    GSO_TCPV4,
    GSO_UDP_L4,
    MTU,
    NEAR,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OUR_MAC,
    PARTIAL,
    POD,
    TWIN_POD,
    ipv4,
    pattern,
    peer_mac,
    stepped,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
    vxlan,
)
from tests.reference import PREFIX_LEN, Outcome

IN = udp(NEAR_POD, POD, b"a good packet")
BROADCAST = b"\xff" * 6


@pytest.fixture
def is_vxlan() -> bool:
    return True


@pytest.fixture(params=["reference", "fastpath", "trains"])
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    with implementation(request.param, is_vxlan=True) as datapath:
        yield datapath


def decap_wire(datapath: Datapath, payload: bytes, source: str = NEAR) -> Outcome:
    return datapath.decap_wire([Message(payload, source)]).outcome()


@pytest.mark.parametrize("case", DECAP_VXLAN, ids=lambda case: case.slug)
def test_a_bad_prefix_is_dropped_under_its_own_counter_and_the_next_is_looked_at(
    datapath: Datapath, case: Bad
) -> None:
    assert decap_wire(datapath, case.packet, case.source) == Outcome(case.counter)
    assert decap_wire(datapath, vxlan(IN)) == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(IN),))


@pytest.mark.parametrize(
    "payload",
    [
        *(vxlan(IN, flags=n) for n in (8, 9, 0x0C, 0x18, 0x88, 0xFF)),
        vxlan(IN, reserved=(0xFFFFFF, 0xFF)),
        vxlan(IN, source=BROADCAST),
        vxlan(IN, source=bytes(6)),
        vxlan(IN, source=OUR_MAC),
        vxlan(IN, source=peer_mac(2)),
        vxlan(IN + b"trailing"),
    ],
    ids=lambda payload: payload[:PREFIX_LEN].hex(),
)
def test_reserved_bits_and_the_inner_source_mac_mean_nothing(datapath: Datapath, payload: bytes) -> None:
    assert decap_wire(datapath, payload) == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(IN),))


def test_a_train_of_bad_prefixes_is_cut_up_and_counted_one_by_one(fast: FastDatapath) -> None:
    payloads = [vxlan(IN), vxlan(IN, vni=9), vxlan(IN), vxlan(IN, destination=BROADCAST), vxlan(IN, flags=0)]
    short = vxlan(IN)[:5]
    batch = fast.decap_wire([Message(b"".join(payloads) + short, NEAR, len(payloads[0]))])
    assert batch.counts == {
        "decap_packets": 6,
        "decap_delivered": 2,
        "decap_drop_vxlan_vni": 1,
        "decap_drop_vxlan_mac": 1,
        "decap_drop_vxlan_flags": 1,
        "decap_drop_vxlan_short": 1,
    }


def test_a_message_that_is_one_bare_packet_is_cut_all_the_same(fast: FastDatapath) -> None:
    whole = udp(NEAR_POD, POD, bytes(500), check=PARTIAL)
    assert fast.decap_wire([Message(whole, NEAR, 100)]).counts == {
        "decap_packets": 6,
        "decap_drop_vxlan_flags": 6,
    }


# -------------------------------------------------------------------------------------------- where flows leave


def flow(i: int, n_bytes: int = 100, *, protocol: int = 17, destination: str = NEAR_POD, **ip: object) -> bytes:
    """A packet of flow number i."""
    build = tcp_segment if protocol == 6 else udp_segment
    segment = build(POD, destination, pattern(n_bytes), ports=(20_000 + i, 53))
    return ipv4(POD, destination, segment, protocol=protocol, **ip)  # type: ignore[arg-type]


def ports(fast: FastDatapath, raws: list[bytes]) -> list[int]:
    return [port for _packet, port in fast.encap_with_ports(raws)]


@pytest.mark.parametrize("protocol", [6, 17])
def test_a_flow_leaves_from_one_socket_and_flows_are_spread_over_all(fast: FastDatapath, protocol: int) -> None:
    seen: dict[int, int] = {}
    for i in range(300):
        packet = NO_VNET_HDR + flow(i, protocol=protocol)
        longer = NO_VNET_HDR + flow(i, 300, protocol=protocol, options=b"\1" * 8, tos=7)
        first, *others = ports(fast, [packet, longer, packet])
        assert others == [first] * 2
        seen[first] = seen.get(first, 0) + 1
    senders = {sock.getsockname()[1] for sock in fast.senders}
    assert seen.keys() == senders
    assert min(seen.values()) > 300 / len(senders) / 2


def test_the_segments_of_a_super_packet_leave_where_single_packets_of_their_flow_do(fast: FastDatapath) -> None:
    for protocol, gso_type in ((6, GSO_TCPV4), (17, GSO_UDP_L4)):
        for i in range(20):
            whole = vnet_hdr(flags=NEEDS_CSUM, gso_type=gso_type, gso_size=100) + flow(i, 999, protocol=protocol)
            assert len(set(ports(fast, [NO_VNET_HDR + flow(i, protocol=protocol), whole]))) == 1


def test_all_fragments_between_two_addresses_leave_from_one_socket(fast: FastDatapath) -> None:
    raws = []
    for i in range(20):
        raws.append(NO_VNET_HDR + flow(i, 96, flags="MF"))
        raws.append(NO_VNET_HDR + ipv4(POD, NEAR_POD, pattern(96, i), offset=104, flags="MF"))
        raws.append(NO_VNET_HDR + ipv4(POD, NEAR_POD, pattern(50, i), offset=200))
    assert len(set(ports(fast, raws))) == 1


def test_packets_without_ports_are_spread_by_their_addresses(fast: FastDatapath) -> None:
    seen = set()
    for i in range(50):
        echo = ipv4(f"10.244.1.{i}", NEAR_POD, b"\x08\0" + bytes(6), protocol=1)
        short = ipv4(f"10.244.1.{i}", NEAR_POD, b"\1\2\3", protocol=17)
        port, other = ports(fast, [NO_VNET_HDR + echo, NO_VNET_HDR + short])
        assert port == other
        seen.add(port)
    assert len(seen) == len(fast.senders)


def test_flows_that_are_mixed_keep_their_order(fast: FastDatapath) -> None:
    rng = random.Random(7)
    packets = []
    for number in range(200):
        destination = rng.choice((NEAR_POD, TWIN_POD))
        packets.append(flow(rng.randrange(8), rng.choice((60, 60, 200)), destination=destination, ident=number))
    batch = fast.encap_batch([NO_VNET_HDR + packet for packet in packets])
    sent = [payload for payloads in batch.sends.values() for payload in payloads]
    for key in {(packet[16:24]) for packet in packets}:
        expected = [stepped(packet) for packet in packets if packet[16:24] == key]
        assert [payload for payload in sent if payload[16:24] == key] == expected


def test_a_packet_with_its_prefix_is_one_piece_of_a_message(fast: FastDatapath) -> None:
    raws = [NO_VNET_HDR + flow(1, 64, ident=i) for i in range(40)]
    assert fast.encap_trains(raws) == [(40, 92)]


def test_the_largest_packets_that_fit_a_datagram_are_sent_and_longer_ones_counted(fast: FastDatapath) -> None:
    most = 65_507 - PREFIX_LEN
    fits, too_long = (ipv4(POD, NEAR_POD, bytes(n - 20), protocol=50) for n in (most, most + 1))
    batch = fast.encap_batch([NO_VNET_HDR + fits])
    assert batch.counts == {"encap_packets": 1, "encap_sent": 1}
    batch = fast.encap_batch([NO_VNET_HDR + too_long])
    assert batch.counts == {"encap_packets": 1, "encap_drop_send": 1}


# -------------------------------------------------------------------------------------------------- per peer


def test_bytes_are_counted_without_their_prefixes(fast: FastDatapath) -> None:
    fast.encap_batch([NO_VNET_HDR + flow(1, 100)] * 3)
    whole = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_UDP_L4, gso_size=100) + flow(1, 250)
    fast.encap_batch([whole])
    fast.decap_batch([(IN, NEAR)] * 5)
    sent = 3 * 128 + 2 * 128 + 78
    assert fast.peer_counts(NEAR_POD) == [6, sent, 5, 5 * len(IN)]


def test_the_udp_backend_sends_from_the_socket_that_it_receives_with() -> None:
    skip_unless_built()
    with FastDatapath() as fast:
        assert set(ports(fast, [NO_VNET_HDR + flow(i) for i in range(50)])) == {fast.udp.getsockname()[1]}


def test_the_mtu_of_the_peer_is_that_of_the_inner_packet(datapath: Datapath) -> None:
    packet = ipv4(POD, NEAR_POD, bytes(MTU - 20), flags="DF")
    assert datapath.encap(NO_VNET_HDR + packet).counter == "encap_sent"

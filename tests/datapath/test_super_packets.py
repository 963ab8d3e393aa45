"""Reads of the TUN with work left to us: super-packets to cut up, and checksums to complete.

What must come out is built packet by packet with the builders of tests/packets.py.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.datapath.harness import Batch, Datapath, FastDatapath, ReferenceDatapath, remote_of, skip_unless_built
from tests.packets import (
    DEAF_POD,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NARROW_MTU,
    NARROW_POD,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    PARTIAL,
    POD,
    POD6,
    TCP_ACK,
    TCP_CWR,
    TCP_FIN,
    TCP_PSH,
    TWIN_POD,
    UNLEASED,
    icmp_answer,
    icmp_message,
    ipv4,
    ipv6,
    pattern,
    stepped,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.reference import Outcome, Remote
from udptun.core.offload import Offload
from udptun.lab.machine import wait_until


@dataclass(frozen=True, slots=True)
class Super:
    """A super-packet of TCP, or of UDP, and the packets that it stands for."""

    n_bytes: int
    size: int
    protocol: int = 6
    destination: str = NEAR_POD
    flags: int = TCP_ACK
    sequence: int = 1000
    tcp_options: bytes = b""
    ident: int = 0x1234
    ip: tuple[tuple[str, Any], ...] = ()
    gso_type: int = 0
    seed: int = 0

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.destination

    @property
    def gso_tcp(self) -> int:
        return GSO_TCPV6 if self.is_ipv6 else GSO_TCPV4

    @property
    def start(self) -> int:
        """Where the transport header begins; with IPv4 nobody looks at that."""
        return 40 + sum(1 + len(rest) for _kind, rest in dict(self.ip).get("headers", ())) if self.is_ipv6 else 20

    def _packet(self, at: int, data: bytes, *, number: int = 0, flags: int = 0, **check: Any) -> bytes:
        source = POD6 if self.is_ipv6 else POD
        if self.protocol == 6:
            how = {"sequence": self.sequence + at, "flags": flags, "options": self.tcp_options, **check}
            transport = tcp_segment(source, self.destination, data, **how)
        else:
            transport = udp_segment(source, self.destination, data, **check)
        if self.is_ipv6:
            return ipv6(source, self.destination, transport, protocol=self.protocol, **dict(self.ip))
        ident = (self.ident + number) & 0xFFFF
        return ipv4(POD, self.destination, transport, protocol=self.protocol, ident=ident, **dict(self.ip))

    @property
    def whole(self) -> bytes:
        return self._packet(0, pattern(self.n_bytes, self.seed), flags=self.flags, check=PARTIAL)

    @property
    def raw(self) -> bytes:
        gso_type = self.gso_type or (self.gso_tcp if self.protocol == 6 else GSO_UDP_L4)
        offset = 16 if self.protocol == 6 else 6
        # hdr_len is wrong on purpose: it is wrong in packets that come from elsewhere, too.
        return vnet_hdr(
            flags=NEEDS_CSUM, gso_type=gso_type, hdr_len=7, gso_size=self.size, start=self.start, offset=offset
        ) + self.whole

    @property
    def packets(self) -> list[bytes]:
        data = pattern(self.n_bytes, self.seed)
        starts = range(0, self.n_bytes, self.size)
        flags = [self.flags] * len(starts)
        for i in range(len(starts)):
            if i < len(starts) - 1:
                flags[i] &= ~(TCP_FIN | TCP_PSH)
            if i > 0:
                flags[i] &= ~TCP_CWR
        return [
            self._packet(at, data[at : at + self.size], number=i, flags=flags[i]) for i, at in enumerate(starts)
        ]


def assert_sent(datapath: Datapath, *supers: Super) -> None:
    batch = datapath.encap_batch([one.raw for one in supers])
    expected: dict[Remote, list[bytes]] = {}
    for one in supers:
        expected.setdefault(remote_of(datapath, one.destination), []).extend(map(stepped, one.packets))
    n = sum(map(len, expected.values()))
    assert batch == Batch({"encap_packets": n, "encap_sent": n}, expected)


SIZES = [
    (1, 1),
    (1, 1432),
    (2, 1),
    (3, 2),
    (130, 1),
    (1431, 1432),
    (1432, 1432),
    (1433, 1432),
    (2864, 1432),
    (4000, 999),
    (20_000, 536),
    (20_001, 533),
    (65_000, 1432),
]


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize(("n_bytes", "size"), SIZES)
def test_a_super_packet_goes_out_as_its_segments(datapath: Datapath, n_bytes: int, size: int, protocol: int) -> None:
    assert_sent(datapath, Super(n_bytes, size, protocol))


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(Super(65_535 - 40, 1432), id="TCP"),
        pytest.param(Super(65_535 - 28, 1444, protocol=17), id="UDP"),
        pytest.param(
            Super(65_535 - 120, 1352, tcp_options=b"\1" * 40, ip=(("options", b"\1" * 40),)), id="largest headers"
        ),
    ],
)
def test_the_largest_packet_there_is_goes_out_as_its_segments(datapath: Datapath, one: Super) -> None:
    assert len(one.whole) == 65_535
    assert_sent(datapath, one)


def test_a_super_packet_may_have_2048_segments_and_no_more(datapath: Datapath) -> None:
    assert_sent(datapath, Super(2048, 1))
    assert datapath.encap(Super(2049, 1).raw) == Outcome("encap_drop_malformed")


def test_every_combination_of_flags_is_spread_over_the_segments(datapath: Datapath) -> None:
    for n_bytes in (1, 2, 3):
        assert_sent(datapath, *(Super(n_bytes, 1, flags=flags) for flags in range(0x1000 if n_bytes == 3 else 0x100)))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"sequence": 0xFFFFFFFF - 700}, id="sequence wraps"),
        pytest.param({"ident": 0xFFFE}, id="id wraps"),
        pytest.param({"tcp_options": bytes.fromhex("0101080a11111111222222ff")}, id="timestamps"),
        pytest.param({"tcp_options": b"\1" * 40}, id="40 bytes of TCP options"),
        pytest.param({"ip": (("options", b"\1" * 4),)}, id="IP options"),
        pytest.param({"ip": (("options", b"\1" * 40),), "tcp_options": b"\1" * 40}, id="largest headers"),
        pytest.param({"ip": (("tos", 0xB9),)}, id="TOS and ECN"),
        pytest.param({"ip": (("flags", "DF"),)}, id="DF"),
        pytest.param({"ip": (("ttl", 2),)}, id="TTL 2"),
        pytest.param({"ip": (("ttl", 255),)}, id="TTL 255"),
        pytest.param({"gso_type": GSO_TCPV4 | GSO_ECN, "flags": TCP_ACK | TCP_CWR}, id="ECN"),
    ],
)
def test_the_headers_of_every_segment_are_the_super_packets(datapath: Datapath, changes: dict[str, Any]) -> None:
    assert_sent(datapath, Super(3000, 700, **changes))


@pytest.mark.parametrize(("protocol", "shown"), [(6, b"\0\0"), (17, b"\xff\xff")])
def test_a_segment_whose_checksum_is_zero_says_so_in_the_way_of_its_protocol(
    datapath: Datapath, protocol: int, shown: bytes
) -> None:
    segment, at = ((tcp_segment, 16), (udp_segment, 6))[protocol == 17]
    # With these two bytes of data the right checksum is zero.
    data = segment(POD, NEAR_POD, bytes(2))[at : at + 2]
    whole = ipv4(POD, NEAR_POD, segment(POD, NEAR_POD, data + b"zz", check=PARTIAL), protocol=protocol)
    raw = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4 if protocol == 6 else GSO_UDP_L4, gso_size=2) + whole
    sent = datapath.encap_batch([raw]).sends[remote_of(datapath, NEAR_POD)]
    assert [len(packet) for packet in sent] == [len(whole) - 2] * 2
    assert sent[0][20 + at : 22 + at] == shown


def test_a_super_packet_and_what_is_around_it_keep_their_order(datapath: Datapath) -> None:
    raws: list[bytes] = []
    expected: dict[Remote, list[bytes]] = {}
    for i in range(40):
        pod = (NEAR_POD, TWIN_POD)[i % 3 == 0]
        if i % 2:
            one = Super(1 + i * 37, 100, protocol=6 if i % 4 == 1 else 17, destination=pod, seed=i)
            raw, packets = one.raw, one.packets
        else:
            packets = [udp(POD, pod, pattern(100 - 8 * (i % 3), i))]
            raw = NO_VNET_HDR + packets[0]
        raws.append(raw)
        expected.setdefault(remote_of(datapath, pod), []).extend(map(stepped, packets))
    batch = datapath.encap_batch(raws)
    n = sum(map(len, expected.values()))
    assert batch == Batch({"encap_packets": n, "encap_sent": n}, expected)


# ------------------------------------------------------------------------------------------------------ drops


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize(
    ("destination", "ip", "counter", "answer"),
    [
        pytest.param(UNLEASED, (), "encap_drop_no_route", (3, 0, 0), id="unleased"),
        pytest.param(NEAR_POD, (("ttl", 1),), "encap_drop_ttl", (11, 0, 0), id="TTL 1"),
        pytest.param(NARROW_POD, (("flags", "DF"),), "encap_drop_too_big", (3, 4, NARROW_MTU), id="too big"),
    ],
)
def test_a_dropped_super_packet_counts_its_segments_and_is_answered_once(
    datapath: Datapath, protocol: int, destination: str, ip: Any, counter: str, answer: tuple[int, int, int]
) -> None:
    one = Super(6 * 1300 + 1, 1300, protocol, destination, ip=ip)
    batch = datapath.encap_batch([one.raw])
    kind, code, mtu = answer
    quoting = NO_VNET_HDR + icmp_answer(kind, code, one.whole, source=OWN, next_hop_mtu=mtu)
    assert batch == Batch({"encap_packets": 7, counter: 7, "icmp_sent": 1}, {}, [quoting])


def test_segments_longer_than_the_peer_takes_go_out_when_they_may_be_fragmented(datapath: Datapath) -> None:
    assert_sent(datapath, Super(5000, 1300, destination=NARROW_POD))


def test_segments_that_just_fit_the_peer_go_out_however_long_the_super_packet_is(datapath: Datapath) -> None:
    one = Super(20_000, NARROW_MTU - 40, destination=NARROW_POD, ip=(("flags", "DF"),))
    assert_sent(datapath, one)
    batch = datapath.encap_batch([replace(one, size=NARROW_MTU - 39).raw])
    assert batch.counts == {"encap_packets": 18, "encap_drop_too_big": 18, "icmp_sent": 1}


def test_one_segment_shorter_than_its_size_says_is_not_too_big(datapath: Datapath) -> None:
    assert_sent(datapath, Super(100, 60_000, destination=NARROW_POD, ip=(("flags", "DF"),)))


def test_segments_that_the_kernel_refuses_are_counted_one_by_one(datapath: Datapath) -> None:
    good, refused = Super(3000, 1000), Super(3000, 1000, destination=DEAF_POD)
    batch = datapath.encap_batch([good.raw, refused.raw, good.raw])
    assert batch.counts == {"encap_packets": 9, "encap_sent": 6, "encap_drop_send": 3}
    assert batch.sends == {remote_of(datapath, NEAR_POD): [stepped(packet) for packet in good.packets * 2]}


def _gso(packet: bytes, gso_type: int = GSO_TCPV4, gso_size: int = 100) -> bytes:
    return vnet_hdr(flags=NEEDS_CSUM, gso_type=gso_type, gso_size=gso_size, start=20, offset=16) + packet


_TCP, _UDP = tcp(POD, NEAR_POD, pattern(500)), udp(POD, NEAR_POD, pattern(500))


def _needs_csum(start: int, offset: int, packet: bytes = _UDP) -> bytes:
    return vnet_hdr(flags=NEEDS_CSUM, start=start, offset=offset) + packet


MISFITS = {
    "size-0": _gso(_TCP, gso_size=0),
    "udp-size-0": _gso(_UDP, GSO_UDP_L4, gso_size=0),
    "tcp-without-payload": _gso(tcp(POD, NEAR_POD)),
    "udp-without-payload": _gso(udp(POD, NEAR_POD), GSO_UDP_L4),
    **{f"type-{kind:#x}": _gso(_TCP, kind) for kind in (2, 3, 4, 6, 7, 0x21, 0x41, 0x7F, GSO_ECN, 0xFF)},
    "udp-fragmentation-offload": _gso(_UDP, 3),
    "tcp-called-udp": _gso(_TCP, GSO_UDP_L4),
    "udp-called-tcp": _gso(_UDP, GSO_TCPV4),
    "of-another-protocol": _gso(ipv4(POD, NEAR_POD, _TCP[20:], protocol=132)),
    "data-offset-4": _gso(tcp(POD, NEAR_POD, bytes(500), data_offset=4)),
    "data-offset-past-the-end": _gso(tcp(POD, NEAR_POD, bytes(19), data_offset=10)),
    "tcp-header-cut": _gso(ipv4(POD, NEAR_POD, bytes(19), protocol=6)),
    "udp-header-cut": _gso(ipv4(POD, NEAR_POD, bytes(7)), GSO_UDP_L4),
    "headers-cut-by-the-total-length": _gso(ipv4(POD, NEAR_POD, _TCP[20:], protocol=6, total_len=40)),
    "first-fragment": _gso(ipv4(POD, NEAR_POD, _TCP[20:], protocol=6, flags="MF")),
    "last-fragment": _gso(ipv4(POD, NEAR_POD, _TCP[20:], protocol=6, offset=8)),
    "udp-first-fragment": _gso(ipv4(POD, NEAR_POD, _UDP[20:], flags="MF"), GSO_UDP_L4),
    "misfit-before-unroutable": _gso(tcp(POD, UNLEASED, bytes(500)), gso_size=0),
    "checksum-field-one-byte-past-the-end": _needs_csum(20, len(_UDP) - 21),
    "checksum-field-past-the-end": _needs_csum(20, len(_UDP)),
    "checksum-field-in-the-trailing-bytes": _needs_csum(20, len(_UDP) - 20, _UDP + bytes(10)),
    "checksum-starts-at-the-end": _needs_csum(len(_UDP), 0),
    "checksum-starts-past-the-end": _needs_csum(65_535, 0),
    "checksum-as-far-off-as-can-be": _needs_csum(65_535, 65_535),
    "checksum-offset-past-the-end": _needs_csum(20, 65_535),
    "checksum-starts-at-0": _needs_csum(0, 10),
    "checksum-starts-in-the-ip-header": _needs_csum(19, 6),
    "checksum-starts-in-the-ip-options": _needs_csum(20, 6, ipv4(POD, NEAR_POD, _UDP[20:], options=b"\1" * 4)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_packet_that_its_virtio_header_does_not_fit_is_malformed(datapath: Datapath, name: str) -> None:
    assert datapath.encap(MISFITS[name]) == Outcome("encap_drop_malformed")
    assert_sent(datapath, Super(1000, 300))


# -------------------------------------------------------------------------------------------------- checksums


@pytest.mark.parametrize("n_bytes", [0, 1, 2, 63, 64, 65, 1000, 1444])
@pytest.mark.parametrize("n_options", [0, 4, 40])
def test_a_checksum_that_the_kernel_left_to_us_is_completed(datapath: Datapath, n_bytes: int, n_options: int) -> None:
    near = remote_of(datapath, NEAR_POD)
    for protocol, segment, offset in ((6, tcp_segment, 16), (17, udp_segment, 6)):
        given, complete = (
            ipv4(
                POD,
                NEAR_POD,
                segment(POD, NEAR_POD, pattern(n_bytes), **check),
                protocol=protocol,
                options=b"\1" * n_options,
            )
            for check in ({"check": PARTIAL}, {})
        )
        raw = vnet_hdr(flags=NEEDS_CSUM, start=20 + n_options, offset=offset) + given + b"trailing"
        assert datapath.encap(raw) == Outcome("encap_sent", sends=((near, stepped(complete)),))


@pytest.mark.parametrize("protocol", [6, 17])
def test_a_completed_checksum_of_zero_is_written_as_its_other_form(datapath: Datapath, protocol: int) -> None:
    segment, offset = ((tcp_segment, 16), (udp_segment, 6))[protocol == 17]
    complete = segment(POD, NEAR_POD, bytes(2))
    # With these two bytes of data the right checksum is zero.
    data = complete[offset : offset + 2]
    packet = ipv4(POD, NEAR_POD, segment(POD, NEAR_POD, data, check=PARTIAL), protocol=protocol)
    outcome = datapath.encap(vnet_hdr(flags=NEEDS_CSUM, start=20, offset=offset) + packet)
    ((_remote, sent),) = outcome.sends
    assert sent[20 + offset : 22 + offset] == b"\xff\xff"


def test_an_answer_quotes_the_packet_with_its_completed_checksum(datapath: Datapath) -> None:
    raw = vnet_hdr(flags=NEEDS_CSUM, start=20, offset=6) + udp(POD, UNLEASED, b"data", check=PARTIAL)
    answer = NO_VNET_HDR + icmp_answer(3, 0, udp(POD, UNLEASED, b"data"), source=OWN)
    assert datapath.encap(raw) == Outcome("encap_drop_no_route", writes=(answer,), icmp="icmp_sent")


def test_any_field_of_any_protocol_can_be_completed(datapath: Datapath) -> None:
    message = icmp_message(8, data=pattern(101))
    packet = ipv4(POD, NEAR_POD, message[:2] + bytes(2) + message[4:], protocol=1)
    outcome = datapath.encap(vnet_hdr(flags=NEEDS_CSUM, start=20, offset=2) + packet)
    expected = stepped(ipv4(POD, NEAR_POD, message, protocol=1))
    assert outcome == Outcome("encap_sent", sends=((remote_of(datapath, NEAR_POD), expected),))


@pytest.mark.parametrize("flags", [0, 2, 0xFE])
def test_other_flags_of_the_virtio_header_change_nothing(datapath: Datapath, flags: int) -> None:
    outcome = datapath.encap(vnet_hdr(flags=flags, hdr_len=9, gso_size=9, start=9999, offset=9999) + _UDP)
    assert outcome == Outcome("encap_sent", sends=((remote_of(datapath, NEAR_POD), stepped(_UDP)),))


def test_a_wrong_header_checksum_is_replaced_in_segments(datapath: Datapath) -> None:
    one = Super(1000, 300)
    batch = datapath.encap_batch([one.raw[:10] + with_header_checksum(one.whole, 0xBEEF)])
    assert batch.sends == {remote_of(datapath, NEAR_POD): [stepped(packet) for packet in one.packets]}


# ------------------------------------------------------------------------------------------ fast path alone


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        pytest.param(Super(3 * 1432, 1432), [(3, 1472)], id="one message"),
        pytest.param(Super(46 * 1400, 1400), [(23, 1440), (23, 1440)], id="split evenly"),
        pytest.param(Super(100, 1), [(50, 41), (50, 41)], id="64 datagrams a message at most"),
        pytest.param(Super(1, 1432), [(1, 41)], id="a single datagram"),
    ],
)
def test_segments_leave_in_as_few_messages_as_hold_them(
    fast: FastDatapath, one: Super, expected: list[tuple[int, int]]
) -> None:
    assert fast.encap_trains([one.raw]) == expected


def test_small_packets_of_one_size_to_one_peer_leave_in_one_message(fast: FastDatapath) -> None:
    packets = [udp(POD, NEAR_POD, pattern(64, i)) for i in range(40)]
    assert fast.encap_trains([NO_VNET_HDR + packet for packet in packets]) == [(40, 92)]


def test_a_shorter_packet_ends_the_message_and_a_longer_one_begins_another(fast: FastDatapath) -> None:
    packets = [udp(POD, NEAR_POD, bytes(n)) for n in (72, 72, 50, 50, 72, 72, 90)]
    expected = [(3, 100), (1, 78), (2, 100), (1, 118)]
    assert fast.encap_trains([NO_VNET_HDR + packet for packet in packets]) == expected


def test_a_peer_that_may_read_one_at_a_time_is_sent_few_at_once() -> None:
    """A lease without our mark is that of a flanneld, whose loop reads one datagram a system call."""
    skip_unless_built()
    packets = [udp(POD, NEAR_POD, pattern(64, i)) for i in range(40)]
    with FastDatapath(are_peers_udptun=False) as fast:
        assert fast.encap_trains([Super(46 * 1400, 1400).raw]) == [(16, 1440), (16, 1440), (14, 1440)]
        assert fast.encap_trains([NO_VNET_HDR + packet for packet in packets]) == [(16, 92), (16, 92), (8, 92)]


def test_all_datagrams_arrive_when_the_kernel_refuses_to_cut_messages_up(fast: FastDatapath) -> None:
    # The kernel refuses UDP_SEGMENT (EINVAL), and nothing else, on a socket without checksums.
    so_no_check = 11
    for sock in (fast.udp, *fast.senders):
        sock.setsockopt(socket.SOL_SOCKET, so_no_check, 1)
    assert_sent(fast, Super(30_000, 1000), Super(777, 100, protocol=17), Super(5000, 1000, destination=TWIN_POD))
    assert_sent(fast, Super(30_000, 1000), Super(2048, 1))


def test_a_group_that_is_refused_once_costs_one_peer_its_groups_for_a_while(fast: FastDatapath) -> None:
    """A second in which the way to one peer refused groups ended them for all peers until the process ended."""
    to_near = Super(5000, 1000)
    whole = fast.encap_trains([to_near.raw])
    assert [n for n, _size in whole] == [5]
    so_no_check = 11
    for sock in (fast.udp, *fast.senders):
        sock.setsockopt(socket.SOL_SOCKET, so_no_check, 1)
    assert_sent(fast, to_near)
    for sock in (fast.udp, *fast.senders):
        sock.setsockopt(socket.SOL_SOCKET, so_no_check, 0)
    assert Offload.UDP_SEGMENT not in fast.refused
    assert [n for n, _size in fast.encap_trains([to_near.raw])] == [1] * 5
    wait_until("groups to the peer again", lambda: fast.encap_trains([to_near.raw]) == whole, 60)


def test_both_agree_on_every_value_of_every_byte_of_the_virtio_header(fast: FastDatapath) -> None:
    model = ReferenceDatapath()
    model.table = fast.table
    for raw in (Super(600, 250).raw, Super(600, 250, protocol=17).raw, _needs_csum(20, 6)):
        for at in range(10):
            raws = [raw[:at] + bytes([value]) + raw[at + 1 :] for value in range(256)]
            assert fast.encap_batch(raws) == model.encap_batch(raws)

"""IPv6 inside the tunnel: every row of the two tables in docs/wire-format.md, over both implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.datapath.harness import (
    Datapath,
    FastDatapath,
    Message,
    assert_every_packet_is_counted,
    implementation,
    remote_of,
)
from tests.datapath.ipv6_cases import DECAP, DECAP_VXLAN, ENCAP, GOOD_DECAP, GOOD_ENCAP, MALFORMED_READS
from tests.packets import (
    DEAF_POD6,
    DESTINATION_OPTIONS,
    GSO_TCPV6,
    HOP_BY_HOP,
    MTU,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN6,
    PARTIAL,
    POD,
    POD6,
    SLIM_POD6,
    STRANGER,
    TCP_ACK,
    TCP_CWR,
    TCP_FIN,
    TCP_PSH,
    UNLEASED6,
    address,
    destination_of,
    fragment_header,
    icmp_answer,
    icmp_answer_to_peer,
    icmpv6_message,
    ipv6,
    options_header,
    routing_header,
    source_of,
    stepped,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
)
from tests.reference import Outcome, Remote

OUT = udp(POD6, NEAR_POD6, b"a good packet")
IN = udp(NEAR_POD6, POD6, b"a good packet")
EXTENSIONS = {
    "": (),
    "behind-options": (options_header(HOP_BY_HOP), options_header(DESTINATION_OPTIONS)),
    "behind-a-routing-header": (routing_header(4, 0),),
}
behind_extensions = pytest.mark.parametrize("headers", EXTENSIONS.values(), ids=EXTENSIONS)


@pytest.fixture(params=["udp-reference", "udp-fastpath", "udp-trains", "vxlan-reference", "vxlan-trains"])
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    """Either implementation; with udp it carries both families, over VXLAN IPv6 alone."""
    encapsulation, name = request.param.split("-")
    with implementation(name, is_vxlan=encapsulation == "vxlan", has_ipv6=True) as datapath:
        yield datapath


of_udp = pytest.mark.parametrize("datapath", ["udp-reference", "udp-fastpath", "udp-trains"], indirect=True)
"""Where the other family is there, too."""


def for_each(slugs: Iterable[str], check: Callable[[str], None]) -> None:
    """Making a datapath costs more than a hundred packets."""
    for slug in slugs:
        try:
            check(slug)
        except BaseException as exc:
            exc.add_note(slug)
            raise


def test_encap_drops_every_kind_of_bad_packet_under_its_own_counter_and_goes_on(datapath: Datapath) -> None:
    cases = {case.slug: case for case in ENCAP}

    def check(slug: str) -> None:
        case = cases[slug]
        writes: tuple[bytes, ...] = ()
        if case.answer:
            type_, code, mtu = case.answer
            answer = icmp_answer(type_, code, case.quoted or case.packet, source=OWN6, next_hop_mtu=mtu)
            writes = (NO_VNET_HDR + answer,)
        outcome = datapath.encap(NO_VNET_HDR + case.packet)
        assert outcome == Outcome(case.counter, writes=writes, icmp=case.icmp)  # type: ignore[arg-type]

    for_each(cases, check)
    assert_good_packets_pass(datapath)
    assert_every_packet_is_counted(datapath)


def test_decap_drops_every_kind_of_bad_packet_under_its_own_counter_and_goes_on(datapath: Datapath) -> None:
    cases = {case.slug: case for case in sorted(DECAP, key=lambda case: case.source_check)}

    def check(slug: str) -> None:
        case = cases[slug]
        if datapath.table.source_check != case.source_check:
            datapath.configure(source_check=case.source_check)
        sends: tuple[tuple[Remote, bytes], ...] = ()
        if case.answer:
            type_, code, _mtu = case.answer
            answer = icmp_answer_to_peer(type_, code, case.quoted or case.packet, source=OWN6)
            sends = ((remote_of(datapath, source_of(case.packet)), answer),)
        outcome = datapath.decap(case.packet, case.source)
        assert outcome == Outcome(case.counter, sends=sends, icmp=case.icmp)  # type: ignore[arg-type]

    for_each(cases, check)
    assert_good_packets_pass(datapath)
    assert_every_packet_is_counted(datapath)


def assert_good_packets_pass(datapath: Datapath) -> None:
    out, into = datapath.encap(NO_VNET_HDR + OUT), datapath.decap(IN, NEAR)
    assert out == Outcome("encap_sent", sends=((remote_of(datapath, NEAR_POD6), stepped(OUT)),))
    assert into == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(IN),))


def test_encap_sends_every_kind_of_good_packet_as_it_is_but_for_the_hop_limit(datapath: Datapath) -> None:
    def check(slug: str) -> None:
        packet = GOOD_ENCAP[slug]
        expected = Outcome("encap_sent", sends=((remote_of(datapath, destination_of(packet)), stepped(packet)),))
        assert datapath.encap(NO_VNET_HDR + packet) == expected
        assert datapath.encap(NO_VNET_HDR + packet + b"trailing") == expected

    for_each(GOOD_ENCAP, check)


def test_decap_delivers_every_kind_of_good_packet_as_it_is_but_for_the_hop_limit(datapath: Datapath) -> None:
    def check(slug: str) -> None:
        packet, source = GOOD_DECAP[slug]
        expected = Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))
        assert datapath.decap(packet, source) == expected
        assert datapath.decap(packet + b"trailing", source) == expected

    for_each(GOOD_DECAP, check)


def test_reads_whose_virtio_header_does_not_fit_the_packet_are_malformed(datapath: Datapath) -> None:
    def check(slug: str) -> None:
        assert datapath.encap(MALFORMED_READS[slug]) == Outcome("encap_drop_malformed")

    for_each(MALFORMED_READS, check)


def test_every_truncation_of_a_good_packet_is_dropped_both_ways(datapath: Datapath) -> None:
    for n_bytes in range(1, len(OUT)):
        assert datapath.encap(NO_VNET_HDR + OUT[:n_bytes]) == Outcome(
            "encap_drop_short" if n_bytes < 40 else "encap_drop_malformed"
        )
        assert datapath.decap(IN[:n_bytes], NEAR) == Outcome(
            "decap_drop_short" if n_bytes < 40 else "decap_drop_length"
        )


@of_udp
def test_both_families_share_a_batch_and_keep_their_order(datapath: Datapath) -> None:
    ipv4_out, ipv4_in = udp(POD, NEAR_POD, b"of IPv4"), udp(NEAR_POD, POD, b"of IPv4")
    out = [OUT, ipv4_out, udp(POD6, UNLEASED6), ipv4_out, OUT]
    batch = datapath.encap_batch([NO_VNET_HDR + packet for packet in out])
    assert batch.sends == {remote_of(datapath, NEAR_POD6): [stepped(packet) for packet in out if packet != out[2]]}
    assert batch.writes == [NO_VNET_HDR + icmp_answer(1, 0, out[2], source=OWN6)]
    into = [IN, ipv4_in, IN, ipv4_in]
    batch = datapath.decap_batch([(packet, NEAR) for packet in into])
    assert batch.counts == {"decap_packets": 4, "decap_delivered": 4}
    if isinstance(datapath, FastDatapath):
        assert datapath.peer_counts(NEAR_POD6) == [2, 2 * len(OUT), 2, 2 * len(IN)]
        assert datapath.peer_counts(NEAR_POD) == [2, 2 * len(ipv4_out), 2, 2 * len(ipv4_in)]


def test_a_packet_of_one_family_never_reaches_a_lease_of_the_other(datapath: Datapath) -> None:
    """The last 32 bits of these addresses are in a lease of IPv4."""
    mapped = "::ffff:10.244.2.10", "fd00:244::10.244.2.10"
    for destination in mapped:
        assert datapath.encap(NO_VNET_HDR + udp(POD6, destination)).counter == "encap_drop_no_route"
    assert datapath.decap(udp(mapped[1], POD6), NEAR).counter == "decap_drop_source_spoofed"


def test_an_answer_that_the_kernel_refuses_is_suppressed(datapath: Datapath) -> None:
    datapath.configure(source_check="off")
    outcome = datapath.decap(udp(DEAF_POD6, POD6, ttl=1), STRANGER)
    assert outcome == Outcome("decap_drop_ttl", icmp="icmp_suppressed")


@of_udp
def test_a_dead_peer_is_unreachable(datapath: Datapath) -> None:
    peers = tuple(
        replace(peer, is_dead=ip_address(NEAR_POD6) in peer.subnet) for peer in datapath.table.peers
    )
    datapath.configure(peers=peers)
    answer = icmp_answer(1, 3, OUT, source=OWN6)
    expected = Outcome("encap_drop_dead", writes=(NO_VNET_HDR + answer,), icmp="icmp_sent")
    assert datapath.encap(NO_VNET_HDR + OUT) == expected
    assert datapath.encap(NO_VNET_HDR + udp(POD, NEAR_POD)).counter == "encap_sent"


of_vtep = pytest.mark.parametrize("datapath", ["vxlan-reference", "vxlan-trains"], indirect=True)


@of_vtep
def test_a_vtep_of_ipv6_takes_frames_of_ipv6_alone(datapath: Datapath) -> None:
    """The cases of DECAP_VXLAN; the next good packet passes."""
    cases = {case.slug: case for case in DECAP_VXLAN}

    def check(slug: str) -> None:
        message = Message(cases[slug].packet, cases[slug].source)
        assert datapath.decap_wire([message]).outcome() == Outcome(cases[slug].counter)

    for_each(cases, check)
    assert_good_packets_pass(datapath)


@of_vtep
def test_a_vtep_of_ipv6_neither_sends_nor_answers_packets_of_ipv4(datapath: Datapath) -> None:
    for packet in (udp(POD, NEAR_POD), udp(POD, "0.0.0.0"), udp(POD, NEAR_POD, ttl=1)):
        assert datapath.encap(NO_VNET_HDR + packet) == Outcome("encap_drop_malformed")
        assert datapath.inject(packet) == datapath.inject(packet, into_tun=True) == Outcome("inject_drop_malformed")


# ------------------------------------------------------------------------------------------ offloaded senders


@behind_extensions
@pytest.mark.parametrize("protocol", [6, 17])
def test_a_partial_checksum_is_left_to_the_kernel_on_the_way_in(
    datapath: Datapath, protocol: int, headers: tuple[tuple[int, bytes], ...]
) -> None:
    make, offset = (tcp_segment, 16) if protocol == 6 else (udp_segment, 6)
    start = 40 + sum(1 + len(rest) for _kind, rest in headers)
    for data in (b"", b"odd", bytes(1000)):
        segment = make(NEAR_POD6, POD6, data, check=PARTIAL)
        packet = ipv6(NEAR_POD6, POD6, segment, protocol=protocol, headers=headers)
        expected = vnet_hdr(flags=NEEDS_CSUM, start=start, offset=offset) + stepped(packet)
        assert datapath.decap(packet + bytes(3), NEAR) == Outcome("decap_delivered", writes=(expected,))


@behind_extensions
@pytest.mark.parametrize("protocol", [6, 17])
def test_a_partial_checksum_is_completed_on_the_way_out(
    datapath: Datapath, protocol: int, headers: tuple[tuple[int, bytes], ...]
) -> None:
    make, offset = (tcp_segment, 16) if protocol == 6 else (udp_segment, 6)
    start = 40 + sum(1 + len(rest) for _kind, rest in headers)
    for data in (b"", b"odd", bytes(1000)):
        given, wanted = (
            ipv6(POD6, NEAR_POD6, make(POD6, NEAR_POD6, data, check=check), protocol=protocol, headers=headers)
            for check in (PARTIAL, "full")
        )
        raw = vnet_hdr(flags=NEEDS_CSUM, start=start, offset=offset) + given
        sends = ((remote_of(datapath, NEAR_POD6), stepped(wanted)),)
        assert datapath.encap(raw) == Outcome("encap_sent", sends=sends)


def test_a_udp_checksum_of_zero_goes_out_in_its_other_form(datapath: Datapath) -> None:
    """Zero means none, which IPv6 does not have (RFC 8200 8.1)."""
    data = b"\0\0"
    check = int.from_bytes(udp_segment(POD6, NEAR_POD6, data)[6:8])
    segment = udp_segment(POD6, NEAR_POD6, check.to_bytes(2), check=PARTIAL)
    raw = vnet_hdr(flags=NEEDS_CSUM, start=40, offset=6) + ipv6(POD6, NEAR_POD6, segment)
    ((_remote, sent),) = datapath.encap(raw).sends
    assert sent[46:48] == b"\xff\xff"


@pytest.mark.parametrize("flags", [TCP_ACK, TCP_ACK | TCP_PSH | TCP_FIN, TCP_ACK | TCP_CWR])
@behind_extensions
def test_a_tcp_super_packet_is_written_for_the_kernel_to_cut(
    datapath: Datapath, flags: int, headers: tuple[tuple[int, bytes], ...]
) -> None:
    start = 40 + sum(1 + len(rest) for _kind, rest in headers)
    segment = tcp_segment(NEAR_POD6, POD6, bytes(5000), flags=flags, options=b"\1" * 12, check=PARTIAL)
    packet = ipv6(NEAR_POD6, POD6, segment, protocol=6, headers=headers)
    hdr_len, gso_type = start + 32, GSO_TCPV6 | (0x80 if flags & TCP_CWR else 0)
    header = vnet_hdr(
        flags=NEEDS_CSUM, gso_type=gso_type, hdr_len=hdr_len, gso_size=MTU - hdr_len, start=start, offset=16
    )
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(header + stepped(packet),))


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(tcp(NEAR_POD6, POD6, bytes(20), data_offset=4, check=PARTIAL), id="data offset below 5"),
        pytest.param(tcp(NEAR_POD6, POD6, bytes(19), data_offset=10, check=PARTIAL), id="data offset past the end"),
        pytest.param(
            ipv6(NEAR_POD6, POD6, tcp_segment(NEAR_POD6, POD6, check=PARTIAL), protocol=132), id="another protocol"
        ),
        pytest.param(
            ipv6(NEAR_POD6, POD6, udp_segment(NEAR_POD6, POD6, bytes(8), check=PARTIAL),
                 headers=[fragment_header(more=True)]), id="first fragment"
        ),
        pytest.param(
            ipv6(NEAR_POD6, POD6, udp_segment(NEAR_POD6, POD6, check=PARTIAL), headers=[fragment_header(8)]),
            id="last fragment",
        ),
        pytest.param(ipv6(NEAR_POD6, POD6, udp_segment(POD6, SLIM_POD6, check=PARTIAL)), id="of other addresses"),
        pytest.param(ipv6(NEAR_POD6, POD6, udp_segment(NEAR_POD, POD, check=PARTIAL)), id="of another family"),
        pytest.param(
            ipv6(NEAR_POD6, POD6, icmpv6_message(NEAR_POD6, POD6, 128, check=PARTIAL), protocol=58), id="ICMPv6"
        ),
    ],
)  # fmt: skip
def test_what_only_resembles_a_partial_checksum_is_delivered_plain(datapath: Datapath, packet: bytes) -> None:
    assert datapath.decap(packet, NEAR) == Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(packet),))


# ------------------------------------------------------------------------------------------ marks and echoes


@pytest.mark.parametrize("inner", range(4))
def test_a_mark_on_the_way_reaches_the_packet_inside(datapath: Datapath, inner: int) -> None:
    delivered = {0: (0, 0, 0, None), 1: (1, 1, 1, 3), 2: (2, 1, 2, 3), 3: (3, 3, 3, 3)}[inner]
    for outer, expected in enumerate(delivered):
        batch = datapath.decap_messages([Message(marked(inner), NEAR, ecn=outer)])
        if expected is None:
            assert batch.counts == {"decap_packets": 1, "decap_drop_ce": 1}
        else:
            assert batch.writes == [NO_VNET_HDR + stepped(marked(expected))]


def marked(ecn: int) -> bytes:
    return ipv6(NEAR_POD6, POD6, udp_segment(NEAR_POD6, POD6), tos=0xB8 | ecn, flow_label=0xFFFFF)


PUNT_ID = 0x5EED


def reply(*, destination: str = OWN6, kind: int = 129, ident: int = PUNT_ID, check: str | int = "full",
          headers: tuple[tuple[int, bytes], ...] = (), **header: int) -> bytes:  # fmt: skip
    rest = ident.to_bytes(2) + b"\0\7"
    message = icmpv6_message(NEAR_POD6, destination, kind, rest=rest, data=b"12345678", check=check)
    return ipv6(NEAR_POD6, destination, message, protocol=58, headers=headers, **header)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(reply(), id="reply"),
        pytest.param(reply(headers=EXTENSIONS["behind-options"]), id="reply behind options"),
        pytest.param(reply(headers=(fragment_header(),)), id="reply in an atomic fragment"),
        pytest.param(reply(headers=(fragment_header(more=True),), check=7), id="first fragment of a reply"),
    ],
)
def test_an_echo_reply_that_the_control_plane_waits_for_is_punted(datapath: Datapath, packet: bytes) -> None:
    datapath.configure(punt_id=PUNT_ID)
    assert datapath.decap(packet + b"trailing", NEAR) == Outcome("decap_punted", punts=(packet,))


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(reply(ident=7), id="of another id"),
        pytest.param(reply(kind=128), id="question"),
        pytest.param(reply(kind=0), id="type of IPv4"),
        pytest.param(reply(check=7), id="wrong checksum"),
        pytest.param(reply(destination=POD6), id="to a pod"),
        pytest.param(reply(headers=(fragment_header(8),)), id="later fragment"),
        pytest.param(reply(payload_len=7), id="cut"),
    ],
)
def test_other_packets_to_the_tunnel_address_are_delivered(datapath: Datapath, packet: bytes) -> None:
    datapath.configure(punt_id=PUNT_ID)
    assert datapath.decap(packet, NEAR).counter == "decap_delivered"


def test_the_control_plane_injects_packets_of_both_families(datapath: Datapath) -> None:
    packet = ipv6(OWN6, NEAR_POD6, icmpv6_message(OWN6, NEAR_POD6, 128), protocol=58)
    assert datapath.inject(packet) == Outcome("inject_sent", sends=((remote_of(datapath, NEAR_POD6), packet),))
    assert datapath.inject(packet, into_tun=True) == Outcome("inject_delivered", writes=(NO_VNET_HDR + packet,))
    lost = packet[:24] + address(UNLEASED6) + packet[40:]
    assert datapath.inject(lost) == Outcome("inject_drop_no_route")
    jumbogram = packet[:4] + bytes(3) + packet[7:40]
    for wrong in (packet[:39], packet[:-1], packet + b"\0", b"\x70" + packet[1:], jumbogram):
        assert datapath.inject(wrong) == Outcome("inject_drop_malformed")


@pytest.mark.parametrize("kind", ["answer", "question", "other-answer", "question-of-another-length", "fragment"])
def test_learning_asks_and_is_asked_through_ipv6(datapath: Datapath, kind: str) -> None:
    """Row 23: from an address that is no peer's only an answer to our question, and a question, reach anybody."""
    datapath.configure(punt_id=PUNT_ID, learn_id=PUNT_ID << 16 | 7)
    packet = {
        "answer": reply(),
        "question": reply(kind=128, ident=3),
        "other-answer": reply(ident=3),
        "question-of-another-length": reply(kind=128, headers=EXTENSIONS["behind-options"]),
        "fragment": reply(headers=(fragment_header(),)),
    }[kind]
    is_taken = kind in ("answer", "question")
    assert datapath.decap(packet, STRANGER).counter == ("decap_punted" if is_taken else "decap_drop_unknown_peer")

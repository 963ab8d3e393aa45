"""Every way a packet can be wrong, for both directions, and what must become of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.packets import (
    LEARNED,
    LOCAL,
    LOCAL_IN_A_LEASE,
    MTU,
    NARROW,
    NARROW_MTU,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    OUR_MAC,
    OUTSIDE,
    OWN,
    PARTIAL,
    POD,
    PORT,
    STRANGER,
    TCP_RST,
    TCP_SYN,
    TCP_URG,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_POD,
    UNDERLAY,
    UNLEASED,
    VNI,
    WIDE,
    icmp_message,
    ipv4,
    peer_mac,
    tcp,
    udp,
    udp_segment,
    vxlan,
    with_header_checksum,
)
from tests.reference import PREFIX_LEN


@dataclass(frozen=True, slots=True)
class Bad:
    """A packet to be dropped under `counter`.

    `answer`: type, code and next-hop MTU of the ICMP error that must come back; None: the row of the table has no
    answer, or `is_suppressed` says that this packet must not get one.
    """

    slug: str
    counter: str
    packet: bytes
    answer: tuple[int, int, int] | None = None
    is_suppressed: bool = False
    source: str = NEAR
    source_check: str = "peer"
    quoted: bytes | None = None
    """What the answer quotes, where that is not `packet`."""

    @property
    def icmp(self) -> str | None:
        """The counter of its answer."""
        return "icmp_sent" if self.answer else "icmp_suppressed" if self.is_suppressed else None


NET_UNREACHABLE = (3, 0, 0)
TIME_EXCEEDED = (11, 0, 0)

_OUT = udp(POD, NEAR_POD, b"from a pod of ours")
_IN = udp(NEAR_POD, POD, b"from a pod of a peer")
_IPV6 = bytes.fromhex("6000000000083a40") + bytes(15) + b"\1" + bytes(15) + b"\2" + bytes(8)
_BROADCAST = b"\xff" * 6
_ARP = bytes.fromhex("0001080006040001") + peer_mac(1) + bytes([10, 244, 2, 0]) + bytes(6) + bytes([10, 244, 1, 0])
_IPV6_FRAME = bytes.fromhex("6000000000083a40") + bytes(40)
_ESP = 50


def _in(payload: bytes = bytes(64), *, source: str = NEAR_POD, destination: str = POD, **header: object) -> bytes:
    return ipv4(source, destination, payload, **{"protocol": _ESP, **header})  # type: ignore[arg-type]


def _to_a_socket(source: str, destination: str, *, port: int = PORT, **header: object) -> bytes:
    """What carries a packet through the tunnel, once more inside."""
    payload = udp_segment(source, destination, _IN, ports=(PORT, port))
    return ipv4(source, destination, payload, **header)  # type: ignore[arg-type]


def _options(text: str) -> bytes:
    options = bytes.fromhex(text)
    assert len(options) % 4 == 0
    return options


def slugged(cases: list[Bad]) -> list[Bad]:
    assert len({case.slug for case in cases}) == len(cases)
    return cases


def elsewhere(
    let_in_by_off: Iterable[str],
    let_in_unless_strict: Iterable[str],
    of_a_stranger_with_the_check_off: Iterable[str],
    others: Mapping[tuple[str, str], str],
) -> dict[tuple[str, str], str]:
    """By slug in DECAP and SourceCheck: the counter, where that is not the case's own."""
    return {
        **{(slug, "off"): "decap_delivered" for slug in let_in_by_off},
        **{(slug, check): "decap_delivered" for slug in let_in_unless_strict for check in ("off", "peer")},
        **{
            (slug, check): "decap_drop_unknown_peer"
            for slug in of_a_stranger_with_the_check_off
            for check in ("peer", "strict")
        },
        **others,
    }


ENCAP = slugged(
    [
        Bad("no-packet-at-all", "encap_drop_short", b""),
        Bad("one-byte", "encap_drop_short", _OUT[:1]),
        Bad("one-byte-short-of-a-header", "encap_drop_short", _OUT[:19]),
        Bad("short-and-of-version-6", "encap_drop_short", _IPV6[:19]),
        Bad("ipv6", "encap_drop_ipv6", _IPV6),
        Bad("ipv6-header-cut", "encap_drop_ipv6", _IPV6[:20]),
        *(
            Bad(f"version-{n}", "encap_drop_malformed", ipv4(POD, NEAR_POD, version=n))
            for n in range(16)
            if n not in (4, 6)
        ),
        *(Bad(f"ihl-{n}", "encap_drop_malformed", ipv4(POD, NEAR_POD, bytes(40), ihl=n)) for n in range(5)),
        Bad("ihl-beyond-the-packet", "encap_drop_malformed", ipv4(POD, NEAR_POD, bytes(39), ihl=15)),
        Bad("ihl-beyond-the-total-length", "encap_drop_malformed", ipv4(POD, NEAR_POD, bytes(40), ihl=8, total_len=31)),
        Bad("total-length-0", "encap_drop_malformed", ipv4(POD, NEAR_POD, total_len=0)),
        Bad("total-length-19", "encap_drop_malformed", ipv4(POD, NEAR_POD, total_len=19)),
        Bad("total-length-one-too-many", "encap_drop_malformed", ipv4(POD, NEAR_POD, bytes(9), total_len=30)),
        Bad("cut-after-the-header", "encap_drop_malformed", _OUT[:20]),
        Bad("cut-by-one-byte", "encap_drop_malformed", _OUT[:-1]),
        Bad("malformed-before-unroutable", "encap_drop_malformed", udp(POD, OUTSIDE)[:-1]),
        Bad("destination-outside-network", "encap_drop_no_route", udp(POD, OUTSIDE), NET_UNREACHABLE),
        Bad("destination-not-leased", "encap_drop_no_route", udp(POD, UNLEASED), NET_UNREACHABLE),
        Bad("destination-just-below-network", "encap_drop_no_route", udp(POD, "10.243.255.255"), NET_UNREACHABLE),
        Bad("destination-just-above-network", "encap_drop_no_route", udp(POD, "10.245.0.0"), NET_UNREACHABLE),
        Bad("destination-just-above-a-lease", "encap_drop_no_route", udp(POD, "10.244.6.0"), NET_UNREACHABLE),
        Bad("destination-just-below-a-long-lease", "encap_drop_no_route", udp(POD, "10.244.5.63"), NET_UNREACHABLE),
        Bad("destination-just-above-a-long-lease", "encap_drop_no_route", udp(POD, "10.244.5.128"), NET_UNREACHABLE),
        Bad("destination-just-above-a-wide-lease", "encap_drop_no_route", udp(POD, "10.244.32.0"), NET_UNREACHABLE),
        Bad("destination-in-our-own-subnet", "encap_drop_no_route", udp(POD, "10.244.1.11"), NET_UNREACHABLE),
        Bad("destination-0.0.0.0", "encap_drop_no_route", udp(POD, "0.0.0.0"), NET_UNREACHABLE),
        Bad("unroutable-before-ttl", "encap_drop_no_route", udp(POD, UNLEASED, ttl=1), NET_UNREACHABLE),
        Bad("unroutable-from-the-tunnel-address", "encap_drop_no_route", udp(OWN, UNLEASED), NET_UNREACHABLE),
        Bad("unroutable-with-the-largest-header", "encap_drop_no_route",
            ipv4(POD, UNLEASED, bytes(8), options=b"\1" * 40), NET_UNREACHABLE),
        Bad("unroutable-first-fragment", "encap_drop_no_route",
            ipv4(POD, UNLEASED, bytes(64), flags="MF"), NET_UNREACHABLE),
        Bad("unroutable-with-trailing-bytes", "encap_drop_no_route", udp(POD, UNLEASED) + b"trailing",
            NET_UNREACHABLE, quoted=udp(POD, UNLEASED)),
        Bad("unroutable-and-longer-than-an-answer", "encap_drop_no_route",
            udp(POD, UNLEASED, bytes(range(256)) * 5), NET_UNREACHABLE),
        Bad("unroutable-of-an-odd-length", "encap_drop_no_route", udp(POD, UNLEASED, b"odd"), NET_UNREACHABLE),
        *(
            Bad(f"unroutable-icmp-query-{kind}", "encap_drop_no_route",
                ipv4(POD, UNLEASED, icmp_message(kind), protocol=1), NET_UNREACHABLE)
            for kind in (0, 8, 13, 14)
        ),
        *(
            Bad(f"unroutable-icmp-{kind}-is-not-answered", "encap_drop_no_route",
                ipv4(POD, UNLEASED, icmp_message(kind), protocol=1), is_suppressed=True)
            for kind in (3, 4, 5, 11, 12, 15, 40, 255)
        ),
        Bad("unroutable-cut-icmp-is-not-answered", "encap_drop_no_route",
            ipv4(POD, UNLEASED, icmp_message(8)[:7], protocol=1), is_suppressed=True),
        Bad("unroutable-icmp-without-a-header-is-not-answered", "encap_drop_no_route",
            ipv4(POD, UNLEASED, protocol=1), is_suppressed=True),
        Bad("unroutable-icmp-cut-by-its-total-length-is-not-answered", "encap_drop_no_route",
            ipv4(POD, UNLEASED, icmp_message(8), protocol=1, total_len=27), is_suppressed=True),
        Bad("unroutable-later-fragment-is-not-answered", "encap_drop_no_route",
            ipv4(POD, UNLEASED, bytes(64), offset=8), is_suppressed=True),
        Bad("unroutable-middle-fragment-is-not-answered", "encap_drop_no_route",
            ipv4(POD, UNLEASED, bytes(64), offset=65528, flags="MF"), is_suppressed=True),
        *(
            Bad(f"unroutable-from-{source}-is-not-answered", "encap_drop_no_route", udp(source, UNLEASED),
                is_suppressed=True)
            for source in ("0.0.0.0", "0.255.255.255", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.1.2.3",
                           "240.0.0.1", "255.255.255.255")
        ),
        *(
            Bad(f"to-{destination}-is-not-answered", "encap_drop_no_route", udp(POD, destination),
                is_suppressed=True)
            for destination in ("224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.255")
        ),
        Bad("our-own-datagram-to-a-peer", "encap_drop_loop", _to_a_socket(UNDERLAY, NEAR)),
        Bad("our-own-datagram-to-a-peer-on-another-port", "encap_drop_loop", _to_a_socket(UNDERLAY, WIDE, port=9999)),
        Bad("our-own-datagram-with-ttl-1", "encap_drop_loop", _to_a_socket(UNDERLAY, NEAR, ttl=1)),
        Bad("our-own-datagram-with-options", "encap_drop_loop", _to_a_socket(UNDERLAY, NEAR, options=b"\1" * 8)),
        Bad("first-fragment-of-our-own-datagram", "encap_drop_loop", _to_a_socket(UNDERLAY, NEAR, flags="MF")),
        Bad("a-pods-datagram-to-a-peers-socket", "encap_drop_loop", _to_a_socket(POD, NEAR)),
        Bad("a-pods-datagram-to-our-socket", "encap_drop_loop", _to_a_socket(POD, UNDERLAY)),
        Bad("a-pods-datagram-to-our-socket-on-a-leased-address", "encap_drop_loop",
            _to_a_socket(POD, LOCAL_IN_A_LEASE)),
        Bad("another-of-a-pod-to-a-peers-host", "encap_drop_no_route", _to_a_socket(POD, NEAR, port=53),
            NET_UNREACHABLE),
        Bad("later-fragment-to-a-peers-host-is-not-answered", "encap_drop_no_route",
            _to_a_socket(UNDERLAY, NEAR, offset=8), is_suppressed=True),
        Bad("cut-before-the-port", "encap_drop_no_route", ipv4(UNDERLAY, NEAR, bytes(3)), NET_UNREACHABLE),
        Bad("tcp-to-a-peers-host", "encap_drop_no_route",
            tcp(UNDERLAY, NEAR, ports=(PORT, PORT)), NET_UNREACHABLE),
        Bad("ttl-1", "encap_drop_ttl", udp(POD, NEAR_POD, ttl=1), TIME_EXCEEDED),
        Bad("ttl-0", "encap_drop_ttl", udp(POD, NEAR_POD, ttl=0), TIME_EXCEEDED),
        Bad("ttl-1-before-too-big", "encap_drop_ttl",
            ipv4(POD, NARROW_POD, bytes(1300), ttl=1, flags="DF"), TIME_EXCEEDED),
        Bad("ttl-1-and-a-wrong-header-checksum", "encap_drop_ttl",
            with_header_checksum(udp(POD, NEAR_POD, ttl=1), 0xFFFF), TIME_EXCEEDED),
        Bad("ttl-1-in-an-icmp-error-is-not-answered", "encap_drop_ttl",
            ipv4(POD, NEAR_POD, icmp_message(11), protocol=1, ttl=1), is_suppressed=True),
        Bad("one-byte-more-than-the-peer-takes", "encap_drop_too_big",
            ipv4(POD, NARROW_POD, bytes(NARROW_MTU - 19), flags="DF"), (3, 4, NARROW_MTU)),
        Bad("as-large-as-our-device-but-not-the-peer", "encap_drop_too_big",
            ipv4(POD, NARROW_POD, bytes(MTU - 20), flags="DF"), (3, 4, NARROW_MTU)),
        Bad("too-big-first-fragment", "encap_drop_too_big",
            ipv4(POD, NARROW_POD, bytes(1400), flags="DF+MF"), (3, 4, NARROW_MTU)),
        Bad("too-big-later-fragment-is-not-answered", "encap_drop_too_big",
            ipv4(POD, NARROW_POD, bytes(1400), flags="DF", offset=1480), is_suppressed=True),
    ]
)  # fmt: skip


DECAP = slugged(
    [
        Bad("empty", "decap_drop_empty", b""),
        Bad("empty-from-a-stranger", "decap_drop_empty", b"", source=STRANGER),
        Bad("one-byte", "decap_drop_short", b"\x45"),
        Bad("one-byte-short-of-a-header", "decap_drop_short", _IN[:19]),
        Bad("short-and-of-version-6", "decap_drop_short", _IPV6[:19]),
        Bad("short-from-a-stranger", "decap_drop_short", _IN[:19], source=STRANGER),
        Bad("ipv6", "decap_drop_ipv6", _IPV6),
        Bad("ipv6-header-cut", "decap_drop_ipv6", _IPV6[:20]),
        *(Bad(f"version-{n}", "decap_drop_version", _in(version=n)) for n in range(16) if n not in (4, 6)),
        Bad("twenty-zero-bytes", "decap_drop_version", bytes(20)),
        *(Bad(f"ihl-{n}", "decap_drop_ihl", _in(ihl=n)) for n in range(5)),
        Bad("ihl-beyond-the-datagram", "decap_drop_ihl", _in(bytes(39), ihl=15)),
        Bad("ihl-6-of-twenty-bytes", "decap_drop_ihl", _in(b"", ihl=6)),
        Bad("total-length-0", "decap_drop_length", _in(total_len=0)),
        Bad("total-length-19", "decap_drop_length", _in(total_len=19)),
        Bad("total-length-within-the-options", "decap_drop_length", _in(options=bytes(8), total_len=27)),
        Bad("total-length-one-too-many", "decap_drop_length", _in(bytes(64), total_len=85)),
        Bad("total-length-65535", "decap_drop_length", _in(total_len=65535)),
        Bad("cut-after-the-header", "decap_drop_length", _IN[:20]),
        Bad("cut-by-one-byte", "decap_drop_length", _IN[:-1]),
        Bad("checksum-0", "decap_drop_checksum", with_header_checksum(_IN, 0)),
        Bad("checksum-off-by-one", "decap_drop_checksum",
            with_header_checksum(_IN, (int.from_bytes(_IN[10:12]) + 1) & 0xFFFF)),
        Bad("checksum-with-swapped-bytes", "decap_drop_checksum",
            with_header_checksum(_IN, int.from_bytes(_IN[10:12], "little"))),
        Bad("flipped-bit-in-the-source", "decap_drop_checksum", _IN[:15] + bytes([_IN[15] ^ 1]) + _IN[16:]),
        Bad("flipped-bit-in-the-ttl", "decap_drop_checksum", _IN[:8] + bytes([_IN[8] ^ 1]) + _IN[9:]),
        Bad("checksum-over-the-options-missing", "decap_drop_checksum",
            _in(options=b"\1" * 4, checksum=int.from_bytes(_in(bytes(68), ihl=5)[10:12]))),
        Bad("checksum-before-options", "decap_drop_checksum", _in(options=_options("830b0400" + "00" * 8), checksum=1)),
        Bad("loose-source-route", "decap_drop_options", _in(options=_options("830704" + "0a000001" + "00"))),
        Bad("strict-source-route", "decap_drop_options", _in(options=_options("890704" + "0a000001" + "00"))),
        Bad("source-route-after-nops", "decap_drop_options", _in(options=_options("01010183" + "0304" + "0000"))),
        Bad("source-route-after-record-route", "decap_drop_options",
            _in(options=_options("070704" + "00000000" + "01" + "830304" + "00"))),
        Bad("source-route-without-a-length-byte", "decap_drop_options", _in(options=_options("01010183"))),
        Bad("source-route-of-length-0", "decap_drop_options", _in(options=_options("83000000"))),
        Bad("option-of-length-0", "decap_drop_options", _in(options=_options("07000000"))),
        Bad("option-of-length-1", "decap_drop_options", _in(options=_options("07010000"))),
        Bad("option-one-byte-past-the-header", "decap_drop_options", _in(options=_options("07050400"))),
        Bad("option-of-length-255", "decap_drop_options", _in(options=_options("44ff0500"))),
        Bad("option-without-a-length-byte", "decap_drop_options", _in(options=_options("01010107"))),
        Bad("unknown-option-past-the-header", "decap_drop_options", _in(options=_options("01999900"))),
        Bad("option-past-a-full-header", "decap_drop_options", _in(options=b"\1" * 38 + b"\x07\x03")),
        Bad("bad-option-from-a-stranger", "decap_drop_options", _in(options=_options("07000000")), source=STRANGER),
        Bad("more-fragments-without-payload", "decap_drop_fragment", _in(b"", flags="MF")),
        Bad("more-fragments-with-an-odd-payload", "decap_drop_fragment", _in(bytes(63), flags="MF")),
        Bad("more-fragments-with-1-byte", "decap_drop_fragment", _in(bytes(1), flags="MF", offset=8)),
        Bad("more-fragments-made-odd-by-trailing-bytes", "decap_drop_fragment",
            _in(bytes(64), flags="MF", total_len=83)),
        Bad("ping-of-death", "decap_drop_fragment", _in(bytes(64), offset=65528)),
        Bad("fragment-one-byte-past-65535", "decap_drop_fragment", _in(bytes(8), offset=65528)),
        Bad("middle-fragment-past-65535", "decap_drop_fragment", _in(bytes(8), offset=65528, flags="MF")),
        Bad("impossible-fragment-from-a-stranger", "decap_drop_fragment",
            _in(bytes(63), flags="MF"), source=STRANGER),
        Bad("stranger", "decap_drop_unknown_peer", _IN, source=STRANGER),
        Bad("stranger-strict", "decap_drop_unknown_peer", _IN, source=STRANGER, source_check="strict"),
        Bad("stranger-with-an-outside-source", "decap_drop_unknown_peer", udp(OUTSIDE, POD), source=STRANGER),
        Bad("stranger-with-a-martian-source", "decap_drop_unknown_peer", udp("127.0.0.1", POD), source=STRANGER),
        Bad("learned-address-of-another-peer", "decap_drop_unknown_peer", udp(TWIN_POD, POD), source=LEARNED),
        Bad("learned-address-with-an-unleased-source", "decap_drop_unknown_peer", udp(UNLEASED, POD), source=LEARNED),
        Bad("learned-address-with-an-outside-source", "decap_drop_unknown_peer", udp(OUTSIDE, POD), source=LEARNED),
        Bad("learned-address-strict", "decap_drop_unknown_peer", _IN, source=LEARNED, source_check="strict"),
        Bad("learned-address-and-foreign-destination", "decap_drop_foreign_destination", udp(NEAR_POD, NARROW_POD),
            source=LEARNED),
        Bad("ourselves-as-outer-source", "decap_drop_unknown_peer", _IN, source="127.0.0.1"),
        *(
            Bad(f"source-{source}", "decap_drop_source_martian", udp(source, POD))
            for source in ("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.255.255.255",
                           "240.0.0.1", "255.255.255.255")
        ),
        Bad("martian-source-with-the-check-off", "decap_drop_source_martian", udp("127.0.0.1", POD),
            source=STRANGER, source_check="off"),
        Bad("martian-source-strict", "decap_drop_source_martian", udp("224.0.0.1", POD), source_check="strict"),
        Bad("source-a-pod-of-ours", "decap_drop_source_own", udp(POD, POD)),
        Bad("source-our-tunnel-address", "decap_drop_source_own", udp(OWN, POD)),
        Bad("source-last-of-our-subnet", "decap_drop_source_own", udp("10.244.1.255", POD)),
        Bad("source-our-underlay-address", "decap_drop_source_own", udp(UNDERLAY, POD)),
        Bad("source-another-address-of-ours", "decap_drop_source_own", udp(LOCAL, POD)),
        Bad("source-an-address-of-ours-that-the-peer-leases", "decap_drop_source_own", udp(LOCAL_IN_A_LEASE, POD)),
        Bad("source-an-address-of-ours-that-another-peer-leases", "decap_drop_source_own",
            udp(LOCAL_IN_A_LEASE, POD), source=NARROW),
        Bad("source-another-address-of-ours-with-the-check-off", "decap_drop_source_own", udp(LOCAL, POD),
            source=STRANGER, source_check="off"),
        Bad("own-source-with-the-check-off", "decap_drop_source_own", udp(POD, POD), source=STRANGER,
            source_check="off"),
        Bad("underlay-source-with-the-check-off", "decap_drop_source_own", udp(UNDERLAY, POD), source=STRANGER,
            source_check="off"),
        Bad("own-source-strict", "decap_drop_source_own", udp(POD, POD), source_check="strict"),
        Bad("pod-of-another-peer", "decap_drop_source_spoofed", udp(NARROW_POD, POD)),
        Bad("pod-of-another-peer-strict", "decap_drop_source_spoofed", udp(NARROW_POD, POD), source_check="strict"),
        Bad("pod-of-a-peer-with-two-leases", "decap_drop_source_spoofed", udp(TWIN_OTHER_POD, POD)),
        Bad("unleased-source", "decap_drop_source_spoofed", udp(UNLEASED, POD)),
        Bad("source-just-outside-the-long-lease", "decap_drop_source_spoofed", udp("10.244.5.63", POD), source=TWIN),
        Bad("source-network-address", "decap_drop_source_spoofed", udp("10.244.0.0", POD)),
        Bad("source-last-of-network", "decap_drop_source_spoofed", udp("10.244.255.255", POD)),
        Bad("source-outside-network-strict", "decap_drop_source_outside", udp(OUTSIDE, POD), source_check="strict"),
        Bad("source-just-below-network-strict", "decap_drop_source_outside", udp("10.243.255.255", POD),
            source_check="strict"),
        Bad("source-just-above-network-strict", "decap_drop_source_outside", udp("10.245.0.0", POD),
            source_check="strict"),
        *(
            Bad(f"to-{destination}", "decap_drop_foreign_destination", udp(NEAR_POD, destination))
            for destination in ("9.9.9.9", NARROW_POD, NEAR_POD, UNLEASED, UNDERLAY, NEAR, "127.0.0.1", "0.0.0.0",
                                "224.0.0.1", "239.1.2.3", "255.255.255.255", "10.244.0.255", "10.244.2.0")
        ),
        Bad("open-relay-with-the-check-off", "decap_drop_foreign_destination", udp(OUTSIDE, "9.9.9.9"),
            source=STRANGER, source_check="off"),
        Bad("foreign-destination-before-ttl", "decap_drop_foreign_destination", udp(NEAR_POD, "9.9.9.9", ttl=1)),
        Bad("ttl-1", "decap_drop_ttl", udp(NEAR_POD, POD, ttl=1), TIME_EXCEEDED),
        Bad("ttl-0", "decap_drop_ttl", udp(NEAR_POD, POD, ttl=0), TIME_EXCEEDED),
        Bad("ttl-1-in-an-echo", "decap_drop_ttl",
            ipv4(NEAR_POD, POD, icmp_message(8), protocol=1, ttl=1), TIME_EXCEEDED),
        Bad("ttl-1-in-a-first-fragment", "decap_drop_ttl", _in(flags="MF", ttl=1), TIME_EXCEEDED),
        Bad("ttl-1-with-trailing-bytes", "decap_drop_ttl", udp(NEAR_POD, POD, ttl=1) + b"trailing",
            TIME_EXCEEDED, quoted=udp(NEAR_POD, POD, ttl=1)),
        Bad("ttl-1-before-oversize", "decap_drop_ttl", _in(bytes(3000), ttl=1), TIME_EXCEEDED),
        Bad("ttl-1-from-the-tunnel-address-of-the-peer", "decap_drop_ttl", udp("10.244.2.0", POD, ttl=1),
            TIME_EXCEEDED),
        Bad("ttl-1-in-an-icmp-error-is-not-answered", "decap_drop_ttl",
            ipv4(NEAR_POD, POD, icmp_message(3, 1), protocol=1, ttl=1), is_suppressed=True),
        Bad("ttl-1-in-a-cut-icmp-message-is-not-answered", "decap_drop_ttl",
            ipv4(NEAR_POD, POD, icmp_message(8)[:7], protocol=1, ttl=1), is_suppressed=True),
        Bad("ttl-1-in-a-later-fragment-is-not-answered", "decap_drop_ttl", _in(offset=64, ttl=1), is_suppressed=True),
        Bad("ttl-1-from-outside-is-not-answered", "decap_drop_ttl", udp(OUTSIDE, POD, ttl=1), is_suppressed=True),
        Bad("ttl-1-from-an-unleased-source-is-not-answered", "decap_drop_ttl", udp(UNLEASED, POD, ttl=1),
            is_suppressed=True, source=STRANGER, source_check="off"),
        Bad("one-byte-more-than-the-mtu", "decap_drop_oversize", _in(bytes(MTU - 19))),
        Bad("largest-packet-there-is-for-any-encapsulation", "decap_drop_oversize", _in(bytes(65507 - 22 - 20))),
        Bad("oversize-tcp-with-a-complete-checksum", "decap_drop_oversize", tcp(NEAR_POD, POD, bytes(3000))),
        Bad("oversize-udp-with-a-partial-checksum", "decap_drop_oversize",
            udp(NEAR_POD, POD, bytes(3000), check=PARTIAL)),
        *(
            Bad(f"super-packet-with-{name}", "decap_drop_oversize",
                tcp(NEAR_POD, POD, bytes(3000), flags=0x10 | flag, check=PARTIAL))
            for name, flag in (("syn", TCP_SYN), ("rst", TCP_RST), ("urg", TCP_URG))
        ),
        Bad("super-packet-with-a-short-data-offset", "decap_drop_oversize",
            tcp(NEAR_POD, POD, bytes(3000), data_offset=4, check=PARTIAL)),
        Bad("oversize-fragment-that-looks-like-a-super-packet", "decap_drop_oversize",
            ipv4(NEAR_POD, POD, tcp(NEAR_POD, POD, bytes(3004), check=PARTIAL)[20:], protocol=6,
                 flags="MF")),
        Bad("oversize-last-fragment-that-looks-like-a-super-packet", "decap_drop_oversize",
            ipv4(NEAR_POD, POD, tcp(NEAR_POD, POD, bytes(3000), check=PARTIAL)[20:], protocol=6, offset=8)),
        Bad("oversize-of-another-protocol-with-tcp-inside", "decap_drop_oversize",
            ipv4(NEAR_POD, POD, tcp(NEAR_POD, POD, bytes(3000), check=PARTIAL)[20:], protocol=_ESP)),
    ]
)  # fmt: skip

def _flipped(mac: bytes, bit: int) -> bytes:
    return (int.from_bytes(mac) ^ 1 << bit).to_bytes(6)


DECAP_VXLAN = slugged(
    [
        *(Bad(f"{n}-bytes", "decap_drop_vxlan_short", vxlan(_IN)[:n]) for n in range(PREFIX_LEN)),
        Bad("short-and-zero", "decap_drop_vxlan_short", bytes(PREFIX_LEN - 1)),
        Bad("short-from-a-stranger", "decap_drop_vxlan_short", vxlan(_IN)[:8], source=STRANGER),
        Bad("nothing-behind-the-prefix", "decap_drop_empty", vxlan(b"")),
        *(Bad(f"{n}-bytes-behind-the-prefix", "decap_drop_short", vxlan(_IN[:n])) for n in range(1, 20)),
        *(
            Bad(f"{n}-bytes-behind-the-prefix", "decap_drop_length", vxlan(_IN[:n]))
            for n in range(20, len(_IN))
        ),
        *(Bad(f"flags-{n:02x}", "decap_drop_vxlan_flags", vxlan(_IN, flags=n)) for n in (0, 1, 4, 0x10, 0x80, 0xF7)),
        Bad("zeros", "decap_drop_vxlan_flags", bytes(100)),
        Bad("a-bare-packet", "decap_drop_vxlan_flags", _IN),
        *(
            Bad(f"vni-{n}", "decap_drop_vxlan_vni", vxlan(_IN, vni=n))
            for n in (0, 2, 3, 0x100, 0x10000, 0x800001, 0x101, 0xFFFFFF)
        ),
        Bad("vni-in-the-last-byte", "decap_drop_vxlan_vni", vxlan(_IN, vni=0, reserved=(0, VNI))),
        Bad("vni-in-the-reserved-bytes", "decap_drop_vxlan_vni", vxlan(_IN, vni=0, reserved=(VNI, 0))),
        Bad("vni-and-flags", "decap_drop_vxlan_flags", vxlan(_IN, vni=2, flags=0)),
        *(
            Bad(f"ethertype-{n:04x}", "decap_drop_vxlan_ethertype", vxlan(_IN, ethertype=n))
            for n in (0, 8, 0x0801, 0x0900, 0x0806, 0x86DD, 0x8100, 0x88A8, 0x8847, 0xFFFF)
        ),
        Bad("arp-to-all", "decap_drop_vxlan_ethertype", vxlan(_ARP, ethertype=0x0806, destination=_BROADCAST)),
        Bad("arp-to-us", "decap_drop_vxlan_ethertype", vxlan(_ARP, ethertype=0x0806)),
        Bad("ipv6", "decap_drop_vxlan_ethertype", vxlan(_IPV6_FRAME, ethertype=0x86DD)),
        Bad(
            "ipv6-neighbour-solicitation",
            "decap_drop_vxlan_ethertype",
            vxlan(_IPV6_FRAME, ethertype=0x86DD, destination=bytes.fromhex("3333ff000001")),
        ),
        Bad("vlan", "decap_drop_vxlan_ethertype", vxlan(b"\0\1\x08\0" + _IN, ethertype=0x8100)),
        Bad("ethertype-and-vni", "decap_drop_vxlan_vni", vxlan(_IN, vni=2, ethertype=0x0806)),
        *(
            Bad(f"mac-bit-{bit}", "decap_drop_vxlan_mac", vxlan(_IN, destination=_flipped(OUR_MAC, bit)))
            for bit in (0, 7, 8, 23, 40, 47)
        ),
        Bad("mac-of-all", "decap_drop_vxlan_mac", vxlan(_IN, destination=_BROADCAST)),
        Bad("mac-of-a-group", "decap_drop_vxlan_mac", vxlan(_IN, destination=bytes.fromhex("01005e000001"))),
        Bad("mac-zero", "decap_drop_vxlan_mac", vxlan(_IN, destination=bytes(6))),
        Bad("mac-of-the-sender", "decap_drop_vxlan_mac", vxlan(_IN, destination=peer_mac(1))),
        Bad("mac-before-the-packet", "decap_drop_vxlan_mac", vxlan(b"", destination=_BROADCAST)),
        Bad("mac-from-a-stranger", "decap_drop_vxlan_mac", vxlan(_IN, destination=_BROADCAST), source=STRANGER),
        Bad("ipv6-under-a-wrong-ethertype", "decap_drop_ipv6", vxlan(_IPV6_FRAME)),
    ]
)
"""Datagrams as they are on the wire of a VTEP, whose prefix is wrong or has no good packet behind it."""

_LET_IN_BY_OFF = (
    "stranger",
    "stranger-strict",
    "stranger-with-an-outside-source",
    "ourselves-as-outer-source",
    "pod-of-another-peer",
    "pod-of-another-peer-strict",
    "pod-of-a-peer-with-two-leases",
    "unleased-source",
    "source-just-outside-the-long-lease",
    "source-network-address",
    "source-last-of-network",
    "learned-address-of-another-peer",
    "learned-address-with-an-unleased-source",
    "learned-address-with-an-outside-source",
    "learned-address-strict",
)
_LET_IN_UNLESS_STRICT = (
    "source-outside-network-strict",
    "source-just-below-network-strict",
    "source-just-above-network-strict",
)
_OF_A_STRANGER_WITH_THE_CHECK_OFF = (
    "martian-source-with-the-check-off",
    "source-another-address-of-ours-with-the-check-off",
    "own-source-with-the-check-off",
    "underlay-source-with-the-check-off",
    "open-relay-with-the-check-off",
    "ttl-1-from-an-unleased-source-is-not-answered",
)
ELSEWHERE = elsewhere(
    _LET_IN_BY_OFF,
    _LET_IN_UNLESS_STRICT,
    _OF_A_STRANGER_WITH_THE_CHECK_OFF,
    {
        ("learned-address-strict", "peer"): "decap_delivered",
        ("learned-address-and-foreign-destination", "strict"): "decap_drop_unknown_peer",
        ("stranger-with-a-martian-source", "off"): "decap_drop_source_martian",
        ("ttl-1-from-outside-is-not-answered", "strict"): "decap_drop_source_outside",
    },
)


GOOD_ENCAP = {
    "udp": _OUT,
    "tcp": tcp(POD, NEAR_POD, b"data"),
    "icmp-error": ipv4(POD, NEAR_POD, icmp_message(3, 1), protocol=1),
    "bare-header": ipv4(POD, NEAR_POD, protocol=_ESP),
    "ttl-2": udp(POD, NEAR_POD, ttl=2),
    "ttl-255": udp(POD, NEAR_POD, ttl=255),
    "tos-and-ecn": ipv4(POD, NEAR_POD, udp_segment(POD, NEAR_POD), tos=0xB8 | 1),
    "congestion-experienced": ipv4(POD, NEAR_POD, udp_segment(POD, NEAR_POD), tos=0x28 | 3),
    "df": ipv4(POD, NEAR_POD, bytes(MTU - 20), flags="DF"),
    "as-large-as-the-narrow-peer-takes": ipv4(POD, NARROW_POD, bytes(NARROW_MTU - 20), flags="DF"),
    "larger-than-the-narrow-peer-takes-without-df": ipv4(POD, NARROW_POD, bytes(MTU - 20)),
    "options": ipv4(POD, NEAR_POD, bytes(64), options=_options("07270400" + "00" * 36)),
    "source-route": ipv4(POD, NEAR_POD, bytes(64), options=_options("830704" + "0a000001" + "00")),
    "fragment": ipv4(POD, NEAR_POD, bytes(63), flags="MF", offset=65528),
    "source-outside-network": udp(OUTSIDE, NEAR_POD),
    "source-our-tunnel-address": udp(OWN, NEAR_POD),
    "to-the-tunnel-address-of-the-peer": udp(POD, "10.244.2.0"),
    "to-the-last-address-of-a-lease": udp(POD, "10.244.2.255"),
    "to-a-host-with-two-leases": udp(POD, TWIN_POD),
    "to-the-first-of-a-long-lease": udp(POD, "10.244.5.64"),
    "to-the-last-of-a-long-lease": udp(POD, "10.244.5.127"),
    "to-the-first-of-a-wide-lease": udp(POD, "10.244.16.0"),
    "to-the-last-of-a-wide-lease": udp(POD, "10.244.31.255"),
}
"""Packets that must go out as they are, but for the TTL."""

GOOD_DECAP = {
    "udp": (_IN, NEAR),
    "udp-without-a-checksum": (udp(NEAR_POD, POD, b"data", check=0), NEAR),
    "tcp": (tcp(NEAR_POD, POD, b"data"), NEAR),
    "tcp-syn": (tcp(NEAR_POD, POD, flags=TCP_SYN), NEAR),
    "icmp-error": (ipv4(NEAR_POD, POD, icmp_message(3, 1), protocol=1), NEAR),
    "bare-header": (_in(b""), NEAR),
    "ttl-2": (_in(ttl=2), NEAR),
    "ttl-255": (_in(ttl=255), NEAR),
    "tos-and-ecn": (_in(tos=0xB8 | 1), NEAR),
    "congestion-experienced": (_in(tos=0x28 | 3), NEAR),
    "as-large-as-the-mtu": (_in(bytes(MTU - 20), flags="DF"), NEAR),
    "record-route": (_in(options=_options("072704" + "00" * 37)), NEAR),
    "router-alert": (_in(options=_options("94040000")), NEAR),
    "timestamp": (_in(options=_options("440c0500" + "00" * 8)), NEAR),
    "unknown-option": (_in(options=_options("de04beef")), NEAR),
    "only-nops": (_in(options=b"\1" * 40), NEAR),
    "garbage-after-the-end-of-the-options": (_in(options=_options("00830000")), NEAR),
    "option-that-fills-the-header": (_in(options=_options("01012002")), NEAR),
    "option-that-just-fits": (_in(options=_options("0101" + "20" + "06" + "00000000" )), NEAR),
    "first-fragment": (_in(bytes(1448), flags="MF"), NEAR),
    "middle-fragment": (_in(bytes(1448), flags="MF", offset=1448), NEAR),
    "last-fragment": (_in(bytes(13), offset=2896), NEAR),
    "last-fragment-up-to-65535": (_in(bytes(7), offset=65528), NEAR),
    "last-fragment-without-payload": (_in(b"", offset=64), NEAR),
    "fragment-with-df": (_in(bytes(64), flags="DF+MF", offset=64), NEAR),
    "last-fragment-with-df": (_in(bytes(13), flags="DF", offset=64), NEAR),
    "tcp-fragment-with-a-partial-checksum": (
        ipv4(NEAR_POD, POD, tcp(NEAR_POD, POD, bytes(12), check=PARTIAL)[20:], protocol=6, flags="MF"), NEAR),
    "udp-too-short-for-a-header": (ipv4(NEAR_POD, POD, bytes(7)), NEAR),
    "tcp-too-short-for-a-header": (ipv4(NEAR_POD, POD, bytes(19), protocol=6), NEAR),
    "to-our-tunnel-address": (udp(NEAR_POD, OWN), NEAR),
    "to-the-first-of-our-subnet": (udp(NEAR_POD, "10.244.1.1"), NEAR),
    "to-the-last-of-our-subnet": (udp(NEAR_POD, "10.244.1.255"), NEAR),
    "source-outside-network": (udp(OUTSIDE, POD), NEAR),
    "source-outside-network-just-above-0/8": (udp("1.0.0.0", POD), NEAR),
    "source-just-below-multicast": (udp("223.255.255.255", POD), NEAR),
    "from-the-tunnel-address-of-the-peer": (udp("10.244.2.0", POD), NEAR),
    "from-an-address-that-was-learned": (_IN, LEARNED),
    "from-a-narrow-peer": (udp(NARROW_POD, POD), NARROW),
    "from-the-first-lease-of-a-host-with-two": (udp(TWIN_POD, POD), TWIN),
    "from-the-second-lease-of-a-host-with-two": (udp(TWIN_OTHER_POD, POD), TWIN),
}  # fmt: skip
"""Packets, and the outer addresses they come from, that must be delivered as they are, but for the TTL."""

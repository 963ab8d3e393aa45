"""Every way an IPv6 packet inside the tunnel can be wrong or odd, for both directions, and what must become of it.

For a host that carries IPv6; what one does that carries IPv4 alone is in cases.py.
"""

from __future__ import annotations

from tests.datapath.cases import Bad, elsewhere, slugged
from tests.packets import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    FRAGMENT,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    HOP_BY_HOP,
    LEARNED,
    LOCAL6,
    LOCAL6_IN_A_LEASE,
    MTU,
    NARROW,
    NARROW_POD6,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    NEEDS_CSUM,
    OUR_MAC,
    OUTSIDE6,
    OWN6,
    PARTIAL,
    POD,
    POD6,
    PORT,
    ROUTING,
    SLIM_MTU,
    SLIM_POD6,
    STRANGER,
    TCP_RST,
    TCP_SYN,
    TCP_URG,
    TWIN,
    TWIN_OTHER_POD6,
    TWIN_POD6,
    UNLEASED6,
    WIDE,
    authentication_header,
    fragment_header,
    icmpv6_message,
    ipv6,
    options_header,
    routing_header,
    tcp,
    tcp_segment,
    udp,
    udp_segment,
    vnet_hdr,
    vxlan,
)

NO_ROUTE = (1, 0, 0)
TIME_EXCEEDED = (3, 0, 0)
LEAST_MTU = 1280
_ESP, _ICMPV6, _NO_NEXT_HEADER, _MOBILITY = 50, 58, 59, 135

_OUT = udp(POD6, NEAR_POD6, b"from a pod of ours")
_IN = udp(NEAR_POD6, POD6, b"from a pod of a peer")
_PAD = bytes.fromhex("010400000000")
_JUMBO = bytes.fromhex("c20400010000")
_HBH, _DO = options_header(HOP_BY_HOP), options_header(DESTINATION_OPTIONS)
_LINK_LOCAL = "fe80::1"
_ALL_NODES, _ALL_ROUTERS, _SOLICITED_NODE = "ff02::1", "ff02::2", "ff02::1:ff00:10"
_MULTICAST = (_ALL_NODES, _ALL_ROUTERS, _SOLICITED_NODE, "ff05::2", "ff0e::1", "ffff::1")
_NOT_ONE_NODE = ("::", "::1", "::2", "::10.244.2.10", "::ffff:10.244.2.10", _LINK_LOCAL, "febf::1", *_MULTICAST)


def _in(payload: bytes = bytes(64), *, source: str = NEAR_POD6, destination: str = POD6, **header: object) -> bytes:
    return ipv6(source, destination, payload, **{"protocol": _ESP, **header})  # type: ignore[arg-type]


def _out(payload: bytes = bytes(64), *, destination: str = NEAR_POD6, **header: object) -> bytes:
    return _in(payload, source=POD6, destination=destination, **header)


def _lost(payload: bytes = bytes(64), **header: object) -> bytes:
    return _out(payload, destination=UNLEASED6, **header)


def _icmp(type_: int, *, source: str = POD6, destination: str = UNLEASED6, cut: int | None = None,
          **header: object) -> bytes:  # fmt: skip
    message = icmpv6_message(source, destination, type_)[:cut]
    return ipv6(source, destination, message, **{"protocol": _ICMPV6, **header})  # type: ignore[arg-type]


def _to_a_socket(source: str, destination: str, *, port: int = PORT, **header: object) -> bytes:
    payload = udp_segment(source, destination, _IN, ports=(PORT, port))
    return ipv6(source, destination, payload, **header)  # type: ignore[arg-type]


def _options(kind: int, text: str, **length: int) -> tuple[int, bytes]:
    return options_header(kind, bytes.fromhex(text), **length)


ENCAP = slugged(
    [
        Bad("cut-within-an-ipv4-header", "encap_drop_short", _OUT[:19]),
        Bad("cut-behind-an-ipv4-header", "encap_drop_short", _OUT[:20]),
        Bad("one-byte-short-of-a-header", "encap_drop_short", _OUT[:39]),
        Bad("cut-after-the-header", "encap_drop_malformed", _OUT[:40]),
        Bad("cut-by-one-byte", "encap_drop_malformed", _OUT[:-1]),
        Bad("payload-length-one-too-many", "encap_drop_malformed", _out(bytes(9), payload_len=10)),
        Bad("payload-length-65535", "encap_drop_malformed", _out(payload_len=65535)),
        Bad("jumbo", "encap_drop_malformed", _out(headers=[options_header(HOP_BY_HOP, _JUMBO)], payload_len=0)),
        Bad("no-payload-and-hop-by-hop-options", "encap_drop_malformed", _out(headers=[_HBH], payload_len=0)),
        Bad("malformed-before-unroutable", "encap_drop_malformed", udp(POD6, OUTSIDE6)[:-1]),
        Bad("version-7", "encap_drop_malformed", _out(version=7)),
        Bad("destination-outside-network", "encap_drop_no_route", udp(POD6, OUTSIDE6), NO_ROUTE),
        Bad("destination-not-leased", "encap_drop_no_route", udp(POD6, UNLEASED6), NO_ROUTE),
        Bad("destination-just-below-network", "encap_drop_no_route",
            udp(POD6, "fd00:243:ffff:ffff:ffff:ffff:ffff:ffff"), NO_ROUTE),
        Bad("destination-just-above-network", "encap_drop_no_route", udp(POD6, "fd00:244:1::"), NO_ROUTE),
        Bad("destination-just-below-a-long-lease", "encap_drop_no_route",
            udp(POD6, "fd00:244:0:5:7fff:ffff:ffff:ffff"), NO_ROUTE),
        Bad("destination-just-above-a-long-lease", "encap_drop_no_route", udp(POD6, "fd00:244:0:6::"), NO_ROUTE),
        Bad("destination-just-above-a-wide-lease", "encap_drop_no_route", udp(POD6, "fd00:244:0:20::"), NO_ROUTE),
        Bad("destination-in-our-own-subnet", "encap_drop_no_route", udp(POD6, "fd00:244:0:1::11"), NO_ROUTE),
        Bad("destination-the-unspecified-address", "encap_drop_no_route", udp(POD6, "::"), NO_ROUTE),
        Bad("destination-ourselves", "encap_drop_no_route", udp(POD6, "::1"), NO_ROUTE),
        Bad("destination-link-local", "encap_drop_no_route", udp(POD6, _LINK_LOCAL), NO_ROUTE),
        Bad("destination-ipv4-mapped", "encap_drop_no_route", udp(POD6, "::ffff:10.244.2.10"), NO_ROUTE),
        Bad("unroutable-before-hop-limit", "encap_drop_no_route", udp(POD6, UNLEASED6, ttl=1), NO_ROUTE),
        Bad("unroutable-from-the-tunnel-address", "encap_drop_no_route", udp(OWN6, UNLEASED6), NO_ROUTE),
        Bad("unroutable-without-payload", "encap_drop_no_route", _lost(b"", protocol=_NO_NEXT_HEADER), NO_ROUTE),
        Bad("unroutable-with-trailing-bytes", "encap_drop_no_route", udp(POD6, UNLEASED6) + b"trailing", NO_ROUTE,
            quoted=udp(POD6, UNLEASED6)),
        Bad("unroutable-and-as-long-as-an-answer-quotes", "encap_drop_no_route",
            udp(POD6, UNLEASED6, bytes(1280 - 48 - 48)), NO_ROUTE),
        Bad("unroutable-and-longer-than-an-answer", "encap_drop_no_route",
            udp(POD6, UNLEASED6, bytes(range(256)) * 5), NO_ROUTE),
        Bad("unroutable-of-an-odd-length", "encap_drop_no_route", udp(POD6, UNLEASED6, b"odd"), NO_ROUTE),
        Bad("unroutable-behind-extension-headers", "encap_drop_no_route",
            _lost(headers=[_HBH, routing_header(), authentication_header(), _DO]), NO_ROUTE),
        Bad("unroutable-first-fragment", "encap_drop_no_route",
            _lost(headers=[fragment_header(more=True)]), NO_ROUTE),
        Bad("unroutable-atomic-fragment", "encap_drop_no_route", _lost(headers=[fragment_header()]), NO_ROUTE),
        *(
            Bad(f"unroutable-icmpv6-{kind}", "encap_drop_no_route", _icmp(kind), NO_ROUTE)
            for kind in (128, 129, 133, 135, 136, 138, 143, 255)
        ),
        Bad("unroutable-echo-behind-options", "encap_drop_no_route", _icmp(128, headers=[_DO]), NO_ROUTE),
        *(
            Bad(f"unroutable-icmpv6-{kind}-is-not-answered", "encap_drop_no_route", _icmp(kind), is_suppressed=True)
            for kind in (0, 1, 2, 3, 4, 100, 127, 137)
        ),
        Bad("unroutable-icmpv6-error-behind-options-is-not-answered", "encap_drop_no_route",
            _icmp(1, headers=[_HBH, _DO]), is_suppressed=True),
        Bad("unroutable-icmpv6-error-in-a-first-fragment-is-not-answered", "encap_drop_no_route",
            _icmp(3, headers=[fragment_header(more=True)]), is_suppressed=True),
        Bad("unroutable-cut-icmpv6-is-not-answered", "encap_drop_no_route", _icmp(128, cut=7), is_suppressed=True),
        Bad("unroutable-icmpv6-without-a-header-is-not-answered", "encap_drop_no_route",
            _icmp(128, cut=0), is_suppressed=True),
        Bad("unroutable-icmpv6-cut-by-its-payload-length-is-not-answered", "encap_drop_no_route",
            _icmp(128, payload_len=7), is_suppressed=True),
        Bad("unroutable-later-fragment-is-not-answered", "encap_drop_no_route",
            _lost(headers=[fragment_header(8)]), is_suppressed=True),
        Bad("unroutable-middle-fragment-is-not-answered", "encap_drop_no_route",
            _lost(headers=[fragment_header(1448, more=True)]), is_suppressed=True),
        Bad("unroutable-with-a-broken-chain-is-not-answered", "encap_drop_no_route",
            _lost(b"", headers=[_options(DESTINATION_OPTIONS, "010400000000", length=1)]), is_suppressed=True),
        Bad("unroutable-with-nine-extension-headers-is-not-answered", "encap_drop_no_route",
            _lost(headers=[_DO] * 9), is_suppressed=True),
        *(
            Bad(f"unroutable-from-{source}-is-not-answered", "encap_drop_no_route", udp(source, UNLEASED6),
                is_suppressed=True)
            for source in _NOT_ONE_NODE
        ),
        *(
            Bad(f"to-{destination}-is-not-answered", "encap_drop_no_route", udp(POD6, destination),
                is_suppressed=True)
            for destination in _MULTICAST
        ),
        Bad("router-solicitation-is-not-answered", "encap_drop_no_route",
            _icmp(133, source=_LINK_LOCAL, destination=_ALL_ROUTERS, ttl=255), is_suppressed=True),
        Bad("duplicate-address-detection-is-not-answered", "encap_drop_no_route",
            _icmp(135, source="::", destination=_SOLICITED_NODE, ttl=255), is_suppressed=True),
        Bad("multicast-listener-report-is-not-answered", "encap_drop_no_route",
            _icmp(143, source=_LINK_LOCAL, destination="ff02::16", ttl=1,
                  headers=[_options(HOP_BY_HOP, "050200000100")]), is_suppressed=True),
        Bad("a-pods-datagram-to-our-socket", "encap_drop_loop", _to_a_socket(POD6, LOCAL6)),
        Bad("a-pods-datagram-to-our-socket-on-a-leased-address", "encap_drop_loop",
            _to_a_socket(POD6, LOCAL6_IN_A_LEASE)),
        Bad("our-own-datagram-to-ourselves-on-another-port", "encap_drop_loop",
            _to_a_socket(LOCAL6, LOCAL6_IN_A_LEASE, port=9999)),
        Bad("a-datagram-to-our-socket-with-hop-limit-1", "encap_drop_loop", _to_a_socket(POD6, LOCAL6, ttl=1)),
        Bad("a-datagram-to-our-socket-behind-options", "encap_drop_loop",
            _to_a_socket(POD6, LOCAL6, headers=[_HBH, _DO])),
        Bad("first-fragment-of-a-datagram-to-our-socket", "encap_drop_loop",
            _to_a_socket(POD6, LOCAL6, headers=[fragment_header(more=True)])),
        Bad("later-fragment-to-our-address-is-not-answered", "encap_drop_no_route",
            _to_a_socket(POD6, LOCAL6, headers=[fragment_header(8)]), is_suppressed=True),
        Bad("another-datagram-to-our-address", "encap_drop_no_route", _to_a_socket(POD6, LOCAL6, port=53), NO_ROUTE),
        Bad("cut-before-the-port", "encap_drop_no_route", ipv6(POD6, LOCAL6, bytes(3)), NO_ROUTE),
        Bad("tcp-to-our-address", "encap_drop_no_route", tcp(POD6, LOCAL6, ports=(PORT, PORT)), NO_ROUTE),
        Bad("hop-limit-1", "encap_drop_ttl", udp(POD6, NEAR_POD6, ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-0", "encap_drop_ttl", udp(POD6, NEAR_POD6, ttl=0), TIME_EXCEEDED),
        Bad("hop-limit-1-before-too-big", "encap_drop_ttl", _out(bytes(1400), destination=SLIM_POD6, ttl=1),
            TIME_EXCEEDED),
        Bad("hop-limit-1-in-an-icmpv6-error-is-not-answered", "encap_drop_ttl",
            _icmp(3, destination=NEAR_POD6, ttl=1), is_suppressed=True),
        Bad("one-byte-more-than-the-peer-takes", "encap_drop_too_big",
            _out(bytes(SLIM_MTU - 39), destination=SLIM_POD6), (2, 0, SLIM_MTU)),
        Bad("as-large-as-our-device-but-not-the-peer", "encap_drop_too_big",
            _out(bytes(MTU - 40), destination=SLIM_POD6), (2, 0, SLIM_MTU)),
        Bad("more-than-ipv6-allows-to-be-too-big", "encap_drop_too_big",
            _out(bytes(LEAST_MTU - 39), destination=NARROW_POD6), (2, 0, LEAST_MTU)),
        Bad("too-big-first-fragment", "encap_drop_too_big",
            _out(bytes(1400), destination=SLIM_POD6, headers=[fragment_header(more=True)]), (2, 0, SLIM_MTU)),
        Bad("too-big-later-fragment-is-not-answered", "encap_drop_too_big",
            _out(bytes(1400), destination=SLIM_POD6, headers=[fragment_header(1480)]), is_suppressed=True),
        Bad("too-big-icmpv6-error-is-not-answered", "encap_drop_too_big",
            ipv6(POD6, SLIM_POD6, icmpv6_message(POD6, SLIM_POD6, 1, data=bytes(1400)), protocol=_ICMPV6),
            is_suppressed=True),
    ]
)  # fmt: skip


DECAP = slugged(
    [
        Bad("cut-within-an-ipv4-header", "decap_drop_short", _IN[:19]),
        Bad("cut-behind-an-ipv4-header", "decap_drop_short", _IN[:20]),
        Bad("one-byte-short-of-a-header", "decap_drop_short", _IN[:39]),
        Bad("short-from-a-stranger", "decap_drop_short", _IN[:39], source=STRANGER),
        Bad("version-7", "decap_drop_version", _in(version=7)),
        Bad("forty-zero-bytes", "decap_drop_version", bytes(40)),
        Bad("cut-after-the-header", "decap_drop_length", _IN[:40]),
        Bad("cut-by-one-byte", "decap_drop_length", _IN[:-1]),
        Bad("payload-length-one-too-many", "decap_drop_length", _in(bytes(64), payload_len=65)),
        Bad("payload-length-65535", "decap_drop_length", _in(payload_len=65535)),
        Bad("jumbo", "decap_drop_length", _in(headers=[options_header(HOP_BY_HOP, _JUMBO)], payload_len=0)),
        Bad("no-payload-and-hop-by-hop-options", "decap_drop_length", _in(headers=[_HBH], payload_len=0)),
        Bad("no-payload-and-nothing-but-hop-by-hop", "decap_drop_length", _in(b"", protocol=HOP_BY_HOP)),
        Bad("length-from-a-stranger", "decap_drop_length", _IN[:-1], source=STRANGER),
        # Extension headers.
        *(
            Bad(f"extension-{kind}-without-a-byte", "decap_drop_options", _in(b"", protocol=kind))
            for kind in (ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS)
        ),
        *(
            Bad(f"extension-{kind}-of-7-bytes", "decap_drop_options", _in(bytes(7), protocol=kind))
            for kind in (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS)
        ),
        *(
            Bad(f"{name}-beyond-the-payload", "decap_drop_options", _in(bytes(7), headers=[header]))
            for name, header in (
                ("hop-by-hop", _options(HOP_BY_HOP, "010400000000", length=1)),
                ("destination-options", _options(DESTINATION_OPTIONS, "010400000000", length=1)),
                ("longest-destination-options", _options(DESTINATION_OPTIONS, "010400000000", length=255)),
                ("routing-header", routing_header(data=bytes(4), length=1)),
                ("authentication-header", authentication_header(length=6)),
            )
        ),
        Bad("extension-beyond-the-payload-but-not-the-datagram", "decap_drop_options",
            _in(bytes(8), headers=[_options(DESTINATION_OPTIONS, "010400000000", length=1)], payload_len=15)),
        Bad("second-extension-beyond-the-payload", "decap_drop_options",
            _in(b"", headers=[_HBH, _options(DESTINATION_OPTIONS, "010400000000", length=1)])),
        Bad("extension-beyond-the-payload-behind-an-atomic-fragment", "decap_drop_options",
            _in(b"", headers=[fragment_header(), _options(DESTINATION_OPTIONS, "010400000000", length=1)])),
        Bad("hop-by-hop-after-hop-by-hop", "decap_drop_options", _in(headers=[_HBH, _HBH])),
        Bad("hop-by-hop-after-destination-options", "decap_drop_options", _in(headers=[_DO, _HBH])),
        Bad("hop-by-hop-in-a-first-fragment", "decap_drop_options",
            _in(headers=[fragment_header(more=True), _HBH])),
        Bad("nine-extension-headers", "decap_drop_options", _in(headers=[_DO] * 9)),
        Bad("nine-of-all-kinds", "decap_drop_options",
            _in(headers=[_HBH, _DO, routing_header(), authentication_header(), fragment_header(), *[_DO] * 4])),
        Bad("a-hundred-extension-headers", "decap_drop_options", _in(headers=[_DO] * 100)),
        Bad("ninth-extension-header-cut", "decap_drop_options", _in(b"", headers=[_DO] * 8, protocol=_DO[0])),
        Bad("routing-header-type-0", "decap_drop_options", _in(headers=[routing_header(0, 1, bytes(20))])),
        Bad("routing-header-type-0-without-segments-left", "decap_drop_options", _in(headers=[routing_header(0, 0)])),
        *(
            Bad(f"routing-header-type-{kind}-with-segments-left", "decap_drop_options",
                _in(headers=[routing_header(kind, 1)]))
            for kind in (2, 3, 4, 253, 255)
        ),
        Bad("routing-header-with-all-segments-left", "decap_drop_options", _in(headers=[routing_header(4, 255)])),
        Bad("routing-header-with-segments-left-behind-others", "decap_drop_options",
            _in(headers=[_HBH, _DO, routing_header(4, 1)])),
        Bad("routing-header-with-segments-left-in-a-fragment", "decap_drop_options",
            _in(headers=[fragment_header(more=True), routing_header(4, 1)])),
        *(
            Bad(f"{name}-with-{what}", "decap_drop_options", _in(headers=[_options(kind, text)]))
            for name, kind in (("hop-by-hop", HOP_BY_HOP), ("destination-options", DESTINATION_OPTIONS))
            for what, text in (
                ("an-option-past-the-end", "010500000000"),
                ("an-option-far-past-the-end", "01ff00000000"),
                ("an-option-without-a-length", "010300000005"),
                ("pad1-then-an-option-past-the-end", "000000000101"),
                ("an-unknown-option-past-the-end", "de0500000000"),
                ("a-second-option-past-the-end", "0102000005ff"),
            )
        ),
        Bad("options-past-the-end-of-a-long-header", "decap_drop_options",
            _in(headers=[_options(DESTINATION_OPTIONS, "010d" + "00" * 12)])),
        Bad("bad-option-behind-an-authentication-header", "decap_drop_options",
            _in(headers=[authentication_header(), _options(DESTINATION_OPTIONS, "010500000000")])),
        Bad("bad-option-before-an-impossible-fragment", "decap_drop_options",
            _in(bytes(63), headers=[_options(DESTINATION_OPTIONS, "010500000000"), fragment_header(more=True)])),
        Bad("bad-option-from-a-stranger", "decap_drop_options",
            _in(headers=[_options(HOP_BY_HOP, "010500000000")]), source=STRANGER),
        # Fragments.
        Bad("more-fragments-without-payload", "decap_drop_fragment", _in(b"", headers=[fragment_header(more=True)])),
        Bad("more-fragments-with-an-odd-payload", "decap_drop_fragment",
            _in(bytes(63), headers=[fragment_header(more=True)])),
        Bad("more-fragments-with-1-byte", "decap_drop_fragment",
            _in(bytes(1), headers=[fragment_header(8, more=True)])),
        Bad("more-fragments-made-odd-by-trailing-bytes", "decap_drop_fragment",
            _in(bytes(64), headers=[fragment_header(more=True)], payload_len=8 + 63)),
        Bad("ping-of-death", "decap_drop_fragment", _in(bytes(64), headers=[fragment_header(65528)])),
        Bad("fragment-one-byte-past-65535", "decap_drop_fragment", _in(bytes(8), headers=[fragment_header(65528)])),
        Bad("middle-fragment-past-65535", "decap_drop_fragment",
            _in(bytes(8), headers=[fragment_header(65528, more=True)])),
        Bad("impossible-fragment-behind-options", "decap_drop_fragment",
            _in(bytes(63), headers=[_HBH, _DO, fragment_header(more=True)])),
        Bad("second-fragment-header", "decap_drop_fragment",
            _in(headers=[fragment_header(more=True), fragment_header(more=True)])),
        Bad("second-fragment-header-behind-an-atomic-one", "decap_drop_fragment",
            _in(headers=[fragment_header(), fragment_header(8)])),
        Bad("second-fragment-header-behind-options", "decap_drop_fragment",
            _in(headers=[fragment_header(), _DO, fragment_header()])),
        Bad("first-fragment-that-cuts-an-extension-header", "decap_drop_fragment",
            _in(bytes(8), headers=[fragment_header(more=True), _options(DESTINATION_OPTIONS, _PAD.hex(), length=2)])),
        Bad("first-fragment-that-ends-before-an-extension-header", "decap_drop_fragment",
            _in(b"", headers=[fragment_header(more=True), _DO], protocol=DESTINATION_OPTIONS)),
        Bad("first-fragment-without-a-tcp-header", "decap_drop_fragment",
            _in(b"", headers=[fragment_header(more=True), _DO], protocol=6)),
        Bad("first-fragment-that-cuts-a-tcp-header", "decap_drop_fragment",
            _in(tcp_segment(NEAR_POD6, POD6, b"")[:16], headers=[fragment_header(more=True)], protocol=6)),
        Bad("first-fragment-without-a-udp-header", "decap_drop_fragment",
            _in(b"", headers=[fragment_header(more=True), _DO], protocol=17)),
        Bad("first-fragment-without-an-icmpv6-header", "decap_drop_fragment",
            _in(b"", headers=[fragment_header(more=True), _DO], protocol=_ICMPV6)),
        Bad("impossible-fragment-from-a-stranger", "decap_drop_fragment",
            _in(bytes(63), headers=[fragment_header(more=True)]), source=STRANGER),
        # Who sends.
        Bad("stranger", "decap_drop_unknown_peer", _IN, source=STRANGER),
        Bad("stranger-strict", "decap_drop_unknown_peer", _IN, source=STRANGER, source_check="strict"),
        Bad("stranger-with-an-outside-source", "decap_drop_unknown_peer", udp(OUTSIDE6, POD6), source=STRANGER),
        Bad("stranger-with-a-martian-source", "decap_drop_unknown_peer", udp("::1", POD6), source=STRANGER),
        Bad("learned-address-of-another-peer", "decap_drop_unknown_peer", udp(TWIN_POD6, POD6), source=LEARNED),
        Bad("learned-address-with-an-unleased-source", "decap_drop_unknown_peer", udp(UNLEASED6, POD6), source=LEARNED),
        Bad("learned-address-with-an-outside-source", "decap_drop_unknown_peer", udp(OUTSIDE6, POD6), source=LEARNED),
        Bad("learned-address-strict", "decap_drop_unknown_peer", _IN, source=LEARNED, source_check="strict"),
        Bad("learned-address-and-foreign-destination", "decap_drop_foreign_destination",
            udp(NEAR_POD6, TWIN_POD6), source=LEARNED),
        Bad("ourselves-as-outer-source", "decap_drop_unknown_peer", _IN, source="127.0.0.1"),
        *(
            Bad(f"source-{source}", "decap_drop_source_martian", udp(source, POD6)) for source in _NOT_ONE_NODE
        ),
        Bad("martian-source-with-the-check-off", "decap_drop_source_martian", udp("::1", POD6), source=STRANGER,
            source_check="off"),
        Bad("martian-source-strict", "decap_drop_source_martian", udp(_LINK_LOCAL, POD6), source_check="strict"),
        Bad("neighbour-solicitation", "decap_drop_source_martian",
            _icmp(135, source=_LINK_LOCAL, destination=_SOLICITED_NODE, ttl=255)),
        Bad("router-advertisement", "decap_drop_source_martian",
            _icmp(134, source=_LINK_LOCAL, destination=_ALL_NODES, ttl=255)),
        Bad("source-a-pod-of-ours", "decap_drop_source_own", udp(POD6, POD6)),
        Bad("source-our-tunnel-address", "decap_drop_source_own", udp(OWN6, POD6)),
        Bad("source-last-of-our-subnet", "decap_drop_source_own", udp("fd00:244:0:1:ffff:ffff:ffff:ffff", POD6)),
        Bad("source-another-address-of-ours", "decap_drop_source_own", udp(LOCAL6, POD6)),
        Bad("source-an-address-of-ours-that-the-peer-leases", "decap_drop_source_own", udp(LOCAL6_IN_A_LEASE, POD6)),
        Bad("source-an-address-of-ours-that-another-peer-leases", "decap_drop_source_own",
            udp(LOCAL6_IN_A_LEASE, POD6), source=NARROW),
        Bad("source-another-address-of-ours-with-the-check-off", "decap_drop_source_own", udp(LOCAL6, POD6),
            source=STRANGER, source_check="off"),
        Bad("own-source-with-the-check-off", "decap_drop_source_own", udp(POD6, POD6), source=STRANGER,
            source_check="off"),
        Bad("own-source-strict", "decap_drop_source_own", udp(POD6, POD6), source_check="strict"),
        Bad("pod-of-another-peer", "decap_drop_source_spoofed", udp(NARROW_POD6, POD6)),
        Bad("pod-of-another-peer-strict", "decap_drop_source_spoofed", udp(NARROW_POD6, POD6), source_check="strict"),
        Bad("pod-of-a-peer-with-two-leases", "decap_drop_source_spoofed", udp(TWIN_OTHER_POD6, POD6)),
        Bad("pod-of-another-peer-behind-options", "decap_drop_source_spoofed",
            _in(source=NARROW_POD6, headers=[_HBH, _DO])),
        Bad("unleased-source", "decap_drop_source_spoofed", udp(UNLEASED6, POD6)),
        Bad("source-just-outside-the-long-lease", "decap_drop_source_spoofed",
            udp("fd00:244:0:5:7fff:ffff:ffff:ffff", POD6), source=TWIN),
        Bad("source-just-outside-the-wide-lease", "decap_drop_source_spoofed", udp("fd00:244:0:20::", POD6),
            source=WIDE),
        Bad("source-network-address", "decap_drop_source_spoofed", udp("fd00:244::", POD6)),
        Bad("source-last-of-network", "decap_drop_source_spoofed", udp("fd00:244:0:ffff:ffff:ffff:ffff:ffff", POD6)),
        *(
            Bad(f"{name}-strict", "decap_drop_source_outside", udp(source, POD6), source_check="strict")
            for name, source in (
                ("source-outside-network", OUTSIDE6),
                ("source-just-below-network", "fd00:243:ffff:ffff:ffff:ffff:ffff:ffff"),
                ("source-just-above-network", "fd00:244:1::"),
            )
        ),
        # Where to.
        *(
            Bad(f"to-{destination}", "decap_drop_foreign_destination", udp(NEAR_POD6, destination))
            for destination in (OUTSIDE6, NARROW_POD6, NEAR_POD6, UNLEASED6, LOCAL6, "::", "::1", _LINK_LOCAL,
                                "::ffff:10.244.1.10", *_MULTICAST, "fd00:244:0:0:ffff:ffff:ffff:ffff",
                                "fd00:244:0:2::")
        ),
        Bad("multicast-listener-report", "decap_drop_foreign_destination",
            _icmp(143, source=NEAR_POD6, destination="ff02::16", ttl=1,
                  headers=[_options(HOP_BY_HOP, "050200000100")])),
        Bad("open-relay-with-the-check-off", "decap_drop_foreign_destination", udp(OUTSIDE6, "2001:db8:1::1"),
            source=STRANGER, source_check="off"),
        Bad("foreign-destination-before-hop-limit", "decap_drop_foreign_destination",
            udp(NEAR_POD6, OUTSIDE6, ttl=1)),
        # Hop limit.
        Bad("hop-limit-1", "decap_drop_ttl", udp(NEAR_POD6, POD6, ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-0", "decap_drop_ttl", udp(NEAR_POD6, POD6, ttl=0), TIME_EXCEEDED),
        Bad("hop-limit-1-in-an-echo", "decap_drop_ttl",
            _icmp(128, source=NEAR_POD6, destination=POD6, ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-1-in-a-bare-header", "decap_drop_ttl", _in(b"", ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-1-behind-options", "decap_drop_ttl", _in(headers=[_HBH, _DO], ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-1-in-a-first-fragment", "decap_drop_ttl", _in(headers=[fragment_header(more=True)], ttl=1),
            TIME_EXCEEDED),
        Bad("hop-limit-1-with-trailing-bytes", "decap_drop_ttl", udp(NEAR_POD6, POD6, ttl=1) + b"trailing",
            TIME_EXCEEDED, quoted=udp(NEAR_POD6, POD6, ttl=1)),
        Bad("hop-limit-1-before-oversize", "decap_drop_ttl", _in(bytes(3000), ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-1-from-the-tunnel-address-of-the-peer", "decap_drop_ttl",
            udp("fd00:244:0:2::", POD6, ttl=1), TIME_EXCEEDED),
        Bad("hop-limit-1-in-an-icmpv6-error-is-not-answered", "decap_drop_ttl",
            _icmp(1, source=NEAR_POD6, destination=POD6, ttl=1), is_suppressed=True),
        Bad("hop-limit-1-in-a-redirect-is-not-answered", "decap_drop_ttl",
            _icmp(137, source=NEAR_POD6, destination=POD6, ttl=1), is_suppressed=True),
        Bad("hop-limit-1-in-an-icmpv6-error-behind-options-is-not-answered", "decap_drop_ttl",
            _icmp(2, source=NEAR_POD6, destination=POD6, ttl=1, headers=[_HBH, routing_header(), _DO]),
            is_suppressed=True),
        Bad("hop-limit-1-in-cut-icmpv6-is-not-answered", "decap_drop_ttl",
            _icmp(128, source=NEAR_POD6, destination=POD6, ttl=1, cut=7), is_suppressed=True),
        Bad("hop-limit-1-in-a-later-fragment-is-not-answered", "decap_drop_ttl",
            _in(headers=[fragment_header(64)], ttl=1), is_suppressed=True),
        Bad("hop-limit-1-from-outside-is-not-answered", "decap_drop_ttl", udp(OUTSIDE6, POD6, ttl=1),
            is_suppressed=True),
        Bad("hop-limit-1-from-an-unleased-source-is-not-answered", "decap_drop_ttl", udp(UNLEASED6, POD6, ttl=1),
            is_suppressed=True, source=STRANGER, source_check="off"),
        # Too large.
        Bad("one-byte-more-than-the-mtu", "decap_drop_oversize", _in(bytes(MTU - 39))),
        Bad("largest-packet-there-is-for-any-encapsulation", "decap_drop_oversize", _in(bytes(65507 - 22 - 40))),
        Bad("oversize-tcp-with-a-complete-checksum", "decap_drop_oversize", tcp(NEAR_POD6, POD6, bytes(3000))),
        Bad("oversize-udp-with-a-partial-checksum", "decap_drop_oversize",
            udp(NEAR_POD6, POD6, bytes(3000), check=PARTIAL)),
        *(
            Bad(f"super-packet-with-{name}", "decap_drop_oversize",
                tcp(NEAR_POD6, POD6, bytes(3000), flags=0x10 | flag, check=PARTIAL))
            for name, flag in (("syn", TCP_SYN), ("rst", TCP_RST), ("urg", TCP_URG))
        ),
        Bad("super-packet-with-a-short-data-offset", "decap_drop_oversize",
            tcp(NEAR_POD6, POD6, bytes(3000), data_offset=4, check=PARTIAL)),
        *(
            Bad(f"super-packet-behind-{name}", "decap_drop_oversize",
                ipv6(NEAR_POD6, POD6, tcp_segment(NEAR_POD6, POD6, bytes(3004), check=PARTIAL), protocol=6,
                     headers=[header]))
            for name, header in (
                ("an-atomic-fragment-header", fragment_header()),
                ("a-first-fragment-header", fragment_header(more=True)),
                ("a-later-fragment-header", fragment_header(8)),
                ("an-authentication-header", authentication_header()),
            )
        ),
        Bad("oversize-of-another-protocol-with-tcp-inside", "decap_drop_oversize",
            ipv6(NEAR_POD6, POD6, tcp_segment(NEAR_POD6, POD6, bytes(3000), check=PARTIAL), protocol=_ESP)),
    ]
)  # fmt: skip


_LET_IN_BY_OFF = (
    "stranger",
    "stranger-strict",
    "stranger-with-an-outside-source",
    "ourselves-as-outer-source",
    "pod-of-another-peer",
    "pod-of-another-peer-strict",
    "pod-of-a-peer-with-two-leases",
    "pod-of-another-peer-behind-options",
    "unleased-source",
    "source-just-outside-the-long-lease",
    "source-just-outside-the-wide-lease",
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
    "open-relay-with-the-check-off",
    "hop-limit-1-from-an-unleased-source-is-not-answered",
)
ELSEWHERE = elsewhere(
    _LET_IN_BY_OFF,
    _LET_IN_UNLESS_STRICT,
    _OF_A_STRANGER_WITH_THE_CHECK_OFF,
    {
        ("learned-address-strict", "peer"): "decap_delivered",
        ("learned-address-and-foreign-destination", "strict"): "decap_drop_unknown_peer",
        ("stranger-with-a-martian-source", "off"): "decap_drop_source_martian",
        ("hop-limit-1-from-outside-is-not-answered", "strict"): "decap_drop_source_outside",
    },
)


GOOD_ENCAP = {
    "udp": _OUT,
    "tcp": tcp(POD6, NEAR_POD6, b"data"),
    "icmpv6-echo": _icmp(128, destination=NEAR_POD6),
    "icmpv6-error": _icmp(2, destination=NEAR_POD6),
    "bare-header": _out(b""),
    "no-next-header": _out(b"", protocol=_NO_NEXT_HEADER),
    "hop-limit-2": _out(ttl=2),
    "hop-limit-255": _out(ttl=255),
    "traffic-class-and-ecn": _out(tos=0xB8 | 1),
    "congestion-experienced": _out(tos=0x28 | 3),
    "every-bit-of-the-flow-label": _out(flow_label=0xFFFFF),
    "as-large-as-the-device": _out(bytes(MTU - 40)),
    "as-large-as-the-slim-peer-takes": _out(bytes(SLIM_MTU - 40), destination=SLIM_POD6),
    "as-large-as-must-pass-to-the-narrow-peer": _out(bytes(LEAST_MTU - 40), destination=NARROW_POD6),
    "options": _out(headers=[_HBH, _DO]),
    "options-that-are-none": _out(headers=[_options(DESTINATION_OPTIONS, "01ff00000000")]),
    "chain-beyond-the-payload": _out(bytes(8), headers=[_options(DESTINATION_OPTIONS, _PAD.hex(), length=2)]),
    "nine-extension-headers": _out(headers=[_DO] * 9),
    "routing-header-with-segments-left": _out(headers=[routing_header(4, 1)]),
    "fragment": _out(bytes(63), headers=[fragment_header(65528, more=True)]),
    "atomic-fragment": _out(headers=[fragment_header()]),
    "udp-without-a-checksum": udp(POD6, NEAR_POD6, b"data", check=0),
    "ipv4-inside": _out(udp(POD, NEAR_POD), protocol=4),
    "source-outside-network": udp(OUTSIDE6, NEAR_POD6),
    "source-our-tunnel-address": udp(OWN6, NEAR_POD6),
    "source-link-local": udp(_LINK_LOCAL, NEAR_POD6),
    "to-the-tunnel-address-of-the-peer": udp(POD6, "fd00:244:0:2::"),
    "to-the-last-address-of-a-lease": udp(POD6, "fd00:244:0:2:ffff:ffff:ffff:ffff"),
    "to-a-host-with-two-leases": udp(POD6, TWIN_POD6),
    "to-the-first-of-a-long-lease": udp(POD6, "fd00:244:0:5:8000::"),
    "to-the-last-of-a-long-lease": udp(POD6, "fd00:244:0:5:ffff:ffff:ffff:ffff"),
    "to-the-first-of-a-wide-lease": udp(POD6, "fd00:244:0:10::"),
    "to-the-last-of-a-wide-lease": udp(POD6, "fd00:244:0:1f:ffff:ffff:ffff:ffff"),
}
"""Packets that must go out as they are, but for the hop limit."""

GOOD_DECAP = {
    "udp": (_IN, NEAR),
    "udp-without-a-checksum": (udp(NEAR_POD6, POD6, b"data", check=0), NEAR),
    "tcp": (tcp(NEAR_POD6, POD6, b"data"), NEAR),
    "tcp-syn": (tcp(NEAR_POD6, POD6, flags=TCP_SYN), NEAR),
    "icmpv6-echo": (_icmp(128, source=NEAR_POD6, destination=POD6), NEAR),
    "icmpv6-error": (_icmp(2, source=NEAR_POD6, destination=POD6), NEAR),
    "redirect": (_icmp(137, source=NEAR_POD6, destination=POD6), NEAR),
    "icmpv6-with-a-wrong-checksum": (
        ipv6(NEAR_POD6, POD6, icmpv6_message(NEAR_POD6, POD6, 1, check=7), protocol=_ICMPV6), NEAR),
    "bare-header": (_in(b""), NEAR),
    "no-next-header": (_in(b"", protocol=_NO_NEXT_HEADER), NEAR),
    "no-next-header-and-payload": (_in(protocol=_NO_NEXT_HEADER), NEAR),
    "mobility-header": (_in(b"", protocol=_MOBILITY), NEAR),
    "hop-limit-2": (_in(ttl=2), NEAR),
    "hop-limit-255": (_in(ttl=255), NEAR),
    "traffic-class-and-ecn": (_in(tos=0xB8 | 1), NEAR),
    "congestion-experienced": (_in(tos=0x28 | 3), NEAR),
    "every-bit-of-the-flow-label": (_in(flow_label=0xFFFFF), NEAR),
    "as-large-as-the-mtu": (_in(bytes(MTU - 40)), NEAR),
    "eight-extension-headers": (_in(headers=[_DO] * 8), NEAR),
    "all-kinds-of-extension-headers": (
        _in(headers=[_HBH, _DO, routing_header(), fragment_header(), authentication_header(), _DO]), NEAR),
    "hop-by-hop-alone": (_in(b"", headers=[_HBH], protocol=_NO_NEXT_HEADER), NEAR),
    "router-alert": (_in(headers=[_options(HOP_BY_HOP, "050200000100")]), NEAR),
    "jumbo-option-of-a-packet-with-a-length": (_in(headers=[options_header(HOP_BY_HOP, _JUMBO)]), NEAR),
    "unknown-options": (_in(headers=[_options(DESTINATION_OPTIONS, "de02beefc000")]), NEAR),
    "only-pad1": (_in(headers=[_options(HOP_BY_HOP, "00" * 6)]), NEAR),
    "option-that-just-fits": (_in(headers=[_options(DESTINATION_OPTIONS, "00001e020000")]), NEAR),
    "option-without-data-at-the-end": (_in(headers=[_options(DESTINATION_OPTIONS, "000000001e00")]), NEAR),
    "many-options": (
        _in(b"", headers=[_options(DESTINATION_OPTIONS, ("01fe" + "00" * 254) * 5 + "00" * 126)]), NEAR),
    "routing-header-that-has-been-followed": (_in(headers=[routing_header(4, 0)]), NEAR),
    "shortest-authentication-header": (_in(headers=[authentication_header(bytes(6))]), NEAR),
    "authentication-header-of-12-bytes": (_in(headers=[authentication_header(bytes(10))]), NEAR),
    "first-fragment": (_in(bytes(1400), headers=[fragment_header(more=True)]), NEAR),
    "first-fragment-with-just-a-tcp-header": (
        _in(tcp_segment(NEAR_POD6, POD6, options=bytes(4)), headers=[fragment_header(more=True)], protocol=6), NEAR),
    "first-fragment-with-just-a-udp-header": (
        _in(udp_segment(NEAR_POD6, POD6), headers=[fragment_header(more=True)], protocol=17), NEAR),
    "first-fragment-without-anything-behind-its-options": (_in(b"", headers=[fragment_header(more=True), _DO]), NEAR),
    "middle-fragment": (_in(bytes(1400), headers=[fragment_header(1400, more=True)]), NEAR),
    "middle-fragment-that-looks-like-options": (
        _in(b"\xff" * 64, headers=[fragment_header(1400, more=True)], protocol=DESTINATION_OPTIONS), NEAR),
    "last-fragment": (_in(bytes(13), headers=[fragment_header(2800)]), NEAR),
    "last-fragment-up-to-65535": (_in(bytes(7), headers=[fragment_header(65528)]), NEAR),
    "last-fragment-without-payload": (_in(b"", headers=[fragment_header(64)]), NEAR),
    "fragment-with-reserved-bits": (_in(headers=[(FRAGMENT, b"\xff\0\x0e" + bytes(4))]), NEAR),
    "atomic-fragment": (_in(headers=[fragment_header()]), NEAR),
    "atomic-fragment-of-an-odd-length": (_in(bytes(13), headers=[fragment_header()]), NEAR),
    "atomic-fragment-with-a-partial-checksum": (
        _in(udp_segment(NEAR_POD6, POD6, b"data", check=PARTIAL), headers=[fragment_header()], protocol=17), NEAR),
    "authenticated-with-a-partial-checksum": (
        _in(udp_segment(NEAR_POD6, POD6, b"data", check=PARTIAL), headers=[authentication_header()], protocol=17),
        NEAR),
    "udp-too-short-for-a-header": (_in(bytes(7), protocol=17), NEAR),
    "tcp-too-short-for-a-header": (_in(bytes(19), protocol=6), NEAR),
    "icmpv6-too-short-for-a-header": (_in(bytes(3), protocol=_ICMPV6), NEAR),
    "ipv4-inside": (_in(udp(NEAR_POD, POD), protocol=4), NEAR),
    "ipv6-inside": (_in(udp("::1", "ff02::1"), protocol=41), NEAR),
    "icmp-of-ipv4": (_in(protocol=1), NEAR),
    "to-our-tunnel-address": (udp(NEAR_POD6, OWN6), NEAR),
    "to-the-first-of-our-subnet": (udp(NEAR_POD6, "fd00:244:0:1::1"), NEAR),
    "to-the-last-of-our-subnet": (udp(NEAR_POD6, "fd00:244:0:1:ffff:ffff:ffff:ffff"), NEAR),
    "source-outside-network": (udp(OUTSIDE6, POD6), NEAR),
    "source-site-local": (udp("fec0::1", POD6), NEAR),
    "source-just-behind-ipv4-compatible": (udp("::1:0:0", POD6), NEAR),
    "source-just-behind-ipv4-mapped": (udp("::1:0:0:0", POD6), NEAR),
    "source-nat64": (udp("64:ff9b::192.0.2.1", POD6), NEAR),
    "source-just-below-multicast": (udp("feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", POD6), NEAR),
    "source-just-below-link-local": (udp("fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", POD6), NEAR),
    "from-the-tunnel-address-of-the-peer": (udp("fd00:244:0:2::", POD6), NEAR),
    "from-an-address-that-was-learned": (_IN, LEARNED),
    "from-a-narrow-peer": (udp(NARROW_POD6, POD6), NARROW),
    "from-the-first-lease-of-a-host-with-two": (udp(TWIN_POD6, POD6), TWIN),
    "from-the-second-lease-of-a-host-with-two": (udp(TWIN_OTHER_POD6, POD6), TWIN),
    "from-a-wide-lease": (udp(SLIM_POD6, POD6), WIDE),
}  # fmt: skip
"""Packets, and the outer addresses they come from, that must be delivered as they are, but for the hop limit."""


_TCP_SUPER = tcp(POD6, NEAR_POD6, bytes(3000), check=PARTIAL)
_UDP_SUPER = udp(POD6, NEAR_POD6, bytes(3000), check=PARTIAL)


def _gso(packet: bytes, gso_type: int, *, size: int = 1000, start: int = 40, offset: int = 16) -> bytes:
    return vnet_hdr(flags=NEEDS_CSUM, gso_type=gso_type, gso_size=size, start=start, offset=offset) + packet


_LONG = _options(DESTINATION_OPTIONS, "01" + "5c" + "00" * 92)
"""2,048 segments with it, 40 bytes of IPv6 and 20 of TCP have more bytes of headers than a worker holds."""


def _super_behind(header: tuple[int, bytes], start: int) -> bytes:
    segment = tcp_segment(POD6, NEAR_POD6, bytes(3000), check=PARTIAL)
    return _gso(_out(segment, headers=[header], protocol=6), GSO_TCPV6, start=start)


_BROKEN = _out(headers=[_options(DESTINATION_OPTIONS, _PAD.hex(), length=255)])

MALFORMED_READS = {
    "super-packet-of-another-family": _gso(_TCP_SUPER, GSO_TCPV4),
    "ipv4-super-packet-of-another-family": _gso(tcp(POD, NEAR_POD, bytes(3000), check=PARTIAL), GSO_TCPV6, start=20),
    "super-packet-of-another-protocol": _gso(_UDP_SUPER, GSO_TCPV6),
    "udp-super-packet-of-another-protocol": _gso(_TCP_SUPER, GSO_UDP_L4),
    "super-packet-without-a-size": _gso(_TCP_SUPER, GSO_TCPV6, size=0),
    "super-packet-of-too-many-segments": _gso(_TCP_SUPER, GSO_TCPV6, size=1),
    "super-packet-whose-checksum-begins-early": _gso(_TCP_SUPER, GSO_TCPV6, start=32),
    "super-packet-whose-checksum-begins-late": _gso(_TCP_SUPER, GSO_TCPV6, start=48),
    "super-packet-without-payload": _gso(tcp(POD6, NEAR_POD6, check=PARTIAL), GSO_TCPV6),
    "super-packet-with-a-cut-tcp-header": _gso(_out(bytes(19), protocol=6), GSO_TCPV6),
    "super-packet-in-an-atomic-fragment": _super_behind(fragment_header(), 48),
    "super-packet-in-a-fragment": _super_behind(fragment_header(8, more=True), 48),
    "super-packet-behind-an-authentication-header": _super_behind(authentication_header(), 64),
    "super-packet-behind-a-broken-chain": _super_behind(_options(DESTINATION_OPTIONS, _PAD.hex(), length=255), 48),
    "super-packet-of-too-many-long-headers": _gso(
        _out(tcp_segment(POD6, NEAR_POD6, bytes(2048), check=PARTIAL), headers=[_LONG], protocol=6), GSO_TCPV6, size=1,
        start=136),
    "super-packet-cut": _gso(_TCP_SUPER[:-1], GSO_TCPV6),
    "checksum-that-begins-in-the-header": _gso(_UDP_SUPER, 0, start=39, offset=6),
    "checksum-that-begins-in-an-extension-header": _gso(_out(headers=[_HBH, _DO]), 0, start=48, offset=0),
    "checksum-in-a-broken-chain": _gso(_BROKEN, 0, start=40, offset=0),
    "checksum-behind-a-broken-chain": _gso(_BROKEN, 0, start=48, offset=6),
    "checksum-behind-the-packet": _gso(_out(bytes(7), protocol=17), 0, start=40, offset=6),
    "checksum-behind-the-packet-but-not-the-read": _gso(_out(bytes(8), payload_len=7), 0, start=40, offset=6),
}  # fmt: skip
"""Reads of the TUN whose virtio header does not fit the packet."""


def _framed(packet: bytes, *, ethertype: int = 0x86DD, **fields: int) -> bytes:
    return vxlan(packet, ethertype=ethertype, **fields)  # type: ignore[arg-type]


_SOLICITATION = ipv6("fe80::1", _SOLICITED_NODE, icmpv6_message("fe80::1", _SOLICITED_NODE, 135), protocol=58, ttl=255)

DECAP_VXLAN = slugged(
    [
        Bad("cut-within-the-prefix", "decap_drop_vxlan_short", _framed(_IN)[:21]),
        Bad("flags-00", "decap_drop_vxlan_flags", _framed(_IN, flags=0)),
        Bad("vni-2", "decap_drop_vxlan_vni", _framed(_IN, vni=2)),
        *(
            Bad(f"ethertype-{n:04x}", "decap_drop_vxlan_ethertype", _framed(_IN, ethertype=n))
            for n in (0, 0x0800, 0x0806, 0x8100, 0x86DC, 0x86DE, 0xDD86, 0xFFFF)
        ),
        Bad("of-ipv4", "decap_drop_vxlan_ethertype", _framed(udp(NEAR_POD, POD), ethertype=0x0800)),
        *(
            Bad(f"neighbour-solicitation-to-{mac}", "decap_drop_vxlan_mac",
                vxlan(_SOLICITATION, ethertype=0x86DD, destination=bytes.fromhex(mac)))
            for mac in ("3333ff000001", "333300000001", "ffffffffffff", "000000000000")
        ),
        Bad("mac-bit-0", "decap_drop_vxlan_mac",
            vxlan(_IN, ethertype=0x86DD, destination=OUR_MAC[:5] + bytes([OUR_MAC[5] ^ 1]))),
        Bad("neighbour-solicitation-to-us", "decap_drop_source_martian", _framed(_SOLICITATION)),
        Bad("nothing-behind-the-prefix", "decap_drop_empty", _framed(b"")),
        Bad("within-a-header", "decap_drop_short", _framed(_IN[:39])),
        Bad("ipv4-under-a-wrong-ethertype", "decap_drop_version", _framed(udp(NEAR_POD, POD))),
        Bad("ipv4-to-no-address-under-a-wrong-ethertype", "decap_drop_version", _framed(udp(NEAR_POD, "0.0.0.0"))),
        Bad("ipv4-from-a-stranger-under-a-wrong-ethertype", "decap_drop_version", _framed(udp(NEAR_POD, POD)),
            source=STRANGER),
        Bad("ipv4-header-alone-under-a-wrong-ethertype", "decap_drop_version", _framed(udp(NEAR_POD, POD)[:20])),
        Bad("within-an-ipv4-header", "decap_drop_short", _framed(udp(NEAR_POD, POD)[:19])),
    ]
)  # fmt: skip
"""Datagrams as they are on the wire of a VTEP that carries IPv6."""

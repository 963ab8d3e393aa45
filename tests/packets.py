"""Packets for tests: builders of right and wrong packets, an oracle for ICMP answers, and a small overlay.

The builders share no code with udptun.  Addresses are text, which reads well in a test.  Checksums are right unless a
test asks for another value.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.packet import Raw

from tests.reference import Peer, Table, Vtep

NO_VNET_HDR = bytes(10)
"""The virtio header of an ordinary packet."""

FULL, PARTIAL = "full", "partial"
"""A transport checksum over everything, or the pseudo-header's sum that an offloading sender leaves."""

TCP_FIN, TCP_SYN, TCP_RST, TCP_PSH, TCP_ACK, TCP_URG, TCP_ECE, TCP_CWR = (1 << bit for bit in range(8))

NEEDS_CSUM = 1
"""In the flags of a virtio header."""
GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 4, 5, 0x80
"""In its type."""


def vnet_hdr(
    *, flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    """`struct virtio_net_hdr`, built field by field."""
    header = bytes([flags, gso_type])
    return header + b"".join(value.to_bytes(2, "little") for value in (hdr_len, gso_size, start, offset))


_PATTERN = bytes((i * 7 + (i >> 8) * 13) & 0xFF for i in range(1 << 16))


def pattern(n_bytes: int, seed: int = 0) -> bytes:
    """Bytes that differ from their neighbours and from those 256 further on; 65,536 at most."""
    return _PATTERN[:n_bytes].translate(bytes((value + seed) & 0xFF for value in range(256)))


def internet_sum(data: bytes) -> int:
    """The folded ones' complement sum, by arithmetic modulo 65,535 instead of carries."""
    value = int.from_bytes(data + b"\0" * (len(data) % 2))
    return value % 0xFFFF or (0xFFFF if value else 0)


def internet_checksum(data: bytes) -> int:
    return 0xFFFF - internet_sum(data)


def address(text: str) -> bytes:
    return ip_address(text).packed


def ipv4(
    source: str,
    destination: str,
    payload: bytes = b"",
    *,
    protocol: int = 17,
    ttl: int = 64,
    tos: int = 0,
    ident: int = 0x1234,
    flags: str = "",
    offset: int = 0,
    options: bytes = b"",
    version: int = 4,
    ihl: int | None = None,
    total_len: int | None = None,
    checksum: int | None = None,
) -> bytes:
    """An IPv4 packet.  `flags` of "DF", "MF", "DF+MF" or ""; `offset` in bytes, a multiple of 8.

    The checksum covers the header as long as `ihl` says, so that only the check of the ihl can fail.
    """
    header_len = 20 + len(options)
    ihl = header_len // 4 if ihl is None else ihl
    total_len = header_len + len(payload) if total_len is None else total_len
    fragment = offset // 8 | 0x4000 * ("DF" in flags) | 0x2000 * ("MF" in flags)
    packet = (
        struct.pack(">BBHHHBBH", version << 4 | ihl, tos, total_len, ident, fragment, ttl, protocol, 0)
        + address(source)
        + address(destination)
        + options
        + payload
    )
    return with_header_checksum(packet, checksum)


def ipv6(
    source: str,
    destination: str,
    payload: bytes = b"",
    *,
    protocol: int = 17,
    ttl: int = 64,
    tos: int = 0,
    flow_label: int = 0x12345,
    headers: Sequence[tuple[int, bytes]] = (),
    version: int = 6,
    payload_len: int | None = None,
) -> bytes:
    """An IPv6 packet.  `headers` are extension headers: the number of each, and it without its first byte."""
    payload, next_header = behind(headers, payload, protocol)
    payload_len = len(payload) if payload_len is None else payload_len
    word = version << 28 | tos << 20 | flow_label
    return struct.pack(">IHBB", word, payload_len, next_header, ttl) + address(source) + address(destination) + payload


def behind(headers: Sequence[tuple[int, bytes]], payload: bytes, protocol: int) -> tuple[bytes, int]:
    """`payload` with extension headers before it, and the number that the header before these must have."""
    for kind, rest in reversed(headers):
        payload, protocol = bytes([protocol]) + rest + payload, kind
    return payload, protocol


HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS = 0, 43, 44, 51, 60
"""Extension headers."""


def options_header(kind: int, options: bytes = b"\1\4\0\0\0\0", *, length: int | None = None) -> tuple[int, bytes]:
    """Hop-by-hop or destination options, by default one PadN.  `length`: what it says of itself, in 8 bytes less 1."""
    assert len(options) % 8 == 6
    return kind, bytes([len(options) // 8 if length is None else length]) + options


def routing_header(
    kind: int = 2, segments_left: int = 0, data: bytes = bytes(20), *, length: int | None = None
) -> tuple[int, bytes]:
    return ROUTING, bytes([len(data) // 8 if length is None else length, kind, segments_left]) + data


def fragment_header(offset: int = 0, *, more: bool = False, reserved: int = 0) -> tuple[int, bytes]:
    """`offset` in bytes, a multiple of 8."""
    return FRAGMENT, struct.pack(">BHI", reserved, offset | more, 0x5EED)


def authentication_header(data: bytes = bytes(22), *, length: int | None = None) -> tuple[int, bytes]:
    """`length`: what it says of itself, in 4 bytes less 2."""
    return AUTHENTICATION, bytes([len(data) // 4 - 1 if length is None else length]) + data


def with_header_checksum(packet: bytes, checksum: int | None = None) -> bytes:
    """`packet` with `checksum`, or the right one, in its header, whatever stood there."""
    if checksum is None:
        header = packet[: (packet[0] & 0xF) * 4]
        checksum = internet_checksum(header[:10] + bytes(2) + header[12:])
    return packet[:10] + struct.pack(">H", checksum) + packet[12:]


def _transport_check(source: str, destination: str, protocol: int, segment: bytes, kind: str | int) -> int:
    if isinstance(kind, int):
        return kind
    pseudo = address(source) + address(destination) + struct.pack(">IHH", len(segment), 0, protocol)
    if kind == PARTIAL:
        return internet_sum(pseudo)
    check = internet_checksum(pseudo + segment)
    return 0xFFFF if protocol == 17 and check == 0 else check


def udp(source: str, destination: str, data: bytes = b"", *, check: str | int = FULL, ttl: int = 64) -> bytes:
    """A packet of the family of its addresses, with a UDP datagram in it."""
    ip = ipv6 if ":" in source else ipv4
    return ip(source, destination, udp_segment(source, destination, data, check=check), ttl=ttl)


def udp_segment(
    source: str,
    destination: str,
    data: bytes = b"",
    *,
    ports: tuple[int, int] = (5353, 53),
    length: int | None = None,
    check: str | int = FULL,
) -> bytes:
    segment = struct.pack(">HHHH", *ports, 8 + len(data) if length is None else length, 0) + data
    value = _transport_check(source, destination, 17, segment, check)
    return segment[:6] + struct.pack(">H", value) + segment[8:]


def tcp_segment(
    source: str,
    destination: str,
    data: bytes = b"",
    *,
    ports: tuple[int, int] = (40000, 443),
    sequence: int = 1,
    acknowledgement: int = 2,
    flags: int = TCP_ACK,
    window: int = 64240,
    urgent: int = 0,
    options: bytes = b"",
    data_offset: int | None = None,
    check: str | int = FULL,
) -> bytes:
    """`flags` has eight bits, and above them the four that are reserved."""
    data_offset = 5 + len(options) // 4 if data_offset is None else data_offset
    header = struct.pack(
        ">HHIIHHHH", *ports, sequence & 0xFFFFFFFF, acknowledgement, data_offset << 12 | flags, window, 0, urgent
    )
    segment = header + options + data
    value = _transport_check(source, destination, 6, segment, check)
    return segment[:16] + struct.pack(">H", value) + segment[18:]


def tcp(source: str, destination: str, data: bytes = b"", *, ttl: int = 64, **segment: object) -> bytes:
    """The same with a TCP segment; `segment` as `tcp_segment` takes it."""
    body = tcp_segment(source, destination, data, **segment)  # type: ignore[arg-type]
    ip = ipv6 if ":" in source else ipv4
    return ip(source, destination, body, protocol=6, ttl=ttl)


def icmp_message(type_: int, code: int = 0, rest: bytes = b"\0\x01\0\x01", data: bytes = b"ping") -> bytes:
    body = struct.pack(">BBH", type_, code, 0) + rest + data
    return body[:2] + struct.pack(">H", internet_checksum(body)) + body[4:]


def icmpv6_message(
    source: str,
    destination: str,
    type_: int,
    code: int = 0,
    rest: bytes = b"\0\x01\0\x01",
    data: bytes = b"ping",
    *,
    check: str | int = FULL,
) -> bytes:
    body = struct.pack(">BBH", type_, code, 0) + rest + data
    return body[:2] + struct.pack(">H", _transport_check(source, destination, 58, body, check)) + body[4:]


def destination_of(packet: bytes) -> str:
    """The destination address of a packet of either family."""
    return str(ip_address(packet[24:40] if packet[0] >> 4 == 6 else packet[16:20]))


def source_of(packet: bytes) -> str:
    return str(ip_address(packet[8:24] if packet[0] >> 4 == 6 else packet[12:16]))


def stepped(packet: bytes) -> bytes:
    """`packet`, whose header checksum is right, as it looks one hop later."""
    if packet[0] >> 4 == 6:
        return packet[:7] + bytes([packet[7] - 1]) + packet[8:]
    return with_header_checksum(packet[:8] + bytes([packet[8] - 1]) + packet[9:])


def icmp_answer(
    type_: int, code: int, offender: bytes, *, source: str, next_hop_mtu: int = 0, most: int | None = None
) -> bytes:
    """The whole ICMP error of `most` bytes at most that must come back for `offender`, as scapy builds it.

    It is of the family of `source`; ICMPv6 takes 1280 bytes in place of the 576.
    """
    if ":" in source:
        return _icmpv6_answer(type_, code, offender, source=source, next_hop_mtu=next_hop_mtu, most=most or 1280)
    most = 576 if most is None else most
    message = ICMP(type=type_, code=code)
    if next_hop_mtu:
        message.nexthopmtu = next_hop_mtu
    destination = str(IPv4Address(offender[12:16]))
    header = IP(src=source, dst=destination, tos=0xC0, id=0, flags=0, ttl=64, proto=1)
    return bytes(header / message / Raw(offender[: most - 28]))


def _icmpv6_answer(type_: int, code: int, offender: bytes, *, source: str, next_hop_mtu: int, most: int) -> bytes:
    kind = {1: ICMPv6DestUnreach, 2: ICMPv6PacketTooBig, 3: ICMPv6TimeExceeded}[type_]
    message = kind(code=code)
    if type_ == 2:
        message.mtu = next_hop_mtu
    header = IPv6(src=source, dst=source_of(offender), tc=0xC0, fl=0, hlim=64, nh=58)
    return bytes(header / message / Raw(offender[: most - 48]))


def icmp_answer_to_peer(type_: int, code: int, offender: bytes, *, source: str) -> bytes:
    """One that goes over the underlay: no longer than its cause, but it quotes 8 bytes behind the IP header."""
    if ":" in source:
        most = min(1280, max(96, len(offender)))
        return icmp_answer(type_, code, offender, source=source, most=most)
    least = 28 + (offender[0] & 15) * 4 + 8
    return icmp_answer(type_, code, offender, source=source, most=min(576, max(least, len(offender))))


# The overlay of the datapath tests.  Outer addresses are loopback's, so that real sockets can stand for the peers.
OWN = "10.244.1.0"
"""Our tunnel address, first of 10.244.1.0/24."""
POD = "10.244.1.10"
"""A pod of ours."""
UNDERLAY = "192.0.2.1"
LOCAL, LOCAL_IN_A_LEASE = LOCALS = ("198.51.100.9", "10.244.2.200")
"""Other addresses of ours; the second is inside the subnet of the first peer."""

NEAR, NEAR_POD = "127.0.0.2", "10.244.2.10"
NARROW, NARROW_POD, NARROW_MTU = "127.0.0.3", "10.244.3.10", 1200
"""A peer whose path takes less than our device, and that carries no marks of congestion on, as flanneld."""
TWIN, TWIN_POD, TWIN_OTHER_POD = "127.0.0.4", "10.244.4.10", "10.244.5.70"
"""Two leases of one host; the second is a /26."""
WIDE, WIDE_POD = "127.0.0.5", "10.244.31.254"
"""A lease of a /20."""
DEAF, DEAF_POD = "192.0.2.9", "10.244.9.10"
"""A peer that the kernel refuses to send to: a socket bound to a loopback address cannot leave the machine."""
VNI, OUR_MAC = 1, bytes.fromhex("0a0000000001")
"""Of the overlay over VXLAN; the peer with index i has the MAC address 0a:00:00:00:01:<i>."""
STRANGER = "127.0.0.99"
"""An outer address that no lease names."""
LEARNED = "127.0.0.78"
"""An outer address that no lease names; the host of NEAR_POD has been found to send from there."""
OUTSIDE = "198.51.100.7"
"""An inner address outside Network."""
UNLEASED = "10.244.200.1"
"""Inside Network, leased by nobody."""

OWN6, POD6 = "fd00:244:0:1::", "fd00:244:0:1::10"
"""Our tunnel address, first of fd00:244:0:1::/64, and a pod of ours."""
LOCAL6, LOCAL6_IN_A_LEASE = LOCALS6 = ("2001:db8:9::9", "fd00:244:0:2::200")
NEAR_POD6 = "fd00:244:0:2::10"
NARROW_POD6 = "fd00:244:0:3::10"
"""As narrow as with IPv4, which is less than IPv6 allows."""
TWIN_POD6, TWIN_OTHER_POD6 = "fd00:244:0:4::10", "fd00:244:0:5:8000::70"
"""The second one is in a /65."""
SLIM_POD6, SLIM_MTU = "fd00:244:0:1f::fe", 1400
"""In the lease of a /60 that WIDE has; its path takes less than our device."""
DEAF_POD6 = "fd00:244:0:9::10"
OUTSIDE6, UNLEASED6 = "2001:db8::7", "fd00:244:0:200::1"

MTU = 1472
PORT = 8285


def peer_mac(index: int) -> bytes:
    return bytes.fromhex("0a00000001") + bytes([index])


def vxlan(
    packet: bytes,
    *,
    flags: int = 8,
    vni: int = VNI,
    destination: bytes = OUR_MAC,
    source: bytes = peer_mac(1),
    ethertype: int = 0x0800,
    reserved: tuple[int, int] = (0, 0),
) -> bytes:
    """The UDP payload that carries `packet` over VXLAN, by default one from the first peer to us.

    `reserved` are the three bytes after the flags and the one after the VNI.
    """
    header = bytes([flags]) + reserved[0].to_bytes(3) + vni.to_bytes(3) + bytes([reserved[1]])
    return header + destination + source + ethertype.to_bytes(2) + packet


def overlay(ports: dict[str, int] | None = None, *, is_vxlan: bool = False, has_ipv6: bool = False) -> Table:
    """The table; `ports` says where peers really listen, by public IP.  Over VXLAN a table has one family."""
    leases: tuple[tuple[str, str, int], ...] = (
        ("10.244.2.0/24", NEAR, MTU),
        ("10.244.3.0/24", NARROW, NARROW_MTU),
        ("10.244.4.0/24", TWIN, MTU),
        ("10.244.5.64/26", TWIN, MTU),
        ("10.244.16.0/20", WIDE, MTU),
        ("10.244.9.0/24", DEAF, MTU),
    )
    learned = ["10.244.2.0/24"]
    of_ipv6: dict[str, IPv6Network | IPv6Address] = {}
    local: tuple[str, ...] = (UNDERLAY, *LOCALS)
    if has_ipv6:
        leases += (
            ("fd00:244:0:2::/64", NEAR, MTU),
            ("fd00:244:0:3::/64", NARROW, NARROW_MTU),
            ("fd00:244:0:4::/64", TWIN, MTU),
            ("fd00:244:0:5:8000::/65", TWIN, MTU),
            ("fd00:244:0:10::/60", WIDE, SLIM_MTU),
            ("fd00:244:0:9::/64", DEAF, MTU),
        )
        learned.append("fd00:244:0:2::/64")
        of_ipv6 = {
            "network_ipv6": IPv6Network("fd00:244::/48"),
            "own_subnet_ipv6": IPv6Network("fd00:244:0:1::/64"),
            "tunnel_address_ipv6": IPv6Address(OWN6),
        }
        local += LOCALS6
    is_ipv6_alone = is_vxlan and has_ipv6
    if is_ipv6_alone:
        leases, learned = tuple(it for it in leases if ":" in it[0]), learned[1:]
    ports = ports or {}
    return Table(
        network=IPv4Network("0.0.0.0/32" if is_ipv6_alone else "10.244.0.0/16"),
        own_subnet=IPv4Network("0.0.0.0/32" if is_ipv6_alone else "10.244.1.0/24"),
        tunnel_address=IPv4Address("0.0.0.0" if is_ipv6_alone else OWN),
        local_addresses=frozenset(map(ip_address, local)),
        mtu=MTU,
        source_check="peer",
        peers=tuple(
            Peer(
                index,
                ip_network(subnet),
                (IPv4Address(ip), ports.get(ip, PORT)),
                mtu,
                peer_mac(index) if is_vxlan else b"",
                carries_ecn=is_vxlan or ip != NARROW,
            )
            for index, (subnet, ip, mtu) in enumerate(leases, start=1)
        ),
        vtep=Vtep(VNI, OUR_MAC) if is_vxlan else None,
        learned=tuple((ip_network(subnet), IPv4Address(LEARNED), 0) for subnet in learned),
        **of_ipv6,  # type: ignore[arg-type]
    )

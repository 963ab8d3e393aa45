"""IP packets of both families in one form: what the reference reads of their headers, checks and changes in them.

Pure.  `Family` has what differs between IPv4 and IPv6 as values; `Header` is what is read of a packet of either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import NamedTuple

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

Reason = tuple[int, int]
"""ICMP type and code."""

IPV4_HDR_MIN, IPV6_HDR_LEN = 20, 40
ICMP_HDR_LEN, UDP_HDR_LEN = 8, 8
TCP, UDP, UNKNOWN_PROTOCOL = 6, 17, -1
"""The last one is what stands behind a broken chain of extension headers."""
CSUM_OFFSET = {TCP: 16, UDP: 6}
"""Where the check field lies in the transport header."""
TRAFFIC_CLASS_OF_ANSWERS, TTL_OF_ANSWERS = 0xC0, 64

ECN_MASK = 3
"""Of the TOS, or traffic class."""

_OPTION_END, _OPTION_NOP, _OPTION_LSRR, _OPTION_SSRR = 0, 1, 131, 137

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION_OPTIONS = _EXTENSIONS = (0, 43, 44, 51, 60)
_MOST_EXTENSIONS = 8
_PAD1 = 0


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between IPv4 and IPv6.  Lengths in bytes."""

    version: int
    header_len: int
    """Of a header without options."""
    icmp: int
    """Protocol number."""
    gso_tcp: int
    """Type of a TCP super-packet in a virtio header."""
    least_mtu: int
    """What is no longer is never too big; whoever sends it need not know of path MTUs."""
    longest_answer: int
    echo_request: int
    echo_reply: int
    question_len: int
    """Of a question of learning: IP and ICMP header, nonce."""
    answered_icmp: frozenset[int]
    """Types of ICMP messages that may be answered by ICMP errors."""
    martian_sources: tuple[IPNetwork, ...]
    multicast: IPNetwork
    """With IPv4, broadcast too."""
    no_route: Reason
    unreachable: Reason
    too_big: Reason
    time_exceeded: Reason


IPV4 = Family(
    version=4,
    header_len=IPV4_HDR_MIN,
    icmp=1,
    gso_tcp=1,
    least_mtu=0,
    # What every host must take (RFC 1812 4.3.2.3).
    longest_answer=576,
    echo_request=8,
    echo_reply=0,
    question_len=36,
    # RFC 1122 3.2.2. The last two are timestamp and timestamp reply.
    answered_icmp=frozenset((0, 8, 13, 14)),
    martian_sources=tuple(map(ip_network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"))),
    multicast=ip_network("224.0.0.0/3"),
    no_route=(3, 0),
    unreachable=(3, 1),
    too_big=(3, 4),
    time_exceeded=(11, 0),
)
IPV6 = Family(
    version=6,
    header_len=IPV6_HDR_LEN,
    icmp=58,
    gso_tcp=4,
    # RFC 8200 5, and RFC 2473 7.1 for tunnels.
    least_mtu=1280,
    # RFC 4443 2.4(c).
    longest_answer=1280,
    echo_request=128,
    echo_reply=129,
    question_len=56,
    # All but errors and redirects (RFC 4443 2.4(e)).
    answered_icmp=frozenset(range(128, 256)) - {137},
    # ::/96 has the unspecified address, loopback and what is left of "IPv4-compatible".
    martian_sources=tuple(map(ip_network, ("::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8"))),
    multicast=ip_network("ff00::/8"),
    no_route=(1, 0),
    unreachable=(1, 3),
    too_big=(2, 0),
    time_exceeded=(3, 0),
)


class Header(NamedTuple):
    """What is read of the headers of a packet, lengths in bytes; nothing is checked.

    `header_len` is all before the transport header: IPv4 options and IPv6 extension headers are in it.  `protocol` is
    that of the transport header.  `is_whole`: fragments and packets with an authentication header are not, so their
    transport checksums are not ours to complete.
    """

    family: Family
    header_len: int
    total_len: int
    tos: int
    ttl: int
    protocol: int
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int
    is_whole: bool
    source: IPAddress
    destination: IPAddress

    @property
    def is_later_fragment(self) -> bool:
        return self.fragment_offset > 0


def version(data: bytes) -> int:
    return data[0] >> 4


def read_header(data: bytes) -> Header:
    """`data` has at least the `header_len` bytes of its family; bytes after the total length are not looked at."""
    return _read_ipv6(data) if version(data) == 6 else _read_ipv4(data)


_IPV4_HDR = struct.Struct(">BBHxxHBBxx4s4s")
"""Version and ihl, TOS, total length, flags and offset, TTL, protocol, source, destination."""


def _read_ipv4(data: bytes) -> Header:
    first, tos, total_len, fragment, ttl, protocol, source, destination = _IPV4_HDR.unpack_from(data)
    return Header(
        family=IPV4,
        header_len=(first & 0xF) * 4,
        total_len=total_len,
        tos=tos,
        ttl=ttl,
        protocol=protocol,
        dont_fragment=bool(fragment & 0x4000),
        more_fragments=bool(fragment & 0x2000),
        fragment_offset=(fragment & 0x1FFF) * 8,
        is_whole=not fragment & 0x3FFF,
        source=IPv4Address(source),
        destination=IPv4Address(destination),
    )


_IPV6_HDR = struct.Struct(">IHBB16s16s")
"""Version, traffic class and flow label; payload length, next header, hop limit, source, destination."""


def _read_ipv6(data: bytes) -> Header:
    word, payload_len, protocol, hop_limit, source, destination = _IPV6_HDR.unpack_from(data)
    total_len = IPV6_HDR_LEN + payload_len
    at, offset, more_fragments, is_whole = IPV6_HDR_LEN, 0, False, True
    for number, extension in enumerate(_extensions(data[:total_len])):
        if extension.is_cut or number == _MOST_EXTENSIONS:
            protocol = UNKNOWN_PROTOCOL
            break
        at, protocol = extension.end, extension.next_header
        if extension.kind == _FRAGMENT:
            offset, more_fragments = extension.fragment
        is_whole = is_whole and extension.kind not in (_FRAGMENT, _AUTHENTICATION)
    return Header(
        family=IPV6,
        header_len=at,
        total_len=total_len,
        tos=word >> 20 & 0xFF,
        ttl=hop_limit,
        protocol=protocol,
        dont_fragment=True,
        more_fragments=more_fragments,
        fragment_offset=offset,
        is_whole=is_whole,
        source=IPv6Address(source),
        destination=IPv6Address(destination),
    )


class _Extension(NamedTuple):
    """An extension header: its bytes, from `at` to `end` of the packet.  `is_cut`: the packet ends before it does."""

    kind: int
    at: int
    data: bytes
    is_cut: bool

    @property
    def end(self) -> int:
        return self.at + len(self.data)

    @property
    def next_header(self) -> int:
        return self.data[0]

    @property
    def fragment(self) -> tuple[int, bool]:
        """Offset in bytes, and whether there are more.  Of a fragment header that is not cut."""
        (word,) = struct.unpack_from(">H", self.data, 2)
        return word & 0xFFF8, bool(word & 1)


def _extensions(packet: bytes) -> Iterator[_Extension]:
    """The extension headers of an IPv6 packet, up to one that is cut, or that says that a later fragment follows."""
    kind, at = packet[6], IPV6_HDR_LEN
    while kind in _EXTENSIONS:
        length = 8
        if len(packet) >= at + 8 and kind != _FRAGMENT:
            length = (packet[at + 1] + 2) * 4 if kind == _AUTHENTICATION else (packet[at + 1] + 1) * 8
        extension = _Extension(kind, at, packet[at : at + length], is_cut=len(packet) < at + length)
        yield extension
        if extension.is_cut or (kind == _FRAGMENT and extension.fragment[0] > 0):
            return
        kind, at = extension.next_header, extension.end


# ------------------------------------------------------------------------------------------------- what is wrong


def ipv4_problem(data: bytes) -> str | None:
    """The counter, without the direction, of what is wrong with the header; None: it is a packet.  Rows 5 to 9.

    `data` has at least 20 bytes, some of which may come after the packet.
    """
    ip = _read_ipv4(data)
    if not IPV4_HDR_MIN <= ip.header_len <= len(data):  # 5
        return "drop_ihl"
    if not ip.header_len <= ip.total_len <= len(data):  # 6
        return "drop_length"
    if fold_sum(data[: ip.header_len]) != 0xFFFF:  # 7
        return "drop_checksum"
    if not _are_options_acceptable(data[IPV4_HDR_MIN : ip.header_len]):  # 8
        return "drop_options"
    if not _is_fragment_possible(ip.fragment_offset, ip.total_len - ip.header_len, more=ip.more_fragments):  # 9
        return "drop_fragment"
    return None


def ipv6_problem(data: bytes) -> str | None:
    """The same of IPv6, with at least 40 bytes: rows 6, 8 and 9.  The first extension header with a problem decides."""
    (payload_len,) = struct.unpack_from(">H", data, 4)
    is_jumbo = payload_len == 0 and data[6] == _HOP_BY_HOP
    if IPV6_HDR_LEN + payload_len > len(data) or is_jumbo:  # 6
        return "drop_length"
    packet = data[: IPV6_HDR_LEN + payload_len]
    is_first_fragment = has_fragment_header = False
    for number, extension in enumerate(_extensions(packet)):
        if number == _MOST_EXTENSIONS or (extension.kind == _HOP_BY_HOP and number > 0):  # 8
            return "drop_options"
        if extension.is_cut:  # 8; 9 (RFC 7112)
            return "drop_fragment" if is_first_fragment else "drop_options"
        if extension.kind == _FRAGMENT:
            offset, more = extension.fragment
            if has_fragment_header or not _is_fragment_possible(offset, len(packet) - extension.end, more=more):  # 9
                return "drop_fragment"
            has_fragment_header, is_first_fragment = True, more and offset == 0
        elif not _is_extension_acceptable(extension):  # 8
            return "drop_options"
    ip = _read_ipv6(packet)
    least = {TCP: 20, UDP: UDP_HDR_LEN, IPV6.icmp: ICMP_HDR_LEN}.get(ip.protocol, 0)
    if is_first_fragment and len(packet) - ip.header_len < least:  # 9 (RFC 7112)
        return "drop_fragment"
    return None


def _are_options_acceptable(options: bytes) -> bool:
    """Whether the options are well formed (RFC 791 3.1) and hold no source route (RFC 7126 4.3, 4.4)."""
    at = 0
    while at < len(options) and options[at] != _OPTION_END:
        kind = options[at]
        if kind == _OPTION_NOP:
            at += 1
            continue
        if kind in (_OPTION_LSRR, _OPTION_SSRR) or at + 1 == len(options):
            return False
        length = options[at + 1]
        if length < 2 or at + length > len(options):
            return False
        at += length
    return True


def _is_extension_acceptable(extension: _Extension) -> bool:
    """Whether it holds no source route (RFC 5095; RFC 8200 4.4), and well-formed options (RFC 8200 4.2)."""
    if extension.kind == _ROUTING:
        kind, segments_left = extension.data[2:4]
        return kind != 0 and segments_left == 0
    if extension.kind not in (_HOP_BY_HOP, _DESTINATION_OPTIONS):
        return True
    options, at = extension.data[2:], 0
    while at < len(options):
        if options[at] == _PAD1:
            at += 1
        elif at + 1 == len(options):
            return False
        else:
            at += 2 + options[at + 1]
    return at == len(options)


def _is_fragment_possible(offset: int, payload_len: int, *, more: bool) -> bool:
    """Whether there can be such a fragment of some packet; true of a packet that is no fragment."""
    if more and (payload_len == 0 or payload_len % 8 != 0):
        return False
    return offset + payload_len <= 0xFFFF


def is_martian(source: IPAddress) -> bool:
    """Whether no host can have `source` towards another one."""
    return any(source in network for network in (*IPV4.martian_sources, *IPV6.martian_sources))


# --------------------------------------------------------------------------------------------------- what changes


def step_ttl(packet: bytes) -> bytes:
    """`packet` with TTL or hop limit - 1 (it is at least 1); with IPv4 a wrong header checksum stays wrong.

    RFC 1624 equation 3, HC' = ~(~HC + ~m + m'), where m is the 16-bit word that holds TTL and protocol.
    """
    if version(packet) == 6:
        return packet[:7] + bytes([packet[7] - 1]) + packet[8:]
    word, check = struct.unpack_from(">HH", packet, 8)
    new_word = word - 0x0100
    new_check = 0xFFFF ^ _fold((0xFFFF ^ check) + (0xFFFF ^ word) + new_word)
    return packet[:8] + struct.pack(">HH", new_word, new_check) + packet[12:]


def with_ecn(packet: bytes, ecn: int) -> bytes:
    """`packet` with this ECN field, and an IPv4 header checksum that is updated (RFC 1624 equation 3)."""
    if version(packet) == 6:
        (word,) = struct.unpack_from(">H", packet)
        return struct.pack(">H", word & ~(ECN_MASK << 4) | ecn << 4) + packet[2:]
    word, check = struct.unpack_from(">H8xH", packet)
    new_word = word & ~ECN_MASK | ecn
    if new_word == word:
        return packet
    new_check = 0xFFFF ^ _fold((0xFFFF ^ check) + (0xFFFF ^ word) + new_word)
    return struct.pack(">H", new_word) + packet[2:10] + struct.pack(">H", new_check) + packet[12:]


def with_one_form_of_zero(packet: bytes) -> bytes:
    """`packet` with an IPv4 header checksum of 0xFFFF as 0: the TTL step and back keeps the value, not the form."""
    is_other_form = version(packet) == 4 and packet[10:12] == b"\xff\xff"
    return packet[:10] + bytes(2) + packet[12:] if is_other_form else packet


def header_before(header: bytes, segment: bytes, number: int) -> bytes:
    """The IP header of segment `number` of a super-packet that has `header`: lengths, id and header checksum anew."""
    if version(header) == 6:
        payload_len = len(header) - IPV6_HDR_LEN + len(segment)
        return header[:4] + struct.pack(">H", payload_len) + header[6:]
    (ident,) = struct.unpack_from(">H", header, 4)
    changed = struct.pack(">HH", len(header) + len(segment), (ident + number) & 0xFFFF)
    header = header[:2] + changed + header[6:10] + bytes(2) + header[12:]
    return header[:10] + checksum(header) + header[12:]


# ----------------------------------------------------------------------------------------------------------- ICMP


def icmp_error(
    tunnel_address: IPAddress, offender: bytes, reason: Reason, mtu: int = 0, most: int | None = None
) -> bytes:
    """The packet that tells the sender of `offender` why it was dropped (RFC 792, RFC 4443).

    `offender` is a whole packet, TTL as received; the answer quotes as much of it as fits `most` and what every host
    must take.  `mtu` is that of the next hop, bytes; 0 where the reason has none (RFC 1191).
    """
    ip = read_header(offender)
    family = ip.family
    longest = family.longest_answer if most is None else min(most, family.longest_answer)
    quote = offender[: longest - family.header_len - ICMP_HDR_LEN]
    icmp = struct.pack(">BBHI", *reason, 0, mtu) + quote
    addresses = tunnel_address.packed + ip.source.packed
    if family is IPV6:
        check = checksum(addresses + struct.pack(">II", len(icmp), family.icmp) + icmp)
        word = 6 << 28 | TRAFFIC_CLASS_OF_ANSWERS << 20
        return struct.pack(">IHBB", word, len(icmp), family.icmp, TTL_OF_ANSWERS) + addresses + _with(check, icmp)
    lengths = (IPV4_HDR_MIN + len(icmp), 0, 0)
    header = struct.pack(">BBHHHBBH", 0x45, TRAFFIC_CLASS_OF_ANSWERS, *lengths, TTL_OF_ANSWERS, family.icmp, 0)
    check = checksum(header + addresses)
    return header[:10] + check + addresses + _with(checksum(icmp), icmp)


def _with(check: bytes, icmp: bytes) -> bytes:
    return icmp[:2] + check + icmp[4:]


def may_be_answered(packet: bytes) -> bool:
    """Whether an ICMP error may be sent about `packet` (RFC 1122 3.2.2, RFC 4443 2.4(e))."""
    ip = read_header(packet)
    if ip.is_later_fragment or is_martian(ip.source) or ip.destination in ip.family.multicast:
        return False
    if ip.protocol == UNKNOWN_PROTOCOL:
        return False
    if ip.protocol != ip.family.icmp:
        return True
    icmp = packet[ip.header_len :]
    return len(icmp) >= ICMP_HDR_LEN and icmp[0] in ip.family.answered_icmp


# ------------------------------------------------------------------------------------------------------ checksums


def fold_sum(data: bytes) -> int:
    """The ones' complement sum of `data` as 16-bit big-endian words, an odd byte padded with zero (RFC 1071).

    0xFFFF over data that holds its own correct checksum; 0 only where every byte is zero.
    """
    padded = data + b"\0" * (len(data) % 2)
    return _fold(sum(struct.unpack(f">{len(padded) // 2}H", padded)))


def checksum(data: bytes) -> bytes:
    """The Internet checksum of `data`, whose own checksum field is zero, in network byte order."""
    return struct.pack(">H", 0xFFFF ^ fold_sum(data))


def pseudo_header(ip: Header, transport: bytes) -> bytes:
    """What a transport checksum covers beside the transport (RFC 9293 3.1, RFC 8200 8.1)."""
    end = struct.pack(">HH", ip.protocol, len(transport))
    if ip.family is IPV6:
        end = struct.pack(">II", len(transport), ip.protocol)
    return ip.source.packed + ip.destination.packed + end


def is_icmp_checksum_right(ip: Header, icmp: bytes) -> bool:
    """Of IPv6 it covers a pseudo-header too (RFC 4443 2.3)."""
    return fold_sum((pseudo_header(ip, icmp) if ip.family is IPV6 else b"") + icmp) == 0xFFFF


def has_transport_header(protocol: int, transport: bytes) -> bool:
    """Whether `transport` begins with a complete header of TCP or UDP."""
    if protocol == UDP:
        return len(transport) >= UDP_HDR_LEN
    return protocol == TCP and len(transport) >= 20 and 20 <= tcp_header_len(transport) <= len(transport)


def tcp_header_len(tcp: bytes) -> int:
    return (tcp[12] >> 4) * 4


def _fold(total: int) -> int:
    """A sum of 16-bit words brought back to 16 bits by adding the carries in."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total

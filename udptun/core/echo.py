"""Echoes of ICMP and ICMPv6 (RFC 792, RFC 4443) that carry a nonce, by which their replies are known."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from udptun.core.network_state import IPAddress

_IPV4 = struct.Struct(">BBHHHBBH4s4s")
"""Version and ihl, TOS, total length, id, flags and offset, TTL, protocol, checksum, source, destination."""
_IPV6 = struct.Struct(">IHBB16s16s")
"""Version, traffic class and flow label; payload length, next header, hop limit, source, destination."""
_PSEUDO_HEADER = struct.Struct(">16s16sI3xB")
"""Source, destination, length, next header: what an ICMPv6 checksum begins with (RFC 8200 8.1)."""
_ECHO = struct.Struct(">BBHHH8s")
"""Type, code, checksum, id, sequence, and our nonce, with which the payload begins."""
_PROTOCOL_ICMP, _PROTOCOL_ICMPV6 = 1, 58
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_ECHO_REQUEST_V6, _ECHO_REPLY_V6 = 128, 129
_DONT_FRAGMENT = 0x4000
_TTL = 64

NONCE_LEN = 8
MIN_LENGTH = _IPV4.size + _ECHO.size
"""Of an IPv4 packet with a nonce, bytes."""
_MIN_LENGTH_V6 = _IPV6.size + _ECHO.size


@dataclass(frozen=True, slots=True)
class Echo:
    """A request or a reply.  Both addresses are of one family."""

    source: IPAddress
    destination: IPAddress
    id: int
    sequence: int
    nonce: bytes


def min_length(address: IPAddress) -> int:
    """The length of the shortest packet with a nonce to or from that address, bytes."""
    return MIN_LENGTH if address.version == 4 else _MIN_LENGTH_V6


def echo_request(
    source: IPAddress, destination: IPAddress, id: int, sequence: int, nonce: bytes, length: int = 0
) -> bytes:
    """What an echo request of `length` bytes in all, or of `min_length`, begins with.  The missing bytes are zero.

    Whoever cannot forward it drops it: it has DF, as all of IPv6 behaves.  `nonce` has NONCE_LEN bytes.
    """
    return _message(is_request=True, it=Echo(source, destination, id, sequence, nonce), length=length)


def echo_reply(request: Echo) -> bytes:
    """The reply to a request that has nothing behind its nonce."""
    return _message(is_request=False, it=replace(request, source=request.destination, destination=request.source))


def echo_message(nonce: bytes, length: int, version: int) -> bytes:
    """The ICMP or ICMPv6 message of a packet of `length` bytes and of that IP version.

    Whoever sends it fills in the checksum and the id.
    """
    kind, header_len = (_ECHO_REQUEST, _IPV4.size) if version == 4 else (_ECHO_REQUEST_V6, _IPV6.size)
    return _ECHO.pack(kind, 0, 0, 0, 0, nonce).ljust(length - header_len, b"\0")


def parse_echo_request(packet: bytes) -> Echo | None:
    """As `parse_echo_reply`."""
    return _parse(packet, _ECHO_REQUEST, _ECHO_REQUEST_V6)


def parse_echo_reply(packet: bytes) -> Echo | None:
    """From what a packet begins with, whose checksums have been looked at; None unless it has room for a nonce.

    One of IPv6 has no extension headers.
    """
    return _parse(packet, _ECHO_REPLY, _ECHO_REPLY_V6)


def _message(*, is_request: bool, it: Echo, length: int = 0) -> bytes:
    length = length or min_length(it.source)
    addresses = (it.source.packed, it.destination.packed)
    if it.source.version == 4:
        header = _IPV4.pack(0x45, 0, length, 0, _DONT_FRAGMENT, _TTL, _PROTOCOL_ICMP, 0, *addresses)
        header = header[:10] + internet_checksum(header) + header[12:]
        kind, pseudo_header = (_ECHO_REQUEST if is_request else _ECHO_REPLY), b""
    else:
        payload_len = length - _IPV6.size
        header = _IPV6.pack(6 << 28, payload_len, _PROTOCOL_ICMPV6, _TTL, *addresses)
        kind = _ECHO_REQUEST_V6 if is_request else _ECHO_REPLY_V6
        pseudo_header = _PSEUDO_HEADER.pack(*addresses, payload_len, _PROTOCOL_ICMPV6)
    # Zeros at the end change no checksum.
    echo = _ECHO.pack(kind, 0, 0, it.id, it.sequence, it.nonce)
    return header + echo[:2] + internet_checksum(pseudo_header + echo) + echo[4:]


def _parse(packet: bytes, kind: int, kind_v6: int) -> Echo | None:
    version = packet[0] >> 4 if packet else 0
    source: IPAddress
    destination: IPAddress
    if version == 4 and len(packet) >= MIN_LENGTH:
        first, _, _, _, _, _, protocol, _, source_be, destination_be = _IPV4.unpack_from(packet)
        header_len, is_icmp = (first & 0xF) * 4, protocol == _PROTOCOL_ICMP
        source, destination = IPv4Address(source_be), IPv4Address(destination_be)
    elif version == 6 and len(packet) >= _MIN_LENGTH_V6:
        _, _, protocol, _, source_be, destination_be = _IPV6.unpack_from(packet)
        kind, header_len, is_icmp = kind_v6, _IPV6.size, protocol == _PROTOCOL_ICMPV6
        source, destination = IPv6Address(source_be), IPv6Address(destination_be)
    else:
        return None
    if not is_icmp or len(packet) < header_len + _ECHO.size:
        return None
    found, code, _, id, sequence, nonce = _ECHO.unpack_from(packet, header_len)
    if (found, code) != (kind, 0):
        return None
    return Echo(source, destination, id, sequence, nonce)


def parse_echo_reply_message(message: bytes, version: int) -> bytes | None:
    """The nonce in what an ICMP or ICMPv6 message begins with; None unless it is an echo reply with room for one."""
    if len(message) < _ECHO.size:
        return None
    kind, code, _, _, _, nonce = _ECHO.unpack_from(message)
    return nonce if (kind, code) == (_ECHO_REPLY if version == 4 else _ECHO_REPLY_V6, 0) else None


def internet_checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of an even number of bytes, in network byte order."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", 0xFFFF ^ total)

"""ICMP echoes (RFC 792) that carry a nonce, by which their replies are known."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

_IPV4 = struct.Struct(">BBHHHBBH4s4s")
"""Version and ihl, TOS, total length, id, flags and offset, TTL, protocol, checksum, source, destination."""
_ECHO = struct.Struct(">BBHHH8s")
"""Type, code, checksum, id, sequence, and our nonce, with which the payload begins."""
_PROTOCOL_ICMP = 1
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_DONT_FRAGMENT = 0x4000
_TTL = 64

NONCE_LEN = 8
MIN_LENGTH = _IPV4.size + _ECHO.size
"""Of a packet with a nonce, bytes."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A request or a reply."""

    source: IPv4Address
    destination: IPv4Address
    id: int
    sequence: int
    nonce: bytes


def echo_request(
    source: IPv4Address, destination: IPv4Address, id: int, sequence: int, nonce: bytes, length: int = MIN_LENGTH
) -> bytes:
    """What an echo request of `length` bytes in all begins with.  The bytes that are missing are zero.

    DF is set: whoever cannot forward it drops it.  `nonce` has NONCE_LEN bytes.
    """
    return _message(_ECHO_REQUEST, Echo(source, destination, id, sequence, nonce), length)


def echo_reply(request: Echo) -> bytes:
    """The reply to a request that has nothing behind its nonce."""
    return _message(_ECHO_REPLY, replace(request, source=request.destination, destination=request.source), MIN_LENGTH)


def echo_message(nonce: bytes, length: int = MIN_LENGTH) -> bytes:
    """The ICMP message of a packet of `length` bytes.  Whoever sends it fills in the checksum and the id."""
    return _ECHO.pack(_ECHO_REQUEST, 0, 0, 0, 0, nonce).ljust(length - _IPV4.size, b"\0")


def parse_echo_request(packet: bytes) -> Echo | None:
    """As `parse_echo_reply`."""
    return _parse(_ECHO_REQUEST, packet)


def parse_echo_reply(packet: bytes) -> Echo | None:
    """From what a packet begins with, whose checksums have been looked at; None unless it has room for a nonce."""
    return _parse(_ECHO_REPLY, packet)


def _message(kind: int, it: Echo, length: int) -> bytes:
    addresses = (it.source.packed, it.destination.packed)
    header = _IPV4.pack(0x45, 0, length, 0, _DONT_FRAGMENT, _TTL, _PROTOCOL_ICMP, 0, *addresses)
    # Zeros at the end change no checksum.
    echo = _ECHO.pack(kind, 0, 0, it.id, it.sequence, it.nonce)
    return header[:10] + _checksum(header) + header[12:] + echo[:2] + _checksum(echo) + echo[4:]


def _parse(kind: int, packet: bytes) -> Echo | None:
    if len(packet) < MIN_LENGTH:
        return None
    first, _, _, _, _, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
    header_len = (first & 0xF) * 4
    if first >> 4 != 4 or protocol != _PROTOCOL_ICMP or len(packet) < header_len + _ECHO.size:
        return None
    found, code, _, id, sequence, nonce = _ECHO.unpack_from(packet, header_len)
    if (found, code) != (kind, 0):
        return None
    return Echo(IPv4Address(source), IPv4Address(destination), id, sequence, nonce)


def parse_echo_reply_message(message: bytes) -> bytes | None:
    """The nonce in what an ICMP message begins with; None unless it is an echo reply that has room for one."""
    if len(message) < _ECHO.size:
        return None
    kind, code, _, _, _, nonce = _ECHO.unpack_from(message)
    return nonce if (kind, code) == (_ECHO_REPLY, 0) else None


def _checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of an even number of bytes, in network byte order."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", 0xFFFF ^ total)

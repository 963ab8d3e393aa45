"""What the headers of an inner packet say, for people.  Pure; a packet may be cut anywhere, and may be none."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Self

from udptun.core.network_state import IPAddress
from udptun.core.trace_request import TCP, UDP

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION_OPTIONS = 0, 43, 44, 51, 60
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION_OPTIONS)
_FLAGS = "FSRPAUEC"
"""Letters of TCP's flags, the lowest bit first; tcpdump has `.` for A."""


@dataclass(frozen=True, slots=True)
class PacketHead:
    """Each is None where the packet does not say it.  `flags`: of TCP, as letters.  `is_fragment`: but the first."""

    source: IPAddress | None = None
    destination: IPAddress | None = None
    protocol: int | None = None
    source_port: int | None = None
    port: int | None = None
    flags: str | None = None
    is_fragment: bool = False

    @classmethod
    def of(cls, packet: bytes) -> Self:
        version = packet[0] >> 4 if packet else 0
        if version == 4 and len(packet) >= 20:
            protocol, at, is_fragment = packet[9], (packet[0] & 15) * 4, bool(int.from_bytes(packet[6:8]) & 0x1FFF)
            ends: tuple[IPAddress, IPAddress] = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
        elif version == 6 and len(packet) >= 40:
            protocol, at, is_fragment = _transport(packet)
            ends = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        else:
            return cls()
        transport = b"" if is_fragment or protocol not in (TCP, UDP) else packet[at:]
        has_ports, has_flags = len(transport) >= 4, protocol == TCP and len(transport) >= 14
        return cls(
            *ends,
            protocol,
            int.from_bytes(transport[:2]) if has_ports else None,
            int.from_bytes(transport[2:4]) if has_ports else None,
            "".join(it for i, it in enumerate(_FLAGS) if transport[13] >> i & 1) if has_flags else None,
            is_fragment,
        )


def _transport(packet: bytes) -> tuple[int, int, bool]:
    """Of IPv6 the protocol, where its header begins, and whether it is a fragment but the first."""
    protocol, at = packet[6], 40
    while protocol in _EXTENSIONS and at + 8 <= len(packet):
        following, length = packet[at], packet[at + 1]
        if protocol == _FRAGMENT and int.from_bytes(packet[at + 2 : at + 4]) >> 3:
            return following, at + 8, True
        if protocol == _FRAGMENT:
            length = 0
        at += (length + 2) * 4 if protocol == _AUTHENTICATION else (length + 1) * 8
        protocol = following
    return protocol, at, False

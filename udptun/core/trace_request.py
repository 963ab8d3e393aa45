"""What `udptun trace` asks: a packet, and where its datagram comes from; as words, as a query, as bytes.  Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Self

from udptun.core.echo import internet_checksum
from udptun.core.errors import UsageError
from udptun.core.family import Family
from udptun.core.ip_text import ip_address
from udptun.core.network_state import IPAddress, socket_address

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
PROTOCOLS = {"icmp": ICMP, "tcp": TCP, "udp": UDP}
"""By name; with IPv6 `icmp` means ICMPv6."""
_TRANSPORT_LEN = {ICMP: 8, TCP: 20, UDP: 8, ICMPV6: 8}
"""Bytes of the shortest header."""
_HEADER_LEN = {4: 20, 6: 40}
_DATA_LEN = 56
"""Behind the headers where no length is asked for: a ping has as much."""
_PACKET_MAX = 65535
_DIGITS_MAX = 20
"""Of a number.  int() raises for thousands of them."""
_SOURCE_PORT = 49152
_IPV4, _IPV6 = struct.Struct(">BBHHHBBH4s4s"), struct.Struct(">IHBB16s16s")
_UDP, _TCP, _ECHO = struct.Struct(">HHHH"), struct.Struct(">HHIIBBHHH"), struct.Struct(">BBHHH")
_DONT_FRAGMENT, _SYN = 0x4000, 0x02
_ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A packet: both addresses are of one family, `port` is the destination's, `length` has all bytes of it.

    `ttl` (with IPv6 the hop limit) is that with which the packet leaves its sender.  `outer`: the address and port that
    its datagram comes from; None: of what may be expected.
    """

    source: IPAddress
    destination: IPAddress
    protocol: int
    port: int | None
    length: int
    ttl: int = 64
    has_df: bool = False
    outer: IPAddress | None = None
    outer_port: int | None = None

    @property
    def family(self) -> Family:
        return Family(self.destination.version)

    @classmethod
    def from_words(
        cls,
        source: str,
        destination: str,
        protocol: str = "",
        port: str = "",
        *,
        size: str = "",
        ttl: str = "",
        has_df: bool = False,
        outer: str = "",
    ) -> Self:
        """What a person has typed; an empty word was not given.  Raises UsageError."""
        inner = _address("SRC", source), _address("DST", destination)
        if inner[0].version != inner[1].version:
            raise UsageError(f"SRC {source} and DST {destination} are of different families")
        number = _protocol(protocol, inner[0].version)
        least = _HEADER_LEN[inner[0].version] + _TRANSPORT_LEN.get(number, 0)
        given_port = read_port(port, number)
        where, outer_port = _socket_address(outer)
        return cls(
            *inner,
            number,
            80 if given_port is None and number in (TCP, UDP) else given_port,
            read_number("--size", size, least, _PACKET_MAX) if size else least + _DATA_LEN,
            read_number("--ttl", ttl, 0, 255) if ttl else 64,
            has_df,
            where,
            outer_port,
        )

    def query(self) -> str:
        """For the daemon's `GET /trace?…`."""
        outer = "" if self.outer is None else socket_address(self.outer, self.outer_port or 0)
        values = {
            "src": self.source,
            "dst": self.destination,
            "proto": self.protocol,
            "port": "" if self.port is None else self.port,
            "size": self.length,
            "ttl": self.ttl,
            "df": "1" * self.has_df,
            "from": outer,
        }
        return "&".join(f"{name}={value}" for name, value in values.items() if value != "")

    @classmethod
    def from_query(cls, query: str) -> Self:
        """Of what `query` has made.  Raises UsageError."""
        values = dict(part.partition("=")[::2] for part in query.split("&") if part)
        try:
            return cls.from_words(
                values.pop("src"),
                values.pop("dst"),
                values.pop("proto", ""),
                values.pop("port", ""),
                size=values.pop("size", ""),
                ttl=values.pop("ttl", ""),
                has_df=values.pop("df", "") == "1",
                outer=values.pop("from", ""),
            )
        except KeyError as exc:
            raise UsageError(f"trace: {exc.args[0]}= is missing in {query!r}") from exc

    def with_length(self, length: int, *, has_df: bool | None = None) -> Self:
        """The same packet with as many bytes."""
        return replace(self, length=length, has_df=self.has_df if has_df is None else has_df)

    def packet(self) -> bytes:
        """It, with zeros for data and for the checksum of TCP and UDP."""
        version = self.source.version
        body = self._transport()
        body += bytes(self.length - _HEADER_LEN[version] - len(body))
        addresses = (self.source.packed, self.destination.packed)
        if version == 6:
            return _IPV6.pack(6 << 28, len(body), self.protocol, self.ttl, *addresses) + body
        flags = _DONT_FRAGMENT if self.has_df else 0
        header = _IPV4.pack(0x45, 0, self.length, 0, flags, self.ttl, self.protocol, 0, *addresses)
        return header[:10] + internet_checksum(header) + header[12:] + body

    def _transport(self) -> bytes:
        """Its transport header."""
        port = self.port or 0
        if self.protocol == UDP:
            return _UDP.pack(_SOURCE_PORT, port, self.length - _HEADER_LEN[self.source.version], 0)
        if self.protocol == TCP:
            return _TCP.pack(_SOURCE_PORT, port, 0, 0, 5 << 4, _SYN, 0, 0, 0)
        if self.protocol in _ECHO_REQUEST:
            return _ECHO.pack(_ECHO_REQUEST[self.protocol], 0, 0, 0, 0)
        return b""


def protocol_name(number: int) -> str:
    """For people."""
    names = {number: name for name, number in PROTOCOLS.items()} | {ICMPV6: "icmp"}
    return names.get(number) or f"protocol {number}"


def _address(what: str, text: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError as exc:
        raise UsageError(f"{what} {text!r} is no IP address") from exc


def _socket_address(text: str) -> tuple[IPAddress | None, int | None]:
    """The address and the port, if there is one, of `ADDRESS`, `IPv4:PORT` or `[IPv6]:PORT`."""
    if not text:
        return None, None
    if text.startswith("["):
        address, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    else:
        address, port = text, ""
    return _address("--from", address), read_number("--from port", port, 0, 65535) if port else None


def _protocol(text: str, version: int) -> int:
    number = read_protocol(text or "icmp")
    return ICMPV6 if number == ICMP and version == 6 else number


def read_protocol(text: str) -> int:
    """IP's number of the protocol that a person has typed, by name or number.  Raises UsageError."""
    return PROTOCOLS[text] if text in PROTOCOLS else read_number("PROTO", text, 0, 255, " or tcp, udp, icmp")


def read_port(text: str, protocol: int | None) -> int | None:
    """The port that a person has typed, if any.  Raises UsageError, also where `protocol` has none."""
    if not text:
        return None
    if protocol not in (TCP, UDP):
        raise UsageError(f"PORT {text}: only tcp and udp have ports")
    return read_number("PORT", text, 1, 65535)


def read_number(what: str, text: str, least: int, most: int, others: str = "") -> int:
    """The number that a person has typed.  Raises UsageError, which names `others` than numbers that are good, too."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX
    if not is_number or not least <= int(text) <= most:
        raise UsageError(f"{what} {text!r} is no number from {least} to {most}{others}")
    return int(text)

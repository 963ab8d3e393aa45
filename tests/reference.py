"""The datapath in plain Python, one packet at a time: the executable form of docs/wire-format.md.

`encap` and `decap` follow that page's two tables row by row, in its order; the row numbers stand at the
branches.  `_fastpath` must give the same Outcome for every packet, and tests/datapath holds it to that.
How packets share a system call is not described here: `segments` takes a super-packet apart, `datagrams` a train.

Pure: no I/O, no clock; what the kernel answers is an argument.  The token bucket that limits ICMP is not here, because
it needs a clock.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, NamedTuple, Self

Remote = tuple[IPv4Address, int]
"""Where a peer listens: public IP and UDP port."""

Reason = tuple[int, int]
"""ICMP type and code."""

OUTER_LEN = 28
"""Bytes around a UDP payload on the wire: IPv4 header 20 + UDP header 8."""

PREFIX_LEN = 22
"""Bytes before an inner packet in a VXLAN datagram: VXLAN header 8 + inner Ethernet header 14."""

_VXLAN = struct.Struct(">B3xI6s6sH")
"""Flags, VNI above a reserved byte, inner destination and source MAC, EtherType."""
_VNI_IS_VALID = 0x08
_ETHERTYPE_IPV4 = 0x0800

_IPV4_HDR_MIN = 20
_ICMP_HDR_LEN = 8
_ICMP_ANSWER_MAX = 576
"""Largest ICMP answer, bytes: what every IPv4 host must take (RFC 1812 4.3.2.3)."""

_ICMP, _TCP, _UDP = 1, 6, 17
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_ICMP_QUERIES = (_ECHO_REPLY, _ECHO_REQUEST, 13, 14)
"""The last two are timestamp and timestamp reply."""
_QUESTION_LEN = 36
"""Bytes of a question: IPv4 header 20, ICMP header 8, nonce 8."""
_NET_UNREACHABLE: Reason = (3, 0)
_HOST_UNREACHABLE: Reason = (3, 1)
_FRAGMENTATION_NEEDED: Reason = (3, 4)
_TIME_EXCEEDED: Reason = (11, 0)

_UDP_HDR_LEN = 8
_CSUM_OFFSET = {_TCP: 16, _UDP: 6}
"""Where the check field lies in the transport header."""
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_URG, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80

ECN_MASK = 3
"""Of the TOS."""
NOT_ECT, ECT_1, ECT_0, CE = range(4)

_OPTION_END, _OPTION_NOP, _OPTION_LSRR, _OPTION_SSRR = 0, 1, 131, 137

_VNET_NEEDS_CSUM = 1
_VNET_GSO_TCPV4, _VNET_GSO_UDP_L4, _VNET_GSO_ECN = 1, 5, 0x80
_GSO_PROTOCOL = {_VNET_GSO_TCPV4: _TCP, _VNET_GSO_UDP_L4: _UDP}

_SEGMENTS_MAX = 2048
"""Packets that one super-packet may stand for."""

_INNER_ECN: dict[int, tuple[int, int, int, int | None]] = {
    # Outer:    Not-ECT  ECT(1)   ECT(0)   CE
    NOT_ECT: (NOT_ECT, NOT_ECT, NOT_ECT, None),
    ECT_1: (ECT_1, ECT_1, ECT_1, CE),
    ECT_0: (ECT_0, ECT_1, ECT_0, CE),
    CE: (CE, CE, CE, CE),
}
"""Inner ECN field as it came, by the outer one -> as it is delivered; None: the packet is dropped (RFC 6040 4.2)."""

_MARTIAN_SOURCES = (IPv4Network("0.0.0.0/8"), IPv4Network("127.0.0.0/8"), IPv4Network("224.0.0.0/3"))
_MULTICAST_OR_BROADCAST = IPv4Network("224.0.0.0/3")


@dataclass(frozen=True, slots=True)
class Peer:
    """One lease.  `mtu` is the largest inner packet (bytes) its path takes; several may share a public IP.

    `mac` is its VtepMAC, 6 bytes; empty where packets travel bare.
    """

    index: int
    subnet: IPv4Network
    remote: Remote
    mtu: int
    mac: bytes = b""
    carries_ecn: bool = False
    """It carries marks of congestion on, so datagrams to it may be marked."""
    is_dead: bool = False
    """It was found dead, and nothing has come from it since."""


@dataclass(frozen=True, slots=True)
class Vtep:
    """What we are to VXLAN peers: the VNI of all datagrams, and our VtepMAC, 6 bytes."""

    vni: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class Table:
    """What the datapath knows.  The subnets of the peers are disjoint; `mtu` is the device's, bytes.

    `local_addresses` are those of this host, that of our UDP socket among them.
    `vtep` None: packets travel bare (udp).
    """

    network: IPv4Network
    own_subnet: IPv4Network
    tunnel_address: IPv4Address
    local_addresses: frozenset[IPv4Address]
    mtu: int
    source_check: Literal["off", "peer", "strict"]
    peers: tuple[Peer, ...]
    vtep: Vtep | None = None
    punt_id: int = 0
    """ICMP id of the echo replies that the control plane gets; 0: it gets none."""
    port: int = 8285
    """Of our UDP socket."""
    learned: tuple[tuple[IPv4Network, IPv4Address, int], ...] = ()
    """Subnet of a peer, and an outer address and port (0: any) that it has been found to send from."""
    learn_id: int = 0
    """ICMP id and sequence (32 bits) of the answers that the control plane gets from strangers; 0: it gets none."""

    @property
    def prefix_len(self) -> int:
        """Bytes before each inner packet on the wire."""
        return 0 if self.vtep is None else PREFIX_LEN

    def wrapped(self, packet: bytes, peer: Peer) -> bytes:
        """The UDP payload that carries `packet` to `peer`."""
        if self.vtep is None:
            return packet
        return _VXLAN.pack(_VNI_IS_VALID, self.vtep.vni << 8, peer.mac, self.vtep.mac, _ETHERTYPE_IPV4) + packet

    def leasing(self, address: IPv4Address) -> Peer | None:
        """The peer whose subnet holds the inner `address`."""
        return next((peer for peer in self.peers if address in peer.subnet), None)

    def is_endpoint(self, address: IPv4Address) -> bool:
        """Whether a tunnel's socket may be at `address`: a peer's or ours."""
        return self.has_public_ip(address) or address in self.local_addresses

    def is_learned(self, source: IPv4Address, port: int, sender: Peer | None) -> bool:
        """Whether `sender` has been found to send from there."""
        of_sender = [(at, only) for subnet, at, only in self.learned if sender is not None and subnet == sender.subnet]
        return self.source_check == "peer" and any(at == source and only in (0, port) for at, only in of_sender)

    def has_public_ip(self, address: IPv4Address) -> bool:
        """Whether any peer is at the outer `address`; its port does not matter."""
        return any(peer.remote[0] == address for peer in self.peers)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one packet, as it is on the wire: a super-packet has as many as it has segments.

    `sends` are UDP payloads and where they go.  `writes` go into the TUN, virtio header first.  `icmp` is the ICMP
    counter that moved beside `counter`; None where the row of the table has no answer.  `punts` are packets that the
    control plane gets.
    """

    counter: str
    sends: tuple[tuple[Remote, bytes], ...] = ()
    writes: tuple[bytes, ...] = ()
    icmp: Literal["icmp_sent", "icmp_suppressed"] | None = None
    punts: tuple[bytes, ...] = ()


class VnetHdr(NamedTuple):
    """`struct virtio_net_hdr` (linux/virtio_net.h), little endian, 10 bytes; all zero: a plain packet."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        return _VNET_HDR.pack(*self)


_VNET_HDR = struct.Struct("<BBHHHH")


_IPV4_HDR = struct.Struct(">BxHxxHBBxxII")
"""Version and ihl, total length, flags and offset, TTL, protocol, source, destination."""


class _Ipv4(NamedTuple):
    """The fields of an IPv4 header, lengths in bytes; nothing is checked."""

    version: int
    header_len: int
    total_len: int
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int
    ttl: int
    protocol: int
    source: IPv4Address
    destination: IPv4Address

    @classmethod
    def read(cls, data: bytes) -> Self:
        """`data` has at least 20 bytes."""
        first, total_len, fragment, ttl, protocol, source, destination = _IPV4_HDR.unpack_from(data)
        return cls(
            version=first >> 4,
            header_len=(first & 0xF) * 4,
            total_len=total_len,
            dont_fragment=bool(fragment & 0x4000),
            more_fragments=bool(fragment & 0x2000),
            fragment_offset=(fragment & 0x1FFF) * 8,
            ttl=ttl,
            protocol=protocol,
            source=IPv4Address(source),
            destination=IPv4Address(destination),
        )

    @property
    def is_fragment(self) -> bool:
        return self.more_fragments or self.fragment_offset > 0


def encap(table: Table, raw: bytes, *, path_mtu: int | None = None, is_refused: bool = False) -> list[Outcome]:
    """What becomes of the packets that `raw` stands for, one read of the TUN: a 10-byte virtio header, then IP.

    A super-packet that is dropped whole is answered once, beside its first packet.

    `path_mtu`: the kernel knows this MTU (outer bytes) for the way to the peer and answers EMSGSIZE to a larger
    datagram.  `is_refused`: for another reason the kernel refuses what would come out, datagrams or answers.
    """
    data = raw[_VNET_HDR.size :]
    if len(data) < _IPV4_HDR_MIN:  # 1
        return [Outcome("encap_drop_short")]
    ip = _Ipv4.read(data)
    if ip.version == 6:  # 2
        return [Outcome("encap_drop_ipv6")]
    if ip.version != 4 or not _IPV4_HDR_MIN <= ip.header_len <= ip.total_len <= len(data):  # 3
        return [Outcome("encap_drop_malformed")]
    packets = segments(raw)
    if not packets:  # 3
        return [Outcome("encap_drop_malformed")]
    whole = data[: ip.total_len] if _is_super_packet(raw) else packets[0]

    def refuse(counter: str, offender: bytes, reason: Reason, mtu: int = 0) -> Outcome:
        """Drop a packet, and tell its sender by way of the TUN where that is allowed."""
        if is_refused or not _may_be_answered(offender):
            return Outcome(counter, icmp="icmp_suppressed")
        answer = icmp_error(table.tunnel_address, offender, reason, mtu)
        return Outcome(counter, writes=(VnetHdr().pack() + answer,), icmp="icmp_sent")

    def refuse_all(counter: str, reason: Reason, mtu: int = 0) -> list[Outcome]:
        return [refuse(counter, whole, reason, mtu)] + [Outcome(counter)] * (len(packets) - 1)

    peer = table.leasing(ip.destination)
    if _is_of_the_tunnel(table, packets[0], peer):
        return [Outcome("encap_drop_loop")] * len(packets)
    if peer is None:  # 4
        return refuse_all("encap_drop_no_route", _NET_UNREACHABLE)
    if peer.is_dead:
        return refuse_all("encap_drop_dead", _HOST_UNREACHABLE)
    if ip.ttl <= 1:  # 5
        return refuse_all("encap_drop_ttl", _TIME_EXCEEDED)
    if ip.dont_fragment and len(packets[0]) > peer.mtu:  # 6
        return refuse_all("encap_drop_too_big", _FRAGMENTATION_NEEDED, peer.mtu)

    outcomes = []
    for packet in packets:
        payload = table.wrapped(step_ttl(packet), peer)
        if ip.dont_fragment and path_mtu is not None and len(payload) + OUTER_LEN > path_mtu:  # 7
            offender, mtu = _with_one_form_of_zero(packet), path_mtu - OUTER_LEN - table.prefix_len
            outcomes.append(refuse("encap_drop_too_big", offender, _FRAGMENTATION_NEEDED, mtu))
        elif is_refused:  # 8
            outcomes.append(Outcome("encap_drop_send"))
        else:  # 9
            outcomes.append(Outcome("encap_sent", sends=((peer.remote, payload),)))
    return outcomes


def outer_tos(peer: Peer, packet: bytes) -> int:
    """The TOS of the datagram that carries `packet` to `peer` (RFC 6040 4.1): normal or compatibility mode."""
    return packet[1] & ECN_MASK if peer.carries_ecn else NOT_ECT


def segments(raw: bytes) -> list[bytes]:
    """The IP packets that `raw` stands for: a virtio header, then a packet that has passed rows 1 to 3 of encap.

    That packet, with its transport checksum completed if the header asks for it, or the segments of a super-packet.
    Bytes after the total length are cut off.  Empty when the virtio header does not fit the packet.
    """
    vnet = VnetHdr(*_VNET_HDR.unpack_from(raw))
    data = raw[_VNET_HDR.size :]
    packet = data[: _Ipv4.read(data).total_len]
    if _is_super_packet(raw):
        return _cut(packet, vnet)
    if vnet.flags & _VNET_NEEDS_CSUM:
        return _completed(packet, vnet.csum_start, vnet.csum_offset)
    return [packet]


def _is_super_packet(raw: bytes) -> bool:
    return VnetHdr(*_VNET_HDR.unpack_from(raw)).gso_type != 0


def _completed(packet: bytes, start: int, offset: int) -> list[bytes]:
    """`packet` with the checksum over everything from `start` on, at `offset` from there; empty if that is outside.

    The field holds the pseudo-header's sum already.  A checksum of zero is written as 0xFFFF: in UDP zero means none
    (RFC 768), elsewhere the two are the same.
    """
    at = start + offset
    if start < _Ipv4.read(packet).header_len or at + 2 > len(packet):
        return []
    check = (0xFFFF ^ fold_sum(packet[start:])) or 0xFFFF
    return [packet[:at] + struct.pack(">H", check) + packet[at + 2 :]]


def _cut(packet: bytes, vnet: VnetHdr) -> list[bytes]:
    """The segments of a super-packet; empty when it is none.  Only `gso_type` and `gso_size` are looked at."""
    ip = _Ipv4.read(packet)
    transport = packet[ip.header_len :]
    is_known = _GSO_PROTOCOL.get(vnet.gso_type & ~_VNET_GSO_ECN) == ip.protocol
    if not is_known or ip.is_fragment or not _is_transport_header_complete(ip.protocol, transport):
        return []
    header_len = _tcp_header_len(transport) if ip.protocol == _TCP else _UDP_HDR_LEN
    header, payload = transport[:header_len], transport[header_len:]
    if vnet.gso_size == 0 or not payload or len(payload) > vnet.gso_size * _SEGMENTS_MAX:
        return []
    cut: list[bytes] = []
    for at in range(0, len(payload), vnet.gso_size):
        piece = payload[at : at + vnet.gso_size]
        if ip.protocol == _TCP:
            is_last = at + vnet.gso_size >= len(payload)
            segment = _tcp_segment_header(header, at, is_last=is_last) + piece
        else:
            segment = header[:4] + struct.pack(">H", _UDP_HDR_LEN + len(piece)) + header[6:] + piece
        cut.append(_ip_header_before(packet[: ip.header_len], segment, number=len(cut)) + _summed(ip, segment))
    return cut


def _tcp_segment_header(header: bytes, at: int, *, is_last: bool) -> bytes:
    """The TCP header of the segment whose payload begins `at` bytes into the super-packet's."""
    (sequence,) = struct.unpack_from(">I", header, 4)
    flags = header[13]
    if not is_last:
        flags &= ~(_TCP_FIN | _TCP_PSH)
    if at > 0:
        flags &= ~_TCP_CWR
    sequence = (sequence + at) & 0xFFFFFFFF
    return header[:4] + struct.pack(">I", sequence) + header[8:13] + bytes([flags]) + header[14:]


def _ip_header_before(header: bytes, segment: bytes, number: int) -> bytes:
    """The IP header of segment `number`: length, identification and checksum anew."""
    (ident,) = struct.unpack_from(">H", header, 4)
    changed = struct.pack(">HH", len(header) + len(segment), (ident + number) & 0xFFFF)
    header = header[:2] + changed + header[6:10] + bytes(2) + header[12:]
    return header[:10] + _checksum(header) + header[12:]


def _summed(ip: _Ipv4, segment: bytes) -> bytes:
    """`segment`, TCP or UDP, with its checksum anew."""
    at = _CSUM_OFFSET[ip.protocol]
    segment = segment[:at] + bytes(2) + segment[at + 2 :]
    check = 0xFFFF ^ fold_sum(_pseudo_header(ip, segment) + segment)
    if ip.protocol == _UDP:
        check = check or 0xFFFF
    return segment[:at] + struct.pack(">H", check) + segment[at + 2 :]


def _with_one_form_of_zero(packet: bytes) -> bytes:
    """`packet` with a header checksum of 0xFFFF written as 0: the TTL step and back keeps the value, not the form."""
    return packet[:10] + bytes(2) + packet[12:] if packet[10:12] == b"\xff\xff" else packet


def datagrams(message: bytes, gro_size: int = 0, prefix_len: int = 0) -> list[tuple[bytes, int]]:
    """The datagrams in one received message, each with the inner size that `decap` wants.

    `gro_size`: the size of a datagram that the kernel names beside a train of them (UDP_GRO); 0 where it names none.
    A message whose first `prefix_len` bytes are followed by one IPv4 packet, and nothing more, is never cut: `gro_size`
    is then the size of the packet's inner segments.
    """
    if not 0 < gro_size < len(message):
        return [(message, 0)]
    inner = message[prefix_len:]
    if len(inner) >= _IPV4_HDR_MIN:
        ip = _Ipv4.read(inner)
        if ip.version == 4 and ip.total_len == len(inner):
            return [(message, gro_size)]
    return [(message[at : at + gro_size], 0) for at in range(0, len(message), gro_size)]


def decap(
    table: Table,
    payload: bytes,
    source: IPv4Address,
    source_port: int = 0,
    *,
    inner_size: int = 0,
    outer_ecn: int = NOT_ECT,
    is_refused: bool = False,
) -> Outcome:
    """What becomes of `payload`, one datagram from the outer address `source`, whose ECN field is `outer_ecn`.

    With VXLAN the prefix comes first, and the other rows are about what is behind it.

    `inner_size`: the kernel says that the payload is a super-packet of segments of this size (bytes without headers).
    `is_refused`: the kernel refuses what would come out: the write to the TUN device, or the answer.
    """
    if table.vtep is not None:
        counter = _refused_prefix(table.vtep, payload)
        if counter is not None:
            return Outcome(counter)
        payload = payload[PREFIX_LEN:]
    if not payload:  # 1
        return Outcome("decap_drop_empty")
    if len(payload) < _IPV4_HDR_MIN:  # 2
        return Outcome("decap_drop_short")
    ip = _Ipv4.read(payload)
    if ip.version == 6:  # 3
        return Outcome("decap_drop_ipv6")
    if ip.version != 4:  # 4
        return Outcome("decap_drop_version")
    if not _IPV4_HDR_MIN <= ip.header_len <= len(payload):  # 5
        return Outcome("decap_drop_ihl")
    if not ip.header_len <= ip.total_len <= len(payload):  # 6
        return Outcome("decap_drop_length")
    packet = payload[: ip.total_len]

    if fold_sum(packet[: ip.header_len]) != 0xFFFF:  # 7
        return Outcome("decap_drop_checksum")
    if not _are_options_acceptable(packet[_IPV4_HDR_MIN : ip.header_len]):  # 8
        return Outcome("decap_drop_options")
    if not _is_fragment_possible(ip):  # 9
        return Outcome("decap_drop_fragment")

    is_checked = table.source_check != "off"
    sender = table.leasing(ip.source)
    is_learned = table.is_learned(source, source_port, sender)
    if is_checked and not table.has_public_ip(source) and not is_learned:  # 10
        if sender is not None and _is_of_learning(table, packet):  # 23
            return Outcome("decap_punted", punts=(packet,))
        return Outcome("decap_drop_unknown_peer")
    if _is_martian(ip.source):  # 11
        return Outcome("decap_drop_source_martian")
    if ip.source in table.own_subnet or ip.source in table.local_addresses:  # 12
        return Outcome("decap_drop_source_own")
    if ip.source in table.network:
        if is_checked and not is_learned and (sender is None or sender.remote[0] != source):  # 13
            return Outcome("decap_drop_source_spoofed")
    elif table.source_check == "strict":  # 14
        return Outcome("decap_drop_source_outside")
    if ip.destination not in table.own_subnet:  # 15
        return Outcome("decap_drop_foreign_destination")
    if ip.destination in table.local_addresses and _udp_port(packet) == table.port:
        return Outcome("decap_drop_loop")

    if ip.ttl <= 1:  # 16
        if is_refused or sender is None or not _may_be_answered(packet):
            return Outcome("decap_drop_ttl", icmp="icmp_suppressed")
        # No longer than its cause, but with 8 bytes behind the header that it quotes.
        most = max(len(packet), _IPV4_HDR_MIN + _ICMP_HDR_LEN + ip.header_len + 8)
        answer = icmp_error(table.tunnel_address, packet, _TIME_EXCEEDED, most=most)
        return Outcome("decap_drop_ttl", sends=((sender.remote, table.wrapped(answer, sender)),), icmp="icmp_sent")
    inner_ecn = _INNER_ECN[packet[1] & ECN_MASK][outer_ecn]
    if inner_ecn is None:
        return Outcome("decap_drop_ce")
    packet = with_ecn(packet, inner_ecn)
    if _is_punted(table, packet):  # 21
        return Outcome("decap_punted", punts=(packet,))
    vnet_hdr = _vnet_hdr_for(table, packet, inner_size)
    if vnet_hdr is None:  # 17
        return Outcome("decap_drop_oversize")
    if is_refused:  # 18
        return Outcome("decap_drop_tun")
    return Outcome("decap_delivered", writes=(vnet_hdr.pack() + step_ttl(packet),))  # 19


def inject(table: Table, packet: bytes, *, into_tun: bool = False, is_refused: bool = False) -> Outcome:
    """What becomes of `packet`, which the control plane hands to the datapath.

    `is_refused`: the kernel refuses the datagram, or the write to the TUN device.
    """
    if len(packet) < _IPV4_HDR_MIN:
        return Outcome("inject_drop_malformed")
    ip = _Ipv4.read(packet)
    if ip.version != 4 or ip.total_len != len(packet) or not _IPV4_HDR_MIN <= ip.header_len <= len(packet):
        return Outcome("inject_drop_malformed")
    peer = table.leasing(ip.destination)
    if peer is None and not into_tun:
        return Outcome("inject_drop_no_route")
    if is_refused:
        return Outcome("inject_drop_refused")
    if peer is None or into_tun:
        return Outcome("inject_delivered", writes=(VnetHdr().pack() + packet,))
    return Outcome("inject_sent", sends=((peer.remote, table.wrapped(packet, peer)),))


def _udp_port(packet: bytes) -> int | None:
    """The UDP port that `packet` goes to, where it shows one."""
    ip = _Ipv4.read(packet)
    if ip.protocol != _UDP or ip.fragment_offset > 0 or len(packet) < ip.header_len + 4:
        return None
    (port,) = struct.unpack_from(">H", packet, ip.header_len + 2)
    return int(port)


def _is_of_the_tunnel(table: Table, packet: bytes, peer: Peer | None) -> bool:
    """Whether `packet`, whose destination `peer` leases, is a datagram of the tunnel itself (RFC 2473 4.1)."""
    ip, port = _Ipv4.read(packet), _udp_port(packet)
    if port is None or not table.is_endpoint(ip.destination):
        return False
    ports = (table.port,) if peer is None else (table.port, peer.remote[1])
    return port in ports or ip.source in table.local_addresses


def _is_punted(table: Table, packet: bytes) -> bool:
    """Whether `packet`, which has passed rows 1 to 16, is an echo reply that the control plane waits for."""
    ip = _Ipv4.read(packet)
    icmp = packet[ip.header_len :]
    if not table.punt_id or ip.destination != table.tunnel_address or ip.protocol != _ICMP:
        return False
    if ip.fragment_offset > 0 or len(icmp) < _ICMP_HDR_LEN or icmp[0] != _ECHO_REPLY:
        return False
    (ident,) = struct.unpack_from(">H", icmp, 4)
    return bool(ident == table.punt_id and (ip.more_fragments or fold_sum(icmp) == 0xFFFF))


def _is_of_learning(table: Table, packet: bytes) -> bool:
    """Whether `packet`, which has passed rows 1 to 9, is an answer or a question to our tunnel address.

    That a worker punts one question a second and address is not described here: it needs a clock.
    """
    ip = _Ipv4.read(packet)
    icmp = packet[ip.header_len :]
    if table.source_check != "peer" or not table.punt_id or ip.destination != table.tunnel_address:
        return False
    if ip.protocol != _ICMP or ip.is_fragment or len(icmp) < _ICMP_HDR_LEN or fold_sum(icmp) != 0xFFFF:
        return False
    (number,) = struct.unpack_from(">I", icmp, 4)
    if icmp[0] == _ECHO_REPLY:
        return bool(table.learn_id and number == table.learn_id)
    return icmp[0] == _ECHO_REQUEST and len(packet) == _QUESTION_LEN and number & 0xFFFF != 0


def _refused_prefix(vtep: Vtep, payload: bytes) -> str | None:
    """The counter to drop a datagram under that carries no IPv4 packet in a frame for us; None: it does.

    Reserved bits are not looked at (RFC 7348 5).  Nor is the inner source MAC: row 10 checks who sent the packet.
    """
    if len(payload) < PREFIX_LEN:  # V1
        return "decap_drop_vxlan_short"
    flags, vni, destination, _source, ethertype = _VXLAN.unpack_from(payload)
    if not flags & _VNI_IS_VALID:  # V2
        return "decap_drop_vxlan_flags"
    if vni >> 8 != vtep.vni:  # V3
        return "decap_drop_vxlan_vni"
    if ethertype != _ETHERTYPE_IPV4:  # V4
        return "decap_drop_vxlan_ethertype"
    if destination != vtep.mac:  # V5
        return "decap_drop_vxlan_mac"
    return None


def step_ttl(packet: bytes) -> bytes:
    """`packet` with TTL - 1 (it is at least 1) and its header checksum updated: a wrong checksum stays wrong.

    RFC 1624 equation 3, HC' = ~(~HC + ~m + m'), where m is the 16-bit word that holds TTL and protocol.
    """
    word, check = struct.unpack_from(">HH", packet, 8)
    new_word = word - 0x0100
    new_check = 0xFFFF ^ _fold((0xFFFF ^ check) + (0xFFFF ^ word) + new_word)
    return packet[:8] + struct.pack(">HH", new_word, new_check) + packet[12:]


def with_ecn(packet: bytes, ecn: int) -> bytes:
    """`packet` with this ECN field and its header checksum updated (RFC 1624 equation 3)."""
    word, check = struct.unpack_from(">H8xH", packet)
    new_word = word & ~ECN_MASK | ecn
    if new_word == word:
        return packet
    new_check = 0xFFFF ^ _fold((0xFFFF ^ check) + (0xFFFF ^ word) + new_word)
    return struct.pack(">H", new_word) + packet[2:10] + struct.pack(">H", new_check) + packet[12:]


def icmp_error(
    tunnel_address: IPv4Address, offender: bytes, reason: Reason, mtu: int = 0, most: int = _ICMP_ANSWER_MAX
) -> bytes:
    """The IPv4 packet that tells the sender of `offender` why it was dropped (RFC 792).

    `offender` is a whole packet, TTL as received; the answer quotes as much of it as fits.  `mtu` is that of the next
    hop, bytes; 0 where the reason has none (RFC 1191).
    """
    quote = offender[: min(most, _ICMP_ANSWER_MAX) - _IPV4_HDR_MIN - _ICMP_HDR_LEN]
    icmp = struct.pack(">BBHHH", *reason, 0, 0, mtu) + quote
    icmp = icmp[:2] + _checksum(icmp) + icmp[4:]
    destination = _Ipv4.read(offender).source
    header = struct.pack(
        ">BBHHHBBH4s4s",
        *(0x45, 0xC0, _IPV4_HDR_MIN + len(icmp), 0, 0, 64, _ICMP, 0),
        tunnel_address.packed,
        destination.packed,
    )
    return header[:10] + _checksum(header) + header[12:] + icmp


def fold_sum(data: bytes) -> int:
    """The ones' complement sum of `data` as 16-bit big-endian words, an odd byte padded with zero (RFC 1071).

    0xFFFF over data that holds its own correct checksum; 0 only where every byte is zero.
    """
    padded = data + b"\0" * (len(data) % 2)
    return _fold(sum(struct.unpack(f">{len(padded) // 2}H", padded)))


def _may_be_answered(packet: bytes) -> bool:
    """Whether an ICMP error may be sent about `packet` (RFC 1122 3.2.2)."""
    ip = _Ipv4.read(packet)
    if ip.fragment_offset > 0 or _is_martian(ip.source) or ip.destination in _MULTICAST_OR_BROADCAST:
        return False
    if ip.protocol != _ICMP:
        return True
    icmp = packet[ip.header_len :]
    return len(icmp) >= _ICMP_HDR_LEN and icmp[0] in _ICMP_QUERIES


def _is_martian(source: IPv4Address) -> bool:
    """Whether no host can have `source`: "this network", loopback, multicast, reserved, broadcast."""
    return any(source in network for network in _MARTIAN_SOURCES)


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


def _is_fragment_possible(ip: _Ipv4) -> bool:
    """Whether `ip` can be a fragment of some packet; true of a packet that is no fragment."""
    payload_len = ip.total_len - ip.header_len
    if ip.more_fragments and (payload_len == 0 or payload_len % 8 != 0):
        return False
    return ip.fragment_offset + payload_len <= 0xFFFF


def _vnet_hdr_for(table: Table, packet: bytes, inner_size: int) -> VnetHdr | None:
    """The virtio header to write `packet` with; None when it is too large and nobody may cut it."""
    ip = _Ipv4.read(packet)
    if not _has_partial_checksum(packet):
        return VnetHdr() if ip.total_len <= table.mtu else None
    csum_offset = _CSUM_OFFSET[ip.protocol]
    csum = VnetHdr(flags=_VNET_NEEDS_CSUM, csum_start=ip.header_len, csum_offset=csum_offset)
    udp_hdr_len = ip.header_len + _UDP_HDR_LEN
    if ip.protocol == _UDP and 0 < inner_size < ip.total_len - udp_hdr_len:
        if udp_hdr_len + inner_size > table.mtu:
            return None
        return csum._replace(gso_type=_VNET_GSO_UDP_L4, hdr_len=udp_hdr_len, gso_size=inner_size)
    if ip.total_len <= table.mtu:
        return csum
    if ip.protocol != _TCP:
        return None
    tcp = packet[ip.header_len :]
    hdr_len = ip.header_len + _tcp_header_len(tcp)
    if hdr_len == ip.total_len or hdr_len >= table.mtu or tcp[13] & (_TCP_SYN | _TCP_RST | _TCP_URG):
        return None
    gso_type = _VNET_GSO_TCPV4 | (_VNET_GSO_ECN if tcp[13] & _TCP_CWR else 0)
    return csum._replace(gso_type=gso_type, hdr_len=hdr_len, gso_size=table.mtu - hdr_len)


def _has_partial_checksum(packet: bytes) -> bool:
    """Whether the transport checksum is only the pseudo-header's sum: the sender left the rest to its hardware."""
    ip = _Ipv4.read(packet)
    transport = packet[ip.header_len :]
    if ip.is_fragment or not _is_transport_header_complete(ip.protocol, transport):
        return False
    (check,) = struct.unpack_from(">H", transport, _CSUM_OFFSET[ip.protocol])
    return bool(check == fold_sum(_pseudo_header(ip, transport)))


def _pseudo_header(ip: _Ipv4, transport: bytes) -> bytes:
    return ip.source.packed + ip.destination.packed + struct.pack(">HH", ip.protocol, len(transport))


def _is_transport_header_complete(protocol: int, transport: bytes) -> bool:
    if protocol == _UDP:
        return len(transport) >= _UDP_HDR_LEN
    return protocol == _TCP and len(transport) >= 20 and 20 <= _tcp_header_len(transport) <= len(transport)


def _tcp_header_len(tcp: bytes) -> int:
    return (tcp[12] >> 4) * 4


def _checksum(data: bytes) -> bytes:
    """The Internet checksum of `data`, whose own checksum field is zero, in network byte order."""
    return struct.pack(">H", 0xFFFF ^ fold_sum(data))


def _fold(total: int) -> int:
    """A sum of 16-bit words brought back to 16 bits by adding the carries in."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total

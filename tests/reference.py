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
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple

from tests.reference_ip import (
    CSUM_OFFSET,
    ECN_MASK,
    ICMP_HDR_LEN,
    IPV4,
    IPV4_HDR_MIN,
    IPV6,
    IPV6_HDR_LEN,
    TCP,
    UDP,
    UDP_HDR_LEN,
    UNKNOWN_PROTOCOL,
    Family,
    Header,
    IPAddress,
    IPNetwork,
    Reason,
    fold_sum,
    has_transport_header,
    header_before,
    icmp_error,
    ipv4_problem,
    ipv6_problem,
    is_icmp_checksum_right,
    is_martian,
    may_be_answered,
    pseudo_header,
    read_header,
    step_ttl,
    tcp_header_len,
    version,
    with_ecn,
    with_one_form_of_zero,
)

Remote = tuple[IPAddress, int]
"""Where a peer listens: public IP and UDP port."""

OUTER_LEN = {4: 28, 6: 48}
"""Bytes around a UDP payload on the wire, by the version of the outer packet: IP header 20 or 40 + UDP header 8."""

PREFIX_LEN = 22
"""Bytes before an inner packet in a VXLAN datagram: VXLAN header 8 + inner Ethernet header 14."""

_VXLAN = struct.Struct(">B3xI6s6sH")
"""Flags, VNI above a reserved byte, inner destination and source MAC, EtherType."""
_VNI_IS_VALID = 0x08
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}

_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_URG, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80

NOT_ECT, ECT_1, ECT_0, CE = range(4)

_VNET_NEEDS_CSUM = 1
_VNET_GSO_UDP_L4, _VNET_GSO_ECN = 5, 0x80

_SEGMENTS_MAX, _HEADERS_MAX = 2048, 2048 * 144
"""Packets that one super-packet may stand for, and bytes of all their headers: no headers of IPv4 are that long."""

_INNER_ECN: dict[int, tuple[int, int, int, int | None]] = {
    # Outer:    Not-ECT  ECT(1)   ECT(0)   CE
    NOT_ECT: (NOT_ECT, NOT_ECT, NOT_ECT, None),
    ECT_1: (ECT_1, ECT_1, ECT_1, CE),
    ECT_0: (ECT_0, ECT_1, ECT_0, CE),
    CE: (CE, CE, CE, CE),
}
"""Inner ECN field as it came, by the outer one -> as it is delivered; None: the packet is dropped (RFC 6040 4.2)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A subnet of one lease.  `mtu` is the largest inner packet (bytes) its path takes; several may share a public IP.

    `mac` is its VtepMAC, 6 bytes; empty where packets travel bare.
    """

    index: int
    subnet: IPNetwork
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


class Space(NamedTuple):
    """The addresses of one family inside the tunnel: all, ours, and the one of our device."""

    network: IPNetwork
    own_subnet: IPNetwork
    tunnel_address: IPAddress


@dataclass(frozen=True, slots=True)
class Table:
    """What the datapath knows.  The subnets of the peers are disjoint; `mtu` is the device's, bytes.

    `local_addresses` are those of this host, that of our UDP socket among them.
    `vtep` None: packets travel bare (udp).  IPv6 is carried when the three fields of it are set, and IPv4 unless its
    tunnel address is 0.0.0.0.  With a VTEP one of them is.
    """

    network: IPv4Network
    own_subnet: IPv4Network
    tunnel_address: IPv4Address
    local_addresses: frozenset[IPAddress]
    mtu: int
    source_check: Literal["off", "peer", "strict"]
    peers: tuple[Peer, ...]
    vtep: Vtep | None = None
    punt_id: int = 0
    """ICMP id of the echo replies that the control plane gets; 0: it gets none."""
    port: int = 8285
    """Of our UDP socket."""
    learned: tuple[tuple[IPNetwork, IPAddress, int], ...] = ()
    """Subnet of a peer, and an outer address and port (0: any) that it has been found to send from."""
    learn_id: int = 0
    """ICMP id and sequence (32 bits) of the answers that the control plane gets from strangers; 0: it gets none."""
    network_ipv6: IPv6Network | None = None
    own_subnet_ipv6: IPv6Network | None = None
    tunnel_address_ipv6: IPv6Address | None = None

    def space(self, family: Family) -> Space | None:
        """None: packets of this family are not carried."""
        if family is IPV4:
            is_carried = not self.tunnel_address.is_unspecified
            return Space(self.network, self.own_subnet, self.tunnel_address) if is_carried else None
        if self.network_ipv6 is None or self.own_subnet_ipv6 is None or self.tunnel_address_ipv6 is None:
            return None
        return Space(self.network_ipv6, self.own_subnet_ipv6, self.tunnel_address_ipv6)

    @property
    def prefix_len(self) -> int:
        """Bytes before each inner packet on the wire."""
        return 0 if self.vtep is None else PREFIX_LEN

    def wrapped(self, packet: bytes, peer: Peer) -> bytes:
        """The UDP payload that carries `packet` to `peer`."""
        if self.vtep is None:
            return packet
        return _VXLAN.pack(_VNI_IS_VALID, self.vtep.vni << 8, peer.mac, self.vtep.mac, self.ethertype) + packet

    @property
    def ethertype(self) -> int:
        """Of the frames of a VTEP."""
        return _ETHERTYPES[6 if self.space(IPV6) else 4]

    def leasing(self, address: IPAddress) -> Peer | None:
        """The peer whose subnet holds the inner `address`."""
        return next((peer for peer in self.peers if address in peer.subnet), None)

    def is_endpoint(self, address: IPAddress) -> bool:
        """Whether a tunnel's socket may be at `address`: a peer's or ours."""
        return self.has_public_ip(address) or address in self.local_addresses

    def is_learned(self, source: IPAddress, port: int, sender: Peer | None) -> bool:
        """Whether `sender` has been found to send from there."""
        of_sender = [(at, only) for subnet, at, only in self.learned if sender is not None and subnet == sender.subnet]
        return self.source_check == "peer" and any(at == source and only in (0, port) for at, only in of_sender)

    def has_public_ip(self, address: IPAddress) -> bool:
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


def encap(table: Table, raw: bytes, *, path_mtu: int | None = None, is_refused: bool = False) -> list[Outcome]:
    """What becomes of the packets that `raw` stands for, one read of the TUN: a 10-byte virtio header, then IP.

    A super-packet that is dropped whole is answered once, beside its first packet.

    `path_mtu`: the kernel knows this MTU (outer bytes) for the way to the peer and answers EMSGSIZE to a larger
    datagram.  `is_refused`: for another reason the kernel refuses what would come out, datagrams or answers.
    """
    data = raw[_VNET_HDR.size :]
    if len(data) < IPV4_HDR_MIN:  # 1
        return [Outcome("encap_drop_short")]
    family = IPV6 if version(data) == 6 else IPV4
    space = table.space(family)
    if space is None:  # 2, 3
        return [Outcome("encap_drop_ipv6" if family is IPV6 else "encap_drop_malformed")]
    if len(data) < family.header_len:  # 1
        return [Outcome("encap_drop_short")]
    packets = segments(raw) if _is_packet(data) else []
    if not packets:  # 3
        return [Outcome("encap_drop_malformed")]
    ip = read_header(data)
    whole = data[: ip.total_len] if _is_super_packet(raw) else packets[0]

    def refuse(counter: str, offender: bytes, reason: Reason, mtu: int = 0) -> Outcome:
        """Drop a packet, and tell its sender by way of the TUN where that is allowed."""
        if is_refused or not may_be_answered(offender):
            return Outcome(counter, icmp="icmp_suppressed")
        answer = icmp_error(space.tunnel_address, offender, reason, mtu)
        return Outcome(counter, writes=(VnetHdr().pack() + answer,), icmp="icmp_sent")

    def refuse_all(counter: str, reason: Reason, mtu: int = 0) -> list[Outcome]:
        return [refuse(counter, whole, reason, mtu)] + [Outcome(counter)] * (len(packets) - 1)

    peer = table.leasing(ip.destination)
    if _is_of_the_tunnel(table, packets[0], peer):
        return [Outcome("encap_drop_loop")] * len(packets)
    if peer is None:  # 4
        return refuse_all("encap_drop_no_route", family.no_route)
    if peer.is_dead:
        return refuse_all("encap_drop_dead", family.unreachable)
    if ip.ttl <= 1:  # 5
        return refuse_all("encap_drop_ttl", family.time_exceeded)
    most = max(peer.mtu, family.least_mtu)
    if ip.dont_fragment and len(packets[0]) > most:  # 6
        return refuse_all("encap_drop_too_big", family.too_big, most)

    outcomes = []
    if path_mtu is not None:
        most = max(path_mtu - OUTER_LEN[peer.remote[0].version] - table.prefix_len, family.least_mtu)
    for packet in packets:
        payload = table.wrapped(step_ttl(packet), peer)
        if path_mtu is not None and ip.dont_fragment and len(packet) > most:  # 7
            offender = with_one_form_of_zero(packet)
            outcomes.append(refuse("encap_drop_too_big", offender, family.too_big, most))
        elif is_refused:  # 8
            outcomes.append(Outcome("encap_drop_send"))
        else:  # 9
            outcomes.append(Outcome("encap_sent", sends=((peer.remote, payload),)))
    return outcomes


def outer_tos(peer: Peer, packet: bytes) -> int:
    """The TOS of the datagram that carries `packet` to `peer` (RFC 6040 4.1): normal or compatibility mode."""
    return read_header(packet).tos & ECN_MASK if peer.carries_ecn else NOT_ECT


def _is_packet(data: bytes) -> bool:
    """Whether an IPv4 or IPv6 packet that row 3 of encap takes begins `data`: some header and room for its length."""
    ip = read_header(data)
    if ip.family is IPV6:
        # Hop-by-hop options of a packet without payload have its real length (RFC 2675), which is more than we read.
        is_jumbo = ip.total_len == IPV6_HDR_LEN and data[6] == 0
        return ip.total_len <= len(data) and not is_jumbo
    return version(data) == 4 and IPV4_HDR_MIN <= ip.header_len <= ip.total_len <= len(data)


def segments(raw: bytes) -> list[bytes]:
    """The IP packets that `raw` stands for: a virtio header, then a packet that has passed rows 1 to 3 of encap.

    That packet, with its transport checksum completed if the header asks for it, or the segments of a super-packet.
    Bytes after its total length are cut off.  Empty when the virtio header does not fit the packet.
    """
    vnet = VnetHdr(*_VNET_HDR.unpack_from(raw))
    data = raw[_VNET_HDR.size :]
    packet = data[: read_header(data).total_len]
    if _is_super_packet(raw):
        return _cut(packet, vnet)
    if vnet.flags & _VNET_NEEDS_CSUM:
        return _completed(packet, vnet.csum_start, vnet.csum_offset)
    return [packet]


def _is_super_packet(raw: bytes) -> bool:
    return VnetHdr(*_VNET_HDR.unpack_from(raw)).gso_type != 0


def _completed(packet: bytes, start: int, offset: int) -> list[bytes]:
    """`packet` with the checksum over everything from `start` on, at `offset` from there; empty if that is outside.

    Or if nobody knows where the transport header begins: the field might be one of the extension headers.

    The field holds the pseudo-header's sum already.  A checksum of zero is written as 0xFFFF: in UDP zero means none
    (RFC 768), elsewhere the two are the same.
    """
    at = start + offset
    ip = read_header(packet)
    if start < ip.header_len or at + 2 > len(packet) or ip.protocol == UNKNOWN_PROTOCOL:
        return []
    check = (0xFFFF ^ fold_sum(packet[start:])) or 0xFFFF
    return [packet[:at] + struct.pack(">H", check) + packet[at + 2 :]]


def _cut(packet: bytes, vnet: VnetHdr) -> list[bytes]:
    """The segments of a super-packet; empty when it is none.

    `gso_type` and `gso_size` are looked at, and with IPv6 `csum_start`: the kernel and we must agree on the headers.
    """
    ip = read_header(packet)
    transport = packet[ip.header_len :]
    protocol = {ip.family.gso_tcp: TCP, _VNET_GSO_UDP_L4: UDP}.get(vnet.gso_type & ~_VNET_GSO_ECN)
    if protocol != ip.protocol or not ip.is_whole or not has_transport_header(ip.protocol, transport):
        return []
    if ip.family is IPV6 and vnet.csum_start != ip.header_len:
        return []
    header_len = tcp_header_len(transport) if ip.protocol == TCP else UDP_HDR_LEN
    header, payload = transport[:header_len], transport[header_len:]
    if vnet.gso_size == 0 or not payload:
        return []
    n = -(-len(payload) // vnet.gso_size)
    if n > _SEGMENTS_MAX or n * (ip.header_len + header_len) > _HEADERS_MAX:
        return []
    cut: list[bytes] = []
    for at in range(0, len(payload), vnet.gso_size):
        piece = payload[at : at + vnet.gso_size]
        if ip.protocol == TCP:
            is_last = at + vnet.gso_size >= len(payload)
            segment = _tcp_segment_header(header, at, is_last=is_last) + piece
        else:
            segment = header[:4] + struct.pack(">H", UDP_HDR_LEN + len(piece)) + header[6:] + piece
        cut.append(header_before(packet[: ip.header_len], segment, number=len(cut)) + _summed(ip, segment))
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


def _summed(ip: Header, segment: bytes) -> bytes:
    """`segment`, TCP or UDP, with its checksum anew."""
    at = CSUM_OFFSET[ip.protocol]
    segment = segment[:at] + bytes(2) + segment[at + 2 :]
    check = 0xFFFF ^ fold_sum(pseudo_header(ip, segment) + segment)
    if ip.protocol == UDP:
        check = check or 0xFFFF
    return segment[:at] + struct.pack(">H", check) + segment[at + 2 :]


def datagrams(message: bytes, gro_size: int = 0, prefix_len: int = 0) -> list[tuple[bytes, int]]:
    """The datagrams in one received message, each with the inner size that `decap` wants.

    `gro_size`: the size of a datagram that the kernel names beside a train of them (UDP_GRO); 0 where it names none.
    A message whose first `prefix_len` bytes are followed by one packet, and nothing more, is never cut: `gro_size` is
    then the size of the packet's inner segments.
    """
    if not 0 < gro_size < len(message):
        return [(message, 0)]
    inner = message[prefix_len:]
    if _has_header(inner) and read_header(inner).total_len == len(inner):
        return [(message, gro_size)]
    return [(message[at : at + gro_size], 0) for at in range(0, len(message), gro_size)]


def _has_header(data: bytes) -> bool:
    """Whether `data` begins with a header of IPv4 or IPv6, whatever is in its fields."""
    least = {4: IPV4_HDR_MIN, 6: IPV6_HDR_LEN}
    return bool(data) and version(data) in least and len(data) >= least[version(data)]


def decap(
    table: Table,
    payload: bytes,
    source: IPAddress,
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
        counter = _refused_prefix(table.vtep, table.ethertype, payload)
        if counter is not None:
            return Outcome(counter)
        payload = payload[PREFIX_LEN:]
    if not payload:  # 1
        return Outcome("decap_drop_empty")
    if len(payload) < IPV4_HDR_MIN:  # 2
        return Outcome("decap_drop_short")
    family = IPV6 if version(payload) == 6 else IPV4
    space = table.space(family)
    if space is None:  # 3, 4
        return Outcome("decap_drop_ipv6" if family is IPV6 else "decap_drop_version")
    if len(payload) < family.header_len:  # 2
        return Outcome("decap_drop_short")
    if version(payload) not in (4, 6):  # 4
        return Outcome("decap_drop_version")
    problem = ipv6_problem(payload) if family is IPV6 else ipv4_problem(payload)
    if problem is not None:  # 5 to 9
        return Outcome(f"decap_{problem}")
    ip = read_header(payload)
    packet = payload[: ip.total_len]

    is_checked = table.source_check != "off"
    sender = table.leasing(ip.source)
    is_learned = table.is_learned(source, source_port, sender)
    if is_checked and not table.has_public_ip(source) and not is_learned:  # 10
        if sender is not None and _is_of_learning(table, packet):  # 23
            return Outcome("decap_punted", punts=(packet,))
        return Outcome("decap_drop_unknown_peer")
    if is_martian(ip.source):  # 11
        return Outcome("decap_drop_source_martian")
    if ip.source in space.own_subnet or ip.source in table.local_addresses:  # 12
        return Outcome("decap_drop_source_own")
    if ip.source in space.network:
        if is_checked and not is_learned and (sender is None or sender.remote[0] != source):  # 13
            return Outcome("decap_drop_source_spoofed")
    elif table.source_check == "strict":  # 14
        return Outcome("decap_drop_source_outside")
    if ip.destination not in space.own_subnet:  # 15
        return Outcome("decap_drop_foreign_destination")
    if ip.destination in table.local_addresses and _udp_port(packet) == table.port:
        return Outcome("decap_drop_loop")

    if ip.ttl <= 1:  # 16
        if is_refused or sender is None or not may_be_answered(packet):
            return Outcome("decap_drop_ttl", icmp="icmp_suppressed")
        # No longer than its cause, but with 8 bytes behind the header that it quotes.
        quoted_len = ip.header_len if family is IPV4 else IPV6_HDR_LEN
        most = max(len(packet), family.header_len + ICMP_HDR_LEN + quoted_len + 8)
        answer = icmp_error(space.tunnel_address, packet, family.time_exceeded, most=most)
        return Outcome("decap_drop_ttl", sends=((sender.remote, table.wrapped(answer, sender)),), icmp="icmp_sent")
    inner_ecn = _INNER_ECN[ip.tos & ECN_MASK][outer_ecn]
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
    if not _has_header(packet) or not _is_packet(packet):
        return Outcome("inject_drop_malformed")
    ip = read_header(packet)
    if ip.total_len != len(packet) or table.space(ip.family) is None:
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
    ip = read_header(packet)
    if ip.protocol != UDP or ip.is_later_fragment or len(packet) < ip.header_len + 4:
        return None
    (port,) = struct.unpack_from(">H", packet, ip.header_len + 2)
    return int(port)


def _is_of_the_tunnel(table: Table, packet: bytes, peer: Peer | None) -> bool:
    """Whether `packet`, whose destination `peer` leases, is a datagram of the tunnel itself (RFC 2473 4.1)."""
    ip, port = read_header(packet), _udp_port(packet)
    if port is None or not table.is_endpoint(ip.destination):
        return False
    ports = (table.port,) if peer is None else (table.port, peer.remote[1])
    return port in ports or ip.source in table.local_addresses


def _is_punted(table: Table, packet: bytes) -> bool:
    """Whether `packet`, which has passed rows 1 to 16, is an echo reply that the control plane waits for."""
    ip = read_header(packet)
    icmp = packet[ip.header_len :]
    if not table.punt_id or not _is_to_tunnel_address(table, ip) or ip.protocol != ip.family.icmp:
        return False
    if ip.is_later_fragment or len(icmp) < ICMP_HDR_LEN or icmp[0] != ip.family.echo_reply:
        return False
    (ident,) = struct.unpack_from(">H", icmp, 4)
    return bool(ident == table.punt_id and (ip.more_fragments or is_icmp_checksum_right(ip, icmp)))


def _is_to_tunnel_address(table: Table, ip: Header) -> bool:
    space = table.space(ip.family)
    return space is not None and ip.destination == space.tunnel_address


def _is_of_learning(table: Table, packet: bytes) -> bool:
    """Whether `packet`, which has passed rows 1 to 9, is an answer or a question to our tunnel address.

    That a worker punts one question a second and address is not described here: it needs a clock.
    """
    ip = read_header(packet)
    icmp = packet[ip.header_len :]
    if table.source_check != "peer" or not table.punt_id or not _is_to_tunnel_address(table, ip):
        return False
    if ip.protocol != ip.family.icmp or not ip.is_whole or len(icmp) < ICMP_HDR_LEN:
        return False
    if not is_icmp_checksum_right(ip, icmp):
        return False
    (number,) = struct.unpack_from(">I", icmp, 4)
    if icmp[0] == ip.family.echo_reply:
        return bool(table.learn_id and number == table.learn_id)
    is_question = icmp[0] == ip.family.echo_request and len(packet) == ip.family.question_len
    return is_question and number & 0xFFFF != 0


def _refused_prefix(vtep: Vtep, ethertype: int, payload: bytes) -> str | None:
    """The counter to drop a datagram under that carries no packet of `ethertype` in a frame for us; None: it does.

    Reserved bits are not looked at (RFC 7348 5).  Nor is the inner source MAC: row 10 checks who sent the packet.
    """
    if len(payload) < PREFIX_LEN:  # V1
        return "decap_drop_vxlan_short"
    flags, vni, destination, _source, kind = _VXLAN.unpack_from(payload)
    if not flags & _VNI_IS_VALID:  # V2
        return "decap_drop_vxlan_flags"
    if vni >> 8 != vtep.vni:  # V3
        return "decap_drop_vxlan_vni"
    if kind != ethertype:  # V4
        return "decap_drop_vxlan_ethertype"
    if destination != vtep.mac:  # V5
        return "decap_drop_vxlan_mac"
    return None


def _vnet_hdr_for(table: Table, packet: bytes, inner_size: int) -> VnetHdr | None:
    """The virtio header to write `packet` with; None when it is too large and nobody may cut it."""
    ip = read_header(packet)
    if not _has_partial_checksum(packet):
        return VnetHdr() if ip.total_len <= table.mtu else None
    csum_offset = CSUM_OFFSET[ip.protocol]
    csum = VnetHdr(flags=_VNET_NEEDS_CSUM, csum_start=ip.header_len, csum_offset=csum_offset)
    udp_hdr_len = ip.header_len + UDP_HDR_LEN
    if ip.protocol == UDP and 0 < inner_size < ip.total_len - udp_hdr_len:
        if udp_hdr_len + inner_size > table.mtu:
            return None
        return csum._replace(gso_type=_VNET_GSO_UDP_L4, hdr_len=udp_hdr_len, gso_size=inner_size)
    if ip.total_len <= table.mtu:
        return csum
    if ip.protocol != TCP:
        return None
    tcp = packet[ip.header_len :]
    hdr_len = ip.header_len + tcp_header_len(tcp)
    if hdr_len == ip.total_len or hdr_len >= table.mtu or tcp[13] & (_TCP_SYN | _TCP_RST | _TCP_URG):
        return None
    gso_type = ip.family.gso_tcp | (_VNET_GSO_ECN if tcp[13] & _TCP_CWR else 0)
    return csum._replace(gso_type=gso_type, hdr_len=hdr_len, gso_size=table.mtu - hdr_len)


def _has_partial_checksum(packet: bytes) -> bool:
    """Whether the transport checksum is only the pseudo-header's sum: the sender left the rest to its hardware."""
    ip = read_header(packet)
    transport = packet[ip.header_len :]
    if not ip.is_whole or not has_transport_header(ip.protocol, transport):
        return False
    (check,) = struct.unpack_from(">H", transport, CSUM_OFFSET[ip.protocol])
    return bool(check == fold_sum(pseudo_header(ip, transport)))

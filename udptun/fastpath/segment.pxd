# cython: cdivision=True
"""Cut a super-packet that the TUN handed over into the packets that it stands for.

    super-packet    one IP packet of TCP or UDP whose payload is up to 64 KiB, read with a virtio header that says how
                    long a piece may be (gso_size)
    segment         one of the packets it stands for: its own header, and a stretch of the payload
    virtio header   struct virtio_net_hdr, before every packet of the TUN: what is still to be done to the packet

Pure arithmetic over memory that the caller owns.  Headers are written out, payload is never copied.

A segment's checksums are sums of three parts: what all segments share (`sum_headers`, once), the payload, and the few
fields that differ.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from udptun.fastpath.packet cimport *
from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

cdef struct SuperPacket:
    const uint8_t *data           # borrowed
    int header                    # IP, extension and transport headers together, bytes
    int ip_header                 # without the transport header
    int protocol
    bint is_ipv6
    int payload                   # bytes behind `header`
    int size                      # payload of every segment but the last
    int n                         # segments
    uint64_t ip_sum               # of the IPv4 header without length, id and checksum, unfolded
    uint64_t transport_sum        # of the transport header and addresses without what differs between segments


cdef inline int measure_super_packet(SuperPacket *s, const Packet *p, const virtio_net_hdr *vnet) noexcept nogil:
    """Take a super-packet's measures.  Number of segments; 0: not one.

    The virtio header's hdr_len is not looked at: it is wrong in packets that were forwarded from elsewhere.  With
    extension headers the kernel and we must agree where the transport header is, so csum_start is.
    """
    cdef int kind = vnet.gso_type & ~VIRTIO_NET_HDR_GSO_ECN, transport = UDP_HEADER
    s.data = p.data
    s.ip_header = p.header
    s.is_ipv6 = p.is_ipv6
    s.protocol = p.protocol
    if not p.is_whole or vnet.gso_size == 0 or p.is_ipv6 and vnet.csum_start != p.header:
        return 0
    if kind == (VIRTIO_NET_HDR_GSO_TCPV6 if p.is_ipv6 else VIRTIO_NET_HDR_GSO_TCPV4):
        if p.protocol != PROTO_TCP or p.len < p.header + TCP_HEADER_MIN:
            return 0
        transport = tcp_header_len(p.data + p.header)
        if transport < TCP_HEADER_MIN:
            return 0
    elif kind != VIRTIO_NET_HDR_GSO_UDP_L4 or p.protocol != PROTO_UDP:
        return 0
    s.header = p.header + transport
    s.payload = p.len - s.header
    s.size = vnet.gso_size
    if s.payload <= 0:
        return 0
    s.n = (s.payload + s.size - 1) // s.size
    return s.n


cdef inline void sum_headers(SuperPacket *s) noexcept nogil:
    """Sum once what all segments share; after the TTL step.

    Left out, and added for each: total length, id and checksum of IPv4; sequence number, flags and checksum of TCP;
    length and checksum of UDP.
    """
    cdef const uint8_t *d = s.data
    cdef const uint8_t *t = d + s.ip_header
    if s.is_ipv6:
        s.transport_sum = ut_sum(d + IPV6_SOURCE, 32, 0)
    else:
        s.ip_sum = ut_sum(d, 2, ut_sum(d + IP_FRAGMENT, 4, ut_sum(d + IP_SOURCE, s.ip_header - IP_SOURCE, 0)))
        s.transport_sum = ut_sum(d + IP_SOURCE, 8, 0)
    s.transport_sum = ut_sum(t, 4, s.transport_sum)    # ports
    if s.protocol == PROTO_TCP:
        s.transport_sum = ut_sum(t + TCP_ACKNOWLEDGEMENT, 4, ut_sum(t + TCP_WINDOW, 2, s.transport_sum))
        # The urgent pointer and the options.
        s.transport_sum = ut_sum(t + TCP_URGENT, s.header - s.ip_header - TCP_URGENT, s.transport_sum)


cdef inline int write_segment_header(const SuperPacket *s, int i, uint8_t *out) noexcept nogil:
    """Write segment i's header, s.header bytes, to `out`; return the length of its payload.

    The payload begins at s.data + s.header + i * s.size.
    """
    cdef int at = i * s.size
    cdef int payload = min(s.size, s.payload - at)
    cdef int transport = s.header - s.ip_header + payload
    cdef uint8_t *t = out + s.ip_header
    memcpy(out, s.data, s.header)
    if s.is_ipv6:
        store_be16(out + IPV6_PAYLOAD_LEN, s.header + payload - IPV6_HEADER)
    else:
        store_be16(out + IP_TOTAL_LEN, s.header + payload)
        store_be16(out + IP_ID, load_be16(s.data + IP_ID) + i)
        store_memory16(out + IP_CHECKSUM, ~ut_fold(ut_sum(out + IP_TOTAL_LEN, 4, s.ip_sum)))
    cdef uint64_t total = ut_sum(s.data + s.header + at, payload, s.transport_sum)
    total = add_pseudo_header_end(s.protocol, transport, total)
    if s.protocol == PROTO_TCP:
        store_be32(t + TCP_SEQUENCE, load_be32(t + TCP_SEQUENCE) + <uint32_t>at)
        if i != s.n - 1:
            t[TCP_FLAGS] &= ~(TCP_FIN | TCP_PSH) & 0xff
        if i != 0:
            t[TCP_FLAGS] &= ~TCP_CWR & 0xff
        total = ut_sum(t + TCP_DATA_OFFSET, 2, ut_sum(t + TCP_SEQUENCE, 4, total))
        store_memory16(t + TCP_CHECKSUM, ~ut_fold(total))
    else:
        store_be16(t + UDP_LENGTH, transport)
        total = ut_sum(t + UDP_LENGTH, 2, total)
        store_memory16(t + UDP_CHECKSUM, nonzero(~ut_fold(total)))
    return payload


cdef inline uint16_t nonzero(uint16_t check) noexcept nogil:
    """In UDP a checksum of zero means none; its other form stands for it (RFC 768)."""
    return check if check else 0xffff


cdef inline bint complete_checksum(Packet *p, const virtio_net_hdr *vnet) noexcept nogil:
    """Finish a transport checksum that the kernel left to us: the field holds the pseudo-header's sum.

    False when the virtio header points outside the packet, or into its IP header, or when nobody knows where that ends.
    """
    cdef int start = vnet.csum_start, at = vnet.csum_start + vnet.csum_offset
    if at + 2 > p.len or start < p.header or p.protocol == UNKNOWN_PROTOCOL:
        return False
    store_memory16(p.data + at, nonzero(~ut_fold(ut_sum(p.data + start, p.len - start, 0))))
    return True

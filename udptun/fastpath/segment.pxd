# cython: cdivision=True
"""Cut a super-packet that the TUN handed over into the packets that it stands for.

    super-packet    one IP packet of TCP or UDP whose payload is up to 64 KiB, read with a virtio header that says how
                    long a piece may be (gso_size)
    segment         one of the packets it stands for: its own header, and a stretch of the payload

Pure arithmetic over memory that the caller owns.  Headers are written out, payload is never copied.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    SEGMENT_HEADER_MAX = 120      # IPv4 60 + TCP 60
    TCP_FIN = 0x01
    TCP_PSH = 0x08
    TCP_CWR = 0x80

cdef struct SuperPacket:
    const uint8_t *data           # borrowed
    int header                    # IP and transport header together, bytes
    int ip_header
    int payload                   # bytes behind `header`
    int size                      # payload of every segment but the last
    int n                         # segments
    bint is_tcp
    uint64_t ip_sum               # of the IP header without length, id and checksum, unfolded
    uint64_t transport_sum        # of the transport header and addresses without what differs between segments


cdef inline int measure_super_packet(
        SuperPacket *s, const uint8_t *d, int total, const virtio_net_hdr *vnet) noexcept nogil:
    """Take a super-packet's measures: `total` bytes at `d`, IPv4 header checked.  Number of segments; 0: not one.

    hdr_len is not looked at: in packets forwarded from elsewhere it is not what it should be.
    """
    cdef int kind = vnet.gso_type & ~VIRTIO_NET_HDR_GSO_ECN
    cdef int ip_header = ip_header_len(d), transport
    s.data = d
    s.ip_header = ip_header
    s.is_tcp = kind == VIRTIO_NET_HDR_GSO_TCPV4
    if ip_is_fragment(d) or vnet.gso_size == 0:
        return 0
    if s.is_tcp:
        if ip_protocol(d) != PROTO_TCP or total < ip_header + TCP_HEADER_MIN:
            return 0
        transport = (d[ip_header + 12] >> 4) * 4
        if transport < TCP_HEADER_MIN:
            return 0
    elif kind == VIRTIO_NET_HDR_GSO_UDP_L4:
        if ip_protocol(d) != PROTO_UDP:
            return 0
        transport = UDP_HEADER
    else:
        return 0
    s.header = ip_header + transport
    s.payload = total - s.header
    s.size = vnet.gso_size
    if s.payload <= 0:
        return 0
    s.n = (s.payload + s.size - 1) // s.size
    return s.n


cdef inline void sum_headers(SuperPacket *s) noexcept nogil:
    """Sum once what all segments share; after the TTL step.

    Left out, and added for each: total length, id and checksum of IP; sequence number, flags and checksum of TCP;
    length and checksum of UDP.
    """
    cdef const uint8_t *d = s.data
    cdef const uint8_t *t = d + s.ip_header
    s.ip_sum = ut_sum(d, 2, ut_sum(d + 6, 4, ut_sum(d + 12, s.ip_header - 12, 0)))
    s.transport_sum = ut_sum(d + 12, 8, 0)
    if s.is_tcp:
        # ports; acknowledgement; window; urgent pointer and options
        s.transport_sum = ut_sum(t, 4, ut_sum(t + 8, 4, ut_sum(t + 14, 2, s.transport_sum)))
        s.transport_sum = ut_sum(t + 18, s.header - s.ip_header - 18, s.transport_sum)
    else:
        s.transport_sum = ut_sum(t, 4, s.transport_sum)


cdef inline int write_segment_header(const SuperPacket *s, int i, uint8_t *out) noexcept nogil:
    """Write segment i's header, s.header bytes, to `out`; return the length of its payload, which begins at
    s.data + s.header + i * s.size."""
    cdef int at = i * s.size
    cdef int payload = min(s.size, s.payload - at)
    cdef int transport = s.header - s.ip_header + payload
    cdef uint8_t *t = out + s.ip_header
    cdef uint8_t tail[4]
    memcpy(out, s.data, s.header)
    store_be16(out + 2, s.header + payload)
    store_be16(out + 4, load_be16(s.data + 4) + i)
    store_memory16(out + 10, ~ut_fold(ut_sum(out + 2, 4, s.ip_sum)))
    cdef uint64_t total = ut_sum(s.data + s.header + at, payload, s.transport_sum)
    tail[0] = 0
    tail[1] = out[9]
    store_be16(tail + 2, transport)
    total = ut_sum(tail, 4, total)
    if s.is_tcp:
        store_be32(t + 4, load_be32(t + 4) + <uint32_t>at)
        if i != s.n - 1:
            t[13] &= ~(TCP_FIN | TCP_PSH) & 0xff
        if i != 0:
            t[13] &= ~TCP_CWR & 0xff
        total = ut_sum(t + 12, 2, ut_sum(t + 4, 4, total))
        store_memory16(t + 16, ~ut_fold(total))
    else:
        store_be16(t + 4, transport)
        total = ut_sum(t + 4, 2, total)
        store_memory16(t + 6, nonzero(~ut_fold(total)))
    return payload


cdef inline uint16_t nonzero(uint16_t check) noexcept nogil:
    """In UDP a checksum of zero means none; its other form stands for it (RFC 768)."""
    return check if check else 0xffff


cdef inline bint complete_checksum(uint8_t *d, int total, const virtio_net_hdr *vnet) noexcept nogil:
    """Finish a transport checksum that the kernel left to us: the field holds the pseudo-header's sum.

    False when the virtio header points outside the packet, or into its IP header.
    """
    cdef int start = vnet.csum_start, at = vnet.csum_start + vnet.csum_offset
    if at + 2 > total or start < ip_header_len(d):
        return False
    store_memory16(d + at, nonzero(~ut_fold(ut_sum(d + start, total - start, 0))))
    return True

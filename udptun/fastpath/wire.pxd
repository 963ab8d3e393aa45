"""Inline packet arithmetic: where the fields of an IPv4 packet are and how they change.

`p` is the first byte of an inner packet, borrowed; nothing here reads past what the caller has checked.  Addresses
come out in host order, checksums stay in memory order.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "checksum.h" nogil:
    uint64_t ut_sum(const void *data, size_t n, uint64_t start)
    uint16_t ut_fold(uint64_t total)

cdef enum:
    IPV4_HEADER_MIN = 20
    UDP_HEADER = 8
    TCP_HEADER_MIN = 20
    ICMP_HEADER = 8
    PROTO_ICMP = 1
    PROTO_TCP = 6
    PROTO_UDP = 17
    FLAG_DF = 0x4000
    FLAG_MF = 0x2000
    FRAGMENT_MASK = 0x1fff        # of the offset, in 8-byte units
    TCP_SYN_RST_URG = 0x26
    ICMP_ECHO_REPLY = 0
    ICMP_UNREACHABLE = 3
    ICMP_NET_UNREACHABLE = 0
    ICMP_FRAGMENTATION_NEEDED = 4
    ICMP_ECHO = 8
    ICMP_TIME_EXCEEDED = 11
    ICMP_TIMESTAMP = 13
    ICMP_TIMESTAMP_REPLY = 14
    OPTION_END = 0
    OPTION_NOP = 1
    OPTION_LSRR = 131
    OPTION_SSRR = 137


cdef inline uint16_t load_be16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((p[0] << 8) | p[1])

cdef inline uint32_t load_be32(const uint8_t *p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]

cdef inline void store_be16(uint8_t *p, uint32_t value) noexcept nogil:
    p[0] = <uint8_t>(value >> 8)
    p[1] = <uint8_t>value

cdef inline void store_be32(uint8_t *p, uint32_t value) noexcept nogil:
    store_be16(p, value >> 16)
    store_be16(p + 2, value)

cdef inline void store_memory16(uint8_t *p, uint16_t value) noexcept nogil:
    """Store what `ut_fold` returned, which is in memory order already."""
    memcpy(p, &value, 2)

cdef inline int ip_version(const uint8_t *p) noexcept nogil:
    return p[0] >> 4

cdef inline int ip_header_len(const uint8_t *p) noexcept nogil:
    return (p[0] & 15) * 4

cdef inline int ip_total_len(const uint8_t *p) noexcept nogil:
    return load_be16(p + 2)

cdef inline int ip_fragment_word(const uint8_t *p) noexcept nogil:
    """Flags and offset together."""
    return load_be16(p + 6)

cdef inline bint ip_is_fragment(const uint8_t *p) noexcept nogil:
    return (load_be16(p + 6) & (FLAG_MF | FRAGMENT_MASK)) != 0

cdef inline int ip_ttl(const uint8_t *p) noexcept nogil:
    return p[8]

cdef inline int ip_protocol(const uint8_t *p) noexcept nogil:
    return p[9]

cdef inline uint32_t ip_source(const uint8_t *p) noexcept nogil:
    return load_be32(p + 12)

cdef inline uint32_t ip_destination(const uint8_t *p) noexcept nogil:
    return load_be32(p + 16)

cdef inline void ip_step_ttl(uint8_t *p) noexcept nogil:
    """TTL - 1 (it is at least 2), the header checksum updated by RFC 1624 equation 3.

    HC' = ~(~HC + ~m + m') with m the word of TTL and protocol, m' = m - 0x0100: the two terms of m add up to the
    constant 0xfeff.
    """
    cdef uint32_t total = (~<uint32_t>load_be16(p + 10) & 0xffff) + 0xfeff
    total = (total & 0xffff) + (total >> 16)
    p[8] -= 1
    store_be16(p + 10, ~total & 0xffff)

cdef inline bint is_martian(uint32_t address) noexcept nogil:
    """0/8, 127/8, and 224/3 with all above: no host's address (RFC 1812 5.3.7)."""
    cdef uint32_t first = address >> 24
    return first == 0 or first == 127 or first >= 224

cdef inline uint16_t pseudo_sum(const uint8_t *p, int transport_len) noexcept nogil:
    """Folded, uncomplemented pseudo-header sum, memory order: what an offloading sender leaves in the check field."""
    cdef uint8_t tail[4]
    tail[0] = 0
    tail[1] = p[9]
    store_be16(tail + 2, transport_len)
    return ut_fold(ut_sum(tail, 4, ut_sum(p + 12, 8, 0)))

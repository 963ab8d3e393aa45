"""Where the fields of a packet are, and how they change.  Inline arithmetic; bytes from the begin of each header:

    IPv4 (RFC 791)                           TCP (RFC 9293)                    UDP (RFC 768)
      0  version; header length in words       0  source port                    0  source port
      1  TOS, ECN in the last two bits         2  destination port               2  destination port
      2  total length                          4  sequence number                4  length, with this header
      4  identification                        8  acknowledgement number         6  checksum; 0: none
      6  DF, MF; fragment offset / 8          12  header length in words
      8  TTL                                  13  flags
      9  protocol                             14  window
     10  header checksum                      16  checksum
     12  source                               18  urgent pointer
     16  destination                          20  options
     20  options

    IPv6 (RFC 8200)                          fragment header                   other extension headers
      0  version, traffic class, flow label    0  next header                    0  next header
      4  length of all behind this header      2  offset / 8, two bits, more     1  length in 8 bytes, less one; of an
      6  next header                           4  identification                    authentication header in 4, less two
      7  hop limit                                                               2  routing: type; options
      8  source                                                                  3  routing: segments left
     24  destination

    pseudo-header   source, destination, protocol and transport length: TCP and UDP checksums cover it too, and of IPv6
                    ICMPv6 checksums
    sum             ones'-complement sum of 16-bit words (RFC 1071); a checksum is its complement
    memory order    as the bytes stand in a packet: `ut_sum` adds words as they come, which gives the sum in this order

`p` is the first byte of an inner packet, borrowed; nothing here reads past what the caller has checked.  Addresses and
ports come out in host order.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "checksum.h" nogil:
    uint64_t ut_sum(const void *data, size_t n, uint64_t start)
    uint16_t ut_fold(uint64_t total)

cdef enum:
    IP_TOS = 1
    IP_TOTAL_LEN = 2
    IP_ID = 4
    IP_FRAGMENT = 6
    IP_TTL = 8
    IP_PROTOCOL = 9
    IP_CHECKSUM = 10
    IP_SOURCE = 12
    IP_DESTINATION = 16
    IPV4_HEADER_MIN = 20
    IPV6_PAYLOAD_LEN = 4
    IPV6_NEXT_HEADER = 6
    IPV6_HOP_LIMIT = 7
    IPV6_SOURCE = 8
    IPV6_DESTINATION = 24
    IPV6_HEADER = 40
    IPV6_MTU_MIN = 1280           # every path takes packets of so many bytes
    ECN_MASK = 3                  # of the TOS, or traffic class
    ECN_NOT_ECT = 0
    ECN_ECT_1 = 1
    ECN_ECT_0 = 2
    ECN_CE = 3
    FLAG_DF = 0x4000
    FLAG_MF = 0x2000
    FRAGMENT_MASK = 0x1fff
    PROTO_ICMP = 1
    PROTO_TCP = 6
    PROTO_UDP = 17
    PROTO_ICMPV6 = 58
    # Extension headers of IPv6
    HOP_BY_HOP_OPTIONS = 0
    ROUTING_HEADER = 43
    FRAGMENT_HEADER = 44
    AUTHENTICATION_HEADER = 51
    DESTINATION_OPTIONS = 60
    EXTENSION_UNIT = 8            # bytes; none is shorter
    ROUTING_TYPE = 2
    ROUTING_SEGMENTS_LEFT = 3
    IPV6_MORE_FRAGMENTS = 1
    IPV6_OFFSET_MASK = 0xfff8
    OPTION_PAD1 = 0
    OPTION_END = 0
    OPTION_NOP = 1
    OPTION_LSRR = 131
    OPTION_SSRR = 137
    # TCP and UDP
    UDP_LENGTH = 4
    UDP_CHECKSUM = 6
    UDP_HEADER = 8
    TCP_SEQUENCE = 4
    TCP_ACKNOWLEDGEMENT = 8
    TCP_DATA_OFFSET = 12
    TCP_FLAGS = 13
    TCP_WINDOW = 14
    TCP_CHECKSUM = 16
    TCP_URGENT = 18
    TCP_HEADER_MIN = 20
    TCP_FIN = 0x01
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_CWR = 0x80
    TCP_SYN_RST_URG = 0x26
    # ICMP and ICMPv6: types
    ICMP_HEADER = 8
    ICMP_ID = 4                   # of an echo and its reply
    ICMP_ECHO_REPLY = 0
    ICMP_ECHO = 8
    ICMP_TIMESTAMP = 13
    ICMP_TIMESTAMP_REPLY = 14
    ICMPV6_ECHO = 128             # all below are errors
    ICMPV6_ECHO_REPLY = 129
    ICMPV6_REDIRECT = 137


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

cdef inline uint32_t be32(uint32_t value) noexcept nogil:
    """A number of host order in network order."""
    cdef uint32_t out
    store_be32(<uint8_t *>&out, value)
    return out

cdef inline void store_memory16(uint8_t *p, uint16_t value) noexcept nogil:
    """Store what `ut_fold` returned, which is in memory order already."""
    memcpy(p, &value, 2)

cdef inline int ip_version(const uint8_t *p) noexcept nogil:
    return p[0] >> 4

cdef inline int ip_header_len(const uint8_t *p) noexcept nogil:
    return (p[0] & 15) * 4

cdef inline int ip_total_len(const uint8_t *p) noexcept nogil:
    return load_be16(p + IP_TOTAL_LEN)

cdef inline int ip_fragment_word(const uint8_t *p) noexcept nogil:
    """Flags and offset together."""
    return load_be16(p + IP_FRAGMENT)

cdef inline int ip_ttl(const uint8_t *p) noexcept nogil:
    return p[IP_TTL]

cdef inline int ip_protocol(const uint8_t *p) noexcept nogil:
    return p[IP_PROTOCOL]

cdef inline uint32_t ip_source(const uint8_t *p) noexcept nogil:
    return load_be32(p + IP_SOURCE)

cdef inline uint32_t ip_destination(const uint8_t *p) noexcept nogil:
    return load_be32(p + IP_DESTINATION)

cdef inline int ipv6_total_len(const uint8_t *p) noexcept nogil:
    return IPV6_HEADER + load_be16(p + IPV6_PAYLOAD_LEN)

cdef inline int tcp_header_len(const uint8_t *tcp) noexcept nogil:
    return (tcp[TCP_DATA_OFFSET] >> 4) * 4

cdef inline void ip_step_ttl(uint8_t *p) noexcept nogil:
    """TTL - 1 (it is at least 2), the header checksum updated by RFC 1624 equation 3.

    HC' = ~(~HC + ~m + m') with m the word of TTL and protocol, m' = m - 0x0100: the two terms of m add up to the
    constant 0xfeff.
    """
    cdef uint32_t total = (~<uint32_t>load_be16(p + IP_CHECKSUM) & 0xffff) + 0xfeff
    total = (total & 0xffff) + (total >> 16)
    p[IP_TTL] -= 1
    store_be16(p + IP_CHECKSUM, ~total & 0xffff)

cdef inline void ip_undo_ttl_step(uint8_t *p) noexcept nogil:
    """The inverse of ip_step_ttl, except that a checksum of 0xffff comes back as 0, its other form."""
    cdef uint32_t total = (~<uint32_t>load_be16(p + IP_CHECKSUM) & 0xffff) + 0x0100
    total = (total & 0xffff) + (total >> 16)
    p[IP_TTL] += 1
    store_be16(p + IP_CHECKSUM, ~total & 0xffff)

cdef inline void ip_set_ecn(uint8_t *p, int ecn) noexcept nogil:
    """Another ECN field, the header checksum updated by RFC 1624 equation 3, with m the header's first word."""
    cdef uint32_t total = (~<uint32_t>load_be16(p + IP_CHECKSUM) & 0xffff) + (~<uint32_t>load_be16(p) & 0xffff)
    p[IP_TOS] = <uint8_t>(p[IP_TOS] & ~ECN_MASK | ecn)
    total += load_be16(p)
    total = (total & 0xffff) + (total >> 16)
    total = (total & 0xffff) + (total >> 16)
    store_be16(p + IP_CHECKSUM, ~total & 0xffff)

cdef inline uint64_t add_pseudo_header_end(int protocol, int transport_len, uint64_t total) noexcept nogil:
    """`total` and the part of the pseudo-header that is not the addresses.

    With IPv6 both numbers have 32 bits, of which the upper 16 are zero: the sum is the same.
    """
    cdef uint8_t end[4]
    end[0] = 0
    end[1] = <uint8_t>protocol
    store_be16(end + 2, transport_len)
    return ut_sum(end, 4, total)

"""A packet of either family: what its headers say, read once, so that the stages ask for it and not for the family.

    extension headers   of IPv6, between its header and the transport header: hop-by-hop options, routing, fragment,
                        authentication, destination options
    chain               the extension headers of a packet, and the transport header behind them
    first, later        fragment whose offset is 0, which has the transport header; any other one
    problem             what is wrong with a chain, PROBLEM_*; the first one of a packet counts

`read_headers` is called once the packet's length is known, and fills what is below in `Packet`.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from udptun.fastpath.shm cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    PACKET_MAX = 65535            # an IPv4 total length; no longer one of IPv6 is ever read or received
    MOST_EXTENSIONS = 8
    UNKNOWN_PROTOCOL = -1
    PROBLEM_NONE = 0
    PROBLEM_OPTIONS = 1
    PROBLEM_FRAGMENT = 2

cdef struct Packet:
    uint8_t *data                 # borrowed from a buffer until the end of the turn
    int len                       # what was read; once that is checked, its length by its IP header, bytes
    uint32_t peer                 # index in the table; who gets it, or who sent it (0: a source outside Network)
    bint is_ipv6
    int header                    # bytes before the transport header: the IP header, with options or extension headers
    int protocol                  # of the transport header; UNKNOWN_PROTOCOL where the packet ends before it
    bint has_fragment_header      # of IPv6
    bint has_more                 # more fragments follow
    bint is_later_fragment
    bint is_whole                 # neither a fragment, nor behind a fragment or authentication header

# ------------------------------------------------------------------------------------------------ reading

cdef inline bint take_length(Packet *p) noexcept nogil:
    """Cut off what is behind the packet, by its own length.  False where its header does not fit what was read.

    There are at least IPV4_HEADER_MIN bytes, and IPV6_HEADER of a packet of version 6.
    """
    p.is_ipv6 = ip_version(p.data) == 6
    return take_ipv6_length(p) if p.is_ipv6 else take_ipv4_length(p)


cdef inline bint take_ipv4_length(Packet *p) noexcept nogil:
    cdef int header = ip_header_len(p.data), total = ip_total_len(p.data)
    if header < IPV4_HEADER_MIN or total < header or total > p.len:
        return False
    p.len = total
    return True


cdef inline bint take_ipv6_length(Packet *p) noexcept nogil:
    """A jumbogram (RFC 2675) does not fit."""
    cdef int total = ipv6_total_len(p.data)
    if total > p.len or total == IPV6_HEADER and p.data[IPV6_NEXT_HEADER] == HOP_BY_HOP_OPTIONS:
        return False
    p.len = total
    return True


cdef inline int read_headers(Packet *p) noexcept nogil:
    """Find the transport header, and what the fragment's fields say.  The problem of an IPv6 chain."""
    if p.is_ipv6:
        return read_ipv6_headers(p)
    read_ipv4_header(p)
    return PROBLEM_NONE


cdef inline void read_ipv4_header(Packet *p) noexcept nogil:
    cdef int fragment = ip_fragment_word(p.data)
    p.is_ipv6 = False
    p.header = ip_header_len(p.data)
    p.protocol = ip_protocol(p.data)
    p.has_more = fragment & FLAG_MF != 0
    p.is_later_fragment = fragment & FRAGMENT_MASK != 0
    p.is_whole = fragment & (FLAG_MF | FRAGMENT_MASK) == 0


cdef inline int read_ipv6_headers(Packet *p) noexcept nogil:
    p.is_ipv6 = True
    p.header = IPV6_HEADER
    p.protocol = p.data[IPV6_NEXT_HEADER]
    p.has_fragment_header = p.has_more = p.is_later_fragment = False
    p.is_whole = True
    return follow_chain(p) if is_extension(p.protocol) else PROBLEM_NONE


cdef inline bint is_extension(int protocol) noexcept nogil:
    return (protocol == HOP_BY_HOP_OPTIONS or protocol == DESTINATION_OPTIONS or protocol == ROUTING_HEADER
            or protocol == FRAGMENT_HEADER or protocol == AUTHENTICATION_HEADER)


cdef inline int follow_chain(Packet *p) noexcept nogil:
    """Follow the extension headers as far as they go, whatever is in them; the first problem."""
    cdef int n = 0, length, problem = PROBLEM_NONE, found
    cdef bint is_first_fragment = False
    while is_extension(p.protocol) and not p.is_later_fragment:
        n += 1
        length = extension_len(p)
        found = PROBLEM_NONE
        if n > MOST_EXTENSIONS or p.protocol == HOP_BY_HOP_OPTIONS and n > 1:
            found = PROBLEM_OPTIONS
        elif p.header + length > p.len:
            # All extension headers have to be in the first fragment (RFC 7112).
            found = PROBLEM_FRAGMENT if is_first_fragment else PROBLEM_OPTIONS
        elif p.protocol == FRAGMENT_HEADER:
            found = fragment_problem(p)
            is_first_fragment = p.has_more and not p.is_later_fragment
        elif not is_extension_acceptable(p.data + p.header, p.protocol, length):
            found = PROBLEM_OPTIONS
        if problem == PROBLEM_NONE:
            problem = found
        if n > MOST_EXTENSIONS or p.header + length > p.len:
            p.protocol = UNKNOWN_PROTOCOL
            return problem
        p.is_whole &= p.protocol != FRAGMENT_HEADER and p.protocol != AUTHENTICATION_HEADER
        p.protocol = p.data[p.header]
        p.header += length
    if is_first_fragment and problem == PROBLEM_NONE and p.len - p.header < least_transport(p.protocol):
        problem = PROBLEM_FRAGMENT
    return problem


cdef inline int extension_len(const Packet *p) noexcept nogil:
    """Of the extension header that begins at p.header; EXTENSION_UNIT where the packet ends before it says so."""
    cdef const uint8_t *d = p.data + p.header
    if p.protocol == FRAGMENT_HEADER or p.header + EXTENSION_UNIT > p.len:
        return EXTENSION_UNIT
    return (d[1] + 2) * 4 if p.protocol == AUTHENTICATION_HEADER else (d[1] + 1) * EXTENSION_UNIT


cdef inline int fragment_problem(Packet *p) noexcept nogil:
    """Read the fragment header at p.header; whether there can be such a fragment."""
    cdef int word = load_be16(p.data + p.header + 2), behind = p.len - p.header - EXTENSION_UNIT
    cdef bint is_second = p.has_fragment_header
    p.has_fragment_header = True
    p.has_more = word & IPV6_MORE_FRAGMENTS != 0
    p.is_later_fragment = word & IPV6_OFFSET_MASK != 0
    if is_second or not is_fragment_possible(word & IPV6_OFFSET_MASK, behind, p.has_more):
        return PROBLEM_FRAGMENT
    return PROBLEM_NONE


cdef inline bint is_fragment_possible(int offset, int payload, bint has_more) noexcept nogil:
    return offset + payload <= PACKET_MAX and not (has_more and (payload == 0 or payload & 7))


cdef inline bint is_extension_acceptable(const uint8_t *d, int kind, int length) noexcept nogil:
    """Whether it routes by no source (RFC 5095; RFC 8200 4.4), and its options, if it has any, fit (RFC 8200 4.2)."""
    cdef int i = 2
    if kind == ROUTING_HEADER:
        return d[ROUTING_TYPE] != 0 and d[ROUTING_SEGMENTS_LEFT] == 0
    if kind == AUTHENTICATION_HEADER:
        return True
    while i < length:
        if d[i] == OPTION_PAD1:
            i += 1
        elif i + 1 == length:
            return False
        else:
            i += 2 + d[i + 1]
    return i == length


cdef inline int least_transport(int protocol) noexcept nogil:
    """Bytes of the shortest transport header."""
    if protocol == PROTO_TCP:
        return TCP_HEADER_MIN
    return UDP_HEADER if protocol == PROTO_UDP or protocol == PROTO_ICMPV6 else 0

# --------------------------------------------------------------------------------- fields of either family

cdef inline const uint8_t *source_of(const Packet *p) noexcept nogil:
    return p.data + (IPV6_SOURCE if p.is_ipv6 else IP_SOURCE)

cdef inline const uint8_t *destination_of(const Packet *p) noexcept nogil:
    return p.data + (IPV6_DESTINATION if p.is_ipv6 else IP_DESTINATION)

cdef inline ut_address address_at(const Packet *p, const uint8_t *address) noexcept nogil:
    """An address of the packet as the shared memory has it."""
    cdef ut_address out
    cdef uint32_t address_be
    if p.is_ipv6:
        memcpy(&out, address, sizeof(ut_address))
        return out
    memcpy(&address_be, address, 4)
    return mapped(address_be)

cdef inline int ttl_of(const Packet *p) noexcept nogil:
    """Also the hop limit."""
    return p.data[IPV6_HOP_LIMIT] if p.is_ipv6 else ip_ttl(p.data)

cdef inline void step_ttl(Packet *p) noexcept nogil:
    """One less; it is at least 2."""
    if p.is_ipv6:
        p.data[IPV6_HOP_LIMIT] -= 1
    else:
        ip_step_ttl(p.data)

cdef inline void undo_ttl_step(Packet *p) noexcept nogil:
    if p.is_ipv6:
        p.data[IPV6_HOP_LIMIT] += 1
    else:
        ip_undo_ttl_step(p.data)

cdef inline int ecn_of(const Packet *p) noexcept nogil:
    return (p.data[1] >> 4 if p.is_ipv6 else p.data[IP_TOS]) & ECN_MASK

cdef inline void set_ecn(Packet *p, int ecn) noexcept nogil:
    if p.is_ipv6:
        p.data[1] = <uint8_t>(p.data[1] & ~(ECN_MASK << 4) | ecn << 4)
    else:
        ip_set_ecn(p.data, ecn)

cdef inline bint may_be_fragmented(const Packet *p, int length) noexcept nogil:
    """Whether an outer packet may be, where the path is too narrow for the `length` bytes of the packet in it.

    IPv6 packets that every path must take are never too big (RFC 2473 7.1).
    """
    if p.is_ipv6:
        return length <= IPV6_MTU_MIN
    return not ip_fragment_word(p.data) & FLAG_DF

cdef inline uint32_t least_mtu(const Packet *p, uint32_t mtu) noexcept nogil:
    """The MTU to tell the packet's sender of: nobody need do with less than IPV6_MTU_MIN."""
    return max(mtu, <uint32_t>IPV6_MTU_MIN) if p.is_ipv6 else mtu

cdef inline bint has_ports(const Packet *p) noexcept nogil:
    """Whether both ports are there, of TCP or UDP."""
    return ((p.protocol == PROTO_TCP or p.protocol == PROTO_UDP) and not p.is_later_fragment
            and p.len >= p.header + 4)

cdef inline bint is_icmp(const Packet *p) noexcept nogil:
    """Whether it is ICMP of its family, with a whole ICMP header."""
    return (p.protocol == (PROTO_ICMPV6 if p.is_ipv6 else PROTO_ICMP) and not p.is_later_fragment
            and p.len >= p.header + ICMP_HEADER)

cdef inline uint64_t sum_addresses(const Packet *p) noexcept nogil:
    cdef uint32_t words[2]
    if p.is_ipv6:
        return ut_sum(p.data + IPV6_SOURCE, 32, 0)
    memcpy(words, p.data + IP_SOURCE, sizeof(words))
    return <uint64_t>words[0] + words[1]

cdef inline uint16_t pseudo_sum(const Packet *p) noexcept nogil:
    """Folded, uncomplemented pseudo-header sum, memory order: what an offloading sender leaves in the check field."""
    return ut_fold(add_pseudo_header_end(p.protocol, p.len - p.header, sum_addresses(p)))

cdef inline bint transport_checksum_holds(const Packet *p) noexcept nogil:
    """Of TCP, UDP and ICMPv6."""
    cdef int transport = p.len - p.header
    cdef uint64_t total = add_pseudo_header_end(p.protocol, transport, sum_addresses(p))
    return ut_fold(ut_sum(p.data + p.header, transport, total)) == 0xffff

cdef inline bint icmp_checksum_holds(const Packet *p) noexcept nogil:
    if p.is_ipv6:
        return transport_checksum_holds(p)
    return ut_fold(ut_sum(p.data + p.header, p.len - p.header, 0)) == 0xffff

# ------------------------------------------------------------------------------- what the table says of its addresses

cdef inline uint32_t leasing(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    """Index of the peer that leases an address of the packet; 0: none."""
    return lookup_ipv6(table, address) if p.is_ipv6 else lookup(table, load_be32(address))

cdef inline bint is_in_network(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    if p.is_ipv6:
        return is_within(&table.network_ipv6, address)
    return load_be32(address) & table.network_mask == table.network

cdef inline bint is_in_own_subnet(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    if p.is_ipv6:
        return is_within(&table.own_subnet_ipv6, address)
    return load_be32(address) & table.own_mask == table.own_subnet

cdef inline bint is_tunnel_address(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    if p.is_ipv6:
        return memcmp(address, &table.tunnel_address_ipv6, sizeof(ut_address)) == 0
    return load_be32(address) == table.tunnel_address

cdef inline bint is_of_this_host(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    return is_local_ipv6(table, address) if p.is_ipv6 else is_local(table, load_be32(address))

cdef inline bint is_public_ip(const ut_slot *table, const Packet *p, const uint8_t *address) noexcept nogil:
    """Whether it is some peer's."""
    cdef ut_address wanted = address_at(p, address)
    # Of a packet of IPv6 ::ffff:a.b.c.d is not a.b.c.d.
    return not (p.is_ipv6 and is_mapped(&wanted)) and is_remote(table, &wanted)

cdef inline bint is_multicast(const Packet *p, const uint8_t *address) noexcept nogil:
    """With IPv4 also what is above: reserved addresses and broadcast."""
    return address[0] == 0xff if p.is_ipv6 else address[0] >= 224

cdef inline bint is_martian(const Packet *p, const uint8_t *address) noexcept nogil:
    """No host's address, to another host.

    IPv4: 0/8, 127/8, and 224/3 with all above (RFC 1812 5.3.7).  IPv6: ::/96, ::ffff:0:0/96, fe80::/10 and ff00::/8.
    """
    cdef uint32_t words[3]
    if not p.is_ipv6:
        return address[0] == 0 or address[0] == 127 or address[0] >= 224
    if address[0] == 0xff or address[0] == 0xfe and address[1] & 0xc0 == 0x80:
        return True
    memcpy(words, address, sizeof(words))
    return words[0] == 0 and words[1] == 0 and (words[2] == 0 or words[2] == be32(0xffff))

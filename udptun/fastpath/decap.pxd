# cython: cdivision=True
"""Check a datagram that came from a peer, step its TTL and give it to the merger: the first stage to the TUN.

    message             what one receive gave: a datagram, or a train of them
    train               several datagrams that the kernel has put together (UDP_GRO), all of one size but the last
    outer, inner        the UDP datagram and its source address; the packet in it
    super-packet        an inner packet that nobody has cut up, because the sender's network card is virtual
    partial checksum    the check field holds only the pseudo-header's sum: the sender left the rest to hardware that
                        does not exist

The conditions stand in the order of the tables "Decap" in docs/wire-format.md.  A check returns the counter to drop the
packet under, or NULL.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from udptun.fastpath.coalesce cimport add_packet, begin_item, close_flow, is_full, start_batch
from udptun.fastpath.coalesce cimport VNET, Item
from udptun.fastpath.ecn cimport take_mark
from udptun.fastpath.icmp cimport TTL_EXCEEDED, answer_peer
from udptun.fastpath.loop cimport *
from udptun.fastpath.loops cimport is_for_our_socket
from udptun.fastpath.ring cimport is_asked_for, is_punt_full, punt
from udptun.fastpath.segment cimport complete_checksum
from udptun.fastpath.vxlan cimport check_prefix
from udptun.fastpath.wire cimport *
from udptun.fastpath.stray cimport take_stray
from udptun.fastpath.trace cimport set_end, trace
from udptun.fastpath.write cimport write_items, write_segments


cdef inline void decap_message(Loop *w, int i, bint is_inherited) noexcept nogil:
    """Decap every datagram of message i; of an inherited one those that its first owner had not yet written."""
    cdef int length = <int>min(w.in_flight.message[i].msg_len, <uint32_t>PACKET_MAX)
    cdef uint8_t *train = w.in_flight.train[i]
    cdef int gro_size, tos, size, at = 0
    ut_read_control(&w.in_flight.message[i].msg_hdr, &gro_size, &tos)
    size = datagram_size(train, length, gro_size, w.prefix_len, is_inherited)
    while True:
        if not is_inherited or at + w.prefix_len >= length or not is_written(train + at + w.prefix_len):
            decap(w, i, train + at, min(size, length - at), gro_size if gro_size < size else 0, tos & ECN_MASK)
        at += size
        if at >= length:
            break


cdef inline int datagram_size(
        const uint8_t *d, int length, int gro_size, int prefix_len, bint is_inherited) noexcept nogil:
    """How long the datagrams in a received message are, all but the last; at least 1.

    `gro_size` is what the kernel says, 0 when it says nothing.  An inner packet that covers the message is never cut: a
    kernel that encapsulates hands over a super-packet whole, and `gro_size` is then that of its inner segments.  In an
    inherited message such a packet may bear the mark of one that is written.
    """
    cdef const uint8_t *inner = d + prefix_len
    cdef int inner_len = length - prefix_len, version
    if gro_size <= 0 or gro_size >= length:
        return max(length, 1)
    version = inner[0] if is_inherited and is_written(inner) else ip_version(inner)
    if inner_len >= IPV4_HEADER_MIN and version == 4 and ip_total_len(inner) == inner_len:
        return length
    if inner_len >= IPV6_HEADER and version == 6 and ipv6_total_len(inner) == inner_len:
        return length
    return gro_size


cdef inline void decap(Loop *w, int i, uint8_t *d, int length, int inner_size, int outer_ecn) noexcept nogil:
    """Check one datagram of message i, step its TTL and give it to the merger; or drop it, or punt it.

    `inner_size`: payload of the segments of a super-packet of UDP, bytes; 0 where the kernel tells none.  `outer_ecn`:
    the ECN field of the outer packet.
    """
    cdef Counters *c = w.counters
    cdef const ut_socket_address *source = &w.in_flight.source[i]
    cdef Counter *drop = NULL
    cdef Counter *end
    cdef Counter n_answers
    cdef ut_traced *entry = NULL
    cdef Packet p
    cdef virtio_net_hdr vnet
    c.decap_packets += 1
    if w.prefix_len:
        drop = check_prefix(w.slot, c, d, length)
        d += w.prefix_len
        length -= w.prefix_len
    p.data = d
    p.len = length
    p.peer = 0
    if drop == NULL:
        drop = check_packet(w.slot, c, &p, source)
    if drop == NULL:
        drop = take_mark(c, &p, outer_ecn)
    if drop == NULL and is_for_control_plane(w.slot, &p):
        if w.is_traced:
            end = &c.decap_drop_punt_full if is_punt_full(w) else &c.decap_punted
            entry = trace(w, UT_TRACE_DECAP, &p, 1, end, source)
        end = punt(w, &p, source, False)
        if entry != NULL:
            set_end(w, entry, end)
        return
    if drop == NULL:
        drop = offload_header(w.slot, c, &p, inner_size, &vnet)
    if w.is_traced:
        if drop == NULL:
            entry = trace(w, UT_TRACE_DECAP, &p, n_segments(&p, &vnet), &c.decap_delivered, source)
        else:
            entry = trace(w, UT_TRACE_DECAP, &p, 1, drop, source)
    if drop != NULL:
        if drop == &c.decap_drop_unknown_peer or drop == &c.decap_drop_source_spoofed:
            end = take_stray(w, &p, source, drop == &c.decap_drop_unknown_peer)
            if end != NULL:
                if entry != NULL:
                    set_end(w, entry, end)
                return
        elif drop == &c.decap_drop_ttl:
            n_answers = c.icmp_sent
            answer_peer(w, &p, TTL_EXCEEDED)
            if entry != NULL:
                entry.is_answered = c.icmp_sent != n_answers
        drop[0] += 1
        return
    step_ttl(&p)
    deliver(w, &p, &vnet)


cdef inline void deliver(Loop *w, Packet *p, virtio_net_hdr *vnet) noexcept nogil:
    """Give a packet that has passed all checks to the merger.

    One that needs a virtio header is an item of its own; for a device that takes none it is finished here.
    """
    cdef Item *it
    if vnet.flags and not w.vnet_len:
        if vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE:
            write_segments(w, p, vnet)
            return
        complete_checksum(p, vnet)
        vnet.flags = 0
    if is_full(w.merger):
        write_items(w)
        start_batch(w.merger)
    if vnet.flags:
        close_flow(w.merger, p)
        it = begin_item(w.merger, p)
        memcpy(it.vnet, vnet, VNET)
    else:
        add_packet(w.merger, p)


cdef inline Counter *check_packet(
        const ut_slot *table, Counters *c, Packet *p, const ut_socket_address *source) noexcept nogil:
    """Rows 1 to 16, with loops: is this a packet, may `source` send it, and is it for us?  Sets p.peer."""
    cdef Counter *drop = check_header(table, c, p)
    if drop == NULL:
        drop = check_source(table, c, p, source)
    if drop != NULL:
        return drop
    if not is_in_own_subnet(table, p, destination_of(p)):
        return &c.decap_drop_foreign_destination
    if is_for_our_socket(table, p):
        return &c.decap_drop_loop
    return &c.decap_drop_ttl if ttl_of(p) <= 1 else NULL


cdef inline bint is_for_control_plane(const ut_slot *table, const Packet *p) noexcept nogil:
    """Row 21."""
    return is_tunnel_address(table, p, destination_of(p)) and is_asked_for(table, p)


cdef inline Counter *check_header(const ut_slot *table, Counters *c, Packet *p) noexcept nogil:
    """Rows 1 to 9: is this a packet?  Cuts off the bytes behind it and reads its headers."""
    if p.len == 0:
        return &c.decap_drop_empty
    if p.len < IPV4_HEADER_MIN:
        return &c.decap_drop_short
    if ip_version(p.data) == 4 and carries_ipv4(table):
        return check_ipv4_header(c, p)
    if ip_version(p.data) != 6:
        return &c.decap_drop_version
    return check_ipv6_header(c, p) if carries_ipv6(table) else &c.decap_drop_ipv6


cdef inline Counter *check_ipv4_header(Counters *c, Packet *p) noexcept nogil:
    """Rows 5 to 9."""
    cdef const uint8_t *d = p.data
    cdef int header = ip_header_len(d)
    if header < IPV4_HEADER_MIN or header > p.len:
        return &c.decap_drop_ihl
    if not take_ipv4_length(p):
        return &c.decap_drop_length
    if ut_fold(ut_sum(d, header, 0)) != 0xffff:
        return &c.decap_drop_checksum
    if header > IPV4_HEADER_MIN and not options_acceptable(d, header):
        return &c.decap_drop_options
    read_ipv4_header(p)
    if not p.is_whole and not is_fragment_possible(
            (ip_fragment_word(d) & FRAGMENT_MASK) * 8, p.len - header, p.has_more):
        return &c.decap_drop_fragment
    return NULL


cdef inline Counter *check_ipv6_header(Counters *c, Packet *p) noexcept nogil:
    """Rows 2, 6, 8 and 9."""
    cdef int problem
    if p.len < IPV6_HEADER:
        return &c.decap_drop_short
    if not take_ipv6_length(p):
        return &c.decap_drop_length
    problem = read_ipv6_headers(p)
    if problem == PROBLEM_NONE:
        return NULL
    return &c.decap_drop_options if problem == PROBLEM_OPTIONS else &c.decap_drop_fragment


cdef inline bint options_acceptable(const uint8_t *d, int header) noexcept nogil:
    """Whether the options are well formed and none of them routes by source (RFC 7126 4.3, 4.4)."""
    cdef int i = IPV4_HEADER_MIN
    while i < header:
        if d[i] == OPTION_END:
            return True
        if d[i] == OPTION_NOP:
            i += 1
            continue
        if d[i] == OPTION_LSRR or d[i] == OPTION_SSRR:
            return False
        if i + 1 >= header or d[i + 1] < 2 or i + d[i + 1] > header:
            return False
        i += d[i + 1]
    return True


cdef inline Counter *check_source(
        const ut_slot *table, Counters *c, Packet *p, const ut_socket_address *source) noexcept nogil:
    """Rows 10 to 14: may `source` send this inner source?  Sets p.peer."""
    cdef const uint8_t *inner = source_of(p)
    cdef bint is_from_its_peer
    cdef ut_address outer
    p.peer = leasing(table, p, inner)
    is_from_its_peer = p.peer != 0 and is_at(table, p.peer, source)
    if not is_from_its_peer and table.source_check != UT_SOURCE_OFF:
        outer = address_of(source)
        if not is_remote(table, &outer):
            if not is_learned(table, p.peer, &outer, port_of(source)):
                return &c.decap_drop_unknown_peer
            is_from_its_peer = True
    if is_martian(p, inner):
        return &c.decap_drop_source_martian
    if is_in_own_subnet(table, p, inner) or is_of_this_host(table, p, inner):
        return &c.decap_drop_source_own
    if is_from_its_peer or table.source_check == UT_SOURCE_OFF:
        return NULL
    if is_in_network(table, p, inner):
        return &c.decap_drop_source_spoofed
    if table.source_check == UT_SOURCE_STRICT:
        return &c.decap_drop_source_outside
    return NULL


cdef inline Counter *offload_header(
        const ut_slot *table, Counters *c, Packet *p, int inner_size, virtio_net_hdr *vnet) noexcept nogil:
    """Row 17, and the virtio header that the TUN write needs."""
    cdef uint8_t *transport = p.data + p.header
    cdef int payload = p.len - p.header - UDP_HEADER, check = partial_checksum_offset(p), tcp_header
    memset(vnet, 0, sizeof(virtio_net_hdr))
    if check:
        vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
        vnet.csum_start = <uint16_t>p.header
        vnet.csum_offset = <uint16_t>check
    if check and p.protocol == PROTO_UDP and 0 < inner_size < payload:
        # These are several datagrams, however short together, and must not come out as one.
        if p.header + UDP_HEADER + inner_size > <int>table.mtu:
            return &c.decap_drop_oversize
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.hdr_len = <uint16_t>(p.header + UDP_HEADER)
        vnet.gso_size = <uint16_t>inner_size
    elif <uint32_t>p.len > table.mtu:
        if check == 0 or p.protocol == PROTO_UDP:
            return &c.decap_drop_oversize
        tcp_header = tcp_header_len(transport)
        if (p.len == p.header + tcp_header or transport[TCP_FLAGS] & TCP_SYN_RST_URG
                or p.header + tcp_header >= <int>table.mtu):
            return &c.decap_drop_oversize
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV6 if p.is_ipv6 else VIRTIO_NET_HDR_GSO_TCPV4
        if transport[TCP_FLAGS] & TCP_CWR:
            # A device that cannot keep the flag to the first segment leaves the cutting to the kernel.
            vnet.gso_type |= VIRTIO_NET_HDR_GSO_ECN
        vnet.hdr_len = <uint16_t>(p.header + tcp_header)
        vnet.gso_size = <uint16_t>(table.mtu - p.header - tcp_header)
    return NULL


cdef inline int n_segments(const Packet *p, const virtio_net_hdr *vnet) noexcept nogil:
    """How many packets it stands for, by its virtio header."""
    if vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE or not vnet.flags or not vnet.gso_size:
        return 1
    return (p.len - vnet.hdr_len + vnet.gso_size - 1) // vnet.gso_size


cdef inline int partial_checksum_offset(const Packet *p) noexcept nogil:
    """Where the check field is (bytes into the transport header) if the checksum is partial; else 0."""
    cdef int transport = p.len - p.header, at = UDP_CHECKSUM, tcp_header
    cdef uint16_t field
    if not p.is_whole:
        return 0
    if p.protocol == PROTO_TCP:
        if transport < TCP_HEADER_MIN:
            return 0
        tcp_header = tcp_header_len(p.data + p.header)
        if tcp_header < TCP_HEADER_MIN or tcp_header > transport:
            return 0
        at = TCP_CHECKSUM
    elif p.protocol != PROTO_UDP or transport < UDP_HEADER:
        return 0
    memcpy(&field, p.data + p.header + at, 2)
    return at if field == pseudo_sum(p) else 0

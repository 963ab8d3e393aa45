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
from udptun.fastpath.icmp cimport answer_peer
from udptun.fastpath.loop cimport *
from udptun.fastpath.loops cimport is_for_our_socket
from udptun.fastpath.ring cimport is_asked_for, punt
from udptun.fastpath.segment cimport complete_checksum
from udptun.fastpath.vxlan cimport check_prefix
from udptun.fastpath.wire cimport *
from udptun.fastpath.stray cimport take_stray
from udptun.fastpath.write cimport write_items, write_segments


cdef inline void decap_message(Loop *w, int i, bint is_inherited) noexcept nogil:
    """Decap every datagram of message i; of an inherited one those that its first owner had not yet written."""
    cdef int length = <int>min(w.in_flight.message[i].msg_len, <uint32_t>PACKET_MAX)
    cdef uint8_t *train = w.in_flight.train[i]
    cdef int gro_size, tos, size, at = 0
    ut_read_control(&w.in_flight.message[i].msg_hdr, &gro_size, &tos)
    size = datagram_size(train, length, gro_size, w.prefix_len, is_inherited)
    while True:
        if not is_inherited or at + w.prefix_len >= length or train[at + w.prefix_len] != IS_WRITTEN:
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
    cdef int inner_len = length - prefix_len
    if gro_size <= 0 or gro_size >= length:
        return max(length, 1)
    if (inner_len >= IPV4_HEADER_MIN and ip_total_len(inner) == inner_len
            and (ip_version(inner) == 4 or is_inherited and inner[0] == IS_WRITTEN)):
        return length
    return gro_size


cdef inline void decap(Loop *w, int i, uint8_t *d, int length, int inner_size, int outer_ecn) noexcept nogil:
    """Check one datagram of message i, step its TTL and give it to the merger; or drop it, or punt it.

    `inner_size`: payload of the segments of a super-packet of UDP, bytes; 0 where the kernel tells none.  `outer_ecn`:
    the ECN field of the outer packet.
    """
    cdef Counters *c = w.counters
    cdef Counter *drop = NULL
    cdef Packet p
    cdef virtio_net_hdr vnet
    c.decap_packets += 1
    if w.prefix_len:
        drop = check_prefix(w.slot, c, d, length)
        d += w.prefix_len
        length -= w.prefix_len
    p.data = d
    p.len = length
    if drop == NULL:
        drop = check_header(c, &p)
    if drop == NULL:
        drop = check_source(w.slot, c, &p, &w.in_flight.source[i])
    if drop == NULL and (ip_destination(d) & w.slot.own_mask) != w.slot.own_subnet:
        drop = &c.decap_drop_foreign_destination
    if drop == NULL and is_for_our_socket(w.slot, &p):
        drop = &c.decap_drop_loop
    if drop == NULL and ip_ttl(d) <= 1:
        drop = &c.decap_drop_ttl
        answer_peer(w, &p, ICMP_TIME_EXCEEDED, 0)
    if drop == NULL:
        drop = take_mark(c, d, outer_ecn)
    if drop == NULL and ip_destination(d) == w.slot.tunnel_address and is_asked_for(w.slot, &p):
        punt(w, &p, &w.in_flight.source[i], False)
        return
    if drop == NULL:
        drop = offload_header(w.slot, c, &p, inner_size, &vnet)
    if drop != NULL:
        if drop == &c.decap_drop_unknown_peer or drop == &c.decap_drop_source_spoofed:
            if take_stray(w, &p, &w.in_flight.source[i], drop == &c.decap_drop_unknown_peer):
                return
        drop[0] += 1
        return
    ip_step_ttl(d)
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
        complete_checksum(p.data, p.len, vnet)
        vnet.flags = 0
    if is_full(w.merger):
        write_items(w)
        start_batch(w.merger)
    if vnet.flags:
        close_flow(w.merger, p.data, p.len)
        it = begin_item(w.merger, p.data, p.len, p.peer)
        memcpy(it.vnet, vnet, VNET)
    else:
        add_packet(w.merger, p.data, p.len, p.peer)


cdef inline Counter *check_header(Counters *c, Packet *p) noexcept nogil:
    """Rows 1 to 9: is this an IPv4 packet?  Cuts off the bytes after the total length."""
    cdef const uint8_t *d = p.data
    cdef int header, total, fragment, payload
    if p.len == 0:
        return &c.decap_drop_empty
    if p.len < IPV4_HEADER_MIN:
        return &c.decap_drop_short
    if ip_version(d) != 4:
        return &c.decap_drop_ipv6 if ip_version(d) == 6 else &c.decap_drop_version
    header = ip_header_len(d)
    if header < IPV4_HEADER_MIN or header > p.len:
        return &c.decap_drop_ihl
    total = ip_total_len(d)
    if total < header or total > p.len:
        return &c.decap_drop_length
    if ut_fold(ut_sum(d, header, 0)) != 0xffff:
        return &c.decap_drop_checksum
    if header > IPV4_HEADER_MIN and not options_acceptable(d, header):
        return &c.decap_drop_options
    fragment = ip_fragment_word(d)
    if fragment & (FLAG_MF | FRAGMENT_MASK):
        payload = total - header
        if (fragment & FRAGMENT_MASK) * 8 + payload > PACKET_MAX:
            return &c.decap_drop_fragment
        if fragment & FLAG_MF and (payload == 0 or payload & 7):
            return &c.decap_drop_fragment
    p.len = total
    return NULL


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
    cdef uint32_t inner = ip_source(p.data)
    cdef bint is_from_its_peer
    cdef ut_address outer
    p.peer = lookup(table, inner)
    is_from_its_peer = p.peer != 0 and is_at(table, p.peer, source)
    if not is_from_its_peer and table.source_check != UT_SOURCE_OFF:
        outer = address_of(source)
        if not is_remote(table, &outer):
            if not is_learned(table, p.peer, &outer, port_of(source)):
                return &c.decap_drop_unknown_peer
            is_from_its_peer = True
    if is_martian(inner):
        return &c.decap_drop_source_martian
    if (inner & table.own_mask) == table.own_subnet or is_local(table, inner):
        return &c.decap_drop_source_own
    if is_from_its_peer or table.source_check == UT_SOURCE_OFF:
        return NULL
    if (inner & table.network_mask) == table.network:
        return &c.decap_drop_source_spoofed
    if table.source_check == UT_SOURCE_STRICT:
        return &c.decap_drop_source_outside
    return NULL


cdef inline Counter *offload_header(
        const ut_slot *table, Counters *c, Packet *p, int inner_size, virtio_net_hdr *vnet) noexcept nogil:
    """Row 17, and the virtio header that the TUN write needs."""
    cdef uint8_t *d = p.data
    cdef int header = ip_header_len(d), transport = p.len - header, check, tcp_header, flags
    memset(vnet, 0, sizeof(virtio_net_hdr))
    check = partial_checksum_offset(p)
    if check:
        vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
        vnet.csum_start = <uint16_t>header
        vnet.csum_offset = <uint16_t>check
    if check and ip_protocol(d) == PROTO_UDP and 0 < inner_size < transport - UDP_HEADER:
        # These are several datagrams, however short together, and must not come out as one.
        if header + UDP_HEADER + inner_size > <int>table.mtu:
            return &c.decap_drop_oversize
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.hdr_len = <uint16_t>(header + UDP_HEADER)
        vnet.gso_size = <uint16_t>inner_size
    elif <uint32_t>p.len > table.mtu:
        if check == 0 or ip_protocol(d) == PROTO_UDP:
            return &c.decap_drop_oversize
        tcp_header = tcp_header_len(d + header)
        flags = d[header + TCP_FLAGS]
        if transport == tcp_header or flags & TCP_SYN_RST_URG or header + tcp_header >= <int>table.mtu:
            return &c.decap_drop_oversize
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        if flags & TCP_CWR:
            # A device that cannot keep the flag to the first segment leaves the cutting to the kernel.
            vnet.gso_type |= VIRTIO_NET_HDR_GSO_ECN
        vnet.hdr_len = <uint16_t>(header + tcp_header)
        vnet.gso_size = <uint16_t>(table.mtu - header - tcp_header)
    return NULL


cdef inline int partial_checksum_offset(const Packet *p) noexcept nogil:
    """Where the check field is (bytes into the transport header) if the checksum is partial; else 0."""
    cdef const uint8_t *d = p.data
    cdef int header = ip_header_len(d), transport = p.len - header, at, tcp_header
    cdef uint16_t field
    if ip_is_fragment(d):
        return 0
    if ip_protocol(d) == PROTO_TCP:
        if transport < TCP_HEADER_MIN:
            return 0
        tcp_header = tcp_header_len(d + header)
        if tcp_header < TCP_HEADER_MIN or tcp_header > transport:
            return 0
        at = TCP_CHECKSUM
    elif ip_protocol(d) == PROTO_UDP:
        if transport < UDP_HEADER:
            return 0
        at = UDP_CHECKSUM
    else:
        return 0
    memcpy(&field, d + header + at, 2)
    return at if field == pseudo_sum(d, transport) else 0

# cython: cdivision=True
"""Check a packet that came from the TUN, find its peer, step its TTL and queue its datagrams: the first stage to UDP.

    read        what one read of the TUN gave: a virtio header, then a packet, or a super-packet that stands for several
    n           packets on the wire that the read stands for; all counters count those

The conditions stand in the order of the table "Encap" in docs/wire-format.md; the first that applies decides.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from udptun.fastpath.ecn cimport outer_tos
from udptun.fastpath.flow cimport sender_for
from udptun.fastpath.icmp cimport NO_ROUTE, PEER_IS_DEAD, TOO_BIG, TTL_EXCEEDED, answer_local
from udptun.fastpath.loop cimport *
from udptun.fastpath.loops cimport is_of_the_tunnel
from udptun.fastpath.segment cimport *
from udptun.fastpath.send cimport GROUP_BYTES, group_limit, make_room, queue_datagram, send_alone, send_groups
from udptun.fastpath.trace cimport trace
from udptun.fastpath.vxlan cimport put_prefix
from udptun.fastpath.wire cimport *


cdef inline void encap(Loop *w, Packet *p, ut_read *tun_read) noexcept nogil:
    """Check one packet or super-packet, step its TTL and queue its datagrams for its peer; or drop and answer it.

    `p` has its data, and for its length what was read.
    """
    cdef virtio_net_hdr *vnet = <virtio_net_hdr *>tun_read.vnet
    cdef Counters *c = w.counters
    cdef Counter *drop
    cdef ut_traced *entry = NULL
    cdef SuperPacket s
    cdef int n = 1, longest
    memset(&s, 0, sizeof(s))
    drop = take_read(w, p, vnet, &s)
    if drop != NULL:
        drop_encap(w, drop, 1)
        if w.is_traced:
            p.peer = 0
            trace(w, UT_TRACE_ENCAP, p, 1, drop, NULL)
        return
    longest = p.len
    if s.n:
        n = s.n
        longest = min(p.len, s.header + s.size)
    make_room(w, n, n * (w.prefix_len + s.header))
    drop = check_way(w, p, longest)
    if w.is_traced and drop != in_fragments(w):
        entry = trace(w, UT_TRACE_ENCAP, p, n, &c.encap_sent if drop == NULL else drop, NULL)
    if drop != NULL:
        if drop == in_fragments(w):
            encap_in_fragments(w, p, tun_read, &s, longest)
        else:
            drop_and_answer(w, p, drop, n, entry)
        return
    c.encap_packets += n
    step_ttl(p)
    tun_read.is_stepped = 1
    if s.n:
        queue_segments(w, p, &s)
    else:
        queue_packet(w, p)


cdef inline void encap_in_fragments(
        Loop *w, Packet *p, ut_read *tun_read, SuperPacket *s, int longest) noexcept nogil:
    """The rest of `encap` for a packet, or a super-packet's segments, that is longer than the path to the peer takes.

    Each leaves by itself, and the outer packet may be fragmented on the way.  Rare.
    """
    cdef int i, payload, tos, n = max(s.n, 1)
    cdef ut_remote remote
    cdef Counter *drop
    cdef ut_traced *entry = NULL
    cdef Packet segment
    # What is queued goes first, so that nothing overtakes.  That may take a while, and the table may change.
    send_groups(w)
    drop = check_way(w, p, longest)
    if w.is_traced:
        entry = trace(w, UT_TRACE_ENCAP, p, n, &w.counters.encap_sent if drop == NULL else drop, NULL)
    if drop != NULL and drop != in_fragments(w):
        drop_and_answer(w, p, drop, n, entry)
        return
    w.counters.encap_packets += n
    step_ttl(p)
    tun_read.is_stepped = 1
    remote = remote_of(w.slot, p.peer)[0]
    tos = outer_tos(w, p)
    if s.n == 0:
        put_prefix(w, p.peer, p.data - w.prefix_len)
        send_alone(w, p, &remote, tos, p.data)
        return
    segment = p[0]
    segment.data = w.single + SINGLE_ROOM
    put_prefix(w, p.peer, segment.data - w.prefix_len)
    sum_headers(s)
    for i in range(s.n):
        payload = write_segment_header(s, i, segment.data)
        memcpy(segment.data + s.header, s.data + s.header + i * s.size, payload)
        segment.len = s.header + payload
        send_alone(w, &segment, &remote, tos, s.data + s.header + i * s.size)


cdef inline void drop_and_answer(Loop *w, Packet *p, Counter *drop, int n, ut_traced *entry) noexcept nogil:
    """`entry`: the packet's, or NULL."""
    cdef Counter n_answers = w.counters.icmp_sent
    drop_encap(w, drop, n)
    answer_sender(w, p, drop)
    if entry != NULL:
        entry.is_answered = w.counters.icmp_sent != n_answers


cdef inline Counter *take_read(Loop *w, Packet *p, virtio_net_hdr *vnet, SuperPacket *s) noexcept nogil:
    """Rows 1 to 3: is this a packet, or a super-packet whose measures `s` then has?  Completes its checksum.

    The counter to drop it under, or NULL.
    """
    cdef Counters *c = w.counters
    if p.len < IPV4_HEADER_MIN:
        return &c.encap_drop_short
    if ip_version(p.data) == 6:
        if not carries_ipv6(w.slot):
            return &c.encap_drop_ipv6
        if p.len < IPV6_HEADER:
            return &c.encap_drop_short
        if not take_ipv6_length(p):
            return &c.encap_drop_malformed
        read_ipv6_headers(p)
    else:
        if ip_version(p.data) != 4 or not carries_ipv4(w.slot) or not take_ipv4_length(p):
            return &c.encap_drop_malformed
        read_ipv4_header(p)
    if vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        measure_super_packet(s, p, vnet)
        if s.n == 0 or s.n > SEGMENTS or s.n * (w.prefix_len + s.header) > HEADERS_BYTES:
            return &c.encap_drop_malformed
    elif vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if not complete_checksum(p, vnet):
            return &c.encap_drop_malformed
        # A successor that finds the packet in flight must not complete it once more.
        vnet.flags = 0
    return NULL


cdef inline Counter *check_way(const Loop *w, Packet *p, int longest) noexcept nogil:
    """Rows 4 to 6, with loops and dead peers: which peer gets the packet, and may it?  Sets p.peer.

    `longest`: of the packets that it stands for, bytes.  The counter to drop it under, NULL, or `in_fragments`.
    """
    cdef Counters *c = w.counters
    p.peer = leasing(w.slot, p, destination_of(p))
    if is_of_the_tunnel(w.slot, p):
        return &c.encap_drop_loop
    if p.peer == 0:
        return &c.encap_drop_no_route
    if w.slot.peers[p.peer].flags & UT_PEER_DEAD and not is_back(w, p.peer):
        return &c.encap_drop_dead
    if ttl_of(p) <= 1:
        return &c.encap_drop_ttl
    if <uint32_t>longest > w.slot.peers[p.peer].mtu:
        return in_fragments(w) if may_be_fragmented(p, longest) else &c.encap_drop_too_big
    return NULL


cdef inline Counter *in_fragments(const Loop *w) noexcept nogil:
    """What `check_way` says of a packet that is not dropped although it is longer than the path takes: it may be
    fragmented.  So it ends in this counter.
    """
    return &w.counters.encap_sent


cdef inline void answer_sender(Loop *w, Packet *p, const Counter *drop) noexcept nogil:
    """Tell the sender why the packet was dropped by `check_way`.  About loops nobody is told."""
    cdef Counters *c = w.counters
    if drop == &c.encap_drop_no_route:
        answer_local(w, p, NO_ROUTE, 0)
    elif drop == &c.encap_drop_dead:
        answer_local(w, p, PEER_IS_DEAD, 0)
    elif drop == &c.encap_drop_ttl:
        answer_local(w, p, TTL_EXCEEDED, 0)
    elif drop == &c.encap_drop_too_big:
        answer_local(w, p, TOO_BIG, least_mtu(p, w.slot.peers[p.peer].mtu))


cdef inline bint is_back(const Loop *w, uint32_t peer) noexcept nogil:
    """Whether any worker has received something from the peer since it was found dead.

    The control plane learns of it later.  Until then what is sent to the peer costs a look at the counters.
    """
    cdef uint64_t received = 0
    cdef int i
    for i in range(<int>UT_MAX_WORKERS):
        # A worker that never ran has counted nothing, and its memory costs nothing until it is looked at.
        if w.stats.worker[i].turns:
            received += w.stats.peer[i][peer].decap_packets
    return received != w.slot.peers[peer].received


cdef inline void drop_encap(Loop *w, Counter *reason, int n) noexcept nogil:
    w.counters.encap_packets += n
    reason[0] += n


cdef inline void queue_packet(Loop *w, Packet *p) noexcept nogil:
    """Queue a packet as it is, with its prefix before it."""
    cdef uint8_t *datagram = p.data - w.prefix_len
    put_prefix(w, p.peer, datagram)
    queue_datagram(
        w, sender_for(w, p), p.peer, outer_tos(w, p), NULL, 0, datagram, w.prefix_len + p.len, group_limit(w, p.peer))


cdef inline void queue_segments(Loop *w, Packet *p, SuperPacket *s) noexcept nogil:
    """Queue a super-packet's segments, spread evenly over as few messages as hold them."""
    cdef int i, payload, most, n_messages, fd = sender_for(w, p), tos = outer_tos(w, p)
    cdef uint8_t *out
    most = max(1, min(group_limit(w, p.peer), GROUP_BYTES // (w.prefix_len + s.header + s.size)))
    n_messages = (s.n + most - 1) // most
    most = (s.n + n_messages - 1) // n_messages
    sum_headers(s)
    for i in range(s.n):
        out = w.headers + w.n_header_bytes
        w.n_header_bytes += w.prefix_len + s.header
        put_prefix(w, p.peer, out)
        payload = write_segment_header(s, i, out + w.prefix_len)
        queue_datagram(
            w, fd, p.peer, tos, out, w.prefix_len + s.header, <uint8_t *>s.data + s.header + i * s.size, payload, most)

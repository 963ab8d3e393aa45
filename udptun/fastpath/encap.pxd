# cython: cdivision=True
"""Check a packet that came from the TUN, find its peer, step its TTL and queue its datagrams: the first stage to UDP.

    read        what one read of the TUN gave: a virtio header, then a packet, or a super-packet that stands for several
    n           packets on the wire that the read stands for; all counters count those

The conditions stand in the order of the table "Encap" in docs/wire-format.md; the first that applies decides.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from udptun.fastpath.ecn cimport outer_tos
from udptun.fastpath.flow cimport sender_for
from udptun.fastpath.icmp cimport answer_local
from udptun.fastpath.loop cimport *
from udptun.fastpath.loops cimport is_of_the_tunnel
from udptun.fastpath.segment cimport *
from udptun.fastpath.send cimport GROUP_BYTES, group_limit, make_room, queue_datagram
from udptun.fastpath.vxlan cimport put_prefix
from udptun.fastpath.wire cimport *


cdef inline void encap(Loop *w, Packet *p, ut_read *tun_read) noexcept nogil:
    """Check one packet or super-packet, step its TTL and queue its datagrams for its peer; or drop and answer it.

    `p` has its data, and for its length what was read.
    """
    cdef uint8_t *d = p.data
    cdef virtio_net_hdr *vnet = <virtio_net_hdr *>tun_read.vnet
    cdef Counters *c = w.counters
    cdef int length = p.len, header, total, longest, n = 1
    cdef SuperPacket s
    memset(&s, 0, sizeof(s))
    if length < IPV4_HEADER_MIN:
        drop_encap(w, &c.encap_drop_short, 1)
        return
    if ip_version(d) != 4:
        drop_encap(w, &c.encap_drop_ipv6 if ip_version(d) == 6 else &c.encap_drop_malformed, 1)
        return
    header = ip_header_len(d)
    total = ip_total_len(d)
    if header < IPV4_HEADER_MIN or total < header or total > length:
        drop_encap(w, &c.encap_drop_malformed, 1)
        return
    p.len = longest = total
    if vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        n = measure_super_packet(&s, d, total, vnet)
        if n == 0 or n > SEGMENTS:
            drop_encap(w, &c.encap_drop_malformed, 1)
            return
        longest = min(total, s.header + s.size)
    elif vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if not complete_checksum(d, total, vnet):
            drop_encap(w, &c.encap_drop_malformed, 1)
            return
        # A successor that finds the packet in flight must not complete it once more.
        vnet.flags = 0
    make_room(w, n)
    p.peer = lookup(w.slot, ip_destination(d))
    if is_of_the_tunnel(w.slot, p):
        drop_encap(w, &c.encap_drop_loop, n)
        return
    if p.peer == 0:
        drop_encap(w, &c.encap_drop_no_route, n)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_NET_UNREACHABLE, 0)
        return
    if w.slot.peers[p.peer].flags & UT_PEER_DEAD and not is_back(w, p.peer):
        drop_encap(w, &c.encap_drop_dead, n)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_HOST_UNREACHABLE, 0)
        return
    if ip_ttl(d) <= 1:
        drop_encap(w, &c.encap_drop_ttl, n)
        answer_local(w, p, ICMP_TIME_EXCEEDED, 0, 0)
        return
    if <uint32_t>longest > w.slot.peers[p.peer].mtu and ip_fragment_word(d) & FLAG_DF:
        drop_encap(w, &c.encap_drop_too_big, n)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, w.slot.peers[p.peer].mtu)
        return
    c.encap_packets += n
    ip_step_ttl(d)
    tun_read.is_stepped = 1
    if vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE:
        queue_packet(w, p)
    else:
        queue_segments(w, p.peer, &s)


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
        w, sender_for(w, p.peer, p.data, p.len), p.peer, outer_tos(w, p.peer, p.data), NULL, 0, datagram,
        w.prefix_len + p.len, group_limit(w, p.peer))


cdef inline void queue_segments(Loop *w, uint32_t peer, SuperPacket *s) noexcept nogil:
    """Queue a super-packet's segments, spread evenly over as few messages as hold them."""
    cdef int i, payload, most, n_messages, fd = sender_for(w, peer, s.data, s.header + s.payload)
    cdef int tos = outer_tos(w, peer, s.data)
    cdef uint8_t *out
    most = max(1, min(group_limit(w, peer), GROUP_BYTES // (w.prefix_len + s.header + s.size)))
    n_messages = (s.n + most - 1) // most
    most = (s.n + n_messages - 1) // n_messages
    sum_headers(s)
    for i in range(s.n):
        out = w.headers + w.n_headers * HEADER_ROOM
        w.n_headers += 1
        put_prefix(w, peer, out)
        payload = write_segment_header(s, i, out + w.prefix_len)
        queue_datagram(
            w, fd, peer, tos, out, w.prefix_len + s.header, <uint8_t *>s.data + s.header + i * s.size, payload, most)

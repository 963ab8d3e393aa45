"""Write the merger's items into the TUN: the last stage on the way from UDP.

    item        what one write carries: a packet as it came, or packets of one flow as one super-packet (coalesce.pxd)
    written     said by a mark in a packet's first byte, for the successor of a killed process: it writes the others

Every packet ends in a counter: decap_delivered or decap_drop_tun.
"""

from libc.errno cimport EBADFD, EINVAL, errno
from libc.stdint cimport uint8_t
from libc.string cimport memset

from udptun.fastpath.coalesce cimport VNET, Item, seal, start_batch
from udptun.fastpath.loop cimport *
from udptun.fastpath.segment cimport SuperPacket, measure_super_packet, sum_headers, write_segment_header
from udptun.fastpath.trace cimport drop_late
from udptun.fastpath.wire cimport PROTO_TCP


cdef inline void write_items(Loop *w) noexcept nogil:
    """Write all items, in order."""
    cdef int i, n_writes = 0, nbytes = 0
    cdef Item *it
    for i in range(w.merger.n):
        it = &w.merger.item[i]
        if writev(w.tun_fd, it.iov, seal(it, w.vnet_len)) >= 0:
            n_writes += 1
            nbytes += count_delivered(
                w, it.peer, it.n, it.first_len if it.n == 1 else it.n * it.header_len + it.payload)
        elif it.n > 1 and errno == EINVAL:
            # The kernel does not take super-packets of this kind (some 6.6 kernels): write one by one from now on.
            refuse(w, UT_OFFLOAD_WRITE_TCP if it.protocol == PROTO_TCP else UT_OFFLOAD_WRITE_UDP)
            write_one_by_one(w, it)
        else:
            if errno == EBADFD:
                w.tun_lost = 1
            w.counters.decap_drop_tun += it.n
            if w.is_traced:
                trace_refused_item(w, it)
        mark_item_written(it)
    count_writes(w, n_writes, nbytes)


cdef inline int count_delivered(Loop *w, uint32_t peer, int n, int nbytes) noexcept nogil:
    """Count `n` packets of `nbytes` in all that the peer has sent.  Returns `nbytes`."""
    w.counters.decap_delivered += n
    w.peer_stats[peer].decap_packets += n
    w.peer_stats[peer].decap_bytes += nbytes
    return nbytes


cdef inline void count_writes(Loop *w, int n, int nbytes) noexcept nogil:
    """Count so many writes that the TUN has taken, with `nbytes` of packets."""
    w.counters.tun_writes += n
    w.counters.tun_written_bytes += nbytes


cdef inline void mark_item_written(Item *it) noexcept nogil:
    """Mark each packet of the item, so that a successor does not write it once more."""
    cdef int k
    mark_written(it.first)
    for k in range(1, it.n):
        mark_written(packet_in(it, k))


cdef inline void trace_refused_item(Loop *w, const Item *it) noexcept nogil:
    cdef int k
    trace_refused(w, it.peer, it.first, it.first_len)
    for k in range(1, it.n):
        trace_refused(w, it.peer, packet_in(it, k), <int>it.iov[2 + k].iov_len + it.header_len)


cdef inline void trace_refused(Loop *w, uint32_t peer, uint8_t *d, int length) noexcept nogil:
    """Show that the device has refused a packet of the peer's."""
    cdef Packet p
    p.data = d
    p.len = length
    p.peer = peer
    drop_late(w, UT_TRACE_DECAP, &p, d, &w.counters.decap_drop_tun)


cdef inline uint8_t *packet_in(const Item *it, int k) noexcept nogil:
    """Packet k of an item of several: each still stands before its payload."""
    return <uint8_t *>it.iov[2 + k].iov_base - it.header_len


cdef inline void write_one_by_one(Loop *w, Item *it) noexcept nogil:
    """Write the packets of a super-packet that the kernel refused."""
    cdef int k, length
    cdef iovec piece[2]
    memset(it.vnet, 0, VNET)
    piece[0].iov_base = it.vnet
    piece[0].iov_len = VNET
    for k in range(it.n):
        length = <int>it.iov[2 + k].iov_len + it.header_len
        piece[1].iov_base = packet_in(it, k)
        piece[1].iov_len = length
        if writev(w.tun_fd, piece, 2) < 0:
            w.counters.decap_drop_tun += 1
            if w.is_traced:
                trace_refused(w, it.peer, packet_in(it, k), length)
        else:
            count_writes(w, 1, count_delivered(w, it.peer, 1, length))


cdef inline void write_segments(Loop *w, Packet *p, const virtio_net_hdr *vnet) noexcept nogil:
    """Cut up a super-packet that arrived whole, for a device that takes no virtio header.  Rare."""
    cdef SuperPacket s
    cdef iovec piece[2]
    cdef int i
    cdef bint is_taken = True
    # What was received earlier is written earlier.
    write_items(w)
    start_batch(w.merger)
    measure_super_packet(&s, p, vnet)
    sum_headers(&s)
    piece[0].iov_base = w.cut_header
    piece[0].iov_len = s.header
    for i in range(s.n):
        piece[1].iov_len = write_segment_header(&s, i, w.cut_header)
        piece[1].iov_base = p.data + s.header + i * s.size
        is_taken &= writev(w.tun_fd, piece, 2) >= 0
    if is_taken:
        count_writes(w, s.n, count_delivered(w, p.peer, 1, p.len))
    else:
        w.counters.decap_drop_tun += 1
        if w.is_traced:
            trace_refused(w, p.peer, p.data, p.len)
    mark_written(p.data)

# cython: cdivision=True
"""Put packets of one flow together again, so that the TUN takes them in one write.

    item        what one write to the TUN carries: a packet as it came, or several of one TCP or UDP flow as one
                super-packet that the kernel treats as if a network card had merged them
    open item   the last item of a flow, while the next packet of the flow may still join it

What joins must be what the kernel would give back when it cuts the super-packet up: same IP header but for length and
id, same TCP header but for sequence number, checksum and PSH, payloads in sequence and all of one size but the last.
Checksums are verified before anything is merged: the kernel computes them anew and would launder a corrupted
packet.  Items are written in the order in which they began, once a batch; nothing waits for a timer, and within a flow
nothing overtakes.

Payload is never copied, packets are not changed: an item's own header is written beside it, so that the packets can
still go one by one when the kernel refuses the super-packet.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from udptun.fastpath.segment cimport *
from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    ITEMS = 128                   # writes a batch
    OPEN_FLOWS = 16               # open items looked through for each packet
    ITEM_PACKETS = 64             # the kernel takes 128 of UDP since 6.9, 64 before
    VNET = 10                     # sizeof(struct virtio_net_hdr), as TUNSETVNETHDRSZ sets it
    TCP_ACK = 0x10

cdef struct Item:
    uint8_t vnet[VNET]
    uint8_t header[SEGMENT_HEADER_MAX]   # the super-packet's; in use from the second packet on
    uint8_t *first                # the first packet, borrowed from the receive buffers
    int first_len
    int header_len                # IP and transport, bytes
    int size                      # payload of the first packet
    int payload                   # of all together
    int n                         # packets
    uint32_t peer                 # who sent the first; of one flow all are the same peer's
    uint32_t next_sequence        # TCP: what the next packet must begin with
    bint is_verified              # the first packet's checksum has been looked at and is right
    bint has_push                 # a packet with PSH has joined: the last
    iovec iov[ITEM_PACKETS + 2]   # virtio header, header, payloads

cdef struct Merger:
    int n                         # items begun
    int open[OPEN_FLOWS]          # their numbers; -1: free
    int oldest                    # slot of `open` to give up next
    bint tcp, udp                 # whether the kernel takes super-packets of the kind
    Item item[ITEMS]


cdef inline void start_batch(Merger *m) noexcept nogil:
    m.n = 0
    memset(m.open, 0xff, sizeof(m.open))
    m.oldest = 0


cdef inline bint is_full(const Merger *m) noexcept nogil:
    return m.n == ITEMS


cdef inline bint transport_checksum_holds(const uint8_t *d, int total) noexcept nogil:
    cdef int header = ip_header_len(d)
    return ut_fold(ut_sum(d + header, total - header, pseudo_sum(d, total - header))) == 0xffff


cdef inline int mergeable_header(const Merger *m, const uint8_t *d, int total) noexcept nogil:
    """Length of the headers of a packet that may be merged with others; 0 of any other."""
    cdef int header
    if d[0] != 0x45 or ip_is_fragment(d):
        return 0
    if ip_protocol(d) == PROTO_TCP:
        if not m.tcp or total < IPV4_HEADER_MIN + TCP_HEADER_MIN:
            return 0
        header = IPV4_HEADER_MIN + (d[IPV4_HEADER_MIN + 12] >> 4) * 4
        # SYN, FIN, RST, URG, ECE and CWR each mean something where they stand.
        if header < IPV4_HEADER_MIN + TCP_HEADER_MIN or (d[IPV4_HEADER_MIN + 13] & ~TCP_PSH & 0xff) != TCP_ACK:
            return 0
    elif ip_protocol(d) == PROTO_UDP:
        header = IPV4_HEADER_MIN + UDP_HEADER
        # A zero checksum would be replaced by a real one.
        if not m.udp or total < header or load_be16(d + IPV4_HEADER_MIN + 6) == 0:
            return 0
        if load_be16(d + IPV4_HEADER_MIN + 4) != total - IPV4_HEADER_MIN:
            return 0
    else:
        return 0
    return header if total > header else 0


cdef inline bint may_join(const Item *it, const uint8_t *d, int total, int header) noexcept nogil:
    """Whether the packet is what follows in the item's super-packet; the flow is the same already."""
    cdef const uint8_t *head = it.first
    cdef const uint8_t *a = head + IPV4_HEADER_MIN
    cdef const uint8_t *b = d + IPV4_HEADER_MIN
    cdef int payload = total - header
    if it.n == ITEM_PACKETS or header != it.header_len or payload > it.size or it.has_push:
        return False
    if it.payload != it.n * it.size or it.header_len + it.payload + payload > 65535:
        return False
    # TOS with ECN; flags; TTL (all have been stepped alike).
    if d[1] != head[1] or load_be16(d + 6) != load_be16(head + 6) or d[8] != head[8]:
        return False
    # With DF the id means nothing (RFC 6864); without, the kernel must give the same ids again.
    if not load_be16(d + 6) & FLAG_DF and load_be16(d + 4) != ((load_be16(head + 4) + it.n) & 0xffff):
        return False
    if ip_protocol(d) == PROTO_UDP:
        return True
    return (
        load_be32(b + 4) == it.next_sequence
        and memcmp(a + 8, b + 8, 4) == 0       # acknowledgement
        and a[12] == b[12]
        and memcmp(a + 14, b + 14, 2) == 0     # window
        and memcmp(a + 18, b + 18, header - IPV4_HEADER_MIN - 18) == 0   # urgent pointer and options
    )


cdef inline int find_open(const Merger *m, const uint8_t *d) noexcept nogil:
    """Slot of `open` that has the packet's flow; -1: none.  Only of packets that have ports."""
    cdef int k
    cdef const uint8_t *head
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0:
            head = m.item[m.open[k]].first
            if memcmp(head + 12, d + 12, 8) == 0 and head[9] == d[9] and memcmp(
                    head + IPV4_HEADER_MIN, d + IPV4_HEADER_MIN, 4) == 0:
                return k
    return -1


cdef inline void close_flow(Merger *m, const uint8_t *d, int total) noexcept nogil:
    """A packet that cannot be merged: what follows in its flow must not overtake it by joining an earlier item."""
    cdef int k
    if d[0] == 0x45 and not ip_is_fragment(d) and total >= IPV4_HEADER_MIN + 4:
        k = find_open(m, d)
        if k >= 0:
            m.open[k] = -1
        return
    # Without ports where they are looked for: all flows between the two addresses.
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0 and memcmp(m.item[m.open[k]].first + 12, d + 12, 8) == 0:
            m.open[k] = -1


cdef inline Item *begin_item(Merger *m, uint8_t *d, int total, uint32_t peer) noexcept nogil:
    """A new item with this packet in it; there is room (`is_full`)."""
    cdef Item *it = &m.item[m.n]
    m.n += 1
    memset(it.vnet, 0, VNET)
    it.first = d
    it.first_len = total
    it.n = 1
    it.peer = peer
    return it


cdef inline void add_packet(Merger *m, uint8_t *d, int total, uint32_t peer) noexcept nogil:
    """Join the packet to its flow's open item, or begin one."""
    cdef int header = mergeable_header(m, d, total), k
    cdef Item *it
    if header == 0:
        close_flow(m, d, total)
        begin_item(m, d, total, peer)
        return
    k = find_open(m, d)
    if k >= 0:
        it = &m.item[m.open[k]]
        if may_join(it, d, total, header):
            if not it.is_verified:
                it.is_verified = transport_checksum_holds(it.first, it.first_len)
            if it.is_verified and transport_checksum_holds(d, total):
                join(it, d, total, header)
                return
    else:
        k = m.oldest
        m.oldest = (m.oldest + 1) % OPEN_FLOWS
    m.open[k] = m.n
    it = begin_item(m, d, total, peer)
    it.is_verified = False
    it.header_len = header
    it.size = total - header
    it.payload = it.size
    it.has_push = False
    if ip_protocol(d) == PROTO_TCP:
        it.next_sequence = load_be32(d + IPV4_HEADER_MIN + 4) + <uint32_t>it.size
        it.has_push = (d[IPV4_HEADER_MIN + 13] & TCP_PSH) != 0
    it.iov[2].iov_base = d + header
    it.iov[2].iov_len = it.size


cdef inline void join(Item *it, uint8_t *d, int total, int header) noexcept nogil:
    it.iov[2 + it.n].iov_base = d + header
    it.iov[2 + it.n].iov_len = total - header
    it.n += 1
    it.payload += total - header
    it.next_sequence += <uint32_t>(total - header)
    if ip_protocol(d) == PROTO_TCP and d[IPV4_HEADER_MIN + 13] & TCP_PSH:
        it.has_push = True


cdef inline int seal(Item *it, int vnet_len) noexcept nogil:
    """Write the item's virtio header and, for a super-packet, its own header; return how many of it.iov to write.

    `vnet_len` 0: the device takes no virtio header, and the item is a single packet.
    """
    cdef uint8_t *h = it.header
    cdef uint8_t *t = h + IPV4_HEADER_MIN
    cdef virtio_net_hdr vnet
    it.iov[0].iov_base = it.vnet
    it.iov[0].iov_len = vnet_len
    if it.n == 1:
        it.iov[1].iov_base = it.first
        it.iov[1].iov_len = it.first_len
        return 2
    memcpy(h, it.first, it.header_len)
    store_be16(h + 2, it.header_len + it.payload)
    store_be16(h + 10, 0)
    store_memory16(h + 10, ~ut_fold(ut_sum(h, IPV4_HEADER_MIN, 0)))
    memset(&vnet, 0, sizeof(vnet))
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    vnet.hdr_len = <uint16_t>it.header_len
    vnet.gso_size = <uint16_t>it.size
    vnet.csum_start = IPV4_HEADER_MIN
    if ip_protocol(h) == PROTO_TCP:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        vnet.csum_offset = 16
        if it.has_push:
            t[13] |= TCP_PSH
    else:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.csum_offset = 6
        store_be16(t + 4, UDP_HEADER + it.payload)
    store_memory16(t + vnet.csum_offset, pseudo_sum(h, it.header_len - IPV4_HEADER_MIN + it.payload))
    memcpy(it.vnet, &vnet, VNET)
    it.iov[1].iov_base = h
    it.iov[1].iov_len = it.header_len
    return 2 + it.n

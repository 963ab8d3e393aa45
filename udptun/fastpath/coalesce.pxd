# cython: cdivision=True
"""Put packets of one flow together again, so that the TUN takes them in one write.

    flow        addresses, protocol and ports of a packet
    item        what one write to the TUN carries: a packet as it came, or several of one TCP or UDP flow as one
                super-packet that the kernel treats as if a network card had merged them
    open item   the last item of a flow, while the next packet of the flow may still join it
    merger      the items of one batch, and which of them are open

Packets join only if the kernel gives the same packets back when it cuts the super-packet up: same IP header except for
length and id, same TCP header except for sequence number, checksum and PSH, payloads in sequence and all of one size
except the last.  Checksums are verified before anything is merged: the kernel computes them anew and would hide a
corrupted packet.  Items are written in the order in which they began, once a batch; nothing waits for a timer, and
within a flow nothing overtakes.

Payload is never copied and packets are not changed: an item's own header is written beside it.  So the packets can
still go one by one when the kernel refuses the super-packet.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from udptun.fastpath.segment cimport SEGMENT_HEADER_MAX
from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    ITEMS = 128                   # writes a batch
    OPEN_FLOWS = 16               # open items looked through for each packet
    ITEM_PACKETS = 64             # the kernel takes 128 of UDP since 6.9, 64 before
    VNET = 10                     # sizeof(struct virtio_net_hdr), as TUNSETVNETHDRSZ sets it

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
        header = IPV4_HEADER_MIN + tcp_header_len(d + IPV4_HEADER_MIN)
        # SYN, FIN, RST, URG, ECE and CWR each mean something where they stand.
        if header < IPV4_HEADER_MIN + TCP_HEADER_MIN or (d[IPV4_HEADER_MIN + TCP_FLAGS] & ~TCP_PSH & 0xff) != TCP_ACK:
            return 0
    elif ip_protocol(d) == PROTO_UDP:
        header = IPV4_HEADER_MIN + UDP_HEADER
        # The kernel would replace a zero checksum with a real one.
        if not m.udp or total < header or load_be16(d + IPV4_HEADER_MIN + UDP_CHECKSUM) == 0:
            return 0
        if load_be16(d + IPV4_HEADER_MIN + UDP_LENGTH) != total - IPV4_HEADER_MIN:
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
    # The TTLs have been stepped alike.
    if d[IP_TOS] != head[IP_TOS] or ip_fragment_word(d) != ip_fragment_word(head) or ip_ttl(d) != ip_ttl(head):
        return False
    # With DF the id means nothing (RFC 6864).  Without it the kernel must give the same ids again.
    if not ip_fragment_word(d) & FLAG_DF and load_be16(d + IP_ID) != ((load_be16(head + IP_ID) + it.n) & 0xffff):
        return False
    if ip_protocol(d) == PROTO_UDP:
        return True
    return (
        load_be32(b + TCP_SEQUENCE) == it.next_sequence
        and memcmp(a + TCP_ACKNOWLEDGEMENT, b + TCP_ACKNOWLEDGEMENT, 4) == 0
        and a[TCP_DATA_OFFSET] == b[TCP_DATA_OFFSET]
        and memcmp(a + TCP_WINDOW, b + TCP_WINDOW, 2) == 0
        # The urgent pointer and the options.
        and memcmp(a + TCP_URGENT, b + TCP_URGENT, header - IPV4_HEADER_MIN - TCP_URGENT) == 0
    )


cdef inline int find_open(const Merger *m, const uint8_t *d) noexcept nogil:
    """Slot of `open` that has the packet's flow; -1: none.  Only of packets that have ports."""
    cdef int k
    cdef const uint8_t *head
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0:
            head = m.item[m.open[k]].first
            if (memcmp(head + IP_SOURCE, d + IP_SOURCE, 8) == 0 and ip_protocol(head) == ip_protocol(d)
                    and memcmp(head + IPV4_HEADER_MIN, d + IPV4_HEADER_MIN, 4) == 0):
                return k
    return -1


cdef inline void close_flow(Merger *m, const uint8_t *d, int total) noexcept nogil:
    """Close the flow of a packet that cannot be merged: what follows must not overtake it in an earlier item."""
    cdef int k
    if d[0] == 0x45 and not ip_is_fragment(d) and total >= IPV4_HEADER_MIN + 4:
        k = find_open(m, d)
        if k >= 0:
            m.open[k] = -1
        return
    # A packet without ports where they are looked for may belong to any flow between the two addresses.
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0 and memcmp(m.item[m.open[k]].first + IP_SOURCE, d + IP_SOURCE, 8) == 0:
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
        it.next_sequence = load_be32(d + IPV4_HEADER_MIN + TCP_SEQUENCE) + <uint32_t>it.size
        it.has_push = (d[IPV4_HEADER_MIN + TCP_FLAGS] & TCP_PSH) != 0
    it.iov[2].iov_base = d + header
    it.iov[2].iov_len = it.size


cdef inline void join(Item *it, uint8_t *d, int total, int header) noexcept nogil:
    it.iov[2 + it.n].iov_base = d + header
    it.iov[2 + it.n].iov_len = total - header
    it.n += 1
    it.payload += total - header
    it.next_sequence += <uint32_t>(total - header)
    if ip_protocol(d) == PROTO_TCP and d[IPV4_HEADER_MIN + TCP_FLAGS] & TCP_PSH:
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
    store_be16(h + IP_TOTAL_LEN, it.header_len + it.payload)
    store_be16(h + IP_CHECKSUM, 0)
    store_memory16(h + IP_CHECKSUM, ~ut_fold(ut_sum(h, IPV4_HEADER_MIN, 0)))
    memset(&vnet, 0, sizeof(vnet))
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    vnet.hdr_len = <uint16_t>it.header_len
    vnet.gso_size = <uint16_t>it.size
    vnet.csum_start = IPV4_HEADER_MIN
    if ip_protocol(h) == PROTO_TCP:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        vnet.csum_offset = TCP_CHECKSUM
        if it.has_push:
            t[TCP_FLAGS] |= TCP_PSH
    else:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.csum_offset = UDP_CHECKSUM
        store_be16(t + UDP_LENGTH, UDP_HEADER + it.payload)
    store_memory16(t + vnet.csum_offset, pseudo_sum(h, it.header_len - IPV4_HEADER_MIN + it.payload))
    memcpy(it.vnet, &vnet, VNET)
    it.iov[1].iov_base = h
    it.iov[1].iov_len = it.header_len
    return 2 + it.n

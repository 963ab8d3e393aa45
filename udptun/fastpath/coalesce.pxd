# cython: cdivision=True
"""Put packets of one flow together again, so that the TUN takes them in one write.

    flow        addresses, protocol and ports of a packet
    item        what one write to the TUN carries: a packet as it came, or several of one TCP or UDP flow as one
                super-packet that the kernel treats as if a network card had merged them
    open item   the last item of a flow, while the next packet of the flow may still join it
    merger      the items of one batch, and which of them are open

Packets join only if the kernel gives the same packets back when it cuts the super-packet up: same IP header except for
length and id, without extension headers, same TCP header except for sequence number, checksum and PSH, payloads in
sequence and all of one size except the last.  Checksums are verified before anything is merged: the kernel computes
them anew and would hide a corrupted packet.  Items are written in the order in which they began, once a batch; nothing
waits for a timer, and within a flow nothing overtakes.

Payload is never copied and packets are not changed: an item's own header is written beside it.  So the packets can
still go one by one when the kernel refuses the super-packet.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from udptun.fastpath.packet cimport *
from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    ITEMS = 128                   # writes a batch
    OPEN_FLOWS = 16               # open items looked through for each packet
    ITEM_PACKETS = 64             # the kernel takes 128 of UDP since 6.9, 64 before
    MERGED_HEADER_MAX = 100       # IPv6 40 and TCP 60
    VNET = 10                     # sizeof(struct virtio_net_hdr), as TUNSETVNETHDRSZ sets it

cdef struct Item:
    uint8_t vnet[VNET]
    uint8_t header[MERGED_HEADER_MAX]    # the super-packet's; in use from the second packet on
    uint8_t *first                # the first packet, borrowed from the receive buffers
    int first_len
    bint is_ipv6
    int protocol                  # of the transport header
    int ip_header                 # bytes, of what may be merged without options and extension headers
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


cdef inline bint has_plain_header(const Packet *p) noexcept nogil:
    """Whether there are neither options nor extension headers."""
    return p.header == (IPV6_HEADER if p.is_ipv6 else IPV4_HEADER_MIN)


cdef inline int mergeable_header(const Merger *m, const Packet *p) noexcept nogil:
    """Length of the headers of a packet that may be merged with others; 0 of any other."""
    cdef const uint8_t *transport = p.data + p.header
    cdef int header
    if not p.is_whole or not has_plain_header(p):
        return 0
    if p.protocol == PROTO_TCP:
        if not m.tcp or p.len < p.header + TCP_HEADER_MIN:
            return 0
        header = p.header + tcp_header_len(transport)
        # SYN, FIN, RST, URG, ECE and CWR each mean something where they stand.
        if header < p.header + TCP_HEADER_MIN or (transport[TCP_FLAGS] & ~TCP_PSH & 0xff) != TCP_ACK:
            return 0
    elif p.protocol == PROTO_UDP:
        header = p.header + UDP_HEADER
        # The kernel would replace a zero checksum with a real one.
        if not m.udp or p.len < header or load_be16(transport + UDP_CHECKSUM) == 0:
            return 0
        if load_be16(transport + UDP_LENGTH) != p.len - p.header:
            return 0
    else:
        return 0
    return header if p.len > header else 0


cdef inline bint may_join(const Item *it, const Packet *p, int header) noexcept nogil:
    """Whether the packet is what follows in the item's super-packet; the flow is the same already."""
    cdef const uint8_t *a = it.first + it.ip_header
    cdef const uint8_t *b = p.data + p.header
    cdef int payload = p.len - header
    if it.n == ITEM_PACKETS or header != it.header_len or payload > it.size or it.has_push:
        return False
    if it.payload != it.n * it.size or it.header_len + it.payload + payload > 65535:
        return False
    if not has_same_ip_fields(it, p):
        return False
    if p.protocol == PROTO_UDP:
        return True
    return (
        load_be32(b + TCP_SEQUENCE) == it.next_sequence
        and memcmp(a + TCP_ACKNOWLEDGEMENT, b + TCP_ACKNOWLEDGEMENT, 4) == 0
        and a[TCP_DATA_OFFSET] == b[TCP_DATA_OFFSET]
        and memcmp(a + TCP_WINDOW, b + TCP_WINDOW, 2) == 0
        # The urgent pointer and the options.
        and memcmp(a + TCP_URGENT, b + TCP_URGENT, header - p.header - TCP_URGENT) == 0
    )


cdef inline bint has_same_ip_fields(const Item *it, const Packet *p) noexcept nogil:
    """Whether the fields that must be equal, or follow each other, are so.  The TTLs have been stepped alike."""
    cdef const uint8_t *head = it.first
    cdef const uint8_t *d = p.data
    if p.is_ipv6:
        # Traffic class and flow label; the next header is part of the flow.
        return memcmp(d, head, 4) == 0 and d[IPV6_HOP_LIMIT] == head[IPV6_HOP_LIMIT]
    if d[IP_TOS] != head[IP_TOS] or ip_fragment_word(d) != ip_fragment_word(head) or ip_ttl(d) != ip_ttl(head):
        return False
    # With DF the id means nothing (RFC 6864).  Without it the kernel must give the same ids again.
    return ip_fragment_word(d) & FLAG_DF or load_be16(d + IP_ID) == ((load_be16(head + IP_ID) + it.n) & 0xffff)


cdef inline bint has_same_addresses(const Item *it, const Packet *p) noexcept nogil:
    if it.is_ipv6 != p.is_ipv6:
        return False
    if p.is_ipv6:
        return memcmp(it.first + IPV6_SOURCE, p.data + IPV6_SOURCE, 32) == 0
    return memcmp(it.first + IP_SOURCE, p.data + IP_SOURCE, 8) == 0


cdef inline int find_open(const Merger *m, const Packet *p) noexcept nogil:
    """Slot of `open` that has the packet's flow; -1: none.  Only of packets that have ports, behind a plain header."""
    cdef int k
    cdef const Item *it
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0:
            it = &m.item[m.open[k]]
            if (has_same_addresses(it, p) and it.protocol == p.protocol
                    and memcmp(it.first + it.ip_header, p.data + p.header, 4) == 0):
                return k
    return -1


cdef inline void close_flow(Merger *m, const Packet *p) noexcept nogil:
    """Close the flow of a packet that cannot be merged: what follows must not overtake it in an earlier item."""
    cdef int k
    if p.is_whole and has_plain_header(p) and p.len >= p.header + 4:
        k = find_open(m, p)
        if k >= 0:
            m.open[k] = -1
        return
    # A packet without ports where they are looked for may belong to any flow between the two addresses.
    for k in range(OPEN_FLOWS):
        if m.open[k] >= 0 and has_same_addresses(&m.item[m.open[k]], p):
            m.open[k] = -1


cdef inline Item *begin_item(Merger *m, const Packet *p) noexcept nogil:
    """A new item with this packet in it; there is room (`is_full`)."""
    cdef Item *it = &m.item[m.n]
    m.n += 1
    memset(it.vnet, 0, VNET)
    it.first = p.data
    it.first_len = p.len
    it.is_ipv6 = p.is_ipv6
    it.protocol = p.protocol
    it.ip_header = p.header
    it.n = 1
    it.peer = p.peer
    return it


cdef inline void add_packet(Merger *m, const Packet *p) noexcept nogil:
    """Join the packet to its flow's open item, or begin one."""
    cdef int header = mergeable_header(m, p), k
    cdef Item *it
    if header == 0:
        close_flow(m, p)
        begin_item(m, p)
        return
    k = find_open(m, p)
    if k >= 0:
        it = &m.item[m.open[k]]
        if may_join(it, p, header):
            if not it.is_verified:
                it.is_verified = first_checksum_holds(it)
            if it.is_verified and transport_checksum_holds(p):
                join(it, p, header)
                return
    else:
        k = m.oldest
        m.oldest = (m.oldest + 1) % OPEN_FLOWS
    m.open[k] = m.n
    it = begin_item(m, p)
    it.is_verified = False
    it.header_len = header
    it.size = p.len - header
    it.payload = it.size
    it.has_push = False
    if p.protocol == PROTO_TCP:
        it.next_sequence = load_be32(p.data + p.header + TCP_SEQUENCE) + <uint32_t>it.size
        it.has_push = (p.data[p.header + TCP_FLAGS] & TCP_PSH) != 0
    it.iov[2].iov_base = p.data + header
    it.iov[2].iov_len = it.size


cdef inline Packet packet_of(const Item *it, uint8_t *data, int length) noexcept nogil:
    """A packet of the item, of which only what sums need is filled."""
    cdef Packet p
    p.data = data
    p.len = length
    p.is_ipv6 = it.is_ipv6
    p.protocol = it.protocol
    p.header = it.ip_header
    return p


cdef inline bint first_checksum_holds(const Item *it) noexcept nogil:
    cdef Packet first = packet_of(it, it.first, it.first_len)
    return transport_checksum_holds(&first)


cdef inline void join(Item *it, const Packet *p, int header) noexcept nogil:
    it.iov[2 + it.n].iov_base = p.data + header
    it.iov[2 + it.n].iov_len = p.len - header
    it.n += 1
    it.payload += p.len - header
    it.next_sequence += <uint32_t>(p.len - header)
    if p.protocol == PROTO_TCP and p.data[p.header + TCP_FLAGS] & TCP_PSH:
        it.has_push = True


cdef inline int seal(Item *it, int vnet_len) noexcept nogil:
    """Write the item's virtio header and, for a super-packet, its own header; return how many of it.iov to write.

    `vnet_len` 0: the device takes no virtio header, and the item is a single packet.
    """
    it.iov[0].iov_base = it.vnet
    it.iov[0].iov_len = vnet_len
    if it.n == 1:
        it.iov[1].iov_base = it.first
        it.iov[1].iov_len = it.first_len
        return 2
    write_merged_header(it)
    it.iov[1].iov_base = it.header
    it.iov[1].iov_len = it.header_len
    return 2 + it.n


cdef inline void write_merged_header(Item *it) noexcept nogil:
    """The headers of a super-packet, and the virtio header before it."""
    cdef uint8_t *h = it.header
    cdef uint8_t *t = h + it.ip_header
    cdef virtio_net_hdr vnet
    cdef Packet whole = packet_of(it, h, it.header_len + it.payload)
    memcpy(h, it.first, it.header_len)
    if it.is_ipv6:
        store_be16(h + IPV6_PAYLOAD_LEN, whole.len - IPV6_HEADER)
    else:
        store_be16(h + IP_TOTAL_LEN, whole.len)
        store_be16(h + IP_CHECKSUM, 0)
        store_memory16(h + IP_CHECKSUM, ~ut_fold(ut_sum(h, IPV4_HEADER_MIN, 0)))
    memset(&vnet, 0, sizeof(vnet))
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    vnet.hdr_len = <uint16_t>it.header_len
    vnet.gso_size = <uint16_t>it.size
    vnet.csum_start = <uint16_t>it.ip_header
    if it.protocol == PROTO_TCP:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV6 if it.is_ipv6 else VIRTIO_NET_HDR_GSO_TCPV4
        vnet.csum_offset = TCP_CHECKSUM
        if it.has_push:
            t[TCP_FLAGS] |= TCP_PSH
    else:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.csum_offset = UDP_CHECKSUM
        store_be16(t + UDP_LENGTH, UDP_HEADER + it.payload)
    store_memory16(t + vnet.csum_offset, pseudo_sum(&whole))
    memcpy(it.vnet, &vnet, VNET)

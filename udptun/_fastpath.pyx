# cython: language_level=3str, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""The datapath: TUN <-> UDP.  Knows descriptors and bytes; never a lease, a config or a logger.

Theory of operation
===================

One worker is one thread without the GIL.  A turn of its loop moves one batch each way:

    TUN --read_tun--> encap_batch --send_batch--> UDP          (encap)
    UDP --receive_batch--> decap_batch --write_tun--> TUN      (decap)

When a turn moves nothing the worker sleeps in poll() on both descriptors and on an eventfd that stop() writes to;
under load stop() is seen because every turn looks at a flag.

Buffers: a worker owns BATCH packet slots per direction, allocated once.  A `Packet` points into a slot and is valid
until the next turn.  Nothing is allocated, locked or logged per packet, and nothing here raises: every packet ends in
exactly one counter (docs/wire-format.md lists the conditions in the order in which this file checks them), so that
the packets read are the sum of what was sent and the drops by reason.

The table of peers is shared memory that the control plane rewrites; a turn uses one slot of it from begin to end
(shm.h has the protocol).  Counters are shared memory that only this worker writes.

The TUN device may be deleted under us: every read and write then answers EBADFD, for every holder of the
descriptor, until someone attaches it again with TUNSETIFF.  Meanwhile the worker looks every TUN_LOST_WAIT_MS and
leaves arriving datagrams in the socket's queue.

A process that is killed takes with it the batch in its hands, at most; everything else waits in the kernel's queues for
the process that goes on with the same descriptors.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EBADFD, EINTR, EMSGSIZE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from udptun._sys cimport *
from udptun._wire cimport *

# ---------------------------------------------------------------------------------------------------- limits

cdef enum:
    BATCH = 64                    # packets a turn and direction: enough to share the cost of a call
    PACKET_MAX = 65535            # an IPv4 total length
    # Slots 64 KiB apart would fall into the same cache sets; this much more spreads them (multiple of 64).
    SLOT_BYTES = 65536 + 1664
    VNET = 10                     # sizeof(struct virtio_net_hdr), as TUNSETVNETHDRSZ sets it
    ICMP_MAX = 576                # RFC 1812 4.3.2.3
    ICMP_PER_S = 1000
    ICMP_BURST = 50
    TUN_LOST_WAIT_MS = 20

# --------------------------------------------------------------------------------------- shared memory (shm.h)

cdef extern from "shm.h" nogil:
    enum:
        UT_TABLE_MAGIC, UT_STATS_MAGIC, UT_LAYOUT_VERSION
        UT_MAX_PEERS, UT_L1_ENTRIES, UT_L2_ENTRIES, UT_L2_PAGES, UT_L2_FLAG, UT_MAX_WORKERS, UT_MAX_COUNTERS
        UT_TABLE_HEADER_BYTES, UT_STATS_HEADER_BYTES
        UT_PEER_UDPTUN
        UT_SOURCE_OFF, UT_SOURCE_PEER, UT_SOURCE_STRICT
        UT_STATE_STOPPED, UT_STATE_RUNNING, UT_STATE_TUN_LOST
    struct ut_peer:
        sockaddr_in remote
        uint32_t subnet, mask, mtu, flags
    struct ut_slot:
        uint32_t network, network_mask, own_subnet, own_mask, tunnel_address, underlay_address
        uint32_t mtu, source_check, n_l1, n_remotes
        uint32_t l1[1]
        uint32_t remotes[1]
        ut_peer peers[1]
        uint32_t l2[1][256]
    struct ut_table:
        uint32_t magic, layout_version
        uint64_t generation
        ut_slot slot[2]
    struct ut_worker:
        uint64_t generation_seen, pid, state, turns
        uint64_t counter[1]
    struct ut_peer_stats:
        uint64_t encap_packets, encap_bytes, decap_packets, decap_bytes
    struct ut_stats:
        uint32_t magic, layout_version
        ut_worker worker[1]
        ut_peer_stats peer[1][65536]
    const ut_slot *ut_table_enter(const ut_table *table, ut_worker *worker)
    void ut_table_leave(ut_worker *worker)
    void ut_store_u64(uint64_t *word, uint64_t value)
    uint64_t ut_load_u64(const uint64_t *word)

# -------------------------------------------------------------------------------------------------- counters

# The order is that of COUNTERS below; docs/wire-format.md says when each applies.
cdef enum Counter:
    ENCAP_PACKETS
    ENCAP_SENT
    ENCAP_DROP_SHORT
    ENCAP_DROP_IPV6
    ENCAP_DROP_MALFORMED
    ENCAP_DROP_NO_ROUTE
    ENCAP_DROP_TTL
    ENCAP_DROP_TOO_BIG
    ENCAP_DROP_SEND
    DECAP_PACKETS
    DECAP_DELIVERED
    DECAP_DROP_EMPTY
    DECAP_DROP_SHORT
    DECAP_DROP_IPV6
    DECAP_DROP_VERSION
    DECAP_DROP_IHL
    DECAP_DROP_LENGTH
    DECAP_DROP_CHECKSUM
    DECAP_DROP_OPTIONS
    DECAP_DROP_FRAGMENT
    DECAP_DROP_UNKNOWN_PEER
    DECAP_DROP_SOURCE_MARTIAN
    DECAP_DROP_SOURCE_OWN
    DECAP_DROP_SOURCE_SPOOFED
    DECAP_DROP_SOURCE_OUTSIDE
    DECAP_DROP_FOREIGN_DESTINATION
    DECAP_DROP_TTL
    DECAP_DROP_OVERSIZE
    DECAP_DROP_TUN
    ICMP_SENT
    ICMP_SUPPRESSED
    N_COUNTERS

COUNTERS = (
    "encap_packets",
    "encap_sent",
    "encap_drop_short",
    "encap_drop_ipv6",
    "encap_drop_malformed",
    "encap_drop_no_route",
    "encap_drop_ttl",
    "encap_drop_too_big",
    "encap_drop_send",
    "decap_packets",
    "decap_delivered",
    "decap_drop_empty",
    "decap_drop_short",
    "decap_drop_ipv6",
    "decap_drop_version",
    "decap_drop_ihl",
    "decap_drop_length",
    "decap_drop_checksum",
    "decap_drop_options",
    "decap_drop_fragment",
    "decap_drop_unknown_peer",
    "decap_drop_source_martian",
    "decap_drop_source_own",
    "decap_drop_source_spoofed",
    "decap_drop_source_outside",
    "decap_drop_foreign_destination",
    "decap_drop_ttl",
    "decap_drop_oversize",
    "decap_drop_tun",
    "icmp_sent",
    "icmp_suppressed",
)

# ----------------------------------------------------------------------------------------------- peer routes

cdef inline uint32_t lookup(const ut_slot *table, uint32_t address) noexcept nogil:
    """Index of the peer that leases `address` (host order); 0: none.  One or two loads, however many peers."""
    cdef uint32_t i = (address - table.network) >> 8
    cdef uint32_t entry
    # Below the network the subtraction wraps to a large index.
    if i >= table.n_l1:
        return 0
    entry = table.l1[i]
    if entry & UT_L2_FLAG:
        return table.l2[entry & ~<uint32_t>UT_L2_FLAG][address & 255]
    return entry


cdef inline bint is_remote(const ut_slot *table, uint32_t address) noexcept nogil:
    """Whether some peer has this public IP.  A binary search: only packets that no lease explains come here."""
    cdef uint32_t low = 0, high = table.n_remotes, middle
    while low < high:
        middle = (low + high) >> 1
        if table.remotes[middle] < address:
            low = middle + 1
        else:
            high = middle
    return low < table.n_remotes and table.remotes[low] == address

# --------------------------------------------------------------------------------------------------- buffers

cdef struct Packet:
    uint8_t *data                 # the inner packet, borrowed from its slot until the next turn
    int len                       # its IPv4 total length, bytes
    uint32_t peer                 # index in the table; who gets it, or who sent it (0: a source outside Network)
    uint8_t check[2]              # encap: the header checksum as it came, before our TTL step

cdef struct Loop:
    # Borrowed: shared memory, and descriptors that the Worker object's creator keeps open.
    const ut_table *table
    ut_stats *stats
    ut_worker *worker             # our block of stats
    ut_peer_stats *peer_stats     # our row of stats.peer
    int tun_fd, udp_fd
    # Owned by the Worker object.
    int event_fd
    uint8_t *slots                # BATCH slots of [virtio header | packet], used by one direction at a time
    Packet packet[BATCH]
    iovec iov[BATCH]
    mmsghdr message[BATCH]
    sockaddr_in source[BATCH]
    uint8_t icmp[VNET + ICMP_MAX]
    # The rest is our own state.
    const ut_slot *slot           # the table of this turn
    int stop
    int tun_lost
    long icmp_tokens
    uint64_t icmp_refilled_ns


cdef inline void count(Loop *w, Counter which) noexcept nogil:
    w.worker.counter[<int>which] += 1


cdef inline uint8_t *slot_data(Loop *w, int i) noexcept nogil:
    """The packet's place in slot i; the virtio header lies before it, so that the packet is 16-byte aligned."""
    return w.slots + <size_t>i * SLOT_BYTES + 16

# ------------------------------------------------------------------------------------------ encap: TUN to UDP

cdef int read_tun(Loop *w) noexcept nogil:
    """Fill the slots from the TUN until it has no more.  Returns how many were read (0..BATCH)."""
    cdef int n = 0
    cdef ssize_t got
    while n < BATCH:
        got = read(w.tun_fd, slot_data(w, n) - VNET, VNET + PACKET_MAX)
        if got < 0:
            if errno == EBADFD:
                w.tun_lost = 1
            break
        count(w, ENCAP_PACKETS)
        w.packet[n].data = slot_data(w, n)
        w.packet[n].len = <int>got - VNET
        n += 1
    return n


cdef int encap_batch(Loop *w, int n) noexcept nogil:
    """Point every packet at its peer and step its TTL; drop and answer what cannot go.

    Order is kept.  Returns how many are left at the front of w.packet.
    """
    cdef int i, kept = 0, have, header, total
    cdef Packet *p
    cdef uint8_t *d
    cdef uint32_t peer
    for i in range(n):
        p = &w.packet[i]
        d = p.data
        have = p.len
        if have < IPV4_HEADER_MIN:
            count(w, ENCAP_DROP_SHORT)
            continue
        if ip_version(d) != 4:
            count(w, ENCAP_DROP_IPV6 if ip_version(d) == 6 else ENCAP_DROP_MALFORMED)
            continue
        header = ip_header_len(d)
        total = ip_total_len(d)
        if header < IPV4_HEADER_MIN or total < header or total > have:
            count(w, ENCAP_DROP_MALFORMED)
            continue
        p.len = total
        peer = lookup(w.slot, ip_destination(d))
        if peer == 0:
            count(w, ENCAP_DROP_NO_ROUTE)
            answer_local(w, p, ICMP_UNREACHABLE, ICMP_NET_UNREACHABLE, 0)
            continue
        if ip_ttl(d) <= 1:
            count(w, ENCAP_DROP_TTL)
            answer_local(w, p, ICMP_TIME_EXCEEDED, 0, 0)
            continue
        if <uint32_t>total > w.slot.peers[peer].mtu and ip_fragment_word(d) & FLAG_DF:
            count(w, ENCAP_DROP_TOO_BIG)
            answer_local(w, p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, w.slot.peers[peer].mtu)
            continue
        memcpy(p.check, d + 10, 2)
        ip_step_ttl(d)
        p.peer = peer
        w.packet[kept] = p[0]
        kept += 1
    return kept


cdef void send_batch(Loop *w, int n) noexcept nogil:
    """Send the first n packets, each to its peer, in order; every one ends in a counter."""
    cdef int i, sent, done = 0
    cdef Packet *p
    for i in range(n):
        p = &w.packet[i]
        w.iov[i].iov_base = p.data
        w.iov[i].iov_len = p.len
        memset(&w.message[i].msg_hdr, 0, sizeof(msghdr))
        w.message[i].msg_hdr.msg_name = <void *>&w.slot.peers[p.peer].remote
        w.message[i].msg_hdr.msg_namelen = sizeof(sockaddr_in)
        w.message[i].msg_hdr.msg_iov = &w.iov[i]
        w.message[i].msg_hdr.msg_iovlen = 1
    while done < n:
        sent = sendmmsg(w.udp_fd, w.message + done, n - done, MSG_DONTWAIT)
        if sent > 0:
            for i in range(done, done + sent):
                count_sent(w, &w.packet[i])
            done += sent
        elif errno == EAGAIN:
            if not wait_for_socket(w):
                w.worker.counter[<int>ENCAP_DROP_SEND] += n - done
                return
        elif errno == EMSGSIZE:
            send_over_smaller_path(w, done)
            done += 1
        elif errno != EINTR:
            count(w, ENCAP_DROP_SEND)
            done += 1


cdef inline void count_sent(Loop *w, const Packet *p) noexcept nogil:
    count(w, ENCAP_SENT)
    w.peer_stats[p.peer].encap_packets += 1
    w.peer_stats[p.peer].encap_bytes += p.len


cdef int wait_for_socket(Loop *w) noexcept nogil:
    """The socket's send buffer is full: sleep until it is not.  0 when the worker shall stop instead."""
    cdef pollfd fds[2]
    fds[0].fd = w.udp_fd
    fds[0].events = POLLOUT
    fds[1].fd = w.event_fd
    fds[1].events = POLLIN
    poll(fds, 2, -1)
    return not w.stop


cdef void send_over_smaller_path(Loop *w, int i) noexcept nogil:
    """The kernel knows a path MTU that message i does not fit: tell the sender, or fragment if it allows it."""
    cdef Packet *p = &w.packet[i]
    cdef int mode, mtu
    if ip_fragment_word(p.data) & FLAG_DF:
        mtu = path_mtu(w, &w.slot.peers[p.peer].remote) - IPV4_HEADER_MIN - UDP_HEADER
        count(w, ENCAP_DROP_TOO_BIG)
        # The answer quotes the packet as it came, before our TTL step.
        p.data[8] += 1
        memcpy(p.data + 10, p.check, 2)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, mtu if mtu > 0 else 0)
        return
    mode = IP_PMTUDISC_DONT
    setsockopt(w.udp_fd, IPPROTO_IP, IP_MTU_DISCOVER, &mode, sizeof(int))
    if sendmsg(w.udp_fd, &w.message[i].msg_hdr, MSG_DONTWAIT) >= 0:
        count_sent(w, p)
    else:
        count(w, ENCAP_DROP_SEND)
    mode = IP_PMTUDISC_DO
    setsockopt(w.udp_fd, IPPROTO_IP, IP_MTU_DISCOVER, &mode, sizeof(int))


cdef int path_mtu(Loop *w, const sockaddr_in *remote) noexcept nogil:
    """What the kernel believes the MTU to `remote` is, bytes of outer packet; 0 when it does not say.

    Only a connected socket can ask.  Rare: once per packet that was refused, under the same limit as ICMP.
    """
    cdef sockaddr_in own
    cdef socklen_t n = sizeof(sockaddr_in)
    cdef int mtu = 0
    cdef int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    if fd < 0:
        return 0
    if getsockname(w.udp_fd, <sockaddr *>&own, &n) == 0:
        own.sin_port = 0
        bind(fd, <sockaddr *>&own, n)
    if connect(fd, <const sockaddr *>remote, sizeof(sockaddr_in)) == 0:
        n = sizeof(int)
        if getsockopt(fd, IPPROTO_IP, IP_MTU, &mtu, &n) != 0:
            mtu = 0
    close(fd)
    return mtu

# ------------------------------------------------------------------------------------------ decap: UDP to TUN

cdef int receive_batch(Loop *w) noexcept nogil:
    """Fill the slots from the socket.  Returns how many datagrams came (0..BATCH)."""
    cdef int i, n
    for i in range(BATCH):
        w.iov[i].iov_base = slot_data(w, i)
        w.iov[i].iov_len = PACKET_MAX
        memset(&w.message[i].msg_hdr, 0, sizeof(msghdr))
        w.message[i].msg_hdr.msg_name = &w.source[i]
        w.message[i].msg_hdr.msg_namelen = sizeof(sockaddr_in)
        w.message[i].msg_hdr.msg_iov = &w.iov[i]
        w.message[i].msg_hdr.msg_iovlen = 1
    n = recvmmsg(w.udp_fd, w.message, BATCH, MSG_DONTWAIT, NULL)
    if n < 0:
        return 0
    for i in range(n):
        count(w, DECAP_PACKETS)
        w.packet[i].data = slot_data(w, i)
        w.packet[i].len = <int>w.message[i].msg_len
    return n


cdef int decap_batch(Loop *w, int n) noexcept nogil:
    """Check every datagram in the documented order and step the TTL of those that pass.

    Order is kept.  Returns how many are left at the front of w.packet.
    """
    cdef int i, verdict, kept = 0
    cdef Packet *p
    for i in range(n):
        p = &w.packet[i]
        verdict = check_header(p)
        if verdict < 0:
            verdict = check_source(w.slot, p, load_be32(<const uint8_t *>&w.source[i].sin_addr.s_addr))
        if verdict < 0 and (ip_destination(p.data) & w.slot.own_mask) != w.slot.own_subnet:
            verdict = DECAP_DROP_FOREIGN_DESTINATION
        if verdict < 0 and ip_ttl(p.data) <= 1:
            verdict = DECAP_DROP_TTL
            answer_peer(w, p, ICMP_TIME_EXCEEDED, 0)
        if verdict < 0:
            verdict = offload_header(w.slot, p)
        if verdict >= 0:
            count(w, <Counter>verdict)
            continue
        ip_step_ttl(p.data)
        w.packet[kept] = p[0]
        kept += 1
    return kept


cdef int check_header(Packet *p) noexcept nogil:
    """Rows 1 to 9: is this an IPv4 packet?  Cuts bytes after the total length.  -1, or the drop counter."""
    cdef const uint8_t *d = p.data
    cdef int header, total, fragment, payload
    if p.len == 0:
        return DECAP_DROP_EMPTY
    if p.len < IPV4_HEADER_MIN:
        return DECAP_DROP_SHORT
    if ip_version(d) != 4:
        return DECAP_DROP_IPV6 if ip_version(d) == 6 else DECAP_DROP_VERSION
    header = ip_header_len(d)
    if header < IPV4_HEADER_MIN or header > p.len:
        return DECAP_DROP_IHL
    total = ip_total_len(d)
    if total < header or total > p.len:
        return DECAP_DROP_LENGTH
    if ut_fold(ut_sum(d, header, 0)) != 0xffff:
        return DECAP_DROP_CHECKSUM
    if header > IPV4_HEADER_MIN and not options_acceptable(d, header):
        return DECAP_DROP_OPTIONS
    fragment = ip_fragment_word(d)
    if fragment & (FLAG_MF | FRAGMENT_MASK):
        payload = total - header
        if (fragment & FRAGMENT_MASK) * 8 + payload > PACKET_MAX:
            return DECAP_DROP_FRAGMENT
        if fragment & FLAG_MF and (payload == 0 or payload & 7):
            return DECAP_DROP_FRAGMENT
    p.len = total
    return -1


cdef bint options_acceptable(const uint8_t *d, int header) noexcept nogil:
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


cdef int check_source(const ut_slot *table, Packet *p, uint32_t outer) noexcept nogil:
    """Rows 10 to 14: may `outer` (host order) send this inner source?  Sets p.peer.  -1, or the drop counter."""
    cdef uint32_t inner = ip_source(p.data)
    cdef bint explained
    p.peer = lookup(table, inner)
    explained = p.peer != 0 and table.peers[p.peer].remote.sin_addr.s_addr == be32(outer)
    if not explained and table.source_check != UT_SOURCE_OFF and not is_remote(table, outer):
        return DECAP_DROP_UNKNOWN_PEER
    if is_martian(inner):
        return DECAP_DROP_SOURCE_MARTIAN
    if (inner & table.own_mask) == table.own_subnet or inner == table.underlay_address:
        return DECAP_DROP_SOURCE_OWN
    if explained or table.source_check == UT_SOURCE_OFF:
        return -1
    if (inner & table.network_mask) == table.network:
        return DECAP_DROP_SOURCE_SPOOFED
    if table.source_check == UT_SOURCE_STRICT:
        return DECAP_DROP_SOURCE_OUTSIDE
    return -1


cdef inline uint32_t be32(uint32_t value) noexcept nogil:
    cdef uint32_t out
    store_be32(<uint8_t *>&out, value)
    return out


cdef int offload_header(const ut_slot *table, Packet *p) noexcept nogil:
    """Row 17, and the virtio header that the TUN write needs.  -1, or the drop counter."""
    cdef uint8_t *d = p.data
    cdef virtio_net_hdr vnet
    cdef int header = ip_header_len(d), transport = p.len - header, check, doff, flags
    memset(&vnet, 0, VNET)
    check = partial_checksum_offset(p)
    if check:
        vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
        vnet.csum_start = <uint16_t>header
        vnet.csum_offset = <uint16_t>check
    if <uint32_t>p.len > table.mtu:
        if check == 0 or ip_protocol(d) != PROTO_TCP:
            return DECAP_DROP_OVERSIZE
        doff = (d[header + 12] >> 4) * 4
        flags = d[header + 13]
        if transport == doff or flags & TCP_SYN_RST_URG or header + doff >= <int>table.mtu:
            return DECAP_DROP_OVERSIZE
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        vnet.hdr_len = <uint16_t>(header + doff)
        vnet.gso_size = <uint16_t>(table.mtu - header - doff)
    memcpy(d - VNET, &vnet, VNET)
    return -1


cdef int partial_checksum_offset(const Packet *p) noexcept nogil:
    """Where the check field is (bytes into the transport header) if only the pseudo-header is in it; else 0."""
    cdef const uint8_t *d = p.data
    cdef int header = ip_header_len(d), transport = p.len - header, at, doff
    cdef uint16_t field
    if ip_is_fragment(d):
        return 0
    if ip_protocol(d) == PROTO_TCP:
        if transport < TCP_HEADER_MIN:
            return 0
        doff = (d[header + 12] >> 4) * 4
        if doff < TCP_HEADER_MIN or doff > transport:
            return 0
        at = 16
    elif ip_protocol(d) == PROTO_UDP:
        if transport < UDP_HEADER:
            return 0
        at = 6
    else:
        return 0
    memcpy(&field, d + header + at, 2)
    return at if field == pseudo_sum(d, transport) else 0


cdef void write_tun(Loop *w, int n) noexcept nogil:
    """Write the first n packets, in order; every one ends in a counter."""
    cdef int i
    cdef Packet *p
    for i in range(n):
        p = &w.packet[i]
        if write(w.tun_fd, p.data - VNET, VNET + p.len) < 0:
            if errno == EBADFD:
                w.tun_lost = 1
            count(w, DECAP_DROP_TUN)
            continue
        count(w, DECAP_DELIVERED)
        w.peer_stats[p.peer].decap_packets += 1
        w.peer_stats[p.peer].decap_bytes += p.len

# ------------------------------------------------------------------------------------------------------ ICMP

cdef bint may_answer(Loop *w, const Packet *p) noexcept nogil:
    """RFC 1122 3.2.2: not about errors, later fragments or what no single host sent; and a token must be left."""
    cdef const uint8_t *d = p.data
    cdef int header = ip_header_len(d), kind
    if is_martian(ip_source(d)) or ip_destination(d) >> 29 == 7:
        return False
    if ip_fragment_word(d) & FRAGMENT_MASK:
        return False
    if ip_protocol(d) == PROTO_ICMP:
        if p.len < header + ICMP_HEADER:
            return False
        kind = d[header]
        if kind != ICMP_ECHO and kind != ICMP_ECHO_REPLY and kind != ICMP_TIMESTAMP and kind != ICMP_TIMESTAMP_REPLY:
            return False
    return take_token(w)


cdef bint take_token(Loop *w) noexcept nogil:
    cdef timespec now
    cdef uint64_t now_ns, earned
    clock_gettime(CLOCK_MONOTONIC, &now)
    now_ns = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec
    earned = (now_ns - w.icmp_refilled_ns) // (1000000000 // ICMP_PER_S)
    if earned:
        w.icmp_tokens = <long>min(<uint64_t>w.icmp_tokens + earned, <uint64_t>ICMP_BURST)
        w.icmp_refilled_ns += earned * (1000000000 // ICMP_PER_S)
    if w.icmp_tokens == 0:
        return False
    w.icmp_tokens -= 1
    return True


cdef int build_icmp(Loop *w, const Packet *offender, int kind, int code, uint32_t mtu) noexcept nogil:
    """Put the error about `offender` into w.icmp behind its virtio header; return its length, bytes."""
    cdef uint8_t *d = w.icmp + VNET
    cdef uint8_t *icmp = d + IPV4_HEADER_MIN
    cdef int quote = min(offender.len, ICMP_MAX - IPV4_HEADER_MIN - ICMP_HEADER)
    cdef int total = IPV4_HEADER_MIN + ICMP_HEADER + quote
    memset(w.icmp, 0, VNET + IPV4_HEADER_MIN + ICMP_HEADER)
    d[0] = 0x45
    d[1] = 0xC0                   # internetwork control, RFC 1812 4.3.2.5
    store_be16(d + 2, total)
    d[8] = 64
    d[9] = PROTO_ICMP
    store_be32(d + 12, w.slot.tunnel_address)
    memcpy(d + 16, offender.data + 12, 4)
    store_memory16(d + 10, ~ut_fold(ut_sum(d, IPV4_HEADER_MIN, 0)))
    icmp[0] = <uint8_t>kind
    icmp[1] = <uint8_t>code
    store_be16(icmp + 6, mtu)     # RFC 1191; unused and zero in the other kinds
    memcpy(icmp + ICMP_HEADER, offender.data, quote)
    store_memory16(icmp + 2, ~ut_fold(ut_sum(icmp, ICMP_HEADER + quote, 0)))
    return total


cdef void answer_local(Loop *w, const Packet *offender, int kind, int code, uint32_t mtu) noexcept nogil:
    """Answer a packet that came from our own kernel: through the TUN, back into it."""
    cdef int n
    if may_answer(w, offender):
        n = build_icmp(w, offender, kind, code, mtu)
        if write(w.tun_fd, w.icmp, VNET + n) >= 0:
            count(w, ICMP_SENT)
            return
    count(w, ICMP_SUPPRESSED)


cdef void answer_peer(Loop *w, const Packet *offender, int kind, int code) noexcept nogil:
    """Answer a packet that came through the tunnel: back through it, to the peer that leases its source."""
    cdef msghdr message
    cdef iovec iov
    # check_source has found the peer; unless SourceCheck is off it has also seen that the packet came from there.
    if offender.peer != 0 and may_answer(w, offender):
        iov.iov_base = w.icmp + VNET
        iov.iov_len = build_icmp(w, offender, kind, code, 0)
        memset(&message, 0, sizeof(msghdr))
        message.msg_name = <void *>&w.slot.peers[offender.peer].remote
        message.msg_namelen = sizeof(sockaddr_in)
        message.msg_iov = &iov
        message.msg_iovlen = 1
        if sendmsg(w.udp_fd, &message, MSG_DONTWAIT) >= 0:
            count(w, ICMP_SENT)
            return
    count(w, ICMP_SUPPRESSED)

# ------------------------------------------------------------------------------------------------------ loop

cdef int turn(Loop *w) noexcept nogil:
    """Move one batch each way.  Returns how many packets were seen; leaves the table when it is none."""
    cdef int seen, n
    w.slot = ut_table_enter(w.table, w.worker)
    w.worker.turns += 1
    w.tun_lost = 0
    seen = read_tun(w)
    if seen:
        n = encap_batch(w, seen)
        send_batch(w, n)
    if not w.tun_lost:
        n = receive_batch(w)
        if n:
            seen += n
            n = decap_batch(w, n)
            write_tun(w, n)
    ut_table_leave(w.worker)
    return seen


cdef void run_loop(Loop *w) noexcept nogil:
    cdef pollfd fds[3]
    cdef uint64_t drained
    fds[0].fd = w.event_fd
    fds[1].fd = w.tun_fd
    fds[2].fd = w.udp_fd
    fds[0].events = fds[1].events = fds[2].events = POLLIN
    ut_store_u64(&w.worker.pid, getpid())
    while not w.stop:
        if turn(w):
            continue
        if w.tun_lost:
            w.worker.state = UT_STATE_TUN_LOST
            poll(fds, 1, TUN_LOST_WAIT_MS)
        else:
            w.worker.state = UT_STATE_RUNNING
            poll(fds, 3, -1)
            # A deleted device makes poll return at once, with POLLERR; the next turn's read says so.
        if fds[0].revents:
            read(w.event_fd, &drained, sizeof(drained))
    w.worker.state = UT_STATE_STOPPED
    ut_store_u64(&w.worker.pid, 0)

# ----------------------------------------------------------------------------------------------- Python face

cdef void *_map(int fd, size_t size, int protection, uint32_t magic, str what) except NULL:
    """Map a shared file whole and look at its first two words."""
    cdef void *memory = mmap(NULL, size, protection, MAP_SHARED, fd, 0)
    if memory == MAP_FAILED:
        raise OSError(errno, f"cannot map the {what}")
    if (<uint32_t *>memory)[0] != magic or (<uint32_t *>memory)[1] != UT_LAYOUT_VERSION:
        munmap(memory, size)
        raise ValueError(f"the {what} is not one, or of another layout version than {UT_LAYOUT_VERSION}")
    return memory


cdef class Worker:
    """One thread's share of the datapath.

    `table_fd` and `stats_fd` are the shared memory files (mapped here, the descriptors may be closed after), `index`
    says which block of the statistics is ours, `tun_fd` is a non-blocking queue of a TUN device with virtio headers,
    `udp_fd` the UDP socket.  The two are borrowed: the caller keeps them open while the worker runs.
    Raises OSError when the files cannot be mapped, ValueError when they are something else.
    """

    cdef Loop *_w

    def __cinit__(self, int table_fd, int stats_fd, unsigned int index, int tun_fd, int udp_fd):
        if index >= UT_MAX_WORKERS:
            raise ValueError(f"worker {index}: there are {UT_MAX_WORKERS} at most")
        self._w = <Loop *>calloc(1, sizeof(Loop))
        if self._w == NULL:
            raise MemoryError
        self._w.event_fd = -1
        self._w.slots = <uint8_t *>calloc(BATCH, SLOT_BYTES)
        if self._w.slots == NULL:
            raise MemoryError
        self._w.table = <const ut_table *>_map(table_fd, sizeof(ut_table), PROT_READ, UT_TABLE_MAGIC, "peer table")
        self._w.stats = <ut_stats *>_map(
            stats_fd, sizeof(ut_stats), PROT_READ | PROT_WRITE, UT_STATS_MAGIC, "statistics")
        self._w.worker = &self._w.stats.worker[index]
        self._w.peer_stats = self._w.stats.peer[index]
        self._w.tun_fd = tun_fd
        self._w.udp_fd = udp_fd
        self._w.icmp_tokens = ICMP_BURST
        self._w.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self._w.event_fd < 0:
            raise OSError(errno, "cannot create an eventfd")

    def __dealloc__(self):
        if self._w == NULL:
            return
        if self._w.table != NULL:
            munmap(<void *>self._w.table, sizeof(ut_table))
        if self._w.stats != NULL:
            munmap(self._w.stats, sizeof(ut_stats))
        if self._w.event_fd >= 0:
            close(self._w.event_fd)
        free(self._w.slots)
        free(self._w)

    def turn(self):
        """Move one batch each way without sleeping.  True when there was anything.  Not while run() runs."""
        cdef int seen
        with nogil:
            seen = turn(self._w)
        return seen != 0

    def run(self):
        """Move packets until stop(), without the GIL."""
        with nogil:
            run_loop(self._w)

    def stop(self):
        """Make run() return after the turn it is in.  From any thread; also before run()."""
        cdef uint64_t one = 1
        self._w.stop = 1
        write(self._w.event_fd, &one, sizeof(one))


cdef class TableReader:
    """Look peers up as a worker does, batch by batch: for the tests of the flip protocol and for bench/.

    Takes worker block `index` of the statistics to announce its generation in.
    """

    cdef ut_table *_table
    cdef ut_stats *_stats
    cdef ut_worker *_worker

    def __cinit__(self, int table_fd, int stats_fd, unsigned int index):
        if index >= UT_MAX_WORKERS:
            raise ValueError(f"worker {index}: there are {UT_MAX_WORKERS} at most")
        self._table = <ut_table *>_map(table_fd, sizeof(ut_table), PROT_READ, UT_TABLE_MAGIC, "peer table")
        self._stats = <ut_stats *>_map(
            stats_fd, sizeof(ut_stats), PROT_READ | PROT_WRITE, UT_STATS_MAGIC, "statistics")
        self._worker = &self._stats.worker[index]

    def __dealloc__(self):
        if self._table != NULL:
            munmap(self._table, sizeof(ut_table))
        if self._stats != NULL:
            munmap(self._stats, sizeof(ut_stats))

    def lookup(self, addresses, peers, remotes):
        """For each address (host order) the peer's index and its remote address (network order), from one table.

        Three buffers of as many uint32; the last two are written.  Without the GIL; a writer waits meanwhile.
        """
        cdef Py_buffer asked, found, where
        cdef const ut_slot *slot
        cdef Py_ssize_t i, n
        cdef uint32_t peer
        PyObject_GetBuffer(addresses, &asked, PyBUF_SIMPLE)
        PyObject_GetBuffer(peers, &found, PyBUF_WRITABLE)
        PyObject_GetBuffer(remotes, &where, PyBUF_WRITABLE)
        try:
            n = asked.len // <Py_ssize_t>sizeof(uint32_t)
            if found.len != asked.len or where.len != asked.len:
                raise ValueError("the three buffers differ in length")
            with nogil:
                slot = ut_table_enter(self._table, self._worker)
                for i in range(n):
                    peer = lookup(slot, (<const uint32_t *>asked.buf)[i])
                    (<uint32_t *>found.buf)[i] = peer
                    (<uint32_t *>where.buf)[i] = slot.peers[peer].remote.sin_addr.s_addr
                ut_table_leave(self._worker)
        finally:
            PyBuffer_Release(&asked)
            PyBuffer_Release(&found)
            PyBuffer_Release(&where)


cdef uint64_t *_word(object words, Py_ssize_t i, int flags) except NULL:
    """Word i of a buffer of uint64.  The caller's object keeps the memory; a released buffer stays where it is."""
    cdef Py_buffer view
    cdef uint64_t *word
    PyObject_GetBuffer(words, &view, flags)
    word = <uint64_t *>view.buf + i
    if i < 0 or (i + 1) * <Py_ssize_t>sizeof(uint64_t) > view.len:
        word = NULL
    PyBuffer_Release(&view)
    if word == NULL:
        raise IndexError(f"no word {i} in the buffer")
    return word


def store_u64(words, Py_ssize_t i, uint64_t value):
    """words[i] = value, sequentially consistent: the control plane's half of the flip protocol."""
    ut_store_u64(_word(words, i, PyBUF_WRITABLE), value)


def load_u64(words, Py_ssize_t i):
    """words[i], sequentially consistent."""
    return ut_load_u64(_word(words, i, PyBUF_SIMPLE))


cdef ut_slot *_slot0 = NULL       # for offsets only; never dereferenced
cdef ut_table *_table0 = NULL
cdef ut_stats *_stats0 = NULL
cdef ut_worker *_worker0 = NULL

LAYOUT = {
    "version": UT_LAYOUT_VERSION,
    "table_magic": UT_TABLE_MAGIC,
    "stats_magic": UT_STATS_MAGIC,
    "max_peers": UT_MAX_PEERS,
    "l1_entries": UT_L1_ENTRIES,
    "l2_entries": UT_L2_ENTRIES,
    "l2_pages": UT_L2_PAGES,
    "l2_flag": <uint32_t>UT_L2_FLAG,
    "max_workers": UT_MAX_WORKERS,
    "max_counters": UT_MAX_COUNTERS,
    "table_header": UT_TABLE_HEADER_BYTES,
    "stats_header": UT_STATS_HEADER_BYTES,
    "peer": sizeof(ut_peer),
    "slot": sizeof(ut_slot),
    "table": sizeof(ut_table),
    "worker": sizeof(ut_worker),
    "peer_stats": sizeof(ut_peer_stats),
    "stats": sizeof(ut_stats),
    "slot.l1": <size_t>&_slot0.l1,
    "slot.remotes": <size_t>&_slot0.remotes,
    "slot.peers": <size_t>&_slot0.peers,
    "slot.l2": <size_t>&_slot0.l2,
    "table.generation": <size_t>&_table0.generation,
    "table.slot": <size_t>&_table0.slot,
    "worker.counter": <size_t>&_worker0.counter,
    "stats.worker": <size_t>&_stats0.worker,
    "stats.peer": <size_t>&_stats0.peer,
}
"""Sizes and offsets in bytes, for udptun/datapath/table.py and stats.py to agree with."""

if len(COUNTERS) != N_COUNTERS or N_COUNTERS > UT_MAX_COUNTERS:
    raise ImportError("the names of the counters do not match their numbers")

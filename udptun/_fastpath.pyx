# cython: language_level=3str, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""The datapath: TUN <-> UDP.  Knows descriptors and bytes; never a lease, a config or a logger.

Theory of operation
===================

One worker is one thread without the GIL.  A turn of its loop moves one batch each way:

    TUN --readv--> encap --queue_datagram, queue_segments--> groups --send_groups--> UDP      (encap_turn)
    UDP --recvmmsg--> decap --add_packet--> items --write_items--> TUN                        (decap_turn)

A read of the TUN may be a super-packet, which fastpath/segment.pxd cuts up; datagrams of one peer and size go to the kernel in
groups, one message each.  A received message may be a train of datagrams; packets of one flow are put together again by
fastpath/coalesce.pxd and written as one item.  On the wire there are always single packets.

Before each packet on the wire may stand a prefix (VXLAN): the peer's, ready in the table.  A `Packet` to be sent always
has room for it in front, so that prefix and packet are one piece.  With VXLAN datagrams leave from several sockets,
each inner flow from one of them; sends keep the order of the reads all the same.

When a turn moves nothing the worker sleeps in poll() on both descriptors and on an eventfd that stop() writes to;
under load stop() is seen because every turn looks at a flag.

Buffers: what a worker has in its hands lies in shared memory (`ut_hands` in shm.h), so that the process that goes
on after a kill can hand it on.  A `Packet` points into it and is valid until the next turn.  Nothing is allocated,
locked or logged per packet, and nothing here raises: every packet ends in exactly one counter (docs/wire-format.md
lists the conditions in the order in which this file checks them), so that the packets read are the sum of what was
sent and the drops by reason.

The table of peers is shared memory that the control plane rewrites; a turn uses one slot of it from begin to end
(shm.h has the protocol).  Counters are shared memory that only this worker writes.

The TUN device may be deleted under us: every read and write then answers EBADFD, for every holder of the
descriptor, until someone attaches it again with TUNSETIFF.  Meanwhile the worker looks every TUN_LOST_WAIT_MS and
leaves arriving datagrams in the socket's queue.

A process that is killed loses nothing: what it had not begun to read waits in the kernel's queues, and what it had
read and not handed on is handed on by its successor (`go_on`), a little of it twice.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EBADFD, EINTR, EINVAL, EIO, EMSGSIZE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from udptun.fastpath.coalesce cimport *
from udptun.fastpath.segment cimport *
from udptun.fastpath.sys cimport *
from udptun.fastpath.wire cimport *

# ---------------------------------------------------------------------------------------------------- limits

cdef enum:
    PACKET_MAX = 65535            # an IPv4 total length
    SEGMENTS = 2048               # headers and datagrams a turn; one super-packet of 64 KiB with an MSS of 48 has 1,365
    HEADER_ROOM = 144             # UT_PREFIX_BYTES and SEGMENT_HEADER_MAX are 142
    GROUPS = 256                  # messages a sendmmsg
    GROUP_SEGMENTS = 64           # UDP_MAX_SEGMENTS before Linux 6.9
    PLAIN_SEGMENTS = 16           # to a peer that may read one datagram at a time: its queue holds some 90
    GROUP_BYTES = 65507           # UDP payload of an IPv4 packet, which UDP_SEGMENT is cut from
    WRITTEN = 0                   # in the first byte of a packet: no IP version
    FEW_MESSAGES = 8              # when they are long trains
    LONG_TRAIN = 8192             # bytes
    ICMP_MAX = 576                # RFC 1812 4.3.2.3
    ICMP_ROOM = 32                # before an answer, for a virtio header or a prefix
    ICMP_PER_S = 1000
    ICMP_BURST = 50
    TUN_LOST_WAIT_MS = 20
    # RFC 7348 5; after the VXLAN header stands an Ethernet frame.
    VXLAN_VNI_IS_VALID = 0x08     # in the first byte
    VXLAN_VNI = 4
    INNER_DESTINATION = 8
    INNER_ETHERTYPE = 20
    ETHERTYPE_IPV4 = 0x0800

# --------------------------------------------------------------------------------------- shared memory (shm.h)

cdef extern from "shm.h" nogil:
    enum:
        UT_TABLE_MAGIC, UT_STATS_MAGIC, UT_LAYOUT_VERSION
        UT_MAX_PEERS, UT_L1_ENTRIES, UT_L2_ENTRIES, UT_L2_PAGES, UT_L2_FLAG, UT_MAX_WORKERS, UT_MAX_COUNTERS
        UT_READS, UT_READ_BYTES, UT_MESSAGES, UT_PREFIX_BYTES, UT_PREFIX_ROOM, UT_MAX_SENDERS
        UT_TABLE_HEADER_BYTES, UT_STATS_HEADER_BYTES
        UT_PEER_UDPTUN
        UT_SOURCE_OFF, UT_SOURCE_PEER, UT_SOURCE_STRICT
        UT_OFFLOAD_SEGMENT, UT_OFFLOAD_WRITE_TCP, UT_OFFLOAD_WRITE_UDP, UT_OFFLOAD_VNET_HDR
        UT_STATE_STOPPED, UT_STATE_RUNNING, UT_STATE_TUN_LOST
        UT_AT_SLOT_L1, UT_AT_SLOT_REMOTES, UT_AT_SLOT_PEERS, UT_AT_SLOT_L2, UT_AT_TABLE_GENERATION, UT_AT_TABLE_SLOT
        UT_AT_WORKER_COUNTER, UT_AT_STATS_WORKER, UT_AT_STATS_PEER
    struct ut_peer:
        sockaddr_in remote
        uint32_t subnet, mask, mtu, flags
        uint8_t prefix[22]
    struct ut_slot:
        uint32_t network, network_mask, own_subnet, own_mask, tunnel_address, underlay_address
        uint32_t mtu, source_check, n_l1, n_remotes, offloads, prefix_len, vni
        uint8_t own_mac[6]
        uint32_t l1[1]
        uint32_t remotes[1]
        ut_peer peers[1]
        uint32_t l2[1][256]
    struct ut_table:
        uint32_t magic, layout_version
        uint64_t generation
        ut_slot slot[2]
    struct ut_worker:
        uint64_t generation_seen, pid, state, turns, refused
        uint64_t counter[1]
    struct ut_peer_stats:
        uint64_t encap_packets, encap_bytes, decap_packets, decap_bytes
    struct ut_read:
        uint8_t vnet[16]
        uint32_t at, is_stepped
    struct ut_hands:
        uint32_t n_reads, n_messages
        ut_read read[1]
        mmsghdr message[1]
        sockaddr_in source[1]
        uint8_t control[1][24]
        uint8_t arena[1]
        uint8_t train[1][67200]
    struct ut_stats:
        uint32_t magic, layout_version
        ut_worker worker[1]
        ut_peer_stats peer[1][65536]
        ut_hands hands[1]
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
    DECAP_DROP_VXLAN_SHORT
    DECAP_DROP_VXLAN_FLAGS
    DECAP_DROP_VXLAN_VNI
    DECAP_DROP_VXLAN_ETHERTYPE
    DECAP_DROP_VXLAN_MAC
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
    "decap_drop_vxlan_short",
    "decap_drop_vxlan_flags",
    "decap_drop_vxlan_vni",
    "decap_drop_vxlan_ethertype",
    "decap_drop_vxlan_mac",
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
    uint8_t *data                 # the inner packet, borrowed from a buffer until the next turn
    int len                       # its IPv4 total length, bytes
    uint32_t peer                 # index in the table; who gets it, or who sent it (0: a source outside Network)

cdef struct Group:                # what one message of a sendmmsg carries: datagrams to one peer, of one size
    uint32_t peer
    int fd                        # the socket that it leaves from
    int size                      # of every datagram but the last, bytes, with its prefix
    int n                         # datagrams
    int bytes                     # of all, with their prefixes
    iovec *iov                    # into Loop.iov
    int n_iov
    bint is_closed                # the last datagram was a shorter one

cdef struct Loop:
    # Borrowed: shared memory, and descriptors that the Worker object's creator keeps open.
    const ut_table *table
    ut_stats *stats
    ut_worker *worker             # our block of stats
    ut_peer_stats *peer_stats     # our row of stats.peer
    ut_hands *hands               # ours of stats.hands: every packet that is in our hands
    int tun_fd, udp_fd
    int senders[16]               # sockets that datagrams leave from, all workers' alike; none: from udp_fd
    int n_senders
    # Owned by the Worker object.
    int event_fd
    uint8_t *headers              # encap: SEGMENTS times HEADER_ROOM bytes, each for a prefix and a segment's header
    Merger *merger                # decap
    # Encap: the groups that wait for sending.
    Group group[GROUPS]
    iovec iov[2 * SEGMENTS]
    int n_groups, n_iov, n_headers
    mmsghdr message[GROUPS]
    uint8_t control[GROUPS][UT_CMSG_BYTES]
    iovec train_iov[UT_MESSAGES]  # decap
    int n_messages                # to ask recvmmsg for
    uint8_t icmp[32 + ICMP_MAX]   # an answer, at ICMP_ROOM
    uint8_t single[32 + PACKET_MAX]   # one datagram of a group, put together; with its prefix
    # The rest is our own state.
    const ut_slot *slot           # the table of this turn
    int prefix_len                # its prefix_len
    int group_segments            # 1: the kernel does not cut messages up for us
    int vnet_len                  # of the virtio header before every packet of the TUN, bytes: VNET or 0
    int stop
    bint has_begun                # not while we are the standby: the hands are another process's
    int tun_lost
    long icmp_tokens
    uint64_t icmp_refilled_ns


cdef inline void count(Loop *w, Counter which, int n) noexcept nogil:
    w.worker.counter[<int>which] += n

# ------------------------------------------------------------------------------------------ encap: TUN to UDP

cdef int encap_turn(Loop *w) noexcept nogil:
    """Read what the TUN has, up to a batch, and send it.  Returns how many reads gave something."""
    cdef iovec room[2]
    cdef Packet p
    cdef ut_read *note
    cdef ssize_t got
    cdef int reads = 0, used = 0
    room[0].iov_len = w.vnet_len
    room[1].iov_len = PACKET_MAX
    while reads < <int>UT_READS and used < <int>UT_READ_BYTES:
        note = &w.hands.read[reads]
        note.at = <uint32_t>UT_PREFIX_ROOM + used
        note.is_stepped = 0
        if w.vnet_len == 0:
            memset(note.vnet, 0, VNET)
        room[0].iov_base = note.vnet
        room[1].iov_base = p.data = w.hands.arena + note.at
        # A successor that finds a first byte of 0 knows that there is no packet.
        p.data[0] = 0
        w.hands.n_reads = reads + 1
        got = readv(w.tun_fd, room, 2)
        if got < 0:
            if errno == EBADFD:
                w.tun_lost = 1
            break
        reads += 1
        p.len = <int>got - w.vnet_len
        if p.len > 0:
            used += p.len + w.prefix_len
        encap(w, &p, note)
    send_groups(w)
    w.hands.n_reads = 0
    return reads


cdef void encap_again(Loop *w) noexcept nogil:
    """Send what an earlier process had read and perhaps not sent when it was killed."""
    cdef uint32_t i, n = min(w.hands.n_reads, <uint32_t>UT_READS), room = UT_PREFIX_ROOM
    cdef Packet p
    cdef ut_read *note
    for i in range(n):
        note = &w.hands.read[i]
        p.data = w.hands.arena + max(room, min(note.at, room + <uint32_t>UT_READ_BYTES))
        if ip_version(p.data) != 4:
            continue
        p.len = ip_total_len(p.data)
        if note.is_stepped:
            note.is_stepped = 0
            undo_ttl_step(p.data)
        encap(w, &p, note)
    send_groups(w)
    w.hands.n_reads = 0


cdef void encap(Loop *w, Packet *p, ut_read *note) noexcept nogil:
    """Check one packet or super-packet, step its TTL and queue its datagrams for its peer; or drop and answer it."""
    cdef uint8_t *d = p.data
    cdef virtio_net_hdr *vnet = <virtio_net_hdr *>note.vnet
    cdef int have = p.len, header, total, longest, n = 1
    cdef SuperPacket s
    memset(&s, 0, sizeof(s))
    if have < IPV4_HEADER_MIN:
        drop_encap(w, ENCAP_DROP_SHORT, 1)
        return
    if ip_version(d) != 4:
        drop_encap(w, ENCAP_DROP_IPV6 if ip_version(d) == 6 else ENCAP_DROP_MALFORMED, 1)
        return
    header = ip_header_len(d)
    total = ip_total_len(d)
    if header < IPV4_HEADER_MIN or total < header or total > have:
        drop_encap(w, ENCAP_DROP_MALFORMED, 1)
        return
    p.len = longest = total
    if vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        n = measure_super_packet(&s, d, total, vnet)
        if n == 0 or n > SEGMENTS:
            drop_encap(w, ENCAP_DROP_MALFORMED, 1)
            return
        longest = min(total, s.header + s.size)
    elif vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if not complete_checksum(d, total, vnet):
            drop_encap(w, ENCAP_DROP_MALFORMED, 1)
            return
        vnet.flags = 0
    p.peer = lookup(w.slot, ip_destination(d))
    if p.peer == 0:
        drop_encap(w, ENCAP_DROP_NO_ROUTE, n)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_NET_UNREACHABLE, 0)
        return
    if ip_ttl(d) <= 1:
        drop_encap(w, ENCAP_DROP_TTL, n)
        answer_local(w, p, ICMP_TIME_EXCEEDED, 0, 0)
        return
    if <uint32_t>longest > w.slot.peers[p.peer].mtu and ip_fragment_word(d) & FLAG_DF:
        drop_encap(w, ENCAP_DROP_TOO_BIG, n)
        answer_local(w, p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, w.slot.peers[p.peer].mtu)
        return
    count(w, ENCAP_PACKETS, n)
    ip_step_ttl(d)
    note.is_stepped = 1
    if n == 1 and vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE:
        if w.n_iov + 1 > 2 * SEGMENTS:
            send_groups(w)
        put_prefix(w, p.peer, d - w.prefix_len)
        queue_datagram(
            w, sender_for(w, d, total), p.peer, NULL, 0, d - w.prefix_len, w.prefix_len + total, group_limit(w, p.peer))
        return
    queue_segments(w, p.peer, &s)


cdef inline void drop_encap(Loop *w, Counter reason, int n) noexcept nogil:
    count(w, ENCAP_PACKETS, n)
    count(w, reason, n)


cdef inline void put_prefix(Loop *w, uint32_t peer, uint8_t *out) noexcept nogil:
    if w.prefix_len:
        memcpy(out, w.slot.peers[peer].prefix, UT_PREFIX_BYTES)


cdef inline int sender_for(Loop *w, const uint8_t *d, int total) noexcept nogil:
    """The socket that a packet leaves from: the same for all of an inner flow, and for all fragments of a packet.

    So the routers on the way, and the peer, spread flows and keep the order within each (RFC 7348 5).
    """
    cdef uint32_t flow
    cdef int header
    if w.n_senders == 0:
        return w.udp_fd
    flow = ip_source(d) ^ ip_destination(d) * <uint32_t>0x9E3779B1
    header = ip_header_len(d)
    if (ip_protocol(d) == PROTO_TCP or ip_protocol(d) == PROTO_UDP) and not ip_is_fragment(d) and total >= header + 4:
        flow ^= load_be32(d + header) * <uint32_t>0x85EBCA77
    # Multiplied, all bits reach the upper ones, which choose.
    flow = (flow ^ flow >> 16) * <uint32_t>0x9E3779B1
    return w.senders[<uint64_t>flow * <uint32_t>w.n_senders >> 32]


cdef void queue_segments(Loop *w, uint32_t peer, SuperPacket *s) noexcept nogil:
    """Queue a super-packet's segments, spread evenly over as few messages as hold them."""
    cdef int i, payload, most, per_group, fd = sender_for(w, s.data, s.header + s.payload)
    cdef uint8_t *out
    if w.n_headers + s.n > SEGMENTS or w.n_iov + 2 * s.n > 2 * SEGMENTS:
        send_groups(w)
    most = max(1, min(group_limit(w, peer), GROUP_BYTES // (w.prefix_len + s.header + s.size)))
    per_group = (s.n + most - 1) // most
    per_group = (s.n + per_group - 1) // per_group
    sum_headers(s)
    for i in range(s.n):
        out = w.headers + w.n_headers * HEADER_ROOM
        w.n_headers += 1
        put_prefix(w, peer, out)
        payload = write_segment_header(s, i, out + w.prefix_len)
        queue_datagram(
            w, fd, peer, out, w.prefix_len + s.header, <uint8_t *>s.data + s.header + i * s.size, payload, per_group)


cdef inline int group_limit(const Loop *w, uint32_t peer) noexcept nogil:
    """How many datagrams one send to the peer may carry.  Over VXLAN any peer takes all: a kernel, or one like us."""
    if w.prefix_len or w.slot.peers[peer].flags & UT_PEER_UDPTUN:
        return w.group_segments
    return min(w.group_segments, PLAIN_SEGMENTS)


cdef inline void queue_datagram(
        Loop *w, int fd, uint32_t peer, uint8_t *header, int header_len, uint8_t *data, int data_len,
        int most) noexcept nogil:
    """Append one datagram, in one or two pieces, to the last group, or begin another one.

    To the last group only: nothing overtakes.  A group has at most `most` datagrams.
    """
    cdef int length = header_len + data_len
    cdef Group *g = &w.group[max(w.n_groups, 1) - 1]
    if (w.n_groups == 0 or g.peer != peer or g.fd != fd or g.is_closed or length > g.size or g.n >= most
            or g.bytes + length > GROUP_BYTES):
        if w.n_groups == GROUPS:
            send_groups_but_keep_buffers(w)
        g = &w.group[w.n_groups]
        w.n_groups += 1
        memset(g, 0, sizeof(Group))
        g.peer = peer
        g.fd = fd
        g.size = length
        g.iov = &w.iov[w.n_iov]
    if header_len:
        append_piece(w, g, header, header_len)
    append_piece(w, g, data, data_len)
    g.n += 1
    g.bytes += length
    g.is_closed = length < g.size


cdef inline void append_piece(Loop *w, Group *g, uint8_t *data, int length) noexcept nogil:
    """Add bytes to a group; pieces that touch become one."""
    cdef iovec *last = &g.iov[g.n_iov - 1]
    if g.n_iov and <uint8_t *>last.iov_base + last.iov_len == data:
        last.iov_len += length
        return
    w.iov[w.n_iov].iov_base = data
    w.iov[w.n_iov].iov_len = length
    w.n_iov += 1
    g.n_iov += 1


cdef void send_groups(Loop *w) noexcept nogil:
    """Send all queued groups; every datagram ends in a counter.  Their headers and pieces are free again."""
    send_groups_but_keep_buffers(w)
    w.n_iov = 0
    w.n_headers = 0


cdef void send_groups_but_keep_buffers(Loop *w) noexcept nogil:
    cdef int i, sent, end, why, done = 0
    cdef Group *g
    cdef msghdr *message
    for i in range(w.n_groups):
        g = &w.group[i]
        message = &w.message[i].msg_hdr
        memset(message, 0, sizeof(msghdr))
        message.msg_name = <void *>&w.slot.peers[g.peer].remote
        message.msg_namelen = sizeof(sockaddr_in)
        message.msg_iov = g.iov
        message.msg_iovlen = g.n_iov
        # A single datagram must do without: some network cards refuse what looks like an offload.
        if g.n > 1:
            ut_put_segment_size(message, w.control[i], <uint16_t>g.size)
    while done < w.n_groups:
        end = done + 1
        while end < w.n_groups and w.group[end].fd == w.group[done].fd:
            end += 1
        sent = sendmmsg(w.group[done].fd, w.message + done, end - done, MSG_DONTWAIT)
        if sent > 0:
            for i in range(done, done + sent):
                count_sent(w, w.group[i].peer, w.group[i].n, w.group[i].bytes - w.group[i].n * w.prefix_len)
            done += sent
        elif errno == EAGAIN:
            if not wait_for_socket(w, w.group[done].fd):
                for i in range(done, w.n_groups):
                    count(w, ENCAP_DROP_SEND, w.group[i].n)
                break
        elif errno != EINTR:
            why = errno
            # The egress device lacks checksum offload, or the kernel the feature: from now on one by one.  Unless the
            # path turns out to be too narrow, which some kernels call EINVAL too.
            if send_one_by_one(w, &w.group[done]) and w.group[done].n > 1 and (why == EIO or why == EINVAL):
                refuse(w, UT_OFFLOAD_SEGMENT)
            done += 1
    w.n_groups = 0


cdef inline void count_sent(Loop *w, uint32_t peer, int n, int nbytes) noexcept nogil:
    count(w, ENCAP_SENT, n)
    w.peer_stats[peer].encap_packets += n
    w.peer_stats[peer].encap_bytes += nbytes


cdef int wait_for_socket(Loop *w, int fd) noexcept nogil:
    """The socket's send buffer is full: sleep until it is not.  0 when the worker shall stop instead."""
    cdef pollfd fds[2]
    fds[0].fd = fd
    fds[0].events = POLLOUT
    fds[1].fd = w.event_fd
    fds[1].events = POLLIN
    poll(fds, 2, -1)
    return not w.stop


cdef bint send_one_by_one(Loop *w, Group *g) noexcept nogil:
    """Send a group that the kernel refused, each datagram for itself.  Rare: gathers each into one piece.

    False when the path is too narrow for any of them.
    """
    cdef int i, piece = 0, offset = 0, length, part, have
    cdef bint fits = True
    cdef Packet p
    p.data = w.single + w.prefix_len
    p.peer = g.peer
    for i in range(g.n):
        length = min(g.size, g.bytes - i * g.size)
        have = 0
        while have < length:
            part = min(<int>g.iov[piece].iov_len - offset, length - have)
            memcpy(w.single + have, <uint8_t *>g.iov[piece].iov_base + offset, part)
            have += part
            offset += part
            if offset == <int>g.iov[piece].iov_len:
                piece += 1
                offset = 0
        p.len = length - w.prefix_len
        fits &= send_single(w, g.fd, &p)
    return fits


cdef bint send_single(Loop *w, int fd, Packet *p) noexcept nogil:
    """Send one datagram; when the path is too narrow for it tell its sender, or fragment it if it allows that.

    The packet's prefix stands before it.  False when the path was too narrow.
    """
    cdef msghdr message
    cdef iovec iov
    cdef int mode, mtu
    iov.iov_base = p.data - w.prefix_len
    iov.iov_len = w.prefix_len + p.len
    memset(&message, 0, sizeof(msghdr))
    message.msg_name = <void *>&w.slot.peers[p.peer].remote
    message.msg_namelen = sizeof(sockaddr_in)
    message.msg_iov = &iov
    message.msg_iovlen = 1
    while sendmsg(fd, &message, MSG_DONTWAIT) < 0:
        if errno == EAGAIN and wait_for_socket(w, fd) or errno == EINTR:
            continue
        if errno != EMSGSIZE:
            count(w, ENCAP_DROP_SEND, 1)
            return True
        if ip_fragment_word(p.data) & FLAG_DF:
            mtu = path_mtu(w, &w.slot.peers[p.peer].remote) - IPV4_HEADER_MIN - UDP_HEADER - w.prefix_len
            count(w, ENCAP_DROP_TOO_BIG, 1)
            # The answer quotes the packet as it came, before our TTL step.
            undo_ttl_step(p.data)
            answer_local(w, p, ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, mtu if mtu > 0 else 0)
            return False
        # From our own socket, whatever the flow's: that one other workers may be using.
        mode = IP_PMTUDISC_DONT
        setsockopt(w.udp_fd, IPPROTO_IP, IP_MTU_DISCOVER, &mode, sizeof(int))
        mtu = <int>sendmsg(w.udp_fd, &message, MSG_DONTWAIT)
        mode = IP_PMTUDISC_DO
        setsockopt(w.udp_fd, IPPROTO_IP, IP_MTU_DISCOVER, &mode, sizeof(int))
        if mtu < 0:
            count(w, ENCAP_DROP_SEND, 1)
        else:
            count_sent(w, p.peer, 1, p.len)
        return False
    count_sent(w, p.peer, 1, p.len)
    return True


cdef void undo_ttl_step(uint8_t *p) noexcept nogil:
    """The inverse of ip_step_ttl, but that a checksum of 0xffff comes back as 0, its other form."""
    cdef uint32_t total = (~<uint32_t>load_be16(p + 10) & 0xffff) + 0x0100
    total = (total & 0xffff) + (total >> 16)
    p[8] += 1
    store_be16(p + 10, ~total & 0xffff)


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

cdef int decap_turn(Loop *w) noexcept nogil:
    """Take what the socket has, up to a batch, and write it to the TUN.  Returns how many messages there were."""
    cdef int i, n, longest = 0
    w.hands.n_messages = w.n_messages
    n = recvmmsg(w.udp_fd, w.hands.message, w.n_messages, MSG_DONTWAIT, NULL)
    if n > 0:
        start_batch(w.merger)
        for i in range(n):
            longest = max(longest, <int>w.hands.message[i].msg_len)
            decap_message(w, i, False)
        write_items(w)
        for i in range(n):
            clear_message(w, i)
        # Long trains fill the cache by themselves; take fewer of them before they are written out.
        w.n_messages = FEW_MESSAGES if longest >= LONG_TRAIN else UT_MESSAGES
    w.hands.n_messages = 0
    return max(n, 0)


cdef void clear_message(Loop *w, int i) noexcept nogil:
    """Make message i ready to be received into."""
    cdef msghdr *message = &w.hands.message[i].msg_hdr
    # A successor that finds a length of 0 knows that there is no message.
    w.hands.message[i].msg_len = 0
    w.train_iov[i].iov_base = w.hands.train[i]
    w.train_iov[i].iov_len = PACKET_MAX
    memset(message, 0, sizeof(msghdr))
    message.msg_name = &w.hands.source[i]
    message.msg_namelen = sizeof(sockaddr_in)
    message.msg_iov = &w.train_iov[i]
    message.msg_iovlen = 1
    message.msg_control = w.hands.control[i]
    message.msg_controllen = UT_CMSG_BYTES


cdef void decap_again(Loop *w) noexcept nogil:
    """Write what an earlier process had received and not yet written when it was killed."""
    cdef int i, n = <int>min(w.hands.n_messages, <uint32_t>UT_MESSAGES)
    start_batch(w.merger)
    for i in range(n):
        if w.hands.message[i].msg_len:
            w.hands.message[i].msg_hdr.msg_control = w.hands.control[i]
            decap_message(w, i, True)
    write_items(w)
    w.hands.n_messages = 0


cdef void decap_message(Loop *w, int i, bint again) noexcept nogil:
    """Decap every datagram of message i; `again`: those that write_items has not marked as written."""
    cdef int length = min(<int>w.hands.message[i].msg_len, PACKET_MAX)
    cdef uint8_t *train = w.hands.train[i]
    cdef int told = ut_segment_size(&w.hands.message[i].msg_hdr)
    cdef int size = datagram_size(train, length, told, w.prefix_len, again), at = 0
    while True:
        if not again or at + w.prefix_len >= length or train[at + w.prefix_len] != WRITTEN:
            decap(w, i, train + at, min(size, length - at), told if told < size else 0)
        at += size
        if at >= length:
            break


cdef int datagram_size(const uint8_t *d, int length, int told, int prefix_len, bint again) noexcept nogil:
    """How long the datagrams in a received message are, all but the last; at least 1.  `told` by the kernel, 0: not.

    An inner packet that covers the message is never cut: a kernel that encapsulates hands over a super-packet whole,
    and the size that is told is then that of its inner segments.  `again`: it may bear the mark of write_items.
    """
    cdef const uint8_t *inner = d + prefix_len
    cdef int inner_len = length - prefix_len
    if told <= 0 or told >= length:
        return max(length, 1)
    if (inner_len >= IPV4_HEADER_MIN and ip_total_len(inner) == inner_len
            and (ip_version(inner) == 4 or again and inner[0] == WRITTEN)):
        return length
    return told


cdef void decap(Loop *w, int i, uint8_t *d, int length, int inner_size) noexcept nogil:
    """Check one datagram of message i in the documented order, step its TTL and give it to the merger.

    `inner_size`: payload of a whole UDP super-packet's segments, bytes; 0 where the kernel tells none.
    """
    cdef int verdict = -1
    cdef Packet p
    cdef virtio_net_hdr vnet
    cdef Item *it
    count(w, DECAP_PACKETS, 1)
    if w.prefix_len:
        verdict = check_prefix(w.slot, d, length)
        d += w.prefix_len
        length -= w.prefix_len
    p.data = d
    p.len = length
    if verdict < 0:
        verdict = check_header(&p)
    if verdict < 0:
        verdict = check_source(w.slot, &p, load_be32(<const uint8_t *>&w.hands.source[i].sin_addr.s_addr))
    if verdict < 0 and (ip_destination(d) & w.slot.own_mask) != w.slot.own_subnet:
        verdict = DECAP_DROP_FOREIGN_DESTINATION
    if verdict < 0 and ip_ttl(d) <= 1:
        verdict = DECAP_DROP_TTL
        answer_peer(w, &p, ICMP_TIME_EXCEEDED, 0)
    if verdict < 0:
        verdict = offload_header(w.slot, &p, inner_size, &vnet)
    if verdict >= 0:
        count(w, <Counter>verdict, 1)
        return
    ip_step_ttl(d)
    if vnet.flags and not w.vnet_len:
        if vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE:
            write_segments(w, &p, &vnet)
            return
        complete_checksum(d, p.len, &vnet)
        vnet.flags = 0
    if is_full(w.merger):
        write_items(w)
        start_batch(w.merger)
    if vnet.flags:
        close_flow(w.merger, d, p.len)
        it = begin_item(w.merger, d, p.len, p.peer)
        memcpy(it.vnet, &vnet, VNET)
    else:
        add_packet(w.merger, d, p.len, p.peer)


cdef int check_prefix(const ut_slot *table, const uint8_t *d, int length) noexcept nogil:
    """Rows V1 to V5: an IPv4 packet in a frame for us?  -1, or the drop counter."""
    if length < <int>UT_PREFIX_BYTES:
        return DECAP_DROP_VXLAN_SHORT
    if not d[0] & VXLAN_VNI_IS_VALID:
        return DECAP_DROP_VXLAN_FLAGS
    if load_be32(d + VXLAN_VNI) >> 8 != table.vni:
        return DECAP_DROP_VXLAN_VNI
    if load_be16(d + INNER_ETHERTYPE) != ETHERTYPE_IPV4:
        return DECAP_DROP_VXLAN_ETHERTYPE
    if memcmp(d + INNER_DESTINATION, table.own_mac, 6) != 0:
        return DECAP_DROP_VXLAN_MAC
    return -1


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


cdef int offload_header(const ut_slot *table, Packet *p, int inner_size, virtio_net_hdr *vnet) noexcept nogil:
    """Row 17, and the virtio header that the TUN write needs.  -1, or the drop counter."""
    cdef uint8_t *d = p.data
    cdef int header = ip_header_len(d), transport = p.len - header, check, doff, flags
    memset(vnet, 0, sizeof(virtio_net_hdr))
    check = partial_checksum_offset(p)
    if check:
        vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
        vnet.csum_start = <uint16_t>header
        vnet.csum_offset = <uint16_t>check
    if check and ip_protocol(d) == PROTO_UDP and 0 < inner_size < transport - UDP_HEADER:
        # However short it is: these are several datagrams, and must not come out as one.
        if header + UDP_HEADER + inner_size > <int>table.mtu:
            return DECAP_DROP_OVERSIZE
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        vnet.hdr_len = <uint16_t>(header + UDP_HEADER)
        vnet.gso_size = <uint16_t>inner_size
    elif <uint32_t>p.len > table.mtu:
        if check == 0 or ip_protocol(d) == PROTO_UDP:
            return DECAP_DROP_OVERSIZE
        doff = (d[header + 12] >> 4) * 4
        flags = d[header + 13]
        if transport == doff or flags & TCP_SYN_RST_URG or header + doff >= <int>table.mtu:
            return DECAP_DROP_OVERSIZE
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        vnet.hdr_len = <uint16_t>(header + doff)
        vnet.gso_size = <uint16_t>(table.mtu - header - doff)
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


cdef void write_items(Loop *w) noexcept nogil:
    """Write all items, in order; every packet ends in a counter."""
    cdef int i
    cdef Item *it
    for i in range(w.merger.n):
        it = &w.merger.item[i]
        if writev(w.tun_fd, it.iov, seal(it, w.vnet_len)) >= 0:
            count_delivered(w, it)
        elif it.n > 1 and errno == EINVAL:
            # The kernel does not take super-packets of this kind (some 6.6 kernels): from now on one by one.
            refuse(w, UT_OFFLOAD_WRITE_TCP if ip_protocol(it.first) == PROTO_TCP else UT_OFFLOAD_WRITE_UDP)
            write_one_by_one(w, it)
        else:
            if errno == EBADFD:
                w.tun_lost = 1
            count(w, DECAP_DROP_TUN, it.n)
        mark_written(it)


cdef void write_segments(Loop *w, Packet *p, const virtio_net_hdr *vnet) noexcept nogil:
    """Cut up a super-packet that arrived whole, for a device that takes no virtio header.  Rare."""
    cdef SuperPacket s
    cdef iovec piece[2]
    cdef int i
    cdef bint is_taken = True
    # What was received before it is written before it.
    write_items(w)
    start_batch(w.merger)
    measure_super_packet(&s, p.data, p.len, vnet)
    sum_headers(&s)
    piece[0].iov_base = w.headers
    piece[0].iov_len = s.header
    for i in range(s.n):
        piece[1].iov_len = write_segment_header(&s, i, w.headers)
        piece[1].iov_base = p.data + s.header + i * s.size
        is_taken &= writev(w.tun_fd, piece, 2) >= 0
    p.data[0] = WRITTEN
    if not is_taken:
        count(w, DECAP_DROP_TUN, 1)
        return
    count(w, DECAP_DELIVERED, 1)
    w.peer_stats[p.peer].decap_packets += 1
    w.peer_stats[p.peer].decap_bytes += p.len


cdef inline void mark_written(Item *it) noexcept nogil:
    """Leave a mark in each packet that a successor shall not write it once more."""
    cdef int k
    it.first[0] = WRITTEN
    for k in range(1, it.n):
        (<uint8_t *>it.iov[2 + k].iov_base - it.header_len)[0] = WRITTEN


cdef inline void count_delivered(Loop *w, const Item *it) noexcept nogil:
    cdef int nbytes = it.first_len if it.n == 1 else it.n * it.header_len + it.payload
    count(w, DECAP_DELIVERED, it.n)
    w.peer_stats[it.peer].decap_packets += it.n
    w.peer_stats[it.peer].decap_bytes += nbytes


cdef void write_one_by_one(Loop *w, Item *it) noexcept nogil:
    """Write the packets of a super-packet that the kernel refused: each still stands before its payload."""
    cdef int k
    cdef iovec piece[2]
    memset(it.vnet, 0, VNET)
    piece[0].iov_base = it.vnet
    piece[0].iov_len = VNET
    for k in range(it.n):
        piece[1].iov_base = <uint8_t *>it.iov[2 + k].iov_base - it.header_len
        piece[1].iov_len = it.iov[2 + k].iov_len + it.header_len
        if writev(w.tun_fd, piece, 2) < 0:
            count(w, DECAP_DROP_TUN, 1)
            continue
        count(w, DECAP_DELIVERED, 1)
        w.peer_stats[it.peer].decap_packets += 1
        w.peer_stats[it.peer].decap_bytes += it.iov[2 + k].iov_len + it.header_len

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
    """Put the error about `offender` into w.icmp at ICMP_ROOM, zeros before it; return its length, bytes."""
    cdef uint8_t *d = w.icmp + ICMP_ROOM
    cdef uint8_t *icmp = d + IPV4_HEADER_MIN
    cdef int quote = min(offender.len, ICMP_MAX - IPV4_HEADER_MIN - ICMP_HEADER)
    cdef int total = IPV4_HEADER_MIN + ICMP_HEADER + quote
    memset(w.icmp, 0, ICMP_ROOM + IPV4_HEADER_MIN + ICMP_HEADER)
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
        if write(w.tun_fd, w.icmp + ICMP_ROOM - w.vnet_len, w.vnet_len + n) >= 0:
            count(w, ICMP_SENT, 1)
            return
    count(w, ICMP_SUPPRESSED, 1)


cdef void answer_peer(Loop *w, const Packet *offender, int kind, int code) noexcept nogil:
    """Answer a packet that came through the tunnel: back through it, to the peer that leases its source."""
    cdef msghdr message
    cdef iovec iov
    # check_source has found the peer; unless SourceCheck is off it has also seen that the packet came from there.
    if offender.peer != 0 and may_answer(w, offender):
        iov.iov_base = w.icmp + ICMP_ROOM - w.prefix_len
        iov.iov_len = w.prefix_len + build_icmp(w, offender, kind, code, 0)
        put_prefix(w, offender.peer, <uint8_t *>iov.iov_base)
        memset(&message, 0, sizeof(msghdr))
        message.msg_name = <void *>&w.slot.peers[offender.peer].remote
        message.msg_namelen = sizeof(sockaddr_in)
        message.msg_iov = &iov
        message.msg_iovlen = 1
        if sendmsg(w.udp_fd, &message, MSG_DONTWAIT) >= 0:
            count(w, ICMP_SENT, 1)
            return
    count(w, ICMP_SUPPRESSED, 1)

# ------------------------------------------------------------------------------------------------------ loop

cdef inline void use_table(Loop *w) noexcept nogil:
    """Take what a turn needs often from the table that is valid now."""
    w.slot = ut_table_enter(w.table, w.worker)
    w.prefix_len = UT_PREFIX_BYTES if w.slot.prefix_len else 0
    allow_offloads(w)


cdef inline void allow_offloads(Loop *w) noexcept nogil:
    cdef uint64_t allowed = w.slot.offloads & ~w.worker.refused
    w.group_segments = GROUP_SEGMENTS if allowed & UT_OFFLOAD_SEGMENT else 1
    w.vnet_len = VNET if allowed & UT_OFFLOAD_VNET_HDR else 0
    w.merger.tcp = w.vnet_len and allowed & UT_OFFLOAD_WRITE_TCP
    w.merger.udp = w.vnet_len and allowed & UT_OFFLOAD_WRITE_UDP


cdef void refuse(Loop *w, uint64_t offload) noexcept nogil:
    """The kernel has refused an offload: do without it from now on, and let the control plane see that."""
    w.worker.refused |= offload
    allow_offloads(w)


cdef void go_on(Loop *w) noexcept nogil:
    """Hand on what a process that was killed had in its hands.  Some of it may go twice; none is lost."""
    cdef int i
    # What stood in the way of an earlier process may be gone.
    w.worker.refused = 0
    use_table(w)
    encap_again(w)
    decap_again(w)
    ut_table_leave(w.worker)
    for i in range(UT_MESSAGES):
        clear_message(w, i)


cdef int turn(Loop *w, bint tun, bint udp) noexcept nogil:
    """Move one batch each way, or only from where something is known to wait.  Returns how many reads gave any."""
    cdef int seen = 0
    if not w.has_begun:
        w.has_begun = True
        go_on(w)
    use_table(w)
    w.worker.turns += 1
    w.tun_lost = 0
    if tun:
        seen = encap_turn(w)
    if udp and not w.tun_lost:
        seen += decap_turn(w)
    ut_table_leave(w.worker)
    return seen


cdef void run_loop(Loop *w) noexcept nogil:
    cdef pollfd fds[3]
    cdef uint64_t drained
    cdef bint tun = True, udp = True
    fds[0].fd = w.event_fd
    fds[1].fd = w.tun_fd
    fds[2].fd = w.udp_fd
    fds[0].events = fds[1].events = fds[2].events = POLLIN
    ut_store_u64(&w.worker.pid, getpid())
    while not w.stop:
        if turn(w, tun, udp):
            tun = udp = True
            continue
        tun = udp = True
        if w.tun_lost:
            w.worker.state = UT_STATE_TUN_LOST
            poll(fds, 1, TUN_LOST_WAIT_MS)
        else:
            w.worker.state = UT_STATE_RUNNING
            poll(fds, 3, -1)
            # The side that woke us goes first and alone: what waits there waits for nothing else.  A deleted device
            # makes poll return at once, with POLLERR; the read then says so.
            tun = fds[1].revents != 0 or fds[2].revents == 0
            udp = fds[2].revents != 0
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
    says which block of the statistics is ours, `tun_fd` is a non-blocking queue of a TUN device (the table says whether
    it has virtio headers), `udp_fd` the UDP socket that receives, and sends unless there are `senders`: sockets that
    share the flows among them (VXLAN).  All are borrowed: the caller keeps them open while the worker runs.
    Raises OSError when the files cannot be mapped, ValueError when they are something else.
    """

    cdef Loop *_w

    def __cinit__(self, int table_fd, int stats_fd, unsigned int index, int tun_fd, int udp_fd, senders=()):
        if index >= UT_MAX_WORKERS:
            raise ValueError(f"worker {index}: there are {UT_MAX_WORKERS} at most")
        if len(senders) > UT_MAX_SENDERS:
            raise ValueError(f"{len(senders)} sockets to send from: there are {UT_MAX_SENDERS} at most")
        self._w = <Loop *>calloc(1, sizeof(Loop))
        if self._w == NULL:
            raise MemoryError
        self._w.event_fd = -1
        self._w.headers = <uint8_t *>calloc(SEGMENTS, HEADER_ROOM)
        self._w.merger = <Merger *>calloc(1, sizeof(Merger))
        if self._w.headers == NULL or self._w.merger == NULL:
            raise MemoryError
        self._w.n_messages = UT_MESSAGES
        self._w.table = <const ut_table *>_map(table_fd, sizeof(ut_table), PROT_READ, UT_TABLE_MAGIC, "peer table")
        self._w.stats = <ut_stats *>_map(
            stats_fd, sizeof(ut_stats), PROT_READ | PROT_WRITE, UT_STATS_MAGIC, "statistics")
        self._w.worker = &self._w.stats.worker[index]
        self._w.peer_stats = self._w.stats.peer[index]
        self._w.hands = &self._w.stats.hands[index]
        self._w.tun_fd = tun_fd
        self._w.udp_fd = udp_fd
        for fd in senders:
            self._w.senders[self._w.n_senders] = fd
            self._w.n_senders += 1
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
        free(self._w.headers)
        free(self._w.merger)
        free(self._w)

    def turn(self):
        """Move one batch each way without sleeping.  True when there was anything.  Not while run() runs."""
        cdef int seen
        with nogil:
            seen = turn(self._w, True, True)
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
    "max_senders": UT_MAX_SENDERS,
    "prefix": UT_PREFIX_BYTES,
    "max_counters": UT_MAX_COUNTERS,
    "table_header": UT_TABLE_HEADER_BYTES,
    "stats_header": UT_STATS_HEADER_BYTES,
    "peer": sizeof(ut_peer),
    "slot": sizeof(ut_slot),
    "table": sizeof(ut_table),
    "worker": sizeof(ut_worker),
    "peer_stats": sizeof(ut_peer_stats),
    "stats": sizeof(ut_stats),
    "slot.l1": UT_AT_SLOT_L1,
    "slot.remotes": UT_AT_SLOT_REMOTES,
    "slot.peers": UT_AT_SLOT_PEERS,
    "slot.l2": UT_AT_SLOT_L2,
    "table.generation": UT_AT_TABLE_GENERATION,
    "table.slot": UT_AT_TABLE_SLOT,
    "worker.counter": UT_AT_WORKER_COUNTER,
    "stats.worker": UT_AT_STATS_WORKER,
    "stats.peer": UT_AT_STATS_PEER,
}
"""Sizes and offsets in bytes, for udptun/datapath/table.py and stats.py to agree with."""

if len(COUNTERS) != N_COUNTERS or N_COUNTERS > UT_MAX_COUNTERS:
    raise ImportError("the names of the counters do not match their numbers")

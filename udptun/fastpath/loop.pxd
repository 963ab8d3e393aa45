"""What one worker holds while it moves packets: `Loop`, its buffers and their limits, and which offloads it may use.

    packet      one inner packet, or a super-packet that stands for several (packet.pxd)
    group       datagrams of one size and outer TOS to one peer that the kernel takes as one message (send.pxd)
    item        packets of one flow that the TUN takes as one write (coalesce.pxd)
    prefix      bytes between the UDP header and the inner packet: none, or 22 with VXLAN (vxlan.pxd)

Who owns what is said beside each field.  A pointer into `in_flight` is valid until the end of the turn.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from udptun.fastpath.coalesce cimport ITEMS, VNET, Merger
from udptun.fastpath.packet cimport *
from udptun.fastpath.shm cimport *
from udptun.fastpath.sys cimport *

cdef enum:
    SEGMENTS = 2048               # headers and datagrams a turn; one super-packet of 64 KiB with an MSS of 48 has 1,365
    HEADER_ROOM = 144             # for each, on the average: UT_PREFIX_BYTES, 60 of IPv4 and 60 of TCP are 142
    GROUPS = SEGMENTS             # each datagram may need a message of its own
    GROUP_SEGMENTS = 64           # UDP_MAX_SEGMENTS before Linux 6.9
    HEADERS_BYTES = SEGMENTS * HEADER_ROOM
    ICMP_MAX = 576                # bytes of an ICMP answer, RFC 1812 4.3.2.3
    ICMPV6_MAX = 1280             # RFC 4443 2.4(c)
    ICMP_ROOM = 32                # bytes before an ICMP answer, for a virtio header or a prefix
    SINGLE_ROOM = 32              # bytes before a single datagram's packet, for a prefix or a virtio header

cdef struct Group:
    uint32_t peer
    ut_remote remote              # of the peer, when the group was begun; the table may change before it is sent
    int fd                        # the socket that it leaves from
    int size                      # of every datagram but the last, bytes, with its prefix
    int tos                       # of the outer packets
    int n                         # datagrams
    int bytes                     # of all, with their prefixes
    iovec *iov                    # into Loop.iov
    int n_iov
    bint is_closed                # the last datagram is shorter than the others, so none may follow

cdef struct Loop:
    # Borrowed: shared memory, and descriptors that the Worker object's creator keeps open.
    const ut_table *table
    ut_stats *stats
    ut_worker *worker             # our block of stats
    Counters *counters            # in that block
    ut_peer_stats *peer_stats     # our row of stats.peer
    ut_in_flight *in_flight       # ours of stats.in_flight
    ut_stray *strays              # our row of stats.stray
    ut_ring *punts                # our ring of stats.punt
    ut_ring *injects              # worker 0's: what the control plane hands over; NULL of the others
    ut_trace_ring *traces         # our rings of stats.traced, by UT_TRACE_*
    int punt_fd                   # an eventfd that tells the control plane of punts; -1: nobody is told
    int tun_fd                    # of our queue, and what we write to: queue[0]
    int queue[UT_MAX_WORKERS]     # of the device, that we read
    int n_queues
    int udp_fd
    int ipv6_fd                   # beside udp_fd, which is of IPv4 then; -1: udp_fd is all that we have
    int senders[UT_MAX_SENDERS]   # sockets with ports of their own to send from (flow.pxd), the same for all workers
    int n_senders
    int ipv6_senders[UT_MAX_SENDERS]  # likewise of IPv6, where udp_fd is of IPv4 and ipv6_fd beside it
    int n_ipv6_senders
    int index, n_workers          # which worker of how many
    # Owned by the Worker object.
    int event_fd                  # wakes us; worker 0's is the control plane's too, and borrowed
    bint is_event_fd_ours
    uint32_t *single_until_s      # by peer: until when its datagrams go one by one; 0: in groups.  CLOCK_MONOTONIC
    uint8_t *headers              # encap: HEADERS_BYTES for segments' headers, each behind its prefix
    Merger *merger                # decap
    # Encap: the groups that wait for sending.
    Group group[GROUPS]
    iovec iov[2 * SEGMENTS]
    int n_groups, n_iov, n_header_bytes
    mmsghdr message[GROUPS]
    uint8_t control[GROUPS][UT_SEND_CMSG_BYTES]
    uint8_t single_control[UT_SEND_CMSG_BYTES]
    # Decap: where each message is received to, and how many to ask recvmmsg for.
    iovec train_iov[UT_MESSAGES]
    int n_messages
    uint8_t icmp[ICMP_ROOM + ICMPV6_MAX]  # an ICMP answer
    uint8_t single[SINGLE_ROOM + PACKET_MAX]  # one datagram put together, behind its prefix
    uint8_t cut_header[PACKET_MAX]        # of a segment that is written to the TUN
    ut_ring_slot injected                 # a slot of `injects`, copied before it is looked at
    bint has_punted                       # the control plane has not been told of the last punts
    # The table of this turn, and what follows from it.
    const ut_slot *slot
    int prefix_len                # bytes before each inner packet on the wire
    bint is_traced                # whether somebody watches: then trace.pxd is asked about each packet
    int group_segments            # datagrams a message; 1: the kernel does not cut messages up for us
    bint has_grouped              # whether the kernel has ever cut a message up
    bint has_ecn                  # whether each send has a TOS of its own
    int n_single                  # peers that get their datagrams one by one, for a while
    uint32_t now_s                # of this turn, while there are such peers
    uint32_t n_unplaced           # stray datagrams that found no slot
    int vnet_len                  # of the virtio header before every packet of the TUN, bytes: VNET or 0
    # Sleeps until a socket's full send buffer has room, and moves packets the other way meanwhile; 0: stop instead.
    # Here, because it needs the stages of both ways.
    bint (*wait_for_room)(Loop *w, int fd) noexcept nogil
    int next_queue                # of `queue`: where the next read is tried first
    int stop
    bint has_begun                # false while we are the standby: until then `in_flight` is another process's
    int tun_lost
    ut_trace_filter filter        # of the packets to trace, and the trace's number: valid with is_traced
    uint64_t trace_number
    uint32_t n_open[2]            # entries of `traces` that are not published yet
    long icmp_tokens
    uint64_t icmp_refilled_ns


cdef inline void allow_offloads(Loop *w) noexcept nogil:
    """Use what the control plane allows and the kernel has not refused."""
    cdef uint64_t allowed = w.slot.offloads & ~w.worker.refused
    w.group_segments = GROUP_SEGMENTS if allowed & UT_OFFLOAD_SEGMENT else 1
    w.has_ecn = allowed & UT_OFFLOAD_ECN != 0
    w.vnet_len = VNET if allowed & UT_OFFLOAD_VNET_HDR else 0
    w.merger.tcp = w.vnet_len and allowed & UT_OFFLOAD_WRITE_TCP
    w.merger.udp = w.vnet_len and allowed & UT_OFFLOAD_WRITE_UDP


cdef inline int own_socket(const Loop *w, const ut_remote *remote) noexcept nogil:
    """Our socket to send to the remote from: that of its family."""
    return w.ipv6_fd if w.ipv6_fd >= 0 and remote.where.any.sa_family == AF_INET6 else w.udp_fd


cdef inline void mark_written(uint8_t *d) noexcept nogil:
    """Mark a packet, so that a successor does not write it once more: its first byte is its version alone."""
    d[0] >>= 4


cdef inline bint is_written(const uint8_t *d) noexcept nogil:
    """Whether it has the mark; no packet begins so."""
    return d[0] == 4 or d[0] == 6


cdef inline void refuse(Loop *w, uint64_t offload) noexcept nogil:
    """The kernel has refused an offload: do without it from now on, and let the control plane see that."""
    w.worker.refused |= offload
    allow_offloads(w)

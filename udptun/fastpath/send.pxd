# cython: cdivision=True
"""Gather datagrams into groups and send them: the last stage on the way from the TUN to UDP.

    datagram    what is one packet on the wire: prefix and inner packet, in one or two pieces of memory
    group       datagrams of one size (the last may be shorter) and outer TOS to one peer from one socket: one message,
                which the kernel cuts up (UDP_SEGMENT)
    most        how many datagrams a group may have: fewer to a peer that may read one datagram at a time

A datagram joins the last group or begins another one, so nothing overtakes.  `send_groups` gives all groups to the
kernel with one sendmmsg for each run of groups from the same socket.  A group that the kernel refuses is sent datagram
by datagram.  Every datagram ends in a counter: encap_sent, encap_drop_send or encap_drop_too_big.

A full send buffer holds up nothing but the reading of the TUN: see `wait_for_room` in _fastpath.pyx.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from udptun.fastpath.icmp cimport TOO_BIG, may_answer, send_local_answer
from udptun.fastpath.loop cimport *
from udptun.fastpath.trace cimport drop_late
from udptun.fastpath.wire cimport *

cdef enum:
    GROUP_BYTES = 65507           # UDP payload of an IPv4 packet, which UDP_SEGMENT is cut from
    SINGLE_S = 10                 # a peer whose groups were refused gets single datagrams for so long
    PLAIN_SEGMENTS = 16           # to a peer that may read one datagram at a time: its queue holds some 90


cdef inline int group_limit(const Loop *w, uint32_t peer) noexcept nogil:
    """How many datagrams one message to the peer may carry.

    With VXLAN every peer takes all: it is a kernel, or udptun.
    """
    if w.n_single and w.single_until_s[peer] > w.now_s:
        return 1
    if w.prefix_len or w.slot.peers[peer].flags & UT_PEER_UDPTUN:
        return w.group_segments
    return min(w.group_segments, PLAIN_SEGMENTS)


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


cdef inline void queue_datagram(
        Loop *w, int fd, uint32_t peer, int tos, uint8_t *header, int header_len, uint8_t *data, int data_len,
        int most) noexcept nogil:
    """Append one datagram, in one or two pieces, to the last group, or begin another group.

    The pieces stay where they are until `send_groups`.  The caller has made room.
    """
    cdef int length = header_len + data_len
    cdef Group *g = &w.group[max(w.n_groups, 1) - 1]
    if (w.n_groups == 0 or g.peer != peer or g.fd != fd or g.tos != tos or g.is_closed or length > g.size
            or g.n >= most or g.bytes + length > GROUP_BYTES):
        g = &w.group[w.n_groups]
        w.n_groups += 1
        memset(g, 0, sizeof(Group))
        g.peer = peer
        g.remote = remote_of(w.slot, peer)[0]
        g.fd = fd
        g.tos = tos
        g.size = length
        g.iov = &w.iov[w.n_iov]
    if header_len:
        append_piece(w, g, header, header_len)
    append_piece(w, g, data, data_len)
    g.n += 1
    g.bytes += length
    g.is_closed = length < g.size


cdef inline void make_room(Loop *w, int n, int header_bytes) noexcept nogil:
    """Have room for `n` more datagrams, SEGMENTS at most, each with a message of its own, and for their headers.

    Before the table is looked at: what is queued may have to be sent, and the table may change meanwhile.
    """
    if w.n_groups + n > GROUPS or w.n_header_bytes + header_bytes > HEADERS_BYTES or w.n_iov + 2 * n > 2 * SEGMENTS:
        send_groups(w)


cdef inline void send_groups(Loop *w) noexcept nogil:
    """Send all queued groups.  Their headers and pieces are free again."""
    cdef int i, sent, end, error, nbytes, done = 0
    cdef Group *g
    for i in range(w.n_groups):
        address_message(w, i)
    while done < w.n_groups:
        end = done + 1
        while end < w.n_groups and w.group[end].fd == w.group[done].fd:
            end += 1
        sent = sendmmsg(w.group[done].fd, w.message + done, end - done, MSG_DONTWAIT)
        if sent > 0:
            nbytes = 0
            for i in range(done, done + sent):
                g = &w.group[i]
                w.has_grouped |= g.n > 1
                nbytes += count_sent(w, g.peer, g.n, g.bytes - g.n * w.prefix_len)
            count_send(w, sent, nbytes)
            done += sent
        elif errno == EAGAIN:
            if not w.wait_for_room(w, w.group[done].fd):
                for i in range(done, w.n_groups):
                    drop_group(w, &w.group[i])
                break
        elif errno != EINTR:
            error = errno
            g = &w.group[done]
            if send_one_by_one(w, g) and g.n > 1 and (error == EIO or error == EINVAL):
                stop_grouping(w, g.peer)
            done += 1
    w.n_groups = w.n_iov = w.n_header_bytes = 0


cdef inline void stop_grouping(Loop *w, uint32_t peer) noexcept nogil:
    """The kernel refused a group and took each of its datagrams alone.

    If it has never taken a group, it or the device cannot cut messages up (no UDP_SEGMENT: EINVAL; no checksum offload:
    EIO), and none is tried again.  Otherwise the way to this one peer cannot, and that may change.
    """
    cdef timespec now
    if not w.has_grouped:
        refuse(w, UT_OFFLOAD_SEGMENT)
        return
    clock_gettime(CLOCK_MONOTONIC, &now)
    w.now_s = <uint32_t>now.tv_sec
    w.n_single += w.single_until_s[peer] == 0
    w.single_until_s[peer] = w.now_s + SINGLE_S


cdef inline void allow_groups_again(Loop *w) noexcept nogil:
    """At the begin of a turn, while some peers get single datagrams: group again for those whose time is over."""
    cdef timespec now
    cdef uint32_t peer
    clock_gettime(CLOCK_MONOTONIC, &now)
    if <uint32_t>now.tv_sec == w.now_s:
        return
    w.now_s = <uint32_t>now.tv_sec
    for peer in range(UT_MAX_PEERS):
        if w.single_until_s[peer] and w.single_until_s[peer] <= w.now_s:
            w.single_until_s[peer] = 0
            w.n_single -= 1


cdef inline void address_message(Loop *w, int i) noexcept nogil:
    """Make message i carry group i."""
    cdef Group *g = &w.group[i]
    cdef msghdr *message = &w.message[i].msg_hdr
    memset(message, 0, sizeof(msghdr))
    message.msg_name = &g.remote.where
    message.msg_namelen = g.remote.where_len
    message.msg_iov = g.iov
    message.msg_iovlen = g.n_iov
    # A single datagram goes without: some network cards refuse what looks like an offload.
    if g.n > 1:
        ut_put_segment_size(message, w.control[i], <uint16_t>g.size)
    if g.tos:
        ut_put_tos(message, w.control[i], g.tos)


cdef inline int count_sent(Loop *w, uint32_t peer, int n, int nbytes) noexcept nogil:
    """Count `n` datagrams to the peer, `nbytes` without their prefixes.  Returns `nbytes`."""
    w.counters.encap_sent += n
    w.peer_stats[peer].encap_packets += n
    w.peer_stats[peer].encap_bytes += nbytes
    return nbytes


cdef inline void count_send(Loop *w, int n_messages, int nbytes) noexcept nogil:
    """Count one call that the kernel has taken so many messages by, with `nbytes` of inner packets."""
    w.counters.udp_send_calls += 1
    w.counters.udp_send_messages += n_messages
    w.counters.udp_sent_bytes += nbytes


cdef inline bint send_one_by_one(Loop *w, Group *g) noexcept nogil:
    """Send a group that the kernel refused, each datagram for itself.  Rare: copies each into one piece.

    True when the kernel took them all as they are: none was refused, and the path is too narrow for none.
    """
    cdef int i, piece = 0, offset = 0
    cdef bint are_taken = True
    cdef const uint8_t *at
    cdef Packet p
    for i in range(g.n):
        at = copy_datagram(w, g, i, &piece, &offset, &p)
        are_taken &= send_single(w, g, &p, at)
    return are_taken


cdef inline void drop_group(Loop *w, const Group *g) noexcept nogil:
    """Drop a group that finds no room in the send buffer, as the worker shall stop."""
    cdef int i, piece = 0, offset = 0
    cdef const uint8_t *at
    cdef Packet p
    if not w.is_traced:
        w.counters.encap_drop_send += g.n
        return
    for i in range(g.n):
        at = copy_datagram(w, g, i, &piece, &offset, &p)
        drop_refused(w, &p, at)


cdef inline const uint8_t *copy_datagram(
        Loop *w, const Group *g, int i, int *piece, int *offset, Packet *p) noexcept nogil:
    """Copy datagram i of a group into one piece, which `p` is the packet of.  Returns where its last byte was read.

    The datagrams are taken in order: piece and offset say where this one begins and then where the next one does, and
    are 0 at first.
    """
    cdef int length = min(g.size, g.bytes - i * g.size), have = 0, part
    cdef const uint8_t *at = NULL
    while have < length:
        part = min(<int>g.iov[piece[0]].iov_len - offset[0], length - have)
        memcpy(w.single + have, <uint8_t *>g.iov[piece[0]].iov_base + offset[0], part)
        have += part
        offset[0] += part
        at = <uint8_t *>g.iov[piece[0]].iov_base + offset[0] - 1
        if offset[0] == <int>g.iov[piece[0]].iov_len:
            piece[0] += 1
            offset[0] = 0
    p.data = w.single + w.prefix_len
    p.len = length - w.prefix_len
    p.peer = g.peer
    return at


cdef inline bint send_single(Loop *w, Group *g, Packet *p, const uint8_t *at) noexcept nogil:
    """Send one datagram of a group, whose prefix stands before the packet.  True when the kernel took it as it is.

    `at` is the last byte of the packet where it was read.
    Where the path is too narrow for it, it is sent in fragments if it may be, and answered otherwise.
    """
    cdef msghdr message
    cdef iovec iov
    cdef bint is_tos_refused = False
    address_single(w, p, &g.remote, g.tos, &message, &iov)
    while sendmsg(g.fd, &message, MSG_DONTWAIT) < 0:
        if errno == EAGAIN and w.wait_for_room(w, g.fd) or errno == EINTR:
            continue
        if errno == EINVAL and message.msg_controllen:
            # A kernel that takes no TOS with a message, or a route that refuses: then it refuses once more.
            message.msg_controllen = 0
            is_tos_refused = True
            continue
        if errno != EMSGSIZE:
            drop_refused(w, p, at)
            return False
        take_length(p)
        read_headers(p)
        if may_be_fragmented(p, p.len):
            send_in_fragments(w, p, &message, own_socket(w, &g.remote), at)
        else:
            drop_too_big(w, p, &g.remote, at)
        return False
    count_send(w, 1, count_sent(w, p.peer, 1, p.len))
    if is_tos_refused:
        g.tos = 0
        refuse(w, UT_OFFLOAD_ECN)
    return not is_tos_refused


cdef inline void drop_refused(Loop *w, const Packet *p, const uint8_t *at) noexcept nogil:
    w.counters.encap_drop_send += 1
    if w.is_traced:
        drop_late(w, UT_TRACE_ENCAP, p, at, &w.counters.encap_drop_send)


cdef inline void drop_too_big(Loop *w, Packet *p, const ut_remote *remote, const uint8_t *at) noexcept nogil:
    """Drop a packet that the path does not take and nobody may fragment; tell its sender how long one may be.

    Asking the kernel for that takes five system calls, so it is asked only when the answer may be sent.
    """
    cdef int mtu
    cdef Counter n_answers = w.counters.icmp_sent
    cdef ut_traced *entry = NULL
    w.counters.encap_drop_too_big += 1
    if w.is_traced:
        entry = drop_late(w, UT_TRACE_ENCAP, p, at, &w.counters.encap_drop_too_big)
    undo_ttl_step(p)
    if not may_answer(w, p):
        w.counters.icmp_suppressed += 1
        return
    mtu = path_mtu(w, remote) - outer_header(remote) - UDP_HEADER - w.prefix_len
    send_local_answer(w, p, TOO_BIG, least_mtu(p, max(mtu, 0)))
    if entry != NULL:
        entry.is_answered |= w.counters.icmp_sent != n_answers


cdef inline int outer_header(const ut_remote *remote) noexcept nogil:
    """How long the IP header of an outer packet is, bytes."""
    return IPV6_HEADER if remote.where.any.sa_family == AF_INET6 else IPV4_HEADER_MIN


cdef inline void address_single(
        Loop *w, Packet *p, ut_remote *remote, int tos, msghdr *message, iovec *iov) noexcept nogil:
    """Make `message` carry one datagram, whose prefix stands before the packet, in one piece."""
    iov.iov_base = p.data - w.prefix_len
    iov.iov_len = w.prefix_len + p.len
    memset(message, 0, sizeof(msghdr))
    message.msg_name = &remote.where
    message.msg_namelen = remote.where_len
    message.msg_iov = iov
    message.msg_iovlen = 1
    if tos:
        ut_put_tos(message, w.single_control, tos)


cdef inline void send_alone(Loop *w, Packet *p, ut_remote *remote, int tos, const uint8_t *at) noexcept nogil:
    """Send one datagram that is known to be longer than the path takes, as `send_in_fragments`."""
    cdef msghdr message
    cdef iovec iov
    address_single(w, p, remote, tos, &message, &iov)
    send_in_fragments(w, p, &message, own_socket(w, remote), at)


cdef inline void send_in_fragments(Loop *w, Packet *p, msghdr *message, int fd, const uint8_t *at) noexcept nogil:
    """Send a datagram that is longer than the path takes, and let the outer packet be fragmented.

    `at` points into the packet where it was read.
    Our kernel does that as far as it knows what the path takes.  Over IPv4 routers do it too, as there is no DF.

    It leaves from `fd`, our own socket, whatever the flow's is: other workers may be sending from that one just now.
    """
    cdef ssize_t sent
    cdef int error, family = (<const sockaddr *>message.msg_name).sa_family
    while True:
        discover_paths(fd, family, IP_PMTUDISC_DONT)
        sent = sendmsg(fd, message, MSG_DONTWAIT)
        error = errno
        discover_paths(fd, family, IP_PMTUDISC_PROBE)
        if sent >= 0:
            count_send(w, 1, count_sent(w, p.peer, 1, p.len))
            return
        if error == EAGAIN and w.wait_for_room(w, fd) or error == EINTR:
            continue
        if error != EINVAL or not message.msg_controllen:
            drop_refused(w, p, at)
            return
        # As in `send_single`.
        message.msg_controllen = 0


cdef inline void discover_paths(int fd, int family, int mode) noexcept nogil:
    """How the socket gets to know what a path takes.  The modes of IPv6 have the numbers of IPv4's."""
    if family == AF_INET6:
        setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &mode, sizeof(int))
    else:
        setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &mode, sizeof(int))


cdef inline int path_mtu(Loop *w, const ut_remote *remote) noexcept nogil:
    """What the kernel believes the MTU to `remote` is, bytes of outer packet; 0 when it does not say.

    Only a connected socket can ask.  Rare: at most once for each ICMP answer.
    """
    cdef ut_socket_address own
    cdef socklen_t n = sizeof(ut_socket_address)
    cdef int mtu = 0, status
    cdef int fd = socket(remote.where.any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    if fd < 0:
        return 0
    if getsockname(own_socket(w, remote), &own.any, &n) == 0:
        # At the same place in both families.
        own.ipv4.sin_port = 0
        bind(fd, &own.any, n)
    if connect(fd, &remote.where.any, remote.where_len) == 0:
        n = sizeof(int)
        if remote.where.any.sa_family == AF_INET6:
            status = getsockopt(fd, IPPROTO_IPV6, IPV6_MTU, &mtu, &n)
        else:
            status = getsockopt(fd, IPPROTO_IP, IP_MTU, &mtu, &n)
        if status != 0:
            mtu = 0
    close(fd)
    return mtu

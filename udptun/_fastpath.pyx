# cython: language_level=3str, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""The datapath: TUN <-> UDP.  Knows descriptors and bytes; never a lease, a config or a logger.

Theory of operation
===================

One worker is one thread without the GIL.  A turn of its loop moves one batch each way.  Read on in this order; each
stage is a file of fastpath/ that opens with its own words:

    encap_turn        decap_turn
      readv             recvmmsg          TUN and socket, below in this file
      encap.pxd         decap.pxd         check a packet, find its peer, step its TTL
      segment.pxd       coalesce.pxd      cut a super-packet up; put packets of one flow together
      send.pxd          write.pxd         sendmmsg to the peers; writev to the TUN

    icmp.pxd          answers about packets that are dropped       loop.pxd    a worker's buffers and limits
    vxlan.pxd         the prefix before each packet with VXLAN     shm.pxd     memory shared with the control plane
    flow.pxd          from which port a flow leaves                sys.pxd     the kernel's calls and structures
    ecn.pxd           marks of congestion, in and out              loops.pxd   the tunnel's own datagrams inside it
    wire.pxd          where the fields of a packet are             stray.pxd   datagrams that no lease explains
    packet.pxd        a packet of either family, read once         trace.pxd   packets shown while somebody watches
    ring.pxd          packets that the control plane gets, and that it hands over

On the wire there are always single packets.  A read of the TUN may be a super-packet, which is cut up; datagrams of one
peer, size and outer TOS go to the kernel in groups, one message each.  A received message may be a train of datagrams;
packets of one flow are put together again and written as one item.

When a turn moves nothing the worker sleeps in poll() on both descriptors and on an eventfd.  stop() writes to it, and
so does the control plane when it has handed a packet over.  Under load the worker sees both because every turn looks.

Nothing is allocated, locked or logged per packet, and nothing here raises.  Every packet ends in exactly one counter,
so that the packets read are the sum of what was sent and the drops by reason (docs/wire-format.md lists the conditions
in the order in which the code checks them).

The table of peers is shared memory that the control plane rewrites; a turn uses one slot of it from begin to end (shm.h
has the protocol).  Counters are shared memory that only this worker writes.

The TUN device may be deleted under us: every read and write then answers EBADFD, for every holder of the descriptor,
until someone attaches it again with TUNSETIFF.  Meanwhile, and while the kernel is still at deleting it, the worker
tries again every TUN_LOST_WAIT_MS and leaves arriving datagrams in the socket's queue.

A process that is killed loses nothing.  What it had not begun to read waits in the kernel's queues.  What it had read
and not handed on lies in shared memory (`ut_in_flight`), and its successor hands it on (`hand_on_inherited`): a batch
at most, a part of it twice.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EBADFD, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from udptun.fastpath.coalesce cimport VNET, Merger, start_batch
from udptun.fastpath.decap cimport check_packet, decap_message, is_for_control_plane, offload_header
from udptun.fastpath.encap cimport check_way, encap, take_read
from udptun.fastpath.icmp cimport ICMP_BURST
from udptun.fastpath.loop cimport *
from udptun.fastpath.ring cimport announce_punts, drop_half_injected, take_injected
from udptun.fastpath.segment cimport SuperPacket
from udptun.fastpath.send cimport allow_groups_again, send_groups
from udptun.fastpath.trace cimport look_for_trace, publish_traced
from udptun.fastpath.wire cimport IPV6_HEADER, ip_total_len, ip_version, ipv6_total_len
from udptun.fastpath.write cimport write_items

cdef enum:
    FEW_MESSAGES = 8              # a receive, when they are long trains
    LONG_TRAIN = 8192             # bytes
    TUN_LOST_WAIT_MS = 20
    NO_TABLE_WAIT_MS = 10
    BEFORE_QUEUES = 3             # descriptors in poll(): the eventfd and the sockets
    MOST_HAND_ONS = 2             # of what was in flight: it may be what ends whoever hands it on
    N_COUNTERS = sizeof(Counters) // sizeof(Counter)
    N_DIRECTIONS = 3              # whose packets are counted: encap, decap, inject
    NO_DIRECTION = -1
    IS_TOTAL = N_DIRECTIONS       # the packets of a direction: `settle` sets it by their ends, and adds nothing to it

# ------------------------------------------------------------------------------------------ encap: TUN to UDP

cdef int encap_turn(Loop *w) noexcept nogil:
    """Read what our queues of the TUN have, up to a batch, and send it.  Returns how many reads gave something."""
    cdef iovec room[2]
    cdef Packet p
    cdef ut_read *tun_read
    cdef ssize_t got
    cdef int reads = 0, used = 0, n_empty = 0
    room[0].iov_len = w.vnet_len
    room[1].iov_len = PACKET_MAX
    while reads < <int>UT_READS and used < <int>UT_READ_BYTES:
        tun_read = &w.in_flight.read[reads]
        tun_read.at = <uint32_t>UT_PREFIX_ROOM + used
        tun_read.is_stepped = 0
        if w.vnet_len == 0:
            memset(tun_read.vnet, 0, VNET)
        room[0].iov_base = tun_read.vnet
        room[1].iov_base = p.data = w.in_flight.arena + tun_read.at
        # A successor that finds a first byte of 0 knows that there is no packet.
        p.data[0] = 0
        w.in_flight.n_reads = reads + 1
        got = readv(w.queue[w.next_queue], room, 2)
        if got < 0:
            if errno == EBADFD:
                w.tun_lost = 1
                break
            n_empty += 1
            if n_empty == w.n_queues:
                break
            step_queue(w)
            continue
        reads += 1
        p.len = <int>got - w.vnet_len
        if p.len > 0:
            used += p.len + w.prefix_len
        encap(w, &p, tun_read)
    # A queue that is never empty does not keep the others waiting.
    step_queue(w)
    w.counters.tun_reads += reads
    send_groups(w)
    publish_traced(w, UT_TRACE_ENCAP)
    w.in_flight.n_reads = 0
    return reads


cdef inline void step_queue(Loop *w) noexcept nogil:
    """Have the next read be from the next queue."""
    w.next_queue += 1
    if w.next_queue == w.n_queues:
        w.next_queue = 0


cdef void encap_inherited(Loop *w) noexcept nogil:
    """Send what an earlier process had read and perhaps not sent when it was killed."""
    cdef uint32_t i, n = min(w.in_flight.n_reads, <uint32_t>UT_READS), room = UT_PREFIX_ROOM
    cdef Packet p
    cdef ut_read *tun_read
    for i in range(n):
        tun_read = &w.in_flight.read[i]
        p.data = w.in_flight.arena + max(room, min(tun_read.at, room + <uint32_t>UT_READ_BYTES))
        p.is_ipv6 = ip_version(p.data) == 6
        if not p.is_ipv6 and ip_version(p.data) != 4:
            continue
        p.len = min(ipv6_total_len(p.data) if p.is_ipv6 else ip_total_len(p.data), <int>PACKET_MAX)
        if tun_read.is_stepped:
            tun_read.is_stepped = 0
            undo_ttl_step(&p)
        encap(w, &p, tun_read)
    send_groups(w)
    publish_traced(w, UT_TRACE_ENCAP)
    w.in_flight.n_reads = 0

# ------------------------------------------------------------------------------------------ decap: UDP to TUN

cdef int decap_turn(Loop *w, int fd) noexcept nogil:
    """Take what a socket of ours has, up to a batch, and write it to the TUN.  Returns how many messages there were."""
    cdef int i, n, longest = 0
    w.in_flight.n_messages = w.n_messages
    n = recvmmsg(fd, w.in_flight.message, w.n_messages, MSG_DONTWAIT, NULL)
    if n > 0:
        w.counters.udp_receive_calls += 1
        w.counters.udp_receive_messages += n
        start_batch(w.merger)
        for i in range(n):
            longest = max(longest, <int>w.in_flight.message[i].msg_len)
            decap_message(w, i, False)
        write_items(w)
        publish_traced(w, UT_TRACE_DECAP)
        announce_punts(w)
        for i in range(n):
            clear_message(w, i)
        # Long trains fill the cache by themselves; take fewer of them before they are written out.
        w.n_messages = FEW_MESSAGES if longest >= LONG_TRAIN else UT_MESSAGES
    w.in_flight.n_messages = 0
    return max(n, 0)


cdef void clear_message(Loop *w, int i) noexcept nogil:
    """Make message i ready to be received into."""
    cdef msghdr *message = &w.in_flight.message[i].msg_hdr
    # A successor that finds a length of 0 knows that there is no message.
    w.in_flight.message[i].msg_len = 0
    w.train_iov[i].iov_base = w.in_flight.train[i]
    w.train_iov[i].iov_len = PACKET_MAX
    memset(message, 0, sizeof(msghdr))
    message.msg_name = &w.in_flight.source[i]
    message.msg_namelen = sizeof(ut_socket_address)
    message.msg_iov = &w.train_iov[i]
    message.msg_iovlen = 1
    message.msg_control = w.in_flight.control[i]
    message.msg_controllen = UT_CMSG_BYTES


cdef void decap_inherited(Loop *w) noexcept nogil:
    """Write what an earlier process had received and not yet written when it was killed."""
    cdef int i, n = <int>min(w.in_flight.n_messages, <uint32_t>UT_MESSAGES)
    cdef msghdr *header
    start_batch(w.merger)
    for i in range(n):
        if w.in_flight.message[i].msg_len:
            header = &w.in_flight.message[i].msg_hdr
            header.msg_control = w.in_flight.control[i]
            # The memory may have been overwritten: nothing behind the room is looked at.
            header.msg_controllen = min(header.msg_controllen, <size_t>UT_CMSG_BYTES)
            decap_message(w, i, True)
    write_items(w)
    publish_traced(w, UT_TRACE_DECAP)
    w.in_flight.n_messages = 0

# ------------------------------------------------------------------------------------------------------ loop

cdef inline void use_table(Loop *w) noexcept nogil:
    """Take what a turn needs often from the table that is valid now."""
    w.slot = ut_table_enter(w.table, w.worker)
    w.prefix_len = UT_PREFIX_BYTES if w.slot.prefix_len else 0
    allow_offloads(w)
    look_for_trace(w)


cdef void hand_on(Loop *w, ut_worker *dead) noexcept nogil:
    """Hand on what is in `w.in_flight`, which `dead` had, or drop it when two successors have died of that already."""
    cdef Counters since
    memset(&since, 0, sizeof(Counters))
    w.counters = &since
    if w.in_flight.n_handed_on < MOST_HAND_ONS:
        ut_store_u64(&w.in_flight.n_handed_on, w.in_flight.n_handed_on + 1)
        encap_inherited(w)
        decap_inherited(w)
    else:
        drop_inherited(w)
    ut_store_u64(&w.in_flight.n_handed_on, 0)
    w.counters = <Counters *>w.worker.counter
    settle(dead.counter, <Counter *>&since)


cdef void settle(Counter *counter, const Counter *since) noexcept nogil:
    """Add to a dead worker's counters what was counted `since`, such that each packet has one end again.

    The worker counted a packet when it saw it, and its end once the kernel had taken it.  What it was killed with in
    between was handed on and so counted twice; or the kernel had taken it, and it was marked as written.
    """
    cdef Counter before, ends
    cdef int direction, i
    for direction in range(N_DIRECTIONS):
        before = counter[packets_of[direction]]
        ends = 0
        for i in range(N_COUNTERS):
            if direction_of[i] == direction:
                counter[i] += since[i]
                ends += counter[i]
        if ends < before:
            counter[uncounted_of[direction]] += before - ends
        else:
            counter[packets_of[direction]] = ends
    for i in range(N_COUNTERS):
        if direction_of[i] == NO_DIRECTION:
            counter[i] += since[i]


cdef void drop_inherited(Loop *w) noexcept nogil:
    """Count what is in `w.in_flight` as dropped, a read or a message as one: nothing in it is looked at."""
    cdef uint32_t i, n = 0, room = UT_PREFIX_ROOM
    for i in range(min(w.in_flight.n_reads, <uint32_t>UT_READS)):
        n += w.in_flight.arena[max(room, min(w.in_flight.read[i].at, room + <uint32_t>UT_READ_BYTES))] != 0
    w.counters.encap_packets += n
    w.counters.encap_drop_in_flight += n
    n = 0
    for i in range(min(w.in_flight.n_messages, <uint32_t>UT_MESSAGES)):
        n += w.in_flight.message[i].msg_len != 0
        w.in_flight.message[i].msg_len = 0
    w.counters.decap_packets += n
    w.counters.decap_drop_in_flight += n
    w.in_flight.n_reads = w.in_flight.n_messages = 0


cdef void hand_on_inherited(Loop *w) noexcept nogil:
    """Hand on what a process that was killed had in flight.  Some of it may go twice, none is lost.

    The process may have died of it.  So it is handed on twice at most, and then dropped.
    The dead process may have had more workers than this one: what they had is shared out among those there are.
    """
    cdef int i
    cdef ut_in_flight *own = w.in_flight
    # The kernel may take what it has refused an earlier process.
    w.worker.refused = 0
    use_table(w)
    hand_on(w, w.worker)
    drop_half_injected(w)
    # The process may have been killed before it told of its punts.
    w.has_punted = True
    announce_punts(w)
    i = w.index + w.n_workers
    while i < <int>UT_MAX_WORKERS:
        # A worker that never ran has left nothing, and its memory costs nothing until it is looked at.
        if w.stats.worker[i].turns:
            w.in_flight = &w.stats.in_flight[i]
            hand_on(w, &w.stats.worker[i])
            w.stats.worker[i].state = UT_STATE_STOPPED
            ut_store_u64(&w.stats.worker[i].pid, 0)
            ut_table_leave(&w.stats.worker[i])
        i += w.n_workers
    w.in_flight = own
    ut_table_leave(w.worker)
    for i in range(UT_MESSAGES):
        clear_message(w, i)


cdef bint wait_for_room(Loop *w, int fd) noexcept nogil:
    """In the middle of sending: the socket's send buffer is full.  False when the worker shall stop instead.

    Until there is room, what comes from the peers is moved on, and the table may change.  What waits to be sent has its
    addresses with it.  The TUN is not read, so its queue fills, and the kernel slows its senders down.
    """
    cdef pollfd fds[4]
    cdef int i
    fds[0].fd = fd
    fds[0].events = POLLOUT
    fds[1].fd = w.event_fd
    fds[1].events = fds[2].events = fds[3].events = POLLIN
    while not w.stop:
        # A lost device takes nothing; poll() leaves out what has no descriptor.
        fds[2].fd = -1 if w.tun_lost else w.udp_fd
        fds[3].fd = -1 if w.tun_lost else w.ipv6_fd
        ut_table_leave(w.worker)
        poll(fds, 4, -1)
        use_table(w)
        if fds[1].revents:
            # What the control plane has handed over waits for the next turn.
            drain(w.event_fd)
        for i in range(2, 4):
            if fds[i].revents and fds[i].fd >= 0 and not w.tun_lost:
                decap_turn(w, fds[i].fd)
        if fds[0].revents:
            return True
    return False


cdef inline void drain(int event_fd) noexcept nogil:
    """Have an eventfd wake nobody until it is written to again."""
    cdef uint64_t drained
    read(event_fd, &drained, sizeof(drained))


cdef inline bint has_table(Loop *w) noexcept nogil:
    """Whether the control plane has published a table.  Until then every packet waits in the kernel's queues."""
    return ut_load_u64(&w.table.generation) != 0


cdef int turn(Loop *w, bint tun, bint udp) noexcept nogil:
    """Move one batch each way, or only from where something is known to wait.  Returns how much there was."""
    cdef int seen = 0
    if not w.has_begun:
        w.has_begun = True
        hand_on_inherited(w)
    use_table(w)
    w.worker.turns += 1
    w.tun_lost = 0
    if w.n_single:
        allow_groups_again(w)
    seen = take_injected(w)
    if tun:
        seen += encap_turn(w)
    if udp and not w.tun_lost:
        seen += decap_turn(w, w.udp_fd)
        if w.ipv6_fd >= 0 and not w.tun_lost:
            seen += decap_turn(w, w.ipv6_fd)
    ut_table_leave(w.worker)
    return seen


cdef void run_loop(Loop *w) noexcept nogil:
    cdef pollfd fds[BEFORE_QUEUES + UT_MAX_WORKERS]
    cdef int i, n_fds = BEFORE_QUEUES + w.n_queues
    cdef bint tun = True, udp = True, is_going
    fds[0].fd = w.event_fd
    fds[1].fd = w.udp_fd
    # poll() leaves out what has no descriptor.
    fds[2].fd = w.ipv6_fd
    for i in range(w.n_queues):
        fds[BEFORE_QUEUES + i].fd = w.queue[i]
    for i in range(n_fds):
        fds[i].events = POLLIN
    ut_store_u64(&w.worker.pid, getpid())
    while not w.stop and not has_table(w):
        if poll(fds, 1, NO_TABLE_WAIT_MS) > 0:
            drain(w.event_fd)
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
            poll(fds, n_fds, -1)
            # The side that woke us goes first and alone: what waits there waits for nothing else.
            udp = fds[1].revents != 0 or fds[2].revents != 0
            tun = not udp
            is_going = False
            for i in range(BEFORE_QUEUES, n_fds):
                tun |= fds[i].revents != 0
                is_going |= fds[i].revents & POLLERR != 0
            if is_going:
                # The device is being deleted, or is.  Until the kernel lets go of our queues they read as empty, writes
                # fail, and poll() returns at once.
                w.worker.state = UT_STATE_TUN_LOST
                poll(fds, 1, TUN_LOST_WAIT_MS)
                tun, udp = True, False
        if fds[0].revents:
            drain(w.event_fd)
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


cdef void _unmap(const void *table, const void *stats) noexcept:
    """The two files, as far as they are mapped."""
    if table != NULL:
        munmap(<void *>table, sizeof(ut_table))
    if stats != NULL:
        munmap(<void *>stats, sizeof(ut_stats))


cdef class Worker:
    """One thread's share of the datapath.

    `table_fd` and `stats_fd` are the shared memory files (mapped here, the descriptors may be closed after), `index`
    says which block of the statistics is ours, `tun_fd` is a non-blocking queue of a TUN device (the table says whether
    it has virtio headers), `udp_fd` the UDP socket that receives and sends.  `senders` are sockets that share the flows
    to peers that take any source port.  `ipv6_fd`: a socket of IPv6 beside `udp_fd`, which is of IPv4 then; -1: none.
    `ipv6_senders` are to it what `senders` are to `udp_fd`.
    All are borrowed: the caller keeps them open while the worker runs.
    `more_queues`: of the device, which are read as `tun_fd` is, and not written to.
    `n_workers`: how many there are; what workers beyond them had in flight is handed on by those that there are.
    `events`: two eventfds that the control plane shares, or none.  It writes to the first one when it has handed a
    packet to worker 0, and the workers write to the second one when they have handed packets to it.
    Raises OSError when the files cannot be mapped, ValueError when they are something else.
    """

    cdef Loop *_w

    def __cinit__(self, int table_fd, int stats_fd, unsigned int index, int tun_fd, int udp_fd, senders=(),
                  unsigned int n_workers=UT_MAX_WORKERS, events=(), int ipv6_fd=-1, more_queues=(), ipv6_senders=()):
        if index >= UT_MAX_WORKERS:
            raise ValueError(f"worker {index}: there are {UT_MAX_WORKERS} at most")
        if not index < n_workers <= UT_MAX_WORKERS:
            raise ValueError(f"worker {index} of {n_workers}")
        for fds in (senders, ipv6_senders):
            if len(fds) > UT_MAX_SENDERS:
                raise ValueError(f"{len(fds)} sockets to send from: there are {UT_MAX_SENDERS} at most")
        if len(more_queues) >= UT_MAX_WORKERS:
            raise ValueError(f"{len(more_queues)} more queues: there are {UT_MAX_WORKERS - 1} at most")
        self._w = <Loop *>calloc(1, sizeof(Loop))
        if self._w == NULL:
            raise MemoryError
        self._w.event_fd = self._w.punt_fd = -1
        self._w.headers = <uint8_t *>calloc(1, HEADERS_BYTES)
        self._w.merger = <Merger *>calloc(1, sizeof(Merger))
        if self._w.headers == NULL or self._w.merger == NULL:
            raise MemoryError
        self._w.n_messages = UT_MESSAGES
        self._w.wait_for_room = wait_for_room
        self._w.single_until_s = <uint32_t *>calloc(UT_MAX_PEERS, sizeof(uint32_t))
        if self._w.single_until_s == NULL:
            raise MemoryError
        self._w.table = <const ut_table *>_map(table_fd, sizeof(ut_table), PROT_READ, UT_TABLE_MAGIC, "peer table")
        self._w.stats = <ut_stats *>_map(
            stats_fd, sizeof(ut_stats), PROT_READ | PROT_WRITE, UT_STATS_MAGIC, "statistics")
        self._w.index = index
        self._w.n_workers = n_workers
        self._w.worker = &self._w.stats.worker[index]
        self._w.counters = <Counters *>self._w.worker.counter
        self._w.peer_stats = self._w.stats.peer[index]
        self._w.in_flight = &self._w.stats.in_flight[index]
        self._w.strays = self._w.stats.stray[index]
        self._w.punts = &self._w.stats.punt[index]
        self._w.traces = self._w.stats.traced[index]
        if index == 0:
            self._w.injects = &self._w.stats.inject
        self._w.tun_fd = tun_fd
        for fd in (tun_fd, *more_queues):
            self._w.queue[self._w.n_queues] = fd
            self._w.n_queues += 1
        self._w.udp_fd = udp_fd
        self._w.ipv6_fd = ipv6_fd
        for fd in senders:
            self._w.senders[self._w.n_senders] = fd
            self._w.n_senders += 1
        for fd in ipv6_senders:
            self._w.ipv6_senders[self._w.n_ipv6_senders] = fd
            self._w.n_ipv6_senders += 1
        self._w.icmp_tokens = ICMP_BURST
        if events:
            wake_fd, self._w.punt_fd = events
            if index == 0:
                self._w.event_fd = wake_fd
        if self._w.event_fd < 0:
            self._w.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            if self._w.event_fd < 0:
                raise OSError(errno, "cannot create an eventfd")
            self._w.is_event_fd_ours = True

    def __dealloc__(self):
        if self._w == NULL:
            return
        _unmap(self._w.table, self._w.stats)
        if self._w.is_event_fd_ours:
            close(self._w.event_fd)
        free(self._w.single_until_s)
        free(self._w.headers)
        free(self._w.merger)
        free(self._w)

    def turn(self):
        """Move one batch each way without sleeping.  True when there was anything.  Not while run() runs."""
        cdef int seen = 0
        with nogil:
            if has_table(self._w):
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
    """The tests' and benches' window on the worker's lookup: looks peers up as a worker does, batch by batch.

    The product does not use it.  It is here because another extension could not inline `lookup`.  Takes worker block
    `index` of the statistics to announce its generation in.
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
        _unmap(self._table, self._stats)

    def lookup(self, addresses, peers, remotes):
        """For each address the peer's index and the IPv4 address of its remote (network order), from one table.

        Three buffers.  The last two have as many uint32 as there are addresses, and are written.  Addresses are uint32
        (host order), or 16 bytes each as in a packet: IPv6.  Without the GIL; a writer waits meanwhile.
        """
        cdef Py_buffer asked, found, where
        cdef const ut_slot *slot
        cdef Py_ssize_t i, n
        cdef uint32_t peer
        cdef bint is_ipv6
        PyObject_GetBuffer(addresses, &asked, PyBUF_SIMPLE)
        PyObject_GetBuffer(peers, &found, PyBUF_WRITABLE)
        PyObject_GetBuffer(remotes, &where, PyBUF_WRITABLE)
        try:
            n = found.len // <Py_ssize_t>sizeof(uint32_t)
            is_ipv6 = asked.len == n * <Py_ssize_t>sizeof(ut_address)
            if where.len != found.len or not is_ipv6 and asked.len != found.len:
                raise ValueError("the three buffers differ in length")
            with nogil:
                slot = ut_table_enter(self._table, self._worker)
                for i in range(n):
                    if is_ipv6:
                        peer = lookup_ipv6(slot, <const uint8_t *>asked.buf + i * sizeof(ut_address))
                    else:
                        peer = lookup(slot, (<const uint32_t *>asked.buf)[i])
                    (<uint32_t *>found.buf)[i] = peer
                    (<uint32_t *>where.buf)[i] = remote_of(slot, peer).where.ipv4.sin_addr.s_addr
                ut_table_leave(self._worker)
        finally:
            PyBuffer_Release(&asked)
            PyBuffer_Release(&found)
            PyBuffer_Release(&where)


cdef class Judge:
    """Says in which counter a packet would end, by the workers' own checks and their table; counts nothing.

    For the thread that publishes the tables: it announces no generation.  What only the kernel knows is not asked, so
    what passes all checks ends in `encap_sent` or `decap_delivered`.
    """

    cdef Loop *_w
    cdef Counters _counters
    cdef bytearray _packet

    def __cinit__(self, int table_fd, int stats_fd):
        self._w = <Loop *>calloc(1, sizeof(Loop))
        if self._w == NULL:
            raise MemoryError
        self._w.table = <const ut_table *>_map(table_fd, sizeof(ut_table), PROT_READ, UT_TABLE_MAGIC, "peer table")
        self._w.stats = <ut_stats *>_map(stats_fd, sizeof(ut_stats), PROT_READ, UT_STATS_MAGIC, "statistics")
        self._w.counters = &self._counters

    def __dealloc__(self):
        if self._w == NULL:
            return
        _unmap(self._w.table, self._w.stats)
        free(self._w)

    def encap(self, bytes packet):
        """Of a packet read from the TUN, no super-packet: the counter, and the index of the peer that gets it or 0."""
        cdef Packet p
        cdef SuperPacket s
        cdef virtio_net_hdr vnet
        cdef Counter *drop
        self._take(&p, packet)
        memset(&s, 0, sizeof(SuperPacket))
        memset(&vnet, 0, sizeof(virtio_net_hdr))
        drop = take_read(self._w, &p, &vnet, &s)
        if drop == NULL:
            drop = check_way(self._w, &p, p.len)
        return self._name(&self._counters.encap_sent if drop == NULL else drop), p.peer

    def decap(self, bytes packet, bytes source):
        """Of what a datagram from `source`, a struct sockaddr, has behind its prefix.

        The counter, and the index of the peer that leases the inner source or 0.
        """
        cdef Packet p
        cdef virtio_net_hdr vnet
        cdef ut_socket_address where
        cdef Counters *c = &self._counters
        cdef Counter *drop
        memset(&where, 0, sizeof(ut_socket_address))
        memcpy(&where, <const char *>source, min(len(source), <Py_ssize_t>sizeof(ut_socket_address)))
        self._take(&p, packet)
        drop = check_packet(self._w.slot, c, &p, &where)
        if drop == NULL and is_for_control_plane(self._w.slot, &p):
            drop = &c.decap_punted
        if drop == NULL:
            drop = offload_header(self._w.slot, c, &p, 0, &vnet)
        return self._name(&c.decap_delivered if drop == NULL else drop), p.peer

    cdef int _take(self, Packet *p, bytes packet) except -1:
        """A copy of the packet, which the checks may change, and the table of now."""
        cdef uint64_t generation = ut_load_u64(&self._w.table.generation)
        if generation == 0:
            raise ValueError("no table has been published")
        self._w.slot = &self._w.table.slot[generation & 1]
        self._w.prefix_len = UT_PREFIX_BYTES if self._w.slot.prefix_len else 0
        # The checks look at a few bytes of a packet that is too short.
        self._packet = bytearray(packet) + bytearray(IPV6_HEADER)
        memset(p, 0, sizeof(Packet))
        p.data = <uint8_t *><char *>self._packet
        p.len = <int>len(packet)
        return 0

    cdef str _name(self, const Counter *counter):
        return COUNTERS[counter - <Counter *>&self._counters]


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


cdef extern from "spread.h" nogil:
    int ut_spread(int fd, uint32_t first, uint32_t n)

cdef extern from "confine.h" nogil:
    int ut_confine(int wanted)


def spread(int udp_fd, uint32_t n, uint32_t first=0):
    """Have the kernel spread what comes to the port of `udp_fd` over `n` of the sockets that share it, from `first` on.

    In the order in which they were bound.  The others get nothing any more; what waits in them stays.  The source port
    counts, and so does the source address (csrc/spread.h).  Raises OSError when the kernel cannot.
    """
    if n == 0:
        raise ValueError("no socket to spread over")
    if ut_spread(udp_fd, first, n) != 0:
        raise OSError(errno, "cannot spread datagrams over the sockets of a port")


def confine(int wanted):
    """Give up what this thread, and those that it starts from now on, can do without (csrc/confine.h).  For good.

    `wanted` is 0 for nothing, 1 for the capabilities, 2 for system calls too.  Returns how far that was possible.
    Raises OSError when the capabilities cannot be given up.
    """
    cdef int reached = ut_confine(wanted)
    if reached < 0:
        raise OSError(errno, "cannot give up the capabilities of a datapath process")
    return reached


# What the control plane must know of shm.h, and takes from nowhere else.

cdef extern from "fields.h" nogil:
    enum:
        UT_N_FIELDS
    struct ut_field:
        const char *structure
        const char *name
        size_t offset, bytes
    const ut_field ut_fields[1]


def _fields():
    cdef size_t i
    structures = {}
    for i in range(UT_N_FIELDS):
        fields = structures.setdefault(ut_fields[i].structure.decode(), {})
        fields[ut_fields[i].name.decode()] = (ut_fields[i].offset, ut_fields[i].bytes)
    return structures


FIELDS = _fields()
"""Structure -> field -> (offset, length), bytes."""

LAYOUT = {
    "version": UT_LAYOUT_VERSION,
    "table_magic": UT_TABLE_MAGIC,
    "stats_magic": UT_STATS_MAGIC,
    # Sizes of the structures in bytes.
    "peer": sizeof(ut_peer),
    "slot": sizeof(ut_slot),
    "table": sizeof(ut_table),
    "worker": sizeof(ut_worker),
    "peer_stats": sizeof(ut_peer_stats),
    "stray": sizeof(ut_stray),
    "learned": sizeof(ut_learned),
    "length": sizeof(ut_length),
    "remote": sizeof(ut_remote),
    "ring": sizeof(ut_ring),
    "ring_slot": sizeof(ut_ring_slot),
    "stats": sizeof(ut_stats),
    "in_flight": sizeof(ut_in_flight),
    "prefix": UT_PREFIX_BYTES,
    # How many there are at most.
    "max_peers": UT_MAX_PEERS,
    "index_entries": UT_INDEX_ENTRIES,
    "max_lengths": UT_MAX_LENGTHS,
    "max_workers": UT_MAX_WORKERS,
    "max_senders": UT_MAX_SENDERS,
    "l1_entries": UT_L1_ENTRIES,
    "l2_pages": UT_L2_PAGES,
    "l2_entries": UT_L2_ENTRIES,
    "local_entries": UT_LOCAL_ENTRIES,
    "max_local": UT_MAX_LOCAL,
    "max_learned": UT_MAX_LEARNED,
    "strays": UT_STRAYS,
    "trace_filter": sizeof(ut_trace_filter),
    "trace": sizeof(ut_trace),
    "traced": sizeof(ut_traced),
    "trace_ring": sizeof(ut_trace_ring),
    "ring_slots": UT_RING_SLOTS,
    "ring_bytes": UT_RING_BYTES,
    "trace_slots": UT_TRACE_SLOTS,
    "trace_bytes": UT_TRACE_BYTES,
    "trace_ways": UT_TRACE_WAYS,
    # Bits and values of fields.
    "hash": <uint32_t>UT_HASH,
    "hash_upper": UT_HASH_UPPER,
    "hash_lower": UT_HASH_LOWER,
    "hash_both": UT_HASH_BOTH,
    "l2_flag": <uint32_t>UT_L2_FLAG,
    "flags.udptun": UT_PEER_UDPTUN,
    "flags.any_source_port": UT_PEER_ANY_SOURCE_PORT,
    "flags.dead": UT_PEER_DEAD,
    "flags.ecn": UT_PEER_ECN,
    "source_check.off": UT_SOURCE_OFF,
    "source_check.peer": UT_SOURCE_PEER,
    "source_check.strict": UT_SOURCE_STRICT,
    "offloads.udp_segment": UT_OFFLOAD_SEGMENT,
    "offloads.write_tcp": UT_OFFLOAD_WRITE_TCP,
    "offloads.write_udp": UT_OFFLOAD_WRITE_UDP,
    "offloads.vnet_hdr": UT_OFFLOAD_VNET_HDR,
    "offloads.ecn": UT_OFFLOAD_ECN,
    "state.stopped": UT_STATE_STOPPED,
    "state.running": UT_STATE_RUNNING,
    "state.tun_lost": UT_STATE_TUN_LOST,
    "way.peer": UT_WAY_PEER,
    "way.tun": UT_WAY_TUN,
    "trace.any_protocol": UT_TRACE_ANY_PROTOCOL,
    "trace.encap": UT_TRACE_ENCAP,
    "trace.decap": UT_TRACE_DECAP,
    "inject.waits": UT_INJECT_WAITS,
    "inject.done": UT_INJECT_DONE,
    "inject.malformed": UT_INJECT_MALFORMED,
    "inject.no_route": UT_INJECT_NO_ROUTE,
    "inject.refused": UT_INJECT_REFUSED,
    "inject.in_flight": UT_INJECT_IN_FLIGHT,
}
"""The numbers of shm.h."""

cdef Counters _no_counts
memset(&_no_counts, 0, sizeof(Counters))
# Cython turns a struct into a dict of its fields, in their order.
COUNTERS = tuple(<dict>_no_counts)
"""The names of all counters, in the order of the shared memory."""

if len(COUNTERS) > UT_MAX_COUNTERS:
    raise ImportError(f"{len(COUNTERS)} counters: the shared memory has room for {UT_MAX_COUNTERS}")

# What `settle` must know of the counters, by their place in COUNTERS: whose end each counter is, where the packets of a
# direction are counted, and its end for a packet that was taken and not counted.
cdef int direction_of[N_COUNTERS]
cdef int packets_of[N_DIRECTIONS]
cdef int uncounted_of[N_DIRECTIONS]


def _sort_counters():
    cdef int i, direction
    uncounted = {"encap": "encap_sent", "decap": "decap_delivered", "inject": "inject_drop_in_flight"}
    for i, name in enumerate(COUNTERS):
        direction_of[i] = NO_DIRECTION
        for direction, prefix in enumerate(uncounted):
            if name == f"{prefix}_packets":
                packets_of[direction] = i
                direction_of[i] = IS_TOTAL
            elif name.startswith(f"{prefix}_"):
                direction_of[i] = direction
            if name == uncounted[prefix]:
                uncounted_of[direction] = i


_sort_counters()

# cython: cdivision=True
"""Show the control plane what becomes of packets, while somebody watches (`udptun trace --live`).

    filter      which packets somebody wants to see
    entry       one packet or super-packet in shared memory: what it begins with, its peer, and the counter of its end
    ring        UT_TRACE_SLOTS entries.  A worker has one for each way: from the TUN, and to it
    open        an entry that is not published yet, because the kernel may still refuse the packet

As long as nobody watches, a packet pays for this with one look at `Loop.is_traced`, and a turn with one look at the
number of the trace.  While somebody does, a packet that matches is copied as far as the filter says; nobody waits for
the control plane, and what finds the ring full is counted there and not shown.

An entry is filled when all checks have been made, and published when the batch has been handed to the kernel
(`publish_traced`).  In between stands the end that the packet has unless the kernel refuses it; if it does, `drop_late`
finds the entry by where the packet lies.

The control plane asks for a few seconds at a time (`until_ns`).  So whoever is killed, nothing is traced for long.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from udptun.fastpath.loop cimport *
from udptun.fastpath.ring cimport monotonic_ns
from udptun.fastpath.wire cimport *

# ---------------------------------------------------------------------------------------------- what is wanted

cdef inline void look_for_trace(Loop *w) noexcept nogil:
    """At the begin of a turn: does somebody watch?"""
    w.is_traced = False
    if ut_load_u64(&w.stats.trace.number) and monotonic_ns() < ut_load_u64(&w.stats.trace.until_ns):
        w.trace_number = ut_trace_take(&w.stats.trace, &w.filter)
        w.is_traced = w.trace_number != 0


cdef inline bint read_any(Packet *p) noexcept nogil:
    """Read the headers of what may be no packet.  False: it is none, so it has neither addresses nor a protocol.

    What the packet says about its length is not looked at: it may be wrong.
    """
    p.is_ipv6 = p.len >= IPV6_HEADER and ip_version(p.data) == 6
    if not p.is_ipv6 and (p.len < IPV4_HEADER_MIN or ip_version(p.data) != 4 or ip_header_len(p.data) > p.len):
        return False
    read_headers(p)
    return p.header >= IPV4_HEADER_MIN


cdef inline bint is_wanted(const ut_trace_filter *f, const Packet *p) noexcept nogil:
    """Whether a packet with these headers is one that the filter asks for."""
    if f.family and f.family != <uint32_t>(6 if p.is_ipv6 else 4):
        return False
    if f.protocol != UT_TRACE_ANY_PROTOCOL and <int>f.protocol != p.protocol:
        # ICMP means that of either family.
        if f.protocol != PROTO_ICMP or not p.is_ipv6 or p.protocol != PROTO_ICMPV6:
            return False
    return (is_between(f, p, source_of(p), destination_of(p), 2)
            or f.is_both_ways and is_between(f, p, destination_of(p), source_of(p), 0))


cdef inline bint is_between(
        const ut_trace_filter *f, const Packet *p, const uint8_t *source, const uint8_t *destination,
        int port_at) noexcept nogil:
    """Whether the addresses are those of the filter, and its port stands at `port_at` of the transport header."""
    cdef ut_address its_source = address_at(p, source), its_destination = address_at(p, destination)
    if not is_within(&f.source, <const uint8_t *>&its_source):
        return False
    if not is_within(&f.destination, <const uint8_t *>&its_destination):
        return False
    if f.port == 0:
        return True
    return has_ports(p) and load_be16(p.data + p.header + port_at) == f.port


cdef inline bint wants_all(const ut_trace_filter *f) noexcept nogil:
    """Whether it asks for what is no packet, too."""
    # With an address there is a family.
    return f.family == 0 and f.protocol == UT_TRACE_ANY_PROTOCOL and f.port == 0


cdef inline int headers_of(const Packet *p, bint is_packet) noexcept nogil:
    """How many bytes of it are headers, of what it carries none; no more than it has."""
    cdef int transport = 0
    if not is_packet:
        return min(p.len, IPV4_HEADER_MIN)
    if not p.is_later_fragment and p.protocol != UNKNOWN_PROTOCOL:
        if p.protocol == PROTO_TCP and p.header + TCP_HEADER_MIN <= p.len:
            transport = tcp_header_len(p.data + p.header)
        elif p.protocol in (PROTO_TCP, PROTO_UDP, PROTO_ICMP, PROTO_ICMPV6):
            transport = UDP_HEADER
    return min(p.len, p.header + transport)

# ------------------------------------------------------------------------------------------------------ entries

cdef enum:
    NOWHERE = 0xffffffff          # in place of `at`: the end of the entry is final


cdef inline bint is_drop(const Loop *w, const Counter *end) noexcept nogil:
    cdef const Counters *c = w.counters
    return end != &c.encap_sent and end != &c.decap_delivered and end != &c.decap_punted


cdef inline const uint8_t *batch_of(const Loop *w, int way) noexcept nogil:
    """Where the memory begins that packets lie in."""
    if way == UT_TRACE_ENCAP:
        return w.in_flight.arena
    return w.in_flight.train[0]


cdef inline ut_traced *trace(
        Loop *w, int way, const Packet *p, int n, const Counter *end, const ut_socket_address *source) noexcept nogil:
    """Open an entry for a packet that stands for `n`, if it is asked for; NULL: it is not, or there is no room.

    Of `p` only data, length and peer are looked at; a length below 0 means 0.  `end`: the counter where it ends.
    `source`: where its datagram came from; NULL: it goes to its peer.
    """
    cdef ut_trace_ring *ring = &w.traces[way]
    cdef uint64_t number = ring.written + w.n_open[way]
    cdef ut_traced *entry = &ring.slot[number & (UT_TRACE_SLOTS - 1)]
    cdef Packet read
    cdef bint is_packet
    if w.filter.is_drops_alone and not is_drop(w, end):
        return NULL
    memset(&read, 0, sizeof(Packet))
    read.data = p.data
    read.len = max(p.len, 0)
    is_packet = read_any(&read)
    if not (is_wanted(&w.filter, &read) if is_packet else wants_all(&w.filter)):
        return NULL
    if number - ut_load_u64(&ring.taken) >= UT_TRACE_SLOTS:
        ring.lost += 1
        return NULL
    memset(entry, 0, sizeof(ut_traced) - UT_TRACE_BYTES)
    entry.number = w.trace_number
    entry.time_ns = monotonic_ns()
    entry.peer = p.peer
    if source == NULL and p.peer:
        source = &remote_of(w.slot, p.peer).where
    if source != NULL:
        entry.outer = address_of(source)
        entry.outer_port = <uint16_t>port_of(source)
    entry.length = read.len
    entry.counter = <uint32_t>(end - <const Counter *>w.counters)
    entry.at = <uint32_t>(p.data - batch_of(w, way))
    entry.n_segments = <uint16_t>n
    entry.n_dropped = <uint16_t>(n if is_drop(w, end) else 0)
    entry.kept = <uint16_t>min(
        min(<int>w.filter.snap_len, read.len) if w.filter.snap_len else headers_of(&read, is_packet),
        <int>UT_TRACE_BYTES)
    memcpy(entry.packet, p.data, entry.kept)
    w.n_open[way] += 1
    return entry


cdef inline void set_end(Loop *w, ut_traced *entry, const Counter *end) noexcept nogil:
    """Have the entry of a peer's packet that was opened last end in this counter, with all that it stands for.

    Where only drops are asked for and this is none, the entry is withdrawn.
    """
    if w.filter.is_drops_alone and not is_drop(w, end):
        w.n_open[UT_TRACE_DECAP] -= 1
        return
    entry.counter = <uint32_t>(end - <const Counter *>w.counters)
    entry.n_dropped = entry.n_segments if is_drop(w, end) else 0


cdef inline ut_traced *end_late(Loop *w, int way, const uint8_t *d, const Counter *end) noexcept nogil:
    """Say in the open entries of what lies at `d` that one more packet of it was dropped after all.

    Returns the last of them; NULL: there is none.
    """
    cdef ut_trace_ring *ring = &w.traces[way]
    cdef int64_t at = d - batch_of(w, way)
    cdef ut_traced *entry
    cdef ut_traced *found = NULL
    cdef uint32_t i
    for i in range(w.n_open[way]):
        entry = &ring.slot[(ring.written + i) & (UT_TRACE_SLOTS - 1)]
        if <int64_t>entry.at <= at < <int64_t>entry.at + entry.length:
            entry.counter = <uint32_t>(end - <const Counter *>w.counters)
            entry.n_dropped += 1
            found = entry
    return found


cdef inline ut_traced *drop_late(
        Loop *w, int way, const Packet *p, const uint8_t *at, const Counter *end) noexcept nogil:
    """The kernel has refused a packet whose TTL has been stepped; `at` points into it where it was read.

    Where only drops are asked for it has no entry yet.  `p` may be a copy, so the new entry lies nowhere.
    """
    cdef ut_traced *entry = end_late(w, way, at, end)
    cdef Packet copy
    if entry == NULL:
        entry = trace(w, way, p, 1, end, NULL)
        if entry == NULL:
            return NULL
        entry.at = NOWHERE
        if entry.kept >= IPV4_HEADER_MIN:
            copy.data = entry.packet
            copy.is_ipv6 = ip_version(copy.data) == 6
            undo_ttl_step(&copy)
    return entry


cdef inline void publish_traced(Loop *w, int way) noexcept nogil:
    """The packets of a batch have come to their ends."""
    cdef ut_trace_ring *ring = &w.traces[way]
    if w.n_open[way]:
        ut_store_u64(&ring.written, ring.written + w.n_open[way])
        w.n_open[way] = 0

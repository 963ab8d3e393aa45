"""Packets between the workers and the control plane: punted ones go to it, injected ones come from it.

    punt        hand a packet from a peer to the control plane in place of the TUN
    inject      send a packet of the control plane's to the peer that leases its destination, or write it to the TUN
    ring        UT_RING_SLOTS slots in shared memory, with one producer and one consumer
    slot        one packet, or what it begins with: the first UT_RING_BYTES of it, and how long it is

Theory of operation
===================

Each worker has a ring to the control plane, and the control plane has one to worker 0: there always is a worker 0,
however many others come and go.  A packet that does not match pays for this with one comparison, of its destination
with our tunnel address, and a turn of worker 0 with another one, of two numbers of the ring.  Only what matches costs a
system call: an eventfd wakes the control plane once for all punts of a turn, and another one wakes worker 0, which
sleeps in poll() on it anyway.

Numbers only ever grow, and they live in the shared memory.  So whoever takes the place of one that has died, on either
side, goes on where it stopped:

    producer    fills slot `written`, checksum last, then stores written + 1 (release)
    consumer    loads `written` (acquire), stores `begun`, handles the packet, stores `taken` (release)

* A producer that is killed in the middle of a slot has not moved `written`, and its successor fills the slot anew.
* A worker that is killed in the middle of an injected packet has moved `begun`, not `taken`.  Its successor does not
  send this packet, because it may be what the other one died of: it is sent at most once, and its result says so.
* A worker that is killed between a punt and the mark in its message (`mark_written`) leaves it to a successor, which
  punts it once more.  The control plane must expect that.
* A control plane copies a punted packet and stores `taken` before it handles it.  One that dies of a packet takes it
  along, so the next one does not die of it.

There is one producer because there is one: a datapath process runs its workers while it holds the lock, and a daemon
while it holds that of the run directory.  Should that ever not hold, or something else write to the memory, then a slot
is not what its producer meant.  So its consumer copies it, and looks at sequence, lengths and checksum of the copy
before it believes a word: nothing torn is ever sent.

A full ring drops: what is punted under decap_drop_punt_full, and what is injected by telling the control plane so.
Nobody waits for the other side.

Which packets are punted: ICMP echo replies of either family to our tunnel address whose id is `punt_id` of the table.
They have passed all checks of the source, so they come from a peer.  Fragments but the first are not punted.

There is one exception from the checks: stray.pxd says which packets from addresses that are no peer's are punted.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from udptun.fastpath.loop cimport *
from udptun.fastpath.vxlan cimport put_prefix
from udptun.fastpath.wire cimport *


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec

# ------------------------------------------------------------------------------------- punt: to the control plane

cdef inline bint is_asked_for(const ut_slot *table, const Packet *p) noexcept nogil:
    """Whether a packet to our tunnel address is one that the control plane waits for; its headers have been read."""
    cdef const uint8_t *icmp = p.data + p.header
    if table.punt_id == 0 or not is_icmp(p):
        return False
    if (icmp[0] != (ICMPV6_ECHO_REPLY if p.is_ipv6 else ICMP_ECHO_REPLY)
            or load_be16(icmp + ICMP_ID) != table.punt_id):
        return False
    # The checksum of a packet in fragments covers what is not here.
    return p.has_more or icmp_checksum_holds(p)


cdef inline bint is_punt_full(const Loop *w) noexcept nogil:
    """Whether the ring to the control plane has no room.  Room may come at any time; only the worker takes it."""
    return w.punts.written - ut_load_u64(&w.punts.taken) >= UT_RING_SLOTS


cdef inline Counter *punt(Loop *w, Packet *p, const ut_socket_address *source, bint is_stray) noexcept nogil:
    """Hand the packet to the control plane; `source` is where its datagram came from.  The counter where it has ended.
    """
    cdef ut_ring *ring = w.punts
    cdef uint64_t written = ring.written
    cdef ut_ring_slot *slot = &ring.slot[written & (UT_RING_SLOTS - 1)]
    if is_punt_full(w):
        w.counters.decap_drop_punt_full += 1
        return &w.counters.decap_drop_punt_full
    memset(slot, 0, sizeof(ut_ring_slot) - UT_RING_BYTES)
    slot.time_ns = monotonic_ns()
    slot.sequence = written + 1
    slot.length = p.len
    slot.kept = min(slot.length, <uint32_t>UT_RING_BYTES)
    slot.peer = p.peer
    slot.outer = address_of(source)
    slot.outer_port = <uint16_t>port_of(source)
    slot.is_stray = is_stray
    memcpy(slot.packet, p.data, slot.kept)
    slot.checksum = ut_slot_checksum(slot, slot.kept)
    ut_store_u64(&ring.written, written + 1)
    # A successor that finds the message in flight must not punt it once more.
    mark_written(p.data)
    w.counters.decap_punted += 1
    w.has_punted = True
    return &w.counters.decap_punted


cdef inline void announce_punts(Loop *w) noexcept nogil:
    """Tell the control plane of the punts since the last time."""
    cdef uint64_t one = 1
    if w.has_punted:
        w.has_punted = False
        if w.punt_fd >= 0:
            write(w.punt_fd, &one, sizeof(one))

# ----------------------------------------------------------------------------------- inject: from the control plane

cdef inline int take_injected(Loop *w) noexcept nogil:
    """Send all that the control plane has handed over; return how many packets these were."""
    if w.injects == NULL or ut_load_u64(&w.injects.written) == w.injects.taken:
        return 0
    return inject_all(w, w.injects)


cdef inline int inject_all(Loop *w, ut_ring *ring) noexcept nogil:
    """The part of `take_injected` that is rare."""
    cdef uint64_t taken = ring.taken, written = ut_load_u64(&ring.written)
    cdef int n = 0
    cdef ut_ring_slot *slot
    if written - taken > UT_RING_SLOTS:
        # No producer of ours has left it so; there is nothing to believe.
        count_injected(w, UT_INJECT_MALFORMED, False)
        ring.begun = written
        ut_store_u64(&ring.taken, written)
        return 1
    while taken != written:
        slot = &ring.slot[taken & (UT_RING_SLOTS - 1)]
        taken += 1
        ut_store_u64(&ring.begun, taken)
        memcpy(&w.injected, slot, sizeof(ut_ring_slot))
        # The answer may be here before the send is over.
        slot.time_ns = monotonic_ns()
        slot.result = inject(w, &w.injected, taken)
        slot.error = w.injected.error
        count_injected(w, slot.result, w.injected.way == UT_WAY_TUN)
        ut_store_u64(&ring.taken, taken)
        n += 1
    return n


cdef inline void drop_half_injected(Loop *w) noexcept nogil:
    """Give up the packet that a process was killed with."""
    cdef ut_ring *ring = w.injects
    cdef ut_ring_slot *slot
    if ring == NULL or ring.begun == ring.taken:
        return
    slot = &ring.slot[(ring.begun - 1) & (UT_RING_SLOTS - 1)]
    # Otherwise the process had come to its end with it.
    if slot.result == UT_INJECT_WAITS:
        slot.result = UT_INJECT_IN_FLIGHT
        count_injected(w, UT_INJECT_IN_FLIGHT, False)
    ut_store_u64(&ring.taken, ring.begun)


cdef inline void count_injected(Loop *w, uint32_t result, bint is_for_tun) noexcept nogil:
    cdef Counters *c = w.counters
    c.inject_packets += 1
    if result == UT_INJECT_DONE:
        if is_for_tun:
            c.inject_delivered += 1
        else:
            c.inject_sent += 1
    elif result == UT_INJECT_NO_ROUTE:
        c.inject_drop_no_route += 1
    elif result == UT_INJECT_REFUSED:
        c.inject_drop_refused += 1
    elif result == UT_INJECT_IN_FLIGHT:
        c.inject_drop_in_flight += 1
    else:
        c.inject_drop_malformed += 1


cdef inline uint32_t inject(Loop *w, ut_ring_slot *slot, uint64_t sequence) noexcept nogil:
    """Send the packet in `slot`, a copy of ours, which should have this sequence; return UT_INJECT_*.

    Its TTL is not stepped, and no MTU of a peer is looked at: whoever measures a path knows better.
    """
    cdef uint8_t *d = w.single + SINGLE_ROOM
    cdef Packet p
    slot.error = 0
    if (slot.sequence != sequence or slot.kept > UT_RING_BYTES or slot.kept < IPV4_HEADER_MIN
            or slot.length < slot.kept or slot.length > PACKET_MAX
            or slot.checksum != ut_slot_checksum(slot, slot.kept)):
        return UT_INJECT_MALFORMED
    memset(w.single, 0, SINGLE_ROOM)
    memcpy(d, slot.packet, slot.kept)
    memset(d + slot.kept, 0, slot.length - slot.kept)
    p.data = d
    p.len = <int>slot.length
    if not is_injectable(w.slot, &p):
        return UT_INJECT_MALFORMED
    if slot.way == UT_WAY_TUN:
        if write(w.tun_fd, d - w.vnet_len, w.vnet_len + slot.length) >= 0:
            return UT_INJECT_DONE
    else:
        p.peer = leasing(w.slot, &p, destination_of(&p))
        if p.peer == 0:
            return UT_INJECT_NO_ROUTE
        put_prefix(w, p.peer, d - w.prefix_len)
        if send_injected(w, remote_of(w.slot, p.peer), d - w.prefix_len, w.prefix_len + <int>slot.length) >= 0:
            return UT_INJECT_DONE
    slot.error = <uint32_t>errno
    return UT_INJECT_REFUSED


cdef inline bint is_injectable(const ut_slot *table, Packet *p) noexcept nogil:
    """Whether it is a packet from end to end, of a family that we carry."""
    cdef int length = p.len
    if ip_version(p.data) == 6:
        return length >= IPV6_HEADER and carries_ipv6(table) and take_length(p) and p.len == length
    return ip_version(p.data) == 4 and carries_ipv4(table) and take_length(p) and p.len == length


cdef inline ssize_t send_injected(Loop *w, const ut_remote *remote, uint8_t *datagram, int length) noexcept nogil:
    """Send a datagram from our own port.  Nothing waits for room in a full buffer."""
    cdef msghdr message
    cdef iovec iov
    iov.iov_base = datagram
    iov.iov_len = length
    memset(&message, 0, sizeof(msghdr))
    message.msg_name = <void *>&remote.where
    message.msg_namelen = remote.where_len
    message.msg_iov = &iov
    message.msg_iovlen = 1
    return sendmsg(own_socket(w, remote), &message, MSG_DONTWAIT)

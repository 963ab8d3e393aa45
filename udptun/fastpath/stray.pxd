"""What is remembered of stray datagrams, so that an operator learns why a peer is silent.

    stray       a datagram whose inner source a peer leases, but which came from another address than that peer's: its
                PublicIP is not the source that others see

A worker has UT_STRAYS slots, and a pair of outer source and peer may be in UT_STRAY_WAYS of them.  Nothing is allocated
and no slot is ever looked for.  Whoever floods us with other sources must not drive a pair out that keeps coming: each
datagram makes its slot stronger, and of those that find no slot only every STRAY_STEP-th weakens the weakest of theirs,
in turn where several are equally weak.  A slot of no strength, or one that nothing has come for in STRAY_IDLE_S, goes
to the pair that asks.

Two kinds of strays are handed to the control plane, which learns from where peers send (datapath/learning.py):

    answer      an echo reply to our tunnel address with the id and sequence of the table's `learn_id`: 32 bits that
                only those have seen who were asked just now
    question    an echo request to our tunnel address with a sequence, as long as that of another udptun: one a slot and
                second

They get a quarter of the ring at most, so they keep nothing out that comes from a peer.
"""

from libc.stdint cimport uint8_t, uint32_t

from udptun.fastpath.loop cimport *
from udptun.fastpath.ring cimport punt
from udptun.fastpath.wire cimport *

cdef enum:
    STRAY_STEP_BITS = 8
    STRAY_STEP = 1 << STRAY_STEP_BITS
    STRAY_STRENGTH = 16           # at most
    STRAY_IDLE_S = 10
    QUESTION_LEN = 16             # ICMP header 8, nonce 8


cdef inline Counter *take_stray(Loop *w, Packet *p, const ut_socket_address *source, bint is_strangers) noexcept nogil:
    """Note a datagram that may not come from `source`, if a peer leases its inner source.

    `is_strangers`: the address is no peer's.  Where it was punted the counter where it has ended, or NULL.
    """
    cdef ut_stray *slot
    if p.peer == 0:
        return NULL
    slot = note_stray(w, p, address_of(source))
    if (not is_strangers or w.slot.punt_id == 0 or w.slot.source_check != UT_SOURCE_PEER
            or not is_tunnel_address(w.slot, p, destination_of(p)) or not is_of_learning(w, p, slot)):
        return NULL
    if w.punts.written - ut_load_u64(&w.punts.taken) >= UT_RING_SLOTS // 4:
        return NULL
    return punt(w, p, source, True)


cdef inline bint is_of_learning(Loop *w, const Packet *p, ut_stray *slot) noexcept nogil:
    """Whether a packet to our tunnel address is an answer, or a question that has its turn.  `slot` may be NULL."""
    cdef const uint8_t *icmp = p.data + p.header
    if not is_icmp(p) or not p.is_whole:
        return False
    if icmp[0] == (ICMPV6_ECHO_REPLY if p.is_ipv6 else ICMP_ECHO_REPLY):
        return w.slot.learn_id != 0 and load_be32(icmp + ICMP_ID) == w.slot.learn_id and icmp_checksum_holds(p)
    # Probes whether we are alive have sequence 0.
    if icmp[0] != (ICMPV6_ECHO if p.is_ipv6 else ICMP_ECHO) or load_be16(icmp + ICMP_ID + 2) == 0:
        return False
    if p.len != (IPV6_HEADER if p.is_ipv6 else IPV4_HEADER_MIN) + QUESTION_LEN:
        return False
    if slot == NULL or slot.punted_s == slot.last_s or not icmp_checksum_holds(p):
        return False
    slot.punted_s = slot.last_s
    return True


cdef inline ut_stray *note_stray(Loop *w, const Packet *p, ut_address outer) noexcept nogil:
    """Count a datagram from `outer` with an inner source that p.peer leases.  Its slot, or NULL."""
    cdef uint32_t which = ut_hash(ut_hash_address(&outer) ^ p.peer)
    cdef ut_stray *slots = &w.strays[(which & (UT_STRAY_SETS - 1)) * UT_STRAY_WAYS]
    cdef ut_stray *slot = &slots[(w.n_unplaced >> STRAY_STEP_BITS) & (UT_STRAY_WAYS - 1)]
    cdef uint32_t now_s, i
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    now_s = <uint32_t>now.tv_sec
    for i in range(UT_STRAY_WAYS):
        if is_same(&slots[i].outer, &outer) and slots[i].peer == p.peer:
            slots[i].strength = min(slots[i].strength + 1, <uint32_t>STRAY_STRENGTH)
            slots[i].datagrams += 1
            slots[i].inner = address_at(p, source_of(p))
            slots[i].last_s = now_s
            return &slots[i]
        if now_s - slots[i].last_s >= STRAY_IDLE_S:
            slots[i].strength = 0
        if slots[i].strength < slot.strength:
            slot = &slots[i]
    if slot.strength:
        w.n_unplaced += 1
        if w.n_unplaced & (STRAY_STEP - 1):
            return NULL
        slot.strength -= 1
        if slot.strength:
            return NULL
    slot.outer = outer
    slot.peer = p.peer
    slot.inner = address_at(p, source_of(p))
    slot.last_s = now_s
    slot.datagrams = 1
    slot.strength = 1
    return slot

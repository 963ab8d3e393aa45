"""What is remembered of stray datagrams, so that an operator learns why a peer is silent.

    stray       a datagram whose inner source a peer leases, but which came from another address than that peer's: its
                PublicIP is not the source that others see

A worker has UT_STRAYS slots, and a pair of outer source and peer may be in UT_STRAY_WAYS of them.  Nothing is allocated
and no slot is ever looked for.  Whoever floods us with other sources must not drive a pair out that keeps coming: each
datagram makes its slot stronger, and of those that find no slot only every STRAY_STEP-th weakens the weakest of theirs,
in turn where several are equally weak.  A slot of no strength, or one that nothing has come for in STRAY_IDLE_S, goes
to the pair that asks.
"""

from libc.stdint cimport uint32_t

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport ip_source

cdef enum:
    STRAY_STEP_BITS = 8
    STRAY_STEP = 1 << STRAY_STEP_BITS
    STRAY_STRENGTH = 16           # at most
    STRAY_IDLE_S = 10


cdef inline void note_stray(Loop *w, const Packet *p, uint32_t outer) noexcept nogil:
    """Count a datagram from `outer` (host order) that was dropped for its source, if a peer leases the inner source."""
    cdef ut_stray *slots = &w.strays[(ut_hash(outer ^ p.peer) & (UT_STRAY_SETS - 1)) * UT_STRAY_WAYS]
    cdef ut_stray *slot = &slots[(w.n_unplaced >> STRAY_STEP_BITS) & (UT_STRAY_WAYS - 1)]
    cdef uint32_t now_s, i
    cdef timespec now
    if p.peer == 0:
        return
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    now_s = <uint32_t>now.tv_sec
    for i in range(UT_STRAY_WAYS):
        if slots[i].outer == outer and slots[i].peer == p.peer:
            slots[i].strength = min(slots[i].strength + 1, <uint32_t>STRAY_STRENGTH)
            slots[i].datagrams += 1
            slots[i].inner = ip_source(p.data)
            slots[i].last_s = now_s
            return
        if now_s - slots[i].last_s >= STRAY_IDLE_S:
            slots[i].strength = 0
        if slots[i].strength < slot.strength:
            slot = &slots[i]
    if slot.strength:
        w.n_unplaced += 1
        if w.n_unplaced & (STRAY_STEP - 1):
            return
        slot.strength -= 1
        if slot.strength:
            return
    slot.outer = outer
    slot.peer = p.peer
    slot.inner = ip_source(p.data)
    slot.last_s = now_s
    slot.datagrams = 1
    slot.strength = 1

"""Marks of congestion through the tunnel (explicit congestion notification, RFC 6040).

    ECN field   the last two bits of the TOS of an IPv4 header, or of the traffic class of an IPv6 header
                  Not-ECT    the sender wants no marks: a router with a full queue can only drop
                  ECT(0/1)   the sender understands marks
                  CE         the mark: a router's queue was about to be full
    normal      the mode to a peer that carries marks on: the outer packet has the inner one's ECN field
    compatible  the mode to any other peer, as flannel's udp backend is one: the outer packet is Not-ECT

A router on the underlay sees and marks the outer packet only.  So what it has marked must be marked inside when the
outer header goes.  All packets of a message have the same outer TOS: send.pxd groups by it, and the kernel merges by it
(UDP_GRO, since Linux 6.9).  The rest of the outer TOS is 0.
"""

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport *


cdef inline int outer_tos(const Loop *w, const Packet *p) noexcept nogil:
    """The TOS of the datagrams that carry the packet to its peer (RFC 6040 4.1)."""
    return ecn_of(p) if w.has_ecn and w.slot.peers[p.peer].flags & UT_PEER_ECN else ECN_NOT_ECT


cdef inline Counter *take_mark(Counters *c, Packet *p, int outer) noexcept nogil:
    """Give the packet the ECN field that it has by `outer`, that of its datagram (RFC 6040 4.2).

    Returns NULL, or the counter to drop it under: whoever does not understand marks has to be told of congestion by a
    loss.
    """
    cdef int inner = ecn_of(p)
    if outer == ECN_NOT_ECT or outer == inner:
        return NULL
    if inner == ECN_NOT_ECT:
        return &c.decap_drop_ce if outer == ECN_CE else NULL
    if outer == ECN_CE or outer == ECN_ECT_1 and inner == ECN_ECT_0:
        set_ecn(p, outer)
    return NULL

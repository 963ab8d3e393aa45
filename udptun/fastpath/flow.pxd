"""From which socket a datagram leaves, and so from which port.

    flow        packets of one inner connection: the same addresses, and where there are ports the same ports
    senders     sockets with ports of their own, for peers that take any source port

All packets of a flow leave from the same socket.  The routers on the way, the peer's network card and its workers
spread flows by the port and keep the order within each (RFC 7348 5).  To any other peer, and where there are no
senders, everything leaves from the worker's own socket.  A worker with sockets of both families has senders of each.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport *


cdef inline int sender_for(Loop *w, const Packet *p) noexcept nogil:
    """The socket that a packet to its peer leaves from: the same for all of an inner flow, also for its fragments.

    Fragments of a flow that has ports may leave from another one than its whole packets: they do not all know the
    ports.
    """
    cdef uint32_t flow
    cdef int own = own_socket(w, remote_of(w.slot, p.peer)), n = w.n_senders
    cdef const int *senders = w.senders
    if own == w.ipv6_fd:
        senders = w.ipv6_senders
        n = w.n_ipv6_senders
    if n == 0 or not w.slot.peers[p.peer].flags & UT_PEER_ANY_SOURCE_PORT:
        return own
    flow = short_address(p, source_of(p)) ^ short_address(p, destination_of(p)) * <uint32_t>0x9E3779B1
    if p.is_whole and has_ports(p):
        flow ^= load_be32(p.data + p.header) * <uint32_t>0x85EBCA77    # both ports
    # The multiplication carries all bits to the upper ones, which choose.
    flow = (flow ^ flow >> 16) * <uint32_t>0x9E3779B1
    return senders[<uint64_t>flow * <uint32_t>n >> 32]


cdef inline uint32_t short_address(const Packet *p, const uint8_t *address) noexcept nogil:
    """32 bits that are an IPv4 address, or follow from an IPv6 one."""
    cdef ut_address whole
    if not p.is_ipv6:
        return load_be32(address)
    whole = address_at(p, address)
    return ut_hash_address(&whole)

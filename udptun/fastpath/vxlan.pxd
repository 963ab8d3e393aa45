"""VXLAN: the prefix before each inner packet, and the socket that a datagram leaves from.

    prefix      22 bytes: VXLAN header (RFC 7348 5), then an Ethernet header, because VXLAN carries frames
                  0  flags; 0x08: the VNI is valid
                  4  VNI, 24 bits, and a reserved byte
                  8  inner destination MAC: the VtepMAC of who gets it
                 14  inner source MAC: the VtepMAC of who sends it
                 20  EtherType
    VNI         which of several VXLAN networks a datagram belongs to
    senders     sockets with ports of their own: all packets of an inner flow leave from the same one

A peer's prefix stands ready in the table.  A `Packet` to be sent always has room for it in front, so that prefix and
packet are one piece of memory.  Without VXLAN the prefix has no bytes, and everything leaves from the worker's own
socket.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    VXLAN_VNI_IS_VALID = 0x08
    VXLAN_VNI = 4
    INNER_DESTINATION = 8
    INNER_ETHERTYPE = 20
    ETHERTYPE_IPV4 = 0x0800


cdef inline void put_prefix(Loop *w, uint32_t peer, uint8_t *out) noexcept nogil:
    """Write the peer's prefix, w.prefix_len bytes, to `out`."""
    if w.prefix_len:
        memcpy(out, w.slot.peers[peer].prefix, UT_PREFIX_BYTES)


cdef inline Counter *check_prefix(const ut_slot *table, Counters *c, const uint8_t *d, int length) noexcept nogil:
    """Rows V1 to V5: an IPv4 packet in a frame for us?  The counter to drop it under; NULL: it is."""
    if length < <int>UT_PREFIX_BYTES:
        return &c.decap_drop_vxlan_short
    if not d[0] & VXLAN_VNI_IS_VALID:
        return &c.decap_drop_vxlan_flags
    if load_be32(d + VXLAN_VNI) >> 8 != table.vni:
        return &c.decap_drop_vxlan_vni
    if load_be16(d + INNER_ETHERTYPE) != ETHERTYPE_IPV4:
        return &c.decap_drop_vxlan_ethertype
    if memcmp(d + INNER_DESTINATION, table.own_mac, 6) != 0:
        return &c.decap_drop_vxlan_mac
    return NULL


cdef inline int sender_for(Loop *w, const uint8_t *d, int total) noexcept nogil:
    """The socket that a packet leaves from: the same for all of an inner flow, and for all fragments of a packet.

    The routers on the way, and the peer, spread flows by it and keep the order within each (RFC 7348 5).
    """
    cdef uint32_t flow
    cdef int header
    if w.n_senders == 0:
        return w.udp_fd
    flow = ip_source(d) ^ ip_destination(d) * <uint32_t>0x9E3779B1
    header = ip_header_len(d)
    if (ip_protocol(d) == PROTO_TCP or ip_protocol(d) == PROTO_UDP) and not ip_is_fragment(d) and total >= header + 4:
        flow ^= load_be32(d + header) * <uint32_t>0x85EBCA77    # both ports
    # The multiplication carries all bits to the upper ones, which choose.
    flow = (flow ^ flow >> 16) * <uint32_t>0x9E3779B1
    return w.senders[<uint64_t>flow * <uint32_t>w.n_senders >> 32]

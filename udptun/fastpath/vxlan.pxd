"""VXLAN: the prefix before each inner packet.

    prefix      22 bytes: VXLAN header (RFC 7348 5), then an Ethernet header, because VXLAN carries frames
                  0  flags; 0x08: the VNI is valid
                  4  VNI, 24 bits, and a reserved byte
                  8  inner destination MAC: the VtepMAC of who gets it
                 14  inner source MAC: the VtepMAC of who sends it
                 20  EtherType
    VNI         which of several VXLAN networks a datagram belongs to

A peer's prefix stands ready in the table.  A `Packet` to be sent always has room for it in front, so that prefix and
packet are one piece of memory.  Without VXLAN the prefix has no bytes.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport *

cdef enum:
    VXLAN_VNI_IS_VALID = 0x08
    VXLAN_VNI = 4
    INNER_DESTINATION = 8
    INNER_ETHERTYPE = 20
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_IPV6 = 0x86DD


cdef inline void put_prefix(Loop *w, uint32_t peer, uint8_t *out) noexcept nogil:
    """Write the peer's prefix, w.prefix_len bytes, to `out`."""
    if w.prefix_len:
        memcpy(out, w.slot.peers[peer].prefix, UT_PREFIX_BYTES)


cdef inline Counter *check_prefix(const ut_slot *table, Counters *c, const uint8_t *d, int length) noexcept nogil:
    """Rows V1 to V5: a packet of our family in a frame for us?  The counter to drop it under; NULL: it is."""
    if length < <int>UT_PREFIX_BYTES:
        return &c.decap_drop_vxlan_short
    if not d[0] & VXLAN_VNI_IS_VALID:
        return &c.decap_drop_vxlan_flags
    if load_be32(d + VXLAN_VNI) >> 8 != table.vni:
        return &c.decap_drop_vxlan_vni
    if load_be16(d + INNER_ETHERTYPE) != (ETHERTYPE_IPV6 if carries_ipv6(table) else ETHERTYPE_IPV4):
        return &c.decap_drop_vxlan_ethertype
    if memcmp(d + INNER_DESTINATION, table.own_mac, 6) != 0:
        return &c.decap_drop_vxlan_mac
    return NULL

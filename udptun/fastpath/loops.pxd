"""Datagrams of the tunnel inside the tunnel: they would go round and round, each time longer (RFC 2473 4.1).

    endpoint    the address and the UDP port of a tunnel's socket: ours, or a peer's by its lease

A route that leads a peer's endpoint into our device sends our own datagrams back to us, and a peer's pod may send to
our endpoint.  No route and no lease that we accept does that; this is for routes that others set.
"""

from libc.stdint cimport uint32_t

from udptun.fastpath.loop cimport *
from udptun.fastpath.wire cimport *


cdef inline int udp_destination_port(const Packet *p) noexcept nogil:
    """The UDP port that the packet goes to; -1 where there is none to see."""
    return load_be16(p.data + p.header + 2) if p.protocol == PROTO_UDP and has_ports(p) else -1


cdef inline bint is_of_the_tunnel(const ut_slot *table, const Packet *p) noexcept nogil:
    """Whether a packet from the TUN is a tunnel's own datagram: UDP to a peer's public IP, or to an address of ours.

    A pod's packet is one if it goes to our port, or to that of the peer that leases its destination.  One of this host
    is one whatever its port: another peer may have another port.
    """
    cdef int port = udp_destination_port(p)
    if port < 0:
        return False
    if (port != table.port and not is_of_this_host(table, p, source_of(p))
            and (p.peer == 0 or port_of(&remote_of(table, p.peer).where) != <uint32_t>port)):
        return False
    return is_public_ip(table, p, destination_of(p)) or is_of_this_host(table, p, destination_of(p))


cdef inline bint is_for_our_socket(const ut_slot *table, const Packet *p) noexcept nogil:
    """Whether a peer's packet goes to our own UDP socket."""
    return udp_destination_port(p) == table.port and is_of_this_host(table, p, destination_of(p))

"""The memory that a worker shares with the control plane (csrc/shm.h), and how the worker finds a peer in it.

    table       the peers, written by the control plane, read-only here; a turn uses one of its slots from begin to end
    slot        one complete picture of the overlay: own subnets, MTU, peers, and what `lookup` and `lookup_ipv6` read
    peer        one subnet that another host leases, of either family
    remote      where a host is: its address and port, which all its peers share
    address     16 bytes, with IPv4 as ::ffff:a.b.c.d; elsewhere IPv4 addresses are numbers in host order
    worker      a block of words that one worker writes: the generation it uses, its state, its counters
    in flight   what a worker has read from the kernel and not yet handed on: its successor goes on with it
    stray       a slot of a worker for datagrams from an address that no lease explains
    ring        packets between a worker and the control plane (ring.pxd, trace.pxd)
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from udptun.fastpath.sys cimport *

# Cython wants to know which fields are arrays; how long they are only shm.h says.
cdef extern from "shm.h" nogil:
    enum:
        UT_TABLE_MAGIC, UT_STATS_MAGIC, UT_LAYOUT_VERSION
        UT_MAX_PEERS, UT_INDEX_ENTRIES, UT_MAX_LENGTHS, UT_L1_ENTRIES, UT_L2_ENTRIES, UT_L2_PAGES, UT_L2_FLAG
        UT_MAX_WORKERS, UT_MAX_COUNTERS
        UT_LOCAL_ENTRIES, UT_MAX_LOCAL, UT_MAX_LEARNED, UT_HASH, UT_STRAYS, UT_STRAY_SETS, UT_STRAY_WAYS
        UT_RING_SLOTS, UT_RING_BYTES, UT_READS, UT_READ_BYTES, UT_MESSAGES, UT_PREFIX_BYTES, UT_PREFIX_ROOM
        UT_MAX_SENDERS, UT_PEER_UDPTUN, UT_PEER_ANY_SOURCE_PORT, UT_PEER_DEAD, UT_PEER_ECN
        UT_SOURCE_OFF, UT_SOURCE_PEER, UT_SOURCE_STRICT
        UT_OFFLOAD_SEGMENT, UT_OFFLOAD_WRITE_TCP, UT_OFFLOAD_WRITE_UDP, UT_OFFLOAD_VNET_HDR
        UT_OFFLOAD_ECN
        UT_STATE_STOPPED, UT_STATE_RUNNING, UT_STATE_TUN_LOST
        UT_WAY_PEER, UT_WAY_TUN
        UT_TRACE_SLOTS, UT_TRACE_BYTES, UT_TRACE_ANY_PROTOCOL, UT_TRACE_ENCAP, UT_TRACE_DECAP, UT_TRACE_WAYS
        UT_INJECT_WAITS, UT_INJECT_DONE, UT_INJECT_MALFORMED, UT_INJECT_NO_ROUTE, UT_INJECT_REFUSED, UT_INJECT_IN_FLIGHT
    # Numbers of 64 bits, which an enum has no room for.
    const uint64_t UT_HASH_UPPER, UT_HASH_LOWER, UT_HASH_BOTH
    struct ut_address:
        uint64_t half[2]
    struct ut_prefix:
        ut_address address, mask
    union ut_socket_address:
        sockaddr any
        sockaddr_in ipv4
        sockaddr_in6 ipv6
    struct ut_remote:
        ut_socket_address where
        uint32_t where_len
    struct ut_peer:
        ut_address subnet
        uint32_t subnet_len, remote, mtu, flags
        uint8_t prefix[1]
        uint64_t received
    struct ut_learned:
        ut_address outer
        uint32_t peer, port
    struct ut_length:
        ut_address mask
        uint64_t subnet_len
    struct ut_slot:
        uint32_t network, network_mask, own_subnet, own_mask, tunnel_address, local_mask
        uint32_t mtu, source_check, n_l1, offloads, prefix_len, vni, punt_id
        uint8_t own_mac[6]
        uint16_t port
        uint32_t n_learned, learn_id, n_peers, n_remotes
        uint32_t remote_hash_mask, peer_hash_mask, local_ipv6_mask, n_lengths
        ut_prefix network_ipv6, own_subnet_ipv6
        ut_address tunnel_address_ipv6
        ut_length lengths[1]
        uint32_t l1[1]
        ut_remote remotes[1]
        uint32_t remote_hash[1]
        uint32_t peer_hash[1]
        uint32_t local[1]
        ut_address local_ipv6[1]
        ut_learned learned[1]
        ut_peer peers[1]
        uint32_t l2[1][1]
    struct ut_table:
        uint32_t magic, layout_version
        uint64_t generation
        ut_slot slot[2]
    struct ut_worker:
        uint64_t generation_seen, pid, state, turns, refused
        uint64_t counter[1]
    struct ut_peer_stats:
        uint64_t encap_packets, encap_bytes, decap_packets, decap_bytes
    struct ut_stray:
        ut_address outer, inner
        uint32_t peer, last_s, strength, punted_s
        uint64_t datagrams
    struct ut_read:
        uint8_t vnet[16]
        uint32_t at, is_stepped
    struct ut_in_flight:
        uint32_t n_reads, n_messages
        uint64_t n_handed_on
        ut_read read[1]
        mmsghdr message[1]
        ut_socket_address source[1]
        uint8_t control[1][1]
        uint8_t arena[1]
        uint8_t train[1][1]
    struct ut_ring_slot:
        uint32_t checksum, result, error
        uint64_t time_ns, sequence
        uint32_t way, length, kept, peer
        ut_address outer
        uint16_t outer_port, is_stray
        uint8_t packet[1]
    struct ut_ring:
        uint64_t written, refused, begun, taken
        ut_ring_slot slot[1]
    struct ut_trace_filter:
        ut_prefix source, destination
        uint32_t family, protocol, port, is_both_ways, is_drops_alone, snap_len
    struct ut_trace:
        uint64_t number, until_ns
        ut_trace_filter filter
    struct ut_traced:
        uint64_t number, time_ns
        ut_address outer
        uint32_t peer, length, counter, at
        uint16_t outer_port, kept, n_segments, n_dropped, is_answered
        uint8_t packet[1]
    struct ut_trace_ring:
        uint64_t written, lost, taken
        ut_traced slot[1]
    struct ut_stats:
        uint32_t magic, layout_version
        ut_trace trace
        ut_worker worker[1]
        ut_peer_stats peer[1][1]
        ut_in_flight in_flight[1]
        ut_stray stray[1][1]
        ut_ring inject
        ut_ring punt[1]
        ut_trace_ring traced[1][1]
    const ut_slot *ut_table_enter(const ut_table *table, ut_worker *worker)
    void ut_table_leave(ut_worker *worker)
    uint32_t ut_hash(uint32_t word)
    uint32_t ut_hash_address(const ut_address *address)
    uint64_t ut_trace_take(const ut_trace *trace, ut_trace_filter *filter)
    uint32_t ut_slot_checksum(const ut_ring_slot *slot, uint32_t kept)
    void ut_store_u64(uint64_t *word, uint64_t value)
    uint64_t ut_load_u64(const uint64_t *word)

ctypedef uint64_t Counter

cdef struct Counters:
    # All counters, in the order of the shared memory: ut_worker.counter begins with these.  The names are those of
    # `udptun status`; docs/wire-format.md says when each applies.  Another order, or a name in between, is another
    # layout version: an earlier build may have counted in this memory.
    Counter encap_packets
    Counter encap_sent
    Counter encap_drop_short
    Counter encap_drop_ipv6
    Counter encap_drop_malformed
    Counter encap_drop_no_route
    Counter encap_drop_ttl
    Counter encap_drop_too_big
    Counter encap_drop_send
    Counter encap_drop_in_flight
    Counter decap_packets
    Counter decap_delivered
    Counter decap_drop_vxlan_short
    Counter decap_drop_vxlan_flags
    Counter decap_drop_vxlan_vni
    Counter decap_drop_vxlan_ethertype
    Counter decap_drop_vxlan_mac
    Counter decap_drop_empty
    Counter decap_drop_short
    Counter decap_drop_ipv6
    Counter decap_drop_version
    Counter decap_drop_ihl
    Counter decap_drop_length
    Counter decap_drop_checksum
    Counter decap_drop_options
    Counter decap_drop_fragment
    Counter decap_drop_unknown_peer
    Counter decap_drop_source_martian
    Counter decap_drop_source_own
    Counter decap_drop_source_spoofed
    Counter decap_drop_source_outside
    Counter decap_drop_foreign_destination
    Counter decap_drop_ttl
    Counter decap_drop_oversize
    Counter decap_drop_tun
    Counter decap_drop_in_flight
    Counter icmp_sent
    Counter icmp_suppressed
    # What came later stands at the end, so that memory of earlier builds counts on.
    Counter decap_punted
    Counter decap_drop_punt_full
    Counter inject_packets
    Counter inject_sent
    Counter inject_delivered
    Counter inject_drop_malformed
    Counter inject_drop_no_route
    Counter inject_drop_refused
    Counter inject_drop_in_flight
    Counter encap_drop_dead
    Counter decap_drop_ce
    Counter encap_drop_loop
    Counter decap_drop_loop
    # What the packets cost in system calls; each counts what the kernel has taken or given.
    Counter tun_reads
    Counter udp_send_calls
    Counter udp_send_messages
    Counter udp_sent_bytes
    Counter udp_receive_calls
    Counter udp_receive_messages
    Counter tun_writes
    Counter tun_written_bytes


cdef inline uint32_t lookup(const ut_slot *table, uint32_t address) noexcept nogil:
    """Index of the peer that leases `address` (host order); 0: none.  One or two loads, however many peers."""
    cdef uint32_t i = (address - table.network) >> 8
    cdef uint32_t entry
    # Below the network the subtraction wraps to a large index.
    if i >= table.n_l1:
        return 0
    entry = table.l1[i]
    if entry & UT_L2_FLAG:
        return table.l2[entry & ~<uint32_t>UT_L2_FLAG][address & 255]
    return entry


cdef inline uint32_t lookup_ipv6(const ut_slot *table, const uint8_t *address) noexcept nogil:
    """Index of the peer that leases the IPv6 `address` (as in a packet); 0: none.

    For each prefix length that peers have one entry and one peer, as a rule, however many peers.
    """
    cdef ut_address whole, wanted
    cdef const ut_length *length
    cdef const ut_peer *peer
    cdef uint32_t k, i
    memcpy(&whole, address, sizeof(ut_address))
    for k in range(table.n_lengths):
        length = &table.lengths[k]
        wanted.half[0] = whole.half[0] & length.mask.half[0]
        wanted.half[1] = whole.half[1] & length.mask.half[1]
        i = ut_hash_address(&wanted) & table.peer_hash_mask
        while table.peer_hash[i]:
            peer = &table.peers[table.peer_hash[i]]
            if is_same(&peer.subnet, &wanted) and peer.subnet_len == length.subnet_len:
                return table.peer_hash[i]
            i = (i + 1) & table.peer_hash_mask
    return 0


cdef inline bint carries_ipv4(const ut_slot *table) noexcept nogil:
    return table.tunnel_address != 0


cdef inline bint carries_ipv6(const ut_slot *table) noexcept nogil:
    return table.own_subnet_ipv6.mask.half[0] != 0


cdef inline bint is_within(const ut_prefix *prefix, const uint8_t *address) noexcept nogil:
    cdef ut_address it
    memcpy(&it, address, sizeof(ut_address))
    return (it.half[0] & prefix.mask.half[0] == prefix.address.half[0]
            and it.half[1] & prefix.mask.half[1] == prefix.address.half[1])


cdef inline bint is_same(const ut_address *a, const ut_address *b) noexcept nogil:
    return a.half[0] == b.half[0] and a.half[1] == b.half[1]


cdef inline ut_address mapped(uint32_t address_be) noexcept nogil:
    """An IPv4 address (network order) as ::ffff:a.b.c.d."""
    cdef ut_address out
    cdef uint8_t *end = <uint8_t *>&out.half[1]
    out.half[0] = 0
    end[0] = end[1] = 0
    end[2] = end[3] = 0xff
    memcpy(end + 4, &address_be, 4)
    return out


cdef inline bint is_mapped(const ut_address *address) noexcept nogil:
    """Whether it stands for an IPv4 address."""
    cdef ut_address first = mapped(0)
    return address.half[0] == 0 and memcmp(&address.half[1], &first.half[1], 4) == 0


cdef inline ut_address address_of(const ut_socket_address *where) noexcept nogil:
    cdef ut_address out
    if where.any.sa_family == AF_INET:
        return mapped(where.ipv4.sin_addr.s_addr)
    memcpy(&out, &where.ipv6.sin6_addr, sizeof(ut_address))
    return out


cdef inline uint32_t port_of(const ut_socket_address *where) noexcept nogil:
    """In host order.  It is at the same place in both families."""
    cdef const uint8_t *port_be = <const uint8_t *>&where.ipv4.sin_port
    return <uint32_t>port_be[0] << 8 | port_be[1]


cdef inline const ut_remote *remote_of(const ut_slot *table, uint32_t peer) noexcept nogil:
    return &table.remotes[table.peers[peer].remote]


cdef inline bint is_at(const ut_slot *table, uint32_t peer, const ut_socket_address *source) noexcept nogil:
    """Whether `source` is the peer's public IP."""
    cdef const ut_socket_address *where = &remote_of(table, peer).where
    if source.any.sa_family != where.any.sa_family:
        return False
    if source.any.sa_family == AF_INET:
        return source.ipv4.sin_addr.s_addr == where.ipv4.sin_addr.s_addr
    return memcmp(&source.ipv6.sin6_addr, &where.ipv6.sin6_addr, sizeof(ut_address)) == 0


cdef inline bint is_remote(const ut_slot *table, const ut_address *address) noexcept nogil:
    """Whether some peer has this public IP.  Needed only for packets that no lease explains."""
    cdef ut_address other
    cdef uint32_t i = ut_hash_address(address) & table.remote_hash_mask
    while table.remote_hash[i]:
        other = address_of(&table.remotes[table.remote_hash[i]].where)
        if is_same(&other, address):
            return True
        i = (i + 1) & table.remote_hash_mask
    return False


cdef inline bint is_learned(
        const ut_slot *table, uint32_t peer, const ut_address *address, uint32_t port) noexcept nogil:
    """Whether `peer` has been found to send from there (host order).

    A binary search; it is needed only for packets that would be dropped otherwise.
    """
    cdef const ut_learned *it
    cdef uint32_t low = 0, high = table.n_learned, middle
    cdef int order
    while low < high:
        middle = (low + high) >> 1
        it = &table.learned[middle]
        order = memcmp(&it.outer, address, sizeof(ut_address))
        if order < 0 or order == 0 and it.peer < peer:
            low = middle + 1
        else:
            high = middle
    it = &table.learned[low]
    return low < table.n_learned and is_same(&it.outer, address) and it.peer == peer and it.port in (0, port)


cdef inline bint is_local(const ut_slot *table, uint32_t address) noexcept nogil:
    """Whether this host has `address` (host order).  One load as a rule; at least half of the entries are free."""
    cdef uint32_t i = ut_hash(address) & table.local_mask
    while table.local[i]:
        if table.local[i] == address:
            return True
        i = (i + 1) & table.local_mask
    return False


cdef inline bint is_local_ipv6(const ut_slot *table, const uint8_t *address) noexcept nogil:
    """The same of an IPv6 address, as in a packet."""
    cdef ut_address wanted
    cdef uint32_t i
    memcpy(&wanted, address, sizeof(ut_address))
    i = ut_hash_address(&wanted) & table.local_ipv6_mask
    while table.local_ipv6[i].half[0] or table.local_ipv6[i].half[1]:
        if is_same(&table.local_ipv6[i], &wanted):
            return True
        i = (i + 1) & table.local_ipv6_mask
    return False

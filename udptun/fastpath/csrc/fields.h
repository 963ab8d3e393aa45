/* Where the control plane finds the fields of shm.h that it reads or writes; _fastpath.pyx makes FIELDS of it.
 *
 * In the order in which they lie.  A name that ends in _be says network byte order, any other host order; a `struct
 * ut_address` is bytes, as in a packet.
 */
#ifndef UDPTUN_FIELDS_H
#define UDPTUN_FIELDS_H

#include "shm.h"

struct ut_field {
    const char *structure, *name;
    size_t offset, bytes;
};

#define UT_FIELD_AS(of, field, name) \
    {#of, name, offsetof(struct ut_##of, field), sizeof(((struct ut_##of *)0)->field)}
#define UT_FIELD(of, field) UT_FIELD_AS(of, field, #field)

static const struct ut_field ut_fields[] = {
    UT_FIELD(remote, where),
    UT_FIELD(remote, where_len),

    UT_FIELD(peer, subnet),
    UT_FIELD(peer, subnet_len),
    UT_FIELD(peer, remote),
    UT_FIELD(peer, mtu),
    UT_FIELD(peer, flags),
    UT_FIELD(peer, prefix),
    UT_FIELD(peer, received),

    UT_FIELD(length, mask),
    UT_FIELD(length, subnet_len),

    UT_FIELD(learned, outer),
    UT_FIELD(learned, peer),
    UT_FIELD(learned, port),

    UT_FIELD(slot, network),
    UT_FIELD(slot, network_mask),
    UT_FIELD(slot, own_subnet),
    UT_FIELD(slot, own_mask),
    UT_FIELD(slot, tunnel_address),
    UT_FIELD(slot, local_mask),
    UT_FIELD(slot, mtu),
    UT_FIELD(slot, source_check),
    UT_FIELD(slot, n_l1),
    UT_FIELD(slot, offloads),
    UT_FIELD(slot, prefix_len),
    UT_FIELD(slot, vni),
    UT_FIELD(slot, punt_id),
    UT_FIELD(slot, own_mac),
    UT_FIELD(slot, port),
    UT_FIELD(slot, n_learned),
    UT_FIELD(slot, learn_id),
    UT_FIELD(slot, n_peers),
    UT_FIELD(slot, n_remotes),
    UT_FIELD(slot, remote_hash_mask),
    UT_FIELD(slot, peer_hash_mask),
    UT_FIELD(slot, local_ipv6_mask),
    UT_FIELD(slot, n_lengths),
    UT_FIELD(slot, network_ipv6),
    UT_FIELD(slot, own_subnet_ipv6),
    UT_FIELD(slot, tunnel_address_ipv6),
    UT_FIELD(slot, lengths),
    UT_FIELD(slot, l1),
    UT_FIELD(slot, remotes),
    UT_FIELD(slot, remote_hash),
    UT_FIELD(slot, peer_hash),
    UT_FIELD(slot, local),
    UT_FIELD(slot, local_ipv6),
    UT_FIELD(slot, learned),
    UT_FIELD(slot, peers),
    UT_FIELD(slot, l2),

    UT_FIELD(table, generation),
    UT_FIELD(table, slot),

    UT_FIELD(worker, generation_seen),
    UT_FIELD(worker, pid),
    UT_FIELD(worker, state),
    UT_FIELD(worker, turns),
    UT_FIELD(worker, refused),
    UT_FIELD(worker, counter),

    UT_FIELD(peer_stats, encap_packets),
    UT_FIELD(peer_stats, encap_bytes),
    UT_FIELD(peer_stats, decap_packets),
    UT_FIELD(peer_stats, decap_bytes),

    UT_FIELD(stray, outer),
    UT_FIELD(stray, inner),
    UT_FIELD(stray, peer),
    UT_FIELD(stray, last_s),
    UT_FIELD(stray, datagrams),

    UT_FIELD(stats, n_strangers),
    UT_FIELD(stats, trace),
    UT_FIELD(stats, worker),
    UT_FIELD(stats, peer),
    UT_FIELD(stats, in_flight),
    UT_FIELD(stats, stray),
    UT_FIELD(stats, inject),
    UT_FIELD(stats, punt),
    UT_FIELD(stats, traced),

    UT_FIELD(trace_filter, source),
    UT_FIELD(trace_filter, destination),
    UT_FIELD(trace_filter, family),
    UT_FIELD(trace_filter, protocol),
    UT_FIELD(trace_filter, port),
    UT_FIELD(trace_filter, is_both_ways),
    UT_FIELD(trace_filter, is_drops_alone),
    UT_FIELD(trace_filter, snap_len),

    UT_FIELD(trace, number),
    UT_FIELD(trace, until_ns),
    UT_FIELD(trace, filter),

    UT_FIELD(traced, number),
    UT_FIELD(traced, time_ns),
    UT_FIELD(traced, outer),
    UT_FIELD(traced, peer),
    UT_FIELD(traced, length),
    UT_FIELD(traced, counter),
    UT_FIELD(traced, outer_port),
    UT_FIELD(traced, kept),
    UT_FIELD(traced, n_segments),
    UT_FIELD(traced, n_dropped),
    UT_FIELD(traced, is_answered),
    UT_FIELD(traced, packet),

    UT_FIELD(trace_ring, written),
    UT_FIELD(trace_ring, lost),
    UT_FIELD(trace_ring, taken),
    UT_FIELD(trace_ring, slot),

    UT_FIELD(ring, written),
    UT_FIELD(ring, refused),
    UT_FIELD(ring, begun),
    UT_FIELD(ring, taken),
    UT_FIELD(ring, slot),

    UT_FIELD(ring_slot, checksum),
    UT_FIELD(ring_slot, result),
    UT_FIELD(ring_slot, error),
    UT_FIELD(ring_slot, time_ns),
    UT_FIELD(ring_slot, sequence),
    UT_FIELD(ring_slot, way),
    UT_FIELD(ring_slot, length),
    UT_FIELD(ring_slot, kept),
    UT_FIELD(ring_slot, peer),
    UT_FIELD(ring_slot, outer),
    UT_FIELD(ring_slot, outer_port),
    UT_FIELD(ring_slot, is_stray),
    UT_FIELD(ring_slot, packet),

    /* The tests write here what a process that was killed leaves behind. */
    UT_FIELD(read, at),
    UT_FIELD(read, is_stepped),
    UT_FIELD(in_flight, n_reads),
    UT_FIELD(in_flight, n_messages),
    UT_FIELD(in_flight, n_handed_on),
    UT_FIELD(in_flight, read),
    UT_FIELD_AS(in_flight, message[0].msg_len, "message_len"),
    UT_FIELD(in_flight, source),
    UT_FIELD(in_flight, arena),
    UT_FIELD(in_flight, train),
};
#define UT_N_FIELDS (sizeof(ut_fields) / sizeof(ut_fields[0]))

#endif

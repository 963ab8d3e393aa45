/* Layout of the two memory files that the control plane and the datapath share, and the atomics that guard them.
 *
 * One writer each: the control plane writes the table and the head of the statistics, worker i writes block i of them.
 * The rings, which lie in the same file, have two; ring.pxd and trace.pxd say who writes what.  Both files are sparse
 * and sealed against resizing; a page that nobody touches costs nothing.  Integers are in host order, but for socket
 * addresses and `struct ut_address`.  This is the only description: fastpath/shm.pxd declares the names to Cython, and
 * the control plane takes sizes, offsets and bits from LAYOUT and FIELDS of _fastpath.pyx.
 */
#ifndef UDPTUN_SHM_H
#define UDPTUN_SHM_H

/* struct mmsghdr needs _GNU_SOURCE, which Python.h defines. */
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "cmsg.h"

#define UT_TABLE_MAGIC 0x74756454u /* "Tdut" */
#define UT_STATS_MAGIC 0x74756453u /* "Sdut" */
#define UT_LAYOUT_VERSION 12u

#define UT_MAX_PEERS 131072u      /* of both families; index 0 means "no peer" */
#define UT_INDEX_ENTRIES 262144u  /* of a hash table of indices, so that half of it is free; a power of two */
#define UT_MAX_LENGTHS 128u       /* different prefix lengths of IPv6 subnets */
#define UT_L1_ENTRIES 65536u      /* one per /24 of the widest Network, a /8 */
#define UT_L2_ENTRIES 256u        /* one per address of a /24 that holds longer prefixes */
#define UT_L2_PAGES 65536u
#define UT_L2_FLAG 0x80000000u    /* an L1 entry with it names an L2 page, without it a peer */
#define UT_LOCAL_ENTRIES 65536u   /* of the hash table of this host's addresses of one family; a power of two */
#define UT_MAX_LOCAL 32768u       /* addresses in it, so that half of it is free */
#define UT_HASH 0x9e3779b1u       /* 2^32 divided by the golden ratio */
#define UT_HASH_UPPER 0x9e3779b97f4a7c15u /* 2^64 divided by it, and two other odd numbers without a pattern */
#define UT_HASH_LOWER 0xc2b2ae3d27d4eb4fu
#define UT_HASH_BOTH 0x165667b19e3779f9u
#define UT_MAX_WORKERS 16u
#define UT_MAX_COUNTERS 64u
#define UT_READS 128u             /* TUN reads a turn */
#define UT_READ_BYTES 131072u     /* and bytes: what is in flight stays in the processor's second-level cache */
#define UT_MESSAGES 64u           /* datagrams, or trains of them, a receive */
#define UT_PREFIX_ROOM 64u        /* before the first packet read, a cache line for its prefix */
/* Buffers 64 KiB apart would fall into the same cache sets; this much more spreads them (multiple of 64). */
#define UT_MESSAGE_BYTES (65536u + 1664u)
#define UT_PREFIX_BYTES 22u       /* of a VXLAN datagram before the inner packet: VXLAN 8, inner Ethernet 14 */
#define UT_MAX_SENDERS 16u        /* sockets beside the workers' own that datagrams leave from */
#define UT_STRAY_SETS 16u         /* slots of a worker for datagrams that no lease explains, in sets; a power of two */
#define UT_STRAY_WAYS 4u          /* slots of a set, any of which a pair may have; a power of two */
#define UT_STRAYS (UT_STRAY_SETS * UT_STRAY_WAYS)
#define UT_MAX_LEARNED 65536u     /* addresses beside the public IPs that peers send from */
#define UT_RING_SLOTS 64u         /* packets that wait in a ring at most; a power of two */
#define UT_RING_BYTES 440u        /* of a packet, in its slot */
#define UT_TRACE_SLOTS 1024u      /* packets that wait in a ring of traces at most; a power of two */
#define UT_TRACE_BYTES 256u       /* of a packet, in its slot */
#define UT_TABLE_HEADER_BYTES 4096u
#define UT_STATS_HEADER_BYTES 4096u

/* An IPv6 address as it stands in a packet, or an IPv4 one as ::ffff:a.b.c.d (RFC 4291 2.5.5.2).  All zero: none. */
struct ut_address {
    uint64_t half[2];
};

/* Addresses that are the same as `address` where `mask` has ones. */
struct ut_prefix {
    struct ut_address address, mask;
};

union ut_socket_address {
    struct sockaddr any;
    struct sockaddr_in ipv4;
    struct sockaddr_in6 ipv6;
};

/* Where datagrams to a host go: its public IP and UDP port, ready for sendmsg.  The peers of one host share it. */
struct ut_remote {
    union ut_socket_address where;
    uint32_t where_len;           /* of the address in `where`, bytes */
};

/* What a peer leases, of one family, and where it is; one cache line. */
struct ut_peer {
    struct ut_address subnet;     /* the first address of the lease */
    uint32_t subnet_len;          /* its prefix length, in the 128 bits of `subnet`; 0: no peer */
    uint32_t remote;              /* index in remotes[] */
    uint32_t mtu;                 /* largest inner packet the path carries, bytes */
    uint32_t flags;               /* UT_PEER_* */
    uint8_t prefix[UT_PREFIX_BYTES]; /* ready to stand before each packet, the first prefix_len bytes of it */
    uint8_t reserved[2];
    uint64_t received;            /* with UT_PEER_DEAD: packets from it that all workers had counted by then */
};
#define UT_PEER_UDPTUN 1u         /* the lease says that udptun wrote it */
#define UT_PEER_ANY_SOURCE_PORT 2u /* its datagrams may leave from any of our sockets */
#define UT_PEER_DEAD 4u           /* it answers no probe; nothing is sent to it until something comes from it */
#define UT_PEER_ECN 8u            /* it carries on the marks of congestion that its datagrams get on the way */

/* An address, no peer's public IP, from which a peer has been found to send.  It may send what that peer leases. */
struct ut_learned {
    struct ut_address outer;
    uint32_t peer;                /* index in peers[] */
    uint32_t port;                /* of UDP, from which alone; 0: from any */
};

/* The IPv6 subnets of one prefix length, as they are looked for. */
struct ut_length {
    struct ut_address mask;
    uint64_t subnet_len;
};

/* One complete, immutable-while-published picture of the overlay. */
struct ut_slot {
    uint32_t network, network_mask;
    uint32_t own_subnet, own_mask;
    uint32_t tunnel_address;      /* of our TUN device: the first of own_subnet; 0: we carry no IPv4 */
    uint32_t local_mask;          /* entries in use in local[], less one */
    uint32_t mtu;                 /* of our TUN device, bytes */
    uint32_t source_check;        /* UT_SOURCE_* */
    uint32_t n_l1;                /* L1 entries in use: /24s in Network, at least one */
    uint32_t offloads;            /* UT_OFFLOAD_*: what workers may use */
    uint32_t prefix_len;          /* before each packet on the wire: 0, or UT_PREFIX_BYTES with VXLAN */
    uint32_t vni;                 /* VXLAN: of all that we send and take */
    uint32_t punt_id;             /* ICMP id of the echo replies that the control plane gets; 0: it gets none */
    uint8_t own_mac[6];           /* VXLAN: inner destination of all that is meant for us */
    uint16_t port;                /* of our UDP socket; 0: not known */
    uint32_t n_learned;           /* entries in use in learned[] */
    uint32_t learn_id;            /* ICMP id and sequence of the echo replies that the control plane gets although no
                                   * peer is known to send from where they come from; 0: it gets none */
    uint32_t n_peers, n_remotes;  /* entries in use in peers[] and remotes[], the unused ones between them included */
    uint32_t remote_hash_mask;    /* entries in use in remote_hash[], less one */
    uint32_t peer_hash_mask;      /* in peer_hash[], likewise */
    uint32_t local_ipv6_mask;     /* in local_ipv6[], likewise */
    uint32_t n_lengths;           /* entries in use in lengths[] */
    struct ut_prefix network_ipv6, own_subnet_ipv6; /* all zero: we carry no IPv6 */
    struct ut_address tunnel_address_ipv6;
    uint64_t reserved_line[2];
    struct ut_length lengths[UT_MAX_LENGTHS]; /* of the IPv6 subnets of all peers, longest first */
    uint32_t l1[UT_L1_ENTRIES];
    struct ut_remote remotes[UT_MAX_PEERS]; /* of all peers, each address and port once; index 0 means "none" */
    uint32_t remote_hash[UT_INDEX_ENTRIES]; /* indices in remotes[], hashed by address; 0: a free entry */
    uint32_t peer_hash[UT_INDEX_ENTRIES]; /* indices in peers[] of those of IPv6, hashed by subnet; 0: a free entry */
    uint32_t local[UT_LOCAL_ENTRIES]; /* addresses of this host, hashed (ut_hash); 0: a free entry */
    struct ut_address local_ipv6[UT_LOCAL_ENTRIES]; /* likewise (ut_hash_address) */
    struct ut_learned learned[UT_MAX_LEARNED]; /* ascending by outer, byte by byte, and peer, each pair once */
    struct ut_peer peers[UT_MAX_PEERS];
    uint32_t l2[UT_L2_PAGES][UT_L2_ENTRIES];
};
enum { UT_SOURCE_OFF = 0, UT_SOURCE_PEER = 1, UT_SOURCE_STRICT = 2 };
enum {
    UT_OFFLOAD_SEGMENT = 1,       /* one send for many datagrams (UDP_SEGMENT) */
    UT_OFFLOAD_WRITE_TCP = 2,     /* one TUN write for many packets of a TCP flow */
    UT_OFFLOAD_WRITE_UDP = 4,     /* of a UDP flow */
    UT_OFFLOAD_VNET_HDR = 8,      /* packets of the TUN have a virtio header before them */
    UT_OFFLOAD_ECN = 16,          /* each send has a TOS of its own, for marks of congestion */
};

_Static_assert(sizeof(struct ut_peer) == 64 && offsetof(struct ut_slot, peers) % 64 == 0, "a peer is a cache line");

struct ut_table {
    uint32_t magic, layout_version;
    /* Slot (generation & 1) is the published one.  0: nothing published yet. */
    uint64_t generation;
    uint8_t pad[UT_TABLE_HEADER_BYTES - 16];
    struct ut_slot slot[2];
};

/* One worker's words; nobody else writes them, but for the heirs of a process that had more workers.
 * Whole cache lines. */
struct ut_worker {
    uint64_t generation_seen;     /* what it works with now; 0 while it sleeps and after it ended */
    uint64_t pid;                 /* of the process that runs it; 0: nobody does */
    uint64_t state;               /* UT_STATE_* */
    uint64_t turns;               /* rounds of the loop, to tell a spinning worker from a waiting one */
    uint64_t refused;             /* UT_OFFLOAD_* that the kernel refused, and that are not tried again */
    uint64_t reserved[3];
    uint64_t counter[UT_MAX_COUNTERS];
};
enum { UT_STATE_STOPPED = 0, UT_STATE_RUNNING = 1, UT_STATE_TUN_LOST = 2 };

/* Inner bytes and packets exchanged with one peer, by one worker. */
struct ut_peer_stats {
    uint64_t encap_packets, encap_bytes, decap_packets, decap_bytes;
};

/* Datagrams that were dropped because their outer source is not that of the peer that leases the inner source.  One
 * slot a pair of outer source and peer.  It is for people: a reader may see a slot half changed. */
struct ut_stray {
    struct ut_address outer;      /* their outer source; none: the slot is free */
    struct ut_address inner;      /* inner source of the last of them */
    uint32_t peer;                /* index of the peer that leases their inner source */
    uint32_t last_s;              /* when that came, CLOCK_MONOTONIC */
    uint32_t strength;            /* how much it takes to give the slot to another pair */
    uint32_t punted_s;            /* when a question of the slot was punted last, whosever that was */
    uint64_t datagrams;           /* since the pair has the slot */
};

/* What a worker has taken from the kernel and not yet handed on.  Here, and not in its own memory, so that the process
 * that goes on after it was killed can hand it on.  Nobody else reads it. */
struct ut_read {
    uint8_t vnet[16];             /* the virtio header of the read, 10 bytes of it */
    uint32_t at;                  /* where in the arena the packet lies, UT_PREFIX_ROOM at least; its first byte is 0
                                   * until there is one */
    uint32_t is_stepped;          /* whether its TTL has been stepped */
};
struct ut_in_flight {
    uint32_t n_reads;             /* reads begun in this turn; 0 once all is sent */
    uint32_t n_messages;          /* messages asked for in this turn; 0 once all is written */
    uint64_t n_handed_on;         /* how many successors have begun to hand it on; 0 once one has done so */
    uint32_t reserved[12];
    struct ut_read read[UT_READS];
    struct mmsghdr message[UT_MESSAGES]; /* the pointers in it are the writer's own */
    union ut_socket_address source[UT_MESSAGES];
    uint8_t control[UT_MESSAGES][UT_CMSG_BYTES];
    uint8_t arena[UT_PREFIX_ROOM + UT_READ_BYTES + 65536u]; /* packets as they were read, each behind its prefix */
    uint8_t train[UT_MESSAGES][UT_MESSAGE_BYTES];
};

/* One packet on its way between a worker and the control plane; whole cache lines (ring.pxd). */
struct ut_ring_slot {
    uint32_t checksum;            /* Adler-32 (RFC 1950) of all from `sequence` to the last byte kept */
    uint32_t result;              /* UT_INJECT_*: what became of an injected packet.  Its consumer writes it */
    uint32_t error;               /* with UT_INJECT_REFUSED: errno.  Its consumer writes it */
    uint32_t reserved;
    uint64_t time_ns;             /* CLOCK_MONOTONIC of the worker: when it had the packet, and began to hand it on */
    uint64_t sequence;            /* number of the packet in its ring; the first one has 1 */
    uint32_t way;                 /* UT_WAY_*: where an injected packet goes */
    uint32_t length;              /* of the packet, bytes */
    uint32_t kept;                /* so many of them are in the slot.  Of an injected packet the others are zero */
    uint32_t peer;                /* of a punted packet: index of who leases its inner source; 0: nobody */
    struct ut_address outer;      /* of a punted packet: where its datagram came from */
    uint16_t outer_port;          /* of a punted packet: likewise */
    uint16_t is_stray;            /* of a punted packet: no peer is known to send from there (learn_id) */
    uint32_t reserved_2;
    uint8_t packet[UT_RING_BYTES];
};
enum { UT_WAY_PEER = 0, UT_WAY_TUN = 1 };
enum {
    UT_INJECT_WAITS = 0,
    UT_INJECT_DONE = 1,           /* the kernel has taken it */
    UT_INJECT_MALFORMED = 2,
    UT_INJECT_NO_ROUTE = 3,       /* no peer leases its destination */
    UT_INJECT_REFUSED = 4,        /* by the kernel */
    UT_INJECT_IN_FLIGHT = 5,      /* a process was killed with it; perhaps it was sent */
};

/* Packets from one producer to one consumer.  Numbers only ever grow; packet n is in slot (n - 1) % UT_RING_SLOTS. */
struct ut_ring {
    uint64_t written;             /* the producer's: number of the last packet that is whole */
    uint64_t refused;             /* the producer's: packets that found the ring full, of the control plane's ring */
    uint64_t producer_line[6];
    uint64_t begun;               /* the consumer's: number of the last packet that it has begun to handle */
    uint64_t taken;               /* the consumer's: number of the last packet whose slot is free again */
    uint64_t consumer_line[6];
    struct ut_ring_slot slot[UT_RING_SLOTS];
};

/* Which packets a live trace asks for (trace.pxd). */
struct ut_trace_filter {
    struct ut_prefix source, destination;
    uint32_t family;              /* 4 or 6; 0: any */
    uint32_t protocol;            /* of the transport header; UT_TRACE_ANY_PROTOCOL: any */
    uint32_t port;                /* of TCP or UDP, at the end that `destination` is; 0: any */
    uint32_t is_both_ways;        /* whether answers match too: from `destination` to `source` */
    uint32_t is_drops_alone;      /* whether packets that are sent, delivered or punted are left out */
    uint32_t snap_len;            /* keep so many bytes of a packet, UT_TRACE_BYTES at most; 0: its headers alone */
};
enum { UT_TRACE_ANY_PROTOCOL = 256 };

/* What the control plane wants traced; whole cache lines.  It stores `number` last, and 0 before it writes the rest. */
struct ut_trace {
    uint64_t number;              /* of the trace, each has another one; 0: nothing is traced */
    uint64_t until_ns;            /* CLOCK_MONOTONIC.  From then on nothing is traced, whoever has died meanwhile */
    struct ut_trace_filter filter;
    uint8_t pad[24];
};

/* One packet that a live trace has asked for; whole cache lines. */
struct ut_traced {
    uint64_t number;              /* of the trace */
    uint64_t time_ns;             /* CLOCK_MONOTONIC */
    struct ut_address outer;      /* where its datagram goes to, or came from; none: it goes nowhere */
    uint32_t peer;                /* index of the peer that gets it, or that leases its source; 0: none */
    uint32_t length;              /* of the packet, bytes */
    uint32_t counter;             /* where it has ended: index in `struct Counters` of shm.pxd */
    uint32_t at;                  /* where the packet lay, for the worker alone */
    uint16_t outer_port;
    uint16_t kept;                /* so many bytes of it are in the slot */
    uint16_t n_segments;          /* packets that a super-packet stands for; 1: it is none */
    uint16_t n_dropped;           /* how many of them were dropped */
    uint16_t is_answered;         /* whether an ICMP error was sent about it */
    uint16_t pad[3];
    uint8_t packet[UT_TRACE_BYTES];
};

/* From a worker to the control plane, as in `struct ut_ring`. */
struct ut_trace_ring {
    uint64_t written;             /* the worker's: number of the last packet whose end is known */
    uint64_t lost;                /* the worker's: packets that found no room */
    uint64_t producer_line[6];
    uint64_t taken;               /* the control plane's: number of the last packet whose slot is free again */
    uint64_t consumer_line[7];
    uint8_t pad[UT_STATS_HEADER_BYTES - 128]; /* so that the pages of the slots can be given back */
    struct ut_traced slot[UT_TRACE_SLOTS];
};
enum { UT_TRACE_ENCAP = 0, UT_TRACE_DECAP = 1, UT_TRACE_WAYS = 2 };

_Static_assert(sizeof(struct ut_trace) % 64 == 0 && sizeof(struct ut_traced) % 64 == 0, "whole cache lines");
_Static_assert(sizeof(struct ut_trace_ring) % UT_STATS_HEADER_BYTES == 0, "whole pages");

struct ut_stats {
    uint32_t magic, layout_version;
    uint64_t n_strangers;         /* datagrams that the kernel has kept from the workers.  The control plane's.  Files of
                                   * builds that do not know it have 0 here */
    uint64_t head_line[6];
    struct ut_trace trace;        /* the control plane's */
    uint8_t pad[UT_STATS_HEADER_BYTES - 64 - sizeof(struct ut_trace)];
    struct ut_worker worker[UT_MAX_WORKERS];
    struct ut_peer_stats peer[UT_MAX_WORKERS][UT_MAX_PEERS];
    struct ut_in_flight in_flight[UT_MAX_WORKERS];
    struct ut_stray stray[UT_MAX_WORKERS][UT_STRAYS];
    struct ut_ring inject;        /* from the control plane to worker 0 */
    struct ut_ring punt[UT_MAX_WORKERS]; /* from each worker to the control plane */
    struct ut_trace_ring traced[UT_MAX_WORKERS][UT_TRACE_WAYS]
        __attribute__((aligned(UT_STATS_HEADER_BYTES))); /* from each worker: UT_TRACE_* */
};

/* A reader announces the generation it is about to use and looks again: the writer may have flipped in between and,
 * not having seen the announcement, have begun to rewrite the slot.  Both sides need sequential consistency: the
 * announcement must be visible before the second look. */
static inline const struct ut_slot *ut_table_enter(const struct ut_table *table, struct ut_worker *worker)
{
    uint64_t generation = __atomic_load_n(&table->generation, __ATOMIC_ACQUIRE);

    for (;;) {
        __atomic_store_n(&worker->generation_seen, generation, __ATOMIC_SEQ_CST);
        uint64_t now = __atomic_load_n(&table->generation, __ATOMIC_SEQ_CST);
        if (now == generation)
            return &table->slot[generation & 1];
        generation = now;
    }
}

static inline void ut_table_leave(struct ut_worker *worker)
{
    __atomic_store_n(&worker->generation_seen, 0, __ATOMIC_RELEASE);
}

/* Copies the filter of the trace that is wanted now, and returns its number; 0 when none is, or while it changes. */
static inline uint64_t ut_trace_take(const struct ut_trace *trace, struct ut_trace_filter *filter)
{
    uint64_t number = __atomic_load_n(&trace->number, __ATOMIC_ACQUIRE);

    *filter = trace->filter;
    /* What is copied is read before the second look. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&trace->number, __ATOMIC_RELAXED) == number ? number : 0;
}

/* 16 bits of which each depends on most bits of `word`.  With local_mask it is the entry of local[] from which on an
 * address is looked for, entry by entry in a circle, until one is free. */
static inline uint32_t ut_hash(uint32_t word)
{
    return (word * UT_HASH) >> 16;
}

/* 32 bits of which each depends on most bits of the address.  With a mask they are where in a hash table of addresses,
 * or of what has one, an address is looked for, entry by entry in a circle, until one is free. */
static inline uint32_t ut_hash_address(const struct ut_address *address)
{
    uint64_t mixed = address->half[0] * UT_HASH_UPPER + address->half[1] * UT_HASH_LOWER;

    mixed = (mixed ^ mixed >> 32) * UT_HASH_BOTH;
    return (uint32_t)(mixed >> 32);
}

/* Of fewer than 5,553 bytes: neither half overflows before the end (RFC 1950 9). */
static inline uint32_t ut_adler32(const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    uint32_t low = 1, high = 0;

    for (; n; p++, n--) {
        low += *p;
        high += low;
    }
    return high % 65521 << 16 | low % 65521;
}

/* What a slot's checksum must be; `kept` is at most UT_RING_BYTES. */
static inline uint32_t ut_slot_checksum(const struct ut_ring_slot *slot, uint32_t kept)
{
    const size_t begin = offsetof(struct ut_ring_slot, sequence);

    return ut_adler32((const uint8_t *)slot + begin, offsetof(struct ut_ring_slot, packet) - begin + kept);
}

/* The writer's half. */
static inline void ut_store_u64(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline uint64_t ut_load_u64(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

#endif

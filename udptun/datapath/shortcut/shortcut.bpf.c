/* The shortcut: the datagrams that need no thought, carried by the kernel (docs/shortcut.md).
 *
 *     flannel0, egress          encap     an inner packet gets its outer header and leaves by the underlay
 *     underlay, ingress         decap     a peer's datagram loses its outer header and goes into the veth pair
 *     far end of the pair,      deliver   by then GRO has merged what belongs together; on to flannel0
 *     ingress
 *     detour, ingress           arrive    the same for the packets of a peer whose super-packets arrive whole
 *
 * The detour is a VXLAN device of our own.  `decap` puts a VXLAN header in the place of the outer UDP header, and the
 * kernel takes the packet from there as it takes any VXLAN, which is the only way to have it forget that a super-packet
 * was encapsulated: one that it remembers is cut up at the next device.
 *
 * `pass` hands a packet over to the worker, which has all the policy: nothing of the packet has changed by then, and
 * the reason is counted.  So a check here may be narrower than the worker's, never wider.  The checks have the numbers
 * of the tables in docs/wire-format.md where they do the same.
 *
 * Only headers of the kernel's user interface are used, so one bytecode fits every kernel.  What a host differs in
 * comes from the map `config`.  `./dev bytecode` compiles this into bytecode.json.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define be16(x) __builtin_bswap16(x)
#define be32(x) __builtin_bswap32(x)
#define CE 3
#define ECN_MASK 3
#define ECT_0 2
#define ECT_1 1
#define DONT_FRAGMENT 0x4000
#define FRAGMENT_MASK 0x3fff /* more fragments, and the offset */
#define AF_INET 2
#define LOOPBACK 1           /* LOOPBACK_IFINDEX: where the kernel says that its own packets come from */
#define OUTER_LEN 28
#define ID_MASK 0xf000       /* of the outer identification, with which nothing is put together where DF is set: */
#define ID_OF_KERNEL 0x7000  /* a kernel has encapsulated it.  The rest counts the segments of a super-packet */
/* On to the programs and filters behind ours, and then to the worker.  TC_ACT_OK would end the chain before them. */
#define NEXT TC_ACT_UNSPEC
#define FLOW_BITS 12 /* _N_FLOWS in programs.py */
#define FLOW_GAP_NS 20000000ull
#define FLOW_AGE_NS 2000000000ull
#define SUPER_AGE_NS 2000000000ull
#define SUPER_NOTE_NS 250000000ull
#define DETOUR_LATE_NS 500000000ull /* who takes the detour is through in some microseconds */
#define DETOUR_LATE_N 3
#define VXLAN_FLAGS 0x08000000 /* there is a VNI */
#define DETOUR_LEN 50 /* of the outer headers in the detour */
#define DETOUR_MAX (65535 - DETOUR_LEN)

/* The order is that of the helpers' numbers in linux/bpf.h. */
static void *(*map_lookup)(void *, const void *) = (void *)BPF_FUNC_map_lookup_elem;
static __u64 (*ktime_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static int (*store_bytes)(void *, __u32, const void *, __u32, __u64) = (void *)BPF_FUNC_skb_store_bytes;
static int (*redirect)(__u32, __u64) = (void *)BPF_FUNC_redirect;
static int (*pull_data)(void *, __u32) = (void *)BPF_FUNC_skb_pull_data;
static int (*change_head)(void *, __u32, __u64) = (void *)BPF_FUNC_skb_change_head;
static int (*adjust_room)(void *, __s32, __u32, __u64) = (void *)BPF_FUNC_skb_adjust_room;
static int (*fib_lookup)(void *, struct bpf_fib_lookup *, int, __u32) = (void *)BPF_FUNC_fib_lookup;
static int (*redirect_neigh)(__u32, struct bpf_redir_neigh *, int, __u64) = (void *)BPF_FUNC_redirect_neigh;
static __u64 (*coarse_ktime_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;

/* What holds for this host.  Addresses and the port are in network byte order. */
struct config {
    __u32 self;           /* our underlay address */
    __u32 own_subnet, own_mask;
    __u32 tunnel_address; /* the one on flannel0 */
    __u32 key_mask;       /* of the subnets in `peers` */
    __u32 underlay;       /* indexes of the links: the underlay, flannel0, the near end of the pair */
    __u32 device;
    __u32 pair;
    __u32 mtu;            /* of flannel0, bytes */
    __u16 port;
    __u16 carries_ecn;
};

#define PEER_EGRESS 1 /* packets to it may leave here */
#define PEER_ECN 2    /* it carries on marks of congestion */
struct peer {
    __u32 subnet; /* the key, network byte order; first, see `read_peer` */
    __u32 remote; /* network byte order */
    __u16 port;   /* likewise */
    __u16 flags;
    __u32 index; /* in the peer table */
    /* The kernel's alone: */
    __u32 n_out;      /* of its packets in the detour, since one has last come out */
    __u32 unused;
    __u64 super_ns;   /* when the worker has last got a super-packet of it */
    __u64 detour_ns;  /* when one has last taken the detour */
    __u64 out_ns;     /* when the first of those that are out went in */
};

/* Of a peer what the daemon says, as of one moment. */
struct told {
    __u32 remote;
    __u16 port, flags;
    __u32 index;
};

/* By MAC addresses and sign `arrive` knows what `decap` has sent.  They are chosen at random.  An ICMP error may quote
 * the addresses.  The sign is beside the packet, where only this host can write.  All is zero while there is no detour.
 */
struct detour {
    __u64 since_ns; /* super-packets take it since then */
    __u32 is_on;
    __u32 vni;  /* as it stands in the header */
    __u16 port; /* likewise */
    __u8 macs[12];
    __u16 sign;
};

/* The same four as in struct ut_peer_stats. */
struct peer_counts {
    __u64 encap_packets, encap_bytes, decap_packets, decap_bytes;
};

/* What has the same addresses and protocol: fragments tell no ports.  Different flows may share one. */
struct flow {
    __u64 left_ns; /* when the worker has last got a packet of it that only it can send; 0: it holds nothing back */
    __u64 last_ns; /* when the worker has last got any packet of it */
};

/* Without CAP_PERFMON the verifier is strict about the stack.  No helper reads there what was not written, padding
 * included.  And before Linux 6.8 a constant that was written to a multiple of eight bytes counts as a register that was
 * saved: until a helper has read it, nothing else may be written to those eight bytes.  So each key has eight bytes for
 * itself, and structures are in `scratch`.
 */
typedef __u32 map_key __attribute__((aligned(8)));

/* What is given to helpers, of each processor. */
struct scratch {
    struct bpf_fib_lookup way;
    struct bpf_redir_neigh neighbour;
    __u16 unused;
    /* The head of a datagram.  The kernel fills in the addresses of the Ethernet header. */
    struct ethhdr eth;
    struct iphdr ip;
    struct udphdr udp;
    /* In the detour alone. */
    __u32 vxlan_flags, vni;
    struct ethhdr inner_eth;
};

/* In the order of COUNTS in counts.py. */
enum {
    ENCAP_PACKETS,
    ENCAP_SENT,
    ENCAP_DROP_SEND,
    UDP_SENT_BYTES,
    DECAP_PACKETS,
    DECAP_DELIVERED,
    DECAP_DROP_TUN,
    TUN_WRITTEN_BYTES,
    PASS_ENCAP_SHAPE,
    PASS_ENCAP_PEER,
    PASS_ENCAP_TTL,
    PASS_ENCAP_TOO_BIG,
    PASS_ENCAP_ROUTE,
    PASS_ENCAP_ORDER,
    PASS_ENCAP_LAPSED,
    PASS_DECAP_LAPSED,
    PASS_DECAP_SHAPE,
    PASS_DECAP_CHECKSUM,
    PASS_DECAP_SENDER,
    PASS_DECAP_SUPER,
    PASS_DECAP_SOURCE,
    PASS_DECAP_DESTINATION,
    PASS_DECAP_TTL,
    PASS_DECAP_TOO_BIG,
    PASS_DECAP_MARK,
    DETOUR_SENT,
    DETOUR_ARRIVED,
    DETOUR_REFUSED,
    DETOUR_LATE,
    N_COUNTS
};

/* The loader makes maps of these names; their sizes are in programs.py. */
#define MAP(name) \
    struct { \
        int unused; \
    } name SECTION("maps")
MAP(config);
MAP(control);
MAP(detour);
MAP(peers);
MAP(flows);
MAP(counts);
MAP(peer_counts);
MAP(scratch);

INLINE void count(__u32 which, __u64 n)
{
    map_key key = which;
    __u64 *at = map_lookup(&counts, &key);
    if (at)
        *at += n;
}

/* To the worker, with the reason. */
INLINE int pass(__u32 why)
{
    count(why, 1);
    return NEXT;
}

INLINE struct config *find_config(void)
{
    map_key first = 0;
    return map_lookup(&config, &first);
}

/* Whether the daemon has not said for too long that it follows the peers: it is dead, or stands still.  `control` has
 * the time until which it counts, 0 while it wants nothing taken.  `deliver` does not ask: what it gets was taken.
 */
INLINE int has_lapsed(void)
{
    map_key first = 0;
    __u64 *until_ns = map_lookup(&control, &first);
    return !until_ns || coarse_ktime_ns() >= *until_ns;
}

INLINE struct detour *find_detour(void)
{
    map_key first = 0;
    return map_lookup(&detour, &first);
}

INLINE struct peer *leasing(const struct config *c, __u32 address)
{
    map_key key = address & c->key_mask;
    return map_lookup(&peers, &key);
}

/* With what the daemon says of it.
 *
 * When an entry is replaced or deleted, its place is that of the next one that is written, at once, and while programs
 * look at it (alloc_htab_elem in kernel/bpf/hashtab.c).  The key is written first, so what was read before a key that is
 * still the right one belongs to it, where processors keep the order of writes and of reads, as x86 does.  BPF has no
 * barrier to ask the others for that.
 */
INLINE struct peer *read_peer(const struct config *c, __u32 address, struct told *told)
{
    struct peer *p = leasing(c, address);
    if (!p)
        return p;
    *told = (struct told){.remote = p->remote, .port = p->port, .flags = p->flags, .index = p->index};
    __asm__ volatile("" ::: "memory");
    return p->subnet == (address & c->key_mask) ? p : 0;
}

INLINE struct flow *flow_of(const struct iphdr *ip)
{
    /* Addresses differ in their last bits first, and a product is mixed best in its first ones. */
    map_key key = (be32(ip->saddr) * 0x9e3779b1u + be32(ip->daddr)) * 0x85ebca6bu + ip->protocol;
    key = (key * 0x9e3779b1u) >> (32 - FLOW_BITS);
    return map_lookup(&flows, &key);
}

/* To the worker, and what follows of the flow as well, which would overtake it. */
INLINE int pass_in_order(const struct iphdr *ip, __u32 why)
{
    struct flow *flow = flow_of(ip);
    if (flow)
        flow->left_ns = flow->last_ns = ktime_ns();
    return pass(why);
}

/* Whether the packet would overtake others of its flow.  A gap in the flow frees it, as the worker has sent all by
 * then, and so does its age.  Times of other processors may be a little ahead.
 */
INLINE int would_overtake(const struct iphdr *ip)
{
    struct flow *flow = flow_of(ip);
    if (!flow || !flow->left_ns)
        return 0;
    __u64 now = ktime_ns();
    if ((__s64)(now - flow->last_ns) > (__s64)FLOW_GAP_NS || (__s64)(now - flow->left_ns) > (__s64)FLOW_AGE_NS) {
        flow->left_ns = 0;
        return 0;
    }
    flow->last_ns = now;
    return 1;
}

/* The sum over a header of 20 bytes, folded; 0xffff where its checksum is right. */
INLINE __u16 sum_header(const struct iphdr *ip)
{
    const __u16 *word = (const void *)ip;
    __u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 10; i++)
        sum += word[i];
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

/* Change one 16-bit word of a header whose checksum is right (RFC 1624). */
INLINE void change_word(struct iphdr *ip, __u16 before, __u16 after)
{
    __u32 sum = (__u16)~ip->check + (__u16)~before + after;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    ip->check = ~sum;
}

INLINE void step_ttl(struct iphdr *ip)
{
    __u16 *word = (__u16 *)&ip->ttl, before = *word;
    ip->ttl--;
    change_word(ip, before, *word);
}

INLINE void set_ecn(struct iphdr *ip, __u8 ecn)
{
    __u16 *word = (__u16 *)ip, before = *word;
    ip->tos = (ip->tos & ~ECN_MASK) | ecn;
    change_word(ip, before, *word);
}

SECTION("tc/encap") int encap(struct __sk_buff *skb)
{
    void *d = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct config *c = find_config();
    struct iphdr *ip = d;
    __u32 len = skb->len, n = 1, headers = 0, longest = len;
    map_key first = 0;
    if (!c || skb->protocol != be16(ETH_P_IP))
        return NEXT;
    if (has_lapsed())
        return pass(PASS_ENCAP_LAPSED);
    if ((void *)(ip + 1) > end)
        return pass(PASS_ENCAP_SHAPE);
    if (*(__u8 *)ip != 0x45 || be16(ip->tot_len) != len || len > 65535 - OUTER_LEN
        || ip->frag_off & be16(FRAGMENT_MASK))
        return pass_in_order(ip, PASS_ENCAP_SHAPE);
    if (skb->gso_size) {
        __u8 *tcp = (void *)(ip + 1);
        if (ip->protocol != IPPROTO_TCP || (void *)(tcp + 20) > end)
            return pass_in_order(ip, PASS_ENCAP_SHAPE);
        headers = sizeof(*ip) + (tcp[12] >> 4) * 4;
        n = skb->gso_segs;
        longest = headers + skb->gso_size;
        if (!n)
            return pass_in_order(ip, PASS_ENCAP_SHAPE);
    }
    struct told peer;
    if (!read_peer(c, ip->daddr, &peer) || !(peer.flags & PEER_EGRESS))
        return pass(PASS_ENCAP_PEER);
    if (ip->ttl <= 1)
        return pass(PASS_ENCAP_TTL);
    if (longest > c->mtu)
        return pass_in_order(ip, PASS_ENCAP_TOO_BIG);
    if (would_overtake(ip))
        return pass(PASS_ENCAP_ORDER);
    struct scratch *s = map_lookup(&scratch, &first);
    if (!s)
        return NEXT;

    /* As the kernel looks up a datagram of its own, with what it has learned of the path's MTU.  Where the neighbour is
     * not resolved, it fails: the kernel would send what then waits by the route of the inner packet, which has no
     * Ethernet header (neigh_update() takes the neighbour of skb_dst()).
     */
    s->way = (struct bpf_fib_lookup){
        .family = AF_INET,
        .l4_protocol = IPPROTO_UDP,
        .sport = c->port,
        .dport = peer.port,
        .tot_len = longest + OUTER_LEN,
        .ifindex = LOOPBACK,
        .ipv4_src = c->self,
        .ipv4_dst = peer.remote,
    };
    if (fib_lookup(skb, &s->way, sizeof(s->way), 0) != BPF_FIB_LKUP_RET_SUCCESS || s->way.family != AF_INET
        || s->way.ifindex != c->underlay)
        return pass_in_order(ip, PASS_ENCAP_ROUTE);

    s->ip = (struct iphdr){
        .version = 4,
        .ihl = 5,
        .tos = peer.flags & PEER_ECN && c->carries_ecn ? ip->tos & ECN_MASK : 0,
        .tot_len = be16(len + OUTER_LEN),
        .id = be16(ID_OF_KERNEL),
        .frag_off = be16(DONT_FRAGMENT),
        .ttl = 64,
        .protocol = IPPROTO_UDP,
        .saddr = c->self,
        .daddr = peer.remote,
    };
    s->ip.check = ~sum_header(&s->ip);
    s->eth.h_proto = be16(ETH_P_IP);
    s->udp = (struct udphdr){.source = c->port, .dest = peer.port, .len = be16(len + sizeof(struct udphdr))};
    s->neighbour.nh_family = AF_INET;
    s->neighbour.ipv4_nh = s->way.ipv4_dst;
    __u32 underlay = c->underlay;
    map_key index = peer.index;
    if (adjust_room(skb, OUTER_LEN, BPF_ADJ_ROOM_MAC,
                    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_FIXED_GSO))
        return pass(PASS_ENCAP_SHAPE);
    __u64 bytes = len + (__u64)(n - 1) * headers;
    count(ENCAP_PACKETS, n);
    if (change_head(skb, ETH_HLEN, 0) || store_bytes(skb, 0, &s->eth, ETH_HLEN + OUTER_LEN, 0))
        goto failed;
    d = (void *)(long)skb->data;
    end = (void *)(long)skb->data_end;
    ip = d + ETH_HLEN + OUTER_LEN;
    if ((void *)(ip + 1) > end)
        goto failed;
    step_ttl(ip);
    struct peer_counts *of_peer = map_lookup(&peer_counts, &index);
    if (of_peer) {
        of_peer->encap_packets += n;
        of_peer->encap_bytes += bytes;
    }
    count(ENCAP_SENT, n);
    count(UDP_SENT_BYTES, bytes);
    return redirect_neigh(underlay, &s->neighbour, sizeof(s->neighbour), 0);
failed:
    count(ENCAP_DROP_SEND, n);
    return TC_ACT_SHOT;
}

INLINE int is_younger(__u64 ns, __u64 now, __u64 age)
{
    return ns && (__s64)(now - ns) < (__s64)age;
}

enum way { BY_WORKER, BY_PAIR, BY_DETOUR };

/* The way of a packet that comes from this peer.  `fits`: a super-packet may take the detour.
 *
 * A super-packet takes the detour where there is one, and else goes through the worker.  For a while so does all else
 * that this peer sends: it would overtake.  Times of other processors may be a little ahead.
 */
INLINE enum way way_of(struct peer *p, const struct detour *by, __u32 is_super, int fits)
{
    if (!is_super && !p->super_ns && !p->detour_ns)
        return BY_PAIR;
    __u64 now = ktime_ns();
    int is_open = by->is_on;
    if (is_super && !(is_open && fits)) {
        if ((__s64)(now - p->super_ns) > (__s64)SUPER_NOTE_NS)
            p->super_ns = now;
        return BY_WORKER;
    }
    if (is_super && (__s64)(now - p->detour_ns) > (__s64)SUPER_NOTE_NS)
        p->detour_ns = now;
    if (!is_younger(p->super_ns, now, SUPER_AGE_NS))
        p->super_ns = 0;
    else if (!is_open || (__s64)(p->super_ns - by->since_ns) > 0)
        return BY_WORKER;
    if (!is_younger(p->detour_ns, now, SUPER_AGE_NS)) {
        p->detour_ns = 0;
        return BY_PAIR;
    }
    if (!is_open)
        return BY_PAIR;
    /* Nothing of what it sends comes out again: something on the way drops it. */
    if (p->n_out >= DETOUR_LATE_N && (__s64)(now - p->out_ns) > (__s64)DETOUR_LATE_NS) {
        count(DETOUR_LATE, 1);
        p->n_out = 0;
        p->super_ns = now;
        return BY_WORKER;
    }
    return BY_DETOUR;
}

/* What every packet that is taken gets, once its headers are where they shall be.  `of`: its peer's index. */
INLINE void receive(struct iphdr *in, __u32 of, __u32 len, __u8 ecn, __u8 mark)
{
    map_key index = of;
    struct peer_counts *of_peer = map_lookup(&peer_counts, &index);
    step_ttl(in);
    if (mark != ecn)
        set_ecn(in, mark);
    if (of_peer) {
        of_peer->decap_packets++;
        of_peer->decap_bytes += len;
    }
}

INLINE int into_pair(struct __sk_buff *skb, const struct config *c, __u32 of, __u32 len, __u8 ecn, __u8 mark)
{
    if (adjust_room(skb, -OUTER_LEN, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
        return pass(PASS_DECAP_SHAPE);
    count(DECAP_PACKETS, 1);
    void *d = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *eth = d;
    struct iphdr *in = (void *)(eth + 1);
    if ((void *)(in + 1) > end) {
        count(DECAP_DROP_TUN, 1);
        return TC_ACT_SHOT;
    }
    /* The far end takes what is for its address (kernel/veth.py). */
    eth->h_dest[0] = eth->h_source[0] = 2;
    eth->h_dest[1] = eth->h_source[1] = 'u';
    eth->h_dest[2] = eth->h_source[2] = 't';
    eth->h_dest[3] = eth->h_source[3] = 0;
    eth->h_dest[4] = eth->h_source[4] = 0;
    eth->h_dest[5] = 2;
    eth->h_source[5] = 1;
    receive(in, of, len, ecn, mark);
    return redirect(c->pair, 0);
}

/* The kernel goes on with it as with a VXLAN packet that has come by the underlay.  With marks of congestion on the
 * outer header it would mark the inner one again.
 */
INLINE int into_detour(struct __sk_buff *skb, const struct detour *by, struct peer *p, __u32 of, const struct iphdr *ip,
                       __u32 len, __u8 ecn, __u8 mark)
{
    map_key first = 0;
    struct scratch *s = map_lookup(&scratch, &first);
    if (!s)
        return NEXT;
    s->ip = *ip;
    s->ip.tos &= ~ECN_MASK;
    s->ip.tot_len = be16(len + DETOUR_LEN);
    s->ip.check = 0;
    s->ip.check = ~sum_header(&s->ip);
    s->udp = (struct udphdr){.source = by->port, .dest = by->port, .len = be16(len + DETOUR_LEN - sizeof(s->ip))};
    s->vxlan_flags = be32(VXLAN_FLAGS);
    s->vni = by->vni;
    __builtin_memcpy(s->inner_eth.h_dest, by->macs, sizeof(by->macs));
    s->inner_eth.h_proto = be16(ETH_P_IP);
    if (adjust_room(skb, DETOUR_LEN - OUTER_LEN, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
        return pass(PASS_DECAP_SHAPE);
    count(DECAP_PACKETS, 1);
    if (store_bytes(skb, ETH_HLEN, &s->ip, DETOUR_LEN, BPF_F_RECOMPUTE_CSUM))
        goto failed;
    void *d = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct iphdr *in = d + ETH_HLEN + DETOUR_LEN;
    if ((void *)(in + 1) > end)
        goto failed;
    receive(in, of, len, ecn, mark);
    if (!p->n_out)
        p->out_ns = ktime_ns();
    p->n_out++;
    count(DETOUR_SENT, 1);
    /* With TC_ACT_OK the kernel copies it to tc_index. */
    skb->tc_classid = by->sign;
    return TC_ACT_OK;
failed:
    count(DECAP_DROP_TUN, 1);
    return TC_ACT_SHOT;
}

SECTION("tc/decap") int decap(struct __sk_buff *skb)
{
    void *d = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct config *c = find_config();
    struct detour *by = find_detour();
    struct ethhdr *eth = d;
    struct iphdr *ip = (void *)(eth + 1), *in;
    struct udphdr *udp = (void *)(ip + 1);
    __u32 all = sizeof(*eth) + OUTER_LEN + sizeof(*in) + sizeof(*udp), longest, headers = 0;
    if (!c || !by || skb->protocol != be16(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present)
        return NEXT;
    if ((void *)(udp + 1) > end) {
        if (skb->len < all || pull_data(skb, all))
            return NEXT;
        d = (void *)(long)skb->data;
        end = (void *)(long)skb->data_end;
        eth = d;
        ip = (void *)(eth + 1);
        udp = (void *)(ip + 1);
        if ((void *)(udp + 1) > end)
            return NEXT;
    }
    if (ip->protocol != IPPROTO_UDP || ip->daddr != c->self || *(__u8 *)ip != 0x45
        || ip->frag_off & be16(FRAGMENT_MASK))
        return NEXT;
    if (udp->dest != c->port) {
        /* A stranger who has guessed the VNI gets no further.  Who has not is no concern of ours: the port may be that
         * of a connection which is masqueraded.
         */
        __u32 *vni = (void *)(udp + 1) + 4;
        if (by->port && udp->dest == by->port && (void *)(vni + 1) <= end && *vni == by->vni) {
            count(DETOUR_REFUSED, 1);
            return TC_ACT_SHOT;
        }
        return NEXT;
    }

    /* It is for our socket. */
    if (has_lapsed())
        return pass(PASS_DECAP_LAPSED);
    if (d + all > end) {
        if (skb->len < all || pull_data(skb, all))
            return pass(PASS_DECAP_SHAPE);
        d = (void *)(long)skb->data;
        end = (void *)(long)skb->data_end;
        if (d + all > end)
            return pass(PASS_DECAP_SHAPE);
    }
    eth = d;
    ip = (void *)(eth + 1);
    udp = (void *)(ip + 1);
    in = (void *)(udp + 1);
    __u32 len = be16(in->tot_len);
    if (*(__u8 *)in != 0x45 || len < sizeof(*in) || be16(ip->tot_len) != len + OUTER_LEN
        || be16(udp->len) != len + sizeof(*udp) || skb->len != sizeof(*eth) + OUTER_LEN + len
        || in->frag_off & be16(FRAGMENT_MASK))
        return pass(PASS_DECAP_SHAPE);
    if (sum_header(ip) != 0xffff || sum_header(in) != 0xffff)
        return pass(PASS_DECAP_CHECKSUM);
    /* What a worker or another program has sent may have inner checksums that are to be finished, which a worker sees.
     * What a kernel has sent brings the kernel's note of that along.
     */
    if (udp->check || (ip->id & be16(ID_MASK)) != be16(ID_OF_KERNEL))
        return pass(PASS_DECAP_SENDER);
    struct told peer;
    struct peer *p = read_peer(c, in->saddr, &peer);
    if (!p || peer.remote != ip->saddr)
        return pass(PASS_DECAP_SOURCE);
    longest = len;
    if (skb->gso_size) {
        __u8 *tcp = (void *)(in + 1);
        if (in->protocol == IPPROTO_TCP && (void *)(tcp + 20) <= end)
            headers = sizeof(*in) + (tcp[12] >> 4) * 4;
        longest = headers + skb->gso_size;
    }
    enum way way = way_of(p, by, skb->gso_size, headers && len <= DETOUR_MAX);
    if (way == BY_WORKER)
        return pass(PASS_DECAP_SUPER);
    if ((in->daddr & c->own_mask) != c->own_subnet)
        return pass(PASS_DECAP_DESTINATION);
    if (in->daddr == c->tunnel_address && in->protocol == IPPROTO_ICMP)
        return pass(PASS_DECAP_DESTINATION);
    if (in->protocol == IPPROTO_UDP && ((struct udphdr *)(in + 1))->dest == c->port)
        return pass(PASS_DECAP_DESTINATION);
    if (in->ttl <= 1)
        return pass(PASS_DECAP_TTL);
    if (longest > c->mtu)
        return pass(PASS_DECAP_TOO_BIG);
    __u8 outer = c->carries_ecn ? ip->tos & ECN_MASK : 0, inner = in->tos & ECN_MASK, mark = inner;
    if (outer == CE && !inner)
        return pass(PASS_DECAP_MARK);
    if (inner && (outer == CE || (outer == ECT_1 && inner == ECT_0)))
        mark = outer;

    return way == BY_DETOUR ? into_detour(skb, by, p, peer.index, ip, len, inner, mark)
                            : into_pair(skb, c, peer.index, len, inner, mark);
}

SECTION("tc/deliver") int deliver(struct __sk_buff *skb)
{
    struct config *c = find_config();
    __u32 n = skb->gso_size ? skb->gso_segs : 1;
    if (!c)
        return TC_ACT_SHOT;
    /* Somebody else's, as the kernel's own solicitations. */
    if (skb->protocol != be16(ETH_P_IP))
        return TC_ACT_SHOT;
    count(DECAP_DELIVERED, n);
    count(TUN_WRITTEN_BYTES, skb->len - ETH_HLEN);
    return redirect(c->device, BPF_F_INGRESS);
}

SECTION("tc/arrive") int arrive(struct __sk_buff *skb)
{
    void *d = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct config *c = find_config();
    struct detour *by = find_detour();
    struct ethhdr *eth = d;
    struct iphdr *in = (void *)(eth + 1);
    __u32 n = skb->gso_segs ? skb->gso_segs : 1;
    if (!c || !by)
        return TC_ACT_SHOT;
    if ((void *)(in + 1) > end) {
        if (pull_data(skb, sizeof(*eth) + sizeof(*in)))
            goto refused;
        d = (void *)(long)skb->data;
        end = (void *)(long)skb->data_end;
        eth = d;
        in = (void *)(eth + 1);
        if ((void *)(in + 1) > end)
            goto refused;
    }
    __u16 *have = d, *want = (void *)by->macs, differs = skb->protocol ^ be16(ETH_P_IP);
#pragma unroll
    for (int i = 0; i < 6; i++)
        differs |= have[i] ^ want[i];
    if (differs || !by->port || skb->tc_index != by->sign)
        goto refused;
    struct peer *p = leasing(c, in->saddr);
    if (!p || (in->daddr & c->own_mask) != c->own_subnet)
        goto refused;
    p->n_out = 0;
    /* A super-packet is one, as it was when it was received: decap has made its number of segments zero. */
    count(DETOUR_ARRIVED, n);
    count(DECAP_DELIVERED, n);
    count(TUN_WRITTEN_BYTES, skb->len - ETH_HLEN);
    return redirect(c->device, BPF_F_INGRESS);
refused:
    count(DETOUR_REFUSED, 1);
    return TC_ACT_SHOT;
}

/* The kernel has most of the helpers for such programs only. */
char _license[] SECTION("license") = "GPL";

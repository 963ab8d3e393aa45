/* Which of several sockets on one port a datagram goes to. */
#ifndef UDPTUN_SPREAD_H
#define UDPTUN_SPREAD_H

#include <linux/filter.h>
#include <netinet/in.h>
#include <stdint.h>
#include <sys/socket.h>

#ifndef SO_ATTACH_REUSEPORT_CBPF
#define SO_ATTACH_REUSEPORT_CBPF 51
#endif

/* A number for the source address in the accumulator: the address of IPv4, and of IPv6 its four words by XOR. */
#define UT_LOAD_FROM_HEADER(size, offset) BPF_STMT(BPF_LD | size | BPF_ABS, (uint32_t)SKF_NET_OFF + (offset))
#define UT_XOR_WORD(offset) \
    BPF_STMT(BPF_MISC | BPF_TAX, 0), UT_LOAD_FROM_HEADER(BPF_W, offset), BPF_STMT(BPF_ALU | BPF_XOR | BPF_X, 0)
#define UT_SOURCE_IPV4 UT_LOAD_FROM_HEADER(BPF_W, 12)
#define UT_SOURCE_IPV6 UT_LOAD_FROM_HEADER(BPF_W, 8), UT_XOR_WORD(12), UT_XOR_WORD(16), UT_XOR_WORD(20)
#define UT_CHOOSE(port_offset) \
    BPF_STMT(BPF_ALU | BPF_MUL | BPF_K, 0x9E3779B1u), BPF_STMT(BPF_ALU | BPF_RSH | BPF_K, 16), \
        BPF_STMT(BPF_MISC | BPF_TAX, 0), UT_LOAD_FROM_HEADER(BPF_H, port_offset), \
        BPF_STMT(BPF_ALU | BPF_ADD | BPF_X, 0), BPF_STMT(BPF_ALU | BPF_MOD | BPF_K, n), \
        BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, first), BPF_STMT(BPF_RET | BPF_A, 0)

/* Have the kernel choose among `n` sockets from `first` on, in the order in which they were bound, of those that share
 * a port with `fd`: first + (hash of the source address + source port) mod n.  So the ports of one sender that follow
 * each other go to sockets that do, and one for each socket serves them all.  0, or -1 with errno: EINVAL where nothing
 * is shared.
 *
 * Offsets from SKF_NET_OFF are into the IP header.  With options or extension headers behind it the port is other
 * bytes, which are the same for a flow too. */
static inline int ut_spread(int fd, uint32_t first, uint32_t n)
{
    struct sock_filter ipv4[] = {UT_SOURCE_IPV4, UT_CHOOSE(20)};
    struct sock_filter ipv6[] = {UT_SOURCE_IPV6, UT_CHOOSE(40)};
    struct sock_fprog program = {sizeof(ipv4) / sizeof(ipv4[0]), ipv4};
    int domain = AF_INET;
    socklen_t size = sizeof(domain);

    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_INET6) {
        program.len = sizeof(ipv6) / sizeof(ipv6[0]);
        program.filter = ipv6;
    }
    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof(program));
}

#endif

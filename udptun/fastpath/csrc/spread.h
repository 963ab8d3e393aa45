/* Which of several sockets on one port a datagram goes to. */
#ifndef UDPTUN_SPREAD_H
#define UDPTUN_SPREAD_H

#include <linux/filter.h>
#include <stdint.h>
#include <sys/socket.h>

#ifndef SO_ATTACH_REUSEPORT_CBPF
#define SO_ATTACH_REUSEPORT_CBPF 51
#endif

/* Have the kernel choose among `n` sockets from `first` on, in the order in which they were bound, of those that share
 * a port with `fd`: first + (hash of the source address + source port) mod n.  So the ports of one sender that follow
 * each other go to sockets that do, and one for each socket serves them all.  0, or -1 with errno: EINVAL where nothing
 * is shared.
 *
 * Offsets from SKF_NET_OFF are into the IP header.  With options in it the port is other bytes, which are the same for
 * a flow too. */
static inline int ut_spread(int fd, uint32_t first, uint32_t n)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)SKF_NET_OFF + 12),
        BPF_STMT(BPF_ALU | BPF_MUL | BPF_K, 0x9E3779B1u),
        BPF_STMT(BPF_ALU | BPF_RSH | BPF_K, 16),
        BPF_STMT(BPF_MISC | BPF_TAX, 0),
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, (uint32_t)SKF_NET_OFF + 20),
        BPF_STMT(BPF_ALU | BPF_ADD | BPF_X, 0),
        BPF_STMT(BPF_ALU | BPF_MOD | BPF_K, n),
        BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, first),
        BPF_STMT(BPF_RET | BPF_A, 0),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};

    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof(program));
}

#endif

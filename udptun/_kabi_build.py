"""Builds `udptun._kabi`: constants of the kernel's headers, and system calls that Python 3.11 lacks.

The C compiler fills in every `...` below from the headers of the building machine, so no number here can be wrong.
Tests compare the numbers in the Cython sources with these.  The calls take and return what the C functions do: -1 means
failure, and `ffi.errno` says why.

Set-up code and tests use this module.  `_fastpath` does not: a call through it costs half a microsecond.
"""

from cffi import FFI

# The headers of an older distribution lack these names, though the running kernel may have the features.  The numbers
# are kernel ABI and never change.
_FALLBACKS = {
    "UDP_SEGMENT": "103",
    "UDP_GRO": "104",
    "TUN_F_USO4": "0x20",
    "TUN_F_USO6": "0x40",
    "IFF_NAPI": "0x0010",
    "IFF_NAPI_FRAGS": "0x0020",
    "VIRTIO_NET_HDR_GSO_UDP_L4": "5",
    "IP_PMTUDISC_INTERFACE": "4",
    "IP_PMTUDISC_OMIT": "5",
    # Enumerators, so these stand in for the headers' own, too.
    "BPF_MAP_LOOKUP_BATCH": "24",
    "BPF_LINK_CREATE": "28",
    "BPF_TCX_INGRESS": "46",
    "BPF_TCX_EGRESS": "47",
}

_CONSTANTS = """
    TUNSETIFF TUNGETIFF TUNSETOFFLOAD TUNSETPERSIST TUNSETVNETHDRSZ TUNGETVNETHDRSZ TUNGETFEATURES
    TUNSETSNDBUF
    IFF_TUN IFF_TAP IFF_NO_PI IFF_VNET_HDR IFF_MULTI_QUEUE IFF_PERSIST
    IFF_NAPI IFF_NAPI_FRAGS IFNAMSIZ
    TUN_F_CSUM TUN_F_TSO4 TUN_F_TSO6 TUN_F_TSO_ECN TUN_F_USO4 TUN_F_USO6
    VIRTIO_NET_HDR_F_NEEDS_CSUM VIRTIO_NET_HDR_F_DATA_VALID
    VIRTIO_NET_HDR_GSO_NONE VIRTIO_NET_HDR_GSO_TCPV4 VIRTIO_NET_HDR_GSO_TCPV6 VIRTIO_NET_HDR_GSO_UDP_L4
    VIRTIO_NET_HDR_GSO_ECN
    SOL_UDP UDP_SEGMENT UDP_GRO
    SO_RCVBUFFORCE SO_SNDBUFFORCE SO_ATTACH_FILTER SO_DETACH_FILTER SO_ATTACH_BPF
    IP_MTU IP_MTU_DISCOVER IP_PMTUDISC_DONT IP_PMTUDISC_WANT IP_PMTUDISC_DO IP_PMTUDISC_PROBE
    IP_PMTUDISC_INTERFACE IP_PMTUDISC_OMIT IP_RECVERR IP_FREEBIND
    IPV6_MTU IPV6_MTU_DISCOVER
    CLONE_NEWNS CLONE_NEWNET CLONE_NEWPID CLONE_NEWUTS
    PR_SET_PDEATHSIG
    MS_BIND MS_REC MS_PRIVATE MS_NOSUID MS_NODEV MS_NOEXEC
    BPF_MAP_CREATE BPF_MAP_LOOKUP_ELEM BPF_MAP_UPDATE_ELEM BPF_MAP_DELETE_ELEM BPF_MAP_LOOKUP_BATCH
    BPF_PROG_LOAD BPF_LINK_CREATE
    BPF_MAP_TYPE_HASH BPF_MAP_TYPE_ARRAY BPF_MAP_TYPE_PERCPU_ARRAY BPF_PROG_TYPE_SCHED_CLS
    BPF_TCX_INGRESS BPF_TCX_EGRESS
"""

ffi = FFI()

ffi.cdef(
    "\n".join(f"#define {name} ..." for name in _CONSTANTS.split())
    + """
    /* drivers/net/tun.c puts this before every packet of a device opened with IFF_VNET_HDR. */
    struct virtio_net_hdr {
        uint8_t flags;
        uint8_t gso_type;
        uint16_t hdr_len;
        uint16_t gso_size;
        uint16_t csum_start;
        uint16_t csum_offset;
        ...;
    };
    struct ifreq { ...; };

    int setns(int fd, int nstype);
    int unshare(int flags);
    int prctl_pdeathsig(int signal);
    int bpf(int command, void *attributes, unsigned int size);
    int mount(const char *source, const char *target, const char *type, unsigned long flags, const char *options);
    """
)

ffi.set_source(
    "udptun._kabi",
    """
    /* Python.h has defined it already where the compiler is told to build an extension. */
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <stdint.h>
    #include <sched.h>
    #include <net/if.h>
    #include <netinet/in.h>
    #include <netinet/udp.h>
    #include <sys/ioctl.h>   /* _IOW, before linux/if_tun.h uses it */
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include <linux/bpf.h>
    #include <linux/if_tun.h>
    #include <linux/virtio_net.h>
    """
    + "".join(f"#ifndef {name}\n#define {name} {value}\n#endif\n" for name, value in _FALLBACKS.items())
    + """
    /* prctl() is variadic, which cffi would have to call through libffi. */
    static int prctl_pdeathsig(int signal)
    {
        return prctl(PR_SET_PDEATHSIG, (unsigned long)signal, 0UL, 0UL, 0UL);
    }
    /* The C library has no function for it. */
    static int bpf(int command, void *attributes, unsigned int size)
    {
        return (int)syscall(SYS_bpf, command, attributes, size);
    }
    """,
)

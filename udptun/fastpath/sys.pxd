"""The system calls and structures of the datapath, as the C library declares them; nothing else."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport off_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec *iov, int n)
    ssize_t writev(int fd, const iovec *iov, int n)

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    struct sockaddr:
        uint16_t sa_family
    int IPPROTO_IP, IPPROTO_IPV6
    int IPV6_MTU, IPV6_MTU_DISCOVER

cdef extern from "<netinet/ip.h>" nogil:
    int IP_MTU
    int IP_MTU_DISCOVER
    int IP_PMTUDISC_DONT
    int IP_PMTUDISC_PROBE

# _GNU_SOURCE, which these need, is defined by Python.h.
cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    int recvmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags, void *timeout)
    int sendmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags)
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)
    int socket(int domain, int type, int protocol)
    int connect(int fd, const sockaddr *address, socklen_t length)
    int bind(int fd, const sockaddr *address, socklen_t length)
    int getsockname(int fd, sockaddr *address, socklen_t *length)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
    int AF_INET, AF_INET6
    int SOCK_DGRAM
    int SOCK_CLOEXEC
    int MSG_DONTWAIT
    int MSG_TRUNC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLIN
    short POLLOUT
    short POLLERR

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buffer, size_t n)
    ssize_t write(int fd, const void *buffer, size_t n)
    int close(int fd)
    int getpid()

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
    int munmap(void *address, size_t length)
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void *MAP_FAILED

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *out)
    int CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE

cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr:
        uint8_t flags
        uint8_t gso_type
        uint16_t hdr_len
        uint16_t gso_size
        uint16_t csum_start
        uint16_t csum_offset
    int VIRTIO_NET_HDR_F_NEEDS_CSUM
    int VIRTIO_NET_HDR_GSO_NONE
    int VIRTIO_NET_HDR_GSO_TCPV4
    int VIRTIO_NET_HDR_GSO_TCPV6
    int VIRTIO_NET_HDR_GSO_ECN

cdef extern from "cmsg.h" nogil:
    """
    #ifndef VIRTIO_NET_HDR_GSO_UDP_L4
    #define VIRTIO_NET_HDR_GSO_UDP_L4 5  /* in headers since Linux 6.2 */
    #endif
    """
    int VIRTIO_NET_HDR_GSO_UDP_L4
    enum:
        UT_CMSG_BYTES, UT_SEND_CMSG_BYTES
    void ut_put_segment_size(msghdr *message, void *room, uint16_t size)
    void ut_put_tos(msghdr *message, void *room, int tos)
    void ut_read_control(msghdr *message, int *segment_size, int *tos)

/* A kernel as some were: preloaded, it refuses what they refuse.
 *
 * gcc -shared -fPIC -o old_kernel.so old_kernel.c; OLD_KERNEL=gso_write,no_seccomp LD_PRELOAD=./old_kernel.so ...
 *
 *   gso_write       super-packets written to a TUN are EINVAL (6.6.44 and others with e269d79c7d35)
 *   narrow_einval   datagrams of a group that the path is too narrow for are EINVAL, not EMSGSIZE
 *   no_tos          a TOS in the control messages of a datagram is EINVAL (before 3.13)
 *   no_seccomp      seccomp() is ENOSYS (without CONFIG_SECCOMP_FILTER)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>

static int is_on(const char *fault)
{
    const char *given = getenv("OLD_KERNEL");
    return given && strstr(given, fault);
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
    ssize_t (*real)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev");

    /* struct virtio_net_hdr: flags, gso_type. */
    if (is_on("gso_write") && n > 1 && iov[0].iov_len == 10 && ((const unsigned char *)iov[0].iov_base)[1]) {
        errno = EINVAL;
        return -1;
    }
    return real(fd, iov, n);
}

static int has_tos(const struct msghdr *message)
{
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR((struct msghdr *)message, cmsg))
        if (cmsg->cmsg_level == IPPROTO_IP && cmsg->cmsg_type == IP_TOS)
            return 1;
    return 0;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    ssize_t (*real)(int, const struct msghdr *, int) = dlsym(RTLD_NEXT, "sendmsg");

    if (is_on("no_tos") && has_tos(message)) {
        errno = EINVAL;
        return -1;
    }
    return real(fd, message, flags);
}

int sendmmsg(int fd, struct mmsghdr *message, unsigned int n, int flags)
{
    int (*real)(int, struct mmsghdr *, unsigned int, int) = dlsym(RTLD_NEXT, "sendmmsg");
    unsigned int taken = 0;
    int sent;

    /* The kernel sends what stands before the message that it refuses. */
    while (is_on("no_tos") && taken < n && !has_tos(&message[taken].msg_hdr))
        taken++;
    if (is_on("no_tos") && n && !taken) {
        errno = EINVAL;
        return -1;
    }
    sent = real(fd, message, is_on("no_tos") ? taken : n, flags);

    if (sent < 0 && errno == EMSGSIZE && is_on("narrow_einval") && message[0].msg_hdr.msg_controllen)
        errno = EINVAL;
    return sent;
}

long syscall(long number, ...)
{
    long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list arguments;

    if (number == SYS_seccomp && is_on("no_seccomp")) {
        errno = ENOSYS;
        return -1;
    }
    /* As many as there can be; the kernel looks at no more than the call has. */
    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

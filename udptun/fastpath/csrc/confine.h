/* What a datapath process gives up once it holds its descriptors: every capability, and the system calls that it does
 * without.
 *
 * Whoever makes the process run code of his own, by a packet, has these descriptors and no more.  He opens no file,
 * starts no program, and reaches no other process, no other kind of socket and no other network namespace.
 *
 * A call that is not on the list fails, and the process lives on.  To kill it would turn a call that a later C library
 * tries first and can do without into an outage, for the standby would die of the same call.  */
#ifndef UDPTUN_CONFINE_H
#define UDPTUN_CONFINE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_ATTACH_REUSEPORT_CBPF
#define SO_ATTACH_REUSEPORT_CBPF 51
#endif
#ifndef SECCOMP_FILTER_FLAG_SPEC_ALLOW
#define SECCOMP_FILTER_FLAG_SPEC_ALLOW (1UL << 2)
#endif

#if defined(__x86_64__)
#define UT_AUDIT_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define UT_AUDIT_ARCH AUDIT_ARCH_AARCH64
#endif

enum { UT_CONFINE_OFF, UT_CONFINE_CAPABILITIES, UT_CONFINE_FULL };

/* Give up all five sets of capabilities, and for good: no program that is executed later gets any.  0, or -1 with
 * errno.  Of the calling thread and those that it starts.
 *
 * The bounding set can be emptied only with CAP_SETPCAP, which a container or a unit may withhold.  What is left in it
 * is then of no use, because no_new_privs keeps execve() from giving what the permitted set has not. */
static inline int ut_drop_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2];
    int capability;

    for (capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        prctl(PR_CAPBSET_DROP, capability, 0, 0, 0);
    memset(none, 0, sizeof(none));
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -1;
    /* The ambient set goes with the inheritable one. */
    return (int)syscall(SYS_capset, &header, none);
}

#ifdef UT_AUDIT_ARCH

#define UT_RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
#define UT_DENY UT_RETURN(SECCOMP_RET_ERRNO | EPERM)
#define UT_IS(value, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, otherwise)
#define UT_ALLOW_VALUE(value) UT_IS(value, 1), UT_RETURN(SECCOMP_RET_ALLOW)
#define UT_ALLOW(call) UT_ALLOW_VALUE(__NR_##call)
/* The next `n` instructions are about this call alone, and end with a return. */
#define UT_ABOUT(call, n) UT_IS(__NR_##call, n)
/* The lower half of an argument: what is looked at here are ints and flags.  Both architectures are little-endian. */
#define UT_ARGUMENT(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (i))

/* Linux has given all architectures the same numbers from here on (5.1).  These calls are answered as by a kernel that
 * does not know them, so that the C library does it as before: a thread by clone3() is then one by clone(). */
#define UT_FIRST_OF_LATER_CALLS 424
#define UT_NEW_NAMESPACES \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)

/* Calls without a condition come first, and of these the packet loop's: the kernel remembers them (5.11). */
static const struct sock_filter ut_filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
    UT_IS(UT_AUDIT_ARCH, 1),
    BPF_JUMP(BPF_JMP | BPF_JA, 1, 0, 0),
    UT_DENY,
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    /* The packet loop. */
    UT_ALLOW(readv),
    UT_ALLOW(recvmmsg),
    UT_ALLOW(sendmmsg),
    UT_ALLOW(writev),
#ifdef __NR_poll
    UT_ALLOW(poll),
#endif
    UT_ALLOW(ppoll),
    UT_ALLOW(sendmsg),
    UT_ALLOW(clock_gettime),
    UT_ALLOW(read),
    UT_ALLOW(write),
    UT_ALLOW(getsockname),
    UT_ALLOW(getsockopt),
    UT_ALLOW(bind),
    UT_ALLOW(connect),
    UT_ALLOW(close),
    /* Threads and memory, and what Python does for itself. */
    UT_ALLOW(futex),
    UT_ALLOW(sched_yield),
    UT_ALLOW(sched_getaffinity),
    UT_ALLOW(set_robust_list),
#ifdef __NR_rseq
    UT_ALLOW(rseq),
#endif
    UT_ALLOW(gettid),
    UT_ALLOW(getpid),
    UT_ALLOW(munmap),
    UT_ALLOW(mremap),
    UT_ALLOW(madvise),
    UT_ALLOW(brk),
    UT_ALLOW(getrandom),
    UT_ALLOW(gettimeofday),
    UT_ALLOW(clock_nanosleep),
    UT_ALLOW(nanosleep),
    UT_ALLOW(sigaltstack),
    UT_ALLOW(rt_sigaction),
    UT_ALLOW(rt_sigprocmask),
    UT_ALLOW(rt_sigreturn),
    UT_ALLOW(restart_syscall),
    UT_ALLOW(exit),
    UT_ALLOW(exit_group),
    /* The conversation with the control plane, and a change of sockets. */
    UT_ALLOW(accept4),
    UT_ALLOW(recvfrom),
    UT_ALLOW(recvmsg),
    UT_ALLOW(sendto),
    UT_ALLOW(dup),
    UT_ALLOW(dup3),
#ifdef __NR_dup2
    UT_ALLOW(dup2),
#endif
    UT_ALLOW(eventfd2),
    /* The lock.  Not F_SETOWN, by which signals are sent to others. */
    UT_ABOUT(fcntl, 14),
    UT_ARGUMENT(1),
    UT_ALLOW_VALUE(F_SETLKW),
    UT_ALLOW_VALUE(F_DUPFD_CLOEXEC),
    UT_ALLOW_VALUE(F_GETFL),
    UT_ALLOW_VALUE(F_SETFL),
    UT_ALLOW_VALUE(F_GETFD),
    UT_ALLOW_VALUE(F_SETFD),
    UT_DENY,
    /* A connection that does not block. */
    UT_ABOUT(ioctl, 4),
    UT_ARGUMENT(1),
    UT_ALLOW_VALUE(FIONBIO),
    UT_DENY,
    /* A UDP socket, by which the kernel is asked for the MTU of a path. */
    UT_ABOUT(socket, 9),
    UT_ARGUMENT(0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 1, 0),
    UT_IS(AF_INET6, 5),
    UT_ARGUMENT(1),
    UT_IS(SOCK_DGRAM | SOCK_CLOEXEC, 3),
    UT_ARGUMENT(2),
    UT_ALLOW_VALUE(0),
    UT_DENY,
    /* Which socket of the port a datagram goes to; a datagram that may be fragmented. */
    UT_ABOUT(setsockopt, 16),
    UT_ARGUMENT(1),
    UT_IS(SOL_SOCKET, 3),
    UT_ARGUMENT(2),
    UT_ALLOW_VALUE(SO_ATTACH_REUSEPORT_CBPF),
    UT_ARGUMENT(1),
    UT_IS(IPPROTO_IP, 3),
    UT_ARGUMENT(2),
    UT_ALLOW_VALUE(IP_MTU_DISCOVER),
    UT_ARGUMENT(1),
    UT_IS(IPPROTO_IPV6, 3),
    UT_ARGUMENT(2),
    UT_ALLOW_VALUE(IPV6_MTU_DISCOVER),
    UT_DENY,
    /* Memory, but none that can be executed. */
    UT_ABOUT(mmap, 4),
    UT_ARGUMENT(2),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 1, 0),
    UT_RETURN(SECCOMP_RET_ALLOW),
    UT_DENY,
    UT_ABOUT(mprotect, 4),
    UT_ARGUMENT(2),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 1, 0),
    UT_RETURN(SECCOMP_RET_ALLOW),
    UT_DENY,
    /* A thread, but no process, and no namespace of its own. */
    UT_ABOUT(clone, 5),
    UT_ARGUMENT(0),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, UT_NEW_NAMESPACES, 2, 0),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 1),
    UT_RETURN(SECCOMP_RET_ALLOW),
    UT_DENY,
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, UT_FIRST_OF_LATER_CALLS, 0, 1),
    UT_RETURN(SECCOMP_RET_ERRNO | ENOSYS),
    UT_DENY,
};

/* Have the kernel refuse what `ut_filter` does not allow.  After ut_drop_capabilities, whose no_new_privs it needs. */
static inline int ut_install_filter(void)
{
    struct sock_fprog program = {sizeof(ut_filter) / sizeof(ut_filter[0]), (struct sock_filter *)ut_filter};

    /* Before Linux 5.16 a filter switches on, without this flag, guards against speculation that make all code slower.
     * They are for processes that run foreign code beside secrets. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) == 0)
        return 0;
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

#else

static inline int ut_install_filter(void)
{
    errno = ENOSYS;
    return -1;
}

#endif

/* Confine the calling thread, and those that it starts from now on, as far as `wanted` (UT_CONFINE_*).  Returns how far
 * that was possible: a kernel without seccomp, and an architecture whose calls are not listed, go without the filter.
 * -1 with errno when the capabilities cannot be given up. */
static inline int ut_confine(int wanted)
{
    if (wanted == UT_CONFINE_OFF)
        return UT_CONFINE_OFF;
    if (ut_drop_capabilities() != 0)
        return -1;
    if (wanted == UT_CONFINE_FULL && ut_install_filter() == 0)
        return UT_CONFINE_FULL;
    return UT_CONFINE_CAPABILITIES;
}

#endif

"""The filter of system calls, instruction by instruction, as it is compiled for each architecture that has one."""

from __future__ import annotations

import fcntl
import mmap
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import udptun
from udptun._kabi import lib

CSRC = Path(udptun.__file__).parent / "fastpath" / "csrc"

ALLOWED = """
    readv writev recvmmsg sendmmsg sendmsg sendto recvmsg recvfrom ppoll read write close accept4 connect bind
    getsockname getsockopt futex munmap mremap madvise brk getrandom clock_gettime clock_nanosleep rt_sigreturn
    rt_sigprocmask exit exit_group eventfd2 gettid sched_yield
"""
DENIED = """
    openat unlinkat mkdirat renameat linkat symlinkat fchmodat fchownat chroot mount umount2 pivot_root execve execveat
    ptrace process_vm_readv process_vm_writev kill tkill tgkill rt_sigqueueinfo prctl capset setuid setgid setns unshare
    socketpair listen shutdown memfd_create bpf perf_event_open keyctl add_key init_module finit_module delete_module
    kexec_load reboot setrlimit prlimit64 personality userfaultfd inotify_init1 timer_create seccomp sethostname
"""
LATER = "io_uring_setup io_uring_enter clone3 openat2 pidfd_getfd pidfd_send_signal open_tree move_mount"

PROGRAM = """
#include <stdio.h>
#include "confine.h"
int main(void)
{{
    printf("arch %u\\n", UT_AUDIT_ARCH);
    for (size_t i = 0; i < sizeof ut_filter / sizeof ut_filter[0]; i++)
        printf("op %u %u %u %u\\n", ut_filter[i].code, ut_filter[i].jt, ut_filter[i].jf, ut_filter[i].k);
    {calls}
    return 0;
}}
"""
CONDITIONAL = "fcntl ioctl socket setsockopt mmap mprotect clone"

_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


class Filter:
    """The compiled filter, run as the kernel's interpreter of classic BPF runs it."""

    def __init__(self, text: str) -> None:
        lines = [line.split() for line in text.splitlines()]
        self.code = [tuple(map(int, words[1:])) for words in lines if words[0] == "op"]
        self.arch = next(int(words[1]) for words in lines if words[0] == "arch")
        self.number = {words[1]: int(words[2]) for words in lines if words[0] == "call"}

    def verdict(self, call: str | int, *arguments: int, arch: int | None = None) -> int:
        number = call if isinstance(call, int) else self.number[call]
        data = {0: number, 4: self.arch if arch is None else arch}
        for i in range(6):
            data[16 + 8 * i] = arguments[i] & 0xFFFFFFFF if i < len(arguments) else 0
        a = at = 0
        while True:
            op, yes, no, k = self.code[at]
            at += 1
            match op:
                case 0x20:  # LD W ABS
                    a = data[k]
                case 0x05:  # JA
                    at += k
                case 0x15:  # JEQ
                    at += yes if a == k else no
                case 0x35:  # JGE
                    at += yes if a >= k else no
                case 0x45:  # JSET
                    at += yes if a & k else no
                case 0x06:  # RET
                    return k
                case _:
                    raise AssertionError(f"instruction {op:#x}")


@pytest.fixture(scope="module", params=["native", "arm64"])
def filter_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Filter:
    compiler, runner = (["gcc"], []) if request.param == "native" else (["aarch64-linux-gnu-gcc"], ["qemu-aarch64"])
    for tool in (*compiler, *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: the filter for {request.param} stays unverified here")
    names = f"{ALLOWED} {DENIED} {LATER} {CONDITIONAL}".split()
    calls = " ".join(f'printf("call {it} %d\\n", __NR_{it});' for it in names)
    folder = tmp_path_factory.mktemp("filter")
    source, program = folder / "filter.c", folder / "filter"
    source.write_text(PROGRAM.format(calls=calls))
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-static", f"-I{CSRC}"]
    subprocess.run([*compiler, *flags, source, "-o", program], check=True)
    return Filter(subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout)


def test_calls_are_allowed_denied_or_unknown(filter_of: Filter) -> None:
    verdict: Callable[[str], int] = filter_of.verdict
    assert [it for it in ALLOWED.split() if verdict(it) != _ALLOW] == []
    assert [it for it in DENIED.split() if verdict(it) != _EPERM] == []
    # As on a kernel that does not know them, so that the C library does without.
    assert [it for it in LATER.split() if verdict(it) != _ENOSYS] == []


def test_calls_of_another_architecture_are_denied(filter_of: Filter) -> None:
    i386, x32 = 0x40000003, 0x40000000
    assert filter_of.verdict("read", arch=i386) == _EPERM
    assert filter_of.verdict(filter_of.number["read"] | x32) == _ENOSYS


@pytest.mark.parametrize(
    ("call", "arguments", "is_allowed"),
    [
        ("fcntl", (3, fcntl.F_SETLKW), True),
        ("fcntl", (3, fcntl.F_DUPFD_CLOEXEC), True),
        ("fcntl", (3, fcntl.F_SETOWN), False),
        ("fcntl", (3, fcntl.F_SETSIG), False),
        ("ioctl", (3, 0x400454D9), False),  # TUNSETQUEUE
        ("ioctl", (3, 0x5421), True),  # FIONBIO
        ("ioctl", (3, lib.TUNSETIFF), False),
        ("ioctl", (3, 0x5412), False),  # TIOCSTI
        ("socket", (socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0), True),
        ("socket", (socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0), True),
        ("socket", (socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0), False),
        ("socket", (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0), False),
        ("socket", (socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0), False),
        ("socket", (socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMP), False),
        ("socket", (socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0), False),
        ("socket", (socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0), False),
        ("setsockopt", (3, socket.SOL_SOCKET, 51), True),  # SO_ATTACH_REUSEPORT_CBPF
        ("setsockopt", (3, socket.IPPROTO_IP, lib.IP_MTU_DISCOVER), True),
        ("setsockopt", (3, socket.IPPROTO_IPV6, lib.IPV6_MTU_DISCOVER), True),
        ("setsockopt", (3, socket.IPPROTO_IPV6, lib.IP_MTU_DISCOVER), False),
        ("setsockopt", (3, socket.SOL_SOCKET, lib.IP_MTU_DISCOVER), False),
        ("setsockopt", (3, socket.IPPROTO_IP, 51), False),
        ("setsockopt", (3, socket.IPPROTO_TCP, 31), False),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_WRITE), True),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), False),
        ("mprotect", (0, 4096, mmap.PROT_READ), True),
        ("mprotect", (0, 4096, mmap.PROT_EXEC), False),
        ("clone", (0x3D0F00,), True),  # as glibc starts a thread
        ("clone", (0x7D0F00,), True),  # and musl
        ("clone", (0x01200011,), False),  # fork()
        ("clone", (0x3D0F00 | 0x40000000,), False),  # a thread in a network namespace of its own
    ],
)
def test_some_calls_depend_on_their_arguments(
    filter_of: Filter, call: str, arguments: tuple[int, ...], is_allowed: bool
) -> None:
    assert filter_of.verdict(call, *arguments) == (_ALLOW if is_allowed else _EPERM)

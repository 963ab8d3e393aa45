"""PID 1 of one lab machine: makes its namespaces, then keeps them until the lab's owner is gone.

    python -m udptun.lab.holder LAB MACHINE OWNER_PIDFD [MOUNTS_OF_PID]

It is the first process of a new PID namespace.  So the kernel kills every process of the machine, also those in
sessions of their own, when this one ends, and the namespaces disappear with the last process.  The holder ends with
its owner: a pidfd says so even when the owner got SIGKILL, and unlike PR_SET_PDEATHSIG it doesn't mistake the end of
the thread that started us for the end of the process.

Writes one line to stdout when the machine is ready.  The `underlay` machine is made first, without MOUNTS_OF_PID; the
hosts start from its mounts, which is how they share the lab's directory without a trace of it on the machine's disks.

A lab starts one for each host.  So it imports neither pathlib nor socket, which take longer than all that it does.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed does not have it
import _socket
import os
import select
import sys

from udptun._kabi import ffi, lib

LAB_DIR = "/run/udptun-lab"
_STATE = "/var/lib"
_OWN_STATE = ("udptun", "cni")


def main() -> None:
    machine, owner_fd = sys.argv[2], int(sys.argv[3])
    # A process in here that loses its parent becomes our child.  The kernel reaps children of whoever ignores SIGCHLD.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    if len(sys.argv) > 4:
        with open(f"/proc/{sys.argv[4]}/ns/mnt", "rb") as mounts:
            _check(lib.setns(mounts.fileno(), lib.CLONE_NEWNS), "enter the underlay's mount namespace")
    _check(lib.unshare(lib.CLONE_NEWNS | lib.CLONE_NEWNET | lib.CLONE_NEWUTS), "make namespaces")
    _socket.sethostname(machine)
    _mount("none", "/", "", lib.MS_REC | lib.MS_PRIVATE)
    _mount("proc", "/proc", "proc", lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC)
    # A sysfs shows the links of the network namespace that mounted it.
    _mount("sysfs", "/sys", "sysfs", lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC)
    if len(sys.argv) > 4:
        _isolate_run_keeping_the_lab_directory()
        _isolate_state()
        _sysctl("net/ipv4/ip_forward", "1")
        # As systemd sets it: the end of an address does not remove the younger addresses of its prefix.
        _sysctl("net/ipv4/conf/all/promote_secondaries", "1")
    else:
        _tmpfs("/run")
        os.mkdir(LAB_DIR, 0o700)
    # Neighbour discovery and multicast reports would be the only noise on an underlay that tests capture.
    _sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    _sysctl("net/ipv6/conf/default/disable_ipv6", "1")
    print("ready", flush=True)
    owner_gone = select.poll()
    owner_gone.register(owner_fd, select.POLLIN)
    owner_gone.poll()


def _isolate_run_keeping_the_lab_directory() -> None:
    lab_fd = _open_dir(LAB_DIR)
    _tmpfs("/run")
    os.mkdir(LAB_DIR, 0o700)
    _bind(f"/proc/self/fd/{lab_fd}", LAB_DIR)
    os.close(lab_fd)


def _isolate_state() -> None:
    """Empty /var/lib/udptun and /var/lib/cni; the rest of /var/lib stays visible (a virtualenv may live there).

    A mount needs a directory to be mounted on, and making those two on the real disk would leave them behind.
    """
    real_fd = _open_dir(_STATE)
    # Before the mount hides them.
    entries = [
        (entry.name, os.readlink(entry) if entry.is_symlink() else None, entry.is_dir())
        for entry in os.scandir(_STATE)
        if entry.name not in _OWN_STATE
    ]
    _tmpfs(_STATE)
    for name, link, is_dir in entries:
        here = f"{_STATE}/{name}"
        if link is not None:
            os.symlink(link, here)
            continue
        if is_dir:
            os.mkdir(here)
        else:
            os.close(os.open(here, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        _bind(f"/proc/self/fd/{real_fd}/{name}", here)
    os.close(real_fd)
    for name in _OWN_STATE:
        os.mkdir(f"{_STATE}/{name}")


def _open_dir(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _tmpfs(target: str) -> None:
    _mount("tmpfs", target, "tmpfs", lib.MS_NOSUID | lib.MS_NODEV, "mode=755")


def _bind(source: str, target: str) -> None:
    _mount(source, target, "", lib.MS_BIND | lib.MS_REC)


def _mount(source: str, target: str, fs_type: str, flags: int, options: str = "") -> None:
    result = lib.mount(
        source.encode(), target.encode(), fs_type.encode() or ffi.NULL, flags, options.encode() or ffi.NULL
    )
    _check(result, f"mount {fs_type or source} on {target}")


def _check(result: int, attempt: str) -> None:
    if result < 0:
        sys.exit(f"cannot {attempt}: {os.strerror(ffi.errno)}")


def _sysctl(name: str, value: str) -> None:
    try:
        with open(f"/proc/sys/{name}", "w") as file:
            file.write(value)
    except FileNotFoundError:
        # The kernel has no IPv6.
        return


if __name__ == "__main__":
    main()

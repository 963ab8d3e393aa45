"""What a datapath process gives up: /proc says that it has, and what it tries all the same fails.

The rig is that of test_processes.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.datapath.test_processes import Rig, until
from udptun import _fastpath
from udptun.core.tunnel import Confinement
from udptun.datapath import processes, worker
from udptun.datapath.supervision import Datapath


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rig = Rig(run_dir)
    yield rig
    rig.close()
    assert list(run_dir.iterdir()) == [], "a datapath process or its socket is left"


def with_datapath(
    rig: Rig, test: Callable[[Datapath], Awaitable[None]], confinement: Confinement = Confinement.FULL
) -> None:
    async def main() -> None:
        datapath = Datapath(rig.run_dir, rig.descriptors, [], "flannel0", confinement)
        supervisor = asyncio.create_task(asyncio.sleep(0))
        try:
            await datapath.start()
            supervisor = asyncio.create_task(datapath.supervise())
            await test(datapath)
        finally:
            supervisor.cancel()
            await asyncio.wait([supervisor])
            await datapath.stop()

    asyncio.run(main())


def of_each_thread(pid: int, *names: str) -> list[tuple[int, ...]]:
    """The fields of /proc/PID/status, which are in hexadecimal, of every thread."""
    texts = [it.read_text() for it in Path(f"/proc/{pid}/task").glob("*/status")]
    return [tuple(int(re.findall(rf"^{name}:\s*(\w+)$", text, re.M)[0], 16) for name in names) for text in texts]


SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose capabilities there are to give up")
@pytest.mark.parametrize("confinement", list(Confinement))
def test_every_thread_is_without_capabilities_and_under_a_filter(
    rig: Rig, figure: Callable[..., None], confinement: Confinement
) -> None:
    ours = dict(zip(("Seccomp", *SETS), of_each_thread(os.getpid(), "Seccomp", *SETS)[0], strict=True))

    async def test(datapath: Datapath) -> None:
        rig.send(5)
        await rig.received(5)
        for process in datapath.processes:
            assert process.confinement is confinement
            threads = of_each_thread(process.pid, "NoNewPrivs", "Seccomp", *SETS)
            n_privileged = sum(any(capabilities) for _, _, *capabilities in threads)
            figure(f"{confinement.value}: threads with a capability, of {len(threads)}", n_privileged)
            for found in threads:
                if confinement is Confinement.OFF:
                    assert found[2:] == tuple(ours[name] for name in SETS)
                else:
                    assert found == (1, 2 if confinement is Confinement.FULL else ours["Seccomp"], 0, 0, 0, 0, 0)
        # The active one has a thread for the worker beside those that wait for the lock and for the control plane.
        assert datapath.active is not None
        assert len(of_each_thread(datapath.active.pid, "Seccomp")) >= 2

    with_datapath(rig, test, confinement)


TRIES = f"""
import _thread, ctypes, errno, fcntl, mmap, os, signal, socket, sys, time
names = {{"__name__": "worker"}}
exec(open({worker.__file__!r}).read(), names)
fastpath = names["load_fastpath"]({_fastpath.__file__!r})
libc = ctypes.CDLL(None, use_errno=True)
kept, udp = socket.socketpair(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ours = os.getpid()
buffer = ctypes.create_string_buffer(4096)
assert fastpath.confine(2) == 2

def by_libc(function, *arguments):
    if libc[function](*arguments) == -1:
        raise OSError(ctypes.get_errno(), function)

def denied(what, attempt, expected=errno.EPERM):
    try:
        attempt()
    except OSError as exc:
        print(what, "denied" if exc.errno == expected else exc)
    else:
        print(what, "WENT THROUGH")

denied("open", lambda: os.open("/etc/hostname", os.O_RDONLY))
denied("write", lambda: os.open("/tmp/x", os.O_WRONLY | os.O_CREAT))
denied("delete", lambda: os.unlink("/nowhere"))
denied("list", lambda: os.listdir("/proc"))
denied("execve", lambda: os.execv("/bin/true", ["true"]))
denied("fork", os.fork)
denied("kill", lambda: os.kill(os.getppid(), signal.SIGCONT))
denied("unix", lambda: socket.socket(socket.AF_UNIX))
denied("netlink", lambda: socket.socket(socket.AF_NETLINK))
denied("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
denied("tcp", lambda: socket.socket(socket.AF_INET))
denied("ptrace", lambda: by_libc("ptrace", 16, os.getppid(), 0, 0))
denied("unshare", lambda: by_libc("unshare", 0x10000000))
denied("setns", lambda: by_libc("setns", kept[0].fileno(), 0))
denied("tun", lambda: fcntl.ioctl(udp, 0x400454CA, bytes(40)))
denied("owner", lambda: fcntl.fcntl(udp, fcntl.F_SETOWN, 1))
denied("code", lambda: by_libc("mprotect", ctypes.addressof(buffer) & ~4095, 4096, 7))
denied("capset", lambda: by_libc("capset", buffer, buffer))
denied("prctl", lambda: by_libc("prctl", 23, 0, 0, 0, 0))
denied("io_uring", lambda: by_libc("syscall", 425, 8, buffer), errno.ENOSYS)

said = []
_thread.start_new_thread(said.append, ("a thread",))
while not said:
    time.sleep(0.001)
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 0)
asking.connect(("127.0.0.1", 9))
assert asking.getsockopt(socket.IPPROTO_IP, 14) >= 1500
kept[0].setblocking(False)
kept[0].send(b"x")
assert kept[1].recv(1) == b"x"
mmap.mmap(-1, 1 << 20).close()
print("and lives on")
"""


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no filter for this architecture")
def test_what_is_forbidden_fails_and_the_process_lives_on() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", TRIES], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    *tried, last = done.stdout.splitlines()
    assert [line for line in tried if not line.endswith(" denied")] == []
    assert (len(tried), last) == (20, "and lives on")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Confinement.FULL, Confinement.OFF),
        # As after a process that has failed under its filter: the next daemon tries it again.
        (Confinement.CAPABILITIES, Confinement.FULL),
    ],
)
async def test_processes_with_another_confinement_are_replaced_without_losing_what_waits(
    rig: Rig, before: Confinement, after: Confinement
) -> None:
    earlier = Datapath(rig.run_dir, rig.descriptors, [], "flannel0", before)
    await earlier.start()
    earlier.detach()
    found = await processes.find_running(rig.run_dir)
    assert [it.confinement for it in found] == [before] * 2
    for process in found:
        process.close_descriptors()
    rig.send(10)
    successor = Datapath(rig.run_dir, rig.descriptors, found, "flannel0", after)
    await successor.start()
    rig.send(10)
    await rig.received(20)
    assert [it.confinement for it in successor.processes] == [after] * 2
    await successor.stop()


@pytest.mark.parametrize("wanted", [Confinement.FULL, Confinement.OFF])
async def test_processes_without_a_filter_are_adopted_where_the_kernel_has_none(
    rig: Rig, wanted: Confinement, old_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, and where no filter is written for the architecture, each start of the daemon replaced the datapath."""
    monkeypatch.setenv("LD_PRELOAD", str(old_kernel))
    monkeypatch.setenv("OLD_KERNEL", "no_seccomp")
    earlier = Datapath(rig.run_dir, rig.descriptors, [], "flannel0", Confinement.FULL)
    await earlier.start()
    assert {it.confinement for it in earlier.processes} == {Confinement.CAPABILITIES}
    earlier.detach()
    found = await processes.find_running(rig.run_dir)
    for process in found:
        process.close_descriptors()
    later = Datapath(rig.run_dir, rig.descriptors, found, "flannel0", wanted)
    before = [it.pid for it in found]
    await later.start()
    is_adopted = [it.pid for it in later.processes] == before
    assert is_adopted == (wanted is Confinement.FULL)
    await later.stop()


FAILS_UNDER_THE_FILTER = f"""
import _thread, sys
names = {{"__name__": "worker"}}
exec(open({worker.__file__!r}).read(), names)
start, started = _thread.start_new_thread, []
def start_one(function, arguments):
    if len(started) == STARTS and sys.argv[-2] == "2":
        raise RuntimeError("can't start new thread")
    started.append(start(function, arguments))
_thread.start_new_thread = start_one
names["main"](sys.argv[1:])
"""


@pytest.mark.parametrize("n_starts", [0, 1], ids=["at its start", "when its turn comes"])
def test_a_process_that_fails_under_its_filter_is_followed_by_one_without(
    rig: Rig, n_starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A C library may need a call that the filter denies.  Without this every next process would fail of it too."""
    script = tmp_path / "worker.py"
    script.write_text(FAILS_UNDER_THE_FILTER.replace("STARTS", str(n_starts)))

    async def test(datapath: Datapath) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(worker, "__file__", str(script))
            for process in datapath.processes:
                os.kill(process.pid, signal.SIGKILL)
            rig.send(5)
            await rig.received(5, within_s=30)
            await until(lambda: datapath.active is not None)
            assert datapath.active is not None
            assert datapath.active.confinement is Confinement.CAPABILITIES
            (problem,) = [it for it in datapath.problems if "filter" in it]
            assert re.match(r"the datapath runs without its filter of system calls, as .* \(pid=\d+, with ", problem)
            await until(lambda: len(datapath.standbys) == 1, within_s=30)

    with_datapath(rig, test)


def test_a_process_that_a_signal_ends_is_followed_by_one_under_the_filter(rig: Rig) -> None:
    """Who kills processes, as the kernel does for lack of memory, shall not take the filter away."""

    async def test(datapath: Datapath) -> None:
        before = {process.pid for process in datapath.processes}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: datapath.active is not None and len({it.pid for it in datapath.processes} - before) == 2)
        assert [it.confinement for it in datapath.processes] == [Confinement.FULL] * 2

    with_datapath(rig, test)

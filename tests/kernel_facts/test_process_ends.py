"""What ends with a process, what outlives it, and what the kernel says about the other end of a socket."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from namespace import KERNEL, seconds_until

TIMEOUT_S = 20

shows_all_waiters = pytest.mark.skipif(
    KERNEL <= (5, 10), reason="needs Linux after 5.10: /proc/locks names those who wait behind others"
)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


def child(undo: ExitStack, body: Callable[[], object]) -> int:
    """Run `body` in a fork, which then sleeps until it is killed; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            while True:
                signal.pause()
        finally:
            os._exit(1)
    undo.callback(end, pid)
    return pid


def end(pid: int) -> None:
    """kill -9, if it is still there, and wait for it."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def told(reader: int) -> bytes:
    """One byte from a pipe, b"" when none comes."""
    os.set_blocking(reader, False)
    answer: list[bytes] = []

    def look() -> bool:
        with suppress(BlockingIOError):
            answer.append(os.read(reader, 1))
        return bool(answer)

    seconds_until(look, TIMEOUT_S)
    return answer[0]


# --- record locks: how two datapath processes agree on the active one


@pytest.fixture
def lock() -> Iterator[int]:
    fd = os.memfd_create("lock")
    yield fd
    os.close(fd)


def locks_and_says(fd: int, writer: int, letter: bytes) -> Callable[[], object]:
    def body() -> None:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        os.write(writer, letter)

    return body


def test_a_record_lock_goes_with_its_holder_however_it_ends_and_to_one_who_waits(lock: int, undo: ExitStack) -> None:
    """locks_remove_posix, at the exit of the process: SIGKILL releases it too, and one of the sleepers has it."""
    reader, writer = os.pipe()
    undo.callback(os.close, reader)
    undo.callback(os.close, writer)
    active = child(undo, locks_and_says(lock, writer, b"1"))
    assert told(reader) == b"1"
    child(undo, locks_and_says(lock, writer, b"2"))
    end(active)
    assert told(reader) == b"2"


@shows_all_waiters
def test_those_who_wait_for_a_record_lock_get_it_in_the_order_in_which_they_came(lock: int, undo: ExitStack) -> None:
    """locks_wake_up_blocks goes through the list of waiters, each of which asks again: first come, first served."""
    reader, writer = os.pipe()
    undo.callback(os.close, reader)
    undo.callback(os.close, writer)
    holders = [child(undo, locks_and_says(lock, writer, b"0"))]
    assert told(reader) == b"0"
    for letter in (b"1", b"2", b"3"):
        holders.append(child(undo, locks_and_says(lock, writer, letter)))
        seconds_until(lambda pid=holders[-1]: f"{pid} " in waiters(), TIMEOUT_S)
    for n, letter in enumerate((b"1", b"2", b"3")):
        end(holders[n])
        assert told(reader) == letter


@shows_all_waiters
def test_a_stopped_process_does_not_hold_up_those_who_wait_behind_it_for_a_record_lock(
    lock: int, undo: ExitStack
) -> None:
    """SIGSTOP takes it out of the wait, as every signal does, and it asks again when it goes on (signal(7))."""
    reader, writer = os.pipe()
    undo.callback(os.close, reader)
    undo.callback(os.close, writer)
    holders = [child(undo, locks_and_says(lock, writer, b"0"))]
    assert told(reader) == b"0"
    for letter in (b"1", b"2"):
        holders.append(child(undo, locks_and_says(lock, writer, letter)))
        seconds_until(lambda pid=holders[-1]: f"{pid} " in waiters(), TIMEOUT_S)
    os.kill(holders[1], signal.SIGSTOP)
    seconds_until(lambda: f"{holders[1]} " not in waiters(), TIMEOUT_S)
    end(holders[0])
    assert told(reader) == b"2"
    os.kill(holders[1], signal.SIGCONT)
    end(holders[2])
    assert told(reader) == b"1"


def waiters() -> str:
    """The lines of /proc/locks that wait."""
    return "".join(line for line in Path("/proc/locks").read_text().splitlines(True) if "->" in line)


def test_a_record_lock_is_lost_when_its_holder_closes_any_descriptor_of_the_file(lock: int, undo: ExitStack) -> None:
    """fcntl(2): so a datapath process opens the lock file once and never closes it."""
    ready, go, answer = os.pipe(), os.pipe(), os.pipe()
    for fd in (*ready, *go, *answer):
        undo.callback(os.close, fd)

    def holder() -> None:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os.close(os.open(f"/proc/self/fd/{lock}", os.O_RDWR))
        os.write(ready[1], b"x")

    child(undo, holder)
    assert told(ready[0]) == b"x"
    with pytest.raises(BlockingIOError):
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(go[1], b"x")
    assert told(ready[0]) == b"x"
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- shared memory


def test_a_sealed_memory_file_can_be_mapped_and_written_and_not_resized() -> None:
    """F_SEAL_SHRINK and F_SEAL_GROW (mm/memfd.c): who shrank the file would kill the others with SIGBUS."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with mmap.mmap(fd, 4096) as memory, mmap.mmap(fd, 4096, prot=mmap.PROT_READ) as reader:
            memory[0] = 7
            assert reader[0] == 7
    finally:
        os.close(fd)


# --- sockets


def peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[0])


def test_peercred_names_the_process_that_made_the_listening_socket(undo: ExitStack) -> None:
    """unix_listen takes the credentials, and whoever accepts later does not change them.

    A datapath process inherits its listening socket from the control plane, and so tells its pid in HELLO.
    """
    listener = undo.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(f"\0udptun-tests/peercred-{os.getpid()}")
    listener.listen()
    child(undo, lambda: listener.accept()[0].send(b"x"))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(listener.getsockname())
        assert client.recv(1) == b"x"
        assert peer_pid(client) == os.getpid()


def test_passcred_names_the_process_that_has_sent_a_message(undo: ExitStack) -> None:
    """The receiver asks for it before it connects, and the sender need not know (unix(7), SCM_CREDENTIALS)."""
    listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(f"\0udptun-tests/passcred-{os.getpid()}")
    listener.listen()
    pid = child(undo, lambda: listener.accept()[0].send(b"x"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(TIMEOUT_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        client.connect(listener.getsockname())
        _message, ((_level, kind, data),), _flags, _address = client.recvmsg(8, socket.CMSG_SPACE(12))
        assert kind == socket.SCM_CREDENTIALS
        assert struct.unpack("=iII", data)[0] == pid


def test_a_connect_that_does_not_block_is_refused_while_nobody_accepts_those_before(undo: ExitStack) -> None:
    """EAGAIN, and nothing comes of it later: it has to be tried again.  A blocking connect() would sleep (unix(7))."""
    listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(f"\0udptun-tests/backlog-{os.getpid()}")
    listener.listen(2)
    for _ in range(3):
        undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(listener.getsockname())
    late = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
    with pytest.raises(BlockingIOError):
        late.connect(listener.getsockname())
    listener.accept()[0].close()
    late.connect(listener.getsockname())


def test_an_abstract_name_is_taken_exactly_as_long_as_a_process_holds_its_socket(undo: ExitStack) -> None:
    """No file is left that would have to be removed (net/unix/af_unix.c): `udptun lab` reserves its names so."""
    name = f"\0udptun-tests/name-{os.getpid()}"
    reader, writer = os.pipe()
    undo.callback(os.close, reader)
    undo.callback(os.close, writer)

    def take() -> None:
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        holder.bind(name)
        os.write(writer, b"x")
        signal.pause()

    pid = child(undo, take)
    assert told(reader) == b"x"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(name)
        end(pid)
        other.bind(name)


# --- the end of a parent


def test_pdeathsig_comes_when_the_thread_ends_that_started_the_process(undo: ExitStack) -> None:
    """prctl(2): "parent" is the thread.  So the lab's holders watch a pidfd of their owner instead."""
    started: list[subprocess.Popen[bytes]] = []
    script = (
        "import ctypes, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGTERM));"
        "print(flush=True); signal.pause()"
    )

    def start() -> None:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (process,) = started
    with process:
        assert process.wait(TIMEOUT_S) == -signal.SIGTERM


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_every_process_of_a_pid_namespace_ends_with_its_first_one() -> None:
    """zap_pid_ns_processes: sessions of their own do not save them.  So a lab's machine leaves nothing behind."""
    daemon, first = (f"sleep {os.getpid()}.{n}" for n in (1, 2))
    script = f"setsid {daemon} & echo; exec {first}"
    init = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    )
    with init:
        assert init.stdout is not None
        init.stdout.readline()
        seconds_until(lambda: running(daemon) and running(first), TIMEOUT_S)
        os.kill(running(first)[0], signal.SIGKILL)
        init.wait(TIMEOUT_S)
    seconds_until(lambda: not running(daemon), TIMEOUT_S)


def running(command: str) -> list[int]:
    """pids of the living processes with this command line."""
    lines = subprocess.run(["ps", "-eo", "pid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    fields = [line.split(None, 2) for line in lines]
    return [int(pid) for pid, state, args in fields if args == command and not state.startswith("Z")]

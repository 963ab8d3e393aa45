"""`udptun status --watch` on a terminal, which is a pty here, and in a pipe; the daemon is a thread of this process."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from status_document import DOCUMENT

from udptun.core.daemon_socket import SOCKET_NAME

UDPTUN = ["env", "--default-signal=INT,QUIT,HUP", sys.executable, "-m", "udptun"]
"""Without env the command would ignore what these tests ignore: SIGINT and SIGQUIT where a shell runs them in the
background, SIGHUP under nohup."""
DEADLINE_S = 30.0
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?7h\x1b[?25h\x1b[?1049l"


class Daemon:
    """Answers `GET /status` with a document, or the text of a 503, until it is stopped."""

    def __init__(self, run_dir: Path) -> None:
        self.answer: dict[str, Any] | str = DOCUMENT
        self.n_answers = 0
        self._path = run_dir / SOCKET_NAME
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                if isinstance(self.answer, str):
                    connection.sendall(f"HTTP/1.1 503 x\r\n\r\n{self.answer}\n".encode())
                else:
                    connection.sendall(f"HTTP/1.1 200 OK\r\n\r\n{json.dumps(self.answer)}\n".encode())
            self.n_answers += 1

    def stop(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    it = Daemon(tmp_path)
    yield it
    it.stop()


class Terminal:
    """A terminal of 80 columns and 24 lines in which the command runs."""

    def __init__(self, run_dir: Path, *flags: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.written = self.all = b""
        environ = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
        command = [*UDPTUN, "status", "--watch", "0.1", "--run-dir", str(run_dir), *flags]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read_until(self, is_there: Callable[[bytes], object]) -> None:
        """Read what is written from here on until there is something, which is forgotten then."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_there(self.written):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.written[-3000:]
            if select.select([self._ours], [], [], left_s)[0]:
                data = os.read(self._ours, 65536)
                self.written += data
                self.all += data
        self.written = b""

    def shows(self, pattern: str) -> None:
        self.read_until(lambda written: re.search(pattern.encode(), written))

    def ended(self) -> int:
        """Its exit status; the terminal must be as before."""
        self.read_until(lambda written: written.endswith(LEAVE))
        status = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self._theirs) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self._ours)


@contextmanager
def watched(run_dir: Path, *flags: str) -> Iterator[Terminal]:
    terminal = Terminal(run_dir, *flags)
    try:
        yield terminal
    finally:
        terminal.close()


def test_screen_is_shown_in_place_until_q_and_the_terminal_is_as_before(daemon: Daemon, tmp_path: Path) -> None:
    with watched(tmp_path) as terminal:
        terminal.shows(re.escape(ENTER.decode()))
        terminal.shows("1 problem.*every 0.1 s, q quits")
        daemon.answer = {**DOCUMENT, "problems": [], "skipped": [], "counters": {}}
        terminal.shows("\x1b\\[H.*all is well")
        terminal.press(b"xq")
        assert terminal.ended() == 0
        # No look clears the screen, which would flicker.
        assert b"\x1b[2J" not in terminal.all


def test_daemon_that_restarts_is_waited_for(daemon: Daemon, tmp_path: Path) -> None:
    with watched(tmp_path) as terminal:
        terminal.shows("1 problem")
        daemon.stop()
        terminal.shows("no udptun daemon answers")
        terminal.shows("\\(for 1s\\)")
        again = Daemon(tmp_path)
        try:
            again.answer = "the daemon is not ready yet: no lease"
            terminal.shows("not ready yet: no lease")
            again.answer = {**DOCUMENT, "pid": 4711}
            terminal.shows("pid 4711")
            terminal.press(b"q")
            assert terminal.ended() == 0
        finally:
            again.stop()


def test_a_watch_may_begin_before_the_daemon(tmp_path: Path) -> None:
    with watched(tmp_path) as terminal:
        terminal.shows("no udptun daemon answers")
        later = Daemon(tmp_path)
        try:
            terminal.shows("1 problem")
        finally:
            later.stop()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), *((it, -it) for it in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))],
)
def test_signals_end_it_and_leave_the_terminal_as_it_was(
    daemon: Daemon, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """Ctrl-\\ (SIGQUIT) left the other screen there, without cursor and echo."""
    with watched(tmp_path) as terminal:
        terminal.shows("1 problem")
        terminal.process.send_signal(number)
        assert terminal.ended() == status


def test_another_size_of_the_window_is_used_at_once(daemon: Daemon, tmp_path: Path) -> None:
    with watched(tmp_path, "--watch", "3600") as terminal:
        terminal.shows("measured for 0.5 s|drops")
        terminal.shows("IN bit/s")
        terminal.resize(120, 40)
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.shows("OUT pkt/s")


def test_while_it_is_stopped_the_terminal_is_as_before(daemon: Daemon, tmp_path: Path) -> None:
    with watched(tmp_path) as terminal:
        terminal.shows("1 problem")
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.read_until(lambda written: written.endswith(LEAVE))
        os.waitpid(terminal.process.pid, os.WUNTRACED)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.shows(re.escape(ENTER.decode()))
        terminal.shows("1 problem")
        terminal.press(b"q")
        assert terminal.ended() == 0


def test_one_peer_can_be_watched_also_one_that_goes(daemon: Daemon, tmp_path: Path) -> None:
    with watched(tmp_path, "--peer", "10.244.2.0/24") as terminal:
        terminal.shows("192.0.2.2, UDP port 9000")
        daemon.answer = {**DOCUMENT, "peers": []}
        terminal.shows("no peer has 10.244.2.0/24")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_in_a_pipe_each_look_is_written_below_the_one_before(daemon: Daemon, tmp_path: Path, flags: list[str]) -> None:
    command = [*UDPTUN, "status", "--watch", "0.1", "--run-dir", str(tmp_path), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if flags:
            assert [json.loads(process.stdout.readline()) for _ in range(3)] == [DOCUMENT] * 3
        else:
            lines = [process.stdout.readline() for _ in range(60)]
            assert lines.count("udptun     1 problem\n") >= 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")


def test_in_json_a_peer_that_is_not_there_is_said_once(daemon: Daemon, tmp_path: Path) -> None:
    """It was said again at every look."""
    daemon.answer = {**DOCUMENT, "peers": []}
    command = [*UDPTUN, "status", "--json", "--watch", "0.1", "--run-dir", str(tmp_path)]
    command += ["--peer", "10.244.2.0/24"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        deadline_s = time.monotonic() + DEADLINE_S
        while daemon.n_answers < 4 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        daemon.answer = DOCUMENT
        assert json.loads(process.stdout.readline())["peers"] == DOCUMENT["peers"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert daemon.n_answers > 4
    assert err.count("\n") == 1
    assert "no peer has 10.244.2.0/24" in err

"""`udptun health`, which exec probes run every few seconds."""

from __future__ import annotations

import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import udptun
from udptun.commands import health
from udptun.config.flags import parse_daemon_flags
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import UdptunError, UsageError
from udptun.kernel import peer

OK, UNREADY = "HTTP/1.1 200 OK\r\n\r\nflanneld is ready", "HTTP/1.1 503 Unavailable\r\n\r\nflanneld is not ready yet"


@contextmanager
def daemon(directory: Path, answers: dict[str, str] | None) -> Iterator[None]:
    """Answers each path once; None: takes connections and says nothing, as one that hangs."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / SOCKET_NAME))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                path = connection.recv(4096).split()[1].decode()
                assert answers is not None
                connection.sendall(answers[path].encode())

        thread = threading.Thread(target=serve)
        if answers is not None:
            thread.start()
        yield
        if answers is not None:
            thread.join()


def ask(directory: Path, *argv: str) -> int:
    return health.run([*argv, f"--run-dir={directory}"], {})


def why(directory: Path, *argv: str) -> str:
    with pytest.raises(UdptunError) as caught:
        ask(directory, *argv)
    assert caught.value.exit_status == 1
    return str(caught.value)


def test_health_asks_where_the_daemon_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(health, "_ask", lambda where, path: asked.append(where))
    health.run([], {})
    assert asked == [str(parse_daemon_flags([], {}).run_dir / SOCKET_NAME)]


@pytest.mark.parametrize("argv", [(), ("--ready",), ("--live",)])
def test_health_of_a_daemon_that_is_ready_is_0(tmp_path: Path, argv: tuple[str, ...]) -> None:
    with daemon(tmp_path, {"/readyz": OK, "/healthz": OK}):
        assert ask(tmp_path, *argv) == 0


def test_a_daemon_that_waits_for_its_store_is_live_and_not_ready(tmp_path: Path) -> None:
    with daemon(tmp_path, {"/readyz": UNREADY}):
        assert why(tmp_path, "--ready") == "flanneld is not ready yet"
    (tmp_path / SOCKET_NAME).unlink()
    with daemon(tmp_path, {"/healthz": OK}):
        assert ask(tmp_path, "--live") == 0


def test_a_daemon_that_hangs_is_not_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_TIMEOUT_S", 1)
    with daemon(tmp_path, None):
        assert why(tmp_path, "--live").endswith("does not answer at " + f"{tmp_path}/udptun.sock within 1 s: it hangs")


def test_no_daemon_is_neither(tmp_path: Path) -> None:
    for flag in ("--live", "--ready"):
        assert why(tmp_path, flag) == f"no daemon answers at {tmp_path}/udptun.sock: No such file or directory"


@pytest.mark.parametrize(("flag", "expected"), [("--ready", 1), ("--live", 0)])
def test_the_daemon_of_another_container_does_not_make_this_one_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, expected: int
) -> None:
    """They share the socket.  A probe of the new pod, which waits for its turn, would have ended the old one."""
    monkeypatch.setattr(health, "peer_of", lambda _: (0, os.geteuid()))
    with daemon(tmp_path, {"/readyz": OK, "/healthz": OK}):
        if expected:
            assert why(tmp_path, flag) == "not ready: the daemon of another container serves this host"
        else:
            assert ask(tmp_path, flag) == 0


def test_a_strangers_socket_is_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "peer_of", lambda _: (7, 4711))
    with daemon(tmp_path, {"/readyz": OK}):
        assert "belongs to uid 4711" in why(tmp_path)


@pytest.mark.parametrize("argv", [["--liv"], ["--run-dir"], ["live"], ["--run-dir="]])
def test_wrong_arguments_end_with_2(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        health.run(argv, {})


def test_peer_is_the_process_that_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as asking:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        asking.connect(str(tmp_path / "socket"))
        assert peer.peer_of(asking) == (os.getpid(), os.geteuid())


def test_a_probe_takes_less_than_30_ms_of_cpu(
    tmp_path: Path, request: pytest.FixtureRequest, figure: Callable[..., None]
) -> None:
    """Without what this machine's Python does at each start (-S), which a container's has not."""
    is_full = request.config.getoption("--full")
    call = f"sys.argv = ['udptun', 'health', '--live', '--run-dir={tmp_path}']; cli.main()"
    path = f"import sys; sys.path.insert(0, {str(Path(udptun.__file__).parents[1])!r})"
    command = [sys.executable, "-S", "-c", f"{path}; from udptun.commands import cli; {call}"]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    took_ms = []
    for _ in range(50 if is_full else 5):
        with daemon(tmp_path, {"/healthz": OK}):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, env=environ)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took_ms.append(1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        (tmp_path / SOCKET_NAME).unlink()
    figure("CPU of `udptun health --live`", took_ms, "ms")
    assert statistics.median(took_ms) < (30 if is_full else 150)


def test_health_loads_none_of_the_slow_modules() -> None:
    """It shall cost less than 30 ms of CPU, most of which is the start of Python."""
    script = "import sys; from udptun.commands import cli, health; print(*sys.modules)"
    path = f"import sys; sys.path.insert(0, {str(Path(udptun.__file__).parents[1])!r})"
    command = [sys.executable, "-S", "-c", f"{path}; {script}"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    slow = {"asyncio", "argparse", "pathlib", "typing", "re", "json", "subprocess", "ipaddress", "logging"}
    slow |= {"socket", "signal", "enum", "collections", "functools"}
    assert slow & set(loaded) == set()
    ours = {name for name in loaded if name.startswith("udptun.")}
    assert ours <= {
        *("udptun.commands", "udptun.commands.cli", "udptun.commands.health", "udptun.core", "udptun.core.errors"),
        *("udptun.core.daemon_socket", "udptun.kernel", "udptun.kernel.peer"),
    }

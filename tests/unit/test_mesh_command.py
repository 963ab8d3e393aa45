"""`udptun mesh` with a daemon here that says anything, and hosts at addresses of the loopback device."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mesh_views import change, document, peer

from udptun.commands.mesh import command
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import UdptunError, UsageError


def local(number: int) -> str:
    """A subnet whose first address is this machine's."""
    return f"127.0.{number}.0/24"


def view(number: int, *others: dict[str, Any], **more: Any) -> dict[str, Any]:
    return document(number, 0, subnet=local(number), peers=list(others), n_peers=len(others), **more)


def seen(number: int, **more: Any) -> dict[str, Any]:
    return peer(number, subnet=local(number), **more)


@contextmanager
def answering(listener: socket.socket, document: object) -> Iterator[None]:
    """Each who asks gets this; bytes as they are."""
    body = document if isinstance(document, bytes) else f"{json.dumps(document)}\n".encode()
    head = b"" if isinstance(document, bytes) else b"HTTP/1.1 200 OK\r\n\r\n"

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(head + body)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        # It wakes the thread; close() would not.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


@contextmanager
def daemon(run_dir: Path, document: object) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(run_dir / SOCKET_NAME))
    listener.listen()
    with answering(listener, document):
        yield


@contextmanager
def hosts(documents: dict[int, object]) -> Iterator[int]:
    """The port at which each of these answers at its tunnel address."""
    with ExitStack() as undo:
        port = 0
        for number, said in documents.items():
            listener = socket.create_server((f"127.0.{number}.0", port))
            port = listener.getsockname()[1]
            undo.enter_context(answering(listener, said))
        yield port


def run(run_dir: Path, *words: str) -> int:
    return command.run([*words, "--run-dir", str(run_dir)], {})


def test_hosts_are_asked_at_the_port_of_this_one_and_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third = seen(3)
    change(third, "dead")
    others = {2: view(2, seen(1), third), 3: view(3, seen(1), seen(2))}
    with hosts(others) as port, daemon(tmp_path, view(1, seen(2), seen(3), mesh_port=port)):
        assert run(tmp_path, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        assert [(it["kind"], it["hosts"]) for it in found["problems"]] == [("one_way", [2, 3])]
        assert found["port"] == port
        assert [host["view"] is not None for host in found["hosts"]] == [True, True, True]
        assert run(tmp_path, local(2)) == 0
        assert capsys.readouterr().out.startswith("mesh       all is well, 2 ways are alive\n")


def test_the_page_goes_into_a_file_beside_the_table_or_to_stdout_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with daemon(tmp_path, view(1, seen(2, udptun=False), mesh_port=0)):
        assert run(tmp_path, "--html", str(tmp_path / "mesh.html")) == 0
        assert (tmp_path / "mesh.html").read_text().startswith("<!DOCTYPE html>")
        assert capsys.readouterr().out.startswith("mesh       all is well, 1 way is alive\n")
        assert run(tmp_path, "--html", "-") == 0
        out = capsys.readouterr().out
        assert out.startswith("<!DOCTYPE html>")
        assert out.endswith("</html>\n")
        with pytest.raises(UdptunError, match=r"cannot write /.*/no/file: No such file or directory"):
            run(tmp_path, "--html", str(tmp_path / "no" / "file"))
        with pytest.raises(UsageError, match="both write to stdout"):
            run(tmp_path, "--html", "-", "--json")


@pytest.mark.parametrize(
    ("own", "note"),
    [
        ({"mesh_port": 0}, "--mesh-port is closed here, and --port is not given"),
        ({"backend": "host-gw"}, "with Backend.Type host-gw hosts have no tunnel address to be asked at"),
    ],
)
def test_where_nobody_can_be_asked_this_host_speaks_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: dict[str, Any], note: str
) -> None:
    with daemon(tmp_path, view(1, seen(2), **own)):
        assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("mesh       no problem known, 1 way is alive; 1 view is missing\n")
    assert f"from the others' side only: {note}\n" in out


def test_a_host_whose_port_is_closed_and_one_that_lies_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hosts({2: b"\x1b[2J<script>\r\n\r\n"}) as port, daemon(tmp_path, view(1, seen(2), seen(4), mesh_port=0)):
        assert run(tmp_path, f"--port={port}", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [host["reason"] for host in found["hosts"]] == [
        None,
        "its answer is not used: it is none of an HTTP server",
        f"port {port} is closed there: no --mesh-port, or an earlier version",
    ]
    assert [it["kind"] for it in found["problems"]] == ["bad_answer"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            b"HTTP/1.1 404 Not Found\r\n\r\n404 not found\n",
            "the daemon here is of a version without a view: restart it, and ask again",
        ),
        (b"HTTP/1.1 503 x\r\n\r\nthe daemon is not ready yet: waits\n", "the daemon is not ready yet: waits"),
        ({"schema": 9}, "the daemon of this host says what cannot be used: its schema is 9, and this udptun reads 1"),
    ],
)
def test_a_daemon_that_has_no_view_is_an_error_in_one_line(tmp_path: Path, said: object, why: str) -> None:
    with daemon(tmp_path, said), pytest.raises(UdptunError) as caught:
        run(tmp_path)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["10.9.9.0/24"], "nobody here knows a host with 10.9.9.0/24; `udptun status` lists them"),
        (["h2"], "'h2' is no subnet, as 10.244.3.0/24, and no address"),
        (["--port=0"], "--port: '0' must be 1..65535"),
        (["--port=http"], "--port: 'http' must be an integer"),
        (["--wait=0"], "--wait: '0' is no number of seconds from 0.1 to 60"),
        (["--wait=soon"], "--wait: 'soon' is no number of seconds"),
    ],
)
def test_words_that_are_wrong_are_named(tmp_path: Path, words: list[str], why: str) -> None:
    with daemon(tmp_path, view(1, seen(2), mesh_port=0)), pytest.raises(UsageError, match=why):
        run(tmp_path, *words)

"""`udptun status` against sockets that answer well, badly or not at all; what it shows is tested in test_screen.py."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from status_document import DOCUMENT

from udptun.commands import status
from udptun.commands.status import Request
from udptun.core.daemon_socket import SOCKET_NAME
from udptun.core.errors import UdptunError


@contextmanager
def daemon(run_dir: Path, *answers: bytes | None) -> Iterator[None]:
    """Someone who answers each request so, or with None takes it and stays silent."""
    done = threading.Event()

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(4096).startswith(b"GET /status HTTP/1.1\r\n")
                if answer is None:
                    done.wait(30)
                else:
                    connection.sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(run_dir / SOCKET_NAME))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        done.set()
        thread.join()


def http(status_line: str, body: str) -> bytes:
    return f"HTTP/1.1 {status_line}\r\nContent-Type: x\r\n\r\n{body}".encode()


def test_json_is_passed_on_as_the_daemon_wrote_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(DOCUMENT) + "\n"
    with daemon(tmp_path, http("200 OK", text)):
        assert status.show(Request(tmp_path, as_json=True)) == 0
    assert capsys.readouterr().out == text


def test_json_of_one_peer_is_the_same_document_without_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (peer,) = DOCUMENT["peers"]
    other = {**peer, "subnet": "10.244.3.0/24", "public_ip": "192.0.2.3"}
    with daemon(tmp_path, http("200 OK", json.dumps({**DOCUMENT, "peers": [peer, other]}) + "\n")):
        assert status.show(Request(tmp_path, as_json=True, peer="10.244.3.9")) == 0
    assert json.loads(capsys.readouterr().out) == {**DOCUMENT, "peers": [other]}
    (tmp_path / SOCKET_NAME).unlink()
    alone = http("200 OK", json.dumps(DOCUMENT) + "\n")
    with daemon(tmp_path, alone), pytest.raises(UdptunError, match=r"^no peer has 192"):
        status.show(Request(tmp_path, as_json=True, peer="192.0.2.9"))


def test_what_happens_a_second_is_seen_in_a_second_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (peer,) = DOCUMENT["peers"]
    later = {**DOCUMENT, "peers": [{**peer, "encap_bytes": peer["encap_bytes"] + 10_000_000}]}
    with daemon(tmp_path, *(http("200 OK", json.dumps(it) + "\n") for it in (DOCUMENT, later))):
        assert status.show(Request(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "\n10.244.2.0/24  192.0.2.2:9000" in out
    assert "out 0 bit/s" not in out
    assert "\x1b" not in out


def test_where_nothing_is_counted_there_is_no_second_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(tmp_path, http("200 OK", json.dumps({**DOCUMENT, "counters": {}, "datapath": None}) + "\n")):
        assert status.show(Request(tmp_path)) == 0
    assert "\npeers      1 alive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (http("503 Service Unavailable", "not ready\n"), "not ready"),
        (http("500 Internal Server Error", ""), "the daemon at {path} answered 'HTTP/1.1 500 Internal Server Error'"),
        (b"", "the daemon at {path} answered ''"),
        (b"\xff\xfe", "the daemon at {path} answered '\ufffd\ufffd'"),
        (http("200 OK", '{"schema": 1, "versi'), "the daemon at {path} answered with half a document"),
        (None, "the daemon at {path} does not answer within 0 s"),
    ],
)
def test_daemon_that_answers_badly_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, line: str
) -> None:
    monkeypatch.setattr(status, "_TIMEOUT_S", 0.2 if answer is None else 10.0)
    with daemon(tmp_path, answer), pytest.raises(UdptunError) as caught:
        status.show(Request(tmp_path))
    assert str(caught.value) == line.format(path=tmp_path / SOCKET_NAME)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("makes_room", [True, False])
def test_a_daemon_with_a_full_queue_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makes_room: bool
) -> None:
    """While many clients came at once, `no udptun daemon answers: Resource temporarily unavailable; is it running`."""
    monkeypatch.setattr(status, "_TIMEOUT_S", 10.0 if makes_room else 0.2)
    text = json.dumps(DOCUMENT) + "\n"
    path = tmp_path / SOCKET_NAME
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(path))
        listener.listen(0)
        other.connect(str(path))  # the one that the queue has room for

        def answer() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(http("200 OK", text))

        if not makes_room:
            with pytest.raises(UdptunError, match=f"the daemon at {path} does not answer within 0 s"):
                status.fetch(tmp_path)
            return
        late = threading.Timer(0.2, answer)
        late.start()
        assert status.fetch(tmp_path) == text
        late.join()


def test_daemon_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    with pytest.raises(UdptunError) as caught:
        status.fetch(tmp_path)
    said = f"no udptun daemon answers at {path}: No such file or directory; is it running, and with this --run-dir?"
    assert str(caught.value) == said
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(UdptunError, match=r"Connection refused; is it running"):
        status.fetch(tmp_path)
    with pytest.raises(UdptunError, match=r"AF_UNIX path too long; is it running"):
        status.fetch(tmp_path / ("x" * 100))

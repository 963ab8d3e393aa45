"""The HTTP server, spoken to in raw bytes and by the standard library's client."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

import pytest

from udptun.control import http as server
from udptun.control.http import Request, Response, Routes, serve
from udptun.core.errors import KernelError
from udptun.kernel import supervisor


async def _slow(request: Request) -> Response:
    await asyncio.sleep(0.01)
    return Response(HTTPStatus.OK, "at last")


async def _broken(request: Request) -> Response:
    raise ZeroDivisionError


ROUTES: Routes = {
    "/slow": _slow,
    "/slow_and_broken": _broken,
    "/healthz": lambda request: Response(HTTPStatus.OK, "flanneld is running"),
    "/readyz": lambda request: Response(HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
    "/status": lambda request: Response(HTTPStatus.OK, '{"ä":1}', "application/json"),
    "/not_utf8": lambda request: Response(HTTPStatus.OK, os.fsdecode(b"eth\xff")),
    "/broken": lambda request: Response(HTTPStatus.OK, str(1 // 0)),
    "/large": lambda request: Response(HTTPStatus.OK, "x" * 50_000_000),
}


def run(test: Callable[[str, int], Awaitable[None]]) -> None:
    """Run `test` with host and port of a server of ROUTES."""

    async def main() -> None:
        listening = await serve(ROUTES, ("127.0.0.1", 0))
        try:
            host, port = listening.sockets[0].getsockname()
            await asyncio.wait_for(test(host, port), 30)
        finally:
            listening.close()

    asyncio.run(main())


async def answer_to(host: str, port: int, request: bytes) -> bytes:
    """Everything the server sends until it closes."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("path", "status", "body", "content_type"),
    [
        ("/healthz", 200, "flanneld is running", "text/plain; charset=utf-8"),
        ("/healthz?verbose=1", 200, "flanneld is running", "text/plain; charset=utf-8"),
        ("/readyz", 503, "flanneld is not ready yet", "text/plain; charset=utf-8"),
        ("/status", 200, '{"ä":1}', "application/json"),
        ("/slow", 200, "at last", "text/plain; charset=utf-8"),
        ("/slow_and_broken", 500, "500 internal server error\n", "text/plain; charset=utf-8"),
        ("/not_utf8", 200, "eth\\udcff", "text/plain; charset=utf-8"),
        ("/", 404, "404 not found\n", "text/plain; charset=utf-8"),
        ("/healthz/", 404, "404 not found\n", "text/plain; charset=utf-8"),
        ("/broken", 500, "500 internal server error\n", "text/plain; charset=utf-8"),
    ],
)
def test_get_is_answered_by_the_paths_route(path: str, status: int, body: str, content_type: str) -> None:
    def get(host: str, port: int) -> tuple[int, str, str | None]:
        client = http.client.HTTPConnection(host, port, timeout=10)
        client.request("GET", path)
        response = client.getresponse()
        got = response.status, response.read().decode(), response.getheader("Content-Type")
        client.close()
        return got

    async def test(host: str, port: int) -> None:
        assert await asyncio.to_thread(get, host, port) == (status, body, content_type)

    run(test)


def test_head_is_answered_as_get_without_the_body() -> None:
    async def test(host: str, port: int) -> None:
        get, head = [
            await answer_to(host, port, f"{method} /status HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            for method in ("GET", "HEAD")
        ]
        assert head == get.removesuffix('{"ä":1}'.encode()) != get

    run(test)


def test_route_gets_what_the_client_says() -> None:
    got: list[Request] = []

    def note(request: Request) -> Response:
        got.append(request)
        return Response(HTTPStatus.OK, "")

    async def main() -> None:
        listening = await serve({"/it": note}, ("127.0.0.1", 0))
        try:
            head = b"GET /it?a=b HTTP/1.1\r\nAccept:  text/plain \r\nACCEPT: x\r\nno colon\r\n: no name\r\n\r\n"
            await answer_to(*listening.sockets[0].getsockname(), head)
        finally:
            listening.close()

    asyncio.run(main())
    assert [(it.method, it.path, it.headers["accept"]) for it in got] == [("GET", "/it", "text/plain")]


@pytest.mark.parametrize(
    ("request_", "status_line"),
    [
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"DELETE /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"HEAD /nope HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"POST /nope HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"GET /healthz\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET  /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /healthz HTTP/2\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK"),
    ],
)
def test_requests_that_are_no_get_of_a_route_are_refused(request_: bytes, status_line: bytes) -> None:
    async def test(host: str, port: int) -> None:
        answer = await answer_to(host, port, request_)
        assert answer.split(b"\r\n")[0] == status_line
        assert (b"\r\nAllow: GET, HEAD\r\n" in answer) == (b" 405 " in status_line)

    run(test)


def test_a_request_that_ends_early_is_a_bad_one() -> None:
    async def test(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        writer.write_eof()
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()

    run(test)


def test_a_client_that_sends_nothing_and_leaves_gets_nothing() -> None:
    async def test(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()

    run(test)


def test_a_request_beyond_the_limit_ends_the_connection_and_not_the_server() -> None:
    async def test(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 10 * server.REQUEST_BYTES)
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""  # the kernel resets what is closed before it was read
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        writer.close()
        assert b" 200 OK" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")

    run(test)


def test_a_client_that_does_not_finish_its_request_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.05)

    async def test(host: str, port: int) -> None:
        assert (await answer_to(host, port, b"GET /heal")).startswith(b"HTTP/1.1 400 ")

    run(test)


def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.05)

    async def test(host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, (host, port))
            await loop.sock_sendall(client, b"GET /large HTTP/1.1\r\n\r\n")
            received = len(await loop.sock_recv(client, 100))  # so the server is answering
            while any("Server._attend" in repr(task) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.01)
            with contextlib.suppress(ConnectionResetError):
                while chunk := await loop.sock_recv(client, 1 << 20):
                    received += len(chunk)
            assert received < 50_000_000

    run(test)


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Client]]


def run_on_each_kind_of_socket(kind: str, tmp_path: Path, test: Callable[[Connect], Awaitable[None]]) -> None:
    """Run `test` with what connects to a server of ROUTES at a TCP or Unix socket."""

    async def main() -> None:
        where: tuple[str, int] | Path = ("127.0.0.1", 0) if kind == "tcp" else tmp_path / "status.sock"
        listening = await serve(ROUTES, where)

        async def connect() -> Client:
            address = listening.sockets[0].getsockname()
            return await (asyncio.open_connection(*address) if kind == "tcp" else asyncio.open_unix_connection(address))

        try:
            await asyncio.wait_for(test(connect), 30)
        finally:
            listening.close()

    asyncio.run(main())


async def probe(connect: Connect) -> bytes:
    """The first line of the answer to a kubelet's request."""
    reader, writer = await connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    line = (await reader.read()).split(b"\r\n")[0]
    writer.close()
    return line


async def silent(client: Client) -> None:
    """Sends nothing."""


async def half_way(client: Client) -> None:
    """Begins a request and leaves it at that."""
    client[1].write(b"GET /healthz HTTP/1.1\r\nHost:")


async def byte_by_byte(client: Client) -> None:
    """Slowloris: always a little more, and never the end."""
    with contextlib.suppress(ConnectionError):
        for byte in b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 1000:
            client[1].write(bytes([byte]))
            await client[1].drain()
            await asyncio.sleep(0.005)


async def unread(client: Client) -> None:
    """Asks for much and reads none of it."""
    client[1].transport.pause_reading()
    client[1].write(b"GET /large HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("n_clients", [64, 200])
@pytest.mark.parametrize("behave", [silent, half_way, byte_by_byte, unread])
def test_idle_clients_never_take_healthz_away(
    behave: Callable[[Client], Awaitable[None]],
    n_clients: int,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 clients that sent nothing had all places: for five seconds, and for ever if they came again, each probe was
    turned away unanswered.  A kubelet restarts the container then.
    """
    monkeypatch.setattr(server, "REQUEST_S", 60.0)
    monkeypatch.setitem(ROUTES, "/large", lambda request: Response(HTTPStatus.OK, "x" * 1_000_000))  # type: ignore[misc]

    async def test(connect: Connect) -> None:
        clients = [await connect() for _ in range(n_clients)]
        behaving = [asyncio.create_task(behave(client)) for client in clients]
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert await asyncio.wait_for(probe(connect), 2) == b"HTTP/1.1 200 OK"
        for task in behaving:
            task.cancel()
        for _, writer in clients:
            writer.transport.abort()

    run_on_each_kind_of_socket(kind, tmp_path, test)


FLOOD = """
import collections, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
held = collections.deque(maxlen=200)
while True:
    one = socket.socket(socket.AF_INET if port else socket.AF_UNIX)
    one.connect((host, port) if port else host)
    held.append(one)
"""

# As kubelet's, they come from a process of their own.  Between the two calls a thread of ours would wait for the
# interpreter's lock, which the server has, and meanwhile the others come.
PROBES = """
import contextlib, os, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
for _ in range(100):
    with socket.socket(socket.AF_INET if port else socket.AF_UNIX) as client:
        client.connect((host, port) if port else host)
        client.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        client.settimeout(10)
        print(client.recv(100).split(b"\\r\\n")[0].decode())
"""


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_flood_of_new_idle_clients_never_takes_healthz_away(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe's request is read before so many others have come that the probe is turned out."""

    async def test(connect: Connect) -> None:
        _, writer = await connect()
        host, port = writer.get_extra_info("peername") if kind == "tcp" else (str(tmp_path / "status.sock"), 0)
        writer.close()
        with subprocess.Popen([sys.executable, "-c", FLOOD, host, str(port)]) as flood:
            try:
                while not caplog.records:
                    await asyncio.sleep(0.01)
                command = (sys.executable, "-c", PROBES, host, str(port))
                probes = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
                said, _ = await probes.communicate()
                assert said.splitlines() == [b"HTTP/1.1 200 OK"] * 100
                assert flood.poll() is None
            finally:
                flood.kill()

    run_on_each_kind_of_socket(kind, tmp_path, test)


def test_the_client_that_is_idle_the_longest_is_turned_out_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is being answered stays, however old, and so do those that came later."""
    monkeypatch.setattr(server, "CLIENTS", 3)
    answer = asyncio.Event()

    async def waits(request: Request) -> Response:
        await answer.wait()
        return Response(HTTPStatus.OK, "at last")

    monkeypatch.setitem(ROUTES, "/waits", waits)  # type: ignore[misc]

    async def test(host: str, port: int) -> None:
        asking = asyncio.create_task(answer_to(host, port, b"GET /waits HTTP/1.1\r\n\r\n"))
        await asyncio.sleep(0.05)
        idle = [await asyncio.open_connection(host, port) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert b" 200 OK" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")
        assert await idle[0][0].read() == b""
        idle[1][1].write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b" 200 OK" in await idle[1][0].read()
        answer.set()
        assert b"at last" in await asking
        for _, writer in idle:
            writer.close()

    run(test)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "udptun.control.http"]
    assert line == "too many http clients, turning out those that are idle the longest n_clients=3"


def test_when_every_client_is_being_answered_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that never come do not take /healthz away either."""
    monkeypatch.setattr(server, "CLIENTS", 2)

    async def never(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setitem(ROUTES, "/never", never)  # type: ignore[misc]

    async def test(host: str, port: int) -> None:
        asking = [
            asyncio.create_task(answer_to(host, port, b"GET /never HTTP/1.1\r\n\r\n")) for _ in range(server.CLIENTS)
        ]
        await asyncio.sleep(0.05)
        assert b" 200 OK" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")
        done, waiting = await asyncio.wait(asking, timeout=0.05)
        assert [task.result() for task in done] == [b""]
        assert len(waiting) == server.CLIENTS - 1
        for task in waiting:
            task.cancel()

    run(test)


def test_places_are_free_again_once_clients_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is turned out then: a client that comes later than three that left keeps its place."""
    monkeypatch.setattr(server, "CLIENTS", 2)

    async def test(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for _ in range(3):
            assert b" 200 OK" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")
            _, gone = await asyncio.open_connection(host, port)
            gone.close()
            await asyncio.sleep(0.05)
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b" 200 OK" in await reader.read()
        writer.close()

    run(test)


def test_a_client_that_cannot_be_let_in_is_said_once_and_the_next_one_is_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when there are no descriptors: the server goes on as soon as there are, and does not spin meanwhile."""
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3
    accept = asyncio.SelectorEventLoop.sock_accept  # type: ignore[attr-defined]  # typeshed has it in the base alone

    async def fails_at_first(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return await accept(loop, listener)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", fails_at_first)

    async def test(host: str, port: int) -> None:
        start_s = asyncio.get_running_loop().time()
        assert b" 200 OK" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")
        assert asyncio.get_running_loop().time() - start_s >= 0.2

    run(test)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "udptun.control.http"]
    assert line == "cannot let an http client in error='Too many open files'"


def test_a_route_that_fails_at_each_request_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """Each request logged a traceback, so whoever reached the port could fill the disk."""

    async def test(host: str, port: int) -> None:
        for path in ("broken", "slow_and_broken", "broken?again"):
            answer = await answer_to(host, port, f"GET /{path} HTTP/1.1\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 500 ")

    run(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "udptun.control.http"]
    assert lines == [f"no answer for a request path=/{path}" for path in ("broken", "slow_and_broken")]


def test_unix_socket_serves_its_owner_only_and_replaces_what_a_dead_server_left(tmp_path: Path) -> None:
    path = tmp_path / "status.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def main() -> bytes:
        listening = await serve(ROUTES, path)
        try:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /status HTTP/1.1\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            return answer
        finally:
            listening.close()

    assert asyncio.run(main()).endswith(b'\r\n\r\n{"\xc3\xa4":1}')


async def test_serve_names_the_address_when_it_is_taken(tmp_path: Path) -> None:
    first = await serve(ROUTES, ("127.0.0.1", 0))
    port = first.sockets[0].getsockname()[1]
    with pytest.raises(KernelError, match=f"cannot listen on 127.0.0.1:{port}: EADDRINUSE; another program"):
        await serve(ROUTES, ("127.0.0.1", port))
    first.close()
    with pytest.raises(KernelError, match=r"cannot listen on /.*/no/sock: ENOENT; No such file"):
        await serve(ROUTES, tmp_path / "no" / "sock")


def test_an_unexpected_error_while_a_client_is_let_in_does_not_close_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, the task that lets clients in ended with it, and nobody got an answer any more."""
    monkeypatch.setattr(supervisor, "PAUSE_S", (0.01, 0.01))
    let_in = server.Server._let_in
    failures = iter([True])

    def fail_once(self: server.Server, connection: socket.socket) -> None:
        if next(failures, False):
            connection.close()
            raise ValueError("not expected")
        let_in(self, connection)

    monkeypatch.setattr(server.Server, "_let_in", fail_once)

    async def test(host: str, port: int) -> None:
        with contextlib.suppress(ConnectionResetError):
            assert await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
        assert b"flanneld is running" in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n")

    run(test)

"""The HTTP server, spoken to in raw bytes and by the standard library's client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import stat
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

import pytest

from udptun.control import http as server
from udptun.control.http import Response, Routes, serve
from udptun.core.errors import KernelError


async def _slow() -> Response:
    await asyncio.sleep(0.01)
    return Response(HTTPStatus.OK, "at last")


async def _broken() -> Response:
    raise ZeroDivisionError


ROUTES: Routes = {
    "/slow": _slow,
    "/slow_and_broken": _broken,
    "/healthz": lambda: Response(HTTPStatus.OK, "flanneld is running"),
    "/readyz": lambda: Response(HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
    "/status": lambda: Response(HTTPStatus.OK, '{"ä":1}', "application/json"),
    "/broken": lambda: Response(HTTPStatus.OK, str(1 // 0)),
    "/large": lambda: Response(HTTPStatus.OK, "x" * 50_000_000),
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


@pytest.mark.parametrize(
    ("request_", "status_line"),
    [
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"HEAD /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
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
        assert (b"\r\nAllow: GET\r\n" in answer) == (b" 405 " in status_line)

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
            while any("on_connection" in repr(task) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.01)
            with contextlib.suppress(ConnectionResetError):
                while chunk := await loop.sock_recv(client, 1 << 20):
                    received += len(chunk)
            assert received < 50_000_000

    run(test)


def test_only_so_many_clients_are_served_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 2)

    async def test(host: str, port: int) -> None:
        idle = [await asyncio.open_connection(host, port) for _ in range(2)]
        reader, writer = await asyncio.open_connection(host, port)
        assert await reader.read() == b""
        writer.close()
        for _, held in idle:
            held.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert [b" 200 OK" in await held.read() for held, _ in idle] == [True, True]
        for _, held in idle:
            held.close()
        # The places are free again once the server has seen both leave.
        while b" 200 OK" not in await answer_to(host, port, b"GET /healthz HTTP/1.1\r\n\r\n"):
            await asyncio.sleep(0.01)

    run(test)


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


def test_serve_names_the_address_when_it_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        first = await serve(ROUTES, ("127.0.0.1", 0))
        port = first.sockets[0].getsockname()[1]
        with pytest.raises(KernelError, match=f"cannot listen on 127.0.0.1:{port}: EADDRINUSE; another program"):
            await serve(ROUTES, ("127.0.0.1", port))
        first.close()
        with pytest.raises(KernelError, match=r"cannot listen on /.*/no/sock: ENOENT; No such file"):
            await serve(ROUTES, tmp_path / "no" / "sock")

    asyncio.run(main())

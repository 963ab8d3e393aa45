"""A very small HTTP/1.1 server for health checks, status and metrics: GET only, one request a connection.

It may face the network, so everything is bounded: bytes and seconds a request may take, connections at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from udptun.core.errors import KernelError

REQUEST_BYTES = 8192
REQUEST_S = 5.0
"""How long a client may take to send its request and, again, to take the answer; seconds."""
CONNECTIONS = 64
"""How many clients at once; the next is turned away unanswered."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; `body` is sent as UTF-8."""

    status: HTTPStatus
    body: str
    content_type: str = "text/plain; charset=utf-8"


Routes = Mapping[str, Callable[[], Response | Awaitable[Response]]]
"""Path -> what makes its answer.  Called in the event loop, so it must not block: what takes longer is awaited."""


async def serve(routes: Routes, where: tuple[str, int] | Path) -> asyncio.Server:
    """Answer requests at a TCP address (host, port) or a Unix socket (mode 0600) until the server is closed.

    A socket that a dead server left at the path is replaced.  Raises KernelError when the address cannot be had.
    """
    n_open = 0

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_open
        n_open += 1
        try:
            if n_open <= CONNECTIONS:
                await _answer(routes, reader, writer)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), REQUEST_S)
        except BaseException as exc:
            # Not after a close that went well: abort() then fails if the last bytes had to wait for the client.
            writer.transport.abort()
            if not isinstance(exc, OSError):  # the client went away, or does not read
                raise
        finally:
            n_open -= 1

    try:
        if isinstance(where, Path):
            server = await asyncio.start_unix_server(on_connection, where, limit=REQUEST_BYTES)
            where.chmod(0o600)
            return server
        host, port = where
        return await asyncio.start_server(on_connection, host or None, port, limit=REQUEST_BYTES)
    except OSError as exc:
        name = where if isinstance(where, Path) else f"{where[0]}:{where[1]}"
        hint = "another program listens there" if exc.errno == errno.EADDRINUSE else exc.strerror or str(exc)
        # getaddrinfo() has negative numbers of its own.
        raise KernelError(f"cannot listen on {name}", max(exc.errno or 0, 0), hint) from exc


async def _answer(routes: Routes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
        response = await _respond(routes, head)
    except (asyncio.LimitOverrunError, TimeoutError):
        response = _error(HTTPStatus.BAD_REQUEST)
    except asyncio.IncompleteReadError as exc:
        if not exc.partial:
            return
        response = _error(HTTPStatus.BAD_REQUEST)
    body = response.body.encode()
    allow = "Allow: GET\r\n" if response.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    writer.write(
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
        f"Content-Type: {response.content_type}\r\nContent-Length: {len(body)}\r\n{allow}"
        "Connection: close\r\n\r\n".encode()
        + body
    )
    await asyncio.wait_for(writer.drain(), REQUEST_S)


async def _respond(routes: Routes, head: bytes) -> Response:
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        return _error(HTTPStatus.BAD_REQUEST)
    method, target, _ = words
    route = routes.get(target.partition("?")[0])
    if route is None:
        return _error(HTTPStatus.NOT_FOUND)
    if method != "GET":
        return _error(HTTPStatus.METHOD_NOT_ALLOWED)
    try:
        response = route()
        return response if isinstance(response, Response) else await response
    except Exception:
        log.exception("no answer for a request path=%s", target)
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR)


def _error(status: HTTPStatus) -> Response:
    return Response(status, f"{status.value} {status.phrase.lower()}\n")

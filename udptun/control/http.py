"""A small HTTP/1.1 server for health, readiness, status and metrics: one request a connection, which has no body.

It may face the network, so everything is bounded: bytes and seconds a request may take, clients at once.  When there
are too many, the newest is let in and the oldest that keeps us waiting is turned out.  So clients that connect and say
nothing, say it byte by byte or do not read their answer cost one another their places, and a probe is answered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from udptun._kabi import lib
from udptun.core.errors import KernelError, one_line
from udptun.core.ip_text import ip_address
from udptun.core.network_state import IPAddress, socket_address
from udptun.kernel.supervisor import Supervisor

REQUEST_BYTES = 8192
REQUEST_S = 5.0
"""How long a client may take to send its request and, again, to take the answer; seconds."""
CLIENTS = 64
"""How many clients at once."""

_BACKLOG = 128
"""How many clients the kernel may hold for us while we are busy."""
_ACCEPT_RETRY_S = 0.1
"""How long to wait after a client could not be let in, as when there are no descriptors left; seconds."""
_UNWELCOME_PAUSE_S = 0.001
"""After somebody who was turned out unheard: so many that come cost little; seconds."""
_SAY_AGAIN_S = 60.0
"""How often a line is logged at most, whatever clients do; seconds."""

log = logging.getLogger(__name__)


class Pieces(Protocol):
    """What is sent piece by piece as it comes, until StopAsyncIteration."""

    async def __anext__(self) -> str: ...

    def close(self) -> None:
        """It was all sent, or the client has left, perhaps before the first piece.  Called once, whatever happens."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; `body` is sent as UTF-8, and then `more`."""

    status: HTTPStatus
    body: str
    content_type: str = "text/plain; charset=utf-8"
    more: Pieces | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a client has asked for.  `headers` are by their names in small letters; of several alike the first counts.

    `query` is what stands behind the question mark, as it came.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: str = ""


Routes = Mapping[str, Callable[[Request], Response | Awaitable[Response]]]
"""Path -> what makes the answer to a GET of it, and to a HEAD; `POST path` -> to a POST.

It is called in the event loop, so it must not block but await what takes longer.
"""


async def serve(routes: Routes, where: tuple[str, int] | Path) -> Server:
    """Answer requests at a TCP address (host, port) or a Unix socket (mode 0600) until the server is closed.

    A socket that a dead server left at the path is replaced.  Raises KernelError when the address cannot be had.
    """
    with _listening_at(where if isinstance(where, Path) else f"{where[0]}:{where[1]}") as listeners:
        listeners += [_bound_to_path(where)] if isinstance(where, Path) else await _bound_to_address(*where)
        return Server(routes, listeners)


def serve_to_some(routes: Routes, ip: IPAddress, port: int, is_welcome: Callable[[IPAddress], bool]) -> Server:
    """Answer requests of those who come from an address that is welcome, until the server is closed.

    `ip` need not be an address of this host yet.  Raises KernelError when the port cannot be had.
    """
    with _listening_at(socket_address(ip, port)) as listeners:
        listeners.append(_bound_to_future_address(ip, port))
        return Server(routes, listeners, is_welcome)


@contextmanager
def _listening_at(name: object) -> Iterator[list[socket.socket]]:
    """Closes the sockets that the block has put into the list when it fails.  Raises KernelError for OSError."""
    listeners: list[socket.socket] = []
    try:
        yield listeners
    except OSError as exc:
        for listener in listeners:
            listener.close()
        hint = "another program listens there" if exc.errno == errno.EADDRINUSE else exc.strerror or str(exc)
        # getaddrinfo() has negative numbers of its own.
        raise KernelError(f"cannot listen on {name}", max(exc.errno or 0, 0), hint) from exc


def _bound_to_path(path: Path) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        # Nobody can connect before listen().
        path.chmod(0o600)
    except BaseException:
        listener.close()
        raise
    return listener


async def _bound_to_address(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that the name means; all addresses for an empty one, by asyncio's rules."""
    loop = asyncio.get_running_loop()
    bound = await loop.create_server(asyncio.Protocol, host or None, port, start_serving=False)
    listeners = [socket.socket(fileno=os.dup(it.fileno())) for it in bound.sockets]
    bound.close()
    return listeners


def _bound_to_future_address(ip: IPAddress, port: int) -> socket.socket:
    is_ipv4 = ip.version == 4
    listener = socket.socket(socket.AF_INET if is_ipv4 else socket.AF_INET6)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # It holds for IPv6, too.
        listener.setsockopt(socket.IPPROTO_IP, lib.IP_FREEBIND, 1)
        listener.bind((str(ip), port))
    except BaseException:
        listener.close()
        raise
    return listener


@dataclass(eq=False, slots=True)
class _Client:
    """Idle while we wait for its request, or for it to take its answer."""

    connection: socket.socket
    is_idle: bool = True


class Server:
    """Answers requests at `sockets`, which are bound, until it is closed; owns them.  Raises OSError.

    Who comes from an address that is not welcome is turned out unheard.
    """

    def __init__(
        self,
        routes: Routes,
        sockets: Sequence[socket.socket],
        is_welcome: Callable[[IPAddress], bool] | None = None,
    ) -> None:
        for listener in sockets:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
        self.sockets = sockets
        self._routes = routes
        self._is_welcome = is_welcome
        self._clients: dict[_Client, asyncio.Task[None]] = {}
        """In the order in which they came."""
        self._said_s: dict[str, float] = {}
        """When each line, or the failure of each path that has a route, was last logged, by the event loop's clock."""
        self._supervisor = Supervisor()
        self._accepting = [self._start_accepting(listener) for listener in sockets]

    def close(self) -> None:
        """Let nobody in from now on, and turn all clients out."""
        for task in (*self._accepting, *self._clients.values()):
            task.cancel()

    def _start_accepting(self, listener: socket.socket) -> asyncio.Task[None]:
        task = asyncio.create_task(self._supervisor.keep("http", lambda: self._accept(listener)))
        # Not before the task has ended: until then the event loop knows the descriptor by its number.
        task.add_done_callback(lambda _: listener.close())
        return task

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as exc:
                self._say(f"cannot let an http client in error={exc.strerror!r}")
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            # A link-local address of IPv6 has a zone.
            if self._is_welcome is None or self._is_welcome(ip_address(address[0].partition("%")[0])):
                self._let_in(connection)
            else:
                connection.close()
                await asyncio.sleep(_UNWELCOME_PAUSE_S)
            # The client that was let in has its turn before the next one comes.  Else a flood of new clients would turn
            # a probe out before its request is read, which is mostly here already.
            await asyncio.sleep(0)

    def _let_in(self, connection: socket.socket) -> None:
        if len(self._clients) >= CLIENTS:
            self._turn_out()
        client = _Client(connection)
        task = asyncio.create_task(self._attend(client))
        self._clients[client] = task

        def left(task: asyncio.Task[None]) -> None:
            self._clients.pop(client, None)
            connection.close()

        task.add_done_callback(left)

    def _turn_out(self) -> None:
        """Make room: the oldest idle client goes, or the oldest of all when none is idle."""
        client = next((client for client in self._clients if client.is_idle), next(iter(self._clients)))
        self._clients.pop(client).cancel()
        self._say(f"too many http clients, turning out those that are idle the longest n_clients={CLIENTS}")

    def _say(self, line: str) -> None:
        if self._is_due(line):
            log.warning("%s", line)

    def _is_due(self, line: str) -> bool:
        """Whether the caller shall log it, or what it stands for, now."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._said_s.get(line, float("-inf")) <= _SAY_AGAIN_S:
            return False
        self._said_s[line] = now_s
        return True

    async def _attend(self, client: _Client) -> None:
        more: Pieces | None = None
        try:
            answer, more = await self._answer(client)
            if answer:
                await _send(client, answer)
            if more is not None:
                client.is_idle = False
                await _send_while_there(client, more)
        except OSError:  # TimeoutError is one
            log.debug("an http client left, or does not read its answer")
        finally:
            if more is not None:
                more.close()

    async def _answer(self, client: _Client) -> tuple[bytes, Pieces | None]:
        """What to send, and what follows it.  Nothing to a client that left without a word."""
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await _read_head(client.connection)
        except TimeoutError:
            return _encode(_error(HTTPStatus.BAD_REQUEST)), None
        if head is None:
            return b"", None
        request = _parse(head)
        if request is None:
            return _encode(_error(HTTPStatus.BAD_REQUEST)), None
        client.is_idle = False
        response = await _respond(self._routes, request, self._is_due)
        client.is_idle = True
        more = response.more
        if request.method != "HEAD":
            return _encode(response), more
        if more is not None:
            more.close()
        return _encode(response, with_body=False), None


async def _send(client: _Client, answer: bytes) -> None:
    async with asyncio.timeout(REQUEST_S):
        await asyncio.get_running_loop().sock_sendall(client.connection, answer)


async def _send_while_there(client: _Client, more: Pieces) -> None:
    """Send what comes, until it ends or the client leaves.  Whoever has more to say than a request may leave, too."""

    async def send_all() -> None:
        with suppress(StopAsyncIteration):
            while True:
                await _send(client, _utf8(await more.__anext__()))

    sending = asyncio.create_task(send_all())
    leaving = asyncio.create_task(asyncio.get_running_loop().sock_recv(client.connection, 1))
    try:
        done, _ = await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if sending in done:
            sending.result()
    finally:
        for task in (sending, leaving):
            task.cancel()
        await asyncio.gather(sending, leaving, return_exceptions=True)


async def _read_head(connection: socket.socket) -> bytes | None:
    """The request up to the empty line; what there is when it ends before that or is too long; None for nothing."""
    loop = asyncio.get_running_loop()
    head = b""
    while b"\r\n\r\n" not in head and len(head) <= REQUEST_BYTES:
        chunk = await loop.sock_recv(connection, REQUEST_BYTES)
        if not chunk:
            return head or None
        head += chunk
    return head


def _parse(head: bytes) -> Request | None:
    """None for what is no request, or too long."""
    text, end, _ = head.partition(b"\r\n\r\n")
    first, *lines = text.decode("latin-1").split("\r\n")
    words = first.split(" ")
    is_http = len(words) == 3 and words[2].startswith("HTTP/1.") and words[1].startswith("/")
    if not is_http or not end or len(text) > REQUEST_BYTES:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    path, _, query = words[1].partition("?")
    return Request(words[0], path, headers, query)


async def _respond(routes: Routes, request: Request, is_due: Callable[[str], bool]) -> Response:
    """`is_due` is asked whether to log that the route of a path has failed."""
    is_get = request.method in ("GET", "HEAD")
    route = routes.get(request.path if is_get else f"{request.method} {request.path}")
    if route is None:
        return _error(HTTPStatus.METHOD_NOT_ALLOWED if request.path in routes else HTTPStatus.NOT_FOUND)
    try:
        response = route(request)
        return response if isinstance(response, Response) else await response
    except Exception:
        if is_due(request.path):
            log.exception("no answer for a request path=%s", one_line(request.path))
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR)


def _error(status: HTTPStatus) -> Response:
    return Response(status, f"{status.value} {status.phrase.lower()}\n")


def _encode(response: Response, *, with_body: bool = True) -> bytes:
    body = _utf8(response.body)
    allow = "Allow: GET, HEAD\r\n" if response.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    # The end of the connection is the end of what comes piece by piece.
    length = f"Content-Length: {len(body)}\r\n" if response.more is None else ""
    head = (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
        f"Content-Type: {response.content_type}\r\n{length}{allow}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")


def _utf8(text: str) -> bytes:
    # A name from the kernel or an environment may have bytes that are no UTF-8, which Python keeps as surrogates.
    return text.encode(errors="backslashreplace")

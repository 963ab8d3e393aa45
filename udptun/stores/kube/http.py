"""HTTP/1.1 to one server: requests on connections that are kept, and answers as streams.

The libraries for this cost 6 MB and 0.15 s of processor at each start, for what a GET and a PATCH of one server need.
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from ssl import SSLContext
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

_CHUNK = 1 << 16
"""At most so much of a body at once, bytes; also the longest head of an answer."""

_GZIP_WBITS = 31
"""Tells zlib that what comes is gzip."""

_IDLE_S = 5.0
"""A connection is kept for so long.  Requests come close together, or hours apart, and each connection costs a server
of thousands of hosts memory."""


class HttpError(Exception):
    """The server has sent no answer, half of one, or what is none."""


class HttpTimeoutError(HttpError):
    """Nothing has come for as long as the caller waits."""


@dataclass(slots=True)
class Request:
    """What is sent.  `headers` may be changed before each attempt."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes | None = None


@dataclass(slots=True)
class Answer:
    """The head of an answer, names of headers in lower case; `chunks` has its body, once."""

    status_code: int
    headers: Mapping[str, str]
    chunks: AsyncGenerator[bytes, None]


class Auth(Protocol):
    """Puts credentials into a request and, when they are refused, better ones; as lightkube's classes do."""

    def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, Answer]: ...


@dataclass(eq=False, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_used: bool = False
    """Whether it has carried an answer."""
    ending: asyncio.TimerHandle | None = None
    """Of a connection that is kept."""

    @property
    def is_usable(self) -> bool:
        return not (self.reader.at_eof() or self.reader.exception() or self.writer.is_closing())

    def close(self) -> None:
        if self.ending is not None:
            self.ending.cancel()
        # In order would be to wait for the server.
        self.writer.transport.abort()


@dataclass(slots=True)
class _Body:
    """How much of an answer's body is still to come."""

    connection: _Connection
    read_s: float
    length: int | None
    """None: until the connection ends."""
    is_chunked: bool
    is_complete: bool = False

    async def chunks(self, *, is_gzip: bool) -> AsyncGenerator[bytes, None]:
        unzip = zlib.decompressobj(_GZIP_WBITS) if is_gzip else None
        pieces = self._chunked() if self.is_chunked else self._plain()
        async for piece in pieces:
            try:
                yield piece if unzip is None else unzip.decompress(piece)
            except zlib.error as exc:
                raise HttpError(f"the answer is no gzip: {exc}") from exc
        if unzip is not None and not unzip.eof:
            raise HttpError("the answer's gzip ends in the middle")
        self.is_complete = self.length is not None or self.is_chunked

    async def _plain(self) -> AsyncIterator[bytes]:
        left = self.length
        while left is None or left > 0:
            async with _answers_within(self.read_s):
                piece = await self.connection.reader.read(_CHUNK if left is None else min(left, _CHUNK))
            if not piece:
                if left is None:
                    return
                raise HttpError("the connection has ended in the middle of the answer")
            left = None if left is None else left - len(piece)
            yield piece

    async def _chunked(self) -> AsyncIterator[bytes]:
        reader = self.connection.reader
        while True:
            async with _answers_within(self.read_s):
                size = _hexadecimal(await reader.readuntil(b"\n"))
            left = size
            while left > 0:
                async with _answers_within(self.read_s):
                    piece = await reader.read(min(left, _CHUNK))
                if not piece:
                    raise HttpError("the connection has ended in the middle of the answer")
                left -= len(piece)
                yield piece
            async with _answers_within(self.read_s):
                # After the last chunk there may be headers before the empty line.
                while (await reader.readuntil(b"\n")).strip():
                    if size:
                        raise HttpError("the answer has a chunk of another length than it says")
            if not size:
                return


class Http:
    """Asks the server at `url`, over TLS with `tls`, and through `proxy`, if there is one."""

    def __init__(self, url: str, tls: SSLContext | None, auth: Auth | None, user_agent: str, proxy: str = "") -> None:
        """Raises ValueError when these are no URLs that can be asked."""
        self._url = _split(url)
        self._tls = tls if self._url.scheme == "https" else None
        self._auth = auth
        self._proxy = _split_proxy(proxy) if proxy else None
        self._headers = {"Host": self._url.netloc.rpartition("@")[2], "User-Agent": user_agent}
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def ask(self, request: Request, answer_s: float, read_s: float) -> AsyncIterator[Answer]:
        """The answer to `request`, whose target begins with `/`.

        A connection and the head of the answer may take `answer_s` each, and each piece of the body `read_s`.  Raises
        HttpError, OSError and what the credentials raise.
        """
        sent = Request(request.method, self._url.path.rstrip("/") + request.target, dict(request.headers), request.body)
        flow = None if self._auth is None else self._auth.async_auth_flow(sent)
        try:
            sent = sent if flow is None else await anext(flow)
            while True:
                connection, answer, body = await self._send(sent, answer_s, read_s)
                try:
                    if flow is not None:
                        try:
                            sent = await flow.asend(answer)
                            # Credentials were refused and there are others.
                            continue
                        except StopAsyncIteration:
                            flow = None
                    yield answer
                    return
                finally:
                    await answer.chunks.aclose()
                    is_kept = body.is_complete and answer.headers.get("connection", "").lower() != "close"
                    if is_kept and connection.is_usable:
                        self._keep(connection)
                    else:
                        connection.close()
        finally:
            if flow is not None:
                await flow.aclose()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send(self, request: Request, answer_s: float, read_s: float) -> tuple[_Connection, Answer, _Body]:
        while True:
            connection = self._kept()
            if connection is None:
                async with _answers_within(answer_s):
                    connection = await self._connect()
            try:
                async with _answers_within(answer_s):
                    head = _head_of(request, self._headers, is_for_proxy=bool(self._proxy and not self._tls))
                    connection.writer.write(head + (request.body or b""))
                    await connection.writer.drain()
                    status, headers = await _read_head(connection.reader)
                body = _body_of(connection, request, status, headers, read_s)
            except HttpTimeoutError:
                connection.close()
                raise
            except (HttpError, ConnectionError):
                connection.close()
                if not connection.is_used:
                    raise
                # The server has ended it at that moment, as it does with those that are idle for long.
                continue
            except BaseException:
                connection.close()
                raise
            connection.is_used = True
            chunks = body.chunks(is_gzip=headers.get("content-encoding") == "gzip")
            return connection, Answer(status, headers, chunks), body

    def _keep(self, connection: _Connection) -> None:
        def end() -> None:
            self._idle.remove(connection)
            connection.close()

        self._idle.append(connection)
        connection.ending = asyncio.get_running_loop().call_later(_IDLE_S, end)

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                assert connection.ending is not None
                connection.ending.cancel()
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        to = self._proxy or self._url
        host, port = to.hostname or "", to.port or (443 if to.scheme == "https" else 80)
        if self._proxy is None:
            reader, writer = await asyncio.open_connection(host, port, ssl=self._tls, limit=_CHUNK)
            return _Connection(reader, writer)
        reader, writer = await asyncio.open_connection(host, port, limit=_CHUNK)
        if self._tls is not None:
            try:
                server = self._headers["Host"] if self._url.port else f"{self._headers['Host']}:443"
                await _ask_proxy(reader, writer, self._proxy, server)
                await writer.start_tls(self._tls, server_hostname=self._url.hostname)
            except BaseException:
                writer.transport.abort()
                raise
        return _Connection(reader, writer)


@asynccontextmanager
async def _answers_within(seconds: float) -> AsyncIterator[None]:
    """What goes wrong with the stream in the block becomes HttpError."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise HttpTimeoutError(f"nothing has come for {seconds:g} s") from exc
    except asyncio.IncompleteReadError as exc:
        raise HttpError("the connection has ended in the middle of the answer") from exc
    except asyncio.LimitOverrunError as exc:
        raise HttpError(f"the answer has a line of more than {_CHUNK} bytes") from exc


def _head_of(request: Request, more: Mapping[str, str], *, is_for_proxy: bool) -> bytes:
    headers = {**more, **request.headers}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    target = f"http://{more['Host']}{request.target}" if is_for_proxy else request.target
    lines = [f"{request.method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise HttpError("a line break in the request's head: does the token's file have several lines?")
    return "\r\n".join([*lines, "", ""]).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, after those that only say that one will come (1xx)."""
    while True:
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise HttpError(f"what answers does not speak HTTP: {status_line[:80]!r}")
        if (status := int(rest[:3])) >= 200:
            pairs = (line.partition(":") for line in lines if line)
            return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


def _body_of(
    connection: _Connection, request: Request, status: int, headers: Mapping[str, str], read_s: float
) -> _Body:
    is_chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
    length = "0" if status in (204, 304) else headers.get("content-length")
    if length is not None and not length.isdecimal():
        raise HttpError(f"the answer has the length {length[:40]!r}")
    return _Body(connection, read_s, None if length is None else int(length), is_chunked)


def _hexadecimal(line: bytes) -> int:
    """The length that begins a chunk."""
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as exc:
        raise HttpError(f"the answer has a chunk of length {line[:40]!r}") from exc


def _split(url: str) -> SplitResult:
    """Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url!r} is no URL of a server: http://HOST:PORT or https://HOST:PORT")
    return parts


# --- proxies


def needs_proxy(url: str, exceptions: str) -> bool:
    """Whether the server at `url` is not among the `exceptions`, which are written as NO_PROXY is for Go.

    That is a comma between hosts, domains, addresses and subnets, or `*`.  What is on this host needs none.  Pure.
    """
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or (address is not None and address.is_loopback):
        return False
    for word in (it.strip().lower() for it in exceptions.split(",")):
        with suppress(ValueError):
            if address is not None and address in ip_network(word, strict=False):
                return False
        if word and (word in ("*", host) or host.endswith(f".{word.removeprefix('*').removeprefix('.')}")):
            return False
    return True


def _split_proxy(text: str) -> SplitResult:
    """Raises ValueError."""
    proxy = urlsplit(text if "://" in text else f"http://{text}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ValueError(f"the proxy {text} cannot be used, only http://HOST:PORT: or name the server in NO_PROXY")
    return proxy


async def _ask_proxy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, proxy: SplitResult, server: str
) -> None:
    """Have the proxy connect us to `server`.  Raises HttpError."""
    headers = {"Host": server}
    if proxy.username:
        secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    lines = [f"CONNECT {server} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    await writer.drain()
    status, _ = await _read_head(reader)
    if status != 200:
        raise HttpError(f"the proxy {proxy.hostname} answers {status}")

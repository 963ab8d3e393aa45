"""HTTP/1.1 to one server: requests on connections that are kept, and answers as streams.

The protocol is h11's, which opens nothing and waits for nothing.  Here are the connections, with TLS, proxies, timeouts
and gzip (docs/decisions/0008-how-the-kube-store-speaks-http.md).
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

import h11

from udptun.core.ip_text import ip_address, ip_network

_CHUNK = 1 << 15
"""At most so much is read at once, bytes.  The head of an answer may not be longer than twice that."""

_GZIP_WBITS = 31
"""Tells zlib that what comes is gzip."""

_UNZIPPED = 1 << 20
"""So much is unzipped at once, bytes."""

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
    protocol: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT, _CHUNK))
    is_used: bool = False
    """Whether it has carried an answer."""
    ending: asyncio.TimerHandle | None = None
    """Of a connection that is kept."""

    @property
    def is_usable(self) -> bool:
        return not (self.reader.at_eof() or self.reader.exception() or self.writer.is_closing())

    async def send(self, request: h11.Request, body: bytes) -> None:
        data = self.protocol.send(request)
        if body:
            data += self.protocol.send(h11.Data(data=body))
        self.writer.write(data + self.protocol.send(h11.EndOfMessage()))
        await self.writer.drain()

    async def read_head(self) -> h11.Response:
        """The head of an answer, after those that only say that one will come (1xx)."""
        while not isinstance(event := await self._next_event(), h11.Response):
            pass
        return event

    async def read_body(self, seconds: float, *, is_gzip: bool) -> AsyncGenerator[bytes, None]:
        """The body, of which each piece may take `seconds`."""
        unzip = zlib.decompressobj(_GZIP_WBITS) if is_gzip else None
        while True:
            async with _answers_within(seconds):
                event = await self._next_event()
            if not isinstance(event, h11.Data):
                break
            if unzip is None:
                yield event.data
                continue
            rest = event.data
            while rest:
                try:
                    # In pieces: a chunk of zeros stands for a thousand times as many.
                    piece = unzip.decompress(rest, _UNZIPPED)
                except zlib.error as exc:
                    raise HttpError(f"the answer is no gzip: {exc}") from exc
                rest = unzip.unconsumed_tail
                yield piece
        if unzip is not None and not unzip.eof:
            raise HttpError("the answer's gzip ends in the middle")

    def begin_anew(self) -> bool:
        """Make it ready for the next request; False when it cannot carry one."""
        is_done = self.protocol.our_state is self.protocol.their_state is h11.DONE
        if not is_done or self.protocol.trailing_data[0] or not self.is_usable:
            return False
        self.protocol.start_next_cycle()
        return True

    def close(self) -> None:
        if self.ending is not None:
            self.ending.cancel()
        # In order would be to wait for the server.
        self.writer.transport.abort()

    async def _next_event(self) -> object:
        """What h11 makes of what comes.  Raises HttpError."""
        try:
            while (event := self.protocol.next_event()) is h11.NEED_DATA:
                self.protocol.receive_data(await self.reader.read(_CHUNK))
        except h11.RemoteProtocolError as exc:
            if self.protocol.trailing_data[1]:
                raise HttpError("the connection has ended in the middle of the answer") from exc
            raise HttpError(f"what answers does not speak HTTP: {exc!s:.200}") from exc
        return event


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
                connection, answer = await self._send(sent, answer_s, read_s)
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
                    if connection.begin_anew():
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

    async def _send(self, request: Request, answer_s: float, read_s: float) -> tuple[_Connection, Answer]:
        head = _head_of(request, self._headers, is_for_proxy=bool(self._proxy and not self._tls))
        while True:
            connection = self._kept()
            if connection is None:
                async with _answers_within(answer_s):
                    connection = await self._connect()
            try:
                async with _answers_within(answer_s):
                    await connection.send(head, request.body or b"")
                    response = await connection.read_head()
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
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            chunks = connection.read_body(read_s, is_gzip=headers.get("content-encoding") == "gzip")
            return connection, Answer(response.status_code, headers, chunks)

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
            reader, writer = await asyncio.open_connection(host, port, ssl=self._tls)
            return _Connection(reader, writer)
        reader, writer = await asyncio.open_connection(host, port)
        if self._tls is not None:
            try:
                server = self._headers["Host"] if self._url.port else f"{self._headers['Host']}:443"
                await _ask_proxy(_Connection(reader, writer), self._proxy, server)
                await writer.start_tls(self._tls, server_hostname=self._url.hostname)
            except BaseException:
                writer.transport.abort()
                raise
        return _Connection(reader, writer)


@asynccontextmanager
async def _answers_within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise HttpTimeoutError(f"nothing has come for {seconds:g} s") from exc


def _head_of(request: Request, more: Mapping[str, str], *, is_for_proxy: bool) -> h11.Request:
    headers = {**more, **request.headers}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    target = f"http://{more['Host']}{request.target}" if is_for_proxy else request.target
    try:
        return h11.Request(
            method=request.method,
            target=target.encode(),
            headers=[(name.encode(), value.strip().encode()) for name, value in headers.items()],
        )
    except h11.LocalProtocolError:
        # h11's text has the value, which may be a token.
        raise HttpError("a character that cannot be in a request: does the token's file have several lines?") from None


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
        # A server may be named with a zone, which is no part of its address.
        address = ip_address(host.partition("%")[0])
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


async def _ask_proxy(connection: _Connection, proxy: SplitResult, server: str) -> None:
    """Have the proxy connect us to `server`.  Raises HttpError."""
    headers = {"Host": server}
    if proxy.username:
        secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    await connection.send(_head_of(Request("CONNECT", server, {}), headers, is_for_proxy=False), b"")
    response = await connection.read_head()
    if response.status_code != 200:
        raise HttpError(f"the proxy {proxy.hostname} answers {response.status_code}")

"""The API server's answers as bytes: framing, gzip, and what the client makes of them.

An input is the bytes that one connection carries.  Where they have SPLIT in them, they come in pieces.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import suppress
from random import Random

from tests import virtual_time
from tests.fuzz.mutate import words_mutator
from tests.fuzz.oracles import check_line
from udptun.config.store_flags import KubeOptions
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.stores.kube import http
from udptun.stores.kube.client import Client, GoneError, NotFoundError, SilentError
from udptun.stores.kube.http import Http

_KINDS = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR")
SPLIT = b"\x00\xffSPLIT"
_OK = b"HTTP/1.1 200 OK\r\n"
_BODY = json.dumps({"metadata": {"resourceVersion": "8"}, "items": []}).encode()
_EVENT = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}\n'
_ZIPPED = gzip.compress(_BODY, mtime=0)
FOUND = {
    "an event of no type is a change": _OK + b'\r\n{"type": "", "object": {"metadata": {"resourceVersion": "9"}}}\n',
}
SEEDS = (
    _OK + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
    _OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(_ZIPPED) + _ZIPPED,
    _OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(_EVENT) + _EVENT + b"\r\n0\r\n\r\n",
    _OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc" + SPLIT + b"\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n",
    _OK + b"\r\nuntil the end",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + _OK + b"Content-Length: 1\r\n\r\na",
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 410 Gone\r\nContent-Length: 21\r\n\r\n" + b'{"message": "too old"}',
    b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n" + b'{"reason": "NotFound"}',
    b"HTTP/1.1 403 Forbidden\r\n\r\n" + b'{"message": "nodes is forbidden: \\u001b[31m\\n"}',
    b"HTTP/1.1 301 Moved\r\nLocation: http://192.0.2.1/\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
)

_words = words_mutator(
    (
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 200 \r\n", b"HTTP/1.1 410 Gone\r\n"),
        *(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Retry-After: 99999"),
        *(b"\r\n\r\n", b"\r\n", b"0\r\n\r\n", b"FFFFFFFFFFFFFFFF\r\n", b"-1", SPLIT, _BODY, _EVENT, _ZIPPED),
        *(gzip.compress(bytes(1 << 20), mtime=0), b"Connection: close\r\n", b'{"code":410,"message":"x"}', b"\n" * 50),
    )
)


def mutate(data: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        # A whole answer whose length is right, with another body.
        body = random.choice((_words(_BODY, random), gzip.compress(_words(_EVENT, random), mtime=0), _EVENT))
        encoding = b"Content-Encoding: gzip\r\n" if body[:2] == b"\x1f\x8b" else b""
        return _OK + encoding + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return _words(data, random)


def check(data: bytes) -> None:
    virtual_time.run(_ask(data.split(SPLIT)))


async def _ask(pieces: list[bytes]) -> None:
    for ask in (_list, _watch):
        client = Client(KubeOptions())
        client.url = "http://192.0.2.1"
        client._http = _Scripted(pieces)
        try:
            await ask(client)
        except (NotFoundError, GoneError, SilentError):
            pass
        except (StoreUnavailableError, ConfigError) as exc:
            check_line(str(exc))
        await client.aclose()
        assert len(asyncio.all_tasks()) == 1


async def _list(client: Client) -> None:
    text = await client.ask("GET", "/api/v1/nodes", "list the nodes", params={"limit": "500"})
    assert len(text) >= 0


async def _watch(client: Client) -> None:
    async with client.watch({"resourceVersion": "5"}, "flannel.alpha.coreos.com/") as events:
        n = 0
        async for some in events:
            n += len(some)
            assert all(event.kind in _KINDS for event in some)


class _Scripted(Http):
    """Each connection gets the same bytes, and then the end of the stream."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__("http://192.0.2.1", None, None, "udptun/fuzz")
        self._pieces = pieces
        self._n = 0

    async def _connect(self) -> http._Connection:
        self._n += 1
        assert self._n < 10, "it connects again and again"
        reader = asyncio.StreamReader()
        for piece in self._pieces:
            asyncio.get_running_loop().call_soon(_feed, reader, piece)
        asyncio.get_running_loop().call_soon(reader.feed_eof)
        return http._Connection(reader, _Writer())  # type: ignore[arg-type]


def _feed(reader: asyncio.StreamReader, piece: bytes) -> None:
    with suppress(AssertionError):
        reader.feed_data(piece)


class _Writer:
    """What the client sends goes nowhere."""

    def __init__(self) -> None:
        self.transport = self
        self._is_closed = False

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def is_closing(self) -> bool:
        return self._is_closed

    def abort(self) -> None:
        self._is_closed = True

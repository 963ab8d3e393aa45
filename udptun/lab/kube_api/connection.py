"""One client of the API server: HTTP/1.1 by h11, request by request, and the faults of a bad network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11


@dataclass(frozen=True, slots=True)
class Request:
    """What a client has asked."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    came_s: float = field(default_factory=time.monotonic)

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") in ("true", "1")

    @property
    def line(self) -> str:
        """Method, path and query, for comparisons."""
        query = "&".join(f"{key}={value}" for key, value in sorted(self.query.items()))
        return f"{self.method} {self.path}" + (f"?{query}" if query else "")


@dataclass(slots=True)
class Faults:
    """What is wrong with the server right now."""

    answers: list[tuple[int, str]] = field(default_factory=list)
    """Each of the next requests gets one instead of its answer: the status, and Retry-After in seconds or nothing."""
    is_silent: bool = False
    """Watches go on without any event or bookmark, also those that begin meanwhile."""
    is_deaf: bool = False
    """Requests are read, and get no answer."""
    bytes_per_s: float | None = None


class Connection:
    """One client, request by request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults) -> None:
        self._reader = reader
        self._writer = writer
        self._faults = faults
        self._http = h11.Connection(h11.SERVER)

    async def read(self) -> Request | None:
        """The next request; None when the client has gone."""
        head: h11.Request | None = None
        body = b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(1 << 16))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                url = urlsplit(head.target.decode())
                headers = {name.decode(): value.decode() for name, value in head.headers}
                query = dict(parse_qsl(url.query, keep_blank_values=True))
                return Request(head.method.decode(), url.path, query, headers, body)
            else:
                return None

    async def answer(self, status: int, text: bytes, retry_after_s: str = "") -> None:
        # Exactly this type: clients compare it.
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(text)))]
        headers += [("Retry-After", retry_after_s)] if retry_after_s else []
        await self._write(h11.Response(status_code=status, headers=headers))
        await self.send(text)
        await self.end()

    async def begin(self) -> None:
        """The head of a stream, which `send` continues."""
        await self._write(h11.Response(status_code=HTTPStatus.OK, headers=[("Content-Type", "application/json")]))

    async def send(self, text: bytes) -> None:
        if (rate := self._faults.bytes_per_s) is None:
            await self._write(h11.Data(data=text))
            return
        size = max(1, int(rate / 10))
        for at in range(0, len(text), size):
            await self._write(h11.Data(data=text[at : at + size]))
            await asyncio.sleep(0.1)

    async def end(self) -> None:
        await self._write(h11.EndOfMessage())

    def go_on(self) -> bool:
        """Whether the client may ask more."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def is_gone_after(self, changed: asyncio.Event, seconds: float) -> bool:
        """Wait until `changed` is set or the time is over; whether the client has ended the connection meanwhile."""
        waiting, gone = asyncio.create_task(changed.wait()), asyncio.create_task(self._reader.read(1))
        try:
            await asyncio.wait({waiting, gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
            return gone.done()
        finally:
            waiting.cancel()
            gone.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)

    async def _write(self, event: Any) -> None:  # h11's events have no class of their own in common
        if data := self._http.send(event):
            self._writer.write(data)
            await self._writer.drain()

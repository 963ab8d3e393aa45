"""Requests to the daemon's HTTP server, and what a daemon that takes over makes of another one's answer."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from unittest import mock

from tests.fuzz.mutate import words_mutator
from udptun.control import hand_over
from udptun.control import http as server
from udptun.control.http import REQUEST_BYTES, Response

FOUND = {"a path commands a terminal": b"GET /fails?\x1b[31m HTTP/1.1\r\n\r\n"}
SEEDS = (
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /hand-over HTTP/1.1\r\n\r\n",
    b"HEAD /healthz?x=y HTTP/1.0\r\n\r\n",
    b"GET /fails HTTP/1.1\r\n\r\n",
    b"GET http://x/ HTTP/1.1\r\n\r\n",
    b"HTTP/1.1 202 Accepted\r\n",
    b"\r\n\r\n",
    b"",
)
mutate = words_mutator(
    (
        *(b"GET ", b"POST ", b"/healthz", b"/hand-over", b"/fails", b" HTTP/1.1", b"\r\n", b"\r\n\r\n"),
        *(b"A: b\r\n" * 900, b"9" * 4400, b"\x1b[31m", b"\n"),
    )
)
_LOOP = asyncio.new_event_loop()
_STATUSES = (
    *(HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
    *(HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.INTERNAL_SERVER_ERROR),
)


def _fail(request: server.Request) -> Response:
    raise ValueError("as a fault of ours would")


_ROUTES: server.Routes = {
    "/healthz": lambda request: Response(HTTPStatus.OK, "ok\n"),
    "/fails": _fail,
    "POST /hand-over": lambda request: Response(HTTPStatus.ACCEPTED, "stepping back\n"),
}


def check(data: bytes) -> None:
    _LOOP.run_until_complete(_ask(data))


async def _ask(data: bytes) -> None:
    with mock.patch.object(server.log, "exception") as said:
        request = server._parse(data[: REQUEST_BYTES + 100])
        response = server._error(HTTPStatus.BAD_REQUEST)
        if request is not None:
            response = await server._respond(_ROUTES, request, lambda path: True)
    for call in said.call_args_list:
        line = call.args[0] % call.args[1:]
        assert line.isprintable(), line
    assert response.status in _STATUSES
    answer = server._encode(response)
    head, end, body = answer.partition(b"\r\n\r\n")
    assert end
    assert head.startswith(b"HTTP/1.1 ")
    assert f"Content-Length: {len(body)}".encode() in head
    # Somebody else's answer.
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        opened = await asyncio.open_unix_connection(sock=ours)
        with mock.patch.object(asyncio, "open_unix_connection", new=mock.AsyncMock(return_value=opened)):
            status = await hand_over._ask(hand_over.Path("/nowhere"), "GET", "/readyz")
    assert status is None or isinstance(status, int)

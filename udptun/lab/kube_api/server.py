"""The server: HTTP/1.1 over TCP or TLS, tokens, lists in pages, watches, patches, and faults on demand.

It runs in a thread with an event loop of its own.  Everything that a test asks of it is safe on any thread.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import TypeVar

import h11

from udptun.lab.kube_api import patch as patches
from udptun.lab.kube_api.cluster import ApiError, Cluster, Json, Objects
from udptun.lab.kube_api.connection import Connection, Faults, Request

BOOKMARK_S = 60.0
"""How often a watch that asks for bookmarks gets one (the watch cache's defaultBookmarkFrequency)."""

_LAST_BOOKMARK_S = 2.0
"""A watch gets one so long before its end, too (cacher.go)."""

_WATCH_S = 1800.0
"""How long a watch lasts whose client does not say (--min-request-timeout)."""

T = TypeVar("T")


class ApiServer:
    """A context manager: serves `cluster` on the socket that `listen` makes, at each `start` another one.

    By default that is a port of 127.0.0.1 that the kernel picks, always the same.

    `tokens` maps a bearer token to what its owner may do, as `verb resource` (`patch nodes/status`); None: everything.
    Without tokens everybody may do everything.
    """

    def __init__(
        self,
        *,
        listen: Callable[[], socket.socket] | None = None,
        tls: ssl.SSLContext | None = None,
        tokens: Mapping[str, frozenset[str] | None] | None = None,
        bookmark_s: float = BOOKMARK_S,
    ) -> None:
        self.cluster = Cluster()
        self.tokens = dict(tokens or {})
        self.faults = Faults()
        self.requests: list[Request] = []
        self.gone_s: list[float] = []
        """When a watch was told that its revision is forgotten (410), by the monotonic clock."""
        self._bookmark_s = bookmark_s
        self._tls = tls
        self._address = ("127.0.0.1", 0)
        self._listen = listen or (lambda: socket.create_server(self._address))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kube API server", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Event] = set()
        self.cluster.on_change = self._wake

    @property
    def url(self) -> str:
        host, port = self._address
        return f"{'https' if self._tls else 'http'}://{host}:{port}"

    def __enter__(self) -> ApiServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, change: Callable[[Cluster], T]) -> T:
        """Have the server's thread call `change`, and return what that returns or raises."""

        async def run() -> T:
            return change(self.cluster)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def start(self) -> None:
        """Serve, for the first time or again after `stop`: on the same address, with the same objects."""

        async def run() -> None:
            listener = self._listen()
            self._address = listener.getsockname()[:2]
            # asyncio does so only where the protocol is named.  Otherwise an answer in two parts takes 40 ms.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server = await asyncio.start_server(self._accept, sock=listener, ssl=self._tls)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def stop(self) -> None:
        """End every connection, and refuse new ones."""

        async def run() -> None:
            if self._server is not None:
                self._server.close()
            await _cancel(self._connections)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def drop_watches(self) -> int:
        """End the streams of all watches in the middle; how many there were."""

        async def run() -> int:
            return await _cancel(self._watches)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def n_watches(self) -> int:
        return len(self._watches)

    def lines(self) -> list[str]:
        """What clients have asked so far, without bodies."""
        return [request.line for request in list(self.requests)]

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()

    # ---------------------------------------------------------------------------------------------------- HTTP

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError, ssl.SSLError):
                await self._converse(Connection(reader, writer, self.faults))
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _converse(self, connection: Connection) -> None:
        while (request := await connection.read()) is not None:
            self.requests.append(request)
            if self.faults.is_deaf:
                await asyncio.Event().wait()
            try:
                if self.faults.answers:
                    status, retry_after_s = self.faults.answers.pop(0)
                    error = ApiError(status, HTTPStatus(status).phrase.replace(" ", ""), "a fault of the lab")
                    await connection.answer(status, _text(error.body), retry_after_s)
                elif request.is_watch:
                    await self._watch(connection, request)
                else:
                    status, text = self._do(request)
                    await connection.answer(status, text)
            except ApiError as exc:
                await connection.answer(exc.status, _text(exc.body))
            if not connection.go_on():
                return

    # ------------------------------------------------------------------------------------------------- the API

    def _do(self, request: Request) -> tuple[int, bytes]:
        """The answer to everything but a watch."""
        path = request.path.rstrip("/")
        if path in _DISCOVERY:
            return HTTPStatus.OK, _text(_DISCOVERY[path])
        if path in ("/healthz", "/readyz", "/livez"):
            return HTTPStatus.OK, b"ok"
        objects, name, is_status = self._find(request)
        match request.method:
            case "GET" if name:
                return HTTPStatus.OK, objects.get(name).text
            case "GET":
                return HTTPStatus.OK, _list(objects, request.query)
            case "POST" if not name:
                return HTTPStatus.CREATED, objects.create(_object(request.body)).text
            case "DELETE" if name:
                objects.delete(name)
                return HTTPStatus.OK, _text({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
            case "PATCH" if name:
                kind = request.headers.get("content-type", "")
                if kind not in (patches.STRATEGIC, patches.MERGE):
                    raise ApiError(
                        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                        "UnsupportedMediaType",
                        f"the body of the request was in an unknown format - accepted media types include: "
                        f"{patches.MERGE}, {patches.STRATEGIC}",
                    )
                return HTTPStatus.OK, objects.patch(name, kind, _object(request.body), is_status=is_status).text
        raise ApiError(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed", "the server does not allow this method")

    def _find(self, request: Request) -> tuple[Objects, str, bool]:
        """What the path names: a resource, an object of it or none, and whether it is the object's status."""
        match = _PATH.fullmatch(request.path)
        if match is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "NotFound", "the server could not find the requested resource")
        namespace, resource, name, status = match.groups()
        self._check_rights(request, f"{resource}{'/status' if status else ''}", bool(name))
        if resource == "pods":
            return self.cluster.pods, f"{namespace}/{name}" if name else "", False
        return self.cluster.nodes, name or "", bool(status)

    def _check_rights(self, request: Request, resource: str, is_named: bool) -> None:
        if not self.tokens:
            return
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            raise ApiError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "Unauthorized")
        verb = request.method.lower()
        if verb == "get" and not is_named:
            verb = "watch" if request.is_watch else "list"
        may = self.tokens[token]
        if may is not None and f"{verb} {resource}" not in may:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "Forbidden",
                f'{resource} is forbidden: User "lab" cannot {verb} resource "{resource}" in API group "" at the '
                "cluster scope",
            )

    async def _watch(self, connection: Connection, request: Request) -> None:
        objects, name, _ = self._find(request)
        wanted = name or _selected_name(request.query)
        after = int(request.query.get("resourceVersion") or 0) or self.cluster.revision
        task = asyncio.current_task()
        assert task is not None
        changed = asyncio.Event()
        self._watchers.add(changed)
        self._watches.add(task)
        try:
            await connection.begin()
            until_s = self._loop.time() + float(request.query.get("timeoutSeconds") or _WATCH_S)
            async with asyncio.timeout_at(until_s):
                with_bookmarks = _asks_bookmarks(request.query)
                await self._follow(connection, objects, wanted, after, changed, until_s, with_bookmarks)
        except TimeoutError:
            await connection.end()
        finally:
            self._watches.discard(task)
            self._watchers.discard(changed)

    async def _follow(
        self,
        connection: Connection,
        objects: Objects,
        wanted: str,
        after: int,
        changed: asyncio.Event,
        until_s: float,
        with_bookmarks: bool,
    ) -> None:
        """Send what changes, until the client goes, or is told that the history does not reach back."""
        told: int | None = None
        """A bookmark has told so much, or the beginning of the watch."""
        bookmark_s = min(self._loop.time() + self._bookmark_s, until_s - _LAST_BOOKMARK_S)
        while True:
            changed.clear()
            if self.faults.is_silent:
                # For good: a stream that has lost its way does not find it again.
                await connection.is_gone_after(asyncio.Event(), _WATCH_S)
                return
            try:
                news = objects.since(after)
            except ApiError as exc:
                self.gone_s.append(time.monotonic())
                await connection.send(_event("ERROR", _text(exc.body)))
                await connection.end()
                return
            for change in news:
                if wanted in ("", change.stored.value["metadata"]["name"]):
                    await connection.send(_event(change.kind, change.stored.text))
                after = change.revision
            told = after if told is None else told
            if self._loop.time() >= bookmark_s:
                bookmark_s = self._loop.time() + self._bookmark_s
                # A real one, too, sends none while nothing has happened since the watch began.
                if not with_bookmarks or after == told:
                    continue
                told = after
                metadata = {"resourceVersion": str(after), "creationTimestamp": None}
                bookmark = {"kind": objects.kind, "apiVersion": "v1", "metadata": metadata, "spec": {}, "status": {}}
                await connection.send(_event("BOOKMARK", _text(bookmark)))
            if await connection.is_gone_after(changed, bookmark_s - self._loop.time()):
                return


async def _cancel(tasks: set[asyncio.Task[None]]) -> int:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
    return len(ending)


_PATH = re.compile(r"/api/v1/(?:namespaces/([^/]+)/)?(nodes|pods)(?:/([^/]+)(/status)?)?")


def _list(objects: Objects, query: Mapping[str, str]) -> bytes:
    token, revision = query.get("continue", ""), query.get("resourceVersion", "")
    # A list of any revision comes out of the watch cache, which knows no pages (cacher.go of the API server).
    page = objects.page(0 if revision == "0" and not token else int(query.get("limit") or 0), token)
    metadata: dict[str, Json] = {"resourceVersion": str(page.revision)}
    if page.token:
        metadata |= {"continue": page.token, "remainingItemCount": page.n_left}
    name = _selected_name(query)
    items = b",".join(it.text for it in page.items if name in ("", it.value["metadata"]["name"]))
    head = {"kind": f"{objects.kind}List", "apiVersion": "v1", "metadata": metadata}
    return _text(head)[:-1] + b',"items":[' + items + b"]}"


def _selected_name(query: Mapping[str, str]) -> str:
    """The object that the field selector names; empty: all.  Other selectors are refused."""
    selector = query.get("fieldSelector", "")
    if selector and not selector.startswith("metadata.name="):
        raise ApiError(HTTPStatus.BAD_REQUEST, "BadRequest", f"field label not supported: {selector}")
    return selector.removeprefix("metadata.name=")


def _asks_bookmarks(query: Mapping[str, str]) -> bool:
    return query.get("allowWatchBookmarks") in ("true", "1")


def _object(body: bytes) -> dict[str, Json]:
    try:
        value = json.loads(body)
    except ValueError as exc:
        raise ApiError(HTTPStatus.BAD_REQUEST, "BadRequest", f"the body is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "BadRequest", "the body is no JSON object")
    return value


def _event(kind: str, text: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), text)


def _text(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


_DISCOVERY: Mapping[str, Json] = {
    "/version": {"major": "1", "minor": "20", "gitVersion": "v1.20.2"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {
                "name": "nodes",
                "singularName": "",
                "namespaced": False,
                "kind": "Node",
                "verbs": ["create", "delete", "get", "list", "patch", "watch"],
                "shortNames": ["no"],
            },
            {
                "name": "nodes/status",
                "singularName": "",
                "namespaced": False,
                "kind": "Node",
                "verbs": ["get", "patch"],
            },
            {"name": "pods", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]},
        ],
    },
}
"""What kubectl asks before it does anything."""

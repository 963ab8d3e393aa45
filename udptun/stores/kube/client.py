"""Requests to the API server, and what its answers mean."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from urllib.parse import urlencode

from udptun import __version__
from udptun.config.store_flags import KubeOptions
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.stores.kube.access import CredentialsError, find_access
from udptun.stores.kube.http import Answer, Http, HttpError, HttpTimeoutError, Request
from udptun.stores.kube.node import NodeEvent, NodeFormatError, lines_of, read_event, read_failure

ANSWER_S = 10.0
"""How long the server may take to begin with an answer, and to go on with it."""

SILENCE_S = 150.0
"""A watch without a byte for so long is opened anew.  A server that is well sends a bookmark each minute."""

WATCHES_S = (300, 600)
"""How long a watch lasts, by chance between these, seconds (client-go's minWatchTimeout).  All at once would be a
burst."""

_EARLY_S = 1.0
"""A watch may end so much before its time."""

_JSON = "application/json"

_BODY = 1 << 20
"""So much room an answer gets at first, bytes; what is not used costs nothing."""

_LARGEST_BODY = 1 << 30
"""Of an answer, bytes.  A list of 10,000 nodes at once has 200 MB."""

_LONGEST_LINE = 64 << 20
"""Of a watch, bytes.  etcd keeps no object that is larger than a few."""

_LONGEST_PAUSE_S = 60.0
"""A server that asks for a longer pause (Retry-After) is asked again after so long."""


class GoneError(Exception):
    """The server no longer knows what was so long ago (410)."""


class NotFoundError(Exception):
    """There is no such object (404)."""


class SilentError(Exception):
    """A watch has ended in the middle or before its time, or nothing came for too long; the text says which."""


class Client:
    """Connects with the first call."""

    def __init__(self, options: KubeOptions) -> None:
        self._options = options
        self._http: Http | None = None
        self.url = ""
        """Of the server, once it is known."""

    async def ask(
        self,
        method: str,
        path: str,
        operation: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> memoryview:
        """The answer's body; `body` is a strategic-merge patch.

        Raises NotFoundError, GoneError, StoreUnavailableError and, for flags that lead nowhere, ConfigError.
        """
        http = self._connect()
        headers = {"Accept": _JSON, "Accept-Encoding": "gzip"}
        if body is not None:
            headers["Content-Type"] = "application/strategic-merge-patch+json"
        target = f"{path}?{urlencode(params)}" if params else path
        with self._failures(operation):
            async with http.ask(Request(method, target, headers, body), ANSWER_S, ANSWER_S) as answer:
                text = await _body_of(answer)
        await self._check(answer, text, operation)
        return text

    @asynccontextmanager
    async def watch(
        self, params: Mapping[str, str], prefix: str
    ) -> AsyncIterator[AsyncGenerator[list[NodeEvent], None]]:
        """The events of a watch of nodes, as many at a time as come together.

        They end when the server ends the watch in order and in time, or with SilentError.  Raises as `ask`.
        """
        http, operation = self._connect(), "watch the nodes"
        seconds = random.randint(*WATCHES_S)
        query = {
            "allowWatchBookmarks": "true",
            **params,
            # client-go says it twice.
            "timeout": f"{seconds // 60}m{seconds % 60}s",
            "timeoutSeconds": str(seconds),
            "watch": "true",
        }
        request = Request("GET", f"/api/v1/nodes?{urlencode(query)}", {"Accept": _JSON})
        ends_s = asyncio.get_running_loop().time() + seconds - _EARLY_S
        async with AsyncExitStack() as undo:
            with self._failures(operation):
                answer = await undo.enter_async_context(http.ask(request, ANSWER_S, SILENCE_S))
                text = None if answer.status_code == HTTPStatus.OK else await _body_of(answer)
            if text is not None:
                await self._check(answer, text, operation)
            yield self._events(answer, prefix, ends_s)

    async def aclose(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    async def _events(self, answer: Answer, prefix: str, ends_s: float) -> AsyncGenerator[list[NodeEvent], None]:
        buffer = bytearray()
        try:
            async for chunk in answer.chunks:
                buffer += chunk
                if len(buffer) > _LONGEST_LINE:
                    raise SilentError(f"it has a line of more than {_LONGEST_LINE >> 20} MiB")
                if events := [read_event(line, prefix) for line in lines_of(buffer)]:
                    yield events
        except HttpTimeoutError as exc:
            raise SilentError(f"nothing has come for {SILENCE_S:g} s") from exc
        except (HttpError, OSError) as exc:
            raise SilentError(f"it ended in the middle: {_said(exc)}") from exc
        except NodeFormatError as exc:
            raise SilentError(f"it has a line that cannot be read: {exc}") from exc
        if asyncio.get_running_loop().time() < ends_s:
            # As a server does that shuts down, or that begins its cache anew: to all hosts at the same moment.
            raise SilentError("the server has ended it before its time")

    def _connect(self) -> Http:
        if self._http is None:
            try:
                access = find_access(self._options)
                self.url = access.url
                self._http = Http(access.url, access.tls, access.auth, f"udptun/{__version__}", access.proxy)
            except Exception as exc:  # whatever YAML, msgspec, ssl and lightkube say of a file that somebody wrote
                where = f" {self._options.kubeconfig_file}" if self._options.kubeconfig_file else ""
                raise ConfigError(
                    f"cannot reach Kubernetes: the configuration{where} is no use: {_said(exc)}; run in a pod with a "
                    "service account, or name a file with --kubeconfig-file"
                ) from exc
        return self._http

    async def _check(self, answer: Answer, text: memoryview, operation: str) -> None:
        """Raise what a refusal means."""
        status = answer.status_code
        if status < 300:
            return
        reason, message = read_failure(text)
        if status == HTTPStatus.GONE:
            raise GoneError(message or reason)
        if status == HTTPStatus.NOT_FOUND:
            raise NotFoundError(message or reason)
        if status == HTTPStatus.TOO_MANY_REQUESTS or "retry-after" in answer.headers:
            await asyncio.sleep(_pause_s(answer.headers.get("retry-after", "1")))
        raise StoreUnavailableError(
            f"cannot {operation}: the API server at {self.url} answers {status} {message or reason}".rstrip()
            + _REMEDIES.get(status, "")
        )

    def _failures(self, operation: str) -> _Failures:
        return _Failures(operation, self.url)


_REMEDIES = {
    401: "; is the token of the service account, or of the kubeconfig, still good?",
    403: "; the ClusterRole needs: nodes get, list and watch, nodes/status patch, and pods get without NODE_NAME",
}


class _Failures:
    """A context manager: what the HTTP client raises becomes StoreUnavailableError."""

    def __init__(self, operation: str, url: str) -> None:
        self._operation = operation
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, (HttpError, CredentialsError, OSError)):
            raise StoreUnavailableError(
                f"cannot {self._operation}: the API server at {self._url} does not answer: {_said(exc)}"
            ) from exc


async def _body_of(answer: Answer) -> memoryview:
    """All of the answer, in memory that goes back to the system with it.

    Of 10 MB on the heap, those of a thousand nodes, 7 MB would stay with us.
    """
    # Private: a shared mapping ends at its first size, whatever it is resized to (SIGBUS).
    text, n_bytes = mmap.mmap(-1, _BODY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
    async for chunk in answer.chunks:
        if n_bytes + len(chunk) > _LARGEST_BODY:
            raise HttpError(f"the answer has more than {_LARGEST_BODY >> 20} MiB")
        while n_bytes + len(chunk) > len(text):
            text.resize(2 * len(text))
        text[n_bytes : n_bytes + len(chunk)] = chunk
        n_bytes += len(chunk)
    return memoryview(text)[:n_bytes]


def _pause_s(retry_after: str) -> float:
    """What Retry-After asks for and a bit more by chance, so that not all come at once."""
    seconds = float(retry_after) if retry_after.isdecimal() else 1.0
    return min(seconds, _LONGEST_PAUSE_S) * random.uniform(1.0, 1.5)


def _said(exc: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(exc, ConnectionError) and exc.errno:
        # asyncio says "Connect call failed" and the address.
        return os.strerror(exc.errno)
    return " ".join(str(exc).split()) or type(exc).__name__

"""The HTTP client: lightkube's for configuration, TLS and tokens, and requests of our own on it.

lightkube's models and its own watch are left out: a node is read by node.py, and a watch has to ask for bookmarks.
"""

from __future__ import annotations

import asyncio
import importlib
import mmap
import random
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING

from udptun import __version__
from udptun.config.store_flags import KubeOptions
from udptun.core.errors import ConfigError, StoreUnavailableError
from udptun.kernel.lean_import import import_without_init
from udptun.stores.kube.node import NodeEvent, NodeFormatError, lines_of, read_event, read_failure


def _import_lean() -> None:
    """lightkube's models of every Kubernetes object would be 2 MB and 80 ms, and HTTP/2, which we do not ask for, 2 MB.

    A later import by others gets the real ones.
    """
    models = "lightkube.core.internal_models"
    stand_in = ModuleType(models)
    stand_in.__dict__["meta_v1"] = None
    without: dict[str, ModuleType | None] = {models: stand_in, "h2": None}
    ours = {name: module for name, module in without.items() if name not in sys.modules}
    sys.modules.update(ours)  # type: ignore[arg-type]  # None makes the import fail
    try:
        import_without_init("lightkube", "config.client_adapter")
        # httpx2 would do so with the first request.
        importlib.import_module("httpcore2")
    finally:
        for name in ours:
            del sys.modules[name]


_import_lean()
import httpx2  # noqa: E402
from lightkube.config import client_adapter  # noqa: E402
from lightkube.config.kubeconfig import KubeConfig, SingleConfig  # noqa: E402
from lightkube.config.models import User  # noqa: E402
from lightkube.core.exceptions import ConfigError as LightkubeError  # noqa: E402

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

ANSWER_S = 10.0
"""How long the server may take to begin with an answer, and to go on with it."""

SILENCE_S = 150.0
"""A watch without a byte for so long is opened anew.  A server that is well sends a bookmark each minute."""

WATCHES_S = (300, 600)
"""How long a watch lasts, by chance between these, seconds (client-go's minWatchTimeout).  All at once would be a
burst."""

_BODY = 1 << 20
"""So much room an answer gets at first, bytes; what is not used costs nothing."""

_LONGEST_PAUSE_S = 60.0
"""A server that asks for a longer pause (Retry-After) is asked again after so long."""


class GoneError(Exception):
    """The server no longer knows what was so long ago (410)."""


class NotFoundError(Exception):
    """There is no such object (404)."""


class SilentError(Exception):
    """A watch has ended in the middle, or nothing came for too long; the text says which."""


class Client:
    """Connects with the first call."""

    def __init__(self, options: KubeOptions) -> None:
        self._options = options
        self._client: AsyncClient | None = None
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
        client = self._connect()
        headers = {} if body is None else {"Content-Type": "application/strategic-merge-patch+json"}
        with self._failures(operation):
            async with client.stream(method, path, params=params, content=body, headers=headers) as response:
                text = await _body_of(response)
        await self._check(response, text, operation)
        return text

    @asynccontextmanager
    async def watch(
        self, params: Mapping[str, str], prefix: str
    ) -> AsyncIterator[AsyncGenerator[list[NodeEvent], None]]:
        """The events of a watch of nodes, as many at a time as come together.

        They end when the server ends the watch in order, or with SilentError.  Raises as `ask`.
        """
        client, operation = self._connect(), "watch the nodes"
        seconds = random.randint(*WATCHES_S)
        query = {
            "allowWatchBookmarks": "true",
            **params,
            # client-go says it twice.
            "timeout": f"{seconds // 60}m{seconds % 60}s",
            "timeoutSeconds": str(seconds),
            "watch": "true",
        }
        request = client.build_request(
            "GET", "/api/v1/nodes", params=query, timeout=httpx2.Timeout(ANSWER_S, read=SILENCE_S)
        )
        with self._failures(operation):
            async with asyncio.timeout(2 * ANSWER_S):
                response = await client.send(request, stream=True)
        try:
            if response.status_code != httpx2.codes.OK:
                with self._failures(operation):
                    text = await _body_of(response)
                await self._check(response, text, operation)
            yield self._events(response, prefix)
        finally:
            with suppress(httpx2.HTTPError):
                await response.aclose()

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _events(self, response: Response, prefix: str) -> AsyncGenerator[list[NodeEvent], None]:
        buffer = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                buffer += chunk
                if events := [read_event(line, prefix) for line in lines_of(buffer)]:
                    yield events
        except httpx2.ReadTimeout as exc:
            raise SilentError(f"nothing has come for {SILENCE_S:g} s") from exc
        except httpx2.TransportError as exc:
            raise SilentError(f"it ended in the middle: {_said(exc)}") from exc
        except NodeFormatError as exc:
            raise SilentError(f"it has a line that cannot be read: {exc}") from exc

    def _connect(self) -> AsyncClient:
        if self._client is None:
            try:
                config = _config(self._options)
                self.url = config.cluster.server
                parameters = client_adapter.ConnectionParams(timeout=httpx2.Timeout(ANSWER_S))
                self._client = client_adapter.AsyncClient(config, parameters)
            except Exception as exc:  # whatever YAML, msgspec, ssl and lightkube say of a file that somebody wrote
                where = f" {self._options.kubeconfig_file}" if self._options.kubeconfig_file else ""
                raise ConfigError(
                    f"cannot reach Kubernetes: the configuration{where} is no use: {_said(exc)}; run in a pod with a "
                    "service account, or name a file with --kubeconfig-file"
                ) from exc
            self._client.headers["User-Agent"] = f"udptun/{__version__}"
        return self._client

    async def _check(self, response: Response, text: memoryview, operation: str) -> None:
        """Raise what a refusal means."""
        status = response.status_code
        if status < 300:
            return
        reason, message = read_failure(text)
        if status == httpx2.codes.GONE:
            raise GoneError(message or reason)
        if status == httpx2.codes.NOT_FOUND:
            raise NotFoundError(message or reason)
        if status == httpx2.codes.TOO_MANY_REQUESTS or "Retry-After" in response.headers:
            await asyncio.sleep(_pause_s(response.headers.get("Retry-After", "1")))
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
        if isinstance(exc, (httpx2.HTTPError, LightkubeError, OSError)):
            raise StoreUnavailableError(
                f"cannot {self._operation}: the API server at {self._url} does not answer: {_said(exc)}"
            ) from exc


async def _body_of(response: Response) -> memoryview:
    """All of the answer, in memory that goes back to the system with it.

    Of 10 MB on the heap, those of a thousand nodes, 7 MB would stay with us.
    """
    # Private: a shared mapping ends at its first size, whatever it is resized to (SIGBUS).
    text, n_bytes = mmap.mmap(-1, _BODY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
    async for chunk in response.aiter_bytes():
        while n_bytes + len(chunk) > len(text):
            text.resize(2 * len(text))
        text[n_bytes : n_bytes + len(chunk)] = chunk
        n_bytes += len(chunk)
    return memoryview(text)[:n_bytes]


def _config(options: KubeOptions) -> SingleConfig:
    """As client-go finds it: the flags, else the pod's service account, else the user's own kubeconfig."""
    if options.kubeconfig_file:
        found = KubeConfig.from_file(options.kubeconfig_file).get()
    elif options.kube_api_url:
        found = KubeConfig.from_server(options.kube_api_url).get()
    else:
        found = KubeConfig.from_env().get()
    assert found is not None
    if options.kube_api_url:
        found.cluster.server = options.kube_api_url
    return found._replace(user=found.user or User())


def _pause_s(retry_after: str) -> float:
    """What Retry-After asks for and a bit more by chance, so that not all come at once."""
    seconds = float(retry_after) if retry_after.isdecimal() else 1.0
    return min(seconds, _LONGEST_PAUSE_S) * random.uniform(1.0, 1.5)


def _said(exc: BaseException) -> str:
    """What went wrong, in one line."""
    return " ".join(str(exc).split()) or type(exc).__name__

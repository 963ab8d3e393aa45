"""The TCP port of /healthz and /readyz.  The network does not depend on it, so a port that is held is waited for."""

from __future__ import annotations

import asyncio
import logging

from udptun.control.http import Routes, Server, serve
from udptun.core.errors import KernelError

RETRY_S = 1.0
"""How long to wait before the port is asked for again; seconds."""

log = logging.getLogger(__name__)


class HealthPort:
    """Serves `routes` at the address and the port from `open` to `close`, as soon as it can be had.

    For one event loop.  `problem` says why it is not served now; empty when it is.
    """

    def __init__(self, routes: Routes, ip: str, port: int) -> None:
        self.problem = ""
        self._routes = routes
        self._where = ip, port
        self._server: Server | None = None
        self._retrying: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Serve now, or else as soon as it can be."""
        if not await self._serve():
            self._retrying = asyncio.create_task(self._retry())

    def close(self) -> None:
        """Serve no longer.  It may be opened again."""
        self.problem = ""
        if self._retrying is not None:
            self._retrying.cancel()
        if self._server is not None:
            self._server.close()

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if await self._serve():
                return

    async def _serve(self) -> bool:
        try:
            self._server = await serve(self._routes, self._where)
        except KernelError as exc:
            problem = f"{exc}; it is tried again every second, and until then probes of the port fail"
            if problem != self.problem:
                log.warning("%s", problem)
            self.problem = problem
            return False
        if self.problem:
            log.info("health is served now ip=%s port=%d", *self._where)
        self.problem = ""
        return True

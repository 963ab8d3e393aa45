"""What the daemon answers over HTTP: whether it lives, whether it is ready, its status (docs/status.md) and metrics."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from udptun import __version__
from udptun.control.document import document
from udptun.control.http import Request, Response, Routes
from udptun.control.running import Running
from udptun.core.mesh import PATH as MESH_PATH
from udptun.kernel.process_usage import usage_of

if TYPE_CHECKING:
    from udptun.control.metrics.page import MetricsPage
    from udptun.control.metrics.text import Sample
    from udptun.control.trace.live import LiveTraces


class Answers:
    """The answers of one daemon, from its very start.  `running` None: it is not ready yet.

    `waiting` then says what it does and what is in its way.
    """

    def __init__(self, waiting: Callable[[], str]) -> None:
        self._waiting = waiting
        self.running: Running | None = None
        self._started_s = time.time()
        self._page: MetricsPage | None = None
        self._live: LiveTraces | None = None

    def health(self, *, with_metrics: bool) -> Routes:
        """What everybody who can reach the health port may ask.  /metrics names the peers."""
        routes: Routes = {"/healthz": self._healthz, "/readyz": self._readyz}
        return {**routes, "/metrics": self._metrics} if with_metrics else routes

    @property
    def all(self) -> Routes:
        """What this host's root may ask."""
        asked = {
            "/status": self._status,
            "/trace": self._trace,
            "/trace/live": self._trace_live,
            MESH_PATH: self._mesh,
        }
        return {**self.health(with_metrics=True), **asked}

    def _healthz(self, request: Request) -> Response:
        return Response(HTTPStatus.OK, "flanneld is running")

    def _readyz(self, request: Request) -> Response:
        if self.running is None:
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet")
        return Response(HTTPStatus.OK, "flanneld is ready")

    async def _status(self, request: Request) -> Response:
        running = self.running
        if running is None:
            return self._not_ready()
        uptime_s = time.time() - self._started_s
        # In a thread: with 65,000 peers it takes more than a second, in which the event loop would do nothing else.
        text = await asyncio.to_thread(lambda: json.dumps(document(running, uptime_s)) + "\n")
        return Response(HTTPStatus.OK, text, "application/json")

    async def _trace(self, request: Request) -> Response:
        if self.running is None:
            return self._not_ready()
        # Most daemons are never asked.
        from udptun.control.trace.page import answer_trace

        return await answer_trace(self.running, request)

    async def _trace_live(self, request: Request) -> Response:
        running = self.running
        if running is None:
            return self._not_ready()
        if self._live is None:
            from udptun.control.trace.live import LiveTraces

            self._live = LiveTraces()
        # A daemon that begins again may carry other families.
        return self._live.answer(running, request, lambda: self.running is running)

    async def _mesh(self, request: Request) -> Response:
        return self._not_ready() if self.running is None else await self.running.mesh_port.answer(request)

    def _not_ready(self) -> Response:
        return Response(HTTPStatus.SERVICE_UNAVAILABLE, f"the daemon is not ready yet: {self._waiting()}\n")

    async def _metrics(self, request: Request) -> Response:
        if self._page is None:
            # Here, because a daemon that nobody scrapes does without.
            from udptun.control.metrics.page import MetricsPage

            self._page = MetricsPage(self._samples)
        return await self._page.answer(request)

    def _samples(self) -> Iterator[Sample]:
        """Of this moment, for a thread beside the event loop."""
        from udptun.control.metrics.samples import daemon_samples, samples

        running = self.running
        usage = usage_of(os.getpid())
        yield from daemon_samples(__version__, self._started_s, usage, is_ready=running is not None)
        if running is not None:
            leases = {lease.key: lease for table in running.membership.tables for lease in list(table.peers.values())}
            peers, forwarding = list(leases.values()), running.forwarding
            liveness = Counter(map(forwarding.liveness, peers))
            shown = {lease.key for lease in forwarding.busiest(peers, running.options.metrics_peers)}
            yield from samples(document(running, time.time() - self._started_s, shown), liveness)

"""The answer to `GET /metrics`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus

from udptun.control.http import Request, Response
from udptun.control.metrics.text import Format, Sample, format_for, render

_SHARE = 0.1
"""Of a processor that making the text of one format may take, whoever asks however often: the port may face the
network."""


class MetricsPage:
    """Answers of one daemon.  `samples` gives those of the moment; it is called on a thread beside the event loop."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples
        self._making: dict[Format, asyncio.Task[str]] = {}
        """The texts on their way.  They belong to the page: a client that leaves does not end one."""
        self._turn = asyncio.Lock()
        """One text is made at a time."""
        self._made: dict[Format, tuple[str, float]] = {}
        """In each format the last text, and until when it is served again (CLOCK_MONOTONIC, seconds)."""

    async def answer(self, request: Request) -> Response:
        """In the format that the client asks for.  A text that took long to make is served for a while."""
        form = format_for(request.headers.get("accept", ""))
        text, until_s = self._made.get(form, ("", 0.0))
        if time.monotonic() >= until_s:
            if form not in self._making:
                self._making[form] = asyncio.create_task(self._make(form))
            # A client that is turned out cannot stop the thread, and others wait for the same text.
            text = await asyncio.shield(self._making[form])
        return Response(HTTPStatus.OK, text, form.content_type)

    async def _make(self, form: Format) -> str:
        try:
            async with self._turn:
                text, took_s = await asyncio.to_thread(self._render, form)
            self._made[form] = text, time.monotonic() + took_s / _SHARE
            return text
        finally:
            del self._making[form]

    def _render(self, form: Format) -> tuple[str, float]:
        """The text, and the processor time that it took, seconds."""
        began_s = time.thread_time()
        text = render(self._samples(), form)
        return text, time.thread_time() - began_s

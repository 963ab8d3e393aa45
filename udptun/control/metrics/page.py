"""The answer to `GET /metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus

from udptun.control.http import Request, Response
from udptun.control.kept_text import KeptText
from udptun.control.metrics.text import Format, Sample, format_for, render


class MetricsPage:
    """Answers of one daemon.  `samples` gives those of the moment; it is called on a thread beside the event loop."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples
        self._turn = asyncio.Lock()
        self._texts: dict[Format, KeptText] = {}

    async def answer(self, request: Request) -> Response:
        """In the format that the client asks for."""
        form = format_for(request.headers.get("accept", ""))
        if form not in self._texts:
            self._texts[form] = KeptText(lambda: render(self._samples(), form), self._turn)
        return Response(HTTPStatus.OK, await self._texts[form].get(), form.content_type)

"""A text that anybody may ask for however often, and that costs a small share of a processor all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_SHARE = 0.1
"""Of a processor that making the text may take, whoever asks however often: a port may face the network."""


class KeptText:
    """The text that `make` makes, on a thread beside the event loop.  One that took long is given again for a while.

    Of those that share `turn`, one is made at a time.
    """

    def __init__(self, make: Callable[[], str], turn: asyncio.Lock) -> None:
        self._make = make
        self._turn = turn
        self._making: asyncio.Task[str] | None = None
        """The text on its way.  It belongs to us: somebody who asked and left does not end it."""
        self._made = ""
        self._until_s = 0.0
        """Until when `_made` is given (CLOCK_MONOTONIC)."""

    async def get(self) -> str:
        if time.monotonic() < self._until_s:
            return self._made
        if self._making is None:
            self._making = asyncio.create_task(self._make_new())
        # One who leaves cannot stop the thread, and others wait for the same text.
        return await asyncio.shield(self._making)

    async def _make_new(self) -> str:
        try:
            async with self._turn:
                text, took_s = await asyncio.to_thread(self._timed)
            self._made, self._until_s = text, time.monotonic() + took_s / _SHARE
            return text
        finally:
            self._making = None

    def _timed(self) -> tuple[str, float]:
        """The text, and the processor time that it took, seconds."""
        began_s = time.thread_time()
        text = self._make()
        return text, time.thread_time() - began_s

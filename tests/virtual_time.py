"""Time that a test decides over: a clock to set, and an event loop that jumps to the next timer.

The loop does not wait for a timer: hours of a program pass in milliseconds.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from udptun.core.clock import Clock

T = TypeVar("T")


class SetClock(Clock):
    """A clock that a test can set, and whose time it can let pass."""

    def __init__(self) -> None:
        self.set_by_s = self.passed_s = 0.0

    def unix_s(self) -> float:
        return super().unix_s() + self.set_by_s + self.passed_s

    def elapsed_s(self) -> float:
        return super().elapsed_s() + self.passed_s


class StoppedClock(SetClock):
    """Time passes when a test lets it, and not while the machine is busy."""

    def elapsed_s(self) -> float:
        return self.passed_s


class _NoWaiting(selectors.BaseSelector):
    """Waits for nothing: the time that it is asked to wait has passed when it answers."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if not ready:
            assert timeout is not None, "everything waits, and nothing will ever happen"
            self.now_s += max(timeout, 0.0)
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run; the loop's clock starts at 0.  For code that waits for timers and other tasks alone."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)

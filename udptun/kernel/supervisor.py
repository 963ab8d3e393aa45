"""Tasks that shall never end: one that ends by a mistake is run again, and the daemon lives.

A WatchLoop does the same for each of its looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from udptun.core.errors import UdptunError

log = logging.getLogger(__name__)

PAUSE_S = (1.0, 60.0)
"""First and longest pause before a task is run again; each is twice the one before."""

CALM_S = 60.0
"""A task that has run for so long is well again: it has no problem, and its next pause is the first."""


class Supervisor:
    """Keeps tasks running, and says what is wrong with them.  For one event loop."""

    def __init__(self) -> None:
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each task that has failed lately.  May be read on another thread."""
        return tuple(self._problems.copy().values())

    async def keep(self, subject: str, run: Callable[[], Awaitable[None]]) -> None:
        """Await `run()`, and again after each exception, until it returns or we are cancelled.

        `subject` names the task in log lines.  `run` begins anew each time, whatever state it was left in.
        """
        clock = asyncio.get_running_loop().time
        pause_s = PAUSE_S[0]
        while True:
            began_s = clock()
            calm = asyncio.get_running_loop().call_later(CALM_S, self._recover, subject)
            try:
                await run()
                self._problems.pop(subject, None)
                return
            except Exception as exc:
                self._note(subject, first_failure(exc))
            finally:
                calm.cancel()
            if clock() - began_s >= CALM_S:
                pause_s = PAUSE_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])

    def _note(self, subject: str, exc: BaseException) -> None:
        what = str(exc) if isinstance(exc, UdptunError) else f"unexpected {type(exc).__name__}: {exc}"
        problem = f"{subject}: {what}; it is tried again, the log has more"
        if self._problems.get(subject) != problem:
            log.error("task failed, running it again subject=%r error=%r", subject, what, exc_info=exc)
        self._problems[subject] = problem

    def _recover(self, subject: str) -> None:
        if self._problems.pop(subject, None):
            log.info("task runs again subject=%r", subject)


def first_failure(exc: BaseException) -> BaseException:
    """The first failure of a task group, groups within it opened; the exception itself when it is no group."""
    return first_failure(exc.exceptions[0]) if isinstance(exc, BaseExceptionGroup) else exc

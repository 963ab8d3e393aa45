"""One loop for everything that is watched and set right: kernel state, firewall rules, the underlay.

    a notice, or the timer -> wait until it is quiet -> look, and act on what is found -> wait again

A look that fails is tried again soon, and each further time later.  A look that raises is logged once and tried again
in the same way: a mistake in one look does not end the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from udptun.core.errors import UdptunError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """When a WatchLoop looks.  All times are in seconds."""

    settle_s: float
    """A look waits until no notice has come for so long, because one change brings several notices."""
    max_settle_s: float
    """A look waits no longer than this after the first notice."""
    storm_s: float
    """Looks closer together than this are a storm; each of them doubles the settle time, up to its maximum."""
    period_s: float
    """Look this often without any notice, because not every change brings one."""
    retry_s: float
    """Wait after a failed look; doubled with each further one, up to the period.  A failed source waits as long."""


class WatchLoop:
    """Calls `look` at the start, after notices and by a timer, for as long as `run` runs.

    For one event loop.  Two looks never run at the same time.
    """

    def __init__(
        self,
        subject: str,
        notices: Callable[[], AsyncGenerator[object, None]],
        look: Callable[[], Awaitable[bool]],
        pace: Pace,
    ) -> None:
        """`subject` names in log lines what is looked at.

        Every item of `notices` asks for a look, whatever the item is; the first look answers what comes at once.  A
        generator that raises or ends is replaced by a new one, and the timer goes on meanwhile.  `look` returns whether
        all is well; if not, it is called again soon.
        """
        self._subject = subject
        self._notices = notices
        self._look = look
        self._pace = pace
        self._wake = asyncio.Event()
        self.problem = ""
        """Says what the latest look raised; empty when it raised nothing."""

    def wake(self) -> None:
        """Look soon, as after a notice."""
        self._wake.set()

    async def run(self) -> None:
        """Look now and whenever it is due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(), name=f"notices: {self._subject}")
            await self._keep_looking()

    async def _keep_looking(self) -> None:
        clock = asyncio.get_running_loop().time
        pace = self._pace
        settle_s, retry_s = pace.settle_s, pace.retry_s
        # The notices are opened first.  Each of our sources then says that it has not seen earlier changes.
        await asyncio.sleep(0)
        while True:
            self._wake.clear()
            if await self._look_once():
                wait_s, retry_s = pace.period_s, pace.retry_s
            else:
                wait_s, retry_s = retry_s, min(2 * retry_s, pace.period_s)
            looked_s = clock()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            is_storm = clock() - looked_s < pace.storm_s
            settle_s = min(2 * settle_s, pace.max_settle_s) if is_storm else pace.settle_s
            await self._wait_until_quiet(settle_s)

    async def _wait_until_quiet(self, settle_s: float) -> None:
        clock = asyncio.get_running_loop().time
        latest_s = clock() + self._pace.max_settle_s
        while clock() < latest_s:
            self._wake.clear()
            try:
                async with asyncio.timeout_at(min(clock() + settle_s, latest_s)):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _look_once(self) -> bool:
        try:
            is_well = await self._look()
        except Exception as exc:
            problem = f"{self._subject}: unexpected {type(exc).__name__}: {exc}; it is tried again, the log has more"
            if problem != self.problem:
                log.exception("unexpected error, trying again subject=%r", self._subject)
            self.problem = problem
            return False
        if self.problem:
            log.info("no error any more subject=%r", self._subject)
        self.problem = ""
        return is_well

    async def _listen(self) -> None:
        known = ""
        while True:
            try:
                async with aclosing(self._notices()) as notices:
                    async for _notice in notices:
                        known = ""
                        self._wake.set()
            except Exception as exc:
                if repr(exc) != known:
                    log.warning(
                        "no notices, looking by the timer alone subject=%r period_s=%g error=%s",
                        self._subject,
                        self._pace.period_s,
                        exc,
                        exc_info=None if isinstance(exc, UdptunError) else exc,
                    )
                known = repr(exc)
            await asyncio.sleep(self._pace.retry_s)

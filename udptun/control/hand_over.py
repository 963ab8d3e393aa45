"""One daemon takes over from another of the same run directory, as the container of a rollout does (--take-over).

    the new one  asks on the status socket ........ takes the lock, starts, adopts the datapath -> ready
    the old one  undoes what it did, as at its end, and is in reserve: it serves again when nobody has the lock

Who has the lock of the run directory serves.  Nothing else is agreed upon, so each of the two may end at any moment,
in any way.  The datapath carries packets all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from udptun.control.http import Request, Response, Routes
from udptun.control.run_dir import RunDirInUseError, lock_run_dir
from udptun.core.daemon_socket import SOCKET_NAME

PATH = "/hand-over"

_LOCK_RETRY_S = 0.02
_ASK_AGAIN_S = 2.0
_ANSWER_S = 1.0
"""How long the other daemon may take to answer; seconds."""
_GIVE_WAY_S = 1.0
"""For so long after it has stepped back a daemon leaves the lock to the one that has asked for it; seconds."""
_RESERVE_S = 0.1
"""How often a daemon in reserve tries to get the lock; seconds."""

log = logging.getLogger(__name__)


class HandOver:
    """The turns of one daemon: it serves, is in reserve, serves again."""

    def __init__(self, run_dir: Path, step_back: Callable[[], None], *, take_over: bool) -> None:
        """`step_back` is called when another daemon asks for it, after the answer is sent.  It ends the turn.

        With `take_over` this one asks the daemon that it finds; without, it gives up.
        """
        self.is_in_reserve = False
        self.goes_on = False
        """Whether this turn goes on where the one before has ended: no other daemon has been ready in between."""
        self._run_dir = run_dir
        self._step_back = step_back
        self._take_over = take_over

    @property
    def routes(self) -> Routes:
        return {f"POST {PATH}": self._hand_over}

    async def lock(self) -> int:
        """Begin a turn.  The descriptor returned holds the lock of the run directory; the caller owns it.

        Raises what `lock_run_dir` does: with `take_over`, too, when the daemon that has it knows of no hand-over.
        """
        if self.is_in_reserve:
            return await self._lock_again()
        self.goes_on = False
        loop = asyncio.get_running_loop()
        ask_at_s, said = loop.time(), ""
        while True:
            try:
                return lock_run_dir(self._run_dir)
            except RunDirInUseError as exc:
                if not self._take_over:
                    raise
                in_use = exc
            if loop.time() >= ask_at_s:
                status = await _ask(self._run_dir, "POST", PATH)
                if status not in (None, HTTPStatus.ACCEPTED):
                    raise in_use
                who = str(in_use).partition(";")[0]
                line = f"taking over: {who}" if status else f"not taking over yet, no answer, asking again: {who}"
                if line != said:
                    log.log(logging.INFO if status else logging.WARNING, "%s", line)
                said = line
                ask_at_s = loop.time() + _ASK_AGAIN_S
            await asyncio.sleep(_LOCK_RETRY_S)

    async def _lock_again(self) -> int:
        """Be in reserve until no other daemon has the lock."""
        log.info("stepped back for another daemon, in reserve until that one ends or this one is stopped")
        self.goes_on = True
        loop = asyncio.get_running_loop()
        give_way_until_s = loop.time() + _GIVE_WAY_S
        while True:
            if self.goes_on:
                status = await _ask(self._run_dir, "GET", "/readyz")
                self.goes_on = status != HTTPStatus.OK
                if status is not None:
                    # It has got the lock.
                    give_way_until_s = loop.time()
            if loop.time() >= give_way_until_s:
                with contextlib.suppress(RunDirInUseError):
                    lock_fd = lock_run_dir(self._run_dir)
                    log.warning("the other daemon has ended%s, serving again", " before it was ready" * self.goes_on)
                    self.is_in_reserve = False
                    return lock_fd
            await asyncio.sleep(_RESERVE_S)

    def _hand_over(self, request: Request) -> Response:
        if not self.is_in_reserve:
            self.is_in_reserve = True
            # The answer is sent before the event loop comes to this.
            asyncio.get_running_loop().call_soon(self._step_back)
        return Response(HTTPStatus.ACCEPTED, "stepping back\n")


async def _ask(run_dir: Path, method: str, path: str) -> int | None:
    """The status with which the daemon that listens in `run_dir` answers; None when it does not."""
    with contextlib.suppress(OSError, ValueError):  # TimeoutError is an OSError
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(run_dir / SOCKET_NAME)
            try:
                writer.write(f"{method} {path} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
                words = (await reader.readline()).split()
            finally:
                writer.close()
        return int(words[1]) if len(words) > 1 else None
    return None

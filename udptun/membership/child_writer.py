"""Write files by a child process.

Who writes to a file system that hangs (frozen, or of a server that is away) is held there, and no signal ends it, not
even SIGKILL.  A thread of ours would keep the whole daemon from ending.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from udptun.core import atomic_file

LIMIT_S = 60.0
"""A write that takes longer is taken to hang.  fsync takes seconds on a slow card."""


class ChildWriter:
    """One write at a time, each by a process of its own (10 ms of processor time).  For one event loop.

    No further one is started while one hangs.  Whoever is cancelled leaves its process behind, killed.
    """

    def __init__(self) -> None:
        self._latest: asyncio.subprocess.Process | None = None
        self._limit_s = LIMIT_S
        self._limit: asyncio.Timeout | None = None
        """That of the write that goes on."""

    def hurry(self, limit_s: float) -> None:
        """From now on a write may take so long; one that goes on, too."""
        self._limit_s = limit_s
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + limit_s)

    async def replace(self, path: Path, text: str) -> None:
        """As `atomic_file.replace`.  Raises OSError; ETIMEDOUT when the file system does not answer."""
        await self._run("replace", path, text)

    async def delete(self, path: Path) -> None:
        """Delete the file if it is there.  Raises OSError as `replace` does."""
        await self._run("delete", path, "")

    async def _run(self, action: str, path: Path, text: str) -> None:
        if self._latest is not None and self._latest.returncode is None:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        nowhere = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", atomic_file.__file__, action, str(path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=nowhere,
            stderr=nowhere,
            # ^C on a terminal is for the daemon.
            start_new_session=True,
        )
        self._latest = process
        try:
            async with asyncio.timeout(self._limit_s) as self._limit:
                await process.communicate(text.encode())
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        finally:
            self._limit = None
            # Not awaited, as it may take for ever.  Not by `process.kill`: see firewall/tool.py.
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        if code := process.returncode:
            code = code if code > 0 else errno.EIO
            raise OSError(code, os.strerror(code))

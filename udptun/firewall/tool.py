"""Run the system's firewall tools, with a limit to the time that each may take."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from udptun.core.errors import FirewallError

_LIMIT_S = 30.0
"""A tool that takes longer is taken to hang.  On busy hosts iptables waits for its lock (-w) for seconds."""
_NOT_IN_KERNEL = ("do you need to insmod", "Protocol not supported")
"""What legacy iptables, and the tools on nf_tables, say on a kernel without what they need."""


class AbsentError(FirewallError):
    """The tool is not installed, or the kernel has nothing for it to work on: there are no rules of that kind."""


class TimedOutError(FirewallError):
    """The tool hung, perhaps because another program held its lock.  The next try may succeed."""


class UnreadableError(FirewallError):
    """There is a table, and the tool cannot say what is in it."""


async def run(command: str, *arguments: str, script: str = "") -> str:
    """What `command` prints when `script` is its input.

    Raises FirewallError unless it ends with status 0; AbsentError and TimedOutError where they fit.
    """
    attempt = " ".join([command, *arguments])
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    )
    try:
        # Shielded, because asyncio would kill a half-started process with `process.kill`.  See `_end`.
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(OSError):
            await _end(await starting)
        raise
    except FileNotFoundError:
        raise AbsentError(f"`{attempt}`: {command} is not installed (or not in PATH)") from None
    except OSError as exc:
        raise FirewallError(f"`{attempt}`: {exc.strerror}") from exc
    try:
        async with asyncio.timeout(_LIMIT_S):
            out, err = await process.communicate(script.encode())
    except TimeoutError:
        raise TimedOutError(f"`{attempt}` has not ended after {_LIMIT_S:.0f} s and was killed") from None
    finally:
        await _end(process)
    if process.returncode:
        said = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
        reason = " / ".join(said[:3]) or "no reason given"
        is_absent = any(words in reason for words in _NOT_IN_KERNEL)
        error = AbsentError if is_absent else FirewallError
        raise error(f"`{attempt}` ended with status {process.returncode}: {reason}")
    return out.decode(errors="replace")


def is_installed(command: str) -> bool:
    """Whether `command` is in PATH.  As shutil.which, which would bring four compression libraries."""
    return any(os.access(Path(directory, command), os.X_OK) for directory in os.get_exec_path())


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process if it still runs.

    `process.kill` is not used: it first looks whether the process has ended, and so takes the exit status away from the
    asyncio thread that waits for it.  That thread then warns in the log.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()

"""Tools that are interrupted: nothing is left of them, and nothing is said about it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from udptun.core.errors import FirewallError
from udptun.firewall import tool


def test_a_tool_that_is_interrupted_at_any_moment_is_gone_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's own kill looks whether the process has ended, and the thread that waits for it then warned."""

    async def interrupt(after_s: float) -> None:
        running = asyncio.create_task(tool.run("true"))
        await asyncio.sleep(after_s)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    async def interrupt_often() -> None:
        for n in range(200):
            await interrupt(n * 20e-6)

    asyncio.run(interrupt_often())
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_a_tool_that_hangs_is_killed_when_its_caller_is_told_to_end() -> None:
    async def run() -> float:
        running = asyncio.create_task(tool.run("sleep", "60"))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return time.monotonic() - start

    assert asyncio.run(run()) < 5


def test_a_tool_that_is_missing_is_named() -> None:
    with pytest.raises(FirewallError, match="`no-such-tool -L`: no-such-tool is not installed"):
        asyncio.run(tool.run("no-such-tool", "-L"))

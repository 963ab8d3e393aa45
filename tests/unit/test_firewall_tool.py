"""Tools that are interrupted, that hang, that are missing, and that print what nobody can read."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from udptun.core.errors import FirewallError
from udptun.firewall import tool
from udptun.firewall.nft import NftRules
from udptun.firewall.rules import DesiredRules


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


async def test_a_table_that_nft_cannot_list_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nft 1.0.6 broke off at the flags of a dormant table: the rules then stayed as they were until the timer."""

    async def broken_off(*_argv: str, script: str = "") -> str:
        return '{"nftables": [{"metainfo": {}}, {"table": {"family": "ip", "name": "flannel-ipv4", "flags": \n'

    monkeypatch.setattr(tool, "run", broken_off)
    repair = await NftRules(DesiredRules(masquerade=(), forward=())).compare()
    assert repair.findings == ("unreadable table ip flannel-ipv4",)
    assert repair.script == "add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n"
    assert not repair.is_new

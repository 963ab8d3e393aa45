"""Tools that are interrupted or print nonsense."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from ipaddress import IPv4Network

import pytest

from udptun.core.errors import FirewallError
from udptun.firewall import tool
from udptun.firewall.nft import NftRules
from udptun.firewall.nft_form import nft_removal
from udptun.firewall.rules import DesiredRules, forward


async def test_a_tool_that_is_interrupted_at_any_moment_is_gone_without_a_word(
    caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio's own kill looks whether the process has ended, and the thread that waits for it then warned."""

    async def interrupt(after_s: float) -> None:
        running = asyncio.create_task(tool.run("true"))
        await asyncio.sleep(after_s)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    for n in range(200):
        await interrupt(n * 20e-6)
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


def test_our_table_that_nft_cannot_print_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nft 1.0.6 prints broken JSON for a dormant table.  Nothing was repaired then, until it was deleted by hand."""

    async def print_half(*_command: str) -> str:
        return '{"nftables": [{"table": {"family": "ip", "name": "flannel-ipv4", "handle": 1, "flags": '

    monkeypatch.setattr(tool, "run", print_half)
    network = IPv4Network("10.244.0.0/16")
    repair = asyncio.run(NftRules(DesiredRules(forward=forward(network)), [network]).compare())
    assert repair.findings == ("unreadable table ip flannel-ipv4",)
    assert repair.script.startswith(nft_removal("ip", "flannel-ipv4"))
    assert "chain forward {" in repair.script
    assert not repair.is_new
    assert asyncio.run(NftRules(DesiredRules(), [network]).compare()).script == nft_removal("ip", "flannel-ipv4")

"""sd_notify: one datagram, as systemd reads it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from udptun.control import notify


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_notify_sends_the_state_in_one_datagram(tmp_path: Path, abstract: bool) -> None:
    address = f"@udptun-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind("\0" + address[1:] if abstract else address)
        notify.notify(address, notify.READY)
        assert manager.recv(100) == b"READY=1"
        notify.notify(address, notify.STOPPING)
        assert manager.recv(100) == b"STOPPING=1"


def test_notify_does_nothing_when_there_is_no_service_manager() -> None:
    notify.notify("", notify.READY)  # would raise: "" is no address


def test_notify_raises_when_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        notify.notify(str(tmp_path / "nobody"), notify.READY)


def test_reloading_carries_the_monotonic_time_in_microseconds() -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = notify.reloading().split("\n")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= after


def test_notify_does_not_wait_for_a_manager_that_does_not_read(tmp_path: Path) -> None:
    address = tmp_path / "notify"

    def keep_telling() -> None:
        for _ in range(10_000):
            notify.notify(str(address), notify.READY)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        with pytest.raises(BlockingIOError):
            keep_telling()


def test_patience_is_kept_while_the_managers_queue_is_full(tmp_path: Path) -> None:
    """READY was lost when it came right behind more descriptors than the queue holds, and systemd ended the daemon."""
    address = tmp_path / "notify"

    async def tell(manager: socket.socket) -> None:
        with suppress(BlockingIOError):
            while True:
                notify.notify(str(address), "FDSTORE=1")
        telling = asyncio.create_task(notify.patiently(partial(notify.notify, str(address), notify.READY)))
        await asyncio.sleep(0.05)
        assert not telling.done()
        while manager.recv(100) != b"READY=1":
            await asyncio.sleep(0.001)
        await telling

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(str(address))
        asyncio.run(tell(manager))

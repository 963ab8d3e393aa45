"""A network namespace for one test, driven with `ip`; code under test runs in a thread that has entered it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()

requires_netns = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)
KERNEL = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
HAS_TCX = KERNEL >= (6, 6)


class Namespace:
    def __init__(self, name: str) -> None:
        self.name = name

    def ip(self, command: str) -> None:
        """Run `ip <command>` inside."""
        argv = ["ip", "-n", self.name, *command.split()]
        print("+", *argv)
        subprocess.run(argv, check=True, timeout=30)

    def add_ipv6(self, address: str, device: str) -> None:
        """Add `address`, ADDRESS/LENGTH, to a device that is up, and wait until packets to it are ours.

        A thread of the kernel adds the route for that: often later than `ip` ends, and much later on a busy machine.
        """
        self.ip(f"-6 address add {address} dev {device} nodad")
        ours = address.partition("/")[0]
        seconds_until(lambda: ours in {it["dst"] for it in self.show("-6 route show table local type local")}, 30)

    def make_slow_to_delete(self, device: str) -> None:
        """Give a device so many addresses that the kernel takes some ten milliseconds from the begin to the end.

        On a busy machine that takes it a second without them: it waits for every processor (synchronize_net).
        """
        addresses = [f"10.8.{high}.{low}/32" for high in range(20) for low in range(250)]
        argv = ["ip", "-n", self.name, "-batch", "-"]
        text = "\n".join(f"address add {it} dev {device}" for it in addresses)
        subprocess.run(argv, input=text, text=True, check=True, timeout=60)

    def show(self, command: str) -> list[dict[str, Any]]:
        """What `ip -j <command>` answers; nothing when it fails, as for a device that is not there."""
        argv = ["ip", "-j", "-d", "-n", self.name, *command.split()]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        return [entry for entry in json.loads(result.stdout or "[]") if entry] if result.returncode == 0 else []

    def enter(self) -> None:
        """Move the calling thread in."""
        with Path(f"/run/netns/{self.name}").open() as file:
            if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` inside, in a thread of its own; its exception is raised here."""
        outcome: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                self.enter()
                outcome.append(function())
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return outcome[0]

    def call_async(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self.call(lambda: asyncio.run(function()))

    @contextlib.contextmanager
    def background(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[asyncio.AbstractEventLoop]:
        """Run a coroutine inside while the block runs, then cancel it.  An error of its own is raised here."""
        ready = threading.Event()
        state: dict[str, Any] = {}

        async def main() -> None:
            state["loop"] = asyncio.get_running_loop()
            state["task"] = asyncio.create_task(function())
            ready.set()
            with contextlib.suppress(asyncio.CancelledError):
                await state["task"]

        def body() -> None:
            self.enter()
            try:
                asyncio.run(main())
            except BaseException as exc:
                state["error"] = exc

        thread = threading.Thread(target=body)
        thread.start()
        assert ready.wait(10)
        try:
            yield state["loop"]
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                state["loop"].call_soon_threadsafe(state["task"].cancel)
            thread.join()
        if "error" in state:
            raise state["error"]


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A fresh namespace with lo up; gone afterwards."""
    name = f"utn-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        ns = Namespace(name)
        ns.ip("link set lo up")
        yield ns
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)


@contextlib.contextmanager
def linked_namespace() -> Iterator[Namespace]:
    """As `namespace`, with a pair of links: v0 (192.0.2.1/24, up) -- v1 (up)."""
    with namespace() as ns:
        ns.ip("link add v0 type veth peer name v1")
        ns.ip("link set v0 up")
        ns.ip("link set v1 up")
        ns.ip("address add 192.0.2.1/24 dev v0")
        yield ns


def seconds_until(condition: Callable[[], object], limit_s: float) -> float:
    """Wait for `condition`; how long it took.  Fails after `limit_s`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"not so after {limit_s} s"
        time.sleep(0.005)
    return time.monotonic() - start


def open_fds() -> int:
    """How many descriptors this process has, the one that reads the directory included."""
    # Those of an earlier test that are in a cycle go whenever the collector runs.
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))

"""When the underlay watch moves, and what it does about a move that fails.  Fake kernel, a clock that jumps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
import virtual_time

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.kernel import underlay_watch
from udptun.kernel.notices import Notice, NoticeKind
from udptun.kernel.underlay import Underlay, UnderlayOptions
from udptun.kernel.underlay_watch import UnderlayWatch

OLD = Underlay("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1"))
NEW = replace(OLD, address=IPv4Address("192.0.2.9"), public_ip=IPv4Address("192.0.2.9"))


class Host:
    """`present` is what the kernel would say, `refusal` what a move meets; `moves` are the times of the attempts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, current: Underlay = OLD) -> None:
        self.present = current
        self.refusal: Exception | None = None
        self.moves: list[float] = []
        self.notices: asyncio.Queue[NoticeKind] = asyncio.Queue()
        self.watch = UnderlayWatch(UnderlayOptions(), current, self.move, lambda: ())

        async def present(_watch: UnderlayWatch) -> Underlay:
            return self.present

        monkeypatch.setattr(UnderlayWatch, "_present", present)
        monkeypatch.setattr(underlay_watch, "watch", self.listen)

    async def listen(self, *families: Family) -> AsyncGenerator[frozenset[Notice], None]:
        while True:
            yield frozenset({Notice(await self.notices.get())})

    async def move(self, _present: Underlay) -> None:
        self.moves.append(round(asyncio.get_running_loop().time(), 3))
        if self.refusal is not None:
            raise self.refusal

    async def change(self, after_s: float, present: Underlay, refusal: Exception | None, *kinds: NoticeKind) -> None:
        await asyncio.sleep(after_s)
        self.present, self.refusal = present, refusal
        for kind in kinds:
            self.notices.put_nowait(kind)

    async def run_for(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.watch.run()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_it_moves_once_after_the_notice_of_another_address(host: Host) -> None:
    async def main() -> None:
        await asyncio.gather(host.run_for(100), host.change(10, NEW, None, NoticeKind.ADDRESS))

    virtual_time.run(main())
    assert host.moves == [10.05]
    assert host.watch.problem == ""


def test_a_move_that_failed_is_tried_again_by_a_timer(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger had the port on the new address and let go of it: without another notice the host stayed cut off."""
    taken = KernelError("cannot bind to 192.0.2.9:8285", 98)

    async def main() -> str:
        await asyncio.gather(host.run_for(15), host.change(10, NEW, taken, NoticeKind.ADDRESS))
        problem = host.watch.problem
        host.refusal = None
        await host.run_for(100)
        return problem

    problem = virtual_time.run(main())
    assert problem == "cannot bind to 192.0.2.9:8285: EADDRINUSE"
    assert host.moves == [10.05, 11.05, 13.05, 15]
    assert host.watch.problem == ""
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1


def test_a_change_that_brought_no_notice_is_found_by_the_timer(host: Host) -> None:
    async def main() -> None:
        await asyncio.gather(host.run_for(100), host.change(10, NEW, None))

    virtual_time.run(main())
    assert host.moves == [30]


def test_routes_matter_only_while_an_interface_is_looked_for(host: Host) -> None:
    async def main() -> None:
        await asyncio.gather(host.run_for(29), host.change(10, NEW, None, NoticeKind.ROUTE))
        assert host.moves == []
        host.refusal = KernelError("cannot bind", 98)
        await asyncio.gather(host.run_for(3), host.change(2.5, NEW, None, NoticeKind.ROUTE))

    virtual_time.run(main())
    assert host.moves == [29, 30, 31.55]


def test_routes_matter_all_the_time_where_they_have_chosen_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = replace(OLD, address_link="lo", is_routed=True)
    host = Host(monkeypatch, routed)
    other_way = replace(routed, link_name="eth1", link_index=3)

    async def main() -> None:
        await asyncio.gather(host.run_for(29), host.change(10, other_way, None, NoticeKind.ROUTE))

    virtual_time.run(main())
    assert host.moves == [10.05]


def test_a_move_that_raises_what_nobody_expects_is_a_problem_and_tried_again(host: Host) -> None:
    async def main() -> str:
        host.present, host.refusal = NEW, LookupError("a mistake of ours")
        await host.run_for(2)
        problem = host.watch.problem
        host.refusal = None
        await host.run_for(1)
        return problem

    assert "unexpected LookupError: a mistake of ours" in virtual_time.run(main())
    assert (host.watch.problem, host.moves) == ("", [0, 1, 2])

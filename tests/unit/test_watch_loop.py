"""When the shared loop looks: fake notices, and a clock that jumps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import pytest
import virtual_time

from udptun.core.errors import KernelError
from udptun.kernel.watch_loop import Pace, WatchLoop

PACE = Pace(settle_s=0.02, max_settle_s=0.15, storm_s=1.0, period_s=30.0, retry_s=1.0)


class Watched:
    """A loop over a source and a look that the test decides; `looks` are the times of the looks."""

    def __init__(self, notices: Sequence[float] = (), pace: Pace = PACE) -> None:
        """`notices` are the times at which the source says something."""
        self.at = notices
        self.looks: list[float] = []
        self.opened: list[float] = []
        self.outcome: Callable[[], bool] = lambda: True
        self.took_s = 0.0
        self.source_error: Exception | None = None
        self.loop = WatchLoop("the thing", self.notices, self.look, pace)

    @property
    def now(self) -> float:
        return round(asyncio.get_running_loop().time(), 3)

    async def notices(self) -> AsyncGenerator[float, None]:
        self.opened.append(self.now)
        if self.source_error is not None:
            raise self.source_error
        for at in self.at:
            wait_s = at - self.now
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if wait_s >= 0:
                yield at
        await asyncio.sleep(1e6)

    async def look(self) -> bool:
        self.looks.append(self.now)
        await asyncio.sleep(self.took_s)
        return self.outcome()

    async def run_for(self, seconds: float) -> list[float]:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.loop.run()
        return self.looks


def looks(watched: Watched, seconds: float) -> list[float]:
    return virtual_time.run(watched.run_for(seconds))


def test_it_looks_at_once_and_then_by_the_timer() -> None:
    assert looks(Watched(), 100) == [0, 30, 60, 90]


def test_what_a_source_says_once_it_is_open_is_answered_by_the_first_look() -> None:
    """Each start looked twice at everything, the firewall's rules with three programs a look."""
    assert looks(Watched([0.0, 10.0]), 20) == [0, 10.02]


def test_a_notice_brings_a_look_when_it_is_quiet_again() -> None:
    """Three notices of one change are one look, and the timer begins anew with it."""
    assert looks(Watched([10.0, 10.01, 10.025]), 60) == [0, 10.045, 40.045]


def test_notices_that_do_not_stop_cannot_put_a_look_off_for_ever() -> None:
    steady = [10 + n / 100 for n in range(30)]
    assert looks(Watched(steady), 11)[1] == 10.15


def test_looks_in_a_storm_are_ever_further_apart_up_to_a_bound() -> None:
    """A notice 30 ms after each look: the settle time is 20, 40, 80 and then 150 ms."""
    watched = Watched()

    async def follow_each_look() -> AsyncGenerator[None, None]:
        while not watched.looks:
            await asyncio.sleep(0.001)
        for _ in range(6):
            n = len(watched.looks)
            await asyncio.sleep(10 if n == 1 else 0.03)
            yield None
            while len(watched.looks) == n:
                await asyncio.sleep(0.001)
        await asyncio.sleep(1e6)

    watched.notices = follow_each_look  # type: ignore[method-assign]  # another source
    watched.loop = WatchLoop("the thing", watched.notices, watched.look, PACE)
    found = looks(watched, 12)
    gaps = [later - earlier - 0.03 for earlier, later in pairwise(found[1:])]
    assert gaps == pytest.approx([0.04, 0.08, 0.15, 0.15, 0.15], abs=0.003)


def test_without_a_storm_time_every_change_settles_equally_long() -> None:
    pace = Pace(settle_s=0.3, max_settle_s=0.7, storm_s=0.0, period_s=5.0, retry_s=5.0)
    assert looks(Watched([1.0, 2.0, 3.0], pace), 5) == [0, 1.3, 2.3, 3.3]


def test_a_notice_during_a_look_brings_another_one() -> None:
    """What changed behind the look's back is not seen by it."""
    watched = Watched([5.0, 5.5])
    watched.took_s = 1.0
    assert looks(watched, 20) == [0, 5.02, 6.06]


def test_waking_it_is_as_good_as_a_notice() -> None:
    watched = Watched()

    async def main() -> list[float]:
        asyncio.get_running_loop().call_later(10, watched.loop.wake)
        return await watched.run_for(20)

    assert virtual_time.run(main()) == [0, 10.02]


def test_a_failed_look_is_tried_again_ever_later_and_never_later_than_the_period() -> None:
    """A move to a new underlay address that failed was never tried again: that loop had no timer."""
    watched = Watched()
    watched.outcome = lambda: False
    assert looks(watched, 125) == [0, 1, 3, 7, 15, 31, 61, 91, 121]


def test_after_a_success_the_next_failure_is_tried_again_soon() -> None:
    watched = Watched()
    watched.outcome = lambda: watched.now in (7, 37) or watched.now > 40
    assert looks(watched, 50) == [0, 1, 3, 7, 37]
    watched = Watched()
    watched.outcome = lambda: watched.now in (3, 34)
    assert looks(watched, 40) == [0, 1, 3, 33, 34]


def test_a_notice_cuts_the_wait_after_a_failure_short() -> None:
    watched = Watched([8.0])
    watched.outcome = lambda: watched.now > 8
    assert looks(watched, 20) == [0, 1, 3, 7, 8.02]


def test_an_unexpected_error_is_logged_once_tried_again_and_a_problem_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ended the daemon."""
    problems = []
    watched = Watched()

    def fail_thrice() -> bool:
        problems.append(watched.loop.problem)
        if len(watched.looks) <= 3:
            raise LookupError("no such thing")
        return True

    watched.outcome = fail_thrice
    with caplog.at_level(logging.INFO, logger="udptun.kernel.watch_loop"):
        assert looks(watched, 40) == [0, 1, 3, 7, 37]
    said = "the thing: unexpected LookupError: no such thing; it is tried again, the log has more"
    assert problems == ["", said, said, said, ""]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
    assert "no error any more" in caplog.text


def test_another_unexpected_error_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()

    def fail() -> bool:
        raise LookupError(len(watched.looks) // 3)

    watched.outcome = fail
    looks(watched, 40)
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 3


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(KernelError("cannot listen", 24), False), (LookupError("of the decoder"), True)]
)
def test_a_source_that_fails_is_opened_anew_and_the_timer_goes_on(
    error: Exception, has_traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched([70.0])
    watched.source_error = error

    async def main() -> list[float]:
        asyncio.get_running_loop().call_later(62, lambda: setattr(watched, "source_error", None))
        return await watched.run_for(80)

    assert virtual_time.run(main()) == [0, 30, 60, 70.02]
    assert watched.opened == list(range(63)), "once a second until it works"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no notices, looking by the timer alone subject='the thing' period_s=30" in warning.getMessage()
    assert bool(warning.exc_info) == has_traceback


def test_a_source_that_ends_is_opened_anew() -> None:
    watched = Watched()

    async def one() -> AsyncGenerator[None, None]:
        watched.opened.append(watched.now)
        yield None

    watched.loop = WatchLoop("the thing", one, watched.look, PACE)
    looks(watched, 3.5)
    assert watched.opened == [0, 1, 2, 3]


def test_cancelling_it_ends_look_and_source() -> None:
    watched = Watched()
    closed = []

    async def source() -> AsyncGenerator[None, None]:
        try:
            await asyncio.sleep(1e6)
            yield None
        finally:
            closed.append(True)

    watched.loop = WatchLoop("the thing", source, watched.look, PACE)
    watched.took_s = 1e5

    async def main() -> None:
        task = asyncio.create_task(watched.loop.run())
        await asyncio.sleep(10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    virtual_time.run(main())
    assert closed == [True]

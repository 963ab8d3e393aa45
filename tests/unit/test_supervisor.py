"""Tasks that are run again: a clock that jumps, and failures that the test decides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest
import virtual_time

from udptun.core.errors import KernelError, UdptunError
from udptun.kernel.supervisor import Supervisor


async def keep_for(
    supervisor: Supervisor, seconds: float, failures: Iterator[Exception | None], took_s: float
) -> list[float]:
    """When the task began, each time."""
    began: list[float] = []

    async def run() -> None:
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(took_s)
        if failure := next(failures):
            raise failure

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await supervisor.keep("the task", run)
    return began


def always(failure: Exception) -> Iterator[Exception]:
    while True:
        yield failure


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        (ValueError("x"), "the task: unexpected ValueError: x; it is tried again, the log has more"),
        (
            ExceptionGroup("", [KeyError("y")]),
            "the task: unexpected KeyError: 'y'; it is tried again, the log has more",
        ),
        (UdptunError("no"), "the task: no; it is tried again, the log has more"),
        (KernelError("cannot x", 5), "the task: cannot x: EIO; it is tried again, the log has more"),
    ],
)
def test_a_task_that_fails_is_run_again_with_growing_pauses_and_one_traceback(
    caplog: pytest.LogCaptureFixture, failure: Exception, problem: str
) -> None:
    """Before, one unexpected exception in one task of the daemon ended all of them, and the daemon with status 1."""
    supervisor = Supervisor()
    began = virtual_time.run(keep_for(supervisor, 200, always(failure), 0))
    assert began == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert supervisor.problems == (problem,)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None


def test_a_task_that_runs_again_for_a_minute_has_no_problem_and_the_first_pause() -> None:
    supervisor = Supervisor()

    async def main() -> None:
        failures = iter([ValueError(), ValueError(), ValueError(), None])
        task = asyncio.create_task(keep_for(supervisor, 1000, failures, 70))
        await asyncio.sleep(100)
        assert supervisor.problems
        await asyncio.sleep(35)
        assert supervisor.problems == ()
        assert await task == [0, 71, 142, 213]
        assert supervisor.problems == ()

    virtual_time.run(main())


def test_a_task_that_returns_or_is_cancelled_is_not_run_again() -> None:
    assert virtual_time.run(keep_for(Supervisor(), 100, iter([None]), 5)) == [0]
    assert virtual_time.run(keep_for(Supervisor(), 3, iter([None]), 5)) == [0]

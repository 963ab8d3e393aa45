"""What every test directory shares: which tests this run, machine and user can do, and how several workers share them.

`./dev test` runs the tests in several processes at once (pytest-xdist). Each test has namespaces, sockets, files and
ports of its own, so most tests do not notice. Two rules cover the rest:

    tests that share a lab or another fixture   run in one process, so that it is made once
    a test that is marked `alone`               runs while no other test does

Tests of what is promised hand their figures to `figure`; `--full` prints them all at the end of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import inspect
import os
import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from shortcut_run import ShortcutRun

# An example that takes long says that the machine is busy, and nothing else.
settings.register_profile("udptun", deadline=None)
settings.load_profile("udptun")

MANY_CASES = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")
    parser.addoption("--flanneld", metavar="PATH", help="flanneld's program, for the tests beside the real one")
    parser.addoption("--kube-apiserver", metavar="PATH", help="kube-apiserver's program, to test beside ours")
    parser.addoption("--shortcut", action="store_true", help="have the shortcut in every lab (tests/shortcut_run.py)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shortcut"):
        config.pluginmanager.register(ShortcutRun())


Figure = Callable[..., None]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """`figure("forwarding again", [0.21, 0.3], "s")`: print what was measured, and once more at the end of the run.

    Of several values the median and the greatest are shown.
    """

    def note(what: str, values: float | Sequence[float], unit: str = "") -> None:
        shown = [values] if isinstance(values, int | float) else list(values)
        text = f"{what}: {statistics.median(shown):.4g} {unit}".rstrip()
        if len(shown) > 1:
            text = f"{what}: median {statistics.median(shown):.4g}, worst {max(shown):.4g} {unit}".rstrip()
            text += f", of {len(shown)}"
        print(text)
        # These reach the process that reports, whichever process runs the test.
        request.node.user_properties.append(("figure", text))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--full"):
        return
    terminalreporter.section("figures")
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for kind, text in report.user_properties:
                if kind == "figure" and report.when == "call":
                    terminalreporter.write_line(f"{report.nodeid}: {text}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is made while tests are collected stays: do not look for garbage among it, neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is an `async def` in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked `alone` wait until no other worker runs a test, and the others wait for it.

    The locks are on this very file and on its directory, so that two runs of one checkout respect each other as well.
    Whoever comes after a test that must be alone waits behind it: otherwise two others that take turns could keep it
    waiting for ever. The time that a test waits here does not count against its timeout.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with _opened(Path(__file__).parent) as room:
        with _opened(Path(__file__)) as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
            fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            # Closing would not do: a process that the test has forked may still have the descriptor.
            fcntl.flock(room, fcntl.LOCK_UN)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        if full:
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    if config.getoption("--shortcut"):
        for item in items:
            if (mark := item.get_closest_marker("workers")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"about the workers alone: {mark.kwargs['reason']}"))
    # A test that must be alone waits for the longest of those that run: so all of them come at the end.
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)
    if hasattr(config, "workerinput"):
        _take_out_of_groups([item for item in items if item.get_closest_marker("alone")])
        _group_by_shared_fixture(items)
        _group_quick_cases(items)
    _skip_what_needs_a_lab(items)


def _take_out_of_groups(items: Sequence[pytest.Item]) -> None:
    """They come at the end, whenever the others of their groups do: to xdist several marks are a group of its own."""
    for number, item in enumerate(items):
        if item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(f"alone-{number}"))


def _group_by_shared_fixture(items: list[pytest.Item]) -> None:
    """Put a test into the group of that shared fixture which most tests use, as others are made from it."""
    used = {item: _shared_fixtures(item) for item in items if not item.get_closest_marker("alone")}
    n_users = Counter(fixture for fixtures in used.values() for fixture in fixtures)
    for item, fixtures in used.items():
        if fixtures:
            item.add_marker(pytest.mark.xdist_group(max(fixtures, key=lambda fixture: (n_users[fixture], fixture))))


def _group_quick_cases(items: list[pytest.Item]) -> None:
    """Put the cases of a function that has many into one group.

    They take a millisecond each.  Handed out one by one they cost the process that hands out as much again: for each
    test it counts all groups that a worker has had.
    """
    others = [item for item in items if not any(map(item.get_closest_marker, ("netns", "alone", "xdist_group")))]
    n_cases = Counter(item.nodeid.partition("[")[0] for item in others)
    for item in others:
        function = item.nodeid.partition("[")[0]
        if n_cases[function] >= MANY_CASES:
            item.add_marker(pytest.mark.xdist_group(function))


def _shared_fixtures(item: pytest.Item) -> list[str]:
    """What the test shares with others: fixtures of its module, with their parameters, and the labs of tests/netns."""
    if not isinstance(item, pytest.Function):
        return []
    parameters = getattr(item, "callspec", None)
    of_the_module = [
        f"{item.path.stem}-{name}-{parameters.indices.get(name) if parameters else None}"
        for name, definitions in item._fixtureinfo.name2fixturedefs.items()
        if definitions[-1].scope == "module"
    ]
    return of_the_module + [name for name in ("pair", "three_hosts") if name in item.fixturenames]


def _skip_what_needs_a_lab(items: list[pytest.Item]) -> None:
    needing_a_lab = [item for item in items if item.get_closest_marker("netns")]
    if not needing_a_lab:
        return
    # Here, because the lab needs the compiled modules and the unit tests are to run without them.
    from udptun.lab.topology import missing_requirements

    missing = missing_requirements(
        ("ip", "bridge", "nsenter", "ping", "ethtool", "tcpdump", "iperf3", "ps", "nft", "iptables", "chrt")
    )
    if missing:
        skip = pytest.mark.skip(reason=f"needs {', '.join(missing)}")
        for item in needing_a_lab:
            item.add_marker(skip)

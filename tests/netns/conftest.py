"""Labs for the tests, and the check that nothing of them outlives the session."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from traffic import REAL_TIME, wait_for_peers

from udptun.lab.host import Host
from udptun.lab.topology import Lab

_TOKEN_NAME = "UDPTUN_TEST_SESSION"
"""Every process that the tests start inherits it, so that the survivors are found wherever they went."""


def _processes_with(name: str, value: str) -> dict[int, str]:
    """pid -> command line of every other process whose environment has `name`=`value`; zombies are none."""
    wanted = f"{name}={value}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


@pytest.fixture
def processes_with() -> Callable[[str, str], dict[int, str]]:
    return _processes_with


@pytest.fixture
def slack(request: pytest.FixtureRequest) -> int:
    """Deadlines are the promised times as often: the machine may be busy."""
    return 1 if request.config.getoption("--full") else 5


@contextlib.contextmanager
def _started_lab(name: str, n_hosts: int = 2, n_pods: int = 1) -> Iterator[Lab]:
    with Lab(f"{name}{os.getpid()}", n_hosts=n_hosts, n_pods=n_pods) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        wait_for_peers(lab)
        yield lab


@pytest.fixture
def two_hosts() -> Iterator[Lab]:
    """A lab of its own for a test that does not leave it as it found it: the real daemon, Type udp, a pod on each host.

        pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
    """
    with _started_lab("t") as lab:
        yield lab


class SharedLab:
    """A lab that the tests of one process share. It is made when the first of them asks for it."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[Lab]]) -> None:
        self._make = make
        self._lab: Lab | None = None
        self._undo = contextlib.ExitStack()

    def get(self) -> Lab:
        if self._lab is None:
            self._lab = self._undo.enter_context(self._make())
        return self._lab

    def drop(self) -> None:
        """The next `get` makes another one."""
        self._lab = None
        self._undo.close()


def _lend(shared: SharedLab, session: pytest.Session) -> Iterator[Lab]:
    """For one test. After a failure nobody knows what it has left behind, and the next one gets a new lab."""
    n_failed = session.testsfailed
    lab = shared.get()
    yield lab
    if session.testsfailed > n_failed or any("Traceback" in host.daemon_log() for host in lab.hosts):
        shared.drop()


SHARED_LABS = {
    "pair": SharedLab(lambda: _started_lab("p")),
    "three_hosts": SharedLab(lambda: _started_lab("q", n_hosts=3, n_pods=2)),
}


@pytest.fixture(scope="session")
def _shared_labs(_nothing_outlives_the_session: None) -> Iterator[None]:
    yield
    for shared in SHARED_LABS.values():
        shared.drop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """End a lab behind the last test of its group: each host costs a hundredth of a processor.

    In one process alone tests that need it may follow.
    """
    yield
    if hasattr(item.config, "workerinput"):
        for name, shared in SHARED_LABS.items():
            if nextitem is None or name not in getattr(nextitem, "fixturenames", ()):
                shared.drop()


@pytest.fixture
def pair(_shared_labs: None, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """As `two_hosts`, shared by tests that leave it as they found it."""
    yield from _lend(SHARED_LABS["pair"], request.session)


@pytest.fixture
def three_hosts(_shared_labs: None, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """As `pair`, with three hosts and two pods on each."""
    yield from _lend(SHARED_LABS["three_hosts"], request.session)


@pytest.fixture
def host() -> Iterator[Host]:
    """One host without a daemon."""
    with Lab(f"d{os.getpid()}", n_hosts=1) as lab:
        yield lab.host(1)


_FILES = [
    *map(Path, ("/run/flannel", "/run/udptun", "/var/lib/udptun")),
    # Of a lab's containers.
    *map(Path, ("/run/busybox", "/run/cni", "/var/lib/cni", "/etc/cni/net.d/10-flannel.conflist")),
]


def _names_outside_the_labs() -> set[str]:
    """What a test could leave in the namespaces it was started in: names that udptun or flannel would give."""
    links = {f"link {path.name}" for path in Path("/sys/class/net").iterdir()}
    run_netns = Path("/run/netns")
    namespaces = {f"namespace {path.name}" for path in run_netns.iterdir()} if run_netns.exists() else set()
    nft = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
    tables = {line.strip() for line in nft.splitlines()}
    ours = {"link h1", "link underlay", "namespace p1"}
    return {
        name
        for name in links | namespaces | tables
        if name in ours or any(word in name for word in ("flannel", "udptun", "cni0", "namespace netns-"))
    } | {f"file {path}" for path in _FILES if path.exists()}


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_session() -> Iterator[None]:
    token = f"{os.getpid()}-{time.time_ns()}"
    before = _names_outside_the_labs()
    os.environ[_TOKEN_NAME] = token
    # Every command in a lab is logged there; pytest shows it beside a failure.
    logging.getLogger("udptun.lab").setLevel(logging.INFO)
    yield
    del os.environ[_TOKEN_NAME]
    deadline = time.monotonic() + 10
    while _processes_with(_TOKEN_NAME, token) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = _processes_with(_TOKEN_NAME, token)
    assert not left, f"processes outlive the tests: {left}"
    # Other workers of this session may still be at it, with a test that takes long.
    deadline = time.monotonic() + 60
    while _names_outside_the_labs() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    new = _names_outside_the_labs() - before
    assert not new, f"the tests left behind: {sorted(new)}"

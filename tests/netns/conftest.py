"""Labs for the tests, and the check that nothing of them outlives the session."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
def two_hosts() -> Iterator[Lab]:
    """A lab with the real daemon, Type udp, a pod on each host.

        pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
    """
    with Lab(f"t{os.getpid()}") as lab:
        lab.start()
        yield lab


def _names_outside_the_labs() -> set[str]:
    """What a test could leave in the namespaces it was started in: names that udptun or flannel would give."""
    links = {f"link {path.name}" for path in Path("/sys/class/net").iterdir()}
    run_netns = Path("/run/netns")
    namespaces = {f"namespace {path.name}" for path in run_netns.iterdir()} if run_netns.exists() else set()
    nft = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
    tables = {line.strip() for line in nft.splitlines()}
    files = {f"file {path}" for path in map(Path, ("/run/flannel", "/run/udptun", "/var/lib/udptun")) if path.exists()}
    return {
        name
        for name in links | namespaces | tables | files
        if any(word in name for word in ("flannel", "udptun", "cni0", "link h1", "link underlay", "namespace p1"))
    }


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
    # Other workers of this session may still be at it.
    while _names_outside_the_labs() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    new = _names_outside_the_labs() - before
    assert not new, f"the tests left behind: {sorted(new)}"

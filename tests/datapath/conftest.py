"""The fixture `datapath` runs a test over both implementations, `fast` over the fast path alone.

Both fixtures run it over both encapsulations.  `old_kernel` is a library that makes a kernel of an earlier one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datapath.harness import Datapath, FastDatapath, implementation, skip_unless_built


@pytest.fixture(params=["udp", "vxlan"])
def is_vxlan(request: pytest.FixtureRequest) -> bool:
    """How packets travel."""
    return bool(request.param == "vxlan")


@pytest.fixture
def fast(is_vxlan: bool) -> Iterator[FastDatapath]:
    """The fast path alone."""
    skip_unless_built()
    with FastDatapath(is_vxlan=is_vxlan) as datapath:
        yield datapath


@pytest.fixture(params=["udp-reference", "udp-fastpath", "udp-trains", "vxlan-reference", "vxlan-trains"])
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    """Either implementation, fresh, with the overlay of tests/packets.py and SourceCheck peer."""
    encapsulation, name = request.param.split("-")
    with implementation(name, is_vxlan=encapsulation == "vxlan") as datapath:
        yield datapath


@pytest.fixture(scope="session")
def old_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old_kernel.c, to be preloaded; the variable OLD_KERNEL says what is refused."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library, source = tmp_path_factory.mktemp("old") / "old_kernel.so", Path(__file__).with_name("old_kernel.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", library, source, "-ldl"], check=True)
    return library

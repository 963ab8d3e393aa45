"""What differs by the kernel, on those of Debian's releases in a virtual machine."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
from virtual_machine import KEYRING, TOOLS, Kernel

from udptun.lab.machine import SOURCE_ROOT

_MISSING = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if KEYRING.exists() else [str(KEYRING)])
_LIMIT_S = 1500
"""An emulated machine takes five minutes, beside other work more."""

pytestmark = [
    pytest.mark.netns,
    pytest.mark.full,
    pytest.mark.timeout(2 * _LIMIT_S),
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {', '.join(_MISSING)}"),
]

KERNEL_FACTS = "tests/kernel_facts"
PROGRAMS = f"{KERNEL_FACTS} tests/netns/test_filters.py tests/datapath/test_shortcut_packets.py"
SHORTCUT = (
    "tests/netns/test_shortcut.py "
    '-k "{} and (pods_speak or switching or killed_workers or killed_daemon_leaves or stopped or cleanup)"'
)
BY_TCX, BY_CLSACT = SHORTCUT.format("tcx"), SHORTCUT.format("clsact")
WITHOUT = "tests/netns/test_without_shortcut.py"


@dataclass(frozen=True, slots=True)
class Case:
    """What runs on the kernel of a suite of Debian's.

    `lacks`: what reasons of skipped tests begin with, as a regular expression.  Nothing else may be skipped.
    """

    suite: str
    facts: str
    lab: str
    lacks: str | None


CASES = {
    "5.10": Case("debian-security bullseye-security", KERNEL_FACTS, WITHOUT, r"needs Linux (after 5\.10|6\.2)"),
    # It has a stricter verifier.
    "6.1": Case("debian-security bookworm-security", PROGRAMS, BY_CLSACT, r"needs (a kernel with tcx|Linux 6\.2)"),
    "6.12": Case("debian-security trixie-security", PROGRAMS, BY_TCX, None),
    # Whichever is the newest.
    "backports": Case("debian trixie-backports", PROGRAMS, BY_TCX, None),
}


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernel]:
    @cache
    def kernel_of(suite: str) -> Kernel:
        return Kernel.unpack(suite, tmp_path_factory.mktemp("kernel"))

    return kernel_of


@pytest.mark.parametrize("part", ["facts", "lab"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_does_what_is_said_of_it(kernel_of: Callable[[str], Kernel], name: str, part: str) -> None:
    """The facts: programs load with the documented capabilities, and do with each packet what the reference does.

    In the lab pods speak by them, which the counters show.  Daemons are killed, stopped and started again without a
    loss, and cleanup leaves nothing.  On a kernel that is too old for the shortcut the workers do all that.
    """
    case = CASES[name]
    kernel = kernel_of(case.suite)
    assert name == "backports" or kernel.release.startswith(f"{name}.")
    tests = case.facts if part == "facts" else case.lab
    command = f"PYTHONPATH=tests/netns {sys.executable} -m pytest -p slow_machine -o timeout=600 --full"
    status, said = kernel.run(f"{command} -q --tb=short -p no:logging {tests}", SOURCE_ROOT, _LIMIT_S)
    print(kernel.release)
    print(said)
    assert status == 0
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)
    assert [it for it in reasons if case.lacks is None or not re.match(case.lacks, it)] == []

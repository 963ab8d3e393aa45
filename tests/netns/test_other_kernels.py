"""What differs by the kernel, on that of Debian 12 in a virtual machine: without tcx, and with a stricter verifier."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from virtual_machine import TOOLS, Kernel

from udptun.lab.machine import SOURCE_ROOT

_MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
_LIMIT_S = 1500
"""An emulated machine takes five minutes, beside other work more."""

pytestmark = [
    pytest.mark.netns,
    pytest.mark.full,
    pytest.mark.timeout(2 * _LIMIT_S),
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {', '.join(_MISSING)}"),
]

FACTS = ("tests/kernel_facts", "tests/netns/test_filters.py", "tests/datapath/test_shortcut_packets.py")
LAB = (
    "tests/netns/test_shortcut.py",
    '-k "pods_speak or switching or killed_workers or killed_daemon_leaves or stopped or cleanup"',
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel.unpack("linux-image-amd64", tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize("tests", [FACTS, LAB], ids=["facts", "lab"])
def test_kernel_does_what_the_shortcut_needs(kernel: Kernel, tests: tuple[str, ...]) -> None:
    """The facts: programs load with the documented capabilities, and do with each packet what the reference does.

    In the lab pods speak by them, which the counters show.  Daemons are killed, stopped and started again without a
    loss, and cleanup leaves nothing.
    """
    command = f"PYTHONPATH=tests/netns {sys.executable} -m pytest -p slow_machine --full -q --tb=short -p no:logging"
    status, said = kernel.run(f"{command} {' '.join(tests)}", SOURCE_ROOT, _LIMIT_S)
    print(said)
    assert status == 0
    # Nothing is left out but what the kernel lacks.
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)
    assert [it for it in reasons if not re.match(r"needs (a kernel with tcx|Linux )", it)] == []

"""What is left in the bounding set of a process without other capabilities is of no use to it with no_new_privs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from udptun import _fastpath

PROGRAM = f"""
import os, sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
spec = ModuleSpec("_fastpath", ExtensionFileLoader("_fastpath", {_fastpath.__file__!r}), origin={_fastpath.__file__!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
if sys.argv[1] == "give-up":
    assert module.confine(1) == 1
os.execvp("grep", ["grep", "Cap", "/proc/self/status"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("gives_up", [True, False])
def test_execve_gives_root_nothing_of_its_bounding_set(gives_up: bool) -> None:
    """A program that root executes gets the bounding set otherwise."""
    net_admin = 1 << 12
    privileges = ["setpriv", "--bounding-set=-all,+net_admin"]
    argv = [*privileges, sys.executable, "-c", PROGRAM, "give-up" if gives_up else "keep"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    sets = {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\s*(\w+)", done.stdout)}
    assert sets["Bnd"] == net_admin
    assert sets["Prm"] == sets["Eff"] == (0 if gives_up else net_admin)

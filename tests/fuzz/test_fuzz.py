"""A short run of `python -m tests.fuzz`; the long one is a command of its own (CONTRIBUTING.md)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CPU_SECONDS = 5


@pytest.mark.timeout(600)
def test_random_flows_find_nothing_with_address_sanitizer() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    command = [sys.executable, "-m", "tests.fuzz", "--cpu-seconds", str(CPU_SECONDS)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=590)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout

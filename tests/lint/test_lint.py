"""The checks of `./dev lint`, as one test, so that they run beside the others and count among them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_source_passes_lint_and_type_checks() -> None:
    done = subprocess.run([ROOT / "dev", "lint"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

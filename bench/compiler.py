"""Compile the bench's C programs when they are needed.  Nothing of them is installed or kept."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError

SOURCES = Path(__file__).parent


def missing_compiler() -> str | None:
    """Why no C program can be compiled here, or None."""
    return None if shutil.which("gcc") else "needs the command gcc"


def compiled(source: str, directory: Path, options: Sequence[str] = ()) -> Path:
    """Compile `source`, named from bench/, into `directory`; return the program.  Raises BenchError."""
    program = directory / Path(source).stem
    command = ["gcc", "-O2", "-Wall", "-o", str(program), str(SOURCES / source), *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as exc:
        raise BenchError(f"cannot compile bench/{source}: gcc: {exc.strerror}; install gcc and the C headers") from exc
    if result.returncode:
        said = next((line for line in result.stderr.splitlines() if "error" in line), "it said nothing of use")
        raise BenchError(f"cannot compile bench/{source}: {said}; are the C and kernel headers installed?")
    return program

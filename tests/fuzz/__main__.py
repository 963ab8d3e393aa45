"""Build the fast path with AddressSanitizer and UndefinedBehaviorSanitizer, and run the rounds with it.

    python -m tests.fuzz --cpu-seconds 600

The build is made in a copy of the sources, which is removed afterwards.  It needs gcc with libasan, and no root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# The last flag wins, and setup.py has flags of its own: optimizing as for a release would take twice as long.
COMPILER = '#!/bin/sh\nexec gcc "$@" -O1 -g1\n'


def build(directory: Path) -> dict[str, str]:
    """Copy the sources to `directory` and build there; return the environment in which Python takes that build."""
    for name in ("udptun", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    if (ROOT / "build/cython").exists():
        # The times of the files say whether what Cython has made is still right.
        shutil.copytree(ROOT / "build/cython", directory / "build/cython")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, directory)
    compiler = directory / "cc"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    flags = {"CC": str(compiler), "CFLAGS": SANITIZE, "LDFLAGS": "-fsanitize=address,undefined"}
    environment = {**os.environ, **flags}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build with sanitizers failed:\n{done.stdout}{done.stderr}")
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python itself does not free everything at its end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(directory),
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="udptun-fuzz-") as name:
        directory = Path(name)
        print("building with sanitizers", file=sys.stderr)
        environment = build(directory)
        command = [sys.executable, "-m", "tests.fuzz.rounds", *sys.argv[1:]]
        return subprocess.run(command, cwd=directory, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Inputs that nobody has thought of, for a stated processor time, until one breaks a promise.

    python -m tests.fuzz --minutes 10                       packets through the fast path
    python -m tests.fuzz --target lease --minutes 10        one of `--list`, on inputs that coverage leads to

The fast path is built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources that is removed
afterwards.  That needs gcc with libasan, and no root.  What coverage leads needs atheris (guided.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.rounds import CARRIED as PACKETS
from tests.fuzz.table import TARGETS, Target

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# The last flag wins, and setup.py has flags of its own.  Optimizing takes longer than it saves in minutes: packets are
# made and compared in Python.
COMPILER = '#!/bin/sh\nexec gcc "$@" -O0 -g1\n'


def build(directory: Path) -> dict[str, str]:
    """Copy the sources to `directory` and build there; return the environment in which Python takes that build."""
    for name in ("udptun", "tests"):
        # With the bytecode, which the times of the files keep right: with sanitizers it would be made in seconds.
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("*.so", "results"))
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
        "LD_PRELOAD": " ".join([*_libfuzzer(), *libraries]),
        # Python itself does not free everything at its end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:verify_asan_link_order=0:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(directory),
    }


def _libfuzzer() -> list[str]:
    """atheris's libFuzzer, where there is one.  It has to come before libasan, whose functions of the same names would
    be called in its place, and they do nothing."""
    found = importlib.util.find_spec("atheris")
    return [] if found is None else list(map(str, Path(found.origin or "").parent.glob("core_with_libfuzzer.*.so")))


def main() -> int:
    given, rest = _arguments()
    if given.list:
        for target in TARGETS.values():
            print(f"{target.name:<8} {target.about}")
        for name, about in PACKETS.items():
            print(f"{name:<8} packets through the fast path: {about}")
        return 0
    rest += ["--cpu-seconds", str(60 * given.minutes if given.minutes else given.cpu_seconds)]
    for name in given.target or ["packets"]:
        if name in TARGETS:
            status = _run_guided(TARGETS[name], rest, keeps=given.keep)
        else:
            how = ["--carried", name] if name in PACKETS else []
            status = _run_with_sanitizers(["tests.fuzz.rounds", *how, *rest])
        if status:
            return status
    return 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--target", action="append", choices=(*TARGETS, *PACKETS), help="may be repeated; default: packets of all kinds"
    )
    parser.add_argument("--cpu-seconds", type=float, default=60.0, metavar="S", help="of each; default: %(default)g")
    parser.add_argument("--minutes", type=float, metavar="N", help="the same in minutes")
    parser.add_argument("--keep", action="store_true", help="put what reaches new code into tests/fuzz/corpus")
    parser.add_argument("--list", action="store_true", help="say which targets there are")
    parser.add_argument("--seed", metavar="N", help="of a run that is to be repeated")
    given = parser.parse_args()
    return given, ["--seed", given.seed] if given.seed else []


def _run_guided(target: Target, arguments: Sequence[str], *, keeps: bool) -> int:
    missing = [name for name in ("atheris", *target.needs) if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"the target {target.name} needs {' and '.join(missing)} (pip install atheris)")
    print(f"{target.name}: {target.about}", flush=True)
    arguments = [target.name, *arguments, *(["--keep"] if keeps else [])]
    if not target.has_sanitizers:
        return subprocess.run([sys.executable, "-m", "tests.fuzz.guided", *arguments], cwd=ROOT).returncode
    return _run_with_sanitizers(["tests.fuzz.guided", *arguments], target.corpus_file if keeps else None)


def _run_with_sanitizers(command: Sequence[str], corpus_file: Path | None = None) -> int:
    """Run a module in a copy whose fast path has them; `corpus_file` gets what the copy's has become."""
    with tempfile.TemporaryDirectory(prefix="udptun-fuzz-") as name:
        directory = Path(name)
        print("building with sanitizers", file=sys.stderr)
        environment = build(directory)
        status = subprocess.run([sys.executable, "-m", *command], cwd=directory, env=environment).returncode
        if corpus_file is not None and status == 0:
            corpus_file.parent.mkdir(exist_ok=True)
            shutil.copy(directory / corpus_file.relative_to(ROOT), corpus_file)
        return status


if __name__ == "__main__":
    sys.exit(main())

"""Python packages: our own wheel, built for the image's architecture, and those that it needs."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from base import HERE, PYTHON, SOURCE, Architecture, Contents, DownloadError, run

_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_NOT_INSTALLED = (
    *("numpy/**/tests", "numpy/f2py", "numpy/distutils", "numpy/typing", "numpy/_pyinstaller", "bin"),
    *("**/*.pyi", "**/*.pyx", "**/*.pxd", "**/*.h", "**/*.c", "**/*.proto"),
)
"""Patterns of what packages have and the image has not."""
_NOTES = ("RECORD", "direct_url.json", "INSTALLER", "REQUESTED")
"""What pip writes beside a package; paths of this machine are among it."""


def copy_of_source(work: Path) -> Path:
    """What the wheel is built from: a build in the repository itself would put in what an earlier one has left."""
    copy = work / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(SOURCE / name, copy)
    for name in ("udptun", "build/cython"):
        # The second is what Cython has made of the sources, if they have been built before.
        if (SOURCE / name).exists():
            shutil.copytree(SOURCE / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def compiler_environment(arch: Architecture, source: Path, sysroot: Path) -> dict[str, str]:
    """What makes setuptools build `source` for `arch`.

    For an architecture that is not this machine's, `sysroot` has headers and settings of its Python.
    """
    include = sysconfig.get_path("include") if arch.is_native else str(sysroot / "usr/include")
    compiler = os.environ.get("CC", "gcc") if arch.is_native else f"{arch.triplet}-gcc"
    environ = {
        "CC": compiler,
        # An interpreter that was not built by Debian would have its own directory in here.
        "LDSHARED": f"{compiler} -shared",
        # Neither paths of this machine nor what the linker numbers belong into the image.
        "CFLAGS": f"-g0 -ffile-prefix-map={source}=. -ffile-prefix-map={include}=/usr/include",
        "LDFLAGS": "-Wl,--build-id=none -s",
        "PYTHONHASHSEED": "0",
    }
    if arch.is_native:
        return environ
    settings = sysroot / "settings"
    settings.mkdir(exist_ok=True)
    name = f"_sysconfigdata__{arch.triplet}"
    shutil.copy(sysroot / "usr/lib" / PYTHON / f"{name}.py", settings)
    # The second is for the header that includes the architecture's own by its path from there.
    environ["CFLAGS"] += f" -I{include}/{PYTHON} -I{include}"
    return environ | {
        "PYTHONPATH": str(settings),
        "_PYTHON_SYSCONFIGDATA_NAME": name,
        "_PYTHON_HOST_PLATFORM": f"linux-{arch.machine}",
    }


def build_wheels(arch: Architecture, source: Path, environ: Mapping[str, str], wheels: Path) -> Path:
    """Our wheel, of `source`.  Beside it in `wheels` is what the index has no wheel of for `arch`."""
    pip = [*_PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
    run([*pip, source], "build our wheel", **environ)
    if arch.name != "amd64":
        pytun = ["--no-binary=python-pytun", "--no-cache-dir", "python-pytun==2.4.1"]
        run([*pip, *pytun], "build python-pytun", DownloadError, **environ)
    (wheel,) = wheels.glob("udptun-*.whl")
    return wheel


def install(arch: Architecture, wheel: Path, site: Path) -> Contents:
    """Our wheel, and what it needs, into `site`."""
    version = PYTHON.removeprefix("python").replace(".", "")
    platforms = ("manylinux_2_36", "manylinux_2_28", "manylinux_2_17", "manylinux2014", "linux")
    run(
        [
            *(*_PIP, "install", "--quiet", "--no-compile", "--target", site),
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={version}"),
            *(f"--platform={it}_{arch.machine}" for it in platforms),
            *("--constraint", HERE / "constraints.txt", "--find-links", wheel.parent),
            f"udptun[etcd,kube] @ {wheel.as_uri()}",
        ],
        "install the Python packages",
        DownloadError,
    )
    for pattern in _NOT_INSTALLED:
        for path in list(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    contents = Contents("Python packages")
    for info in sorted(site.glob("*.dist-info")):
        with (info / "RECORD").open() as record:
            files = [site / row[0] for row in csv.reader(record)]
        for note in _NOTES:
            (info / note).unlink(missing_ok=True)
        name, version = info.name.removesuffix(".dist-info").split("-")
        contents.lines.append((name, version, sum(it.stat().st_size for it in files if it.is_file())))
    return contents


def compile_all(root: Path) -> None:
    """Compile every module: a container's root is read-only, so each start would do it again."""
    # A pyc says by itself that it is right, whatever the times of the files are.
    options = ["-q", "-s", root, "-p", "/", "--invalidation-mode", "unchecked-hash"]
    modules = [root / "usr/lib" / PYTHON, root / "usr/lib/python3"]
    run([sys.executable, "-m", "compileall", *options, *modules], "compile the modules", PYTHONHASHSEED="0")

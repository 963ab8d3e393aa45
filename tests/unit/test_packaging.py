"""What is shipped: the sdist has all that is needed to build and test, the wheel all that is needed to run."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
PYTHONS = ("3.11", "3.12", "3.13")


def run(argv: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ |= environment
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{argv}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


# The first of them builds the wheel.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with sdist and wheel; the wheel is built from the sdist, with this environment's build tools."""
    pytest.importorskip("build", reason="needs the Python package build")
    here = tmp_path_factory.mktemp("packaging")
    shutil.copytree(SOURCE, here / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    if (SOURCE / "build/cython").exists():
        # The times of the files say whether what Cython has made is still right.  The sdist takes none of it.
        shutil.copytree(SOURCE / "build/cython", here / "source/build/cython")
    # What is in the packages is looked at, not how fast it is.
    (here / "cc").write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    (here / "cc").chmod(0o755)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", here / "dist"]
    run(build, here / "source", CC=str(here / "cc"))
    return here / "dist"


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def sources(directory: str, *patterns: str) -> set[str]:
    """Files of the source tree by pattern, relative to it; no pattern means all that are source."""
    found = (path for pattern in patterns for path in (SOURCE / directory).rglob(pattern))
    return {str(path.relative_to(SOURCE)) for path in found if "__pycache__" not in path.parts}


def test_sdist_has_every_source_test_and_document_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources("udptun", "*.py", "*.pyx", "*.pxd", "*.pyi", "*.h", "*.proto", "py.typed")
    wanted |= sources("udptun", "bytecode.json", "*.bpf.c")
    wanted |= sources("tests", "*.py") | sources("docs", "*.md") | sources("bench", "*.py")
    wanted |= sources("deploy", "*.py", "*.in", "*.txt", "*.yml", "*.yaml", "*.service", "*.conf", "*.json")
    wanted |= sources("deploy", "Containerfile")
    wanted |= {"pyproject.toml", "setup.py", "dev", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert {"udptun/_fastpath.pyx", "deploy/monitoring/dashboard.json"} <= wanted
    assert wanted - names == set()
    compiled = [name for name in names if name.endswith((".so", ".c", ".pyc")) and not name.endswith(".bpf.c")]
    assert compiled == []


def test_wheel_has_every_module_both_extensions_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (archive.read(name).decode() for name in archive.namelist() if "entry_points" in name)
    extensions = {name for name in names if name.endswith(".so")}
    assert {name.split(".")[0] for name in extensions} == {"udptun/_fastpath", "udptun/_kabi"}
    # The .pyx, .pxd and .h are what a traceback and a reader of the compiled module want.
    patterns = ("*.py", "*.pyx", "*.pxd", "*.pyi", "*.h", "*.proto", "py.typed", "bytecode.json")
    assert names - extensions == sources("udptun", *patterns)
    for name in ("udptun", "flanneld", "mk-docker-opts.sh"):
        assert f"{name} = udptun.commands.cli:main" in entry_points
    assert "udptun-cni = udptun.cni.plugin:main" in entry_points


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh virtual environment with the wheel; the dependencies are this environment's."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], directory)
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-c", script], directory).stdout.strip())
    ours = {str(Path(module.__file__ or "").parents[1]) for module in map(__import__, ("pyroute2", "numpy", "pytun"))}
    # A directory named in a .pth file brings no .pth files of its own, so no udptun but the wheel's.
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return directory / "bin"


def test_commands_of_the_wheel_say_the_version(installed: Path, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    assert run([installed / "udptun", "version"], installed).stdout == f"udptun {version}\n"
    asked = run([installed / "flanneld", "-version"], installed)
    assert (asked.stdout, asked.stderr) == ("", f"udptun {version}\n")
    assert run([installed / "mk-docker-opts.sh", "-h"], installed).stdout.startswith("usage: udptun docker-opts ")


def test_cni_plugin_of_the_wheel_runs_and_installs_itself(installed: Path, tmp_path: Path) -> None:
    run([installed / "udptun", "cni", "install", tmp_path], tmp_path)
    for program in (installed / "udptun-cni", tmp_path / "flannel"):
        environ = {"CNI_COMMAND": "VERSION"}
        done = subprocess.run([program], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert '"supportedVersions":["0.1.0",' in done.stdout, done.stderr


def test_daemon_of_the_wheel_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = (
        "import udptun.control.daemon, udptun._fastpath as f, udptun.datapath.worker as w; "
        "print(f.__file__, w.__file__)"
    )
    for path in run([installed / "python", "-c", script], tmp_path).stdout.split():
        assert Path(path).is_relative_to(installed.parent)
    flags = [f"--{name}={tmp_path / name}" for name in ("run-dir", "state-dir", "net-config-path", "subnet-file")]
    # The first of the two is asked for by name: flanneld without a store means etcd.
    flags += ["--store", f"local:{tmp_path}/leases.db"]
    for command in ([installed / "udptun", "daemon"], [installed / "flanneld"]):
        done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"E udptun.control.daemon: no network config at {tmp_path}/net-config-path: write it" in done.stderr


@functools.cache
def interpreter(version: str) -> Path | None:
    """A Python of this version, from the PATH or pyenv, that runs and can build (a shim may do neither)."""
    candidates = [Path(found)] if (found := shutil.which(f"python{version}")) else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    script = (
        "import ensurepip, os, sys, sysconfig; assert os.path.exists(sysconfig.get_paths()['include'] + '/Python.h');"
        "print('%d.%d' % sys.version_info[:2])"
    )
    for path in candidates:
        done = subprocess.run([path, "-c", script], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", PYTHONS)
def test_sdist_builds_and_passes_the_unit_tests_on(version: str, sdist: Path, tmp_path: Path) -> None:
    """Installed from the sdist with its own build requirements, then the sdist's tests."""
    if version == "{}.{}".format(*sys.version_info[:2]):
        pytest.skip(f"Python {version} is what these tests run with")
    base = interpreter(version)
    if base is None:
        pytest.skip(f"no Python {version} with headers on this machine")
    run([base, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", f"udptun[dev] @ {sdist.as_uri()}"], tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("udptun-*")
    # The package beside the tests has no compiled modules: it must not be found first.
    (source / "udptun").rename(source / "udptun-not-installed")
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit", "--deselect", "tests/unit/test_packaging.py"]
    done = run([python, *tests], source)
    print(f"Python {version}: {done.stdout.splitlines()[-1]}")

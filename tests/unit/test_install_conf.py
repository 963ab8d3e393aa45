"""`/opt/bin/install-conf` of the image, as flannel's manifest calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def install_conf(*paths: Path | str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, ROOT / "deploy/image/install_conf.py", *paths]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ, umask=0o077)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"new\n")
    path.chmod(0o640)
    return path


def test_content_and_mode_are_those_of_the_source_in_one_step(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "etc" / "10-flannel.conflist"
    target.parent.mkdir()
    target.write_text("old")
    with target.open() as reader:
        assert install_conf(source, target).returncode == 0
        # Who has the old file open reads it to its end.
        assert reader.read() == "old"
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new\n", 0o640)
    assert list(target.parent.iterdir()) == [target]


def test_what_fails_is_one_line_and_leaves_the_old_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    for paths, words in (
        ((tmp_path / "none", target), f"cannot install {target}: {tmp_path}/none: No such file or directory"),
        ((source, tmp_path / "none" / "target"), "No such file or directory"),
    ):
        done = install_conf(*paths)
        assert done.returncode == 1
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert target.read_text() == "old"
    assert install_conf(source).stderr == "usage: install-conf SRC DST\n"

"""What the steps of the build share: architectures, commands, errors, the list of contents."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1]
RELEASE, PYTHON = "bookworm", "python3.11"
"""The Debian of the image, and its Python."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """`name` is Debian's, `machine` that of the kernel and of Python packages."""

    name: str
    machine: str

    @property
    def triplet(self) -> str:
        return f"{self.machine}-linux-gnu"

    @property
    def is_native(self) -> bool:
        return self.machine == os.uname().machine


ARCHITECTURES = {it.name: it for it in (Architecture("amd64", "x86_64"), Architecture("arm64", "aarch64"))}


class BuildError(Exception):
    """The build cannot go on, for a reason that one line says."""

    status = 1


class DownloadError(BuildError):
    """Something could not be had from a mirror."""

    status = 3


def run(argv: Sequence[str | Path], what: str, error: type[BuildError] = BuildError, **environ: str) -> str:
    """What the command prints.  Raises `error`, which names `what` it was for, and says why it failed."""
    try:
        done = subprocess.run(list(map(str, argv)), env={**os.environ, **environ}, capture_output=True, text=True)
    except OSError as exc:
        raise BuildError(f"cannot {what}: {exc}") from exc
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if not line.startswith("WARNING")]
        raise error(f"cannot {what}: `{argv[0]}` ended with status {done.returncode}: {' / '.join(said[-3:])}")
    return done.stdout


@dataclass(slots=True)
class Contents:
    """A section of contents.txt: a name, a version and bytes a line."""

    title: str
    lines: list[tuple[str, str, int]] = field(default_factory=list)

    def text(self) -> str:
        rows = "".join(f"  {name:<28} {version:<32} {-(-size // 1024):>8}\n" for name, version, size in self.lines)
        return f"{self.title}\n{rows}"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(it.lstat().st_size for it in files if not it.is_dir() or it.is_symlink())

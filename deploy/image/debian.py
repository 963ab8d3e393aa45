"""Debian packages: downloaded by apt-get, which checks them against Debian's signatures, and unpacked without dpkg."""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from base import HERE, PYTHON, RELEASE, Architecture, BuildError, Contents, DownloadError, run

_SOURCES = """\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {0} main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security {0}-security main
"""
_APT_CONF = (HERE / "apt.conf").read_text()

_SHARE, _STDLIB = "./usr/share", f"./usr/lib/{PYTHON}"
_NOT_UNPACKED = (
    *(f"{_SHARE}/{it}" for it in ("man", "info", "lintian", "gdb", "gcc", "bash-completion", "initramfs-tools")),
    *(f"{_SHARE}/{it}" for it in ("binfmts", "base-files", "python3", "pixmaps", "applications")),
    *(f"{_SHARE}/doc/*/{it}" for it in ("*.gz", "NEWS*", "README*", "examples", "FAQ*", "TODO*", "AUTHORS*")),
    *(f"./etc/{it}" for it in ("init.d", "default", "systemd", "dpkg", "motd", "update-motd.d", "issue*")),
    *("./boot", "./home", "./usr/games", "./usr/src", "./var/run", "./var/lock", "./var/mail", "./var/spool"),
    *("./lib/systemd", "./usr/lib/systemd", "./usr/lib/*/gconv", "./lib/*/gconv"),
    *(f"{_STDLIB}/{it}" for it in ("test", "pydoc_data", "idlelib", "lib2to3", "turtle.py", "ensurepip", "distutils")),
    # They want libraries that nothing else does, or are for Python's own tests.
    *(f"{_STDLIB}/lib-dynload/{it}.*" for it in ("_curses*", "readline", "nis", "_dbm", "_test*", "_xx*", "xx*")),
    f"{_STDLIB}/lib-dynload/_codecs_*",
)
"""Patterns of what packages have and the image has not.  Licences stay."""


@contextmanager
def apt(directory: Path, arch: Architecture) -> Iterator[Mapping[str, str]]:
    """The environment in which apt-get knows the Debian of the image and nothing of this machine's.

    `directory` keeps what was downloaded for the next build.
    """
    for sub in ("lists/partial", "archives/partial"):
        (directory / sub).mkdir(parents=True, exist_ok=True)
    (directory / "sources.list").write_text(_SOURCES.format(RELEASE))
    (directory / "apt.conf").write_text(_APT_CONF.format(directory=directory, arch=arch.name))
    with (directory / "lock-of-build").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environ = {"APT_CONFIG": str(directory / "apt.conf")}
        what = f"read what {RELEASE} has"
        # Otherwise a mirror that does not answer is a warning to apt-get.
        run(["apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update"], what, DownloadError, **environ)
        yield environ


def download(names: Sequence[str], directory: Path, environ: Mapping[str, str]) -> list[Path]:
    """The .deb files of the packages, the newest there are, in the given order.

    apt-get fetches what is missing, or is not what the signed lists say.
    """
    uris = run(["apt-get", "download", "--print-uris", *names], "find the packages", DownloadError, **environ)
    files = {name.split("_")[0]: name for name in re.findall(r"^'[^']*' (\S+)", uris, re.MULTILINE)}
    # apt-get writes into the directory where it runs.
    script = ["sh", "-c", 'cd "$0" && exec apt-get -q download "$@"', directory / "archives", *names]
    run(script, "download the packages", DownloadError, **environ)
    return [directory / "archives" / files[name] for name in names]


def names_of_packages() -> list[str]:
    lines = (HERE / "packages.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def unpack(package: Path, root: Path) -> list[Path]:
    """Unpack without what the image does not need; return what was unpacked."""
    tar = ["tar", "-xvp", "--no-same-owner", "--keep-directory-symlink", "-C", str(root)]
    tar += [f"--exclude={pattern}" for pattern in _NOT_UNPACKED]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as packed:
        done = subprocess.run(tar, stdin=packed.stdout, capture_output=True, text=True)
    if done.returncode != 0 or packed.returncode != 0:
        raise BuildError(f"cannot unpack {package}: {done.stderr.strip()}")
    return [root / line for line in done.stdout.splitlines()]


def unpack_packages(packages: Iterable[Path], root: Path) -> Contents:
    """Unpack the packages, and note them where dpkg would."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    contents = Contents(f"Debian {RELEASE}")
    status = []
    for package in packages:
        size = sum(it.lstat().st_size for it in unpack(package, root) if it.is_symlink() or it.is_file())
        control = run(["dpkg-deb", "-f", package], f"read {package}")
        fields = dict(re.findall(r"^(\w+): (.*)$", control, re.MULTILINE))
        contents.lines.append((fields["Package"], fields["Version"], size))
        status.append(control.replace("\n", "\nStatus: install ok installed\n", 1))
    (root / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    (root / "var/lib/dpkg/status").write_text("\n".join(status))
    return contents


def check_libraries(root: Path, arch: Architecture) -> None:
    """Raise BuildError when a program or library of the image needs a library that is not in it."""
    files = [it for it in root.rglob("*") if it.is_file() and not it.is_symlink() and _is_elf(it)]
    there = {it.name for it in root.rglob("*.so*")}
    kind = {"amd64": "X86-64", "arm64": "AArch64"}[arch.name]
    at = ""
    for line in run(["readelf", "-hdW", *files], "read the programs of the image").splitlines():
        if line.startswith("File: "):
            at = line.removeprefix("File: ").removeprefix(str(root))
        elif "(NEEDED)" in line and (name := line.partition("[")[2].rstrip("]")) not in there:
            raise BuildError(f"{at} needs {name}: its package is missing in {HERE / 'packages.txt'}")
        elif line.startswith("  Machine:") and kind not in line:
            raise BuildError(f"{at} is for {line.partition(':')[2].strip()}, not for {arch.name}")


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"

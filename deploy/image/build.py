#!/usr/bin/env python3
"""Build the container image from Debian packages, Python packages and this repository: `deploy/image/build.py OUT`.

It needs no root and no registry of images.  It makes in OUT

    root/                      the root file system
    root.tar                   the same, for the Containerfile
    udptun-VERSION-ARCH.tar    the image, for `podman load`, `docker load` and `ctr images import`
    contents.txt               what is in it: packages, versions, sizes

The same packages make the same bytes.  All times are SOURCE_DATE_EPOCH, or the time of the last commit.  docs/image.md
says what the build needs.
Exit status 1: it failed; 3: something could not be downloaded.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import debian
import python_packages
from archive import write_image, write_layer
from base import ARCHITECTURES, HERE, PYTHON, SOURCE, Architecture, BuildError, Contents, run, size_of

DEBIANS_PYTHON = Path("/usr/bin/python3")
"""The CNI plugin is made of what this one loads."""
SITE = "usr/lib/python3/dist-packages"

APPLETS = (
    *("[", "cat", "chmod", "cp", "cut", "date", "df", "dmesg", "du", "echo", "env", "false", "find", "free", "grep"),
    *("head", "hostname", "id", "ip", "kill", "less", "ln", "ls", "mkdir", "mount", "mv", "nc", "netstat", "nslookup"),
    *("ping", "printf", "ps", "pwd", "readlink", "rm", "rmdir", "sed", "sh", "sleep", "sort", "stat", "sync", "tail"),
    *("tar", "tee", "test", "time", "top", "touch", "traceroute", "true", "umount", "uname", "uptime", "vi", "wc"),
    *("wget", "xargs"),
)
"""Of busybox."""

MOUNT_POINTS = (
    *("dev", "proc", "sys", "tmp", "root", "run/flannel", "run/udptun", "var/lib/udptun", "etc/kube-flannel"),
    *("etc/cni/net.d", "opt/cni/bin", "run/secrets/kubernetes.io/serviceaccount"),
)
"""They are there in a read-only root, too."""

FILES: Mapping[str, str] = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    **dict.fromkeys(("etc/hosts", "etc/hostname", "etc/resolv.conf", "run/xtables.lock"), ""),
}

LINKS: Mapping[str, str] = {
    "usr/bin/python3": PYTHON,
    "opt/bin/flanneld": "../../usr/bin/flanneld",
    "opt/bin/mk-docker-opts.sh": "../../usr/bin/mk-docker-opts.sh",
    # Where the image of flannel's plugin has it.
    "flannel": "opt/udptun/udptun-cni",
    "var/run": "../run",
    **{f"usr/bin/{applet}": "busybox" for applet in APPLETS},
}

SCRIPT = """\
#!/usr/bin/python3 -I
import sys
from {module} import {function}
sys.exit({function}())
"""


def main(out: Path, arch: Architecture, cache: Path) -> None:
    """Build everything into `out`, whose old content goes.  Raises BuildError."""
    if (running := f"python{sys.version_info.major}.{sys.version_info.minor}") != PYTHON:
        raise BuildError(f"this is {running}, and the image has {PYTHON}, for which the modules are compiled: use that")
    version = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["version"]
    out.mkdir(parents=True, exist_ok=True)
    root = out / "root"
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()
    with tempfile.TemporaryDirectory() as work:
        sections = fill(root, arch, cache / arch.name, Path(work))
    debian.check_libraries(root, arch)
    write_layer(root, out / "root.tar")
    image = out / f"udptun-{version}-{arch.name}.tar"
    write_image(out / "root.tar", f"udptun:{version}", arch, HERE / "Containerfile", image)
    total = sum(size for section in sections for _, _, size in section.lines)
    text = f"udptun:{version} for {arch.name}; sizes in KiB\n\n" + "\n".join(it.text() for it in sections)
    text += f"\n{'total':<61} {-(-total // 1024):>8}\n"
    (out / "contents.txt").write_text(text)
    print(text, end="")


def fill(root: Path, arch: Architecture, cache: Path, work: Path) -> list[Contents]:
    """Make the root file system; return what was put into it."""
    sysroot = work / "sysroot"
    with debian.apt(cache, arch) as environ:
        packages = debian.download(debian.names_of_packages(), cache, environ)
        if not arch.is_native:
            sysroot.mkdir()
            for package in debian.download([f"lib{PYTHON}-dev", f"lib{PYTHON}-minimal"], cache, environ):
                debian.unpack(package, sysroot)
        sections = [debian.unpack_packages(packages, root)]
    source = python_packages.copy_of_source(work)
    build_environment = python_packages.compiler_environment(arch, source, sysroot)
    wheel = python_packages.build_wheels(arch, source, build_environment, work)
    sections.append(python_packages.install(arch, wheel, root / SITE))
    own = Contents("The rest")
    before = size_of(root)
    python_packages.compile_all(root)
    own.lines.append(("bytecode of all modules", "", size_of(root) - before))
    before = size_of(root)
    build_plugin(root / "opt/udptun/udptun-cni", arch, sysroot)
    make_entries(root)
    own.lines.append(("CNI plugin, links, scripts", "", size_of(root) - before))
    return [*sections, own]


def build_plugin(program: Path, arch: Architecture, sysroot: Path) -> None:
    """The CNI plugin as a static executable, which is put on the hosts."""
    program.parent.mkdir(parents=True)
    cross = [] if arch.is_native else [f"--sysroot={sysroot}", f"--machine={arch.machine}"]
    run([DEBIANS_PYTHON, SOURCE / "deploy/cni/build.py", program, *cross], "build the CNI plugin")


def make_entries(root: Path) -> None:
    """The commands, under all the names that manifests call them by, and what a container's root needs."""
    for directory in (*MOUNT_POINTS, "opt/bin"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (info,) = (root / SITE).glob("udptun-*.dist-info")
    entries = configparser.ConfigParser()
    entries.read(info / "entry_points.txt")
    for name, place in entries["console_scripts"].items():
        module, function = place.split(":")
        _write_program(root / "usr/bin" / name, SCRIPT.format(module=module, function=function))
    _write_program(root / "opt/bin/install-conf", (HERE / "install_conf.py").read_text())
    for name, content in FILES.items():
        (root / name).write_text(content)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the container image.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make it in")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="the image's architecture (this machine's)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "udptun", "image")
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="for Debian packages (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    native = next((it for it in ARCHITECTURES.values() if it.is_native), None)
    chosen = ARCHITECTURES[given.arch] if given.arch else native
    try:
        if chosen is None:
            raise BuildError(f"--arch must be one of {', '.join(ARCHITECTURES)}: there is no image for this machine's")
        main(given.out.resolve(), chosen, given.cache.resolve())
    except BuildError as exc:
        print(f"build.py: error: {exc}", file=sys.stderr)
        sys.exit(exc.status)

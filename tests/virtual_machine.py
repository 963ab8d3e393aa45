"""A virtual machine with another kernel and this machine's files: for what differs by the kernel.

    kernel      a Debian package, unpacked into a folder and installed nowhere
    initramfs   a static busybox, and the modules that it takes to see this machine's root over 9p
    root        an overlay in memory upon that: everything can be written to, and nothing of it stays

The machine has no network but loopback.  Without a KVM that works it is emulated, some ten times slower.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = ("qemu-system-x86_64", "busybox", "modprobe", "apt-get", "dpkg-deb")
_BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
_BEGUN, _ENDED = "machine: begun", "machine: ended with "
_BOOT_LIMIT_S = {"kvm": 10.0, "tcg": 120.0}

_APT_CONF = (Path(__file__).parents[1] / "deploy/image/apt.conf").read_text()
"""That of the image's build, which knows nothing of this machine's either."""

_INIT = """#!/bin/busybox sh
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /low /up /root
mount -t proc none /proc
for module in {modules}; do insmod /modules/$module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /low
mount -t tmpfs none /up
mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work none /root
cd /root
mount -t proc none proc
mount -t sysfs none sys
mount -t devtmpfs none dev
mkdir -p dev/pts dev/shm lib/modules
mount -t devpts none dev/pts
mount -t tmpfs none dev/shm
mount -t tmpfs none run
mount -t cgroup2 none sys/fs/cgroup
ln -s {tree} lib/modules/{release}
echo {begun}
mount -o move . /
exec chroot . /usr/bin/env -i PATH={path} HOME=/root TERM=dumb /bin/sh -c '
modprobe -a tun iptable_nat
ip link set lo up
cd {directory}
{command}
echo {ended}$?
echo o >/proc/sysrq-trigger
sleep 60'
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a package has, below `folder`."""

    folder: Path
    release: str

    @classmethod
    def unpack(cls, suite: str, folder: Path) -> Kernel:
        """The one that a suite of Debian's has now, as `debian-security bookworm-security`.  Raises CalledProcessError.

        apt-get knows that suite and nothing of this machine's, and checks what it fetches by Debian's signatures.
        """
        for sub in ("lists/partial", "archives/partial"):
            (folder / "apt" / sub).mkdir(parents=True)
        (folder / "apt/sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/{suite} main\n")
        conf = folder / "apt/apt.conf"
        conf.write_text(_APT_CONF.format(directory=folder / "apt", arch="amd64"))
        environ = {**os.environ, "APT_CONFIG": str(conf)}

        def output(*argv: str) -> str:
            return subprocess.run(argv, check=True, cwd=folder, env=environ, capture_output=True, text=True).stdout

        output("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")
        (exact,) = re.findall(r"Depends: (linux-image-\S+)", output("apt-cache", "depends", "linux-image-amd64"))
        release = exact.removeprefix("linux-image-")
        # Of some it is a package of packages.
        parts = re.findall(rf"Depends: (linux-\w+-{re.escape(release)})", output("apt-cache", "depends", exact))
        output("apt-get", "-qq", "download", exact, *parts)
        for file in folder.glob("*.deb"):
            output("dpkg-deb", "-x", str(file), ".")
            file.unlink()
        if not (folder / "lib").exists():
            (folder / "lib").symlink_to("usr/lib")
        output("depmod", "-b", ".", release)
        return cls(folder, release)

    def run(self, command: str, directory: Path, limit_s: float) -> tuple[int, str]:
        """Exit status and output of a shell command without single quotes.  Raises TimeoutError."""
        initramfs = self._make_initramfs(command, directory)
        for accelerator in ["kvm", "tcg"] if os.access("/dev/kvm", os.W_OK) else ["tcg"]:
            output = self._boot(initramfs, accelerator, limit_s)
            if _BEGUN in output:
                break
        _, _, said = output.partition(_BEGUN)
        said, ended, status = said.replace("\r", "").partition(_ENDED)
        if not ended:
            raise TimeoutError(f"the machine did not end in {limit_s} s:\n{output}")
        return int(status.split()[0]), said

    def _boot(self, initramfs: Path, accelerator: str, limit_s: float) -> str:
        """What the console shows until the machine ends, or does not begin in time."""
        log = self.folder / "console"
        machine = ["qemu-system-x86_64", "-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", "3G"]
        machine += ["-nographic", "-no-reboot", "-net", "none", "-append", "console=ttyS0 panic=-1 quiet"]
        # Where packages have it, and those that are packages of packages.
        (kernel,) = [*self.folder.glob("boot/vmlinuz-*"), *self.folder.glob("usr/lib/modules/*/vmlinuz")]
        machine += ["-kernel", str(kernel), "-initrd", str(initramfs)]
        machine += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]
        with log.open("wb") as console, subprocess.Popen(
            machine, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        ) as process:
            began_s = time.monotonic()
            try:
                process.wait(_BOOT_LIMIT_S[accelerator])
            except subprocess.TimeoutExpired:
                if _BEGUN in log.read_text(errors="replace"):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(limit_s - (time.monotonic() - began_s))
            finally:
                process.kill()
        return log.read_text(errors="replace")

    def _make_initramfs(self, command: str, directory: Path) -> Path:
        root = self.folder / "initramfs"
        shutil.rmtree(root, ignore_errors=True)
        (root / "modules").mkdir(parents=True)
        (root / "bin").mkdir()
        shutil.copy(shutil.which("busybox") or "busybox", root / "bin")
        modules: list[str] = []
        for module in _BOOT_MODULES:
            asked = ["modprobe", "-d", self.folder, "-S", self.release, "--show-depends", module]
            shown = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
            for path in re.findall(r"^insmod (\S+)", shown, re.MULTILINE):
                if Path(path).name not in modules:
                    modules.append(Path(path).name)
                    # Some releases compress them.
                    content = Path(path).read_bytes()
                    content = lzma.decompress(content) if path.endswith(".xz") else content
                    (root / "modules" / Path(path).name).write_bytes(content)
        init = root / "init"
        init.write_text(
            _INIT.format(
                modules=" ".join(modules),
                tree=self.folder / "lib" / "modules" / self.release,
                release=self.release,
                begun=_BEGUN,
                ended=_ENDED,
                path=os.environ["PATH"],
                directory=directory,
                command=command,
            )
        )
        init.chmod(0o755)
        archive = self.folder / "initramfs.cpio"
        files = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        with archive.open("wb") as file:
            packing = ["busybox", "cpio", "-o", "-H", "newc"]
            subprocess.run(packing, check=True, cwd=root, input=files.encode(), stdout=file, stderr=subprocess.DEVNULL)
        return archive

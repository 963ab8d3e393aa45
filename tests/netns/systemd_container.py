"""systemd as process 1 of a container in a host of a lab, with this machine's programs and little of its units.

    lab's host: network namespace, pid namespace
      +-- crun: mounts, pids, cgroups, IPC of its own
            process 1: /usr/lib/systemd/systemd -> journald, our unit

The container shares /usr and the package with this machine, read-only, and nothing of /run, /tmp, /etc, /var or of the
cgroups.  Of the units that systemd has it sees UNITS: all others would set up a machine, and this one is set up.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import oci_config
from oci_config import bound

from udptun.lab.host import Host
from udptun.lab.machine import LAB_DIR, SOURCE_ROOT, wait_until

SYSTEMD = Path("/usr/lib/systemd/systemd")
LACKING = [str(it) for it in (SYSTEMD, Path("/usr/lib/systemd/systemd-journald")) if not it.exists()]
LACKING += [it for it in ("crun", "systemctl", "journalctl") if shutil.which(it) is None]
"""What this machine has not."""

UNITS = (
    *("basic.target", "sysinit.target", "multi-user.target", "shutdown.target", "exit.target", "final.target"),
    *("umount.target", "local-fs.target", "swap.target", "sockets.target", "timers.target", "paths.target"),
    *("slices.target", "network.target", "network-online.target", "systemd-exit.service", "rescue.target"),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
)
_UNIT_DIR = Path("/usr/lib/systemd/system")
# Not below /root or /tmp, of which the unit sees nothing.
_SOURCE, _PACKAGES, _PYTHON = "/opt/source", "/opt/packages", "/opt/python"
_PROGRAM = f"""\
#!/bin/sh
PYTHONPATH={_SOURCE}:{_PACKAGES} exec {_PYTHON}/bin/python3 -m udptun "$@"
"""
_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\nsystemd-journal:x:101:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "machine-id": "0123456789abcdef0123456789abcdef\n",
    "os-release": "ID=test\n",
}
_OF_THIS_MACHINE = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
# Without those that reach beyond namespaces: the clock, modules, memory, a reboot.
_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "BPF"),
    *("SETFCAP", "MKNOD", "AUDIT_WRITE", "PERFMON"),
)


class SystemdContainer:
    """systemd in `host`, with `unit` enabled; `etc` has further files of /etc.  A context manager."""

    def __init__(self, host: Host, unit: Path, etc: Mapping[str, str]) -> None:
        self.host = host
        self._name = f"systemd-{host.name}"
        # The pid tells it from those of other labs: cgroups are the whole machine's.
        self._cgroup = f"/sys/fs/cgroup/udptun-{os.getpid()}-{host.name}"
        bundle = LAB_DIR / self._name
        _make_root(host.path(bundle / "root"), unit, etc)
        (host.path(bundle) / "config.json").write_text(json.dumps(self._config(bundle / "root")))
        self._log = host.path(bundle / "log")
        host.run(["sh", "-c", f"mount -t cgroup2 none /sys/fs/cgroup && mkdir {self._cgroup}"])
        # It manages the cgroup that it begins in, so it begins in one of its own.
        crun = f"crun --cgroup-manager=disabled --root=/run/crun run --bundle={bundle} {self._name}"
        with self._log.open("w") as output:
            command = ["sh", "-c", f"echo 0 >{self._cgroup}/cgroup.procs && exec {crun}"]
            self._process = host.popen(command, stdout=output, stderr=output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all that runs in it, at once."""
        self.host.run(["sh", "-c", f"echo 1 >{self._cgroup}/cgroup.kill"], check=False)
        self._process.kill()
        self._process.wait()
        remove = ["find", self._cgroup, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
        wait_until("the end of its cgroup", lambda: self.host.run(remove, check=False).returncode == 0, 10)

    def __call__(self, *command: str, check: bool = True) -> str:
        """What the command prints in the container."""
        crun = ("crun", "--cgroup-manager=disabled", "--root=/run/crun", "exec", self._name)
        return str(self.host.run([*crun, *command], check=check).stdout).strip()

    def property(self, unit: str, name: str) -> str:
        """What systemd says of the unit; empty while it cannot be asked."""
        return self("systemctl", "show", unit, "--value", f"--property={name}", check=False)

    def wait_active(self, unit: str, within_s: float = 30) -> None:
        """Until systemd says that the unit has started; what it logged is printed when it does not."""
        try:
            wait_until(f"{unit} to be active", lambda: self.property(unit, "ActiveState") == "active", within_s)
        except BaseException:
            print(self._log.read_text(), self("systemctl", "status", "-l", unit, check=False))
            print(self("journalctl", "--no-pager", "-n", "100", check=False))
            raise

    def _config(self, root: Path) -> dict[str, Any]:
        unit_dir, nothing = root / "units", root / "nothing"
        mounts = [
            bound("/usr", "/usr", is_read_only=True),
            bound(unit_dir, str(_UNIT_DIR), is_read_only=True),
            bound(nothing, "/usr/lib/systemd/system-generators", is_read_only=True),
            bound(SOURCE_ROOT, _SOURCE, is_read_only=True),
            bound(sysconfig.get_path("purelib"), _PACKAGES, is_read_only=True),
            bound(sys.base_prefix, _PYTHON, is_read_only=True),
            bound(self._cgroup, "/sys/fs/cgroup", is_read_only=False),
            # The rest of /proc/sys is the machine's.
            bound("/proc/sys/net", "/proc/sys/net", is_read_only=False),
            {"type": "tmpfs", "source": "tmpfs", "destination": "/run", "options": ["mode=755"]},
            *(bound(it, it, is_read_only=True) for it in _OF_THIS_MACHINE if Path(it).exists()),
        ]
        linux = {
            "namespaces": [{"type": it} for it in ("pid", "mount", "ipc", "uts", "cgroup")],
            "devices": [{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o600}],
        }
        container = {"securityContext": {"capabilities": {"drop": ["ALL"], "add": list(_CAPABILITIES)}}}
        args = [str(SYSTEMD), "--unit=multi-user.target"]
        environment = ["container=oci", "PATH=/usr/bin:/usr/sbin"]
        return oci_config.config(container, args, environment, mounts, linux) | {"hostname": self.host.name}


def _make_root(root: Path, unit: Path, etc: Mapping[str, str]) -> None:
    for it in ("usr", "proc", "sys", "dev", "run", "tmp", "root", "home", "var/lib", "var/tmp", "units", "nothing"):
        (root / it).mkdir(parents=True)
    for it in ("bin", "sbin", "lib", "lib64"):
        (root / it).symlink_to(f"usr/{it}")
    (root / "var/run").symlink_to("../run")
    for name in UNITS:
        shutil.copy(_UNIT_DIR / name, root / "units")
    program = root / "opt/udptun/bin/udptun"
    files = {f"etc/{name}": text for name, text in (_ETC | dict(etc)).items()} | {"opt/udptun/bin/udptun": _PROGRAM}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    program.chmod(0o755)
    wanted = root / "etc/systemd/system/multi-user.target.wants"
    wanted.mkdir(parents=True)
    shutil.copy(unit, wanted.parent)
    (wanted / unit.name).symlink_to(f"../{unit.name}")
    sockets = root / "etc/systemd/system/sysinit.target.wants"
    sockets.mkdir()
    for name in UNITS:
        if "journald" in name:
            (sockets / name).symlink_to(_UNIT_DIR / name)

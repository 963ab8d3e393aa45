"""podman in a host of the lab: containers get their network through CNI, as on a node of Kubernetes.

    podman --/etc/cni/net.d--> flannel (ours) --> bridge --> host-local
                          `--> portmap

podman with its CNI back end, flannel's configuration, and the plugins bridge, host-local and portmap are not ours.  A
container needs no image: its root is a directory with static busybox.

All of it lies on tmpfs of the machine, and every process belongs to the machine, so nothing outlives it.  podman's
configuration lies where podman looks for it, so `podman` in the host works as it stands.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

from udptun.cni import install
from udptun.cni.errors import CniError
from udptun.lab.errors import LabError
from udptun.lab.machine import Machine

if TYPE_CHECKING:
    from udptun.core.network_state import IPAddress

CONFLIST = """\
{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"""
"""flannel's, unchanged."""

ROOT = Path("/run/busybox")
"""The root of every container: static busybox, and a link to it for each of its commands."""

PROGRAMS = Path("/run/cni")
"""Where podman finds our plugin.  The others are in one of PLUGIN_DIRS."""

PLUGIN_DIRS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))

_BUSYBOX = Path("/bin/busybox")
_RESULTS = Path("/var/lib/cni/results")
_NETWORK, _LINK = "cbr0", "eth0"

_CONTAINERS_CONF = """\
[containers]
# podman would load its own profile into the kernel, and leave it there.
apparmor_profile = "unconfined"
cgroups = "disabled"
# podman's own, and NET_RAW for ping, as containerd and Docker have it.
default_capabilities = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"]
# Not above the limits of whoever started the lab: root in a container may lack the right to raise them.
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{programs}", "{plugins}"]
network_config_dir = "/etc/cni/net.d"
default_network = "{network}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
# By default the locks are in /dev/shm, which is the whole machine's.
lock_type = "file"
"""

_STORAGE_CONF = """\
[storage]
driver = "vfs"
graphroot = "/run/containers/graph"
runroot = "/run/containers/run"
"""

_MOUNTS = """\
mount -t tmpfs tmpfs /etc/containers && mount -t tmpfs tmpfs /etc/cni && mkdir /etc/cni/net.d &&
# crun wants one version of cgroups, and a host may have both.
mount -t cgroup2 none /sys/fs/cgroup
"""


def plugin_directory() -> Path | None:
    """Where this machine has bridge, host-local and portmap; None when it has not."""
    for directory in PLUGIN_DIRS:
        if all((directory / name).exists() for name in ("bridge", "host-local", "portmap")):
            return directory
    return None


def missing_packages() -> list[str]:
    """Debian's names of the packages that containers need and this machine lacks."""
    missing = [name for name in ("podman", "iptables") if shutil.which(name) is None]
    missing += [] if shutil.which("crun") or shutil.which("runc") else ["crun"]
    missing += [] if plugin_directory() else ["containernetworking-plugins"]
    return missing if _is_static(_BUSYBOX) else [*missing, "busybox-static"]


def _is_static(program: Path) -> bool:
    """Whether the program is there and needs no libraries.  Debian's package busybox has one that does."""
    try:
        return b"\0.interp\0" not in program.read_bytes()
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Container:
    """What CNI has answered.  `address`: see `Pod`.  `net_ns` is the name of its network namespace in /run/netns of the
    machine.
    """

    address: IPAddress
    net_ns: str
    ipv6_address: IPv6Address | None = None


class Podman:
    """podman of one machine.  Making it prepares the machine; `missing_packages` must be empty.  Raises LabError.

    Not for threads: one thread at a time may call it.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.run(["sh", "-c", _MOUNTS])
        here = machine.at()
        values = {"programs": PROGRAMS, "plugins": plugin_directory(), "network": _NETWORK}
        here.path("/etc/containers/containers.conf").write_text(_CONTAINERS_CONF.format(**values))
        here.path("/etc/containers/storage.conf").write_text(_STORAGE_CONF)
        here.path("/etc/cni/net.d/10-flannel.conflist").write_text(CONFLIST)
        here.path(PROGRAMS).mkdir()
        try:
            install.install(str(here.path(PROGRAMS)), "flannel", install.launcher())
        except CniError as exc:
            raise LabError(f"cannot install the CNI plugin in {machine.name}: {exc.message} {exc.details}") from exc
        for directory in ("bin", "etc", "proc", "sys", "dev", "tmp", "run"):
            here.path(ROOT / directory).mkdir(parents=True)
        shutil.copy(_BUSYBOX, here.path(ROOT / "bin"))
        machine.run(["chroot", str(ROOT), "/bin/busybox", "--install", "-s", "/bin"])

    def __call__(self, *words: str) -> str:
        """What `podman WORDS` prints.  See `Machine.run`."""
        return self._machine.run(["podman", *words], timeout=60).stdout.strip()

    def run_pod(self, name: str) -> Container:
        """Start a container that sleeps, with an address of the host's subnet."""
        options = ["--detach", "--name", name, "--hostname", name, "--rootfs", str(ROOT)]
        identity = self("run", *options, "sleep", "infinity")
        # What CNI has answered, as libcni keeps it for a later DEL.  To ask podman costs one more process.
        path = self._machine.at().path(_RESULTS / f"{_NETWORK}-{identity}-{_LINK}")
        try:
            result = json.loads(path.read_text())["result"]
            (inside,) = (it for it in result["interfaces"] if it["name"] == _LINK)
            addresses = [ip_interface(it["address"]).ip for it in result["ips"]]
            ipv6_address = next((it for it in addresses if isinstance(it, IPv6Address)), None)
            return Container(addresses[0], Path(inside["sandbox"]).name, ipv6_address)
        except (OSError, ValueError, LookupError) as exc:
            raise LabError(
                f"podman of {self._machine.name} has not used CNI for its container {name} ({exc}): "
                "that needs podman 4; later ones have no CNI back end"
            ) from exc

"""The daemon in containers under crun, as the manifest asks for it (deploy/kube-flannel.yml), and cleanup.yml's.

Command, capabilities, read-only root and mounts are read from the manifests.  What their image would hold, this
machine's programs and this package with its bytecode, is bound into an otherwise empty root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import oci_config
import yaml
from oci_config import bound
from traffic import REAL_TIME, datapath_pids

from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import LAB_DIR, SOURCE_ROOT, wait_until
from udptun.lab.topology import KUBE_PORT, Lab

MISSING = [name for name in ("crun",) if shutil.which(name) is None]
"""What these tests need and this machine lacks."""

_DEPLOY = SOURCE_ROOT / "deploy"
_CONFIG_MAP = LAB_DIR / "kube-flannel-cfg"
"""For each host a directory, as the kubelet makes one of a ConfigMap."""
_API = f"--kube-api-url=http://{UNDERLAY[1]}:{KUBE_PORT}"
_IMAGE = dict.fromkeys(("/usr", "/etc", str(SOURCE_ROOT), sys.prefix, sys.base_prefix))
"""What is bound into the root, read-only."""


class Containers:
    """The containers of a lab's hosts.  `bytecode` is an empty directory of this machine."""

    def __init__(self, lab: Lab, bytecode: Path, net_conf: Mapping[str, object]) -> None:
        self.lab = lab
        self._bytecode = bytecode
        self._started: list[Container] = []
        # An image is compiled, and nobody can write to its files later.
        imports = ", ".join(f"udptun.{it}" for it in ("commands.cli", "control.daemon", "stores.kube.store"))
        command = [sys.executable, "-c", f"import udptun.control.tunnelled, {imports}"]
        env = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "PYTHONPYCACHEPREFIX": str(bytecode)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run(command, env=env, check=True)
        for host in lab.hosts:
            # crun wants one version of cgroups, and this machine may have both.
            host.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"])
            self.configure(host, json.dumps(net_conf))

    def configure(self, host: Host, net_conf: str) -> None:
        """Give the host the manifest's ConfigMap, with this net-conf.json."""
        directory = host.path(_CONFIG_MAP) / host.name
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in _object("kube-flannel.yml", "ConfigMap")["data"].items():
            (directory / name).write_text(net_conf if name == "net-conf.json" else text)

    def start(self, host: Host, name: str, *flags: str, without: Sequence[str] = ()) -> Container:
        """Run the manifest's daemon with these flags besides, and `without` others."""
        pod = _pod("kube-flannel.yml")
        (container,) = pod["containers"]
        program, *args = [*container["command"], *container["args"]]
        args = [it for it in args if it not in without]
        return self._run(host, name, pod, container, [program, *args, _API, *flags])

    def clean_up(self, host: Host) -> None:
        """Have cleanup.yml's container do its work."""
        pod = _pod("cleanup.yml")
        (container,) = pod["initContainers"]
        cleanup = self._run(host, "cleanup", pod, container, container["command"])
        assert cleanup.process.wait(30) == 0, cleanup.log()

    def _run(self, host: Host, name: str, pod: Any, container: Any, command: Sequence[str]) -> Container:
        # All hosts of a lab share its directory.
        name = f"{host.name}-{name}"
        running = Container(host, name, _bundle(host, name, self._bytecode, pod, container, command))
        self._started.append(running)
        return running

    def running(self, host: Host) -> list[Container]:
        """The host's, in the order in which they were started."""
        return [it for it in self._started if it.host is host and it.process.poll() is None]

    def kill_all(self, host: Host) -> None:
        """Whatever still runs on the host."""
        for container in self.running(host):
            container.kill()


class Container:
    """A running container of the daemon.  When it ends or is killed, all its processes end, as those of a pod."""

    def __init__(self, host: Host, name: str, bundle: Path) -> None:
        self.host = host
        self.name = name
        self._log = host.path(LAB_DIR / f"{name}.log")
        crun = [*REAL_TIME, "crun", "--cgroup-manager=disabled", "--root=/run/crun", "run", f"--bundle={bundle}", name]
        with self._log.open("w") as output:
            self.began_ns = time.monotonic_ns()
            self.process = host.popen(crun, stdout=output, stderr=output)

    @property
    def daemon_pid(self) -> int:
        """Process 1 of the container, as this machine has it."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the log has `text` so many times."""
        try:
            wait_until(text, lambda: self.log().count(text) >= count or self.process.poll() is not None, 15)
        finally:
            print(self.log())
        assert self.log().count(text) >= count

    def wait_ready(self, count: int = 1) -> None:
        self.wait_for(" ready subnet=", count)

    def has_datapath(self) -> bool:
        """Whether all datapath processes of the host, two, are this container's."""
        ours = Path(f"/proc/{self.daemon_pid}/ns/pid").readlink()
        pids = datapath_pids(self.host)
        try:
            return len(pids) == 2 and all(self.host.path(f"/proc/{pid}/ns/pid").readlink() == ours for pid in pids)
        except FileNotFoundError:
            # One has just ended.
            return False

    def wait_for_datapath(self) -> None:
        wait_until("the datapath in the container", self.has_datapath, 10)

    def stop(self) -> None:
        """As the kubelet does: SIGTERM to the daemon; with it everything in the container ends."""
        os.kill(self.daemon_pid, signal.SIGTERM)
        assert self.process.wait(10) == 0

    def kill(self) -> None:
        """SIGKILL to process 1, and so to all of the container."""
        os.kill(self.daemon_pid, signal.SIGKILL)
        self.process.wait()


def _object(manifest: str, kind: str) -> Any:
    return next(it for it in yaml.safe_load_all((_DEPLOY / manifest).read_text()) if it["kind"] == kind)


def _pod(manifest: str) -> Any:
    return _object(manifest, "DaemonSet")["spec"]["template"]["spec"]


def _bundle(host: Host, name: str, bytecode: Path, pod: Any, container: Any, command: Sequence[str]) -> Path:
    """Write what crun needs to run it; the directory, as the host has it."""
    assert (command[0], container["securityContext"]["capabilities"]["drop"]) == ("udptun", ["ALL"])
    bundle = LAB_DIR / "containers" / name
    root = host.path(bundle) / "root"
    root.mkdir(parents=True, exist_ok=True)
    for link in ("bin", "sbin", "lib", "lib64"):
        if Path(f"/{link}").is_symlink() and not (root / link).is_symlink():
            (root / link).symlink_to(Path(f"/{link}").readlink())
    image = [bound(path, path, is_read_only=True) for path in (*_IMAGE, str(bytecode))]
    environment = [
        f"PATH={os.environ['PATH']}",
        f"PYTHONPATH={SOURCE_ROOT}",
        f"PYTHONPYCACHEPREFIX={bytecode}",
        f"NODE_NAME={host.name}",
    ]
    args, mounts = [sys.executable, "-m", *command], [*image, *_volumes(host, pod, container)]
    namespaces = {"namespaces": [{"type": it} for it in ("pid", "mount", "ipc", "uts", "cgroup")]}
    config = oci_config.config(container, args, environment, mounts, namespaces) | {"hostname": host.name}
    (host.path(bundle) / "config.json").write_text(json.dumps(config))
    return bundle


def _volumes(host: Host, pod: Any, container: Any) -> Iterator[dict[str, object]]:
    """The manifest's volumes: nothing else does a container share with the host and with the next container."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]].get("hostPath", {"path": str(_CONFIG_MAP / host.name), "type": ""})
        path = host.path(volume["path"])
        if volume["type"] == "DirectoryOrCreate":
            path.mkdir(parents=True, exist_ok=True)
        elif volume["type"] == "FileOrCreate":
            path.touch()
        yield bound(volume["path"], mount["mountPath"], is_read_only=mount.get("readOnly", False))

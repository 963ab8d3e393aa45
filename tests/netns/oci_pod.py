"""Pods of a DaemonSet in a host of a lab, as kubelet and a container runtime run them: runc or crun, no engine.

What a container gets is made from the manifest and nothing else: its security context, environment and volumes, and
around them what every runtime adds (oci_config.py, and the seccomp profile).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oci_config
from container_runtimes import mount_cgroups
from oci_config import bound

from udptun.lab.host import Host
from udptun.lab.machine import wait_until

SECCOMP = Path("/usr/share/containers/seccomp.json")
"""The profile that runtimes use by default, in docker's form."""

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "runc": ("runc", "--root=/run/runc"),
    # crun refuses cgroups of both versions at once, which a machine may have.
    "crun": ("crun", "--root=/run/crun", "--cgroup-manager=disabled"),
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image as deploy/image/build.py leaves it in `directory`."""

    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def archive(self) -> Path:
        (archive,) = self.directory.glob("udptun-*.tar")
        return archive

    def settings(self) -> dict[str, Any]:
        """Entrypoint, Env and the like."""
        with tarfile.open(self.archive) as archive:
            (manifest,) = json.loads(_read(archive, "manifest.json"))
            settings: dict[str, Any] = json.loads(_read(archive, manifest["Config"]))["config"]
            return settings


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


class OciPod:
    """The pod of a manifest's DaemonSet in one host.  `objects` are those of the manifest."""

    def __init__(
        self,
        host: Host,
        runtime: str,
        image: Image,
        objects: Sequence[Mapping[str, Any]],
        directory: Path,
        cgroup: str,
        environ: Mapping[str, str],
    ) -> None:
        """`directory` is this pod's, and has `serviceaccount/`; `environ` is where the API server is."""
        self.host = host
        self.log_path = directory / "log"
        self._runtime = _COMMANDS[runtime]
        self._image = image
        self._directory = directory
        self._cgroup = cgroup
        self._environ = environ
        (daemon_set,) = (it for it in objects if it["kind"] == "DaemonSet")
        data = {k: v for it in objects if it["kind"] == "ConfigMap" for k, v in it["data"].items()}
        self.namespace = daemon_set["metadata"]["namespace"]
        self.name = f"{daemon_set['metadata']['name']}-{host.name}"
        self._spec = daemon_set["spec"]["template"]["spec"]
        self._volumes = {it["name"]: self._volume(it, data) for it in self._spec["volumes"]}
        self._processes: list[subprocess.Popen[str]] = []
        if not any(host.path("/sys/fs/cgroup").iterdir()):
            if runtime == "runc":
                mount_cgroups(host)
            else:
                host.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"])

    def _volume(self, volume: Mapping[str, Any], data: Mapping[str, str]) -> Path:
        """The directory or file of the host that the volume is, made as kubelet makes it."""
        if "configMap" in volume:
            directory = self._directory / volume["name"]
            directory.mkdir()
            for name, text in data.items():
                (directory / name).write_text(text)
            return directory
        path = Path(volume["hostPath"]["path"])
        if path.parts[1] not in ("run", "var", "dev"):
            # The hosts of a lab share /opt and /etc with this machine.
            here = there = self._directory.parent / self.host.name / path.relative_to("/")
        else:
            here, there = self.host.path(path), path
        kind = volume["hostPath"].get("type", "")
        if kind == "FileOrCreate":
            here.touch()
        elif kind == "CharDevice":
            assert here.is_char_device()
        else:
            here.mkdir(parents=True, exist_ok=True)
        return there

    def of_host(self, volume: str) -> Path:
        """The host's directory of this volume, as a path of ours."""
        path = self._volumes[volume]
        return path if path.is_relative_to(self._directory.parent) else self.host.path(path)

    # --- running

    def initialise(self) -> str:
        """Run the init containers one after the other; what they print."""
        said = ""
        for container in self._spec["initContainers"]:
            command = self._command("run", self._bundle(container), self._id(container))
            done = self.host.run(command, check=False)
            said += done.stdout + done.stderr
            assert done.returncode == 0, f"{container['name']}: {said}"
            self.host.run([*self._runtime, "delete", "--force", self._id(container)], check=False)
        return said

    def start(self) -> None:
        """Start the daemon's container."""
        (container,) = self._spec["containers"]
        with self.log_path.open("a") as log:
            command = self._command("run", self._bundle(container), self._id(container))
            self._processes.append(self.host.popen(command, stdout=log, stderr=log))

    def start_with(self, refused: str) -> None:
        """As `start`, with a list of devices that refuses `refused`, such as `c 10:200 rwm`.  For runc."""
        (container,) = self._spec["containers"]
        with self.log_path.open("a") as log:
            command = self._command("create", self._bundle(container), self._id(container))
            done = self.host.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            assert done.wait(30) == 0, self.log()
        self.host.path(f"/sys/fs/cgroup/devices{self._cgroup}/{self._id(container)}/devices.deny").write_text(refused)
        self.host.run([*self._runtime, "start", self._id(container)])

    def wait_until_ended(self) -> None:
        (container,) = self._spec["containers"]
        wait_until("the end", lambda: '"stopped"' in self._state(container).replace(" ", ""), 30)

    def _state(self, container: Mapping[str, Any]) -> str:
        return self.host.run([*self._runtime, "state", self._id(container)]).stdout

    @property
    def process(self) -> subprocess.Popen[str]:
        """The runtime's process, which ends with the container and has its status."""
        return self._processes[-1]

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the daemon's container, as an exec probe does."""
        (container,) = self._spec["containers"]
        return self.host.run([*self._runtime, "exec", self._id(container), *command], check=check)

    def wait_for(self, text: str) -> None:
        """Wait until the log has `text`."""
        try:
            wait_until(text, lambda: text in self.log() or self.process.poll() is not None, 30)
        finally:
            print(self.log())
        assert text in self.log()

    def log(self) -> str:
        return self.log_path.read_text()

    def stop(self) -> None:
        """As kubelet does: SIGTERM, and with the daemon all in the container ends."""
        (container,) = self._spec["containers"]
        self.host.run([*self._runtime, "kill", self._id(container), str(int(signal.SIGTERM))])
        assert self.process.wait(30) == 0, self.log()
        self.host.run([*self._runtime, "delete", "--force", self._id(container)], check=False)

    # --- what a container is

    def _id(self, container: Mapping[str, Any]) -> str:
        return f"{self.name}-{container['name']}"

    def _command(self, verb: str, bundle: Path, name: str) -> list[str]:
        # Without a key ring: those of a machine are few.
        return [*self._runtime, verb, "--no-new-keyring", "--bundle", str(bundle), name]

    def _bundle(self, container: Mapping[str, Any]) -> Path:
        """The directory with config.json, and with a root of the container's own over the image's."""
        bundle = self._directory / container["name"]
        if not bundle.exists():
            bundle.mkdir()
            (bundle / "root").mkdir()
            upper = f"/run/oci/{self._id(container)}"
            self.host.run(["mkdir", "-p", f"{upper}/upper", f"{upper}/work"])
            options = f"lowerdir={self._image.root},upperdir={upper}/upper,workdir={upper}/work"
            self.host.run(["mount", "-t", "overlay", "overlay", "-o", options, str(bundle / "root")])
        (bundle / "config.json").write_text(json.dumps(self._config(container)))
        return bundle

    def _config(self, container: Mapping[str, Any]) -> dict[str, Any]:
        kind = self._spec.get("securityContext", {}).get("seccompProfile", {}).get("type")
        linux: dict[str, Any] = {
            # Those of net and uts are the host's, under hostNetwork.
            "namespaces": [{"type": it} for it in ("pid", "ipc", "mount")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"{self._cgroup}/{self._id(container)}",
        }
        if kind == "RuntimeDefault":
            linux["seccomp"] = seccomp(json.loads(SECCOMP.read_text()), oci_config.capabilities(container))
        assert self._spec["hostNetwork"] is True
        args = [*container["command"], *container.get("args", ())]
        return oci_config.config(container, args, self._environment(container), self._mounts(container), linux)

    def _environment(self, container: Mapping[str, Any]) -> list[str]:
        fields = {"spec.nodeName": self.host.name, "metadata.name": self.name, "metadata.namespace": self.namespace}
        given = {
            it["name"]: it["value"] if "value" in it else fields[it["valueFrom"]["fieldRef"]["fieldPath"]]
            for it in container.get("env", ())
        }
        return [*self._image.settings()["Env"], *(f"{k}={v}" for k, v in {**self._environ, **given}.items())]

    def _mounts(self, container: Mapping[str, Any]) -> list[dict[str, Any]]:
        mounts = [bound(self._directory / "serviceaccount", SERVICE_ACCOUNT, is_read_only=True)]
        for mount in container.get("volumeMounts", ()):
            is_read_only = bool(mount.get("readOnly"))
            mounts.append(bound(self._volumes[mount["name"]], mount["mountPath"], is_read_only=is_read_only))
        return mounts


def seccomp(profile: Mapping[str, Any], capabilities: Sequence[str]) -> dict[str, Any]:
    """docker's form of a profile as the runtime's: its rules are for some capabilities and architectures only."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    held = set(capabilities)
    rules = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if not held.issuperset(includes.get("caps", ())) or held.intersection(excludes.get("caps", ())):
            continue
        if machine not in includes.get("arches", [machine]) or machine in excludes.get("arches", ()):
            continue
        rules.append({key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None})
    (native, *_) = (it for it in profile["archMap"] if machine in _seccomp_name(it["architecture"]))
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [native["architecture"], *native["subArchitectures"]],
        "syscalls": rules,
    }


def _seccomp_name(architecture: str) -> str:
    return {"SCMP_ARCH_X86_64": "amd64", "SCMP_ARCH_AARCH64": "arm64"}.get(architecture, "")


def missing(*programs: str) -> str:
    """What these tests need and this machine lacks."""
    lacking = [name for name in programs if shutil.which(name) is None]
    return ", ".join(lacking if SECCOMP.exists() else [*lacking, f"{SECCOMP} (golang-github-containers-common)"])

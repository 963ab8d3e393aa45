"""containerd's CRI in a host of a lab, a container runtime that nobody here wrote.  (podman is in the lab itself.)

Everything of it lies in one directory and in the host's own /run and /var/lib/cni. It needs no image from a registry:
that of the containers which hold the pods' namespaces is made here, of static busybox.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from udptun.lab.host import Host
from udptun.lab.podman import CONFLIST, missing_packages, plugin_directory

_CONTAINERD_CONF = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{programs}"
    conf_dir = "{directory}/net.d"
"""


class Containerd:
    """The client of a containerd's CRI.  The messages are written by hand: two dozen bytes need no stubs."""

    def __init__(self, socket: Path, directory: Path, cgroup: str) -> None:
        self._directory = directory
        self._cgroup = cgroup
        self.channel = grpc.insecure_channel(f"unix://{socket}")

    def _call(self, method: str, request: bytes) -> bytes:
        method = f"/runtime.v1.RuntimeService/{method}"
        call = self.channel.unary_unary(method, request_serializer=None, response_deserializer=None)
        return call(request, timeout=60, wait_for_ready=True)  # type: ignore[no-any-return]

    def run_sandbox(self, name: str) -> str:
        """Make a pod without containers; return its id."""
        metadata = _field(1, name) + _field(2, f"uid-{name}") + _field(3, "default") + _field(4, 0)
        port = _field(1, 0) + _field(2, 80) + _field(3, 0)
        config = _field(1, metadata) + _field(2, name) + _field(3, f"{self._directory}/logs")
        config += _field(5, port) + _field(8, _field(1, self._cgroup))
        (sandbox,) = _strings(self._call("RunPodSandbox", _field(1, config)))
        return sandbox

    def remove_sandbox(self, sandbox: str) -> None:
        """As kubelet does: stopped twice, then removed."""
        for method in ("StopPodSandbox", "StopPodSandbox", "RemovePodSandbox"):
            self._call(method, _field(1, sandbox))

    def status(self, sandbox: str) -> bytes:
        return self._call("PodSandboxStatus", _field(1, sandbox))

    def wait_ready(self) -> None:
        self._call("Version", b"")


def _varint(n: int) -> bytes:
    written = b""
    while n > 127:
        written += bytes([n & 127 | 128])
        n >>= 7
    return written + bytes([n])


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _strings(message: bytes) -> list[str]:
    """The fields of a message that has short strings only."""
    found, offset = [], 0
    while offset < len(message):
        length = message[offset + 1]
        found.append(message[offset + 2 : offset + 2 + length].decode())
        offset += 2 + length
    return found


@contextlib.contextmanager
def containerd(host: Host, directory: Path, programs: Path, cgroup: str) -> Iterator[Containerd]:
    """A containerd in the host, with an image for the containers that hold the pods' namespaces."""
    (directory / "net.d").mkdir()
    (directory / "net.d" / "10-flannel.conflist").write_text(CONFLIST)
    for name in ("bridge", "host-local", "portmap", "loopback"):
        (programs / name).symlink_to(Path(str(plugin_directory()), name))
    socket = "/run/containerd.sock"
    config = _CONTAINERD_CONF.format(directory=directory, programs=programs, socket=socket)
    (directory / "config.toml").write_text(config)
    mount_cgroups(host)
    with (directory / "log").open("w") as log:
        daemon = host.popen(["containerd", "-c", str(directory / "config.toml")], stdout=log, stderr=log)
    client = Containerd(host.path(socket), directory, cgroup)
    try:
        client.wait_ready()
        image = directory / "pause.tar"
        image.write_bytes(_pause_image())
        host.run(["ctr", "-a", socket, "-n", "k8s.io", "images", "import", "--snapshotter", "native", str(image)])
        yield client
    finally:
        client.channel.close()
        daemon.terminate()
        daemon.wait(20)


def mount_cgroups(host: Host) -> None:
    """As this machine has them: the host has a /sys of its own."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, target, kind, options, *_ in sorted(
        (it for it in mounts if "/sys/fs/cgroup" in it[1]), key=lambda it: it[1]
    ):
        if kind == "cgroup":
            given = [it for it in options.split(",") if it not in ("rw", "relatime", "nosuid", "nodev", "noexec")]
            host.run(["sh", "-c", f"mkdir -p {target}; mount -t cgroup -o {','.join(given)} none {target}"])
        elif kind == "cgroup2":
            host.run(["sh", "-c", f"mkdir -p {target}; mount -t cgroup2 none {target}"])
        else:
            host.run(["mount", "-t", "tmpfs", "none", target])


@contextlib.contextmanager
def cgroup_parent() -> Iterator[str]:
    """The parent of the sandboxes' cgroups, in every hierarchy.  Runtimes make it, and never remove it."""
    name = f"udptun-test-{os.getpid()}"
    yield f"/{name}"
    top = Path("/sys/fs/cgroup")
    for parent in (*top.glob(name), *top.glob(f"*/{name}")):
        for path in (*sorted(parent.rglob("*/"), reverse=True), parent):
            deadline = time.monotonic() + 5
            while path.exists():
                try:
                    path.rmdir()
                except OSError:
                    # Its last process may not be gone quite yet.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def _pause_image() -> bytes:
    """An archive as `docker save` makes it, with static busybox that sleeps."""
    layer = _tar({"bin/busybox": Path("/bin/busybox").read_bytes()})
    diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Entrypoint": ["/bin/busybox", "sleep", "1000000"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": ["localhost/pause:1"], "Layers": ["layer.tar"]}]
    files = {config_name: config, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}
    return _tar(files)


def _tar(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


def missing(*programs: str) -> str:
    """What is not on this machine of what these tests need; empty when all is there."""
    return ", ".join([*(name for name in programs if shutil.which(name) is None), *missing_packages()])

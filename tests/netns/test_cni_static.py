"""The installed plugin on a host that has no Python, no libc and nothing else: as our manifest puts it there."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cni_plugin import IPV4_ENV, NAME, Plugin
from udptun.cni import install
from udptun.lab.host import Host
from udptun.lab.podman import plugin_directory

BUILD = Path(__file__).resolve().parents[2] / "deploy" / "cni" / "build.py"
PYTHON = Path("/usr/bin/python3")
BUSYBOX = Path("/bin/busybox")


@functools.cache
def built(out: Path) -> str:
    """What the build says that kept it from building `out`; empty when it is there."""
    done = subprocess.run([PYTHON, BUILD, out], capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def is_static(program: Path) -> bool:
    return "not a dynamic executable" in subprocess.run(["ldd", program], capture_output=True, text=True).stderr


pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(plugin_directory() is None, reason="needs bridge and host-local (containernetworking-plugins)"),
    pytest.mark.skipif(not BUSYBOX.exists() or not is_static(BUSYBOX), reason="needs busybox-static"),
]


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "udptun-cni"
    if problem := built(out):
        pytest.skip(f"no static executable: {problem}")
    assert is_static(out)
    return out


@pytest.fixture
def root(tmp_path: Path, executable: Path) -> Path:
    """A root directory: the plugin, installed, busybox and the delegates with the libraries that these need."""
    root = tmp_path / "root"
    for directory in ("bin", "opt/cni/bin", "proc", "run/netns", "run/flannel", "var/lib/cni"):
        (root / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin")
    (root / "bin" / "sh").symlink_to("busybox")
    for name in ("bridge", "host-local"):
        plugin = plugin_directory() / name  # type: ignore[operator]  # there is one, see above
        shutil.copy(plugin, root / "opt/cni/bin")
        listed = subprocess.run(["ldd", plugin], capture_output=True, text=True).stdout
        for library in [Path(word) for word in listed.split() if word.startswith("/")]:
            (root / library.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library.relative_to("/"))
    assert install.install(str(root / "opt/cni/bin"), "flannel", executable.read_bytes()).startswith("installed ")
    assert install.install(str(root / "opt/cni/bin"), "flannel", executable.read_bytes()).endswith("is there already")
    (root / "run/flannel/subnet.env").write_text(IPV4_ENV)
    return root


def test_installed_file_runs_where_there_is_nothing_else(root: Path, host: Host) -> None:
    host.run(["ip", "netns", "add", "target"])
    for source, target in (("/proc", root / "proc"), ("/run/netns", root / "run/netns")):
        host.run(["mount", "--rbind", source, str(target)])

    def popen(command: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        return host.machine.popen(["chroot", str(root), *command], **kwargs)

    plugin = Plugin(root, Path("/opt/cni/bin/flannel"), ("/opt/cni/bin",), popen)
    plugin.conf = {"name": NAME, "type": "flannel", "cniVersion": "1.0.0"}
    there = host.run(["chroot", str(root), "/bin/sh", "-c", "python3 -V; exec /opt/cni/bin/flannel"], check=False)
    assert "python3: not found" in there.stderr
    assert "udptun-cni: the CNI plugin flannel" in there.stderr
    assert plugin.run("VERSION").result()["supportedVersions"][-1] == "1.1.0"
    result = plugin.run("ADD", "c1", "/run/netns/target").result()
    assert result["ips"][0]["address"] == "10.1.17.2/24"
    (state,) = (path for path in (root / "var/lib/cni/flannel").iterdir() if path.is_file())
    assert json.loads(state.read_text())["mtu"] == 1472
    plugin.run("CHECK", "c1", "/run/netns/target", conf={"prevResult": result}).result()
    host.run(["ip", "netns", "exec", "target", "ping", "-c1", "-W5", "10.1.17.1"])
    plugin.run("DEL", "c1", "/run/netns/target").result()
    assert not state.exists()
    assert list((root / "var/lib/cni/networks" / NAME).glob("10.*")) == []
    error = plugin.run("ADD", "c1", "/run/netns/target", conf={"delegate": {"type": "nope"}}).error()
    assert error["code"] == 102


def test_two_builds_of_the_same_sources_are_the_same(executable: Path, tmp_path: Path) -> None:
    """So that the installer leaves alone what has not changed."""
    assert built(tmp_path / "again") == ""
    assert (tmp_path / "again").read_bytes() == executable.read_bytes()

"""The image that deploy/image/build.py makes, under runc and crun, with exactly what manifests give its containers.

    [h1: runc]  eth0 -- underlay (API server, TLS) -- eth0  [h2: crun]

The hosts' pods are made once; each test runs the daemons anew, and `deploy/cleanup.yml` removes what they leave.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from container_runtimes import cgroup_parent
from etcd_server import Authority
from kube_server import MISSING, TOKEN
from oci_pod import Image, OciPod, missing
from traffic import is_answered, listener_at, ping, seconds_until, socket_in

from deploy import render
from tests import flannel_manifest
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.podman import Podman, missing_packages, plugin_directory
from udptun.lab.topology import KUBE_PORT, Lab

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "deploy" / "image" / "build.py"
NOT_DOWNLOADED = 3
LACKING = [*MISSING, *filter(None, [missing("runc", "crun", "apt-get", "dpkg-deb", "gcc", "openssl")])]
if plugin_directory() is None:
    LACKING.append("bridge and host-local (containernetworking-plugins)")
if sys.version_info[:2] != (3, 11):
    LACKING.append("Python 3.11, which the image has")

pytestmark = [
    pytest.mark.netns,
    # The first test waits for the image: 20 s of processor time.
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
]

Objects = list[dict[str, Any]]


DATE = 1_700_000_000
SOON_S = 30.0


def build(out: Path, *options: str, compiler: str = "") -> None:
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(DATE), **({"CC": compiler} if compiler else {})}
    argv = [sys.executable, BUILD, out, *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=environ)
    if done.returncode == NOT_DOWNLOADED:
        pytest.skip(f"needs mirrors of Debian and of the Python packages: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    out = tmp_path_factory.mktemp("image")
    # Whether it works is looked at, not how fast it is.
    compiler = tmp_path_factory.mktemp("compiler") / "cc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    build(out, compiler=str(compiler))
    yield Image(out)
    # Half a gigabyte, which pytest would keep for three runs.
    shutil.rmtree(out)


class Cluster:
    """Two hosts that are nodes, and what runs pods in them."""

    def __init__(self, lab: Lab, api: Any, image: Image, directory: Path, cgroup: str, ca: Path) -> None:
        self.lab = lab
        self._api = api
        self._image = image
        self._directory = directory
        self._cgroup = cgroup
        self._ca = ca
        self._n_made = 0
        for host in lab.hosts:
            # What a node has to have in its directory of plugins.
            directory_of_plugins = directory / host.name / "opt/cni/bin"
            directory_of_plugins.mkdir(parents=True)
            for name in ("bridge", "host-local", "portmap"):
                shutil.copy(Path(str(plugin_directory()), name), directory_of_plugins)
        # What a container cannot write, and h2 has.
        for name in ("ipv4/conf/default/accept_local=1", "ipv6/conf/default/accept_ra=0"):
            lab.host(2).run(["sysctl", "-q", "-w", f"net/{name}"])

    def pod(self, host: Host, objects: Sequence[Mapping[str, Any]]) -> OciPod:
        """The DaemonSet's pod for `host`, nothing of which runs yet."""
        self._n_made += 1
        directory = self._directory / f"{self._n_made}-{host.name}"
        account = directory / "serviceaccount"
        account.mkdir(parents=True)
        (account / "token").write_text(TOKEN)
        (account / "ca.crt").write_bytes(self._ca.read_bytes())
        environ = {"KUBERNETES_SERVICE_HOST": str(UNDERLAY[1]), "KUBERNETES_SERVICE_PORT": str(KUBE_PORT)}
        runtime = "runc" if host.index == 1 else "crun"
        pod = OciPod(host, runtime, self._image, objects, directory, self._cgroup, environ)
        (account / "namespace").write_text(pod.namespace)
        key = f"{pod.namespace}/{pod.name}"
        if key not in self._api.do(lambda it: it.pods.names()):
            self._api.do(lambda it: it.add_pod(pod.namespace, pod.name, host.name))
        return pod

    @contextlib.contextmanager
    def running(self, *manifests: Sequence[Mapping[str, Any]]) -> Iterator[list[OciPod]]:
        """A pod on each host, initialised and ready; afterwards they are removed as a person removes them.

        There is a manifest for all hosts, or one for each.
        """
        pods = [self.pod(host, manifests[n % len(manifests)]) for n, host in enumerate(self.lab.hosts)]
        with ExitStack() as undo:
            for pod in pods:
                pod.initialise()
            for pod in pods:
                pod.start()
                undo.callback(pod.stop)
            for pod in pods:
                pod.wait_for(" ready subnet=")
            for host in self.lab.hosts:
                if not host.pods:
                    host.add_pod()
            yield pods
        for pod in pods:
            assert "Traceback" not in pod.log()
        self.clean_up()

    def clean_up(self) -> None:
        for host in self.lab.hosts:
            print(self.pod(host, manifest("cleanup.yml")).initialise())
            links = {it["ifname"] for it in json.loads(host.run(["ip", "-j", "link"]).stdout)}
            assert not links & {"flannel0", "flannel.1"}

    def ping_across(self) -> None:
        """Between all pods, once each daemon has learned of the other."""
        for source in self.lab.hosts:
            for destination in self.lab.hosts:
                pod, address = source.pod(1), destination.pod(1).address
                seconds_until(lambda pod=pod, address=address: is_answered(pod, address), "an answer", SOON_S)  # type: ignore[misc]
                ping(pod, address)


@pytest.fixture(scope="module")
def cluster(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from udptun.lab.kube_api.server import ApiServer

    directory = tmp_path_factory.mktemp("cluster")
    authority = Authority(directory / "tls")
    pair = authority.issue("apiserver", f"IP:{UNDERLAY[1]}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with (
        # All processes of the hosts are gone before the cgroups are removed.
        cgroup_parent() as cgroup,
        Lab(f"i{os.getpid()}", n_hosts=2) as lab,
        ApiServer(listen=lambda: listener_at(lab), tls=context, tokens={TOKEN: None}) as api,
    ):
        for host in lab.hosts:
            api.do(lambda it, host=host: it.add_node(host.name, f"10.244.{host.index}.0/24"))
        yield Cluster(lab, api, image, directory, cgroup, authority.certificate)


def manifest(name: str, backend: str = "") -> Objects:
    """A file of deploy/, or the chart with this backend."""
    text = render.render({"flannel": {"backend": backend}}) if backend else (ROOT / "deploy" / name).read_text()
    return [it for it in yaml.safe_load_all(text) if it is not None]


def with_backend(objects: Sequence[Mapping[str, Any]], kind: str) -> Objects:
    changed: Objects = copy.deepcopy(list(objects))  # type: ignore[arg-type]
    (data,) = (it["data"] for it in changed if it["kind"] == "ConfigMap")
    data["net-conf.json"] = json.dumps({**json.loads(data["net-conf.json"]), "Backend": {"Type": kind}})
    return changed


def get(host: Host, path: str) -> tuple[str, str]:
    """Status and body of what the host's health port answers."""
    with socket_in(host, 1) as connection:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", 8081))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).decode().partition("\r\n\r\n")
        return head.split()[1], body


NOT_WRITTEN = {
    "udp": "sysctl net/ipv4/conf/flannel0/accept_local cannot be set to 1 (EROFS)",
    "vxlan": "sysctl net/ipv6/conf/flannel.1/accept_ra cannot be set to 0 (EROFS)",
}
"""The problem line of a backend whose setting a container cannot write, and the host does not have."""


def assert_well(pod: OciPod, kind: str) -> None:
    """The daemon carries packets with this backend, and names nothing but what /proc/sys refuses it."""
    status = json.loads(pod.execute("udptun", "status", "--json").stdout)
    expected = [NOT_WRITTEN[kind]] if kind in NOT_WRITTEN and pod.host.index == 1 else []
    assert (status["backend"]["type"], [it.partition(",")[0] for it in status["problems"]]) == (kind, expected)


# -------------------------------------------------------------------------------------------------------- our manifest


@pytest.mark.parametrize("kind", ["udp", "vxlan", "host-gw"])
def test_our_manifest_runs_with_what_it_asks_for_and_no_more(
    cluster: Cluster, image: Image, kind: str, slack: int
) -> None:
    with cluster.running(manifest("", backend=kind)) as pods:
        cluster.ping_across()
        for pod in pods:
            assert_well(pod, kind)
            installed = pod.of_host("cni-plugin") / "flannel"
            assert installed.read_bytes() == (image.root / "opt/udptun/udptun-cni").read_bytes()
            conflist = json.loads((pod.of_host("cni") / "10-flannel.conflist").read_text())
            assert conflist["cniVersions"]
            is_confined(pod)
            is_examined(pod, kind)
            for flag in ("--live", "--ready"):
                pod.execute("udptun", "health", flag)
        if kind == "udp":
            for flag in ("--live", "--ready"):
                assert 0 < cost_of_probe_ms(pods[0], flag) < 30 * slack


def is_examined(pod: OciPod, kind: str) -> None:
    """As by `kubectl exec`, the doctor finds the daemon's flags, and nothing but what /proc/sys refuses the daemon."""
    expected = [NOT_WRITTEN[kind]] if kind in NOT_WRITTEN and pod.host.index == 1 else []
    # A busy machine may let a ping wait for too long.
    for _ in range(10):
        said = json.loads(pod.execute("udptun", "doctor", "--json", check=False).stdout)
        # The pods' bridge may be that of the run before, with another backend; this machine may have no NTP.
        told = [it for it in said["findings"] if it["check"] != "mtu" and it["severity"] != "note"]
        found = [it["cause"].partition(",")[0] for it in told]
        if found == expected:
            break
    assert found == expected
    assert {"daemon", "capabilities", "store", "pod-cidr", "reachability", "subnet-env"} <= set(said["fine"])
    assert {"packet-filters", "store-endpoints"} <= set(said["fine"])
    assert "cni-configuration" in said["not_looked_at"]


def is_confined(pod: OciPod) -> None:
    """The container has what the manifest's security context leaves it."""
    lines = pod.execute("cat", "/proc/1/status").stdout.splitlines()
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    net_admin_and_raw = f"{1 << 12 | 1 << 13:016x}"
    assert (status["CapEff"], status["CapBnd"]) == (net_admin_and_raw,) * 2
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for path in ("/x", "/proc/sys/net/ipv4/ip_forward"):
        assert "Read-only file system" in pod.execute("sh", "-c", f"echo 1 > {path}", check=False).stderr


def cost_of_probe_ms(pod: OciPod, flag: str, n: int = 20) -> float:
    """The processor time of a probe, the mean of `n` that succeed.  The clock of `times` steps by 10 ms."""
    script = f"i=0; while [ $i -lt {n} ]; do udptun health $0 || exit 1; i=$((i+1)); done; times"
    # The shell's own times, then those of its children: user, system.
    children = pod.execute("sh", "-c", script, flag).stdout.splitlines()[-1]
    times = re.findall(r"(\d+)m([\d.]+)s", children)
    cost_ms = sum(60 * int(minutes) + float(seconds) for minutes, seconds in times) / n * 1000
    print(f"udptun health {flag}: {cost_ms:.1f} ms, the mean of {n}")
    return cost_ms


# ------------------------------------------------------------------------------------------------------ flannel's own


def test_flannels_manifest_works_with_only_the_image_changed(cluster: Cluster, image: Image) -> None:
    """Its own mounts and capabilities, its init containers, /proc/sys read-only, and nothing that keeps state."""
    with cluster.running(with_backend(flannel_manifest.OBJECTS, "vxlan")) as pods:
        cluster.ping_across()
        for pod in pods:
            assert_well(pod, "vxlan")
            assert get(pod.host, "/healthz") == ("200", "flanneld is running")
            assert get(pod.host, "/readyz")[0] == "200"
            installed = pod.of_host("cni-plugin") / "flannel"
            assert installed.read_bytes() == (image.root / "opt/udptun/udptun-cni").read_bytes()
            assert_conflist_is_the_manifests(pod)


def test_flannels_old_manifests_do_and_rules_stand_beside_those_of_the_host(cluster: Cluster) -> None:
    """That of 0.20 on a host with rules of legacy iptables, that of 0.12 on one without rules.

    The image has both flavours of iptables, and the name `iptables` for neither.
    """
    legacy, nft = cluster.lab.hosts
    rule = ["INPUT", "-p", "tcp", "--dport", "1", "-j", "ACCEPT"]
    legacy.run(["iptables-legacy", "-A", *rule])
    old = [with_backend(it, "host-gw") for it in (flannel_manifest.as_of_0_20(), flannel_manifest.as_of_0_12())]
    with cluster.running(*old) as pods:
        cluster.ping_across()
        for pod in pods:
            assert_well(pod, "host-gw")
            assert_conflist_is_the_manifests(pod)
        for host, flavour, other in ((legacy, "legacy", "nft"), (nft, "nft", "legacy")):
            assert "FLANNEL-POSTRTG" in host.run([f"iptables-{flavour}-save", "-t", "nat"]).stdout
            assert "FLANNEL" not in host.run([f"iptables-{other}-save"]).stdout
        assert "firewall rules in place form=iptables program=iptables-legacy " in pods[0].log()
    legacy.run(["iptables-legacy", "-D", *rule])


def assert_conflist_is_the_manifests(pod: OciPod) -> None:
    (conflist,) = (it["data"]["cni-conf.json"] for it in flannel_manifest.OBJECTS if it["kind"] == "ConfigMap")
    assert (pod.of_host("cni") / "10-flannel.conflist").read_text() == conflist


def test_flannels_manifest_with_udp_says_what_to_mount(cluster: Cluster) -> None:
    """It mounts no /dev/net/tun."""
    pod = cluster.pod(cluster.lab.host(1), with_backend(flannel_manifest.OBJECTS, "udp"))
    pod.start()
    assert pod.process.wait(60) == 1
    (error,) = (line for line in pod.log().splitlines() if line.split()[2] == "E")
    assert "/dev/net/tun is missing" in error
    assert "hostPath /dev/net/tun of type CharDevice" in error


@pytest.mark.skipif(
    not Path("/sys/fs/cgroup/devices").exists(), reason="needs the devices controller of cgroups, version 1"
)
def test_device_that_the_runtime_refuses_is_named_with_the_remedy(cluster: Cluster) -> None:
    """As crun does, and runc 1.2.0 to 1.2.3: the list of devices of the container's cgroup lacks it."""
    pod = cluster.pod(cluster.lab.host(1), manifest("", backend="udp"))
    pod.start_with(refused="c 10:200 rwm")
    pod.wait_until_ended()
    (error,) = (line for line in pod.log().splitlines() if line.split()[2] == "E")
    assert "the container's list of devices refuses /dev/net/tun" in error
    assert "have the runtime allow the device (c 10:200 rwm)" in error


# ------------------------------------------------------------------------------------------------------------ the image


def test_contents_name_every_package_with_its_size(image: Image) -> None:
    text = (image.directory / "contents.txt").read_text()
    rows = {words[0]: words for line in text.splitlines() if line.startswith("  ") for words in [line.split()]}
    packages = (ROOT / "deploy/image/packages.txt").read_text().splitlines()
    assert {it for it in packages if it and not it.startswith("#")} <= rows.keys()
    assert {"udptun", "lightkube", "grpcio", "python_pytun"} <= rows.keys()
    in_the_image = sum(it.lstat().st_size for it in image.root.rglob("*") if it.is_symlink() or it.is_file())
    assert int(text.split()[-1]) == pytest.approx(in_the_image / 1024, rel=0.02)


def test_archive_is_one_layer_of_root_s_files_with_the_entry_point_of_flannels_image(image: Image) -> None:
    assert image.settings() == {"Env": ["PATH=/usr/sbin:/usr/bin:/opt/bin"], "Entrypoint": ["/opt/bin/flanneld"]}
    with tarfile.open(image.archive) as archive:
        (manifest_of_archive,) = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
        config = json.loads(archive.extractfile(manifest_of_archive["Config"]).read())  # type: ignore[union-attr]
        layer = archive.extractfile(manifest_of_archive["Layers"][0])
        assert layer is not None
        digest = hashlib.file_digest(layer, "sha256").hexdigest()  # type: ignore[arg-type]
    values = yaml.safe_load((ROOT / "deploy/chart/values.yaml").read_text())["flannel"]["image"]
    assert manifest_of_archive["RepoTags"] == [f"{values['repository']}:{values['tag']}"]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
    with tarfile.open(image.directory / "root.tar") as layer_file:
        entries = layer_file.getmembers()
    assert {(it.uid, it.gid, it.mtime) for it in entries} == {(0, 0, DATE)}
    assert [it.name for it in entries if it.mode & 0o6022 and not it.issym() and it.name != "tmp"] == []
    assert [it.name for it in entries if it.name.endswith((".pyx", "RECORD"))] == []
    ours = list((image.root / "usr/lib/python3/dist-packages/udptun").glob("*.so"))
    assert len(ours) == 2
    of_this_machine = re.compile(b"/tmp/|" + str(Path.home()).encode())
    assert [it.name for it in ours if of_this_machine.search(it.read_bytes())] == []
    names = {it.name for it in entries}
    # The daemon chooses between the two.
    assert {"usr/sbin/iptables-nft", "usr/sbin/iptables-legacy", "usr/sbin/nft"} <= names
    assert not {"usr/sbin/iptables", "sbin/iptables"} & names
    assert {"opt/bin/flanneld", "opt/bin/install-conf", "opt/bin/mk-docker-opts.sh", "flannel", "bin"} <= names


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_builds_of_the_same_packages_are_the_same(tmp_path: Path) -> None:
    for name in ("one", "other"):
        build(tmp_path / name)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "other")


def digests_of(directory: Path) -> dict[str, str]:
    digests = {}
    with tarfile.open(directory / "root.tar") as layer:
        for entry in layer:
            file = layer.extractfile(entry) if entry.isreg() else None
            content = file.read() if file is not None else entry.linkname.encode()
            digests[f"{entry.name} {entry.mode:o}"] = hashlib.sha256(content).hexdigest()
    return digests


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(missing("aarch64-linux-gnu-gcc", "qemu-aarch64")), reason="needs the tools for arm64")
def test_image_for_arm64_has_programs_that_run_there(tmp_path: Path) -> None:
    """Under qemu, which has no namespaces: every module of the package is imported, the plugin says its versions."""
    build(tmp_path, "--arch=arm64")
    root = tmp_path / "root"
    qemu = ["qemu-aarch64", "-L", root, "-E", f"PYTHONHOME={root}/usr"]
    script = (
        "import importlib, pkgutil, platform, sys; sys.path.append(sys.argv[1]); import udptun\n"
        "names = [it.name for it in pkgutil.walk_packages(udptun.__path__, 'udptun.')]\n"
        "[importlib.import_module(it) for it in names if not it.endswith(('__main__', '_kabi_build'))]\n"
        "print(platform.machine(), 'udptun._fastpath' in sys.modules)\n"
    )
    argv = [*qemu, root / "usr/bin/python3.11", "-I", "-c", script, root / "usr/lib/python3/dist-packages"]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "aarch64 True\n"
    argv = ["qemu-aarch64", root / "opt/udptun/udptun-cni"]
    environ = {**os.environ, "CNI_COMMAND": "VERSION"}
    assert "supportedVersions" in subprocess.run(argv, check=True, capture_output=True, text=True, env=environ).stdout


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(missing_packages()), reason=f"needs {', '.join(missing_packages())}")
def test_podman_loads_the_archive_and_builds_the_same_from_the_containerfile(host: Host, image: Image) -> None:
    podman = Podman(host.machine)
    # As Debian's package has it: images of no registry need no signature.
    host.path("/etc/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    assert "udptun:0.1.0" in podman("load", "-q", "-i", str(image.archive))
    podman("build", "-q", "-f", str(BUILD.with_name("Containerfile")), "-t", "udptun:built", str(image.directory))
    settings = podman("inspect", "-f", "{{.Config.Entrypoint}} {{.Config.Env}}", "udptun:0.1.0", "udptun:built")
    assert len(set(settings.splitlines())) == 1
    run = ("run", "--rm", "--network=host", "--read-only", "--cap-add=NET_ADMIN", "--entrypoint=udptun")
    for name in ("udptun:0.1.0", "udptun:built"):
        assert "vxlan    yes" in podman(*run, name, "status", "--backends")
        # Also where no daemon runs, and the container is another one.
        done = host.run(["podman", *run, name, "doctor", "--json"], check=False, timeout=60)
        found = {it["check"] for it in json.loads(done.stdout)["findings"]}
        assert (done.returncode, found & {"daemon", "tun-device"}) == (2, {"daemon", "tun-device"})

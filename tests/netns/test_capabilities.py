"""The daemon, and its cleanup, do with what manifest and systemd unit leave them, and need each capability of it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from namespace import Namespace, linked_namespace, requires_netns, seconds_until

from udptun.datapath.shortcut.programs import find_lack

pytestmark = [pytest.mark.netns, requires_netns]

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "udptun.service"
SYSCTLS = DEPLOY / "systemd" / "90-udptun.conf"

_NUMBERS = {"NET_ADMIN": 12, "NET_RAW": 13}
"""linux/capability.h"""


@functools.cache
def capabilities_of_the_manifest() -> list[str]:
    for found in yaml.safe_load_all((DEPLOY / "kube-flannel.yml").read_text()):
        if found["kind"] == "DaemonSet":
            (daemon,) = found["spec"]["template"]["spec"]["containers"]
            return daemon["securityContext"]["capabilities"]["add"]
    raise AssertionError("no DaemonSet")


def values_of_the_unit(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def capabilities_of_the_unit() -> list[str]:
    (line,) = values_of_the_unit("CapabilityBoundingSet")
    return [it.removeprefix("CAP_") for it in line.split()]


@pytest.fixture
def linked() -> Iterator[Namespace]:
    with linked_namespace() as namespace:
        yield namespace


def test_unit_leaves_the_daemon_what_the_manifest_does() -> None:
    assert sorted(capabilities_of_the_unit()) == sorted(capabilities_of_the_manifest())


def with_capabilities(names: Sequence[str]) -> list[str]:
    """The beginning of a command that has only these, and gets no more."""
    return ["setpriv", f"--bounding-set={','.join(['-all', *(f'+{it.lower()}' for it in names)])}", "--no-new-privs"]


class Daemon:
    """A daemon in `namespace`; its files are below `folder`."""

    def __init__(self, namespace: Namespace, folder: Path, conf: dict[str, object], privileges: Sequence[str]) -> None:
        (folder / "net-conf.json").write_text(json.dumps(conf))
        self._udptun = ["ip", "netns", "exec", namespace.name, *privileges, sys.executable, "-m", "udptun"]
        self.run_dir = folder / "run"
        paths = {"net-config-path": "net-conf.json", "state-dir": "state", "subnet-file": "env/subnet.env"}
        self._flags = [f"--{name}={folder / path}" for name, path in paths.items()] + [f"--run-dir={self.run_dir}"]
        self._flags += [f"--store=local:{folder}/state/leases.db", "--ip-masq", "--iface=v0"]
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*self._udptun, "daemon", *self._flags], stderr=log)

    def wait_until_ready(self) -> None:
        seconds_until(lambda: self.process.poll() is not None or " ready subnet=" in self.said, 60)
        assert self.process.poll() is None, self.said
        assert [line for line in self.said.splitlines() if line.split()[2] == "E"] == []

    @property
    def said(self) -> str:
        return self._log.read_text()

    def status(self) -> dict[str, Any]:
        argv = [*self._udptun, "status", "--json", f"--run-dir={self.run_dir}"]
        asked = subprocess.run(argv, capture_output=True, check=True, timeout=30)
        return dict[str, Any](json.loads(asked.stdout))

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def clean_up(self) -> int:
        done = subprocess.run([*self._udptun, "cleanup", *self._flags], capture_output=True, text=True, timeout=30)
        print(done.stdout, done.stderr)
        return done.returncode


@contextmanager
def started(
    namespace: Namespace, folder: Path, conf: dict[str, object], privileges: Sequence[str]
) -> Iterator[Daemon]:
    """A daemon that is ready; at the end it and what it made are gone."""
    daemon = Daemon(namespace, folder, conf, privileges)
    try:
        daemon.wait_until_ready()
        yield daemon
    finally:
        daemon.end()
        status = daemon.clean_up()
    assert status == 0
    assert not {it["ifname"] for it in namespace.show("link")} & {"flannel0", "flannel.1"}


def network(backend: dict[str, object], *, nftables: bool = False) -> dict[str, object]:
    return {"Network": "10.244.0.0/16", "EnableNFTables": nftables, "Backend": backend}


def sets_of(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(value, 16) for name, value in re.findall(r"^Cap(\w+):\s*(\w+)$", status, re.MULTILINE)}


@pytest.mark.parametrize(
    ("backend", "nftables", "capabilities"),
    [
        ({"Type": "udp"}, False, capabilities_of_the_manifest()),
        ({"Type": "vxlan"}, False, capabilities_of_the_manifest()),
        ({"Type": "vxlan", "Userspace": True}, False, capabilities_of_the_manifest()),
        ({"Type": "host-gw"}, False, capabilities_of_the_manifest()),
        ({"Type": "udp"}, True, ["NET_ADMIN"]),
    ],
    ids=["udp", "vxlan", "vtep", "host-gw", "without-net_raw"],
)
def test_daemon_gets_ready_and_cleans_up_with_no_more_capabilities(
    backend: dict[str, object],
    nftables: bool,
    capabilities: list[str],
    linked: Namespace,
    tmp_path: Path,
    figure: Callable[..., None],
) -> None:
    conf = network(backend, nftables=nftables)
    subprocess.run(["ip", "netns", "exec", linked.name, "sysctl", "-qp", str(SYSCTLS)], check=True)
    with started(linked, tmp_path, conf, with_capabilities(capabilities)) as daemon:
        mask = sum(1 << _NUMBERS[it] for it in capabilities)
        assert sets_of(daemon.process.pid)["Eff"] == mask
        figure(f"capabilities of the daemon ({', '.join(capabilities)})", len(capabilities))
        status = daemon.status()
        assert status["problems"] == []
        datapath = status["datapath"]
        if datapath is None:
            # From a socket that needs no capability.
            seconds_until(lambda: daemon.status()["backend"]["probes"] == "on", 10)
            return
        assert datapath["confinement"] == "full"
        # The bounding set needs CAP_SETPCAP to be emptied.  With no_new_privs it gives nobody anything.
        for pid in (datapath["pid"], *datapath["standby_pids"]):
            assert sets_of(pid) == {"Inh": 0, "Prm": 0, "Eff": 0, "Amb": 0, "Bnd": mask}
        # The device comes back by the daemon alone: the datapath may not attach to it.
        device = status["backend"]["device"]
        linked.ip(f"link delete {device}")
        seconds_until(lambda: device in {it["ifname"] for it in linked.show("link")}, 10)
        seconds_until(lambda: daemon.status()["datapath"]["workers"] == ["running"], 10)


@pytest.mark.parametrize(("backend", "said"), [("udp", "TUN device flannel0"), ("vxlan", "vxlan: EPERM")])
def test_daemon_ends_with_the_reason_when_it_lacks_net_admin(
    backend: str, said: str, linked: Namespace, tmp_path: Path
) -> None:
    daemon = Daemon(linked, tmp_path, network({"Type": backend}), with_capabilities(["NET_RAW"]))
    try:
        assert daemon.process.wait(60) == 1
        (line,) = [line for line in daemon.said.splitlines() if line.split()[2] == "E"]
        assert said in line
        assert "CAP_NET_ADMIN" in line
    finally:
        daemon.end()


LAUNCHER = r"""
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
CALLS
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
};

int main(int argc, char **argv)
{
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    (void)argc;
    umask(UMASK);
    /* PR_SET_MDWE: memory is not both written and executed, on kernels that know it (6.3). */
    prctl(65, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        return perror("the filter"), 99;
    execv(argv[1], argv + 1);
    return perror(argv[1]), 99;
}
"""

ALLOW = """
#ifdef __NR_{0}
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_{0}, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
#endif
"""

MOUNTS = """
set -e
mount --make-rprivate /
for place in $1; do mkdir -p $place; mount --bind $place $place; done
[ ! -e /run/xtables.lock ] || mount --bind /run/xtables.lock /run/xtables.lock
# /dev with little in it
mount -t tmpfs -o nosuid,noexec dev $2
mkdir $2/net $2/shm
for it in null zero full random urandom net/tun; do touch $2/$it; mount --bind /dev/$it $2/$it; done
mount --rbind $2 /dev
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys
mount -o remount,bind,ro /
shift 2
exec "$@"
"""


def calls_that_the_unit_allows() -> set[str]:
    """What SystemCallFilter leaves: an allow list, from which lines that begin with ~ take away."""
    allowed = set(_members(["@default"]))
    for line in values_of_the_unit("SystemCallFilter"):
        members = set(_members(line.removeprefix("~").split()))
        allowed = allowed - members if line.startswith("~") else allowed | members
    return allowed


def _members(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if not name.startswith("@"):
            yield name
            continue
        asked = subprocess.run(["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True)
        lines = [line.strip() for line in asked.stdout.splitlines()[1:]]
        yield from _members(line for line in lines if line and not line.startswith("#"))


def under_the_unit(
    folder: Path, writable: Sequence[Path], *, more_calls: Sequence[str] = (), more_capabilities: Sequence[str] = ()
) -> list[str]:
    """The beginning of a command that has what the unit and a drop-in leave, without systemd to see to it.

    Not done: address families, the rest of /proc, and that there are no new namespaces.
    """
    calls = "".join(ALLOW.format(name) for name in sorted({*calls_that_the_unit_allows(), *more_calls}))
    (umask,) = values_of_the_unit("UMask")
    source, launcher, dev = folder / "launcher.c", folder / "launcher", folder / "dev"
    source.write_text(LAUNCHER.replace("CALLS", calls).replace("UMASK", umask))
    subprocess.run(["gcc", "-O1", source, "-o", launcher], check=True)
    dev.mkdir()
    places = " ".join(map(str, writable))
    mounts = ["unshare", "--mount", "sh", "-c", MOUNTS, "sh", places, str(dev)]
    return [*mounts, *with_capabilities([*capabilities_of_the_unit(), *more_capabilities]), str(launcher)]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze, which knows groups of calls")
def test_daemon_and_datapath_do_with_what_the_unit_leaves_them(linked: Namespace, tmp_path: Path) -> None:
    """Read-only root, few devices, and the unit's list of system calls, within which the datapath has its own."""
    writable = [tmp_path / name for name in ("run", "state", "env")]
    privileges = under_the_unit(tmp_path, writable)
    with started(linked, tmp_path, network({"Type": "udp"}), privileges) as daemon:
        of_the_daemon = Path(f"/proc/{daemon.process.pid}")
        assert "\nSeccomp:\t2\n" in (of_the_daemon / "status").read_text()
        mounts = [line.split() for line in (of_the_daemon / "mountinfo").read_text().splitlines()]
        modes = [it[5].split(",")[0] for it in mounts if it[4] in ("/", "/proc/sys", "/proc/sys/net")]
        assert modes == ["ro", "ro", "rw"]
        status = daemon.status()
        assert status["problems"] == []
        assert status["datapath"]["confinement"] == "full"
        # The directory was there, made as systemd makes it.
        assert daemon.run_dir.stat().st_mode & 0o777 == 0o700
        sockets = list(daemon.run_dir.glob("*.sock"))
        assert {it.stat().st_mode & 0o777 for it in sockets} == {0o600}
        assert len(sockets) == 3
        assert (tmp_path / "env" / "subnet.env").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(bool(find_lack()), reason=find_lack())
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze, which knows groups of calls")
def test_the_shortcut_does_with_what_its_drop_in_adds_to_the_unit(linked: Namespace, tmp_path: Path) -> None:
    """The unit's filter forbids bpf(2), and nothing said what to add."""
    page = (UNIT.parents[2] / "docs" / "operations.md").read_text()
    (row,) = re.findall(r"^\| the \[shortcut\].*$", page, re.M)
    capabilities = [it.removeprefix("CAP_") for it in re.findall(r"CapabilityBoundingSet=(\w+)", row)]
    calls = re.findall(r"SystemCallFilter=(\w+)", row)
    writable = [tmp_path / name for name in ("run", "state", "env")]
    privileges = under_the_unit(tmp_path, writable, more_calls=calls, more_capabilities=capabilities)
    with started(linked, tmp_path, network({"Type": "udp", "Shortcut": "require"}), privileges) as daemon:
        deadline_s = time.monotonic() + 10
        while (state := daemon.status()["datapath"]["shortcut"]) != "on":
            assert time.monotonic() < deadline_s, state
            time.sleep(0.05)

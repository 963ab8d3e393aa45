"""The daemon, and its cleanup, do with the capabilities that manifest and systemd unit leave them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from namespace import Namespace, linked_namespace, requires_netns, seconds_until

pytestmark = [pytest.mark.netns, requires_netns]

DEPLOY = Path(__file__).parents[2] / "deploy"

_NUMBERS = {"NET_ADMIN": 12, "NET_RAW": 13}
"""linux/capability.h"""


def capabilities_of_the_manifest() -> list[str]:
    for found in yaml.safe_load_all((DEPLOY / "kube-flannel.yml").read_text()):
        if found["kind"] == "DaemonSet":
            (daemon,) = found["spec"]["template"]["spec"]["containers"]
            return daemon["securityContext"]["capabilities"]["add"]
    raise AssertionError("no DaemonSet")


def capabilities_of_the_unit() -> list[str]:
    (line,) = (it for it in (DEPLOY / "systemd/udptun.service").read_text().splitlines() if "BoundingSet" in it)
    return [it.removeprefix("CAP_") for it in line.partition("=")[2].split()]


@pytest.fixture
def linked() -> Iterator[Namespace]:
    with linked_namespace() as namespace:
        yield namespace


def test_unit_leaves_the_daemon_what_the_manifest_does() -> None:
    assert sorted(capabilities_of_the_unit()) == sorted(capabilities_of_the_manifest())


@pytest.mark.parametrize(
    ("backend", "nftables", "capabilities"),
    [
        ("udp", False, capabilities_of_the_manifest()),
        ("vxlan", False, capabilities_of_the_manifest()),
        ("udp", True, ["NET_ADMIN"]),
    ],
    ids=["udp", "vxlan", "without-net_raw"],
)
def test_daemon_gets_ready_and_cleans_up_with_no_more_capabilities(
    backend: str, nftables: bool, capabilities: list[str], linked: Namespace, tmp_path: Path
) -> None:
    conf = {"Network": "10.244.0.0/16", "EnableNFTables": nftables, "Backend": {"Type": backend}}
    (tmp_path / "net-conf.json").write_text(json.dumps(conf))
    bounding_set = ",".join(["-all", *(f"+{it.lower()}" for it in capabilities)])
    privileges = ["setpriv", f"--bounding-set={bounding_set}", "--no-new-privs"]
    udptun = ["ip", "netns", "exec", linked.name, *privileges, sys.executable, "-m", "udptun"]
    paths = {"net-config-path": "net-conf.json", "run-dir": "run", "state-dir": "state", "subnet-file": "subnet.env"}
    flags = [f"--{name}={tmp_path / path}" for name, path in paths.items()]
    flags += [f"--store=local:{tmp_path}/leases.db", "--ip-masq", "--iface=v0"]
    with (tmp_path / "log").open("w") as log:
        daemon = subprocess.Popen([*udptun, "daemon", *flags], stderr=log)
    try:
        seconds_until(lambda: daemon.poll() is not None or " ready subnet=" in (tmp_path / "log").read_text(), 30)
        said = (tmp_path / "log").read_text()
        assert daemon.poll() is None, said
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert f"CapEff:\t{sum(1 << _NUMBERS[it] for it in capabilities):016x}\n" in status
        assert [line for line in said.splitlines() if line.split()[2] == "E"] == []
        asked = subprocess.run(
            [*udptun, "status", "--json", f"--run-dir={tmp_path}/run"], capture_output=True, check=True, timeout=30
        )
        assert json.loads(asked.stdout)["problems"] == []
    finally:
        daemon.terminate()
        daemon.wait(30)
        done = subprocess.run([*udptun, "cleanup", *flags], capture_output=True, text=True, timeout=30)
        print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert not {it["ifname"] for it in linked.show("link")} & {"flannel0", "flannel.1"}

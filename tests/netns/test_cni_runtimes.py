"""flannel's configuration, unchanged, called by runtimes that nobody here wrote."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from container_runtimes import cgroup_parent, containerd, missing

from tests.cni_plugin import installed
from tests.namespace import seconds_until
from udptun.lab.host import Host
from udptun.lab.podman import ROOT, Podman

pytestmark = pytest.mark.netns

SUBNET_ENV = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.30.1/24
FLANNEL_IPV6_NETWORK=fd00:244::/48
FLANNEL_IPV6_SUBNET=fd00:244:0:30::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
"""


@pytest.fixture
def cgroup() -> Iterator[str]:
    """Asked for before `host`, it is removed when all processes of the host are gone."""
    with cgroup_parent() as name:
        yield name


@pytest.fixture
def node(host: Host) -> Host:
    """A host with a subnet of each family."""
    host.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.default.disable_ipv6=0"])
    host.path("/run/flannel").mkdir()
    host.path("/run/flannel/subnet.env").write_text(SUBNET_ENV)
    return host


def left(host: Host) -> list[str]:
    """What the containers of a host have left: addresses, state, links and mapped ports."""
    given = host.path("/var/lib/cni/networks/cbr0")
    found = [f"address {path.name}" for kind in ("10.*", "fd00:*") for path in given.glob(kind)]
    found += [f"state {path}" for path in host.path("/var/lib/cni/flannel").rglob("*") if path.is_file()]
    found += [f"result {path.name}" for path in host.path("/var/lib/cni").glob("results/*")]
    found += [link["ifname"] for link in json.loads(host.run(["ip", "-j", "link", "show", "master", "cni0"]).stdout)]
    rules = host.run(["iptables-save", "-t", "nat"]).stdout.splitlines()
    return found + [rule for rule in rules if rule.startswith("-A CNI-DN-")]


@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")
def test_podman_runs_reloads_stops_starts_and_removes_containers(node: Host) -> None:
    podman, host = Podman(node.machine), node
    httpd = ("/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/bin")
    podman("run", "-d", "--name", "a", "-p", "8080:80", "--network", "cbr0", "--rootfs", str(ROOT), *httpd)

    def addresses() -> str:
        return podman("exec", "a", "ip", "-o", "addr", "show", "eth0")

    def is_served() -> bool:
        """To another machine, through the mapped port."""
        url = f"http://{host.underlay_address}:8080/busybox"
        script = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read(4))"
        return "ELF" in host.lab.switch.run([sys.executable, "-IS", "-c", script], check=False).stdout

    assert "10.244.30.2/24" in addresses()
    assert "fd00:244:0:30::2/64" in addresses()
    assert "default via 10.244.30.1" in podman("exec", "a", "ip", "route")
    assert "10.244.0.0/16 via 10.244.30.1" in podman("exec", "a", "ip", "route")
    assert "default via fd00:244:0:30::1" in podman("exec", "a", "ip", "-6", "route")
    assert "fd00:244::/48 via fd00:244:0:30::1" in podman("exec", "a", "ip", "-6", "route")
    assert "mtu 1430" in podman("exec", "a", "ip", "link", "show", "eth0")
    for gateway in ("10.244.30.1", "fd00:244:0:30::1"):
        podman("exec", "a", "ping", "-c1", "-W5", gateway)
    seconds_until(is_served, 30)
    podman("network", "reload", "a")
    assert "10.244.30.2/24" in addresses()
    assert "fd00:244:0:30::2/64" in addresses()
    seconds_until(is_served, 30)
    podman("stop", "-t", "0", "a")
    assert left(host) == []
    podman("start", "a")
    assert "10.244.30.3/24" in addresses()
    seconds_until(is_served, 30)
    podman("rm", "-f", "-t", "0", "a")
    assert left(host) == []
    given = ("--name", "b", "--ip", "10.244.30.77", "--network", "cbr0", "--rootfs", str(ROOT))
    podman("run", "-d", *given, *httpd)
    assert "10.244.30.77/24" in podman("exec", "b", "ip", "addr")
    assert "fd00:244:0:30::" in podman("exec", "b", "ip", "addr")
    podman("rm", "-f", "-t", "0", "b")
    assert left(host) == []


@pytest.mark.skipif(bool(missing("containerd", "runc", "ctr")), reason=f"needs {missing('containerd', 'runc', 'ctr')}")
@pytest.mark.parametrize("n", [4, pytest.param(20, marks=pytest.mark.full)])
def test_containerd_makes_and_removes_pods_four_at_a_time(cgroup: str, node: Host, tmp_path: Path, n: int) -> None:
    host, programs = node, installed(tmp_path / "cni").parent
    with containerd(host, tmp_path, programs, cgroup) as cri, ThreadPoolExecutor(4) as pool:
        started_s = time.monotonic()
        sandboxes = list(pool.map(cri.run_sandbox, [f"pod{i}" for i in range(n)]))
        added_s = time.monotonic() - started_s
        assert len([it for it in left(host) if it.startswith("address ")]) == 2 * n
        statuses = [cri.status(sandbox) for sandbox in sandboxes]
        assert all(b"10.244.30." in status and b"fd00:244:0:30::" in status for status in statuses)
        list(pool.map(cri.remove_sandbox, sandboxes))
        print(f"{n} pods, 4 at a time: {added_s:.2f} s, with their removal {time.monotonic() - started_s:.2f} s")
        assert left(host) == []

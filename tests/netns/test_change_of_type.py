"""A cluster moves from flannel to udptun, to another Backend.Type and back, as docs/kubernetes.md says.

    pod -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod      (and h3, with --full)
                                |
                        API server (switch)

udptun runs in containers as the manifests have them (daemon_container.py), flanneld is played by flannel_stand_in.py.
Datagrams go from each pod to each other, and what is printed is for how long each pair of nodes was apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path

import pytest
from daemon_container import MISSING, Container, Containers
from kube_server import MISSING as MISSING_LIBRARIES
from traffic import UdpFlow, is_answered, nothing_in_clear_text, read_status, seconds_until, udp_flow

from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import KUBE_PORT, Lab

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(MISSING or MISSING_LIBRARIES), reason=f"needs {', '.join([*MISSING_LIBRARIES, *MISSING])}"),
]

API_URL = f"http://{UNDERLAY[1]}:{KUBE_PORT}"
EXPLAINED = "tcp port 6443 or udp dst port 8472 or icmp[0]=3"
"""Beside the tunnel's: requests to the API server, VXLAN, and what a kernel answers for a port that is closed."""
RATE = 200
"""Datagrams a second from each pod to each other."""
PROMISED_S = 1.0
"""For so long at most nodes are apart that change their type at once."""


def conf(kind: str) -> str:
    return json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": kind}})


class Cluster:
    """The nodes of a lab, each with flanneld's stand-in or with a container of udptun."""

    def __init__(self, lab: Lab, containers: Containers) -> None:
        self.lab = lab
        self._containers = containers
        self._flannels: dict[Host, subprocess.Popen[str]] = {}
        self._turn = 0

    def start_flannel(self, host: Host) -> None:
        stand_in = Path(__file__).with_name("flannel_stand_in.py")
        mtu = str(self.lab.underlay_mtu - 50)
        command = [sys.executable, "-I", "-S", str(stand_in), API_URL, host.name, str(host.underlay_address), mtu]
        self._flannels[host] = host.popen(command, stdout=subprocess.PIPE)
        assert self._flannels[host].stdout.readline() == "ready\n"  # type: ignore[union-attr]

    def stop_flannel(self, host: Host) -> None:
        with self._flannels.pop(host) as process:
            process.kill()

    def start_udptun(self, host: Host, kind: str) -> Container:
        """The container of a rollout, with `kind` in the ConfigMap, beside the one that may run."""
        self._turn += 1
        self._containers.configure(host, conf(kind))
        return self._containers.start(host, f"{kind}-{self._turn}")

    def end_old(self, new: Container) -> None:
        """Once the new container is ready, end the others of its host."""
        new.wait_ready()
        for old in self._containers.running(new.host):
            if old is not new:
                old.stop()

    def remove_udptun(self, host: Host) -> None:
        """Delete the pod, and run cleanup.yml."""
        (running,) = self._containers.running(host)
        running.stop()
        self._containers.clean_up(host)

    def end(self) -> None:
        for host in self.lab.hosts:
            self._containers.kill_all(host)
            if host in self._flannels:
                self.stop_flannel(host)

    @contextmanager
    def watched(self, what: str) -> Iterator[dict[str, float]]:
        """Packets pass between all pods before and after the block.

        Afterwards: for how long they did not, seconds, by the pair of nodes.  Pairs that lost nothing are left out.
        """
        apart_s: dict[str, float] = {}
        pairs = list(permutations(self.lab.hosts, 2))
        with ExitStack() as stack:
            flows: dict[tuple[Host, Host], UdpFlow] = {
                (one, two): stack.enter_context(udp_flow(one.pod(1), two.pod(1), RATE, 5000 + one.index))
                for one, two in pairs
            }
            yield apart_s
            for flow in flows.values():
                flow.wait_for_more(RATE // 4)
        for (one, two), flow in flows.items():
            if flow.report.lost:
                pair = "-".join(sorted((one.name, two.name)))
                apart_s[pair] = max(apart_s.get(pair, 0), flow.report.longest_gap_ms / 1000)
        print(f"{what}: apart {', '.join(f'{pair} {s:.2f} s' for pair, s in sorted(apart_s.items())) or 'nobody'}")

    def wait_for_one_type(self) -> None:
        """Until no node says that it cannot reach another."""
        for host in self.lab.hosts:
            seconds_until(lambda host=host: others(host) == {} and not apart_lines(host), f"{host}'s peers", 20)  # type: ignore[misc]


def others(host: Host) -> dict[str, str]:
    """Subnet -> backend type of the peers that the host's status says are of another type."""
    return {it["subnet"]: it["backend_type"] for it in read_status(host)["other_types"]}


def apart_lines(host: Host) -> list[str]:
    return [line for line in read_status(host)["problems"] if ", this node carries " in line]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Every node has flannel, and a pod."""
    n_hosts = 3 if request.config.getoption("--full") else 2
    bytecode = tmp_path / "bytecode"
    bytecode.mkdir()
    with Lab(f"ct{os.getpid()}", n_hosts=n_hosts, store="kube") as lab:
        cluster = Cluster(lab, Containers(lab, bytecode, {}))
        for host in lab.hosts:
            cluster.start_flannel(host)
            host.add_pod()
        # A flannel that does not know the others yet sends their packets in clear text.
        for one, two in permutations(lab.hosts, 2):
            wait_until(f"{two} to answer {one}", lambda a=one, b=two: is_answered(a.pod(1), b.pod(1).address), 20)  # type: ignore[misc]
        yield cluster
        cluster.end()


def test_a_cluster_moves_from_flannel_to_another_type_and_back_node_by_node(
    cluster: Cluster, tmp_path: Path, slack: int
) -> None:
    hosts = cluster.lab.hosts
    with nothing_in_clear_text(cluster.lab, tmp_path / "c.pcap", EXPLAINED):
        replace_flannel(cluster)
        with cluster.watched("udptun vxlan -> udptun udp, node by node"):
            first = cluster.start_udptun(hosts[0], "udp")
            cluster.end_old(first)
            check_who_is_named(hosts[:1], hosts[1:])
            for n_changed, host in enumerate(hosts[1:], 2):
                cluster.end_old(cluster.start_udptun(host, "udp"))
                check_who_is_named(hosts[:n_changed], hosts[n_changed:])
            cluster.wait_for_one_type()
        for host in hosts[1:]:
            # A line when it comes up, and one when it is resolved.
            line = f"peer {host.underlay_address} leases {host.subnet} for vxlan, this node carries udp"
            assert (first.log().count(line), first.log().count(f"resolved: {line}")) == (2, 1)
        for before, after in (("udp", "vxlan"), ("vxlan", "udp")):
            with cluster.watched(f"udptun {before} -> udptun {after}, all at once") as apart_s:
                for new in [cluster.start_udptun(host, after) for host in hosts]:
                    cluster.end_old(new)
                cluster.wait_for_one_type()
            assert max(apart_s.values(), default=0) < PROMISED_S * slack

    bring_flannel_back(cluster, "udp")


@pytest.mark.full
def test_a_cluster_moves_from_flannel_and_back_with_one_type_node_by_node(cluster: Cluster) -> None:
    replace_flannel(cluster)
    apart_s = bring_flannel_back(cluster, "vxlan")
    assert max(apart_s.values(), default=0) < 5


def replace_flannel(cluster: Cluster) -> None:
    """Nobody is apart, as the kernel's device stays."""
    with cluster.watched("flannel -> udptun vxlan, node by node") as apart_s:
        for host in cluster.lab.hosts:
            cluster.stop_flannel(host)
            cluster.end_old(cluster.start_udptun(host, "vxlan"))
    assert apart_s == {}
    cluster.wait_for_one_type()


def bring_flannel_back(cluster: Cluster, kind: str) -> dict[str, float]:
    """flannel has no routes that refuse, so what has no way yet follows the default route."""
    with cluster.watched(f"udptun {kind} -> flannel, node by node") as apart_s:
        for host in cluster.lab.hosts:
            cluster.remove_udptun(host)
            cluster.start_flannel(host)
    return apart_s


def check_who_is_named(changed: list[Host], left: list[Host]) -> None:
    """Nodes with udp name those with vxlan, and the other way round; nobody names one of its own type."""
    for group, kind, others_group, other_kind in ((changed, "udp", left, "vxlan"), (left, "vxlan", changed, "udp")):
        wanted = {str(other.subnet): other_kind for other in others_group}
        for host in group:
            seconds_until(lambda host=host, wanted=wanted: others(host) == wanted, f"{host} to name them", 20)  # type: ignore[misc]
            assert [line.partition(":")[0] for line in apart_lines(host)] == [
                f"peer {it.underlay_address} leases {it.subnet} for {other_kind}, this node carries {kind}"
                for it in others_group
            ]

"""The kube store under the contract test: on the lab's API server, and with --kube-apiserver PATH on a real one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from etcd_server import until
from kube_server import MISSING, SHARED, Client, Ours, Running, write_kubeconfig
from store_harness import NET_CONF, SUBNETS, Can, host

from udptun.config.flags import parse_daemon_flags
from udptun.lab.kube_api.patch import STRATEGIC

if TYPE_CHECKING:
    from udptun.lab.kube_api.cluster import Cluster
    from udptun.stores.kube.store import KubeStore

PREFIX = "flannel.alpha.coreos.com/"


def annotations(number: int) -> dict[str, str]:
    """What our daemon on host `number` writes."""
    attrs = host(number)
    said = {
        f"{PREFIX}backend-data": json.dumps(attrs.backend_data, separators=(",", ":")),
        f"{PREFIX}backend-type": attrs.backend_type,
        f"{PREFIX}kube-subnet-manager": "true",
    }
    if attrs.public_ip is not None:
        said[f"{PREFIX}public-ip"] = str(attrs.public_ip)
    if attrs.public_ipv6 is not None:
        said[f"{PREFIX}backend-v6-data"] = json.dumps(attrs.backend_v6_data, separators=(",", ":"))
        said[f"{PREFIX}public-ipv6"] = str(attrs.public_ipv6)
    return said


def pod_cidrs(subnet: int) -> str:
    """The podCIDRs of that number, that of IPv6 first: the control plane has either order."""
    subnets = SUBNETS[subnet]
    return ",".join(str(it) for it in (subnets.ipv6, subnets.ipv4) if it is not None)


def kube_store(kubeconfig: Path, net_conf: Path, node: str, *flags: str) -> KubeStore:
    """As the daemon on the node makes it from its flags."""
    from udptun.stores.kube.store import KubeStore

    argv = ["--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}", *flags]
    return KubeStore(parse_daemon_flags(argv, {"NODE_NAME": node}).kube, net_conf)


class KubeHarness:
    """The hands are an administrator's.  Host `number` is the node of that number; its subnet is its podCIDR."""

    name = "kube"
    kind = "tls"
    program: ClassVar[str | None] = None
    lacks: Mapping[Can, str] = {
        Can.ALLOCATE: "the controller manager has given each node its podCIDR",
        Can.EXPIRE: "a lease ends with its node",
        Can.RESUME: "only the table of the last revision is kept; any other watch starts with a snapshot",
    }
    needs: Sequence[str] = MISSING
    slack_descriptors = 8
    _number: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, directory: Path) -> None:
        self.server: Running = SHARED.get(self.kind, directory, self.program)
        self.client = Client(self.server.url, ca=self.server.ca)
        self.net_conf = directory / "net-conf.json"
        self.net_conf.write_text(NET_CONF)
        self.kubeconfig = write_kubeconfig(directory / "kubeconfig", self.server.url, ca=self.server.ca)
        for name in self.client.names():
            self.client.delete(name)
        self._there: dict[int, int] = {}

    def store(self, number: int = 1) -> KubeStore:
        return kube_store(self.kubeconfig, self.net_conf, f"n{number}")

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        wanted = {number: subnet for subnet, number in leases}
        for number, subnet in self._there.items():
            if wanted.get(number) != subnet:
                self.client.delete(f"n{number}")
        for number, subnet in wanted.items():
            if self._there.get(number) != subnet:
                self.client.add_node(f"n{number}", pod_cidrs(subnet), annotations(number))
            else:
                self.client.annotate(f"n{number}", annotations(number))
        self._there = wanted

    def spoil(self, number: int) -> str:
        node = f"n{next(it for it, subnet in self._there.items() if subnet == number)}"
        self.client.annotate(node, {f"{PREFIX}public-ip": "2001:db8::1"})
        return f"node {node}:"

    def lose_history(self) -> None:
        raise AssertionError("keeps none")


class LabKubeHarness(KubeHarness):
    """Writes thousands of nodes without a request for each."""

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        assert isinstance(self.server, Ours)
        wanted = {number: subnet for subnet, number in leases}
        there, self._there = self._there, wanted

        def change(cluster: Cluster) -> None:
            for number, subnet in there.items():
                if wanted.get(number) != subnet:
                    cluster.nodes.delete(f"n{number}")
            for number, subnet in wanted.items():
                if there.get(number) != subnet:
                    cluster.add_node(f"n{number}", pod_cidrs(subnet), annotations(number))
                else:
                    patch = {"metadata": {"annotations": annotations(number)}}
                    cluster.nodes.patch(f"n{number}", STRATEGIC, patch, is_status=False)

        self.server.api.do(change)


class RealKubeHarness(KubeHarness):
    """On a kube-apiserver.  Its cache, out of which a first list comes, is some milliseconds behind."""

    name = "kube-apiserver"
    kind = "real"

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        super().write(leases)
        self._wait_for_cache()

    def spoil(self, number: int) -> str:
        name = super().spoil(number)
        self._wait_for_cache()
        return name

    def _wait_for_cache(self) -> None:
        def nodes(query: str) -> list[tuple[str, str]]:
            items = self.client.get(f"/api/v1/nodes{query}")["items"]
            return [(it["metadata"]["name"], it["metadata"]["resourceVersion"]) for it in items]

        until(lambda: sorted(nodes("?resourceVersion=0")) == sorted(nodes("")), "the cache has all nodes")

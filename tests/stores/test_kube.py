"""What the kube store alone does: flannel's requests to the byte, a node's life, and a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kube_harness import PREFIX, annotations, kube_store
from kube_server import MISSING, POOR_TOKEN, TOKEN, Client, Ours, write_kubeconfig
from member import CONFIG, Member, holds
from store_harness import host, watching

from udptun.core.clock import Clock
from udptun.core.errors import ConfigError, LeaseError, LeaseLostError, StoreUnavailableError
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseAttrs
from udptun.stores.base import PublicAddresses, SubnetChoice

if TYPE_CHECKING:
    from udptun.lab.kube_api.connection import Request
    from udptun.stores.kube.store import KubeStore

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.xdist_group("kube"),
]

ANNOTATE, LIST = "PATCH /api/v1/nodes/n1/status", "GET /api/v1/nodes?limit=500&resourceVersion=0"


class Cluster:
    """An API server of its own over TLS, an administrator, and stores of the nodes."""

    def __init__(self, undo: ExitStack, directory: Path) -> None:
        self.server = Ours(undo, directory, with_tls=True)
        self.api = self.server.api
        self.admin = Client(self.server.url, ca=self.server.ca)
        self.directory = directory
        self.net_conf = directory / "net-conf.json"
        self.net_conf.write_text(CONFIG)
        self.kubeconfig = write_kubeconfig(directory / "kubeconfig", self.server.url, ca=self.server.ca)

    def store(self, node: str = "n1", *flags: str) -> KubeStore:
        return kube_store(self.kubeconfig, self.net_conf, node, *flags)

    def patches(self) -> list[Request]:
        return [request for request in list(self.api.requests) if request.method == "PATCH"]

    def put_right(self, change: Callable[[Any], Any]) -> None:
        self.api.do(change)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as undo:
        yield Cluster(undo, tmp_path)


def nobody_chooses(leases: object) -> SubnetChoice:
    raise AssertionError("the control plane has chosen")


async def claim(store: KubeStore, attrs: LeaseAttrs) -> Lease:
    return await store.claim(attrs, nobody_chooses)


# --- flannel's requests


UDP = LeaseAttrs(IPv4Address("10.99.0.1"))
VXLAN = LeaseAttrs(
    IPv4Address("10.99.0.1"), backend_type="vxlan", backend_data={"VNI": 1, "VtepMAC": "8e:a1:ea:52:d6:a3"}
)
CAPTURED = {
    # What real flanneld v0.20 sent.
    "udp": '{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"null",'
    '"flannel.alpha.coreos.com/backend-type":"","flannel.alpha.coreos.com/kube-subnet-manager":"true",'
    '"flannel.alpha.coreos.com/public-ip":"10.99.0.1"}}}',
    "vxlan": '{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":'
    '"{\\"VNI\\":1,\\"VtepMAC\\":\\"8e:a1:ea:52:d6:a3\\"}","flannel.alpha.coreos.com/backend-type":"vxlan",'
    '"flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"10.99.0.1"}}}',
}


@pytest.mark.parametrize(("attrs", "body"), [(UDP, CAPTURED["udp"]), (VXLAN, CAPTURED["vxlan"])], ids=["udp", "vxlan"])
async def test_the_requests_are_flannels_to_the_byte(cluster: Cluster, attrs: LeaseAttrs, body: str) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store()
    lease = await claim(store, attrs)
    assert (str(lease.subnet), lease.attrs, lease.expires_s, lease.node_name) == ("10.0.1.0/24", attrs, None, "n1")
    async with watching(store):
        await store.note_ready(())
        await holds(lambda: len(cluster.patches()) == 2, "both patches")
    annotate, condition = cluster.patches()
    assert annotate.line == condition.line == ANNOTATE
    assert {it.headers["content-type"] for it in (annotate, condition)} == {"application/strategic-merge-patch+json"}
    assert annotate.body.decode() == body
    stamp = r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"'
    wanted = re.escape('{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":@,')
    wanted += re.escape('"lastTransitionTime":@,"reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}')
    assert re.fullmatch(wanted.replace("@", stamp), condition.body.decode())
    lines = cluster.api.lines()
    assert LIST in lines
    watch = next(line for line in lines if "watch=true" in line)
    match = re.fullmatch(
        r"GET /api/v1/nodes\?allowWatchBookmarks=true&resourceVersion=\d+&timeout=(\d+)m(\d+)s"
        r"&timeoutSeconds=(\d+)&watch=true",
        watch,
    )
    assert match is not None, watch
    assert 60 * int(match[1]) + int(match[2]) == int(match[3])
    await store.aclose()


async def test_a_second_start_writes_nothing_that_is_there_and_only_what_differs(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    for attrs in (VXLAN, VXLAN, LeaseAttrs(IPv4Address("10.99.0.2"), None, "vxlan", VXLAN.backend_data)):
        store = cluster.store()
        assert (await claim(store, attrs)).attrs == attrs
        await store.aclose()
    first, second = cluster.patches()
    assert first.body.decode() == CAPTURED["vxlan"]
    assert json.loads(second.body) == {"metadata": {"annotations": {f"{PREFIX}public-ip": "10.99.0.2"}}}


async def test_another_annotation_prefix_is_used_for_every_annotation(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store("n1", "--kube-annotation-prefix=example.com/a")
    await claim(store, UDP)
    written = json.loads(cluster.patches()[0].body)["metadata"]["annotations"]
    assert sorted(written) == [
        f"example.com/a-{name}" for name in ("backend-data", "backend-type", "kube-subnet-manager", "public-ip")
    ]
    assert len((await store.snapshot()).leases) == 1
    await store.aclose()


async def test_nodes_that_flannel_annotated_are_peers_and_others_are_not(cluster: Cluster) -> None:
    flannels = {f"{PREFIX}backend-data": "null", f"{PREFIX}backend-type": "", f"{PREFIX}public-ip": "192.0.2.1"}
    manager = {f"{PREFIX}kube-subnet-manager": "true"}
    vxlan = {
        f"{PREFIX}backend-data": '{"VNI":1,"VtepMAC":"8e:a1:ea:52:d6:a3"}',
        f"{PREFIX}backend-type": "vxlan",
        f"{PREFIX}public-ip": "192.0.2.2",
    }

    def make(it: Any) -> None:
        it.add_node("udp", "10.0.1.0/24", {**flannels, **manager})
        it.add_node("vxlan", "10.0.2.0/24", {**vxlan, **manager})
        it.add_node("none", "10.0.3.0/24", flannels)
        it.add_node("false", "10.0.4.0/24", {**flannels, f"{PREFIX}kube-subnet-manager": "false"})
        it.add_node("no-cidr", "", {**flannels, **manager})
        it.add_node("junk", "10.0.5.0/24", {**vxlan, **manager, f"{PREFIX}backend-data": "{"})
        it.nodes.create(
            {
                "metadata": {"name": "dual", "annotations": {**flannels, **manager, f"{PREFIX}public-ip": "192.0.2.3"}},
                "spec": {"podCIDR": "fd00::/64", "podCIDRs": ["fd00::/64", "10.0.6.0/24"]},
            }
        )

    cluster.put_right(make)
    store = cluster.store()
    snapshot = await store.snapshot()
    leases = {lease.node_name: lease for lease in snapshot.leases}
    assert leases.keys() == {"udp", "vxlan", "dual"}
    assert leases["udp"].attrs == LeaseAttrs(IPv4Address("192.0.2.1"))
    assert leases["vxlan"].attrs.backend_data == {"VNI": 1, "VtepMAC": "8e:a1:ea:52:d6:a3"}
    assert leases["dual"].key == "10.0.6.0-24&fd00::-64"
    no_cidr, junk = sorted(snapshot.skipped, reverse=True)
    assert no_cidr == "node no-cidr: it has no podCIDR"
    assert junk.startswith(f"node junk: its annotation {PREFIX}backend-data is not JSON: ")
    await store.aclose()


# --- a node's life


async def test_public_ip_overwrite_is_what_peers_get_and_is_followed_when_it_changes(cluster: Cluster) -> None:
    overwrite = f"{PREFIX}public-ip-overwrite"
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24", {overwrite: "203.0.113.1"}))
    store = cluster.store()
    assert (await claim(store, host(1))).attrs.public_ip == IPv4Address("203.0.113.1")
    async with watching(store) as watcher:
        await asyncio.to_thread(cluster.admin.annotate, "n1", {overwrite: "203.0.113.2"})
        await watcher.until(lambda: watcher.leases["10.0.1.0-24"].attrs.public_ip == IPv4Address("203.0.113.2"))
        # One that is no address would take the node out of its peers' tables.
        await asyncio.to_thread(cluster.admin.annotate, "n1", {overwrite: "many"})
        await watcher.until(lambda: watcher.leases["10.0.1.0-24"].attrs == host(1))
    await store.aclose()


async def test_node_public_ip_is_told_before_the_claim(cluster: Cluster) -> None:
    key, v6_key = f"{PREFIX}node-public-ip", f"{PREFIX}node-public-ipv6"
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24", {key: "203.0.113.1", v6_key: "2001:db8::1"}))
    store = cluster.store()
    both = PublicAddresses(IPv4Address("203.0.113.1"), IPv6Address("2001:db8::1"))
    assert await store.public_addresses() == both
    for wrong in (key, v6_key):
        await asyncio.to_thread(cluster.admin.annotate, "n1", {key: None, v6_key: None, wrong: "many"})
        with pytest.raises(ConfigError, match=rf"node n1: its annotation {wrong}: "):
            await store.public_addresses()
    await asyncio.to_thread(cluster.admin.annotate, "n1", {v6_key: None})
    assert await store.public_addresses() == PublicAddresses()
    await store.aclose()


async def test_a_node_that_loses_ipv6_takes_its_ipv6_annotations_back(cluster: Cluster) -> None:
    """Before, public-ipv6 and backend-v6-data of an earlier run stayed, and peers of Type udp sent there."""
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24,fd00::/64"))
    store = cluster.store()
    with_ipv6 = replace(host(1), public_ipv6=IPv6Address("2001:db8::1"), backend_v6_data={"VNI": 1})
    assert (await claim(store, with_ipv6)).attrs == with_ipv6
    assert (await claim(store, host(1))).attrs == host(1)
    (lease,) = (await store.snapshot()).leases
    assert lease.attrs == host(1)
    await store.aclose()


@pytest.mark.parametrize(
    ("family", "cidr", "lacks"),
    [(Family.IPV4, "fd00:0:0:2::/64", "no IPv4 podCIDR"), (Family.IPV6, "10.0.2.0/24", "no IPv6 podCIDR")],
)
async def test_a_node_without_a_pod_cidr_of_the_network_is_named_as_skipped(
    cluster: Cluster, family: Family, cidr: str, lacks: str
) -> None:
    """Before, its lease was in no table, and nobody said why."""
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24,fd00:0:0:1::/64"))
    annotations = {f"{PREFIX}kube-subnet-manager": "true", f"{PREFIX}public-ip": "192.0.2.2"}
    cluster.put_right(lambda it: it.add_node("n2", cidr, annotations))
    store = cluster.store()
    store.want_families([family])
    await claim(store, host(1))
    snapshot = await store.snapshot()
    assert [lease.node_name for lease in snapshot.leases] == ["n1"]
    assert snapshot.skipped == (f"node n2: it has {lacks}, only {cidr}",)
    await store.aclose()


async def test_public_ipv6_overwrite_is_what_peers_get_and_public_ip_stays(cluster: Cluster) -> None:
    overwrite = f"{PREFIX}public-ipv6-overwrite"
    cluster.put_right(lambda it: it.add_node("n1", "fd00::/64,10.0.1.0/24", {overwrite: "2001:db8::9"}))
    store = cluster.store()
    attrs = replace(host(1), public_ipv6=IPv6Address("2001:db8::1"))
    lease = await claim(store, attrs)
    assert lease.key == "10.0.1.0-24&fd00::-64"
    assert lease.attrs == replace(attrs, public_ipv6=IPv6Address("2001:db8::9"))
    async with watching(store) as watcher:
        await asyncio.to_thread(cluster.admin.annotate, "n1", {overwrite: "many"})
        await watcher.until(lambda: watcher.leases[lease.key].attrs == attrs)
    await store.aclose()


@pytest.mark.parametrize(
    ("families", "cidr", "lacks"),
    [
        ([Family.IPV4], "fd00::/64", "no IPv4 podCIDR"),
        ([Family.IPV6], "10.0.1.0/24", "no IPv6 podCIDR"),
        ([Family.IPV4, Family.IPV6], "fd00::/64", ""),
        ([Family.IPV4, Family.IPV6], "10.0.1.0/24", ""),
    ],
    ids=str,
)
async def test_a_pod_cidr_of_a_family_that_pods_have_is_enough(
    cluster: Cluster, families: list[Family], cidr: str, lacks: str
) -> None:
    """A node with an IPv6 podCIDR alone had no lease, although pods had both families."""
    cluster.put_right(lambda it: it.add_node("n1", cidr))
    store = cluster.store()
    store.want_families(families)
    if lacks:
        with pytest.raises(StoreUnavailableError, match=f"node n1: it has {lacks}, only {cidr}; the controller"):
            await claim(store, host(1))
    else:
        assert str((await claim(store, host(1))).subnet) == cidr
    await store.aclose()


async def test_the_condition_says_which_family_pods_lack_and_no_longer_when_they_have_it(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))

    def message() -> object:
        condition = cluster.admin.condition("n1", "NetworkUnavailable")
        return None if condition is None else (condition["status"], condition["message"])

    plain = "Flannel is running on this node"
    for lacks, wanted in ((["pods have no IPv6"], f"{plain}; pods have no IPv6"), ([], plain)):
        store = cluster.store()
        await claim(store, host(1))
        await store.note_ready(lacks)
        await holds(lambda wanted=wanted: message() == ("False", wanted), "the message")  # type: ignore[misc]
        await store.aclose()


async def test_the_pod_says_which_node_it_is(cluster: Cluster) -> None:
    from udptun.config.flags import parse_daemon_flags
    from udptun.stores.kube.store import KubeStore

    cluster.put_right(lambda it: it.add_node("n7", "10.0.1.0/24"))
    cluster.put_right(lambda it: it.add_pod("kube-flannel", "flannel-x", "n7"))
    argv = ["--kube-subnet-mgr", f"--kubeconfig-file={cluster.kubeconfig}"]
    pod = {"POD_NAME": "flannel-x", "POD_NAMESPACE": "kube-flannel"}
    store = KubeStore(parse_daemon_flags(argv, pod).kube, cluster.net_conf)
    assert (await claim(store, host(1))).node_name == "n7"
    assert store.node_name == "n7"
    await store.aclose()
    store = KubeStore(parse_daemon_flags(argv, {**pod, "POD_NAME": "other"}).kube, cluster.net_conf)
    with pytest.raises(StoreUnavailableError, match=r'pods "other" not found; give NODE_NAME'):
        await claim(store, host(1))
    await store.aclose()


async def test_a_missing_pod_cidr_is_waited_for_and_the_remedy_is_said_to_kubernetes_too(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1"))
    store = cluster.store()
    with pytest.raises(StoreUnavailableError, match=r"node n1: it has no podCIDR; .*--allocate-node-cidrs=true"):
        await claim(store, host(1))
    condition = await asyncio.to_thread(cluster.admin.condition, "n1", "NetworkUnavailable")
    assert condition is not None
    assert (condition["status"], condition["reason"]) == ("True", "NoPodCIDR")
    assert "--cluster-cidr" in condition["message"]
    assert "it has no podCIDR" in await store.find_lack()
    waiting = asyncio.create_task(claim(store, host(1)))
    await holds(lambda: cluster.api.n_watches() == 1, "a watch of the node")
    n_requests = len(cluster.api.requests)
    await asyncio.sleep(0.2)
    assert len(cluster.api.requests) == n_requests
    body = {"spec": {"podCIDR": "10.0.1.0/24", "podCIDRs": ["10.0.1.0/24"]}}
    kind = "application/strategic-merge-patch+json"
    await asyncio.to_thread(cluster.admin.ask, "PATCH", "/api/v1/nodes/n1", body, kind)
    assert str((await waiting).subnet) == "10.0.1.0/24"
    assert await store.find_lack() == ""
    await store.aclose()


async def test_a_node_that_is_not_there_yet_is_waited_for(cluster: Cluster) -> None:
    store = cluster.store()
    with pytest.raises(StoreUnavailableError, match=r"there is no node n1 in Kubernetes: kubelet registers it"):
        await claim(store, host(1))
    waiting = asyncio.create_task(claim(store, host(1)))
    await holds(lambda: cluster.api.n_watches() == 1, "a watch of the node")
    await asyncio.to_thread(cluster.admin.add_node, "n1", "10.0.1.0/24")
    assert (await waiting).node_name == "n1"
    await store.aclose()


async def test_annotations_that_somebody_removes_and_a_node_that_comes_again_are_written_at_once(
    cluster: Cluster,
) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store()
    lease = await claim(store, host(1))
    async with watching(store) as watcher:
        await asyncio.to_thread(cluster.admin.annotate, "n1", {f"{PREFIX}kube-subnet-manager": None})
        await watcher.until(lambda: len(watcher.batches) > 1 and lease.key in watcher.leases)
        await asyncio.to_thread(cluster.admin.delete, "n1")
        await watcher.until(lambda: lease.key not in watcher.leases)
        with pytest.raises(LeaseLostError, match="there is no node n1"):
            await store.renew(lease)
        await holds(lambda: store.problems, "the problem to be said")
        await asyncio.to_thread(cluster.admin.add_node, "n1", "10.0.1.0/24")
        await watcher.until(lambda: lease.key in watcher.leases)
        assert watcher.leases[lease.key].attrs == host(1)
        await holds(lambda: not store.problems, "all to be well")
    await store.aclose()


async def test_network_unavailable_is_set_again_when_somebody_else_sets_it_with_growing_pauses(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from udptun.stores.kube import own_node

    monkeypatch.setattr(own_node, "QUARREL_S", (0.2, 60.0))
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store()

    def status() -> str:
        return (cluster.admin.condition("n1", "NetworkUnavailable") or {"status": ""})["status"]

    async def is_false() -> None:
        while await asyncio.to_thread(status) != "False":
            await asyncio.sleep(0.01)

    await claim(store, host(1))
    assert status() == ""
    async with asyncio.timeout(20), watching(store):
        await store.note_ready(())
        await is_false()
        began_s = time.monotonic()
        for _ in range(3):
            await asyncio.to_thread(cluster.admin.set_condition, "n1", "NetworkUnavailable", "True")
            await is_false()
        # 0.2 + 0.4 + 0.8 s at least.
        assert time.monotonic() - began_s > 1.0
    await store.aclose()


async def test_network_unavailable_is_left_alone_when_the_flag_says_so(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store("n1", "--set-node-network-unavailable=false")
    await claim(store, host(1))
    async with watching(store) as watcher:
        await store.note_ready(())
        await asyncio.to_thread(cluster.admin.add_node, "n2", "10.0.2.0/24", annotations(2))
        await watcher.until(lambda: "10.0.2.0-24" in watcher.leases)
    assert len(cluster.patches()) == 1
    await store.aclose()


async def test_two_nodes_with_one_address_or_one_subnet_are_both_named(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("a", "10.0.1.0/24", annotations(1)))
    cluster.put_right(lambda it: it.add_node("b", "10.0.2.0/24", annotations(1)))
    store = cluster.store()
    async with watching(store) as watcher:
        (line,) = store.problems
        assert line.startswith(f"the nodes a and b publish one PublicIP {host(1).public_ip}, ")
        await asyncio.to_thread(cluster.admin.add_node, "c", "10.0.1.0/24", annotations(3))
        wanted = "node c: its podCIDR 10.0.1.0-24 is that of node a, too"
        await watcher.until(lambda: watcher.refused == {wanted})
        assert watcher.leases["10.0.1.0-24"].node_name == "a"
        await asyncio.to_thread(cluster.admin.delete, "a")
        await watcher.until(lambda: watcher.leases["10.0.1.0-24"].node_name == "c" and not watcher.refused)
        assert store.problems == ()
    await store.aclose()


async def test_operators_commands_say_what_to_do_instead(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    store = cluster.store()
    lease = await claim(store, host(1))
    with pytest.raises(LeaseError, match="gives each node its podCIDR"):
        await store.reserve(lease.subnets, host(1))
    with pytest.raises(LeaseError, match="kubectl annotate node n1 "):
        await store.delete(lease)
    await store.aclose()


# --- a server that misbehaves


def churn(cluster: Cluster, rng: random.Random, there: set[int], n_changes: int, n_nodes: int) -> None:
    """Nodes come, go, move and are touched without a change that matters."""

    def change(it: Any) -> None:
        for _ in range(n_changes):
            number = rng.randrange(2, n_nodes)
            name = f"n{number}"
            subnet = f"10.{number >> 8}.{number & 255}.0/24"
            if number not in there:
                it.add_node(name, subnet, annotations(number))
                there.add(number)
                continue
            match rng.randrange(4):
                case 0:
                    it.nodes.delete(name)
                    there.discard(number)
                case 1:
                    moved = {"metadata": {"annotations": annotations(number + n_nodes)}}
                    it.nodes.patch(name, "application/merge-patch+json", moved, is_status=False)
                case 2:
                    gone = {"metadata": {"annotations": {f"{PREFIX}kube-subnet-manager": None}}}
                    it.nodes.patch(name, "application/merge-patch+json", gone, is_status=False)
                case _:
                    beat = {"status": {"conditions": [{"type": "Ready", "status": rng.choice("ab")}]}}
                    it.nodes.patch(name, "application/merge-patch+json", beat, is_status=True)

    cluster.api.do(change)


def truth(cluster: Cluster) -> dict[str, str]:
    """Every lease that the server has: key and PublicIP."""

    def read(it: Any) -> dict[str, str]:
        found = {}
        for name in it.nodes.names():
            value = it.nodes.get(name).value
            texts = value["metadata"]["annotations"]
            if texts.get(f"{PREFIX}kube-subnet-manager") == "true":
                found[value["spec"]["podCIDR"].replace("/", "-")] = texts[f"{PREFIX}public-ip"]
        return found

    return cluster.api.do(read)


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "dropped": lambda it: void(it.api.drop_watches()),
    "compacted": lambda it: (it.server.compact(), void(it.api.drop_watches()))[1],  # type: ignore[func-returns-value]
    "throttled": lambda it: (it.api.faults.answers.extend([(429, "0")] * 3), void(it.api.drop_watches()))[1],
    "failing": lambda it: (it.api.faults.answers.extend([(500, "")] * 3), void(it.api.drop_watches()))[1],
    "restarted": lambda it: (it.api.stop(), it.api.start())[1],
}


def void(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("n_nodes", "rounds"), [(60, 3), pytest.param(5000, 10, marks=[pytest.mark.full, pytest.mark.alone])]
)
async def test_no_peer_is_lost_and_none_is_a_phantom_whatever_the_server_does(
    cluster: Cluster, n_nodes: int, rounds: int
) -> None:
    rng = random.Random(1)
    there: set[int] = set()
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    churn(cluster, rng, there, 2 * n_nodes, n_nodes)
    store = cluster.store()
    await claim(store, host(1))
    member_of: dict[str, str] = {}
    slowest_s = 0.0

    async def follow() -> None:
        """As membership does."""
        after = -1
        while True:
            try:
                if after == -1:
                    snapshot = await store.snapshot()
                    after = snapshot.revision
                    member_of.clear()
                    member_of.update({lease.key: str(lease.attrs.public_ip) for lease in snapshot.leases})
                async with aclosing(store.watch(after)) as batches:
                    async for batch in batches:
                        if batch.snapshot is not None:
                            member_of.clear()
                            leases = batch.snapshot.leases
                            member_of.update({lease.key: str(lease.attrs.public_ip) for lease in leases})
                        for event in batch.events:
                            if event.type.value == "added":
                                member_of[event.lease.key] = str(event.lease.attrs.public_ip)
                            else:
                                assert member_of.pop(event.lease.key, None), "a removal of what was never told"
                        after = batch.revision
            except StoreUnavailableError:
                await asyncio.sleep(random.uniform(0.05, 0.1))

    following = asyncio.create_task(follow())
    try:
        await holds(lambda: member_of == truth(cluster) or following.done(), "the first table")
        for number in range(rounds):
            for fault in FAULTS.values():
                await asyncio.to_thread(churn, cluster, rng, there, n_nodes // 10, n_nodes)
                await asyncio.to_thread(fault, cluster)
                await asyncio.to_thread(churn, cluster, rng, there, n_nodes // 10, n_nodes)
                wanted = await asyncio.to_thread(truth, cluster)
                slowest_s = max(slowest_s, await holds(lambda wanted=wanted: member_of == wanted, f"round {number}"))  # type: ignore[misc]
        assert not following.done()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.aclose()
    print(f"{n_nodes} nodes: right again {slowest_s:.2f} s after the last change at the slowest")
    lists = [line for line in cluster.api.lines() if line.startswith("GET /api/v1/nodes?limit=500")]
    # One at the start, and one for each forgotten history: of at most ten pages each, and twice when interrupted.
    assert len(lists) <= (1 + 4 * rounds) * (1 + n_nodes // 500)


IMAGES = [{"names": [f"registry.example/{number:064x}"], "sizeBytes": number} for number in range(90)]
"""They make a node as large as a real one, 10 kB."""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("n_nodes", "allowed_s", "beats_s", "gone_s"),
    [(500, 5 * 1.5, 1.0, 5 * 1.0), pytest.param(5000, 1.5, 10.0, 1.0, marks=pytest.mark.full)],
)
async def test_nodes_of_real_size_are_listed_in_little_more_than_the_server_takes_and_heartbeats_cost_little(
    cluster: Cluster, n_nodes: int, allowed_s: float, beats_s: float, gone_s: float
) -> None:
    """And a list that is needed because the server has forgotten what was before waits for nothing."""
    def make(it: Any) -> None:
        for number in range(1, n_nodes + 1):
            it.add_node(f"n{number}", f"10.{number >> 8}.{number & 255}.0/24", annotations(number), images=IMAGES)

    def beat(it: Any, number: int) -> None:
        body = {"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": str(time.time())}]}}
        it.nodes.patch(f"n{number}", "application/strategic-merge-patch+json", body, is_status=True)

    cluster.put_right(make)
    began_s = time.monotonic()
    connection = cluster.admin._connection()
    connection.request("GET", "/api/v1/nodes?resourceVersion=0", headers={"Authorization": f"Bearer {TOKEN}"})
    n_bytes = len(connection.getresponse().read())
    connection.close()
    sends_s = time.monotonic() - began_s
    store = cluster.store()
    began_s = time.monotonic()
    snapshot = await store.snapshot()
    took_s = time.monotonic() - began_s
    assert len(snapshot.leases) == n_nodes
    print(f"{n_nodes} nodes, {n_bytes / n_nodes / 1000:.1f} kB each: sent in {sends_s:.2f} s, listed in {took_s:.2f} s")
    assert took_s - sends_s <= allowed_s
    async with watching(store, snapshot.revision, snapshot.leases) as watcher:
        await holds(lambda: cluster.api.n_watches() == 1, "the watch")
        # A kubelet writes every 5 minutes, as long as nothing changes.
        n_beats = int(n_nodes / 300 * beats_s) + 1
        began_s, cpu_s = time.monotonic(), time.thread_time()
        for number in range(n_beats):
            await asyncio.to_thread(cluster.put_right, lambda it, number=number: beat(it, number + 1))  # type: ignore[misc]
            await asyncio.sleep(beats_s / n_beats)
        cpu_s, took_s = time.thread_time() - cpu_s, time.monotonic() - began_s
        print(f"{n_beats} heartbeats in {took_s:.1f} s cost {100 * cpu_s / took_s:.2f} % of a core")
        # The test's own share is in it.
        assert cpu_s / took_s < (0.02 if n_nodes == 5000 else 0.1)
        assert not watcher.events(EventType.ADDED)

        def forget(it: Any) -> None:
            it.nodes.delete("n2")
            it.nodes.compact()

        cluster.put_right(forget)
        await asyncio.to_thread(cluster.api.drop_watches)
        await watcher.until(lambda: "10.0.2.0-24" not in watcher.leases)
        right_s = time.monotonic() - cluster.api.gone_s[-1]
        print(f"right {right_s:.2f} s after the server has said that it has forgotten what was before (410)")
        assert right_s <= gone_s
    await store.aclose()


@pytest.mark.parametrize("ending", ["dropped", "in order"])
async def test_hosts_that_lose_their_watches_together_do_not_list_together(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A server that restarts or begins its cache anew ends all watches, and has forgotten what was before.

    The wait is before they ask again.  With one before the list as well, tables were right a second and a half late.
    """
    from udptun.lab.kube_api import server
    from udptun.stores.kube import watch

    async def end_in_order(connection: Any, *_: object) -> None:
        await changed.wait()
        await connection.end()

    monkeypatch.setattr(watch, "reconnect_spread_s", lambda n_hosts: 2.0)
    monkeypatch.setattr(watch, "_SHORT_S", 0.1)
    follow = server.ApiServer._follow
    changed = await asyncio.to_thread(cluster.api.do, lambda it: asyncio.Event())
    if ending == "in order":
        monkeypatch.setattr(server.ApiServer, "_follow", lambda self, connection, *rest: end_in_order(connection))
    n_hosts = 16
    stores = [cluster.store(f"n{number}") for number in range(n_hosts)]
    async with AsyncExitStack() as undo:
        watchers = [await undo.enter_async_context(watching(store)) for store in stores]
        await holds(lambda: cluster.api.n_watches() == n_hosts, "all watches")
        await asyncio.sleep(0.2)
        monkeypatch.setattr(server.ApiServer, "_follow", follow)
        n_requests = len(cluster.api.requests)

        def restart(it: Any) -> None:
            changed.set()
            if ending == "dropped":
                for task in cluster.api._watches:
                    task.cancel()
            it.add_node("new", "10.0.99.0/24", annotations(99))
            it.nodes.compact()

        cluster.put_right(restart)
        for watcher in watchers:
            await watcher.until(lambda watcher=watcher: "10.0.99.0-24" in watcher.leases)  # type: ignore[misc]
    lists = [it.came_s for it in list(cluster.api.requests)[n_requests:] if it.line == "GET /api/v1/nodes?limit=500"]
    assert len(lists) == n_hosts
    # Half a second of two for all of sixteen would be a chance of one in fifty million.
    assert max(lists) - min(lists) > 0.5
    for store in stores:
        await store.aclose()


async def test_a_refusal_in_one_piece_with_events_is_not_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events were taken and the refusal was not: the list came only after another watch, and its pause."""
    from udptun.lab.kube_api import server

    follow = server.ApiServer._follow
    cluster.put_right(lambda it: it.add_node("n2", "10.0.2.0/24"))
    text = cluster.api.do(lambda it: it.add_node("n3", "10.0.3.0/24", annotations(3)).text)
    gone = {"kind": "Status", "status": "Failure", "message": "too old", "reason": "Expired", "code": 410}

    async def send_both(self: server.ApiServer, connection: Any, *rest: Any) -> None:
        monkeypatch.setattr(server.ApiServer, "_follow", follow)
        await connection.send(server._event("MODIFIED", text) + server._event("ERROR", json.dumps(gone).encode()))
        await connection.end()

    monkeypatch.setattr(server.ApiServer, "_follow", send_both)
    store = cluster.store()
    snapshot = await store.snapshot()
    async with watching(store, snapshot.revision) as watcher:
        await watcher.until(lambda: "10.0.3.0-24" in watcher.leases)
        await holds(lambda: cluster.api.n_watches() == 1, "the second watch")
    lines = [line.partition("&")[0] for line in cluster.api.lines()]
    watch = "GET /api/v1/nodes?allowWatchBookmarks=true"
    assert lines == ["GET /api/v1/nodes?limit=500", watch, "GET /api/v1/nodes?limit=500", watch]
    await store.aclose()


async def test_a_server_that_ends_each_watch_at_once_is_not_asked_without_a_pause(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked again as fast as it answered, for ever."""
    from udptun.lab.kube_api import server

    async def end(self: object, connection: Any, *_: object) -> None:
        await connection.end()

    monkeypatch.setattr(server.ApiServer, "_follow", end)
    store = cluster.store()
    snapshot = await store.snapshot()

    async def follow() -> None:
        async with aclosing(store.watch(snapshot.revision)) as batches:
            async for _ in batches:
                pass

    with pytest.raises(StoreUnavailableError, match=r"cannot watch the nodes at .*: the server has ended it before"):
        await follow()
    assert sum("watch=true" in line for line in cluster.api.lines()) == 1
    await store.aclose()


async def test_a_silent_stream_is_opened_again_and_goes_on_without_a_list(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from udptun.stores.kube import client as kube_client

    monkeypatch.setattr(kube_client, "SILENCE_S", 1.5)
    cluster.put_right(lambda it: it.add_node("n2", "10.0.2.0/24", annotations(2)))
    store = cluster.store()
    async with watching(store) as watcher:
        await holds(lambda: cluster.api.n_watches() == 1, "the watch")
        cluster.api.faults.is_silent = True
        await asyncio.to_thread(cluster.admin.add_node, "n3", "10.0.3.0/24", annotations(3))
        await asyncio.sleep(0.3)
        assert "10.0.3.0-24" not in watcher.leases
        cluster.api.faults.is_silent = False
        await watcher.until(lambda: "10.0.3.0-24" in watcher.leases)
    assert cluster.api.lines().count(LIST) == 1
    assert sum("watch=true" in line for line in cluster.api.lines()) == 2
    await store.aclose()


async def test_a_slow_stream_is_followed(cluster: Cluster) -> None:
    store = cluster.store()
    async with watching(store) as watcher:
        cluster.api.faults.bytes_per_s = 5000
        await asyncio.to_thread(cluster.admin.add_node, "n3", "10.0.3.0/24", annotations(3))
        await watcher.until(lambda: "10.0.3.0-24" in watcher.leases)
    await store.aclose()


async def test_a_page_that_is_forgotten_begins_the_list_again(cluster: Cluster) -> None:
    def make(it: Any) -> None:
        for number in range(1200):
            it.add_node(f"n{number}", f"10.{number >> 8}.{number & 255}.0/24", annotations(number))

    cluster.put_right(make)
    store = cluster.store()
    assert len((await store.snapshot()).leases) == 1200
    n_requests = len(cluster.api.requests)
    listing = asyncio.create_task(store.snapshot())
    await holds(lambda: len(cluster.api.requests) > n_requests, "the first page")
    cluster.server.compact()
    assert len((await listing).leases) == 1200
    assert cluster.api.lines()[n_requests] == "GET /api/v1/nodes?limit=500"
    await store.aclose()


@pytest.mark.parametrize(
    ("token", "line"),
    [
        ("wrong", r"cannot read the node n1: the API server at https://.* answers 401 Unauthorized; is the token"),
        (POOR_TOKEN, r"answers 403 nodes is forbidden: User .*; the ClusterRole needs: nodes get, list and watch"),
    ],
)
async def test_who_may_not_is_told_what_is_missing_and_goes_on_trying(cluster: Cluster, token: str, line: str) -> None:
    write_kubeconfig(cluster.kubeconfig, cluster.server.url, token=token, ca=cluster.server.ca)
    store = cluster.store()
    with pytest.raises(StoreUnavailableError, match=line):
        await claim(store, host(1))
    await store.aclose()


async def test_a_token_that_is_replaced_in_its_file_is_read_again(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    file = cluster.directory / "token"
    file.write_text(TOKEN)
    write_kubeconfig(cluster.kubeconfig, cluster.server.url, token_file=file, ca=cluster.server.ca)
    store = cluster.store()
    lease = await claim(store, host(1))
    cluster.api.tokens["rotated"] = cluster.api.tokens.pop(TOKEN)
    file.write_text("rotated")
    assert await store.renew(lease) == lease
    await store.aclose()


async def test_a_server_that_throttles_is_asked_no_sooner_than_it_says(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    cluster.api.faults.answers.append((429, "1"))
    store = cluster.store()
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="answers 429 a fault of the lab"):
        await claim(store, host(1))
    assert time.monotonic() - began_s >= 1.0
    await store.aclose()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "cannot reach Kubernetes: the configuration .*kubeconfig is no use"),
        ("{", "cannot reach Kubernetes: the configuration .*kubeconfig is no use"),
        (None, "cannot reach Kubernetes: the configuration .*kubeconfig is no use: .* not found"),
    ],
)
async def test_a_kubeconfig_that_is_no_use_is_one_line(cluster: Cluster, text: str | None, line: str) -> None:
    if text is None:
        cluster.kubeconfig.unlink()
    else:
        cluster.kubeconfig.write_text(text)
    store = cluster.store()
    with pytest.raises(ConfigError, match=line) as caught:
        await claim(store, host(1))
    assert "\n" not in str(caught.value)
    await store.aclose()


async def test_a_server_that_is_away_or_is_another_one_is_one_line(cluster: Cluster) -> None:
    store = cluster.store()
    cluster.api.stop()
    with pytest.raises(
        StoreUnavailableError, match=r"cannot read the node n1: the API server at https://127.* does not"
    ):
        await claim(store, host(1))
    await store.aclose()


# --- with membership


def member(cluster: Cluster, number: int) -> Member:
    return Member(cluster.store(f"n{number}"), cluster.directory, number, Clock())


async def test_members_find_each_other_survive_an_outage_and_a_deleted_node(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="udptun")
    for number in (1, 2, 3):
        cluster.put_right(lambda it, number=number: it.add_node(f"n{number}", f"10.0.{number}.0/24"))  # type: ignore[misc]
    members = [member(cluster, number) for number in (1, 2, 3)]
    for each in members:
        await each.start()
    await holds(lambda: all(len(each.peers) == 2 for each in members), "two peers each")
    await asyncio.to_thread(cluster.api.stop)
    await holds(lambda: members[0].membership.problems, "the outage to be said")
    await asyncio.to_thread(cluster.api.start)
    await asyncio.to_thread(cluster.admin.delete, "n3")
    await asyncio.to_thread(cluster.admin.add_node, "n3", "10.0.3.0/24")
    await holds(lambda: all(len(each.peers) == 2 for each in members[:2]), "two peers each again")
    await holds(lambda: not any(each.membership.problems for each in members), "all to be well")
    assert not members[2].membership._own.given_instead.is_set()
    assert [each.running is not None and not each.running.done() for each in members] == [True] * 3
    # Deleted and made again with another podCIDR: the daemon has to begin again.
    await asyncio.to_thread(cluster.admin.delete, "n3")
    await asyncio.to_thread(cluster.admin.add_node, "n3", "10.0.33.0/24")
    async with asyncio.timeout(20):
        await members[2].membership.given_instead()
    for each in members:
        await each.die()
    assert not any("Traceback" in record.getMessage() or record.exc_info for record in caplog.records)


@pytest.mark.parametrize("is_later", [False, True], ids=["at the start", "with the table of the last run"])
async def test_a_daemon_that_knows_its_pod_alone_begins_again_when_its_node_gets_another_pod_cidr(
    cluster: Cluster, is_later: bool
) -> None:
    """While the API server is away nobody knows the node's name.  It was never learnt then, and the move not seen."""
    from udptun.config.flags import parse_daemon_flags
    from udptun.stores.kube.store import KubeStore

    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    cluster.put_right(lambda it: it.add_pod("kube-flannel", "flannel-x", "n1"))
    argv = ["--kube-subnet-mgr", f"--kubeconfig-file={cluster.kubeconfig}"]
    options = parse_daemon_flags(argv, {"POD_NAME": "flannel-x", "POD_NAMESPACE": "kube-flannel"}).kube

    def begin() -> Member:
        return Member(KubeStore(options, cluster.net_conf), cluster.directory, 1, Clock())

    if is_later:
        before = begin()
        await before.start()
        await holds(lambda: (cluster.directory / "1/last-leases.json").exists(), "the saved table")
        await before.die()
        await asyncio.to_thread(cluster.api.stop)
    one = begin()
    await one.start()
    if is_later:
        await asyncio.to_thread(cluster.api.start)
    await holds(lambda: cluster.api.n_watches() == 1, "the watch")
    await asyncio.to_thread(cluster.admin.delete, "n1")
    await asyncio.to_thread(cluster.admin.add_node, "n1", "10.0.33.0/24")
    async with asyncio.timeout(20):
        await one.membership.given_instead()
    await one.die()


async def test_a_node_with_our_own_address_is_no_peer_and_is_named(cluster: Cluster) -> None:
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24"))
    other = {**annotations(2), f"{PREFIX}public-ip": "192.0.2.1"}
    cluster.put_right(lambda it: it.add_node("n2", "10.0.2.0/24", other))
    one = member(cluster, 1)
    await one.start()
    await holds(lambda: one.membership.problems, "the problem")
    assert one.membership.skipped == ("10.0.2.0-24: the node n2 publishes our own PublicIP 192.0.2.1",)
    assert "the nodes n1 and n2 publish one PublicIP 192.0.2.1" in one.membership.problems[0]
    assert one.peers == set()
    await one.die()


async def test_a_member_whose_address_is_overwritten_is_content_with_what_the_server_has(cluster: Cluster) -> None:
    """What we ask for and what the store has differ for good then: that is no move, and nothing to write again."""
    overwrite = {f"{PREFIX}public-ip-overwrite": "203.0.113.1"}
    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24", overwrite))
    one = member(cluster, 1)
    await one.start()
    await holds(lambda: cluster.api.n_watches() == 1, "the watch")
    assert one.membership.own.attrs.public_ip == IPv4Address("203.0.113.1")
    n_requests = len(cluster.api.requests)
    await asyncio.to_thread(cluster.admin.annotate, "n1", {f"{PREFIX}public-ip-overwrite": "203.0.113.2"})
    await holds(lambda: one.membership.own.attrs.public_ip == IPv4Address("203.0.113.2"), "the new address")
    await asyncio.sleep(0.3)
    # The operator's patch and ours, and a look by membership before it takes the lease again.
    assert len(cluster.api.requests) - n_requests <= 5
    assert one.membership.problems == one.membership.skipped == ()
    await one.die()


def test_lease_commands_need_no_node(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    from udptun.commands import lease as lease_command
    from udptun.config.command_flags import parse_lease_flags

    cluster.put_right(lambda it: it.add_node("n1", "10.0.1.0/24", annotations(1)))
    flags = ["--store=kube", f"--kubeconfig-file={cluster.kubeconfig}", f"--net-config-path={cluster.net_conf}"]
    assert lease_command.list_leases(parse_lease_flags(flags, {}, 0)) == 0
    assert re.search(r"10\.0\.1\.0/24 +198\.18\.0\.1 .* 8285 +never", capsys.readouterr().out)
    with pytest.raises(LeaseError, match=f"kubectl annotate node n1 {PREFIX}kube-subnet-manager-"):
        lease_command.release(parse_lease_flags([*flags, "10.0.1.0/24"], {}, 1))

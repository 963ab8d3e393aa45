"""Hosts whose leases are nodes of Kubernetes: the lab's API server stands at the underlay's switch.

API server 192.168.77.1:6443 (switch) -- underlay -- h1, h2, h3
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import yaml
from etcd_server import Authority
from kube_server import DAEMONS_TOKEN, MISSING, Client, Real, write_kubeconfig
from traffic import (
    REAL_TIME,
    datapath_pids,
    kill,
    listener_at,
    peers,
    ping,
    read_status,
    seconds_until,
    tcp_flow,
    udp_flow,
)

from bench import bulk_nodes
from bench.measure import bytes_alone
from bench.paths import daemon_and_datapath
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.topology import KUBE_PORT, NET_CONF, Lab

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]

UDPTUN = (sys.executable, "-m", "udptun")
PREFIX = "flannel.alpha.coreos.com/"
SOON_S = 20.0


@contextlib.contextmanager
def kube_lab(name: str, backend: Mapping[str, object], n_pods: int = 1) -> Iterator[tuple[Lab, Any]]:
    """Three hosts without running daemons, each a node with a podCIDR, and the API server."""
    from udptun.lab.kube_api.server import ApiServer

    command = [
        *(*REAL_TIME, sys.executable, "-m", "udptun", "daemon", "--kube-subnet-mgr"),
        *(f"--kube-api-url=http://{UNDERLAY[1]}:{KUBE_PORT}", "--net-config-path", str(NET_CONF)),
    ]
    conf = {"Network": "10.244.0.0/16", "Backend": backend}
    with Lab(name, n_hosts=3, n_pods=n_pods, net_conf=conf, daemon_command=command) as lab:
        with ApiServer(listen=lambda: listener_at(lab)) as api:
            for host in lab.hosts:
                api.do(lambda it, host=host: it.add_node(host.name, f"10.244.{host.index}.0/24"))
            yield lab, api
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def node(api: Any, host: Host) -> dict[str, Any]:
    value: dict[str, Any] = api.do(lambda it: it.nodes.get(host.name).value)
    return value


def wait_for_equal_tables(lab: Lab, subnets: Mapping[str, str]) -> None:
    """Every host has the others' subnets, by the hosts' names."""
    wait_for_equal_tables_of(lab.hosts, subnets)


def wait_for_equal_tables_of(hosts: Sequence[Host], subnets: Mapping[str, str]) -> None:
    for host in hosts:
        wanted = {subnet for name, subnet in subnets.items() if name != host.name}
        seconds_until(lambda host=host, wanted=wanted: set(peers(host)) == wanted, f"{host}'s table", SOON_S)  # type: ignore[misc]


SUBNETS = {f"h{number}": f"10.244.{number}.0/24" for number in (1, 2, 3)}


@pytest.mark.parametrize("kind", ["udp", "vxlan"])
def test_pods_of_three_nodes_reach_each_other_and_the_nodes_say_what_flannels_do(kind: str) -> None:
    with kube_lab(f"t-kube-{kind}", {"Type": kind}) as (lab, api):
        # A person says at which of its addresses the third host is reached.
        addresses = {host.name: str(host.underlay_address) for host in lab.hosts} | {"h3": "192.168.77.213"}
        lab.host(3).run(["ip", "addr", "add", f"{addresses['h3']}/{UNDERLAY.prefixlen}", "dev", "eth0"])
        wanted = {"metadata": {"annotations": {f"{PREFIX}node-public-ip": addresses["h3"]}}}
        api.do(lambda it: it.nodes.patch("h3", "application/merge-patch+json", wanted, is_status=False))
        lab.start()
        wait_for_equal_tables(lab, SUBNETS)
        for source in lab.hosts:
            for destination in lab.hosts:
                ping(source.pod(1), destination.pod(1).address)
        for host in lab.hosts:
            status = read_status(host)
            assert (status["store"], status["problems"], status["skipped"]) == ("kube", [], [])
            assert str(host.subnet) == SUBNETS[host.name]
            value = node(api, host)
            texts = value["metadata"]["annotations"]
            assert (texts[f"{PREFIX}kube-subnet-manager"], texts[f"{PREFIX}backend-type"]) == ("true", kind)
            assert texts[f"{PREFIX}public-ip"] == status["lease"]["public_ip"] == addresses[host.name]
            data = json.loads(texts[f"{PREFIX}backend-data"])
            assert data["NodeID"] == status["lease"]["node_id"]
            assert data["Port"] == 8285 if kind == "udp" else data["VNI"] == 1
            conditions = {it["type"]: it for it in value["status"]["conditions"]}
            assert (conditions["NetworkUnavailable"]["status"], conditions["Ready"]["status"]) == ("False", "True")
            first = texts[f"{PREFIX}backend-data"].replace(',"Shortcut":true', "")
            assert written_by(api, host) == captured(addresses[host.name], kind, first)
        host = lab.host(1)
        # Somebody takes an annotation away: it alone is written again.
        gone = {"metadata": {"annotations": {f"{PREFIX}kube-subnet-manager": None}}}
        api.do(lambda it: it.nodes.patch(host.name, "application/merge-patch+json", gone, is_status=False))
        again = '{"metadata":{"annotations":{"flannel.alpha.coreos.com/kube-subnet-manager":"true"}}}'
        seconds_until(lambda: written_by(api, host)[2:] == [again], "the annotation", SOON_S)
        wait_for_equal_tables(lab, SUBNETS)
        # A start writes nothing that is there, and an end, even for good, takes nothing away.
        host.stop_daemon()
        host.start_daemon()
        host.wait_ready(20)
        host.stop_daemon()
        host.run([*UDPTUN, "cleanup", "--release", *host.lab.daemon_command[-4:]])
        assert written_by(api, host)[3:] == []
        kinds = {re.sub(r"=[^&]*", "", line) for line in api.lines() if line.startswith("GET")}
        assert kinds == {
            "GET /api/v1/nodes?fieldSelector",
            "GET /api/v1/nodes?limit&resourceVersion",
            "GET /api/v1/nodes?allowWatchBookmarks&resourceVersion&timeout&timeoutSeconds&watch",
        }


OF_A_SHORTCUT = {f"{PREFIX}backend-data"}


def written_by(api: Any, host: Host) -> list[str]:
    """The bodies of the host's patches, with N in the place of times.

    Without those that a shortcut adds: it is on a moment after the start, and its lease says so by a patch of its own.
    """
    bodies = [it.body.decode() for it in list(api.requests) if it.line == f"PATCH /api/v1/nodes/{host.name}/status"]
    bodies = [it for it in bodies if json.loads(it).get("metadata", {}).get("annotations", {}).keys() != OF_A_SHORTCUT]
    return [re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "N", body) for body in bodies]


def captured(public_ip: str, kind: str, backend_data: str) -> list[str]:
    """What real flanneld v0.20 sent, with our backend-type and backend-data."""
    return [
        f'{{"metadata":{{"annotations":{{"flannel.alpha.coreos.com/backend-data":{json.dumps(backend_data)},'
        f'"flannel.alpha.coreos.com/backend-type":"{kind}","flannel.alpha.coreos.com/kube-subnet-manager":"true",'
        f'"flannel.alpha.coreos.com/public-ip":"{public_ip}"}}}}}}',
        '{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"N",'
        '"lastTransitionTime":"N","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}',
    ]


def check_remedy_is_said(host: Host, api: Any) -> None:
    """To whoever asks the daemon, a pod that cannot start, or Kubernetes; the daemon that waits for its podCIDR."""
    remedy = (
        f"node {host.name}: it has no podCIDR; the controller manager gives each node one when it runs with "
        "--allocate-node-cidrs=true and --cluster-cidr (kubeadm: --pod-network-cidr=<Network>), or give one by hand: "
        f'kubectl patch node {host.name} -p "spec: {{podCIDR: <subnet>}}"'
    )
    asked = host.run([*UDPTUN, "status"], check=False)
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr.startswith("udptun: error: the daemon is not ready yet: waits for its lease in kube: ")
    assert remedy in asked.stderr
    assert remedy in host.daemon_log()
    assert remedy in json.loads(host.path("/run/flannel/subnet.env.status").read_text())["reason"]
    condition = next(it for it in node(api, host)["status"]["conditions"] if it["type"] == "NetworkUnavailable")
    assert (condition["status"], condition["reason"], condition["message"]) == ("True", "NoPodCIDR", remedy)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Lab, Any]]:
    """Three hosts with a pod each, Type udp; h3 gets its podCIDR late."""
    with kube_lab("t-kube", {"Type": "udp"}) as (lab, api):
        late = lab.host(3)
        api.do(lambda it: it.nodes.delete(late.name))
        api.do(lambda it: it.add_node(late.name))
        for host in lab.hosts:
            host.start_daemon()
        for host in lab.hosts[:2]:
            host.wait_ready(20)
        seconds_until(lambda: "it has no podCIDR" in late.daemon_log(), "the remedy in the log", SOON_S)
        assert late.daemon is not None
        assert late.daemon.poll() is None
        check_remedy_is_said(late, api)
        spec = {"spec": {"podCIDR": SUBNETS[late.name], "podCIDRs": [SUBNETS[late.name]]}}
        kind = "application/merge-patch+json"
        api.do(lambda it: it.nodes.patch(late.name, kind, spec, is_status=False))
        late.wait_ready(20)
        for host in lab.hosts:
            host.add_pod()
        yield lab, api


def test_a_node_that_gets_its_pod_cidr_late_joins_by_itself(running: tuple[Lab, Any]) -> None:
    """flannel ends after 30 s, again and again, and its users have to find out why."""
    lab, api = running
    wait_for_equal_tables(lab, SUBNETS)
    ping(lab.host(1).pod(1), lab.host(3).pod(1).address)
    late = lab.host(3)
    assert len([line for line in late.daemon_log().splitlines() if "it has no podCIDR" in line]) == 1
    conditions = {it["type"]: it for it in node(api, late)["status"]["conditions"]}
    assert conditions["NetworkUnavailable"]["reason"] == "FlannelIsUp"


def test_pods_talk_on_while_the_api_is_away_and_after_a_restart_without_it(running: tuple[Lab, Any]) -> None:
    lab, api = running
    wait_for_equal_tables(lab, SUBNETS)
    one, two = lab.host(1), lab.host(2)
    api.stop()
    try:
        with udp_flow(one.pod(1), two.pod(1), 200) as flow, tcp_flow(two.pod(1), one.pod(1)) as stream:
            flow.wait_for_more(20)
        assert flow.report.lost == []
        stream.report.assert_exact()
        assert one.stop_daemon() == 0
        kill(one, *datapath_pids(one))
        one.start_daemon()
        one.wait_ready(20)
        ping(one.pod(1), two.pod(1).address)
        assert len(peers(one)) == 2
        assert any("does not answer" in line for line in read_status(one)["problems"])
    finally:
        api.start()
    for host in lab.hosts:
        seconds_until(lambda host=host: read_status(host)["problems"] == [], f"{host} to be well", SOON_S)  # type: ignore[misc]


def test_a_node_that_is_made_again_with_another_pod_cidr_begins_again_by_itself(running: tuple[Lab, Any]) -> None:
    """flannel goes on with the old subnet, and its peers keep the old route, until somebody restarts it."""
    lab, api = running
    wait_for_equal_tables(lab, SUBNETS)
    host = lab.host(3)
    assert host.daemon is not None
    pid = host.daemon.pid
    try:
        with udp_flow(lab.host(1).pod(1), lab.host(2).pod(1), 200) as flow:
            api.do(lambda it: it.nodes.delete(host.name))
            api.do(lambda it: it.add_node(host.name, "10.244.33.0/24"))
            wait_for_equal_tables(lab, {**SUBNETS, "h3": "10.244.33.0/24"})
            flow.wait_for_more(20)
        assert flow.report.lost == []
        seconds_until(lambda: str(host.subnet) == "10.244.33.0/24", "subnet.env", SOON_S)
        seconds_until(lambda: read_status(host)["problems"] == [], "the host to be well", SOON_S)
        assert (host.daemon.pid, host.daemon.poll()) == (pid, None)
        address = host.run(["ip", "-br", "-4", "addr", "show", "dev", "flannel0"]).stdout
        assert "10.244.33.0/32" in address
        assert "10.244.3.0/32" not in address
        pod = host.add_pod()
        host.machine.at().ip(f"addr add {host.gateway} dev cni0")
        ping(lab.host(1).pod(1), pod.address)
    finally:
        api.do(lambda it: it.nodes.delete(host.name))
        api.do(lambda it: it.add_node(host.name, SUBNETS["h3"]))
    wait_for_equal_tables(lab, SUBNETS)


def test_lab_with_the_kube_store_brings_an_api_server_of_its_own() -> None:
    with Lab("t-kube-own", n_hosts=2, store="kube") as lab:
        lab.start()
        ping(lab.host(1).pod(1), lab.host(2).pod(1).address)
        assert [str(host.subnet) for host in lab.hosts] == ["10.244.1.0/24", "10.244.2.0/24"]
        host = lab.add_host()
        host.start_daemon()
        host.wait_ready(20)
        assert str(host.subnet) == "10.244.3.0/24"


def test_a_daemon_in_a_pod_takes_its_service_account_and_weighs_little_with_a_thousand_nodes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Over TLS, with nodes of 10 kB.  Each page that the three processes have counts, whoever else has it."""
    from udptun.lab.kube_api.server import ApiServer

    authority = Authority(tmp_path / "tls")
    pair = authority.issue("apiserver", f"IP:{UNDERLAY[1]}")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.certificate, pair.key)
    network = IPv4Network("10.224.0.0/12")
    command = [
        *("env", f"KUBERNETES_SERVICE_HOST={UNDERLAY[1]}", f"KUBERNETES_SERVICE_PORT={KUBE_PORT}"),
        *(sys.executable, "-m", "udptun", "daemon", "--kube-subnet-mgr", "--net-config-path", str(NET_CONF)),
    ]
    conf = {"Network": str(network), "Backend": {"Type": "udp"}}
    with (
        Lab("t-kube-pod", n_hosts=1, net_conf=conf, daemon_command=command) as lab,
        ApiServer(listen=lambda: listener_at(lab), tls=tls, tokens={"the pod's": None}) as api,
    ):
        host = lab.host(1)
        # What kubelet mounts under /var/run.
        account = host.path("/run/secrets/kubernetes.io/serviceaccount")
        account.mkdir(parents=True)
        (account / "token").write_text("the pod's\n")
        (account / "namespace").write_text("kube-flannel")
        (account / "ca.crt").write_bytes(authority.certificate.read_bytes())

        def register(cluster: Any) -> None:
            cluster.add_node(host.name, "10.224.1.0/24")
            for node in bulk_nodes.nodes(network, 1000):
                cluster.nodes.create(node)

        api.do(register)
        host.start_daemon()
        host.wait_ready(5 * SOON_S)
        assert len(peers(host)) == 1000
        # It keeps the connection to the API server for a while, and OpenSSL's buffers with it.
        time.sleep(6)
        mib = bytes_alone([process.pid for process in daemon_and_datapath(host)]) / 2**20
        print(f"1,000 nodes: the daemon and both datapath processes weigh {mib:.1f} MiB")
        assert mib <= (50 if request.config.getoption("--full") else 60)
        assert " I httpx" not in host.daemon_log()


@contextlib.contextmanager
def relayed(lab: Lab, url: str) -> Iterator[None]:
    """Have what connects to the switch's port for the API server reach the server at `url`, which is of our own."""
    loop = asyncio.new_event_loop()
    port = int(url.rpartition(":")[2])

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(carry(reader, theirs[1]), carry(theirs[0], writer))

    async def end() -> None:
        server.close()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(connect, sock=listener_at(lab)), loop).result(10)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["udp", "vxlan"])
def test_pods_of_three_nodes_of_a_real_api_server_with_the_rights_of_our_manifest(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = request.config.getoption("--kube-apiserver")
    if program is None:
        pytest.skip("give kube-apiserver's program with --kube-apiserver PATH")
    manifest = Path(__file__).parents[2] / "deploy/kube-flannel.yml"
    role = next(it for it in yaml.safe_load_all(manifest.read_text()) if it["kind"] == "ClusterRole")
    with contextlib.ExitStack() as undo:
        server = Real(undo, tmp_path, program)
        server.let("daemon", role["rules"])
        admin = Client(server.url, ca=server.ca)
        kubeconfig = write_kubeconfig(
            tmp_path / "kubeconfig", f"https://{UNDERLAY[1]}:{KUBE_PORT}", token=DAEMONS_TOKEN, ca=server.ca
        )
        command = [*UDPTUN, "daemon", "--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}"]
        command += ["--net-config-path", str(NET_CONF)]
        conf = {"Network": "10.244.0.0/16", "Backend": {"Type": kind}}
        lab = undo.enter_context(Lab(f"t-kube-real-{kind}", n_hosts=3, net_conf=conf, daemon_command=command))
        undo.enter_context(relayed(lab, server.url))
        for host in lab.hosts:
            admin.add_node(host.name, SUBNETS[host.name])
        lab.start()
        one, two, three = lab.hosts
        wait_for_equal_tables(lab, SUBNETS)
        ping(one.pod(1), two.pod(1).address)
        for host in lab.hosts:
            condition = admin.condition(host.name, "NetworkUnavailable")
            assert condition is not None
            assert (condition["status"], condition["reason"]) == ("False", "FlannelIsUp")
        # Others set it, take an annotation away, delete the node and make it again.
        admin.set_condition(two.name, "NetworkUnavailable", "True")
        seconds_until(lambda: admin.condition(two.name, "NetworkUnavailable")["status"] == "False", "it", SOON_S)  # type: ignore[index]
        admin.annotate(two.name, {f"{PREFIX}kube-subnet-manager": None})
        wait_for_equal_tables(lab, SUBNETS)
        admin.delete(three.name)
        wait_for_equal_tables_of(lab.hosts[:2], {name: SUBNETS[name] for name in ("h1", "h2")})
        admin.add_node(three.name, SUBNETS[three.name])
        wait_for_equal_tables(lab, SUBNETS)
        # A new server knows nothing of what was before.
        with udp_flow(one.pod(1), two.pod(1), 200) as flow:
            server.lose_history()
            texts = admin.get("/api/v1/nodes/h3")["metadata"]["annotations"]
            data = json.loads(texts[f"{PREFIX}backend-data"]) | {"NodeID": "f" * 32}
            data |= {"VtepMAC": "8e:a1:ea:52:d6:a3"} if kind == "vxlan" else {}
            other = {f"{PREFIX}backend-data": json.dumps(data), f"{PREFIX}public-ip": "192.168.77.99"}
            admin.add_node("h4", "10.244.4.0/24", {**texts, **other})
            wait_for_equal_tables(lab, {**SUBNETS, "h4": "10.244.4.0/24"})
        assert flow.report.lost == []
        for host in lab.hosts:
            seconds_until(lambda host=host: read_status(host)["problems"] == [], f"{host} to be well", SOON_S)  # type: ignore[misc]
            assert "Traceback" not in host.daemon_log()

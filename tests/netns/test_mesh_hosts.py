"""`udptun mesh` among hosts: what they say of each other, who may ask, and that all that is shown agrees.

pod -- flannel0 -- eth0 of h1 -- switch -- eth0 of h2 and h3, likewise; h3 has no --mesh-port, and h4 is flannel's
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from faults import lease_of_type
from prometheus_client.parser import text_string_to_metric_families
from test_probes import parted
from traffic import in_network_of, read_status, socket_in, tunnel_address, wait_for_peers

from udptun.commands import status
from udptun.commands.mesh import command
from udptun.commands.mesh.matrix import Mesh
from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, Lab

pytestmark = pytest.mark.netns

PORT = 8286
FLAG = f"--mesh-port={PORT}"
ABSENT = "10.244.200.0/24"
"""The subnet of a lease that flannel wrote, of a host that is not there."""


def mesh(host: Host, *words: str) -> tuple[int, Any]:
    """Exit status and document of `udptun mesh --json`."""
    ended = host.run([sys.executable, "-m", "udptun", "mesh", "--json", *words], check=False)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def gathered(host: Host) -> Mesh:
    """The same in this process, which takes a few milliseconds."""
    return in_network_of(host, lambda: command.gather(host.path("/run/udptun"), [], None, 10))


def ways(document: Any) -> dict[tuple[int, int], Any]:
    return {(way["from"], way["to"]): way for way in document["ways"]}


def numbers(document: Any, *hosts: Host) -> list[int]:
    by_subnet = {host["subnet"]: host["number"] for host in document["hosts"]}
    return [by_subnet[str(host.subnet)] for host in hosts]


def ask(place: Host | Pod, to: object, request: bytes = b"GET /mesh HTTP/1.1\r\n\r\n", source: str = "") -> bytes:
    """All that comes back; an error's name where no connection is made."""
    with socket_in(place, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        try:
            if source:
                connection.bind((source, 0))
            connection.connect((str(to), PORT))
        except OSError as exc:
            return type(exc).__name__.encode()
        try:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:
            return b""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"m{os.getpid()}", n_hosts=3) as lab:
        lab.daemon_command.append(FLAG)
        lab.start()
        third = lab.host(3)
        third.stop_daemon()
        third.start_daemon(["--mesh-port=0"])
        third.wait_ready()
        wait_for_peers(lab)
        wait_until("all hosts to know all", lambda: is_known(lab), 60)
        yield lab
        assert all("Traceback" not in host.daemon_log() for host in lab.hosts)


def is_known(lab: Lab) -> bool:
    """After traffic between all pods: whoever has some is looked at closely, if it lasts until the next look."""
    for host, other in combinations(lab.hosts, 2):
        host.pod(1).run(["ping", "-q", "-c", "60", "-i", "0.002", str(other.pod(1).address)])
    return all(is_measured(host) for host in lab.hosts)


def is_measured(host: Host) -> bool:
    # A host whose peers probe it need not send a probe itself.
    return all(peer["path_mtu"] and peer["rtt_ms"] is not None for peer in read_status(host)["peers"])


def liveness(host: Host, of: Host) -> str:
    (found,) = [peer for peer in read_status(host)["peers"] if peer["subnet"] == str(of.subnet)]
    return str(found["liveness"])


def test_all_ways_are_alive_and_a_host_without_a_port_is_seen_from_the_others_side(lab: Lab) -> None:
    exit_status, document = mesh(lab.host(1))
    one, two, three = numbers(document, *lab.hosts)
    found = ways(document)
    assert {pair: way["state"] for pair, way in found.items()} == {
        (start, end): "alive" for start in (one, two) for end in (one, two, three) if start != end
    }
    assert exit_status == 0
    assert document["problems"] == []
    assert all(way["path_mtu"] == way["mtu"] == 1472 for way in found.values())
    (silent,) = [host for host in document["hosts"] if host["view"] is None]
    assert silent["number"] == three
    assert silent["reason"] == f"port {PORT} is closed there: no --mesh-port, or an earlier version"
    text = lab.host(1).run([sys.executable, "-m", "udptun", "mesh"]).stdout
    assert text.startswith("mesh       no problem known, 4 ways are alive; 1 view is missing\n")


def test_mesh_status_metrics_and_the_datapath_agree(lab: Lab) -> None:
    first, second = lab.host(1), lab.host(2)
    for _ in range(50):
        before = [read_status(it) for it in (first, second)]
        it = gathered(first)
        metrics = status.fetch(first.path("/run/udptun"), "/metrics")
        after = [read_status(it) for it in (first, second)]
        # Otherwise an answer to a probe has come meanwhile, as it does each second.
        if [known(it) for it in before] == [known(it) for it in after]:
            break
    by_subnet = {str(host.subnet): host for host in it.hosts}
    for said in after:
        assert len(said["peers"]) == 2
        for peer in said["peers"]:
            way = it.way(by_subnet[said["lease"]["subnet"]], by_subnet[peer["subnet"]])
            assert way is not None
            assert way.state == way.found.liveness == peer["liveness"] == "alive"
            found = (way.found.rtt_ms, way.found.path_mtu, way.found.probes_sent, way.found.probes_lost)
            assert found == tuple(peer[key] for key in ("rtt_ms", "path_mtu", "probes_sent", "probes_lost"))
            # What is alive was heard through the tunnel.
            assert peer["decap_packets"] > 0
    series = {
        (it.name, it.labels.get("peer") or it.labels.get("liveness")): it.value
        for family in text_string_to_metric_families(metrics)
        for it in family.samples
    }
    for peer in after[0]["peers"]:
        assert series["udptun_peer_rtt_seconds", peer["subnet"]] == pytest.approx(peer["rtt_ms"] / 1000)
        assert series["udptun_peer_path_mtu_bytes", peer["subnet"]] == peer["path_mtu"]
    assert series["udptun_peers", "alive"] == sum(peer["liveness"] == "alive" for peer in after[0]["peers"])
    # Every probe that was answered was handed over by a worker.
    counters = after[0]["counters"]
    answered = sum(peer["probes_sent"] - peer["probes_lost"] for peer in after[0]["peers"])
    assert answered <= counters["decap_punted"] <= counters["inject_sent"]


def known(document: Any) -> list[tuple[object, ...]]:
    keys = ("subnet", "liveness", "rtt_ms", "path_mtu", "probes_sent", "probes_lost")
    return [tuple(peer[key] for key in keys) for peer in document["peers"]]


def test_only_hosts_of_peers_can_ask_and_read_one_path(lab: Lab) -> None:
    first, second, third = lab.hosts
    there = tunnel_address(second)
    head, _, body = ask(first, there).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    document = json.loads(body)
    assert document["subnet"] == str(second.subnet)
    assert {peer["subnet"] for peer in document["peers"]} == {str(first.subnet), str(third.subnet)}
    assert ask(first, there, b"GET /status HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert ask(first, there, b"POST /take-over HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    # Pods here and there, and the host itself.
    for place in (first.pod(1), second.pod(1), second):
        assert ask(place, there) == b""
    # From outside the tunnel, even with a route; and at no other address.
    assert ask(first, second.underlay_address) == b"ConnectionRefusedError"
    assert ask(first, second.gateway.ip) == b"ConnectionRefusedError"
    first.machine.at().ip(f"route add {there} via {second.underlay_address}")
    try:
        assert ask(first, there, source=str(first.underlay_address)) == b""
    finally:
        first.machine.at().ip(f"route del {there} via {second.underlay_address}")


def test_a_lease_of_flannel_is_seen_from_our_side_alone(lab: Lab) -> None:
    first = lab.host(1)
    lease_of_type("")(first)
    subnets = [peer["subnet"] for peer in read_status(first)["peers"]]
    wait_until("the lease", lambda: ABSENT in [peer["subnet"] for peer in read_status(first)["peers"]], 20)
    try:
        _, document = mesh(first)
        (absent,) = [host for host in document["hosts"] if host["subnet"] == ABSENT]
        assert (absent["udptun"], absent["reason"]) == (False, "flannel, which has no view to give")
        assert ways(document)[numbers(document, first)[0], absent["number"]]["state"] == "unknown"
        # Named hosts alone.
        _, of_two = mesh(first, str(lab.host(2).pod(1).address))
        assert [host["subnet"] for host in of_two["hosts"]] == sorted(
            map(str, (first.subnet, lab.host(2).subnet)), key=lambda text: int(text.split(".")[2])
        )
    finally:
        sql = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(sys.argv[2]); db.commit()"
        delete = f"delete from leases where key = '{ABSENT.replace('/', '-')}'"
        first.run([sys.executable, "-c", sql, str(LEASES), delete])
        wait_until("it to be gone", lambda: len(read_status(first)["peers"]) == len(subnets), 20)


def test_a_host_that_is_cut_off_one_way_is_named_with_the_direction(lab: Lab, slack: int) -> None:
    """Nothing that h1 sends reaches h2, while h1 gets what h2 sends."""
    first, second, third = lab.hosts
    with parted(second, which=f"ip saddr {first.underlay_address}"):
        # Packets that are not answered have h2 look closer.
        second.pod(1).run(["ping", "-c", "5", "-i", "0.1", "-W", "1", str(first.pod(1).address)], check=False)
        wait_until("h2 to miss h1", lambda: liveness(second, first) == "dead", 5 * slack)
        exit_status, document = mesh(third, f"--port={PORT}")
        one, two, _ = numbers(document, *lab.hosts)
        assert exit_status == 1
        assert [(it["kind"], it["hosts"]) for it in document["problems"]] == [("one_way", [two, one])]
        assert document["problems"][0]["text"].endswith("what the latter sends to the former is lost")
        assert ways(document)[one, two]["state"] == "alive"
        # Between the two themselves nothing can be asked.
        exit_status, document = mesh(second)
        assert exit_status == 1
        assert [(it["kind"], it["hosts"]) for it in document["problems"]] == [("host_dead", [one])]
        (unheard,) = [it for it in document["hosts"] if it["number"] == one]
        assert unheard["reason"] == "it cannot be reached from here (EHOSTUNREACH)"
    wait_until("h2 to hear h1", lambda: liveness(second, first) == "alive", 5 * slack)


def test_a_device_that_was_deleted_takes_nothing_with_it(lab: Lab) -> None:
    """The socket is bound to the address, which comes back with the device."""
    first, second, _ = lab.hosts
    second.run(["ip", "link", "delete", "flannel0"])
    wait_until("flannel0", lambda: second.path("/sys/class/net/flannel0").exists(), 10)
    wait_until("an answer", lambda: ask(first, tunnel_address(second)).startswith(b"HTTP/1.1 200 "), 20)


VXLAN = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "vxlan"}}
WITHOUT_IPV4 = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "udp"}}


def let_ping(*hosts: Host) -> None:
    for host in hosts:
        host.run(["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("net_conf", "addresses"),
    [
        pytest.param(VXLAN, 2, id="vxlan"),
        pytest.param({**VXLAN, "Backend": {"Type": "vxlan", "Userspace": True}}, 2, id="vtep"),
        pytest.param(WITHOUT_IPV4, 1, id="ipv6 alone"),
    ],
)
def test_hosts_are_asked_whatever_carries_their_packets(net_conf: dict[str, Any], addresses: int) -> None:
    """At each tunnel address, also after the devices were deleted."""
    with Lab(f"n{os.getpid()}", net_conf=net_conf, ipv6=True) as lab:
        lab.daemon_command.append(FLAG)
        # The kernel's default has nobody probe where it carries the packets.
        let_ping(*lab.hosts)
        lab.start()
        first, second = lab.hosts
        wait_for_peers(lab)
        listening = second.run(["ss", "-Hltn", "sport", "=", f":{PORT}"]).stdout.splitlines()
        assert len(listening) == addresses

        def is_well() -> bool:
            exit_status, document = mesh(first)
            states = [way["state"] for way in document["ways"]]
            return exit_status == 0 and states == ["alive", "alive"]

        wait_until("both to be alive", is_well, 30)
        for name in sorted(it.name for it in second.path("/sys/class/net").iterdir() if it.name.startswith("flannel")):
            second.run(["ip", "link", "delete", name], check=False)
        wait_until("the same again", is_well, 30)


@pytest.mark.full
def test_host_gw_shows_each_host_its_own_view_alone_and_says_so() -> None:
    with Lab(f"o{os.getpid()}", net_conf={"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}}) as lab:
        lab.daemon_command.append(FLAG)
        lab.start()
        wait_for_peers(lab)
        first = lab.host(1)
        assert (
            "--mesh-port has no effect: with Backend.Type host-gw this host has no tunnel address" in first.daemon_log()
        )
        assert read_status(first)["problems"] == []
        _, document = mesh(first)
        assert [host["reason"] for host in document["hosts"] if not host["self"]] == [
            "with Backend.Type host-gw hosts have no tunnel address to be asked at"
        ]

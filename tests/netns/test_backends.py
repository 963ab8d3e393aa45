"""Every backend between hosts, and the one mechanism that repairs them all.

    pod h1/p1 -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod h2/p1
                                      |  `---- eth0 [h3] ...; for DirectRouting h3 is behind a router

What the kernel has is read with `ip -j` and `bridge -j` and compared with flannel's own set-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from typing import Any

import pytest
from traffic import (
    CLEANUP,
    REAL_TIME,
    cpu_s,
    datapath_pids,
    peers,
    ping,
    read_status,
    read_trace,
    seconds_until,
    tcp_flow,
    wait_for_peers,
)

from udptun.core.trace_request import TraceRequest
from udptun.kernel.veth import pair_names
from udptun.lab.errors import LabError
from udptun.lab.host import DISTANT, SUBNET_ENV, UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

NETWORK = "10.244.0.0/16"
PROTOCOL = "158"
LEASABLE = [str(prefix) for prefix in summarize_address_range(IPv4Address("10.244.1.0"), IPv4Address("10.244.255.255"))]
"""What hosts lease by default of NETWORK: the first subnet is left out."""

BACKENDS: Mapping[str, Mapping[str, object]] = {
    "udp": {"Type": "udp"},
    "vxlan": {"Type": "vxlan"},
    "vtep": {"Type": "vxlan", "Userspace": True},
    "host-gw": {"Type": "host-gw"},
    "alloc": {"Type": "alloc"},
}
CARRYING = [name for name in BACKENDS if name != "alloc"]
DEVICES = {"udp": "flannel0", "vxlan": "flannel.1", "vtep": "flannel.1"}
USERSPACE = ("udp", "vtep")
TUNNELS = (*USERSPACE, "vxlan")
OVERHEADS = {"udp": 28, "vxlan": 50, "vtep": 50, "host-gw": 0, "alloc": 0}


def net_conf(backend: Mapping[str, object], **keys: object) -> dict[str, object]:
    return {"Network": NETWORK, "Backend": dict(backend), **keys}


@pytest.fixture(scope="module", params=CARRYING)
def named_lab(request: pytest.FixtureRequest) -> Iterator[tuple[str, Lab]]:
    """Three hosts for each backend, each with a pod; shared by the tests of the module."""
    name = request.param
    with Lab(f"b{os.getpid()}{name[:2]}", n_hosts=3, net_conf=net_conf(BACKENDS[name])) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        wait_for_peers(lab)
        for source in lab.hosts:
            for destination in lab.hosts:
                if source is not destination:
                    wait_for_answer(source.pod(1), destination.pod(1))
        yield name, lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def lab_of(n_hosts: int, backend: Mapping[str, object]) -> Lab:
    return Lab(f"c{os.getpid()}", n_hosts=n_hosts, net_conf=net_conf(backend))


def wait_for_answer(source: Pod, destination: Pod) -> None:
    """Both ways are up: a peer that is known is not yet one that the kernel was told of."""
    command = ["ping", "-c", "1", "-W", "1", "-s", "1000", str(destination.address)]
    wait_until(f"{destination} to answer", lambda: source.run(command, check=False).returncode == 0, 10)


def guard(prefix: str) -> dict[str, Any]:
    return {"type": "unreachable", "dst": prefix, "metric": 4294967295, "flags": []}


def show(host: Host, *command: str) -> list[dict[str, Any]]:
    """What `ip -j -d` or `bridge -j` says in the host; nothing about a device that is not there."""
    argv = [command[0], "-j", *(["-d"] if command[0] == "ip" else []), *command[1:]]
    result = host.run(argv, check=False)
    return [entry for entry in json.loads(result.stdout or "[]") if entry] if result.returncode == 0 else []


def own_routes(host: Host) -> list[dict[str, Any]]:
    routes = show(host, "ip", "-4", "route", "show", "proto", PROTOCOL)
    for route in routes:
        route.pop("scope", None)
    return sorted(routes, key=lambda route: (route["dst"], route.get("metric", 0)))


def neighbours(host: Host, device: str) -> dict[str, tuple[str | None, list[str]]]:
    return {n["dst"]: (n.get("lladdr"), n["state"]) for n in show(host, "ip", "-4", "neigh", "show", "dev", device)}


def fdb(host: Host, device: str) -> set[tuple[str, str, str]]:
    entries = show(host, "bridge", "fdb", "show", "dev", device)
    return {(e["mac"], e["dst"], e["state"]) for e in entries if "dst" in e}


def kernel_state(host: Host, name: str) -> dict[str, Any]:
    """All that the daemon looks after, without what changes from device to device."""
    state: dict[str, Any] = {"routes": own_routes(host), "rules": host.run(["iptables", "-S"]).stdout}
    if device := DEVICES.get(name):
        links = show(host, "ip", "link", "show", device)
        addresses = show(host, "ip", "address", "show", "dev", device)
        state["link"] = [(link["mtu"], "UP" in link["flags"], link.get("address")) for link in links]
        state["vxlan"] = [link.get("linkinfo", {}).get("info_data", {}).get("local") for link in links]
        state["addresses"] = [(a["local"], a["prefixlen"]) for e in addresses for a in e.get("addr_info", [])]
        state["neighbours"], state["fdb"] = neighbours(host, device), fdb(host, device)
    return state


def mac(host: Host) -> str:
    return str(show(host, "ip", "link", "show", "flannel.1")[0]["address"])


def leases(host: Host) -> dict[str, Any]:
    """Key -> value of every lease in the lab's store."""
    script = (
        "import sqlite3, sys, json; db = sqlite3.connect(sys.argv[1]);"
        "rows = db.execute(sys.argv[2]) if db.execute('select 1 from sqlite_master').fetchone() else [];"
        "print(json.dumps(dict(rows)))"
    )
    text = host.run([sys.executable, "-c", script, str(LEASES), "select key, value from leases"]).stdout
    return {key: json.loads(value) for key, value in json.loads(text).items()}


def sql(host: Host, statement: str) -> None:
    script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(sys.argv[2]); db.commit()"
    host.run([sys.executable, "-c", script, str(LEASES), statement])


def write_conf(host: Host, conf: Mapping[str, object]) -> None:
    host.path(NET_CONF).write_text(json.dumps(conf))


def restart(host: Host, backend: Mapping[str, object], **keys: object) -> None:
    if host.daemon is not None and host.daemon.poll() is None:
        host.stop_daemon()
    write_conf(host, net_conf(backend, **keys))
    host.start_daemon()
    host.wait_ready()


# --- three hosts


def test_pods_of_all_hosts_reach_each_other(named_lab: tuple[str, Lab]) -> None:
    name, lab = named_lab
    for source in lab.hosts:
        for destination in lab.hosts:
            if source is not destination:
                # To the other pod, to the other host's pod bridge, and as large as it goes without fragments.
                ping(source.pod(1), destination.pod(1).address)
                ping(source, destination.pod(1).address)
                ping(source.pod(1), destination.pod(1).address, "-M", "do", "-s", str(source.mtu - 28))
    assert {host.mtu for host in lab.hosts} == {1500 - OVERHEADS[name]}


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_iperf3_gets_through(named_lab: tuple[str, Lab], kind: str) -> None:
    _, lab = named_lab
    source, destination = lab.host(1).pod(1), lab.host(2).pod(1)
    # Its socket holds a twentieth of a second.  An ordinary process may wait longer than that for a processor.
    with destination.popen([*REAL_TIME, "iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass
        # A stream of a second takes the processors from the tests beside it, and says no more than its first bytes.
        flags = ["-u", "-b", "20M", "-t", "1"] if kind == "udp" else ["-n", "20M"]
        text = source.run(["iperf3", "-c", str(destination.address), "-J", *flags]).stdout
        server.communicate(timeout=30)
    end = json.loads(text)["end"]
    print(name_rate(end))
    assert end["sum_received"]["bytes"] > 1_000_000
    if kind == "udp":
        assert end["sum"]["lost_packets"] == 0


def name_rate(end: Mapping[str, Any]) -> str:
    return f"{end['sum_received']['bits_per_second'] / 1e6:.0f} Mbit/s"


def test_a_transfer_is_exact_to_the_byte(named_lab: tuple[str, Lab]) -> None:
    _, lab = named_lab
    one, three = lab.host(1).pod(1), lab.host(3).pod(1)
    with tcp_flow(one, three, 2e7) as forth, tcp_flow(three, one, 2e7, port=5003) as back:
        ping(one, three.address, "-s", "1000", count=20)
    forth.report.assert_exact()
    back.report.assert_exact()


def test_the_kernel_has_what_flannel_would_have_set_up(named_lab: tuple[str, Lab]) -> None:
    name, lab = named_lab
    one, others = lab.host(1), lab.hosts[1:]
    device = DEVICES.get(name)
    if name in USERSPACE:
        prefixes = [NETWORK] if name == "udp" else LEASABLE
        wanted = [guard(prefix) for prefix in prefixes]
        # The host may have leased the first prefix, which is as long as a lease: the way to its own pods is not ours.
        led = [prefix for prefix in prefixes if prefix != str(one.subnet)]
        wanted += [{"type": "unicast", "dst": prefix, "dev": device, "flags": []} for prefix in led]
    elif name == "vxlan":
        wanted = [guard(prefix) for prefix in LEASABLE] + [
            {
                "type": "unicast",
                "dst": str(host.subnet),
                "gateway": str(host.subnet.network_address),
                "dev": device,
                "flags": ["onlink"],
            }
            for host in others
        ]
    else:
        wanted = [
            {
                "type": "unicast",
                "dst": str(host.subnet),
                "gateway": str(host.underlay_address),
                "dev": "eth0",
                "flags": [],
            }
            for host in others
        ]
    key = lambda route: (route["dst"], route.get("metric", 0))  # noqa: E731
    assert own_routes(one) == sorted(wanted, key=key)
    if device is not None:
        (addresses,) = show(one, "ip", "-4", "address", "show", "dev", device)
        assert [(a["local"], a["prefixlen"], a["scope"]) for a in addresses["addr_info"]] == [
            (str(one.subnet.network_address), 32, "global")
        ]


def test_trace_says_how_each_backend_carries_a_packet(named_lab: tuple[str, Lab]) -> None:
    name, lab = named_lab
    one, two = lab.host(1), lab.host(2)
    pod, their_pod, public_ip = str(one.pod(1).address), str(two.pod(1).address), str(two.underlay_address)
    out = read_trace(one, TraceRequest.from_words(pod, their_pod))
    back = read_trace(one, TraceRequest.from_words(their_pod, pod))
    counters = ("encap_sent", "decap_delivered") if name in USERSPACE else (None, None)
    assert [said["verdict"]["counter"] for said in (out, back)] == [*counters]
    assert [said["verdict"]["delivered"] for said in (out, back)] == [True, True]
    assert [said["direction"] for said in (out, back)] == ["outgoing", "arriving"]
    assert out["backend"] == ("udp" if name == "udp" else "host-gw" if name == "host-gw" else "vxlan")
    assert out["kernel"]["device"] == DEVICES.get(name, "eth0")
    assert back["kernel"]["device"] == "cni0"
    assert out["peer"]["public_ip"] == public_ip
    assert out["peer"]["subnet"] == str(two.subnet)
    if name in USERSPACE:
        outer = out["outer"]
        assert (outer["destination"], outer["bytes"], outer["device"]) == (public_ip, 84 + OVERHEADS[name], "eth0")
    if name == "vxlan":
        assert out["neighbour"] == {"ip": str(two.subnet.network_address), "mac": mac(two), "vtep": public_ip}
    else:
        assert out["neighbour"] is None
    # What nobody leases is refused by a route, or is in no row of the tunnel.
    nowhere = read_trace(one, TraceRequest.from_words(pod, "10.244.0.5"))["verdict"]
    assert (nowhere["delivered"], nowhere["counter"]) == (False, "encap_drop_no_route" if name == "udp" else None)


def test_packets_are_shown_live_where_they_pass_through_the_datapath(named_lab: tuple[str, Lab]) -> None:
    name, lab = named_lab
    one, pod, their_pod = lab.host(1), lab.host(1).pod(1), str(lab.host(2).pod(1).address)
    words = (str(pod.address), their_pod, "icmp", "--live", "2", "--json")
    asked = one.popen(
        [sys.executable, "-m", "udptun", "trace", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asked.stdout is not None
    if name not in USERSPACE:
        _, said = asked.communicate(timeout=20)
        assert asked.returncode == 1
        assert f"`tcpdump -ni {DEVICES.get(name, 'eth0')}` shows what the kernel carries" in said
        return
    assert json.loads(asked.stdout.readline())["devices"] == [DEVICES[name]]
    # With options, as the workers' alone pass where the kernel carries packets too.
    ping(pod, their_pod, "-R", count=1)
    out, _ = asked.communicate(timeout=20)
    assert asked.returncode == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [it.get("counter") for it in found] == ["encap_sent", "decap_delivered", None]


def test_the_vxlan_device_and_its_peers_are_flannels() -> None:
    """The contract's text, with keys other than the defaults."""
    backend = {"Type": "vxlan", "VNI": 7, "Port": 4789, "GBP": True, "MTU": 1400}
    with lab_of(2, backend) as lab:
        lab.start()
        wait_for_peers(lab)
        one, two = lab.hosts
        (link,) = show(one, "ip", "link", "show", "flannel.7")
        data = link["linkinfo"]["info_data"]
        assert link["linkinfo"]["info_kind"] == "vxlan"
        assert (data["id"], data["local"], data["link"], data["port"]) == (7, str(one.underlay_address), "eth0", 4789)
        assert (data["learning"], data["gbp"], link["mtu"]) == (False, True, 1350)
        first_octet = int(link["address"][:2], 16)
        assert first_octet & 3 == 2, "locally administered, unicast"
        assert one.subnet_env()["FLANNEL_MTU"] == "1350"

        (peer,) = show(two, "ip", "link", "show", "flannel.7")
        tunnel_address, vtep_mac = str(two.subnet.network_address), peer["address"]
        wait_until("the peer's neighbour", lambda: bool(neighbours(one, "flannel.7")), 10)
        assert neighbours(one, "flannel.7") == {tunnel_address: (vtep_mac, ["PERMANENT"])}
        assert fdb(one, "flannel.7") == {(vtep_mac, str(two.underlay_address), "permanent")}
        lease = next(value for value in leases(one).values() if value["PublicIP"] == str(two.underlay_address))
        assert lease["BackendType"] == "vxlan"
        assert list(lease["BackendData"])[:2] == ["VNI", "VtepMAC"]
        assert (lease["BackendData"]["VNI"], lease["BackendData"]["VtepMAC"]) == (7, vtep_mac)


# --- vxlan's device


def test_the_mac_outlives_restart_and_device_and_an_unfit_device_is_made_anew() -> None:
    with lab_of(2, BACKENDS["vxlan"]) as lab:
        one, two = lab.hosts
        one.machine.at().ip(
            f"link add flannel.1 type vxlan id 1 dev eth0 local {one.underlay_address} dstport 9999 nolearning",
            "link set flannel.1 up",
        )
        lab.start()
        wait_for_peers(lab)
        (link,) = show(one, "ip", "link", "show", "flannel.1")
        assert link["linkinfo"]["info_data"]["port"] == 8472
        before = link["address"]
        one.stop_daemon()
        one.machine.at().ip("link delete flannel.1")
        one.start_daemon()
        one.wait_ready()
        assert mac(one) == before
        wait_for_answer(one.pod(1), two.pod(1))


def test_a_device_of_flanneld_is_taken_over_with_all_that_is_on_it() -> None:
    """The device fits and stays; the peer that left while nobody ran goes; the routes become ours."""
    with lab_of(2, BACKENDS["vxlan"]) as lab:
        one, two = lab.hosts
        one.machine.at().ip(
            f"link add flannel.1 type vxlan id 1 dev eth0 local {one.underlay_address} dstport 8472 nolearning",
            "link set flannel.1 up",
            "neigh add 10.244.199.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
            "route add 10.244.199.0/24 via 10.244.199.0 dev flannel.1 onlink",
        )
        one.run(["bridge", "fdb", "add", "02:00:00:00:00:99", "dev", "flannel.1", "dst", "192.168.77.99"])
        (link,) = show(one, "ip", "link", "show", "flannel.1")
        lab.start()
        wait_for_peers(lab)
        (ours,) = show(one, "ip", "link", "show", "flannel.1")
        assert (ours["ifindex"], ours["address"]) == (link["ifindex"], link["address"]), "peers have the MAC"
        tunnel_address = str(two.subnet.network_address)
        wait_until("the present peer alone", lambda: list(neighbours(one, "flannel.1")) == [tunnel_address], 10)
        assert fdb(one, "flannel.1") == {(mac(two), str(two.underlay_address), "permanent")}
        assert show(one, "ip", "route", "show", "10.244.199.0/24") == []
        wait_for_answer(one.pod(1), two.pod(1))


def test_leases_of_other_backends_are_no_peers_of_vxlan() -> None:
    with lab_of(1, BACKENDS["vxlan"]) as lab:
        one = lab.host(1)
        lab.start()
        # Hosts lease one of the first hundred subnets.
        for number, kind in ((200, "host-gw"), (201, "")):
            value = {"PublicIP": f"192.168.77.{number}", "PublicIPv6": None, "BackendType": kind}
            add_lease(one, f"10.244.{number}.0-24", value)
        skipped = ["host-gw, not vxlan", "empty, not vxlan"]
        wait_until("the leases to be refused", lambda: len(read_status(one)["skipped"]) == 2, 10)
        assert read_status(one)["skipped"] == [
            f"10.244.{200 + n}.0-24: its BackendType is {text}" for n, text in enumerate(skipped)
        ]
        # The one without a type never expires: a reservation, whose host is still to come.
        other = {"subnet": "10.244.200.0/24", "public_ip": "192.168.77.200", "backend_type": "host-gw"}
        assert read_status(one)["other_types"] == [other]
        assert one.daemon_log().count("lease skipped ") == 1
        assert {route["dst"]: route for route in own_routes(one)} == {prefix: guard(prefix) for prefix in LEASABLE}


def add_lease(host: Host, key: str, value: Mapping[str, object]) -> None:
    sql(host, f"insert into leases (key, value) values ('{key}', '{json.dumps(value)}')")


# --- host-gw and alloc


def test_host_gw_refuses_to_work_behind_a_nat() -> None:
    with lab_of(1, BACKENDS["host-gw"]) as lab:
        one = lab.host(1)
        one.start_daemon(["--public-ip", "203.0.113.7", "--iface", "eth0"])
        with pytest.raises(LabError, match="ended with status 1"):
            one.wait_ready()
        assert "your PublicIP differs from interface IP, meaning that probably you're on a NAT" in one.daemon_log()
        assert leases(one) == {}


def test_routes_to_a_peer_that_left_while_we_were_down_go() -> None:
    with lab_of(3, BACKENDS["host-gw"]) as lab:
        lab.start()
        wait_for_peers(lab)
        one, two, three = lab.hosts
        gone = str(three.subnet)
        wait_until("both routes", lambda: len(own_routes(one)) == 2, 10)
        one.stop_daemon()
        three.stop_daemon()
        sql(one, f"delete from leases where key = '{gone.replace('/', '-')}'")
        assert gone in [route["dst"] for route in own_routes(one)]
        one.start_daemon()
        one.wait_ready()
        assert [route["dst"] for route in own_routes(one)] == [str(two.subnet)]


def test_a_peer_that_host_gw_cannot_reach_is_a_problem_of_its_own() -> None:
    """The kernel refuses a gateway that is on no link; every other peer is reached, and so would this one be later."""
    with lab_of(2, BACKENDS["host-gw"]) as lab:
        lab.relocate(lab.host(2), DISTANT)
        lab.start()
        wait_for_peers(lab)
        one, two = lab.hosts
        wait_until("the problem to be reported", lambda: bool(read_status(one)["problems"]), 10)
        (problem,) = read_status(one)["problems"]
        assert str(two.subnet) in problem
        assert "Nexthop has invalid gateway" in problem
        lab.relocate(two, UNDERLAY)
        wait_until("the route", lambda: [route["dst"] for route in own_routes(one)] == [str(two.subnet)], 10)
        wait_for_answer(one.pod(1), two.pod(1))
        wait_until("no problem", lambda: read_status(one)["problems"] == [], 10)


def test_alloc_takes_a_lease_and_nothing_else() -> None:
    with lab_of(1, BACKENDS["alloc"]) as lab:
        one = lab.host(1)
        lab.start()
        (value,) = leases(one).values()
        assert "BackendType" not in value
        assert one.subnet_env()["FLANNEL_MTU"] == "1500"
        assert own_routes(one) == []
        assert not [link for link in show(one, "ip", "link", "show") if "flannel" in link["ifname"]]
        assert read_status(one)["datapath"] is None
        assert datapath_pids(one) == set()


# --- direct routing


@pytest.mark.parametrize("name", ["vxlan", "vtep"])
def test_direct_routing_goes_straight_to_peers_on_the_link_and_follows_a_host_that_moves(name: str) -> None:
    """h1 and h2 on one subnet, h3 behind a router; then h2 joins h3.

    Through the userspace VTEP there is one route for all peers; only those that are reached directly have their own.
    """
    with lab_of(3, {**BACKENDS[name], "DirectRouting": True}) as lab:
        one, two, three = lab.hosts
        lab.relocate(three, DISTANT)
        one.run(["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])
        lab.start()
        wait_for_peers(lab)

        def ways(host: Host) -> dict[str, tuple[str, str]]:
            routes = [route for route in own_routes(host) if "gateway" in route]
            return {route["dst"]: (route["gateway"], route["dev"]) for route in routes}

        def direct(peer: Host) -> tuple[str, str]:
            return str(peer.underlay_address), "eth0"

        def tunnelled(peer: Host) -> tuple[str, str] | None:
            return (str(peer.subnet.network_address), "flannel.1") if name == "vxlan" else None

        def wait_for_ways(host: Host, **wanted: tuple[str, str] | None) -> None:
            peers = {"one": one, "two": two, "three": three}
            goal = {str(peers[peer].subnet): way for peer, way in wanted.items() if way is not None}
            wait_until(f"the routes of {host}", lambda: ways(host) == goal, 10)

        wait_for_ways(one, two=direct(two), three=tunnelled(three))
        wait_for_ways(three, one=tunnelled(one), two=tunnelled(two))
        if name == "vxlan":
            assert list(neighbours(one, "flannel.1")) == [str(three.subnet.network_address)]
        for host in (two, three):
            wait_for_answer(one.pod(1), host.pod(1))
        # What the datapath asks a direct peer through the tunnel is answered past it, so it learns nothing.
        wanted = {str(two.subnet): "alive" if name == "vxlan" else "unknown", str(three.subnet): "alive"}

        def liveness() -> dict[str, str]:
            return {it["subnet"]: it["liveness"] for it in read_status(one)["peers"]}

        wait_until("answers", lambda: liveness() == wanted, 30)

        lab.relocate(two, DISTANT)
        wait_for_ways(one, two=tunnelled(two), three=tunnelled(three))
        wait_for_ways(three, one=tunnelled(one), two=direct(two))
        if name == "vxlan":
            assert len(neighbours(one, "flannel.1")) == len(fdb(one, "flannel.1")) == 2
        for host in (two, three):
            wait_for_answer(one.pod(1), host.pod(1))
        wait_for_answer(two.pod(1), three.pod(1))

        # The kernel's own answer changes without any lease.
        one.machine.at().ip(f"route add {two.underlay_address}/32 dev eth0")
        wait_for_ways(one, two=direct(two), three=tunnelled(three))
        one.machine.at().ip(f"route delete {two.underlay_address}/32 dev eth0")
        wait_for_ways(one, two=tunnelled(two), three=tunnelled(three))


# --- repair


@dataclass(frozen=True, slots=True)
class Damage:
    """`command` for a shell, from the device, the host under test and a peer of it."""

    backends: tuple[str, ...]
    command: Callable[[str, Host, Host], str]


DAMAGES: Mapping[str, Damage] = {
    "device deleted": Damage(TUNNELS, lambda device, _, peer: f"ip link delete {device}"),
    "link down": Damage(TUNNELS, lambda device, _, peer: f"ip link set {device} down"),
    "link down and up": Damage(
        TUNNELS, lambda device, _, peer: f"sh -c 'ip link set {device} down; ip link set {device} up'"
    ),
    "MTU changed": Damage(TUNNELS, lambda device, _, peer: f"ip link set {device} mtu 1200"),
    "MAC changed": Damage(("vxlan",), lambda device, _, peer: f"ip link set {device} address 02:00:00:00:00:77"),
    "address deleted": Damage(TUNNELS, lambda device, _, peer: f"ip address flush dev {device}"),
    "address added": Damage(TUNNELS, lambda device, _, peer: f"ip address add 10.9.9.9/32 dev {device}"),
    "routes deleted": Damage((*TUNNELS, "host-gw"), lambda device, _, peer: f"ip route flush proto {PROTOCOL}"),
    "one route deleted": Damage(("vxlan", "host-gw"), lambda device, _, peer: f"ip route delete {peer.subnet}"),
    "neighbour deleted": Damage(
        ("vxlan",), lambda device, _, peer: f"ip neigh delete {peer.subnet.network_address} dev {device}"
    ),
    "neighbour replaced": Damage(
        ("vxlan",),
        lambda device, _, peer: (
            f"ip neigh replace {peer.subnet.network_address} lladdr 02:00:00:00:00:66 dev {device} nud permanent"
        ),
    ),
    "neighbours flushed": Damage(("vxlan",), lambda device, _, peer: f"ip neigh flush dev {device} nud permanent"),
    "fdb entry deleted": Damage(("vxlan",), lambda device, _, peer: f"bridge fdb delete {mac(peer)} dev {device}"),
    "fdb entry replaced": Damage(
        ("vxlan",),
        lambda device, _, peer: f"bridge fdb replace {mac(peer)} dev {device} dst 192.168.77.99 self permanent",
    ),
    "stray entries added": Damage(
        ("vxlan",),
        lambda device, _, peer: (
            f"sh -c 'bridge fdb add 02:00:00:00:00:55 dev {device} dst 192.168.77.98 self permanent;"
            f" ip neigh add 10.244.250.0 lladdr 02:00:00:00:00:55 dev {device} nud permanent'"
        ),
    ),
    "underlay down and up": Damage(
        ("host-gw",),
        lambda device, host, peer: (
            "sh -c 'ip link set eth0 down; ip link set eth0 up; ip route replace default via 192.168.77.1'"
        ),
    ),
    "forward rules deleted": Damage(tuple(CARRYING), lambda device, _, peer: "iptables -F FLANNEL-FWD"),
    "forward chain deleted": Damage(
        tuple(CARRYING),
        # In one transaction: the kernel refuses to delete a chain that a repair in between has linked again.
        lambda device, _, peer: (
            "printf '*filter\\n-F FORWARD\\n-F FLANNEL-FWD\\n-X FLANNEL-FWD\\nCOMMIT\\n' | iptables-restore --noflush"
        ),
    ),
}


def test_whatever_is_damaged_is_repaired_and_tcp_survives(
    named_lab: tuple[str, Lab], slack: int, figure: Callable[..., None]
) -> None:
    """One mechanism for all backends: after each damage everything is as before, with one line in the log."""
    name, lab = named_lab
    repaired_ms: list[float] = []
    one, two = lab.host(1), lab.host(2)
    device = DEVICES.get(name, "")
    before = kernel_state(one, name)
    pid = read_status(one)["pid"]
    with tcp_flow(one.pod(1), two.pod(1)) as stream:
        for what, damage in DAMAGES.items():
            if name not in damage.backends:
                continue
            log_len = len(one.daemon_log())
            one.run(["sh", "-c", damage.command(device, one, two)])
            took_s = seconds_until(lambda: kernel_state(one, name) == before, f"{what}: repaired", slack * 1.0)
            print(f"{name}: {what}: repaired after {took_s * 1000:.0f} ms")
            repaired_ms.append(took_s * 1000)

            def changes(log_len: int = log_len) -> list[str]:
                log = one.daemon_log()[log_len:].splitlines()
                return [line for line in log if "kernel state changed" in line or "firewall rules repaired" in line]

            wait_until(f"{what}: said", lambda: len(changes()) >= 1, 5)
            # What is done in several steps may be seen half done, and then it is two repairs.  So may what takes routes
            # along: routes and addresses are two questions, and the damage may come between them.
            is_in_steps = damage.command(device, one, two).startswith(("sh ", "ip route flush", "ip address flush"))
            is_in_steps |= what in ("device deleted", "link down")
            assert len(changes()) == 1 or is_in_steps, changes()
            ping(one.pod(1), two.pod(1).address)
        used_s = cpu_s(one, pid)
        ping(one.pod(1), two.pod(1).address, "-i", "0.25", count=4)
        assert cpu_s(one, pid) - used_s <= 0.1, "of one second in which nothing happens"
    figure("repaired", repaired_ms, "ms")
    stream.report.assert_exact()
    assert not [line for line in one.daemon_log().splitlines() if " E " in line]


def test_a_changed_underlay_mtu_is_followed(
    named_lab: tuple[str, Lab], slack: int, figure: Callable[..., None]
) -> None:
    name, lab = named_lab
    one = lab.host(1)
    for underlay_mtu in (1400, 1500):
        one.machine.at().ip(f"link set eth0 mtu {underlay_mtu}")
        mtu = underlay_mtu - OVERHEADS[name]
        took_s = seconds_until(lambda mtu=mtu: one.mtu == mtu, "subnet.env to follow", slack * 1.0)  # type: ignore[misc]
        figure(f"subnet.env has the MTU for {underlay_mtu} bytes", took_s, "s")
        if device := DEVICES.get(name):
            wait_until(
                "the device to follow",
                lambda mtu=mtu, device=device: show(one, "ip", "link", "show", device)[0]["mtu"] == mtu,  # type: ignore[misc]
                slack * 1.0,
            )
        assert read_status(one)["underlay"]["mtu"] == underlay_mtu
    ping(one.pod(1), lab.host(2).pod(1).address)


def test_a_changed_underlay_address_is_followed_by_lease_and_peers_and_tcp_survives(
    named_lab: tuple[str, Lab], slack: int, figure: Callable[..., None]
) -> None:
    _, lab = named_lab
    one, two = lab.host(1), lab.host(2)
    subnet, old = one.subnet, one.underlay_address
    try:
        with tcp_flow(one.pod(1), two.pod(1)) as stream:
            one.move(UNDERLAY[77])
            took_s = seconds_until(
                lambda: peers(two)[str(subnet)] == str(UNDERLAY[77]), "lease and peers to follow", slack * 2.0
            )
            figure("lease and peers have the new address", took_s, "s")
            wait_for_answer(one.pod(1), two.pod(1))
        stream.report.assert_exact()
        log = one.daemon_log().splitlines()
        assert len([line for line in log if f"underlay changed iface=eth0 address={UNDERLAY[77]}" in line]) == 1
        assert one.subnet == subnet
        assert [lease["PublicIP"] for key, lease in leases(one).items() if key == str(subnet).replace("/", "-")] == [
            str(UNDERLAY[77])
        ]
    finally:
        one.move(old)
        wait_until("the way back", lambda: read_status(one)["underlay"]["address"] == str(old), 10)


def test_a_host_that_loses_its_address_says_so_and_goes_on_when_it_has_one_again() -> None:
    with lab_of(2, BACKENDS["vxlan"]) as lab:
        one, two = lab.hosts
        lab.start()
        wait_for_answer(one.pod(1), two.pod(1))
        one.machine.at().ip("addr flush dev eth0")
        wait_until("the problem to be said", lambda: bool(read_status(one)["problems"]), 10)
        (problem,) = read_status(one)["problems"]
        assert problem.startswith("Failed to find any valid interface to use: failed to get default interface")
        one.machine.at().ip(f"addr add {UNDERLAY[88]}/24 brd + dev eth0", f"route add default via {UNDERLAY[1]}")
        wait_until("no problem", lambda: read_status(one)["problems"] == [], 10)
        assert read_status(one)["underlay"]["address"] == str(UNDERLAY[88])
        wait_for_answer(one.pod(1), two.pod(1))
        errors = [line for line in one.daemon_log().splitlines() if " E udptun" in line]
        assert len(errors) == 1, errors


# --- from one to another


@pytest.mark.parametrize(
    "walk",
    [
        pytest.param(["udp", "vxlan", "vtep", "vxlan", "host-gw", "alloc", "udp"], id="some"),
        pytest.param(None, id="every-one-after-every-other", marks=pytest.mark.full),
    ],
)
def test_a_change_of_backend_leaves_nothing_stale(walk: list[str] | None) -> None:
    """One backend after another on one host; the other host changes with it."""
    walk = walk or eulerian(list(BACKENDS))
    with lab_of(2, BACKENDS[walk[0]]) as lab:
        one, two = lab.hosts
        lab.start()
        for name in walk[1:]:
            for host in lab.hosts:
                host.stop_daemon()
            write_conf(one, net_conf(BACKENDS[name]))
            for host in lab.hosts:
                host.start_daemon()
            for host in lab.hosts:
                host.wait_ready()
            wait_for_peers(lab)
            links = {link["ifname"] for link in show(one, "ip", "link", "show") if link["ifname"].startswith("flannel")}
            # With --shortcut two more are on their way.
            links -= set(pair_names("flannel0")) if name == "udp" else set()
            assert links == ({DEVICES[name]} if name in DEVICES else set()), name
            n = len(LEASABLE)
            # Nothing leads our own pods' packets into the device, and a host may lease one of these prefixes whole.
            n_through = n - (str(one.subnet) in LEASABLE)
            n_routes = {"udp": 2, "vxlan": n + 1, "vtep": n + n_through, "host-gw": 1, "alloc": 0}[name]
            wait_until(f"the routes of {name}", lambda n=n_routes: len(own_routes(one)) == n, 10)  # type: ignore[misc]
            wait_until(
                f"{name} to have its processes and no others",
                lambda name=name: len(datapath_pids(one)) == (2 if name in USERSPACE else 0),  # type: ignore[misc]
                10,
            )
            if name != "alloc":
                wait_for_answer(one.pod(1), two.pod(1))
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def eulerian(names: list[str]) -> list[str]:
    """A closed walk in which every name follows every other one exactly once (Hierholzer's)."""
    ways = {name: [other for other in names if other != name] for name in names}
    stack, walk = [names[0]], []
    while stack:
        if ways[stack[-1]]:
            stack.append(ways[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


@pytest.mark.parametrize("name", TUNNELS)
def test_a_change_of_network_leaves_nothing_stale(name: str) -> None:
    with lab_of(1, BACKENDS[name]) as lab:
        one = lab.host(1)
        lab.start()
        restart(one, BACKENDS[name], Network="10.96.0.0/12")
        routes = show(one, "ip", "route", "show", "table", "all")
        text = json.dumps(routes + show(one, "ip", "address", "show", "dev", DEVICES[name]))
        assert ("10.96.0.0/12" if name == "udp" else "10.104.0.0/13") in text
        assert "10.244.0.0/16" not in text
        network = IPv4Network("10.96.0.0/12")
        assert all(IPv4Network(route["dst"]).subnet_of(network) for route in own_routes(one))
        (address,) = show(one, "ip", "-4", "address", "show", "dev", DEVICES[name])[0]["addr_info"]
        assert address["local"] == str(one.subnet.network_address)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "udp"])
def test_cleanup_removes_what_the_backend_made(name: str) -> None:
    with lab_of(2, BACKENDS[name]) as lab:
        one = lab.host(1)
        lab.start()
        wait_for_peers(lab)
        one.stop_daemon()
        one.run([*CLEANUP, "--release"])
        assert own_routes(one) == []
        assert [link["ifname"] for link in show(one, "ip", "link", "show") if "flannel" in link["ifname"]] == []
        assert datapath_pids(one) == set()
        assert not one.path(SUBNET_ENV).exists()
        assert not one.path("/var/lib/udptun/vtep-mac").exists()
        assert [value["PublicIP"] for value in leases(one).values()] == [str(lab.host(2).underlay_address)]


def test_a_start_that_gets_no_lease_leaves_no_device_behind() -> None:
    """There is one subnet for two hosts; the device is made before the lease is asked for."""
    conf = net_conf(BACKENDS["vxlan"], SubnetMin="10.244.9.0", SubnetMax="10.244.9.0")
    with Lab(f"c{os.getpid()}", n_hosts=2, net_conf=conf) as lab:
        one, two = lab.hosts
        one.start_daemon()
        one.wait_ready()
        two.start_daemon()
        with pytest.raises(LabError, match="out of subnets"):
            two.wait_ready()
        assert show(two, "ip", "link", "show", "flannel.1") == []
        assert own_routes(two) == []


# --- kernels without vxlan


@pytest.fixture
def no_vxlan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every daemon of this test finds a kernel without vxlan."""
    monkeypatch.setenv("UDPTUN_PRETEND_NO_VXLAN", "1")


@pytest.mark.usefixtures("no_vxlan")
def test_without_vxlan_and_without_a_fallback_the_daemon_ends_with_the_reason() -> None:
    with lab_of(1, {"Type": "vxlan", "Fallback": "none"}) as lab:
        one = lab.host(1)
        one.start_daemon()
        with pytest.raises(LabError, match="ended with status 1"):
            one.wait_ready()
        assert "cannot create flannel.1 (vxlan id 1): the kernel has no vxlan (EOPNOTSUPP" in one.daemon_log()
        assert leases(one) == {}


@pytest.mark.usefixtures("no_vxlan")
def test_without_vxlan_the_fallback_may_be_udp() -> None:
    with lab_of(2, {"Type": "vxlan", "Fallback": "udp"}) as lab:
        lab.start()
        wait_for_peers(lab)
        one, two = lab.hosts
        wait_for_answer(one.pod(1), two.pod(1))
        backend = read_status(one)["backend"]
        assert (backend["type"], backend["device"]) == ("udp", "flannel0")
        assert backend["reason"].endswith("and Backend.Fallback is udp")
        assert len([line for line in one.daemon_log().splitlines() if "backend chosen" in line]) == 1


def test_status_says_what_each_backend_would_get_here_without_a_daemon() -> None:
    with lab_of(1, BACKENDS["vxlan"]) as lab:
        one = lab.host(1)
        text = one.run([sys.executable, "-m", "udptun", "status", "--backends"]).stdout
        rows = {line.split()[0]: line.split(None, 2)[1:] for line in text.splitlines()}
        assert rows.keys() == {backend["Type"] for backend in BACKENDS.values()}
        assert rows["vxlan"] == ["yes", "the kernel's VXLAN device"]
        assert show(one, "ip", "link", "show", "type", "vxlan") == [], "the probe's device is gone again"


# --- the leases file


@contextmanager
def file_lab(backend: Mapping[str, object]) -> Iterator[Lab]:
    """Two hosts whose leases a file says."""
    path = LAB_DIR / "leases.json"
    with Lab(f"f{os.getpid()}", net_conf=net_conf(backend), store=f"file:{path}") as lab:
        entries = [
            {"Subnet": f"10.244.{host.index}.0/24", "PublicIP": str(host.underlay_address)} for host in lab.hosts
        ]
        lab.switch.at().path(path).write_text(json.dumps(entries))
        yield lab


@pytest.mark.parametrize("name", ["udp", "host-gw", "alloc"])
def test_hosts_of_a_leases_file_find_each_other(name: str) -> None:
    """With host-gw each host skipped all others, as udp's, and said that it was ready."""
    with file_lab(BACKENDS[name]) as lab:
        lab.start()
        wait_for_peers(lab)
        one, two = lab.hosts
        assert read_status(one)["skipped"] == []
        if name in CARRYING:
            wait_for_answer(one.pod(1), two.pod(1))


@pytest.mark.parametrize("name", ["vxlan", "vtep"])
def test_a_leases_file_that_cannot_say_enough_of_a_peer_ends_the_start(name: str) -> None:
    """The daemon was ready, without any peer: each lease was skipped for its BackendType."""
    with file_lab(BACKENDS[name]) as lab:
        one = lab.host(1)
        one.start_daemon()
        with pytest.raises(LabError, match="ended with status 2"):
            one.wait_ready()
        assert f"vxlan does not work with the store file:{LAB_DIR / 'leases.json'}" in one.daemon_log()
        assert "use --store etcd, or Backend.Type udp or host-gw" in one.daemon_log()
        assert show(one, "ip", "link", "show", "flannel.1") == []


@pytest.mark.usefixtures("no_vxlan")
def test_a_leases_file_is_enough_for_vxlans_fallback_udp() -> None:
    with file_lab({"Type": "vxlan", "Fallback": "udp"}) as lab:
        lab.start()
        wait_for_peers(lab)
        wait_for_answer(lab.host(1).pod(1), lab.host(2).pod(1))

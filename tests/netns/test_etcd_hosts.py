"""Hosts whose leases are in a real etcd, which the underlay's switch runs: joins, races, outages and flannel beside us.

etcd 192.168.77.1:2379 (switch) -- underlay -- h1, h2, h3
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from etcd_server import MISSING, EtcdServer
from traffic import (
    REAL_TIME,
    datapath_pids,
    has_shortcut,
    kill,
    nothing_in_clear_text,
    peers,
    ping,
    read_status,
    rss_mib,
    seconds_until,
    tcp_flow,
    udp_flow,
)

from bench.compiler import compiled, missing_compiler
from udptun.lab.host import SUBNET_ENV, UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]

FOLLOWS_S = 5.0
"""Five times the second in which the tables must follow: the machine may be busy."""

ENDPOINT = f"http://{UNDERLAY[1]}:2379"
PREFIX = "/coreos.com/network"
CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
WIDE = {"Network": "10.0.0.0/8", "Backend": {"Type": "udp"}}
UDPTUN = [sys.executable, "-m", "udptun"]
COMMAND = [*REAL_TIME, *UDPTUN, "daemon", f"--etcd-endpoints={ENDPOINT}"]


class Etcd(EtcdServer):
    """The server, and what the tests say to it in flannel's terms."""

    def config(self, conf: Mapping[str, object]) -> None:
        self.etcdctl("put", f"{PREFIX}/config", json.dumps(conf))

    def leases(self) -> dict[str, str]:
        """Key, without the prefix -> value, as the server has them."""
        lines = self.etcdctl("get", "--prefix", f"{PREFIX}/subnets/").splitlines()
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return {key.removeprefix(f"{PREFIX}/subnets/"): value for key, value in pairs}

    def put(self, key: str, value: object) -> None:
        self.etcdctl("put", f"{PREFIX}/subnets/{key}", value if isinstance(value, str) else json.dumps(value))

    def delete(self, key: str) -> None:
        self.etcdctl("del", f"{PREFIX}/subnets/{key}")

    def transaction(self, *lines: str) -> None:
        self.etcdctl("txn", stdin="\n".join(["", *lines, "", ""]) + "\n")

    def ttl_s(self, key: str) -> int:
        """What is left of the etcd lease that the key hangs on; its whole time is 86,400 s."""
        found = json.loads(self.etcdctl("get", f"{PREFIX}/subnets/{key}", "-w", "json"))["kvs"][0]
        said = self.etcdctl("lease", "timetolive", f"{found['lease']:x}")
        match = re.search(r"granted with TTL\((\d+)s\), remaining\((\d+)s\)", said)
        assert match is not None, said
        assert match.group(1) == "86400"
        return int(match.group(2))


@contextlib.contextmanager
def etcd_lab(name: str, directory: Path, n_hosts: int, conf: Mapping[str, object] = CONF) -> Iterator[tuple[Lab, Etcd]]:
    """A lab without running daemons, and etcd in its switch."""
    with Lab(name, n_hosts=n_hosts, daemon_command=COMMAND) as lab:
        # The kernel ends it when this session is killed.
        enter = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={lab.switch.at().net_ns}"]
        flags = ["--max-txn-ops=4096", "--max-request-bytes=8000000"]
        etcd = Etcd(directory, address=str(UNDERLAY[1]), port=2379, command=enter, flags=flags)
        try:
            etcd.start()
            etcd.config(conf)
            yield lab, etcd
        finally:
            etcd.kill()
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def restart(host: Host) -> None:
    assert host.stop_daemon() == 0
    host.start_daemon()
    host.wait_ready()


def log_lines(host: Host, text: str) -> list[str]:
    return [line for line in host.daemon_log().splitlines() if text in line]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Etcd]]:
    """Three hosts with a pod each."""
    with etcd_lab("t-etcd", tmp_path_factory.mktemp("etcd"), 3) as (lab, etcd):
        lab.start()
        yield lab, etcd


@pytest.fixture
def cluster(running: tuple[Lab, Etcd]) -> tuple[Lab, Etcd]:
    """The three hosts, all well."""
    lab, etcd = running
    wait_for_equal_tables(lab, etcd)
    for host in lab.hosts:
        seconds_until(lambda host=host: read_status(host)["problems"] == [], f"{host} to be well", FOLLOWS_S)  # type: ignore[misc]
    return lab, etcd


def expected(etcd: Etcd, host: Host) -> dict[str, str]:
    """The table that the host should have: etcd's, without its own lease."""
    own = f"{host.subnet.network_address}-{host.subnet.prefixlen}"
    return {key.replace("-", "/"): json.loads(value)["PublicIP"] for key, value in etcd.leases().items() if key != own}


def wait_for_equal_tables(lab: Lab, etcd: Etcd) -> float:
    """How long it takes until every host's table is etcd's."""
    truth = {host.name: expected(etcd, host) for host in lab.hosts}
    return seconds_until(
        lambda: all(peers(host) == truth[host.name] for host in lab.hosts), "every table to be etcd's", FOLLOWS_S
    )


@contextlib.contextmanager
def nothing_lost(lab: Lab) -> Iterator[None]:
    """Packets and a stream flow between the first two hosts' pods, and all of it arrives."""
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    with udp_flow(one, two, 500) as flow, tcp_flow(two, one) as stream:
        yield
        flow.wait_for_more(50)
    assert flow.report.lost == []
    assert flow.report.n_spoilt == 0
    stream.report.assert_exact()


# --- three hosts


def test_keys_and_values_in_etcd_are_flannels_and_pods_reach_each_other(cluster: tuple[Lab, Etcd]) -> None:
    lab, etcd = cluster
    leases = etcd.leases()
    assert len(leases) == 3
    for host in lab.hosts:
        key = f"{host.subnet.network_address}-24"
        node_id = read_status(host)["lease"]["node_id"]
        more = ',"Shortcut":true' if has_shortcut(host) else ""
        assert leases[key] == (
            f'{{"PublicIP":"{host.underlay_address}","PublicIPv6":null,"BackendType":"udp",'
            f'"BackendData":{{"Port":8285,"NodeID":"{node_id}","Udptun":1,"AnySourcePort":true,"ECN":true{more}}}}}'
        )
        assert 86_000 < etcd.ttl_s(key) <= 86_400
        assert read_status(host)["store"] == "etcd"
    for source in lab.hosts:
        for destination in lab.hosts:
            ping(source.pod(1), destination.pod(1).address)
    server = lab.host(2).pod(1).popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    with server:
        address = str(lab.host(2).pod(1).address)
        wait_until(
            "iperf3 to listen",
            lambda: "5201" in lab.host(2).pod(1).run(["ss", "-Htln"]).stdout,
            10,
        )
        said = lab.host(1).pod(1).run(["iperf3", "-c", address, "-t", "1", "-J"]).stdout
    assert json.loads(said)["end"]["sum_received"]["bits_per_second"] > 1e7


def test_doctor_names_the_server_of_etcd_that_does_not_answer_while_another_does(cluster: tuple[Lab, Etcd]) -> None:
    """The store goes on with the other one, so nothing else shows that it has one less."""
    lab, etcd = cluster
    away = f"http://{UNDERLAY[1]}:1"
    seen: list[Mapping[str, Any]] = []

    def is_named() -> bool:
        argv = [sys.executable, "-m", "udptun", "doctor", "--json", f"--etcd-endpoints={etcd.endpoint},{away}"]
        seen[:] = [json.loads(lab.host(1).run(argv, check=False).stdout)]
        return [it["subject"] for it in seen[0]["findings"] if it["severity"] != "note"] == [away]

    # A busy machine may hold up an answer, or a ping.
    wait_until("the finding", is_named, 30)
    (said,) = seen
    assert said["exit_status"] == 1
    assert {"store", "own-lease", "network-config"} <= set(said["fine"])
    there, not_there = said["store_endpoints"]
    assert (there["endpoint"], there["error"], there["latency_ms"] > 0) == (etcd.endpoint, "", True)
    assert (not_there["endpoint"], not_there["latency_ms"]) == (away, None)
    assert "connection refused" in not_there["error"].lower()


@pytest.mark.parametrize("more", [{}, {"BackendType": "udp"}, {"PublicIPv6": None, "Unknown": []}])
def test_a_lease_written_by_hand_in_flannels_form_is_honoured(
    cluster: tuple[Lab, Etcd], more: Mapping[str, object]
) -> None:
    lab, etcd = cluster
    etcd.put("10.244.240.0-24", {"PublicIP": "192.168.77.240", **more})
    try:
        seconds = wait_for_equal_tables(lab, etcd)
        print(f"in every table {seconds * 1000:.0f} ms after it was written")
        (peer,) = [peer for peer in read_status(lab.host(1))["peers"] if peer["subnet"] == "10.244.240.0/24"]
        assert (peer["public_ip"], peer["port"], peer["udptun"]) == ("192.168.77.240", 8285, False)
    finally:
        etcd.delete("10.244.240.0-24")
    wait_for_equal_tables(lab, etcd)


def test_a_peer_is_forgotten_everywhere_when_its_lease_expires(cluster: tuple[Lab, Etcd]) -> None:
    """The dead host's, whose own daemon renews no more; etcd's shortest time is a second or two."""
    lab, etcd = cluster
    granted = etcd.etcdctl("lease", "grant", "2").split()[1]
    value = json.dumps({"PublicIP": "192.168.77.241"})
    etcd.etcdctl("put", f"--lease={granted}", f"{PREFIX}/subnets/10.244.241.0-24", value)
    added = "peer added subnet=10.244.241.0/24"
    # The tables have it for two seconds, which may be less than looking at all of them takes.
    wait_until("every host to add the peer", lambda: all(added in host.daemon_log() for host in lab.hosts), 10)
    wait_until("etcd to end the lease", lambda: "10.244.241.0-24" not in etcd.leases(), 10)
    seconds = wait_for_equal_tables(lab, etcd)
    print(f"gone from every table {seconds * 1000:.0f} ms after it is gone from etcd")


@pytest.mark.parametrize("how", ["deleted", "revoked", "wiped"])
def test_own_lease_that_etcd_loses_is_made_again_on_the_same_subnet(
    cluster: tuple[Lab, Etcd], figure: Callable[..., None], how: str
) -> None:
    lab, etcd = cluster
    host, before = lab.host(1), etcd.leases()
    key = f"{host.subnet.network_address}-24"
    with nothing_lost(lab):
        if how == "deleted":
            etcd.delete(key)
        elif how == "revoked":
            found = json.loads(etcd.etcdctl("get", f"{PREFIX}/subnets/{key}", "-w", "json"))["kvs"][0]
            etcd.etcdctl("lease", "revoke", f"{found['lease']:x}")
        else:
            etcd.kill()
            etcd.wipe()
            etcd.start()
            etcd.config(CONF)
        figure("lease back", seconds_until(lambda: etcd.leases() == before, "the leases to be back", FOLLOWS_S), "s")
        wait_for_equal_tables(lab, etcd)
    assert etcd.ttl_s(key) > 86_000
    ping(host.pod(1), lab.host(2).pod(1).address)
    if how != "wiped":
        assert len(log_lines(host, "our lease is gone from the store")) >= 1


def test_own_subnet_that_another_got_is_said_once_and_packets_flow_on(cluster: tuple[Lab, Etcd]) -> None:
    lab, etcd = cluster
    host = lab.host(3)
    key = f"{host.subnet.network_address}-24"
    before = len(log_lines(host, "our lease cannot be taken again"))
    etcd.put(key, {"PublicIP": "192.168.77.242"})
    seconds_until(lambda: len(read_status(host)["problems"]) == 1, "the host to say so", FOLLOWS_S)
    assert f"{host.subnet} is leased to 192.168.77.242" in read_status(host)["problems"][0]
    assert json.loads(etcd.leases()[key])["PublicIP"] == "192.168.77.242"
    with udp_flow(lab.host(1).pod(1), lab.host(2).pod(1), 200) as flow:
        flow.wait_for_more(50)
    assert flow.report.lost == []
    assert len(peers(host)) == 2
    etcd.delete(key)
    seconds_until(lambda: read_status(host)["problems"] == [], "the host to have its lease again", FOLLOWS_S)
    assert json.loads(etcd.leases()[key])["PublicIP"] == str(host.underlay_address)
    assert len(log_lines(host, "our lease cannot be taken again")) == before + 1


# --- etcd away


@contextlib.contextmanager
def cut_off(lab: Lab) -> Iterator[None]:
    """What the hosts send to etcd vanishes, and so does what etcd sends: nobody is told."""
    rules = """
        table inet cut {
            chain input { type filter hook input priority 0; iifname underlay tcp dport 2379 drop; }
            chain output { type filter hook output priority 0; oifname underlay tcp sport 2379 drop; }
        }
    """
    lab.switch.run(["nft", "-f", "-"], input=rules)
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete", "table", "inet", "cut"])


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_nothing_is_lost_while_etcd_is_down_and_the_tables_are_right_soon_after(
    cluster: tuple[Lab, Etcd], figure: Callable[..., None], how: str
) -> None:
    lab, etcd = cluster
    host = lab.host(1)
    before = len(host.daemon_log().splitlines())
    with nothing_lost(lab):
        etcd.kill() if how == "killed" else etcd.stop()
        seconds_until(lambda: read_status(host)["problems"] != [], "the daemon to say so", 30)
        assert len(peers(host)) == 2
        etcd.start()
        etcd.put("10.244.243.0-24", {"PublicIP": "192.168.77.243"})
        figure("every table right after etcd's return", wait_for_equal_tables(lab, etcd), "s")
        etcd.delete("10.244.243.0-24")
        wait_for_equal_tables(lab, etcd)
    said = [line for line in host.daemon_log().splitlines()[before:] if "unavailable" in line]
    print("\n".join(said))
    assert 1 <= len(said) <= 4
    seconds_until(lambda: read_status(host)["problems"] == [], "all to be well", FOLLOWS_S)


@pytest.mark.parametrize("away_s", [5, pytest.param(60, marks=pytest.mark.full)])
def test_nothing_is_lost_while_etcd_is_cut_off_and_changes_meanwhile(
    cluster: tuple[Lab, Etcd], figure: Callable[..., None], away_s: int
) -> None:
    lab, etcd = cluster
    etcd.put("10.244.244.0-24", {"PublicIP": "192.168.77.244"})
    wait_for_equal_tables(lab, etcd)
    with nothing_lost(lab):
        with cut_off(lab):
            etcd.delete("10.244.244.0-24")
            for number in range(245, 250):
                etcd.put(f"10.244.{number}.0-24", {"PublicIP": f"192.168.77.{number}"})
            etcd.put("10.244.245.0-24", {"PublicIP": "192.168.77.250"})
            until = time.monotonic() + away_s
            while time.monotonic() < until:
                assert all("10.244.244.0/24" in peers(host) for host in lab.hosts), "it cannot know"
                time.sleep(0.2)
        start = time.monotonic()
        # TCP tries again after a time that grows with that of the silence, where the connection is still the old one.
        truth = {host.name: expected(etcd, host) for host in lab.hosts}
        seconds_until(lambda: all(peers(host) == truth[host.name] for host in lab.hosts), "the tables", 15 + away_s)
        figure(f"every table right after etcd was cut off for {away_s} s", time.monotonic() - start, "s")
        for number in range(245, 250):
            etcd.delete(f"10.244.{number}.0-24")
        wait_for_equal_tables(lab, etcd)


def test_a_host_begins_without_etcd_and_joins_when_it_is_back(
    cluster: tuple[Lab, Etcd], figure: Callable[..., None]
) -> None:
    lab, etcd = cluster
    host, others = lab.host(1), lab.hosts[1:]
    key, table = f"{host.subnet.network_address}-24", peers(host)
    # So that the file knows until when the others' leases last: etcd says it only when asked, one by one.
    seconds_until(
        lambda: all(peer["expires_at"] > time.time() + 3600 for peer in read_status(host)["peers"]),
        "the expiries",
        30,
    )
    assert host.stop_daemon() == 0
    # Nothing is to be adopted: what it knows is in its file.
    kill(host, *datapath_pids(host))
    etcd.kill()
    start = time.monotonic()
    host.start_daemon()
    host.wait_ready()
    figure("ready without etcd after the start", time.monotonic() - start, "s")
    assert peers(host) == table
    assert host.gateway.network == lab.host(1).subnet
    for other in others:
        ping(host.pod(1), other.pod(1).address)
    (problem,) = read_status(host)["problems"]
    print(problem)
    assert "etcd" in problem
    assert len(log_lines(host, "beginning with the table of the last run")) == 1
    with nothing_lost(lab):
        etcd.start()
        start = time.monotonic()
        etcd.put("10.244.251.0-24", {"PublicIP": "192.168.77.251"})
        wait_for_equal_tables(lab, etcd)
        figure("every table right after etcd is back", time.monotonic() - start, "s")
        seconds_until(lambda: read_status(host)["problems"] == [], "all to be well", FOLLOWS_S)
    assert json.loads(etcd.leases()[key])["PublicIP"] == str(host.underlay_address)
    etcd.delete("10.244.251.0-24")


def test_a_host_that_knows_nothing_waits_for_etcd_and_for_its_config(tmp_path: Path) -> None:
    with etcd_lab("t-wait", tmp_path, 1) as (lab, etcd):
        host = lab.host(1)
        etcd.kill()
        host.start_daemon()
        wait_until("it to say so", lambda: bool(log_lines(host, "no network config, waiting for it")), 10)
        etcd.wipe()
        etcd.start()
        wait_until("it to miss the config", lambda: bool(log_lines(host, "no network config in etcd")), 10)
        etcd.etcdctl("put", f"{PREFIX}/config", '{"Network": "10.244.0.0/33"}')
        wait_until("it to refuse the config", lambda: bool(log_lines(host, "10.244.0.0/33")), 10)
        lines = [line for line in host.daemon_log().splitlines() if " W " in line]
        print("\n".join(lines))
        assert len(lines) <= 5
        start = time.monotonic()
        etcd.config(CONF)
        host.wait_ready()
        print(f"ready {time.monotonic() - start:.2f} s after the config is there")


# --- races


def fresh(lab: Lab, etcd: Etcd) -> None:
    """No lease, and hosts that never had one."""
    for host in lab.hosts:
        if host.daemon is not None and host.daemon.poll() is None:
            facts = read_status(host)["datapath"]
            assert host.stop_daemon() == 0
            kill(host, *facts["standby_pids"], facts["pid"])
            # It has the address of the old subnet, from which the kernel may answer others until it has the new one.
            host.machine.at().ip("link del flannel0")
        for path in (SUBNET_ENV, "/var/lib/udptun/node-id", "/var/lib/udptun/last-leases.json"):
            host.path(path).unlink(missing_ok=True)
    etcd.etcdctl("del", "--prefix", f"{PREFIX}/subnets/")


@pytest.mark.parametrize(
    ("n_hosts", "n_rounds"),
    [
        (3, 2),
        (8, 1),
        pytest.param(3, 200, marks=[pytest.mark.full, pytest.mark.timeout(1800)]),
        pytest.param(8, 20, marks=[pytest.mark.full, pytest.mark.timeout(900)]),
    ],
)
def test_hosts_that_start_at_once_all_get_a_subnet_and_all_peers(
    tmp_path: Path, figure: Callable[..., None], n_hosts: int, n_rounds: int
) -> None:
    """In every other round etcd answers nobody until all have asked, so that they meet in one moment.

    There are as many subnets as hosts.
    """
    conf = {
        "Network": "10.244.0.0/16",
        "SubnetMin": "10.244.1.0",
        "SubnetMax": f"10.244.{n_hosts}.0",
        "Backend": {"Type": "udp"},
    }
    took_s: list[float] = []
    with etcd_lab("t-race", tmp_path, n_hosts, conf) as (lab, etcd):
        for number in range(n_rounds):
            fresh(lab, etcd)
            held = number % 2 == 0
            if held:
                etcd.freeze()
            for host in lab.hosts:
                host.start_daemon()
            if held:
                for host in lab.hosts:
                    wait_until(f"{host} to wait", lambda host=host: is_waiting(host), 20)
                etcd.thaw()
            for host in lab.hosts:
                host.wait_ready(20)
            subnets = {host.subnet for host in lab.hosts}
            assert len(subnets) == n_hosts, f"round {number}: {subnets}"
            assert len(etcd.leases()) == n_hosts
            took_s.append(wait_for_equal_tables(lab, etcd))
            for host in lab.hosts:
                assert host.daemon is not None
                assert host.daemon.poll() is None
                assert read_status(host)["problems"] == []
    figure(f"{n_hosts} hosts at once: peers missing and subnets twice", 0)
    figure("every table is right when all are ready, after", took_s, "s")


def is_waiting(host: Host) -> bool:
    """Whether the daemon has a connection to etcd, on which nothing comes back."""
    return ":2379" in host.run(["ss", "-Htn", "state", "established"]).stdout


# --- many


def lease_of(number: int) -> tuple[str, str]:
    """A stranger's, in flannel's form: 10.<64 + high>.<low>.0-24 at 172.<16 + high>.<low>.1."""
    high, low = divmod(number, 256)
    return f"10.{64 + high}.{low}.0-24", json.dumps({"PublicIP": f"172.{16 + high}.{low}.1", "PublicIPv6": None})


def put_all(etcd: Etcd, numbers: range) -> None:
    """In one transaction."""
    lines = [f"put {PREFIX}/subnets/{key} {json.dumps(value)}" for key, value in map(lease_of, numbers)]
    etcd.transaction(*lines)


def test_thousands_of_leases_at_once_are_all_learned_and_a_start_with_them_is_quick(
    tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Of 100 leases in one transaction flanneld 0.20 learned one."""
    with etcd_lab("t-many", tmp_path, 2, WIDE) as (lab, etcd):
        lab.start()
        host = lab.host(1)
        base = rss_mib(host, read_status(host)["pid"])
        with udp_flow(host.pod(1), lab.host(2).pod(1), 200) as flow:
            for first in range(0, 10_000, 1000):
                put_all(etcd, range(first, first + 1000))
            seconds = wait_for_equal_tables(lab, etcd)
            grown = rss_mib(host, read_status(host)["pid"]) - base
            figure("10,000 leases in both tables after the last transaction", seconds, "s")
            figure("more memory of the daemon", grown, "MiB")
            assert grown < 100
            start = time.monotonic()
            assert host.stop_daemon() == 0
            host.start_daemon()
            host.wait_ready(20)
            figure("stopped, started and ready with 10,002 leases", time.monotonic() - start, "s")
            assert len(peers(host)) == 10_001
            etcd.etcdctl("del", "--prefix", f"{PREFIX}/subnets/10.6")
            etcd.etcdctl("del", f"{PREFIX}/subnets/10.64", f"{PREFIX}/subnets/10.99999")
            seconds = wait_for_equal_tables(lab, etcd)
            print(f"gone again {seconds:.2f} s after the deletion")
            flow.wait_for_more(20)
        figure(f"of {flow.report.sent} packets, lost", len(flow.report.lost))
        assert flow.report.lost == []


# --- flannel beside us


STAND_IN_SUBNET = IPv4Network("10.244.177.0/24")
"""Beyond the first hundred subnets, of which our hosts lease one."""


def flannel_rules(host: Host) -> None:
    """What flanneld sets up beside its packet loop: address, route, and its file."""
    host.machine.at().ip(
        f"addr add {STAND_IN_SUBNET.network_address}/32 dev flannel0",
        "link set flannel0 up mtu 1472",
        f"route add {CONF['Network']} dev flannel0",
    )
    host.path(SUBNET_ENV).parent.mkdir(parents=True, exist_ok=True)
    host.path(SUBNET_ENV).write_text(
        f"FLANNEL_NETWORK={CONF['Network']}\nFLANNEL_SUBNET={STAND_IN_SUBNET[1]}/24\n"
        "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )


@contextlib.contextmanager
def stand_in(lab: Lab, etcd: Etcd, host: Host, directory: Path) -> Iterator[None]:
    """flannel's packet loop as the naive engine plays it, and a lease in its form without BackendData."""
    if missing := missing_compiler():
        pytest.skip(missing)
    program = compiled("peers/naive.c", directory)
    one, two = lab.hosts[:2]
    arguments = [str(one.underlay_address), str(two.subnet), str(two.underlay_address)]
    process = host.popen(
        [str(program), "flannel0", str(host.underlay_address), "8285", *arguments], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        flannel_rules(host)
        etcd.put(f"{STAND_IN_SUBNET.network_address}-24", {"PublicIP": str(host.underlay_address), "PublicIPv6": None})
        yield
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def real_flanneld(host: Host, program: Path) -> Iterator[None]:
    """flanneld itself."""
    host.start_daemon(command=[str(program), f"-etcd-endpoints={ENDPOINT}", "-iface=eth0"])
    try:
        host.wait_ready(30)
        yield
    finally:
        host.stop_daemon()


@pytest.mark.parametrize("kind", ["stand-in", "flanneld"])
def test_pods_of_flannel_and_of_udptun_reach_each_other(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    program = request.config.getoption("--flanneld")
    if kind == "flanneld" and program is None:
        pytest.skip("give flanneld's program with --flanneld PATH")
    with etcd_lab("t-mixed", tmp_path, 3) as (lab, etcd):
        ours, flannels = lab.hosts[:2], lab.host(3)
        for host in ours:
            host.start_daemon()
        for host in ours:
            host.wait_ready()
            host.add_pod()
        way = real_flanneld(flannels, program) if kind == "flanneld" else stand_in(lab, etcd, flannels, tmp_path)
        with way:
            flannels.add_pod()
            seconds_until(lambda: all(len(peers(host)) == 2 for host in ours), "the tables", FOLLOWS_S)
            assert [peer["udptun"] for host in ours for peer in read_status(host)["peers"]].count(False) == 2
            pods = [host.pod(1) for host in lab.hosts]
            with nothing_in_clear_text(lab, tmp_path / "c.pcap", "tcp port 2379"):
                for source in pods:
                    for destination in pods:
                        ping(source, destination.address)
                        ping(source, destination.address, "-s", "1400")
                with tcp_flow(pods[0], pods[2]) as there, tcp_flow(pods[2], pods[1]) as back:
                    time.sleep(0.5)
            there.report.assert_exact()
            back.report.assert_exact()
            for host in ours:
                assert read_status(host)["problems"] == []


def test_a_node_moves_from_flannel_to_udptun_and_back_and_its_pods_stay(tmp_path: Path) -> None:
    """The steps of docs/operations.md."""
    with etcd_lab("t-moves", tmp_path, 3) as (lab, etcd):
        others, moving = lab.hosts[:2], lab.host(3)
        for host in others:
            host.start_daemon()
        for host in others:
            host.wait_ready()
            host.add_pod()

        def seen_as(host: Host) -> bool | None:
            """Whether the host takes it for one of udptun's."""
            kinds = {peer["subnet"]: bool(peer["udptun"]) for peer in read_status(host)["peers"]}
            return kinds.get(str(STAND_IN_SUBNET))

        def check(is_udptun: bool) -> None:
            for host in others:
                seconds_until(lambda host=host: seen_as(host) is is_udptun, "the lease", FOLLOWS_S)  # type: ignore[misc]
                ping(host.pod(1), moving.pod(1).address)
                ping(moving.pod(1), host.pod(1).address, "-s", "1400")

        with stand_in(lab, etcd, moving, tmp_path):
            moving.add_pod()
            check(is_udptun=False)
        moving.start_daemon()
        moving.wait_ready()
        assert moving.subnet == STAND_IN_SUBNET
        check(is_udptun=True)
        assert read_status(moving)["problems"] == []
        assert [line for line in moving.daemon_log().splitlines() if " W " in line] == []
        assert moving.stop_daemon() == 0
        print(moving.run([*UDPTUN, "cleanup", f"--etcd-endpoints={ENDPOINT}"]).stdout)
        assert f"{STAND_IN_SUBNET.network_address}-24" in etcd.leases()
        with stand_in(lab, etcd, moving, tmp_path):
            check(is_udptun=False)

"""Several networks on one host, each with a daemon of its own; devices, routes and firewall chains are shared.

    d-NAME [h1] eth0 -- underlay -- eth0 [h2] d-NAME      for each network a bridge with the host's FLANNEL_SUBNET

flannel's own functional test "multi" does the same with vxlan and host-gw.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import Any

import pytest
from test_backends import fdb, neighbours, show
from test_firewall import forward_rules, masquerade_rules
from traffic import datapath_pids, kill, ping

from udptun.commands import status
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, Lab

pytestmark = pytest.mark.netns

UDPTUN = [sys.executable, "-m", "udptun"]
QUIET_S = 10.0
"""For so long nobody may change anything.  A quarrel of two daemons is 30 changes a second."""


@dataclass(frozen=True)
class Network:
    """One network, and what its daemons are told."""

    name: str
    prefix: str
    backend: Mapping[str, object]
    device: str | None
    nftables: bool = False

    @property
    def network(self) -> str:
        return f"{self.prefix}.0.0/16"

    @property
    def mtu(self) -> int:
        return 1500 - {"udp": 28, "vxlan": 50, "host-gw": 0}[str(self.backend["Type"])]


FIVE = [
    Network("vx", "10.11", {"Type": "vxlan"}, "flannel.1"),
    Network("gw", "10.12", {"Type": "host-gw"}, None),
    Network("v2", "10.13", {"Type": "vxlan", "VNI": 2}, "flannel.2"),
    Network("ua", "10.14", {"Type": "udp"}, "flannel0"),
    Network("ub", "10.15", {"Type": "udp", "Port": 8286}, "flannel1"),
]
VX, GW, V2, UA, UB = FIVE


class Daemon:
    """The daemon of one network on one host, with a run directory, a state directory and a subnet.env of its own."""

    def __init__(self, host: Host, network: Network, udptun: Sequence[str] = UDPTUN) -> None:
        """`udptun`: the command."""
        self.host = host
        self.network = network
        self._udptun = udptun
        self.process: subprocess.Popen[str] | None = None
        self.run_dir = f"/run/udptun-{network.name}"
        self.subnet_file = f"/run/flannel/{network.name}.env"
        self.flags = [
            *("--store", f"local:{LAB_DIR}/{network.name}.db", "--net-config-path", f"{LAB_DIR}/{network.name}.json"),
            *("--run-dir", self.run_dir, "--state-dir", f"/var/lib/udptun/{network.name}"),
            *("--subnet-file", self.subnet_file),
        ]
        conf = {"Network": network.network, "Backend": dict(network.backend), "EnableNFTables": network.nftables}
        host.path(f"{LAB_DIR}/{network.name}.json").write_text(json.dumps(conf))
        self._log = host.path(f"{LAB_DIR}/{network.name}-{host.name}.log")

    def start(self, *more: str) -> None:
        self.host.path(self.subnet_file).unlink(missing_ok=True)
        with self._log.open("a") as log:
            self.process = self.host.machine.popen(
                [*self._udptun, "daemon", *self.flags, "--ip-masq", *more], stdout=log, stderr=log, new_session=True
            )

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            return self.host.path(self.subnet_file).exists()

        wait_until(f"the daemon of {self.network.name} on {self.host}", is_ready, 30)
        wait_until("its status", lambda: bool(self.status()), 10)

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_ready()

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(20)

    def status(self) -> Any:
        try:
            return json.loads(status.fetch(self.host.path(self.run_dir)))
        except Exception:
            return {}

    def log(self) -> str:
        """Without what it says of probes: they begin when it is ready, and that is no matter of these tests."""
        lines = self._log.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if " udptun.probing." not in line)

    def cleanup(self, *more: str) -> str:
        return self.host.run([*UDPTUN, "cleanup", *self.flags, *more]).stdout

    def refused(self, *more: str, command: str = "daemon") -> str:
        """The one line that a daemon with these flags ends with."""
        result = self.host.run([*UDPTUN, command, *self.flags, *more], check=False)
        assert result.returncode in (1, 2), result
        lines = [line for line in result.stderr.splitlines() if " E " in line or "error: " in line]
        assert len(lines) == 1, result.stderr
        return re.split(r" E udptun\S+: |error: ", lines[0])[1]

    def env(self) -> dict[str, str]:
        text = self.host.path(self.subnet_file).read_text()
        return dict(line.split("=", 1) for line in text.splitlines())

    @property
    def gateway(self) -> IPv4Interface:
        return IPv4Interface(self.env()["FLANNEL_SUBNET"])


@dataclass
class Crowd:
    """Two hosts with a daemon for each network on both."""

    lab: Lab
    daemons: list[Daemon]

    def on(self, host: int, network: Network) -> Daemon:
        return next(it for it in self.daemons if it.host is self.lab.host(host) and it.network is network)

    def ping(self, network: Network, *options: str, count: int = 2) -> None:
        """From the subnet of host 1 to that of host 2, as pods would."""
        here, there = self.on(1, network), self.on(2, network)
        ping(here.host, there.gateway.ip, "-I", str(here.gateway.ip), *options, count=count)

    def ping_all(self) -> None:
        for network in {daemon.network.name: daemon.network for daemon in self.daemons}.values():
            self.ping(network)

    def logs(self) -> dict[str, str]:
        return {f"{daemon.host}/{daemon.network.name}": daemon.log() for daemon in self.daemons}


def add_pods(daemon: Daemon) -> None:
    daemon.host.machine.at().ip(
        f"link add d-{daemon.network.name} type bridge",
        f"address add {daemon.gateway} dev d-{daemon.network.name}",
        f"link set d-{daemon.network.name} up",
    )


@contextlib.contextmanager
def crowd_of(networks: Sequence[Network], n_hosts: int = 2, udptun: Sequence[str] = UDPTUN) -> Iterator[Crowd]:
    with Lab(f"n{os.getpid()}", n_hosts=n_hosts) as lab:
        crowd = Crowd(lab, [])
        for network in networks:
            crowd.daemons += [Daemon(host, network, udptun) for host in lab.hosts]
        for daemon in crowd.daemons:
            daemon.start()
            # One after the other, so that the names of the devices are known.
            if daemon.network.device is not None:
                daemon.wait_ready()
        for daemon in crowd.daemons:
            daemon.wait_ready()
            add_pods(daemon)
        for network in networks if n_hosts > 1 else []:
            wait_until(f"{network.name} to pass", lambda it=network: passes(crowd, it), 20)
        yield crowd


def passes(crowd: Crowd, network: Network) -> bool:
    here, there = crowd.on(1, network), crowd.on(2, network)
    command = ["ping", "-c", "1", "-W", "1", "-I", str(here.gateway.ip), str(there.gateway.ip)]
    return here.host.run(command, check=False).returncode == 0


@pytest.fixture(scope="module")
def _crowd() -> Iterator[tuple[Crowd, dict[str, object]]]:
    """With the state of each host, as the last test has left it."""
    with crowd_of(FIVE) as crowd:
        yield crowd, {host.name: state_of(host) for host in crowd.lab.hosts}


@pytest.fixture
def crowd(_crowd: tuple[Crowd, dict[str, object]]) -> Iterator[Crowd]:
    """All five networks on two hosts, in the same state before and after each test."""
    crowd, states = _crowd
    yield crowd
    before = states.copy()
    states |= {host.name: state_of(host) for host in crowd.lab.hosts}
    assert states == before
    for name, log in crowd.logs().items():
        assert "Traceback" not in log, name


PAIR = re.compile(r"flannel\d+-\w+")
"""The devices of a shortcut."""


def state_of(host: Host) -> dict[str, object]:
    """All that daemons share on a host, but for what comes and goes with a shortcut."""
    devices = {it["ifname"]: it for it in show(host, "ip", "link", "show") if not PAIR.fullmatch(it["ifname"])}
    rules = [host.run(["iptables", "-t", table, "-S"]).stdout.splitlines() for table in ("nat", "filter")]
    routes = show(host, "ip", "-4", "route", "show", "table", "all")
    return {
        "devices": {name: (link.get("ifalias"), link["mtu"], "UP" in link["flags"]) for name, link in devices.items()},
        "routes": sorted(json.dumps(route, sort_keys=True) for route in routes if route.get("type") != "local"),
        "neighbours": {name: permanent_neighbours(host, name) for name in devices if name.startswith("flannel.")},
        "fdb": {name: sorted(fdb(host, name)) for name in devices if name.startswith("flannel.")},
        # The order of the networks in a chain is that of the starts.
        "rules": [sorted(of_table) for of_table in rules],
        "nft": host.run(["nft", "list", "tables"]).stdout,
    }


def permanent_neighbours(host: Host, device: str) -> dict[str, str | None]:
    """Those that somebody has set.  The kernel makes others for a while, for pings that nobody answers."""
    return {ip: mac for ip, (mac, state) in neighbours(host, device).items() if state == ["PERMANENT"]}


def index_of(host: Host, device: str) -> int:
    return int(show(host, "ip", "link", "show", device)[0]["ifindex"])


# --- side by side


def test_all_networks_carry_packets_each_its_own_way(crowd: Crowd) -> None:
    crowd.ping_all()
    for network in FIVE:
        one, two = crowd.on(1, network), crowd.on(2, network)
        crowd.ping(network, "-M", "do", "-s", str(network.mtu - 28))
        (way,) = show(one.host, "ip", "route", "get", str(two.gateway.ip))
        assert way["dev"] == (network.device or "eth0")
        if network.device is not None:
            assert one.status()["backend"]["device"] == network.device
            (link,) = show(one.host, "ip", "link", "show", network.device)
            assert link["ifalias"] == f"udptun {network.network}"


def test_one_network_is_not_reached_through_the_device_of_another(crowd: Crowd) -> None:
    one = crowd.lab.host(1)
    for through, to in ((VX, GW), (VX, V2), (UA, UB), (UB, VX)):
        command = ["ping", "-c", "1", "-W", "1", "-I", str(through.device), str(crowd.on(2, to).gateway.ip)]
        assert one.run(command, check=False).returncode != 0


def test_each_daemon_writes_its_own_subnet_env(crowd: Crowd) -> None:
    for daemon in crowd.daemons:
        env, network = daemon.env(), daemon.network
        assert list(env) == ["FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"]
        assert (env["FLANNEL_NETWORK"], env["FLANNEL_MTU"]) == (network.network, str(network.mtu))
        assert daemon.status()["lease"]["subnet"] == str(daemon.gateway.network)
        assert env["FLANNEL_SUBNET"].startswith(f"{network.prefix}.")


def test_daemons_leave_each_others_things_alone(crowd: Crowd) -> None:
    """They deleted each other's routes, devices and rules for ever, with 30 lines a second in each log."""
    before = {host.name: state_of(host) for host in crowd.lab.hosts}
    logs = crowd.logs()
    monitor = ["timeout", str(QUIET_S), "ip", "monitor", "link", "address", "route"]
    assert crowd.lab.host(1).run(monitor, check=False).stdout == ""
    assert {host.name: state_of(host) for host in crowd.lab.hosts} == before
    assert crowd.logs() == logs
    for daemon in crowd.daemons:
        assert daemon.status()["problems"] == []


def test_each_network_has_flannels_rules_as_a_block(crowd: Crowd) -> None:
    host = crowd.lab.host(1)
    for table, chain, expected in (
        ("nat", "FLANNEL-POSTRTG", masquerade_rules),
        ("filter", "FLANNEL-FWD", lambda network, _subnet: forward_rules(network)),
    ):
        rules = host.run(["iptables", "-t", table, "-S", chain]).stdout.splitlines()[1:]
        blocks = [expected(daemon.network.network, str(daemon.gateway.network))[1:] for daemon in daemons_of(crowd, 1)]
        assert sorted(rules) == sorted(rule for block in blocks for rule in block)
        for block in blocks:
            start = next(n for n in range(len(rules)) if rules[n : n + len(block)] == block)
            assert rules[start : start + len(block)] == block
        every = host.run(["iptables", "-t", table, "-S"]).stdout
        assert every.count(f"-j {chain}\n") == 1


def daemons_of(crowd: Crowd, host: int) -> list[Daemon]:
    return [daemon for daemon in crowd.daemons if daemon.host is crowd.lab.host(host)]


def test_every_network_is_masqueraded_on_its_way_out(crowd: Crowd) -> None:
    """The gateway of the underlay knows no way to the networks: it answers the host's own address alone."""
    for daemon in daemons_of(crowd, 1):
        ping(daemon.host, UNDERLAY[1], "-I", str(daemon.gateway.ip))


def test_damaged_rules_of_all_are_repaired_once_and_by_nobody_else(crowd: Crowd) -> None:
    host = crowd.lab.host(1)
    before = state_of(host)
    logs = {daemon.network.name: daemon.log() for daemon in daemons_of(crowd, 1)}
    for command in (
        ["-F", "FLANNEL-FWD"],
        ["-t", "nat", "-F", "FLANNEL-POSTRTG"],
        ["-D", "FORWARD", "-m", "comment", "--comment", "flanneld forward", "-j", "FLANNEL-FWD"],
    ):
        host.run(["iptables", *command])
    wait_until("the rules", lambda: state_of(host) == before, 20)
    lines = {
        name: [line for line in log.splitlines() if "firewall" in line]
        for name, log in (
            (it.network.name, it.log().removeprefix(logs[it.network.name])) for it in daemons_of(crowd, 1)
        )
    }
    print(lines)
    assert all(1 <= len(of_one) <= 3 for of_one in lines.values())
    assert not any(" W " in line for of_one in lines.values() for line in of_one)
    # What one of them does not want is none of the others' business.
    host.run(["iptables", "-D", "FLANNEL-FWD", "-s", UB.network, *COMMENT, "-j", "ACCEPT"])
    wait_until("the rule", lambda: state_of(host) == before, 10)
    now = {it.network.name: it.log() for it in daemons_of(crowd, 1)}
    assert "other rules in chain FLANNEL-FWD" in now["ub"].splitlines()[-1]
    assert now["ua"].count("firewall rules repaired") - logs["ua"].count("firewall rules repaired") <= 3


COMMENT = ["-m", "comment", "--comment", "flanneld forward"]


# --- one of them comes and goes


@pytest.mark.parametrize("network", FIVE, ids=lambda it: it.name)
def test_daemon_that_is_killed_and_started_finds_its_own_device_again(crowd: Crowd, network: Network) -> None:
    daemon = crowd.on(1, network)
    host = daemon.host
    index = index_of(host, network.device) if network.device else None

    def others() -> dict[str, str]:
        """Their logs, without what comes a moment after a start with --shortcut: it is on, and the lease says so."""
        news = re.compile(r"^.* (peer added|shortcut on) .*\n", re.MULTILINE)
        return {name: news.sub("", log) for name, log in crowd.logs().items() if name != f"h1/{network.name}"}

    before = others()
    daemon.stop(signal.SIGKILL)
    crowd.ping_all()
    daemon.start()
    daemon.wait_ready()
    crowd.ping_all()
    assert (index_of(host, network.device) if network.device else None) == index
    assert others() == before


def test_daemon_whose_datapath_is_killed_too_finds_its_own_device_again(crowd: Crowd) -> None:
    daemon, other = crowd.on(1, UB), crowd.on(1, UA)
    host, index = daemon.host, index_of(daemon.host, "flannel1")
    datapath = daemon.status()["datapath"]
    daemon.stop(signal.SIGKILL)
    kill(host, *datapath["standby_pids"])
    kill(host, datapath["pid"])
    crowd.ping(UA)
    daemon.start()
    daemon.wait_ready()
    wait_until("the network", lambda: passes(crowd, UB), 10)
    assert index_of(host, "flannel1") == index
    assert other.status()["datapath"]["pid"] not in (datapath["pid"], *datapath["standby_pids"])


def test_device_that_was_deleted_without_a_daemon_is_not_taken_for_another_daemons(crowd: Crowd) -> None:
    """flannel0 is free while its daemon is away; who comes back later takes a free name or its own."""
    first, second = crowd.on(1, UA), crowd.on(1, UB)
    first.stop()
    first.host.machine.at().ip("link delete flannel0")
    second.restart()
    assert second.status()["backend"]["device"] == "flannel1"
    first.start()
    first.wait_ready()
    assert first.status()["backend"]["device"] == "flannel0"
    wait_until("both", lambda: passes(crowd, UA) and passes(crowd, UB), 10)


@pytest.mark.parametrize("network", FIVE, ids=lambda it: it.name)
def test_cleanup_of_one_leaves_the_others_alone_and_names_them(crowd: Crowd, network: Network) -> None:
    daemon = crowd.on(1, network)
    host, before = daemon.host, state_of(daemon.host)
    others = [it for it in FIVE if it is not network]
    logs = {name: log for name, log in crowd.logs().items() if not name.endswith(network.name)}
    daemon.stop()
    said = daemon.cleanup().splitlines()
    print("\n".join(said))
    for other in others:
        crowd.ping(other)
        if other.device is not None:
            assert f"left {other.device} alone: it belongs to the udptun daemon of {other.network}" in said
    assert any(line.startswith("left the routes of other udptun daemons alone: 10.1") for line in said)
    networks = ", ".join(sorted(other.network for other in others))
    assert f"left the firewall rules of {networks} alone" in said
    for left in (
        host.run(["ip", "route", "show", "table", "all", "proto", "158"]).stdout,
        *(host.run(["iptables", "-t", table, "-S"]).stdout for table in ("nat", "filter")),
    ):
        assert f"{network.prefix}." not in left
        assert all(other.prefix in left for other in others)
    assert network.device is None or show(host, "ip", "link", "show", network.device) == []
    assert not host.path(daemon.run_dir).exists()
    assert not host.path(daemon.subnet_file).exists()
    assert {name: log for name, log in crowd.logs().items() if not name.endswith(network.name)} == logs
    daemon.start()
    daemon.wait_ready()
    wait_until("the network", lambda: passes(crowd, network), 20)
    wait_until("the state before", lambda: state_of(host) == before, 10)


# --- what is refused, before anything is touched


@pytest.fixture
def host() -> Iterator[Host]:
    """One host without a daemon."""
    with Lab(f"m{os.getpid()}", n_hosts=1) as lab:
        lab.host(1).path("/run/flannel").mkdir()
        yield lab.host(1)


def started(host: Host, network: Network, *flags: str) -> Daemon:
    daemon = Daemon(host, network)
    daemon.start(*flags)
    daemon.wait_ready()
    return daemon


def like(network: Network, prefix: str, backend: Mapping[str, object] | None = None) -> Network:
    """Another network with directories of its own."""
    return Network("other", prefix, backend or network.backend, None)


@pytest.mark.parametrize("prefix", ["10.11.0.0/16", "10.0.0.0/8", "10.11.128.0/17"], ids=["same", "wider", "narrower"])
def test_overlapping_network_is_refused_while_the_other_daemon_runs_and_when_it_is_gone(
    host: Host, prefix: str
) -> None:
    first = started(host, VX)
    assert first.process is not None
    second = Daemon(host, like(GW, "10.12"))
    conf = {"Network": prefix, "SubnetMin": "10.11.130.0", "Backend": {"Type": "host-gw"}}
    host.path(f"{LAB_DIR}/other.json").write_text(json.dumps(conf))
    before = state_of(host)
    what = "it" if prefix == VX.network else f"{VX.network}, which overlaps it"
    said = second.refused()
    pid = first.status()["pid"]
    who = f"another udptun daemon on this host{f' (pid {pid})' if prefix == VX.network else ''}"
    assert said == f"Network: {prefix} cannot be ours: {who} has {what}; give each daemon a Network of its own"
    first.stop()
    if prefix != VX.network:
        # With the same Network it could be a daemon that has got other directories.
        assert second.refused() == (
            f"Network: {prefix} cannot be ours: the udptun daemon that made flannel.1 has {what}; give each daemon a "
            "Network of its own; `udptun cleanup` with its flags removes what it has left"
        )
    assert state_of(host) == before
    assert not host.path(second.subnet_file).exists()
    assert not host.path("/var/lib/udptun/other/networks").exists()
    assert first.cleanup()
    second.start()
    second.wait_ready()


def test_port_vni_and_directories_of_another_daemon_are_refused_with_one_line(host: Host) -> None:
    udp, vxlan = started(host, UA), started(host, VX)
    before, logs = state_of(host), (udp.log(), vxlan.log())
    same_port = Daemon(host, like(UA, "10.20"))
    assert "cannot bind the tunnel's socket to 192.168.77.11 UDP port 8285: EADDRINUSE" in same_port.refused()
    same_vni = Daemon(host, like(VX, "10.20"))
    assert same_vni.refused() == (
        "flannel.1 belongs to the udptun daemon of 10.11.0.0/16; "
        "give each Network of this host a Backend.VNI of its own"
    )
    vtep = Daemon(host, like(VX, "10.20", {"Type": "vxlan", "Userspace": True}))
    assert vtep.refused() == same_vni.refused()
    other = Daemon(host, like(GW, "10.20"))
    pid = udp.status()["pid"]
    for flag, path in (
        ("--run-dir", udp.run_dir),
        ("--state-dir", "/var/lib/udptun/ua"),
        ("--subnet-file", udp.subnet_file),
    ):
        remedy = "a --run-dir, --state-dir and --subnet-file" if flag == "--run-dir" else f"a {flag}"
        line = f"another udptun daemon (pid {pid}) uses {path}; stop it, or give this one {remedy} of its own"
        assert other.refused(f"{flag}={path}") == line
        assert other.refused(f"{flag}={path}", command="cleanup") == line
    assert state_of(host) == before
    assert (udp.log(), vxlan.log()) == logs
    # The link may be another one: it is the directory that counts.
    host.path("/run/link").symlink_to("/var/lib/udptun/ua")
    assert "uses /run/link;" in other.refused("--state-dir=/run/link")
    other.start()
    other.wait_ready()
    assert {name for name in state_of(host)["devices"] if name.startswith("flannel")} == {"flannel0", "flannel.1"}


def test_two_userspace_vteps_with_ports_of_their_own_run_beside_each_other(host: Host) -> None:
    one = started(host, Network("t1", "10.11", {"Type": "vxlan", "Userspace": True}, "flannel.1"))
    vni_alone = Daemon(host, Network("t2", "10.12", {"Type": "vxlan", "Userspace": True, "VNI": 2}, "flannel.2"))
    assert "cannot bind the tunnel's socket to 192.168.77.11 UDP port 8472: EADDRINUSE" in vni_alone.refused()
    started(host, Network("t3", "10.13", {"Type": "vxlan", "Userspace": True, "VNI": 3, "Port": 8473}, "flannel.3"))
    assert one.status()["problems"] == []
    devices = state_of(host)["devices"]
    assert {name for name in devices if name.startswith("flannel")} == {"flannel.1", "flannel.3"}


def test_flannel0_of_flanneld_is_no_reason_for_another_name(host: Host) -> None:
    """It would go on taking the packets: flanneld itself makes flannel1 beside it and loses them in silence."""
    started(host, UB)
    host.machine.at().ip("link set flannel0 name flannel7", "tuntap add flannel0 mode tun")
    assert "flannel0 is there already and is not ours" in Daemon(host, UA).refused()


@pytest.mark.alone  # four starts at once, each within the deadline of one
def test_daemons_that_start_at_the_same_time_get_devices_of_their_own(host: Host) -> None:
    """Both found no flannel0, and the second attached its queues to the device of the first."""
    networks = [Network(f"s{n}", f"10.{20 + n}", {"Type": "udp", "Port": 9000 + n}, None) for n in range(4)]
    daemons = [Daemon(host, network) for network in networks]
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
    devices = {daemon.status()["backend"]["device"]: daemon for daemon in daemons}
    assert sorted(devices) == [f"flannel{n}" for n in range(4)]
    for device, daemon in devices.items():
        (addresses,) = show(host, "ip", "-4", "address", "show", "dev", device)
        assert [it["local"] for it in addresses["addr_info"]] == [str(daemon.gateway.network.network_address)]


def test_name_that_a_stranger_holds_does_not_keep_a_daemon_from_starting(host: Host) -> None:
    """Every user can hold an abstract name."""
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(3)]\n"
        "names = ['network 10.14.0.0/16', 'start', 'firewall']\n"
        "for one, name in zip(held, names): one.bind('\\0udptun ' + name); one.listen()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    stranger = host.popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == "held\n"
    daemon = started(host, UA)
    assert "other daemons on this host cannot see a name of ours name='network 10.14.0.0/16'" in daemon.log()
    assert daemon.status()["problems"] == []
    daemon.stop()
    daemon.cleanup()
    stranger.communicate(timeout=10)


# --- cleanup, and networks that change


def test_cleanup_without_a_daemon_of_its_own_takes_nothing_and_names_what_it_leaves(host: Host) -> None:
    udp = started(host, UA)
    nobody = Daemon(host, like(GW, "10.20"))
    for stop in (False, True):
        if stop:
            udp.stop()
        before = state_of(host)
        workers = datapath_pids(host)
        said = [line for line in nobody.cleanup().splitlines() if not PAIR.search(line)]
        assert said == [
            "left flannel0 alone: it belongs to the udptun daemon of 10.14.0.0/16",
            "left the routes of other udptun daemons alone: 10.14.0.0/16, 10.14.0.0/16",
            "left the firewall rules of 10.14.0.0/16 alone",
            "no daemon with /run/udptun-other, /var/lib/udptun/other and /run/flannel/other.env has left anything; "
            "give the directories of the one whose things shall go",
        ]
        assert state_of(host) == before
        assert datapath_pids(host) == workers
    udp.cleanup()
    assert nobody.cleanup() == ""


def test_cleanup_with_the_subnet_env_of_another_daemon_leaves_it(host: Host) -> None:
    """As `--subnet-file` left out: the default is that of the first daemon."""
    first, second = started(host, UA), started(host, GW)
    first.stop()
    second.stop()
    said = second.cleanup("--subnet-file", first.subnet_file).splitlines()
    assert f"left {first.subnet_file} alone: it is about {UA.network}" in said
    assert host.path(first.subnet_file).exists()
    assert "flannel0" in state_of(host)["devices"]
    first.start()
    first.wait_ready()


def test_network_that_changes_leaves_nothing_behind_and_can_be_had_by_another_daemon(host: Host) -> None:
    beside = started(host, VX)
    daemon = started(host, UA)
    daemon.stop()
    moved = {"Network": "10.30.0.0/16", "Backend": {"Type": "vxlan", "VNI": 9}}
    host.path(f"{LAB_DIR}/ua.json").write_text(json.dumps(moved))
    daemon.start()
    daemon.wait_ready()
    everything = json.dumps(state_of(host))
    assert "10.14." not in everything
    assert "flannel0" not in everything
    assert "10.11." in everything
    assert host.path("/var/lib/udptun/ua/networks").read_text() == "10.30.0.0/16\n"
    heir = started(host, Network("heir", "10.14", {"Type": "udp", "Port": 8287}, "flannel0"))
    before, log = state_of(host), daemon.log()
    host.run(["iptables", "-F", "FLANNEL-FWD"])
    wait_until("the rules", lambda: state_of(host) == before, 10)
    daemon.restart()
    assert state_of(host) == before
    assert heir.status()["problems"] == beside.status()["problems"] == []
    assert "10.14." not in daemon.log().removeprefix(log)


# --- upgrade


def make_it_look_like_an_older_builds(daemon: Daemon, alias: str) -> None:
    """Builds that knew one daemon a host marked VXLAN devices alone, without a Network, and remembered no Network."""
    host = daemon.host
    host.run(["ip", "link", "set", str(daemon.network.device), "alias", alias])
    host.path(f"/var/lib/udptun/{daemon.network.name}/networks").unlink()


@pytest.mark.parametrize(
    ("network", "alias"),
    [(VX, "udptun"), (Network("t1", "10.11", {"Type": "vxlan", "Userspace": True}, "flannel.1"), ""), (UA, "")],
    ids=["vxlan", "vtep", "udp"],
)
def test_what_an_older_build_has_left_is_taken_over(host: Host, network: Network, alias: str) -> None:
    daemon = started(host, network)
    before, index, workers = state_of(host), index_of(host, str(network.device)), datapath_pids(host)
    daemon.stop(signal.SIGKILL)
    make_it_look_like_an_older_builds(daemon, alias)
    log = daemon.log()
    # A daemon of another network, started first, takes it for nothing of its own.
    beside = started(host, UB)
    assert beside.status()["backend"]["device"] == ("flannel1" if network is UA else "flannel0")
    daemon.start()
    daemon.wait_ready()
    assert index_of(host, str(network.device)) == index
    assert datapath_pids(host) >= workers
    changed = [line for line in daemon.log().removeprefix(log).splitlines() if "kernel state changed" in line]
    assert len(changed) <= 1
    after = state_of(host)
    assert {key: value for key, value in after["devices"].items() if key in before["devices"]} == before["devices"]
    assert set(before["routes"]) <= set(after["routes"])


def test_what_an_older_build_has_left_of_another_network_is_removed(host: Host) -> None:
    """Upgraded and given another Network at once; subnet.env still names the old one."""
    daemon = started(host, VX)
    daemon.stop()
    make_it_look_like_an_older_builds(daemon, "udptun")
    subnet_env = host.path(daemon.subnet_file).read_text()
    conf = {"Network": "10.30.0.0/16", "Backend": {"Type": "udp"}}
    host.path(f"{LAB_DIR}/vx.json").write_text(json.dumps(conf))
    daemon.start()
    host.path(daemon.subnet_file).write_text(subnet_env)
    wait_until("the new Network", lambda: daemon.status().get("network") == "10.30.0.0/16", 20)
    everything = json.dumps(state_of(host))
    assert "10.11." not in everything
    assert "flannel.1" not in everything


def test_cleanup_removes_what_an_older_build_has_left(host: Host) -> None:
    daemon, beside = started(host, VX), started(host, UB)
    daemon.stop()
    make_it_look_like_an_older_builds(daemon, "udptun")
    said = daemon.cleanup().splitlines()
    assert "deleted link flannel.1" in said
    assert "left flannel0 alone: it belongs to the udptun daemon of 10.15.0.0/16" in said
    everything = json.dumps(state_of(host))
    assert "10.11." not in everything
    assert beside.status()["problems"] == []

"""Masquerading and forwarding as pods and the outside world see them, and rules that stay whatever is done to them.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
                                                 |
                                                eth0 [h3] the outside: 203.0.113.1, which knows no way to the pods

The rules are looked at with iptables-save and `nft`, what they do with sockets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from traffic import CLEANUP, REAL_TIME, cpu_s, ping, read_status, seconds_until, socket_in, udp_flow

from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

OUTSIDE = "203.0.113.1"
DAEMON = [sys.executable, "-m", "udptun", "daemon", "--store", f"local:{LEASES}", "--net-config-path", str(NET_CONF)]

FOREIGN = {
    "nat": [
        "-A POSTROUTING -s 172.17.0.0/16 -o docker0 -j MASQUERADE",
        '-A POSTROUTING -m comment --comment "about FLANNEL-POSTRTG" -j KUBE-POSTROUTING',
        "-A KUBE-POSTROUTING -s 10.96.0.0/12 -j RETURN",
    ],
    "filter": ["-A FORWARD -i docker0 -j ACCEPT", "-A FORWARD -s 10.9.0.0/16 -j DROP"],
}
"""Rules of others that must outlive everything."""


@dataclass(frozen=True)
class Flavour:
    """One way for the rules to be in the kernel.  `iptables`: the program called so on the hosts."""

    name: str
    iptables: str
    nftables: bool = False
    resync_s: int = 600
    """With notices there is a repair long before."""

    def command(self) -> list[str]:
        # The host's iptables is the one that is found first.
        path = f"/run/udptun-lab/{self.iptables}:{os.environ['PATH']}"
        return [*REAL_TIME, "env", f"PATH={path}", *DAEMON, "--ip-masq", f"--iptables-resync={self.resync_s}"]

    def net_conf(self) -> dict[str, object]:
        return {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}, "EnableNFTables": self.nftables}


FLAVOURS = [
    Flavour("iptables-nft", "iptables-nft"),
    # The kernel tells nothing about these; the timer alone looks.
    Flavour("iptables-legacy", "iptables-legacy", resync_s=1),
    Flavour("nftables", "iptables-nft", nftables=True),
]


def make_iptables(lab: Lab) -> None:
    """Directories for a PATH in which `iptables` is the one program or the other."""
    for program in ("iptables-nft", "iptables-legacy"):
        directory = lab.host(1).path(f"/run/udptun-lab/{program}")
        directory.mkdir()
        for suffix in ("", "-save", "-restore"):
            tool = shutil.which(f"{program}{suffix}")
            if tool is None:
                pytest.skip(f"needs {program}{suffix}")
            (directory / f"iptables{suffix}").symlink_to(tool)


def skip_without_legacy(lab: Lab) -> None:
    # At the switch, since looking makes the tables.
    if lab.switch.run(["iptables-legacy", "-S"], check=False).returncode != 0:
        pytest.skip("needs a kernel with legacy iptables")


@pytest.fixture(scope="module", params=FLAVOURS, ids=lambda flavour: flavour.name)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    chosen: Flavour = request.param
    return chosen


@pytest.fixture(scope="module")
def _world(flavour: Flavour) -> Iterator[Lab]:
    with Lab(f"w{os.getpid()}", net_conf=flavour.net_conf()) as lab:
        make_iptables(lab)
        if flavour.iptables == "iptables-legacy":
            skip_without_legacy(lab)
        for host in lab.hosts:
            host.run([flavour.iptables, "-P", "FORWARD", "DROP"])
            add_foreign_rules(host, flavour.iptables)
            host.start_daemon(command=flavour.command())
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        outside = lab.add_host()
        outside.machine.at().ip(f"addr add {OUTSIDE}/32 dev lo")
        lab.switch.at().ip(f"route add {OUTSIDE} via {outside.underlay_address}")
        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        yield lab


@pytest.fixture
def world(_world: Lab, flavour: Flavour) -> Iterator[Lab]:
    """Two hosts with pods that forward nothing by default, others' rules, and the outside; shared by the tests."""
    yield _world
    for host in _world.hosts[:2]:
        assert foreign_rules(host, flavour.iptables) == FOREIGN


def add_foreign_rules(host: Host, iptables: str) -> None:
    host.run([iptables, "-t", "nat", "-N", "KUBE-POSTROUTING"])
    for table, rules in FOREIGN.items():
        text = "".join(f"{rule}\n" for rule in rules)
        host.run([f"{iptables}-restore", "--noflush"], input=f"*{table}\n{text}COMMIT\n")


def save(host: Host, table: str, iptables: str) -> list[str]:
    return host.run([f"{iptables}-save", "-t", table]).stdout.splitlines()


def foreign_rules(host: Host, iptables: str) -> dict[str, list[str]]:
    return {
        table: [line for line in save(host, table, iptables) if line.startswith("-A") and "flanneld" not in line]
        for table in ("nat", "filter")
    }


def nft_table(host: Host) -> str:
    """The table as nft lists it, "" when there is none."""
    return host.run(["nft", "list", "table", "ip", "flannel-ipv4"], check=False).stdout


def flannels(host: Host, flavour: Flavour) -> list[str]:
    """Every line in the kernel about flannel's rules, wherever."""
    lines = nft_table(host).splitlines()
    for iptables in ("iptables-nft", "iptables-legacy"):
        for table in ("nat", "filter"):
            # Looking makes the tables of legacy iptables.
            if iptables == flavour.iptables or iptables == "iptables-nft":
                lines += [line for line in save(host, table, iptables) if "flanneld" in line or line[:9] == ":FLANNEL-"]
    return lines


def masquerade_rules(network: str, subnet: str) -> list[str]:
    comment = '-m comment --comment "flanneld masq"'
    return [
        f"-A POSTROUTING {comment} -j FLANNEL-POSTRTG",
        f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {subnet} -d {network} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {network} -d {subnet} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG ! -s {network} -d {subnet} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {network} ! -d 224.0.0.0/4 {comment} -j MASQUERADE --random-fully",
        f"-A FLANNEL-POSTRTG ! -s {network} -d {network} {comment} -j MASQUERADE --random-fully",
    ]


def forward_rules(network: str) -> list[str]:
    comment = '-m comment --comment "flanneld forward"'
    return [
        f"-A FORWARD {comment} -j FLANNEL-FWD",
        f"-A FLANNEL-FWD -s {network} {comment} -j ACCEPT",
        f"-A FLANNEL-FWD -d {network} {comment} -j ACCEPT",
    ]


def expected(host: Host, flavour: Flavour) -> list[str]:
    """What `flannels` gives when all is well, word by word."""
    network, subnet = "10.244.0.0/16", str(host.subnet)
    masquerade, forward = masquerade_rules(network, subnet), forward_rules(network)
    if not flavour.nftables:
        return [":FLANNEL-POSTRTG - [0:0]", *masquerade, ":FLANNEL-FWD - [0:0]", *forward]
    return [
        "table ip flannel-ipv4 {",
        '\tcomment "rules for flannel-ipv4"',
        "\tchain postrtg {",
        '\t\tcomment "chain to manage traffic masquerading by flannel"',
        "\t\ttype nat hook postrouting priority srcnat; policy accept;",
        "\t\tmeta mark & 0x00004000 == 0x00004000 return",
        f"\t\tip saddr {subnet} ip daddr {network} return",
        f"\t\tip saddr {network} ip daddr {subnet} return",
        f"\t\tip saddr != {network} ip daddr {subnet} return",
        f"\t\tip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random",
        f"\t\tip saddr != {network} ip daddr {network} masquerade fully-random",
        "\t}",
        "",
        "\tchain forward {",
        '\t\tcomment "chain to accept flannel traffic"',
        "\t\ttype filter hook forward priority filter; policy accept;",
        f"\t\tip saddr {network} accept",
        f"\t\tip daddr {network} accept",
        "\t}",
        "}",
        # FORWARD of iptables drops, and no other table can help that.
        ":FLANNEL-FWD - [0:0]",
        *forward,
    ]


def repairs(host: Host) -> list[str]:
    return re.findall("firewall rules repaired found='?\"?(.*?)['\"]?$", host.daemon_log(), re.MULTILINE)


def seen_from(client: Host | Pod, server: Host | Pod, address: object, port: int, source: str = "") -> str:
    """The client's address as the server sees it, over a TCP connection to `address`.  Raises OSError without one."""
    with socket_in(server, socket.SOCK_STREAM) as listener, socket_in(client, socket.SOCK_STREAM) as connection:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", 80))
        listener.listen()
        listener.settimeout(10)
        connection.settimeout(10)
        if source:
            connection.bind((source, 0))
        connection.connect((str(address), port))
        accepted, peer = listener.accept()
        with accepted:
            # The way back as well.
            accepted.sendall(b"hello")
            assert connection.recv(16) == b"hello"
        return str(peer[0])


# --- what the rules are and do


def test_rules_are_flannels_word_by_word(world: Lab, flavour: Flavour) -> None:
    for host in world.hosts[:2]:
        assert flannels(host, flavour) == expected(host, flavour)
    assert world.host(1).subnet_env()["FLANNEL_IPMASQ"] == "true"
    form = "nftables" if flavour.nftables else "iptables"
    assert read_status(world.host(1))["firewall"] == {"form": form, "masquerade": True, "forward": True, "repairs": 0}


def test_pods_reach_the_outside_with_their_hosts_address_and_each_other_with_their_own(world: Lab) -> None:
    one, two, outside = world.hosts
    pod, other = one.pod(1), two.pod(1)
    assert seen_from(pod, outside, OUTSIDE, 80) == str(one.underlay_address)
    assert seen_from(other, outside, OUTSIDE, 80) == str(two.underlay_address)
    ping(pod, OUTSIDE)
    assert seen_from(pod, other, other.address, 80) == str(pod.address)
    assert seen_from(other, pod, pod.address, 80) == str(other.address)


def test_hosts_reach_pods_here_and_there(world: Lab) -> None:
    one, two, _ = world.hosts
    here, there = one.pod(1), two.pod(1)
    assert seen_from(one, here, here.address, 80) == str(one.gateway.ip)
    assert seen_from(one, there, there.address, 80) == str(one.subnet.network_address)
    # From its own address a host is nobody that the pod could answer through the overlay: masqueraded.
    assert seen_from(one, there, there.address, 80, str(one.underlay_address)) == str(one.subnet.network_address)


def test_published_port_leads_to_pods_here_and_there(world: Lab, flavour: Flavour) -> None:
    one, two, outside = world.hosts
    here, there = one.pod(1), two.pod(1)
    publish = [flavour.iptables, "-t", "nat", "-{}", "PREROUTING", "-p", "tcp", "-d", str(one.underlay_address)]
    ports = {8080: here, 8081: there}
    rules = [[*publish, "--dport", str(port), "-j", "DNAT", "--to", f"{pod.address}:80"] for port, pod in ports.items()]
    with ExitStack() as undo:
        for rule in rules:
            one.run([word.format("A") for word in rule])
            undo.callback(one.run, [word.format("D") for word in rule])
        # A pod of this host answers through it anyway, so it may see who asks; another host's could not.
        assert seen_from(outside, here, one.underlay_address, 8080, OUTSIDE) == OUTSIDE
        assert seen_from(outside, there, one.underlay_address, 8081, OUTSIDE) == str(one.subnet.network_address)


# --- what is done to them


FORWARD_JUMP = '-m comment --comment "flanneld forward" -j FLANNEL-FWD'
MASQ_JUMP = '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
IPTABLES_DAMAGE: list[tuple[str, dict[str, list[str]]]] = [
    ("flushed", {"nat": ["-F FLANNEL-POSTRTG"], "filter": ["-F FLANNEL-FWD"]}),
    ("a rule gone", {"nat": ["-D FLANNEL-POSTRTG 3"]}),
    ("a rule twice", {"filter": ['-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT']}),
    ("out of order", {"filter": ["-D FLANNEL-FWD 1", "-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT"]}),
    ("a foreign rule", {"nat": ["-I FLANNEL-POSTRTG 1 -j ACCEPT"]}),
    ("no jump", {"filter": [f"-D FORWARD {FORWARD_JUMP}"]}),
    ("a second jump", {"nat": [f"-A POSTROUTING {MASQ_JUMP}"]}),
    (
        "chains deleted",
        {
            "filter": [f"-D FORWARD {FORWARD_JUMP}", "-F FLANNEL-FWD", "-X FLANNEL-FWD"],
            "nat": [f"-D POSTROUTING {MASQ_JUMP}", "-F FLANNEL-POSTRTG", "-X FLANNEL-POSTRTG"],
        },
    ),
]
NFT_DAMAGE = [
    ("flushed", ["flush table ip flannel-ipv4"]),
    ("a chain flushed", ["flush chain ip flannel-ipv4 postrtg"]),
    ("a rule twice", ["add rule ip flannel-ipv4 forward ip daddr 10.244.0.0/16 accept"]),
    ("a foreign rule", ["insert rule ip flannel-ipv4 postrtg accept"]),
    ("another policy", ["chain ip flannel-ipv4 forward { policy drop; }"]),
    ("a foreign chain", ["add chain ip flannel-ipv4 other"]),
    ("a chain deleted", ["delete chain ip flannel-ipv4 forward"]),
    ("table deleted", ["delete table ip flannel-ipv4"]),
    ("dormant", ["add table ip flannel-ipv4 { flags dormant; }"]),
]


def damages(flavour: Flavour) -> Iterator[tuple[str, list[str], str]]:
    """What it is called, and a program with its input, which does all of it at once: no repair comes in between."""
    if flavour.nftables:
        for what, commands in NFT_DAMAGE:
            yield what, ["nft", "-f", "-"], "".join(f"{command}\n" for command in commands)
    else:
        for what, tables in IPTABLES_DAMAGE:
            lines = [line for table, rules in tables.items() for line in (f"*{table}", *rules, "COMMIT")]
            yield what, [f"{flavour.iptables}-restore", "--noflush"], "".join(f"{line}\n" for line in lines)


def test_each_damage_is_repaired_with_one_line(world: Lab, flavour: Flavour, figure: Callable[..., None]) -> None:
    host = world.host(1)
    took_s: list[float] = []
    for what, program, text in damages(flavour):
        before = len(repairs(host))
        host.run(program, input=text)
        limit_s = 5 if flavour.resync_s > 5 else 10
        took_s.append(seconds_until(lambda n=before: len(repairs(host)) > n, f"the repair of: {what}", limit_s))
        assert flannels(host, flavour) == expected(host, flavour), what
        assert len(repairs(host)) == before + 1, what
    figure("rules repaired", took_s, "s")
    ping(host.pod(1), OUTSIDE)
    ping(host.pod(1), world.host(2).pod(1).address)


def test_firewall_that_starts_anew_is_joined_again(world: Lab, flavour: Flavour) -> None:
    """As firewalld and a reload of nftables do it: away with everything, then their own rules."""
    host = world.host(2)
    before = len(repairs(host))
    if flavour.iptables == "iptables-legacy":
        # At once: between two commands the daemon may bring its chains back.
        host.run(["iptables-legacy-restore"], input="*nat\nCOMMIT\n*filter\nCOMMIT\n")
    else:
        host.run(["nft", "flush", "ruleset"])
    add_foreign_rules(host, flavour.iptables)
    host.run([flavour.iptables, "-P", "FORWARD", "DROP"])
    wait_until("the rules", lambda: flannels(host, flavour) == expected(host, flavour), 10)
    assert len(repairs(host)) in (before + 1, before + 2)
    assert seen_from(host.pod(1), world.host(3), OUTSIDE, 80) == str(host.underlay_address)


def test_nothing_is_lost_while_rules_are_replaced(world: Lab, flavour: Flavour) -> None:
    """Every packet needs the forward rules: without them FORWARD drops it."""
    host = world.host(1)
    with udp_flow(host.pod(1), world.host(2).pod(1), 1000) as flow:
        for i in range(5):
            before = len(repairs(host))
            if flavour.nftables:
                host.run(["nft", "add", "rule", "ip", "flannel-ipv4", "forward", "ip", "daddr", "10.0.0.1", "accept"])
            host.run([flavour.iptables, "-A", "FLANNEL-FWD", "-d", f"10.0.0.{i}", "-j", "ACCEPT"])
            wait_until("the repair", lambda n=before: len(repairs(host)) > n, 10)
    assert flow.report.lost == []


def test_rules_that_nobody_touches_cost_no_processor_time(world: Lab, flavour: Flavour) -> None:
    """Others' rules change all day long; with notices about them alone nobody looks."""
    host = world.host(2)
    pid = read_status(host)["pid"]
    lines = len(host.daemon_log())
    start = cpu_s(host, pid)
    for _ in range(50):
        for option in ("-A", "-D"):
            host.run([flavour.iptables, "-t", "nat", option, "KUBE-POSTROUTING", "-j", "RETURN"])
    assert cpu_s(host, pid) - start < 0.5
    assert len(host.daemon_log()) == lines


# --- start, end and what is left


@pytest.fixture
def host(host: Host) -> Host:
    """With both kinds of iptables."""
    make_iptables(host.lab)
    return host


def conf(host: Host, network: str = "10.244.0.0/16", nftables: bool = False) -> None:
    text = json.dumps({"Network": network, "Backend": {"Type": "udp"}, "EnableNFTables": nftables})
    host.path(NET_CONF).write_text(text)


def restart(host: Host, command: list[str]) -> None:
    host.stop_daemon()
    host.start_daemon(command=command)
    host.wait_ready()


def test_rules_stay_at_the_end_and_cleanup_removes_them_alone(world: Lab, flavour: Flavour) -> None:
    host = world.host(2)
    host.stop_daemon(signal.SIGKILL)
    assert flannels(host, flavour) == expected(host, flavour)
    host.start_daemon(command=flavour.command())
    host.wait_ready()
    assert "found='nothing to change'" in host.daemon_log().rsplit("firewall rules in place", 1)[1]
    host.stop_daemon()
    assert flannels(host, flavour) == expected(host, flavour)
    said = host.run(CLEANUP).stdout
    assert flannels(host, flavour) == []
    assert "removed leftover chain FLANNEL-FWD\n" in said
    assert "flannel" not in host.run(["nft", "list", "tables"]).stdout
    host.start_daemon(command=flavour.command())
    host.wait_ready()


@pytest.mark.parametrize(
    "order",
    # All: every change from one to another, once.
    [(0, 2, 1, 0), pytest.param((0, 1, 0, 2, 1, 2, 0), marks=pytest.mark.full)],
    ids=["some", "all"],
)
def test_another_form_and_network_leave_nothing_of_those_before(host: Host, order: Sequence[int]) -> None:
    skip_without_legacy(host.lab)
    for n, flavour in enumerate(FLAVOURS[which] for which in order):
        conf(host, f"10.{n}.0.0/16", flavour.nftables)
        if n:
            host.stop_daemon()
        host.start_daemon(command=flavour.command())
        host.wait_ready()
        there = {
            "nftables": nft_table(host),
            **{name: "\n".join(save(host, "nat", name)) for name in ("iptables-nft", "iptables-legacy")},
        }
        assert [name for name, text in there.items() if "FLANNEL" in text or "postrtg" in text] == [flavour.name]
        everything = host.run(["nft", "list", "ruleset"]).stdout + host.run(["iptables-legacy-save"]).stdout
        assert set(re.findall(r"10\.\d+\.0\.0/16", everything)) == {f"10.{n}.0.0/16"}


@pytest.mark.parametrize("by", ["start", "cleanup"])
def test_rules_of_older_flannels_go(host: Host, by: str) -> None:
    """0.12 had no chains; 0.20 put its jumps first."""
    network, subnet = "10.5.0.0/16", "10.5.9.0/24"
    old_nat = [
        f"-A POSTROUTING -s {network} -d {network} -j RETURN",
        f"-A POSTROUTING -s {network} ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
        f"-A POSTROUTING ! -s {network} -d {subnet} -j RETURN",
        f"-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE --random-fully",
    ]
    old_forward = [f"-A FORWARD -s {network} -j ACCEPT", f"-A FORWARD -d {network} -j ACCEPT"]
    comment = '-m comment --comment "flanneld masq"'
    chain = [
        f"-I POSTROUTING {comment} -j FLANNEL-POSTRTG",
        f"-A FLANNEL-POSTRTG -s {network} -d {network} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {network} ! -d 224.0.0.0/4 {comment} -j MASQUERADE --random-fully",
    ]
    add_foreign_rules(host, "iptables")
    text = "\n".join(
        ["*nat", ":FLANNEL-POSTRTG - [0:0]", *old_nat, *chain, "COMMIT", "*filter", *old_forward, "COMMIT", ""]
    )
    host.run(["iptables-restore", "--noflush"], input=text)
    host.path("/run/flannel").mkdir()
    host.path("/run/flannel/subnet.env").write_text(
        f"FLANNEL_NETWORK={network}\nFLANNEL_SUBNET=10.5.9.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
    )
    if by == "cleanup":
        host.run(CLEANUP)
        text = host.run(["iptables-save"]).stdout
        assert "10.5." not in text
        assert ":FLANNEL" not in text
        assert foreign_rules(host, "iptables") == FOREIGN
        return
    host.start_daemon(command=[*DAEMON, "--ip-masq"])
    host.wait_ready()
    rules = [line for table in ("nat", "filter") for line in save(host, table, "iptables") if line.startswith("-A")]
    assert "10.5." not in "\n".join(rules)
    masquerade = masquerade_rules("10.244.0.0/16", str(host.subnet))
    # The jump stays where it was: one is enough, wherever.
    assert [rule for rule in rules if "flanneld masq" in rule] == masquerade
    assert rules[0] == masquerade[0]
    assert foreign_rules(host, "iptables") == FOREIGN


def test_without_ip_masq_there_are_forward_rules_alone_and_without_them_none(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()
    assert flannels(host, FLAVOURS[0]) == [":FLANNEL-FWD - [0:0]", *forward_rules("10.244.0.0/16")]
    assert host.subnet_env()["FLANNEL_IPMASQ"] == "false"
    restart(host, [*DAEMON, "--iptables-forward-rules=false"])
    assert flannels(host, FLAVOURS[0]) == []
    assert read_status(host)["firewall"] == {"form": None, "masquerade": False, "forward": False, "repairs": 0}
    # No rule, no table: nobody's packets pay for what nobody asked for.
    assert host.run(["cat", "/proc/net/ip_tables_names"]).stdout == ""


def test_fully_random_can_be_switched_off(host: Host) -> None:
    host.start_daemon(["--ip-masq", "--ip-masq-fully-random-disable"])
    host.wait_ready()
    rules = "\n".join(save(host, "nat", "iptables"))
    assert rules.count("-j MASQUERADE\n") == 2
    assert "--random-fully" not in rules


def test_host_that_refuses_random_ports_is_masqueraded_without(host: Host) -> None:
    tools = host.path("/run/udptun-lab/iptables-nft")
    (tools / "iptables-restore").rename(tools / "real")
    (tools / "iptables-restore").write_text(
        "#!/bin/sh\nscript=$(cat)\n"
        'case $script in *random-fully*) echo "unknown option --random-fully" >&2; exit 2 ;; esac\n'
        'echo "$script" | iptables-nft-restore "$@"\n'
    )
    (tools / "iptables-restore").chmod(0o755)
    host.start_daemon(command=FLAVOURS[0].command())
    host.wait_ready()
    assert "\n".join(save(host, "nat", "iptables-nft")).count("-j MASQUERADE\n") == 2
    (line,) = (line for line in host.daemon_log().splitlines() if " W " in line)
    assert "masquerading with guessable source ports, as random ones are refused: " in line
    assert line.endswith("ended with status 2: unknown option --random-fully")
    host.run(["iptables-nft", "-t", "nat", "-F", "FLANNEL-POSTRTG"])
    wait_until("the repair", lambda: repairs(host) != [], 5)
    assert "\n".join(save(host, "nat", "iptables-nft")).count("-j MASQUERADE\n") == 2


WITHOUT_TOOLS = [
    *(sys.executable, "-c", "import os, sys; os.environ['PATH'] = '/nowhere'; os.execv(sys.argv[1], sys.argv[1:])"),
    *DAEMON,
]
"""A daemon that finds neither iptables nor nft."""


def test_host_without_iptables_does_without_forward_rules_and_says_so_once(host: Host) -> None:
    host.start_daemon(command=WITHOUT_TOOLS)
    host.wait_ready()
    (line,) = (line for line in host.daemon_log().splitlines() if " W " in line)
    assert line.endswith(
        "no forward rules, the host's firewall decides: iptables is not installed (or not in PATH); it needs root and "
        "iptables 1.6.2 or newer; EnableNFTables in net-conf.json does it with nft, "
        "--ip-masq=false --iptables-forward-rules=false does without"
    )
    assert read_status(host)["problems"] == []
    assert read_status(host)["firewall"]["form"] is None


@pytest.mark.parametrize("flags", [["--ip-masq"], ["--iptables-forward-rules"], []], ids=["masq", "forward", "nft"])
def test_rules_that_were_asked_for_and_cannot_be_set_end_the_start_with_status_1(host: Host, flags: list[str]) -> None:
    conf(host, nftables=not flags)
    failed = host.run([*WITHOUT_TOOLS, *flags], check=False)
    assert failed.returncode == 1
    (line,) = (line for line in failed.stderr.splitlines() if " E " in line)
    tool = "iptables is not installed" if flags else "`nft -j list table ip flannel-ipv4`: nft is not installed"
    assert f"cannot set the firewall's rules: {tool} (or not in PATH); " in line
    assert not host.path("/run/flannel/subnet.env").exists()
    assert not host.path("/sys/class/net/flannel0").exists()


@pytest.mark.parametrize("flavour", [FLAVOURS[0], FLAVOURS[2]], ids=lambda flavour: flavour.name)
def test_start_that_fails_leaves_the_rules_as_they_were(host: Host, flavour: Flavour) -> None:
    conf(host, nftables=flavour.nftables)
    bad = [*flavour.command(), "--subnet-file=/proc/none/subnet.env"]
    failed = host.run(bad, check=False)
    assert failed.returncode == 1
    assert "firewall rules in place" in failed.stderr
    assert flannels(host, flavour) == []
    host.start_daemon(command=flavour.command())
    host.wait_ready()
    host.stop_daemon()
    before = flannels(host, flavour)
    assert host.run(bad, check=False).returncode == 1
    assert flannels(host, flavour) == before != []


def test_rules_that_cannot_be_set_while_it_runs_are_a_problem_until_they_can(host: Host) -> None:
    tools = host.path("/run/udptun-lab/iptables-nft")
    host.start_daemon(command=FLAVOURS[0].command())
    host.wait_ready()
    (tools / "iptables-restore").rename(tools / "away")
    (tools / "iptables-restore").write_text("#!/bin/sh\necho Permission denied >&2\nexit 4\n")
    (tools / "iptables-restore").chmod(0o755)
    host.run(["iptables", "-F", "FLANNEL-FWD"])
    wait_until("the problem", lambda: read_status(host)["problems"] != [], 5)
    problem = "firewall rules: `iptables-restore --noflush -w` ended with status 4: Permission denied"
    assert read_status(host)["problems"] == [problem]
    (tools / "iptables-restore").unlink()
    (tools / "away").rename(tools / "iptables-restore")
    # A change: of flushing an empty chain the kernel tells nothing.
    host.run(["iptables", "-A", "FLANNEL-FWD", "-j", "RETURN"])
    wait_until("it to be over", lambda: read_status(host)["problems"] == [], 5)
    assert flannels(host, FLAVOURS[0]) == expected(host, FLAVOURS[0])
    assert host.daemon_log().count(problem) == 1


@pytest.mark.full
def test_program_that_undoes_every_repair_is_told_once_and_met_by_the_timer_alone(host: Host) -> None:
    host.start_daemon(["--iptables-resync=5"])
    host.wait_ready()
    over = threading.Event()

    def undo() -> None:
        while not over.wait(0.1):
            host.run(["iptables", "-F", "FLANNEL-FWD"])

    opponent = threading.Thread(target=undo)
    opponent.start()
    try:
        wait_until("the problem", lambda: read_status(host)["problems"] != [], 60)
        n_lines = len(host.daemon_log().splitlines())
        start = cpu_s(host, read_status(host)["pid"])
        over.wait(10)
        assert cpu_s(host, read_status(host)["pid"]) - start < 0.5
        assert len(host.daemon_log().splitlines()) == n_lines
    finally:
        over.set()
        opponent.join()


# --- the blackhole route


def test_blackhole_route_stands_behind_cni0s_and_goes_with_its_flag(host: Host) -> None:
    def blackholes() -> list[str]:
        return host.run(["ip", "route", "show", "type", "blackhole"]).stdout.splitlines()

    host.start_daemon(["--ip-blackhole-route"])
    host.wait_ready()
    (line,) = blackholes()
    assert line.split() == ["blackhole", str(host.subnet), "proto", "158", "metric", "4294967295"]
    # No bridge yet: a packet for a pod must not go back into the tunnel it may have come from.
    nobody = host.subnet.network_address + 99
    assert "Invalid argument" in host.run(["ip", "route", "get", str(nobody)], check=False).stderr
    pod = host.add_pod()
    ping(host, pod.address)
    assert f"{nobody} dev cni0" in host.run(["ip", "route", "get", str(nobody)]).stdout
    assert read_status(host)["problems"] == []
    host.run(["ip", "route", "del", "blackhole", str(host.subnet), "metric", "4294967295"])
    wait_until("the route", lambda: blackholes() != [], 5)
    restart(host, DAEMON)
    assert blackholes() == []

"""What an operator reads when something is wrong on a host, and how it ends: one row a fault.

`tests/unit/test_fault_table.py` has the faults that are no rows here, each with its tests.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1

Each fault is done to h1.  Then `udptun status` has its lines under `problem`, the log has each of them once, and the
daemon lives.  When the cause is gone the lines are gone too, and the pods reach each other.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import DHCP_CLIENT, Act, Background, StoppedStandby, lease_of_type, on_pod, shell
from traffic import CLEANUP, cpu_s, is_answered, peers, ping, read_status, socket_in

from udptun.lab.errors import LabError
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import UNDERLAY, Lab

pytestmark = pytest.mark.netns

FLAGS = ["--iptables-resync=1"]

ON_NOTICE_S = 10
"""For what the kernel reports, and what `--iptables-resync` finds.  A second or so is promised; the machine may be
busy."""


@dataclass(frozen=True)
class Fault:
    """`lines` are regular expressions, each for a whole line."""

    name: str
    lines: tuple[str, ...]
    inflict: Act
    heal: Act
    at_start: bool = False
    """The fault is there before the daemon starts."""
    flags: tuple[str, ...] = ()
    is_silent: bool = False
    """The kernel does not report the end of the cause.  The next look finds it, whatever brings the look."""
    gone_s: float = ON_NOTICE_S
    level: str = "W"
    """The letter of the log's line."""


def read_only_sysctls(path: str, value: int, without: str) -> str:
    return (
        rf"sysctl {path} cannot be set to {value} \(EROFS\), so {without}; run `sysctl -w {path}={value}` on the host, "
        r"or give the container a /proc/sys that it can write"
    )


NOTICE = shell("ip link set lo mtu 65535; ip link set lo mtu 65536")
"""Brings a look at the kernel's state."""

HELD_PORT = Background(
    f"exec {sys.executable} -c 'import signal, socket; s = socket.create_server((\"\", 9000)); signal.pause()'"
)


def hold_port(host: Host) -> None:
    HELD_PORT.start(host)
    wait_until("the port to be held", lambda: ":9000 " in host.run(["ss", "-Hltn"]).stdout, 5)


READ_ONLY = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"

class TakenPort:
    """The host moves to an address on which another program has our port."""

    address = UNDERLAY[200]

    def __init__(self) -> None:
        self._undo = ExitStack()

    def inflict(self, host: Host) -> None:
        taken = self._undo.enter_context(socket_in(host, socket.SOCK_DGRAM))
        taken.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
        taken.bind((str(self.address), 8285))
        host.move(self.address)

    def heal(self, _host: Host) -> None:
        self._undo.close()


IP_FREEBIND = 15
"""Bind to an address that the host does not have yet (linux/in.h); Python's socket module lacks it."""
TAKEN_PORT = TakenPort()
STANDBY = StoppedStandby()

FAULTS = [
    # Settings of the kernel.  The device is new, so each one has to be set.
    Fault(
        "/proc/sys read-only",
        (read_only_sysctls("net/ipv4/conf/flannel0/accept_local", 1, "this host and its pods are not told of .*"),),
        shell(READ_ONLY),
        shell("umount /proc/sys"),
        at_start=True,
        is_silent=True,
    ),
    Fault(
        "/proc/sys read-only, IPv6 on",
        (read_only_sysctls("net/ipv6/conf/flannel0/disable_ipv6", 1, "the kernel sends IPv6 router solicitations .*"),),
        shell(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0",
            "sysctl -qw net.ipv4.conf.default.accept_local=1",
            READ_ONLY,
        ),
        shell(
            "umount /proc/sys",
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
            "sysctl -qw net.ipv4.conf.default.accept_local=0",
        ),
        at_start=True,
        is_silent=True,
    ),
    # Forwarding.
    Fault(
        "ip_forward off",
        (r"net\.ipv4\.ip_forward is 0, so no packet passes .*; run `sysctl -w net\.ipv4\.ip_forward=1`, and .*",),
        shell("sysctl -qw net.ipv4.ip_forward=0"),
        shell("sysctl -qw net.ipv4.ip_forward=1"),
    ),
    Fault(
        "forwarding of the pods' bridge and of flannel0 off",
        tuple(
            rf"net/ipv4/conf/{link}/forwarding is 0, so packets that come in by {link} are not forwarded; "
            rf"run `sysctl -w net/ipv4/conf/{link}/forwarding=1`"
            for link in ("flannel0", "cni0")
        ),
        shell("sysctl -qw net.ipv4.conf.cni0.forwarding=0 net.ipv4.conf.flannel0.forwarding=0"),
        shell("sysctl -qw net.ipv4.conf.cni0.forwarding=1 net.ipv4.conf.flannel0.forwarding=1"),
    ),
    # Packet filters of others; which rules count is the matter of test_obstacles.py.
    Fault(
        "a REJECT before flannel's rules",
        (r"rule 1 of FORWARD \(iptables-nft, table filter\) rejects packets between pods here and other hosts; .*",),
        shell("iptables-nft -I FORWARD -j REJECT"),
        shell("iptables-nft -D FORWARD -j REJECT"),
    ),
    Fault(
        "a rule in Docker's chain for users",
        (r"rule 1 of DOCKER-USER \(iptables-nft, table filter\) drops packets from other hosts to pods here; .*",),
        shell(
            "iptables-nft -N DOCKER-USER",
            "iptables-nft -I FORWARD -j DOCKER-USER",
            "iptables-nft -A DOCKER-USER ! -i cni0 -o cni0 -j DROP",
        ),
        shell("iptables-nft -F DOCKER-USER", "iptables-nft -D FORWARD -j DOCKER-USER", "iptables-nft -X DOCKER-USER"),
    ),
    Fault(
        "Docker's rule for a container in table raw",
        (
            r"rule 1 of PREROUTING \(iptables-nft, table raw\) drops some packets from other hosts to pods here; if "
            r"Docker has set it, `\"allow-direct-routing\": true` in daemon\.json ends it; else delete the rule",
        ),
        on_pod("iptables-nft -t raw -A PREROUTING -d {}/32 ! -i cni0 -j DROP"),
        shell("iptables-nft -t raw -F PREROUTING"),
    ),
    Fault(
        "the other iptables drops by its policy",
        (
            r"the policy of FORWARD \(iptables-legacy, table filter\) drops packets between pods here and other "
            r"hosts; .*",
        ),
        shell("iptables-legacy -P FORWARD DROP"),
        shell("iptables-legacy -P FORWARD ACCEPT"),
    ),
    Fault(
        "a table of nftables drops by its policy",
        (
            r"the policy of chain forward \(nft, table inet fw\) drops packets between pods here and other hosts; "
            r"accept the overlay there: `nft insert rule inet fw forward ip saddr 10\.244\.0\.0/16 accept`, and .*",
        ),
        shell(
            "nft add table inet fw",
            "nft 'add chain inet fw forward { type filter hook forward priority 10; policy drop; }'",
        ),
        shell("nft insert rule inet fw forward ip saddr 10.244.0.0/16 accept; nft delete table inet fw"),
    ),
    Fault(
        "FORWARD drops and flannel's rules are not wanted",
        (r"the policy of FORWARD \(iptables-nft, table filter\) drops packets .*; flannel's rules are not there .*",),
        shell("iptables-nft -P FORWARD DROP"),
        shell("iptables-nft -P FORWARD ACCEPT"),
        flags=("--iptables-forward-rules=false",),
    ),
    Fault(
        "a firewall that does not name the tunnel's port",
        (
            r"the rule with handle \d+ of chain in \(nft, table inet fw\) drops packets of peers to UDP port 8285 here "
            r"unless this host has just sent to them; accept the tunnel there: `nft insert rule inet fw in udp dport "
            r"8285 accept`",
        ),
        shell(
            "nft add table inet fw",
            "nft 'add chain inet fw in { type filter hook input priority 10; }'",
            "nft 'add rule inet fw in ct state { established, related } accept'",
            "nft 'add rule inet fw in iif eth0 meta l4proto udp drop'",
        ),
        shell("nft delete table inet fw"),
    ),
    Fault(
        "rules of nft in a chain of iptables",
        (
            r"firewall rules: `iptables -w -t filter -S FORWARD` ended with status 1: .* is incompatible, use 'nft' "
            r"tool\.; rules set with nft hide those of iptables there: give the table of nft another name .*",
        ),
        shell("nft add rule ip filter FORWARD 'ct state vmap { invalid : continue }'"),
        shell(
            "nft delete rule ip filter FORWARD handle "
            "$(nft -a list chain ip filter FORWARD | sed -n 's/.*vmap.* handle //p')"
        ),
    ),
    # Addresses of this host that the peers' packets are not compared with.
    Fault(
        "a local route that is too wide",
        (
            r"packets that peers send from 198\.18\.0\.0/15 are not refused, because so many do not fit; run "
            r"`iptables -t raw -A PREROUTING -i flannel0 -m addrtype --src-type LOCAL ! -s 10\.244\.\d+\.0 -j DROP`",
        ),
        shell("ip route add local 198.18.0.0/15 dev lo"),
        shell("ip route del local 198.18.0.0/15 dev lo"),
    ),
    # The datapath.  What becomes of an active process that is stopped, or of one that dies again and again, is the
    # matter of test_faults.py and tests/datapath/test_processes.py.
    Fault(
        "the standby stopped",
        (
            r"the standby datapath process \d+ is stopped by a signal, so it cannot take over; continue it: "
            r"`kill -CONT \d+`",
        ),
        STANDBY.start,
        STANDBY.stop,
    ),
    # The port of /healthz: the daemon ended.
    Fault(
        "the health port held",
        (r"cannot listen on 0\.0\.0\.0:9000: EADDRINUSE; another program listens there; it is tried again every .*",),
        hold_port,
        HELD_PORT.stop,
        at_start=True,
        flags=("--healthz-port=9000",),
        is_silent=True,
    ),
    Fault(
        "a health address that the host does not have",
        (r"cannot listen on 203\.0\.113\.9:9000: EADDRNOTAVAIL; .*; it is tried again every second, and .*",),
        shell("true"),
        shell("ip address add 203.0.113.9/32 dev lo"),
        at_start=True,
        flags=("--healthz-ip=203.0.113.9", "--healthz-port=9000"),
    ),
    # Others at our device.
    Fault(
        "a DHCP client at flannel0",
        (
            r"another program, a DHCP client perhaps, puts address 169\.254\.9\.9/16 on flannel0 again and again; have "
            r"it leave flannel0 alone: `denyinterfaces flannel0` in dhcpcd\.conf, .*",
            r"another program, a DHCP client perhaps, puts route 0\.0\.0\.0/0 dev flannel0 metric 50 proto 16 on "
            r"flannel0 again and again; .*",
        ),
        DHCP_CLIENT.start,
        DHCP_CLIENT.stop,
        is_silent=True,
        gone_s=30,
    ),
    # Other hosts.
    Fault(
        "a host with another backend type",
        (
            r"peer 192\.168\.77\.200 leases 10\.244\.200\.0/24 for vxlan, this node carries udp: pods of the two do "
            r"not reach each other; give both hosts one Backend\.Type",
        ),
        lease_of_type("vxlan"),
        # As flanneld's udp.
        lease_of_type(""),
    ),
    # The last one, as the host has another address afterwards.
    Fault(
        "the port is taken on a new underlay address",
        (rf"cannot bind the tunnel's socket to {TAKEN_PORT.address} UDP port 8285: EADDRINUSE; `ss -ulpn` shows .*",),
        TAKEN_PORT.inflict,
        TAKEN_PORT.heal,
        gone_s=30,
        level="E",
    ),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts with a pod each, shared by the rows."""
    with Lab(f"w{os.getpid()}") as lab:
        for host in lab.hosts:
            host.start_daemon(FLAGS)
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        yield lab


def problems(host: Host) -> list[str]:
    found: list[str] = read_status(host)["problems"]
    return found


def wait_for_problems(host: Host, expected: Sequence[str]) -> list[str]:
    """Wait until the host has these problem lines and no others; returns them."""
    lines: list[str] = []

    def are_there() -> bool:
        lines[:] = problems(host)
        return len(lines) == len(expected) and all(map(re.fullmatch, expected, lines))

    try:
        wait_until("the problem lines", are_there, ON_NOTICE_S)
    except LabError:
        pytest.fail(f"not the problem lines: {lines}")
    return lines


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: re.sub(r"\W+", "_", fault.name))
def test_fault_is_named_until_its_cause_is_gone(lab: Lab, fault: Fault) -> None:
    host = lab.host(1)
    one, two = host.pod(1), lab.host(2).pod(1)
    assert problems(host) == []
    address_before = read_status(host)["lease"]["public_ip"]
    if fault.at_start or fault.flags:
        assert host.stop_daemon() == 0
        host.run(CLEANUP)
    before = len(host.daemon_log())
    if fault.flags and not fault.at_start:
        start(host, fault)
    try:
        fault.inflict(host)
        if fault.at_start:
            start(host, fault)
        for line in wait_for_problems(host, fault.lines):
            (logged,) = [it for it in host.daemon_log()[before:].splitlines() if line in it]
            assert logged.split(" ", 3)[2] == fault.level
    finally:
        fault.heal(host)

    def is_over() -> bool:
        if fault.is_silent:
            NOTICE(host)
        return problems(host) == []

    wait_until("the end of the problem", is_over, fault.gone_s)
    assert "Traceback" not in host.daemon_log()[before:]
    # Where the address has changed, the other host hears of it a moment later.
    address = read_status(host)["lease"]["public_ip"]
    wait_until("the other host to know the address", lambda: address in peers(lab.host(2)).values(), ON_NOTICE_S)
    if address != address_before:
        # Its status shows the lease before its workers have the table.
        wait_until("an answer", lambda: is_answered(one, two.address), ON_NOTICE_S)
    ping(one, two.address)
    if fault.flags:
        assert host.stop_daemon() == 0
        start(host, None)


def test_a_quarrel_with_a_dhcp_client_grows_quiet(lab: Lab) -> None:
    """Address and route came and went several times a second, with a line in the log for each time."""
    host = lab.host(2)

    def changes() -> int:
        return host.daemon_log().count("kernel state changed")

    DHCP_CLIENT.start(host)
    try:
        wait_until("the problem lines", lambda: len(problems(host)) == 2, ON_NOTICE_S)
        before, cpu_before_s, pid = changes(), cpu_s(host, read_status(host)["pid"]), read_status(host)["pid"]
        time.sleep(5)
        assert changes() - before <= 4
        assert cpu_s(host, pid) - cpu_before_s < 0.5
        ping(lab.host(1).pod(1), host.pod(1).address)
    finally:
        DHCP_CLIENT.stop(host)


def test_a_host_that_has_no_pods_yet_needs_no_forwarding(lab: Lab) -> None:
    """The CNI plugin switches it on with the first pod."""
    host = lab.add_host()
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    host.start_daemon(FLAGS)
    host.wait_ready()
    # More than the time in which a change is noticed.
    time.sleep(1)
    assert problems(host) == []
    host.add_pod()
    wait_until("the problem line", lambda: problems(host) != [], ON_NOTICE_S)
    host.down()


@pytest.mark.skipif(not Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists(), reason="no CPU quotas of cgroup v1")
def test_a_cpu_limit_is_named_until_it_is_gone() -> None:
    """flannel's old manifests had one of 0.1 processors; nothing said why packets were lost."""
    group = Path(f"/sys/fs/cgroup/cpu/udptun-{os.getpid()}")
    group.mkdir()
    try:
        with Lab(f"wc{os.getpid()}", n_hosts=1) as lab:
            host = lab.host(1)
            # More than the start needs, as the test has no time to lose.
            (group / "cpu.cfs_quota_us").write_text("80000")
            mount = "mount -t tmpfs none $0; mkdir $0/cpu; mount -t cgroup -o cpu none $0/cpu"
            host.run(["sh", "-ec", mount, "/sys/fs/cgroup"])
            enter = f'echo 0 > {group}/cgroup.procs; exec "$@"'
            host.start_daemon(FLAGS, ["sh", "-c", enter, "sh", *lab.daemon_command])
            host.wait_ready(30)
            n = read_status(host)["datapath"]["workers"]
            line = rf"the CPU limit of this cgroup is 0\.8 processors, and the datapath has {len(n)} workers?: .*"
            (found,) = wait_for_problems(host, [line])
            assert f" W udptun.control.daemon: {found}" in host.daemon_log()
            (group / "cpu.cfs_quota_us").write_text("-1")
            assert problems(host) == []
    finally:
        wait_until("the end of the group", lambda: is_removed(group), 10)


def is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def start(host: Host, fault: Fault | None) -> None:
    host.start_daemon([*FLAGS, *(fault.flags if fault else ())])
    host.wait_ready()

"""Processes killed, stopped and restarted and the device deleted, all under traffic; and what cleanup leaves.

The flow of 2,000 UDP packets/s goes from h1's pod to h2's, a TCP stream the other way: h1, where the faults are,
sends and receives.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from traffic import (
    CLEANUP,
    TcpFlow,
    UdpFlow,
    cpu_s,
    datapath_pids,
    kill,
    nothing_in_clear_text,
    peers,
    ping,
    processes,
    read_status,
    tcp_flow,
    udp_flow,
    wait_for_peers,
)

from udptun.lab.host import UNDERLAY, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, Lab

pytestmark = pytest.mark.netns

BATCH = 128
"""What the datapath reads at most before it sends (UT_READS in shm.h)."""
RATE = 2000

SLACK = 5
"""Deadlines are the promised times as often: the machine may be busy."""


@pytest.fixture
def lab(pair: Lab) -> Iterator[Lab]:
    """Two hosts, each with a standby, whose daemons must not have printed a traceback by the end of the test."""
    for host in pair.hosts:
        wait_full_datapath(host)
    yield pair
    assert_no_traceback(pair)


@pytest.fixture
def own_lab(two_hosts: Lab) -> Iterator[Lab]:
    """The same for a test that does not bring everything back."""
    yield two_hosts
    assert_no_traceback(two_hosts)


def assert_no_traceback(lab: Lab) -> None:
    for host in lab.hosts:
        assert "Traceback" not in host.daemon_log()


@contextlib.contextmanager
def traffic(lab: Lab, path: Path, n_kills: int = 0, tcp_bytes_per_s: float = 2e6) -> Iterator[tuple[UdpFlow, TcpFlow]]:
    """The flows of the module's text; TCP must be exact, UDP neither spoilt nor doubled, and nothing leak.

    `n_kills` of a datapath process may each double one batch.
    """
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    with nothing_in_clear_text(lab, path), udp_flow(one, two, RATE) as datagrams:  # noqa: SIM117
        with tcp_flow(two, one, tcp_bytes_per_s) as stream:
            datagrams.wait_for_more()
            yield datagrams, stream
            datagrams.wait_for_more()
    stream.report.assert_exact()
    assert datagrams.report.n_spoilt == 0
    assert datagrams.report.n_duplicates <= n_kills * BATCH


def pids(host: Host) -> tuple[int, int]:
    """Daemon and active datapath process."""
    facts = read_status(host)
    return facts["pid"], facts["datapath"]["pid"]


def start_daemon(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()


def kill_daemon(host: Host, *others: int) -> None:
    """And the `others`; returns when the daemon is gone, so that it can be started again."""
    kill(host, read_status(host)["pid"], *others)
    wait_until(f"the daemon of {host.name} to be gone", lambda: host.daemon and host.daemon.poll() is not None, 10)


def wait_full_datapath(host: Host, gone: int = 0) -> None:
    """Until the daemon has an active process, not `gone`, and one standby."""

    def is_full() -> bool:
        datapath = read_status(host)["datapath"]
        return datapath["pid"] not in (None, gone) and len(datapath["standby_pids"]) == 1

    wait_until(f"a datapath with a standby on {host.name}", is_full, 10)


def is_steady(flow: UdpFlow) -> bool:
    before = flow.received()
    time.sleep(0.2)
    return flow.received() == before


# --- killed


@pytest.mark.parametrize("dead_s", [0.5, pytest.param(5, marks=pytest.mark.full)])
def test_nothing_is_lost_when_the_daemon_is_killed_and_started_again(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], dead_s: float
) -> None:
    host = lab.host(1)
    daemon, datapath = pids(host)
    with traffic(lab, tmp_path / "c.pcap") as (datagrams, _):
        kill(host, daemon)
        datagrams.wait_for_more(int(dead_s * RATE))
        start_daemon(host)
        datagrams.wait_for_more(500)
    assert pids(host)[1] == datapath
    figure(f"of {datagrams.report.sent} packets with the daemon dead for {dead_s} s, lost", len(datagrams.report.lost))
    assert datagrams.report.lost == []
    assert datagrams.report.n_out_of_order == 0


class Killer:
    """Kills one of the host's three processes after the other, drawn by `seed`, each at a moment drawn anew.

    One at a time: a process that was killed has been replaced when the next one dies.
    """

    def __init__(self, host: Host, seed: int) -> None:
        self._host = host
        self._random = random.Random(seed)
        self.n_killed = dict.fromkeys(("daemon", "active", "standby"), 0)
        self._since_start = 0

    def kill_one(self) -> None:
        datapath = self.wait_whole()
        time.sleep(self._random.uniform(0, 0.1))
        # It waits longer and longer with the next start when processes die again and again.
        which = "daemon" if self._since_start == 6 else self._random.choice(list(self.n_killed))
        self.n_killed[which] += 1
        self._since_start = 0 if which == "daemon" else self._since_start + 1
        if which == "daemon":
            kill_daemon(self._host)
            # Where a service manager starts it again that takes a moment.
            time.sleep(self._random.uniform(0, 0.3))
            start_daemon(self._host)
        else:
            kill(self._host, datapath["pid"] if which == "active" else datapath["standby_pids"][0])

    def wait_whole(self) -> dict[str, Any]:
        """What the status says of the datapath once all its processes live."""
        found: dict[str, Any] = {}

        def is_whole() -> bool:
            found.update(read_status(self._host)["datapath"])
            alive = datapath_pids(self._host)
            return {found["pid"], *found["standby_pids"]} == alive and len(alive) == 2

        wait_until("all processes to live", is_whole, 20)
        return found


@pytest.mark.parametrize(
    ("n_kills", "mbit_per_s", "seed"),
    [
        (6, 16, 0),
        pytest.param(20, 200, 0, marks=pytest.mark.full),
        *(pytest.param(100, 16, seed, marks=[pytest.mark.full, pytest.mark.timeout(300)]) for seed in range(1, 11)),
    ],
)
def test_nothing_is_lost_when_random_processes_are_killed_at_random_moments(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], n_kills: int, mbit_per_s: float, seed: int
) -> None:
    """Of the daemon, the active datapath process and its standby; the ten hundreds of `--full` are the thousand."""
    killer = Killer(lab.host(1), seed)
    with traffic(lab, tmp_path / "c.pcap", n_kills, mbit_per_s * 1e6 / 8) as (datagrams, stream):
        for _ in range(n_kills):
            killer.kill_one()
        killer.wait_whole()
    assert sum(killer.n_killed.values()) == n_kills
    report = datagrams.report
    kills = ", ".join(f"{n} of the {which}" for which, n in killer.n_killed.items())
    figure(f"{n_kills} kills ({kills}); of {report.sent} packets, lost", len(report.lost))
    figure("packets that came twice", report.n_duplicates)
    figure("longest time without a packet", report.longest_gap_ms, "ms")
    figure(f"longest silence of a stream of {mbit_per_s} Mbit/s", stream.report.longest_silence_ms, "ms")
    assert report.lost == []
    assert report.n_out_of_order == 0


@pytest.mark.parametrize("n_kills", [10, pytest.param(200, marks=pytest.mark.full)])
def test_a_standby_goes_on_when_the_active_datapath_process_is_killed(lab: Lab, tmp_path: Path, n_kills: int) -> None:
    """What the killed process had read and not yet written its successor finds in shared memory.

    While that was in the process's own memory, 7 of 500 kills cost something, 6 of them one packet and one three.
    """
    host = lab.host(1)
    with traffic(lab, tmp_path / "c.pcap", n_kills) as (datagrams, _):
        for i in range(n_kills):
            _, active = pids(host)
            kill(host, active)
            datagrams.wait_for_more(50)
            wait_full_datapath(host, gone=active)
            if i % 10 == 9 and i + 1 < n_kills:
                # It waits longer and longer with the next start when processes die again and again.
                assert host.stop_daemon() == 0
                start_daemon(host)
    print(f"{n_kills} kills: {datagrams.report}")
    assert datagrams.report.lost == []
    assert datagrams.report.n_out_of_order == 0


def test_the_standby_goes_on_by_itself_when_daemon_and_then_datapath_are_killed(lab: Lab, tmp_path: Path) -> None:
    host = lab.host(1)
    daemon, active = pids(host)
    with traffic(lab, tmp_path / "c.pcap", 1) as (datagrams, _):
        kill(host, daemon)
        datagrams.wait_for_more(500)
        kill(host, active)
        datagrams.wait_for_more(1000)
        (standby,) = datapath_pids(host)
        start_daemon(host)
        wait_full_datapath(host)
    assert pids(host)[1] == standby
    assert datagrams.report.lost == []


def kernel_state(host: Host) -> list[str]:
    """Device, address, routes and rules, as the kernel has them for packets of pods.

    A route is marked while nobody has the device open; packets that take it are dropped.
    """
    commands = ("ip -o address show flannel0", "ip route show proto 158", "iptables-save | grep FLANNEL")
    return [host.run(["sh", "-c", command]).stdout.replace(" linkdown", "") for command in commands]


@pytest.mark.full
@pytest.mark.parametrize("n_times", [20])
def test_forwarding_resumes_when_all_were_killed_and_the_daemon_is_started_at_once(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], n_times: int
) -> None:
    """Without a service manager that keeps descriptors: what comes before the start is lost.  It never leaks."""
    host = lab.host(1)
    killed_ns: list[int] = []
    ready_s: list[float] = []
    before = kernel_state(host)
    with traffic(lab, tmp_path / "c.pcap", 2 * n_times) as (datagrams, _):
        for _ in range(n_times):
            wait_full_datapath(host)
            datapath = datapath_pids(host)
            killed_ns.append(time.monotonic_ns())
            kill_daemon(host, *datapath)
            host.start_daemon()
            host.wait_ready()
            ready_s.append((time.monotonic_ns() - killed_ns[-1]) / 1e9)
            datagrams.wait_for_more(500)
            assert kernel_state(host) == before
    # What was under way in the underlay when they were killed still arrives, within milliseconds.
    outages = [datagrams.report.longest_gap_ms_within(start, start + 2_000_000_000) / 1e3 for start in killed_ns]
    figure("from the kill to packets again", outages, "s")
    figure("from the kill to a daemon that is ready", ready_s, "s")
    assert max(outages) < 0.5 * SLACK


@pytest.mark.parametrize("how", ["one_by_one", "at_once"])
def test_forwarding_resumes_with_the_daemon_when_all_were_killed(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], how: str
) -> None:
    host = lab.host(1)
    before = kernel_state(host)
    with traffic(lab, tmp_path / "c.pcap", n_kills=2) as (datagrams, _):
        if how == "at_once":
            kill(host, read_status(host)["pid"], *datapath_pids(host))
        else:
            kill(host, read_status(host)["pid"])
            for pid in sorted(datapath_pids(host)):
                kill(host, pid)
        wait_until("all to be dead", lambda: not datapath_pids(host), 5)
        assert kernel_state(host) == before
        # On a busy machine the receiver is behind, and has yet to read what had arrived before.
        wait_until("the receiver to have read all", lambda: is_steady(datagrams), 5)
        dead_at = datagrams.received()
        # Dead and not slow: nothing arrives, though the senders go on for a while.
        there = str(lab.host(2).pod(1).address)
        unanswered = host.pod(1).run(["ping", "-c", "5", "-i", "0.1", "-W", "1", there], check=False)
        assert "100% packet loss" in unanswered.stdout
        assert datagrams.received() == dead_at
        start_ns = time.monotonic_ns()
        host.start_daemon()
        host.wait_ready()
        ready_s = (time.monotonic_ns() - start_ns) / 1e9
        datagrams.wait_for_more(500)
    resumed_s = datagrams.report.first_after_s(start_ns)
    figure("packets again after the start of the daemon", resumed_s, "s")
    figure("the daemon is ready after its start", ready_s, "s")
    assert resumed_s < 0.5 * SLACK


# --- stopped and started


@pytest.mark.parametrize("n_times", [1, pytest.param(20, marks=pytest.mark.full)])
def test_nothing_is_lost_when_the_daemon_is_stopped_and_started_again(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], n_times: int
) -> None:
    host = lab.host(1)
    _, datapath = pids(host)
    took = []
    with traffic(lab, tmp_path / "c.pcap") as (datagrams, _):
        for number in (signal.SIGTERM, signal.SIGINT) * n_times:
            start = time.monotonic()
            assert host.stop_daemon(number) == 0
            took.append(time.monotonic() - start)
            datagrams.wait_for_more(500)
            start_daemon(host)
            datagrams.wait_for_more(200)
    figure("SIGTERM or SIGINT to the end of the daemon", [1000 * s for s in took], "ms")
    figure(f"of {datagrams.report.sent} packets, lost", len(datagrams.report.lost))
    assert max(took) < 1 * SLACK
    assert pids(host)[1] == datapath
    assert datagrams.report.lost == []
    assert datagrams.report.n_out_of_order == 0


def test_nothing_is_lost_while_the_daemon_is_suspended(lab: Lab, tmp_path: Path) -> None:
    host = lab.host(1)
    daemon = host.daemon
    assert daemon is not None
    with traffic(lab, tmp_path / "c.pcap") as (datagrams, _):
        daemon.send_signal(signal.SIGSTOP)
        datagrams.wait_for_more(2 * RATE)
        daemon.send_signal(signal.SIGCONT)
        read_status(host)
    assert datagrams.report.lost == []


def test_the_standby_goes_on_when_the_active_process_is_stopped_and_the_daemon_goes_on(lab: Lab) -> None:
    """Before, no packet passed until somebody continued it, and nothing told of it."""
    host, one, two = lab.host(1), lab.host(1).pod(1), lab.host(2).pod(1)
    _, active = pids(host)
    # Few enough for the device's queue, which holds 500.
    with udp_flow(one, two, 40) as outwards, udp_flow(two, one, 40) as inwards:
        host.run(["kill", "-STOP", str(active)])
        for flow in (outwards, inwards):
            flow.wait_for_more(40)
        wait_full_datapath(host, gone=active)
    assert outwards.report.lost == inwards.report.lost == []
    (line,) = [it for it in host.daemon_log().splitlines() if f"the active datapath process {active} is stopped" in it]
    assert line.split(" ", 3)[2] == "W"
    assert f"datapath process ended, as it was stopped, and another goes on pid={active}" in host.daemon_log()


# --- the device


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.full)])
def test_a_deleted_device_comes_back_under_traffic(
    lab: Lab, tmp_path: Path, figure: Callable[..., None], n: int
) -> None:
    host = lab.host(1)
    deleted_ns = []
    _, datapath = pids(host)
    before = len(host.daemon_log())
    with traffic(lab, tmp_path / "c.pcap") as (datagrams, _):
        cpu, start = cpu_s(host, datapath), time.monotonic()
        for _ in range(n):
            deleted_ns.append(time.monotonic_ns())
            host.machine.at().ip("link del flannel0")
            # More than can have been under way when it was deleted.
            datagrams.wait_for_more(1000, 1 * SLACK)
        used, elapsed = cpu_s(host, datapath) - cpu, time.monotonic() - start
    gaps = [datagrams.report.longest_gap_ms_within(start, start + 400_000_000) for start in deleted_ns]
    figure("longest time without a packet after the device was deleted", gaps, "ms")
    figure("the datapath used, of a processor", 100 * used / elapsed, "%")
    lines = [line for line in host.daemon_log()[before:].splitlines() if "udptun.kernel.reconcile.reconciler" in line]
    print("\n".join(lines))
    assert sum("revive device flannel0" in line for line in lines) == n
    # One line a repair; two more when the device goes while the daemon is just looking, and it must look again.
    assert len(lines) <= n + 2, lines
    assert pids(host)[1] == datapath
    assert used / elapsed < 0.5
    assert read_status(host)["problems"] == []


def n_unreachable(pod: Pod) -> int:
    """How many ICMP destination-unreachable messages the pod has got."""
    for line in pod.run(["nstat", "-asz", "IcmpInDestUnreachs"]).stdout.splitlines():
        if line.startswith("IcmpInDestUnreachs"):
            return int(line.split()[1])
    raise AssertionError("nstat does not know IcmpInDestUnreachs")


def test_packets_are_refused_and_nothing_spins_when_the_device_is_deleted_without_a_daemon(
    lab: Lab, tmp_path: Path, figure: Callable[..., None]
) -> None:
    host, there = lab.host(1), lab.host(2).pod(1)
    with traffic(lab, tmp_path / "c.pcap") as (datagrams, _):
        kill(host, read_status(host)["pid"])
        refusals = n_unreachable(host.pod(1))
        host.machine.at().ip("link del flannel0")
        workers = datapath_pids(host)
        assert len(workers) == 2
        cpu, start, before = sum(cpu_s(host, pid) for pid in workers), time.monotonic(), datagrams.received()
        said = host.run(["ping", "-c", "2", "-i", "0.3", "-W", "1", str(there.address)], check=False)
        assert re.search(r"No route to host|Host Unreachable", said.stdout + said.stderr)
        # The kernel tells a pod that goes on like this a few times only, and a ping beside it never.
        wait_until("the pod to be told", lambda: n_unreachable(host.pod(1)) > refusals, 10)
        share = (sum(cpu_s(host, pid) for pid in workers) - cpu) / (time.monotonic() - start)
        assert share < 0.1
        assert datagrams.received() - before < 50
        start_ns = time.monotonic_ns()
        start_daemon(host)
        datagrams.wait_for_more(500)
    figure("packets again after the start of the daemon", datagrams.report.first_after_s(start_ns), "s")
    figure("the datapath used without a device, of a processor", 100 * share, "%")
    assert datapath_pids(host) == workers


# --- the underlay


@pytest.mark.full
def test_packets_pass_again_when_the_underlay_is_up_again(lab: Lab, figure: Callable[..., None]) -> None:
    host = lab.host(1)
    up_ns = []
    with udp_flow(host.pod(1), lab.host(2).pod(1), RATE) as datagrams:
        for _ in range(10):
            host.machine.at().ip("link set eth0 down")
            time.sleep(1)
            up_ns.append(time.monotonic_ns())
            host.machine.at().ip("link set eth0 up", f"route replace default via {UNDERLAY[1]}")
            datagrams.wait_for_more(500)
    figure(
        "packets again after the link of the underlay is up", [datagrams.report.first_after_s(it) for it in up_ns], "s"
    )
    wait_until("no problem", lambda: read_status(host)["problems"] == [], 10)


# --- cleanup


SNAPSHOT = [
    "ip -d link",
    "ip -d address",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule",
    "sysctl -a -r ^net.ipv[46].conf",
    "ss -Hulnp",
    "ss -Hxlp",
    "find /run /var/lib -maxdepth 2 -not -path '/run/udptun-lab*'",
]


def state_of(host: Host) -> dict[str, list[str]]:
    """All that a daemon could leave on the host."""
    found = {command: host.run(["sh", "-c", command]).stdout.splitlines() for command in SNAPSHOT}
    found["processes"] = list(processes(host).values())
    return found


def n_leases(host: Host) -> int:
    code = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('select count(*) from leases').fetchone())"
    return int(host.run([sys.executable, "-I", "-S", "-c", code, str(LEASES)]).stdout)


def cleanup(host: Host, *options: str) -> str:
    return host.run([*CLEANUP, *options]).stdout


OTHER_DAEMON = """
import sys
import pytun
device = pytun.TunTapDevice(name="flannel%d", flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
print(device.name, flush=True)
sys.stdin.read()
"""
"""What flanneld does to get its device: one queue, and any free number."""


def name_that_flanneld_gets(host: Host) -> str:
    child = host.popen([sys.executable, "-c", OTHER_DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return child.communicate(timeout=10)[0].strip()


def test_cleanup_leaves_the_host_as_it_was_so_that_another_daemon_can_start() -> None:
    with Lab("t-clean") as lab:
        host, other = lab.hosts
        # Made by the lab; a daemon makes it where it is missing.
        host.run(["rmdir", "/var/lib/udptun"])
        before = state_of(host)
        for each in lab.hosts:
            each.start_daemon()
        for each in lab.hosts:
            each.wait_ready()
        wait_for_peers(lab)
        ping(host, other.subnet.network_address)
        assert state_of(host) != before
        assert host.stop_daemon() == 0
        assert name_that_flanneld_gets(host) == "flannel1", "nothing to clean up: the test shows nothing"

        print(cleanup(host))
        after = state_of(host)
        kept = [line for line in after[SNAPSHOT[-1]] if line not in before[SNAPSHOT[-1]]]
        print(f"kept without --release: {kept}")
        assert kept == ["/var/lib/udptun", "/var/lib/udptun/node-id"]
        assert n_leases(host) == 2

        print(cleanup(host, "--release"))
        after = state_of(host)
        for what, lines in before.items():
            assert after[what] == lines, what
        assert n_leases(host) == 1
        assert name_that_flanneld_gets(host) == "flannel0"
        assert cleanup(host, "--release") == cleanup(host) == ""


def test_cleanup_makes_an_end_of_all_that_a_killed_daemon_left(own_lab: Lab) -> None:
    host = own_lab.host(1)
    subnet = str(host.subnet)
    kill(host, read_status(host)["pid"])
    said = cleanup(host, "--release")
    print(said)
    assert datapath_pids(host) == set()
    assert not host.path("/sys/class/net/flannel0").exists()
    assert not host.path("/run/udptun").exists()
    assert host.run(["ip", "route", "show", "table", "all", "proto", "158"]).stdout == ""
    wait_until("h2 to forget the host", lambda: subnet not in peers(own_lab.host(2)), 1 * SLACK)


def test_cleanup_refuses_beside_a_running_daemon_and_changes_nothing(lab: Lab) -> None:
    host = lab.host(1)
    daemon, datapath = pids(host)
    refused = host.run([*CLEANUP, "--release"], check=False)
    print(refused.stderr.strip())
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert f"another udptun daemon (pid {daemon})" in refused.stderr
    assert pids(host) == (daemon, datapath)
    ping(host.pod(1), lab.host(2).pod(1).address)
    assert n_leases(host) == 2


def test_a_host_finds_its_subnet_again_after_cleanup_unless_the_lease_was_released(own_lab: Lab) -> None:
    host = own_lab.host(1)
    subnet = host.subnet
    assert host.stop_daemon() == 0
    cleanup(host)
    start_daemon(host)
    assert host.subnet == subnet
    ping(host.pod(1), own_lab.host(2).pod(1).address)
    node_id = read_status(host)["lease"]["node_id"]
    assert host.stop_daemon() == 0
    cleanup(host, "--release")
    assert n_leases(host) == 1
    start_daemon(host)
    assert read_status(host)["lease"]["node_id"] != node_id

"""Daemons of an earlier commit upgraded to this one under traffic, and the way back.

The earlier commit is built here from the repository's history: UPGRADE_FROM names another one.  The flow of 2,000 UDP
packets/s goes from h1's pod to h2's, a TCP stream the other way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traffic import datapath_pids, kill, nothing_in_clear_text, processes, read_status, tcp_flow, udp_flow

from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import DUAL_STACK_NET_CONF, Lab

pytestmark = [pytest.mark.netns, pytest.mark.full]

ROOT = Path(__file__).parents[2]
EARLIER = os.environ.get("UPGRADE_FROM", "55aaccc15617243c24b822dd94a57ae0b4208603")
BEFORE_IPV6 = "ea72ee595266a8cc656d8fc32ca0f00dcef4f342"
"""The last commit whose datapath carries no IPv6, and whose leases have IPv6 subnets all the same."""
BEFORE_IPV6_OF_VTEP = "78e0c23699f05d47903c66056d4824028e06d9c0"
"""The last commit whose userspace VTEP carries IPv4 alone."""
RATE = 2000


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of the earlier commit is, built."""
    return build(EARLIER, tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def before_ipv6(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BEFORE_IPV6, tmp_path_factory.mktemp("before_ipv6"))


@pytest.fixture(scope="module")
def before_ipv6_of_vtep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BEFORE_IPV6_OF_VTEP, tmp_path_factory.mktemp("before_ipv6_of_vtep"))


def build(commit: str, directory: Path) -> Path:
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
    if archive.returncode:
        pytest.skip(f"this is no clone with the commit {commit[:7]}")
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=300)
    return directory


@pytest.fixture
def lab(earlier: Path) -> Iterator[Lab]:
    """Two hosts with daemons of the earlier commit, which must not have printed a traceback by the end of the test."""
    with Lab(f"up{os.getpid()}") as lab:
        lab.daemon_command = of(earlier, lab.daemon_command)
        lab.start()
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def of(package: Path, command: list[str]) -> list[str]:
    """The command of a lab's daemon, run from `package`: -P keeps the working directory's udptun away."""
    assert command[0] == sys.executable
    return ["env", f"PYTHONPATH={package}", sys.executable, "-P", *command[1:]]


def change_build(host: Host, package: Path, command: list[str], how: str) -> None:
    """Replace the daemon with one of `package`, and wait until both datapath processes are of its build."""
    before = read_status(host)
    if how == "stopped":
        assert host.stop_daemon(signal.SIGTERM) == 0
    else:
        kill(host, before["pid"])
        wait_until(f"the daemon of {host.name} to be gone", lambda: host.daemon and host.daemon.poll() is not None, 5)
    began = time.monotonic()
    host.start_daemon(command=command)
    host.wait_ready(20)

    def is_full() -> bool:
        datapath = read_status(host)["datapath"]
        pids = [datapath["pid"], *datapath["standby_pids"]]
        commands = processes(host)
        return len(pids) == 2 and all(str(package / "udptun") in commands.get(pid, "") for pid in pids)

    wait_until(f"a datapath of {package} on {host.name}", is_full, 10)
    after = read_status(host)
    if package == ROOT:
        # On the way back the earlier commit does not know the layout and counts anew.
        assert after["counters"]["encap_sent"] >= before["counters"]["encap_sent"]
    old, new = before["datapath"]["pid"], after["datapath"]["pid"]
    assert old != new
    print(f"{host.name}: daemon {how}, the next after {time.monotonic() - began:.2f} s, datapath {old} -> {new}")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_nothing_is_lost_when_daemons_are_upgraded_and_on_the_way_back(
    lab: Lab, earlier: Path, tmp_path: Path, figure: Callable[..., None], how: str
) -> None:
    """What a datapath process had in flight when it was told to stop may arrive twice, a batch at most."""
    old_command = lab.daemon_command
    new_command = of(ROOT, [sys.executable, *old_command[4:]])
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    n_changes = 0
    with (
        nothing_in_clear_text(lab, tmp_path / "c.pcap"),
        udp_flow(one, two, RATE) as datagrams,
        tcp_flow(two, one) as stream,
    ):
        for package, command in ((ROOT, new_command), (earlier, old_command), (ROOT, new_command)):
            for host in lab.hosts:
                datagrams.wait_for_more(500)
                change_build(host, package, command, how)
                n_changes += 1
        datagrams.wait_for_more(500)
    figure(f"of {datagrams.report.sent} packets over {n_changes} changes of build, lost", len(datagrams.report.lost))
    figure("packets that came twice", datagrams.report.n_duplicates)
    figure("longest silence of the stream", stream.report.longest_silence_ms, "ms")
    stream.report.assert_exact()
    assert datagrams.report.lost == []
    assert datagrams.report.n_spoilt == 0
    assert datagrams.report.n_duplicates <= n_changes * 128
    assert datagrams.report.n_out_of_order == 0


def test_ipv6_in_udp_begins_once_both_hosts_are_upgraded_and_ends_on_the_way_back(
    before_ipv6: Path, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """The build before names IPv6 subnets and drops the packets: a host that sent them to it would lose them."""
    with Lab(f"u6{os.getpid()}", net_conf=DUAL_STACK_NET_CONF, ipv6=True) as lab:
        new_command = of(ROOT, lab.daemon_command)
        old_command = lab.daemon_command = of(before_ipv6, lab.daemon_command)
        lab.start()
        one, two = (host.pod(1) for host in lab.hosts)

        def says() -> str:
            return one.run(["ping", "-c", "1", "-W", "1", str(two.ipv6_address)], check=False).stdout

        with (
            nothing_in_clear_text(lab, tmp_path / "c.pcap", "icmp6"),
            udp_flow(one, two, RATE) as datagrams,
            tcp_flow(two, one) as stream,
        ):
            assert "Destination unreachable" in says()
            change_build(lab.host(1), ROOT, new_command, "stopped")
            datagrams.wait_for_more(500)
            assert "Destination unreachable" in says()
            change_build(lab.host(2), ROOT, new_command, "stopped")
            wait_until("IPv6", lambda: " 0% packet loss" in says(), 10)
            with udp_flow(one, two, RATE, port=5005, ipv6=True) as ipv6:
                for how in ("killed", "stopped"):
                    change_daemon(lab.host(1), new_command, how)
                    ipv6.wait_for_more(500)
            change_build(lab.host(2), before_ipv6, old_command, "stopped")
            wait_until("no IPv6", lambda: "Destination unreachable" in says(), 10)
            datagrams.wait_for_more(500)
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()
    figure("of IPv4 packets over 3 changes of build, lost", len(datagrams.report.lost))
    stream.report.assert_exact()
    assert (datagrams.report.lost, ipv6.report.lost) == ([], [])
    assert (datagrams.report.n_spoilt, ipv6.report.n_spoilt) == (0, 0)


def change_daemon(host: Host, command: list[str], how: str) -> None:
    """Replace the daemon with one of the same build, which goes on with the same datapath."""
    if how == "stopped":
        assert host.stop_daemon(signal.SIGTERM) == 0
    else:
        kill(host, read_status(host)["pid"])
        wait_until(f"the daemon of {host.name} to be gone", lambda: host.daemon and host.daemon.poll() is not None, 5)
    host.start_daemon(command=command)
    host.wait_ready(20)


def test_ipv6_of_a_vtep_begins_with_the_upgrade_and_ends_on_the_way_back(
    before_ipv6_of_vtep: Path, figure: Callable[..., None]
) -> None:
    """The build before knows of one datapath a host: it ends the processes of the second one and deletes its device."""
    conf = {**DUAL_STACK_NET_CONF, "Backend": {"Type": "vxlan", "Userspace": True}}
    with Lab(f"u7{os.getpid()}", net_conf=conf, ipv6=True) as lab:
        new_command = of(ROOT, lab.daemon_command)
        old_command = lab.daemon_command = of(before_ipv6_of_vtep, lab.daemon_command)
        lab.start()
        one, two = (host.pod(1) for host in lab.hosts)

        def says() -> str:
            return one.run(["ping", "-c", "1", "-W", "1", str(two.ipv6_address)], check=False).stdout

        with udp_flow(one, two, RATE) as datagrams, tcp_flow(two, one) as stream:
            assert "Destination unreachable" in says()
            for host in lab.hosts:
                change_build(host, ROOT, new_command, "stopped")
                datagrams.wait_for_more(500)
            wait_until("IPv6", lambda: " 0% packet loss" in says(), 10)
            with udp_flow(one, two, RATE, port=5005, ipv6=True) as ipv6:
                for how in ("killed", "stopped"):
                    change_daemon(lab.host(1), new_command, how)
                    ipv6.wait_for_more(500)
            assert len(datapath_pids(lab.host(2))) == 4
            change_build(lab.host(2), before_ipv6_of_vtep, old_command, "stopped")
            wait_until("no IPv6", lambda: "Destination unreachable" in says(), 10)
            assert len(datapath_pids(lab.host(2))) == 2
            assert lab.host(2).run(["ip", "link", "show", "flannel-v6.1"], check=False).returncode != 0
            datagrams.wait_for_more(500)
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()
    figure("of IPv4 packets over 3 changes of build, lost", len(datagrams.report.lost))
    stream.report.assert_exact()
    assert (datagrams.report.lost, ipv6.report.lost) == ([], [])
    assert (datagrams.report.n_spoilt, ipv6.report.n_spoilt) == (0, 0)

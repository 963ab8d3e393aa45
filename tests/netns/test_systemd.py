"""The unit of deploy/systemd under a systemd that boots in a container in each of two hosts.

    [h1: systemd, udptun.service]  eth0 -- underlay -- eth0  [h2: the same]

The hosts ping each other's tunnel address.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile

import page_commands
import pytest
from systemd_container import LACKING, SystemdContainer

from udptun.lab.machine import SOURCE_ROOT, wait_until
from udptun.lab.topology import Lab

pytestmark = [
    pytest.mark.netns,
    pytest.mark.full,
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
]

DIRECTORY = SOURCE_ROOT / "deploy" / "systemd"
UNIT = "udptun.service"
ADDRESSES = ("10.244.104.0", "10.244.105.0")
WATCHDOG_S = 3


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[SystemdContainer]]:
    """Both ready, as docs/operations.md has it for hosts without Kubernetes; with a watchdog that bites sooner."""
    with ExitStack() as undo:
        lab = undo.enter_context(Lab(f"sd{os.getpid()}", n_hosts=2))
        pairs = zip(ADDRESSES, lab.hosts, strict=True)
        leases = [{"Subnet": f"{it}/24", "PublicIP": str(host.underlay_address)} for it, host in pairs]
        etc = {
            "udptun-leases.json": json.dumps(leases),
            "default/udptun": "FLANNELD_STORE=file:/etc/udptun-leases.json\n",
            "kube-flannel/net-conf.json": json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}),
            f"systemd/system/{UNIT}.d/watchdog.conf": f"[Service]\nWatchdogSec={WATCHDOG_S}\n",
        }
        hosts = [undo.enter_context(SystemdContainer(host, DIRECTORY / UNIT, etc)) for host in lab.hosts]
        for host in hosts:
            host.wait_active(UNIT)
        ping = ["ping", "-c1", "-W1", ADDRESSES[1]]
        wait_until("an answer", lambda: lab.hosts[0].run(ping, check=False).returncode == 0, 10)
        yield hosts
        for host in hosts:
            assert "Traceback" not in host("journalctl", "--no-pager", "--unit", UNIT)


@contextmanager
def nothing_lost(host: SystemdContainer) -> Iterator[None]:
    """Ping h2's tunnel address a hundred times a second while the block runs; each has to be answered."""
    with TemporaryFile("w+") as said:

        def answers() -> set[int]:
            # Not by `said` itself: ping writes where that has read to.
            text = os.pread(said.fileno(), 1 << 20, 0).decode()
            return {int(it) for it in re.findall(r" icmp_seq=(\d+) ttl=", text)}

        with host.host.popen(["ping", "-i0.01", ADDRESSES[1]], stdout=said) as running:
            try:
                yield
                # All that was done may have taken less than half a second.
                wait_until("fifty answers", lambda: len(answers()) > 50, 10)
            finally:
                running.send_signal(signal.SIGINT)
        answered = answers()
    # What is on its way at the end is left without an answer, and nothing before it.
    assert set(range(1, max(answered))) - answered == set()


def status(host: SystemdContainer) -> dict[str, object]:
    document: dict[str, object] = json.loads(host("/opt/udptun/bin/udptun", "status", "--json"))
    return document


def datapath(host: SystemdContainer) -> dict[str, object]:
    found = status(host)["datapath"]
    assert isinstance(found, dict)
    return found


def main_pid(host: SystemdContainer) -> str:
    return host.property(UNIT, "MainPID")


def wait_replaced(host: SystemdContainer, before: str) -> None:
    wait_until("another daemon", lambda: main_pid(host) not in ("0", before), 30)
    host.wait_active(UNIT)


def test_the_daemon_is_ready_within_the_units_restrictions(hosts: list[SystemdContainer]) -> None:
    for host in hosts:
        assert status(host)["problems"] == []
        assert datapath(host)["confinement"] == "full"
        # Memory, lock, eventfds, queue and socket: for the next daemon, should all processes be killed.
        assert int(host.property(UNIT, "NFileDescriptorStore")) >= 5
        of_daemon = host("grep", "-E", "^(CapBnd|NoNewPrivs|Seccomp):", f"/proc/{main_pid(host)}/status").split()
        assert of_daemon == ["CapBnd:", f"{1 << 12 | 1 << 13:016x}", "NoNewPrivs:", "1", "Seccomp:", "2"]


def test_the_page_enables_and_starts_the_unit(hosts: list[SystemdContainer]) -> None:
    one, _ = hosts
    (line,) = (it.text for it in page_commands.commands(SOURCE_ROOT / "docs/operations.md") if "systemctl" in it.text)
    one("systemctl", "disable", "--now", UNIT)
    assert one("systemctl", "is-enabled", UNIT, check=False) == "disabled"
    one("sh", "-c", line)
    assert one("systemctl", "is-enabled", UNIT) == "enabled"
    one.wait_active(UNIT)


def test_packets_flow_on_while_the_unit_is_restarted_reloaded_and_stopped(hosts: list[SystemdContainer]) -> None:
    one, before = hosts[0], datapath(hosts[0])["pid"]
    with nothing_lost(one):
        daemon = main_pid(one)
        one("systemctl", "restart", UNIT)
        assert main_pid(one) != daemon
        one("systemctl", "reload", UNIT)
        one("systemctl", "stop", UNIT)
        assert one.property(UNIT, "ActiveState") == "inactive"
        one("systemctl", "start", UNIT)
        one.wait_active(UNIT)
    assert datapath(one)["pid"] == before


def test_nothing_is_lost_when_all_processes_of_the_unit_are_killed(hosts: list[SystemdContainer]) -> None:
    one = hosts[0]
    daemon, before = main_pid(one), datapath(one)["pid"]
    with nothing_lost(one):
        one("systemctl", "kill", "--signal=KILL", "--kill-whom=all", UNIT)
        wait_replaced(one, daemon)
        wait_until("a standby", lambda: bool(datapath(one)["standby_pids"]), 10)
    assert datapath(one)["pid"] != before


def test_a_daemon_that_hangs_is_replaced_and_packets_flow_on(hosts: list[SystemdContainer]) -> None:
    one = hosts[0]
    daemon, before = main_pid(one), datapath(one)["pid"]
    with nothing_lost(one):
        one("kill", "-STOP", daemon)
        wait_replaced(one, daemon)
    assert datapath(one)["pid"] == before
    assert "Watchdog timeout" in one("journalctl", "--no-pager")

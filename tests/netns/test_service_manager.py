"""The daemon under a service manager: a stand-in on NOTIFY_SOCKET keeps its descriptors and hears that it lives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traffic import datapath_pids, kill, nothing_in_clear_text, ping, read_status, udp_flow

from tests.service_manager import Manager
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import NET_CONF, Lab

pytestmark = pytest.mark.netns

SLACK = 5
RATE = 1000
WATCHDOG_S = 0.6
N_ALWAYS = 5
"""Table, statistics, lock and two eventfds; the rest are queues and sockets."""

LAUNCH = """
import os, socket, sys
names, fds, _, _ = socket.recv_fds(socket.socket(fileno=0), 65536, 253)
# Out of the way first: a number that is taken may be one that is still to be copied.
high = [os.dup(fd) for fd in fds]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i)
os.closerange(3 + len(high), 3 + 3 * len(high))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names.decode())
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""What systemd does between fork and exec."""


class Service:
    """The daemon of `host`, started by a manager that has a descriptor store and a watchdog."""

    def __init__(self, host: Host, manager: Manager, log: Path) -> None:
        self._host = host
        self._manager = manager
        self._log = log
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environ = [f"NOTIFY_SOCKET={NOTIFY}", "FDSTORE=64", f"WATCHDOG_USEC={WATCHDOG_S * 1e6:.0f}"]
        command = [sys.executable, "-c", LAUNCH, "env", *environ, *self._host.lab.daemon_command]
        ours, theirs = socket.socketpair()
        with ours, theirs, self._log.open("a") as log:
            names = ":".join(self._manager.kept).encode() or b":"
            socket.send_fds(ours, [names], list(self._manager.kept.values()))
            self.process = self._host.popen(command, stdin=theirs, stdout=log, stderr=log)

    def wait_for(self, state: str, limit_s: float = 20) -> None:
        wait_until(f"the daemon to say {state}", lambda: state in self._manager.read(), limit_s)


NOTIFY = "/run/manager.sock"


@pytest.fixture
def manager(two_hosts: Lab) -> Iterator[Manager]:
    manager = Manager(two_hosts.host(1).path(NOTIFY))
    yield manager
    manager.close()


@pytest.mark.parametrize("n_times", [1, pytest.param(20, marks=pytest.mark.full)])
def test_forwarding_resumes_at_once_when_daemon_and_datapath_are_killed_together(
    two_hosts: Lab, manager: Manager, tmp_path: Path, figure: Callable[..., None], n_times: int
) -> None:
    """The packets that come while nobody lives wait in the queues of the descriptors that the manager has kept."""
    host = two_hosts.host(1)
    assert host.stop_daemon() == 0
    service = Service(host, manager, tmp_path / "log")
    service.start()
    service.wait_for("READY=1")
    assert len(manager.kept) == N_ALWAYS + 2
    one, two = host.pod(1), two_hosts.host(2).pod(1)
    started_ns: list[int] = []
    ready_s: list[float] = []
    with nothing_in_clear_text(two_hosts, tmp_path / "c.pcap"), udp_flow(one, two, RATE) as datagrams:
        for _ in range(n_times):
            datagrams.wait_for_more()
            before = datapath_pids(host)
            kill(host, read_status(host)["pid"], *before)
            wait_until("all to be dead", lambda: not datapath_pids(host), 5)
            # As long as systemd waits.
            time.sleep(0.1)
            started_ns.append(time.monotonic_ns())
            service.start()
            service.wait_for("READY=1")
            ready_s.append((time.monotonic_ns() - started_ns[-1]) / 1e9)
            datagrams.wait_for_more(500)
    report = datagrams.report
    resumed_s = [report.first_after_s(start_ns) for start_ns in started_ns]
    figure("packets again after the start of the daemon", resumed_s, "s")
    figure("the daemon is ready after its start", ready_s, "s")
    figure(f"of {report.sent} packets, lost", len(report.lost))
    assert max(resumed_s) < 0.5 * SLACK
    assert "datapath brought back" in (tmp_path / "log").read_text()
    wait_until("a standby", lambda: len(read_status(host)["datapath"]["standby_pids"]) == 1, 10)
    status = read_status(host)
    assert status["problems"] == []
    assert not {status["datapath"]["pid"], *status["datapath"]["standby_pids"]} & before


def test_manager_keeps_what_a_change_of_workers_leaves(two_hosts: Lab, manager: Manager, tmp_path: Path) -> None:
    """A queue that is left of more workers goes on getting packets: it has to come back with the others, and be read.
    A socket that is given up has to go.
    """
    host = two_hosts.host(1)
    assert host.stop_daemon() == 0
    service = Service(host, manager, tmp_path / "log")
    service.start()
    service.wait_for("READY=1")
    one_worker = set(manager.kept)
    conf = json.loads(host.path(NET_CONF).read_text())
    assert service.process is not None
    for n_workers in (2, 1):
        conf["Backend"]["Workers"] = n_workers
        host.path(NET_CONF).write_text(json.dumps(conf))
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("READY=1")
        # The device's two queues stay.
        assert len(manager.kept) == N_ALWAYS + 2 + n_workers
        assert read_status(host)["datapath"]["workers"] == ["running"] * n_workers
        ping(host.pod(1), two_hosts.host(2).pod(1).address)
        # Two workers go on, too.
        kill(host, read_status(host)["pid"], *datapath_pids(host))
        wait_until("all to be dead", lambda: not datapath_pids(host), 5)
        service.start()
        service.wait_for("READY=1")
        assert read_status(host)["datapath"]["workers"] == ["running"] * n_workers
        ping(host.pod(1), two_hosts.host(2).pod(1).address)
    assert one_worker < set(manager.kept)
    assert ["/".join(name.split("/")[3:5]) for name in set(manager.kept) - one_worker] == ["tun/1"]
    with udp_flow(host.pod(1), two_hosts.host(2).pod(1), 500, from_many_ports=True) as flow:
        flow.wait_for_more()
    assert flow.report.lost == []


def test_a_daemon_that_hangs_is_not_heard_of_any_more(two_hosts: Lab, manager: Manager, tmp_path: Path) -> None:
    host = two_hosts.host(1)
    assert host.stop_daemon() == 0
    service = Service(host, manager, tmp_path / "log")
    service.start()
    service.wait_for("READY=1")
    service.wait_for("WATCHDOG=1")
    service.wait_for("WATCHDOG=1")
    assert service.process is not None
    os.kill(service.process.pid, signal.SIGSTOP)
    time.sleep(0.1)
    manager.read()
    time.sleep(WATCHDOG_S)
    assert manager.read() == []
    os.kill(service.process.pid, signal.SIGCONT)
    service.wait_for("WATCHDOG=1")

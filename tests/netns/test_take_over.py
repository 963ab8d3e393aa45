"""Daemons in containers of one host, as pods of a rollout: the new one takes over from the old one (--take-over).

    [h1: container old | container new]  eth0 -- underlay -- eth0  [h2: daemon]

A container has pids and mounts of its own.  It shares the host's network and, of its files, what the manifest mounts
from the host.  When it is deleted all its processes die, as those of a pod.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from traffic import REAL_TIME, datapath_pids, nothing_in_clear_text, ping, socket_in, tcp_flow, udp_flow

from udptun.lab.holder import LAB_DIR
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

SHARED = ("/run/udptun", "/run/flannel", "/var/lib/udptun", str(LAB_DIR))
"""hostPath volumes; in the last one are the network config and the store."""
FLAGS = [f"--store=local:{LEASES}", f"--net-config-path={NET_CONF}", "--healthz-port=8081"]
PRIVATE = f"""
set -e
mkdir -p {" ".join(SHARED)} /tmp/shared; mount -t tmpfs none /tmp/shared
n=0; for path in {" ".join(SHARED)}; do n=$((n+1)); mkdir /tmp/shared/$n; mount --bind $path /tmp/shared/$n; done
mount -t tmpfs none /run; mount -t tmpfs none /var/lib
n=0; for path in {" ".join(SHARED)}; do n=$((n+1)); mkdir -p $path; mount --bind /tmp/shared/$n $path; done
exec "$@"
"""


class Container:
    """A daemon in pid and mount namespaces of its own."""

    def __init__(self, host: Host, name: str, *flags: str) -> None:
        self.host = host
        self._log = host.path(LAB_DIR / f"{name}.log")
        isolate = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command = [*REAL_TIME, sys.executable, "-m", "udptun", "daemon", *FLAGS, *flags]
        with self._log.open("a") as output:
            self.process = host.popen([*isolate, "sh", "-c", PRIVATE, "sh", *command], stdout=output, stderr=output)

    @property
    def daemon_pid(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the log has `text` so many times."""
        try:
            wait_until(text, lambda: self.log().count(text) >= count or self.process.poll() is not None, 15)
        finally:
            print(self.log())
        assert self.log().count(text) >= count

    def wait_ready(self, count: int = 1) -> None:
        self.wait_for(" ready subnet=", count)

    def has_datapath(self) -> bool:
        """Whether all datapath processes of the host, two, are this container's."""
        ours = Path(f"/proc/{self.daemon_pid}/ns/pid").readlink()
        pids = datapath_pids(self.host)
        try:
            return len(pids) == 2 and all(self.host.path(f"/proc/{pid}/ns/pid").readlink() == ours for pid in pids)
        except FileNotFoundError:
            # One has just ended.
            return False

    def stop(self) -> None:
        """As the kubelet does: SIGTERM to the daemon; with it everything in the container ends."""
        os.kill(self.daemon_pid, signal.SIGTERM)
        assert self.process.wait(10) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """h1 has a pod and no daemon yet but what it was set up with."""
    with Lab(f"to{os.getpid()}") as lab:
        for host in lab.hosts:
            host.start_daemon()
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        assert lab.host(1).stop_daemon() == 0
        yield lab


@pytest.fixture
def old(lab: Lab) -> Container:
    """The running container of h1, which has all of the datapath."""
    old = Container(lab.host(1), "old", "--take-over")
    old.wait_ready()
    wait_until("the datapath in the container", old.has_datapath, 10)
    return old


def is_ready(host: Host) -> bool:
    with socket_in(host, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        try:
            connection.connect(("127.0.0.1", 8081))
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
            return connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False


@contextmanager
def nothing_lost(lab: Lab) -> Iterator[None]:
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    with udp_flow(two, one, 1000) as datagrams, tcp_flow(one, two) as stream:
        datagrams.wait_for_more(300)
        yield
        datagrams.wait_for_more(300)
    assert datagrams.report.lost == []
    stream.report.assert_exact()


def test_a_rollout_between_containers_loses_nothing(lab: Lab, old: Container, tmp_path: Path) -> None:
    """The new one was refused, and waited for ever in a rollout that deletes the old one last."""
    host = lab.host(1)
    subnet = host.subnet
    with nothing_in_clear_text(lab, tmp_path / "c.pcap"), nothing_lost(lab):
        new = Container(host, "new", "--take-over")
        new.wait_ready()
        wait_until("the datapath in the new container", new.has_datapath, 10)
        assert old.process.poll() is None
        old.stop()
    assert host.subnet == subnet
    assert is_ready(host)
    assert "the other daemon has ended" not in old.log()
    new.stop()


def test_a_new_container_that_cannot_get_ready_leaves_the_old_one_serving(lab: Lab, old: Container) -> None:
    host = lab.host(1)
    config = host.path(NET_CONF).read_text()
    with nothing_lost(lab):
        host.path(NET_CONF).write_text("{}")
        new = Container(host, "new", "--take-over")
        assert new.process.wait(15) == 2
        old.wait_for("the other daemon has ended before it was ready, serving again")
        # It goes on with the config that it had.
        old.wait_ready(2)
        assert old.has_datapath()
        host.path(NET_CONF).write_text(json.dumps({**json.loads(config), "Backend": {"Type": "udp", "Port": "x"}}))
        assert Container(host, "another", "--take-over").process.wait(15) == 2
        old.wait_ready(3)
    assert is_ready(host)
    old.stop()


def test_the_old_container_serves_again_when_the_new_one_dies(lab: Lab, old: Container) -> None:
    host = lab.host(1)
    new = Container(host, "new", "--take-over")
    new.wait_ready()
    wait_until("the datapath in the new container", new.has_datapath, 10)
    # The old one sees that the new one is ready.
    time.sleep(1)
    new.kill()
    old.wait_for("the other daemon has ended, serving again")
    old.wait_ready(2)
    assert is_ready(host)
    ping(host.pod(1), lab.host(2).pod(1).address)
    old.stop()


def test_a_container_that_was_killed_is_taken_over_at_once(lab: Lab, old: Container, tmp_path: Path) -> None:
    """All its processes are dead, the datapath too.  0.5 s is promised; the machine may be busy."""
    host = lab.host(1)
    with nothing_in_clear_text(lab, tmp_path / "c.pcap"):
        old.kill()
        began = time.monotonic()
        new = Container(host, "new", "--take-over")
        new.wait_ready()
        ping(lab.host(2).pod(1), host.pod(1).address, count=1)
        print(f"packets pass again {time.monotonic() - began:.2f} s after the start of the new container")
        assert time.monotonic() - began < 5
    new.stop()


def test_a_daemon_of_another_container_is_named_as_such(lab: Lab, old: Container) -> None:
    """`pid 1` is the pid of both."""
    host = lab.host(1)
    refused = Container(host, "new")
    assert refused.process.wait(15) == 1
    assert "another udptun daemon (pid 1 of another pid namespace) uses /run/udptun; stop it" in refused.log()
    refused = Container(host, "beside", "--run-dir=/run/udptun/beside")
    assert refused.process.wait(15) == 1
    assert "another udptun daemon (in another pid namespace, as another container's is) uses" in refused.log()
    # Its pid as the host has it.
    command = [sys.executable, "-m", "udptun", "daemon", *FLAGS]
    seen = host.run(["sh", "-c", 'exec "$@" 2>&1', "sh", *command], check=False).stdout
    assert "another udptun daemon (pid 1)" not in seen
    assert "of another pid namespace" not in seen
    old.stop()


def test_two_daemons_of_one_machine_take_over_from_each_other(lab: Lab) -> None:
    """Without containers.  The datapath stays where it is."""
    host = lab.host(1)
    before = datapath_pids(host)
    flags = [*FLAGS, "--take-over"]
    command = [sys.executable, "-m", "udptun", "daemon", *flags]
    first, second = (host.path(LAB_DIR / name) for name in ("first", "second"))
    with nothing_lost(lab), first.open("w") as one, second.open("w") as two:
        old = host.popen(command, stderr=one)
        wait_until("the first to be ready", lambda: " ready subnet=" in first.read_text(), 15)
        new = host.popen(command, stderr=two)
        wait_until("the second to be ready", lambda: " ready subnet=" in second.read_text(), 15)
        for process in (new, old):
            process.terminate()
            assert process.wait(10) == 0
    assert datapath_pids(host) == before
    assert "Traceback" not in first.read_text() + second.read_text()


def test_a_daemon_that_does_not_answer_is_named_and_asked_again(lab: Lab) -> None:
    host = lab.host(1)
    host.start_daemon(FLAGS)
    host.wait_ready()
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGSTOP)
    new = Container(host, "new", "--take-over")
    new.wait_for("not taking over yet, no answer, asking again: another udptun daemon (pid ")
    host.daemon.send_signal(signal.SIGCONT)
    new.wait_ready()
    assert host.stop_daemon() == 0
    new.stop()

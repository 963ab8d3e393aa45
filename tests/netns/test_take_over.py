"""Daemons in containers, as pods of a rollout: the new one takes over from the old one (--take-over).

    [h1: container old | container new]  eth0 -- underlay -- eth0  [h2: container]
                                            |
                                    API server (switch)

A container has namespaces of its own, but the host's network, and is run as the manifest says (daemon_container.py).
When it is deleted all its processes die, as those of a pod.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_container import MISSING, Container, Containers
from kube_server import MISSING as MISSING_LIBRARIES
from traffic import (
    datapath_pids,
    nothing_in_clear_text,
    ping,
    read_status,
    socket_in,
    tcp_flow,
    udp_flow,
    wait_for_peers,
)

from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, LAB_DIR, Lab

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(MISSING or MISSING_LIBRARIES), reason=f"needs {', '.join([*MISSING_LIBRARIES, *MISSING])}"),
]

PROMISED_S = 0.5
"""From the start of a container to the first packet, where the one before was killed with the datapath."""
HEALTHZ = "--healthz-port=8081"
API_TRAFFIC = "tcp port 6443"


@contextmanager
def rollout_lab(name: str, directory: Path, net_conf: Mapping[str, object]) -> Iterator[Containers]:
    """Two hosts, each with a pod and a running container of the name `first`."""
    with Lab(f"{name}{os.getpid()}", store="kube", net_conf=net_conf) as lab:
        containers = Containers(lab, directory, net_conf)
        firsts = [containers.start(host, "first") for host in lab.hosts]
        for first in firsts:
            first.wait_ready()
            first.host.add_pod()
        wait_for_peers(lab)
        yield containers
        for host in lab.hosts:
            containers.kill_all(host)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Type udp, for tests that leave a container running on h2 and whatever they like on h1."""
    with rollout_lab("to", tmp_path_factory.mktemp("bytecode"), DEFAULT_NET_CONF) as containers:
        yield containers


@pytest.fixture
def lab(containers: Containers) -> Lab:
    """Nothing runs on h1, but it has a pod."""
    host = containers.lab.host(1)
    containers.kill_all(host)
    containers.configure(host, json.dumps(DEFAULT_NET_CONF))
    return containers.lab


@pytest.fixture
def old(lab: Lab, containers: Containers) -> Container:
    """The running container of h1, which has all of the datapath."""
    old = containers.start(lab.host(1), "old")
    old.wait_ready()
    old.wait_for_datapath()
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
def nothing_lost(lab: Lab, packets_per_s: float = 1000) -> Iterator[None]:
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    with udp_flow(two, one, packets_per_s) as datagrams, tcp_flow(one, two) as stream:
        datagrams.wait_for_more(300)
        yield
        datagrams.wait_for_more(300)
    assert datagrams.report.lost == []
    stream.report.assert_exact()


def roll_out(containers: Containers, name: str, *, kills: bool) -> None:
    """Replace the running container of each host, one host after the other.  `kills`: the old one without a word."""
    for host in containers.lab.hosts:
        (old,) = containers.running(host)
        subnet, has_datapath = host.subnet, bool(datapath_pids(host))
        new = containers.start(host, name)
        new.wait_ready()
        assert old.process.poll() is None
        if kills:
            # At once: the datapath may still be the old one's.
            old.kill()
        else:
            if has_datapath:
                new.wait_for_datapath()
            old.stop()
            assert "the other daemon has ended" not in old.log()
        if has_datapath:
            new.wait_for_datapath()
        assert host.subnet == subnet


@pytest.mark.parametrize("kills", [False, True], ids=["stopped", "killed"])
def test_a_rollout_of_all_hosts_loses_nothing(
    containers: Containers, old: Container, tmp_path: Path, kills: bool
) -> None:
    """The new one was refused, and waited for ever in a rollout that deletes the old one last."""
    lab = containers.lab
    with nothing_in_clear_text(lab, tmp_path / "c.pcap", API_TRAFFIC), nothing_lost(lab, 2000):
        roll_out(containers, f"after-{kills}", kills=kills)
    assert all(is_ready(host) for host in lab.hosts)


@pytest.mark.full
@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, {"Type": "vxlan", "Userspace": True}], ids=["vxlan", "vtep"])
def test_a_rollout_loses_nothing_with_other_backends(tmp_path: Path, backend: Mapping[str, object]) -> None:
    """The manifest's own Type is vxlan."""
    bytecode = tmp_path / "bytecode"
    bytecode.mkdir()
    with rollout_lab("tv", bytecode, {**DEFAULT_NET_CONF, "Backend": backend}) as containers:
        lab = containers.lab
        besides = f"{API_TRAFFIC} or udp dst port 8472"
        with nothing_in_clear_text(lab, tmp_path / "c.pcap", besides), nothing_lost(lab, 2000):
            for turn, kills in enumerate((False, True)):
                roll_out(containers, f"turn-{turn}", kills=kills)


def test_a_new_container_that_cannot_get_ready_leaves_the_old_one_serving(
    lab: Lab, containers: Containers, old: Container
) -> None:
    """With a broken ConfigMap it became ready all the same, with the last run's config, on one host after another."""
    host = lab.host(1)
    with nothing_lost(lab):
        containers.configure(host, "{}")
        new = containers.start(host, "new")
        assert new.process.wait(15) == 2
        old.wait_for("the other daemon has ended before it was ready, serving again")
        # It goes on with the config that it had.
        old.wait_ready(2)
        assert old.has_datapath()
        containers.configure(host, json.dumps({**DEFAULT_NET_CONF, "Backend": {"Type": "udp", "Port": "x"}}))
        assert containers.start(host, "another").process.wait(15) == 2
        old.wait_ready(3)
    assert is_ready(host)
    old.stop()


def test_the_old_container_serves_again_when_the_new_one_dies(lab: Lab, containers: Containers, old: Container) -> None:
    host = lab.host(1)
    new = containers.start(host, "new")
    new.wait_ready()
    new.wait_for_datapath()
    # The old one sees that the new one is ready.
    time.sleep(1)
    new.kill()
    old.wait_for("the other daemon has ended, serving again")
    old.wait_ready(2)
    assert is_ready(host)
    ping(host.pod(1), lab.host(2).pod(1).address)
    old.stop()


@pytest.mark.parametrize(
    "killed_s", [None, 0.15, *(pytest.param(it / 100, marks=pytest.mark.full) for it in (0, 5, 10, 20, 25, 30))]
)
def test_a_container_that_was_killed_is_taken_over_at_once(
    lab: Lab, containers: Containers, old: Container, tmp_path: Path, slack: int, killed_s: float | None
) -> None:
    """All its processes are dead, the datapath too.  `killed_s` after the start of the new one; None: before it.

    A busy machine can only make it slower, so it counts when one of three times is as promised.
    """
    with nothing_in_clear_text(lab, tmp_path / "c.pcap", API_TRAFFIC):
        for _ in range(3):
            ends_s = standstill_ends_s(lab, containers, old, killed_s)
            print(
                f"packets pass again after the start of the new container: {ends_s[0]:.2f} s in, {ends_s[1]:.2f} s out"
            )
            if max(ends_s) < PROMISED_S * slack:
                break
            (old,) = containers.running(lab.host(1))
            old.wait_for_datapath()
    assert max(ends_s) < PROMISED_S * slack


def standstill_ends_s(lab: Lab, containers: Containers, old: Container, killed_s: float | None) -> tuple[float, float]:
    """Kill and start; when packets pass again, inward and outward, seconds after the start of the new container."""
    host, two = lab.host(1), lab.host(2).pod(1)
    with udp_flow(two, host.pod(1), 500) as there, udp_flow(host.pod(1), two, 500) as back:
        if killed_s is None:
            old.kill()
        new = containers.start(host, "new" if old.name.endswith("old") else "old")
        if killed_s is not None:
            time.sleep(killed_s)
            old.kill()
        new.wait_ready()
        for flow in (there, back):
            flow.wait_for_more(100)
    return there.report.longest_gap_ends_s(new.began_ns), back.report.longest_gap_ends_s(new.began_ns)


def test_a_daemon_of_another_container_is_named_as_such(lab: Lab, containers: Containers, old: Container) -> None:
    """`pid 1` is the pid of both."""
    host = lab.host(1)
    refused = containers.start(host, "new", without=["--take-over"])
    assert refused.process.wait(15) == 1
    assert "another udptun daemon (pid 1 of another pid namespace) uses /run/udptun; stop it" in refused.log()
    refused = containers.start(host, "beside", "--run-dir=/run/udptun/beside", without=["--take-over"])
    assert refused.process.wait(15) == 1
    assert "another udptun daemon (in another pid namespace, as another container's is) uses" in refused.log()
    # Its pid as the host has it.
    seen = host.run(["sh", "-c", 'exec "$@" 2>&1', "sh", *lab.daemon_command], check=False).stdout
    assert "another udptun daemon (pid 1)" not in seen
    assert "of another pid namespace" not in seen
    old.stop()


def has_them_all(host: Host) -> bool:
    """Whether the daemon has every datapath process of the host."""
    datapath = read_status(host)["datapath"]
    return {datapath["pid"], *datapath["standby_pids"]} == datapath_pids(host)


def test_two_daemons_of_one_machine_take_over_from_each_other(lab: Lab, old: Container) -> None:
    """Without containers.  The datapath stays where it is."""
    host = lab.host(1)
    command = ["env", f"NODE_NAME={host.name}", *lab.daemon_command, HEALTHZ, "--take-over"]
    first, second = (host.path(LAB_DIR / name) for name in ("first", "second"))
    with nothing_lost(lab), first.open("w") as one, second.open("w") as two:
        one_daemon = host.popen(command, stderr=one)
        wait_until("the first to be ready", lambda: " ready subnet=" in first.read_text(), 15)
        old.stop()
        # Of two processes one may still be the container's, and end.
        wait_until("a new standby", lambda: len(datapath_pids(host)) == 2 and has_them_all(host), 10)
        before = datapath_pids(host)
        other_daemon = host.popen(command, stderr=two)
        wait_until("the second to be ready", lambda: " ready subnet=" in second.read_text(), 15)
        for process in (other_daemon, one_daemon):
            process.terminate()
            assert process.wait(10) == 0
    assert datapath_pids(host) == before
    assert "Traceback" not in first.read_text() + second.read_text()


def test_a_daemon_that_does_not_answer_is_named_and_asked_again(lab: Lab, containers: Containers) -> None:
    host = lab.host(1)
    host.start_daemon([HEALTHZ])
    host.wait_ready()
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGSTOP)
    new = containers.start(host, "new")
    new.wait_for("not taking over yet, no answer, asking again: another udptun daemon (pid ")
    host.daemon.send_signal(signal.SIGCONT)
    new.wait_ready()
    assert host.stop_daemon() == 0
    new.stop()

"""A flood of datagrams from an address that is no peer's.

pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
                                                       ^ a second address: the stranger
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from traffic import is_answered, kill, read_status, socket_in, udp_flow

from tests.packets import udp
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

STRANGER = UNDERLAY[99]
FOLLOWS_S = 15
"""A flood is seen within two seconds."""


@contextmanager
def lab_with_stranger(workers: int) -> Iterator[Lab]:
    backend = {"Type": "udp", "Workers": workers}
    with Lab(f"fl{os.getpid()}", n_hosts=2, net_conf={"Network": "10.244.0.0/16", "Backend": backend}) as lab:
        lab.start()
        for host in lab.hosts:
            host.add_pod()
        lab.hosts[1].machine.at().ip(f"address add {STRANGER}/32 dev eth0")
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


@contextmanager
def flood(lab: Lab) -> Iterator[None]:
    """Some 5,000 packets/s to h1, which claim to be of a pod of h2, while the block runs."""
    one, two = lab.hosts[:2]
    ended = threading.Event()
    payload, target = udp(str(two.subnet[2]), str(one.subnet[2])), (str(one.underlay_address), 8285)
    with socket_in(two, socket.SOCK_DGRAM) as source:
        source.bind((str(STRANGER), 0))

        def send() -> None:
            while not ended.wait(0.01):
                for _ in range(50):
                    source.sendto(payload, target)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def state(host: Host) -> str:
    return str(read_status(host)["datapath"]["stranger_filter"])


def n_dropped(host: Host) -> int:
    return int(read_status(host)["counters"]["drop_stranger"])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_flood_of_strangers_is_dropped_by_the_kernel_and_peers_notice_nothing(workers: int) -> None:
    """Restarted, killed and joined by a host meanwhile.  Before, the workers read every datagram of the flood."""
    with lab_with_stranger(workers) as lab:
        one, two = lab.hosts
        assert (state(one), n_dropped(one)) == ("ready", 0)
        with udp_flow(two.pod(1), one.pod(1), 200) as flow:
            with flood(lab):
                wait_until("the filter", lambda: state(one) == "on", FOLLOWS_S)
                before = n_dropped(one)
                wait_until("drops", lambda: n_dropped(one) > before + 1000, FOLLOWS_S)
                # What is let through is enough to name the address.
                wait_until("its name", lambda: f"came from {STRANGER}" in str(read_status(one)["problems"]), FOLLOWS_S)
                three = lab.add_host()
                three.start_daemon()
                three.wait_ready()
                three.add_pod()
                wait_until("an answer", lambda: is_answered(three.pod(1), one.pod(1).address), FOLLOWS_S)
                assert state(one) == "on"
                counted = n_dropped(one)
                kill(one, read_status(one)["pid"])
                wait_until("the end", lambda: one.daemon is not None and one.daemon.poll() is not None, FOLLOWS_S)
                flow.wait_for_more()
                one.start_daemon()
                one.wait_ready(20)
                # The sum goes on from where it was.
                assert n_dropped(one) >= counted > 1000
                wait_until("the filter again", lambda: state(one) == "on", FOLLOWS_S)
                wait_until("drops", lambda: n_dropped(one) > counted + 1000, FOLLOWS_S)
                counted = n_dropped(one)
                # A stop takes it away as well, and leaves the socket of the workers alone.
                assert one.stop_daemon(signal.SIGTERM) == 0
                assert len(one.run(["ss", "-uanH", "sport = :8285"]).stdout.splitlines()) == workers
                one.start_daemon()
                one.wait_ready(20)
                assert n_dropped(one) >= counted
            flow.wait_for_more()
        assert flow.report.lost == []

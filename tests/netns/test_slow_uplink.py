"""A host whose uplink is slower than what its pods send: what comes to it, and what it learns, must not wait.

pod h1/p1 ~~ as much UDP as it can ~~> eth0 of h1, shaped (tbf) --> pod h2/p1
pod h2/p1 -- 1,000 numbered datagrams a second --> pod h1/p1
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.netns.traffic import REAL_TIME, read_status, udp_flow
from udptun.lab.host import Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

PACKETS_PER_S = 1000
N_PACKETS = 2000

FLOOD = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect((sys.argv[1], 9))
while True:
    try:
        udp.send(bytes(1400))
    except ConnectionRefusedError:
        pass
"""


@contextmanager
def flood(source: Pod, destination: Pod) -> Iterator[None]:
    """Send without a pause while the block runs.  What is lost of it is nobody's concern."""
    process = source.popen(["python3", "-c", FLOOD, str(destination.address)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("rate", ["1mbit", "10mbit", "100mbit"])
def test_what_comes_in_is_not_held_up_when_the_uplink_is_full(rate: str) -> None:
    """The worker slept until its send buffer had room, and read nothing meanwhile: with 10 Mbit/s and one pod that
    uploads, 6,100 of 20,000 packets a second arrived.  A lease change had to wait as well.
    """
    with Lab("uplink", n_hosts=3, n_pods=1) as lab:
        lab.daemon_command[:0] = REAL_TIME
        third = lab.hosts.pop()
        lab.start()
        one, two = lab.hosts
        lab.hosts.append(third)
        # Deeper than a send buffer, so that this is full long before the shaper drops anything.
        one.run(["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "32kb", "limit", "4mb"])
        with udp_flow(two.pod(1), one.pod(1), PACKETS_PER_S) as flow, flood(one.pod(1), two.pod(1)):
            wait_until("the flood", lambda: read_status(one)["counters"]["encap_sent"] > 100, 10)
            flow.wait_for_more(N_PACKETS // 2)
            third.start_daemon()
            third.wait_ready()
            wait_until("the third host", lambda: len(read_status(one)["peers"]) == 2, 5)
            flow.wait_for_more(N_PACKETS // 2)
            counters = read_status(one)["counters"]
        assert flow.report.lost == []
        assert counters["encap_drop_send"] == 0, "the senders wait, and none of their packets is dropped"

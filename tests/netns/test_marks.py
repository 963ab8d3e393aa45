"""Marks of congestion on the underlay: they reach the pods, and their flows slow down.

pod h1/p1 --> [h1] eth0 -- switch, which marks what may be marked (nft) -- eth0 [h2] --> pod h2/p1

The frames cross the underlay one by one, and the receiving host merges them: a train of them is marked in parts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.netns.traffic import read_status
from udptun.lab.host import Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, NET_CONF, Lab, Offload

pytestmark = pytest.mark.netns

NOT_ECT, ECT_1, ECT_0, CE = range(4)
DSCP = 0x20

PYTHON = [sys.executable, "-I", "-S", "-c"]
RECEIVE = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
udp.bind((sys.argv[1], 5010))
udp.settimeout(float(sys.argv[2]))
print("ready", flush=True)
try:
    print(udp.recvmsg(2000, 100)[1][0][2][0])
except TimeoutError:
    print(-1)
"""
SEND = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, int(sys.argv[2]))
udp.sendto(b"x", (sys.argv[1], 5010))
"""
TAKE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5011))
print("ready", flush=True)
stream = listener.accept()[0]
while stream.recv(1 << 20):
    pass
"""
# For a second: bytes acknowledged (tcpi_bytes_acked), packets delivered with a mark and packets sent twice, from
# struct tcp_info of linux/tcp.h.
GIVE = """
import json, socket, sys, time
stream = socket.socket()
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
stream.connect((sys.argv[1], 5011))
end = time.monotonic() + 1
while time.monotonic() < end:
    stream.send(bytes(1 << 16))
info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
def number(at, n):
    return int.from_bytes(info[at : at + n], sys.byteorder)
print(json.dumps({"acked": number(120, 8), "marked": number(196, 4), "resent": number(100, 4)}))
"""

MARK = """
table bridge marks {
    chain forward { type filter hook forward priority 0; ip ecn %s counter ip ecn set ce; }
}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ecn", n_hosts=2, n_pods=1) as lab:
        lab.set_offload(Offload.RECEIVE)
        lab.start()
        for host in lab.hosts:
            host.pod(1).run(["sysctl", "-qw", "net.ipv4.tcp_ecn=1"])
        yield lab


@contextmanager
def marking(lab: Lab, what: str = "{ ect0, ect1 }") -> Iterator[None]:
    """The switch marks all packets whose ECN field is one of `what`, and so those that may be marked."""
    lab.switch.run(["nft", "-f", "-"], input=MARK % what)
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete table bridge marks"])


def carried(one: Pod, two: Pod, tos: int, *, patience_s: float = 10) -> int:
    """The TOS with which a datagram of that TOS arrives; -1: it does not, in `patience_s`."""
    receiver = two.popen([*PYTHON, RECEIVE, str(two.address), str(patience_s)], stdout=subprocess.PIPE)
    with receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        one.run([*PYTHON, SEND, str(two.address), str(tos)])
        return int(receiver.communicate(timeout=30)[0])


def stream(one: Pod, two: Pod) -> dict[str, int]:
    """A second of a flow whose sender understands marks."""
    receiver = two.popen([*PYTHON, TAKE, str(two.address)], stdout=subprocess.PIPE)
    with receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        found: dict[str, int] = json.loads(one.run([*PYTHON, GIVE, str(two.address)]).stdout)
    print(found)
    return found


def configure(host: Host, off: list[str]) -> None:
    conf = dict(DEFAULT_NET_CONF) | {"Backend": {"Type": "udp", "OffloadDisabled": off}}
    host.path(NET_CONF).write_text(json.dumps(conf))
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)
    wait_until("the reload", lambda: ("ecn" in read_status(host)["backend"]["offloads"]) == ("ecn" not in off), 10)


def asks_for_marks(host: Host) -> bool:
    (peer,) = read_status(host)["peers"]
    return bool(peer["ecn"])


def test_a_flow_whose_packets_are_marked_on_the_way_slows_down_without_a_loss(
    lab: Lab, figure: Callable[..., None]
) -> None:
    """The marks were lost with the outer headers, which were Not-ECT: routers dropped, at the same rate of the flow."""
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    unmarked = stream(one, two)
    assert unmarked["marked"] == 0
    with marking(lab):
        marked = stream(one, two)
    figure(f"packets sent twice beside {marked['marked']} marks", marked["resent"])
    figure("acknowledged, of an unmarked flow", marked["acked"] / unmarked["acked"])
    assert marked["marked"] > 10
    assert marked["acked"] < unmarked["acked"] / 2
    assert marked["resent"] < marked["marked"] / 20, "it was told by marks, not by losses"


def test_a_mark_reaches_a_pod_and_a_packet_that_must_not_be_marked_is_dropped(lab: Lab) -> None:
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    for field in range(4):
        assert carried(one, two, DSCP | field) == DSCP | field
    with marking(lab):
        assert [carried(one, two, DSCP | field) for field in range(4)] == [DSCP | NOT_ECT, *[DSCP | CE] * 3]
    before = read_status(lab.host(2))["counters"]["decap_drop_ce"]
    with marking(lab, "not-ect"):
        assert carried(one, two, DSCP, patience_s=0.5) == -1
    # Probes go on meanwhile, and are dropped likewise.
    assert read_status(lab.host(2))["counters"]["decap_drop_ce"] > before


def test_what_goes_to_a_host_that_loses_marks_is_not_marked(lab: Lab) -> None:
    """Its lease no longer says that it carries them on, as flannel's and those of earlier builds never do."""
    here, there = lab.hosts
    assert asks_for_marks(here)
    configure(there, ["ecn"])
    try:
        wait_until("the lease to say so", lambda: not asks_for_marks(here), 10)
        with marking(lab):
            assert carried(here.pod(1), there.pod(1), ECT_0) == ECT_0
            assert stream(here.pod(1), there.pod(1))["marked"] == 0
    finally:
        configure(there, [])
    wait_until("the lease to say so", lambda: asks_for_marks(here), 10)
    with marking(lab):
        assert carried(here.pod(1), there.pod(1), ECT_0) == CE

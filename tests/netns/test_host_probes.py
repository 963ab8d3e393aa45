"""Hosts and paths as the daemon sees them where the kernel carries the packets: kernel vxlan and host-gw.

pod h1/p1 -- flannel.1, or none -- eth0 of h1 -- switch -- eth0 of h2, which nobody of ours runs on; nft drops what
comes to either
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
from test_probes import is_, known, parted
from traffic import CLEANUP, is_answered, read_status, seconds_until

from udptun.lab.host import SUBNET_ENV, Host, Pod
from udptun.lab.topology import NET_CONF, Lab

pytestmark = pytest.mark.netns

OFTEN = (
    "from udptun.commands.cli import main; from udptun.control import host_probes; from udptun.probing import host; "
    "host_probes._IDLE_S = 1.0; host._RETRY_S = 0.5; main()"
)
"""A daemon that asks its peers each second, not each minute, and looks as often whether it may."""
FORBIDDEN, ALLOWED = "1 0", "0 2147483647"
OVERHEAD = {"vxlan": 50, "host-gw": 0}
NARROW_BYTES = 1300
"""Of a packet on the underlay."""


def let_ping(host: Host, groups: str) -> None:
    host.run(["sysctl", "-qw", f"net.ipv4.ping_group_range={groups}"])


def show(host: Host, what: Sequence[str]) -> dict[str, object]:
    (found,) = json.loads(host.run([what[0], "-j", *what[1:]]).stdout)
    return dict(found)


def become_plain(host: Host, peer: Host, backend: str) -> None:
    """End all that is ours, and set up by hand what flannel does.  The lease stays."""
    device = show(host, ["ip", "link", "show", "flannel.1"]) if backend == "vxlan" else {}
    of_peer = show(peer, ["ip", "link", "show", "flannel.1"])["address"] if backend == "vxlan" else ""
    subnet_env = host.path(SUBNET_ENV)
    text = subnet_env.read_text()
    host.stop_daemon()
    host.run(CLEANUP)
    subnet_env.parent.mkdir(exist_ok=True)
    subnet_env.write_text(text)
    ip = host.machine.at().ip
    if backend == "host-gw":
        ip(f"route add {peer.subnet} via {peer.underlay_address} dev eth0")
        return
    there = peer.subnet.network_address
    ip(
        f"link add flannel.1 address {device['address']} mtu {device['mtu']}"
        f" type vxlan id 1 local {host.underlay_address} dev eth0 dstport 8472 nolearning",
        f"address add {host.subnet.network_address}/32 dev flannel.1",
        "link set flannel.1 up",
        f"neighbour add {there} lladdr {of_peer} dev flannel.1 nud permanent",
        f"route add {peer.subnet} via {there} dev flannel.1 onlink",
    )
    host.run(["bridge", "fdb", "append", str(of_peer), "dev", "flannel.1", "dst", str(peer.underlay_address)])


@pytest.fixture(scope="module", params=["vxlan", "host-gw"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lab(backend: str) -> Iterator[Lab]:
    """The first host has a daemon; the second one had one and is a node like any other now."""
    conf = {"Network": "10.244.0.0/16", "Backend": {"Type": backend}}
    with Lab(f"k{os.getpid()}{backend[:1]}", net_conf=conf) as lab:
        assert lab.daemon_command[:3] == [sys.executable, "-m", "udptun"]
        lab.daemon_command[1:3] = ["-c", OFTEN]
        lab.start()
        one, two = lab.hosts
        seconds_until(lambda: len(read_status(one)["peers"]) == 1, "the peer", 20)
        become_plain(two, one, backend)
        yield lab
        assert "Traceback" not in one.daemon_log()


@pytest.fixture
def alive(lab: Lab, slack: int) -> Lab:
    """The first host may probe, and has had an answer."""
    one = lab.host(1)
    let_ping(one, ALLOWED)
    seconds_until(lambda: is_(one, "alive"), "the first answer", 5 * slack)
    return lab


def is_said(host: Host, text: str) -> bool:
    return any(text in line for line in read_status(host)["problems"])


def pods(lab: Lab) -> tuple[Pod, Pod]:
    return lab.host(1).pod(1), lab.host(2).pod(1)


def test_a_host_that_forbids_icmp_sockets_knows_nothing_and_says_why(lab: Lab, slack: int) -> None:
    """The kernel's own default.  The daemon probes as soon as it may."""
    one = lab.host(1)
    let_ping(one, FORBIDDEN)
    one.stop_daemon()
    log_before = one.daemon_log()
    one.start_daemon()
    one.wait_ready()
    seconds_until(lambda: "sysctl" in read_status(one)["backend"]["probes"], "the reason", 5 * slack)
    state = read_status(one)["backend"]["probes"]
    why = "group 0 of the daemon is not in net.ipv4.ping_group_range"
    assert state.startswith(f"off: cannot open an ICMP datagram socket (EACCES): {why}; run `")
    assert state in one.run([sys.executable, "-m", "udptun", "status"]).stdout
    assert known(one) == {"liveness": "unknown", "rtt_ms": None, "path_mtu": None}
    assert read_status(one)["problems"] == []
    (command,) = [it for it in state.split("`") if it.startswith("sysctl")]
    one.run(["sh", "-c", command])
    seconds_until(lambda: is_(one, "alive"), "the first answer", 5 * slack)
    assert read_status(one)["backend"]["probes"] == "on"
    new = one.daemon_log().removeprefix(log_before)
    assert (new.count(" probes are off: cannot open"), new.count(" probes are on")) == (1, 1)


def test_a_dead_host_is_shown_and_packets_to_it_go_on_being_sent(alive: Lab, slack: int) -> None:
    one, two = alive.hosts
    log_before = one.daemon_log()
    assert 0 < float(str(known(one)["rtt_ms"])) < 1000
    assert is_answered(*(pods(alive)[0], pods(alive)[1].address))
    with parted(one, two, which="meta protocol ip"):
        # Its next probe, and three that are lost.
        seconds_until(lambda: is_(one, "dead"), "the verdict", 3 * slack)
        (line,) = read_status(one)["problems"]
        said = pods(alive)[0].run(["ping", "-c1", "-W1", str(pods(alive)[1].address)], check=False).stdout
    assert is_answered(*(pods(alive)[0], pods(alive)[1].address)), "at once"
    seconds_until(lambda: is_(one, "alive"), "alive again", 5 * slack)
    assert line.startswith(f"the host of {two.subnet} at {two.underlay_address} has answered and does not any more")
    assert "Unreachable" not in said
    assert read_status(one)["problems"] == []
    new = one.daemon_log().removeprefix(log_before)
    assert new.count("does not any more") == 1
    assert new.count(f"peer alive again subnet={two.subnet} public_ip={two.underlay_address}") == 1


def test_a_path_that_drops_large_packets_in_silence_is_measured_and_shown(alive: Lab, backend: str, slack: int) -> None:
    one, two = alive.hosts
    mtu = NARROW_BYTES - OVERHEAD[backend]
    seconds_until(lambda: known(one)["path_mtu"] == one.mtu, "the first measure", 5 * slack)
    with parted(one, two, which=f"ip length > {NARROW_BYTES}"):
        took_s = seconds_until(lambda: known(one)["path_mtu"] == mtu, "the measure", 10 * slack)
        (line,) = read_status(one)["problems"]
        assert known(one)["liveness"] == "alive"
    print(f"{mtu} bytes after {took_s:.2f} s")
    words = f"{mtu} bytes, {one.mtu - mtu} fewer than pods may send"
    assert line.startswith(f"the path to the host of {two.subnet} at {two.underlay_address} takes packets of {words}")
    assert f"path mtu={mtu} peer={two.subnet} public_ip={two.underlay_address}" in one.daemon_log()


def n_echoes(host: Host) -> int:
    """Echo requests that it has got."""
    (line,) = [it for it in host.run(["nstat", "-asz", "IcmpInEchos"]).stdout.splitlines() if "IcmpInEchos" in it]
    return int(line.split()[1])


def test_without_probes_nothing_is_sent(alive: Lab, backend: str, slack: int) -> None:
    """By `"Probe": false`, for which SIGHUP will do, or by `--probe=false`."""
    one, two = alive.hosts
    conf = json.loads(one.path(NET_CONF).read_text())
    one.path(NET_CONF).write_text(json.dumps({**conf, "Backend": {"Type": backend, "Probe": False}}))
    assert one.daemon is not None
    one.daemon.send_signal(signal.SIGHUP)
    seconds_until(lambda: read_status(one)["backend"]["probes"] == "off", "the change", 5 * slack)
    assert known(one) == {"liveness": "unknown", "rtt_ms": None, "path_mtu": None}
    before = n_echoes(two)
    time.sleep(2.5)
    one.path(NET_CONF).write_text(json.dumps(conf))
    one.stop_daemon()
    one.start_daemon(["--probe=false"])
    one.wait_ready()
    assert read_status(one)["backend"]["probes"] == "off"
    assert n_echoes(two) == before


MANY_IDLE = """
import asyncio, sys, time
from ipaddress import IPv4Network
from udptun.probing.carrier import Target
from udptun.probing.host import HostCarrier
from udptun.probing.prober import Prober

subnets = list(IPv4Network("10.0.0.0/8").subnets(new_prefix=24))[:10_000]

async def main(n_s):
    prober = Prober(HostCarrier("flannel.1", Family.IPV4), 60, 60)
    prober.switch(is_on=True, mtu=1450)
    prober.set_peers({it: Target(it.network_address, it.network_address, "") for it in subnets})
    running = asyncio.create_task(prober.run())
    await asyncio.sleep(5)
    began_s = time.process_time()
    await asyncio.sleep(n_s)
    print((time.process_time() - began_s) / n_s, sum(prober.document(it)["liveness"] == "alive" for it in subnets))
    running.cancel()

asyncio.run(main(float(sys.argv[1])))
"""


@pytest.mark.full
def test_ten_thousand_idle_peers_cost_less_than_a_hundredth_of_a_processor() -> None:
    """And fewer than 50 packets a second."""
    seconds = 60
    with Lab(f"m{os.getpid()}", n_hosts=1) as lab:
        host = lab.host(1)
        let_ping(host, ALLOWED)
        host.machine.at().ip("route add local 10.0.0.0/8 dev lo")
        before = n_echoes(host)
        said = host.run([sys.executable, "-c", MANY_IDLE, str(seconds)], timeout=60 + 5 * seconds).stdout.split()
        n_sent = n_echoes(host) - before
    share, n_alive = float(said[0]), int(said[1])
    print(f"{share:.2%} of a processor, {n_sent / (seconds + 5):.1f} probes a second, {n_alive} alive")
    assert n_sent / (seconds + 5) < 50
    assert n_alive > 30 * seconds
    assert share < 0.01

"""The workloads: what a run of one path does.  A new one is a line here, one in figures.WORKLOADS and its figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path as File

from bench import measure
from bench.compiler import SOURCES, compiled
from bench.cpu import Meter
from bench.measure import Result
from bench.paths import Path
from udptun.commands.status import fetch
from udptun.core.errors import UdptunError
from udptun.core.trace_request import TraceRequest
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, Lab

NETWORK = IPv4Network("100.0.0.0/8")
"""Network of the bench's lab.  It has room for the most leases there can be, and no other path's addresses in it."""
IPV6_NETWORK = IPv6Network("fd00:244::/48")
"""Of the bench's lab, where IPv6 is measured."""

_LEASES_TIMEOUT_S = 600.0
"""How long both daemons may take to have 65,534 leases in use, or no more; a minute by IPv6 too, on an idle machine."""
_LEASES_PAUSE_S = 0.5
"""Between two looks."""
_IDLE_CORES = 0.1
"""What a daemon takes of a core at most once nothing is left to do about its leases, probes of their hosts included."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a workload needs besides the path.

    `udp` is the traffic program, `seconds` how long a run sends, `congestion` as `measure.tcp` has it.
    """

    lab: Lab
    udp: File
    seconds: int
    congestion: str


def prepare(lab: Lab, directory: File, seconds: int, congestion: str) -> Bench:
    """Compile the traffic program into `directory`.  Raises BenchError."""
    return Bench(lab, compiled("traffic/udp.c", directory), seconds, congestion)


RUN: Mapping[str, Callable[[Bench, Path], Result]] = {
    "tcp_1": lambda bench, path: measure.tcp(path, bench.seconds, congestion=bench.congestion),
    "tcp_8": lambda bench, path: measure.tcp(path, bench.seconds, n_streams=8, congestion=bench.congestion),
    "tcp_both": lambda bench, path: measure.tcp(path, bench.seconds, both_ways=True, congestion=bench.congestion),
    "udp_64": lambda bench, path: measure.udp_flood(path, bench.seconds, 64, bench.udp),
    "udp_512": lambda bench, path: measure.udp_flood(path, bench.seconds, 512, bench.udp),
    "udp_1400": lambda bench, path: measure.udp_flood(path, bench.seconds, 1400, bench.udp),
    "rtt": lambda bench, path: measure.round_trips(path, bench.seconds, bench.udp, bench.lab),
    "memory": lambda bench, path: measure.memory(path),
}


def set_leases(lab: Lab, n: int, *, with_ipv6: bool) -> None:
    """Have `n` leases of other hosts in the store; wait until both daemons have them all in use and have nothing to do.

    `with_ipv6`: each of them has a subnet of either family.
    """
    bulk = [sys.executable, str(SOURCES / "bulk_leases.py"), str(LEASES), str(NETWORK)]
    # The other host's own lease is one of the n.
    said = lab.host(1).run([*bulk, str(n - 1), *[str(IPV6_NETWORK)] * with_ipv6], timeout=_LEASES_TIMEOUT_S)
    gone, last = said.stdout.split()
    for host in lab.hosts:
        wait_until(f"{n} leases in use on {host}", partial(_uses_leases, host, n, gone, last), _LEASES_TIMEOUT_S)
    for host in lab.hosts:
        wait_until(f"idle daemon on {host}", partial(_is_idle, host), _LEASES_TIMEOUT_S)


def _is_idle(host: Host) -> bool:
    """Whether the daemon takes next to no CPU time for a second."""
    assert host.daemon is not None
    meter = Meter([host.daemon.pid])
    time.sleep(1)
    usage = meter.read()
    return usage.tunnel_s < _IDLE_CORES * usage.wall_s


def _uses_leases(host: Host, n: int, gone: str, last: str) -> bool:
    """Whether the host has `n` peers, as many as it shall have by each family; keys are as bulk_leases.py prints them.

    `udptun status` with all of so many would keep the daemon from taking them.
    """
    time.sleep(_LEASES_PAUSE_S)
    try:
        is_peer = partial(_is_peer, host)
        if any(map(is_peer, _halves(gone))) or not all(map(is_peer, _halves(last))):
            return False
        metrics = fetch(host.path("/run/udptun"), "/metrics").splitlines()
    except UdptunError:
        # A daemon that is busy with so many leases may not answer in time.  Then it does not have them yet.
        return False
    return sum(float(line.split()[1]) for line in metrics if line.startswith("udptun_peers{")) == n


def _halves(key: str) -> list[str]:
    """Of the key, one a family; none where there is no key."""
    return [] if key == "-" else key.split("&")


def _is_peer(host: Host, half: str) -> bool:
    """Whether the datapath has a peer for the subnet, which is half of a key."""
    pod, subnet = host.pod(1), ip_network(half.replace("-", "/"))
    source = pod.address if subnet.version == 4 else pod.ipv6_address
    asked = TraceRequest.from_words(str(source), str(subnet[10]))
    document = json.loads(fetch(host.path("/run/udptun"), f"/trace?{asked.query()}"))
    return document.get("peer") is not None

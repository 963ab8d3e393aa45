"""The workloads: what a run of one path does.  A new one is a line here, one in figures.WORKLOADS and its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path as File

from bench import measure
from bench.compiler import SOURCES, compiled
from bench.measure import Result
from bench.paths import Path
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, Lab

NETWORK = IPv4Network("100.0.0.0/8")
"""Network of the bench's lab.  It has room for the most leases there can be, and no other path's addresses in it."""
IPV6_NETWORK = IPv6Network("fd00:244::/48")
"""Of the bench's lab, where IPv6 is measured."""

_LEASES_TIMEOUT_S = 120.0
"""How long both daemons may take to have 65,534 leases in use; a few seconds on an idle machine."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a workload needs besides the path.  `udp` is the traffic program, `seconds` how long a run sends."""

    lab: Lab
    udp: File
    seconds: int


def prepare(lab: Lab, directory: File, seconds: int) -> Bench:
    """Compile the traffic program into `directory`.  Raises BenchError."""
    return Bench(lab, compiled("traffic/udp.c", directory), seconds)


RUN: Mapping[str, Callable[[Bench, Path], Result]] = {
    "tcp_1": lambda bench, path: measure.tcp(path, bench.seconds),
    "tcp_8": lambda bench, path: measure.tcp(path, bench.seconds, n_streams=8),
    "tcp_both": lambda bench, path: measure.tcp(path, bench.seconds, both_ways=True),
    "udp_64": lambda bench, path: measure.udp_flood(path, bench.seconds, 64, bench.udp),
    "udp_512": lambda bench, path: measure.udp_flood(path, bench.seconds, 512, bench.udp),
    "udp_1400": lambda bench, path: measure.udp_flood(path, bench.seconds, 1400, bench.udp),
    "rtt": lambda bench, path: measure.round_trips(path, bench.seconds, bench.udp, bench.lab),
    "memory": lambda bench, path: measure.memory(path),
}


def set_leases(lab: Lab, n: int, *, with_ipv6: bool) -> None:
    """Have `n` leases of other hosts in the store, and wait until both daemons have them all in use.

    `with_ipv6`: each of them has a subnet of either family.
    """
    bulk = [sys.executable, str(SOURCES / "bulk_leases.py"), str(LEASES), str(NETWORK)]
    # The other host's own lease is one of the n.
    lab.host(1).run([*bulk, str(n - 1), *[str(IPV6_NETWORK)] * with_ipv6], timeout=_LEASES_TIMEOUT_S)
    for host in lab.hosts:
        wait_until(f"{n} leases in use on {host}", partial(_has_peers, host, n, with_ipv6), _LEASES_TIMEOUT_S)


def _has_peers(host: Host, n: int, with_ipv6: bool) -> bool:
    answer = host.run([sys.executable, "-m", "udptun", "status", "--json"], check=False)
    # A daemon that is busy with so many leases may not answer in time.  Then it does not have them yet.
    if answer.returncode:
        return False
    status = json.loads(answer.stdout)
    peers = [status["peers"], status["ipv6"]["peers"]] if with_ipv6 else [status["peers"]]
    return all(len(them) == n for them in peers)

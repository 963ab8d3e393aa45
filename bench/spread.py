"""`./dev bench spread`: over how many workers the flows between two hosts spread, and what more workers bring.

Many flows of small datagrams go from a pod of one host to a pod of the other.  The receiving host's counters say how
many datagrams each of its workers has delivered.  Then TCP streams show how throughput grows with the workers, where
there are processors for them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from bench import machine
from bench.errors import BenchError
from bench.measure import tcp
from bench.paths import Path, daemon_and_datapath
from bench.session import Screen, check_idle, run, uninterrupted_end, whole_number
from bench.summary import Spread, table
from udptun.commands import status
from udptun.lab.errors import LabError
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

_WORKERS = (1, 2, 4)
_CORES = 4
"""With fewer, two workers on each of two hosts and the programs that they serve share too little to show anything."""
_DATAGRAMS = 20
"""Of each flow."""
_STREAMS = 8
_TIMEOUT_S = 20.0

_SEND = """
import socket, sys, time
for port in range(int(sys.argv[2])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("", 20000 + port))
        for _ in range(int(sys.argv[3])):
            udp.sendto(b"x", (sys.argv[1], 9))
    time.sleep(0.001)
"""


def main(arguments: Sequence[str]) -> int:
    """`python -m bench spread`.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="./dev bench spread", description="Flows per worker, and what workers bring.")
    parser.add_argument(
        "--flows", type=whole_number(1, 4096), default=256, metavar="N", help="inner flows (default 256)"
    )
    parser.add_argument("--seconds", type=whole_number(1, 60), default=3, metavar="N", help="of TCP a run (default 3)")
    parser.add_argument("--repeats", type=whole_number(1, 100), default=3, metavar="N", help="TCP runs (default 3)")
    options = parser.parse_args(arguments)
    screen = Screen()
    return run(screen, lambda: _measure(screen, options.flows, options.seconds, options.repeats))


def _measure(screen: Screen, n_flows: int, seconds: int, repeats: int) -> None:
    facts = machine.facts()
    screen.step(f"{facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, commit {facts['commit']}")
    check_idle(screen)
    with Lab("spread", n_hosts=2, n_pods=1) as lab, uninterrupted_end():
        _show_spread(screen, lab, n_flows)
        n_cores = len(os.sched_getaffinity(0))
        if n_cores < _CORES:
            screen.step(
                f"scaling: {n_cores} cores cannot show it; with fewer than {_CORES} the workers of both hosts and "
                "the programs take the same cores from each other, whatever their number"
            )
        else:
            _show_scaling(screen, lab, seconds, repeats)


def _show_spread(screen: Screen, lab: Lab, n_flows: int) -> None:
    screen.step(f"spread: {n_flows} flows of one host, {_DATAGRAMS} datagrams each; flows per worker of the other host")
    rows = []
    for source_ports in ("1", "auto"):
        for workers in _WORKERS:
            _start(lab, workers, source_ports)
            got = _delivered(lab, n_flows)
            share = f"{min(got) / sum(got):.0%}" if sum(got) else "-"
            rows.append([source_ports, str(workers), "  ".join(f"{n / _DATAGRAMS:.0f}" for n in got), share])
    screen.show("\n".join(table(["SourcePorts", "Workers", "flows per worker", "the least has"], rows)))


def _show_scaling(screen: Screen, lab: Lab, seconds: int, repeats: int) -> None:
    screen.step(
        f"scaling: {_STREAMS} TCP streams, SourcePorts auto, {repeats} runs of {seconds} s for each, interleaved"
    )
    rates: dict[int, list[float]] = {workers: [] for workers in _WORKERS}
    for _ in range(repeats):
        for workers, rate in rates.items():
            _start(lab, workers, "auto")
            rate.append(tcp(_path(lab), seconds, _STREAMS).figures["gbit_per_s"])
    spreads = {workers: Spread.of(rate) for workers, rate in rates.items()}
    one = spreads[_WORKERS[0]].median
    rows = [
        [str(workers), f"{of.median:.2f} ({of.low:.2f} to {of.high:.2f})", f"{of.median / one:.2f}"]
        for workers, of in spreads.items()
    ]
    screen.show("\n".join(table(["Workers", "Gbit/s, median (least to greatest)", "times one worker"], rows)))


def _start(lab: Lab, workers: int, source_ports: str) -> None:
    """Have both hosts run with so many workers and source ports; the datapath is another one each time."""
    for host in lab.hosts:
        if host.daemon is not None:
            host.stop_daemon()
    for host in lab.hosts:
        host.start_daemon([f"--workers={workers}", f"--source-ports={source_ports}"])
    for host in lab.hosts:
        host.wait_ready()
        if not host.pods:
            host.add_pod()
    wait_until(
        "both hosts to know each other", lambda: all(len(_status(it)["peers"]) == 1 for it in lab.hosts), _TIMEOUT_S
    )
    # Addresses are resolved before anything is counted.
    lab.host(1).pod(1).run(["ping", "-c", "3", "-i", "0.1", "-W", "5", str(lab.host(2).pod(1).address)])


def _delivered(lab: Lab, n_flows: int) -> list[int]:
    """How many of the flows' datagrams each worker of the receiving host delivers."""
    sender, receiver = lab.hosts
    before = _counts(receiver)
    script = [sys.executable, "-I", "-S", "-c", _SEND, str(receiver.pod(1).address), str(n_flows), str(_DATAGRAMS)]
    sender.pod(1).run(script)
    wanted = n_flows * _DATAGRAMS
    try:
        wait_until("all datagrams", lambda: sum(_counts(receiver)) - sum(before) >= wanted, _TIMEOUT_S)
    except LabError as exc:
        raise BenchError(f"{sum(_counts(receiver)) - sum(before)} of {wanted} datagrams arrived") from exc
    return [now - was for now, was in zip(_counts(receiver), before, strict=True)]


def _counts(host: Host) -> list[int]:
    return [counts.get("decap_delivered", 0) for counts in _status(host)["datapath"]["worker_counters"]]


def _status(host: Host) -> Any:
    return json.loads(status.fetch(host.path("/run/udptun")))


def _path(lab: Lab) -> Path:
    client, server = (host.pod(1) for host in lab.hosts)
    processes = tuple(it for host in lab.hosts for it in daemon_and_datapath(host))
    return Path("udptun", lab.host(1).mtu, client, server, server.address, processes)

"""`./dev bench startup`: what a start costs and what a daemon weighs.

One daemon is alone in a lab of one host and is started again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network

from bench import machine
from bench.bulk_leases import FIRST_PUBLIC_IP
from bench.compiler import SOURCES
from bench.cpu import seconds_of
from bench.measure import bytes_alone, pss_bytes
from bench.paths import daemon_and_datapath
from bench.session import Screen, check_idle, run, uninterrupted_end, whole_number
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import KUBE_PORT, LAB_DIR, Lab

_NETWORK = IPv4Network("10.224.0.0/11")
_ENDPOINT = "http://127.0.0.1:2379"
_PREFIX = "/coreos.com/network"
_PUTS_AT_ONCE = 100
"""etcd takes 128 operations a transaction."""
_CALM_S = 1.0
"""So long after READY=1 the daemon is measured: it has given back what the start needed, and saved its table."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds from exec to READY=1, and what the processes weigh a moment later, bytes.

    `cpu_s` is the CPU time of the daemon's process until then, and `daemon` its PSS.  `total` is the weight of the
    daemon and both datapath processes with their memory files, if no other process shared a page with them.
    """

    ready_s: float
    cpu_s: float
    daemon: int
    total: int


def main(arguments: Sequence[str]) -> int:
    """`python -m bench startup`.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="./dev bench startup", description="Measure starts of one daemon.")
    parser.add_argument("--store", choices=("file", "etcd", "kube"), default="file")
    parser.add_argument("--leases", type=whole_number(0, 4096), default=2, metavar="N", help="of peers (default 2)")
    parser.add_argument("--runs", type=whole_number(1, 1000), default=10, metavar="N", help="starts (default 10)")
    options = parser.parse_args(arguments)
    # The daemon inherits it: with it every start would compile the package anew, which no installed one does.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    screen = Screen()
    return run(screen, lambda: _measure(screen, options.store, options.leases, options.runs))


def _measure(screen: Screen, store: str, n_leases: int, n_runs: int) -> None:
    facts = machine.facts()
    screen.step(f"{facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, commit {facts['commit']}")
    check_idle(screen)
    conf = {"Network": str(_NETWORK), "Backend": {"Type": "udp"}}
    with Lab("startup", n_hosts=1, net_conf=conf, store=_store(store)) as lab, uninterrupted_end():
        host = lab.host(1)
        with _leases(host, store, n_leases, conf):
            screen.step(f"--store {store} with {n_leases} peers' leases: one start to warm up, then {n_runs}")
            starts = [_start(host) for _ in range(1 + n_runs)][1:]
        for start in starts:
            screen.show(
                f"ready {start.ready_s:.3f} s, {start.cpu_s:.2f} CPU s; daemon {_mib(start.daemon)} PSS, "
                f"with the datapath's two processes and all that they share {_mib(start.total)}"
            )
        screen.step(
            f"median: ready {statistics.median(start.ready_s for start in starts):.3f} s, "
            f"daemon {_mib(statistics.median(start.daemon for start in starts))} PSS, "
            f"all {_mib(statistics.median(start.total for start in starts))}"
        )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _store(store: str) -> str:
    return f"file:{LAB_DIR}/leases.json" if store == "file" else store


@contextmanager
def _leases(host: Host, store: str, n: int, conf: Mapping[str, object]) -> Iterator[None]:
    """Have the store of `host` hold `n` leases of other hosts, for the block.  A file has the host's own lease too."""
    base = int(_NETWORK.network_address)
    peers = [(IPv4Network((base + (i << 8), 24)), FIRST_PUBLIC_IP + i) for i in range(2, n + 2)]
    if store == "file":
        own = (IPv4Network((base + 256, 24)), host.underlay_address)
        items = [{"Subnet": str(subnet), "PublicIP": str(ip), "Port": 8285} for subnet, ip in (own, *peers)]
        host.path(LAB_DIR / "leases.json").write_text(json.dumps(items))
        yield
    elif store == "kube":
        # The lab's API server has the host's own node.
        server = f"{UNDERLAY[1]}:{KUBE_PORT}"
        host.run([sys.executable, str(SOURCES / "bulk_nodes.py"), server, str(_NETWORK), str(n)])
        yield
    else:
        with _etcd(host) as etcdctl:
            host.run([*etcdctl, "put", f"{_PREFIX}/config", json.dumps(conf)])
            puts = [
                f'put {_PREFIX}/subnets/{str(subnet).replace("/", "-")} "{{\\"PublicIP\\":\\"{ip}\\"}}"\n'
                for subnet, ip in peers
            ]
            for at in range(0, len(puts), _PUTS_AT_ONCE):
                # A transaction: no compares, what to do, nothing to do otherwise.
                host.run([*etcdctl, "txn"], input="\n" + "".join(puts[at : at + _PUTS_AT_ONCE]) + "\n\n")
            yield


@contextmanager
def _etcd(host: Host) -> Iterator[list[str]]:
    """Run an etcd in `host` for the block, which gets the beginning of an etcdctl command line."""
    command = ["etcd", f"--data-dir={LAB_DIR / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"]
    etcd = host.popen(
        [*command, f"--listen-client-urls={_ENDPOINT}", f"--advertise-client-urls={_ENDPOINT}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        etcdctl = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={_ENDPOINT}"]
        wait_until("etcd", lambda: host.run([*etcdctl, "endpoint", "health"], check=False).returncode == 0, _TIMEOUT_S)
        yield etcdctl
    finally:
        etcd.kill()
        etcd.wait()


def _start(host: Host) -> Start:
    began = time.monotonic()
    host.start_daemon()
    host.wait_ready(_TIMEOUT_S)
    ready_s = time.monotonic() - began
    time.sleep(_CALM_S)
    daemon, *datapath = [process.pid for process in daemon_and_datapath(host)]
    cpu_s = seconds_of([daemon])
    weight, total = pss_bytes(daemon), bytes_alone([daemon, *datapath])
    host.stop_daemon(signal.SIGTERM)
    host.run([*host.lab.daemon_command[:3], "cleanup", *host.lab.daemon_command[4:]])
    return Start(ready_s, cpu_s, weight, total)

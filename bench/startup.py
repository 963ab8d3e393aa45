"""What a start costs and what a daemon weighs: one daemon alone in a lab of one host, started again and again.

./dev bench startup [--store file|etcd] [--leases N] [--runs N]
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bench import machine
from bench.errors import BenchError
from bench.session import Screen, check_idle, run, uninterrupted_end, whole_number
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, Lab

_NETWORK = IPv4Network("10.224.0.0/11")
_FIRST_PUBLIC_IP = IPv4Address("198.18.0.0")
"""Of the 131,072 addresses that are set aside for benchmarks (RFC 2544), none of which a lab's host has."""
_ENDPOINT = "http://127.0.0.1:2379"
_PREFIX = "/coreos.com/network"
_PUTS_AT_ONCE = 100
"""etcd takes 128 operations a transaction."""
_CALM_S = 1.0
"""After READY=1: what the start needed is given back, and the table is saved."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds from exec to READY=1, and what the processes weigh a moment later, PSS in bytes.

    `cpu_s`: what the daemon's process has used until then.  `total` is that of the daemon and both datapath processes.
    """

    ready_s: float
    cpu_s: float
    daemon: int
    total: int


def main(arguments: Sequence[str]) -> int:
    """`python -m bench startup`.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="./dev bench startup", description="Measure starts of one daemon.")
    parser.add_argument("--store", choices=("file", "etcd"), default="file")
    parser.add_argument("--leases", type=whole_number(0, 4096), default=2, metavar="N", help="of peers (default 2)")
    parser.add_argument("--runs", type=whole_number(1, 1000), default=10, metavar="N", help="starts (default 10)")
    options = parser.parse_args(arguments)
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
                f"ready {start.ready_s:.3f} s, {start.cpu_s:.2f} CPU s; PSS: daemon {_mb(start.daemon)}, "
                f"with the datapath's two processes {_mb(start.total)}"
            )
        screen.step(
            f"median: ready {statistics.median(start.ready_s for start in starts):.3f} s, "
            f"daemon {_mb(statistics.median(start.daemon for start in starts))} PSS, "
            f"all {_mb(statistics.median(start.total for start in starts))} PSS"
        )


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _store(store: str) -> str:
    return f"file:{LAB_DIR}/leases.json" if store == "file" else "etcd"


@contextmanager
def _leases(host: Host, store: str, n: int, conf: Mapping[str, object]) -> Iterator[None]:
    """Have the store of `host` hold its own lease (file) and `n` others."""
    base = int(_NETWORK.network_address)
    peers = [(IPv4Network((base + (i << 8), 24)), _FIRST_PUBLIC_IP + i) for i in range(2, n + 2)]
    if store == "file":
        own = (IPv4Network((base + 256, 24)), host.underlay_address)
        items = [{"Subnet": str(subnet), "PublicIP": str(ip), "Port": 8285} for subnet, ip in (own, *peers)]
        host.path(LAB_DIR / "leases.json").write_text(json.dumps(items))
        yield
        return
    directory = LAB_DIR / "etcd"
    command = ["etcd", f"--data-dir={directory}", "--unsafe-no-fsync", "--log-level=error"]
    etcd = host.popen(
        [*command, f"--listen-client-urls={_ENDPOINT}", f"--advertise-client-urls={_ENDPOINT}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        health = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={_ENDPOINT}"]
        wait_until("etcd", lambda: host.run([*health, "endpoint", "health"], check=False).returncode == 0, _TIMEOUT_S)
        host.run([*health, "put", f"{_PREFIX}/config", json.dumps(conf)])
        puts = [
            f'put {_PREFIX}/subnets/{str(subnet).replace("/", "-")} "{{\\"PublicIP\\":\\"{ip}\\"}}"\n'
            for subnet, ip in peers
        ]
        for at in range(0, len(puts), _PUTS_AT_ONCE):
            # A transaction: no compares, what to do, nothing to do otherwise.
            host.run([*health, "txn"], input="\n" + "".join(puts[at : at + _PUTS_AT_ONCE]) + "\n\n")
        yield
    finally:
        etcd.kill()
        etcd.wait()


def _start(host: Host) -> Start:
    began = time.monotonic()
    host.start_daemon()
    host.wait_ready(_TIMEOUT_S)
    ready_s = time.monotonic() - began
    time.sleep(_CALM_S)
    daemon = host.daemon
    if daemon is None:
        raise BenchError("the daemon is gone")
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / 100
    sizes = {pid: _pss(pid) for pid in [daemon.pid, *_datapath_pids(host)]}
    start = Start(ready_s, cpu_s, sizes[daemon.pid], sum(sizes.values()))
    host.stop_daemon(signal.SIGTERM)
    host.run([*host.lab.daemon_command[:3], "cleanup", *host.lab.daemon_command[4:]])
    return start


def _datapath_pids(host: Host) -> list[int]:
    """The processes of the host that run worker.py."""
    found = []
    namespace = host.machine.at().net_ns
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if b"datapath/worker.py" in (entry / "cmdline").read_bytes() and _is_in(entry, namespace):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _is_in(process: Path, namespace: str | Path) -> bool:
    return (process / "ns" / "net").stat().st_ino == Path(namespace).stat().st_ino


def _pss(pid: int) -> int:
    """Proportional set size, bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"the kernel does not tell the PSS of process {pid}")

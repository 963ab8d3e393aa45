"""`./dev demo`: two hosts with a pod each on this machine, the tunnel between them, and what it does."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from bench.compiler import compiled
from bench.errors import BenchError
from bench.figures import PLAIN, TUNNEL, VXLAN
from bench.measure import Ping, Result, ping, tcp, udp_flood, wait_for_path
from bench.paths import Path, Paths, connect, interleave
from bench.session import Screen, check_idle, run, uninterrupted_end, whole_number
from bench.summary import ratios, table
from udptun.lab.host import Host
from udptun.lab.topology import DEFAULT_NET_CONF, Lab, missing_requirements

_STATUS = [sys.executable, "-m", "udptun", "status"]
_WIDEST_LINE = 88
"""Columns: in a pipe the table of `udptun status` is as wide as it gets.  So many end behind the column OUT pkt/s, and
with their indentation fit a window of 100."""
_UDP_SECONDS = 1
_UDP_BYTES = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=whole_number(1, 60),
        default=2,
        metavar="S",
        help="of every TCP stream (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1, 20),
        default=2,
        metavar="N",
        help="in each of which every path is measured once (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    screen = Screen()
    return run(screen, lambda: demo(screen, options.seconds, options.rounds))


def demo(screen: Screen, seconds: int, n_rounds: int) -> None:
    """Run the whole demo, from making the lab to removing it.  Raises UdptunError when something does not work."""
    if missing := missing_requirements(("ip", "bridge", "nsenter", "ping", "iperf3", "gcc")):
        raise BenchError(f"the demo needs {' and '.join(missing)}")
    screen.step("making a switch and two hosts, h1 and h2, in namespaces of this machine")
    with tempfile.TemporaryDirectory() as directory, Lab("demo") as lab, uninterrupted_end():
        udp = compiled("traffic/udp.c", File(directory))
        screen.step(f"starting `udptun daemon` in both, {json.dumps(DEFAULT_NET_CONF)}")
        lab.start()
        one, two = lab.host(1).pod(1), lab.host(2).pod(1)
        screen.step(f"both have a lease; pods added: {one} has {one.address}, {two} has {two.address}")
        cut = f"cut -c -{_WIDEST_LINE}"
        _show(screen, lab.host(1), ["udptun", "status", "|", cut], ["sh", "-c", f"{shlex.join(_STATUS)} | {cut}"])
        _show(screen, lab.host(1), ["ip", "route"], ["ip", "route"])
        _ping_both_ways(screen, lab)
        paths = connect(lab)
        others = " and ".join(path.name for path in paths.present if path.name != TUNNEL)
        screen.step(f"the same pods have other paths now, to compare with: {others}")
        for name, reason in paths.missing.items():
            screen.step(f"{name} is left out: {reason}")
        check_idle(screen)
        rounds = [
            {path.name: _measure(screen, f"round {i + 1} of {n_rounds}", path, seconds, udp) for path in order}
            for i, order in interleave(paths.present, n_rounds)
        ]
        screen.title(
            f"pod to pod: one TCP stream of {seconds} s; UDP of {_UDP_BYTES} bytes, sent unpaced; "
            f"{f'median of {n_rounds} rounds' if n_rounds > 1 else 'one round'}"
        )
        screen.show("\n".join(comparison(paths, rounds)))
        screen.show(f"(cores: busy during TCP, of {os.cpu_count()}; both hosts and both ends of iperf3 share them)")
        screen.title("what became of the packets in the tunnel")
        screen.show("\n".join(packets([(host.name, *_counters(host)) for host in lab.hosts])))
        screen.add("\n")
        screen.step("removing the lab")


# --- steps


def _show(screen: Screen, host: Host, shown: Sequence[str], command: Sequence[str]) -> None:
    screen.title(f"{host.name} $ {' '.join(shown)}")
    screen.show(host.run(command).stdout)


def _ping_both_ways(screen: Screen, lab: Lab) -> None:
    tunnel_mtu = lab.host(1).mtu
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    for client, server in ((one, two), (two, one)):
        screen.title(f"{client} $ ping -c 3 -i 0.2 {server.address}")
        path = Path(TUNNEL, tunnel_mtu, client, server, server.address)
        wait_for_path(path)
        screen.show(ping(path, 3, 0.2).text)
    screen.add("\n")


@dataclass(frozen=True, slots=True)
class Figures:
    """One path in one round."""

    ping: Ping
    tcp: Result
    udp: Result


def _measure(screen: Screen, which: str, path: Path, seconds: int, udp: File) -> Figures:
    screen.begin(f"{which}, {path.name + ':':<{len(PLAIN) + 1}} ")
    wait_for_path(path)
    echo = ping(path, 10, 0.05)
    screen.add(f"ping {statistics.median(echo.rtt_ms):.2f} ms, ")
    stream = tcp(path, seconds)
    screen.add(f"TCP {stream.figures['gbit_per_s']:5.2f} Gbit/s, ")
    flood = udp_flood(path, _UDP_SECONDS, _UDP_BYTES, udp)
    screen.add(f"UDP {flood.figures['kpackets_per_s']:.0f}k packets/s\n")
    return Figures(echo, stream, flood)


def _counters(host: Host) -> tuple[dict[str, int], dict[str, int]]:
    """What the datapath counted, and how many packets the kernel's full queues dropped before it."""
    status: dict[str, Any] = json.loads(host.run([*_STATUS, "--json"]).stdout)
    snmp = [line.split() for line in host.path("/proc/1/net/snmp").read_text().splitlines() if line.startswith("Udp:")]
    queue = int(host.path("/sys/class/net/flannel0/statistics/tx_dropped").read_text())
    return status["counters"], {
        "flannel0's queue full": queue,
        "UDP socket's queue full": int(dict(zip(*snmp, strict=True))["RcvbufErrors"]),
    }


# --- tables


def comparison(paths: Paths, rounds: Sequence[dict[str, Figures]]) -> list[str]:
    """The table of all paths, and a line for each missing one."""
    present = {path.name for path in paths.present}

    def of(name: str, what: str, workload: str = "tcp") -> list[float]:
        return [getattr(one[name], workload).figures[what] for one in rounds]

    def relative(name: str, base: str) -> str:
        if base not in present:
            return "-"
        both = (dict(enumerate(of(one, "gbit_per_s"))) for one in (name, base))
        return f"{statistics.median(ratios(*both).values()):.0%}"

    rows = []
    for path in paths.present:
        mine = [one[path.name] for one in rounds]
        rows.append(
            [
                path.name,
                str(path.mtu),
                f"{statistics.median(of(path.name, 'gbit_per_s')):.2f}",
                relative(path.name, PLAIN),
                relative(path.name, VXLAN),
                f"{statistics.median(of(path.name, 'retransmits')):.0f}",
                f"{statistics.median(figures.tcp.usage.busy_cores for figures in mine):.1f}",
                f"{statistics.median(of(path.name, 'kpackets_per_s', 'udp')):.0f}k",
                f"{statistics.median(of(path.name, 'lost', 'udp')):.0%}",
                f"{statistics.median(rtt for figures in mine for rtt in figures.ping.rtt_ms):.2f}",
            ]
        )
    head = ["", "MTU", "TCP Gbit/s", "of plain", "of vxlan", "retrans", "cores", "UDP pkts/s", "lost", "ping ms"]
    lines = table(head, rows)
    return lines + [f"{name:<{len(PLAIN)}}  {reason}" for name, reason in paths.missing.items()]


def packets(hosts: Sequence[tuple[str, dict[str, int], dict[str, int]]]) -> list[str]:
    """From name, counters and full queues of each host to a table, and a line for every kind of loss."""
    rows, losses = [], []
    for name, counters, queues in hosts:
        drops = {counter: n for counter, n in counters.items() if "_drop_" in counter}
        columns = ("encap_packets", "encap_sent", "decap_packets", "decap_delivered")
        rows.append([name, *(f"{counters[column]:,}" for column in columns), f"{sum(drops.values()):,}"])
        losses += [f"{name}: {reason}: {n:,}" for reason, n in {**drops, **queues}.items() if n]
    head = ["", "from pods", "sent to peers", "from peers", "delivered to pods", "dropped"]
    return table(head, rows) + losses


if __name__ == "__main__":
    sys.exit(main())

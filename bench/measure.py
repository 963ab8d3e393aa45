"""One measurement of one path each: ping, a TCP stream, a flood of small datagrams."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from bench.paths import Path
from udptun.errors import UdptunError

UDP_PAYLOAD = 64
"""Bytes a datagram of the flood carries."""

_SLACK_S = 20
"""How much longer than asked for iperf3 may take, connecting and exchanging results included."""


class BenchError(UdptunError):
    """A measurement failed, or what it needs is missing."""


@dataclass(frozen=True, slots=True)
class Ping:
    """`rtt_ms` of every echo in order; `text` is what ping printed."""

    rtt_ms: tuple[float, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Tcp:
    """`gbit_per_s` is what arrived.  `busy_cores` is the whole machine's, which is client, both hosts and server."""

    command: tuple[str, ...]
    gbit_per_s: float
    retransmits: int
    busy_cores: float
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UdpFlood:
    """Datagrams of UDP_PAYLOAD bytes as fast as the client can send them; `lost` is the share that did not arrive."""

    command: tuple[str, ...]
    packets_per_s: float
    lost: float
    busy_cores: float
    raw: Mapping[str, Any]


def ping(path: Path, count: int, interval_s: float) -> Ping:
    """Raises BenchError when a single echo is lost."""
    command = ["ping", "-c", str(count), "-i", f"{interval_s:g}", "-W", "2", str(path.address)]
    result = path.client.run(command, check=False)
    rtt_ms = parse_ping(result.stdout)
    if len(rtt_ms) != count:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise BenchError(
            f"{count - len(rtt_ms)} of {count} pings from {path.client} to {path.server} at {path.address} over "
            f"{path.name} were lost: {said[-1] if said else 'ping said nothing'}"
        )
    return Ping(rtt_ms, result.stdout)


def parse_ping(text: str) -> tuple[float, ...]:
    """Round-trip times, milliseconds, from the output of iputils' ping; duplicates are not counted."""
    return tuple(
        float(found[1])
        for line in text.splitlines()
        if "(DUP!)" not in line and (found := re.search(r"icmp_seq=\d+ .*time=([0-9.]+) ms", line))
    )


def tcp(path: Path, seconds: int) -> Tcp:
    """One TCP stream from client to server."""
    command, output, busy_cores = _iperf3(path, seconds, [])
    return parse_tcp(command, output, busy_cores)


def parse_tcp(command: Sequence[str], output: Mapping[str, Any], busy_cores: float) -> Tcp:
    """Read iperf3's JSON.  Raises BenchError when it lacks what we need."""
    end = _end_of(output, "sum_received", "sum_sent")
    gbit_per_s = end["sum_received"]["bits_per_second"] / 1e9
    return Tcp(tuple(command), gbit_per_s, end["sum_sent"]["retransmits"], busy_cores, output)


def udp_flood(path: Path, seconds: int) -> UdpFlood:
    """Small datagrams, unpaced, from client to server."""
    command, output, busy_cores = _iperf3(path, seconds, ["-u", "-b", "0", "-l", str(UDP_PAYLOAD)])
    return parse_udp_flood(command, output, busy_cores)


def parse_udp_flood(command: Sequence[str], output: Mapping[str, Any], busy_cores: float) -> UdpFlood:
    """Read iperf3's JSON.  Raises BenchError when it lacks what we need."""
    end = _end_of(output, "sum_received", "sum")
    received = end["sum_received"]
    # iperf3's own count of losses ends with the last datagram that arrived; those sent after it are lost too.
    lost = 1 - received["bytes"] / UDP_PAYLOAD / end["sum"]["packets"]
    return UdpFlood(tuple(command), received["bits_per_second"] / 8 / UDP_PAYLOAD, max(0.0, lost), busy_cores, output)


def _end_of(output: Mapping[str, Any], *needed: str) -> Mapping[str, Any]:
    if "error" in output:
        raise BenchError(f"iperf3 failed: {output['error']}")
    end: Mapping[str, Any] = output.get("end", {})
    if missing := [name for name in needed if not end.get(name)]:
        raise BenchError(f"iperf3's result lacks {' and '.join(missing)}; version 3.7 or newer is needed")
    return end


def _iperf3(path: Path, seconds: int, options: Sequence[str]) -> tuple[list[str], Mapping[str, Any], float]:
    command = ["iperf3", "-c", str(path.address), "-t", str(seconds), *options, "-J"]
    with _server(path):
        before = CpuTimes.now()
        result = path.client.run(command, check=False, timeout=seconds + _SLACK_S)
        busy_cores = CpuTimes.now().busy_cores_since(before)
    try:
        return command, json.loads(result.stdout), busy_cores
    except ValueError as exc:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise BenchError(
            f"iperf3 from {path.client} over {path.name} ended with status {result.returncode}: "
            f"{said[-1] if said else 'it said nothing'}"
        ) from exc


@contextlib.contextmanager
def _server(path: Path) -> Iterator[None]:
    """An iperf3 server for one run, listening when the block begins."""
    server = path.server.popen(
        ["iperf3", "-s", "-1", "--forceflush", "-B", str(path.address)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert server.stdout is not None
    with server:
        try:
            said = [server.stdout.readline()]
            while said[-1] and "Server listening" not in said[-1]:
                said.append(server.stdout.readline())
            if not said[-1]:
                raise BenchError(f"no iperf3 server in {path.server}: {' / '.join(''.join(said).splitlines())}")
            yield
        finally:
            server.kill()


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """The machine's CPU time since boot, ticks summed over all cores (proc_stat(5))."""

    busy: int
    total: int

    @classmethod
    def now(cls) -> CpuTimes:
        return cls.parse(File("/proc/stat").read_text())

    @classmethod
    def parse(cls, text: str) -> CpuTimes:
        # user nice system idle iowait irq softirq steal; the two guest columns are in user and nice already.
        ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
        return cls(sum(ticks) - ticks[3] - ticks[4], sum(ticks))

    def busy_cores_since(self, before: CpuTimes) -> float:
        """How many cores were busy on average between the two."""
        total = self.total - before.total
        return (self.busy - before.busy) / total * (os.cpu_count() or 1) if total else 0.0

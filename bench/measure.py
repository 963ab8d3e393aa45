"""One measurement of one path each: ping, TCP streams, a flood of datagrams, round trips one at a time.

The figures are about what arrived.  The CPU time of the same moments stands beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from bench.cpu import Meter, Usage
from bench.errors import BenchError
from bench.paths import End, Path
from bench.summary import percentile
from udptun.lab.topology import Lab

_SLACK_S = 20
"""How much longer than asked for a program may take, for connecting and for exchanging results."""

_PORT = "5301"
"""UDP port of our own traffic programs; iperf3 listens on its usual one."""

ECHO_BYTES = 64
"""UDP payload of a ping-pong."""


@dataclass(frozen=True, slots=True)
class Ping:
    """`rtt_ms` of every echo in order; `text` is what ping printed."""

    rtt_ms: tuple[float, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Result:
    """`figures` by name (bench/figures.py)."""

    figures: Mapping[str, float]
    usage: Usage


def wait_for_path(path: Path) -> None:
    """Until an echo comes back: a host is ready before the others have heard of it, and neighbours are resolved.

    Raises BenchError when none of ten does.
    """
    for _ in range(9):
        if _echoes(path, 1, 1)[0]:
            return
    ping(path, 1, 1)


def ping(path: Path, count: int, interval_s: float) -> Ping:
    """Raises BenchError when a single echo is lost."""
    rtt_ms, text, errors = _echoes(path, count, interval_s)
    if len(rtt_ms) != count:
        said = (errors or text).strip().splitlines()
        raise BenchError(
            f"{count - len(rtt_ms)} of {count} pings from {path.client} to {path.server} at {path.address} over "
            f"{path.name} were lost: {said[-1] if said else 'ping said nothing'}"
        )
    return Ping(rtt_ms, text)


def _echoes(path: Path, count: int, interval_s: float) -> tuple[tuple[float, ...], str, str]:
    """Round-trip times, and what ping printed: its output and its errors."""
    command = ["ping", "-c", str(count), "-i", f"{interval_s:g}", "-W", "2", str(path.address)]
    result = path.client.run(command, check=False)
    return parse_ping(result.stdout), result.stdout, result.stderr


def parse_ping(text: str) -> tuple[float, ...]:
    """Round-trip times, milliseconds, from the output of iputils' ping; duplicates are not counted."""
    return tuple(
        float(found[1])
        for line in text.splitlines()
        if "(DUP!)" not in line and (found := re.search(r"icmp_seq=\d+ .*time=([0-9.]+) ms", line))
    )


# --- TCP: iperf3


def tcp(path: Path, seconds: int, n_streams: int = 1, both_ways: bool = False, congestion: str = "") -> Result:
    """TCP streams from client to server, and with `both_ways` as many in the other direction at the same time.

    `congestion`: the algorithm that controls it, empty for the machine's.
    """
    options = ["-P", str(n_streams), *["--bidir"] * both_ways, *(["-C", congestion] if congestion else [])]
    # -i 0: no figures of single seconds.
    command = ["iperf3", "-c", str(path.address), "-t", str(seconds), *options, "-i", "0", "-J"]
    server = ["iperf3", "-s", "-1", "--forceflush", "-B", str(path.address)]
    with _running(path.server, server, "Server listening"):
        meter = Meter(path.pids)
        result = path.client.run(command, check=False, timeout=seconds + _SLACK_S)
        usage = meter.read()
    try:
        output = json.loads(result.stdout)
    except ValueError as exc:
        raise BenchError(_failed(path, "iperf3", result)) from exc
    return Result(_own(path, parse_tcp(output, usage)), usage)


def parse_tcp(output: Mapping[str, Any], usage: Usage) -> dict[str, float]:
    """Figures from iperf3's JSON.  Raises BenchError when something that we need is not in it."""
    if "error" in output:
        raise BenchError(f"iperf3 failed: {output['error']}")
    end: Mapping[str, Any] = output.get("end", {})
    directions = ["", "_bidir_reverse"] if "sum_received_bidir_reverse" in end else [""]
    needed = [f"{name}{direction}" for direction in directions for name in ("sum_received", "sum_sent")]
    if missing := [name for name in needed if not end.get(name)]:
        raise BenchError(f"iperf3's result lacks {' and '.join(missing)}; version 3.7 or newer is needed")
    received = [end[f"sum_received{direction}"] for direction in directions]
    gigabytes = sum(one["bytes"] for one in received) / 1e9
    if not gigabytes:
        raise BenchError("iperf3 moved nothing: the connection stands and no byte arrives")
    return {
        "gbit_per_s": sum(one["bits_per_second"] for one in received) / 1e9,
        "retransmits": sum(end[f"sum_sent{direction}"].get("retransmits", 0) for direction in directions),
        "tunnel_cpu_s_per_gb": usage.tunnel_s / gigabytes,
        "system_cpu_s_per_gb": usage.system_s / gigabytes,
    }


# --- UDP: traffic/udp.c, whose program is `udp`


def udp_flood(path: Path, seconds: int, n_bytes: int, udp: File) -> Result:
    """Datagrams with `n_bytes` of payload, as fast as one sender makes them with a system call each."""
    command = [str(udp), "blast", str(path.address), _PORT, str(n_bytes), str(seconds)]
    with _running(path.server, [str(udp), "sink", str(path.address), _PORT], "ready") as sink:
        meter = Meter(path.pids)
        blast = path.client.run(command, check=False, timeout=seconds + _SLACK_S)
        usage = meter.read()
        if blast.returncode:
            raise BenchError(_failed(path, "udp blast", blast))
        try:
            said = sink.communicate(timeout=_SLACK_S + 1)[0]
        except subprocess.TimeoutExpired as exc:
            raise BenchError(f"the UDP receiver in {path.server} does not end on its own") from exc
    return Result(_own(path, parse_flood(blast.stdout, said, n_bytes, usage)), usage)


def parse_flood(sender: str, sink: str, n_bytes: int, usage: Usage) -> dict[str, float]:
    """Figures from what both ends printed.  Raises BenchError when too little arrived for a rate."""
    sent, received = _number(r"sent (\d+)", sender), _number(r"received (\d+)", sink)
    took_ns = _number(r"first-to-last (\d+)", sink)
    if received < 2 or not took_ns:
        raise BenchError(f"{received} of {sent} datagrams of {n_bytes} bytes arrived: too few for a rate")
    per_s = (received - 1) / took_ns * 1e9
    return {
        "kpackets_per_s": per_s / 1e3,
        "gbit_per_s": per_s * n_bytes * 8 / 1e9,
        "lost": 1 - received / sent,
        "reordered": _number(r"reordered (\d+)", sink),
        "tunnel_cpu_us_per_packet": usage.tunnel_s / received * 1e6,
        "system_cpu_us_per_packet": usage.system_s / received * 1e6,
    }


def round_trips(path: Path, seconds: int, udp: File, lab: Lab) -> Result:
    """One datagram at a time there and back.  A spinner of the lowest priority on every CPU keeps it awake."""
    command = [str(udp), "pingpong", str(path.address), _PORT, str(ECHO_BYTES), str(seconds)]
    echo = [str(udp), "echo", str(path.address), _PORT]
    with _awake(lab), _running(path.server, echo, "ready"):
        meter = Meter(path.pids)
        result = path.client.run(command, check=False, timeout=seconds + _SLACK_S)
        usage = meter.read()
    if result.returncode:
        raise BenchError(_failed(path, "udp pingpong", result))
    return Result(parse_round_trips(result.stdout), usage)


def parse_round_trips(text: str) -> dict[str, float]:
    """Percentiles in microseconds from lines with nanoseconds.  Raises BenchError when no datagram came back."""
    times = sorted(int(line) / 1e3 for line in text.split("\n") if line.isdecimal())
    lost = _number(r"lost (\d+)", text)
    if not times:
        raise BenchError(f"{lost} ping-pong datagrams were sent, and none came back in time to be counted")
    return {
        "p50_us": percentile(times, 50),
        "p99_us": percentile(times, 99),
        "p99_9_us": percentile(times, 99.9),
        "round_trips": len(times),
        "lost_round_trips": lost,
    }


_SPIN = """import os
os.sched_setaffinity(0, {%d})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.setsid()
if os.path.exists("/proc/self/autogroup"):
    open("/proc/self/autogroup", "w").write("19")
while True: pass"""


@contextlib.contextmanager
def _awake(lab: Lab) -> Iterator[None]:
    """Keep every CPU awake in the block.

    Waking a sleeping CPU costs a virtual machine more than a tunnel does, and not evenly.  With SCHED_IDLE the spinner
    gives way to everything else at once, and the scheduler places work as if the CPU were idle.  That holds within one
    session (sched(7), autogroup).  So the spinner has a session of its own, with a low weight: it gives way to other
    sessions too, such as the datapath's.
    """
    with contextlib.ExitStack() as undo:
        for cpu in sorted(os.sched_getaffinity(0)):
            spinner = lab.switch.popen([sys.executable, "-I", "-S", "-c", _SPIN % cpu], stdin=subprocess.DEVNULL)
            undo.callback(spinner.wait)
            undo.callback(spinner.kill)
        yield


# --- memory


def memory(path: Path) -> Result:
    """Memory of the tunnel's processes on the first host, PSS in MiB."""
    figures: dict[str, float] = {}
    for process in path.processes:
        if process.host == path.processes[0].host:
            mib = pss_bytes(process.pid) / 2**20
            for name in {f"{process.role}_mib", "memory_mib"}:
                figures[name] = figures.get(name, 0.0) + mib
    return Result(figures, Usage.none())


def bytes_alone(pids: Sequence[int]) -> int:
    """What these processes weigh together on a machine where no other shares a page with them.

    Each page counts once, and their memory files (memfd) count whole, mapped or not.  Asking needs root.
    """
    pages: set[int] = set()
    files: dict[int, int] = {}
    for pid in pids:
        with File(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            for line in File(f"/proc/{pid}/maps").read_text().splitlines():
                found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line)
                assert found is not None
                if found[3] == "[vsyscall]" or found[3].startswith("/memfd:"):
                    continue
                first, end = (int(word, 16) // _PAGE for word in found.group(1, 2))
                pagemap.seek(8 * first)
                entries = struct.iter_unpack("=Q", pagemap.read(8 * (end - first)))
                pages.update(entry & _FRAME for (entry,) in entries if entry & _PRESENT)
        for fd in File(f"/proc/{pid}/fd").iterdir():
            if str(fd.readlink()).startswith("/memfd:"):
                files[fd.stat().st_ino] = 512 * fd.stat().st_blocks
    return len(pages) * _PAGE + sum(files.values())


_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1
"""Of an entry of /proc/PID/pagemap: whether the page is in memory, and where."""


def pss_bytes(pid: int) -> int:
    """Proportional set size of the process, with a page that several processes share divided among them."""
    return _number(r"\nPss: +(\d+) kB", File(f"/proc/{pid}/smaps_rollup").read_text()) * 1024


# --- shared


def _own(path: Path, figures: dict[str, float]) -> dict[str, float]:
    """`figures`, without the tunnel's CPU time where the kernel is the tunnel and no process can be told apart."""
    return {name: value for name, value in figures.items() if path.processes or not name.startswith("tunnel_")}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BenchError(f"`{pattern}` is not in the output {text[-200:]!r}")
    return int(found[1])


def _failed(path: Path, program: str, result: subprocess.CompletedProcess[str]) -> str:
    said = (result.stderr or result.stdout).strip().splitlines()
    return (
        f"{program} from {path.client} over {path.name} ended with status {result.returncode}: "
        f"{said[-1] if said else 'it said nothing'}"
    )


@contextlib.contextmanager
def _running(end: End, command: Sequence[str], ready: str) -> Iterator[subprocess.Popen[str]]:
    """Run a receiving program for the block, which begins when the program has said `ready`."""
    program = end.popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert program.stdout is not None
    with program:
        try:
            said = [program.stdout.readline()]
            while said[-1] and ready not in said[-1]:
                said.append(program.stdout.readline())
            if not said[-1]:
                raise BenchError(f"no `{command[0]}` in {end}: {' / '.join(''.join(said).splitlines())}")
            yield program
        finally:
            program.kill()

"""The load: datagrams and streams between the pods, of which every packet and byte is accounted for."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from udptun.lab.host import Pod
from udptun.lab.machine import wait_until

_END = Path(__file__).with_name("traffic_end.py")
_PULSE = Path(__file__).with_name("pulse.py")
_FIRST_PORT = 5001
_ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Gap:
    """`n` packets in a row that never came; all were sent after `after_ns` and before `before_ns`."""

    n: int
    after_ns: int
    before_ns: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What a flow's receiver has seen since it was asked the last time; `received`: since the beginning."""

    received: int
    spoilt: int
    longest_silence_ns: int
    lost: list[Gap] = field(default_factory=list)
    doubled: int = 0
    overtaken: int = 0


class Flow:
    """One flow.  `received` counts packets of UDP, bytes of TCP."""

    def __init__(self, kind: str, source: Pod, destination: Pod, port: int, rate: float) -> None:
        self.kind = kind
        self.hosts = (source.host.name, destination.host.name)
        self.rate = rate
        self._receiver = _start(destination, f"{kind}-receive", destination, port, rate)
        self._sender = _start(source, f"{kind}-send", destination, port, rate)

    def __str__(self) -> str:
        return f"{self.kind} {self.hosts[0]} -> {self.hosts[1]}"

    def ask(self) -> Seen:
        """Raises BenchError when an end has ended."""
        for role, process in (("sender", self._sender), ("receiver", self._receiver)):
            if process.poll() is not None:
                raise BenchError(f"the {role} of {self} has ended")
        assert self._receiver.stdin is not None
        assert self._receiver.stdout is not None
        self._receiver.stdin.write("\n")
        self._receiver.stdin.flush()
        if not select.select([self._receiver.stdout], [], [], _ANSWER_S)[0]:
            raise BenchError(f"the receiver of {self} does not answer")
        facts: dict[str, Any] = json.loads(self._receiver.stdout.readline())
        gaps = [Gap(*gap) for gap in facts.pop("lost", [])]
        return Seen(**facts, lost=gaps)

    def end(self) -> None:
        # The receiver first, and wholly: it says so when its connection ends.
        for process in (self._receiver, self._sender):
            process.kill()
            with process:
                pass


def _start(pod: Pod, role: str, destination: Pod, port: int, rate: float) -> subprocess.Popen[str]:
    process = pod.popen(
        [sys.executable, "-I", "-S", str(_END), role, str(destination.address), str(port), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise BenchError(f"the {role} at {pod} has ended")
    return process


@contextlib.contextmanager
def load(pods: Sequence[Pod], packets_per_s: float, bytes_per_s: float) -> Iterator[list[Flow]]:
    """From each pod datagrams to the next one, and a stream to the one before; all of them until the end."""
    flows: list[Flow] = []
    for here, there in zip(pods, [*pods[1:], pods[0]], strict=True):
        wait_until(
            f"{there} to answer {here}",
            lambda here=here, there=there: _is_answered(here, there),  # type: ignore[misc]
            _ANSWER_S,
        )
    try:
        for here, there in zip(pods, [*pods[1:], pods[0]], strict=True):
            flows.append(Flow("udp", here, there, _FIRST_PORT + len(flows), packets_per_s))
            flows.append(Flow("tcp", there, here, _FIRST_PORT + len(flows), bytes_per_s))
        yield flows
    finally:
        for flow in flows:
            flow.end()


def _is_answered(here: Pod, there: Pod) -> bool:
    return here.run(["ping", "-c", "1", "-W", "1", str(there.address)], check=False).returncode == 0


class Pulse:
    """Tells when the machine gave a process of the datapath's priority no processor (pulse.py)."""

    def __init__(self, command: Sequence[str]) -> None:
        self.starved: list[tuple[int, int]] = []
        """From and to, CLOCK_MONOTONIC ns."""
        self._process = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", str(_PULSE)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._rest = b""

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        with self._process:
            pass

    def read(self) -> None:
        """Take what it has said so far into `starved`."""
        while select.select([self._output], [], [], 0)[0]:
            data = self._output.read1(1 << 16)  # type: ignore[attr-defined]
            if not data:
                raise BenchError("the pulse has ended")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                from_ns, to_ns = map(int, line.split())
                self.starved.append((from_ns, to_ns))


def wait_for_progress(flows: Sequence[Flow], collected: dict[str, list[Seen]], timeout_s: float) -> list[str]:
    """Until each flow has received something more; the flows that have not after `timeout_s`.

    What the flows say meanwhile is added to `collected`, by their names.
    """
    deadline = time.monotonic() + timeout_s
    waiting: dict[str, tuple[Flow, int]] = {}
    for flow in flows:
        seen = flow.ask()
        collected[str(flow)].append(seen)
        waiting[str(flow)] = (flow, seen.received)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.1)
        for name, (flow, before) in list(waiting.items()):
            seen = flow.ask()
            collected[name].append(seen)
            if seen.received > before:
                del waiting[name]
    return list(waiting)

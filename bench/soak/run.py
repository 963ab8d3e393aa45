"""`python -m bench soak`: the command, and one fault after the other until the time is over."""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from bench.errors import BenchError
from bench.results import save
from bench.session import Screen, run, uninterrupted_end, whole_number
from bench.soak import checks, report
from bench.soak.faults import FAULTS, SLACK, Fault, faults_of
from bench.soak.ground import BACKENDS, Ground, leaked, read_status, watch_for_leaks
from bench.soak.load import Flow, Pulse, Seen, load, wait_for_progress
from bench.soak.schedule import Step, schedule
from bench.soak.state import Footprint, footprints, kernel_losses, kernel_state
from bench.soak.store import REAL_TIME, STORES
from udptun.lab.errors import LabError
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab, Offload, missing_requirements

N_HOSTS = 3
SETTLE_S = 90.0
"""Until everything is as it was, after a fault has gone.  The longest pause of ours, that before the start of a
datapath process after many deaths, is 30 s."""
QUIET_S = 1.2
"""Load alone, after everything is as it was: whatever is lost until then shows as lost (traffic_end.LOST_AFTER_NS)."""
NARROW_FOR_S = 150.0
"""So long the tunnel may take a path for narrow that is so no more: it tries after a minute whether it takes more."""
PROGRESS_S = 60.0
"""Until each flow goes on.  TCP waits up to twice as long as the outage was."""
_LOG_LINES = 40
_FAILURES = (LabError, BenchError, subprocess.TimeoutExpired)
"""Of what is done to hosts, and of looks at them."""
_NEEDED = ("ip", "bridge", "nsenter", "ping", "ethtool", "nft", "iptables", "chrt", "nstat", "sysctl")


@dataclass(frozen=True, slots=True)
class Options:
    """What the schedule depends on, and with it everything that happens."""

    seed: int
    minutes: float
    backend: str = "udp"
    store: str = "local"
    mode: str = "B"
    faults: tuple[str, ...] = ()
    first: int = 1
    steps: int = 0
    packets_per_s: int = 500
    mbit_per_s: int = 20

    def command(self, step: int | None = None) -> str:
        """What repeats it, or one step of it."""
        words = ["python", "-m", "bench", "soak", "--seed", str(self.seed), "--minutes", f"{self.minutes:g}"]
        words += ["--backend", self.backend, "--store", self.store, "--mode", self.mode]
        words += ["--packets", str(self.packets_per_s), "--mbit", str(self.mbit_per_s)]
        words += ["--faults", ",".join(self.faults)] if self.faults else []
        if step is not None:
            words += ["--first", str(step), "--steps", "1"]
        return shlex.join(words)


@dataclass(slots=True)
class Outcome:
    """Of one step.  Times are seconds since the soak began, or of an interval."""

    number: int
    fault: str
    host: str
    at_s: float
    held_s: float
    settled_s: float
    lost: int = 0
    starved: int = 0
    """Packets lost while the machine gave the datapath no processor."""
    outage_s: float = 0.0
    """The longest gap of lost packets."""
    after_s: float = 0.0
    """How long after the fault had gone the last packet was lost."""
    silence_s: float = 0.0
    """The longest of a stream."""
    doubled: int = 0
    overtaken: int = 0
    leaked: int = 0
    """Frames on the underlay in clear text."""
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 when anything was wrong."""
    options, file = _parse(arguments)
    screen = Screen()
    return run(screen, lambda: _soak(screen, options, file))


def _parse(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m bench soak",
        description="Three hosts with pods under load, and random faults one after the other.  Fails on any loss "
        "outside a fault's own window, and on anything that is not as it was when the fault is over.",
        epilog=f"The faults: {', '.join(FAULTS)}.",
    )
    parser.add_argument("--minutes", type=_minutes, default=10.0, metavar="N", help="how long (default: 10)")
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32),
        default=1,
        metavar="S",
        help="same seed, same faults (default: 1)",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="udp", help="default: udp")
    parser.add_argument("--store", choices=STORES, default="local", help="default: local")
    parser.add_argument("--mode", choices="ABC", default="B", help="of the underlay, as of the bench (default: B)")
    parser.add_argument("--faults", type=_faults, default=(), metavar="A,B,…", help="these only (default: all)")
    parser.add_argument(
        "--first", type=whole_number(1, 10**9), default=1, metavar="N", help="begin with this step of the schedule"
    )
    parser.add_argument(
        "--steps", type=whole_number(0, 10**9), default=0, metavar="N", help="end after so many (default: 0, no limit)"
    )
    parser.add_argument(
        "--packets",
        type=whole_number(1, 10**6),
        default=500,
        metavar="N",
        help="packets/s of each UDP flow (default: 500)",
    )
    parser.add_argument(
        "--mbit", type=whole_number(1, 10**5), default=20, metavar="N", help="Mbit/s of each TCP stream (default: 20)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step there, the report beside it")
    given = parser.parse_args(arguments)
    options = Options(
        given.seed,
        given.minutes,
        given.backend,
        given.store,
        given.mode,
        given.faults,
        given.first,
        given.steps,
        given.packets,
        given.mbit,
    )
    return options, given.json


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 60 * 24 * 30:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return minutes


def _faults(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in FAULTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is no fault; they are {', '.join(FAULTS)}")
    return names


def _soak(screen: Screen, options: Options, file: Path | None) -> None:
    """Raises BenchError when anything was wrong."""
    tools = [*_NEEDED, *(("etcd", "etcdctl") if options.store == "etcd" else ())]
    if missing := missing_requirements(tools):
        raise BenchError(f"the soak needs {' and '.join(missing)}")
    document: dict[str, Any] = {
        "kind": "soak",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": options.command(),
        "machine": machine.facts(),
        "options": asdict(options),
        "runs": [],
    }
    with ExitStack() as stack:
        screen.step(f"seed {options.seed}: bringing up {N_HOSTS} hosts; {options.command()}")
        ground = stack.enter_context(_ground(options))
        stack.enter_context(uninterrupted_end())
        pulse = stack.enter_context(Pulse(REAL_TIME))
        pods = [host.pod(1) for host in ground.hosts]
        flows = stack.enter_context(load(pods, options.packets_per_s, options.mbit_per_s * 1e6 / 8))
        soak = Soak(screen, options, ground, flows, pulse)
        soak.begin()
        for outcome in soak.steps():
            document["runs"].append(asdict(outcome))
            if file is not None:
                save(document, file)
        document |= soak.summary()
    text = report.text(document)
    screen.add("\n" + text + "\n")
    if file is not None:
        save(document, file)
        file.with_suffix(".txt").write_text(text)
        screen.step(f"written: {file}, {file.with_suffix('.txt')}")
    if failed := report.n_problems(document):
        raise BenchError(f"seed {options.seed}: {failed} things were wrong; the report names them")


@contextmanager
def _ground(options: Options) -> Iterator[Ground]:
    with Lab(f"soak{options.seed}", n_hosts=N_HOSTS, net_conf={"Network": "-"}) as lab:
        store = STORES[options.store](lab)
        lab.daemon_command = [*REAL_TIME, sys.executable, "-m", "udptun", "daemon", *store.daemon_flags]
        lab.set_offload(Offload(options.mode))
        ground = Ground(lab, list(lab.hosts), store, options.backend)
        store.start(ground.conf)
        lab.start()
        yield ground


class Soak:
    """One run.  `steps` makes the steps and yields what came of each."""

    def __init__(self, screen: Screen, options: Options, ground: Ground, flows: list[Flow], pulse: Pulse) -> None:
        self._screen = screen
        self._options = options
        self._ground = ground
        self._flows = flows
        self._pulse = pulse
        self._subnets = [str(host.subnet) for host in ground.hosts]
        self._states: list[dict[str, list[str]]] = []
        self._counters: list[dict[str, int]] = []
        self._n_workers = 0
        self._seen: dict[str, list[Seen]] = {str(flow): [] for flow in flows}
        self._footprints: list[Footprint] = []
        self._narrow_until_s: dict[str, float] = {}
        """By hosts."""
        self._start_s = 0.0
        self._log_lengths: dict[str, int] = {}
        self._losses: dict[str, int] = {}
        self._leaked = 0

    def begin(self) -> None:
        """Take down how everything is while all is well.  Raises LabError when it does not get well."""
        facts = read_status(self._ground.hosts[0])
        self._n_workers = len(facts["datapath"]["workers"])
        wait_until("every host to be well", lambda: not self._host_problems(), SETTLE_S)
        self._states = [kernel_state(self._ground, host) for host in self._ground.hosts]
        self._counters = [read_status(host)["counters"] for host in self._ground.hosts]
        self._losses = kernel_losses(self._ground.hosts, self._ground.device)
        watch_for_leaks(self._ground)
        time.sleep(QUIET_S)
        for flow in self._flows:
            # What was lost while the flows began is nobody's matter.
            flow.ask()
        self._start_s = time.monotonic()

    def steps(self) -> Iterator[Outcome]:
        options = self._options
        kinds = [fault.kind for fault in faults_of(options.mode) if not options.faults or fault.name in options.faults]
        if not kinds:
            raise BenchError(f"none of these faults can be made in mode {options.mode}")
        all_steps = schedule(options.seed, kinds, N_HOSTS)
        for step in itertools.islice(all_steps, options.first - 1, None):
            over_s = self._start_s + options.minutes * 60
            if time.monotonic() > over_s or (options.steps and step.number >= options.first + options.steps):
                return
            outcome, is_well = self._step(step)
            yield outcome
            if not is_well:
                self._screen.step("it does not get well: the soak ends here")
                return

    def _step(self, step: Step) -> tuple[Outcome, bool]:
        fault, host = FAULTS[step.fault], self._ground.hosts[step.host - 1]
        time.sleep(step.pause_s)
        at_s = time.monotonic() - self._start_s
        self._screen.begin(f"{step.number}. {fault.name}, {host.name}: ")
        self._log_lengths = {each.name: len(each.daemon_log()) for each in self._ground.lab.hosts if each.machine.is_up}
        if fault.may_narrow:
            self._narrow_until_s[host.name] = float("inf")
        came_ns = time.monotonic_ns()
        problems: list[str] = []
        try:
            with fault.act(self._ground, host, random.Random(step.draw)):
                time.sleep(step.hold_s)
                healing_ns = time.monotonic_ns()
        except (*_FAILURES, AssertionError, OSError) as exc:
            problems.append(f"the fault could not be made or undone: {exc}")
            healing_ns = time.monotonic_ns()
        went_ns = time.monotonic_ns()
        if fault.may_narrow:
            self._narrow_until_s[host.name] = time.monotonic() + NARROW_FOR_S
        unsettled = self._settle(fault)
        settled_s = (time.monotonic_ns() - went_ns) / 1e9
        problems += unsettled
        stuck = wait_for_progress(self._flows, self._seen, PROGRESS_S)
        problems += [f"{name} does not go on" for name in stuck]
        time.sleep(QUIET_S)
        window = checks.Window(
            came_ns,
            went_ns,
            None if fault.after_s is None else fault.after_s * SLACK,
            frozenset([host.name]),
            fault.may_double,
        )
        outcome = Outcome(
            step.number,
            fault.name,
            host.name,
            round(at_s, 1),
            (healing_ns - came_ns) / 1e9,
            settled_s,
            problems=problems,
        )
        self._judge_flows(outcome, window)
        self._look_for_leaks(outcome, fault)
        self._look_at_logs(outcome)
        self._say(outcome)
        return outcome, not unsettled and not stuck

    def _narrow_for(self, host: Host) -> list[str]:
        """Subnets whose path the host may take for narrow: those of narrow hosts, or all if it is one itself."""
        narrow = {name for name, until_s in self._narrow_until_s.items() if time.monotonic() < until_s}
        hosts = zip(self._ground.hosts, self._subnets, strict=True)
        return [subnet for each, subnet in hosts if host.name in narrow or each.name in narrow]

    def _host_problems(self) -> list[str]:
        """By the status documents and the store, and what does not add up in the counters."""
        leases = self._ground.store.leases()
        wrong = []
        for host, subnet in zip(self._ground.hosts, self._subnets, strict=True):
            try:
                facts = read_status(host)
            except Exception as exc:
                wrong.append(f"{host}: no status: {exc}")
                continue
            address = str(host.underlay_address)
            found = checks.host_problems(facts, leases, address, subnet, self._n_workers, self._narrow_for(host))
            wrong += [f"{host}: {line}" for line in found + checks.sum_problems(facts["counters"])]
        return wrong

    def _state_problems(self) -> list[str]:
        """By the kernel's state, processes and files."""
        return [
            f"{host}: {line}"
            for host, before in zip(self._ground.hosts, self._states, strict=True)
            for line in checks.state_problems(before, kernel_state(self._ground, host), self._narrow_for(host))
        ]

    def _settle(self, fault: Fault) -> list[str]:
        """Wait until everything is as it was; what is not, after SETTLE_S."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            try:
                wrong = self._host_problems() or self._state_problems()
            except _FAILURES as exc:
                wrong = [str(exc)]
            if not wrong or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not wrong:
            wrong += self._look_at_counters(fault)
            for host in self._ground.hosts:
                self._footprints += footprints(host)
        return wrong

    def _look_at_counters(self, fault: Fault) -> list[str]:
        wrong = []
        for n, host in enumerate(self._ground.hosts):
            now = read_status(host)["counters"]
            if not fault.counters_begin_anew:
                wrong += [f"{host}: {line}" for line in checks.backward_problems(self._counters[n], now)]
            self._counters[n] = now
        return wrong

    def _judge_flows(self, outcome: Outcome, window: checks.Window) -> None:
        self._pulse.read()
        starved = [it for it in self._pulse.starved if it[1] > window.came_ns - 5 * checks.SECOND_NS]
        for flow in self._flows:
            seen = [*self._seen[str(flow)], flow.ask()]
            self._seen[str(flow)] = []
            outcome.problems += checks.flow_problems(str(flow), flow.hosts, seen, window, starved)
            for gap in (gap for one in seen for gap in one.lost):
                outcome.lost += gap.n
                outcome.starved += gap.n * checks.is_starved(gap, starved)
                outcome.outage_s = max(outcome.outage_s, (gap.before_ns - gap.after_ns) / 1e9)
                outcome.after_s = max(outcome.after_s, (gap.before_ns - window.went_ns) / 1e9)
            outcome.doubled += sum(one.doubled for one in seen)
            outcome.overtaken += sum(one.overtaken for one in seen)
            if flow.kind == "tcp":
                longest = max(one.longest_silence_ns for one in seen) / 1e9
                outcome.silence_s = max(outcome.silence_s, longest)
        self._pulse.starved = starved

    def _look_for_leaks(self, outcome: Outcome, fault: Fault) -> None:
        so_far = leaked(self._ground)
        outcome.leaked, self._leaked = so_far - self._leaked, so_far
        if outcome.leaked and not fault.may_leak:
            outcome.problems.append(f"{outcome.leaked} frames with a pod's address crossed the underlay in clear text")

    def _look_at_logs(self, outcome: Outcome) -> None:
        for host in self._ground.hosts:
            if "Traceback" in host.daemon_log()[self._log_lengths[host.name] :]:
                outcome.problems.append(f"{host}: a traceback in its log")

    def _say(self, outcome: Outcome) -> None:
        figures = [f"settled after {outcome.settled_s:.2f} s"]
        if outcome.lost:
            figures.append(f"lost {outcome.lost} (gap {outcome.outage_s:.3f} s)")
        if outcome.starved:
            figures.append(f"{outcome.starved} of them for want of a processor")
        figures.append(f"streams silent for {outcome.silence_s:.2f} s at most")
        self._screen.add(", ".join(figures) + "\n")
        if not outcome.problems:
            return
        self._screen.step(f"WRONG at step {outcome.number}, {outcome.fault} on {outcome.host}, {outcome.at_s} s:")
        self._screen.show("\n".join(outcome.problems))
        self._screen.show(f"to repeat it: {self._options.command(outcome.number)}")
        losses = kernel_losses(self._ground.hosts, self._ground.device)
        more = {name: n - self._losses.get(name, 0) for name, n in losses.items()}
        self._screen.show(f"dropped by kernels so far: { {name: n for name, n in more.items() if n} }")
        for host in self._ground.hosts:
            said = host.daemon_log()[self._log_lengths[host.name] :].splitlines()[-_LOG_LINES:]
            self._screen.show("\n".join([f"log of {host} since the fault came:", *said]))

    def summary(self) -> dict[str, Any]:
        """What the report says of the whole run."""
        grown = checks.growths(self._footprints)
        last = {(it.host, it.role): it for it in self._footprints}
        return {
            "minutes": round((time.monotonic() - self._start_s) / 60, 1),
            "growths": [asdict(it) for it in grown],
            "growth_problems": [line for it in grown for line in checks.growth_problems(it)],
            "footprints": [asdict(it) for it in last.values()],
            "course": [asdict(it) for it in self._footprints if it.host == self._ground.hosts[-1].name],
            "flows": {str(flow): flow.ask().received for flow in self._flows},
        }

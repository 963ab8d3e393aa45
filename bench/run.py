"""`./dev bench`: measure all paths in one lab, in interleaved rounds, into one result file."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

from bench import machine, report, results
from bench.compiler import missing_compiler
from bench.cpu import Usage
from bench.errors import BenchError
from bench.figures import (
    FIGURES,
    IPV6_OF,
    LEASE_PATHS,
    LEASES_OF,
    MODES,
    N_LEASES,
    PATHS,
    TUNNEL,
    TUNNELS,
    WORKLOADS,
    by_ipv6,
    lease_path,
    paths_of,
)
from bench.measure import Result, wait_for_path
from bench.paths import Path, Tools, connect, interleave
from bench.session import BUSY_LIMIT, Screen, check_idle, run, uninterrupted_end, whole_number
from bench.workloads import IPV6_NETWORK, NETWORK, RUN, Bench, prepare, set_leases
from udptun.lab.errors import LabError
from udptun.lab.topology import Lab, Offload, missing_requirements

_NEEDED = ("ip", "bridge", "nsenter", "ping", "iperf3", "ethtool")


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: words of figures.MODES, .PATHS and .WORKLOADS, rounds, seconds a run.

    The paths of IPv6 follow from `families`.
    """

    modes: tuple[str, ...]
    paths: tuple[str, ...]
    workloads: tuple[str, ...]
    repeats: int
    seconds: int
    families: tuple[str, ...] = ("4",)
    congestion: str = ""
    """TCP's control; empty: the machine's."""


FULL = Options(tuple(MODES), tuple(it for it in PATHS if it not in IPV6_OF.values()), tuple(WORKLOADS), 5, 3)
QUICK = Options(("A", "B"), ("udptun", "naive", "vxlan"), ("tcp_1", "udp_64", "rtt"), 3, 1)


def main(arguments: Sequence[str]) -> int:
    """`python -m bench`: measure.  Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="Measure the tunnel beside other ways from pod to pod, in a lab on this machine.",
        epilog="`./dev bench report FILE.json` writes the report anew; "
        "`./dev bench compare OLD.json NEW.json` says what became faster or slower.",
    )

    def words(name: str, known: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(
            f"--{name}",
            type=_some_of(known),
            metavar="A,B,…",
            help=f"of {', '.join(known)} (default: {'all' if default == known else ', '.join(default)})",
        )

    words("modes", FULL.modes, FULL.modes)
    words("paths", FULL.paths, FULL.paths)
    words("workloads", FULL.workloads, FULL.workloads)
    parser.add_argument(
        "--family",
        type=_some_of(("4", "6")),
        metavar="4,6",
        help=f"IP versions between pods; by 6 only {', '.join(IPV6_OF)} are measured (default: 4)",
    )
    parser.add_argument(
        "--repeats", type=whole_number(1, 1000), metavar="N", help=f"interleaved rounds (default: {FULL.repeats})"
    )
    parser.add_argument(
        "--seconds", type=whole_number(1, 3600), metavar="S", help=f"that a run sends (default: {FULL.seconds})"
    )
    parser.add_argument("--congestion", default="", metavar="NAME", help="TCP's control (default: the machine's)")
    parser.add_argument("--quick", action="store_true", help="under two minutes: fewer of everything not named")
    parser.add_argument("--flanneld", type=File, metavar="PATH", help="a real flanneld to measure too; needs etcd")
    parser.add_argument("--json", type=File, metavar="FILE", help="write every run there, the report beside it")
    given = vars(parser.parse_args(arguments))
    named = {name: given[name] for name in ("modes", "paths", "workloads", "repeats", "seconds") if given[name]}
    named |= {"families": given["family"] or ("4",), "congestion": given["congestion"]}
    options = replace(QUICK if given["quick"] else FULL, **named)
    if given["flanneld"] and "paths" not in named:
        options = replace(options, paths=tuple(dict.fromkeys((*options.paths, "flanneld"))))
    options = replace(options, paths=paths_of(options.paths, options.families))
    if not options.paths:
        parser.error(f"--family 6: none of these --paths has IPv6; {', '.join(IPV6_OF)} have")
    screen = Screen()
    return run(screen, lambda: bench(screen, options, given["flanneld"], given["json"]))


def bench(screen: Screen, options: Options, flanneld: File | None, file: File | None) -> None:
    """Measure, show the report, write `file`.  Raises UdptunError when something does not work."""
    missing = missing_requirements(_NEEDED) + [text for text in [missing_compiler()] if text]
    if missing:
        raise BenchError(f"the bench needs {' and '.join(missing)}")
    document: dict[str, Any] = {
        "schema": results.SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "machine": machine.facts(),
        "options": asdict(options),
        "runs": [],
    }

    def save() -> None:
        if file is not None:
            results.save(document, file)

    # Before the first round: a file that cannot be written must not cost a whole measurement.
    save()
    screen.step("bringing up two hosts with a pod each")
    conf: dict[str, object] = {"Network": str(NETWORK), "Backend": {"Type": "udp"}}
    has_ipv6 = "6" in options.families
    if has_ipv6:
        conf |= {"EnableIPv6": True, "IPv6Network": str(IPV6_NETWORK)}
    with (
        tempfile.TemporaryDirectory() as directory,
        Lab("bench", net_conf=conf, ipv6=has_ipv6) as lab,
        uninterrupted_end(),
    ):
        lab.start()
        tools = prepare(lab, File(directory), options.seconds, options.congestion)
        screen.step("connecting the pods by " + ", ".join(PATHS[key] for key in options.paths))
        paths = connect(lab, options.paths, Tools(File(directory), flanneld))
        for name, reason in paths.missing.items():
            screen.step(f"{name} is left out: {reason}")
        document["paths"] = [{"name": path.name, "mtu": path.mtu} for path in paths.present]
        document["missing"] = paths.missing
        document["idle_busy_cores"] = check_idle(screen)
        for one in _runs(screen, tools, plan(options, paths.present), paths.present):
            document["runs"].append(one)
            save()
    screen.add("\n" + report.markdown(document) + "\n")
    if file is not None:
        written = report.write(file)
        screen.step(f"written: {', '.join(map(str, [file, *written]))}")
    if failed := sum("error" in one for one in document["runs"]):
        raise BenchError(f"{failed} of {len(document['runs'])} runs failed; the report names them")


@dataclass(frozen=True, slots=True)
class Step:
    """One run to be made.  `path` is its name in the result, `n_leases` the number of other hosts' leases."""

    round: int
    mode: str
    workload: str
    path: str
    n_leases: int = 1


def plan(options: Options, paths: Sequence[Path]) -> list[Step]:
    """Every run, in the order of measurement.  The path changes fastest, so compared runs are seconds apart."""
    steps: list[Step] = []
    for i, order in interleave(paths, options.repeats):
        steps += [
            Step(i, mode, workload, path.name)
            for mode in options.modes
            for workload in options.workloads
            if workload in RUN
            for path in order
            # Where the kernel carries the packets, no process's memory can be told apart.
            if workload != "memory" or path.processes
        ]
        if "leases" in options.workloads:
            first = i % len(N_LEASES)
            steps += [
                Step(i, options.modes[0], workload, lease_path(n, path.name), n)
                for n in (*N_LEASES[first:], *N_LEASES[:first])
                for workload in LEASES_OF
                for path in order
                if path.name in TUNNELS
            ]
    return steps


def _runs(screen: Screen, tools: Bench, steps: Sequence[Step], paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    by_name = {path.name: path for path in paths}
    mode, n_leases = None, 1
    for number, step in enumerate(steps, 1):
        if step.mode != mode:
            mode = step.mode
            tools.lab.set_offload(Offload(mode))
        if step.n_leases != n_leases:
            n_leases = step.n_leases
            screen.step(f"waiting for both daemons to have {n_leases:,} leases")
            set_leases(tools.lab, n_leases, with_ipv6=by_ipv6(TUNNEL) in by_name)
        screen.begin(f"{number}/{len(steps)} round {step.round + 1}, mode {mode}, {step.workload}, {step.path}: ")
        path = by_name.get(step.path) or replace(by_name[LEASE_PATHS[step.path]], name=step.path)
        yield _run(screen, tools, step, path, RUN[LEASES_OF.get(step.workload, step.workload)])


def _run(screen: Screen, tools: Bench, step: Step, path: Path, act: Callable[[Bench, Path], Result]) -> dict[str, Any]:
    """Make one run and return it as the result file has it.  A run that fails is kept with the reason."""
    record = {"round": step.round, "mode": step.mode, "workload": step.workload, "path": step.path}
    try:
        wait_for_path(path)
        result = act(tools, path)
    except (BenchError, LabError, subprocess.TimeoutExpired) as exc:
        screen.add(f"failed: {exc}\n")
        return {**record, **asdict(Result({}, Usage.none())), "error": str(exc)}
    noise = result.usage.foreign_cores
    disturbed = f"; disturbed: others took {noise:.2f} cores" * (noise >= BUSY_LIMIT)
    screen.add(f"{_brief(result.figures)}{disturbed}\n")
    return {**record, **asdict(result)}


def _brief(figures: Mapping[str, float]) -> str:
    """The first figures of a run, in the order of FIGURES."""
    shown = [name for name in FIGURES if name in figures][:3]
    return ", ".join(f"{figures[name]:{FIGURES[name].form}} {FIGURES[name].title}" for name in shown)


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: words of `known` with commas between, each once."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(text.split(",")))
        if unknown := [word for word in given if word not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is none of {', '.join(known)}")
        return given

    return parse

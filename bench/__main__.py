"""Throughput from pod to pod over the tunnel, plain routing and kernel vxlan, interleaved: `./dev bench`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.measure import BenchError, ping, tcp
from bench.paths import PLAIN, VXLAN, Paths, connect, interleave
from bench.session import Screen, check_idle, run, uninterrupted_end, whole_number
from bench.summary import Rounds, Spread, ratio, spread, table
from udptun.lab.topology import Lab, missing_requirements

SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number(1, 1000), default=5, metavar="N", help="rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=whole_number(1, 3600), default=5, metavar="S", help="a stream (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw run and the summary there")
    options = parser.parse_args(arguments)
    screen = Screen()
    return run(screen, lambda: bench(screen, options.repeats, options.seconds, options.json))


def bench(screen: Screen, n_rounds: int, seconds: int, file: Path | None) -> None:
    """Measure, show the table, write `file`.  Raises UdptunError when something does not work."""
    if missing := missing_requirements(("ip", "bridge", "nsenter", "ping", "iperf3")):
        raise BenchError(f"the bench needs {' and '.join(missing)}")
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [sys.executable, "-m", "bench", *sys.argv[1:]],
        "machine": machine.facts(),
        "repeats": n_rounds,
        "seconds": seconds,
        "runs": [],
        "summary": None,
    }
    # Before the first round: a name that cannot be written must not cost the measurement.
    _save(document, file)
    rounds: list[dict[str, float]] = []
    screen.step("bringing up two hosts with a pod each")
    with Lab("bench") as lab, uninterrupted_end():
        lab.start()
        paths = connect(lab)
        document["paths"] = [{"name": path.name, "mtu": path.mtu} for path in paths.present]
        document["missing"] = paths.missing
        document["idle_busy_cores"] = check_idle(screen)
        for i, order in interleave(paths.present, n_rounds):
            rounds.append({})
            for path in order:
                screen.begin(f"round {i + 1} of {n_rounds}, {path.name}: ")
                # Finds out the neighbours' addresses, and that the path works.
                ping(path, 1, 1)
                stream = tcp(path, seconds)
                screen.add(f"{stream.gbit_per_s:.2f} Gbit/s\n")
                rounds[-1][path.name] = stream.gbit_per_s
                document["runs"].append({"round": i, "path": path.name, "kind": "tcp_1", **asdict(stream)})
            _save(document, file)
    document["summary"] = summary(paths, rounds)
    _save(document, file)
    screen.title(f"TCP, one stream of {seconds} s, Gbit/s; median (least to greatest) of {n_rounds}")
    screen.show("\n".join(_table(paths, rounds)))
    screen.add("\n")


def summary(paths: Paths, rounds: Rounds) -> dict[str, Any]:
    """Per path: the spread of Gbit/s, and of its ratio to the others within each round."""
    names = [path.name for path in paths.present]
    return {
        name: {
            "tcp_1_gbit_per_s": asdict(spread(rounds, name)),
            "ratio_to": {base: asdict(ratio(rounds, name, base)) for base in names if base != name},
        }
        for name in names
    }


def _table(paths: Paths, rounds: Rounds) -> list[str]:
    present = {path.name for path in paths.present}

    def cell(of: Spread, form: str) -> str:
        return f"{of.median:{form}} ({of.low:{form}} to {of.high:{form}})"

    rows = [
        [
            path.name,
            str(path.mtu),
            cell(spread(rounds, path.name), ".2f"),
            *(cell(ratio(rounds, path.name, base), ".3f") if base in present else "-" for base in (PLAIN, VXLAN)),
        ]
        for path in paths.present
    ]
    lines = table(["", "MTU", "Gbit/s", "ratio to plain", "ratio to vxlan"], rows)
    return lines + [f"{name}: {reason}" for name, reason in paths.missing.items()]


def _save(document: dict[str, Any], file: Path | None) -> None:
    """Write beside and rename, so that the file is whole at every moment."""
    if file is None:
        return
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(file)
    except OSError as exc:
        raise BenchError(f"cannot write {file}: {exc.strerror}; name another --json file") from exc


if __name__ == "__main__":
    sys.exit(main())

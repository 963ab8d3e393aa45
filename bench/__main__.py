"""`./dev bench`: measure, or work on what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import compare, report, run, spread, startup
from bench.errors import BenchError
from bench.soak import run as soak


def main(arguments: Sequence[str]) -> int:
    try:
        match arguments:
            case ["compare", *rest]:
                compare.main(rest)
            case ["startup", *rest]:
                return startup.main(rest)
            case ["spread", *rest]:
                return spread.main(rest)
            case ["soak", *rest]:
                return soak.main(rest)
            case ["report", *rest]:
                _report(rest)
            case _:
                return run.main(arguments)
    except BenchError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="./dev bench report", description="Write FILE.md and the plots beside FILE.json, and say so."
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    for written in report.write(parser.parse_args(arguments).file):
        print(written)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Nanoseconds per checksum of an IPv4 header, of small and full packets and of 64 KiB, all in the nearest cache."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.compiler import compiled
from bench.errors import BenchError
from bench.session import whole_number
from bench.summary import Spread, table

SIZES = (20, 92, 1472, 65_535)
_CALLS = 20_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.checksum", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number(1, 10_000), default=20, metavar="N", help="timed series (default: %(default)s)"
    )
    repeats = parser.parse_args(arguments).repeats
    figures = measure(repeats)
    rows = [
        [f"{size:,}", f"{of.median:.1f} ({of.low:.1f} to {of.high:.1f})", f"{size / of.median:.1f}"]
        for size, of in figures.items()
    ]
    print(f"ns per checksum, median (least to greatest) of {repeats} x {_CALLS:,} calls")
    print("\n".join(table(["bytes", "ns", "GB/s"], rows)))


def measure(repeats: int) -> Mapping[int, Spread]:
    """Bytes -> ns per call.  Raises BenchError when the sums are wrong."""
    figures: dict[int, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as directory:
        # As the extension is built: setuptools' own flags.
        program = compiled("micro/checksum.c", Path(directory), ["-O3"])
        for _ in range(repeats):
            output = subprocess.run(
                [program, str(_CALLS), *map(str, SIZES)], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            for line in output.splitlines():
                size, ns, check = line.split()
                if int(check) != expected(int(size)):
                    raise BenchError(f"the checksum of {size} bytes is {check}, not {expected(int(size))}")
                figures[int(size)].append(float(ns))
    return {size: Spread.of(values) for size, values in figures.items()}


def expected(size: int) -> int:
    """The ones'-complement sum of the program's data, as 16 bits in this machine's byte order (RFC 1071)."""
    data = bytes((i * 7 + 3) & 255 for i in range(size)) + b"\0" * (size % 2)
    total = sum(int.from_bytes(data[i : i + 2], sys.byteorder) for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


if __name__ == "__main__":
    main()

"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[1]


def facts() -> dict[str, object]:
    """Commit, kernel, CPU model, cores and so on; None for what cannot be found out."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "iperf3": _first_line(["iperf3", "--version"]),
        "tcp_congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    }


def _cpu_model(cpuinfo: str) -> str | None:
    """The model's name.  arm64 kernels give none; there it is the numbers of implementer and part."""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    if "model name" in values:
        return values["model name"]
    if "CPU part" in values:
        return f"implementer {values.get('CPU implementer')} part {values['CPU part']}"
    return None


def _git(*arguments: str) -> str | None:
    return _first_line(["git", "-C", str(_SOURCE), *arguments])


def _first_line(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return result.stdout.split("\n", 1)[0] or None if result.returncode == 0 else None

"""What a process uses."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """`cpu_s`: processor time since it began, seconds.  `memory_bytes`: resident."""

    cpu_s: float
    memory_bytes: int


def usage_of(pid: int) -> Usage | None:
    """None for a process that is gone, or not ours to see."""
    directory = Path(f"/proc/{pid}")
    try:
        # The name stands in parentheses, and may have any characters in it.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        resident_pages = int((directory / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    user, system = int(fields[11]), int(fields[12])
    return Usage((user + system) / _TICKS_PER_S, resident_pages * resource.getpagesize())

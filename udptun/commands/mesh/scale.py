"""Round-trip times in a few steps, for characters and colours.  Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

N_STEPS = 6
_SERIES = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
"""Milliseconds."""


def bounds_of(rtts_ms: Iterable[float]) -> list[float]:
    """Between the steps for these times, ms: of the series 1, 2, 5; N_STEPS - 1 at most, and as few as tell enough."""
    times = sorted(rtts_ms)
    if not times:
        return []
    inner = [bound for bound in _SERIES if times[0] < bound <= times[-1]]
    while len(inner) > N_STEPS - 1:
        # The step with the fewest times becomes one with that before it.
        n_below = [bisect_right(times, bound) for bound in inner]
        counts = [high - low for low, high in pairwise([*n_below, len(times)])]
        del inner[counts.index(min(counts))]
    return inner


def step_of(rtt_ms: float, bounds: list[float]) -> int:
    """0 is the fastest."""
    return bisect_right(bounds, rtt_ms)


def step_names(bounds: list[float]) -> list[str]:
    """`< 0.2 ms`, `0.2 to 0.5 ms`, `0.5 ms and more`."""
    if not bounds:
        return ["all alike"]
    middle = [f"{low:g} to {high:g} ms" for low, high in pairwise(bounds)]
    return [f"< {bounds[0]:g} ms", *middle, f"{bounds[-1]:g} ms and more"]


def rtt_text(rtt_ms: float) -> str:
    """Three digits."""
    return f"{rtt_ms:.2f}" if rtt_ms < 9.995 else f"{rtt_ms:.1f}" if rtt_ms < 99.95 else f"{rtt_ms:.0f}"

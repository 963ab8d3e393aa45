"""The goals of the tunnel as data, and whether a result meets each.  Pure.

A goal is about the median of the ratios to another path, each taken within one round.  A path of `lease_path` is the
tunnel itself with that many leases.  IPv6 is compared with IPv4 on the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.figures import FIGURES, N_LEASES, NAIVE, TUNNEL, TUNNELS, VTEP, VXLAN, by_ipv6, lease_path
from bench.summary import Cell, Runs, Spread


@dataclass(frozen=True, slots=True)
class Goal:
    """`path`'s figure as a multiple of `base`'s: at least the limit of the mode, or at most where `is_at_most`."""

    title: str
    workload: str
    figure: str
    base: str
    limits: Mapping[str, float] = field(hash=False)
    is_at_most: bool = False
    path: str = TUNNEL


@dataclass(frozen=True, slots=True)
class Verdict:
    """One goal in one mode."""

    goal: Goal
    mode: str
    ratio: Spread

    @property
    def is_met(self) -> bool:
        limit = self.goal.limits[self.mode]
        return self.ratio.median <= limit if self.goal.is_at_most else self.ratio.median >= limit


def _modes(a: float, b: float, c: float) -> dict[str, float]:
    return {"A": a, "B": b, "C": c}


_BY_IPV6 = (
    ("TCP, 1 stream", "tcp_1", "gbit_per_s"),
    ("TCP, 8 streams", "tcp_8", "gbit_per_s"),
    ("TCP, both ways", "tcp_both", "gbit_per_s"),
    ("UDP, 64 bytes, received", "udp_64", "kpackets_per_s"),
    ("UDP, 512 bytes, received", "udp_512", "kpackets_per_s"),
    ("UDP, 1400 bytes, received", "udp_1400", "kpackets_per_s"),
    ("RTT p50", "rtt", "p50_us"),
    ("RTT p99", "rtt", "p99_us"),
    ("tunnel CPU/GB, TCP 1", "tcp_1", "tunnel_cpu_s_per_gb"),
)
"""What IPv6 shall cost a tenth of at most: title, workload, figure."""


def _within_a_tenth(title: str, workload: str, figure: str, path: str) -> Goal:
    is_at_most = not FIGURES[figure].is_more_better
    limit = 1.1 if is_at_most else 0.9
    return Goal(f"{title}, IPv6", workload, figure, path, _modes(limit, limit, limit), is_at_most, by_ipv6(path))


GOALS = (
    Goal("TCP, 1 stream", "tcp_1", "gbit_per_s", NAIVE, _modes(5.5, 3.8, 4.2)),
    Goal("TCP, 8 streams", "tcp_8", "gbit_per_s", NAIVE, _modes(6.0, 4.2, 4.8)),
    Goal("UDP, 64 bytes, received", "udp_64", "kpackets_per_s", NAIVE, _modes(2.2, 2.3, 2.4)),
    Goal("TCP, 1 stream", "tcp_1", "gbit_per_s", VXLAN, _modes(0.50, 0.65, 0.80)),
    Goal("TCP, 8 streams", "tcp_8", "gbit_per_s", VXLAN, _modes(0.30, 0.68, 0.95)),
    Goal("UDP, 64 bytes, received", "udp_64", "kpackets_per_s", VXLAN, _modes(1.7, 1.8, 2.4)),
    Goal("RTT p50", "rtt", "p50_us", NAIVE, _modes(1.05, 1.05, 1.05), is_at_most=True),
    Goal("RTT p99", "rtt", "p99_us", NAIVE, _modes(1.05, 1.05, 1.05), is_at_most=True),
    Goal("tunnel CPU/GB, TCP 1", "tcp_1", "tunnel_cpu_s_per_gb", NAIVE, _modes(0.15, 0.33, 0.25), is_at_most=True),
    Goal("system CPU/GB, TCP 1", "tcp_1", "system_cpu_s_per_gb", VXLAN, _modes(2.3, 1.9, 1.4), is_at_most=True),
    *(
        _within_a_tenth(*what, path)
        for path in (TUNNEL, VTEP)
        for what in _BY_IPV6
        # A VTEP's packets of IPv6 hold 1,430 bytes, so that these go in two fragments: they have 1,448.
        if (path, what[1]) != (VTEP, "udp_1400")
    ),
    *(
        # 0.95: two runs of the same differ by as much on a shared machine.
        Goal(
            f"{title}, {lease_path(N_LEASES[-1], tunnel)}",
            workload,
            figure,
            lease_path(N_LEASES[0], tunnel),
            _modes(0.95, 0.95, 0.95),
            path=lease_path(N_LEASES[-1], tunnel),
        )
        for tunnel in TUNNELS
        for title, workload, figure in (
            ("TCP, 1 stream", "leases_tcp_1", "gbit_per_s"),
            ("UDP, 64 bytes", "leases_udp_64", "kpackets_per_s"),
        )
    ),
)


def judge(runs: Runs) -> list[Verdict]:
    """A verdict for every goal and mode that was measured together with its base."""
    return [
        Verdict(goal, mode, found)
        for goal in GOALS
        for mode in goal.limits
        if (found := runs.ratio(Cell(mode, goal.workload, goal.path, goal.figure), goal.base)) is not None
    ]

"""What is wrong, in words, with what was seen.  Pure: an empty list means that all is well."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

from bench.soak.load import Gap, Seen
from bench.soak.state import Footprint

SECOND_NS = 1_000_000_000
QUEUED_S = 1.0
"""A packet that was sent so long before a fault may still be on its way when the fault comes."""
STARVED_NS = 100_000_000
"""The tunnel's queues hold more than the load of such a time."""
LONGEST_SILENCE_S = 5.0
"""Of a stream, under a fault that loses nothing.  The promise is a fiftieth of a second, on an idle machine."""

NARROW_LINE = "fewer than flannel"
"""In the problem line of a path that has become narrow.  It stays until more is tried, at first after a minute."""


@dataclass(frozen=True, slots=True)
class Window:
    """When a fault came and when it had gone (CLOCK_MONOTONIC ns), and what may be lost (see faults.py).

    `after_s` has the slack in it.  `hosts` are those whose flows it may hit.
    """

    came_ns: int
    went_ns: int
    after_s: float | None
    hosts: frozenset[str]
    may_double: int


# --- status and store


def host_problems(
    facts: Mapping[str, Any],
    leases: Mapping[str, str],
    address: str,
    subnet: str,
    n_workers: int,
    narrow: Collection[str],
) -> list[str]:
    """Of one host, by its status document.

    `leases` are the store's; `address` and `subnet` are what the host must lease.  `narrow`: subnets whose path was
    narrow not long ago, so that the host may still take it for narrow.
    """
    wrong = [
        f"problem: {line}"
        for line in facts["problems"]
        if not (NARROW_LINE in line and any(f" {it} " in line for it in narrow))
    ]
    own = facts["lease"] or {}
    if (own.get("subnet"), own.get("public_ip")) != (subnet, address):
        wrong.append(f"its lease is {own.get('subnet')} at {own.get('public_ip')}, not {subnet} at {address}")
    wrong += table_problems(facts["peers"], leases, subnet)
    wrong += [f"peer {peer['subnet']} is dead" for peer in facts["peers"] if peer.get("liveness") == "dead"]
    datapath = facts["datapath"]
    if datapath["pid"] is None or len(datapath["standby_pids"]) != 1:
        wrong.append(f"datapath process {datapath['pid']}, standbys {datapath['standby_pids']}")
    if datapath["workers"] != ["running"] * n_workers:
        wrong.append(f"workers {datapath['workers']}, not {n_workers} running ones")
    wrong += [f"skipped lease {it}" for it in facts["skipped"]] + [f"other type {it}" for it in facts["other_types"]]
    return wrong


def table_problems(peers: Iterable[Mapping[str, Any]], leases: Mapping[str, str], own_subnet: str) -> list[str]:
    """The peer table against the store."""
    stored = {key.replace("-", "/"): json.loads(value)["PublicIP"] for key, value in leases.items()}
    wrong = [] if own_subnet in stored else [f"the store has no lease of {own_subnet}"]
    stored.pop(own_subnet, None)
    table = {peer["subnet"]: peer["public_ip"] for peer in peers}
    return wrong + [
        f"peer {subnet} is {table.get(subnet)} in the table, {stored.get(subnet)} in the store"
        for subnet in sorted(stored.keys() | table.keys())
        if stored.get(subnet) != table.get(subnet)
    ]


# --- counters


BESIDE_THE_SUMS = ("inject_drop_full",)


def sum_problems(counters: Mapping[str, int]) -> list[str]:
    """Every packet has one end (docs/wire-format.md): the ends of each direction add up to its packets."""
    wrong = []
    for direction in ("encap", "decap", "inject"):
        total = f"{direction}_packets"
        ends = {
            name: n
            for name, n in counters.items()
            if name.startswith(f"{direction}_") and name != total and name not in BESIDE_THE_SUMS
        }
        if sum(ends.values()) != counters[total]:
            ended = ", ".join(f"{name} {n}" for name, n in ends.items() if n)
            wrong.append(f"{total} is {counters[total]}, and its ends add up to {sum(ends.values())} ({ended})")
    return wrong


def backward_problems(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Counters only grow."""
    return [f"{name} went back from {n} to {after[name]}" for name, n in before.items() if after[name] < n]


# --- the kernel's state


def state_problems(
    before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]], narrow: Collection[str]
) -> list[str]:
    """What a host has now and had not at the beginning, or the other way round.  `narrow`: see `host_problems`."""
    wrong = []
    for name, lines in before.items():
        more, less = list(now[name]), list(lines)
        for line in lines:
            if line in more:
                more.remove(line)
                less.remove(line)
        if name == "routes":
            more = [line for line in more if not ("'mtu'" in line and any(f"dst {it} " in line for it in narrow))]
        wrong += [f"{name}: gone: {line}" for line in less] + [f"{name}: left over: {line}" for line in more]
    return wrong


# --- what was lost


def flow_problems(
    name: str, hosts: Iterable[str], seen: Sequence[Seen], window: Window, starved: Sequence[tuple[int, int]]
) -> list[str]:
    """Of a flow between `hosts`, from the end of the window before until well after this one.

    Losses while the machine gave the datapath no processor are not judged; the report counts them.
    """
    is_hit = window.after_s is not None and not window.hosts.isdisjoint(hosts)
    wrong = []
    for gap in (gap for one in seen for gap in one.lost):
        if is_starved(gap, starved):
            continue
        between = f"sent {offset(gap.after_ns, window)} to {offset(gap.before_ns, window)} s after the fault came"
        if not is_hit:
            wrong.append(f"{name} lost {gap.n} packets, {between}")
        elif gap.after_ns < window.came_ns - QUEUED_S * SECOND_NS or gap.before_ns > last_allowed_ns(window):
            ended = (window.went_ns - window.came_ns) / SECOND_NS
            wrong.append(
                f"{name} lost {gap.n} packets, {between}; it went after {ended:.2f} s, {window.after_s:g} s are allowed"
            )
    spoilt, doubled = sum(one.spoilt for one in seen), sum(one.doubled for one in seen)
    if spoilt:
        wrong.append(f"{name}: {spoilt} spoilt")
    if doubled > window.may_double:
        wrong.append(f"{name}: {doubled} packets came twice")
    silence_s = max((one.longest_silence_ns for one in seen), default=0) / SECOND_NS
    if name.startswith("tcp") and not is_hit and silence_s > LONGEST_SILENCE_S and window.after_s is None:
        wrong.append(f"{name} was silent for {silence_s:.1f} s")
    return wrong


def last_allowed_ns(window: Window) -> int:
    assert window.after_s is not None
    return window.went_ns + int(window.after_s * SECOND_NS)


def offset(at_ns: int, window: Window) -> str:
    return f"{(at_ns - window.came_ns) / SECOND_NS:.3f}"


def is_starved(gap: Gap, starved: Sequence[tuple[int, int]]) -> bool:
    """Whether the machine gave no processor to a process of the datapath's priority when the packets were lost."""
    return any(
        to_ns - from_ns >= STARVED_NS and from_ns - SECOND_NS < gap.before_ns and gap.after_ns < to_ns + SECOND_NS
        for from_ns, to_ns in starved
    )


# --- growth


MIN_SAMPLES = 20
MIN_MINUTES = 10.0
WARM_UP = 2 / 3
"""Of the samples of a process.  What it allocates once is not growth: a daemon's heap rises in steps, as faults meet
for the first time, and stands after some twenty minutes."""
MEMORY_GROWTH_MIB = {"daemon": 2.0, "datapath": 0.5, "standby": 0.5}
"""Over the time of the samples, by the fitted line."""
FDS_GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one process, by a line fitted through its samples but for those of the warm-up.  `minutes` has these in it."""

    host: str
    role: str
    pid: int
    minutes: float
    n_samples: int
    mean_mib: float
    grown_mib: float
    first_fds: int
    last_fds: int
    grown_fds: float


def growths(samples: Iterable[Footprint]) -> list[Growth]:
    """Of every process that has been looked at often and long enough to tell."""
    by_process: dict[tuple[str, int], list[Footprint]] = {}
    for sample in samples:
        by_process.setdefault((sample.host, sample.pid), []).append(sample)
    found = []
    for (host, pid), all_of_it in by_process.items():
        warm = all_of_it[int(len(all_of_it) * WARM_UP) :]
        minutes = (all_of_it[-1].at_s - all_of_it[0].at_s) / 60
        if len(all_of_it) < MIN_SAMPLES or minutes < MIN_MINUTES:
            continue
        times = [sample.at_s for sample in warm]
        span_s = times[-1] - times[0]
        memory = [sample.memory_mib for sample in warm]
        fds = [float(sample.n_fds) for sample in warm]
        found.append(
            Growth(
                host,
                # A standby may have become the active one.
                warm[-1].role,
                pid,
                minutes,
                len(all_of_it),
                fmean(memory),
                linear_regression(times, memory).slope * span_s,
                warm[0].n_fds,
                warm[-1].n_fds,
                linear_regression(times, fds).slope * span_s,
            )
        )
    return found


def growth_problems(growth: Growth) -> list[str]:
    wrong = []
    who = f"{growth.host}: {growth.role} (pid {growth.pid}) after {growth.minutes:.1f} minutes"
    if growth.grown_mib > MEMORY_GROWTH_MIB[growth.role]:
        wrong.append(f"{who} is still growing, by {growth.grown_mib:.2f} MiB")
    if growth.grown_fds > FDS_GROWTH:
        wrong.append(f"{who} is still growing, by {growth.grown_fds:.1f} descriptors")
    return wrong

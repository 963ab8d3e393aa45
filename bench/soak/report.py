"""The report of a soak, out of its document: text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMNS = "{:33} {:>5} {:>7} {:>7} {:>6} {:>8} {:>8} {:>9} {:>9} {:>5}"

_TITLES = ("fault", "times", "lost", "starved", "leaked", "gap s", "after s", "settled s", "silence s", "wrong")
_LEGEND = [
    "lost: packets of all UDP flows; starved: those of them lost while the machine gave the datapath no processor",
    "leaked: frames on the underlay in clear text",
    "gap: the longest run of lost packets; after: the last loss, counted from the end of the fault",
    "settled: until all is as it was; silence: the longest of a TCP stream; each the worst of all times",
]


def n_problems(document: Mapping[str, Any]) -> int:
    return sum(len(step["problems"]) for step in document["runs"]) + len(document["growth_problems"])


def text(document: Mapping[str, Any]) -> str:
    """Each fault with its count and its worst figures, growth of processes, and what was wrong."""
    lines = [
        f"{document['command']}",
        _machine(document),
        f"{len(document['runs'])} faults in {document['minutes']} minutes; {n_problems(document)} things were wrong",
        "",
        _COLUMNS.format(
            *("fault", "times", "lost", "starved", "leaked", "gap s", "after s", "settled s", "silence s", "wrong")
        ),
    ]
    by_fault: dict[str, list[Mapping[str, Any]]] = {}
    for step in document["runs"]:
        by_fault.setdefault(step["fault"], []).append(step)
    for name, steps in sorted(by_fault.items()):
        worst = {key: max(step[key] for step in steps) for key in ("outage_s", "after_s", "settled_s", "silence_s")}
        lines.append(
            _COLUMNS.format(
                name,
                len(steps),
                sum(step["lost"] for step in steps),
                sum(step["starved"] for step in steps),
                sum(step["leaked"] for step in steps),
                *(f"{worst[key]:.3f}" for key in ("outage_s", "after_s", "settled_s", "silence_s")),
                sum(bool(step["problems"]) for step in steps),
            )
        )
    lines += [
        "",
        "lost: packets of all UDP flows; starved: those lost while the machine gave the datapath no processor",
    ]
    lines += ["gap: the longest run of lost packets; after: the last loss, counted from the end of the fault"]
    lines += ["settled: until all is as it was; silence: the longest of a TCP stream; each the worst of all times", ""]
    lines += [_growth(growth) for growth in document["growths"]]
    lines += [_footprint(it) for it in document["footprints"]]
    lines += [
        f"{name}: {n:,} {'packets' if name.startswith('udp') else 'bytes'}" for name, n in document["flows"].items()
    ]
    for step in document["runs"]:
        lines += [
            f"WRONG at step {step['number']} ({step['fault']}, {step['host']}, {step['at_s']} s): {line}"
            for line in step["problems"]
        ]
    lines += [f"WRONG: {line}" for line in document["growth_problems"]]
    return "\n".join(lines) + "\n"


def _machine(document: Mapping[str, Any]) -> str:
    facts = document["machine"]
    changed = " with uncommitted changes" * bool(facts["uncommitted_changes"])
    return (
        f"{document['started']}; commit {facts['commit']}{changed}; {facts['kernel']}; {facts['cpu']}, "
        f"{facts['cores']} cores; Python {facts['python']}"
    )


def _growth(growth: Mapping[str, Any]) -> str:
    return (
        f"{growth['host']} {growth['role']}, {growth['minutes']:.1f} minutes, {growth['n_samples']} looks: "
        f"{growth['mean_mib']:.2f} MiB, {growth['grown_mib']:+.3f}; "
        f"descriptors {growth['first_fds']} -> {growth['last_fds']}, {growth['grown_fds']:+.2f} by the fitted line"
    )


def _footprint(sample: Mapping[str, Any]) -> str:
    return (
        f"{sample['host']} {sample['role']} at the end: {sample['memory_mib']:.2f} MiB, {sample['n_fds']} descriptors"
    )

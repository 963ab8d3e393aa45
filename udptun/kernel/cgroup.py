"""The limits of our cgroup, of version 1 and 2, also as a container sees them, and which of them harm the datapath.

The processor time of a kernel backend is nobody's quota.  That of the datapath is ours: once a quota is used up, all of
its threads stand still until the next period, some 100 ms, and packets are lost meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MEMORY_NEED = 100 << 20
"""Bytes.  Daemon and datapath take about half of it with 1,000 peers; full socket buffers are charged as well."""

_UNLIMITED = 1 << 60
"""Bytes from which a memory limit of version 1 means none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`cpus`: seconds of processor time a second.  `memory`: bytes.  None: no limit."""

    cpus: float | None
    memory: int | None


def read_limits(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> Limits:
    """The narrowest limits of our cgroup and those above it, as far as they can be seen from here.

    `root` is put before the mount points that `proc` names.
    """
    cpus: list[float] = []
    memory: list[int] = []
    for directory in _directories(proc, root):
        quota = _numbers(directory / "cpu.max")
        if not quota:
            quota = [*_numbers(directory / "cpu.cfs_quota_us"), *_numbers(directory / "cpu.cfs_period_us")]
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            cpus.append(quota[0] / quota[1])
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            memory += [limit for limit in _numbers(directory / name) if limit < _UNLIMITED]
    return Limits(min(cpus, default=None), min(memory, default=None))


def harm(limits: Limits, workers: int | None) -> list[str]:
    """A line for each limit that harms; `workers` are those of the datapath, None: there is none."""
    lines = []
    if workers is not None and limits.cpus is not None and limits.cpus < workers:
        threads = f"{workers} worker{'s' if workers != 1 else ''}"
        lines.append(
            f"the CPU limit of this cgroup is {limits.cpus:g} processors, and the datapath has {threads}: "
            "under load it stands still for up to 100 ms at a time, and packets are lost; remove the CPU limit (in a "
            "pod: resources.limits.cpu) and keep a request"
        )
    if limits.memory is not None and limits.memory < MEMORY_NEED:
        lines.append(
            f"the memory limit of this cgroup is {limits.memory / (1 << 20):.0f} MiB: with many peers, or under load, "
            "the kernel kills the daemon or its datapath; remove the limit (in a pod: resources.limits.memory), or "
            f"give at least {MEMORY_NEED >> 20} MiB"
        )
    return lines


def _directories(proc: Path, root: Path) -> Iterator[Path]:
    """Where our cgroups are mounted, each with those above it."""
    try:
        ours = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for mount in mounts:
        # mount id, parent, major:minor, root, mount point, options, optional fields ..., -, type, source, super options
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind not in ("cgroup", "cgroup2"):
            continue
        for _, controllers, path in ours:
            is_here = not controllers if kind == "cgroup2" else bool({*controllers.split(",")} & {*options})
            if is_here:
                yield from _upwards(root / mount[4].lstrip("/"), mount[3], path)


def _upwards(mounted: Path, mount_root: str, path: str) -> Iterator[Path]:
    """A container without a cgroup namespace has only its own cgroup mounted, under another name than `path`."""
    inner = PurePosixPath(path)
    if inner.is_relative_to(mount_root):
        relative = inner.relative_to(mount_root)
        yield from (mounted / it for it in (relative, *relative.parents))
    else:
        yield mounted


def _numbers(file: Path) -> list[int]:
    """The numbers of the file; empty when it has none, or something else, or cannot be read."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []

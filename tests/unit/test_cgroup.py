"""The limits of our cgroup, read from copies of what the kernel shows, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from udptun.kernel.cgroup import Limits, harm, read_limits

MIB = 1 << 20
NONE = str((1 << 63) - 4096)
V2 = "30 24 0:26 {} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 24 0:27 {0} /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 24 0:28 {0} /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n"
    "33 24 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
POD = "/kubepods/burstable/pod1/c1"
V1_OURS = "3:memory:{0}\n2:cpu,cpuacct:{0}\n1:name=systemd:{0}\n0::/\n"
FLANNEL_V2 = {"cpu.max": "10000 100000", "memory.max": str(50 * MIB), "memory.high": "max"}
FLANNEL = Limits(0.1, 50 * MIB)


def limits_of(where: Path, cgroup: str, mounts: str, files: Mapping[str, str]) -> Limits:
    (where / "proc").mkdir()
    (where / "proc/cgroup").write_text(cgroup)
    (where / "proc/mountinfo").write_text("24 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts)
    for name, text in files.items():
        path = where / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return read_limits(where / "proc", where)


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        ("0::/\n", V2.format("/"), FLANNEL_V2, FLANNEL),
        (f"0::{POD}\n", V2.format("/"), {f"{POD[1:]}/{name}": it for name, it in FLANNEL_V2.items()}, FLANNEL),
        (f"0::{POD}\n", V2.format(POD), FLANNEL_V2, FLANNEL),
        (f"0::{POD}\n", V2.format("/"), {"kubepods/burstable/cpu.max": "150000 100000"}, Limits(1.5, None)),
        (f"0::{POD}\n", V2.format("/elsewhere"), FLANNEL_V2, FLANNEL),
        ("0::/\n", V2.format("/"), {"cpu.max": "max 100000", "memory.max": "max"}, Limits(None, None)),
        ("0::/\n", V2.format("/"), {}, Limits(None, None)),
        (
            V1_OURS.format(POD),
            V1.format(POD),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "10000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": str(50 * MIB),
            },
            FLANNEL,
        ),
        (
            V1_OURS.format(POD),
            V1.format("/"),
            {
                f"cpu,cpuacct{POD}/cpu.cfs_quota_us": "-1",
                f"cpu,cpuacct{POD}/cpu.cfs_period_us": "100000",
                f"memory{POD}/memory.limit_in_bytes": NONE,
                "memory/kubepods/memory.limit_in_bytes": str(64 * MIB),
            },
            Limits(None, 64 * MIB),
        ),
        ("", "", {}, Limits(None, None)),
    ],
    ids=[
        *("container", "host", "container-without-namespace", "of-an-ancestor", "mounted-elsewhere", "v2-unlimited"),
        *("v2-root", "v1-container", "v1-host", "none"),
    ],
)
def test_the_narrowest_limit_that_can_be_seen_counts(
    tmp_path: Path, cgroup: str, mounts: str, files: Mapping[str, str], expected: Limits
) -> None:
    assert limits_of(tmp_path, cgroup, mounts, files) == expected


def test_a_system_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits(None, None)


def test_flannels_old_limits_are_named_with_figures_and_remedy() -> None:
    """Its manifests had 100m and 50Mi.  The datapath stood still nine tenths of the time, and nothing said why."""
    cpu, memory = harm(FLANNEL, 2)
    assert cpu.startswith("the CPU limit of this cgroup is 0.1 processors, and the datapath has 2 workers: ")
    assert cpu.endswith("remove the CPU limit (in a pod: resources.limits.cpu) and keep a request")
    assert memory.startswith("the memory limit of this cgroup is 50 MiB: ")
    assert memory.endswith("remove the limit (in a pod: resources.limits.memory), or give at least 100 MiB")


@pytest.mark.parametrize(
    ("limits", "workers", "n_lines"),
    [
        (Limits(None, None), 2, 0),
        (Limits(2.0, 100 * MIB), 2, 0),
        (Limits(1.9, None), 2, 1),
        (Limits(0.1, None), None, 0),
        (Limits(0.1, 50 * MIB), None, 1),
    ],
    ids=["none", "enough", "less-than-workers", "the-kernel-carries-packets", "memory-matters-to-every-backend"],
)
def test_only_a_limit_that_harms_is_named(limits: Limits, workers: int | None, n_lines: int) -> None:
    assert len(harm(limits, workers)) == n_lines

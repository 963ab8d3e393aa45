"""What a container runtime is told of a container: config.json of the OCI's runtime-spec.

Capabilities, root and privileges are those that the container of a manifest asks for.  Around them is what every
runtime adds: docker's and containerd's capabilities, mounts and read-only paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DEFAULT_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)
_MASKED = (
    *("/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def capabilities(container: Mapping[str, Any]) -> list[str]:
    """What is left of the runtime's own, and what the container gets besides."""
    given = container.get("securityContext", {}).get("capabilities", {})
    names = [] if "ALL" in given.get("drop", ()) else list(_DEFAULT_CAPABILITIES)
    return sorted(f"CAP_{it}" for it in {*names, *given.get("add", ())})


def config(
    container: Mapping[str, Any],
    args: Sequence[str],
    environment: Sequence[str],
    mounts: Sequence[Mapping[str, Any]],
    linux: Mapping[str, Any],
) -> dict[str, Any]:
    """`linux`: namespaces, and what else there is besides the paths.  The root is `root` in the bundle's directory."""
    context = container.get("securityContext", {})
    assert context.get("privileged") is not True
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": list(environment),
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities(container)),
            "noNewPrivileges": context.get("allowPrivilegeEscalation") is False,
        },
        "root": {"path": "root", "readonly": bool(context.get("readOnlyRootFilesystem"))},
        "mounts": [*_MOUNTS, *mounts],
        "linux": {"maskedPaths": list(_MASKED), "readonlyPaths": list(_READ_ONLY), **linux},
    }


def bound(source: Path | str, target: str, *, is_read_only: bool) -> dict[str, Any]:
    """A mount of what is at `source` on the host."""
    options = ["rbind", "rprivate", "ro" if is_read_only else "rw"]
    return {"type": "bind", "source": str(source), "destination": target, "options": options}


def _mount(kind: str, target: str, *options: str) -> dict[str, Any]:
    return {"type": kind, "source": kind, "destination": target, "options": ["nosuid", *options]}


_MOUNTS = (
    _mount("proc", "/proc", "noexec", "nodev"),
    _mount("tmpfs", "/dev", "strictatime", "mode=755", "size=65536k"),
    _mount("devpts", "/dev/pts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
    _mount("tmpfs", "/dev/shm", "noexec", "nodev", "mode=1777", "size=65536k"),
    _mount("sysfs", "/sys", "noexec", "nodev", "ro"),
)

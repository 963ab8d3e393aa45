"""What the kernel has counted of a device, as `ip -s link` shows it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from udptun.core.errors import KernelError

_FILE = Path("/proc/thread-self/net/dev")
"""Of the network namespace that this thread is in, whatever is mounted on /sys."""


@dataclass(frozen=True, slots=True)
class DeviceCounters:
    """Received (rx) is what the device has given to the kernel, transmitted (tx) what the kernel has given to it."""

    rx_packets: int
    rx_bytes: int
    rx_errors: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_errors: int
    tx_dropped: int


def read_device_counters(names: Collection[str]) -> dict[str, DeviceCounters]:
    """By name, of those of these devices that there are.  Raises KernelError."""
    if not names:
        return {}
    try:
        lines = _FILE.read_text().splitlines()
    except OSError as exc:
        raise KernelError(f"cannot read {_FILE}", exc.errno or 0, "is /proc mounted?") from exc
    found = {}
    for line in lines:
        name, colon, numbers = line.partition(":")
        if colon and (name := name.strip()) in names:
            rx_bytes, rx_packets, rx_errors, rx_dropped, *_, tx_bytes, tx_packets, tx_errors, tx_dropped = map(
                int, numbers.split()[:12]
            )
            found[name] = DeviceCounters(
                rx_packets, rx_bytes, rx_errors, rx_dropped, tx_packets, tx_bytes, tx_errors, tx_dropped
            )
    return found

"""Numbers as people read them.  Pure."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`3d04h`, `3h02m`, `2m05s` or `7s`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def count(n: float) -> str:
    """`12,345`, and from a million on three digits: `1.23 M`."""
    return f"{round(n):,}" if n < 999_999.5 else scaled(n)


def scaled(n: float) -> str:
    """Three digits and the prefix of a unit, by thousands: `0`, `512`, `1.23 k`, `45.6 M`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if n < 999.5 or prefix == "P":
            break
        n /= 1000
    if not prefix:
        return f"{n:.0f}" if n >= 1 or not n else f"{n:.1f}"
    return f"{n:.{2 if n < 9.995 else 1 if n < 99.95 else 0}f} {prefix}"


def unit(n: float, name: str) -> str:
    """`1.23 GB`, `512 bit/s`."""
    text = scaled(n)
    return text + name if " " in text else f"{text} {name}"


def plural(n: int, noun: str, nouns: str = "") -> str:
    """`1 peer`, `2 peers`."""
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}"

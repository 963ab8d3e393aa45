"""The bench's own error."""

from __future__ import annotations

from udptun.core.errors import UdptunError


class BenchError(UdptunError):
    """A measurement failed, or what it needs is missing."""

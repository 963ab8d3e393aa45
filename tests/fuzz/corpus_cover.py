"""Which few inputs reach all that many reach."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

Arc = tuple[str, int, int]
"""File, line before and line."""


def smallest_cover(check: Callable[[bytes], None], inputs: Iterable[bytes]) -> list[bytes]:
    """Those that reach a pair of lines of the package first, tried from the shortest on; sorted."""
    seen: set[Arc] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        if new := _reached(check, data) - seen:
            seen |= new
            kept.append(data)
    return kept


def _reached(check: Callable[[bytes], None], data: bytes) -> set[Arc]:
    arcs: set[Arc] = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if "/udptun/" not in name or "/tests/" in name:
            return None
        before = 0

        def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            nonlocal before
            arcs.add((name, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(enter)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return arcs

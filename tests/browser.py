"""Chromium without a window: the pages that it makes of files, as trees and as pictures."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PROGRAM = shutil.which("chromium")
Scheme = Literal["light", "dark"]
_DEADLINE_S = 60
_COLOUR_TYPES = {2: 3, 6: 4}
"""Of PNG: bytes of a pixel, RGB or RGBA."""


def run(page: Path, size: tuple[int, int], scheme: Scheme, *what: str) -> str:
    """What it prints.  `size`: of the window, pixels."""
    assert PROGRAM is not None
    command = [
        *(
            PROGRAM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
        ),
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={size[0]},{size[1]}",
        f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}",
        *what,
        page.as_uri(),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def tree(page: Path, size: tuple[int, int] = (1200, 900), scheme: Scheme = "light") -> str:
    """The page's elements once it has been shown, as HTML."""
    return run(page, size, scheme, "--dump-dom")


def picture(page: Path, size: tuple[int, int], scheme: Scheme, to: Path) -> NDArray[np.uint8]:
    """Rows of pixels of red, green and blue.  The file stays at `to`."""
    run(page, size, scheme, f"--screenshot={to}")
    return read_png(to.read_bytes())


def read_png(data: bytes) -> NDArray[np.uint8]:
    """As `picture`.  What chromium writes: 8 bits a channel, not interlaced (RFC 2083)."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, head = 8, b"", b""
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        head = body if kind == b"IHDR" else head
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height, depth, colour_type, _, _, interlace = struct.unpack(">IIBBBBB", head)
    assert (depth, interlace) == (8, 0)
    n = _COLOUR_TYPES[colour_type]
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * n)
    rows = np.zeros((height + 1, width * n), np.uint8)
    for y in range(height):
        rows[y + 1] = _unfiltered(lines[y, 0], lines[y, 1:], rows[y], n)
    return rows[1:].reshape(height, width, n)[:, :, :3]


def _unfiltered(kind: int, line: NDArray[np.uint8], above: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line.reshape(-1, n), axis=0, dtype=np.uint8).reshape(-1)
    if kind == 2:
        return line + above
    up, found = above.tolist(), line.tolist()
    for i, value in enumerate(found):
        left, upper_left = (found[i - n], up[i - n]) if i >= n else (0, 0)
        guess = (left + up[i]) // 2 if kind == 3 else _paeth(left, up[i], upper_left)
        found[i] = value + guess & 0xFF
    return np.array(found, np.uint8)


def _paeth(left: int, up: int, upper_left: int) -> int:
    by_left, by_up, by_both = abs(up - upper_left), abs(left - upper_left), abs(left + up - 2 * upper_left)
    if by_left <= by_up and by_left <= by_both:
        return left
    return up if by_up <= by_both else upper_left

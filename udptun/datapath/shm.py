"""Memory files that two processes share: created once, of fixed size, sealed against resizing."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np


def create(name: str, size: int, magic: int, version: int) -> int:
    """A new memory file of `size` bytes, all zero but for magic and version.  The caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # A process that shrank the file would kill the other with SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    os.pwrite(fd, np.array([magic, version], np.uint32).tobytes(), 0)
    return fd


def map_whole(fd: int, size: int, magic: int, version: int, what: str) -> mmap.mmap:
    """Map the file for reading and writing.  Raises ValueError when it is not what `what` says."""
    if os.fstat(fd).st_size != size:
        raise ValueError(f"the {what} has {os.fstat(fd).st_size} bytes, not {size}: of another layout version")
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    head = np.frombuffer(memory, np.uint32, 2)
    if head[0] != magic or head[1] != version:
        raise ValueError(f"the {what} is not one, or of another layout version than {version}")
    return memory

"""Write a small file so that a reader sees all of it or none, and a crash or a power failure leaves the old or the new.

The steps are: temporary file, fsync, rename or link, fsync of the directory.

Run as a program (`replace PATH` or `delete PATH`, the text on stdin), it does so in a process of its own and ends with
the number of the error, 0 when there is none.  So it imports nothing of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Make `text` the content of `path`, with `mode` whatever the umask.  For one writer at a time.

    Raises OSError; the old file is then untouched.
    """
    # A fixed name: a file that a crash has left is used again by the next write.
    with _written(path.with_name(f".{path.name}.new"), text, mode) as temporary:
        temporary.replace(path)


def create(path: Path, text: str, mode: int = 0o600) -> None:
    """Make `path` with `text`.  Raises FileExistsError when it is there, so that of several writers one wins."""
    # The name is random.  A pid would not do: containers that share the directory may all be process 1.
    with _written(path.with_name(f".{path.name}.{os.urandom(8).hex()}"), text, mode) as temporary:
        path.hardlink_to(temporary)


@contextmanager
def _written(temporary: Path, text: str, mode: int) -> Iterator[Path]:
    """Write `text` to `temporary`; the block then renames or links it.  At the end both are on disk."""
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, mode)
            file.write(text)
            file.flush()
            os.fsync(fd)
        yield temporary
        directory_fd = os.open(temporary.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
    finally:
        temporary.unlink(missing_ok=True)


def _main(action: str, path: str) -> int:
    try:
        if action == "replace":
            replace(Path(path), sys.stdin.buffer.read().decode())
        else:
            Path(path).unlink(missing_ok=True)
    except OSError as exc:
        return exc.errno or 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

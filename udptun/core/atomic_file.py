"""Write a small file so that a reader sees all of it or none, and a crash or a power failure leaves the old or the new.

The steps are: temporary file, fsync, rename or link, fsync of the directory.

Run as a program (`replace PATH` or `delete PATH`, the text on stdin), it does so in a process of its own and ends with
the number of the error, 0 when there is none.  So it imports nothing of this package.
"""

from __future__ import annotations

import os
import sys

# Only for type checkers; these would be half of what the program takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def replace(path: Path | str, text: str, mode: int = 0o600) -> None:
    """Make `text` the content of `path`, with `mode` whatever the umask.  For one writer at a time.

    Raises OSError; the old file is then untouched.
    """
    directory, name = os.path.split(path)
    # A fixed name: a file that a crash has left is used again by the next write.
    temporary = os.path.join(directory, f".{name}.new")
    _write(temporary, text, mode, lambda: os.replace(temporary, path))


def create(path: Path, text: str, mode: int = 0o600) -> None:
    """Make `path` with `text`.  Raises FileExistsError when it is there, so that of several writers one wins."""
    directory, name = os.path.split(path)
    # The name is random.  A pid would not do: containers that share the directory may all be process 1.
    temporary = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")
    _write(temporary, text, mode, lambda: os.link(temporary, path))


def _write(temporary: str, text: str, mode: int, publish: Callable[[], None]) -> None:
    """Write `text` to `temporary` and have `publish` rename or link it.  At the end both are on disk."""
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, mode)
            file.write(text)
            file.flush()
            os.fsync(fd)
        publish()
        directory_fd = os.open(os.path.dirname(temporary) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
    finally:
        _unlink(temporary)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _main(action: str, path: str) -> int:
    try:
        if action == "replace":
            replace(path, sys.stdin.buffer.read().decode())
        else:
            _unlink(path)
    except OSError as exc:
        return exc.errno or 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

"""Files written by a process that may hang."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from udptun.membership.child_writer import ChildWriter


def hang(path: Path) -> None:
    """Have whoever replaces the file wait for ever: its temporary file is a FIFO that nobody reads."""
    os.mkfifo(path.with_name(f".{path.name}.new"))


def test_a_text_is_written_as_it_is_and_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        writer, path = ChildWriter(), tmp_path / "ä"
        for text in ("one\n", "zwölf\0" * 100_000, ""):
            await writer.replace(path, text)
            assert path.read_text() == text
        await writer.delete(path)
        await writer.delete(path)
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


def test_a_write_that_fails_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError) as missing:
            await ChildWriter().replace(tmp_path / "none" / "file", "x" * 1_000_000)
        assert missing.value.errno == errno.ENOENT
        with pytest.raises(IsADirectoryError):
            await ChildWriter().delete(tmp_path)

    asyncio.run(main())


def test_a_directory_that_hangs_costs_one_process_and_the_time_of_one_write(tmp_path: Path) -> None:
    """Before, a thread of the daemon wrote: it hung in the kernel, and the daemon with it, whatever signal came."""

    async def main() -> None:
        writer, path = ChildWriter(), tmp_path / "file"
        hang(path)
        began = time.monotonic()
        writing = asyncio.create_task(writer.replace(path, "x"))
        await asyncio.sleep(0.1)
        writer.hurry(0.2)
        for attempt in (writing, writer.replace(path, "y")):
            with pytest.raises(TimeoutError) as late:
                await attempt
            assert late.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - began < 5
        path.with_name(".file.new").unlink()
        while not path.exists():
            try:
                await writer.replace(path, "z")
            except TimeoutError:  # the process that was killed has not gone yet
                await asyncio.sleep(0.01)
        assert path.read_text() == "z"

    asyncio.run(main())

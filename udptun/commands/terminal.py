"""A terminal that shows one screen after the other in place, and is as it was before when that ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""The other screen, without cursor, and nothing runs over into the next line (xterm's private modes)."""
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
"""Terminals that know it show what is between at once; the others ignore it."""
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_QUIT = b"qQ\x04"


class _EndedError(BaseException):
    """By a signal."""

    def __init__(self, number: int) -> None:
        self.number = number


class LiveTerminal:
    """See `live_terminal`."""

    def __init__(self, out_fd: int, keys_fd: int | None, wake_fd: int) -> None:
        self._out_fd = out_fd
        self._keys_fd = keys_fd
        self._wake_fd = wake_fd
        self._before: list[int | list[bytes | int]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        return size_of(self._out_fd)

    def show(self, lines: list[str]) -> None:
        """Show these, and nothing of what was there before.  What does not fit is cut off at the bottom."""
        shown = lines[: self.size[1]]
        # Each line is overwritten and its rest cleared: a screen that is cleared first flickers.
        text = "\x1b[K\n".join(["\x1b[H" + shown[0], *shown[1:]] if shown else ["\x1b[H"])
        self._write(f"{_BEGIN}{text}\x1b[K\x1b[J{_END}")

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the window has another size.  False: somebody has pressed q."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            fds = [self._wake_fd] if self._keys_fd is None else [self._wake_fd, self._keys_fd]
            readable, _, _ = select.select(fds, [], [], left_s)
            if self._keys_fd in readable:
                assert self._keys_fd is not None
                keys = os.read(self._keys_fd, 64)
                if any(key in _QUIT for key in keys):
                    return False
                if not keys:
                    self._keys_fd = None
            if self._wake_fd in readable:
                os.read(self._wake_fd, 64)
                break
        return True

    def enter(self) -> None:
        if self._keys_fd is not None:
            self._before = termios.tcgetattr(self._keys_fd)
            tty.setcbreak(self._keys_fd)
        self._write(_ENTER)

    def leave(self) -> None:
        """Twice does no harm."""
        # The terminal may be gone.
        with suppress(OSError, termios.error):
            self._write(_LEAVE)
            if self._before is not None and self._keys_fd is not None:
                termios.tcsetattr(self._keys_fd, termios.TCSADRAIN, self._before)

    def _write(self, text: str) -> None:
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(self._out_fd, data) :]


@contextmanager
def live_terminal() -> Iterator[LiveTerminal]:
    """Stdout's, which must be one, with the keys of stdin if that is one, too.

    However the block ends, the terminal is then as before: also by a signal, which the process ends of afterwards.  So
    it is while a user has stopped the process (Ctrl-Z).  Ctrl-C is a KeyboardInterrupt.
    """
    sys.stdout.flush()
    wake_fd, woken_fd = os.pipe()
    os.set_blocking(woken_fd, False)
    keys_fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    terminal = LiveTerminal(sys.stdout.fileno(), keys_fd, wake_fd)

    def end(number: int, frame: FrameType | None) -> None:
        raise _EndedError(number)

    def stop(number: int, frame: FrameType | None) -> None:
        terminal.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        terminal.enter()

    handlers = {
        **dict.fromkeys(_ENDING, end),
        signal.SIGTSTP: stop,
        # For the wakeup descriptor: a signal without a handler writes nothing there.
        signal.SIGWINCH: lambda number, frame: None,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    wakeup_fd = signal.set_wakeup_fd(woken_fd, warn_on_full_buffer=False)
    ended_by = None
    try:
        terminal.enter()
        yield terminal
    except _EndedError as exc:
        ended_by = exc.number
    finally:
        terminal.leave()
        signal.set_wakeup_fd(wakeup_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake_fd)
        os.close(woken_fd)
    if ended_by is not None:
        os.kill(os.getpid(), ended_by)


def is_dumb(environ: Mapping[str, str]) -> bool:
    """Whether the terminal shows control sequences as they are, by TERM (terminfo); also where that says nothing."""
    return environ.get("TERM", "dumb") in ("", "dumb")


def has_colours(environ: Mapping[str, str]) -> bool:
    """Whether the terminal has colours and its user wants them (https://no-color.org)."""
    return not is_dumb(environ) and not environ.get("NO_COLOR")


def size_of(fd: int) -> tuple[int, int]:
    """Columns and lines of the terminal; 80 and 24 where it does not say."""
    try:
        columns, lines = os.get_terminal_size(fd)
    except OSError:
        columns = lines = 0
    return columns or 80, lines or 24

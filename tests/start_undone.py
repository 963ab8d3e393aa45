"""What the start of a daemon does to its process, undone: in the tests that is pytest's."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def start_undone() -> Iterator[None]:
    """After the block signals and the garbage collector are as before.

    Programs that are started later inherit ignored signals.
    """
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    n_frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
        gc.enable()
        if gc.get_freeze_count() > n_frozen:
            gc.unfreeze()

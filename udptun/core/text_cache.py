"""What has been made of texts, remembered within a bound of bytes.  Pure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TextCache(Generic[T]):
    """Remembers what was made of the last texts, at most `n_bytes` of text in all.

    What comes of a text takes several times its bytes, so a text of more than a hundredth of `n_bytes` is not
    remembered.  Several threads may use one: each step is a single operation on a dict.
    """

    def __init__(self, n_bytes: int) -> None:
        self._longest = n_bytes // 100
        self._half = n_bytes // 2
        self._n_bytes = 0
        """Of the texts in `_recent`."""
        self._recent: dict[str, T] = {}
        self._before: dict[str, T] = {}
        """What was recent until there was too much of it; the next time it is forgotten, as far as nobody asked."""

    def get(self, text: str, make: Callable[[str], T]) -> T:
        """What `make` makes of the text, or has made.  What it raises is let through and not remembered."""
        found = self._recent.get(text)
        if found is None:
            found = self._before.get(text)
            if found is None:
                found = make(text)
            self._keep(text, found)
        return found

    def __len__(self) -> int:
        return len(self._recent.keys() | self._before.keys())

    def _keep(self, text: str, value: T) -> None:
        size = sys.getsizeof(text)
        if size > self._longest:
            return
        if self._n_bytes + size > self._half:
            self._recent, self._before, self._n_bytes = {}, self._recent, 0
        self._recent[text] = value
        self._n_bytes += size

"""What is shown of the daemon's answers, one after the other: a screen of all or of one peer, also while none comes.

Pure.
"""

from __future__ import annotations

from udptun.commands import peer_page, screen
from udptun.commands.figures import duration
from udptun.commands.hosts import Look, counters_of, matching
from udptun.commands.screen import DIM, RED, Page, labelled, paint


class Views:
    """The present screen.  `peer`: the subnet or address of the one to show, None: all."""

    def __init__(self, peer: str | None) -> None:
        self._peer = peer
        self._latest: Look | None = None
        self._earlier: Look | None = None
        self._failure = ""
        self._failing_since_s = self._failed_s = 0.0

    @property
    def has_looked(self) -> bool:
        return self._latest is not None

    @property
    def has_rates(self) -> bool:
        """Whether there are counters, of which another answer shows how fast they grow."""
        return self._latest is not None and bool(counters_of(self._latest.document))

    @property
    def is_anybody_shown(self) -> bool:
        return self._latest is not None and (self._peer is None or bool(matching(self._latest.document, self._peer)))

    def note(self, look: Look) -> None:
        """The daemon has answered."""
        self._earlier, self._latest, self._failure = self._latest, look, ""

    def note_failure(self, reason: str, at_s: float) -> None:
        """The daemon has not answered."""
        if not self._failure:
            self._failing_since_s = at_s
        self._failure, self._failed_s = reason, at_s

    def lines(self, page: Page, corner: str = "") -> list[str]:
        """The present screen.  While no answer comes it is the last one, colourless, below the reason."""
        if not self._failure:
            return self._screen(page, corner)
        away_s = self._failed_s - self._failing_since_s
        since = f" (for {duration(away_s)})" if away_s >= 1 else ""
        head = [paint(line, page) for line in labelled("udptun", self._failure + since, page, RED)]
        if self._latest is None:
            return head
        height = None if page.height is None else max(page.height - len(head) - 1, 1)
        last = self._screen(Page(page.width, height), "")
        return [*head, "", *(paint([screen.Span(line, DIM)], page) for line in last)]

    def _screen(self, page: Page, corner: str) -> list[str]:
        if self._latest is None:
            return []
        if self._peer is None:
            return screen.render(self._latest, self._earlier, page, corner)
        if not self.is_anybody_shown:
            return [paint(line, page) for line in labelled("peer", says_that_nobody_is(self._peer), page, RED)]
        return peer_page.render(self._latest, self._earlier, self._peer, page)


def says_that_nobody_is(peer: str) -> str:
    return f"no peer has {peer}: it is this host's own, or in no lease; `udptun status` lists the peers"

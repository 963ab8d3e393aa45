"""Which peers are asked where there are thousands.  Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from udptun.doctor.facts import Peer

MOST = 100
"""So many are asked at once."""


@dataclass(frozen=True, slots=True)
class Sample:
    chosen: tuple[Peer, ...]
    n_all: int

    def __str__(self) -> str:
        if len(self.chosen) == self.n_all:
            return f"{self.n_all} peer{'s' if self.n_all != 1 else ''}"
        return f"a sample of {len(self.chosen)} of {self.n_all} peers"


def sample(peers: Sequence[Peer]) -> Sample:
    """All, or half of MOST from those that do not answer the daemon, and others by chance; always the same ones."""
    if len(peers) <= MOST:
        return Sample(tuple(peers), len(peers))
    chance = random.Random(len(peers))
    suspects = [peer for peer in peers if peer.liveness == "dead"]
    suspects = chance.sample(suspects, min(MOST // 2, len(suspects)))
    named = set(suspects)
    others = [peer for peer in peers if peer not in named]
    return Sample((*suspects, *chance.sample(others, MOST - len(suspects))), len(peers))

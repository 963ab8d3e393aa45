"""Which fault comes when, on which host, and for how long: the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PAUSE_S = (0.5, 3.0)
"""Between two faults, with nothing but load: whatever is lost then is nobody's but ours."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What the schedule must know of a fault.  `hold_s`: how long it lasts, from and to.

    `ends_processes`: it does not come to the last host, whose processes go on from the first to the last moment.
    """

    name: str
    hold_s: tuple[float, float]
    ends_processes: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """`host` counts from 1.  `hold_s` lies between the coming of the fault and its going, `pause_s` before it."""

    number: int
    fault: str
    host: int
    pause_s: float
    hold_s: float
    draw: int
    """A number for whatever else the fault leaves to chance."""


def schedule(seed: int, kinds: Sequence[Kind], n_hosts: int) -> Iterator[Step]:
    """Steps without an end, numbered from 1.

    They come in rounds: each has every kind once, in an order of its own.  So each kind has had its turn as often as
    any other, give or take one, whenever the soak ends.
    """
    draw = random.Random(seed)
    number = 0
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            number += 1
            hosts = n_hosts - 1 if kind.ends_processes and n_hosts > 1 else n_hosts
            yield Step(
                number,
                kind.name,
                draw.randint(1, hosts),
                round(draw.uniform(*PAUSE_S), 2),
                round(draw.uniform(*kind.hold_s), 2),
                draw.getrandbits(32),
            )

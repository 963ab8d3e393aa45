"""How long packets may be, on paths that swallow what is longer: in a time that jumps from look to look."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from udptun.probing.path_mtu import CHECK_S, DISTRUST_S, GROW_S, IDLE_CHECK_S, IDLE_PER_S, LEAST, N_SIZES, PathMtus
from udptun.probing.prober import LOOK_S

FULL = 1472
TIMEOUT_S = 2 * LOOK_S


@dataclass
class World:
    """One peer whose path takes `path` bytes."""

    path: int = FULL
    full: int = FULL
    now_s: float = 1000.0
    is_watched: bool = True
    is_heard: bool = True
    loses: float = 0.0
    """Of all probes, whatever their size."""
    probes: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paths: PathMtus[str] = PathMtus()
        self.paths.add("a", self.full)
        self._chance = random.Random(3)
        self._lost: list[tuple[float, int]] = []
        self.answer_small()

    def look(self) -> None:
        self.now_s += LOOK_S
        for asked_s, size in list(self._lost):
            if self.now_s - asked_s >= TIMEOUT_S:
                self._lost.remove((asked_s, size))
                self.paths.note_lost("a", size, self.now_s, is_heard=self.is_heard)
        self._send(self.paths.due(["a"] if self.is_watched else [], self.now_s))
        self.changes += [(self.now_s, size) for size in self.paths.take_changes().values()]

    def run(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.look()

    def answer_small(self) -> None:
        """The peer has answered a probe that asks whether it is alive."""
        self._send(self.paths.due_with_answer("a", self.now_s))

    def _send(self, probes: list[tuple[str, int]]) -> None:
        for _, size in probes:
            self.probes.append((self.now_s, size))
            if size <= self.path and self._chance.random() >= self.loses:
                self.paths.note_answer("a", size, self.now_s)
            else:
                self._lost.append((self.now_s, size))

    @property
    def size(self) -> int | None:
        return self.paths.measured("a")


def test_a_path_that_takes_all_is_checked_and_nothing_changes() -> None:
    world = World()
    assert world.size == FULL
    world.run(60)
    assert (world.size, world.changes, world.paths.narrow()) == (FULL, [], {})
    assert {size for _, size in world.probes} == {FULL}
    assert len(world.probes) <= 60 / CHECK_S + 1


@pytest.mark.parametrize("path", [1471, 1400, 1272, 1000, 800, LEAST])
@pytest.mark.parametrize("full", [FULL, 8972], ids=["full-1472", "full-8972"])
def test_a_path_that_becomes_narrow_is_measured_to_the_byte_within_seconds(path: int, full: int) -> None:
    world = World(full, full)
    world.run(30)
    world.path, narrowed_s = path, world.now_s
    world.run(10)
    ((found_s, size),) = world.changes
    assert (size, world.size, world.paths.narrow()) == (path, path, {"a": path})
    # A check, lost twice, and three or four rounds.
    rounds = 3 if full == FULL else 4
    assert found_s - narrowed_s <= CHECK_S + (2 + rounds) * (TIMEOUT_S + LOOK_S)
    assert len([at for at, _ in world.probes if at > narrowed_s]) <= (rounds + 1) * N_SIZES + 10


def test_a_path_that_is_narrow_from_the_begin_is_measured_without_traffic() -> None:
    world = World(1300, is_watched=False)
    world.run(10)
    assert world.size == 1300


@pytest.mark.parametrize("path", [FULL, 1400], ids=["all of it", "a part"])
def test_a_path_that_heals_is_found_out(path: int) -> None:
    world = World(1272)
    world.run(10)
    world.path = path
    world.run(GROW_S[0] + 10)
    assert (world.size, [size for _, size in world.changes]) == (path, [1272, path])


def test_a_path_that_stays_narrow_is_tried_less_and_less_often() -> None:
    world = World(1272)
    world.run(10)
    before_s = world.now_s
    world.run(3600)
    assert world.changes[1:] == []
    tries = [at for at, size in world.probes if at > before_s and size == FULL]
    # After 60, 120, 240, 480, 600 s, and so on.
    assert 7 <= len(tries) <= 10


def test_a_host_that_drops_long_echoes_is_no_narrow_path() -> None:
    world = World(100)
    world.run(3000)
    assert (world.size, world.changes, world.paths.narrow()) == (None, [], {})
    assert len(world.probes) <= (3000 / IDLE_CHECK_S + 1) * (4 * N_SIZES)


def test_a_peer_that_is_gone_is_no_narrow_path() -> None:
    world = World()
    world.run(10)
    world.path, world.is_heard = 0, False
    world.run(60)
    assert (world.changes, world.paths.narrow()) == ([], {})
    assert {size for _, size in world.probes} == {FULL}
    # It goes just when a search has begun.
    world.path, world.is_heard = 1000, True
    while len({size for _, size in world.probes}) < 5:
        world.look()
    world.path, world.is_heard = 0, False
    world.run(10)
    assert world.changes == []


def test_an_outage_that_ends_while_it_is_searched_for_a_size_makes_no_narrow_path() -> None:
    """Before, a host that was away for a second got packets of 646 bytes at most for a minute.

    The first round of the search was lost whole, the second one, of sizes below that, arrived whole.
    """
    world = World()
    world.run(10)
    world.path, n_before = 0, len(world.probes)
    while len(world.probes) - n_before < 2 + N_SIZES:
        world.look()
    world.path = FULL
    world.run(30)
    assert (world.size, world.changes, world.paths.narrow()) == (FULL, [], {})


@pytest.mark.parametrize("loses", [0.01, 0.1, 0.3])
def test_probes_lost_by_chance_make_no_lasting_harm(loses: float) -> None:
    world = World(loses=loses)
    world.run(1000)
    # A search that chance began ends with the full size as a rule.
    assert len([size for _, size in world.changes if size < FULL]) <= {0.01: 0, 0.1: 2, 0.3: 1000}[loses]
    world.loses = 0
    world.run(GROW_S[1] + 10)
    assert world.size in (FULL, None)
    assert world.paths.narrow() == {}


def test_an_idle_peer_is_checked_with_the_answers_that_it_gives_anyway() -> None:
    world = World(is_watched=False)
    for _ in range(10):
        world.run(IDLE_CHECK_S)
        world.answer_small()
    assert len(world.probes) == 11
    world.path = 1300
    world.run(IDLE_CHECK_S)
    assert world.size == FULL
    world.answer_small()
    world.run(10)
    assert world.size == 1300


def test_thousands_of_idle_peers_are_checked_evenly() -> None:
    paths: PathMtus[int] = PathMtus()
    for key in range(10_000):
        paths.add(key, FULL)
    n = 0
    for round_ in range(3):
        for key in range(10_000):
            now_s = 300 * round_ + 0.03 * key
            for _, size in paths.due_with_answer(key, now_s):
                n += 1
                paths.note_answer(key, size, now_s + 0.01)
    assert n <= 900 * IDLE_PER_S + 1
    assert len([key for key in range(10_000) if paths.measured(key)]) > 2 * n / 3


def test_a_probe_that_was_not_sent_ends_the_round_and_says_nothing() -> None:
    world = World()
    paths = world.paths
    ((_, size),) = paths.due(["a"], world.now_s + 10)
    paths.give_up("a", world.now_s + 10)
    paths.note_lost("a", size, world.now_s + 11, is_heard=True)
    assert paths.due(["a"], world.now_s + 10) == []
    assert paths.due(["a"], world.now_s + 20) == [("a", FULL)]
    paths.remove(["a"])
    paths.note_lost("a", FULL, world.now_s + 21, is_heard=True)
    paths.give_up("a", world.now_s + 21)
    assert paths.due(["a"], world.now_s + 30) == []
    assert paths.due_with_answer("a", world.now_s + 30) == []
    assert (paths.measured("a"), paths.take_changes()) == (None, {})


@pytest.mark.parametrize("told", [1272, 1271, LEAST])
def test_what_an_icmp_error_says_is_found_with_one_round_of_probes(told: int) -> None:
    world = World()
    world.run(10.3)
    world.path, told_s = told, world.now_s
    world.paths.note_told("a", told, world.now_s)
    world.run(3 * LOOK_S + TIMEOUT_S)
    assert world.changes == [(world.changes[0][0], told)]
    assert world.changes[0][0] - told_s <= TIMEOUT_S + 2 * LOOK_S
    assert len([at for at, _ in world.probes if at >= told_s]) <= N_SIZES + 4


def test_what_an_icmp_error_says_is_tried_also_while_another_probe_is_on_the_way() -> None:
    world = World()
    world.path = 1272
    world.run(CHECK_S + 1.5 * LOOK_S)
    assert world.size == FULL
    world.paths.note_told("a", 1272, world.now_s)
    world.run(2 * TIMEOUT_S + 3 * LOOK_S)
    assert world.size == 1272


def test_a_forged_icmp_error_changes_nothing_and_costs_a_round_of_probes_in_a_while() -> None:
    """Anybody can send one that quotes a datagram from our port."""
    world = World()
    world.run(10.3)
    world.probes.clear()
    n_s = 60
    for told in range(FULL - n_s, FULL):
        world.paths.note_told("a", told, world.now_s)
        world.run(1)
    assert (world.size, world.changes) == (FULL, [])
    assert len(world.probes) <= n_s / CHECK_S + (N_SIZES + 2) * (n_s / DISTRUST_S + 1)
    for told in (0, 68, LEAST - 1, FULL, 1500):
        world.paths.note_told("a", told, world.now_s + 2 * DISTRUST_S)
    world.probes.clear()
    world.run(2)
    assert {size for _, size in world.probes} == {FULL}

"""When a worker hangs, and when it only looks so."""

from __future__ import annotations

from udptun.datapath.hang import LOOK_S, N_LOOKS, HangWatch


def looks(watch: HangWatch, *signs: object, n: int = N_LOOKS, since_s: float = 100.0) -> list[bool]:
    return [watch.look(signs, since_s + i * LOOK_S) for i in range(n)]


def test_a_worker_that_does_not_move_in_a_turn_hangs() -> None:
    assert looks(HangWatch(), (7, 1), None) == [False] * (N_LOOKS - 1) + [True]


def test_a_worker_that_sleeps_does_not_hang() -> None:
    assert not any(looks(HangWatch(), None, None, n=3 * N_LOOKS))


def test_a_worker_that_moves_does_not_hang() -> None:
    watch = HangWatch()
    assert not any(watch.look([(7, turns)], 100.0 + turns) for turns in range(3 * N_LOOKS))


def test_looks_that_follow_each_other_closely_are_one() -> None:
    """Each death of a process is a reason to look."""
    watch = HangWatch()
    assert not any(watch.look([(7, 1)], 100.0 + i * LOOK_S / 100) for i in range(50))


def test_time_that_passes_without_a_look_does_not_count() -> None:
    """As when the machine was suspended in the middle of a turn."""
    watch = HangWatch()
    assert not watch.look([(7, 1)], 100.0)
    assert not watch.look([(7, 1)], 9000.0)


def test_one_worker_is_not_taken_for_another_when_their_number_changes() -> None:
    watch = HangWatch()
    assert not any(looks(watch, (7, 1), (8, 1), n=N_LOOKS - 1))
    assert not watch.look([(7, 2)], 200.0)
    assert not watch.look([(7, 2), (8, 1)], 201.0)


def test_a_process_does_not_hang_because_the_one_before_it_did() -> None:
    """One that hung and was killed by somebody else took its successor along, when that began between two looks."""
    watch = HangWatch()
    assert looks(watch, (7, 1))[-1]
    assert not watch.look([(8, 1)], 100.0 + (N_LOOKS - 1) * LOOK_S + LOOK_S / 100)
    assert not watch.look([(8, 1)], 100.0 + N_LOOKS * LOOK_S)

"""How many probes were lost is said of the last 10 to 20 minutes."""

from __future__ import annotations

from udptun.probing.loss import WINDOW_S, Counts, Losses


def test_counts_are_of_the_present_window_and_of_the_one_before() -> None:
    losses: Losses[str] = Losses()
    assert losses.counts("a", 0.0) == (0, 0)
    for at_s, is_lost in ((0.0, True), (1.0, False), (WINDOW_S + 1, True)):
        losses.note("a", at_s, is_lost=is_lost)
    losses.note("b", 5.0, is_lost=False)
    assert losses.counts("a", WINDOW_S + 1) == Counts(3, 2)
    assert losses.counts("a", 2 * WINDOW_S + 1) == Counts(1, 1)
    assert losses.counts("a", 4 * WINDOW_S) == Counts(0, 0)
    assert losses.counts("b", 6.0) == Counts(1, 0)


def test_a_peer_that_is_silent_for_long_begins_anew() -> None:
    losses: Losses[str] = Losses()
    losses.note("a", 0.0, is_lost=True)
    losses.note("a", 10 * WINDOW_S, is_lost=False)
    assert losses.counts("a", 10 * WINDOW_S) == Counts(1, 0)
    assert losses.counts("a", 11 * WINDOW_S - 1) == Counts(1, 0)
    losses.remove(["a", "b"])
    assert losses.counts("a", 10 * WINDOW_S) == Counts()

"""Whom to ask where it sends from, what an answer proves, and for how long."""

from __future__ import annotations

import random
from ipaddress import IPv4Address
from itertools import pairwise

import pytest

from udptun.datapath.learning import (
    ADDRESSES_A_PEER,
    ANSWER_S,
    ASK_MAX_S,
    ASK_S,
    CANDIDATE_S,
    CONFIRM_S,
    LIFETIME_S,
    MAX_CANDIDATES,
    PEERS_A_ROUND,
    ROUND_S,
    Learning,
)

HERE, THERE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
START_S = 1000.0


class Rig:
    """Peers that strays come of, with a clock that the test moves."""

    def __init__(self, *peers: str) -> None:
        self.learning: Learning[str] = Learning(random.Random(5))
        self.now_s = START_S
        for peer in peers:
            self.learning.add(peer, {}, self.now_s)

    def stray(self, peer: str = "a", address: IPv4Address = HERE) -> None:
        self.learning.note_stray(peer, address, self.now_s, self.now_s)

    def ask(self) -> set[str]:
        return set(self.learning.begin(self.now_s))

    def answer(self, peer: str = "a", address: IPv4Address = HERE, port: int = 8285) -> bool:
        return self.learning.note_answer(peer, address, port, self.now_s)

    def end(self) -> None:
        self.now_s += ROUND_S
        self.learning.end(self.now_s)

    def learn(self, peer: str = "a", address: IPv4Address = HERE, port: int = 8285) -> None:
        """In one round."""
        self.stray(peer, address)
        assert peer in self.ask()
        self.now_s += 0.1
        assert self.answer(peer, address, port)
        self.end()

    def asked_at(self, peer: str, seconds: float, address: IPv4Address | None = HERE) -> list[float]:
        """When a peer was asked that never answers, while strays come; seconds from now."""
        began_s, times = self.now_s, []
        while self.now_s < began_s + seconds:
            self.now_s += 0.5
            if address is not None:
                self.stray(peer, address)
            self.learning.look(self.now_s)
            if peer in self.ask():
                times.append(self.now_s - began_s)
                self.end()
        return times


@pytest.fixture
def rig() -> Rig:
    return Rig("a", "b")


def test_a_stray_leads_to_a_question_and_the_answer_makes_its_source_valid_for_that_peer(rig: Rig) -> None:
    assert rig.ask() == set()
    rig.stray()
    assert rig.learning.begin(rig.now_s) == {"a": [HERE]}
    assert rig.learning.learned("a") == {}
    rig.now_s += 0.2
    assert rig.answer()
    assert rig.learning.learned("a") == {HERE: 8285}
    assert rig.learning.learned("b") == {}
    assert not rig.answer()


def test_strays_of_nobody_we_know_lead_to_nothing(rig: Rig) -> None:
    rig.stray("x")
    assert rig.ask() == set()
    assert not rig.answer("x")
    assert rig.learning.learned("x") == {}
    assert not rig.learning.may_answer("x", rig.now_s)


def test_without_an_answer_the_questions_become_seldom_and_nothing_is_learned(rig: Rig) -> None:
    times = rig.asked_at("a", 300)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] <= 0.5
    assert gaps == sorted(gaps)
    assert ASK_S <= gaps[0] <= ASK_S + 3 * ROUND_S
    assert ASK_MAX_S <= gaps[-1] <= ASK_MAX_S + 3 * ROUND_S
    assert rig.learning.learned("a") == {}


def test_strays_that_have_led_to_the_question_lead_to_no_other(rig: Rig) -> None:
    rig.stray()
    assert rig.ask() == {"a"}
    rig.end()
    assert rig.asked_at("a", 100, None) == []


def test_an_answer_from_elsewhere_counts_for_where_it_comes_from(rig: Rig) -> None:
    """Somebody has spoofed strays from HERE.  The peer sends from THERE, and it is its answer that says so."""
    rig.stray()
    assert rig.ask() == {"a"}
    assert rig.answer("a", THERE)
    rig.end()
    assert rig.learning.learned("a") == {THERE: 8285}
    assert rig.asked_at("a", 4) == []


def test_another_port_replaces_the_one_before(rig: Rig) -> None:
    """A NAT that has forgotten the flow translates to another port."""
    rig.learn()
    rig.now_s += ASK_S
    rig.learn(port=40_000)
    assert rig.learning.learned("a") == {HERE: 40_000}


def test_another_user_of_the_nat_has_the_peer_asked_ever_more_seldom(rig: Rig) -> None:
    rig.learn()
    n_asked = 0
    for _ in range(600):
        rig.now_s += 0.5
        rig.stray()
        if rig.ask():
            n_asked += 1
            rig.answer()
            rig.end()
    assert n_asked <= 300 / ASK_MAX_S + 6
    assert rig.learning.learned("a") == {HERE: 8285}


def test_what_is_confirmed_stays_and_what_is_not_ends(rig: Rig) -> None:
    rig.learn()
    rig.learn("b")
    n_asked = 0
    while rig.now_s < START_S + 3 * LIFETIME_S:
        rig.now_s += 5
        forgotten = rig.learning.look(rig.now_s)
        asked = rig.ask()
        if "a" in asked:
            n_asked += 1
            rig.answer()
        rig.end()
        if forgotten:
            assert forgotten == [("b", HERE)]
            assert LIFETIME_S <= rig.now_s - START_S <= LIFETIME_S + 20
    assert rig.learning.learned("a") == {HERE: 8285}
    assert rig.learning.learned("b") == {}
    assert 3 * LIFETIME_S / CONFIRM_S / 1.2 <= n_asked <= 3 * LIFETIME_S / CONFIRM_S * 1.2


def test_what_an_earlier_daemon_has_learned_is_asked_about_at_once(rig: Rig) -> None:
    rig.learning.add("c", {HERE: 1, THERE: 0}, rig.now_s)
    assert rig.learning.learned("c") == {HERE: 1, THERE: 0}
    (first, *_) = rig.asked_at("c", 10, None)
    assert first <= 6
    assert rig.asked_at("c", LIFETIME_S, None)
    assert rig.learning.learned("c") == {}


def test_a_peer_that_goes_or_comes_anew_has_nothing(rig: Rig) -> None:
    """Also in the middle of a round."""
    rig.learn()
    rig.now_s += ASK_S
    rig.stray(address=THERE)
    assert rig.ask() == {"a"}
    rig.learning.remove("a")
    assert not rig.answer("a", THERE)
    rig.end()
    rig.learning.add("a", {}, rig.now_s)
    assert rig.learning.learned("a") == {}
    assert rig.asked_at("a", 50, None) == []
    assert rig.learning.look(rig.now_s) == []


def test_of_a_peer_with_many_addresses_the_last_ones_hold(rig: Rig) -> None:
    for n in range(ADDRESSES_A_PEER + 3):
        rig.learn(address=HERE + n)
        rig.now_s += ASK_S
    assert list(rig.learning.learned("a")) == [HERE + n for n in range(3, ADDRESSES_A_PEER + 3)]


def test_a_flood_from_thousands_of_addresses_neither_costs_more_nor_hides_a_peer() -> None:
    """It claims inner sources of all peers.  One stray a second is the peer's own."""
    peers = [f"p{n}" for n in range(50)]
    rig = Rig(*peers)
    chance = random.Random(3)
    asked: list[tuple[str, float]] = []
    for number in range(100):
        for n in range(60):
            rig.stray(chance.choice(peers), IPv4Address("198.18.0.0") + 60 * number + n)
        rig.stray("p7", THERE)
        now = rig.ask()
        assert len(now) <= PEERS_A_ROUND
        asked += [(peer, rig.now_s) for peer in now]
        if "p7" in now:
            rig.answer("p7", THERE)
        rig.end()
    times = [at for peer, at in asked if peer == "p7"]
    # Everyone's turn comes.
    assert times[0] - START_S <= 2 * ROUND_S * len(peers) / PEERS_A_ROUND
    assert min(after - before for before, after in pairwise(times)) >= ASK_S
    assert rig.learning.learned("p7") == {THERE: 8285}
    assert all(not rig.learning.learned(peer) for peer in peers if peer != "p7")
    n_sources = sum(len(peer.sources) for peer in rig.learning._peers.values())
    assert n_sources <= MAX_CANDIDATES + 1
    # And when it is over nothing is left.
    rig.now_s += CANDIDATE_S + 1
    assert rig.ask() == set()
    assert sum(len(peer.sources) for peer in rig.learning._peers.values()) == 1


def test_a_question_is_answered_once_a_second(rig: Rig) -> None:
    n = sum(rig.learning.may_answer("a", rig.now_s + i / 100) for i in range(1000))
    assert n == 10 / ANSWER_S
    assert rig.learning.may_answer("b", rig.now_s)

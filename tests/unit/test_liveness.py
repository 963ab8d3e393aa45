"""Who is probed when, and who is dead: peers in a time that jumps from look to look."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from udptun.probing.liveness import (
    ACTIVE_PACKETS,
    ACTIVE_S,
    IDLE_PER_S,
    IDLE_S,
    MOST_LOST,
    UNKNOWN_S,
    WINDOW_S,
    Liveness,
    Probing,
)
from udptun.probing.path_mtu import CHECK_S
from udptun.probing.prober import LOOK_S

UNKNOWN, ALIVE, DEAD = Liveness.UNKNOWN, Liveness.ALIVE, Liveness.DEAD
RTT_S = 0.01
MUCH = ACTIVE_PACKETS


@dataclass
class World:
    """Peers that answer probes, or do not, and traffic with them.  Looks as the prober does."""

    peers: list[str] = field(default_factory=lambda: ["a"])
    now_s: float = 1000.0
    answering: set[str] = field(default_factory=set)
    sending: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Packets to a peer and from it in each look."""
    can_send: bool = True
    idle_s: float = IDLE_S
    probes: list[tuple[float, str]] = field(default_factory=list)
    changes: list[tuple[float, str, Liveness]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.probing: Probing[str] = Probing(random.Random(1), self.idle_s)
        self.probing.add(self.peers, self.now_s)

    def look(self) -> None:
        self.now_s += LOOK_S
        self.probing.note_traffic({key: n for key, n in self.sending.items() if any(n)}, self.now_s)
        for key in self.probing.waits_too_long(self.now_s):
            if self.can_send:
                self.probing.note_lost(key)
            else:
                self.probing.note_not_sent(key, self.now_s)
        for key in self.probing.due(self.now_s):
            self.probes.append((self.now_s, key))
            if key in self.answering and self.can_send:
                self.probing.note_answer(key, RTT_S, self.now_s + RTT_S)
        self.changes += [(self.now_s, key, it) for key, it in self.probing.take_changes().items()]

    def run(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.look()

    def probes_since(self, since_s: float, key: str = "a") -> list[float]:
        return [at_s for at_s, of in self.probes if of == key and at_s > since_s]

    def liveness(self, key: str = "a") -> Liveness:
        return self.probing.liveness(key)[0]


@pytest.fixture
def alive() -> World:
    """One peer, which has answered."""
    world = World(answering={"a"})
    world.run(2)
    assert world.liveness() is ALIVE
    return world


def test_a_new_peer_is_unknown_and_alive_with_its_first_answer() -> None:
    world = World(answering={"a"})
    assert world.probing.liveness("a") == (UNKNOWN, None)
    world.run(2)
    assert world.probing.liveness("a") == (ALIVE, RTT_S)
    assert [(key, it) for _, key, it in world.changes] == [("a", ALIVE)]
    assert len(world.probes) == 1


def test_a_peer_that_never_answers_is_never_dead_and_seldom_asked() -> None:
    """A firewall may drop echoes while pods can be reached."""
    world = World(sending={"a": (MUCH, 0)})
    world.run(600)
    assert (world.liveness(), world.changes) == (UNKNOWN, [])
    assert len(world.probes) <= 600 / UNKNOWN_S + 2 * MOST_LOST
    world.sending = {}
    world.run(ACTIVE_S)
    before_s = world.now_s
    # Packets to it are unanswered still.
    world.sending = {"a": (0, 1)}
    world.look()
    world.sending = {}
    world.run(2 * IDLE_S)
    assert 1 <= len(world.probes_since(before_s)) <= 2 * IDLE_S / UNKNOWN_S
    world.answering = {"a"}
    world.run(1.2 * IDLE_S)
    assert world.liveness() is ALIVE


@pytest.mark.parametrize("sending", [(MUCH, 0), (1, 0), (0, 0)], ids=["floods it", "tries again", "says nothing"])
def test_a_peer_with_traffic_is_dead_within_3_s_of_its_last_packet(alive: World, sending: tuple[int, int]) -> None:
    alive.sending = {"a": (MUCH, MUCH)}
    alive.run(WINDOW_S)
    alive.answering.clear()
    alive.sending = {"a": sending}
    died_s = alive.now_s
    alive.run(4)
    ((dead_s, _, liveness),) = alive.changes[1:]
    assert liveness is DEAD
    assert dead_s - died_s + LOOK_S <= 3.0
    assert len([at_s for at_s in alive.probes_since(died_s) if at_s < dead_s]) == MOST_LOST


def test_a_peer_with_little_traffic_is_dead_soon_after_packets_to_it_go_unanswered(alive: World) -> None:
    """As those of a TCP connection that begins: one at once, one a second later."""
    alive.run(100)
    alive.answering.clear()
    began_s = alive.now_s
    for n in (1, 0, 0, 0, 1):
        alive.sending = {"a": (n, 0)}
        alive.look()
    alive.sending = {}
    alive.run(3)
    ((dead_s, _, _),) = alive.changes[1:]
    assert dead_s - began_s <= 3.5


def test_an_idle_peer_is_dead_at_its_next_probe(alive: World) -> None:
    alive.answering.clear()
    died_s = alive.now_s
    alive.run(1.2 * IDLE_S)
    ((dead_s, _, liveness),) = alive.changes[1:]
    assert (liveness, dead_s - died_s <= 1.1 * IDLE_S + 3) == (DEAD, True)
    assert len([at_s for at_s in alive.probes_since(died_s) if at_s < dead_s]) == MOST_LOST


def test_whoever_sends_is_alive_whatever_becomes_of_probes(alive: World) -> None:
    alive.answering.clear()
    alive.sending = {"a": (MUCH, 1)}
    alive.run(60)
    assert alive.probes_since(1002) == []
    alive.sending = {}
    for _ in range(30):
        # Silent for a moment, so that it is probed, and then heard.
        alive.run(1.5)
        alive.sending = {"a": (0, 1)}
        alive.look()
        alive.sending = {}
    assert alive.liveness() is ALIVE


@pytest.mark.parametrize("by", ["answer", "traffic"])
def test_a_dead_peer_is_alive_with_the_first_thing_heard_of_it(alive: World, by: str) -> None:
    alive.sending = {"a": (1, 0)}
    alive.answering.clear()
    alive.run(6)
    assert alive.liveness() is DEAD
    assert list(alive.probing.dead_since()) == ["a"]
    if by == "answer":
        alive.answering = {"a"}
        alive.run(2)
    else:
        alive.sending = {"a": (0, 1)}
        alive.look()
    assert alive.liveness() is ALIVE
    assert alive.probing.dead_since() == {}
    assert [it for _, _, it in alive.changes] == [ALIVE, DEAD, ALIVE]


@pytest.mark.parametrize("n", [1, 400])
def test_dead_peers_are_asked_once_a_second_or_in_turn(n: int) -> None:
    """Nothing is sent to them, so that the two ends of a path that heals may both wait for the other one."""
    peers = [str(i) for i in range(n)]
    world = World(peers, answering=set(peers))
    world.run(15)
    world.answering.clear()
    world.sending = dict.fromkeys(peers, (1, 0))
    world.run(5)
    assert set(world.probing.dead_since()) == set(peers)
    world.sending = {}
    world.run(20)
    before_s, n_before = world.now_s, len(world.probes)
    world.run(100)
    assert len(world.probes) - n_before <= 100 * max(1, IDLE_PER_S * 1.1)
    for peer in peers:
        assert 100 / max(1, n / IDLE_PER_S) * 0.8 <= len(world.probes_since(before_s, peer)) <= 101


def test_probes_that_never_left_this_host_say_nothing(alive: World) -> None:
    alive.can_send = False
    alive.sending = {"a": (MUCH, 0)}
    alive.run(60)
    assert alive.liveness() is ALIVE
    assert len(alive.changes) == 1


def test_probes_that_find_no_room_are_sent_with_the_next_looks() -> None:
    """Otherwise, of many dead peers the same ones would be asked each time, and the others never."""
    peers = [str(i) for i in range(400)]
    world = World(peers, answering=set(peers))
    world.run(15)
    world.answering.clear()
    world.sending = dict.fromkeys(peers, (1, 0))
    world.run(5)
    world.sending = {}
    world.run(20)
    asked = Counter[str]()
    for _ in range(200):
        world.now_s += LOOK_S
        for key in world.probing.waits_too_long(world.now_s):
            world.probing.note_lost(key)
        for n, key in enumerate(world.probing.due(world.now_s)):
            if n < 20:
                asked[key] += 1
            else:
                world.probing.note_no_room(key)
    assert set(asked) == set(peers)


def test_a_late_answer_counts_for_being_heard_not_for_its_probe(alive: World) -> None:
    alive.answering.clear()
    alive.sending = {"a": (1, 0)}
    for _ in range(40):
        alive.look()
        # More than one timeout ago, less than three.
        if late := [at_s for at_s in alive.probes_since(1002) if 1.0 <= alive.now_s - at_s < 1.0 + LOOK_S]:
            alive.probing.note_answer("a", alive.now_s - late[0], alive.now_s)
    assert alive.liveness() is ALIVE
    assert alive.probing.liveness("a")[1] == pytest.approx(1.0, abs=LOOK_S)


def test_a_peer_with_traffic_that_answers_is_asked_about_once_a_second(alive: World) -> None:
    alive.sending = {"a": (MUCH, MUCH)}
    alive.run(WINDOW_S)
    assert len(alive.probes) == 1
    alive.sending = {}
    before_s = alive.now_s
    alive.run(ACTIVE_S)
    assert ACTIVE_S / 1.1 - 2 <= len(alive.probes_since(before_s)) <= ACTIVE_S / 0.7
    alive.run(5)
    before_s = alive.now_s
    alive.run(IDLE_S / 2)
    assert len(alive.probes_since(before_s)) <= 1


def test_two_hosts_that_probe_each_other_come_to_rest() -> None:
    """A probe is traffic to the other one: a packet from us, and its kernel's answer.  So are those of the path."""
    here, there = World(), World()
    for world in (here, there):
        world.answering = {"a"}
        world.sending = {"a": (MUCH, MUCH)}
        world.run(WINDOW_S)
        world.sending = {}
    for seconds, most in ((2 * ACTIVE_S, None), (ACTIVE_S, 2)):
        began_s, n_before = here.now_s, (len(here.probes), len(there.probes))
        while here.now_s - began_s < seconds:
            n = len(here.probes), len(there.probes)
            here.look()
            there.look()
            is_time = round(here.now_s / LOOK_S) % round(CHECK_S / LOOK_S) == 0
            there.sending = {"a": (len(here.probes) - n[0] + (is_time and here.probing.watched() != []),) * 2}
            here.sending = {"a": (len(there.probes) - n[1] + (is_time and there.probing.watched() != []),) * 2}
        if most is not None:
            assert len(here.probes) - n_before[0] <= most
            assert len(there.probes) - n_before[1] <= most


def test_thousands_of_idle_peers_are_asked_evenly_and_seldom() -> None:
    peers = [str(i) for i in range(10_000)]
    world = World(peers, answering=set(peers))
    world.run(2 * IDLE_S)
    per_s = Counter(int(at_s) for at_s, _ in world.probes)
    assert max(per_s.values()) < 2 * IDLE_PER_S
    assert len(world.probes) / (2 * IDLE_S) < 50
    assert all(world.liveness(peer) is ALIVE for peer in peers)


def test_peers_that_are_removed_or_begun_anew_leave_nothing() -> None:
    world = World(["a", "b"], answering={"a", "b"}, sending={"a": (MUCH, 0), "b": (MUCH, 0)})
    world.run(3)
    world.answering.clear()
    world.run(5)
    assert set(world.probing.dead_since()) == {"a", "b"}
    world.probing.remove(["a"])
    world.probing.add(["b"], world.now_s)
    assert (world.liveness("a"), world.liveness("b")) == (UNKNOWN, UNKNOWN)
    assert world.probing.dead_since() == {}
    # An answer to a probe of before.
    world.probing.note_answer("a", RTT_S, world.now_s)
    world.run(5)
    assert world.liveness("a") is UNKNOWN
    assert [it for _, key, it in world.changes if key == "a"] == [ALIVE, DEAD]


def test_a_probe_that_was_not_sent_is_soon_sent_again_to_an_idle_peer() -> None:
    """Before, it was when the next one was due, 5 minutes later: the route to a new peer may come after its probe."""
    world = World(answering={"a"}, can_send=False)
    world.run(2)
    world.can_send = True
    world.run(UNKNOWN_S + 1)
    assert world.liveness() is ALIVE
    assert len(world.probes) == 2


def test_thousands_of_idle_peers_that_shall_be_asked_each_minute_are_asked_less_often() -> None:
    peers = [str(i) for i in range(10_000)]
    world = World(peers, answering=set(peers), idle_s=60.0)
    world.run(600)
    assert len(world.probes) / 600 < 50
    few = World(["a"], answering={"a"}, idle_s=60.0)
    few.run(600)
    assert 9 <= len(few.probes) <= 12

"""Which peers are alive, and whom to probe when.  Pure: counts, answers and the time come from the caller.

    probe       an echo request to a peer's tunnel address, which any kernel answers
    heard       a packet of the peer has come, the answer to a probe included
    UNKNOWN     the peer has never answered a probe: its host's firewall may drop echoes, while its pods can be reached
    ALIVE       it has answered, and is thought to be there
    DEAD        it had answered, then probes were lost and nothing at all was heard from it since

Whoever is heard needs no probe.  A peer is watched closely while it had much traffic in the last minute, or when
packets to it go unanswered: once it is silent it is probed until it is heard or dead.  Any other peer is probed once
in IDLE_S, each at a time of its own.

Hosts that run udptun probe each other, and each probe looks like traffic to the other one.  ACTIVE_PACKETS is more than
that makes, and an answered packet is no unanswered one; otherwise two hosts would keep each other awake for ever.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

SILENT_S = 0.7
"""A peer that is watched closely is probed when it was not heard for so long."""
TIMEOUT_S = 0.45
"""An answer that takes longer has come too late for its probe, but it is heard."""
MOST_LOST = 3
"""Probes in a row that are lost when a peer is dead: SILENT_S and MOST_LOST * TIMEOUT_S after it was last heard."""
IDLE_S = 300.0
"""Between two probes of a peer that is not watched closely."""
IDLE_PER_S = 40
"""Of these probes at most, when many peers come at once."""
UNKNOWN_S = 5.0
"""Between two probes of a peer that is watched closely and has never answered, or after one that was not sent."""
DEAD_S = 1.0
"""Between two probes of a dead peer; more where there are many, so that these are IDLE_PER_S at most."""

WINDOW_S = 10.0
ACTIVE_PACKETS = 80
"""More packets than this in WINDOW_S, both ways together, are traffic and not probes alone."""
ACTIVE_S = 60.0
"""For so long after that a peer is watched closely."""
UNANSWERED = 2
"""So many packets to a peer without one from it are a reason to watch it closely."""

K = TypeVar("K", bound=Hashable)


class Liveness(StrEnum):
    UNKNOWN = "unknown"
    ALIVE = "alive"
    DEAD = "dead"


@dataclass(slots=True)
class _Peer:
    """Times are in seconds, of the caller's clock."""

    idle_due_s: float
    heard_s: float
    liveness: Liveness = Liveness.UNKNOWN
    rtt_s: float | None = None
    answered_s: float | None = None
    """When its last answer to a probe came, which `rtt_s` is of."""
    unanswered: int = 0
    window_began_s: float = 0.0
    window_packets: int = 0
    active_until_s: float = 0.0
    asked_s: float | None = None
    """When the probe left that is waited for."""
    probed_s: float = float("-inf")
    n_lost: int = 0


class Probing(Generic[K]):
    """All peers, by whatever the caller calls them.

    `chance` spreads the probes of idle ones, which come every `idle_s`; less often where there are many, so that these
    are IDLE_PER_S.
    """

    def __init__(self, chance: random.Random, idle_s: float = IDLE_S) -> None:
        self._chance = chance
        self._idle_s = idle_s
        self._peers: dict[K, _Peer] = {}
        self._watched: set[K] = set()
        """Those that are looked at each time: watched closely, dead, or with a probe on the way."""
        self._idle: list[tuple[float, int, K]] = []
        """A heap of when each peer is probed though nothing is known about it; the number tells entries apart."""
        self._number = 0
        self._changed: dict[K, Liveness] = {}

    def add(self, keys: Iterable[K], now_s: float) -> None:
        """Begin with peers of which nothing is known, or begin with them anew."""
        added = list(keys)
        spread_s = max(1.0, len(added) / IDLE_PER_S)
        for key in added:
            self.remove([key])
            due_s = now_s + self._chance.uniform(0, spread_s)
            self._peers[key] = _Peer(due_s, now_s)
            self._push(key, due_s)

    def restore(self, key: K, liveness: Liveness, heard_s: float) -> None:
        """It was found out before, by somebody else.  A dead peer is probed at once."""
        peer = self._peers[key]
        peer.liveness = liveness
        if liveness is Liveness.DEAD:
            peer.heard_s = heard_s
            self._watched.add(key)

    def remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._peers.pop(key, None)
            self._watched.discard(key)
            self._changed.pop(key, None)

    def note_traffic(self, packets: Mapping[K, tuple[int, int]], now_s: float) -> None:
        """What was sent to peers and received from them since the last time, without our probes and their answers."""
        for key, (n_sent, n_received) in packets.items():
            peer = self._peers.get(key)
            if peer is None:
                continue
            if n_received:
                self._hear(key, peer, now_s)
            else:
                peer.unanswered += n_sent
            if now_s - peer.window_began_s >= WINDOW_S:
                peer.window_began_s, peer.window_packets = now_s, 0
            peer.window_packets += n_sent + n_received
            if peer.window_packets > ACTIVE_PACKETS:
                peer.active_until_s = now_s + ACTIVE_S
            if self._is_close(peer, now_s):
                self._watched.add(key)

    def note_answer(self, key: K, rtt_s: float, now_s: float) -> None:
        """The peer has answered a probe, in time or late."""
        peer = self._peers.get(key)
        if peer is None:
            return
        peer.rtt_s, peer.answered_s = rtt_s, now_s
        self._hear(key, peer, now_s)
        if peer.liveness is Liveness.UNKNOWN:
            self._become(key, peer, Liveness.ALIVE)

    def note_not_sent(self, key: K, now_s: float) -> None:
        """The probe that is on the way never left this host, which says nothing about the peer: it is asked again."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.asked_s = None
            again_s = now_s + max(UNKNOWN_S, len(self._peers) / IDLE_PER_S)
            if again_s < peer.idle_due_s:
                peer.idle_due_s = again_s
                self._push(key, again_s)

    def note_no_room(self, key: K) -> None:
        """The probe could not be sent now: it is due with the next look."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.asked_s, peer.probed_s = None, float("-inf")

    def waits_too_long(self, now_s: float) -> list[K]:
        """Peers whose probes have got no answer in time; each is then either lost or was not sent."""
        peers = self._peers
        return [
            key for key in self._watched if (asked_s := peers[key].asked_s) is not None and now_s - asked_s >= TIMEOUT_S
        ]

    def note_lost(self, key: K) -> None:
        """The probe has left, and no answer has come in time."""
        peer = self._peers[key]
        peer.asked_s = None
        peer.n_lost += 1
        if peer.n_lost >= MOST_LOST and peer.liveness is Liveness.ALIVE:
            self._become(key, peer, Liveness.DEAD)

    def due(self, now_s: float) -> list[K]:
        """Whom to probe now.  Each of them is waited for from now on."""
        due = [key for key in self._watched if self._is_due(self._peers[key], now_s)]
        while self._idle and self._idle[0][0] <= now_s:
            due_s, _, key = heapq.heappop(self._idle)
            peer = self._peers.get(key)
            # Otherwise it has gone, or another entry is its own.
            if peer is None or peer.idle_due_s != due_s:
                continue
            idle_s = max(self._idle_s, len(self._peers) / IDLE_PER_S)
            peer.idle_due_s = now_s + idle_s * self._chance.uniform(0.9, 1.1)
            self._push(key, peer.idle_due_s)
            if peer.asked_s is None and not 0 < peer.n_lost < MOST_LOST and now_s - peer.probed_s >= TIMEOUT_S:
                due.append(key)
        for key in due:
            peer = self._peers[key]
            peer.asked_s = peer.probed_s = now_s
            self._watched.add(key)
        self._watched -= {key for key in self._watched if not self._is_worth_watching(self._peers[key], now_s)}
        return list(dict.fromkeys(due))

    def take_changes(self) -> dict[K, Liveness]:
        """Peers that were found alive or dead since the last time."""
        changed, self._changed = self._changed, {}
        return changed

    def liveness(self, key: K) -> tuple[Liveness, float | None]:
        """What is known of a peer, and how long its last answer took, seconds; UNKNOWN of one that nobody has added."""
        peer = self._peers.get(key)
        return (Liveness.UNKNOWN, None) if peer is None else (peer.liveness, peer.rtt_s)

    def answered_s(self, key: K) -> float | None:
        """When it has last answered a probe; None: never, as far as we know."""
        peer = self._peers.get(key)
        return None if peer is None else peer.answered_s

    def watched(self) -> list[K]:
        """The peers that are watched closely, or asked just now, and answer."""
        return [key for key in self._watched if self._peers[key].liveness is Liveness.ALIVE]

    def heard_s(self, key: K) -> float:
        """When the peer was last heard; long ago of one that nobody has added."""
        peer = self._peers.get(key)
        return float("-inf") if peer is None else peer.heard_s

    def dead_since(self) -> dict[K, float]:
        """The dead peers, and when each was last heard."""
        peers = list(self._peers.items())
        return {key: peer.heard_s for key, peer in peers if peer.liveness is Liveness.DEAD}

    def _is_close(self, peer: _Peer, now_s: float) -> bool:
        return now_s < peer.active_until_s or peer.unanswered >= UNANSWERED

    def _is_worth_watching(self, peer: _Peer, now_s: float) -> bool:
        is_being_asked = peer.asked_s is not None or 0 < peer.n_lost < MOST_LOST
        return is_being_asked or peer.liveness is Liveness.DEAD or self._is_close(peer, now_s)

    def _is_due(self, peer: _Peer, now_s: float) -> bool:
        if peer.asked_s is not None:
            return False
        if peer.liveness is Liveness.DEAD:
            return now_s - peer.probed_s >= max(DEAD_S, len(self._watched) / IDLE_PER_S)
        if 0 < peer.n_lost < MOST_LOST:
            return True
        if peer.liveness is Liveness.UNKNOWN and now_s - peer.probed_s < UNKNOWN_S:
            return False
        return self._is_close(peer, now_s) and now_s - peer.heard_s >= SILENT_S

    def _hear(self, key: K, peer: _Peer, now_s: float) -> None:
        peer.heard_s = now_s
        peer.unanswered = peer.n_lost = 0
        peer.asked_s = None
        if peer.liveness is Liveness.DEAD:
            self._become(key, peer, Liveness.ALIVE)

    def _become(self, key: K, peer: _Peer, liveness: Liveness) -> None:
        peer.liveness = liveness
        self._changed[key] = liveness

    def _push(self, key: K, due_s: float) -> None:
        self._number += 1
        heapq.heappush(self._idle, (due_s, self._number, key))

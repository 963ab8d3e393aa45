"""From which addresses peers send beside their PublicIPs, and whom to ask about it.  Pure: the caller has the clock.

    source      an outer address and UDP port that datagrams come from
    stray       a datagram with an inner source of a peer's lease, from an address that is no peer's (stray.pxd)
    candidate   an address that strays of a peer come from, and that the peer has not proved to be its own
    learned     an address that a peer has proved to be its own: what it leases is taken from there
    question    an echo request to a peer's tunnel address
    round       some peers are asked, and the answers are waited for

Theory of operation
===================

A peer is sent to at its PublicIP, and what it sends should come from there.  It does not where a NAT translates what
comes in and not what goes out, or where the host sends by another interface than the one that has PublicIP.

An inner source proves nothing, because anybody can write it.  So the peer is asked: an ICMP echo request goes through
the tunnel to its tunnel address, which means to its PublicIP and never to the stranger.  It carries a nonce of 64 bits.
Whoever answers with them has got what was sent to PublicIP, so the address that the answer comes from is one that the
holder of PublicIP sends from.  The answer decides alone, whichever candidate has led to the question: somebody who
floods us with other addresses neither learns anything nor hides the right one.

The question may be a stray to the peer, when both hosts are behind such a NAT; then neither would ever answer.  So a
question that is a stray is answered: the answer goes to the PublicIP of whoever claims to ask, and is as long as the
question.  It says nothing but that we are there.

What is learned holds for inner sources of this lease only.  When the peer sends from one port, it holds for the port of
the answer alone: a NAT's address may have many users.  Peers that may send from many ports, by VXLAN or by their lease,
are taken from every port of the address.

    An attacker who                           gains nothing, because
    sees his own packets only                 the question goes to PublicIP, and he does not get it
    spoofs inner sources of many peers        each of these is asked once in ASK_S, PEERS_A_ROUND of them in a round, by
                                              one packet of 64 bytes (VXLAN: 86), and answered once in ANSWER_S
    floods from thousands of addresses        MAX_CANDIDATES are remembered, those seen last; the peers take turns
    repeats an old answer                     the nonce holds for one answer in one round
    guesses                                   a worker hands over only what has the 32 bits of the round, too
    is a user of the same NAT                 his port is another one; but VXLAN, see above
    is a peer                                 its own PublicIP is never learned for another peer

A learned address ends when the lease does, when the peer is somewhere else, and when it has not been proved for
LIFETIME_S; each CONFIRM_S the peer is asked again.  The shared table keeps it while the daemon restarts.  The next
daemon takes it from there and asks at once, so that nothing is lost.  Only after an upgrade to another layout of the
table it is learned anew, within a second.  A candidate for which the answer comes from elsewhere, or not at all, waits
longer each time.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from udptun.core.network_state import IPAddress

ROUND_S = 1.5
"""An answer takes no longer."""
ASK_S, ASK_MAX_S = 5.0, 60.0
"""From a vain question to the next one about a candidate; it doubles each time.  No peer is asked twice in ASK_S."""
ANSWER_S = 1.0
"""No peer is answered twice in so long, when its questions are strays."""
PEERS_A_ROUND = 16
"""A quarter of the ring, as the answers have it."""
ADDRESSES_A_PEER = 4
"""Learned at most; and candidates that a flood's filter lets in at once."""
MAX_CANDIDATES, CANDIDATE_S = 1024, 120.0
"""Remembered at most, and for so long after the last stray."""
CONFIRM_S, LIFETIME_S = 300.0, 900.0
_SOON_S = 5.0
"""In which a daemon asks about what an earlier one has learned."""

K = TypeVar("K", bound=Hashable)
_NEVER_S = float("-inf")


@dataclass(slots=True)
class _Source:
    """One address of one peer.  `port` None: it is a candidate; 0: any."""

    port: int | None = None
    proved_s: float = _NEVER_S
    confirm_s: float = 0.0
    """When to ask again about what was learned."""
    seen_s: float = _NEVER_S
    """The last stray from there."""
    asked_s: float = _NEVER_S
    retry_s: float = _NEVER_S
    """Not asked before."""
    n_vain: int = 0
    """Questions since something new came of one."""


@dataclass(slots=True)
class _Peer:
    sources: dict[IPAddress, _Source] = field(default_factory=dict)
    asked_s: float = _NEVER_S
    answered_s: float = _NEVER_S


class Learning(Generic[K]):
    """What is known of the peers, by a key that the caller chooses, and when to ask whom."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._peers: dict[K, _Peer] = {}
        self._strays: OrderedDict[tuple[K, IPAddress], None] = OrderedDict()
        """What strays come from, the last one last: all candidates, and learned addresses with another port."""
        self._learned: set[K] = set()
        self._to_confirm: set[tuple[K, IPAddress]] = set()
        self._asked: dict[tuple[K, IPAddress], bool] = {}
        """In this round, and whether strays have led to it."""
        self._news: set[tuple[K, IPAddress]] = set()
        """Of this round."""

    def add(self, key: K, learned: Mapping[IPAddress, int], now_s: float) -> None:
        """A peer, with what an earlier daemon has learned of it; it is asked about that soon."""
        peer = self._peers[key] = _Peer()
        for address, port in learned.items():
            confirm_s = now_s + self._chance.uniform(0, _SOON_S)
            peer.sources[address] = _Source(port, now_s - CONFIRM_S, confirm_s)
            self._learned.add(key)

    def remove(self, key: K) -> None:
        peer = self._peers.pop(key, _Peer())
        self._learned.discard(key)
        for address in peer.sources:
            self._strays.pop((key, address), None)
            self._to_confirm.discard((key, address))

    def note_stray(self, key: K, address: IPAddress, last_s: float, now_s: float) -> None:
        """Strays of a peer have come from an address, the last one then."""
        peer = self._peers.get(key)
        if peer is None:
            return
        source = peer.sources.setdefault(address, _Source())
        # Those of before have led to the question, or are explained by the answer.
        if last_s <= max(source.asked_s, source.proved_s):
            return
        source.seen_s = now_s
        self._strays[key, address] = None
        self._strays.move_to_end((key, address))
        if len(self._strays) > MAX_CANDIDATES:
            self._forget_stray(*next(iter(self._strays)))

    def begin(self, now_s: float) -> dict[K, list[IPAddress]]:
        """Whom to ask now, and the addresses that have led to it.  The round lasts until `end`."""
        while self._strays and self._seen_s(*next(iter(self._strays))) < now_s - CANDIDATE_S:
            self._forget_stray(*next(iter(self._strays)))
        due: dict[K, list[IPAddress]] = {}
        for key, address in dict.fromkeys((*self._strays, *self._to_confirm)):
            peer, source = self._peers[key], self._peers[key].sources[address]
            is_new_stray = source.seen_s > max(source.asked_s, source.proved_s)
            is_due = is_new_stray or (key, address) in self._to_confirm
            if is_due and now_s >= max(source.retry_s, peer.asked_s + ASK_S):
                due.setdefault(key, []).append(address)
        keys = list(due)
        self._chance.shuffle(keys)
        keys.sort(key=lambda key: self._peers[key].asked_s)
        asked = {}
        for key in keys[:PEERS_A_ROUND]:
            asked[key] = self._chance.sample(due[key], min(len(due[key]), ADDRESSES_A_PEER))
            self._peers[key].asked_s = now_s
            for address in asked[key]:
                self._peers[key].sources[address].asked_s = now_s
                self._asked[key, address] = (key, address) not in self._to_confirm
                self._to_confirm.discard((key, address))
        return asked

    def note_answer(self, key: K, address: IPAddress, port: int, now_s: float) -> bool:
        """A peer has answered from there; `port` 0: it may send from any.  Whether that is news."""
        peer = self._peers.get(key)
        if peer is None:
            return False
        source = peer.sources.setdefault(address, _Source())
        is_news = source.port != port
        if is_news:
            source.port = port
            self._news.add((key, address))
        source.proved_s = now_s
        source.confirm_s = now_s + CONFIRM_S * self._chance.uniform(0.9, 1.1)
        self._strays.pop((key, address), None)
        self._to_confirm.discard((key, address))
        self._learned.add(key)
        learned = sorted(
            (it.proved_s, address.version, address) for address, it in peer.sources.items() if it.port is not None
        )
        for _, _, oldest in learned[:-ADDRESSES_A_PEER]:
            self._forget(key, oldest)
        return is_news

    def may_answer(self, key: K, now_s: float) -> bool:
        """Whether to answer a question that claims to be the peer's; the answer counts as given."""
        peer = self._peers.get(key)
        if peer is None or now_s - peer.answered_s < ANSWER_S:
            return False
        peer.answered_s = now_s
        return True

    def end(self, now_s: float) -> None:
        """The round is over.  What has brought nothing new is asked for later each time."""
        for (key, address), is_for_strays in self._asked.items():
            source = self._peers[key].sources.get(address) if key in self._peers else None
            if source is None:
                continue
            is_proved = source.proved_s >= source.asked_s
            if is_proved and (not is_for_strays or (key, address) in self._news):
                source.n_vain, source.retry_s = 0, _NEVER_S
            else:
                source.retry_s = now_s + min(ASK_S * 2**source.n_vain, ASK_MAX_S)
                source.n_vain = min(source.n_vain + 1, 10)
        self._asked.clear()
        self._news.clear()

    def look(self, now_s: float) -> list[tuple[K, IPAddress]]:
        """Forget what has not been proved for long, and return it; and see what is to be proved again."""
        forgotten = []
        for key in list(self._learned):
            for address, source in list(self._peers[key].sources.items()):
                if source.port is None:
                    continue
                if now_s - source.proved_s > LIFETIME_S:
                    self._forget(key, address)
                    forgotten.append((key, address))
                elif now_s >= max(source.confirm_s, source.retry_s):
                    self._to_confirm.add((key, address))
            if not self.learned(key):
                self._learned.discard(key)
        return forgotten

    def learned(self, key: K) -> dict[IPAddress, int]:
        """What holds of a peer, and the port; 0: any."""
        sources = self._peers[key].sources if key in self._peers else {}
        return {address: source.port for address, source in sources.items() if source.port is not None}

    def proved_s(self, key: K, address: IPAddress) -> float:
        """When a learned address was proved the last time; long ago of any other."""
        source = self._peers[key].sources.get(address) if key in self._peers else None
        return _NEVER_S if source is None else source.proved_s

    def _seen_s(self, key: K, address: IPAddress) -> float:
        return self._peers[key].sources[address].seen_s

    def _forget_stray(self, key: K, address: IPAddress) -> None:
        del self._strays[key, address]
        if self._peers[key].sources[address].port is None:
            del self._peers[key].sources[address]

    def _forget(self, key: K, address: IPAddress) -> None:
        del self._peers[key].sources[address]
        self._strays.pop((key, address), None)
        self._to_confirm.discard((key, address))

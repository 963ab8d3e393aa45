"""Learns from which addresses peers send beside their PublicIPs.

`learning.py` has the theory, and decides whom to ask and what an answer proves.  Here are the strays, the echoes, the
clock and the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping

from udptun.core.echo import NONCE_LEN, Echo, echo_reply, echo_request, parse_echo_reply, parse_echo_request
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath.learning import LIFETIME_S, ROUND_S, Learning
from udptun.datapath.rings import Punt
from udptun.datapath.settings import Remote
from udptun.datapath.tunnel import Tunnel

log = logging.getLogger(__name__)

LOOK_S = 0.5
_LONG_LOOK_S = 5.0
"""Between two looks at all that was learned."""
_FRESH_S = 5
"""Strays that have come since then lead to a question."""
_SETTLED_S = 3.0
"""Strays may come for so long after an address was learned: those that the workers had before."""
_MAX_LINES = 4
"""Of the log at once."""


class Learner:
    """What is learned of the hosts of one tunnel; it serves one event loop, but for `document` and `explains`.

    It is given one peer a host, the leader (`peer_entries.py`).
    """

    def __init__(self, tunnel: Tunnel, n_workers: Callable[[], int]) -> None:
        self._tunnel = tunnel
        self._n_workers = n_workers
        self._remotes: dict[IPNetwork, Remote] = {}
        self._own_addresses: Mapping[int, IPAddress] = {}
        self._echo_id = 0
        self._is_on = False
        self._learning: Learning[IPNetwork] = Learning(random.Random())
        self._asked: dict[bytes, IPNetwork] = {}
        """By nonce, in this round; those that have not answered."""
        self._sequence = 0
        """Of this round; 0: there is none."""
        self._ends_s = self._look_s = 0.0
        self._n_told = 0
        self._changed: set[IPNetwork] = set()
        self._woken = asyncio.Event()
        tunnel.rings.take_first = self._take

    def add_peers(self, peers: Mapping[IPNetwork, Remote]) -> None:
        """After they were added to the tunnel, which knows what of the learned addresses still holds."""
        for subnet, remote in peers.items():
            if self._remotes.get(subnet) != remote:
                self._remotes[subnet] = remote
                self._begin(subnet)

    def remove_peers(self, subnets: Iterable[IPNetwork]) -> None:
        for subnet in subnets:
            self._remotes.pop(subnet, None)
            self._forget(subnet)

    def switch(self, *, is_on: bool, own_addresses: Mapping[int, IPAddress], echo_id: int) -> None:
        """Ask from these tunnel addresses, each by its IP version, and with this ICMP id, for which the workers listen;
        or learn nothing.
        """
        self._own_addresses, self._echo_id = own_addresses, echo_id
        if is_on != self._is_on:
            self._is_on = is_on
            for subnet in self._remotes:
                self._begin(subnet)

    def _begin(self, subnet: IPNetwork) -> None:
        self._forget(subnet)
        if self._is_on:
            self._learning.add(subnet, self._tunnel.table.learned(subnet), time.monotonic())

    def _forget(self, subnet: IPNetwork) -> None:
        """Also the question: it went to where the peer was."""
        self._learning.remove(subnet)
        self._asked = {nonce: asked for nonce, asked in self._asked.items() if asked != subnet}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
            self._woken.clear()
            await self._look()

    def document(self, subnet: IPNetwork) -> list[dict[str, object]]:
        """The key of docs/status.md about a peer."""
        learned = sorted(self._tunnel.table.learned(subnet).items(), key=lambda it: (it[0].version, it[0]))
        return [{"address": str(address), "port": port or None} for address, port in learned]

    def explains(self, subnet: IPNetwork, address: IPAddress, last_s: float) -> bool:
        """Whether strays of a peer from there, the last one then, are those of before the address was learned."""
        subnet = self._tunnel.peers.leader(subnet)
        port = self._tunnel.table.learned(subnet).get(address)
        return port == 0 or (port is not None and last_s < self._learning.proved_s(subnet, address) + _SETTLED_S)

    async def _look(self) -> None:
        """End a round that is over, begin the next one, and show the workers what has changed."""
        now_s, learning, table = time.monotonic(), self._learning, self._tunnel.table
        is_over = self._sequence != 0 and (now_s >= self._ends_s or not self._asked)
        if is_over:
            learning.end(now_s)
            self._asked.clear()
            self._sequence = 0
            table.ask(0)
        to_ask: dict[IPNetwork, Remote] = {}
        if self._is_on and not self._sequence:
            self._note_strays(now_s)
            if now_s - self._look_s >= _LONG_LOOK_S:
                self._look_s = now_s
                self._forget_old(now_s)
            if addresses := learning.begin(now_s):
                to_ask = {subnet: self._remotes[subnet] for subnet in addresses}
                self._sequence = random.SystemRandom().randrange(1, 1 << 16)
                self._ends_s = now_s + ROUND_S
                table.ask(self._echo_id << 16 | self._sequence, {it for of in addresses.values() for it in of})
        has_changed = bool(self._changed)
        for subnet in self._changed:
            self._tunnel.peers.set_learned(subnet, learning.learned(subnet))
        self._changed.clear()
        if self._n_told > _MAX_LINES:
            log.info("%d more addresses that peers send from were learned or forgotten", self._n_told - _MAX_LINES)
        self._n_told = 0
        if has_changed or is_over or to_ask:
            # The workers first, then those who are asked: the answer may be here at once.
            await self._tunnel.publish()
        for subnet, remote in to_ask.items():
            if self._remotes.get(subnet) == remote:
                self._ask(subnet)

    def _note_strays(self, now_s: float) -> None:
        table = self._tunnel.table
        for stray in self._tunnel.stats.strays(self._n_workers(), now_s - _FRESH_S):
            lease = table.peer_of(stray.inner)
            if lease is not None and not table.has_remote(stray.outer):
                subnet = self._tunnel.peers.leader(lease[0])
                self._learning.note_stray(subnet, stray.outer, stray.last_s, now_s)

    def _forget_old(self, now_s: float) -> None:
        for subnet, address in self._learning.look(now_s):
            self._changed.add(subnet)
            text = "learned address forgotten: not proved again for %d s subnet=%s public_ip=%s address=%s"
            self._tell(text, LIFETIME_S, subnet, self._remotes[subnet].address, address)

    def _ask(self, subnet: IPNetwork) -> None:
        nonce = os.urandom(NONCE_LEN)
        source = self._own_addresses[subnet.version]
        request = echo_request(source, subnet.network_address, self._echo_id, self._sequence, nonce)
        # Where the ring is full the peer has not answered, and is asked again.
        if self._tunnel.rings.inject(request) is not None:
            self._asked[nonce] = subnet

    def _take(self, punt: Punt) -> bool:
        """Whether it is an answer that we wait for, or a question that is a stray."""
        if punt.is_stray and (question := parse_echo_request(punt.packet)) is not None:
            self._answer(question)
            return True
        echo = parse_echo_reply(punt.packet)
        subnet = None if echo is None else self._asked.get(echo.nonce)
        if echo is None or subnet is None or echo.source != subnet.network_address:
            return False
        del self._asked[echo.nonce]
        self._woken.set()
        remote = self._remotes[subnet]
        if punt.is_stray or punt.outer in self._learning.learned(subnet):
            port = 0 if remote.takes_any_source_port else punt.outer_port
            if self._learning.note_answer(subnet, punt.outer, port, time.monotonic()):
                self._changed.add(subnet)
                text = "peer sends from an address beside its PublicIP, as it has proved subnet=%s public_ip=%s"
                self._tell(f"{text} address=%s port=%s", subnet, remote.address, punt.outer, port or "any")
        return True

    def _answer(self, question: Echo) -> None:
        lease = self._tunnel.table.peer_of(question.source)
        if lease is None or lease[0].network_address != question.source:
            return
        if question.destination != self._own_addresses.get(question.source.version):
            return
        if self._learning.may_answer(self._tunnel.peers.leader(lease[0]), time.monotonic()):
            self._tunnel.rings.inject(echo_reply(question))

    def _tell(self, text: str, *values: object) -> None:
        self._n_told += 1
        if self._n_told <= _MAX_LINES:
            log.info(text, *values)

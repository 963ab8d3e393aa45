"""Probes the peers, and says who is dead and which paths are narrow.

`liveness.py` decides whom to probe and who is dead, `path_mtu.py` and `beliefs.py` how long packets may be, and a
`Carrier` has the echoes.  Here are the nonces, the clock and the words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from udptun.core.echo import NONCE_LEN, min_length
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.probing.beliefs import Beliefs
from udptun.probing.carrier import Carrier, Sent, Target
from udptun.probing.liveness import IDLE_S, Liveness, Probing
from udptun.probing.loss import Losses
from udptun.probing.memory import Known, Memory
from udptun.probing.path_mtu import IDLE_CHECK_S, LEAST, PathMtus

log = logging.getLogger(__name__)

LOOK_S = 0.25
_MEASURE_LOOK_S, _MEASURE_TIMEOUT_S = 0.05, 0.25
"""While a path is measured.  A stalled TCP connection tries again after 3 s, and then after 6: be done by then."""
_AWAY_S = 1.0
"""When we have not looked for so long, it is we who were late, and no probe counts as lost."""
_LATE_S = 5.0
"""An answer is known for so long after its probe."""
_JUST_NOW_S = 1.2
"""A peer that was heard so long ago is there, and what is lost is lost for its length."""
_BELIEFS_S = 5.0
"""Between two looks at what the kernel believes of narrow paths that nothing is sent on."""
_SAVE_S = 10.0
"""What is known of peers is saved so late at most.  What keeps packets from them, or makes them short, is at once."""
_MAX_LINES = 4
"""Of problems of one kind, and of the log at once."""


@dataclass(eq=False, slots=True)
class _Asked:
    subnet: IPNetwork
    target: Target
    sent: Sent
    at_s: float
    size: int | None
    """Of a probe of the path, bytes; None: it asks whether the peer is alive."""
    is_counted: bool
    """As one that a peer that is alive should answer."""
    is_answered: bool = False


class Prober:
    """The probes of one carrier; it serves one event loop, but for `document` and `problems`."""

    def __init__(
        self,
        carrier: Carrier,
        idle_s: float = IDLE_S,
        idle_check_s: float = IDLE_CHECK_S,
        *,
        memory: Memory | None = None,
    ) -> None:
        """`idle_s` is between two probes of a peer without traffic, `idle_check_s` between two checks of its path.

        With `memory` it goes on with what the daemon before has found out.
        """
        self._carrier = carrier
        self._memory = memory
        self._known: dict[IPNetwork, Known] = {}
        """By the daemon before us, of peers that have not been added yet."""
        self._known_full = 0
        self._save_due_s = float("inf")
        self._obstacle: str | None = None
        """Why nobody is probed, once somebody has looked."""
        self._mtu, self._idle_check_s = 0, idle_check_s
        self._probing: Probing[IPNetwork] = Probing(random.Random(), idle_s)
        self._losses: Losses[IPNetwork] = Losses()
        self._paths: PathMtus[IPNetwork] = PathMtus(idle_check_s)
        self._beliefs: Beliefs[IPNetwork] = Beliefs(0)
        self._beliefs_due_s = float("-inf")
        self._undecided: set[IPNetwork] = set()
        """Peers of which something was learnt that may change how long packets to them may be."""
        self._narrow: dict[IPNetwork, int] = {}
        """The peers to which packets may not be as long as the device allows, with the length of which the carrier was
        told."""
        self._targets: dict[IPNetwork, Target] = {}
        self._refused: set[IPNetwork] = set()
        """The dead peers of which the carrier was told."""
        self._asked: dict[IPNetwork, _Asked] = {}
        """The probe of each peer that is waited for."""
        self._measuring: dict[tuple[IPNetwork, int], _Asked] = {}
        """The probes of paths that are waited for, by peer and size."""
        self._by_nonce: dict[bytes, _Asked] = {}
        self._nonces: deque[bytes] = deque()
        """Those of `_by_nonce`, oldest first; some have been answered."""
        self._woken = asyncio.Event()
        self._is_on = False

    def set_peers(self, peers: Mapping[IPNetwork, Target]) -> None:
        """Have exactly these peers.  One that is somewhere else than before is another one."""
        self.remove_peers([subnet for subnet in self._targets if subnet not in peers])
        self.add_peers(peers)

    def add_peers(self, peers: Mapping[IPNetwork, Target]) -> None:
        """Once packets to them are carried."""
        changed = [subnet for subnet, target in peers.items() if self._targets.get(subnet) != target]
        self.remove_peers(changed)
        added = [subnet for subnet in changed if self._carrier.add(subnet)]
        self._targets.update((subnet, peers[subnet]) for subnet in added)
        self._probing.add(added, self._now_s())
        for subnet in added:
            self._paths.add(subnet, self._full(subnet))
        if self._known:
            self._restore(added)

    def _restore(self, added: Iterable[IPNetwork]) -> None:
        """Go on with what the daemon before us knew of these peers."""
        now_s = self._now_s()
        for subnet in added:
            known = self._known.pop(subnet, None)
            if known is None or known.place != self._targets[subnet].identity:
                continue
            self._probing.restore(subnet, known.liveness, min(known.heard_s, now_s))
            if known.liveness is Liveness.DEAD:
                self._carrier.set_dead(subnet, is_dead=True)
                self._refused.add(subnet)
            if known.path_mtu is not None and self._known_full == self._mtu and LEAST <= known.path_mtu <= self._mtu:
                self._paths.restore(subnet, known.path_mtu, now_s)
                if known.path_mtu < self._full(subnet):
                    self._carrier.set_path_mtu(subnet, known.path_mtu)
                    self._narrow[subnet] = known.path_mtu

    def _save(self) -> None:
        """Leave what we know for the next daemon, in place of what the last one has left."""
        self._save_due_s = float("inf")
        if self._memory is None:
            return
        self._known.clear()
        known = {}
        heard_s = self._probing.dead_since()
        for subnet, target in self._targets.items():
            liveness, _ = self._probing.liveness(subnet)
            if liveness is not Liveness.UNKNOWN:
                path_mtu = self._paths.measured(subnet)
                known[subnet] = Known(target.identity, liveness, path_mtu, heard_s.get(subnet, 0.0))
        self._memory.save(self._mtu, known)

    def remove_peers(self, subnets: Iterable[IPNetwork]) -> None:
        for subnet in subnets:
            self._targets.pop(subnet, None)
            self._refused.discard(subnet)
            self._asked.pop(subnet, None)
            self._narrow.pop(subnet, None)
            self._beliefs.remove(subnet)
            self._carrier.remove(subnet)
            self._probing.remove([subnet])
            self._losses.remove([subnet])
            self._paths.remove([subnet])

    def switch(self, *, is_on: bool, mtu: int) -> None:
        """Probe, or do not; `mtu` is the largest packet of a pod, bytes.

        Without probes no peer is dead, and no path narrow but for what the kernel believes.
        """
        if (is_on, mtu) != (self._is_on, self._mtu):
            if is_on and not self._mtu and self._memory is not None:
                self._known_full, self._known = self._memory.load()
            self._is_on, self._mtu = is_on, mtu
            peers = dict(self._targets)
            self.remove_peers(peers)
            self._paths, self._beliefs = PathMtus(self._idle_check_s), Beliefs(mtu)
            self.add_peers(peers)

    async def run(self) -> None:
        """Until cancelled."""
        self._carrier.listen(self._take)
        try:
            looked_s = self._now_s()
            while True:
                look_due_s = looked_s + LOOK_S - self._now_s()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(look_due_s, _MEASURE_LOOK_S) if self._measuring else look_due_s):
                        await self._woken.wait()
                self._woken.clear()
                passed_s = self._now_s() - looked_s
                if passed_s < LOOK_S:
                    self._go_on_measuring(self._now_s())
                else:
                    looked_s += passed_s
                    self._look(was_away=passed_s > _AWAY_S)
                await self._act()
        finally:
            self._carrier.close()
            self._save()

    @property
    def state(self) -> str:
        """`on`, `off`, or `off: ` and why nobody is probed."""
        return "off" if not self._is_on else "on" if self._obstacle is None else f"off: {self._obstacle}"

    def liveness(self, subnet: IPNetwork) -> Liveness:
        """What is known of a peer.  May be asked on another thread."""
        return self._probing.liveness(subnet)[0]

    def document(self, subnet: IPNetwork) -> dict[str, object]:
        """The keys of docs/status.md about a peer."""
        liveness, rtt_s = self._probing.liveness(subnet)
        now_s, answered_s = self._now_s(), self._probing.answered_s(subnet)
        counts = self._losses.counts(subnet, now_s)
        return {
            "liveness": liveness.value,
            "rtt_ms": None if rtt_s is None else round(1000 * rtt_s, 3),
            "rtt_age_s": None if answered_s is None else round(max(now_s - answered_s, 0.0), 1),
            "path_mtu": self._paths.measured(subnet),
            "probes_sent": counts.n_probes,
            "probes_lost": counts.n_lost,
        }

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each dead peer, and for each narrow path.  May be read on another thread."""
        dead = sorted(self._probing.dead_since().items(), key=lambda item: item[1])
        lines = [self._dead_line(subnet, heard_s) for subnet, heard_s in dead[:_MAX_LINES]]
        if len(dead) > _MAX_LINES:
            lines.append(f"{len(dead) - _MAX_LINES} more hosts do not answer any more")
        narrow = self._narrow.copy()
        lines += [self._narrow_line(subnet, mtu) for subnet, mtu in list(narrow.items())[:_MAX_LINES]]
        if len(narrow) > _MAX_LINES:
            lines.append(f"{len(narrow) - _MAX_LINES} more paths take less than the device allows")
        return tuple(lines)

    def _narrow_line(self, subnet: IPNetwork, mtu: int) -> str:
        target = self._targets.get(subnet)
        return self._carrier.narrow_line(_host(subnet, target and target.host), mtu, self._full(subnet))

    def _full(self, subnet: IPNetwork) -> int:
        """How long packets to the peer may be by the device, bytes."""
        target = self._targets.get(subnet)
        return self._mtu - (0 if target is None else target.less)

    def _dead_line(self, subnet: IPNetwork, heard_s: float) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - (self._now_s() - heard_s)))
        target = self._targets.get(subnet)
        return self._carrier.dead_line(_host(subnet, target and target.place), since)

    def _can_probe(self) -> bool:
        before, self._obstacle = self._obstacle, self._carrier.obstacle()
        if self._obstacle != before:
            log.info("probes are %s", self.state)
        return self._obstacle is None

    def _look(self, *, was_away: bool) -> None:
        """Take what has come, give up what has not, and ask whom it is time to ask."""
        now_s, probing = self._now_s(), self._probing
        self._carrier.poll()
        traffic = self._carrier.traffic()
        self._look_at_beliefs((subnet for subnet, (n_sent, _) in traffic.items() if n_sent), now_s)
        if not self._is_on or not self._can_probe():
            return
        probing.note_traffic(traffic, now_s)
        for subnet in probing.waits_too_long(now_s):
            asked = self._asked.pop(subnet, None)
            if asked is None or was_away or not asked.sent.fate().has_left:
                probing.note_not_sent(subnet, now_s)
            else:
                probing.note_lost(subnet)
        self._give_up_measuring(now_s, was_away=was_away)
        for subnet in probing.due(now_s):
            self._ask(subnet, now_s)
        self._measure(self._paths.due(probing.watched(), now_s), now_s)
        if now_s >= self._save_due_s:
            self._save()
        self._forget_late(now_s, was_away=was_away)

    def _forget_late(self, now_s: float, *, was_away: bool) -> None:
        """Wait no longer for the answers to old probes, which are lost."""
        while self._nonces and now_s - self._by_nonce[self._nonces[0]].at_s > _LATE_S:
            asked = self._by_nonce.pop(self._nonces.popleft())
            is_counted = asked.is_counted and self._targets.get(asked.subnet) is asked.target and not was_away
            if is_counted and not asked.is_answered and self._is_alive(asked.subnet) and asked.sent.fate().has_left:
                self._losses.note(asked.subnet, now_s, is_lost=True)

    def _look_at_beliefs(self, sent_to: Iterable[IPNetwork], now_s: float) -> None:
        """Note what the kernel believes of the paths to peers that packets were sent to, at times of other paths."""
        subnets = set(sent_to) & self._targets.keys()
        if now_s >= self._beliefs_due_s:
            self._beliefs_due_s = now_s + _BELIEFS_S
            subnets.update(self._beliefs.peers)
        hosts = {subnet: self._targets[subnet].host for subnet in subnets}
        believed = self._carrier.believed_mtus(set(hosts.values()))
        self._beliefs.note({subnet: self._said(subnet, believed.get(host)) for subnet, host in hosts.items()})

    async def _check_beliefs(self) -> None:
        """Have probes show whether it is so what ICMP has newly said of the paths to peers that answer."""
        hosts = {subnet: self._targets[subnet].host for subnet in self._beliefs.take_new() if subnet in self._targets}
        if not hosts:
            return
        mtus = await self._carrier.route_mtus(set(hosts.values()))
        routes = {subnet: self._said(subnet, mtus[host]) for subnet, host in hosts.items() if host in mtus}
        now_s = self._now_s()
        for subnet, mtu in self._beliefs.note_routes(hosts.keys() & self._targets.keys(), routes).items():
            if self._has_answered(subnet):
                self._paths.note_told(subnet, mtu, now_s)
        self._undecided |= hosts.keys()
        self._measure(self._paths.due((), now_s), now_s)

    def _said(self, subnet: IPNetwork, mtu: int | None) -> int:
        """What the kernel says of a path, where that is less than the device allows; else what the device takes."""
        return self._mtu if mtu is None or mtu >= self._full(subnet) else mtu

    def _has_answered(self, subnet: IPNetwork) -> bool:
        return self._probing.liveness(subnet)[0] is not Liveness.UNKNOWN

    def _is_alive(self, subnet: IPNetwork) -> bool:
        return self._probing.liveness(subnet)[0] is Liveness.ALIVE

    def _go_on_measuring(self, now_s: float) -> None:
        self._give_up_measuring(now_s, was_away=False)
        self._measure(self._paths.due((), now_s), now_s)

    def _give_up_measuring(self, now_s: float, *, was_away: bool) -> None:
        for (subnet, size), asked in list(self._measuring.items()):
            fate = asked.sent.fate()
            rtt_s = self._probing.liveness(subnet)[1] or 0.0
            if now_s - asked.at_s < max(_MEASURE_TIMEOUT_S, 3 * rtt_s) and not fate.is_too_long:
                continue
            del self._measuring[subnet, size]
            if fate.is_too_long or (fate.has_left and not was_away):
                is_heard = now_s - self._probing.heard_s(subnet) < _JUST_NOW_S + 2 * rtt_s
                self._paths.note_lost(subnet, size, now_s, is_heard=is_heard)
            else:
                self._paths.give_up(subnet, now_s)

    def _ask(self, subnet: IPNetwork, now_s: float) -> None:
        asked = self._send(subnet, now_s, None)
        if asked is None:
            self._probing.note_no_room(subnet)
        else:
            self._asked[subnet] = asked

    def _measure(self, probes: Iterable[tuple[IPNetwork, int]], now_s: float) -> None:
        for subnet, size in probes:
            asked = self._send(subnet, now_s, size)
            if asked is None:
                self._paths.give_up(subnet, now_s)
            else:
                self._measuring[subnet, size] = asked

    def _send(self, subnet: IPNetwork, now_s: float, size: int | None) -> _Asked | None:
        """None when there is no room for it."""
        nonce = os.urandom(NONCE_LEN)
        target = self._targets[subnet]
        sent = self._carrier.send(target.address, nonce, size or min_length(target.address))
        if sent is None:
            return None
        is_counted = size is None and self._is_alive(subnet)
        asked = self._by_nonce[nonce] = _Asked(subnet, target, sent, now_s, size, is_counted)
        self._nonces.append(nonce)
        return asked

    def _take(self, nonce: bytes, source: IPAddress, time_ns: int) -> bool:
        """See `Take`."""
        asked = self._by_nonce.get(nonce)
        if asked is None:
            return False
        target = self._targets.get(asked.subnet)
        if target is None or source != target.address:
            return True
        sent_ns, now_s = asked.sent.fate().at_ns, self._now_s()
        rtt_s = now_s - asked.at_s if sent_ns is None else (time_ns - sent_ns) / 1e9
        if asked.size is not None:
            if self._measuring.pop((asked.subnet, asked.size), None) is not None:
                self._paths.note_answer(asked.subnet, asked.size, now_s)
                if asked.subnet in self._beliefs:
                    self._undecided.add(asked.subnet)
        elif self._asked.get(asked.subnet) is asked:
            del self._asked[asked.subnet]
        if asked.is_counted and not asked.is_answered:
            self._losses.note(asked.subnet, now_s, is_lost=False)
        asked.is_answered = True
        self._probing.note_answer(asked.subnet, rtt_s, now_s)
        self._measure(self._paths.due_with_answer(asked.subnet, now_s), now_s)
        self._woken.set()
        return True

    async def _act(self) -> None:
        """Tell the carrier and the log who was found alive or dead, and which paths are narrow."""
        await self._check_beliefs()
        changes, n_told = self._probing.take_changes(), 0
        must_publish = self._decide_path_mtus(changes)
        for subnet, liveness in changes.items():
            if liveness is Liveness.DEAD:
                self._paths.give_up(subnet, self._now_s())
                self._losses.remove([subnet])
            is_dead = liveness is Liveness.DEAD
            if is_dead or subnet in self._refused:
                must_publish = True
                self._carrier.set_dead(subnet, is_dead=is_dead)
                (self._refused.add if is_dead else self._refused.discard)(subnet)
                n_told += 1
                if n_told <= _MAX_LINES:
                    self._tell(subnet, is_dead=is_dead)
        if n_told > _MAX_LINES:
            log.warning("%d more hosts are dead, or alive again", n_told - _MAX_LINES)
        if must_publish:
            await self._carrier.publish()
            self._save()
        elif changes:
            self._save_due_s = min(self._save_due_s, self._now_s() + _SAVE_S)

    def _decide_path_mtus(self, changed: Iterable[IPNetwork]) -> bool:
        """Tell the carrier and the log of peers to which packets may have another length than before.

        `changed`: peers that have become alive or dead.  Returns whether there are any.
        """
        undecided, self._undecided = {*self._paths.take_changes(), *changed, *self._undecided}, set()
        is_any = False
        for subnet in undecided & self._targets.keys():
            measured = self._paths.measured(subnet) if self._has_answered(subnet) else None
            full = self._full(subnet)
            mtu = min(self._beliefs.path_mtu(subnet, measured), full)
            if mtu != self._narrow.pop(subnet, full):
                is_any = True
                self._carrier.set_path_mtu(subnet, mtu)
                log.warning("path mtu=%d peer=%s public_ip=%s", mtu, subnet, self._targets[subnet].host)
            if mtu < full:
                self._narrow[subnet] = mtu
        return is_any

    def _tell(self, subnet: IPNetwork, *, is_dead: bool) -> None:
        if is_dead:
            log.warning("%s", self._dead_line(subnet, self._probing.dead_since().get(subnet, self._now_s())))
        else:
            log.info("peer alive again subnet=%s public_ip=%s", subnet, self._targets[subnet].host)

    def _now_s(self) -> float:
        return time.monotonic()


def _host(subnet: IPNetwork, place: object) -> str:
    """`place` None: the peer has gone since."""
    return f"the host of {subnet}" + ("" if place is None else f" at {place}")

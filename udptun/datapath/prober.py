"""Probes the peers through the tunnel, has packets to dead ones refused, and those that are too long for a path.

`liveness.py` decides whom to probe and who is dead, `path_mtu.py` how long packets may be.  Here are the echoes, the
clock and the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from udptun.core.echo import MIN_LENGTH, NONCE_LEN, echo_request, parse_echo_reply
from udptun.datapath.liveness import Liveness, Probing
from udptun.datapath.path_mtu import PathMtus
from udptun.datapath.rings import Punt, Result
from udptun.datapath.settings import Remote
from udptun.datapath.stats import PeerTraffic
from udptun.datapath.tunnel import Tunnel

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
_MAX_LINES = 4
"""Of problems of one kind, and of the log at once."""


@dataclass(frozen=True, slots=True)
class _Asked:
    subnet: IPv4Network
    number: int
    """Of the packet in the ring."""
    at_s: float
    size: int | None
    """Of a probe of the path, bytes; None: it asks whether the peer is alive."""


class Prober:
    """The probes of one tunnel; it serves one event loop, but for `document` and `problems`."""

    def __init__(self, tunnel: Tunnel) -> None:
        self.echo_id = random.SystemRandom().randrange(1, 1 << 16)
        """Of our echoes.  Two daemons that serve one after the other have different ones."""
        self._tunnel = tunnel
        self._own_address, self._mtu = IPv4Address(0), 0
        self._probing: Probing[IPv4Network] = Probing(random.Random())
        self._paths: PathMtus[IPv4Network] = PathMtus(0)
        self._traffic = PeerTraffic(tunnel.stats)
        self._remotes: dict[IPv4Network, Remote] = {}
        self._subnets: dict[int, IPv4Network] = {}
        self._indexes: dict[IPv4Network, int] = {}
        """In the table."""
        self._asked: dict[IPv4Network, _Asked] = {}
        """The probe of each peer that is waited for."""
        self._measuring: dict[tuple[IPv4Network, int], _Asked] = {}
        """The probes of paths that are waited for, by peer and size."""
        self._by_nonce: dict[bytes, _Asked] = {}
        self._nonces: deque[bytes] = deque()
        """Those of `_by_nonce`, oldest first; some have been answered."""
        self._woken = asyncio.Event()
        self._is_on = False

    def set_peers(self, peers: Mapping[IPv4Network, Remote]) -> None:
        """Have exactly these peers.  One that is somewhere else than before is another one."""
        self.remove_peers([subnet for subnet in self._remotes if subnet not in peers])
        self.add_peers(peers)

    def add_peers(self, peers: Mapping[IPv4Network, Remote]) -> None:
        """After they were added to the tunnel."""
        changed = [subnet for subnet, remote in peers.items() if self._remotes.get(subnet) != remote]
        self.remove_peers(changed)
        for subnet in changed:
            index = self._tunnel.table.index_of(subnet)
            # The table may be full.
            if index is not None:
                self._remotes[subnet] = peers[subnet]
                self._subnets[index], self._indexes[subnet] = subnet, index
        added = [subnet for subnet in changed if subnet in self._remotes]
        self._probing.add(added, self._now_s())
        self._paths.add(added)

    def remove_peers(self, subnets: Iterable[IPv4Network]) -> None:
        for subnet in subnets:
            self._remotes.pop(subnet, None)
            self._asked.pop(subnet, None)
            self._tunnel.set_dead(subnet, is_dead=False)
            self._tunnel.set_path_mtu(subnet, None)
            self._probing.remove([subnet])
            self._paths.remove([subnet])
            if subnet in self._indexes:
                del self._subnets[self._indexes.pop(subnet)]

    def switch(self, *, is_on: bool, own_address: IPv4Address, mtu: int) -> None:
        """Probe from this tunnel address, or do not; `mtu` is the device's, bytes.

        Without probes no peer is dead and no path narrow.
        """
        self._own_address = own_address
        if (is_on, mtu) != (self._is_on, self._mtu):
            self._is_on, self._mtu = is_on, mtu
            peers = dict(self._remotes)
            self.remove_peers(peers)
            self._paths = PathMtus(mtu)
            self.add_peers(peers)

    async def run(self) -> None:
        """Until cancelled."""
        self._tunnel.rings.listen(self._take)
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
                    if self._is_on:
                        self._look(was_away=passed_s > _AWAY_S)
                await self._act()
        finally:
            self._tunnel.rings.close()

    def document(self, subnet: IPv4Network) -> dict[str, object]:
        """The keys of docs/status.md about a peer."""
        liveness, rtt_s = self._probing.liveness(subnet)
        rtt_ms = None if rtt_s is None else round(1000 * rtt_s, 3)
        return {"liveness": liveness.value, "rtt_ms": rtt_ms, "path_mtu": self._paths.measured(subnet)}

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each dead peer, and for each narrow path.  May be read on another thread."""
        dead = sorted(self._probing.dead_since().items(), key=lambda item: item[1])
        lines = [self._line(subnet, heard_s) for subnet, heard_s in dead[:_MAX_LINES]]
        if len(dead) > _MAX_LINES:
            lines.append(f"{len(dead) - _MAX_LINES} more hosts do not answer any more")
        narrow = self._paths.narrow()
        lines += [self._narrow_line(subnet, mtu) for subnet, mtu in list(narrow.items())[:_MAX_LINES]]
        if len(narrow) > _MAX_LINES:
            lines.append(f"{len(narrow) - _MAX_LINES} more paths take less than the device allows")
        return tuple(lines)

    def _narrow_line(self, subnet: IPv4Network, mtu: int) -> str:
        remote = self._remotes.get(subnet)
        where = "" if remote is None else f" at {remote.address}"
        return (
            f"the path to the host of {subnet}{where} takes packets of {mtu} bytes, {self._mtu - mtu} fewer than "
            f"{self._tunnel.tun.name}; longer ones are fragmented, or their senders told (fragmentation needed); "
            f"have all hosts use a Backend.MTU that is {self._mtu - mtu} lower, or mend the path"
        )

    def _line(self, subnet: IPv4Network, heard_s: float) -> str:
        remote = self._remotes.get(subnet)
        where = "" if remote is None else f" at {remote.address} UDP port {remote.port}"
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - (self._now_s() - heard_s)))
        return (
            f"the host of {subnet}{where} has answered and does not any more, nothing has come from it since {since}; "
            "packets to its pods are refused (host unreachable) until something does; is it up, and does the network "
            "between the two hosts carry the tunnel's datagrams?"
        )

    def _look(self, *, was_away: bool) -> None:
        """Take what has come, give up what has not, and ask whom it is time to ask."""
        now_s, rings, probing = self._now_s(), self._tunnel.rings, self._probing
        for punt in rings.take_punts():
            self._take(punt)
        counts = self._traffic.look(max(self._subnets, default=0))
        probing.note_traffic({self._subnets[i]: count for i, count in counts.items() if i in self._subnets}, now_s)
        for subnet in probing.waits_too_long(now_s):
            asked = self._asked.pop(subnet, None)
            if asked is None or was_away or not self._has_left(asked):
                probing.note_not_sent(subnet)
            else:
                probing.note_lost(subnet)
        self._give_up_measuring(now_s, was_away=was_away)
        for subnet in probing.due(now_s):
            self._ask(subnet, now_s)
        self._measure(self._paths.due(probing.watched(), now_s), now_s)
        while self._nonces and now_s - self._by_nonce[self._nonces[0]].at_s > _LATE_S:
            del self._by_nonce[self._nonces.popleft()]

    def _has_left(self, asked: _Asked) -> bool:
        injected = self._tunnel.rings.injected(asked.number)
        # None: others have followed it, so the worker has handled it.
        return injected is None or injected.result is Result.DONE

    def _go_on_measuring(self, now_s: float) -> None:
        self._give_up_measuring(now_s, was_away=False)
        self._measure(self._paths.due((), now_s), now_s)

    def _give_up_measuring(self, now_s: float, *, was_away: bool) -> None:
        for (subnet, size), asked in list(self._measuring.items()):
            injected = self._tunnel.rings.injected(asked.number)
            is_too_long = injected is not None and injected.error == errno.EMSGSIZE
            rtt_s = self._probing.liveness(subnet)[1] or 0.0
            if now_s - asked.at_s < max(_MEASURE_TIMEOUT_S, 3 * rtt_s) and not is_too_long:
                continue
            del self._measuring[subnet, size]
            if is_too_long or (self._has_left(asked) and not was_away):
                is_heard = now_s - self._probing.heard_s(subnet) < _JUST_NOW_S + 2 * rtt_s
                self._paths.note_lost(subnet, size, now_s, is_heard=is_heard)
            else:
                self._paths.give_up(subnet, now_s)

    def _ask(self, subnet: IPv4Network, now_s: float) -> None:
        asked = self._send(subnet, now_s, None)
        if asked is None:
            self._probing.note_no_room(subnet)
        else:
            self._asked[subnet] = asked

    def _measure(self, probes: Iterable[tuple[IPv4Network, int]], now_s: float) -> None:
        for subnet, size in probes:
            asked = self._send(subnet, now_s, size)
            if asked is None:
                self._paths.give_up(subnet, now_s)
            else:
                self._measuring[subnet, size] = asked

    def _send(self, subnet: IPv4Network, now_s: float, size: int | None) -> _Asked | None:
        """None when the ring is full."""
        nonce, length = os.urandom(NONCE_LEN), size or MIN_LENGTH
        request = echo_request(self._own_address, subnet.network_address, self.echo_id, 0, nonce, length)
        number = self._tunnel.rings.inject(request, length)
        if number is None:
            return None
        asked = self._by_nonce[nonce] = _Asked(subnet, number, now_s, size)
        self._nonces.append(nonce)
        return asked

    def _take(self, punt: Punt) -> None:
        """An echo reply with our id.  One that is not ours goes to whom it is for: somebody may ping with that id."""
        echo = parse_echo_reply(punt.packet)
        asked = None if echo is None else self._by_nonce.get(echo.nonce)
        if echo is None or asked is None:
            if punt.length == len(punt.packet):
                self._tunnel.rings.inject(punt.packet, into_tun=True)
            return
        if echo.source != asked.subnet.network_address or asked.subnet not in self._remotes:
            return
        injected = self._tunnel.rings.injected(asked.number)
        now_s = self._now_s()
        rtt_s = now_s - asked.at_s if injected is None else (punt.time_ns - injected.time_ns) / 1e9
        if asked.size is not None:
            if self._measuring.pop((asked.subnet, asked.size), None) is not None:
                self._paths.note_answer(asked.subnet, asked.size, now_s)
        elif self._asked.get(asked.subnet) is asked:
            del self._asked[asked.subnet]
        self._probing.note_answer(asked.subnet, rtt_s, now_s)
        self._measure(self._paths.due_with_answer(asked.subnet, now_s), now_s)
        self._woken.set()

    async def _act(self) -> None:
        """Tell the workers and the log who was found alive or dead."""
        n_told = 0
        mtus = self._paths.take_changes()
        must_publish = bool(mtus)
        for subnet, mtu in mtus.items():
            self._tunnel.set_path_mtu(subnet, mtu)
            log.warning("path mtu=%d peer=%s public_ip=%s", mtu, subnet, self._remotes[subnet].address)
        for subnet, liveness in self._probing.take_changes().items():
            if liveness is Liveness.DEAD:
                self._paths.give_up(subnet, self._now_s())
            is_dead = liveness is Liveness.DEAD
            if is_dead or self._tunnel.is_dead(subnet):
                must_publish = True
                self._tunnel.set_dead(subnet, is_dead=is_dead)
                n_told += 1
                if n_told <= _MAX_LINES:
                    self._tell(subnet, is_dead=is_dead)
        if n_told > _MAX_LINES:
            log.warning("%d more hosts are dead, or alive again", n_told - _MAX_LINES)
        if must_publish:
            await self._tunnel.publish()
        if mtus:
            self._tunnel.narrow_changed()

    def _tell(self, subnet: IPv4Network, *, is_dead: bool) -> None:
        if is_dead:
            log.warning("%s", self._line(subnet, self._probing.dead_since().get(subnet, self._now_s())))
        else:
            log.info("peer alive again subnet=%s public_ip=%s", subnet, self._remotes[subnet].address)

    def _now_s(self) -> float:
        return time.monotonic()

"""The detour of super-packets: made when the first has come, watched, and given up when packets are lost on it.

    decap -> what the host does with any VXLAN packet that comes by the underlay -> a device of ours -> arrive

While there is none they go through the workers, which is always right.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from udptun.core.errors import KernelError, UdptunError
from udptun.datapath.shortcut.counts import Counts, DetourCounts
from udptun.datapath.shortcut.programs import DETOUR, Programs
from udptun.kernel.bpf import monotonic_ns
from udptun.kernel.detour_device import delete_detour, make_detour
from udptun.kernel.device_counters import read_device_counters
from udptun.kernel.own_link import is_in_order

log = logging.getLogger(__name__)

DETOUR_PORT = 18472
"""UDP, of the device.  Whatever comes there from outside gets nowhere."""
_RETRY_S, _MAX_RETRY_S = 60.0, 3600.0
"""What could not be had is tried again after so long; what has lost packets, later each time."""
_DRAIN_S = 0.05
"""So long packets may be on the way."""
_PERIOD_S = 0.9
"""Looks that are closer together tell nothing."""
_N_LOOKS = 4
_FEW = 32
"""So many packets may be lost beyond one in a hundred, and one a look."""


class LossWatch:
    """Whether what takes the detour comes out.  Pure.

    The counters are read one after another while packets pass, so a difference may be some packets off.  What was
    missing at each of the last looks is lost.
    """

    def __init__(self, begin: DetourCounts) -> None:
        """Of a device that is new."""
        self._last = begin
        self._missing = deque([begin.sent - begin.arrived], _N_LOOKS)
        self._n_lost = self._missing[0]
        self._excess = 0.0

    def judge(self, now: DetourCounts, dropped: int) -> str:
        """What is wrong, empty when nothing.  To be called each second.

        `dropped`: by the device, for want of room, which is no fault.
        """
        last, self._last = self._last, now
        missing, least = now.sent - now.arrived - dropped, min(self._missing)
        self._missing.append(missing)
        n_lost = min(self._missing)
        self._excess += n_lost - self._n_lost - max(1.0, (now.sent - last.sent) / 100)
        self._excess = max(0.0, self._excess)
        self._n_lost = n_lost
        if now.late > last.late and missing > least:
            return "what comes from a peer does not come out of it"
        return "part of what comes from peers does not come out of it" if self._excess >= _FEW else ""


@dataclass(frozen=True, slots=True)
class _On:
    """What there is while it is on.

    `words`: VNI, port, addresses and sign, as in struct detour.
    """

    index: int
    name: str
    words: tuple[bytes, bytes, bytes, int]
    watch: LossWatch


class Detour:
    """Of one load of the programs.  For one event loop; `state` and `problem` may be asked on any thread."""

    def __init__(self, programs: Programs, counts: Counts, device: str, mtu: int, alias: str) -> None:
        """`device` is the TUN device and `mtu` that of it, bytes."""
        self._programs, self._counts = programs, counts
        self._device, self._mtu, self._alias = device, mtu, alias
        self._on: _On | None = None
        self._reason = ""
        self._retry_at_s, self._retry_s = 0.0, _RETRY_S
        self._judge_at_s = 0.0
        self.problem = ""
        """Why it was given up; empty when it was not, or is tried again."""

    @property
    def is_wanted(self) -> bool:
        """Whether a super-packet has come."""
        return bool(self._counts.passed.get("decap_super") or self._counts.detour.sent)

    @property
    def state(self) -> str:
        """`on`, or `off: ` and why."""
        return "on" if self._on is not None else f"off: {self._reason or 'no peer has sent a super-packet yet'}"

    async def look(self, objection: str | None) -> None:
        """Have it where it is wanted and does what it shall.  `objection`: see `Shortcut.allow_detour`.

        Raises KernelError.
        """
        on = self._on
        if on is not None:
            if objection:
                await self._switch_off(objection)
            elif not is_in_order(on.name, on.index, self._mtu):
                await self._switch_off(f"{on.name} is gone, or somebody has changed it")
            elif why := self._judge(on):
                await self._give_up(why)
        elif objection:
            self._reason, self.problem = objection, ""
        elif objection is not None and self.is_wanted and time.monotonic() >= self._retry_at_s:
            await self._try_on()

    async def _try_on(self) -> None:
        try:
            await self._switch_on()
        except (UdptunError, OSError) as exc:
            if self._reason != str(exc):
                log.warning("super-packets go through the workers: %s", exc)
            self._reason, self.problem = str(exc), ""
            self._retry_at_s = time.monotonic() + _RETRY_S

    async def _switch_on(self) -> None:
        """Raises KernelError: it is off."""
        vni = 1 + secrets.randbelow((1 << 24) - 1)
        sign = 1 + secrets.randbelow((1 << 16) - 1)
        words = (vni << 8).to_bytes(4), DETOUR_PORT.to_bytes(2), _random_mac() + _random_mac(), sign
        link = await make_detour(self._device, DETOUR_PORT, vni, self._mtu, self._alias)
        try:
            self._programs.set_detour(DETOUR.pack(0, False, *words))
            await self._programs.attach_detour(link.index, self._alias)
            # Not at once with the others: programs may read while the kernel writes.
            self._programs.set_detour(DETOUR.pack(monotonic_ns(), True, *words))
        except BaseException:
            await self._take_apart()
            raise
        self._on = _On(link.index, link.name, words, LossWatch(self._counts.detour))
        self._reason = self.problem = ""
        log.info("super-packets take the kernel device=%s", link.name)

    async def _give_up(self, why: str) -> None:
        self.problem = (
            f"{why}: something on this host drops what comes to UDP port {DETOUR_PORT} from peers, as a firewall; "
            "their super-packets go through the workers, which is slower (docs/shortcut.md)"
        )
        log.warning("%s", self.problem)
        self._retry_at_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
        await self._switch_off(why)

    async def _switch_off(self, why: str) -> None:
        """Raises KernelError: it is off all the same, as nothing gets through."""
        on, self._on, self._reason = self._on, None, why
        assert on is not None
        log.info("super-packets go through the workers: %s", why)
        try:
            self._programs.set_detour(DETOUR.pack(0, False, *on.words))
            await asyncio.sleep(_DRAIN_S)
        finally:
            await self._take_apart()

    async def _take_apart(self) -> None:
        with suppress(KernelError):
            self._programs.set_detour(bytes(DETOUR.size))
        self._programs.detach_detour(self._alias)
        with suppress(KernelError):
            await delete_detour(self._device, self._alias)

    def _judge(self, on: _On) -> str:
        """What is wrong with it; empty when nothing, or it is too soon to tell.  Raises KernelError."""
        now_s = time.monotonic()
        if now_s < self._judge_at_s:
            return ""
        self._judge_at_s = now_s + _PERIOD_S
        dropped = sum(it.rx_dropped for it in read_device_counters([on.name]).values())
        return on.watch.judge(self._counts.detour, dropped)


def _random_mac() -> bytes:
    """Of a single card."""
    first, *others = secrets.token_bytes(6)
    return bytes([first & ~1, *others])

"""The shortcut of one tunnel: switched on where it can be, followed by the peers, and off again without a loss.

    wanted      what `want` has asked for; None: the shortcut shall be off
    on          the programs are attached, and the kernel takes what they are made for

Off is always right: then the workers do everything, as before.  So whatever goes wrong here ends in a line that says
why it is off, and another try.  The programs end with this process, or take nothing a few seconds later, and the
workers carry on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from udptun.core.errors import KernelError, UdptunError
from udptun.core.network_state import IPNetwork
from udptun.datapath.settings import OUTER_HEADERS
from udptun.datapath.shortcut.counts import Counts
from udptun.datapath.shortcut.detour import Detour
from udptun.datapath.shortcut.entries import KernelPeers
from udptun.datapath.shortcut.programs import LinkIndexes, Programs, ShortcutSettings
from udptun.datapath.stats import MAX_WORKERS_BESIDE
from udptun.datapath.tunnel import Tunnel
from udptun.kernel import notices
from udptun.kernel.detour_device import delete_detour
from udptun.kernel.device_counters import read_device_counters
from udptun.kernel.filters import remove_filters
from udptun.kernel.netlink import Netlink
from udptun.kernel.own_link import is_in_order
from udptun.kernel.veth import delete_pair, make_pair, pair_names
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.01, max_settle_s=0.05, storm_s=0.5, period_s=1.0, retry_s=1.0)
"""A look counts, and finds links that are other ones than before."""
_MAC_LEN = len("02:00:00:00:00:01")
"""Links without Ethernet headers, as those of other tunnels, have addresses of another length or none."""
_DRAIN_S = 0.05
"""So long packets may be on the way from one program to the next."""
_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
"""What has failed is tried again after so long, and each time later, whatever notices come: each try makes devices and
deletes them, which brings notices, and without tcx it may stop the underlay's sending for some milliseconds."""
_LAST_S = 1.0
"""A shutdown waits so long for filters to be taken out."""


class Shortcut:
    """For one event loop; `takes`, `state`, `passed` and `is_sent_to` may be asked on any thread."""

    def __init__(self, tunnel: Tunnel, alias: str) -> None:
        """`alias`: that of our devices, by which they are found when they are left over."""
        self._tunnel, self._alias = tunnel, alias
        self._wanted: ShortcutSettings | None = None
        self._on: _On | None = None
        self._reason = ""
        self._retry_at_s, self._retry_s = 0.0, _RETRY_S
        self._objection: str | None = None
        """To the detour."""
        self.switched: Callable[[], None] = lambda: None
        """Called when `takes` is another than before."""
        self._told: bool | None = None
        """What `takes` was then."""
        self.detour_wanted: Callable[[], None] = lambda: None
        """Called when the detour is wanted and was not before."""
        self._loop = WatchLoop("shortcut", notices.watch, self._look, _PACE)

    @property
    def is_on(self) -> bool:
        return self._on is not None

    @property
    def takes(self) -> bool | None:
        """Whether the kernel takes what a peer's sends; None: that is not known yet."""
        return self.is_on if self.is_on or self._reason else None

    @property
    def state(self) -> str:
        """For `udptun status`: `on`, or `off: ` and why."""
        return "on" if self._on is not None else f"off: {self._reason or 'it was not tried yet'}"

    @property
    def passed(self) -> Mapping[str, int]:
        """Packets that the programs have left to the workers since they are on, by the reason."""
        on = self._on
        return {} if on is None else on.counts.passed

    @property
    def is_detour_wanted(self) -> bool:
        """Whether super-packets come, and so `allow_detour` matters."""
        on = self._on
        return on is not None and on.detour.is_wanted

    @property
    def detour(self) -> Mapping[str, object]:
        """Keys of `datapath.shortcut_detour` in docs/status.md."""
        on = self._on
        if on is None:
            return {"state": "off", "packets": 0, "lost": 0, "refused": 0}
        sums = on.counts.detour
        lost = on.counts.n_lost_by_detour
        return {"state": on.detour.state, "packets": sums.sent, "lost": lost, "refused": sums.refused}

    @property
    def detour_problem(self) -> str:
        """Why it was given up; empty when it was not."""
        on = self._on
        return "" if on is None else on.detour.problem

    def is_sent_to(self, subnet: IPNetwork) -> bool:
        """Whether packets to the peer leave by the kernel."""
        on = self._on
        return on is not None and on.peers.is_sent_to(subnet)

    def want(self, settings: ShortcutSettings | None, reason: str = "") -> None:
        """Switch it on soon, with these settings, or off, for this reason."""
        if settings != self._wanted:
            self.try_soon()
        self._wanted = settings
        if settings is None:
            self._reason = reason
        self._loop.wake()

    def try_soon(self) -> None:
        """Not later each time: somebody may have mended what was wrong."""
        self._retry_at_s, self._retry_s = 0.0, _RETRY_S

    def allow_detour(self, objection: str | None) -> None:
        """What the host's firewall has against the detour, from now on: nothing (empty), or it is not known (None)."""
        self._objection = objection
        self._loop.wake()

    async def run(self) -> None:
        """Keep it as wanted until cancelled, and switch it off then."""
        try:
            await self._loop.run()
        finally:
            if self._on is not None:
                # A shutdown hardly waits for netlink: `udptun cleanup` and the next start find the pair by its alias,
                # and filters, which take nothing any more.
                on = self._let_go()
                on.programs.stop()
                time.sleep(_DRAIN_S)
                self._end(on)
                if on.programs.has_filters:
                    with suppress(KernelError, TimeoutError):
                        async with asyncio.timeout(_LAST_S):
                            await remove_filters([self._alias])

    async def _look(self) -> bool:
        try:
            return await self._keep_as_wanted()
        finally:
            # Not before: with other settings or links it is off for a moment only, and peers need not know.
            if self.takes != self._told:
                self._told = self.takes
                self.switched()

    async def _keep_as_wanted(self) -> bool:
        try:
            if self._on is not None:
                # First: filters are looked at by netlink, which may have to wait.
                self._on.programs.keep_on()
            if self._on is not None and (self._on.settings != self._wanted or not await self._is_in_place(self._on)):
                await self._switch_off()
            if self._on is None and self._wanted is not None and time.monotonic() >= self._retry_at_s:
                await self._switch_on(self._wanted)
                self._retry_s = _RETRY_S
            if self._on is not None:
                await self._follow_detour(self._on)
        except (UdptunError, OSError) as exc:
            if self._on is not None:
                await self._switch_off()
            if self._reason != str(exc):
                log.warning("the shortcut is off, the workers carry all packets: %s", exc)
            self._reason = str(exc)
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
            return False
        return True

    async def _switch_on(self, settings: ShortcutSettings) -> None:
        """Raises KernelError, OSError: it is off."""
        if self._tunnel.n_workers > MAX_WORKERS_BESIDE:
            raise UdptunError(f"with {self._tunnel.n_workers} workers there is no room for its counters; have one less")
        async with Netlink() as kernel:
            underlay = await kernel.link(settings.underlay)
        if underlay is None:
            raise UdptunError(f"there is no link {settings.underlay}")
        if len(underlay.mac) != _MAC_LEN or underlay.is_loopback:
            raise UdptunError(f"{underlay.name} is no Ethernet link, which the shortcut needs")
        if underlay.mtu < settings.mtu + OUTER_HEADERS[4]:
            raise UdptunError(
                f"{underlay.name} takes {underlay.mtu} bytes and {self._tunnel.tun.name} {settings.mtu}, to which the "
                f"outer headers add {OUTER_HEADERS[4]}; have --mtu or Backend.MTU not above {underlay.mtu}"
            )
        device = self._tunnel.tun.name
        # There are some when they could not be taken out as it was switched off.
        await remove_filters([self._alias])
        with suppress(KernelError):
            # It is made when it is wanted, and may be somebody else's.
            await delete_detour(device, self._alias)
        # A link with the name of the pair's that is not ours is left alone: this fails.
        pair = await make_pair(device, settings.mtu, self._alias)
        try:
            links = LinkIndexes(underlay.index, socket.if_nametoindex(device), pair.near.index, pair.far.index)
            on = await self._attach(_On.begin(settings, links, self._tunnel, self._alias))
        except BaseException:
            with suppress(KernelError):
                await remove_filters([self._alias])
            with suppress(KernelError):
                await delete_pair(device, self._alias)
            raise
        self._on, self._reason = on, ""
        self._tunnel.publishing = self._follow
        log.info("shortcut on underlay=%s device=%s", settings.underlay, device)

    async def _attach(self, on: _On) -> _On:
        """Have the kernel take packets, and the same peers as the workers.  Raises KernelError: it is ended then."""
        self._tunnel.peers.changed = on.note
        try:
            await on.programs.attach(on.links, self._alias)
            # What has changed meanwhile.
            on.follow(self._tunnel)
        except BaseException:
            self._tunnel.peers.changed = _ignore
            on.end()
            raise
        return on

    async def _switch_off(self) -> None:
        """Whatever goes wrong meanwhile, and if it is cancelled: it is off then."""
        on = self._let_go()
        try:
            on.programs.stop()
            await asyncio.sleep(_DRAIN_S)
        finally:
            self._end(on)
            try:
                with suppress(KernelError):
                    await remove_filters([self._alias])
                with suppress(KernelError):
                    await delete_detour(self._tunnel.tun.name, self._alias)
                with suppress(KernelError):
                    await delete_pair(self._tunnel.tun.name, self._alias)
            finally:
                log.info("shortcut off")

    async def _follow_detour(self, on: _On) -> None:
        """Count what has come, and have the detour as that tells.  Raises KernelError."""
        was_wanted = on.detour.is_wanted
        self._count(on)
        await on.detour.look(self._objection)
        if on.detour.is_wanted and not was_wanted:
            self.detour_wanted()

    def _let_go(self) -> _On:
        """It is off from now on, and nobody tells it of peers; the caller stops and ends it."""
        on = self._on
        assert on is not None
        self._on = None
        self._tunnel.peers.changed, self._tunnel.publishing = _ignore, _do_nothing
        return on

    def _end(self, on: _On) -> None:
        """Count what has come since the last time, and let go of the programs."""
        try:
            if self._tunnel.n_workers <= MAX_WORKERS_BESIDE:
                self._count(on, is_last=True)
        except Exception as exc:
            # Up to a second of counts is no reason to keep the programs.
            log.warning("the shortcut's last counts are lost: %s", exc)
        finally:
            on.end()

    def _follow(self) -> None:
        """Before the workers are shown another table: have the kernel know the same peers."""
        if self._on is None:
            return
        try:
            self._on.follow(self._tunnel)
        except KernelError as exc:
            # A peer that is gone must not stay: the next look switches off.
            log.warning("the shortcut does not follow the peers and is switched off: %s", exc)
            self._on.is_broken = True
            self._loop.wake()

    async def _is_in_place(self, on: _On) -> bool:
        """Whether the links are those that the programs know and pass packets on, with the programs on them, and the
        peers fit."""
        device, links = self._tunnel.tun.name, on.links
        near, far = pair_names(device)
        return (
            not on.is_broken
            and (_index(on.settings.underlay), _index(device)) == (links.underlay, links.device)
            and is_in_order(near, links.near, on.settings.mtu)
            and is_in_order(far, links.far, on.settings.mtu)
            and self._tunnel.table.top < on.programs.peer_counts.n
            and self._tunnel.n_workers <= MAX_WORKERS_BESIDE
            and await on.programs.are_attached(self._alias)
        )

    def _count(self, on: _On, *, is_last: bool = False) -> None:
        device, stats = self._tunnel.tun.name, self._tunnel.stats
        near = pair_names(device)[0]
        found = read_device_counters([near, device])
        if near in found:
            on.n_lost = found[near].tx_dropped
        if device in found:
            # What workers could not write the device counts too.
            rows = stats.worker_counters(MAX_WORKERS_BESIDE)
            on.n_refused = found[device].rx_dropped - sum(row.get("decap_drop_tun", 0) for row in rows)
        on.counts.add(self._tunnel.table.top, on.n_lost, on.n_refused, is_last=is_last)


class _On:
    """What there is while it is on."""

    def __init__(
        self, settings: ShortcutSettings, links: LinkIndexes, programs: Programs, tunnel: Tunnel, alias: str
    ) -> None:
        self.settings, self.links, self.programs = settings, links, programs
        self.counts = Counts(programs.counts, programs.peer_counts, tunnel.stats)
        self.detour = Detour(programs, self.counts, tunnel.tun.name, settings.mtu, alias)
        self.peers = KernelPeers(settings.own_subnet, settings.mtu)
        self.is_broken = False
        self.n_lost = 0
        """Packets that the pair has dropped, as far as is known: a pair that is deleted takes its counters along."""
        self.n_refused = 0
        """What our device has dropped that no worker gave to it, from some number on."""
        self._noted: set[IPNetwork] = set(tunnel.peers.subnets)
        self._indexes: dict[IPNetwork, int] = {}
        self._may_count = False

    @classmethod
    def begin(cls, settings: ShortcutSettings, links: LinkIndexes, tunnel: Tunnel, alias: str) -> _On:
        """With the peers that there are, and attached to nothing.  Raises KernelError."""
        programs = Programs.load(tunnel.table.top)
        try:
            programs.configure(settings, links)
            on = cls(settings, links, programs, tunnel, alias)
            on.follow(tunnel)
            on._may_count = True
        except BaseException:
            programs.close()
            raise
        return on

    def note(self, subnet: IPNetwork) -> None:
        """Something of this peer has changed."""
        self._noted.add(subnet)

    def follow(self, tunnel: Tunnel) -> None:
        """Raises KernelError."""
        noted, self._noted = self._noted, set()
        self.peers.set_local(tunnel.table.local_addresses)
        for subnet in noted:
            entry = tunnel.peers.entry(subnet)
            self.peers.set_peer(subnet, entry)
            if entry is None:
                self._indexes.pop(subnet, None)
            elif self._indexes.get(subnet) != entry.index and entry.index < self.programs.peer_counts.n:
                self._indexes[subnet] = entry.index
                # Before, nothing is counted under any index.
                if self._may_count:
                    self.counts.begin_peer(entry.index)
        # First those that go: they make room, and must not stay where there is none for the others.
        for key, value in sorted(self.peers.changes(), key=lambda it: it[1] is not None):
            self.programs.set_peer(key, value)

    def end(self) -> None:
        self.programs.close()


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _ignore(subnet: IPNetwork) -> None:
    """Nobody asks which peers change."""


def _do_nothing() -> None:
    """Nobody follows."""

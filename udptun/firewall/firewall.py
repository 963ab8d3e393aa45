"""Set flannel's firewall rules up and keep them: look, find the difference, set right.

Deleted rules and chains, a flushed ruleset, a second jump and an old network's rules are all the same case.  nftables
tells of every change, also of those that iptables-nft makes; for legacy iptables there is the timer alone.  The rules
stay when the daemon ends; `remove` takes them out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from udptun.core.errors import FirewallError, KernelError
from udptun.core.network_state import IPNetwork
from udptun.firewall.iptables import IptablesRules, OldIptablesRules, Program, programs
from udptun.firewall.nft import NftRules
from udptun.firewall.rules import Repair, Wanted, forward, masquerade
from udptun.firewall.ruleset_notices import RulesetNotice, watch_ruleset
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_QUIET_S = 0.3
"""Wait until nobody has changed the rules for so long: who flushes chains may be about to delete them, and could not
delete chains that we have filled again."""
_MAX_WAIT_S = 0.7
"""But no longer than this; with the time of the tools it makes less than a second from a change to its repair."""
_STRIFE_REPAIRS = 30
"""So many repairs nearly in a row: another program undoes ours.  It is told once, and the timer alone goes on."""


class Rules(Protocol):
    """Some rules, how to look at them, and how to set them."""

    async def look(self) -> Repair:
        """What differs from what is wanted.  Raises FirewallError."""

    async def apply(self, script: str) -> None:
        """Obey a repair's script, all of it or nothing.  Raises FirewallError."""

    def concerns(self, notice: RulesetNotice) -> bool:
        """Whether the notice may be about these rules."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What flags and configuration say.

    `forward` None: nobody said it, so that a host without the means does without.
    """

    masquerade: bool
    forward: bool | None
    random_fully: bool
    nftables: bool
    resync_s: float

    @property
    def form(self) -> str:
        return "nftables" if self.nftables else "iptables"


class Firewall:
    """The rules of one host.  All methods belong to one event loop."""

    def __init__(self, settings: Settings, network: IPNetwork) -> None:
        """`network` is the whole overlay."""
        self._settings = settings
        self._network = network
        self._kept: list[Rules] = []
        self._is_new = False
        self._repaired: deque[float] = deque(maxlen=_STRIFE_REPAIRS)
        self._problem = ""
        pace = Pace(_QUIET_S, _MAX_WAIT_S, storm_s=0.0, period_s=settings.resync_s, retry_s=settings.resync_s)
        self._loop = WatchLoop("firewall rules", self._relevant_notices, self._repair, pace)

    async def set_up(self, subnet: IPNetwork, previous: tuple[IPNetwork, IPNetwork] | None) -> None:
        """Set the rules, then remove those of the other form and of older flannels.

        `subnet` is the host's own, `previous` are network and subnet of the run before.  Raises FirewallError when
        rules that somebody asked for cannot be set.
        """
        settings = self._settings
        try:
            installed = await programs()
            done, unwanted = await self._set(subnet, installed)
        except FirewallError as exc:
            self._kept = []
            if settings.masquerade or settings.forward or (settings.nftables and settings.forward is None):
                raise FirewallError(f"cannot set the firewall's rules: {exc}; {_advice(settings)}") from exc
            log.warning("no forward rules, the host's firewall decides: %s; %s", exc, _advice(settings))
            return
        if previous is not None:
            unwanted += [OldIptablesRules(program, *previous) for program in installed]
        leftovers = await _look(unwanted, skip_unreadable=True)
        self._is_new = self._is_new and not leftovers
        try:
            done += await _apply(leftovers)
        except FirewallError as exc:
            log.warning("leftover firewall rules stay: %s", exc)
        if self._kept or done:
            log.info(
                "firewall rules in place form=%s masquerade=%s forward=%s found=%r",
                settings.form,
                settings.masquerade,
                settings.forward is not False,
                "; ".join(done) or "nothing to change",
            )

    async def undo_failed_start(self) -> None:
        """Take the rules out again, unless `set_up` found some of flannel's already.  Raises FirewallError."""
        if self._is_new:
            await remove(None)

    async def _set(self, subnet: IPNetwork, installed: Sequence[Program]) -> tuple[list[str], list[Rules]]:
        """Set the wanted rules; return what was found, and the rules that are to go."""
        settings = self._settings
        self._kept, unwanted = self._plan(subnet, installed, settings.random_fully)
        todo = await _look(self._kept)
        self._is_new = bool(todo) and all(repair.is_new for _, repair in todo)
        try:
            return await _apply(todo), unwanted
        except FirewallError as exc:
            if not (settings.masquerade and settings.random_fully):
                raise
            self._kept, unwanted = self._plan(subnet, installed, random_fully=False)
            try:
                done = await _apply(await _look(self._kept))
            except FirewallError:
                raise exc from None
            log.warning("masquerading with guessable source ports, as random ones are refused: %s", exc)
            return done, unwanted

    def _plan(
        self, subnet: IPNetwork, installed: Sequence[Program], random_fully: bool
    ) -> tuple[list[Rules], list[Rules]]:
        """The rules to keep, and those that must not be."""
        settings = self._settings
        wanted = Wanted(
            masquerade(self._network, subnet, random_fully) if settings.masquerade else (),
            () if settings.forward is False else forward(self._network),
        )
        kept: list[Rules] = []
        own = installed[:1] if wanted else ()
        if wanted and settings.nftables:
            # What another table drops no table can accept, and iptables' FORWARD often drops: Docker sets it so.
            against_drop = Wanted(forward=wanted.forward)
            kept.append(NftRules(wanted))
            kept += [IptablesRules(program, against_drop, only_against_drop=True) for program in own]
        elif wanted:
            if not own:
                raise FirewallError("iptables is not installed (or not in PATH)")
            kept += [IptablesRules(program, wanted) for program in own]
        unwanted: list[Rules] = [IptablesRules(program, Wanted()) for program in installed[len(own) :]]
        unwanted += [NftRules(Wanted(), version) for version in ((6,) if wanted and settings.nftables else (4, 6))]
        return kept, unwanted

    def document(self) -> dict[str, object]:
        """The key `firewall` of docs/status.md."""
        return {
            "form": self._settings.form if self._kept else None,
            "masquerade": bool(self._kept) and self._settings.masquerade,
            "forward": bool(self._kept) and self._settings.forward is not False,
        }

    async def run(self) -> None:
        """Look after every notice and every `resync_s` seconds, and set right what differs, until cancelled."""
        if self._kept:
            await self._loop.run()

    async def _relevant_notices(self) -> AsyncGenerator[object, None]:
        try:
            async with aclosing(watch_ruleset()) as batches:
                async for notices in batches:
                    if self._is_concerned(notices):
                        yield notices
        except KernelError as exc:
            # Where there is no nftables there is legacy iptables alone, which tells of nothing anyway.
            log.debug("no notices of changed rules, the timer alone looks error=%s", exc)

    def _is_concerned(self, notices: frozenset[RulesetNotice] | None) -> bool:
        """Whether to look at once.  kube-proxy changes rules all day long that are none of ours."""
        if self._is_strife:
            return False
        return notices is None or any(rules.concerns(notice) for rules in self._kept for notice in notices)

    async def _repair(self) -> bool:
        """Whether all is as wanted now."""
        problem = ""
        try:
            found = await _apply(await _look(self._kept))
        except FirewallError as exc:
            problem = f"firewall rules: {exc}"
        else:
            if found:
                self._repaired.append(asyncio.get_running_loop().time())
            if found and not self._is_strife:
                log.info("firewall rules repaired found=%r", "; ".join(found))
            elif found:
                problem = "firewall rules: they do not stay as they are set; another program changes them all the time"
        if problem and problem != self._problem:
            log.warning("%s", problem)
        if self._problem and not problem:
            log.info("firewall rules are as wanted again")
        self._problem = problem
        return not problem

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as wanted and cannot be set right now, a line each."""
        return tuple(filter(None, [self._problem, self._loop.problem]))

    @property
    def _is_strife(self) -> bool:
        """Whether there have been so many repairs that the timer alone shall bring the next one."""
        since = asyncio.get_running_loop().time() - 1.5 * _STRIFE_REPAIRS * self._settings.resync_s
        return len(self._repaired) == _STRIFE_REPAIRS and self._repaired[0] > since


async def remove(previous: tuple[IPNetwork, IPNetwork] | None) -> list[str]:
    """Take out all of flannel's rules, in both forms, of every iptables there is; a line for each thing.

    `previous` as for `Firewall.set_up`.  Raises FirewallError when something is there and cannot be removed.
    """
    installed = await programs()
    every: list[Rules] = [IptablesRules(program, Wanted()) for program in installed]
    if previous is not None:
        every += [OldIptablesRules(program, *previous) for program in installed]
    every += [NftRules(Wanted(), 4), NftRules(Wanted(), 6)]
    return await _apply(await _look(every, skip_unreadable=True))


async def _look(every: Iterable[Rules], *, skip_unreadable: bool = False) -> list[tuple[Rules, Repair]]:
    """Those that are not as wanted, and how to repair them.

    `skip_unreadable` is for rules that shall be gone: without the tool, or in a kernel without that kind, they are.
    """
    todo: list[tuple[Rules, Repair]] = []
    for rules in every:
        try:
            if repair := await rules.look():
                todo.append((rules, repair))
        except FirewallError as exc:
            if not skip_unreadable:
                raise
            log.debug("no rules to remove error=%s", exc)
    return todo


async def _apply(todo: Iterable[tuple[Rules, Repair]]) -> list[str]:
    """Repair; what was found before, in words."""
    found: list[str] = []
    for rules, repair in todo:
        await rules.apply(repair.script)
        found += repair.findings
    return found


def _advice(settings: Settings) -> str:
    if settings.nftables:
        return "EnableNFTables in net-conf.json needs root and nft 1.0.1 or newer"
    return (
        "it needs root and iptables 1.6.2 or newer; EnableNFTables in net-conf.json does it with nft, "
        "--ip-masq=false --iptables-forward-rules=false does without"
    )

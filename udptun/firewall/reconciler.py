"""Set flannel's firewall rules and keep them: compare the kernel's rules with the desired ones, repair what differs.

Deleted rules and chains, a flushed ruleset, a second jump and the rules of an old network are all the same case.
nftables reports every change, also those that iptables-nft makes.  Legacy iptables reports nothing, so there the timer
alone finds a change.  The rules stay when the daemon ends; `remove_rules` takes them out.

flannel's chains hold the rules of all daemons of the host.  Daemons that repaired them at the same time could undo each
other's work, so each looks again under a lock before it repairs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Protocol

from udptun.core.errors import FirewallError, KernelError
from udptun.core.network_state import IPNetwork
from udptun.core.ownership import Ownership
from udptun.firewall.iptables import IptablesRules, OldIptablesRules, Program, programs
from udptun.firewall.nft import NftRules
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.rules import DesiredRules, Repair, forward, masquerade
from udptun.firewall.ruleset_notices import RulesetNotice, watch_ruleset
from udptun.kernel.claims import locked
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_SETTLE_S = 0.3
"""A program that flushes chains may delete them next.  It could not delete chains that we have filled again.  So a
repair waits until nobody has changed the rules for so long."""
_MAX_SETTLE_S = 0.7
"""But no longer than this.  With the time that the tools take, a repair is complete within a second of the change."""
_STRIFE_REPAIRS = 30
"""After so many repairs nearly in a row another program is taken to undo ours.  One line says so, and from then on the
timer alone brings repairs."""


_LOCK, _PATIENCE_S = "firewall", 5.0
"""A repair waits so long for that of another daemon.  A tool that waits for the lock of iptables takes seconds."""
_ALL_IPV6 = ip_network("::/0")
"""We have no IPv6 rules.  All that an older flannel has left are removed, as flannel does."""


class Rules(Protocol):
    """The desired rules in one form, kept by one tool."""

    async def compare(self) -> Repair:
        """What the kernel's rules differ in, and how to repair it.  Raises FirewallError."""

    async def apply(self, script: str) -> None:
        """Run a repair's script, all of it or nothing.  Raises FirewallError."""

    def concerns(self, notice: RulesetNotice) -> bool:
        """Whether the notice may be about these rules."""


@dataclass(frozen=True, slots=True)
class FirewallSettings:
    """What flags and configuration say.

    `forward` None: nobody asked for forward rules or against them.  A host that cannot have them then does without.
    """

    masquerade: bool
    forward: bool | None
    random_fully: bool
    nftables: bool
    resync_s: float

    @property
    def form(self) -> str:
        return "nftables" if self.nftables else "iptables"


class FirewallReconciler:
    """The rules of one host.  All methods belong to one event loop."""

    def __init__(self, settings: FirewallSettings, ownership: Ownership, obstacles: Obstacles) -> None:
        """Rules about the Networks of `ownership` are ours; those about others belong to other daemons.

        `obstacles` are looked for after each look at our own rules.
        """
        self._settings = settings
        self._obstacles = obstacles
        self._ownership = ownership
        self._random_fully = settings.random_fully
        self._kept: list[Rules] = []
        self._is_new = False
        self._repaired: deque[float] = deque(maxlen=_STRIFE_REPAIRS)
        self._problem = ""
        pace = Pace(_SETTLE_S, _MAX_SETTLE_S, storm_s=0.0, period_s=settings.resync_s, retry_s=settings.resync_s)
        self._loop = WatchLoop("firewall rules", self._relevant_notices, self._look, pace)

    async def set_up(self, subnet: IPNetwork, previous: tuple[IPNetwork, IPNetwork] | None) -> None:
        """Set the rules, then remove those of the other form and of older flannels.

        `subnet` is the host's own; `previous` holds network and subnet of the run before.  Raises FirewallError when
        rules that somebody asked for cannot be set.
        """
        async with locked(_LOCK, _PATIENCE_S):
            await self._set_up(subnet, previous)

    async def _set_up(self, subnet: IPNetwork, previous: tuple[IPNetwork, IPNetwork] | None) -> None:
        settings = self._settings
        try:
            installed = await programs()
            done, unwanted = await self._set_rules(subnet, installed)
        except FirewallError as exc:
            self._kept = []
            if settings.masquerade or settings.forward or (settings.nftables and settings.forward is None):
                raise FirewallError(f"cannot set the firewall's rules: {exc}; {_advice(settings)}") from exc
            log.warning("no forward rules, the host's firewall decides: %s; %s", exc, _advice(settings))
            return
        if previous is not None:
            unwanted += [OldIptablesRules(program, *previous) for program in installed]
        leftovers = await _compare(unwanted, skip_unreadable=True)
        self._is_new = self._is_new and not any(repair for _, repair in leftovers)
        try:
            done += await _repair(leftovers)
        except FirewallError as exc:
            log.warning("leftover firewall rules stay: %s", exc)
        # From now on another daemon may have the Networks of our earlier runs.
        self._ownership = self._ownership.without_leftovers()
        self._kept, _ = self._choose_rules(subnet, installed)
        if self._kept or done:
            log.info(
                "firewall rules in place form=%s masquerade=%s forward=%s found=%r",
                settings.form,
                settings.masquerade,
                settings.forward is not False,
                "; ".join(done) or "nothing to change",
            )

    async def undo_failed_start(self) -> None:
        """Take the rules out again, unless `set_up` found rules of flannel's.  Raises FirewallError."""
        if self._is_new:
            await remove_rules(self._ownership, None)

    async def _set_rules(self, subnet: IPNetwork, installed: Sequence[Program]) -> tuple[list[str], list[Rules]]:
        """Set the desired rules.  Returns what was found before, in words, and the rules that are to go."""
        settings = self._settings
        self._kept, unwanted = self._choose_rules(subnet, installed)
        compared = await _compare(self._kept)
        todo = [repair for _, repair in compared if repair]
        self._is_new = bool(todo) and all(repair.is_new for repair in todo)
        try:
            return await _repair(compared), unwanted
        except FirewallError as exc:
            if not (settings.masquerade and settings.random_fully):
                raise
            self._random_fully = False
            self._kept, unwanted = self._choose_rules(subnet, installed)
            try:
                done = await _repair(await _compare(self._kept))
            except FirewallError:
                raise exc from None
            log.warning("masquerading with guessable source ports, as random ones are refused: %s", exc)
            return done, unwanted

    def _choose_rules(self, subnet: IPNetwork, installed: Sequence[Program]) -> tuple[list[Rules], list[Rules]]:
        """The rules to keep, and those that must not exist."""
        settings, network, networks = self._settings, self._ownership.network, self._ownership.networks
        desired = DesiredRules(
            masquerade(network, subnet, self._random_fully) if settings.masquerade else (),
            () if settings.forward is False else forward(network),
        )
        kept: list[Rules] = []
        own = installed[:1] if desired else ()
        if desired and settings.nftables:
            # A packet that another table drops is lost, whatever ours accepts.  The FORWARD chain of iptables often
            # drops by its policy: Docker sets it so.
            against_drop = DesiredRules(forward=desired.forward)
            kept.append(NftRules(desired, networks))
            kept += [IptablesRules(program, against_drop, networks, only_against_drop=True) for program in own]
        elif desired:
            if not own:
                raise FirewallError("iptables is not installed (or not in PATH)")
            kept += [IptablesRules(program, desired, networks) for program in own]
        unwanted: list[Rules] = [IptablesRules(program, DesiredRules(), networks) for program in installed[len(own) :]]
        if not (desired and settings.nftables):
            unwanted.append(NftRules(DesiredRules(), networks))
        unwanted.append(NftRules(DesiredRules(), [_ALL_IPV6], 6))
        return kept, unwanted

    def document(self) -> dict[str, object]:
        """The key `firewall` of docs/status.md."""
        return {
            "form": self._settings.form if self._kept else None,
            "masquerade": bool(self._kept) and self._settings.masquerade,
            "forward": bool(self._kept) and self._settings.forward is not False,
        }

    async def run(self) -> None:
        """Look after every notice and every `resync_s` seconds, and repair what differs, until cancelled."""
        await self._loop.run()

    async def _relevant_notices(self) -> AsyncGenerator[object, None]:
        try:
            async with aclosing(watch_ruleset()) as batches:
                async for notices in batches:
                    if self._is_concerned(notices):
                        yield notices
        except KernelError as exc:
            # A kernel without nftables has legacy iptables alone, which reports nothing anyway.
            log.debug("no notices of changed rules, the timer alone looks error=%s", exc)

    def _is_concerned(self, notices: frozenset[RulesetNotice] | None) -> bool:
        """Whether to look at once.  kube-proxy changes rules of its own all day long.

        What concerns the obstacles alone waits for the timer, because a look at our own rules starts programs.
        """
        self._obstacles.note(notices)
        if self._is_strife:
            return False
        return notices is None or any(rules.concerns(notice) for rules in self._kept for notice in notices)

    async def _look(self) -> bool:
        """Repair what differs; return whether all is as wanted now."""
        problem = ""
        try:
            found = await self._repair_differences()
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
        # Last, when our own rules are in place again.
        await self._obstacles.look()
        return not problem

    async def _repair_differences(self) -> list[str]:
        """Returns what was found before, in words."""
        if not any(repair for _, repair in await _compare(self._kept)):
            return []
        async with locked(_LOCK, _PATIENCE_S):
            return await _repair(await _compare(self._kept))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as wanted and cannot be set right now, a line each."""
        return (*filter(None, [self._problem, self._loop.problem]), *self._obstacles.problems)

    @property
    def _is_strife(self) -> bool:
        """Whether there have been so many repairs lately that the timer alone shall bring the next one."""
        since = asyncio.get_running_loop().time() - 1.5 * _STRIFE_REPAIRS * self._settings.resync_s
        return len(self._repaired) == _STRIFE_REPAIRS and self._repaired[0] > since


async def remove_rules(ownership: Ownership, previous: tuple[IPNetwork, IPNetwork] | None) -> list[str]:
    """Take out all of our rules, in both forms and from every iptables.

    Returns a line for each thing that was removed, and one about the rules of other Networks, which stay.  `previous`
    as for `FirewallReconciler.set_up`.  Raises FirewallError when something is there and cannot be removed.
    """
    networks = ownership.networks
    async with locked(_LOCK, _PATIENCE_S):
        installed = await programs()
        every: list[Rules] = [IptablesRules(program, DesiredRules(), networks) for program in installed]
        if previous is not None:
            every += [OldIptablesRules(program, *previous) for program in installed]
        every += [NftRules(DesiredRules(), networks), NftRules(DesiredRules(), [_ALL_IPV6], 6)]
        compared = await _compare(every, skip_unreadable=True)
        found = await _repair(compared)
    lines = [f"removed {line.replace('other rules', 'our rules')}" for line in found]
    others = sorted({str(network) for _, repair in compared for network in repair.others})
    return lines + ([f"left the firewall rules of {', '.join(others)} alone"] if others else [])


async def _compare(every: Iterable[Rules], *, skip_unreadable: bool = False) -> list[tuple[Rules, Repair]]:
    """The rules, each with its repair, which is false where nothing differs.

    `skip_unreadable` is for rules that shall be gone: where the tool or that kind of rules is missing, they are.
    """
    compared: list[tuple[Rules, Repair]] = []
    for rules in every:
        try:
            compared.append((rules, await rules.compare()))
        except FirewallError as exc:
            if not skip_unreadable:
                raise
            log.debug("no rules to remove error=%s", exc)
    return compared


async def _repair(compared: Iterable[tuple[Rules, Repair]]) -> list[str]:
    """Repair what differs.  Returns what was found before, in words."""
    found: list[str] = []
    for rules, repair in compared:
        if repair:
            await rules.apply(repair.script)
            found += repair.findings
    return found


def _advice(settings: FirewallSettings) -> str:
    if settings.nftables:
        return "EnableNFTables in net-conf.json needs root and nft 1.0.1 or newer"
    return (
        "it needs root and iptables 1.6.2 or newer; EnableNFTables in net-conf.json does it with nft, "
        "--ip-masq=false --iptables-forward-rules=false does without"
    )

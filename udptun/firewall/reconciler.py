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
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import IPv6Network

from udptun.core.errors import FirewallError, KernelError
from udptun.core.family import Family
from udptun.core.lease import Subnets
from udptun.core.network_state import IPNetwork
from udptun.core.ownership import Ownership
from udptun.firewall.attempt import Attempt, Failure, Rules
from udptun.firewall.iptables import IptablesRules, OldIptablesRules, Program, iptables_rules
from udptun.firewall.iptables_programs import programs
from udptun.firewall.nft import NftRules
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.rules import DesiredRules, Repair, forward, masquerade
from udptun.firewall.ruleset_notices import RulesetNotice, watch_ruleset
from udptun.firewall.tool import AbsentError, TimedOutError, UnreadableError
from udptun.kernel.claims import locked
from udptun.kernel.problem_lines import ProblemLines
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
_ALL_IPV6 = IPv6Network("::/0")
"""Without IPv6 all that an older flannel has left of it is removed, as flannel does."""


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

    def __init__(self, settings: FirewallSettings, ownerships: Sequence[Ownership], obstacles: Obstacles) -> None:
        """Rules about the Networks of `ownerships`, one a family, are ours; others belong to other daemons.

        `obstacles` are looked for after each look at our own rules.
        """
        self._settings = settings
        self._obstacles = obstacles
        self._ownerships = ownerships
        self._random_fully = settings.random_fully
        self._subnets: Subnets | None = None
        self._previous: tuple[IPNetwork, IPNetwork] | None = None
        self._installed: Sequence[Program] = ()
        self._kept: list[Rules] = []
        self._is_settled = False
        """Whether all that a start has to do has been done.  From then on only `_kept` is looked at."""
        self._standing: set[tuple[str, int]] = set()
        """Which rules have been in place since the start: `masquerade` or `forward`, and of which IP version."""
        self._is_new = False
        self.n_repairs = 0
        """Differences that were repaired since `set_up`."""
        self._repaired: deque[float] = deque(maxlen=_STRIFE_REPAIRS)
        self._lines = ProblemLines(log, "firewall rules are as wanted again")
        pace = Pace(_SETTLE_S, _MAX_SETTLE_S, storm_s=0.0, period_s=settings.resync_s, retry_s=settings.resync_s)
        self._loop = WatchLoop("firewall rules", self._relevant_notices, self._look, pace)

    async def set_up(self, subnets: Subnets, previous: tuple[IPNetwork, IPNetwork] | None) -> None:
        """Set the rules, then remove those of the other form and of older flannels.

        `subnets` are the host's own; `previous` holds network and subnet of the run before.  Raises FirewallError when
        IPv4 rules that somebody asked for cannot be set.  What else fails is tried again by `run`, and is a problem
        line until then: rules that nobody asked for, IPv6 rules, whatever a tool that hung should have done, leftovers.
        """
        self._subnets, self._previous = subnets, previous
        async with locked(_LOCK, _PATIENCE_S):
            attempt = await self._set_rules()
        fatal = [str(failure.error) for failure in attempt.failures if self._is_fatal(failure)]
        if fatal:
            raise FirewallError(
                f"cannot set the firewall's rules: {'; '.join(dict.fromkeys(fatal))}; {_advice(self._settings)}"
            )
        for failure in attempt.failures:
            if self._is_done_without(failure):
                advice = _advice(self._settings)
                log.warning("no forward rules, the host's firewall decides: %s; %s", failure.error, advice)
        self._lines.replace(self._describe(attempt.failures))
        if self._standing or attempt.found:
            log.info(
                "firewall rules in place form=%s program=%s masquerade=%s forward=%s found=%r",
                self._settings.form,
                self._program,
                self._stands("masquerade"),
                self._stands("forward"),
                "; ".join(attempt.found) or "nothing to change",
            )

    @property
    def _program(self) -> str:
        """The tool that sets the rules."""
        return "nft" if self._settings.nftables or not self._installed else self._installed[0].name

    async def undo_failed_start(self) -> None:
        """Take the rules out again, unless `set_up` found rules of flannel's.  Raises FirewallError."""
        if self._is_new:
            networks = [network for ownership in self._ownerships for network in ownership.networks]
            _, left = await remove_rules(networks, None)
            if left:
                raise FirewallError("; ".join(left))

    async def _set_rules(self) -> Attempt:
        """Choose the rules and set them, then remove the unwanted ones."""
        attempt = Attempt()
        try:
            self._installed = await programs()
            self._kept, unwanted = self._choose_rules()
        except FirewallError as exc:
            attempt.failures.append(Failure(None, exc))
            return attempt
        compared = await attempt.compare(self._kept)
        # Before anything is set: the start may be interrupted between two programs.
        self._is_new = any(repair for _, repair in compared) and all(repair.is_new for _, repair in compared)
        await self._set_kept(attempt, compared)
        if any(self._is_asked_for(failure) for failure in attempt.failures):
            # Until the new rules are in place the old ones are better than none.
            return attempt
        leftovers = await attempt.compare(unwanted)
        self._is_new = self._is_new and not any(repair for _, repair in leftovers)
        await attempt.repair(leftovers)
        self._is_settled = not any(failure.may_pass or failure.rules in unwanted for failure in attempt.failures)
        if self._is_settled:
            # From now on another daemon may have the Networks of our earlier runs.
            self._ownerships = [ownership.without_leftovers() for ownership in self._ownerships]
            self._kept, _ = self._choose_rules()
        return attempt

    async def _set_kept(self, attempt: Attempt, compared: Sequence[tuple[Rules, Repair]]) -> None:
        """Set what has been found to differ from the kept rules."""
        await attempt.repair(compared)
        # A tool that hung has refused nothing.
        refused = [it for it in attempt.failures if it.is_repair and not it.may_pass and it.rules in self._masquerading]
        if refused and self._random_fully and not self._stands("masquerade"):
            await self._do_without_random_ports(attempt, refused[0])
        self._note_standing(attempt)

    async def _do_without_random_ports(self, attempt: Attempt, refused: Failure) -> None:
        """Masquerade with guessable source ports, if random ones are all that is in the way."""
        before, self._random_fully = self._kept, False
        plain, _ = self._choose_rules()
        self._kept = [new if old.desired.masquerade else old for old, new in zip(before, plain, strict=True)]
        second = Attempt()
        await second.repair(await second.compare(self._masquerading))
        if second.failures:
            self._kept, self._random_fully = before, True
            return
        log.warning("masquerading with guessable source ports, as random ones are refused: %s", refused.error)
        attempt.failures.remove(refused)
        attempt.found += second.found

    @property
    def _masquerading(self) -> list[Rules]:
        return [rules for rules in self._kept if rules.desired.masquerade]

    def _note_standing(self, attempt: Attempt) -> None:
        """All kept rules have been compared and repaired, but for the failures."""
        failing = [failure.rules for failure in attempt.failures]
        forwarding = [rules for rules in self._kept if rules.desired.forward]
        for rules_of_kind, name in ((self._masquerading, "masquerade"), (forwarding, "forward")):
            failed = {rules.version for rules in rules_of_kind if rules in failing}
            self._standing |= {(name, rules.version) for rules in rules_of_kind if rules.version not in failed}

    def _stands(self, kind: str) -> bool:
        """Whether the rules of that kind have been in place, of either IP version: what fails has a line of its own."""
        return any(name == kind for name, _ in self._standing)

    def _has_stood(self, failure: Failure) -> bool:
        """Whether any rules of that IP version have been in place."""
        version = None if failure.rules is None else failure.rules.version
        return any(version in (it, None) for _, it in self._standing)

    def _choose_rules(self) -> tuple[list[Rules], list[Rules]]:
        """The rules to keep, and those that must not exist.  Raises FirewallError when the tool is missing."""
        kept: list[Rules] = []
        unwanted: list[Rules] = []
        for ownership in self._ownerships:
            kept_of_family, unwanted_of_family = self._choose_rules_of(ownership)
            kept += kept_of_family
            unwanted += unwanted_of_family
        for version in {4, 6} - {ownership.network.version for ownership in self._ownerships}:
            # A family that is not enabled, or no longer.
            former = [it for ownership in self._ownerships for it in ownership.networks if it.version == version]
            for program in self._installed if former else ():
                of_version = program if version == 4 else program.for_ipv6
                unwanted += iptables_rules(of_version, DesiredRules(), former)
            if former or version == 6:
                unwanted.append(NftRules(DesiredRules(), former or [_ALL_IPV6], version))
        if self._previous is not None:
            unwanted += [OldIptablesRules(program, *self._previous) for program in self._installed]
        return kept, unwanted

    def _choose_rules_of(self, ownership: Ownership) -> tuple[list[Rules], list[Rules]]:
        """The same about one family, whose Networks are those of `ownership`; none to keep without a subnet of it."""
        assert self._subnets is not None
        settings, network = self._settings, ownership.network
        version = network.version
        networks = [it for it in ownership.networks if it.version == version]
        subnet = self._subnets.of(Family(version))
        installed = [it if version == 4 else it.for_ipv6 for it in self._installed]
        desired = DesiredRules()
        if subnet is not None:
            desired = DesiredRules(
                masquerade(network, subnet, self._random_fully) if settings.masquerade else (),
                () if settings.forward is False else forward(network),
            )
        kept: list[Rules] = []
        own = installed[:1] if desired else []
        if desired and settings.nftables:
            # A packet that another table drops is lost, whatever ours accepts.  The FORWARD chain of iptables often
            # drops by its policy: Docker sets it so.
            against_drop = DesiredRules(forward=desired.forward)
            kept.append(NftRules(desired, networks, version))
            kept += [
                IptablesRules(program, "filter", against_drop, networks, only_against_drop=True) for program in own
            ]
        elif desired:
            if not own:
                raise AbsentError("iptables is not installed (or not in PATH)")
            kept += iptables_rules(own[0], desired, networks)
        unwanted: list[Rules] = []
        for program in installed:
            if program not in own:
                unwanted += iptables_rules(program, DesiredRules(), networks)
            elif settings.nftables:
                unwanted.append(IptablesRules(program, "nat", DesiredRules(), networks))
        if not (desired and settings.nftables):
            unwanted.append(NftRules(DesiredRules(), networks, version))
        return kept, unwanted

    def _is_asked_for(self, failure: Failure) -> bool:
        """Whether flags or configuration ask for these rules by name."""
        settings = self._settings
        if failure.rules is None:
            return bool(settings.masquerade or settings.forward or (settings.nftables and settings.forward is None))
        desired = failure.rules.desired
        return bool(desired.masquerade or (desired.forward and (settings.forward or settings.nftables)))

    def _is_fatal(self, failure: Failure) -> bool:
        """Whether a start that meets it fails.  IPv4 works without the rules of IPv6."""
        is_ipv6 = failure.rules is not None and failure.rules.version == 6
        return self._is_asked_for(failure) and not failure.may_pass and not is_ipv6

    def _is_done_without(self, failure: Failure) -> bool:
        """Whether the host has never had these rules, cannot have them, and nobody asked."""
        return isinstance(failure.error, AbsentError) and not (self._is_asked_for(failure) or self._has_stood(failure))

    def _describe(self, failures: Iterable[Failure]) -> Iterator[str]:
        """The problem lines about these failures."""
        for failure in failures:
            if failure.rules is not None and not failure.rules.desired:
                yield f"leftover firewall rules may stay: {failure.error}"
            elif isinstance(failure.error, TimedOutError | UnreadableError) or self._has_stood(failure):
                yield f"firewall rules: {failure.error}"
            elif not self._is_done_without(failure):
                yield f"firewall rules: {failure.error}; {_advice(self._settings)}"

    def document(self) -> dict[str, object]:
        """The key `firewall` of docs/status.md."""
        return {
            "form": self._settings.form if self._standing else None,
            "masquerade": self._stands("masquerade"),
            "forward": self._stands("forward"),
            "repairs": self.n_repairs,
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
        attempt = await self._repair_differences()
        lines = list(self._describe(attempt.failures))
        self.n_repairs += len(attempt.found)
        if attempt.found:
            self._repaired.append(asyncio.get_running_loop().time())
        if attempt.found and not self._is_strife:
            log.info("firewall rules repaired found=%r", "; ".join(attempt.found))
        elif attempt.found:
            lines.append("firewall rules: they do not stay as they are set; another program changes them all the time")
        self._lines.replace(lines)
        # Last, when our own rules are in place again.
        await self._obstacles.look()
        return not lines

    async def _repair_differences(self) -> Attempt:
        if not self._is_settled:
            async with locked(_LOCK, _PATIENCE_S):
                return await self._set_rules()
        attempt = Attempt()
        compared = await attempt.compare(self._kept)
        if any(repair for _, repair in compared):
            # Again all of them, not just what differs: a program that changes several tables commits one after the
            # other, and the first look may have come in between.
            async with locked(_LOCK, _PATIENCE_S):
                await self._set_kept(attempt, await attempt.compare(rules for rules, _ in compared))
        else:
            self._note_standing(attempt)
        return attempt

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as wanted and cannot be set right now, a line each."""
        return (*self._lines.lines, *filter(None, [self._loop.problem]), *self._obstacles.problems)

    @property
    def _is_strife(self) -> bool:
        """Whether there have been so many repairs lately that the timer alone shall bring the next one."""
        since = asyncio.get_running_loop().time() - 1.5 * _STRIFE_REPAIRS * self._settings.resync_s
        return len(self._repaired) == _STRIFE_REPAIRS and self._repaired[0] > since


async def remove_rules(
    networks: Sequence[IPNetwork], previous: tuple[IPNetwork, IPNetwork] | None
) -> tuple[list[str], list[str]]:
    """Take out all of our rules, those about `networks`, in both forms and from every iptables.

    Returns a line for each thing that was removed, and one about the rules of other Networks, which stay; then a line
    for each thing that is there, or may be there, and could not be removed.  `previous` as for
    `FirewallReconciler.set_up`.  Raises FirewallError when it cannot be found out which iptables there are.
    """
    attempt = Attempt()
    ipv4, ipv6 = ([network for network in networks if network.version == version] for version in (4, 6))
    async with locked(_LOCK, _PATIENCE_S):
        installed = await programs()
        every: list[Rules] = [rules for it in installed for rules in iptables_rules(it, DesiredRules(), ipv4)]
        if ipv6:
            every += [rules for it in installed for rules in iptables_rules(it.for_ipv6, DesiredRules(), ipv6)]
        if previous is not None:
            every += [OldIptablesRules(program, *previous) for program in installed]
        every += [NftRules(DesiredRules(), ipv4), NftRules(DesiredRules(), ipv6 or [_ALL_IPV6], 6)]
        compared = await attempt.compare(every)
        await attempt.repair(compared)
    lines = [f"removed {line.replace('other rules', 'our rules')}" for line in attempt.found]
    others = sorted({str(network) for _, repair in compared for network in repair.others})
    if others:
        lines.append(f"left the firewall rules of {', '.join(others)} alone")
    left = [f"cannot remove firewall rules: {failure.error}" for failure in attempt.failures]
    return lines, list(dict.fromkeys(left))


def _advice(settings: FirewallSettings) -> str:
    if settings.nftables:
        return "EnableNFTables in net-conf.json needs root and nft 1.0.1 or newer"
    return (
        "it needs root and iptables 1.6.2 or newer; EnableNFTables in net-conf.json does it with nft, "
        "--ip-masq=false --iptables-forward-rules=false does without"
    )

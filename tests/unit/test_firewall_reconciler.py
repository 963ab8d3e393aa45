"""What one look at the firewall's rules repairs.  Stand-ins for rules; tests/netns/test_firewall.py has real ones."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from udptun.core.ownership import Ownership
from udptun.firewall import reconciler
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.reconciler import FirewallReconciler, FirewallSettings
from udptun.firewall.rules import DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.firewall.tool import AbsentError

NETWORK = IPv4Network("10.244.0.0/16")


class Table:
    """Differs in what is said at each reading of it, until it is repaired."""

    tool = "iptables"
    desired = DesiredRules()

    def __init__(self, *found: str) -> None:
        self._found = list(found)

    async def compare(self) -> Repair:
        found = self._found.pop(0) if self._found else ""
        return Repair("script", (found,)) if found else Repair()

    async def apply(self, script: str) -> None:
        self._found.clear()

    def concerns(self, notice: RulesetNotice) -> bool:
        return False


async def test_what_changes_between_two_readings_of_one_look_is_repaired_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A program that flushes two tables commits one after the other.  The table that was read before stayed empty until
    the next look, which took a line of its own."""
    caplog.set_level(logging.INFO)
    settings = FirewallSettings(masquerade=True, forward=True, random_fully=True, nftables=False, resync_s=5)
    firewall = FirewallReconciler(settings, [Ownership((NETWORK,))], Obstacles(list, list))
    firewall._kept = [Table("", "nat was flushed"), Table("filter was flushed", "filter was flushed")]
    firewall._is_settled = True
    assert await firewall._look()
    (line,) = [record.getMessage() for record in caplog.records if "repaired" in record.getMessage()]
    assert line == "firewall rules repaired found='nat was flushed; filter was flushed'"


class OfVersion(Table):
    """Rules to masquerade of one IP version; without its program they cannot be set."""

    desired = DesiredRules(masquerade=("a rule",))

    def __init__(self, version: int, *, has_program: bool) -> None:
        super().__init__()
        self.version = version
        self._has_program = has_program

    async def compare(self) -> Repair:
        if not self._has_program:
            raise AbsentError("ip6tables is not installed (or not in PATH)")
        return await super().compare()


async def test_what_ipv6_lacks_is_said_and_what_stands_of_ipv4_is_not_denied() -> None:
    """A host with iptables and no ip6tables had no rules at all by its status, and IPv4 was masqueraded."""
    settings = FirewallSettings(masquerade=True, forward=None, random_fully=True, nftables=False, resync_s=5)
    firewall = FirewallReconciler(settings, [Ownership((NETWORK,))], Obstacles(list, list))
    firewall._kept = [OfVersion(4, has_program=True), OfVersion(6, has_program=False)]
    firewall._is_settled = True
    assert not await firewall._look()
    assert (firewall.document()["form"], firewall.document()["masquerade"]) == ("iptables", True)
    (line,) = firewall._lines.lines
    assert line.startswith("firewall rules: ip6tables is not installed (or not in PATH); it needs root and iptables ")
    firewall._kept = [OfVersion(6, has_program=False)]
    firewall._standing.clear()
    assert not await firewall._look()
    assert (firewall.document()["form"], firewall.document()["masquerade"]) == (None, False)


class New(Table):
    """Rules of which the host has none yet; setting them takes for ever once they are set."""

    def __init__(self) -> None:
        super().__init__("everything is missing")
        self.is_set = asyncio.Event()

    async def compare(self) -> Repair:
        return replace(await super().compare(), is_new=True)

    async def apply(self, script: str) -> None:
        self.is_set.set()
        await asyncio.sleep(1000)


async def test_a_start_that_is_interrupted_while_it_sets_its_rules_takes_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a program had set before the signal came stayed, as it was not known yet that the rules are new."""
    removed: list[object] = []

    async def find_programs() -> list[object]:
        return []

    async def remove(networks: object, previous: object) -> tuple[list[str], list[str]]:
        removed.append(networks)
        return [], []

    settings = FirewallSettings(masquerade=True, forward=True, random_fully=True, nftables=False, resync_s=5)
    firewall = FirewallReconciler(settings, [Ownership((NETWORK,))], Obstacles(list, list))
    rules = New()
    monkeypatch.setattr(reconciler, "programs", find_programs)
    monkeypatch.setattr(reconciler, "remove_rules", remove)
    monkeypatch.setattr(firewall, "_choose_rules", lambda: ([rules], []))
    start = asyncio.create_task(firewall._set_rules())
    await rules.is_set.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await firewall.undo_failed_start()
    assert removed == [[NETWORK]]

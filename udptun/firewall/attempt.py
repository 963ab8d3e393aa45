"""One attempt to have the rules as desired: form by form and table by table, each whatever becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from udptun.core.errors import FirewallError
from udptun.firewall.rules import DesiredRules, Repair
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.firewall.tool import TimedOutError, UnreadableError

log = logging.getLogger(__name__)


class Rules(Protocol):
    """The desired rules of one table, kept by one tool.  No rules are desired of what shall be gone."""

    tool: str
    desired: DesiredRules
    version: int
    """Of IP: 4 or 6."""

    async def compare(self) -> Repair:
        """What the kernel's rules differ in, and how to repair it.  Raises FirewallError."""

    async def apply(self, script: str) -> None:
        """Run a repair's script, all of it or nothing.  Raises FirewallError."""

    def concerns(self, notice: RulesetNotice) -> bool:
        """Whether the notice may be about these rules."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Rules that could not be compared, or not repaired.

    `rules` None: it could not even be found out which rules there shall be.
    """

    rules: Rules | None
    error: FirewallError
    is_repair: bool = False

    @property
    def may_pass(self) -> bool:
        """Whether the next attempt may well succeed."""
        return isinstance(self.error, TimedOutError)


class Attempt:
    """What was found (in words) and repaired, and what failed.

    A tool that has hung once is not called again: it would hang for each table, and hold up a start for minutes.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.failures: list[Failure] = []
        self._hung: dict[str, FirewallError] = {}

    async def compare(self, every: Iterable[Rules]) -> list[tuple[Rules, Repair]]:
        """The rules that can be read, each with its repair, which is false where nothing differs.

        What cannot be read is a failure.  Of rules that shall be gone it is one only if the tool hung, or has found
        something that it cannot read; otherwise the tool or that kind of rules is missing, and they are gone.
        """
        compared: list[tuple[Rules, Repair]] = []
        for rules in every:
            try:
                self._check_tool(rules)
                compared.append((rules, await rules.compare()))
            except FirewallError as exc:
                if rules.desired or isinstance(exc, TimedOutError | UnreadableError):
                    self._fail(rules, exc)
                else:
                    log.debug("no rules to remove error=%s", exc)
        return compared

    async def repair(self, compared: Iterable[tuple[Rules, Repair]]) -> None:
        """Repair what differs."""
        for rules, repair in compared:
            if repair:
                try:
                    self._check_tool(rules)
                    await rules.apply(repair.script)
                    self.found += repair.findings
                except FirewallError as exc:
                    self._fail(rules, exc, is_repair=True)

    def _check_tool(self, rules: Rules) -> None:
        if rules.tool in self._hung:
            raise self._hung[rules.tool]

    def _fail(self, rules: Rules, error: FirewallError, *, is_repair: bool = False) -> None:
        if isinstance(error, TimedOutError):
            self._hung[rules.tool] = error
        self.failures.append(Failure(rules, error, is_repair))

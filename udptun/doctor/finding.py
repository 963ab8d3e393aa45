"""What the doctor says: findings, by how bad they are.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from udptun.core.errors import one_line


class Severity(IntEnum):
    """A greater one is worse."""

    NOTE = 1
    """Good to know; nothing has to be done."""
    WARNING = 2
    """Packets pass, and something will go wrong or goes wrong for some of them."""
    ERROR = 3
    """Packets of pods here do not pass, or will not after the next start."""

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.  `subject`: which file, device, peer or program; empty where the check says it.

    `cause` and `remedy` are one line each.
    """

    severity: Severity
    subject: str
    cause: str
    remedy: str

    def __post_init__(self) -> None:
        for field in ("subject", "cause", "remedy"):
            object.__setattr__(self, field, one_line(getattr(self, field)))

    @classmethod
    def of_line(cls, severity: Severity, line: str, subject: str = "") -> Finding:
        """From a problem line of the daemon, or a message: what is wrong, `; ` and what to do."""
        cause, _, remedy = line.partition("; ")
        return cls(severity, subject, cause, remedy or "docs/operations.md, Problem lines, says more")


class NotHereError(Exception):
    """The check cannot look from here, or there is nothing to look at; the text says why.  No fault of the host."""

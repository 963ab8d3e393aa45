"""Every failure that udptun reports.

A message says what was attempted, with what, what the system answered and what to do next.  It is one line.
"""

from __future__ import annotations

import errno as _errno

TYPE_CHECKING = False
"""As typing's, see commands/cli.py."""
if TYPE_CHECKING:
    from collections.abc import Iterable


_LONGEST_LINE = 2000
"""Characters.  What is quoted in a message may be a megabyte long."""


def one_line(text: str) -> str:
    """`text` as one line that cannot command a terminal: what is not printable is escaped, and the middle of
    what is too long is left out.

    Others write leases and configurations, and what is wrong with them is quoted in the log and by `udptun status`.
    """
    if len(text) > _LONGEST_LINE:
        # What was attempted stands at the beginning, and why it failed at the end.
        text = f"{text[: _LONGEST_LINE - 700]} ... {text[-600:]} ({len(text)} characters)"
    if text.isprintable():
        return text
    return one_line("".join(char if char.isprintable() else repr(char)[1:-1] for char in text))


class UdptunError(Exception):
    """Base of all; `exit_status` is what the command ends with when nobody handles it."""

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong."""
        return (str(self),)


class UsageError(UdptunError):
    """A flag, environment variable or combination of them that cannot be obeyed (exit status 2)."""

    exit_status = 2


class ConfigError(UdptunError):
    """A configuration that a person has to mend (exit status 2).

    Each of `problems` names its key; str() joins them with "; ".  `notes` are lines about what else is odd in it.
    """

    exit_status = 2

    def __init__(self, *problems: str, notes: Iterable[str] = ()) -> None:
        self._problems = tuple(map(one_line, problems))
        self.notes = tuple(notes)
        Exception.__init__(self, "; ".join(self._problems))

    @property
    def problems(self) -> tuple[str, ...]:
        return self._problems


class LeaseError(UdptunError):
    """A lease could not be had, kept or given back."""


class SubnetExhaustedError(LeaseError):
    """No free subnet is left between SubnetMin and SubnetMax (flannel: "out of subnets")."""


class LeaseLostError(LeaseError):
    """Our own lease is gone from the store or belongs to another node now."""


class BeginAgainError(UdptunError):
    """What the daemon was built upon is another one now, such as its subnet: it has to begin again."""


class StoreUnavailableError(LeaseError):
    """The store did not answer; the caller may retry."""


class KernelError(UdptunError):
    """The kernel refused an operation.  `errno` is the number of its answer, 0 when there was none."""

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        answer = _errno.errorcode.get(errno, str(errno)) if errno else "no reason given"
        super().__init__(f"{operation}: {answer}" + (f"; {hint}" if hint else ""))
        self.errno = errno


class FirewallError(UdptunError):
    """The firewall's rules could not be read or set."""


class DatapathError(UdptunError):
    """The datapath process could not be started, adopted or reached."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` for the one of `known` that looks like `word` in any letter case, else nothing."""
    import difflib  # only needed once something is wrong

    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1)
    return f"; did you mean {prefix}{by_fold[close[0]]}?" if close else ""

"""What can go wrong in a lab."""

from __future__ import annotations

import shlex
from subprocess import CompletedProcess

from udptun.core.errors import UdptunError


class LabError(UdptunError):
    """The lab could not be built, or was asked for something it does not have."""


class CommandError(LabError):
    """A command in the lab ended with another status than 0; `result` has its output."""

    def __init__(self, machine: str, result: CompletedProcess[str]) -> None:
        said = " / ".join(line for line in (result.stderr or result.stdout or "").splitlines() if line.strip())
        super().__init__(
            f"{machine}: `{shlex.join(result.args)}` ended with status {result.returncode}: {said or 'it said nothing'}"
        )
        self.result = result

"""Files of NAME=value lines, as shells, systemd and Docker read them.  Pure."""

from __future__ import annotations

import re

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")
_QUOTED = re.compile(r"""(['"])(.*?)\1(?:\s+#.*)?""")


def parse(text: str) -> dict[str, str]:
    """The variables that `text` sets.  Never raises: other lines are skipped, and the last of two lines counts.

    Quotes around a value, `export`, blanks and comments are allowed; nothing is expanded.
    """
    values: dict[str, str] = {}
    for line in text.splitlines():
        match = _ASSIGNMENT.fullmatch(line)
        if match is not None:
            quoted = _QUOTED.fullmatch(match[2])
            values[match[1]] = quoted[2] if quoted else re.sub(r"(^|\s)#.*", "", match[2])
    return values


def name_of(line: str) -> str:
    """The variable that the line sets; empty when it sets none."""
    match = _ASSIGNMENT.fullmatch(line.rstrip("\n"))
    return "" if match is None else match[1]

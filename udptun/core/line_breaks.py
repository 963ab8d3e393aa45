"""Text for a terminal: broken between words, and never within a command that somebody may want to copy.  Pure."""

from __future__ import annotations

import re
import textwrap

_JOINT = "\N{NO-BREAK SPACE}"
"""textwrap breaks at spaces of ASCII alone."""


def broken(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of `width` at most, all but the first behind `indent`; one at least.

    What stands in backticks stays on one line if it fits one.
    """

    def joined(code: re.Match[str]) -> str:
        # With whatever is written to the backticks, such as a comma.
        return code[0].replace(" ", _JOINT) if len(code[0]) <= width - len(indent) else code[0]

    text = re.sub(r"\S*`[^`]*`\S*", joined, text)
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace(_JOINT, " ") for line in lines] or [""]

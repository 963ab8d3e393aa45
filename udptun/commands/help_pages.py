"""What `--help` says, taken apart for completion and man pages.  Pure.

So both have what the help has: a command's flags and actions are named in one place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

_OPTION = re.compile(r" *(--?[A-Za-z][\w-]*(?:, --?[A-Za-z][\w-]*)*)(?: ([A-Z][\w|-]*))?(?:  +(\S.*))?")
_ACTION = re.compile(r"( {2}| {4})?([a-z][a-z-]*)  +(\S.*)")
_HEADING = re.compile(r"([A-Za-z]+(?: \w+)*):")
_OF_ARGPARSE = ("options", "positional arguments")


@dataclass(frozen=True, slots=True)
class Option:
    """`names` as `-d` or `--dir`; `value` is what stands for the value in the help, empty when there is none."""

    names: tuple[str, ...]
    value: str
    help: str
    topic: str

    @property
    def takes_file(self) -> bool:
        return self.value.endswith(("FILE", "PATH"))

    @property
    def takes_directory(self) -> bool:
        return self.value == "DIR"


@dataclass(slots=True)
class Page:
    """The help of one command, or of one action of it."""

    words: tuple[str, ...]
    """The command, and the action if there is one."""
    usage: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    """The lines between usage and options."""
    actions: dict[str, str] = field(default_factory=dict)
    """Their summaries."""
    options: list[Option] = field(default_factory=list)
    end: list[str] = field(default_factory=list)
    """The lines behind the options."""


Pages = Mapping[tuple[str, ...], Page]
"""By the words of each; that of the program has none."""


def read_pages(help_of: Callable[[tuple[str, ...]], str]) -> Pages:
    """The pages of the program, its commands and their actions; `help_of` answers what each says with --help."""
    pages: dict[tuple[str, ...], Page] = {}
    wanted: list[tuple[str, ...]] = [()]
    while wanted:
        words = wanted.pop(0)
        page = pages[words] = read_page(words, help_of(words))
        if len(words) < 2:
            wanted += [(*words, name) for name in page.actions]
    return pages


def read_page(words: tuple[str, ...], text: str) -> Page:
    """The page that `text` is."""
    page, lines = Page(words), text.splitlines()
    while lines and (lines[0].startswith(("usage: ", "       ")) or not lines[0]):
        if line := lines.pop(0).removeprefix("usage: ").strip():
            page.usage.append(line)
        elif page.usage:
            break
    command = " ".join(("udptun", *words))
    named = [match[1] for it in page.usage if (match := re.match(rf"{command} ([a-z][a-z|-]*)( |$)", it))]
    page.actions |= dict.fromkeys((name for it in named if "|" in it for name in it.split("|")), "")
    topic, needs_help = "", False
    for line in lines:
        option, action, heading = (it.fullmatch(line) for it in (_OPTION, _ACTION, _HEADING))
        if option:
            page.options.append(Option(tuple(option[1].split(", ")), option[2] or "", option[3] or "", topic))
            needs_help = not option[3]
        elif needs_help and line.strip():
            page.options[-1] = replace(page.options[-1], help=line.strip())
            needs_help = False
        elif heading:
            topic = "" if heading[1] in _OF_ARGPARSE else heading[1]
        else:
            if action and (action[1] or action[2] in named):
                page.actions[action[2]] = action[3]
            (page.end if page.options else page.text).append(line)
    return page

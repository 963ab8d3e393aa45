"""`udptun man`: manual pages, made of what --help says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from udptun import __version__
from udptun.commands.help_pages import Option, Page, Pages, read_pages
from udptun.core.errors import UdptunError, UsageError

USAGE = """\
usage: udptun man [COMMAND [ACTION]]
       udptun man --all DIR

Print the manual page of the program or of a command, or write all of them to DIR.  To read one without installing it:

    udptun man daemon | man -l -

  --all DIR  write udptun.8 and a page for each command to DIR, such as /usr/share/man/man8
"""

_STATUS = ("done, or stopped as asked", "failed", "a person has to mend a flag or the configuration")
"""What 0, 1 and 2 mean where a command has no meaning of its own for them."""
_OF_DOCTOR = (
    "nothing is wrong, or there are notes alone",
    "warnings, or the command failed",
    "errors, or a flag is wrong",
)
_OF_MESH = ("nothing is wrong", "something is, or no daemon answers", "a word or a flag is wrong")
_STATUS_OF = {
    (): (*_STATUS[:2], f"{_STATUS[2]}; the pages of doctor, trace, mesh, health and config say what each means there"),
    ("doctor",): _OF_DOCTOR,
    ("lab", "doctor"): _OF_DOCTOR,
    ("mesh",): _OF_MESH,
    ("lab", "mesh"): _OF_MESH,
    ("trace",): (
        "the packet would be delivered; --live: so many packets have come, or somebody has pressed Ctrl-C",
        "it would be dropped, or is not the tunnel's; --live: the time is over; or no daemon answers",
        "a word or a flag is wrong",
    ),
    ("health",): ("all is well", "it is not, or no daemon answers", "a flag is wrong"),
    ("config",): (
        "done; check: the file is good",
        "failed; check: warnings",
        f"{_STATUS[2]}; check: the daemon would refuse the file",
    ),
    ("config", "check"): (
        "the file is good",
        "warnings, as of keys that have no effect",
        "the daemon would refuse the file, or a flag is wrong",
    ),
}


def run(argv: Sequence[str], help_of: Callable[[tuple[str, ...]], str]) -> int:
    """Print a page, or write all; `help_of` as in `read_pages`.  Raises UdptunError."""
    if {"-h", "--help", "-help"}.intersection(argv):
        print(USAGE, end="")
        return 0
    pages = read_pages(help_of)
    if argv[:1] == ["--all"]:
        if len(argv) != 2:
            raise UsageError("man: --all needs a DIR")
        for page in own_pages(pages):
            path = Path(argv[1]) / file_name(page)
            try:
                path.write_text(manual(pages, page))
            except OSError as exc:
                raise UdptunError(f"cannot write {path}: {exc.strerror}") from exc
        return 0
    named = pages.get(tuple(argv))
    if named is None:
        raise UsageError(f"man: there is no command {' '.join(argv)} (udptun --help lists the commands)")
    print(manual(pages, named), end="")
    return 0


def file_name(page: Page) -> str:
    """What the page is called where manual pages lie."""
    return f"{_name(page)}.8"


def own_pages(pages: Pages) -> list[Page]:
    """Those that say something of their own: some actions have the help of their command."""
    return [it for words, it in pages.items() if not words or it.usage != pages[words[:-1]].usage]


def manual(pages: Pages, page: Page) -> str:
    """The page for man(1), in the macros of man(7)."""
    lines = [
        f'.TH "{_name(page).upper()}" 8 "" "udptun {__version__}" "udptun"',
        ".SH NAME",
        f"{_text(_name(page))} \\- {_text(_summary(pages, page))}",
        ".SH SYNOPSIS",
        *_as_it_is(page.usage),
        ".SH DESCRIPTION",
        *_as_it_is(_stripped(page.text)),
    ]
    topic = None
    for option in page.options:
        if option.topic != topic:
            topic = option.topic
            lines.append(f'.SH "{_text(topic).upper()}"' if topic else ".SH OPTIONS")
        lines += _option(option)
    if end := _stripped(page.end):
        lines += [".SH NOTES", *map(_text, end)]
    lines.append(".SH EXIT STATUS")
    for status, meaning in enumerate(_STATUS_OF.get(page.words, _STATUS)):
        lines += [".TP", f".B {status}", _text(meaning)]
    others = [it for it in own_pages(pages) if it is not page]
    lines += [".SH SEE ALSO", *(f".BR {_text(_name(it))} (8){',' * (it is not others[-1])}" for it in others)]
    return "\n".join(lines) + "\n"


def _name(page: Page) -> str:
    return "-".join(("udptun", *page.words))


def _summary(pages: Pages, page: Page) -> str:
    if not page.words:
        return "flannel-compatible overlay daemon with a userspace UDP tunnel"
    return pages[page.words[:-1]].actions[page.words[-1]] or "see the description"


def _option(option: Option) -> Iterator[str]:
    value = f" \\fI{_text(option.value)}\\fR" if option.value else ""
    yield ".TP"
    yield ", ".join(f"\\fB{_text(name)}\\fR" for name in option.names) + value
    yield _text(option.help) or "\\&"


def _stripped(lines: list[str]) -> list[str]:
    """Without empty lines at both ends."""
    return "\n".join(lines).strip("\n").splitlines()


def _as_it_is(lines: list[str]) -> list[str]:
    return [".nf", *map(_text, lines), ".fi"]


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped

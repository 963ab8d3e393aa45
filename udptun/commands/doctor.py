"""`udptun doctor`: what is wrong on this host, and what to do about it.  It changes nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from udptun.commands.status import fetch
from udptun.commands.terminal import has_colours, size_of
from udptun.config.command_flags import DoctorRequest, doctor_help, flags_of_flanneld, parse_doctor_flags
from udptun.config.flags import Options
from udptun.core.errors import UdptunError
from udptun.doctor.checks import Examination, examine
from udptun.doctor.daemon import find_pid
from udptun.doctor.facts import gather
from udptun.doctor.processes import daemon_words, environment_of, words_of
from udptun.doctor.report import as_json, as_text

USAGE = """\
usage: udptun doctor [--json] [-v | --all] [FLAG...]

Look at this host for what goes wrong in the field, and say what to do.  Exit status 0: nothing wrong, 1: warnings,
2: errors.  It changes nothing, and works without a daemon and in its container too.  See docs/doctor.md.
-v is --all.  Flags of a daemon that runs here and can be seen need not be given.

"""


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns 0, 1 or 2 as the usage says.  Raises UsageError."""
    # The daemon's -v takes a level, which is nothing to us.
    with_all = "-v" in argv
    request = parse_doctor_flags([word for word in argv if word != "-v"], environ)
    if request.options.help:
        print(USAGE + doctor_help())
        return 0
    pid = find_pid(request.options.run_dir)
    if pid is not None:
        request = _with_the_daemons(pid, argv, environ) or request
    found = asyncio.run(_look(request, pid))
    if request.json:
        print(as_json(found))
    else:
        is_terminal = sys.stdout.isatty()
        width = size_of(1)[0] if is_terminal else None
        with_colour = is_terminal and has_colours(environ)
        print(as_text(found, with_all=with_all or request.all, with_colour=with_colour, width=width), end="")
    return found.exit_status


async def _look(request: DoctorRequest, pid: int | None) -> Examination:
    document, silence, options = None, "", request.options
    try:
        document = json.loads(fetch(options.run_dir))
    except UdptunError as exc:
        silence = str(exc)
    return await examine(await gather(request, document, silence, lambda: _ask(options), pid))


def _ask(options: Options) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(fetch(options.run_dir))
    except UdptunError:
        return None
    return document


def _with_the_daemons(pid: int, argv: Sequence[str], environ: Mapping[str, str]) -> DoctorRequest | None:
    """The flags of the daemon, with ours behind them; None when they cannot be read."""
    said = daemon_words(words_of(pid))
    if said is None:
        return None
    as_flanneld, words = said
    ours = [word for word in argv if word != "-v"]
    try:
        if as_flanneld:
            words = flags_of_flanneld(words)
        return parse_doctor_flags([*words, *ours], environment_of(pid) or environ, as_flanneld=as_flanneld)
    except UdptunError:
        return None

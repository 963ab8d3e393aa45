"""argparse, for the commands that have few arguments; the daemon's flags are read by Go's rules instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from udptun.core.daemon_socket import DEFAULT_RUN_DIR
from udptun.core.errors import UsageError


def subnet_or_address(text: str) -> str:
    """The same text, for `type` of an argument."""
    from udptun.core.ip_text import ip_network

    try:
        ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no subnet, as 10.244.3.0/24, and no address") from None
    return text


def seconds_up_to(most: int) -> Callable[[str], float]:
    """For `type` of an argument: seconds, from 0.1."""

    def read(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to {most}")
        return seconds

    return read


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, and no guessing at abbreviations."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})  # type: ignore[arg-type]  # argparse's own settings

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('udptun ')}: {message}")

    def add_run_dir(self, environ: Mapping[str, str]) -> None:
        """--run-dir, of a command that asks the daemon."""
        self.add_argument(
            "--run-dir",
            type=Path,
            default=Path(environ.get("FLANNELD_RUN_DIR") or DEFAULT_RUN_DIR),
            metavar="DIR",
            help="the daemon's --run-dir (default: FLANNELD_RUN_DIR, else %(default)s)",
        )

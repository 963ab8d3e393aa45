"""argparse, for the commands that have few arguments; the daemon's flags are read by Go's rules instead."""

from __future__ import annotations

import argparse
from typing import NoReturn

from udptun.core.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, and no guessing at abbreviations."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})  # type: ignore[arg-type]  # argparse's own settings

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('udptun ')}: {message}")

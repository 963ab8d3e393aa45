"""`udptun` as on Linux 5.10, which is too old for the shortcut."""

from __future__ import annotations

import os

_uname = os.uname()


def uname() -> os.uname_result:
    """In the place of `os.uname`."""
    return os.uname_result((*_uname[:2], "5.10.0-test", *_uname[3:]))


os.uname = uname

from udptun.commands.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

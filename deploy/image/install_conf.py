#!/usr/bin/python3 -I
"""`/opt/bin/install-conf SRC DST`, as flannel's manifest calls it: make DST what SRC is, in one step.

A runtime that reads DST meanwhile finds the old file or the new one, and so does a boot after a power failure.
"""

import os
import sys
from pathlib import Path

from udptun.cni.install import replace


def main(source: str, target: str) -> None:
    """Raises OSError; the old file is then untouched."""
    with Path(source).open("rb") as file:
        content, mode = file.read(), os.fstat(file.fileno()).st_mode & 0o777
    replace(target, content, mode)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: install-conf SRC DST")
    try:
        main(*sys.argv[1:])
    except OSError as exc:
        sys.exit(f"install-conf: cannot install {sys.argv[2]}: {exc.filename}: {exc.strerror}")

"""`udptun` as on a kernel without tcx, which is one before 6.6: attaching a program says EINVAL there."""

from __future__ import annotations

import errno

from udptun.core.errors import KernelError
from udptun.kernel import bpf


def attach(*_where: object) -> int:
    """In the place of `bpf.attach`."""
    raise KernelError("cannot attach a BPF program", errno.EINVAL)


bpf.attach = attach

from udptun.commands.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

"""A pytest plugin for a machine that is emulated: whatever the lab waits for may take ten times as long."""

from __future__ import annotations

from collections.abc import Callable

from udptun.lab import machine
from udptun.lab.host import Host
from udptun.lab.topology import Lab

_TIMES = 10
_wait_until = machine.wait_until


def wait_until(what: str, condition: Callable[[], object], timeout: float) -> None:
    """In the place of `machine.wait_until`."""
    _wait_until(what, condition, _TIMES * timeout)


machine.wait_until = wait_until
for function in (Host.wait_ready, Lab.start):
    (limit_s,) = function.__defaults__ or ()
    function.__defaults__ = (_TIMES * limit_s,)

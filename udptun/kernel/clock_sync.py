"""Whether something keeps this host's clock in time: an NTP daemon tells the kernel how far off it may be."""

from __future__ import annotations

import ctypes
import os

_STA_UNSYNC = 0x40
"""Of `status` (linux/timex.h): the clock may be off by 16 s and more, as nobody has said otherwise for hours."""


class _Timex(ctypes.Structure):
    """The beginning of struct timex, and more room than the rest takes."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def is_clock_synchronised() -> bool:
    """By adjtimex(2), which needs no rights to look.  Raises OSError."""
    asked = _Timex()
    if _libc.adjtimex(ctypes.byref(asked)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return not asked.status & _STA_UNSYNC

"""Where the daemon of a host answers, for itself and for the commands that ask it.  Pure."""

from __future__ import annotations

DEFAULT_RUN_DIR = "/run/udptun"
"""Where the socket is unless --run-dir says otherwise."""

SOCKET_NAME = "udptun.sock"
"""Speaks HTTP; `udptun status` asks there."""

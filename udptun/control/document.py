"""What the daemon says of itself (docs/status.md, schema 1).  Keys are only ever added."""

SCHEMA = 1
SOCKET_NAME = "udptun.sock"
"""In the run directory; speaks HTTP."""

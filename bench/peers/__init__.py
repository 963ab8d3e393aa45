"""Tunnels to compare with that need no installation.  Each is a program, which bench.paths starts."""

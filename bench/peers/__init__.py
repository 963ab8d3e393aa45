"""Tunnels to compare with that nobody has to install: programs of their own, which bench.paths starts."""

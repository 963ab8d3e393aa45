"""The words that hosts exchange about the mesh: docs/mesh.md.  Pure."""

from __future__ import annotations

PATH = "/mesh"
SCHEMA = 1
"""Of a host's view.  Keys are only ever added."""
MOST_PEERS = 1000
"""So many peers a view has at most."""

FOUND = ("liveness", "rtt_ms", "rtt_age_s", "path_mtu", "probes_sent", "probes_lost")
"""What a view says of a way, by the names that the status document has it by.  With it comes `mtu`."""

"""What was found out about the peers, in a file for the next daemon: otherwise it would have to find all of it anew.

In the run directory, which outlives a daemon however it ends and an upgrade to any build, and goes when the host boots.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from udptun.core import atomic_file
from udptun.core.ip_text import ip_network
from udptun.core.network_state import IPNetwork
from udptun.probing.liveness import Liveness

log = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Known:
    """About a peer, which is another one where `place` is another.

    `path_mtu`: how long packets to it may be, bytes, as measured; None: not known.  `heard_s`: when it was last heard,
    for one that is dead (CLOCK_MONOTONIC).
    """

    place: str
    liveness: Liveness
    path_mtu: int | None
    heard_s: float = 0.0


class Memory:
    """The file at `path`, which one daemon at a time reads and writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_well = True

    def load(self) -> tuple[int, dict[IPNetwork, Known]]:
        """How long packets may be by the device, and what was known; 0 and nothing when there is no usable file."""
        try:
            return _parse(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            if not isinstance(exc, FileNotFoundError):
                log.warning("what was known of peers is found out anew, cannot use %s: %r", self._path, exc)
            return 0, {}

    def save(self, full: int, known: Mapping[IPNetwork, Known]) -> None:
        """Replace it.  A failure is told once, until it succeeds again."""
        peers = {str(subnet): [it.place, it.liveness.value, it.path_mtu, it.heard_s] for subnet, it in known.items()}
        try:
            atomic_file.replace(self._path, json.dumps({"version": _VERSION, "full": full, "peers": peers}))
        except OSError as exc:
            if self._is_well:
                log.warning("the next daemon will not know which peers are alive and which paths narrow: %s", exc)
            self._is_well = False
        else:
            self._is_well = True


def _parse(text: str) -> tuple[int, dict[IPNetwork, Known]]:
    """Raises ValueError, TypeError, KeyError or AttributeError."""
    document = json.loads(text)
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']}")
    full = document["full"]
    found = {}
    for subnet, (place, liveness, path_mtu, heard_s) in document["peers"].items():
        if type(path_mtu) not in (int, type(None)) or not isinstance(place, str) or not math.isfinite(heard_s):
            raise ValueError(f"the entry of {subnet}")
        found[ip_network(subnet)] = Known(place, Liveness(liveness), path_mtu, float(heard_s))
    if type(full) is not int:
        raise ValueError("full")
    return full, found

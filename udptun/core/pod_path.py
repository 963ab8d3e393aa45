"""Where packets between the pods of this host and those of other hosts pass.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network


@dataclass(frozen=True, slots=True)
class PodPath:
    """`network` is the whole overlay, `subnet` this host's part of it.  `device` names the link to the other hosts."""

    network: IPv4Network
    subnet: IPv4Network
    device: str

"""Where packets between the pods of this host and those of other hosts pass.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from udptun.core.family import Family
from udptun.core.network_state import IPNetwork


@dataclass(frozen=True, slots=True)
class PodPath:
    """Of one address family.  `network` is the whole overlay, `subnet` this host's part of it.

    `device` names the link to the other hosts.
    """

    network: IPNetwork
    subnet: IPNetwork
    device: str

    @property
    def family(self) -> Family:
        return Family(self.network.version)

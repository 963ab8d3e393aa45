"""The two address families."""

from __future__ import annotations

from enum import Enum


class Family(Enum):
    """An address family; the value is the version number of IP."""

    IPV4 = 4
    IPV6 = 6

    @property
    def bits(self) -> int:
        """The length of an address, bits."""
        return 32 if self is Family.IPV4 else 128

    @property
    def all_ones(self) -> int:
        """The last address as a number."""
        return (1 << self.bits) - 1

    @property
    def nft_name(self) -> str:
        """What nft calls a table of this family, and the header of its packets."""
        return "ip" if self is Family.IPV4 else "ip6"

    def __str__(self) -> str:
        return f"IPv{self.value}"

"""The datapath's checks in the words of `udptun trace`, in the order of docs/wire-format.md.  Pure.

A traced packet is a whole one with right headers, so the rows about those are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """`words` say what holds of a packet that passes.  The first of `counters` is what one ends in that does not.

    The others are those of the same check by another family.
    """

    words: str
    counters: tuple[str, ...]


ENCAP = (
    Check("its family is carried here", ("encap_drop_ipv6", "encap_drop_malformed")),
    Check("it is no datagram of the tunnel itself", ("encap_drop_loop",)),
    Check("a host leases the destination", ("encap_drop_no_route",)),
    Check("that host is not dead", ("encap_drop_dead",)),
    Check("TTL or hop limit is at least 2", ("encap_drop_ttl",)),
    Check("it is not too long for the host, or may be fragmented", ("encap_drop_too_big",)),
)
"""Of a packet that the device gives."""

SEND = Check("the kernel sends the datagram", ("encap_drop_send", "encap_drop_too_big"))
"""The kernel's, after those."""

DECAP = (
    Check("its family is carried here", ("decap_drop_ipv6", "decap_drop_version")),
    Check("its datagram comes from a host, or SourceCheck is off", ("decap_drop_unknown_peer",)),
    Check("its source is an address that somebody can have", ("decap_drop_source_martian",)),
    Check("its source is not this host's", ("decap_drop_source_own",)),
    Check("its source is the sending host's, where that is asked", ("decap_drop_source_spoofed",)),
    Check("its source lies in Network, or SourceCheck is not strict", ("decap_drop_source_outside",)),
    Check("its destination lies in this host's subnet", ("decap_drop_foreign_destination",)),
    Check("it is no datagram of the tunnel itself", ("decap_drop_loop",)),
    Check("TTL or hop limit is at least 2", ("decap_drop_ttl",)),
    Check("it is no longer than the MTU", ("decap_drop_oversize",)),
)
"""Of a packet that a peer sends."""


def outcomes(
    checks: Sequence[Check], counter: str, facts: Mapping[str, str], *, is_reached: bool = True
) -> list[dict[str, Any]]:
    """Each check, and whether a packet that ends in `counter` passes it; None where it is not reached.

    `is_reached`: the first of them is.  `facts`: what there is to say of those that are, by the first counter of each.
    """
    found: list[dict[str, Any]] = []
    passed: bool | None = True if is_reached else None
    for it in checks:
        if passed and counter in it.counters:
            passed = False
        ends = counter if passed is False else it.counters[0]
        fact = "" if passed is None else facts.get(it.counters[0], "")
        found.append({"check": it.words, "passed": passed, "counter": ends, "fact": fact})
        passed = None if passed is False else passed
    return found

"""Datagrams that come from another address than the lease of their inner source says, and what is remembered of them.

The operator is told from it; the counters are test_equivalence.py's matter.
"""

from __future__ import annotations

import random
import socket
import struct
import time

from tests.datapath.harness import FastDatapath, skip_unless_built
from tests.packets import (
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    OUTSIDE,
    OUTSIDE6,
    POD,
    POD6,
    STRANGER,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_OTHER_POD6,
    TWIN_POD,
    vxlan,
)
from tests.packets import udp as udp_packet

_IP_PKTINFO = 8


def noted(fast: FastDatapath, since_s: float = 0) -> dict[tuple[str, str], int]:
    """Outer and inner source, and how many datagrams."""
    return {(str(it.outer), str(it.inner)): it.datagrams for it in fast.strays(since_s)}


def test_strays_are_noted_by_outer_source_and_peer_most_datagrams_first(fast: FastDatapath) -> None:
    other = "127.9.9.9"
    fast.decap_batch([(udp_packet(NEAR_POD, POD), STRANGER)] * 3 + [(udp_packet(NARROW_POD, POD), STRANGER)] * 2)
    fast.decap_batch([(udp_packet("10.244.2.77", POD), STRANGER)])
    fast.decap_batch([(udp_packet(TWIN_POD, POD), other), (udp_packet(TWIN_OTHER_POD, POD), other)])
    of_other = {(other, TWIN_POD): 1, (other, TWIN_OTHER_POD): 1}
    assert noted(fast) == {(STRANGER, "10.244.2.77"): 4, (STRANGER, NARROW_POD): 2} | of_other
    assert [it.datagrams for it in fast.strays()] == [4, 2, 1, 1]


def test_a_stray_may_come_from_the_address_of_another_peer(fast: FastDatapath) -> None:
    """So it is where a host of the overlay is the router of others, and hides their addresses behind its own."""
    fast.decap_batch([(udp_packet(NEAR_POD, POD), TWIN)] * 2)
    assert noted(fast) == {(TWIN, NEAR_POD): 2}


def test_strays_of_both_families_are_told_apart() -> None:
    """Those of one host have two peers, one for each family."""
    skip_unless_built()
    with FastDatapath(has_ipv6=True) as fast:
        fast.decap_batch([(udp_packet(NEAR_POD6, POD6), STRANGER)] * 3 + [(udp_packet(NEAR_POD, POD), STRANGER)])
        fast.decap_batch([(udp_packet(TWIN_OTHER_POD6, POD6), NEAR), (udp_packet(OUTSIDE6, POD6), STRANGER)])
        of_one_host = {(STRANGER, NEAR_POD6): 3, (STRANGER, NEAR_POD): 1}
        assert noted(fast) == of_one_host | {(NEAR, TWIN_OTHER_POD6): 1}


def test_nothing_is_noted_of_what_no_peer_leases_or_is_dropped_for_another_reason(fast: FastDatapath) -> None:
    fast.decap_batch(
        [
            (udp_packet(OUTSIDE, POD), STRANGER),
            (udp_packet(NEAR_POD, POD), NEAR),
            (udp_packet(NEAR_POD, OUTSIDE), NEAR),
            (udp_packet(NEAR_POD, POD)[:27], STRANGER),
            (b"", STRANGER),
        ]
    )
    fast.configure(source_check="off")
    fast.decap_batch([(udp_packet(NEAR_POD, POD), STRANGER)])
    assert noted(fast) == {}


def test_strays_of_before_are_left_out(fast: FastDatapath) -> None:
    fast.decap_batch([(udp_packet(NEAR_POD, POD), STRANGER)])
    assert noted(fast, time.monotonic() - 5) == {(STRANGER, NEAR_POD): 1}
    assert noted(fast, time.monotonic() + 5) == {}


def test_a_flood_of_spoofed_sources_neither_hides_a_peer_nor_drives_it_out(fast: FastDatapath) -> None:
    """All of them claim inner sources that peers lease.  One datagram in 500 is the peer's."""
    flood = Flood(fast)
    flood.send(100)
    # It comes in while all slots are taken by others, and has not more than its share of luck.
    for _ in range(100):
        flood.send(20 * 500, real_every=500)
        if (STRANGER, NEAR_POD) in noted(fast):
            break
    assert (STRANGER, NEAR_POD) in noted(fast)
    # Once it has come in, it stays, and every datagram is counted.
    flood.send(20_000, real_every=500)
    before = noted(fast)[STRANGER, NEAR_POD]
    flood.send(50_000, real_every=500)
    assert noted(fast)[STRANGER, NEAR_POD] == before + 100
    assert len(noted(fast)) <= 64


class Flood:
    """Datagrams to the worker, each from another address of 127/8 with the inner source of some peer's pod."""

    def __init__(self, fast: FastDatapath) -> None:
        self._fast = fast
        self._random = random.Random(7)
        self._socket = fast.socket_of_any_source()
        self._wrap = vxlan if fast.table.vtep else bytes

    def send(self, n: int, real_every: int = 0) -> None:
        """`n` datagrams; one in `real_every` is from STRANGER and of NEAR_POD."""
        near = self._wrap(udp_packet(NEAR_POD, POD))
        pods = [self._wrap(udp_packet(pod, POD)) for pod in (NEAR_POD, NARROW_POD, TWIN_POD)]
        for i in range(n):
            source, payload = f"127.{self._random.randrange(10, 250)}.{i >> 8 & 255}.{i & 255}", pods[i % 3]
            if real_every and i % real_every == 0:
                source, payload = STRANGER, near
            info = struct.pack("=i4s4s", 0, socket.inet_aton(source), bytes(4))
            self._socket.sendmsg([payload], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, self._fast.udp.getsockname())
            if i % 64 == 63:
                self._fast.turn()
        while self._fast.turn():
            pass

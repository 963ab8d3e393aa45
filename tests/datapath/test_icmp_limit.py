"""The token bucket of the fast path: 1,000 ICMP answers a second, 50 at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.datapath.harness import DEADLINE_S, ICMP_BURST, FastDatapath, skip_unless_built
from tests.packets import NEAR, NEAR_POD, NO_VNET_HDR, OUTSIDE, POD, UNLEASED, udp

ICMP_PER_S = 1000
N = 150

UNROUTABLE = NO_VNET_HDR + udp(POD, UNLEASED)
EXPIRED = udp(NEAR_POD, POD, ttl=1)


@pytest.fixture
def limited(is_vxlan: bool) -> Iterator[FastDatapath]:
    """The fast path with one worker, and so one bucket, for the whole test."""
    skip_unless_built()
    with FastDatapath(is_bucket_renewed=False, is_vxlan=is_vxlan) as datapath:
        yield datapath


@pytest.mark.parametrize("direction", ["encap", "decap"])
def test_icmp_answers_stop_when_the_bucket_is_empty(limited: FastDatapath, direction: str) -> None:
    began = time.monotonic()
    if direction == "encap":
        batch = limited.encap_batch([UNROUTABLE] * N)
        assert len(batch.writes) == batch.counts["icmp_sent"]
    else:
        batch = limited.decap_batch([(EXPIRED, NEAR)] * N)
        assert sum(map(len, batch.sends.values())) == batch.counts["icmp_sent"]
    earned = (time.monotonic() - began) * ICMP_PER_S
    sent, suppressed = batch.counts["icmp_sent"], batch.counts.get("icmp_suppressed", 0)
    assert sent + suppressed == N
    assert ICMP_BURST <= sent <= ICMP_BURST + earned + 1


def test_icmp_answers_come_again_when_tokens_have(limited: FastDatapath) -> None:
    empty_the_bucket(limited)
    deadline = time.monotonic() + DEADLINE_S
    while limited.encap(UNROUTABLE).icmp != "icmp_sent":
        assert time.monotonic() < deadline


def test_packets_that_may_not_be_answered_take_no_token(limited: FastDatapath) -> None:
    ineligible = [NO_VNET_HDR + udp("127.0.0.1", UNLEASED)] * N
    assert limited.encap_batch(ineligible).counts["icmp_suppressed"] == N
    assert limited.decap_batch([(udp(OUTSIDE, POD, ttl=1), NEAR)] * N).counts["icmp_suppressed"] == N
    batch = limited.encap_batch([UNROUTABLE] * ICMP_BURST)
    assert batch.counts["icmp_sent"] == ICMP_BURST


def empty_the_bucket(datapath: FastDatapath) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while datapath.encap_batch([UNROUTABLE] * ICMP_BURST).counts.get("icmp_suppressed", 0) == 0:
        assert time.monotonic() < deadline

"""What membership decides, each decision by itself: no store, no task, and time is an argument."""

from __future__ import annotations

import logging
import math
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from udptun.core.clock import Clock
from udptun.core.errors import LeaseLostError
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, Subnets
from udptun.membership.doubles import PROOF_S, Clones, Doubles
from udptun.membership.grace import GRACE_S, Grace
from udptun.membership.identity import Identity, Node
from udptun.membership.lease_clock import LeaseClock
from udptun.membership.other_types import OtherTypes
from udptun.membership.own import RENEW_RETRY_S, renewal_due_in_s, retry_in_s
from udptun.membership.skipped import Skipped
from udptun.stores.base import SubnetChoice

OURS, OTHERS = "1" * 32, "2" * 32
ME = Identity(IPv4Address("192.0.2.1"), 8285, OURS)


def lease(subnet: str, ip: str, node_id: str | None = None, expires_s: float | None = None) -> Lease:
    data = {"Port": 8285, "NodeID": node_id} if node_id else None
    return Lease(Subnets(IPv4Network(subnet)), LeaseAttrs(IPv4Address(ip), backend_data=data), expires_s)


OWN = lease("10.244.3.0/24", "192.0.2.1", OURS)
DOUBLES = lease("10.244.3.0/24", "192.0.2.1", OTHERS)
"""Of another node with our address."""


def removed(it: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.REMOVED, it)


def added(it: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.ADDED, it)


# --- when our lease is written


def test_renewal_is_due_a_margin_before_the_lease_expires_and_never_for_a_reservation() -> None:
    assert renewal_due_in_s(lease("10.244.3.0/24", "192.0.2.1", expires_s=1000), 300, 600) == 100
    assert renewal_due_in_s(lease("10.244.3.0/24", "192.0.2.1", expires_s=1000), 300, 800) == -100
    assert renewal_due_in_s(OWN, 300, 600) == math.inf


def test_urgent_write_is_retried_after_ever_longer_waits_and_another_after_a_minute() -> None:
    waits = [0.0]
    for _ in range(8):
        waits.append(retry_in_s(waits[-1], is_urgent=True))
    assert waits[1:] == [1, 2, 4, 8, 16, 32, RENEW_RETRY_S, RENEW_RETRY_S]
    assert retry_in_s(0.0, is_urgent=False) == RENEW_RETRY_S


# --- two hosts with one address or one NodeID


def test_own_lease_may_be_taken_back_from_a_double_once_in_a_while() -> None:
    doubles, node = Doubles(ME, Path("/state")), ME.node_of(DOUBLES)
    assert doubles.may_take_back(node, 1000)
    doubles.took_back(node, OWN, 1000)
    assert not doubles.may_take_back(node, 1000 + PROOF_S - 1)
    assert doubles.may_take_back(node, 1000 + PROOF_S)
    assert not doubles.may_take_back(Node(IPv4Address("192.0.2.9"), 8285, OTHERS), 1000), "no double of us"


def test_lease_that_we_took_over_is_never_taken_back() -> None:
    doubles = Doubles(ME, Path("/state"))
    doubles.took_over([DOUBLES], OWN)
    assert not doubles.may_take_back(ME.node_of(DOUBLES), 1e9)
    with pytest.raises(LeaseLostError, match=rf"which we took over, is 192\.0\.2\.1:8285 \(node {OTHERS}\)'s again"):
        doubles.choose_again(OWN, [DOUBLES], 1e9)


@pytest.mark.parametrize(
    "there",
    [
        [],
        [OWN],
        [lease("10.244.3.0/24", "192.0.2.1")],
        [DOUBLES],
        [lease("10.244.3.0/24", "192.0.2.9", OURS)],
        [lease("10.244.4.0/24", "192.0.2.9", OTHERS)],
    ],
    ids=["gone", "ours", "flannel's at our address", "double", "clone", "another subnet"],
)
def test_own_subnet_is_chosen_again_while_nobody_else_may_have_it(there: list[Lease]) -> None:
    assert Doubles(ME, Path("/state")).choose_again(OWN, there, 0) == SubnetChoice(OWN.subnets)


@pytest.mark.parametrize("subnet", ["10.244.3.0/24", "10.244.3.0/25", "10.244.0.0/16"])
def test_own_subnet_is_lost_to_a_stranger_whose_lease_overlaps_it(subnet: str) -> None:
    with pytest.raises(LeaseLostError, match=rf"10\.244\.3\.0/24 is leased to 192\.0\.2\.9 \(node {OTHERS}\) now"):
        Doubles(ME, Path("/state")).choose_again(OWN, [lease(subnet, "192.0.2.9", OTHERS)], 0)


def test_lease_of_ours_from_before_we_moved_is_no_peers() -> None:
    doubles = Doubles(ME, Path("/state"))
    assert doubles.is_own(lease("10.244.9.0/24", "192.0.2.1", OURS), OWN.subnets)
    assert doubles.is_own(lease("10.244.3.0/24", "192.0.2.9", OURS), OWN.subnets)
    assert not doubles.is_own(lease("10.244.9.0/24", "192.0.2.9", OURS), OWN.subnets)
    assert not doubles.is_own(lease("10.244.3.0/24", "192.0.2.9", OTHERS), OWN.subnets)


def test_clone_has_a_line_until_its_lease_goes_or_is_anothers() -> None:
    clones = Clones(Doubles(ME, Path("/state")))
    clone = lease("10.244.9.0/24", "192.0.2.9", OURS)
    clones.see(added(lease("10.244.8.0/24", "192.0.2.8", OTHERS)))
    assert not clones.lines
    clones.see(added(clone))
    assert list(clones.lines) == [clone.key]
    clones.see(added(lease("10.244.9.0/24", "192.0.2.9", OTHERS)))
    assert not clones.lines
    clones.see(added(clone))
    clones.see(removed(clone))
    assert not clones.lines


# --- a moment of grace


PEER, OTHER_PEER = lease("10.244.20.0/24", "192.0.2.20"), lease("10.244.21.0/24", "192.0.2.21")


def test_removal_of_a_peer_is_held_back_and_any_other_event_is_not() -> None:
    grace, peers = Grace(), {PEER.key}
    events = [removed(PEER), removed(OTHER_PEER), added(OTHER_PEER)]
    assert grace.hold_back(events, peers.__contains__, 100) == events[1:]
    assert len(grace) == 1
    assert grace.next_end_s() == 100 + GRACE_S
    assert grace.pop_ended(100, 10) == []
    assert grace.pop_ended(100 + GRACE_S, 10) == [PEER.key]
    assert not grace
    assert grace.next_end_s() == math.inf


def test_peer_whose_lease_is_back_is_kept_and_a_second_removal_begins_anew() -> None:
    grace, peers = Grace(), {PEER.key}
    grace.hold_back([removed(PEER)], peers.__contains__, 100)
    assert grace.hold_back([added(PEER)], peers.__contains__, 100.1) == [added(PEER)]
    assert not grace
    grace.hold_back([removed(PEER)], peers.__contains__, 200)
    grace.hold_back([removed(PEER)], peers.__contains__, 200.2)
    assert grace.next_end_s() == 200 + GRACE_S


def test_snapshot_gives_grace_to_the_peers_it_lacks_and_takes_it_from_those_it_has() -> None:
    grace = Grace()
    grace.hold_back([removed(PEER), removed(OTHER_PEER)], {PEER.key, OTHER_PEER.key}.__contains__, 100)
    grace.restart([PEER.key, "10.244.22.0-24"], 100.2)
    assert grace.pop_ended(100 + GRACE_S, 10) == [PEER.key]
    assert grace.pop_ended(100.2 + GRACE_S, 10) == ["10.244.22.0-24"]


def test_peers_whose_grace_is_over_come_a_few_at_a_time() -> None:
    grace = Grace()
    grace.restart([str(number) for number in range(10)], 0)
    assert [len(grace.pop_ended(GRACE_S, 4)) for _ in range(4)] == [4, 4, 2, 0]


# --- a clock that is set


class FixedClock(Clock):
    def __init__(self) -> None:
        self.unix, self.elapsed = 1e9, 0.0

    def unix_s(self) -> float:
        return self.unix

    def elapsed_s(self) -> float:
        return self.elapsed


def test_expiries_move_by_as_much_as_the_clock_was_set_and_only_once() -> None:
    clock = FixedClock()
    moved: list[float] = []
    leases = LeaseClock(clock, moved.append)
    clock.unix, clock.elapsed = 1e9 + 500, 500
    assert leases.now_s() == 1e9 + 500
    assert moved == []
    clock.unix += 86_400
    assert leases.now_s() == leases.now_s() == 1e9 + 86_900
    assert moved == [86_400]
    clock.unix -= 3600
    clock.elapsed += 10
    leases.look()
    assert moved == [86_400, -3610]


def test_clock_that_is_slewed_moves_no_expiry() -> None:
    clock = FixedClock()
    moved: list[float] = []
    leases = LeaseClock(clock, moved.append)
    for _ in range(1000):
        clock.unix += 30.015
        clock.elapsed += 30
        leases.look()
    assert moved == []


# --- leases that are not used


def test_skipped_lines_are_logged_once_and_again_when_they_are_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    refused: dict[str, str] = {"10.9.0.0-24": "outside"}
    skipped = Skipped([refused])
    skipped.replace(["junk: not JSON"])
    for _ in range(3):
        skipped.change([], [])
        skipped.say()
    assert skipped.lines == ("junk: not JSON", "10.9.0.0-24: outside")
    assert [record.message for record in caplog.records] == [
        "lease skipped 10.9.0.0-24: outside",
        "lease skipped junk: not JSON",
    ]
    refused.clear()
    skipped.replace([])
    skipped.say()
    skipped.change(["junk: not JSON"], [])
    skipped.say()
    assert len(caplog.records) == 3


def test_skipped_lines_that_no_longer_hold_are_gone_from_status_and_said_to_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They stayed until the next snapshot, and the log named what was mended for ever as the last word on it."""
    caplog.set_level(logging.INFO)
    refused: dict[str, str] = {"10.9.0.0-24": "outside"}
    skipped = Skipped([refused])
    skipped.change(["junk: not JSON", "more: not JSON"], [])
    skipped.say()
    caplog.clear()
    refused.clear()
    skipped.change(["other: not JSON"], ["junk: not JSON", "never told"])
    skipped.say()
    skipped.say()
    assert skipped.lines == ("more: not JSON", "other: not JSON")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "lease skipped other: not JSON"),
        ("INFO", "lease no longer skipped 10.9.0.0-24: outside"),
        ("INFO", "lease no longer skipped junk: not JSON"),
    ]
    skipped.change([f"junk {n}" for n in range(300)], [])
    skipped.say()
    caplog.clear()
    skipped.replace([])
    skipped.say()
    assert len(caplog.records) == 201
    assert caplog.records[-1].message == "leases no longer skipped n_more=102"


# --- hosts whose lease is for another backend type


def typed(number: int, kind: str) -> Lease:
    attrs = LeaseAttrs(IPv4Address(f"192.0.2.{number % 256}"), backend_type=kind)
    return Lease(Subnets(IPv4Network(f"10.244.{number % 256}.0/24")), attrs, None, 0)


def test_peers_of_another_backend_type_are_named_once_and_again_when_they_are_reached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With udp they were peers that nothing was said of, and all that pods sent them was lost in silence."""
    caplog.set_level(logging.INFO)
    leases = {"b": typed(7, "vxlan"), "a": typed(3, "")}
    others = OtherTypes(leases, "host-gw")
    for _ in range(2):
        others.say()
    lines = [
        "peer 192.0.2.3 leases 10.244.3.0/24 for udp or alloc, this node carries host-gw",
        "peer 192.0.2.7 leases 10.244.7.0/24 for vxlan, this node carries host-gw",
    ]
    said = [f"{it}: pods of the two do not reach each other; give both hosts one Backend.Type" for it in lines]
    assert others.problems == said
    del leases["b"]
    others.say()
    leases.clear()
    others.say()
    others.say()
    assert others.problems == []
    assert [(record.levelname, record.message) for record in caplog.records] == [
        *(("WARNING", line) for line in said),
        *(("INFO", f"resolved: {line}") for line in reversed(lines)),
    ]


def test_many_peers_of_another_backend_type_are_a_few_lines_and_a_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    leases = {str(number): typed(number, "vxlan") for number in range(250)}
    others = OtherTypes(leases, "udp")
    assert len(others.problems) == 21
    assert others.problems[-1] == "230 more peers have another Backend.Type than this host"
    others.say()
    assert len(caplog.records) == 201
    leases.clear()
    others.say()
    assert caplog.records[-1].message == "resolved: peers with another Backend.Type n_more=50"


def test_what_is_said_of_a_backend_type_is_not_said_of_the_lease_again(caplog: pytest.LogCaptureFixture) -> None:
    skipped = Skipped([{"a": "its BackendType is vxlan, not host-gw", "b": "outside"}], {"a": None})
    skipped.say()
    assert len(skipped.lines) == 2
    assert [record.message for record in caplog.records] == ["lease skipped b: outside"]

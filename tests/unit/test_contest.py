"""When we stop taking away at once what another program puts on our device, and when we go on."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.core.network_state import Address, Link, LinkSettings, Route
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.reconcile.contest import Contests, find_undone

NAMES = {7: "flannel0"}


def address(n: int = 1) -> Change:
    return Change(Verb.DELETE, Address(7, IPv4Address(f"169.254.0.{n}"), 16))


DEFAULT_ROUTE = Change(Verb.DELETE, Route(IPv4Network("0.0.0.0/0"), oif=7, protocol=16))


class Client:
    """Puts its things back as soon as they are gone; `removals` are the times at which they went."""

    def __init__(self, *changes: Change) -> None:
        self.contests = Contests()
        self.changes = changes
        self.removals: list[float] = []

    def go_on(self, start_s: float, end_s: float, step_s: float = 0.1) -> None:
        for n in range(round((end_s - start_s) / step_s)):
            now_s = start_s + n * step_s
            done = self.contests.allow(self.changes, now_s)
            self.contests.note(done, now_s)
            if done:
                self.removals.append(round(now_s, 1))


def test_what_comes_back_at_once_goes_ever_more_slowly() -> None:
    client = Client(address())
    client.go_on(0, 300)
    assert client.removals == [0, 0.1, 0.2, 0.3, 0.4, 1.4, 3.4, 7.4, 15.4, 31.4, 63.4, 123.4, 183.4, 243.4]
    assert client.contests.has_put_off
    (line,) = client.contests.problems(NAMES)
    assert line == (
        "another program, a DHCP client perhaps, puts address 169.254.0.1/16 on flannel0 again and again; have it "
        "leave flannel0 alone: `denyinterfaces flannel0` in dhcpcd.conf, "
        "`unmanaged-devices=interface-name:flannel0` of NetworkManager, `Unmanaged=yes` of systemd-networkd"
    )


def test_another_address_each_time_is_the_same_quarrel_and_the_same_line() -> None:
    contests = Contests()
    lines = set()
    for n in range(1, 20):
        contests.note(contests.allow([address(n)], n / 10), n / 10)
        lines.update(contests.problems(NAMES))
    assert len(lines) == 1
    assert contests.has_put_off


def test_address_and_route_are_quarrels_of_their_own() -> None:
    client = Client(address(), DEFAULT_ROUTE)
    client.go_on(0, 2)
    assert len(client.contests.problems(NAMES)) == 2
    assert "puts route 0.0.0.0/0 dev flannel0 proto 16 on flannel0" in client.contests.problems(NAMES)[1]


def test_a_quarrel_is_over_when_nothing_has_come_back_for_two_pauses() -> None:
    client = Client(address())
    client.go_on(0, 60)
    client.changes = ()
    client.go_on(60, 120)
    assert client.contests.problems(NAMES) != []
    assert not client.contests.has_put_off
    client.go_on(120, 130)
    assert client.contests.problems(NAMES) == []
    client.changes = (address(),)
    client.removals.clear()
    client.go_on(130, 131)
    assert client.removals[:5] == [130, 130.1, 130.2, 130.3, 130.4]


def test_things_that_come_now_and_then_always_go_at_once() -> None:
    client = Client(address())
    for n in range(20):
        client.go_on(60 * n, 60 * n + 0.1)
        client.changes, changes = (), client.changes
        client.go_on(60 * n + 0.1, 60 * n + 59, 1)
        client.changes = changes
    assert len(client.removals) == 20
    assert client.contests.problems(NAMES) == []


def test_a_hundred_routes_at_once_are_no_quarrel() -> None:
    """As on a VXLAN device that is taken over from flanneld."""
    contests = Contests()
    routes = [
        Change(Verb.DELETE, Route(IPv4Network(f"10.244.{n}.0/24"), IPv4Address(f"10.244.{n}.0"), 7, protocol=3))
        for n in range(100)
    ]
    assert contests.allow(routes, 1) == routes
    contests.note(routes, 1)
    assert contests.problems(NAMES) == []


def test_what_is_ours_is_never_put_off() -> None:
    own = [
        Change(Verb.DELETE, Route(IPv4Network("10.244.1.0/24"), oif=7)),
        Change(Verb.ADD, Address(7, IPv4Address("10.244.3.0"), 32)),
        Change(Verb.ADD, Route(IPv4Network("10.244.0.0/16"), oif=7)),
    ]
    client = Client(*own)
    client.go_on(0, 10)
    assert len(client.removals) == 100
    assert client.contests.problems(NAMES) == []


# --- what another program undoes

OURS = Change(Verb.ADD, Address(7, IPv4Address("10.244.3.0"), 32))
UP = Change(Verb.SET, LinkSettings(Link(7, "flannel0", "tun", 1472, False, False, False, 500), up=True))
UP_AGAIN = Change(Verb.SET, LinkSettings(Link(8, "flannel0", "tun", 1500, False, False, False, 500), up=True))


@pytest.mark.parametrize(
    ("rounds", "undone"),
    [
        ([[OURS], [OURS]], [OURS]),
        ([[OURS], [], [UP], [OURS, DEFAULT_ROUTE]], [OURS]),
        ([[UP], [UP_AGAIN]], [UP_AGAIN]),
        ([[OURS], [UP]], []),
        ([[OURS], [OURS], [UP]], []),
        ([[address(), DEFAULT_ROUTE]] * 5, []),
        ([[OURS]], []),
    ],
    ids=["at once", "later", "on a device made anew", "progress", "given up", "strangers' things", "one round"],
)
def test_undone_is_what_the_last_round_made_again(rounds: list[list[Change]], undone: list[Change]) -> None:
    assert find_undone(rounds) == undone

"""What another program puts on our devices again and again, and when to take it away once more.  Pure.

A DHCP client may take our device for one of its own, and gives it an address and a default route.  We remove them, and
the client puts them back.  The first removals follow at once.  Then the pauses grow, so that the quarrel costs next to
nothing, and a line names the thing and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from udptun.core.network_state import ROUTE_PROTOCOL, Address, Route, describe_route
from udptun.kernel.reconcile.change import Change, Verb

_AT_ONCE = 5
"""So many removals are made without a pause."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0
_REST_S = 10.0
"""A thing that has not come back for so long, or for two pauses if that is longer, is taken to stay away."""

_Key = tuple[type, int]
"""What kind of thing, and the index of the device.  A client may choose another address each time."""


@dataclass(slots=True)
class _Contest:
    thing: Address | Route
    seen_s: float
    removed_s: float
    n_removed: int = 0

    @property
    def pause_s(self) -> float:
        """How long to wait after the last removal."""
        over = self.n_removed - _AT_ONCE
        return 0.0 if over < 0 else min(_FIRST_PAUSE_S * 2.0 ** min(over, 30), _MAX_PAUSE_S)


class Contests:
    """The quarrels of one reconciler.  Times are seconds of any clock that only goes forward."""

    def __init__(self) -> None:
        self._contests: dict[_Key, _Contest] = {}
        self.has_put_off = False
        """Whether `allow` left something out the last time."""

    def allow(self, planned: Iterable[Change], now_s: float) -> list[Change]:
        """Those of the planned changes that are to be made now."""
        allowed: list[Change] = []
        self.has_put_off = False
        for change in planned:
            contest = self._see(change, now_s)
            if contest is not None and now_s < contest.removed_s + contest.pause_s:
                self.has_put_off = True
            else:
                allowed.append(change)
        for key, contest in list(self._contests.items()):
            if now_s - contest.seen_s > max(_REST_S, 2 * contest.pause_s):
                del self._contests[key]
        return allowed

    def note(self, done: Iterable[Change], now_s: float) -> None:
        """These changes have been made."""
        # A kind counts once: of a device that is taken over, a hundred routes may go at once.
        contests = {id(contest): contest for change in done if (contest := self._see(change, now_s)) is not None}
        for contest in contests.values():
            contest.removed_s = now_s
            contest.n_removed += 1

    def problems(self, link_names: Mapping[int, str]) -> list[str]:
        """A line for each quarrel that goes on."""
        return [
            _describe(contest.thing, link_names.get(index, f"if{index}"))
            for (_, index), contest in self._contests.items()
            if contest.pause_s
        ]

    def _see(self, change: Change, now_s: float) -> _Contest | None:
        """The quarrel that the change belongs to; None when it removes nothing that a stranger has put there."""
        thing = _strangers_thing(change)
        if thing is None:
            return None
        contest = self._contests.setdefault(_key(thing), _Contest(thing, now_s, now_s))
        contest.seen_s = now_s
        return contest


def find_undone(rounds: Sequence[Iterable[Change]]) -> list[Change]:
    """The changes of the last round that an earlier one has made too: another program has undone them meanwhile.

    Removals of what strangers have put on our devices are left out: they are the matter of Contests.
    """
    *earlier, last = rounds
    # As texts: a device that was made anew has another index, and what is set on it is the same.
    made = {str(change) for changes in earlier for change in changes}
    return [change for change in last if str(change) in made and _strangers_thing(change) is None]


def _strangers_thing(change: Change) -> Address | Route | None:
    """What a stranger has put on a device of ours and the change removes."""
    thing = change.thing
    if change.verb is not Verb.DELETE:
        return None
    if isinstance(thing, Address):
        return thing
    if isinstance(thing, Route) and thing.protocol != ROUTE_PROTOCOL and thing.oif is not None:
        return thing
    return None


def _key(thing: Address | Route) -> _Key:
    return type(thing), (thing.link_index if isinstance(thing, Address) else thing.oif or 0)


def _describe(thing: Address | Route, name: str) -> str:
    what = (
        f"address {thing.ip}/{thing.prefixlen}"
        if isinstance(thing, Address)
        else f"route {describe_route(thing, {thing.oif or 0: name})}"
    )
    return (
        f"another program, a DHCP client perhaps, puts {what} on {name} again and again; have it leave {name} alone: "
        f"`denyinterfaces {name}` in dhcpcd.conf, `unmanaged-devices=interface-name:{name}` of NetworkManager, "
        "`Unmanaged=yes` of systemd-networkd"
    )

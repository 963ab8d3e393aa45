"""What is wrong in a mesh, the worst first.  Pure.

Pairs of hosts with one fault are gathered around the host that has the most of them: a host whose cable is bad is one
problem, however many others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

from udptun.commands.figures import plural
from udptun.commands.mesh.matrix import Host, Mesh, State, Way

_MOST_NAMED = 8
"""Numbers of hosts that a line lists."""
_MOST_UNANSWERED = 4
"""Notes about hosts that do not answer: more of them are one."""


class Verdict(StrEnum):
    """Of a mesh, in one word."""

    WELL = "well"
    WRONG = "wrong"
    UNSURE = "unsure"


class Kind(StrEnum):
    """What is wrong, by names that programs may know; the worst first."""

    HOST_DEAD = "host_dead"
    ONE_WAY = "one_way"
    DEAD = "dead"
    MISSING = "missing"
    LOSS = "loss"
    NARROW = "narrow"
    MTUS = "mtus"
    BAD_ANSWER = "bad_answer"


@dataclass(frozen=True, slots=True)
class Problem:
    """`hosts` are the numbers of those that it is about, first the one that it is about the most."""

    kind: Kind
    hosts: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class _Star:
    """Ways, or pairs, that all have `hub`.  `starts_there`: it is the start of each of them."""

    hub: Host
    others: Sequence[Host]
    starts_there: bool

    def problem(self, kind: Kind, text: str) -> Problem:
        return Problem(kind, (self.hub.number, *(host.number for host in self.others)), text)


_Pairs = list[tuple[Host, Host]]


def problems_of(mesh: Mesh) -> list[Problem]:
    """In the order in which to show them."""
    gone = {host.number: host for host in mesh.hosts if _is_gone(mesh, host)}
    one_way, dead = _dead_pairs(mesh, gone)
    cut = {frozenset((one.number, two.number)) for one, two in (*one_way, *dead)}
    # Where one way is cut, probes are lost on the way back.
    lossy = [it for it in _pairs(mesh, lambda way: way.is_lossy) if frozenset(host.number for host in it) not in cut]
    narrow = _pairs(mesh, lambda way: way.is_narrow)
    wrong = [host for host in mesh.hosts if host.is_wrong]
    return [
        *(_host_dead(mesh, host) for host in gone.values()),
        *(it.problem(Kind.ONE_WAY, _one_way(it)) for it in _stars(one_way)),
        *(it.problem(Kind.DEAD, _dead(mesh, it)) for it in _stars(dead, are_ways=False)),
        *(it.problem(Kind.MISSING, _missing(it)) for it in _stars(_ways(mesh, State.MISSING))),
        *(it.problem(Kind.LOSS, _loss(mesh, it)) for it in _stars(lossy, are_ways=False)),
        *(it.problem(Kind.NARROW, _narrow(mesh, it)) for it in _stars(narrow, are_ways=False)),
        *_mtus(mesh),
        *(Problem(Kind.BAD_ANSWER, (host.number,), f"{name(host)}: {host.reason}") for host in wrong),
    ]


def verdict_of(mesh: Mesh, problems: Sequence[Problem]) -> tuple[Verdict, str]:
    """With words for it.  What a host does not say may be what is wrong, so nobody is sure without it."""
    if problems:
        return Verdict.WRONG, plural(len(problems), "problem")
    n_alive = sum(way is not None and way.state is State.ALIVE for row in mesh.ways for way in row)
    n_missing = sum(host.view is None and host.is_udptun for host in mesh.hosts)
    if not n_alive:
        return Verdict.UNSURE, "nobody is known to be reached"
    alive = f"{plural(n_alive, 'way is', 'ways are')} alive"
    if n_missing:
        return Verdict.UNSURE, f"no problem known, {alive}; {plural(n_missing, 'view is', 'views are')} missing"
    return Verdict.WELL, f"all is well, {alive}"


def notes_of(mesh: Mesh) -> list[str]:
    """What an operator may want to know, and what is no fault of the mesh."""
    notes = []
    silent: dict[str, list[Host]] = {}
    for host in mesh.hosts:
        if host.view is None and not host.is_wrong:
            silent.setdefault(host.reason, []).append(host)
    for reason, hosts in silent.items():
        notes.append(f"{names(hosts)} from the others' side only: {reason}")
    mute: dict[str, list[Host]] = {}
    for host in mesh.viewers:
        if host.view is not None and host.view.probes != "on":
            mute.setdefault(host.view.probes, []).append(host)
    for why, hosts in mute.items():
        notes.append(f"probes of {names(hosts)} are {why}")
    quiet = {host.number for hosts in mute.values() for host in hosts}
    unanswered = [way for way in _ways(mesh, State.UNKNOWN) if way[0].number not in quiet]
    stars = list(_stars(unanswered))
    if len(stars) > _MOST_UNANSWERED:
        ends = sorted({end.number: end for _, end in unanswered}.values(), key=lambda host: host.number)
        where = f"{plural(len(unanswered), 'way')}, by {names(ends)}"
        notes.append(f"no probe was ever answered on {where}; does a firewall drop echoes?")
        stars = []
    for star in stars:
        one, others = name(star.hub), names(star.others)
        who, whom = (others, one) if star.starts_there else (one, others)
        notes.append(f"no probe of {whom} was ever answered by {who}; does a firewall drop echoes?")
    if mesh.n_left_out > 0:
        notes.append(f"{plural(mesh.n_left_out, 'more host')} not shown; those that are named would be")
    return notes


def name(host: Host) -> str:
    """`host 3 (10.244.3.0/24 at 192.0.2.3)`."""
    return f"host {host.number} ({host.subnet} at {host.public_ip})"


def names(hosts: Sequence[Host]) -> str:
    """`hosts 1, 2 and 3`, of many the first ones; of one as `name`."""
    if len(hosts) == 1:
        return name(hosts[0])
    return f"hosts {_listed([str(host.number) for host in hosts])}"


def _listed(words: Sequence[str]) -> str:
    if len(words) > _MOST_NAMED:
        return f"{', '.join(words[: _MOST_NAMED - 1])} and {len(words) - _MOST_NAMED + 1} more"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _stars(pairs: _Pairs, *, are_ways: bool = True) -> Iterator[_Star]:
    """All pairs, as few stars.  Without `are_ways` it does not matter which host of a pair comes first."""
    around: dict[tuple[int, bool], dict[int, Host]] = {}
    """Host, and whether the ways start there -> the others, by the pairs' places."""
    for i, (one, two) in enumerate(pairs):
        around.setdefault((one.number, True), {})[i] = two
        around.setdefault((two.number, not are_ways), {})[i] = one
    while around:
        key = number, starts_there = max(around, key=lambda it: len(around[it]))
        found = around.pop(key)
        if not found:
            return
        hub = next(host for host in pairs[next(iter(found))] if host.number == number)
        yield _Star(hub, sorted(found.values(), key=lambda host: host.number), starts_there)
        for i, other in found.items():
            del around[other.number, not starts_there if are_ways else True][i]


def _ways(mesh: Mesh, state: State) -> _Pairs:
    """The ways of that state."""
    return [(start, end) for start in mesh.viewers for end in mesh.hosts if _state(mesh, start, end) is state]


def _state(mesh: Mesh, start: Host, end: Host) -> State | None:
    way = mesh.way(start, end)
    return None if way is None else way.state


# ------------------------------------------------------------------------------------------------- who hears whom


def _is_gone(mesh: Mesh, host: Host) -> bool:
    """Whether it is dead to all who look at it, and has said nothing itself."""
    states = {_state(mesh, start, host) for start in mesh.viewers if start is not host}
    return host.view is None and State.DEAD in states and State.ALIVE not in states


def _host_dead(mesh: Mesh, host: Host) -> Problem:
    who = [start for start in mesh.viewers if _state(mesh, start, host) is State.DEAD]
    all_of_them = "" if len(who) == 1 else ", to all whose views are known"
    return Problem(Kind.HOST_DEAD, (host.number,), f"{name(host)} is dead to {names(who)}{all_of_them}; is it up?")


def _dead_pairs(mesh: Mesh, gone: Mapping[int, Host]) -> tuple[_Pairs, _Pairs]:
    """Ways that are dead while the way back is alive, and pairs of which nobody says that the other one is alive."""
    one_way, dead = [], []
    for one, two in combinations([host for host in mesh.hosts if host.number not in gone], 2):
        there, back = _state(mesh, one, two), _state(mesh, two, one)
        if there is State.DEAD and back is State.ALIVE:
            one_way.append((one, two))
        elif back is State.DEAD and there is State.ALIVE:
            one_way.append((two, one))
        elif State.DEAD in (there, back):
            dead.append((one, two))
    return one_way, dead


def _one_way(star: _Star) -> str:
    hub, others = name(star.hub), names(star.others)
    if len(star.others) == 1:
        deaf, unheard = (hub, others) if star.starts_there else (others, hub)
        return f"{deaf} does not hear {unheard}, which hears it; what the latter sends to the former is lost"
    if star.starts_there:
        return f"{hub} does not hear {others}, which hear it; what they send to it is lost"
    return f"{others} do not hear {hub}, which hears them; what it sends to them is lost"


def _dead(mesh: Mesh, star: _Star) -> str:
    both = all({_state(mesh, star.hub, other), _state(mesh, other, star.hub)} == {State.DEAD} for other in star.others)
    how = "do not hear each other" if both else "do not hear each other, as far as they say"
    return f"{name(star.hub)} and {names(star.others)} {how}; what is between them?"


def _missing(star: _Star) -> str:
    hub, others = name(star.hub), names(star.others)
    start, end = (hub, others) if star.starts_there else (others, hub)
    has = "has" if star.starts_there or len(star.others) == 1 else "have"
    return f"{start} {has} no lease of {end}; do they follow the same store?"


# ------------------------------------------------------------------------------------------- what gets through


def _pairs(mesh: Mesh, is_it: Callable[[Way], bool]) -> _Pairs:
    """Those of which one way at least is so."""
    return [
        (one, two)
        for one, two in combinations(mesh.hosts, 2)
        if any(way is not None and is_it(way) for way in (mesh.way(one, two), mesh.way(two, one)))
    ]


def _both_ways(mesh: Mesh, star: _Star) -> list[Way]:
    ways = [way for other in star.others for way in (mesh.way(star.hub, other), mesh.way(other, star.hub))]
    return [way for way in ways if way is not None]


def _loss(mesh: Mesh, star: _Star) -> str:
    found = [way.found for way in _both_ways(mesh, star) if way.is_lossy]
    n_lost, n_sent = sum(it.probes_lost for it in found), sum(it.probes_sent for it in found)
    return f"{n_lost} of {n_sent} probes between {name(star.hub)} and {names(star.others)} were lost"


def _narrow(mesh: Mesh, star: _Star) -> str:
    ways = _both_ways(mesh, star)
    narrow = [way for way in ways if way.is_narrow]
    mtus = sorted({way.found.path_mtu for way in narrow if way.found.path_mtu is not None})
    devices = sorted({way.found.mtu for way in narrow if way.found.mtu is not None})
    takes = f"{mtus[0]}" if len(mtus) == 1 else f"{mtus[0]} to {mtus[-1]}"
    # The other way of a pair may take more, or may not be known.
    n_wide = sum(way.state is State.ALIVE and way.found.path_mtu is not None and not way.is_narrow for way in ways)
    other = ", one way alone" if n_wide == len(narrow) else ""
    of = " or ".join(map(str, devices))
    pair = f"{name(star.hub)} and {names(star.others)}"
    return f"paths between {pair} take packets of {takes} bytes{other}, and their devices {of}"


def _mtus(mesh: Mesh) -> Iterator[Problem]:
    """Hosts whose pods send packets of other lengths than those of most hosts."""
    by_mtu: dict[int, list[Host]] = {}
    for host in mesh.viewers:
        assert host.view is not None
        by_mtu.setdefault(host.view.mtu, []).append(host)
    usual = max(by_mtu, key=lambda mtu: len(by_mtu[mtu]))
    for mtu in sorted(by_mtu.keys() - {usual}):
        text = f"{names(by_mtu[mtu])}: the MTU is {mtu}, that of most others {usual}"
        yield Problem(Kind.MTUS, tuple(host.number for host in by_mtu[mtu]), text)

"""Who reaches whom: what the hosts say, put together, and shown as text, JSON and a page, of 1, 3 and 200 hosts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from mesh_views import MTU, Fault, change, document, mesh, peer, subnet_of, view

from udptun.commands.mesh import page, report, table
from udptun.commands.mesh.answer import read_view
from udptun.commands.mesh.ask import Answer
from udptun.commands.mesh.matrix import MOST_HOSTS, Mesh, State, build, choose
from udptun.commands.mesh.problems import notes_of, problems_of
from udptun.commands.mesh.scale import N_STEPS, bounds_of, step_names, step_of
from udptun.commands.screen import Page
from udptun.core.mesh import FOUND

TERMINAL = Page(80, 24, has_colours=True)


def at(*ways: tuple[int, int], say: Callable[[dict[str, Any]], None]) -> Fault:
    """These ways are so, from the first host to the second one."""

    def fault(start: int, end: int, said: dict[str, Any]) -> None:
        if (start, end) in ways:
            say(said)

    return fault


def dead(said: dict[str, Any]) -> None:
    change(said, "dead")


def lossy(said: dict[str, Any]) -> None:
    said.update(probes_sent=40, probes_lost=12)


def narrow(said: dict[str, Any]) -> None:
    said["path_mtu"] = 1400


def at_all(dead: tuple[int, int], lossy: tuple[int, int]) -> Fault:
    def fault(start: int, end: int, said: dict[str, Any]) -> None:
        if (start, end) == dead:
            change(said, "dead")
        elif (start, end) == lossy:
            said.update(probes_sent=40, probes_lost=12)

    return fault


def flannels(said: dict[str, Any]) -> None:
    said["udptun"] = False


def said_of(it: Mesh) -> list[str]:
    """Kind and hosts of each problem, and the notes."""
    return [f"{problem.kind} {problem.hosts}" for problem in problems_of(it)]


# --- what is wrong


def test_a_mesh_that_is_well_has_no_problems_and_no_notes() -> None:
    it = mesh(4)
    assert (said_of(it), notes_of(it)) == ([], [])
    assert [[way and way.state for way in row] for row in it.ways] == [
        [None if i == j else State.ALIVE for j in range(4)] for i in range(4)
    ]


def test_a_way_that_is_dead_in_one_direction_is_said_to_be_so() -> None:
    it = mesh(3, at((3, 1), say=dead))
    (problem,) = problems_of(it)
    assert (problem.kind, problem.hosts) == ("one_way", (3, 1))
    assert problem.text == (
        "host 3 (10.244.3.0/24 at 192.0.2.3) does not hear host 1 (10.244.1.0/24 at 192.0.2.1), which hears it; "
        "what the latter sends to the former is lost"
    )


@pytest.mark.parametrize(
    ("n_hosts", "fault", "silent", "expected"),
    [
        (3, at((1, 3), (3, 1), say=dead), (), ["dead (1, 3)"]),
        # The other one's view is not known.
        (3, at((1, 3), say=dead), (3,), ["dead (3, 1)"]),
        (3, at((1, 3), (2, 3), say=dead), (3,), ["host_dead (3,)"]),
        # It is dead to all, and answers all the same.
        (3, at((1, 3), (2, 3), say=dead), (), ["one_way (3, 1, 2)"]),
        (5, at((2, 4), (3, 4), (5, 4), (4, 1), say=dead), (), ["one_way (4, 2, 3, 5)", "one_way (4, 1)"]),
        (3, at((1, 2), say=lossy), (), ["loss (1, 2)"]),
        # What is lost on a way that is cut is no second fault.
        (3, at_all(dead=(2, 1), lossy=(1, 2)), (), ["one_way (2, 1)"]),
        (5, at((1, 2), (2, 1), (3, 2), (2, 5), say=lossy), (), ["loss (2, 1, 3, 5)"]),
        (4, at((4, 1), (4, 2), (1, 4), say=narrow), (), ["narrow (4, 1, 2)"]),
        (3, at((1, 2), say=lambda said: said.update(probes_sent=9, probes_lost=1)), (), []),
    ],
)
def test_faults_are_gathered_around_the_host_that_has_the_most_of_them(
    n_hosts: int, fault: Fault, silent: tuple[int, ...], expected: list[str]
) -> None:
    found = said_of(mesh(n_hosts, fault, silent))
    # Of a pair either may be the hub.
    assert [re.sub(r"dead \(3, 1\)", "dead (1, 3)", it) for it in found] == [
        re.sub(r"dead \(3, 1\)", "dead (1, 3)", it) for it in expected
    ]


def test_texts_about_several_hosts_say_what_is_lost_and_how_much_fits() -> None:
    def fault(start: int, end: int, said: dict[str, Any]) -> None:
        if end == 4 and start != 4:
            dead(said)
        elif {start, end} == {1, 2}:
            lossy(said)
        elif start == 5 and end in (1, 2):
            narrow(said)

    texts = [problem.text for problem in problems_of(mesh(5, fault))]
    four, five = "host 4 (10.244.4.0/24 at 192.0.2.4)", "host 5 (10.244.5.0/24 at 192.0.2.5)"
    one, two = "host 1 (10.244.1.0/24 at 192.0.2.1)", "host 2 (10.244.2.0/24 at 192.0.2.2)"
    assert texts == [
        f"hosts 1, 2, 3 and 5 do not hear {four}, which hears them; what it sends to them is lost",
        f"24 of 80 probes between {one} and {two} were lost",
        f"paths between {five} and hosts 1 and 2 take packets of 1400 bytes, one way alone, and their devices 1472",
    ]


def test_a_host_that_lacks_another_ones_lease_is_named() -> None:
    own, other = view(1, 3), document(2, 3)
    other |= {"peers": [it for it in other["peers"] if it["subnet"] != subnet_of(3)], "n_peers": 1}
    peers = choose(own)
    answers = {peers[0].subnet: Answer(read_view(json.dumps(other).encode())), peers[1].subnet: Answer(view(3, 3))}
    it = build(own, peers, answers, made_at=0, took_s=0, port=1)
    assert said_of(it) == ["missing (2, 3)"]
    # A view that has not all peers says nothing of the others.
    other["n_peers"] = 2
    answers[peers[0].subnet] = Answer(read_view(json.dumps(other).encode()))
    it = build(own, peers, answers, made_at=0, took_s=0, port=1)
    assert (said_of(it), it.ways[1][2] and it.ways[1][2].state) == ([], State.NO_VIEW)


def test_hosts_with_another_mtu_than_most_are_named_and_answers_that_are_none() -> None:
    own = view(1, 4)
    peers = choose(own)
    short = read_view(json.dumps(document(3, 4, mtu=1400)).encode())
    views = [Answer(view(2, 4)), Answer(short), Answer(None, "its answer is not used: it is none", is_wrong=True)]
    it = build(
        own, peers, {of.subnet: said for of, said in zip(peers, views, strict=True)}, made_at=0, took_s=0, port=1
    )
    assert said_of(it) == ["mtus (3,)", "bad_answer (4,)"]
    assert problems_of(it)[0].text.endswith("the MTU is 1400, that of most others 1472")


def test_hosts_whose_view_is_not_known_are_notes_with_the_reason() -> None:
    it = mesh(
        4, lambda start, end, said: flannels(said) if end == 4 else change(said, "unknown") if end == 2 else None, (3,)
    )
    assert said_of(it) == []
    assert notes_of(it) == [
        "host 3 (10.244.3.0/24 at 192.0.2.3) from the others' side only: closed",
        "host 4 (10.244.4.0/24 at 192.0.2.4) from the others' side only: flannel, which has no view to give",
        "no probe of host 1 (10.244.1.0/24 at 192.0.2.1) was ever answered by host 2 (10.244.2.0/24 at 192.0.2.2); "
        "does a firewall drop echoes?",
    ]


def test_hosts_that_do_not_probe_say_why_once_and_nobody_is_blamed() -> None:
    own = read_view(
        json.dumps(document(1, 2, lambda a, b, said: change(said, "unknown"), probes="off: it is so")).encode()
    )
    other = read_view(
        json.dumps(document(2, 2, lambda a, b, said: change(said, "unknown"), probes="off: it is so")).encode()
    )
    it = build(own, own.peers, {other.subnet: Answer(other)}, made_at=0, took_s=0, port=1)
    assert notes_of(it) == ["probes of hosts 1 and 2 are off: it is so"]


def test_where_echoes_are_filtered_everywhere_one_note_says_so() -> None:
    """200 hosts were 200 notes, and took five seconds."""
    it = mesh(60, lambda start, end, said: change(said, "unknown"))
    began_s = time.process_time()
    assert notes_of(it) == [
        "no probe was ever answered on 3,540 ways, by hosts 1, 2, 3, 4, 5, 6, 7 and 53 more; "
        "does a firewall drop echoes?"
    ]
    assert problems_of(it) == []
    assert time.process_time() - began_s < 2


def test_a_host_that_another_one_knows_by_ipv6_alone_is_not_missing() -> None:
    """Its way was said to be missing, and its own view was taken for somebody else's."""
    by_ipv6 = "fd00:244:0:2::/64"
    peers = [peer(2, subnet=by_ipv6, ipv6_subnet=by_ipv6), peer(3)]
    first = read_view(json.dumps(document(1, 1, peers=peers, n_peers=2)).encode())
    second = read_view(json.dumps(document(2, 3, ipv6_subnet=by_ipv6)).encode())
    third = read_view(json.dumps(document(3, 1, peers=[peer(1), peer(2, ipv6_subnet=by_ipv6)], n_peers=2)).encode())
    views = {it.subnet: Answer(it) for it in (first, second, third)}
    views[first.peers[0].subnet] = Answer(second)
    for own in (first, third):
        it = build(own, own.peers, views, made_at=0, took_s=0, port=1)
        assert len(it.viewers) == 3
        assert said_of(it) == []


def test_of_two_families_that_go_ways_of_their_own_the_worse_one_is_shown() -> None:
    ipv6 = {key: peer(2)[key] for key in ("liveness", "rtt_ms", "rtt_age_s", "path_mtu", "probes_sent", "probes_lost")}
    twin = {**ipv6, "mtu": MTU - 20, "path_mtu": MTU - 20}

    def ways(**changes: Any) -> tuple[State, str]:
        said = document(1, 1, peers=[peer(2, ipv6={**twin, **changes})], n_peers=1)
        own = read_view(json.dumps(said).encode())
        way = build(own, own.peers, {}, made_at=0, took_s=0, port=0).ways[0][1]
        assert way is not None
        return way.state, way.family

    assert ways() == (State.ALIVE, "")
    assert ways(liveness="dead") == (State.DEAD, "IPv6")
    assert ways(path_mtu=1280) == (State.ALIVE, "IPv6")


# --- which hosts


def test_of_more_hosts_than_a_mesh_has_those_in_trouble_stay() -> None:
    peers = [peer(0, subnet=f"10.{244 + i // 250}.{i % 250}.0/24") for i in range(1, 401)]
    peers[399]["ipv6"] = {**{key: peer(1)[key] for key in (*FOUND, "mtu")}, "liveness": "dead"}
    own = read_view(json.dumps(document(0, 1, subnet="10.244.0.0/24", peers=peers, n_peers=5000)).encode())
    chosen = choose(own)
    assert len(chosen) == MOST_HOSTS - 1
    assert [str(it.subnet) for it in (chosen[0], chosen[-2], chosen[-1])] == [
        *("10.244.1.0/24", "10.244.198.0/24", "10.245.150.0/24")
    ]
    it = build(own, chosen, {}, made_at=0, took_s=0, port=0)
    assert notes_of(it)[-1] == "4,801 more hosts not shown; those that are named would be"


def test_named_hosts_are_found_by_subnet_address_and_pod() -> None:
    own = view(1, 9)
    assert [str(it.subnet) for it in choose(own, ["192.0.2.7", "10.244.3.0/24", "10.244.5.17", "10.244.1.9"])] == [
        *(subnet_of(3), subnet_of(5), subnet_of(7))
    ]
    it = build(own, own.peers[:2], {}, made_at=0, took_s=0, port=1, are_named=True)
    assert it.n_left_out == 0
    with pytest.raises(ValueError, match=re.escape("10.244.99.1")):
        choose(own, ["10.244.99.1"])


# --- steps


@pytest.mark.parametrize(
    ("times", "bounds"),
    [
        ([], []),
        ([0.3], []),
        ([0.1, 0.1], []),
        ([0.08, 0.3], [0.1, 0.2]),
        ([0.2, 0.3], []),
        ([0.01, *[0.3] * 20, 0.7, 3, 8, 70, 700, 7000], [0.2, 0.5, 1, 5, 50]),
    ],
)
def test_steps_are_round_and_no_more_than_there_are_colours(times: list[float], bounds: list[float]) -> None:
    found = bounds_of(times)
    assert len(found) < N_STEPS
    assert found == sorted(found)
    if len(bounds) < 5:
        assert found == pytest.approx(bounds)
    assert len(step_names(found)) == len(found) + 1
    assert {step_of(time, found) for time in times} <= set(range(N_STEPS))


# --- text


def many(start: int, end: int, said: dict[str, Any]) -> None:
    """Faults among 200 hosts."""
    if end == 77 or (start, end) == (10, 150):
        dead(said)
    elif {start, end} == {44, 45}:
        lossy(said)
    elif start == 180:
        narrow(said)
    elif end == 120:
        change(said, "unknown")
    elif end == 199:
        flannels(said)


@cache
def large(n_hosts: int) -> Mesh:
    return mesh(n_hosts, many, {77})


def render(it: Mesh, where: Page) -> list[str]:
    return table.render(it, problems_of(it), notes_of(it), where)


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_three_hosts_are_a_matrix_of_times_below_what_is_wrong() -> None:
    lines = render(mesh(3, at((3, 1), say=dead)), Page())
    assert lines[0] == "mesh       1 problem"
    assert lines[1].endswith("in 0.04 s; 3 hosts, 3 of which say what they see, asked at port 8286")
    assert lines[2].startswith("problem    host 3 (10.244.3.0/24 at 192.0.2.3) does not hear host 1")
    assert lines[4:8] == [
        "#  SUBNET         ADDRESS    ITS VIEW",
        "1  10.244.1.0/24  192.0.2.1  this host: udp, MTU 1472, version 0.1.0",
        "2  10.244.2.0/24  192.0.2.2  udp, MTU 1472, version 0.1.0, in 3 ms",
        "3  10.244.3.0/24  192.0.2.3  udp, MTU 1472, version 0.1.0, in 3 ms",
    ]
    assert lines[9:14] == [
        "RTT in ms, from the host of the row to that of the column",
        "       1     2     3",
        "1      ·  0.12  0.07",
        "2   0.12     ·  0.06",
        "3   dead  0.06     ·",
    ]
    assert lines[14] == "           the oldest time is of 12s ago"


def test_one_host_without_peers_is_no_mesh_that_is_well() -> None:
    lines = render(mesh(1), TERMINAL)
    assert "nobody is known to be reached" in lines[0]
    assert "1 host, this one alone says" in " ".join(map(plain, lines))


def test_200_hosts_fit_a_terminal_and_those_in_trouble_are_there() -> None:
    it = large(200)
    lines = [plain(line) for line in render(it, Page(100, 50, has_colours=True))]
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "host 77 (10.244.77.0/24 at 192.0.2.77) is dead to hosts 1, 2," in text
    assert re.search(r"^ 77  10\.244\.77\.0/24 ", text, re.MULTILINE)
    assert "more hosts: --html FILE shows all, as does a pipe" in text


def test_200_hosts_have_a_character_for_each_way_in_a_pipe() -> None:
    it = large(200)
    lines = render(it, Page())
    at_heads = lines.index("RTT, from the host of the row to that of the column") + 1
    assert [line[4:] for line in lines[at_heads : at_heads + 3]] == [
        "".join(f"{number:>3}"[i] for number in range(1, 201)) for i in range(3)
    ]
    rows = [line[4:] for line in lines[at_heads + 3 : at_heads + 203]]
    assert {len(row.ljust(200)) for row in rows} == {200}
    assert (rows[0][76], rows[9][149], rows[43][44], rows[179][0], rows[0][119]) == ("X", "X", "!", "m", "?")
    assert rows[76].strip() == "·"
    assert {rows[i][i] for i in range(200)} == {"·"}
    assert set("".join(rows)) <= set("·X!m? 012345")


# --- JSON


def test_json_has_every_host_way_and_problem() -> None:
    it = mesh(
        3, lambda start, end, said: flannels(said) if end == 2 else dead(said) if (start, end) == (3, 1) else None
    )
    found = json.loads(report.as_json(it, problems_of(it), notes_of(it)))
    assert (found["schema"], found["port"], found["hosts_left_out"]) == (1, 8286, 0)
    assert [(host["number"], host["self"], host["view"] is None, host["reason"]) for host in found["hosts"]] == [
        (1, True, False, None),
        (2, False, True, "flannel, which has no view to give"),
        (3, False, False, None),
    ]
    assert [(way["from"], way["to"], way["state"]) for way in found["ways"]] == [
        *((1, 2, "alive"), (1, 3, "alive"), (3, 1, "dead"), (3, 2, "alive"))
    ]
    assert found["ways"][2] == {
        "from": 3,
        "to": 1,
        "state": "dead",
        "family": None,
        "rtt_ms": 0.071,
        "rtt_age_s": 95.0,
        "path_mtu": MTU,
        "probes_sent": 0,
        "probes_lost": 0,
        "mtu": MTU,
    }
    assert [(problem["kind"], problem["hosts"]) for problem in found["problems"]] == [("one_way", [3, 1])]


# --- the page


class Parsed(HTMLParser):
    """Tags with their attributes, and that each that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def cells(self) -> list[dict[str, str | None]]:
        return [
            attrs for tag, attrs in self.tags if tag == "td" and "class" in attrs and "why" not in str(attrs["class"])
        ]


@pytest.mark.parametrize("n_hosts", [1, 3, 30, 200])
def test_page_is_whole_has_a_cell_for_each_way_and_needs_nothing_else(n_hosts: int) -> None:
    it = large(n_hosts)
    text = page.render(it, problems_of(it), notes_of(it))
    found = Parsed(text)
    cells = found.cells()
    assert len(cells) == n_hosts**2
    assert sum(cell["class"] == "self" for cell in cells) == n_hosts
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "svg", "form", "a"}
    names = {name for _, attrs in found.tags for name in attrs}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href", "style", "srcset", "action"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    if n_hosts == 200:
        assert len(text) < 6_000_000
        row = cells[9 * 200 : 10 * 200]
        assert (row[149]["class"], row[76]["class"]) == ("dead", "dead")
        assert row[149]["title"] == "10 to 150: dead; the last RTT was 0.74 ms, 1m35s ago; path MTU 1472"


def test_page_of_three_hosts_has_figures_tips_and_legends() -> None:
    def fault(start: int, end: int, said: dict[str, Any]) -> None:
        if (start, end) == (3, 1):
            dead(said)
        elif (start, end) == (1, 2):
            lossy(said)
            narrow(said)

    it = mesh(3, fault)
    found = Parsed(page.render(it, problems_of(it), notes_of(it)))
    cells = found.cells()
    assert [cell["class"] for cell in cells[:3]] == ["self", "s1 l3 m1 odd", "s0 l0 m0"]
    assert cells[1]["title"] == (
        "1 (10.244.1.0/24) to 2 (10.244.2.0/24): alive; RTT 0.12 ms, 12s ago; 12 of 40 probes lost; "
        "path MTU 1400 of 1472"
    )
    assert "0.12301400" in found.text
    assert "deaddeaddead" in found.text
    assert "< 0.1 ms" in found.text
    assert "up to 50 % lost" in found.text
    assert "up to 100 bytes less" in found.text
    assert "3 problems" in found.text


def test_nothing_that_comes_from_elsewhere_is_markup() -> None:
    """All that a page says of others passes through two checks: what a view may hold, and this."""
    own = view(1, 2)
    evil = "<script>alert(1)</script>\"'><b onx=1>"
    it = build(own, own.peers, {own.peers[0].subnet: Answer(None, evil, is_wrong=True)}, made_at=0, took_s=0, port=1)
    text = page.render(it, problems_of(it), [evil])
    found = Parsed(text)
    assert "<script" not in text
    assert "<b onx" not in text
    assert found.text.count(evil) == 3
    assert any(attrs.get("title", "").endswith(evil) for tag, attrs in found.tags if tag == "th")

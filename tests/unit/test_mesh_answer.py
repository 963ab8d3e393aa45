"""What another host says is bounded and checked before any of it is shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_views import document, peer

from udptun.commands.mesh import ask, page, report, table
from udptun.commands.mesh.answer import MOST_BYTES, AnswerError, read_view
from udptun.commands.mesh.ask import Answer, Question, ask_all
from udptun.commands.mesh.matrix import build
from udptun.commands.mesh.problems import notes_of, problems_of
from udptun.commands.screen import Page
from udptun.core.mesh import MOST_PEERS

SUBNET = IPv4Network("10.244.2.0/24")
HERE = IPv4Address("127.0.0.1")


def test_a_view_is_read_with_all_that_it_says_and_unknown_keys_are_ignored() -> None:
    ipv6 = {
        key: peer(1)[key]
        for key in ("liveness", "rtt_ms", "rtt_age_s", "path_mtu", "probes_sent", "probes_lost", "mtu")
    }
    said = document(2, 3, more="of a later version")
    said["peers"][0] |= {"more": {}, "ipv6": {**ipv6, "path_mtu": 1280}, "ipv6_subnet": "fd00:244:0:1::/64"}
    view = read_view(json.dumps(said).encode())
    assert (view.subnet, view.backend, view.mtu, view.n_peers) == (SUBNET, "udp", 1472, 2)
    first, second = view.peers
    assert (str(first.subnet), str(first.ipv6_subnet)) == ("10.244.1.0/24", "fd00:244:0:1::/64")
    assert first.ipv6 is not None
    assert first.ipv6.is_narrow
    assert not first.found.is_narrow
    assert (second.found.liveness, second.found.rtt_age_s, second.ipv6) == ("alive", 12.0, None)


def test_a_host_that_does_not_probe_says_nothing_of_its_ways() -> None:
    nothing = dict.fromkeys(("liveness", "rtt_ms", "rtt_age_s", "path_mtu", "probes_sent", "probes_lost", "mtu"))
    view = read_view(json.dumps(document(2, 1, peers=[peer(1, **nothing)], n_peers=1)).encode())
    assert (view.peers[0].found.liveness, view.peers[0].found.loss) == (None, None)


def with_peer(**changes: Any) -> Any:
    return document(2, 1, peers=[peer(1, **changes)])


def without(key: str) -> Any:
    said = document(2, 1)
    del said[key]
    return said


HOSTILE: list[tuple[Any, str]] = [
    (b"", "it is no JSON document"),
    (b"{", "it is no JSON document"),
    (b"\xff\xfe", "it is no JSON document"),
    (b"[" * 100_000, "it is no JSON document"),
    (b"1" * 10_000, "it is no JSON document"),
    (b'{"schema": NaN}', "it is no JSON document"),
    (b" " * (MOST_BYTES + 1), f"it has more than {MOST_BYTES} bytes"),
    ([], "it is no object"),
    (None, "it is no object"),
    ({}, "it has no schema"),
    (document(2, 1, schema=2), "its schema is 2, and this udptun reads 1"),
    (document(2, 1, schema="\x1b[2J<script>"), 'its schema is "\\u001b[2J<script>", and this udptun reads 1'),
    (without("subnet"), "it has no subnet"),
    (without("peers"), "it has no peers"),
    (document(2, 1, subnet="10.244.2.1/24"), 'subnet of it is "10.244.2.1/24"'),
    (document(2, 1, subnet=7), "subnet of it is 7"),
    (document(2, 1, subnet="fe80::%<b>/64"), 'subnet of it is "fe80::%<b>/64"'),
    (document(2, 1, public_ip=["x"]), "public_ip of it is no value of its kind"),
    (document(2, 1, version="1\x1b]0;x\x07"), 'version of it is "1\\u001b]0;x\\u0007"'),
    (document(2, 1, version="<script>alert(1)</script>"), 'version of it is "<script>alert(1)</script>"'),
    (document(2, 1, version="1" * 100_000), f'version of it is "{"1" * 39}...'),
    (document(2, 1, version=""), 'version of it is ""'),
    (document(2, 1, backend="ü\u202e"), 'backend of it is "\\u00fc\\u202e"'),
    (document(2, 1, probes="off: \x9b2J"), 'probes of it is "off: \\u009b2J"'),
    (document(2, 1, probes="x" * 500), f'probes of it is "{"x" * 39}...'),
    (document(2, 1, mtu=True), "mtu of it is true"),
    (document(2, 1, mtu=-1), "mtu of it is -1"),
    (document(2, 1, mtu=1472.5), "mtu of it is 1472.5"),
    (document(2, 1, mtu=65536), "mtu of it is 65536"),
    (document(2, 1, mesh_port=1e300), "mesh_port of it is 1e+300"),
    (document(2, 1, made_at="now"), 'made_at of it is "now"'),
    (document(2, 1, n_peers=None), "n_peers of it is null"),
    (document(2, 1, peers={}), "peers is no list"),
    (document(2, 1, peers=[3]), "peers[0] is no object"),
    (document(2, 1, peers=[peer(1)] * (MOST_PEERS + 1)), "it has 1001 peers, more than 1000"),
    (document(2, 1, peers=[peer(1), peer(1)]), "it has two peers of one subnet"),
    (with_peer(liveness="\nalive"), 'liveness of peers[0] is "\\nalive"'),
    (with_peer(liveness=1), "liveness of peers[0] is 1"),
    (with_peer(rtt_ms="abc"), 'rtt_ms of peers[0] is "abc"'),
    (with_peer(rtt_ms=-0.1), "rtt_ms of peers[0] is -0.1"),
    (with_peer(rtt_ms=10**400), "rtt_ms of peers[0] is 1"),
    (with_peer(rtt_age_s=1e10), "rtt_age_s of peers[0] is 10000000000.0"),
    (with_peer(path_mtu=10**9), "path_mtu of peers[0] is 1000000000"),
    (with_peer(probes_lost=5), "peers[0] has lost more probes than were sent"),
    (with_peer(udptun="yes"), 'udptun of peers[0] is "yes"'),
    (with_peer(ipv6=[]), "peers[0].ipv6 is no object"),
    (with_peer(ipv6={"probes_sent": 0}), "peers[0].ipv6 has no probes_lost"),
]


@pytest.mark.parametrize(("said", "why"), HOSTILE, ids=[why[:40] for _, why in HOSTILE])
def test_an_answer_that_is_none_gets_one_short_line_of_printable_ascii(said: Any, why: str) -> None:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    with pytest.raises(AnswerError) as caught:
        read_view(body)
    line = str(caught.value)
    assert line.startswith(why)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 160


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["10.0.0.0/8", "1::"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150)
def test_any_value_anywhere_is_refused_in_one_line_or_shown_without_harm(data: st.DataObject) -> None:
    said = document(2, 4)
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from([said, *(it for it in said["peers"] if it and isinstance(it, dict))]))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(VALUES)
        if not isinstance(said["peers"], list):
            break
    view, refusal = None, ""
    try:
        view = read_view(json.dumps(said).encode())
    except AnswerError as exc:
        refusal = f"its answer is not used: {exc}"
    assert set(refusal) <= {*map(chr, range(0x20, 0x7F))}
    own = read_view(json.dumps(document(1, 4)).encode())
    it = build(own, own.peers, {SUBNET: Answer(view, refusal, is_wrong=view is None)}, made_at=0, took_s=0, port=1)
    problems, notes = problems_of(it), notes_of(it)
    assert all(set(line) <= SHOWN for line in table.render(it, problems, notes, Page()))
    assert "<script" not in page.render(it, problems, notes)
    json.loads(report.as_json(it, problems, notes))


SHOWN = {*map(chr, range(0x20, 0x7F)), "·", "…"}

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def answer_of(talk: Talk, wait_s: float = 10.0) -> Answer:
    """What becomes of asking somebody who behaves so, and of the host that is asked beside."""

    async def main() -> Answer:
        server = await asyncio.start_server(talk, str(HERE), 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            answers = await ask_all([Question(SUBNET, HERE, HERE)], port, wait_s)
        return answers[SUBNET]

    return asyncio.run(main())


def says(*parts: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /mesh HTTP/1.1\r\n")
        for part in parts:
            writer.write(part)
        writer.close()

    return talk


OK = b"HTTP/1.1 200 OK\r\n\r\n"


def test_a_host_that_answers_has_a_view() -> None:
    answer = answer_of(says(OK, json.dumps(document(2, 3)).encode()))
    assert answer.view is not None
    assert answer.view.subnet == SUBNET
    assert 0 < answer.took_s < 10


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((), "it hung up without an answer: it does not know this host for a peer"),
        ((b"SSH-2.0-OpenSSH_9.2\r\n",), "its answer is not used: it is none of an HTTP server"),
        ((b"HTTP/1.1 ok\r\n\r\n",), "its answer is not used: it is none of an HTTP server"),
        (
            (b"HTTP/1.1 404 not found\r\n\r\n",),
            "its answer is not used: it has HTTP status 404, so something else listens at the port",
        ),
        ((OK, b"{}"), "its answer is not used: it has no schema"),
        ((OK, b"x" * (2 * MOST_BYTES)), f"its answer is not used: it has more than {MOST_BYTES} bytes"),
        (
            (OK, json.dumps(document(3, 3)).encode()),
            "its answer is not used: it comes from the host of 10.244.3.0/24",
        ),
    ],
)
def test_an_answer_that_is_not_used_has_a_reason(parts: tuple[bytes, ...], why: str) -> None:
    answer = answer_of(says(*parts))
    assert (answer.view, answer.reason, answer.is_wrong) == (None, why, "not used" in why)


def test_a_host_that_is_known_by_its_ipv6_subnet_alone_may_say_both() -> None:
    by_ipv6 = IPv6Network("fd00:244:0:2::/64")
    said = json.dumps(document(2, 9, ipv6_subnet=str(by_ipv6))).encode()
    answer = ask._read(Question(by_ipv6, HERE, HERE), OK + said, 0.1, {SUBNET, IPv4Network("10.244.5.0/24")})
    assert answer.view is not None
    # Of the peers those are kept that the mesh has, and nothing is said of the others.
    assert [str(it.subnet) for it in answer.view.peers] == ["10.244.5.0/24"]
    assert answer.view.is_whole


def test_a_host_that_says_its_answer_byte_by_byte_costs_no_more_than_the_deadline() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"H")
            await asyncio.sleep(0.01)

    answer = answer_of(drip, 0.2)
    assert (answer.view, answer.reason, answer.is_wrong) == (None, "no answer within 0.2 s", False)


def test_a_closed_port_is_told_from_silence() -> None:
    async def main() -> Answer:
        server = await asyncio.start_server(lambda reader, writer: None, str(HERE), 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return (await ask_all([Question(SUBNET, HERE, HERE)], port, 10))[SUBNET]

    answer = asyncio.run(main())
    assert answer.reason.endswith("is closed there: no --mesh-port, or an earlier version")


def test_an_error_without_a_name_has_a_reason_all_the_same() -> None:
    assert ask._why_not(OSError("several"), 1) == "cannot ask it (no reason given)"

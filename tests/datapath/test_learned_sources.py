"""Packets from addresses that are no peer's PublicIP: which of them the control plane gets, and what it makes of them.

First the rules, over both implementations; then the limits; then the table; then the control plane's learner, with the
test in the part of peers and attackers.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.datapath.harness import Datapath, FastDatapath
from tests.packets import (
    LEARNED,
    MTU,
    NARROW,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    OWN,
    POD,
    STRANGER,
    TWIN_OTHER_POD,
    TWIN_POD,
    icmp_message,
    ipv4,
    udp,
    vxlan,
)
from tests.reference import Outcome
from udptun._fastpath import LAYOUT
from udptun.core.echo import parse_echo_reply, parse_echo_request
from udptun.core.tunnel import SourceCheck
from udptun.datapath import learner as learner_module
from udptun.datapath import learning
from udptun.datapath.learner import Learner
from udptun.datapath.peer_entries import PeerEntries
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.table import TableWriter

ID, SEQUENCE = 0x5EED, 0x1234
NEAR_SUBNET, NARROW_SUBNET = IPv4Network("10.244.2.0/24"), IPv4Network("10.244.3.0/24")
NEAR_TUNNEL, TWIN_TUNNEL = "10.244.2.0", "10.244.4.0"
ROOM = LAYOUT["ring_slots"] // 4
NONCE = b"a nonce "


def echo(
    kind: int,
    source: str = NEAR_TUNNEL,
    destination: str = OWN,
    *,
    id: int = ID,
    sequence: int = SEQUENCE,
    data: bytes = NONCE,
    **header: object,
) -> bytes:
    message = icmp_message(kind, rest=struct.pack(">HH", id, sequence), data=data)
    return ipv4(source, destination, message, **{"protocol": 1, **header})  # type: ignore[arg-type]


def answer(source: str = NEAR_TUNNEL, destination: str = OWN, **more: Any) -> bytes:
    return echo(0, source, destination, **more)


def question(source: str = NEAR_TUNNEL, destination: str = OWN, **more: Any) -> bytes:
    return echo(8, source, destination, **more)


# ------------------------------------------------------------------------------------------------------ the rules

HANDED_OVER = {
    "an answer": answer(),
    "an answer with more data": answer(data=bytes(100)),
    "an answer with options": answer(options=b"\1" * 8),
    "an answer of another lease": answer(TWIN_TUNNEL),
    "an answer with an inner source that is no tunnel address": answer(NEAR_POD),
    "an answer without a step left": answer(ttl=1),
    "a question": question(),
    "a question of any id": question(id=1, sequence=2),
}
DROPPED = {
    "an answer with another id": answer(id=ID + 1),
    "an answer with another sequence": answer(sequence=SEQUENCE + 1),
    "an answer to a pod": answer(destination=POD),
    "an answer of nobody's lease": answer("10.244.200.0"),
    "an answer from outside": answer("198.51.100.7"),
    "an answer with a wrong checksum": answer()[:-1] + b"?",
    "an answer in fragments": answer(flags="MF"),
    "a later fragment": answer(offset=64),
    "an ICMP header that is cut": ipv4(NEAR_TUNNEL, OWN, answer()[20:27], protocol=1),
    "another protocol": answer(protocol=50),
    "a timestamp reply": echo(14),
    "a probe, which has no sequence": question(sequence=0),
    "a shorter question": question(data=b""),
    "a longer question": question(data=bytes(9)),
    "a question with options": question(data=b"", options=b"\1" * 8)[:-1] + b"?",
    "a question to a pod": question(destination=POD),
    "a packet": udp(NEAR_POD, POD),
}


def test_questions_and_answers_from_strangers_reach_the_control_plane_alone(datapath: Datapath) -> None:
    datapath.configure(punt_id=ID, learn_id=ID << 16 | SEQUENCE)
    strays = take_strays(datapath) if isinstance(datapath, FastDatapath) else None
    for n, (name, packet) in enumerate(HANDED_OVER.items()):
        # Each from another address: questions have their turns.
        source = f"127.9.9.{n + 1}"
        outcome = datapath.decap(packet, source)
        assert replace(outcome, punts=()) == Outcome("decap_punted"), name
        if strays is None:
            assert outcome.punts == (packet,)
        else:
            (punt,) = strays()
            assert (punt.packet, punt.outer, punt.is_stray) == (packet, IPv4Address(source), True)


def test_whatever_else_a_stranger_sends_is_dropped(datapath: Datapath) -> None:
    datapath.configure(punt_id=ID, learn_id=ID << 16 | SEQUENCE)
    for name, packet in DROPPED.items():
        assert datapath.decap(packet, STRANGER) == Outcome("decap_drop_unknown_peer"), name


def test_nothing_of_a_stranger_is_handed_over_where_nothing_is_learned(datapath: Datapath) -> None:
    number = ID << 16 | SEQUENCE
    for how in ({"source_check": "strict", "punt_id": ID}, {"source_check": "peer", "punt_id": 0}):
        datapath.configure(**how, learn_id=number)
        for packet in (answer(), question()):
            assert datapath.decap(packet, STRANGER) == Outcome("decap_drop_unknown_peer")
    # The PublicIP of another peer says who that is.
    datapath.configure(punt_id=ID)
    for packet in (answer(), question()):
        assert datapath.decap(packet, NARROW) == Outcome("decap_drop_source_spoofed")


def test_no_answer_is_handed_over_while_nobody_is_asked(datapath: Datapath) -> None:
    datapath.configure(punt_id=ID)
    for it in (answer(), answer(id=0, sequence=0), answer(sequence=0)):
        assert datapath.decap(it, STRANGER) == Outcome("decap_drop_unknown_peer")


# ----------------------------------------------------------------------------------------------------- the limits


def take_strays(fast: FastDatapath) -> Callable[[], list[Any]]:
    """What `Rings` gives to whoever takes first, each time since the last."""
    taken: list[Any] = []

    def take(punt: Any) -> bool:
        taken.append(punt)
        return True

    fast.rings.take_first = take

    def since() -> list[Any]:
        assert list(fast.rings.take_punts()) == []
        now, taken[:] = list(taken), []
        return now

    return since


def send(fast: FastDatapath, packets: list[bytes], source: str = STRANGER) -> None:
    for packet in packets:
        fast.send_from(source, vxlan(packet) if fast.table.vtep else packet)
    while fast.turn():
        pass


def test_strays_get_a_quarter_of_the_ring(fast: FastDatapath) -> None:
    """And what comes from peers gets the rest, whatever strangers send."""
    fast.configure(punt_id=ID, learn_id=ID << 16 | SEQUENCE)
    send(fast, [answer()] * 100)
    assert (fast.counters["decap_punted"], fast.counters["decap_drop_unknown_peer"]) == (ROOM, 100 - ROOM)
    send(fast, [answer(NEAR_POD)] * 10, NEAR)
    send(fast, [answer()] * 10)
    assert (fast.counters["decap_punted"], fast.counters["decap_drop_punt_full"]) == (ROOM + 10, 0)
    # Nobody takes them first, so nobody gets them, the TUN least of all.
    assert len(list(fast.rings.take_punts())) == 10
    send(fast, [answer()])
    assert fast.counters["decap_punted"] == ROOM + 11


def test_questions_reach_the_control_plane_once_a_second_and_address(fast: FastDatapath) -> None:
    """Those of others do not take the turn away."""
    fast.configure(punt_id=ID)
    began_s = time.monotonic()
    send(fast, [question()] * 50)
    send(fast, [question()] * 50, "127.9.9.9")
    seconds = int(time.monotonic()) - int(began_s) + 1
    assert 2 <= fast.counters["decap_punted"] <= 2 * seconds
    assert sum(fast.counters[name] for name in ("decap_punted", "decap_drop_unknown_peer")) == 100


def test_a_flood_of_questions_from_thousands_of_addresses_is_bounded_by_the_slots(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    strays = take_strays(fast)
    any_source = fast.socket_of_any_source()
    payload = vxlan(question()) if fast.table.vtep else question()
    began_s, n = time.monotonic(), 0
    for i in range(5000):
        info = struct.pack("=i4s4s", 0, socket.inet_aton(f"127.33.{i >> 8}.{i & 255}"), bytes(4))
        any_source.sendmsg([payload], [(socket.IPPROTO_IP, 8, info)], 0, fast.udp.getsockname())
        if i % 50 == 49:
            while fast.turn():
                pass
            n += len(strays())
    seconds = int(time.monotonic()) - int(began_s) + 1
    assert 0 < n <= LAYOUT["strays"] * seconds


# ------------------------------------------------------------------------------------------------------ the table


def port_of(fast: FastDatapath, ip: str) -> int:
    return int(fast.socket_of(ip).getsockname()[1])


def test_what_was_learned_holds_for_that_port_that_address_and_that_lease(fast: FastDatapath) -> None:
    assert fast.decap(udp(TWIN_POD, POD), STRANGER).counter == "decap_drop_unknown_peer"
    twin, other = IPv4Network("10.244.4.0/24"), port_of(fast, STRANGER) ^ 1
    where = IPv4Address(STRANGER)
    for port, counter in (
        (port_of(fast, STRANGER), "decap_delivered"),
        (0, "decap_delivered"),
        (other, "decap_drop_unknown_peer"),
    ):
        fast.configure(learned=((twin, where, port),))
        assert fast.decap(udp(TWIN_POD, POD), STRANGER).counter == counter
        for pod in (TWIN_OTHER_POD, NEAR_POD):
            assert fast.decap(udp(pod, POD), STRANGER).counter == "decap_drop_unknown_peer"
        assert fast.decap(udp(TWIN_POD, POD), LEARNED).counter == "decap_drop_unknown_peer"


def test_packets_from_a_learned_address_are_the_peers(fast: FastDatapath) -> None:
    before = fast.peer_counts(NEAR_POD)
    fast.decap(udp(NEAR_POD, POD), LEARNED)
    assert [now - then for now, then in zip(fast.peer_counts(NEAR_POD), before, strict=True)][2] == 1
    assert fast.strays() == []


def test_many_learned_addresses_are_found_each_with_its_own_peer(fast: FastDatapath) -> None:
    subnets = [peer.subnet for peer in fast.table.peers]
    learned = [(subnets[n % len(subnets)], IPv4Address(f"127.40.{n}.1"), 0) for n in range(200)]
    learned += [(subnets[(n + 1) % len(subnets)], IPv4Address(f"127.40.{n}.1"), 0) for n in range(0, 200, 3)]
    fast.configure(learned=tuple(learned))
    for n in range(0, 200, 7):
        for subnet in subnets:
            is_learned = (subnet, IPv4Address(f"127.40.{n}.1"), 0) in learned
            expected = "decap_delivered" if is_learned else "decap_drop_unknown_peer"
            assert fast.decap(udp(str(subnet[2]), POD), f"127.40.{n}.1").counter == expected


HERE, THERE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
PEER = IPv4Network("10.1.1.0/24")


def settings(source_check: SourceCheck = SourceCheck.PEER, punt_id: int = ID) -> PacketSettings:
    own = IPv4Network("10.1.0.0/24")
    return PacketSettings(IPv4Network("10.1.0.0/16"), own, HERE, MTU, source_check, punt_id=punt_id)


def remote(n: int, **more: Any) -> Remote:
    return Remote(IPv4Address("203.0.113.0") + n, 8285, True, **more)


@pytest.fixture
def table() -> Iterator[TableWriter]:
    table = TableWriter.create()
    table.configure(settings())
    table.set_peer(PEER, remote(1), MTU)
    table.set_learned(PEER, {THERE: 8285})
    yield table
    table.close()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda it: it.remove_peer(PEER), id="the lease ends"),
        pytest.param(lambda it: it.set_peer(PEER, remote(2), MTU), id="the peer moves"),
        pytest.param(lambda it: it.set_peer(PEER, Remote(remote(1).address, 1, True), MTU), id="to another port"),
        pytest.param(
            lambda it: it.set_peer(PEER, remote(1, takes_any_source_port=True), MTU), id="may send from any port"
        ),
        pytest.param(lambda it: it.configure(settings(SourceCheck.STRICT)), id="strict"),
        pytest.param(lambda it: it.configure(settings(SourceCheck.OFF)), id="off"),
        pytest.param(lambda it: it.configure(settings(punt_id=0)), id="no probes"),
        pytest.param(lambda it: it.set_learned(PEER, {}), id="forgotten"),
        pytest.param(
            lambda it: it.set_peer(IPv4Network("10.1.2.0/24"), Remote(THERE, 8285, True), MTU), id="another peer's"
        ),
    ],
)
def test_what_was_learned_ends_with_the_reason_for_it(
    table: TableWriter, change: Callable[[TableWriter], object], fast: FastDatapath
) -> None:
    assert table.publish(fast.stats)
    assert table.learned(PEER) == {THERE: 8285}
    change(table)
    assert table.publish(fast.stats)
    assert (table.learned(PEER), table.n_learned) == ({}, 0)
    # An earlier lease of the subnet has no part in it either.
    table.configure(settings())
    table.set_peer(PEER, remote(1), MTU)
    assert table.publish(fast.stats)
    assert table.learned(PEER) == {}


def test_what_was_learned_stays_while_a_peer_is_dead_or_its_path_narrow(table: TableWriter) -> None:
    table.set_peer(PEER, remote(1), 1300, is_dead=True, received=5)
    table.set_peer(PEER, remote(1), MTU)
    assert table.learned(PEER) == {THERE: 8285}


def test_the_next_control_plane_goes_on_with_what_was_learned(table: TableWriter, fast: FastDatapath) -> None:
    table.ask(5)
    assert table.publish(fast.stats)
    second = TableWriter(table.fd)
    assert second.learned(PEER) == {THERE: 8285}
    second.set_peer(PEER, remote(1), MTU)
    assert second.publish(fast.stats)
    assert TableWriter(second.fd).learned(PEER) == {THERE: 8285}
    # The host has moved while there was no daemon.
    second.set_peer(PEER, remote(2), MTU)
    assert second.learned(PEER) == {}


def test_the_filter_of_a_flood_lets_in_what_was_learned_and_what_is_asked_for(table: TableWriter) -> None:
    asked = [HERE, HERE + 7]
    assert table.next_sources(9) == {THERE, remote(1).address}
    table.ask(7, asked)
    assert table.next_sources(4) == {*asked, THERE, remote(1).address}
    # Not at the price of the filter.
    assert table.next_sources(3) == {THERE, remote(1).address}
    table.ask(0)
    assert table.next_sources(9) == {THERE, remote(1).address}


# ---------------------------------------------------------------------------------------------------- the learner


class Host:
    """A learner over a worker that is turned by hand.  The test is the peers, and whoever else there is."""

    def __init__(self, fast: FastDatapath) -> None:
        self.fast, self.table, self.rings, self.stats = fast, fast._writer, fast.rings, fast.stats
        fast.configure(punt_id=ID, learned=())
        peers = {
            peer.subnet: Remote(*peer.remote, True, fast.table.vtep is not None, peer.mac) for peer in fast.table.peers
        }
        self.peers = PeerEntries(self.table, self.stats)
        self.learner = Learner(self, lambda: 1)  # type: ignore[arg-type]
        self.learner.add_peers(peers)
        self.learner.switch(is_on=True, own_addresses={4: IPv4Address(OWN)}, echo_id=ID)

    async def publish(self) -> None:
        assert self.table.publish(self.stats)

    def look(self) -> list[Any]:
        """What the learner sends in one look: each packet, with the peer that gets it."""
        n = self.fast.counters["inject_sent"]
        with pytest.raises(StopIteration):
            self.learner._look().send(None)
        return self.sent(n)

    def sent(self, n_before: int) -> list[Any]:
        """Since then."""
        self.turn()
        sends = self.fast.collect(self.fast.counters["inject_sent"] - n_before).sends
        return [(str(at), packet) for (at, _), packets in sends.items() for packet in packets]

    def turn(self) -> None:
        while self.fast.turn():
            pass
        assert list(self.rings.take_punts()) == []

    def get(self, packet: bytes, source: str) -> None:
        send(self.fast, [packet], source)
        self.turn()

    def asked(self, n: int = 1) -> list[Any]:
        """The questions of one look, each with the peer's address."""
        found = [(at, parse_echo_request(packet)) for at, packet in self.look()]
        assert len(found) == n
        assert all(it is not None for _, it in found)
        return found

    def answered(self, question: Any, source: str, **changes: Any) -> None:
        """Have `source` give the answer of the peer that was asked."""
        it = {"id": question.id, "sequence": question.sequence, "data": question.nonce, **changes}
        self.get(answer(str(question.destination), **it), source)
        assert self.look() == []

    def is_taken_from(self, source: str, pod: str = NEAR_POD) -> bool:
        outcome = self.fast.decap(udp(pod, POD), source)
        assert outcome.counter in ("decap_delivered", "decap_drop_unknown_peer")
        return outcome.counter == "decap_delivered"


@contextmanager
def host_of(*, is_vxlan: bool = False) -> Iterator[Host]:
    with FastDatapath(is_vxlan=is_vxlan) as fast:
        yield Host(fast)


@pytest.fixture(params=[False, True], ids=["udp", "vxlan"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with host_of(is_vxlan=request.param) as host:
        yield host


def test_a_stray_has_the_peer_asked_at_its_public_ip_and_the_answer_is_learned(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert host.look() == []
    assert not host.is_taken_from(STRANGER)
    ((asked_at, it),) = host.asked()
    assert (asked_at, str(it.source), str(it.destination), it.id) == (NEAR, OWN, NEAR_TUNNEL, ID)
    host.answered(it, STRANGER)
    assert host.is_taken_from(STRANGER)
    assert not host.is_taken_from(STRANGER, NARROW_POD)
    port = None if host.fast.table.vtep else port_of(host.fast, STRANGER)
    assert host.learner.document(NEAR_SUBNET) == [{"address": STRANGER, "port": port}]
    assert host.learner.document(NARROW_SUBNET) == []
    said = f"subnet={NEAR_SUBNET} public_ip={NEAR} address={STRANGER} port={port or 'any'}"
    assert [line for line in caplog.messages if said in line] == [caplog.messages[0]]


def test_what_came_before_an_address_was_learned_is_explained(host: Host) -> None:
    host.is_taken_from(STRANGER)
    where = IPv4Address(STRANGER)
    assert not host.learner.explains(NEAR_SUBNET, where, time.monotonic())
    ((_, it),) = host.asked()
    host.answered(it, STRANGER)
    assert host.learner.explains(NEAR_SUBNET, where, time.monotonic())
    # Later ones come from another port, unless any will do.
    assert host.learner.explains(NEAR_SUBNET, where, time.monotonic() + 60) == (host.fast.table.vtep is not None)
    assert not host.learner.explains(NARROW_SUBNET, where, time.monotonic())


def _replayed(host: Host, it: Any) -> None:
    host.answered(it, NEAR)
    host.answered(it, STRANGER)


def _too_late(host: Host, it: Any) -> None:
    host.learner._ends_s = 0
    host.look()
    host.answered(it, STRANGER)


def _with_a_question(host: Host, it: Any) -> None:
    """It is answered, at the peer's PublicIP."""
    n = host.fast.counters["inject_sent"]
    host.get(question(id=it.id, sequence=it.sequence, data=it.nonce), STRANGER)
    ((at, _),) = host.sent(n)
    assert at == NEAR


def _of_another_lease(host: Host, it: Any) -> None:
    host.get(answer(TWIN_TUNNEL, id=it.id, sequence=it.sequence, data=it.nonce), STRANGER)


def _after_the_peer_has_moved(host: Host, it: Any) -> None:
    """What was asked where it was says nothing of where it is."""
    (peer,) = (peer for peer in host.fast.table.peers if peer.subnet == NEAR_SUBNET)
    moved = Remote(*peer.remote, False, host.fast.table.vtep is not None, peer.mac)
    host.table.set_peer(NEAR_SUBNET, moved, MTU)
    host.learner.add_peers({NEAR_SUBNET: moved})
    host.get(answer(id=it.id, sequence=it.sequence, data=it.nonce), STRANGER)
    # It is asked again.
    ((_, again),) = host.asked()
    assert again.nonce != it.nonce


def _strict(host: Host, it: Any) -> None:
    host.fast.configure(source_check="strict")
    host.learner.switch(is_on=False, own_addresses={4: IPv4Address(OWN)}, echo_id=ID)
    host.answered(it, STRANGER)


ATTACKS: dict[str, Callable[[Host, Any], None]] = {
    "sees only his own packets, and answers with a nonce of his": (
        lambda host, it: host.answered(it, STRANGER, data=b"a guess.")
    ),
    "guesses id and sequence as well": (
        lambda host, it: host.answered(it, STRANGER, id=it.id ^ 1, sequence=it.sequence ^ 1, data=b"a guess.")
    ),
    "has the nonce of the peer's question, in a round of another sequence": (
        lambda host, it: host.answered(it, STRANGER, sequence=it.sequence ^ 1)
    ),
    "sends a question in place of an answer": _with_a_question,
    "repeats an answer that the peer has given": _replayed,
    "repeats an old answer": _too_late,
    "answers with the inner source of another lease": _of_another_lease,
    "is where the peer was before it moved": _after_the_peer_has_moved,
    "comes when the check has become strict": _strict,
    "is another peer": lambda host, it: host.answered(it, NARROW),
}


@pytest.mark.parametrize("attacker", ATTACKS)
def test_an_attacker_gains_nothing_who(host: Host, attacker: str) -> None:
    """Packets of a peer were let in from wherever its answer came.  None of these is that answer."""
    host.is_taken_from(STRANGER)
    ((_, it),) = host.asked()
    ATTACKS[attacker](host, it)
    learned = [host.table.learned(peer.subnet) for peer in host.fast.table.peers]
    assert learned == [{}] * len(learned)
    assert not host.is_taken_from(STRANGER)


def test_an_answer_from_public_ip_has_nobody_learned(host: Host) -> None:
    host.is_taken_from(STRANGER)
    ((_, it),) = host.asked()
    host.answered(it, NEAR)
    assert not host.is_taken_from(STRANGER)
    assert host.table.learned(NEAR_SUBNET) == {}


def test_strangers_get_nothing_back_and_peers_no_more_than_strangers_send(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They claim inner sources of three peers, from hundreds of addresses, and ask questions in their names."""
    # Each look is a round.
    monkeypatch.setattr(learner_module, "ROUND_S", 0)
    n_before = host.fast.counters["inject_sent"]
    got: list[Any] = []
    for n in range(300):
        tunnel = (NEAR_TUNNEL, TWIN_TUNNEL, "10.244.16.0")[n % 3]
        host.get(question(tunnel) if n % 2 else udp(tunnel, POD), f"127.50.{n % 20}.{n % 250}")
        if n % 30 == 29:
            got += host.look()
    got += host.sent(n_before + len(got)) if host.fast.counters["inject_sent"] > n_before + len(got) else []
    assert {at for at, _ in got} <= {str(peer.remote[0]) for peer in host.fast.table.peers}
    assert all(len(packet) == 36 for _, packet in got)
    questions = [it for it in got if parse_echo_request(it[1])]
    # ASK_S and ANSWER_S are longer than this takes, or little shorter.
    assert len(questions) == 3
    assert 0 < len(got) - len(questions) <= 3 * 5


def test_a_question_that_is_a_stray_is_answered_at_public_ip(host: Host) -> None:
    """Both hosts are behind such a NAT: each was a stranger to the other one, and neither would answer."""
    n = host.fast.counters["inject_sent"]
    host.get(question(id=77, sequence=9), STRANGER)
    ((at, packet),) = host.sent(n)
    reply = parse_echo_reply(packet)
    assert reply is not None
    assert (at, str(reply.source), str(reply.destination)) == (NEAR, OWN, NEAR_TUNNEL)
    assert (reply.id, reply.sequence, reply.nonce) == (77, 9, NONCE)
    # It is a stray, too.
    assert len(host.asked()) == 1
    # Not when it is no tunnel address that asks.
    n = host.fast.counters["inject_sent"]
    host.get(question("10.244.16.9"), "127.9.9.9")
    assert host.sent(n) == []


def test_a_full_ring_loses_a_question_and_it_is_asked_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "ASK_S", 0.0)
    host.is_taken_from(STRANGER)
    for _ in range(LAYOUT["ring_slots"]):
        host.rings.inject(udp(POD, TWIN_POD))
    with pytest.raises(StopIteration):
        host.learner._look().send(None)
    host.turn()
    host.fast.collect(LAYOUT["ring_slots"])
    deadline = time.monotonic() + 30
    while not host.learner._asked:
        assert time.monotonic() < deadline
        host.is_taken_from(STRANGER)
        sent = host.look()
    ((_, packet),) = sent
    host.answered(parse_echo_request(packet), STRANGER)
    assert host.is_taken_from(STRANGER)

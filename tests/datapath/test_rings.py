"""Packets that the control plane has the workers send, and those that the workers hand to it.

First the rules, over both implementations; then the rings themselves, turn by turn; then processes that are killed.
"""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests import reference
from tests.datapath.harness import Datapath, FastDatapath
from tests.datapath.test_processes import OWN as OWN_SUBNET
from tests.datapath.test_processes import PEER as PEER_SUBNET
from tests.datapath.test_processes import Rig, until, with_datapath
from tests.packets import (
    DEAF_POD,
    MTU,
    NARROW,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NO_VNET_HDR,
    OUTSIDE,
    OWN,
    POD,
    STRANGER,
    UNLEASED,
    WIDE_POD,
    icmp_message,
    internet_sum,
    ipv4,
    stepped,
    udp,
    vxlan,
)
from tests.reference import Outcome
from udptun._fastpath import FIELDS, LAYOUT
from udptun.core.echo import NONCE_LEN, echo_request, parse_echo_reply
from udptun.core.tunnel import SourceCheck
from udptun.datapath import processes, supervision
from udptun.datapath.restarts import Death
from udptun.datapath.rings import Injected, Punt, Result, Rings, new_events
from udptun.datapath.settings import PacketSettings
from udptun.datapath.stats import Stats

ID = 0x5EED
SLOTS, SLOT_BYTES = LAYOUT["ring_slots"], LAYOUT["ring_bytes"]


def reply(
    data: bytes = b"a nonce ",
    *,
    type_: int = 0,
    id: int = ID,
    source: str = NEAR_POD,
    destination: str = OWN,
    **header: object,
) -> bytes:
    message = icmp_message(type_, rest=struct.pack(">HH", id, 7), data=data)
    return ipv4(source, destination, message, **{"protocol": 1, **header})  # type: ignore[arg-type]


def numbered(number: int) -> bytes:
    return udp(POD, NEAR_POD, struct.pack("=Q", number))


# ------------------------------------------------------------------------------------------------------ the rules

PUNTED = {
    "an echo reply": reply(),
    "without data": reply(b""),
    "as long as the device takes": reply(bytes(MTU - 28)),
    "longer than the device takes": reply(bytes(range(256)) * 10),
    "with options": reply(options=b"\1" * 8),
    "with DF": reply(flags="DF"),
    "of an odd length": reply(b"odd"),
    "from a host of the peer that is not in its subnet": reply(source=OUTSIDE),
    # Its checksum covers what is not in it.
    "the first fragment": ipv4(NEAR_POD, OWN, reply(bytes(64))[20:60], protocol=1, flags="MF"),
}
DELIVERED = {
    "to a pod": reply(destination=POD),
    "of another id": reply(id=ID + 1),
    "an echo request": reply(type_=8),
    "a timestamp reply": reply(type_=14),
    "a later fragment": reply(offset=64),
    "with a wrong checksum": reply()[:-1] + b"?",
    "an ICMP header that is cut": ipv4(NEAR_POD, OWN, reply()[20:27], protocol=1),
    "of another protocol": reply(protocol=17),
    "of another protocol without a port": reply(protocol=50),
}
DROPPED = {
    "decap_drop_unknown_peer": (reply(), STRANGER),
    "decap_drop_source_spoofed": (reply(), NARROW),
    "decap_drop_source_own": (reply(source=OWN), NEAR),
    "decap_drop_source_martian": (reply(source="127.0.0.1"), NEAR),
    "decap_drop_checksum": (reply(checksum=1), NEAR),
}


@pytest.mark.parametrize("name", PUNTED)
def test_what_the_control_plane_waits_for_is_punted_as_it_came(datapath: Datapath, name: str) -> None:
    datapath.configure(punt_id=ID)
    outcome = datapath.decap(PUNTED[name] + b"trailing", NEAR)
    punts = tuple(packet[:SLOT_BYTES] for packet in outcome.punts)
    assert (outcome.counter, punts) == ("decap_punted", (PUNTED[name][:SLOT_BYTES],))
    assert (outcome.writes, outcome.sends, outcome.icmp) == ((), (), None)


@pytest.mark.parametrize("name", DELIVERED)
def test_what_nobody_waits_for_goes_to_the_tun(datapath: Datapath, name: str) -> None:
    datapath.configure(punt_id=ID)
    expected = Outcome("decap_delivered", writes=(NO_VNET_HDR + stepped(DELIVERED[name]),))
    assert datapath.decap(DELIVERED[name], NEAR) == expected


def test_without_an_id_nothing_is_punted(datapath: Datapath) -> None:
    for packet in (reply(), reply(id=0)):
        assert datapath.decap(packet, NEAR).counter == "decap_delivered"
    datapath.configure(punt_id=ID)
    assert datapath.decap(reply(id=0), NEAR).counter == "decap_delivered"


@pytest.mark.parametrize("counter", DROPPED)
def test_what_fails_a_check_is_dropped_and_not_punted(datapath: Datapath, counter: str) -> None:
    datapath.configure(punt_id=ID)
    assert datapath.decap(*DROPPED[counter]) == Outcome(counter)  # type: ignore[arg-type]


def test_what_has_no_step_left_is_answered_and_not_punted(datapath: Datapath) -> None:
    datapath.configure(punt_id=ID)
    outcome = datapath.decap(reply(ttl=1), NEAR)
    assert (outcome.counter, outcome.icmp, outcome.punts) == ("decap_drop_ttl", "icmp_sent", ())


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(echo_request(IPv4Address(OWN), IPv4Address(NEAR_POD), ID, 1, b"a nonce "), id="an echo"),
        pytest.param(udp(POD, NEAR_POD, bytes(300)), id="a datagram"),
        pytest.param(udp(POD, NEAR_POD, ttl=1), id="without a step left"),
        pytest.param(udp(POD, NARROW_POD, b"is narrow"), id="to another peer"),
        pytest.param(udp(POD, WIDE_POD, b"x" * (SLOT_BYTES - 28)), id="that fills a slot"),
        pytest.param(udp(POD, UNLEASED), id="to nobody"),
        pytest.param(udp(POD, OUTSIDE), id="out of the network"),
        pytest.param(udp(POD, DEAF_POD), id="that the kernel refuses"),
        pytest.param(udp(POD, NEAR_POD)[:19], id="that is no packet"),
        pytest.param(udp(POD, NEAR_POD) + b"x", id="of another length"),
        pytest.param(udp(POD, NEAR_POD)[:-1], id="that is cut"),
        pytest.param(ipv4(POD, NEAR_POD, ihl=4), id="with a short header"),
        pytest.param(ipv4(POD, NEAR_POD, ihl=6), id="with too long a header"),
        pytest.param(ipv4(POD, NEAR_POD, version=6), id="of version 6"),
        pytest.param(b"", id="of no bytes"),
    ],
)
def test_an_injected_packet_goes_as_it_is_to_who_leases_its_destination_or_to_the_tun(
    datapath: Datapath, packet: bytes
) -> None:
    is_refused = packet[16:20] == IPv4Address(DEAF_POD).packed
    expected = reference.inject(datapath.table, packet, is_refused=is_refused)
    # The harness takes the prefix off.
    bare = tuple((remote, payload[datapath.table.prefix_len :]) for remote, payload in expected.sends)
    assert datapath.inject(packet) == replace(expected, sends=bare)
    assert datapath.inject(packet, into_tun=True) == reference.inject(datapath.table, packet, into_tun=True)
    datapath.break_tun()
    assert datapath.inject(packet, into_tun=True) == reference.inject(
        datapath.table, packet, into_tun=True, is_refused=True
    )


# ------------------------------------------------------------------------------------------------------ the rings


def leave_punts(fast: FastDatapath, *packets: bytes) -> None:
    """Have the worker take these packets from NEAR."""
    for packet in packets:
        fast.send_from(NEAR, vxlan(packet) if fast.table.vtep else packet)
    while fast.turn():
        pass


def nothing_more(fast: FastDatapath, n_sends: int) -> list[bytes]:
    """The inner packets that NEAR has got; exactly so many."""
    sends = fast.collect(n_sends).sends
    assert set(sends) <= {fast.table.peers[0].remote}
    return [payload for payloads in sends.values() for payload in payloads]


def test_zeros_follow_what_is_in_the_slot(fast: FastDatapath) -> None:
    head = echo_request(IPv4Address(OWN), IPv4Address(NEAR_POD), ID, 1, b"a nonce ", MTU)
    fast.inject(udp(POD, NEAR_POD, b"\xff" * 400))
    ((_, packet),) = fast.inject_zeros(head, MTU).sends
    assert packet == head + bytes(MTU - len(head))
    # Both checksums hold over all of it.
    assert internet_sum(packet[:20]) == internet_sum(packet[20:]) == 0xFFFF


def test_an_injected_packet_may_be_longer_than_the_peers_mtu_and_the_kernel_has_the_last_word(
    fast: FastDatapath,
) -> None:
    source, destination = IPv4Address(OWN), IPv4Address(NARROW_POD)
    head = echo_request(source, destination, ID, 1, b"a nonce ", MTU)
    assert fast.inject_zeros(head, MTU).counter == "inject_sent"
    head = echo_request(source, destination, ID, 1, b"a nonce ", 65_535)
    assert fast.inject_zeros(head, 65_535).counter == "inject_drop_refused"
    injected = fast.rings.injected(2)
    assert injected is not None
    assert (injected.result, os.strerror(injected.error)) == (Result.REFUSED, "Message too long")


def test_the_worker_tells_when_it_has_sent_and_when_it_has_received(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    assert fast.rings.inject(numbered(0)) == 1
    assert fast.rings.injected(1) == Injected(Result.WAITS, 0, 0)
    before_ns = time.monotonic_ns()
    fast.turn()
    injected = fast.rings.injected(1)
    assert injected is not None
    assert injected.result is Result.DONE
    assert before_ns <= injected.time_ns <= time.monotonic_ns()
    assert nothing_more(fast, 1) == [numbered(0)]

    leave_punts(fast, reply(), reply(source=OUTSIDE), reply(bytes(1000)))
    punts = list(fast.rings.take_punts())
    assert [punt.outer for punt in punts] == [IPv4Address(NEAR)] * 3
    assert [punt.peer for punt in punts] == [1, 0, 1]
    assert [punt.length for punt in punts] == [36, 36, 1028]
    times_ns = [injected.time_ns, *(punt.time_ns for punt in punts), time.monotonic_ns()]
    assert times_ns == sorted(times_ns)


def test_a_full_ring_to_the_control_plane_drops_and_counts(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    packets = [reply(struct.pack("=Q", i)) for i in range(SLOTS + 5)]
    leave_punts(fast, *packets)
    counters = fast.counters
    assert (counters["decap_punted"], counters["decap_drop_punt_full"]) == (SLOTS, 5)
    assert counters["decap_packets"] == SLOTS + 5
    assert [punt.packet for punt in fast.rings.take_punts()] == packets[:SLOTS]
    # There is room again, and numbers go on.
    leave_punts(fast, reply(b"the next"))
    assert [punt.packet for punt in fast.rings.take_punts()] == [reply(b"the next")]


def test_a_full_ring_of_the_control_plane_refuses_and_counts(fast: FastDatapath) -> None:
    numbers = [fast.rings.inject(numbered(i)) for i in range(SLOTS + 3)]
    assert numbers == [*range(1, SLOTS + 1), None, None, None]
    assert fast.rings.n_refused == 3
    assert fast.turn()
    assert nothing_more(fast, SLOTS) == [numbered(i) for i in range(SLOTS)]
    assert fast.rings.inject(numbered(0)) == SLOTS + 1
    # The slot of the first one is another one's now.
    assert fast.rings.injected(1) is None
    assert fast.rings.injected(2) is not None
    fast.turn()
    assert nothing_more(fast, 1) == [numbered(0)]
    with pytest.raises(ValueError, match=f"{SLOT_BYTES + 1} bytes"):
        fast.rings.inject(bytes(SLOT_BYTES + 1))


def test_a_slot_that_is_not_what_its_producer_meant_is_never_sent(fast: FastDatapath) -> None:
    """Whatever byte of it is another one."""
    packet = numbered(0)
    fields = FIELDS["ring_slot"]
    not_summed = set(range(fields["result"][0], fields["sequence"][0]))
    not_summed |= set(range(fields["packet"][0] + len(packet), LAYOUT["ring_slot"]))
    for at in range(LAYOUT["ring_slot"]):
        number = fast.rings.inject(packet)
        assert number is not None
        fast.rings.inject_ring.slot(number)[at] ^= 1 << at % 8
        assert fast.turn()
        injected = fast.rings.injected(number)
        # Another sequence is that of no packet.
        if injected is not None:
            assert injected.result is (Result.DONE if at in not_summed else Result.MALFORMED)
    n = len(not_summed)
    counters = fast.counters
    assert (counters["inject_sent"], counters["inject_drop_malformed"]) == (n, LAYOUT["ring_slot"] - n)
    assert nothing_more(fast, n) == [packet] * n


@pytest.mark.parametrize(
    ("word", "value"), [("taken", 9), ("taken", (1 << 64) - 5), ("written", 9999), ("written", (1 << 64) - 1)]
)
def test_the_control_plane_goes_on_with_a_ring_that_something_has_overwritten(
    fast: FastDatapath, word: str, value: int
) -> None:
    """It took nothing from the ring any more, and the worker found no room in it, until the datapath was replaced."""
    fast.configure(punt_id=ID)
    fast.rings.punt_rings[0].store(word, value)
    assert list(fast.rings.take_punts()) == []
    leave_punts(fast, reply(b"the next"))
    assert [punt.packet for punt in fast.rings.take_punts()] == [reply(b"the next")]


@pytest.mark.parametrize(
    ("word", "value"), [("taken", 9), ("written", (1 << 64) - 1), ("written", 9999), ("refused", (1 << 64) - 1)]
)
def test_packets_can_be_injected_once_the_worker_has_seen_an_overwritten_ring(
    fast: FastDatapath, word: str, value: int
) -> None:
    """At the end of the numbers it raised, which ended the prober."""
    fast.turn()
    fast.rings.inject_ring.store(word, value)
    fast.rings.inject(numbered(0))
    assert fast.rings.n_refused < 1 << 64
    fast.turn()
    number = fast.rings.inject(numbered(1))
    assert number is not None
    fast.turn()
    injected = fast.rings.injected(number)
    assert injected is not None
    assert injected.result is Result.DONE
    # The number of no result was a ValueError.
    slot = fast.rings.inject_ring.slot(number)
    slot[FIELDS["ring_slot"]["result"][0]] = 77
    injected = fast.rings.injected(number)
    assert injected is not None
    assert injected.result is Result.MALFORMED
    while fast.collect(0).sends:
        pass


def test_numbers_that_no_producer_has_left_are_not_followed(fast: FastDatapath) -> None:
    for written in (SLOTS + 1, 1 << 63, 5):
        fast.rings.inject_ring.store("written", written)
        assert fast.turn()
        assert not fast.turn()
    assert fast.counters["inject_packets"] == fast.counters["inject_drop_malformed"] == 3
    assert fast.inject(numbered(0)).counter == "inject_sent"


def test_a_punt_that_is_not_what_a_worker_has_written_is_left_out(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    leave_punts(fast, *(reply(struct.pack("=Q", i)) for i in range(4)))
    ring = fast.rings.punt_rings[0]
    ring.slot(2)[70] ^= 1
    struct.pack_into("=I", ring.slot(3), FIELDS["ring_slot"]["kept"][0], 1 << 31)
    assert [punt.packet for punt in fast.rings.take_punts()] == [reply(struct.pack("=Q", i)) for i in (0, 3)]


def test_a_slot_that_a_control_plane_was_killed_with_is_filled_anew_by_the_next_one(fast: FastDatapath) -> None:
    assert fast.inject(numbered(1)).counter == "inject_sent"
    fast.rings.inject_ring.slot(2)[:200] = bytes(range(200))
    assert not fast.turn()
    fast.rings = Rings(fast.stats, ())
    assert fast.inject(numbered(2)).counter == "inject_sent"


def test_a_packet_that_a_worker_was_killed_with_is_not_sent_again(fast: FastDatapath) -> None:
    """It may be what the worker died of."""
    ring = fast.rings.inject_ring
    for i in range(3):
        fast.rings.inject(numbered(i))
    ring.store("begun", 1)
    fast.renew_worker()
    assert fast.turn()
    results = [fast.rings.injected(number) for number in (1, 2, 3)]
    assert [it.result for it in results if it] == [Result.IN_FLIGHT, Result.DONE, Result.DONE]
    assert nothing_more(fast, 2) == [numbered(1), numbered(2)]
    counters = fast.counters
    assert (counters["inject_packets"], counters["inject_drop_in_flight"]) == (3, 1)
    # One that it had come to the end with is not counted twice.
    for field in ("written", "begun"):
        ring.store(field, 4)
    struct.pack_into("=I", ring.slot(4), FIELDS["ring_slot"]["result"][0], Result.DONE.value)
    fast.renew_worker()
    fast.turn()
    assert fast.counters["inject_packets"] == 3


def test_a_punted_packet_in_flight_is_not_punted_once_more(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    leave_punts(fast, reply())
    assert len(list(fast.rings.take_punts())) == 1
    in_flight, fields = FIELDS["stats"]["in_flight"][0], FIELDS["in_flight"]
    n = len(reply()) + fast.table.prefix_len

    def leave_in_flight() -> list[bytes]:
        """As if the worker had been killed before the end of its turn; what its successor punts."""
        struct.pack_into("=I", memory, in_flight + fields["n_messages"][0], 1)
        struct.pack_into("=I", memory, in_flight + fields["message_len"][0], n)
        fast.renew_worker()
        fast.turn()
        return [punt.packet for punt in fast.rings.take_punts()]

    with mmap.mmap(fast.stats.fd, LAYOUT["stats"]) as memory:
        assert leave_in_flight() == []
        # Before the mark, it is: the control plane must expect that.
        memory[in_flight + fields["train"][0] + fast.table.prefix_len] = 0x45
        assert leave_in_flight() == [reply()]


def test_what_workers_that_are_no_more_have_punted_is_taken(fast: FastDatapath) -> None:
    fast.configure(punt_id=ID)
    for i in range(4):
        fast.renew_worker(i)
        leave_punts(fast, reply(struct.pack("=Q", i)))
    fast.renew_worker()
    assert [punt.packet for punt in fast.rings.take_punts()] == [reply(struct.pack("=Q", i)) for i in range(4)]


def test_only_worker_0_takes_what_is_injected(fast: FastDatapath) -> None:
    fast.rings.inject(numbered(0))
    fast.renew_worker(1)
    assert not fast.turn()
    fast.renew_worker(0)
    assert fast.turn()
    assert nothing_more(fast, 1) == [numbered(0)]


def test_only_what_matches_is_announced_and_once_a_turn(fast: FastDatapath) -> None:
    """A system call for each packet, or for those of pods, would cost what the rings shall not."""
    fast.configure(punt_id=ID)
    events = new_events()
    fast.renew_worker(events=events)
    fast.turn()
    # Its first turn announces what an earlier process may have left.
    assert os.eventfd_read(events[1]) == 1
    fast.decap_batch([(packet, NEAR) for packet in (udp(NEAR_POD, POD), *DELIVERED.values())])
    fast.encap_batch([NO_VNET_HDR + udp(POD, NEAR_POD)])
    fast.inject(numbered(0))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events[1])
    leave_punts(fast, reply(), reply(), reply())
    assert len(list(fast.rings.take_punts())) == 3
    assert os.eventfd_read(events[1]) == 1
    fast.renew_worker()
    for fd in events:
        os.close(fd)


def inject_for_ever(stats_fd: int, maker: int) -> None:
    """In a process of its own, which is killed: hand over packets that say who has made them, and their number."""
    rings = Rings(Stats(os.dup(stats_fd)), ())
    number = 0
    while True:
        number += rings.inject(of_maker(maker, number)) is not None


def of_maker(maker: int, number: int) -> bytes:
    return udp(POD, NEAR_POD, struct.pack("=QQ", maker, number) * 20)


def test_nothing_torn_is_sent_however_often_the_control_plane_is_killed(fast: FastDatapath) -> None:
    chance = random.Random(11)
    received: list[tuple[int, int]] = []
    near = fast.socket_of(NEAR)

    def turn() -> None:
        fast.turn()
        with suppress(BlockingIOError):
            while True:
                packet = near.recv(2000)[fast.table.prefix_len :]
                maker, number = struct.unpack_from("=QQ", packet, 28)
                assert packet == of_maker(maker, number)
                received.append((maker, number))

    for maker in range(15):
        process = multiprocessing.get_context("fork").Process(target=inject_for_ever, args=(fast.stats.fd, maker))
        process.start()
        while (maker, 0) not in received:
            assert process.is_alive()
            turn()
        until_s = time.monotonic() + chance.uniform(0, 0.03)
        while time.monotonic() < until_s:
            turn()
        process.kill()
        process.join()
        turn()
        turn()
    # Nobody has overwritten what another one has left: each one's packets come once, all of them, and in order.
    for maker in range(15):
        numbers = [number for of, number in received if of == maker]
        assert numbers == list(range(len(numbers)))
    assert fast.counters["inject_packets"] == fast.counters["inject_sent"] == len(received)


# -------------------------------------------------------------------------------------------------- the processes


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    network, here = OWN_SUBNET.supernet(new_prefix=16), IPv4Address("127.0.0.1")
    rig.table.configure(PacketSettings(network, OWN_SUBNET, here, 1472, SourceCheck.PEER, punt_id=ID))
    assert rig.table.publish(rig.stats)
    yield rig
    rig.close()
    assert list(tmp_path.iterdir()) == []


def request(nonce: int, length: int = 36) -> bytes:
    """What an echo request to the peer's tunnel address begins with."""
    return echo_request(OWN_SUBNET[0], PEER_SUBNET[0], ID, nonce & 0xFFFF, nonce.to_bytes(NONCE_LEN), length)


def nonce_of(punt: Punt) -> int:
    echo = parse_echo_reply(punt.packet)
    assert echo is not None
    assert (echo.source, echo.destination, echo.id) == (PEER_SUBNET[0], OWN_SUBNET[0], ID)
    return int.from_bytes(echo.nonce)


@contextmanager
def answering(rig: Rig) -> Iterator[list[int]]:
    """The peer answers each echo, as a kernel does; the nonces of those that it has got."""
    got: list[int] = []
    is_over = threading.Event()
    rig.peer.settimeout(0.05)

    def answer() -> None:
        while not is_over.is_set():
            try:
                asked = rig.peer.recv(2000)
            except TimeoutError:
                continue
            got.append(int.from_bytes(asked[28:36]))
            # A sum does not care for the order of addresses; 8 less in the type is 0x0800 more in the checksum.
            check = int.from_bytes(asked[22:24]) + 0x0800
            check = (check & 0xFFFF) + (check >> 16)
            echo = bytes(2) + check.to_bytes(2) + asked[24:]
            rig.peer.sendto(asked[:12] + asked[16:20] + asked[12:16] + echo, rig.udp.getsockname())

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield got
    finally:
        is_over.set()
        thread.join()


def test_a_worker_that_sleeps_wakes_for_a_packet_and_the_control_plane_for_its_answer(rig: Rig) -> None:
    async def test(datapath: supervision.Datapath) -> None:
        rings = Rings(rig.stats, rig.events)
        taken: list[Punt] = []
        rings.listen(taken.append)
        for nonce, length in ((1, 36), (2, 1472), (3, 36)):
            await asyncio.sleep(0.05)
            number = rings.inject(request(nonce, length), length)
            assert number is not None
            await until(lambda n=nonce: len(taken) == n)
            injected = rings.injected(number)
            assert injected is not None
            assert injected.result is Result.DONE
            round_trip_s = (taken[-1].time_ns - injected.time_ns) / 1e9
            assert 0 < round_trip_s < 5
            assert (nonce_of(taken[-1]), taken[-1].length) == (nonce, length)
        rings.close()

    with answering(rig):
        with_datapath(rig, test)


def test_the_next_control_plane_goes_on_with_the_rings(rig: Rig) -> None:
    """It has the descriptors from the processes, and what was punted meanwhile waits for it."""

    async def test(datapath: supervision.Datapath) -> None:
        first = Rings(rig.stats, rig.events)
        assert [first.inject(request(nonce)) for nonce in range(3)] == [1, 2, 3]
        await until(lambda: rig.stats.counters()["decap_punted"] == 3)
        found = await processes.find_running(rig.run_dir)
        for process in found:
            process.detach()
        held = found[0].take_descriptors()
        found[1].close_descriptors()
        second = Rings(Stats(held.stats), held.events)
        taken: list[Punt] = []
        assert second.injected(1) is not None
        second.listen(taken.append)
        assert [nonce_of(punt) for punt in taken] == [0, 1, 2]
        assert second.inject(request(3)) == 4
        await until(lambda: len(taken) == 4)
        second.close()
        for fd in held.as_list():
            os.close(fd)

    with answering(rig):
        with_datapath(rig, test)


class _NoPauses:
    """Processes are started at once, however many have died."""

    def note_death(self, now_s: float) -> Death:
        return Death(1, 0, 0)

    def is_calm(self, now_s: float) -> bool:
        return True


@pytest.mark.parametrize("n_kills", [20, pytest.param(300, marks=pytest.mark.full)])
def test_each_packet_is_sent_at_most_once_however_often_the_datapath_is_killed(rig: Rig, n_kills: int) -> None:
    """All that is lost is what a process was killed with, and its result says so."""

    async def test(datapath: supervision.Datapath) -> None:
        datapath._restarts = _NoPauses()  # type: ignore[assignment]
        rings = Rings(rig.stats, rig.events)
        answers: list[int] = []
        rings.listen(lambda punt: answers.append(nonce_of(punt)))
        results: list[Injected] = []
        is_over = asyncio.Event()

        async def inject() -> None:
            """One packet after the other; the nonce of each is its place in `results`.

            No faster than the peer answers: its buffer and the rings shall not be full.
            """
            n_sent = 0
            while not is_over.is_set():
                if n_sent - len(answers) > SLOTS // 4:
                    await asyncio.sleep(0)
                    continue
                number = rings.inject(request(len(results)))
                assert number is not None
                while (injected := rings.injected(number)) is None or injected.result is Result.WAITS:
                    await asyncio.sleep(0)
                results.append(injected)
                n_sent += injected.result is Result.DONE

        injecting = asyncio.create_task(inject())
        chance = random.Random(5)
        for _ in range(n_kills):
            await until(lambda: datapath.active is not None and len(datapath.standbys) == 1, within_s=30)
            await asyncio.sleep(chance.uniform(0.001, 0.02))
            victim = datapath.active
            assert victim is not None
            os.kill(victim.pid, signal.SIGKILL)
            await until(lambda it=victim: it.is_gone)
        is_over.set()
        async with asyncio.timeout(30):
            await injecting
        sent = {nonce for nonce, it in enumerate(results) if it.result is Result.DONE}
        lost = {nonce for nonce, it in enumerate(results) if it.result is Result.IN_FLIGHT}
        await until(lambda: sent <= set(answers), within_s=30)
        rings.close()
        n_twice = len(answers) - len(set(answers))
        print(f"{n_kills} kills, {len(results)} packets, {len(lost)} killed with, {n_twice} answers twice")
        assert len(sent) + len(lost) == len(results)
        assert len(lost) <= n_kills
        assert len(got) == len(set(got))
        assert sent <= set(got) <= sent | lost
        assert n_twice <= n_kills

    with answering(rig) as got:
        with_datapath(rig, test)

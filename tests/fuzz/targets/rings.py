"""Shared memory that somebody has overwritten: the rings, and what a dead process had in flight.

The fast path's half and the control plane's are read and written in turn.  Neither may crash, loop or send what is not
a packet of the other half's, and both must go on when somebody has stopped writing.  An input is a JSON list of what
happens (`_act`).
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from tests import reference
from tests.datapath.harness import DEADLINE_S, FastDatapath
from tests.fuzz.mutate import json_mutator
from tests.packets import (
    DESTINATION_OPTIONS,
    HOP_BY_HOP,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    OWN,
    OWN6,
    POD,
    POD6,
    icmp_message,
    icmpv6_message,
    ipv4,
    ipv6,
    options_header,
    udp,
)
from udptun._fastpath import FIELDS, LAYOUT
from udptun.datapath import rings, stats

ID = 0x5EED
_SLOTS, _BYTES, _PACKET_MAX = LAYOUT["ring_slots"], LAYOUT["ring_bytes"], 65535
_INJECT, _PUNT, _IN_FLIGHT = (FIELDS["stats"][name][0] for name in ("inject", "punt", "in_flight"))
_WORDS = ("written", "refused", "begun", "taken")
_SLOT_FIELDS = ("checksum", "result", "error", "time_ns", "sequence", "way", "length", "kept", "peer", "outer")
_FLIGHT_FIELDS = ("n_reads", "n_messages", "n_handed_on", "message_len", "read", "controllen")
_PACKET = udp(POD, NEAR_POD, b"payload")
_REPLY = ipv4(NEAR_POD, OWN, icmp_message(0, rest=struct.pack(">HH", ID, 7), data=b"12345678"), protocol=1)
_PACKET_IPV6 = udp(POD6, NEAR_POD6, b"payload")
_REPLY_IPV6 = ipv6(
    NEAR_POD6,
    OWN6,
    icmpv6_message(NEAR_POD6, OWN6, 129, rest=struct.pack(">HH", ID, 7), data=b"12345678"),
    protocol=58,
    headers=[options_header(DESTINATION_OPTIONS)],
)
_JUMBOGRAM = ipv6(POD6, NEAR_POD6, headers=[options_header(HOP_BY_HOP)], payload_len=0)[:40]
FOUND = {
    "a worker's ring is ahead of itself": b'[["word", 1, "taken", 9]]',
    "a worker's ring has more than its slots": b'[["word", 1, "written", 9999]]',
    "the numbers are at their end": b'[["word", 0, "written", 18446744073709551615], ["inject", "45", 0, 0]]',
    "the refusals are at their end": b'[["word", 0, "refused", 18446744073709551615], ["word", 0, "written", 64],'
    b' ["inject", "45", 0, 0]]',
    "a result is none": b'[["inject", "45", 0, 0], ["turn"], ["slot", 0, 0, "result", 77], ["injected", 1]]',
    "a packet is shorter than what is kept of it": json.dumps(
        [
            ["word", 1, "written", 1],
            ["packet", 1, 0, _REPLY.hex()],
            ["slot", 1, 0, "length", 1],
            ["fix", 1, 0],
            ["take"],
        ]
    ).encode(),
    "the reference would inject a jumbogram": json.dumps([["inject", _JUMBOGRAM.hex(), 0, 0], ["turn"]]).encode(),
    "the control of a message goes on behind its room": json.dumps(
        [["flight", "n_messages", 1, _REPLY.hex()], ["flight", "controllen", 2**63, "0000000001000000" * 3], ["heir"]]
    ).encode(),
}
SEEDS = tuple(
    json.dumps(acts).encode()
    for acts in (
        [["inject", _PACKET.hex(), 0, 0], ["turn"], ["injected", 1], ["inject", _PACKET.hex(), 900, 1], ["turn"]],
        [["inject", _PACKET.hex(), 0, 0], ["slot", 0, 0, "kept", 5000], ["fix", 0, 0], ["turn"]],
        [["slot", 0, 0, "length", 70000], ["packet", 0, 0, _PACKET.hex()], ["word", 0, "written", 1], ["fix", 0, 0]],
        [["word", 0, "written", 2**64 - 1], ["turn"], ["word", 0, "taken", 7], ["inject", _PACKET.hex(), 0, 0]],
        [["word", 1, "written", 3], ["packet", 1, 0, _REPLY.hex()], ["fix", 1, 0], ["take"], ["word", 1, "taken", 9]],
        [["word", 0, "begun", 3], ["heir"], ["turn"]],
        [["word", 0, "taken", 9], ["inject", "45", 0, 0]],
        [["flight", "n_reads", 9, _PACKET.hex()], ["heir"]],
        [["flight", "n_messages", 3, _REPLY.hex()], ["flight", "message_len", 2**32 - 1, ""], ["heir"]],
        [["flight", "n_messages", 1, _REPLY.hex()], ["flight", "controllen", 64, "20" * 24], ["heir"]],
        [["flight", "n_messages", 1, _REPLY.hex()], ["flight", "controllen", 2**63, "0000000001000000" * 3], ["heir"]],
        [["reply", 0], ["take"], ["reply", 5]],
        [["inject", _PACKET_IPV6.hex(), 0, 0], ["turn"], ["injected", 1], ["inject", _PACKET_IPV6.hex(), 900, 1]],
        [["flight", "n_reads", 9, _PACKET_IPV6.hex()], ["heir"]],
        [["flight", "n_messages", 3, _REPLY_IPV6.hex()], ["flight", "message_len", 2**32 - 1, ""], ["heir"]],
    )
)
mutate = json_mutator(
    (),
    (
        *("inject", "injected", "turn", "take", "heir", "fix", "slot", "word", "packet", "flight", "reply"),
        *(*_WORDS, *_SLOT_FIELDS, *_FLIGHT_FIELDS, _PACKET.hex(), _REPLY.hex(), _PACKET.hex() * 20, "45" * 448),
        *(_PACKET_IPV6.hex(), _REPLY_IPV6.hex(), "60" * 448),
        *(0, 1, 2, 3, 63, 64, 65, 127, 448, 449, 2**32 - 1, 2**64 - 1, 2**64 - 64, ["turn"], ["take"], ["heir"]),
        *(["fix", 0, 0], ["word", 0, "written", 1], ["word", 1, "taken", 5]),
    ),
)


class _Machine:
    """One worker with its sockets, the other half of its rings, and the memory between them."""

    def __init__(self) -> None:
        self.fast = FastDatapath(has_ipv6=True)
        self.fast.configure(punt_id=ID)
        # In its first turn a worker hands on what another one has left.
        self.fast.turn()
        self.memory = self.fast.stats._memory

    def reset(self) -> None:
        for at, size in ((_INJECT, LAYOUT["ring"]), (_PUNT, 2 * LAYOUT["ring"])):
            self.memory[at : at + size] = bytes(size)
        self.memory[_IN_FLIGHT : _IN_FLIGHT + FIELDS["in_flight"]["read"][0]] = bytes(FIELDS["in_flight"]["read"][0])

    def drain(self) -> None:
        """What has come out is thrown away."""
        for sock in (self.fast.tun, *self.fast._outer.values()):
            while True:
                try:
                    sock.recv(1 << 17)
                except BlockingIOError:
                    break


_machine: _Machine | None = None


def check(data: bytes) -> None:
    global _machine
    try:
        acts = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(acts, list):
        return
    machine = _machine = _machine or _Machine()
    machine.reset()
    for act in acts[:20]:
        if isinstance(act, list) and act and isinstance(act[0], str) and act[0] in _ACTS:
            _ACTS[act[0]](machine, *[*act[1:], 0, 0, 0, 0][:4])
    _check_that_it_goes_on(machine)


def _check_that_it_goes_on(machine: _Machine) -> None:
    """Once nobody writes any more, either half puts right what it finds."""
    fast = machine.fast
    _turn(machine)
    _take(machine)
    _look(machine)
    number = fast.rings.inject(_PACKET)
    assert number is not None, "the ring to the worker stays full for ever"
    _turn(machine)
    injected = fast.rings.injected(number)
    assert injected is not None
    assert injected.result is rings.Result.DONE, injected
    assert _punts_of(machine) == [_REPLY], "a packet for the control plane does not reach it"
    machine.drain()


def _punts_of(machine: _Machine) -> list[bytes]:
    fast = machine.fast
    before = fast.counters["decap_packets"]
    fast.send_from(NEAR, _REPLY)
    deadline_s = time.monotonic() + DEADLINE_S
    while fast.counters["decap_packets"] == before and time.monotonic() < deadline_s:
        fast.turn()
        # The kernel delivers when it gets a turn on this processor.
        os.sched_yield()
    return [punt.packet for punt in fast.rings.take_punts()]


def _turn(machine: _Machine, *_: Any) -> None:
    """A turn of the worker, whose counters say what it should have made of the ring."""
    fast = machine.fast
    expected = _expected(machine)
    before = fast.counters
    fast.turn()
    after = fast.counters
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    counts = {name: n for name, n in grown.items() if name.startswith("inject_")}
    # The kernel may refuse what is well-formed.
    n_refused = counts.pop("inject_drop_refused", 0)
    for name in ("inject_sent", "inject_delivered"):
        lacking = expected.get(name, 0) - counts.get(name, 0)
        assert 0 <= lacking <= n_refused, (counts, expected)
        n_refused -= lacking
        expected.pop(name, None)
        counts.pop(name, None)
    assert n_refused == 0
    assert counts == expected
    ring = fast.rings.inject_ring
    assert ring.load("taken") == ring.load("written")
    machine.drain()


def _expected(machine: _Machine) -> dict[str, int]:
    """The counters of a turn, by ring.pxd and the reference."""
    ring = machine.fast.rings.inject_ring
    taken, written = ring.load("taken"), ring.load("written")
    n = (written - taken) % 2**64
    if n > _SLOTS:
        return {"inject_packets": 1, "inject_drop_malformed": 1}
    found: dict[str, int] = {"inject_packets": n} if n else {}
    for i in range(n):
        slot = ring._slots[(taken + i) % _SLOTS * LAYOUT["ring_slot"] :][: LAYOUT["ring_slot"]]
        checksum, _, _, _, sequence, way, length, kept, *_, packet = rings._FIELDS.unpack(slot)
        is_whole = sequence == (taken + i + 1) % 2**64 and 20 <= kept <= min(_BYTES, length) and length <= _PACKET_MAX
        counter = "inject_drop_malformed"
        if is_whole and checksum == rings._checksum(slot, kept):
            whole = packet[:kept] + bytes(length - kept)
            counter = reference.inject(machine.fast.table, whole, into_tun=way == LAYOUT["way.tun"]).counter
        found[counter] = found.get(counter, 0) + 1
    return found


def _take(machine: _Machine, *_: Any) -> None:
    punts = list(machine.fast.rings.take_punts())
    assert len(punts) <= _SLOTS * LAYOUT["max_workers"]
    for punt in punts:
        assert len(punt.packet) <= min(_BYTES, punt.length)


def _look(machine: _Machine) -> None:
    """What `udptun status` reads of the same memory."""
    found = machine.fast.stats
    assert all(isinstance(state, stats.WorkerState) for state in found.states(2))
    assert found.n_strangers >= 0
    assert len(found.strays(2, 0)) <= 2 * LAYOUT["strays"]
    found.refused(2)
    found.signs_of_life(2)
    assert machine.fast.rings.n_refused >= 0


def _inject(machine: _Machine, packet: Any, length: Any, into_tun: Any, _: Any) -> None:
    data = _hex(packet)[:_BYTES]
    machine.fast.rings.inject(data, _number(length) % 70_000 if length else 0, into_tun=bool(into_tun))


def _injected(machine: _Machine, number: Any, *_: Any) -> None:
    found = machine.fast.rings.injected(_number(number) % 2**64)
    assert found is None or isinstance(found.result, rings.Result)


def _heir(machine: _Machine, *_: Any) -> None:
    """Another process goes on."""
    machine.fast.renew_worker()
    machine.fast.turn()
    machine.drain()


def _ring_at(number: Any) -> int:
    """Where a ring is: the one to worker 0, or one of the first two from workers."""
    which = _number(number) % 3
    return _INJECT if which == 0 else _PUNT + (which - 1) * LAYOUT["ring"]


def _slot_at(ring: Any, number: Any) -> int:
    return _ring_at(ring) + FIELDS["ring"]["slot"][0] + _number(number) % _SLOTS * LAYOUT["ring_slot"]


def _write(machine: _Machine, at: int, field: tuple[int, int], value: Any) -> None:
    offset, length = field
    length = min(length, 8)
    number = _number(value) % 256**length
    machine.memory[at + offset : at + offset + length] = number.to_bytes(length, "little")


def _word(machine: _Machine, ring: Any, name: Any, value: Any, _: Any) -> None:
    if isinstance(name, str) and name in _WORDS:
        _write(machine, _ring_at(ring), FIELDS["ring"][name], value)


def _slot(machine: _Machine, ring: Any, number: Any, name: Any, value: Any) -> None:
    if isinstance(name, str) and name in _SLOT_FIELDS:
        _write(machine, _slot_at(ring, number), FIELDS["ring_slot"][name], value)


def _packet(machine: _Machine, ring: Any, number: Any, text: Any, _: Any) -> None:
    data, at = _hex(text)[:_BYTES], _slot_at(ring, number)
    packet = at + FIELDS["ring_slot"]["packet"][0]
    machine.memory[packet : packet + len(data)] = data
    for name in ("kept", "length"):
        _write(machine, at, FIELDS["ring_slot"][name], len(data))


def _fix(machine: _Machine, ring: Any, number: Any, *_: Any) -> None:
    """Make sequence and checksum of a slot what they should be."""
    at = _slot_at(ring, number)
    slot = machine.memory[at : at + LAYOUT["ring_slot"]]
    _write(machine, at, FIELDS["ring_slot"]["sequence"], _number(number) % _SLOTS + 1)
    kept = int.from_bytes(slot[FIELDS["ring_slot"]["kept"][0] :][:4], "little")
    _write(machine, at, FIELDS["ring_slot"]["checksum"], rings._checksum(slot, min(kept, _BYTES)))


def _flight(machine: _Machine, name: Any, value: Any, text: Any, _: Any) -> None:
    """What a dead process has left: packets it had read, or received."""
    fields, data = FIELDS["in_flight"], _hex(text)[:2000]
    if not isinstance(name, str) or name not in _FLIGHT_FIELDS:
        return
    for at in (fields["arena"][0] + 64, fields["train"][0]):
        machine.memory[_IN_FLIGHT + at : _IN_FLIGHT + at + len(data)] = data
    if name == "n_messages":
        _write(machine, _IN_FLIGHT, (fields["message_len"][0], 4), len(data))
        source = _IN_FLIGHT + fields["source"][0]
        machine.memory[source : source + 8] = struct.pack("=HH4s", 2, 0, bytes(map(int, NEAR.split("."))))
    if name == "controllen":
        # Of the first message: its struct msghdr lies before its length, and the room of its
        # control behind all sources.
        _write(machine, _IN_FLIGHT, (fields["message_len"][0] - 56 + 40, 8), value)
        control = _IN_FLIGHT + sum(fields["source"])
        machine.memory[control : control + len(data[:24])] = data[:24]
        return
    _write(machine, _IN_FLIGHT, (fields[name][0], min(fields[name][1], 8)), value)


def _reply(machine: _Machine, *_: Any) -> None:
    _punts_of(machine)


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _hex(text: Any) -> bytes:
    try:
        return bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return b""


_ACTS: dict[str, Callable[..., None]] = {
    "inject": _inject,
    "injected": _injected,
    "turn": _turn,
    "take": _take,
    "heir": _heir,
    "word": _word,
    "slot": _slot,
    "packet": _packet,
    "fix": _fix,
    "flight": _flight,
    "reply": _reply,
}

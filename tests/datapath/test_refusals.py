"""Every kind of bad packet in every mode: refused under its counter, nothing written to the TUN, no byte to the sender.

The kinds are those of cases.py, and of ipv6_cases.py where IPv6 is carried.  The modes: SourceCheck, encapsulation, one
worker or two, with and without virtio headers on the TUN, with and without UDP_GRO (then in trains of two), and a flood
of strangers around each bad packet, which the workers read or the kernel keeps from them.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.datapath import ipv6_cases
from tests.datapath.cases import DECAP, DECAP_VXLAN, ELSEWHERE, Bad
from tests.datapath.harness import DEADLINE_S, TRAIN_BYTES, FastDatapath, Message, skip_unless_built
from tests.packets import (
    LEARNED,
    NEAR_POD,
    NEAR_POD6,
    OWN,
    OWN6,
    POD,
    POD6,
    STRANGER,
    icmp_answer_to_peer,
    source_of,
    udp,
    vxlan,
)
from tests.reference import Remote

if TYPE_CHECKING:
    from udptun.datapath.stats import Stats
    from udptun.datapath.table import TableWriter

CHECKS = ("strict", "peer", "off")
FLOODER = "127.0.0.98"
"""Another stranger than the one of the cases."""
OURSELVES = "127.0.0.1"
NO_PEERS = (STRANGER, FLOODER, OURSELVES)
N_FLOOD = 3
"""Datagrams of the flood before a bad packet, and behind it."""


class Mode(NamedTuple):
    """What does not change while a datapath lives."""

    encapsulation: str
    n_workers: int
    has_vnet_hdr: bool
    has_gro: bool
    flood: str
    """Who gets it: "nobody", "workers", "kernel"."""

    def __str__(self) -> str:
        offloads = f"{'' if self.has_vnet_hdr else 'no-'}vnet_hdr-{'' if self.has_gro else 'no-'}gro"
        return f"{self.encapsulation}-workers_{self.n_workers}-{offloads}-flood_{self.flood}"


MODES = [
    Mode(*it)
    for it in itertools.product(("udp", "vxlan"), (1, 2), (True, False), (True, False), ("nobody", "workers", "kernel"))
]
QUICK_MODES = [
    Mode("udp", 1, True, True, "kernel"),
    Mode("udp", 2, False, False, "kernel"),
    Mode("udp", 2, True, True, "workers"),
    Mode("udp", 1, False, True, "nobody"),
    Mode("vxlan", 1, True, False, "kernel"),
    Mode("vxlan", 2, True, True, "kernel"),
    Mode("vxlan", 1, False, True, "workers"),
    Mode("vxlan", 2, False, False, "nobody"),
]
"""Each value of each field, and most pairs of them."""


class Besieged(FastDatapath):
    """The fast path in a mode: workers among whom the kernel spreads what comes, and the filter for strangers."""

    def __init__(self, mode: Mode, *, has_ipv6: bool) -> None:
        self._mode = mode
        is_vxlan = mode.encapsulation == "vxlan"
        super().__init__(has_gro=mode.has_gro, has_vnet_hdr=mode.has_vnet_hdr, is_vxlan=is_vxlan, has_ipv6=has_ipv6)

    def _set_up(self, writer: TableWriter, stats: Stats, *, is_vxlan: bool) -> None:
        from udptun.core.offload import ALL, Offload
        from udptun.datapath.sockets import open_sockets, set_offload
        from udptun.datapath.strangers import StrangerFilter

        super()._set_up(writer, stats, is_vxlan=is_vxlan)
        address, port = self.udp.getsockname()
        self.udp.close()
        self._sockets = open_sockets(IPv4Address(address), port, self._mode.n_workers)
        for sock in self._sockets:
            self._undo.enter_context(sock)
        set_offload(self._sockets, ALL if self._mode.has_gro else ALL & ~Offload.UDP_GRO)
        self.udp = self._sockets[0]
        self.filter = StrangerFilter(writer, stats, lambda: [self._sockets])
        self.filter.allow(self._mode.flood == "kernel")
        self._undo.callback(self.filter.end)
        for ip in NO_PEERS:
            self._outer[ip] = self._bound(ip)
        self._fill_buckets()

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: TracebackType | None) -> None:
        self._workers.clear()
        super().__exit__(kind, exc, trace)

    def use(self, source_check: str) -> None:
        self.configure(source_check=source_check)
        self.filter.follow()
        self.filter.look()
        self._is_filtered = self._mode.flood == "kernel" and source_check != "off"
        # What is learned counts with SourceCheck peer alone.
        self._strangers = {*NO_PEERS, *([] if source_check == "peer" else [LEARNED])}
        assert self.filter.state == ("on" if self._is_filtered else "off")

    def refuse(self, case: Bad, counter: str, *, is_wire: bool) -> None:
        """Send the case's datagram, and fail unless its end under `counter` is all that happens.

        `is_wire`: the datagram is what it is; others get a prefix with VXLAN.
        """
        if case.answer:
            self._fill_buckets()
        message, n = self._message(case, is_wire=is_wire)
        is_own = counter == case.counter
        n_answers = n if case.answer and is_own else 0
        flood, flood_counter = self._flood_beside(counter)
        moved = self._take(message, n, flood)
        out = self.collect(n_answers)
        assert out.sends == ({self._leaseholder(case): [_answer(case)] * n} if n_answers else {})
        assert bool(out.writes) == (counter == "decap_delivered")
        assert all(map(self._has_got_nothing, NO_PEERS))

        expected = Counter({"decap_packets": n, counter: n})
        if is_own and (case.answer or case.is_suppressed):
            expected["icmp_sent" if case.answer else "icmp_suppressed"] = n
        n_flood = 0 if self._mode.flood == "nobody" else 2 * N_FLOOD
        if not self._is_filtered:
            expected += Counter({"decap_packets": n_flood, flood_counter: n_flood})
        else:
            # By chance a stranger's datagram is let through now and then, and then it is counted like any.
            n_kept, n_strangers = moved.pop("drop_stranger", 0), n_flood
            is_stranger = case.source in self._strangers
            if is_stranger:
                n_strangers += n
                expected[counter] = moved[counter]
            assert n_kept + moved[flood_counter] + (moved[counter] if is_stranger else 0) == n_strangers
            expected[flood_counter] = moved[flood_counter]
            expected["decap_packets"] = n_flood + n - n_kept
        assert moved == expected

    def _message(self, case: Bad, *, is_wire: bool) -> tuple[Message, int]:
        """The case's datagram, or a train of two of them where the kernel may make one message of it; how many."""
        is_bare = is_wire or self.table.vtep is None
        payload = case.packet if is_bare else vxlan(case.packet, ethertype=self.table.ethertype)
        two = Message(payload * 2, case.source, len(payload))
        is_train = self._mode.has_gro and len(two.payload) < TRAIN_BYTES
        if is_train and len(two.received(has_gro=True, prefix_len=self.table.prefix_len)) == 2:
            return two, 2
        return Message(payload, case.source), 1

    def _flood_beside(self, counter: str) -> tuple[bytes, str]:
        """A datagram that is refused under another counter, and that one."""
        is_vxlan = self.table.vtep is not None
        kinds = [(b"", "decap_drop_vxlan_short" if is_vxlan else "decap_drop_empty")]
        kinds.insert(0, (bytes(40), "decap_drop_vxlan_flags" if is_vxlan else "decap_drop_version"))
        if self.table.source_check != "off":
            spoofed = udp(NEAR_POD6, POD6) if self.table.network_ipv6 else udp(NEAR_POD, POD)
            spoofed = vxlan(spoofed, ethertype=self.table.ethertype) if is_vxlan else spoofed
            kinds.insert(0, (spoofed, "decap_drop_unknown_peer"))
        return next(kind for kind in kinds if kind[1] != counter)

    def _take(self, message: Message, n: int, flood: bytes) -> Counter[str]:
        """What moves for `message`, which is `n` datagrams, in the middle of the flood."""
        before = self._totals()
        n_flood = 0 if self._mode.flood == "nobody" else N_FLOOD
        n_all = before["decap_packets"] + before["drop_stranger"] + n + 2 * n_flood
        for it in (*[Message(flood, FLOODER)] * n_flood, message, *[Message(flood, FLOODER)] * n_flood):
            self.send(it)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            n_moving = sum(worker.turn() for worker in self._workers)
            now = self._totals()
            if not n_moving and now["decap_packets"] + now["drop_stranger"] == n_all:
                return now - before
            assert time.monotonic() < deadline, f"not all came: {now - before}"

    def _totals(self) -> Counter[str]:
        self.filter.look()
        return Counter(self.counters | {"drop_stranger": self.stats.n_strangers})

    def _fill_buckets(self) -> None:
        """So that the workers have an answer for each packet."""
        senders = [sock.fileno() for sock in self.senders]
        memory, tun, n = (self._writer.fd, self.stats.fd), self._worker_tun.fileno(), len(self._sockets)
        self._workers = [
            self._new_worker(*memory, i, tun, sock.fileno(), senders, n) for i, sock in enumerate(self._sockets)
        ]
        self._worker = self._workers[0]

    def _leaseholder(self, case: Bad) -> Remote:
        source = ip_address(source_of(case.packet))
        return next(peer.remote for peer in self.table.peers if source in peer.subnet)

    def _has_got_nothing(self, ip: str) -> bool:
        try:
            self._outer[ip].recv(1)
        except BlockingIOError:
            return True
        return False


def _answer(case: Bad) -> bytes:
    assert case.answer is not None
    kind, code, _mtu = case.answer
    own = OWN6 if case.packet[0] >> 4 == 6 else OWN
    return icmp_answer_to_peer(kind, code, case.quoted or case.packet, source=own)


def refuse_all(mode: Mode, monkeypatch: pytest.MonkeyPatch, *, of_ipv6: bool = False) -> int:
    """Returns how many kinds of packets were refused, each under its counter, over all settings of SourceCheck."""
    skip_unless_built()
    from udptun.datapath import strangers

    # Each look is one at a flood.
    monkeypatch.setattr(strangers, "FLOOD_PER_S", -1)
    inner, elsewhere, of_wire = DECAP, ELSEWHERE, DECAP_VXLAN
    if of_ipv6:
        inner, elsewhere, of_wire = ipv6_cases.DECAP, ipv6_cases.ELSEWHERE, ipv6_cases.DECAP_VXLAN
    if mode.encapsulation != "vxlan":
        of_wire = []
    with Besieged(mode, has_ipv6=of_ipv6) as datapath:
        for check in CHECKS:
            datapath.use(check)
            for case, is_wire in ((it, cases is of_wire) for cases in (inner, of_wire) for it in cases):
                counter = case.counter if is_wire else elsewhere.get((case.slug, check), case.counter)
                try:
                    datapath.refuse(case, counter, is_wire=is_wire)
                except BaseException as exc:
                    exc.add_note(f"{case.slug} with SourceCheck {check}")
                    raise
    return len(CHECKS) * (len(inner) + len(of_wire))


@pytest.mark.parametrize("mode", QUICK_MODES, ids=str)
def test_every_kind_of_bad_packet_is_refused_under_its_counter(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_all(mode, monkeypatch)


@pytest.mark.parametrize("mode", QUICK_MODES[0:7:3], ids=str)
def test_every_kind_of_bad_packet_of_ipv6_is_refused_under_its_counter(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_all(mode, monkeypatch, of_ipv6=True)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_of_bad_packet_of_ipv6_is_refused_under_its_counter_in_every_mode(
    mode: Mode, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    n = refuse_all(mode, monkeypatch, of_ipv6=True)
    figure("kinds of packets of IPv6 refused, none delivered and each counted", n)


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_of_bad_packet_is_refused_under_its_counter_in_every_mode(
    mode: Mode, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    figure("kinds of packets refused, none delivered and each counted", refuse_all(mode, monkeypatch))

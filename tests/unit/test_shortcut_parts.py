"""What the kernel is told of the peers, what it has counted, and the bytecode that is shipped."""

from __future__ import annotations

import errno
import json
import struct
import time
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network

import pytest

from udptun.core.errors import FirewallError, KernelError
from udptun.core.network_state import IPNetwork
from udptun.datapath.peer_entries import PeerEntry
from udptun.datapath.settings import Remote
from udptun.datapath.shortcut.compile import BYTECODE, compile_source, compiler, source_hash
from udptun.datapath.shortcut.counts import COUNTS, PEER_COUNTS_LEN, Counts
from udptun.datapath.shortcut.entries import PEER, KernelPeers
from udptun.datapath.shortcut.programs import Programs
from udptun.datapath.stats import MAX_WORKERS_BESIDE, Stats
from udptun.firewall.iptables import Program
from udptun.firewall.port_rules import find_objection, joined, names_port
from udptun.kernel.bpf import Map

OWN = ip_network("10.244.1.0/24")
MTU = 1472
SUBNET = ip_network("10.244.2.0/24")
KEY = SUBNET.network_address.packed
REMOTE = Remote(IPv4Address("192.0.2.2"), 8285, True, takes_shortcut=True, carries_ecn=True)


def entry(remote: Remote = REMOTE, *, index: int = 7, mtu: int = MTU, is_dead: bool = False) -> PeerEntry:
    return PeerEntry(remote, index, mtu, is_dead)


def kernel_peers(**peers: tuple[str, PeerEntry]) -> KernelPeers:
    assert isinstance(OWN.network_address, IPv4Address)
    it = KernelPeers(OWN, MTU)  # type: ignore[arg-type]
    for subnet, of in peers.values():
        it.set_peer(ip_network(subnet), of)
    return it


def test_a_peer_is_told_once_and_again_when_it_has_changed() -> None:
    peers = kernel_peers(two=("10.244.2.0/24", entry()))
    value = PEER.pack(KEY, bytes([192, 0, 2, 2]), b"\x20\x5d", 3, 7, 0, 0, 0, 0)
    assert list(peers.changes()) == [(KEY, value)]
    assert list(peers.changes()) == []
    peers.set_peer(SUBNET, entry())
    assert list(peers.changes()) == []
    peers.set_peer(SUBNET, entry(Remote(IPv4Address("192.0.2.3"), 8286, False)))
    assert list(peers.changes()) == [(KEY, PEER.pack(KEY, bytes([192, 0, 2, 3]), b"\x20\x5e", 0, 7, 0, 0, 0, 0))]
    peers.set_peer(SUBNET, None)
    assert list(peers.changes()) == [(KEY, None)]
    assert list(peers.changes()) == []


@pytest.mark.parametrize(
    ("subnet", "of", "is_known", "is_sent_to"),
    [
        (SUBNET, entry(), True, True),
        (SUBNET, entry(Remote(IPv4Address("192.0.2.2"), 8285, True)), True, False),
        (SUBNET, entry(mtu=MTU - 1), True, False),
        (SUBNET, entry(is_dead=True), False, False),
        (SUBNET, entry(Remote(IPv6Address("2001:db8::2"), 8285, True, takes_shortcut=True)), False, False),
        (ip_network("10.244.2.0/25"), entry(), False, False),
        (ip_network("10.244.0.0/20"), entry(), False, False),
        (IPv6Network("fd00::/64"), entry(), False, False),
    ],
    ids=["right", "does not take it", "narrow", "dead", "over IPv6", "longer", "shorter", "of IPv6"],
)
def test_what_the_kernel_may_do_for_a_peer(
    subnet: IPNetwork, of: PeerEntry, is_known: bool, is_sent_to: bool
) -> None:
    peers = kernel_peers()
    peers.set_peer(subnet, of)
    told = list(peers.changes())
    assert (bool(told), peers.is_sent_to(subnet)) == (is_known, is_sent_to)


def test_a_subnet_that_holds_a_public_ip_or_our_own_address_is_left_to_the_workers() -> None:
    """Its packets may be the tunnel's own, or come from an address that is ours: the workers tell."""
    inside = entry(Remote(IPv4Address("10.244.2.99"), 8285, True, takes_shortcut=True), index=8)
    peers = kernel_peers(two=("10.244.2.0/24", entry()), three=("10.244.3.0/24", inside))
    assert {key for key, _ in peers.changes()} == {bytes([10, 244, 3, 0])}
    peers.set_peer(ip_network("10.244.3.0/24"), None)
    assert dict(peers.changes()) == {bytes([10, 244, 3, 0]): None, KEY: PEER.pack(
        KEY, bytes([192, 0, 2, 2]), b"\x20\x5d", 3, 7, 0, 0, 0, 0
    )}  # fmt: skip
    peers.set_local([IPv4Address("10.244.2.200"), IPv6Address("fd00::1")])
    assert dict(peers.changes()) == {KEY: None}
    peers.set_local([])
    assert [key for key, _ in peers.changes()] == [KEY]


class FakeMap:
    """An array of two processors."""

    def __init__(self, form: str, n: int) -> None:
        self._form, self.n = struct.Struct(form), n
        self.rows = [[[0] * (self._form.size // 8) for _ in range(2)] for _ in range(n)]
        self.stored_len = 2 * self._form.size

    def read(self, index: int) -> bytes:
        return b"".join(self._form.pack(*row) for row in self.rows[index])

    def read_first(self, n: int) -> bytes:
        return b"".join(map(self.read, range(n)))


def test_what_the_kernel_has_counted_is_added_to_the_workers_counters_once() -> None:
    stats = Stats.create()
    counts_map, peers_map = FakeMap("=Q", len(COUNTS)), FakeMap("=4Q", 16)
    assert peers_map.stored_len == 2 * PEER_COUNTS_LEN
    now_s = [0.0]
    counts = Counts(counts_map, peers_map, stats, lambda: now_s[0])  # type: ignore[arg-type]
    counts_map.rows[COUNTS.index("decap_packets")] = [[2], [3]]
    counts_map.rows[COUNTS.index("decap_super")] = [[4], [0]]
    peers_map.rows[7] = [[1, 10, 2, 20], [0, 0, 3, 30]]
    for _ in range(2):
        counts.add(8, n_lost=1, n_refused=5)
    assert (stats.counters()["decap_packets"], stats.counters()["decap_drop_tun"]) == (5, 1)
    assert stats.peers([7, 8]) == [[1, 10, 5, 50], [0, 0, 0, 0]]
    assert stats.received(7) == 5
    assert counts.passed == {"decap_super": 4}
    peers_map.rows[7][0] = [2, 20, 2, 20]
    # Another peer has the index from here on.
    counts.begin_peer(7)
    stats.clear_peers([7])
    peers_map.rows[7][1] = [0, 0, 4, 40]
    counts.add(8, n_lost=1, n_refused=5)
    assert stats.peers([7]) == [[0, 0, 1, 10]]
    assert stats.worker_counters(MAX_WORKERS_BESIDE) == [{}] * MAX_WORKERS_BESIDE
    stats.close()


def test_what_the_device_drops_behind_the_programs_is_no_delivery() -> None:
    """All that a device that is down or a full backlog had dropped counted as delivered."""
    stats = Stats.create()
    counts_map = FakeMap("=Q", len(COUNTS))
    counts = Counts(counts_map, FakeMap("=4Q", 16), stats)  # type: ignore[arg-type]
    # The device had dropped 40 before, and 4 of 10.  It never drops more than there was, nor less than nothing.
    for delivered, n_refused, expected in ((0, 40, (0, 0)), (10, 44, (6, 4)), (12, 50, (6, 6)), (15, 30, (9, 6))):
        counts_map.rows[COUNTS.index("decap_delivered")] = [[delivered], [0]]
        counts.add(0, 0, n_refused)
        assert (stats.counters()["decap_delivered"], stats.counters()["decap_drop_tun"]) == expected
    stats.close()


def test_reading_the_counters_of_many_peers_takes_a_hundredth_of_the_time_at_most() -> None:
    """With 65,000 peers and 16 processors they are 33 MB, which were read each second."""
    stats = Stats.create()
    peers_map, now_s = FakeMap("=4Q", 16), [0.0]

    def read_slowly(n: int) -> bytes:
        now_s[0] += 0.5
        return FakeMap.read_first(peers_map, n)

    peers_map.read_first = read_slowly  # type: ignore[method-assign]
    counts = Counts(FakeMap("=Q", len(COUNTS)), peers_map, stats, lambda: now_s[0])  # type: ignore[arg-type]
    counts.add(8, n_lost=0, n_refused=0)
    for second, (is_last, expected) in enumerate([(False, 0), (False, 0), (True, 1), (False, 1)], 1):
        now_s[0] += 1
        peers_map.rows[7][0][0] = 1 if second < 4 else 2
        counts.add(8, n_lost=0, n_refused=0, is_last=is_last)
        assert stats.peers([7])[0][0] == expected
    now_s[0] += 60
    counts.add(8, n_lost=0, n_refused=0)
    assert stats.peers([7])[0][0] == 2
    stats.close()


def test_the_bytecode_is_made_of_the_source_beside_it() -> None:
    """`./dev bytecode` makes it anew."""
    shipped = json.loads(BYTECODE.read_text())
    assert shipped["source_sha256"] == source_hash()
    assert list(shipped["programs"]) == ["encap", "decap", "deliver", "arrive"]
    try:
        has_same_compiler = compiler() == shipped["compiler"]
    except FileNotFoundError:
        has_same_compiler = False
    if not has_same_compiler:
        pytest.skip(f"{shipped['compiler']} is not installed, so it is not compiled again")
    assert compile_source() == shipped


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("\t\tudp dport 8285 accept", True),
        ("th dport vmap { 53 : accept, 8285 : drop }", True),
        ("udp dport != { 53, 8285 } drop", True),
        ("ip saddr . udp dport { 10.0.0.1 . 8285, 10.0.0.2 . 53 } accept", True),
        ("udp dport { 53, 8285 } drop", True),
        ("udp sport 8000-9000 counter packets 0 bytes 0", True),
        ("th dport 8285 drop", True),
        ("udp dport != 8285 drop", True),
        ("\t\telements = { 22, 8285 }", True),
        ("-A INPUT -p udp -m udp --dport 8285 -j ACCEPT", True),
        ("-A INPUT -p udp -m multiport --dports 53,8000:8300 -j DROP", True),
        ("udp dport 8472 accept", False),
        ("tcp dport 8285 accept", False),
        ("-A INPUT -p tcp -m tcp --dport 8285 -j ACCEPT", False),
        ("\t\telements = { 10.82.85.0, 8.2.8.5 }", False),
        ("ip saddr 10.244.0.0/16 counter packets 8285 bytes 8285 accept", False),
        ("-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT", False),
    ],
)
def test_rules_that_name_the_port_are_found(line: str, expected: bool) -> None:
    assert names_port(line, 8285) is expected


def test_a_set_that_goes_over_several_lines_is_read_as_one() -> None:
    listing = [
        "table inet t {",
        "\tset ports {",
        "\t\ttype inet_service",
        "\t\telements = { 53, 80,",
        "\t\t\t     8285, 9000 }",
        "\t}",
        "\tchain input {",
        "\t\ttype filter hook input priority filter; policy drop;",
        "\t\tudp dport { 53,",
        "\t\t\t    9000 } accept",
        "\t\tth dport vmap { 53 : accept,",
        "\t\t\t\t8285 : drop }",
        "\t}",
        "}",
    ]
    found = [line for line in joined(listing) if names_port(line, 8285)]
    assert found == ["elements = { 53, 80, 8285, 9000 }", "th dport vmap { 53 : accept, 8285 : drop }"]
    assert "udp dport { 53, 9000 } accept" in joined(listing)
    assert len(list(joined(listing))) == 11


def test_a_set_of_many_lines_takes_time_by_its_length() -> None:
    """The text of 50,000 lines was copied and counted again for each of them, on the daemon's event loop."""
    lines = ["elements = { 192.0.2.1,", *["192.0.2.2, 192.0.2.3, 192.0.2.4,"] * 50_000, "192.0.2.5 }"]
    began_s = time.process_time()
    (whole,) = joined(lines)
    assert time.process_time() - began_s < 2
    assert whole.startswith("elements = { 192.0.2.1, 192.0.2.2,")
    assert whole.endswith("192.0.2.4, 192.0.2.5 }")


def test_maps_that_were_made_are_closed_when_the_next_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look, a second after the last one, left up to five of them open."""
    made, closed = list[str](), list[str]()

    class OneMap:
        def __init__(self, name: str) -> None:
            self.close = lambda: closed.append(name)

    def create(name: str, *_shape: object) -> OneMap:
        if name == "ut_peer_counts":
            raise KernelError("cannot make the BPF map ut_peer_counts", errno.ENOMEM)
        made.append(name)
        return OneMap(name)

    monkeypatch.setattr(Map, "create", create)
    with pytest.raises(KernelError):
        Programs.load(1)
    assert len(made) == 6
    assert sorted(closed) == sorted(made)


@pytest.mark.parametrize(
    ("installed", "failure", "expected"),
    [
        ((), None, "the firewall's rules cannot be read: there is neither nft nor an iptables that reads nf_tables"),
        (("nft",), None, ""),
        (("nft",), FirewallError("`nft` ended with status 1"), "the firewall's rules cannot be read: `nft` ended with"),
    ],
    ids=["no program", "no rules", "a listing that fails"],
)
async def test_rules_that_cannot_be_read_are_an_objection(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], failure: FirewallError | None, expected: str
) -> None:
    """They counted as no rules."""

    async def run(*_command: str) -> str:
        if failure is not None:
            raise failure
        return ""

    async def no_programs() -> tuple[Program, ...]:
        return ()

    monkeypatch.setattr("udptun.firewall.tool.is_installed", lambda name: name in installed)
    monkeypatch.setattr("udptun.firewall.tool.run", run)
    monkeypatch.setattr("udptun.firewall.port_rules.programs", no_programs)
    monkeypatch.setattr("udptun.firewall.port_rules.legacy_tables", lambda version: [])
    found = await find_objection(8285, None)
    assert found.startswith(expected)
    assert bool(found) is bool(expected)

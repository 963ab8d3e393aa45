"""The detour of super-packets is had where it is wanted, and given up where packets are lost on it."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from udptun.core.errors import KernelError
from udptun.datapath.shortcut import detour
from udptun.datapath.shortcut.counts import COUNTS, Counts, DetourCounts
from udptun.datapath.shortcut.detour import Detour, LossWatch
from udptun.datapath.shortcut.programs import DETOUR
from udptun.kernel import detour_device
from udptun.kernel.device_counters import DeviceCounters

NONE_COMES_OUT, PART_COMES_OUT = "what comes from a peer", "part of what comes from peers"


def verdicts(*looks: tuple[int, int, int, int]) -> list[str]:
    """Of a watch that gets these, one a second: sent, arrived, late, dropped by the device."""
    watch = LossWatch(DetourCounts())
    return [watch.judge(DetourCounts(sent, arrived, 0, late), dropped) for sent, arrived, late, dropped in looks]


def test_packets_that_are_under_way_are_not_lost() -> None:
    """The counters are not read at one moment."""
    assert not any(verdicts(*((n * 10_000, n * 10_000 - n % 3 * 500 + 400, 0, 0) for n in range(1, 50))))


def test_what_the_device_drops_for_want_of_room_is_no_fault() -> None:
    assert not any(verdicts((5000, 4000, 0, 1000), (5000, 4000, 1, 1000), (9000, 6000, 1, 3000)))


def test_a_peer_of_which_nothing_comes_out_is_seen_beside_one_of_which_all_does() -> None:
    first, second = verdicts((100_000, 100_000, 0, 0), (200_003, 200_000, 1, 0))
    assert not first
    assert second.startswith(NONE_COMES_OUT)


@pytest.mark.parametrize(
    ("a_second", "lost", "is_seen"),
    [(60, 20, True), (100_000, 3000, True), (60, 1, False), (100_000, 900, False)],
    ids=["a third of few", "a thirtieth of many", "one a second", "less than a hundredth"],
)
def test_a_part_that_does_not_come_out_is_seen_within_seconds(a_second: int, lost: int, is_seen: bool) -> None:
    looks = [(n * a_second, n * (a_second - lost), 0, 0) for n in range(1, 9)]
    assert any(it.startswith(PART_COMES_OUT) for it in verdicts(*looks)) is is_seen


class FakeMap:
    """The counts of one processor."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(COUNTS, 0)
        self.stored_len, self.n = 8, len(COUNTS)

    def read_first(self, n: int) -> bytes:
        return b"".join(it.to_bytes(8, "little") for it in list(self.sums.values())[:n])


class Ground:
    """A detour over a kernel that only says what was done; packets come at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.failure: KernelError | None = None
        self.now_s = 1000.0
        self.device: int | None = None
        self.dropped = 0
        self.map = FakeMap()
        self.added: list[dict[str, int]] = []
        stats = SimpleNamespace(count_beside=lambda new, _peers: self.added.append(new))
        nothing = SimpleNamespace(read_first=lambda n: b"", n=0, stored_len=32)
        self.counts = Counts(self.map, nothing, stats)  # type: ignore[arg-type]
        programs: Any = SimpleNamespace(
            set_detour=lambda value: self.done.append(f"is on: {bool(DETOUR.unpack(value)[1])}"),
            attach_detour=self.attach,
            detach_detour=lambda _alias: self.done.append("detach"),
        )
        self.detour = Detour(programs, self.counts, "flannel0", 1472, "ours")
        counters = DeviceCounters(*(0,) * 8)
        monkeypatch.setattr(detour, "make_detour", self.make)
        monkeypatch.setattr(detour, "delete_detour", self.delete)
        monkeypatch.setattr(detour, "_DRAIN_S", 0)
        monkeypatch.setattr(detour, "read_device_counters", lambda names: dict.fromkeys(names, counters))
        monkeypatch.setattr(detour, "is_in_order", self.is_in_order)
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)

    async def make(self, *_of: object) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        self.device = 9
        return SimpleNamespace(index=9, name="flannel0-gso")

    async def attach(self, index: int, _alias: str) -> None:
        self.done.append(f"attach {index}")

    async def delete(self, *_of: object) -> None:
        self.done.append("delete")
        self.device = None

    def is_in_order(self, _name: str, index: int, _mtu: int) -> bool:
        return self.device == index

    async def look(self, objection: str | None = "", **grown: int) -> str:
        """A second later, with these counts more; the state then."""
        for name, n in grown.items():
            self.map.sums[name] += n
        self.now_s += 1
        self.counts.add(0, 0, 0)
        await self.detour.look(objection)
        return self.detour.state


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Ground:
    return Ground(monkeypatch)


async def test_it_is_made_once_a_super_packet_has_come_and_the_firewall_was_asked(ground: Ground) -> None:
    assert await ground.look() == "off: no peer has sent a super-packet yet"
    assert not ground.detour.is_wanted
    assert (await ground.look(None, decap_super=1)).startswith("off: ")
    assert ground.detour.is_wanted
    assert not ground.done
    assert await ground.look() == "on"
    # Programs that read while more than a word is written would see the new VNI with the old addresses.
    assert ground.done == ["is on: False", "attach 9", "is on: True"]


async def test_it_goes_before_its_program_and_its_device_do(ground: Ground) -> None:
    await ground.look(decap_super=1)
    ground.done.clear()
    assert await ground.look("a rule drops it") == "off: a rule drops it"
    assert ground.done == ["is on: False", "is on: False", "detach", "delete"]
    assert not ground.detour.problem
    assert await ground.look() == "on"


async def test_a_kernel_without_vxlan_is_asked_once_a_minute(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    ground.failure = KernelError("cannot create flannel0-gso (vxlan id 5)", errno.EOPNOTSUPP)
    states = {await ground.look(decap_super=1) for _ in range(200)}
    assert states == {f"off: {ground.failure}"}
    assert len(caplog.records) == 1
    ground.failure = None
    assert [await ground.look() for _ in range(60)][-1] == "on"


async def test_what_fails_halfway_is_taken_apart(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_of: object) -> None:
        raise KernelError("cannot attach a BPF program", errno.EPERM)

    monkeypatch.setattr(ground.detour._programs, "attach_detour", fail)
    assert (await ground.look(decap_super=1)).startswith("off: cannot attach")
    assert ground.done[-2:] == ["detach", "delete"]


async def test_one_that_loses_is_given_up_and_tried_again_later_each_time(ground: Ground) -> None:
    waits = []
    for _ in range(8):
        waits.append(1)
        while await ground.look(decap_super=1) != "on":
            waits[-1] += 1
        assert not ground.detour.problem
        assert (await ground.look(detour_sent=5, detour_late=1)).startswith("off: what comes from a peer")
        assert "UDP port 18472" in ground.detour.problem
    assert waits == [1, 60, 120, 240, 480, 960, 1920, 3600]
    await ground.look()
    assert sum(it["decap_drop_tun"] for it in ground.added) == 40


async def test_a_device_that_is_gone_is_made_anew(ground: Ground) -> None:
    await ground.look(decap_super=1)
    ground.device = None
    assert await ground.look() == "off: flannel0-gso is gone, or somebody has changed it"
    assert await ground.look() == "on"


@pytest.mark.parametrize(
    ("own", "of_all", "no_ipv6", "is_closed"),
    [
        ("0", "0", "1", False),
        ("0", "2", "1", True),
        ("1", "0", "1", True),
        ("1", "0", None, True),
        ("1", "0", "0", False),
        (None, None, None, False),
    ],
)
def test_a_device_that_cannot_be_closed_to_strangers_is_not_used(
    monkeypatch: pytest.MonkeyPatch, own: str | None, of_all: str | None, no_ipv6: str | None, is_closed: bool
) -> None:
    """In a container with a read-only /proc/sys: without a program it would take what anybody sends.

    IPv6 stayed on: a stranger's datagram with the VNI brought an IPv6 packet to a socket of the host.
    """
    found = {"ipv4/conf/flannel0-gso/rp_filter": own, "ipv4/conf/all/rp_filter": of_all}
    found["ipv6/conf/flannel0-gso/disable_ipv6"] = no_ipv6

    def refuse(_sysctl: object) -> None:
        raise KernelError("cannot write 1", errno.EROFS)

    monkeypatch.setattr(detour_device, "write_sysctl", refuse)
    monkeypatch.setattr(detour_device, "read_sysctl", lambda path: found[path.removeprefix("net/")])
    with nullcontext() if is_closed else pytest.raises(KernelError):
        detour_device._close("flannel0-gso")


def test_packets_that_are_lost_on_the_detour_are_counted_once_nobody_waits_for_them(ground: Ground) -> None:
    """Never less than before: counters that go back are resets to who reads them."""
    for sent, arrived, lost in ((100, 90, 0), (200, 195, 5), (300, 300, 5), (300, 293, 5), (300, 293, 7)):
        ground.map.sums["detour_sent"], ground.map.sums["detour_arrived"] = sent, arrived
        ground.counts.add(0, 0, 0)
        assert ground.counts.n_lost_by_detour == sum(it["decap_drop_tun"] for it in ground.added) == lost
    ground.map.sums["detour_sent"] = 310
    ground.counts.add(0, 0, 0, is_last=True)
    assert ground.counts.n_lost_by_detour == 17

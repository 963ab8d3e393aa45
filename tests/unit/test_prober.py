"""The prober with a carrier that answers at once, or cannot send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from udptun.backends.base import BackendInput, LiveSettings
from udptun.control import host_probes
from udptun.control.host_probes import HostProbes
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import IPNetwork
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck
from udptun.datapath.carrier import TunnelCarrier
from udptun.datapath.tunnel import Tunnel
from udptun.kernel.underlay import Underlay
from udptun.probing import liveness, prober
from udptun.probing.carrier import Fate, Take, Target
from udptun.probing.host import HostCarrier, _Sent
from udptun.probing.memory import Memory
from udptun.probing.prober import Prober

SUBNET = IPv4Network("10.244.2.0/24")
TARGET = Target(SUBNET.network_address, IPv4Address("192.0.2.2"), "192.0.2.2")
MTU = 1450


class InstantCarrier(HostCarrier):
    """Every probe is answered as soon as it was sent, from `answers_from`."""

    def __init__(self, why_not: str | None = None, answers_from: IPv4Address = TARGET.address) -> None:
        super().__init__(None, Family.IPV4)
        self.why_not = why_not
        self.answers_from = answers_from
        self.lengths: list[int] = []

    def listen(self, take: Take) -> None:
        self.take = take

    def close(self) -> None:
        """There is no socket."""

    def obstacle(self) -> str | None:
        return self.why_not

    def poll(self) -> None:
        """Nothing waits."""

    def send(self, address: IPv4Address, nonce: bytes, length: int) -> _Sent:
        self.lengths.append(length)
        asyncio.get_running_loop().call_soon(self.take, nonce, self.answers_from, 0)
        return _Sent(Fate(has_left=True))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "LOOK_S", 0.005)


def run_until(carrier: InstantCarrier, probing: Prober, *steps: Callable[[], bool]) -> None:
    """Until each of these has been true, one after the other."""

    async def main() -> None:
        probing.switch(is_on=True, mtu=MTU)
        probing.set_peers({SUBNET: TARGET})
        async with asyncio.timeout(30):
            running = asyncio.create_task(probing.run())
            for holds in steps:
                while not holds():
                    await asyncio.sleep(0.001)
            running.cancel()

    asyncio.run(main())


def test_nothing_is_sent_while_something_is_in_the_way_and_the_reason_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    carrier = InstantCarrier(why_not="it is forbidden")
    probing = Prober(carrier)
    assert probing.state == "off"

    def may_begin() -> bool:
        if probing.state != "off: it is forbidden":
            return False
        assert carrier.lengths == []
        unknown = {"liveness": "unknown", "rtt_ms": None, "rtt_age_s": None, "path_mtu": None}
        assert probing.document(SUBNET) == {**unknown, "probes_sent": 0, "probes_lost": 0}
        carrier.why_not = None
        return True

    run_until(carrier, probing, may_begin, lambda: probing.document(SUBNET)["path_mtu"] == MTU)
    assert probing.state == "on"
    assert probing.document(SUBNET)["liveness"] == "alive"
    assert caplog.messages == ["probes are off: it is forbidden", "probes are on"]


def test_probes_that_are_never_answered_are_lost_and_those_of_paths_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How many packets a path loses was known of none: a peer that is heard is not dead, whatever is lost."""
    monkeypatch.setattr(prober, "_LATE_S", 0.05)
    carrier = InstantCarrier()
    probing = Prober(carrier, idle_s=0.1)

    def is_measured() -> bool:
        known = probing.document(SUBNET)
        if known["path_mtu"] is None or not known["probes_sent"]:
            return False
        assert known["probes_lost"] == 0
        assert known["rtt_age_s"] is not None
        # Each of them has left, and its answer comes from somewhere else.
        carrier.answers_from = IPv4Address("10.244.9.9")
        return True

    run_until(carrier, probing, is_measured, lambda: probing.document(SUBNET)["probes_lost"] >= 2)
    assert probing.document(SUBNET)["probes_sent"] > probing.document(SUBNET)["probes_lost"]
    assert len(carrier.lengths) > probing.document(SUBNET)["probes_sent"]


def test_probes_of_a_peer_that_is_not_alive_are_not_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was down or not ready yet would lose packets for another 20 minutes."""
    monkeypatch.setattr(prober, "_LATE_S", 0.4)
    monkeypatch.setattr(liveness, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(liveness, "DEAD_S", 0.05)
    carrier = InstantCarrier(answers_from=(other := IPv4Address("10.244.9.9")))
    probing = Prober(carrier, idle_s=0.1)

    def counts() -> tuple[object, object]:
        known = probing.document(SUBNET)
        return known["probes_sent"], known["probes_lost"]

    def was_never_heard() -> bool:
        if len(carrier.lengths) < 5:
            return False
        carrier.answers_from = TARGET.address
        return True

    def is_alive() -> bool:
        sent, lost = counts()
        if not sent:
            return False
        assert lost == 0
        carrier.answers_from = other
        return True

    def is_dead() -> bool:
        if probing.document(SUBNET)["liveness"] != "dead":
            return False
        n_sent = len(carrier.lengths)
        steps.append(lambda: len(carrier.lengths) > n_sent + 10)
        return True

    steps: list[Callable[[], bool]] = []
    run_until(carrier, probing, was_never_heard, is_alive, is_dead, lambda: steps[0]())
    assert counts() == (0, 0)


def test_a_path_with_longer_headers_is_not_narrow_with_what_they_leave() -> None:
    """A peer over IPv6 gets 20 bytes fewer by a device whose MTU allows for IPv4, and nobody has to mend that."""
    carrier = InstantCarrier()
    probing = Prober(carrier)
    target = replace(TARGET, less=20)

    async def main() -> None:
        probing.switch(is_on=True, mtu=MTU)
        probing.set_peers({SUBNET: target})
        async with asyncio.timeout(30):
            running = asyncio.create_task(probing.run())
            while probing.document(SUBNET)["path_mtu"] is None:
                await asyncio.sleep(0.001)
            running.cancel()

    asyncio.run(main())
    assert probing.document(SUBNET)["path_mtu"] == max(carrier.lengths) == MTU - 20
    assert probing.problems == ()


def test_an_answer_from_another_address_than_was_asked_is_none() -> None:
    carrier = InstantCarrier(answers_from=IPv4Address("10.244.9.9"))
    probing = Prober(carrier)
    run_until(carrier, probing, lambda: len(carrier.lengths) > 2)
    assert probing.document(SUBNET)["liveness"] == "unknown"


@pytest.mark.parametrize(
    ("device", "carried", "remedy"),
    [
        ("flannel.1", "carry the packets of flannel.1?", "a Backend.MTU that is 150 lower"),
        (None, "carry the pods' packets?", "interfaces with an MTU that is 150 lower"),
    ],
)
def test_lines_about_hosts_say_what_can_be_done_with_this_backend(
    device: str | None, carried: str, remedy: str
) -> None:
    carrier = HostCarrier(device, Family.IPV4)
    assert carrier.dead_line("the host of X", "12:00:00").endswith(carried)
    assert f"have all hosts use {remedy}" in carrier.narrow_line("the host of X", 1300, 1450)


def test_the_line_about_a_narrow_path_over_ipv6_says_how_much_less_than_the_device_it_takes() -> None:
    """It said 20 too few beside IPv4, by the longer header that packets there have in any case."""
    device, peers = SimpleNamespace(name="flannel0"), SimpleNamespace(mtu=1472)
    carrier = TunnelCarrier(cast(Tunnel, SimpleNamespace(tun=device, peers=peers, stats=None)))
    line = carrier.narrow_line("the host of X", 1352, 1452)
    assert "takes packets of 1352 bytes, 120 fewer than flannel0; " in line
    assert "a Backend.MTU that is 100 lower" in line
    small = "; IPv6 packets of up to 1280 bytes, which every link has to take, go in fragments, and are lost where the "
    assert small not in carrier.narrow_line("the host of X", 1279, 1452)
    carrier.own_addresses = {6: IPv6Address("fd00:244:0:1::")}
    assert small in carrier.narrow_line("the host of X", 1279, 1452)
    assert small not in carrier.narrow_line("the host of X", 1280, 1452)


def test_what_a_follower_exchanges_is_its_hosts_also_when_it_has_waited_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The carrier was told of followers while they waited, and knew nothing of them later."""
    ipv6, other = IPv6Network("fd00:244:0:2::/64"), IPv4Network("10.244.3.0/24")
    subnets: dict[int, IPNetwork] = {1: SUBNET, 2: other, 5: ipv6}
    table = SimpleNamespace(top=5, subnet_at=subnets.get)
    peers = SimpleNamespace(leader=lambda subnet: SUBNET if subnet == ipv6 else subnet)
    carrier = TunnelCarrier(cast(Tunnel, SimpleNamespace(table=table, peers=peers, stats=None)))
    # The peer of the fourth index has just been removed.
    counts = {1: (1, 2), 2: (0, 5), 4: (7, 7), 5: (30, 40)}
    monkeypatch.setattr(carrier, "_traffic", SimpleNamespace(look=lambda top: counts if top == 5 else {}))
    assert carrier.traffic() == {SUBNET: (31, 42), other: (0, 5)}


def test_probes_of_a_host_go_on_with_what_those_before_them_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart forgot which hosts were dead and which paths narrow, where the kernel carries the packets."""
    here = IPv4Address("192.0.2.1")
    peer = Lease(Subnets(SUBNET), LeaseAttrs(IPv4Address("192.0.2.2")))
    live = LiveSettings(MTU, 1, SourceCheck.PEER, ALL)
    own_subnet = IPv4Network("10.244.1.0/24")
    inputs = BackendInput(own_subnet.supernet(8), (), Underlay("eth0", 2, 1500, here, here), own_subnet, live, (peer,))

    def started(why_not: str | None) -> HostProbes:
        monkeypatch.setattr(host_probes, "HostCarrier", lambda device, family: InstantCarrier(why_not))
        probes = HostProbes(Family.IPV4, "flannel.1", Memory(tmp_path / "probes.json"))
        probes.use(inputs)
        return probes

    async def main() -> None:
        probes = started(None)
        async with asyncio.timeout(30):
            running = asyncio.create_task(probes.run())
            while probes.document(peer)["path_mtu"] != MTU:
                await asyncio.sleep(0.001)
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(main())
    known = started("it is forbidden").document(peer)
    assert (known["liveness"], known["path_mtu"]) == ("alive", MTU)

"""The prober with a carrier that answers at once, or cannot send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

import pytest

from udptun.probing import prober
from udptun.probing.carrier import Fate, Take, Target
from udptun.probing.host import HostCarrier, _Sent
from udptun.probing.prober import Prober

SUBNET = IPv4Network("10.244.2.0/24")
TARGET = Target(SUBNET.network_address, IPv4Address("192.0.2.2"), "192.0.2.2")
MTU = 1450


class InstantCarrier(HostCarrier):
    """Every probe is answered as soon as it was sent, from `answers_from`."""

    def __init__(self, why_not: str | None = None, answers_from: IPv4Address = TARGET.address) -> None:
        super().__init__(None)
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
        assert probing.document(SUBNET) == {"liveness": "unknown", "rtt_ms": None, "path_mtu": None}
        carrier.why_not = None
        return True

    run_until(carrier, probing, may_begin, lambda: probing.document(SUBNET)["path_mtu"] == MTU)
    assert probing.state == "on"
    assert probing.document(SUBNET)["liveness"] == "alive"
    assert caplog.messages == ["probes are off: it is forbidden", "probes are on"]


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
    carrier = HostCarrier(device)
    assert carrier.dead_line("the host of X", "12:00:00").endswith(carried)
    assert f"have all hosts use {remedy}" in carrier.narrow_line("the host of X", 1300, 1450)

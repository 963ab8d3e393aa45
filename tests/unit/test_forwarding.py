"""What forwarding makes and takes back.  No kernel."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest

from udptun.backends.base import BackendInput, LiveSettings
from udptun.backends.choice import BackendChoice
from udptun.backends.hostgw import HostGw
from udptun.config.service_manager import ServiceManager
from udptun.control import forwarding
from udptun.control.document import device_documents
from udptun.control.forwarding import Forwarding
from udptun.control.kept_descriptors import KeptDescriptors
from udptun.control.routing import Routing
from udptun.control.tunnelled import Tunnelled
from udptun.core.errors import KernelError, UdptunError
from udptun.core.family import Family
from udptun.core.lease import Subnets
from udptun.core.network_state import IPNetwork
from udptun.core.offload import ALL, Offload
from udptun.core.ownership import Ownership
from udptun.core.tunnel import Confinement, SourceCheck
from udptun.datapath import tunnel
from udptun.datapath.settings import Where
from udptun.datapath.stats import Stats
from udptun.kernel import device_counters
from udptun.kernel.underlay import Underlay

NETWORKS: dict[Family, IPNetwork] = {
    Family.IPV4: IPv4Network("10.244.0.0/16"),
    Family.IPV6: IPv6Network("fd00:244::/48"),
}
UNDERLAY = Underlay(
    *("eth0", 2, 1500, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.1")),
    ipv6=IPv6Address("2001:db8::1"),
    public_ipv6=IPv6Address("2001:db8::1"),
)
IPV4_ALONE = LiveSettings(1500, 1, SourceCheck.PEER, ALL, probe=False)
BOTH = replace(IPV4_ALONE, ipv6_mtu=1500)
IPV6_ALONE = replace(BOTH, has_ipv4=False)
LEASES = [
    pytest.param(Subnets(IPv4Network("10.244.1.0/24")), IPV4_ALONE, id="IPv4 alone"),
    pytest.param(Subnets(None, IPv6Network("fd00:244:0:1::/64")), IPV6_ALONE, id="IPv6 alone"),
]


@pytest.mark.parametrize(("own", "live"), LEASES)
def test_a_failed_start_takes_back_what_is_marked_with_the_network_of_a_family_without_a_subnet(
    own: Subnets, live: LiveSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of a tunnel has the mark of IPv4's Network, and stayed when the lease had an IPv6 subnet alone."""
    removed: list[IPNetwork] = []

    async def remove(ownership: Ownership, keep: str = "") -> list[str]:
        removed.append(ownership.network)
        return []

    async def start(*args: object, **how: object) -> None:
        pass

    monkeypatch.setattr(forwarding, "remove_ours", remove)
    monkeypatch.setattr(Routing, "start", start)
    backend = HostGw()
    routings = [Routing(backend, family, Ownership((it,)), (it,)) for family, it in NETWORKS.items()]
    kept = KeptDescriptors(ServiceManager(), lambda state, fds: None)
    choice = BackendChoice(backend, "of the test")
    parts = Forwarding(choice, routings, UNDERLAY, BOTH, tmp_path, kept, was_clean=True)

    async def fail() -> None:
        await parts.start(own, live, ())
        assert parts.families == live.families
        removed.clear()
        await parts.undo_failed_start()

    asyncio.run(fail())
    assert removed == [*NETWORKS.values()]


class OfOneFamily:
    """In the place of the datapath that a VTEP has for a family; the device is called as the family."""

    def __init__(self, family: Family, said: list[str], refused: Underlay | None = None) -> None:
        self.families, self.device = frozenset((family,)), str(family)
        self._said, self._refused = said, refused
        self.shortcut = SimpleNamespace(switched=None)
        datapath = SimpleNamespace(stop=self._stop, descriptors=None)
        self.tunnel = SimpleNamespace(
            tun=None, is_adopted=False, datapath=datapath, detach=lambda: None, peers=SimpleNamespace(narrow={})
        )

    async def start(self, inputs: Mapping[Family, BackendInput]) -> None:
        self._said.append(f"start {self.device} for {','.join(map(str, inputs))}")

    async def apply(self, underlay: Underlay, live: LiveSettings) -> LiveSettings:
        if underlay is self._refused:
            raise KernelError("cannot bind", 98, "who has it?")
        self._said.append(f"{self.device} at {underlay.address_of(next(iter(self.families)))}")
        return live

    async def _stop(self) -> None:
        self._said.append(f"stop {self.device}")


def of_each_family(tmp_path: Path, tunnels: Iterable[OfOneFamily]) -> Forwarding:
    backend = HostGw()
    routings = [Routing(backend, family, Ownership((it,)), (it,)) for family, it in NETWORKS.items()]
    kept = KeptDescriptors(ServiceManager(), lambda state, fds: None)
    parts = Forwarding(BackendChoice(backend, ""), routings, UNDERLAY, BOTH, tmp_path, kept, was_clean=True)
    parts._tunnels = [cast(Tunnelled, it) for it in tunnels]
    return parts


@pytest.mark.parametrize(("own", "live"), LEASES)
def test_a_datapath_whose_family_has_no_subnet_is_ended_with_its_device(
    own: Subnets, live: LiveSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    async def remove(ownership: Ownership, keep: str = "") -> list[str]:
        said.append(f"remove {ownership.network} but {keep or 'nothing'}")
        return []

    async def start(*args: object, **how: object) -> None:
        pass

    monkeypatch.setattr(forwarding, "remove_ours", remove)
    monkeypatch.setattr(Routing, "start", start)
    parts = of_each_family(tmp_path, [OfOneFamily(family, said) for family in Family])
    asyncio.run(parts.start(own, live, ()))
    (carried,) = live.families
    (other,) = set(Family) - {carried}
    assert said == [f"stop {other}", f"remove {NETWORKS[other]} but nothing", f"start {carried} for {carried}"]


def test_a_datapath_goes_back_where_that_of_the_other_family_cannot_follow(tmp_path: Path) -> None:
    said: list[str] = []
    moved = replace(UNDERLAY, address=IPv4Address("192.0.2.9"), ipv6=IPv6Address("2001:db8::9"))
    parts = of_each_family(tmp_path, [OfOneFamily(Family.IPV4, said), OfOneFamily(Family.IPV6, said, refused=moved)])
    with pytest.raises(UdptunError):
        asyncio.run(parts.apply(moved, BOTH))
    assert said == ["IPv4 at 192.0.2.9", "IPv4 at 192.0.2.1", "IPv6 at 2001:db8::1"]


class WithWorkers(OfOneFamily):
    """It can have these numbers of workers alone; the last one it was asked for that is among them is what it has."""

    def __init__(self, family: Family, possible: Iterable[int], n: int) -> None:
        super().__init__(family, [])
        self._possible, self.n_workers = set(possible), n

    async def apply(self, underlay: Underlay, live: LiveSettings) -> LiveSettings:
        if live.workers in self._possible:
            self.n_workers = live.workers
        return replace(live, workers=self.n_workers)


@pytest.mark.parametrize(
    ("possible", "after"),
    [
        pytest.param([{2, 4}, {2}], [2, 2], id="the second refuses"),
        pytest.param([{2}, {2, 4}], [2, 2], id="the first refuses"),
        pytest.param([{4}, {2}], [4, 2], id="the first cannot go back"),
    ],
)
def test_two_datapaths_have_the_same_settings_as_far_as_they_can(
    possible: list[set[int]], after: list[int], tmp_path: Path
) -> None:
    """A reload ends even where neither can have what the other has."""
    tunnels = [WithWorkers(family, them, 2) for family, them in zip(Family, possible, strict=True)]
    parts = of_each_family(tmp_path, tunnels)
    live = asyncio.run(parts._apply_to_tunnels(UNDERLAY, replace(BOTH, workers=4)))
    assert [it.n_workers for it in tunnels] == after
    assert live.workers == after[-1]


def test_status_of_a_datapath_shows_the_workers_that_it_has(tmp_path: Path) -> None:
    """It showed as many as the settings say, which are those of the other datapath where this one refused a change."""
    stats = Stats.create()
    tunnel = MagicMock(n_workers=4, stats=stats, granted_offload=Offload(0), receive_queues=[])
    tunnelled = Tunnelled(MagicMock(families={Family.IPV4}), tunnel, tmp_path, "udptun")
    document = tunnelled.document(replace(BOTH, workers=2))
    stats.close()
    assert [len(document["datapath"][key]) for key in ("workers", "worker_counters")] == [4, 4]


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "no more"), asyncio.CancelledError()], ids=repr)
def test_a_start_that_ends_between_two_datapaths_takes_back_the_first(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only errors of our own did: what ran out of descriptors or was cancelled left the first one's device and mark."""
    said: list[str] = []

    async def open_tunnel(parts: Forwarding, encapsulation: OfOneFamily, confinement: Confinement) -> None:
        if parts._tunnels:
            raise failure
        encapsulation.tunnel.detach = lambda: said.append(f"detach {encapsulation.device}")
        parts._tunnels.append(cast(Tunnelled, encapsulation))

    async def remove(ownership: Ownership, keep: str = "") -> list[str]:
        said.append(f"remove {ownership.network}")
        return []

    async def is_anything_ours(ownership: Ownership) -> bool:
        return False

    monkeypatch.setattr(forwarding, "remove_ours", remove)
    monkeypatch.setattr(forwarding, "is_anything_ours", is_anything_ours)
    monkeypatch.setattr(Forwarding, "_open_tunnel", open_tunnel)
    backend = HostGw()
    monkeypatch.setattr(backend, "encapsulations", [OfOneFamily(family, said) for family in Family], raising=False)
    routings = [Routing(backend, family, Ownership((it,)), (it,)) for family, it in NETWORKS.items()]
    kept = KeptDescriptors(ServiceManager(), lambda state, fds: None)
    how = (BackendChoice(backend, ""), routings, UNDERLAY, BOTH, tmp_path, Confinement.FULL, kept)
    with pytest.raises(type(failure)):
        asyncio.run(Forwarding.open(*how))
    assert said == ["stop IPv4", *(f"remove {it}" for it in NETWORKS.values()), "detach IPv4"]


def test_status_is_there_without_devices_where_their_counters_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of /status and /metrics was an error 500 then."""
    parts = of_each_family(tmp_path, [OfOneFamily(family, []) for family in Family])
    monkeypatch.setattr(Forwarding, "device", lambda self, family: "lo")
    assert [it["name"] for it in device_documents(parts)] == ["lo"]
    monkeypatch.setattr(device_counters, "_FILE", tmp_path / "none")
    assert device_documents(parts) == []


async def test_a_datapath_for_which_there_is_no_memory_leaves_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device was made first, and is persistent: it stayed, without a mark that says whose it is."""
    devices: list[str] = []

    def refuse() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tunnel, "new_lock", refuse)
    monkeypatch.setattr(tunnel, "open_queues", lambda device, *how: devices.append(device))
    with pytest.raises(KernelError, match="cannot make the memory of a datapath: EMFILE; raise the limit"):
        await tunnel.Tunnel.open(tmp_path, "flannel0", Where(IPv4Address("127.0.0.1"), 0), 1)
    assert devices == []

"""The service manager keeps the datapath's descriptors; a stand-in for it takes the place of systemd.

The rig is that of test_processes.py: a datapath over a socketpair and two UDP sockets.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.datapath.test_processes import PACKET, Rig, more_queues, until
from tests.service_manager import Manager
from udptun.config.service_manager import ServiceManager
from udptun.control.kept_descriptors import KeptDescriptors, is_locked
from udptun.control.notify import notify
from udptun.core.tunnel import Confinement
from udptun.datapath import processes
from udptun.datapath.protocol import Descriptors
from udptun.datapath.shm import create
from udptun.datapath.supervision import Datapath


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    (tmp_path / "run").mkdir()
    rig = Rig(tmp_path / "run")
    yield rig
    rig.close()
    assert list(rig.run_dir.iterdir()) == [], "a datapath process or its socket is left"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def next_daemon(manager: Manager) -> KeptDescriptors:
    """What a daemon that is started now makes of what it is passed."""
    passed = tuple((name, os.dup(fd)) for name, fd in manager.kept.items())
    return KeptDescriptors(ServiceManager(keeps_descriptors=True, passed=passed), partial(notify, str(manager.path)))


def kinds(manager: Manager) -> list[str]:
    return sorted("/".join(name.split("/")[3:5]) for name in manager.kept)


def open_pipes() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        # One is that of the directory itself.
        with suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return {it for it in found if it.startswith("pipe:")}


async def serve(manager: Manager) -> None:
    while True:
        manager.read()
        await asyncio.sleep(0.002)


WHOLE = ["event/0", "event/1", "lock/0", "stats/0", "table/0", "tun/0", "udp/0"]


async def test_next_daemon_goes_on_when_all_processes_were_killed(rig: Rig, manager: Manager) -> None:
    """What came in between waits in the kernel's queues, which the manager's descriptors hold open."""
    kept = next_daemon(manager)
    await kept.keep({"flannel0": rig.descriptors})
    manager.read()
    assert kinds(manager) == WHOLE
    earlier = Datapath(rig.run_dir, rig.descriptors, [], "flannel0")
    await earlier.start()
    for process in earlier.processes:
        os.kill(process.pid, signal.SIGKILL)
    await until(lambda: all(process.is_gone for process in earlier.processes))
    rig.send(5)
    await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
    await rig.received(5)
    # The daemon finds it as it finds any.
    (found,) = await processes.find_running(rig.run_dir)
    assert found.confinement is Confinement.FULL
    found.close_descriptors()
    datapath = Datapath(rig.run_dir, rig.descriptors, [found], "flannel0")
    await datapath.start()
    assert len(datapath.standbys) == 1
    await datapath.stop()


async def test_sockets_of_ipv6_come_back_with_those_of_ipv4(rig: Rig, manager: Manager) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ipv6:
        ipv6.bind(("::1", 0))
        both = dataclasses.replace(rig.descriptors, ipv6=(ipv6.fileno(),))
        await next_daemon(manager).keep({"flannel0": both})
        manager.read()
        assert kinds(manager) == sorted([*WHOLE, "ipv6/0"])
        await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
        (found,) = await processes.find_running(rig.run_dir)
        assert found.descriptors is not None
        (theirs,) = found.descriptors.ipv6
        assert os.path.sameopenfile(theirs, ipv6.fileno())
        found.close_descriptors()
        await Datapath(rig.run_dir, both, [found], "flannel0").stop()


async def test_queues_beyond_one_a_worker_come_back(rig: Rig, manager: Manager) -> None:
    with more_queues(rig, 2) as queues:
        await next_daemon(manager).keep({"flannel0": rig.descriptors})
        manager.read()
        assert kinds(manager) == sorted([*WHOLE, "tun/1", "tun/2"])
        await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
        (found,) = await processes.find_running(rig.run_dir)
        assert found.descriptors is not None
        assert len(found.descriptors.tun) == 3
        queues[1].send(PACKET)
        await rig.received(1)
        found.close_descriptors()
        await Datapath(rig.run_dir, rig.descriptors, [found], "flannel0").stop()


async def test_each_of_two_datapaths_comes_back_whatever_becomes_of_the_other(rig: Rig, manager: Manager) -> None:
    """What was kept of two devices was taken for one set that does not fit together, and neither came back."""
    other = Rig(rig.run_dir)
    serving = asyncio.create_task(serve(manager))
    await next_daemon(manager).keep({"flannel.1": rig.descriptors, "flannel-v6.1": other.descriptors})
    manager.read()
    assert kinds(manager) == sorted(WHOLE * 2)
    await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
    for device, it in (("flannel.1", rig), ("flannel-v6.1", other)):
        (found,) = await processes.find_running(rig.run_dir, device)
        assert found.descriptors is not None
        assert os.path.sameopenfile(found.descriptors.lock, it.descriptors.lock)
        found.close_descriptors()
        await Datapath(rig.run_dir, it.descriptors, [found], device).stop()
        # The kernel releases the lock a moment after it has closed the connection by whose end we know.
        await until(lambda lock=it.descriptors.lock: not is_locked(lock))
    (name,) = (name for name in manager.kept if name.startswith("udptun/flannel-v6.1/") and "/udp/" in name)
    os.close(manager.kept.pop(name))
    await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
    serving.cancel()
    (found,) = await processes.find_running(rig.run_dir)
    found.close_descriptors()
    await Datapath(rig.run_dir, rig.descriptors, [found], "flannel0").stop()
    assert {it.split("/")[1] for it in manager.kept} == {"flannel.1"}
    other.close()


async def test_a_datapath_that_lives_is_left_as_it_is(rig: Rig, manager: Manager) -> None:
    await next_daemon(manager).keep({"flannel0": rig.descriptors})
    manager.read()
    datapath = Datapath(rig.run_dir, rig.descriptors, [], "flannel0")
    await datapath.start()
    before = sorted(rig.run_dir.iterdir())
    await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
    assert sorted(rig.run_dir.iterdir()) == before
    await datapath.stop()


async def test_only_what_has_changed_is_sent_and_what_is_given_up_is_forgotten(rig: Rig, manager: Manager) -> None:
    """systemd keeps what it has already under its first name: a second name that is then removed would take it away."""
    await next_daemon(manager).keep({"flannel0": rig.descriptors})
    assert len(manager.read()) == len(WHOLE)
    # The next daemon has adopted the same descriptors.
    kept = next_daemon(manager)
    await kept.keep({"flannel0": rig.descriptors})
    assert manager.read() == []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as sender:
        two = dataclasses.replace(
            rig.descriptors,
            tun=(*rig.descriptors.tun, rig.kernel.fileno()),
            udp=(*rig.descriptors.udp, udp.fileno()),
            senders=(sender.fileno(),),
        )
        await kept.keep({"flannel0": two})
        assert len(manager.read()) == 3
        assert kinds(manager) == sorted([*WHOLE, "sender/0", "tun/1", "udp/1"])
    await kept.keep({"flannel0": rig.descriptors})
    assert [state.split("\n")[0] for state in manager.read()] == ["FDSTOREREMOVE=1"] * 3
    assert kinds(manager) == WHOLE


@pytest.mark.parametrize("fault", ["a socket is missing", "two sets", "another version"])
async def test_what_is_not_a_whole_set_of_ours_is_given_up(
    rig: Rig, manager: Manager, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The port is free then for a start from the beginning."""
    descriptors: Descriptors = rig.descriptors
    other = create("another", 8192, 7)
    if fault == "another version":
        descriptors = dataclasses.replace(descriptors, table=other)
    await next_daemon(manager).keep({"flannel0": descriptors})
    manager.read()
    if fault == "two sets":
        (name,) = (name for name in manager.kept if "/udp/" in name)
        manager.kept[name + "1"] = os.dup(manager.kept[name])
    elif fault == "a socket is missing":
        (name,) = (name for name in manager.kept if "/udp/" in name)
        os.close(manager.kept.pop(name))
    serving = asyncio.create_task(serve(manager))
    await next_daemon(manager).bring_back(rig.run_dir, Confinement.FULL)
    assert manager.kept == {}
    assert "descriptors that the service manager has kept are not used" in caplog.text
    serving.cancel()
    os.close(other)


async def test_a_manager_that_does_not_read_costs_a_line_and_a_second(
    rig: Rig, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    kept = next_daemon(manager)
    n_senders = 1 + int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    if n_senders > 600:
        pytest.skip("needs net.unix.max_dgram_qlen below 600: the manager's socket takes all of it")
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(n_senders)]
    many = dataclasses.replace(rig.descriptors, senders=tuple(it.fileno() for it in sockets))
    async with asyncio.timeout(10):
        await kept.keep({"flannel0": many})
    assert "the service manager does not keep our descriptors" in caplog.text
    for it in sockets:
        it.close()


async def test_nothing_is_sent_to_a_manager_that_keeps_nothing(rig: Rig, manager: Manager) -> None:
    kept = KeptDescriptors(ServiceManager(), partial(notify, str(manager.path)))
    await kept.bring_back(rig.run_dir, Confinement.FULL)
    await kept.keep({"flannel0": rig.descriptors})
    await kept.forget(["flannel0"])
    assert manager.read() == []


async def test_giving_up_while_the_manager_is_asked_leaves_no_descriptor(rig: Rig, manager: Manager) -> None:
    """The pipe on which its answer is awaited stayed open when the daemon was told to end meanwhile."""
    kept = next_daemon(manager)
    await kept.keep({"flannel0": rig.descriptors})
    manager.read()
    before = open_pipes()
    forgetting = asyncio.create_task(kept.forget(["flannel0"]))
    await until(lambda: not before >= open_pipes())
    forgetting.cancel()
    await asyncio.wait([forgetting])
    # The manager still has the other end.
    manager.read()
    assert open_pipes() - before == set()


async def test_a_manager_that_does_not_say_that_it_has_let_go_costs_a_line(
    rig: Rig, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait for it ended without a word."""
    kept = next_daemon(manager)
    await kept.keep({"flannel0": rig.descriptors})
    manager.read()
    async with asyncio.timeout(10):
        await kept.forget(["flannel0"])
    assert "does not say that it has let go of our descriptors: no answer for 1 s" in caplog.text
    manager.read()

"""A change of the number of workers or of the address: what fails leaves everything as it was, and nothing is lost.

pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from traffic import datapath_pids, kill, locked_database, read_status, udp_flow

from tests.namespace import namespace
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Where
from udptun.datapath.sockets import open_sockets
from udptun.datapath.supervision import Datapath
from udptun.datapath.tunnel import Tunnel
from udptun.lab.host import SUBNET_ENV, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import NET_CONF, Lab

pytestmark = pytest.mark.netns


def change_workers(host: Host, n: int) -> str:
    """Have the config say so, send SIGHUP, wait until it is over; what the daemon has logged meanwhile."""
    assert host.daemon is not None
    before = len(host.daemon_log())
    backend = {"Type": "udp", "Workers": n}
    host.path(NET_CONF).write_text(json.dumps({"Network": "10.244.0.0/16", "Backend": backend}))
    host.daemon.send_signal(signal.SIGHUP)
    host.wait_ready(20)
    return host.daemon_log()[before:]


def in_use(host: Host) -> dict[str, int]:
    """What status, kernel and processes say of the workers and of the device's queues."""
    datapath = read_status(host)["datapath"]
    status = read_status(host)["pid"]
    links = []
    for fd in host.path(f"/proc/{status}/fd").iterdir():
        # The daemon starts a standby meanwhile, which takes some for a moment.
        with suppress(FileNotFoundError):
            links.append(str(fd.readlink()))
    (link,) = json.loads(host.run(["ip", "-j", "-d", "link", "show", "flannel0"]).stdout)
    return {
        "workers": len(datapath["workers"]),
        "threads": len(list(host.path(f"/proc/{datapath['pid']}/task").iterdir())) - 1,
        "sockets": len(host.run(["ss", "-uanH", "sport = :8285"]).stdout.splitlines()),
        "queues of the daemon": links.count("/dev/net/tun"),
        "queues of the device": link["linkinfo"]["info_data"]["numqueues"],
    }


def all_are(n: int, n_queues: int = 0) -> dict[str, int]:
    """`n_queues`: where there were more workers before, as many queues are left as there were at most."""
    queues = dict.fromkeys(("queues of the daemon", "queues of the device"), n_queues or n)
    return {**dict.fromkeys(("workers", "threads", "sockets"), n), **queues}


def wait_for(host: Host, wanted: dict[str, int]) -> None:
    """Until that is in use: the thread that has waited for the lock ends a moment after the change."""
    wait_until(f"{wanted}", lambda: in_use(host) == wanted, 10)


@contextmanager
def no_tun(host: Host) -> Iterator[None]:
    """/dev/net/tun gives no queue, as in a container that may no longer use it."""
    host.run(["mount", "--bind", "/dev/null", "/dev/net/tun"])
    try:
        yield
    finally:
        host.run(["umount", "/dev/net/tun"])


def test_a_change_of_workers_that_fails_leaves_everything_as_it_was(two_hosts: Lab) -> None:
    """Before, sockets and fields were the new ones already, and status, threads and sockets disagreed."""
    one, two = two_hosts.hosts
    change_workers(one, 2)
    before = datapath_pids(one)
    with udp_flow(two.pod(1), one.pod(1), 200) as inwards, udp_flow(one.pod(1), two.pod(1), 200) as outwards:
        with no_tun(one):
            log = change_workers(one, 4)
            assert "not reloaded, the workers stay 2: cannot attach to TUN device flannel0" in log
            for flow in (inwards, outwards):
                flow.wait_for_more()
            wait_until("a standby", lambda: len(read_status(one)["datapath"]["standby_pids"]) == 1, 10)
            assert in_use(one) == all_are(2)
            assert read_status(one)["datapath"]["pid"] in before
        exchanged = [0, 0]
        for n in (4, 1):
            assert f"workers={n} " in change_workers(one, n)
            for flow in (inwards, outwards):
                flow.wait_for_more()
            assert in_use(one) == all_are(n, 4)
            # What workers that are given up have counted of a peer was lost from its sums.
            (peer,) = read_status(one)["peers"]
            before_change, exchanged = exchanged, [peer["encap_packets"], peer["decap_packets"]]
            assert all(map(int.__gt__, exchanged, before_change))
    assert outwards.report.lost == []
    assert inwards.report.lost == []


@contextmanager
def links_come_and_go() -> Iterator[None]:
    """In a namespace of their own, and so fast that whoever needs the kernel's lock of all links waits for it."""
    again = "link add v0 type veth peer name v1\nlink delete v0\n" * 50
    with namespace() as ns:
        loop = ["ip", "netns", "exec", ns.name, "sh", "-c", 'while :; do printf %s "$0" | ip -batch -; done', again]
        process = subprocess.Popen(loop, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_nothing_is_lost_when_workers_become_fewer_time_and_again(
    two_hosts: Lab, figure: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """The kernel threw away what came to a worker's queue between its last read and the end of the queue.

    It waits for its lock of all links before it ends one.  Now queues stay, and the workers that are left read them.  A
    daemon that finds the workers of another one goes on with all queues, and so does the next process when one dies.
    """
    is_full = request.config.getoption("--full")
    n_rounds = 100 if is_full else 2
    one, two = two_hosts.hosts
    change_workers(one, 3)
    with udp_flow(one.pod(1), two.pod(1), 2000 if is_full else 500, from_many_ports=True) as flow:
        with links_come_and_go():
            for _ in range(n_rounds):
                for n in (1, 3):
                    change_workers(one, n)
                    wait_for(one, all_are(n, 3))
        change_workers(one, 2)
        wait_until("a standby", lambda: len(read_status(one)["datapath"]["standby_pids"]) == 1, 10)
        kill(one, read_status(one)["datapath"]["pid"])
        flow.wait_for_more()
        wait_for(one, all_are(2, 3))
        kill(one, read_status(one)["pid"])
        wait_until("the end of the daemon", lambda: one.daemon is not None and one.daemon.poll() is not None, 10)
        one.start_daemon(["--workers=1"])
        one.wait_ready(20)
        flow.wait_for_more()
        wait_for(one, all_are(1, 3))
    lost = flow.report.lost
    figure(f"of {flow.report.sent} packets over {2 * n_rounds} changes of the workers, lost", len(lost))
    assert lost == []


def test_a_stopped_process_does_not_keep_the_workers_from_changing(two_hosts: Lab) -> None:
    """Before, the change failed after 5 s, half made."""
    one, two = two_hosts.hosts
    change_workers(one, 1)
    with udp_flow(two.pod(1), one.pod(1), 200) as inwards, udp_flow(one.pod(1), two.pod(1), 200) as outwards:
        kill_with(one, signal.SIGSTOP, read_status(one)["datapath"]["pid"])
        assert "workers=3 " in change_workers(one, 3)
        for flow in (inwards, outwards):
            flow.wait_for_more()
        assert in_use(one) == all_are(3)
    assert inwards.report.lost == outwards.report.lost == []


def kill_with(host: Host, number: signal.Signals, pid: int) -> None:
    host.run(["kill", f"-{number.value}", str(pid)])


def test_a_start_with_other_workers_leaves_the_datapath_alone_until_it_has_a_lease(two_hosts: Lab) -> None:
    """Before, the daemon exchanged the processes at once.  With other memory the new ones had no table, and dropped
    all packets until the store took writes again."""
    one, two = two_hosts.hosts
    change_workers(one, 1)
    before = datapath_pids(one)
    with udp_flow(two.pod(1), one.pod(1), 200) as inwards, udp_flow(one.pod(1), two.pod(1), 200) as outwards:
        kill(one, read_status(one)["pid"])
        wait_until("the end of the daemon", lambda: one.daemon is not None and one.daemon.poll() is not None, 10)
        one.path("/var/lib/udptun/last-leases.json").unlink(missing_ok=True)
        one.path(SUBNET_ENV).unlink()
        with locked_database(two, "immediate"):
            one.start_daemon(["--workers=3"])
            wait_until("the adoption", lambda: "datapath adopted" in one.daemon_log(), 10)
            for flow in (inwards, outwards):
                flow.wait_for_more(400)
            assert datapath_pids(one) == before
            assert len(one.run(["ss", "-uanH", "sport = :8285"]).stdout.splitlines()) == 1
        one.wait_ready(20)
        for flow in (inwards, outwards):
            flow.wait_for_more()
        assert in_use(one) == all_are(3)
    assert inwards.report.lost == outwards.report.lost == []


def test_what_a_change_that_was_not_finished_has_left_is_ended(tmp_path: Path) -> None:
    """A daemon that is killed between building a change and making it leaves a standby with other sockets.

    Before, it stayed, and took over with sockets and a number of workers that nobody knew of.
    """
    address = IPv4Address("127.0.0.1")
    network, own = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")

    async def body() -> None:
        tunnel = await Tunnel.open(tmp_path, "flannel0", Where(address, 8285), 1)
        try:
            tunnel.configure(PacketSettings(network, own, address, 1472, SourceCheck.PEER))
            await tunnel.publish()
            await tunnel.start()
            kept = sorted(process.pid for process in tunnel.datapath.processes)
            (other,) = open_sockets(address, 8286, 1)
            descriptors = replace(tunnel.datapath.descriptors, udp=(other.fileno(),))
            unfinished = Datapath(tmp_path, descriptors, [], tunnel.tun.name)
            left = await unfinished._start_one(unfinished.descriptors)
            unfinished.detach()
            other.close()
        finally:
            tunnel.detach()
        tunnel = await Tunnel.open(tmp_path, "flannel0", Where(address, 8285), 1)
        try:
            assert sorted(process.pid for process in tunnel.datapath.processes) == kept
            assert left.pid not in kept
            await tunnel.start()
            assert sorted(process.pid for process in tunnel.datapath.processes) == kept
        finally:
            await tunnel.datapath.stop()
            tunnel.detach()

    with namespace() as ns:
        ns.call_async(body)
    assert list(tmp_path.iterdir()) == []

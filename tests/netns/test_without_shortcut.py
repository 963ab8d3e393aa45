"""Where the kernel is too old for the shortcut: one line says so, and Type udp does all the rest.

On such a kernel (see test_other_kernels.py) all is as it is; on others the daemon is told another version.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespace import KERNEL
from shortcut_labs import run_in_its_place
from traffic import AS_CONFIGURED, datapath_pids, kill, ping, read_status, tcp_flow, udp_flow, wait_for_peers

from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, Lab

pytestmark = pytest.mark.netns

IS_OLD = KERNEL < (5, 13)
RELEASE = os.uname().release if IS_OLD else "5.10.0-test"
WHY = f"it needs Linux 5.13 or later, and this is {RELEASE}"
LIMIT_S = 15
RATE = 200
"""Datagrams a second: what the queues hold is more than two seconds of it, as an emulated machine may need."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    net_conf = {**DEFAULT_NET_CONF, "Backend": {"Type": "udp", "Shortcut": "auto"}}
    with Lab(f"o{os.getpid()}", net_conf=net_conf) as lab:
        if not IS_OLD:
            run_in_its_place(lab, Path(__file__).with_name("old_kernel.py"))
        lab.daemon_command[:0] = AS_CONFIGURED
        lab.start()
        wait_for_peers(lab)
        yield lab


def test_auto_says_why_and_the_workers_carry_everything(lab: Lab) -> None:
    one, two = lab.hosts
    for host in lab.hosts:
        wait_until("it to say why", lambda: read_status(host)["datapath"]["shortcut"] == f"off: {WHY}", LIMIT_S)  # noqa: B023
    ping(one.pods[0], two.pods[0].address, "-s", "1444", "-M", "do")
    ping(one.pods[0], two.pods[0].address, "-s", "3000")
    with (
        tcp_flow(one.pods[0], two.pods[0]) as to_two,
        tcp_flow(two.pods[0], one.pods[0], port=5003) as to_one,
        udp_flow(one.pods[0], two.pods[0], RATE) as datagrams,
    ):
        datagrams.wait_for_more()
    to_two.report.assert_exact()
    to_one.report.assert_exact()
    assert not datagrams.report.lost
    assert not datagrams.report.n_spoilt
    for host in lab.hosts:
        document = read_status(host)
        assert document["problems"] == []
        assert [it["liveness"] for it in document["peers"]] == ["alive"]
        # It is no lack: nobody has asked for more than what there is.
        assert "shortcut" not in host.daemon_log()


def test_kills_lose_nothing(lab: Lab) -> None:
    one, two = lab.hosts
    with udp_flow(one.pods[0], two.pods[0], RATE) as flow, tcp_flow(two.pods[0], one.pods[0], 2e5) as connection:
        kill(two, *datapath_pids(two))
        flow.wait_for_more()
        one.stop_daemon(signal.SIGKILL)
        flow.wait_for_more()
        one.start_daemon()
        one.wait_ready()
        flow.wait_for_more()
    assert not flow.report.lost
    connection.report.assert_exact()


def test_require_does_not_start_and_says_why_in_one_line(lab: Lab) -> None:
    one = lab.hosts[0]
    one.stop_daemon()
    before = one.daemon_log()
    one.start_daemon(["--shortcut=require"])
    assert one.daemon is not None
    assert one.daemon.wait(4 * LIMIT_S) == 2
    (line,) = [it for it in one.daemon_log().removeprefix(before).splitlines() if " E " in it]
    assert line.endswith(f"Shortcut: it is required, and this host cannot have it: {WHY}; set it to auto or off")

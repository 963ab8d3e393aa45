"""The fast path on kernels that refuse more than this one: old_kernel.c is preloaded into a second interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.datapath.harness import FastDatapath, Message, ReferenceDatapath, assert_same_packets, skip_unless_built
from tests.packets import NEAR, NEAR_POD, NO_VNET_HDR, POD, ipv4, pattern, tcp_segment, udp_segment
from udptun.core.offload import Offload

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def run_on(old_kernel: Path) -> Callable[..., str]:
    """Run Python with these arguments on a kernel that refuses `faults`; its output."""
    skip_unless_built()

    def run(faults: str, *arguments: str) -> str:
        environment = {**os.environ, "LD_PRELOAD": str(old_kernel), "OLD_KERNEL": faults}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_packets_go_one_by_one_where_the_kernel_takes_no_super_packets(run_on: Callable[..., str]) -> None:
    function = lose_nothing_when_merged_writes_are_refused.__name__
    run_on("gso_write", "-c", f"from tests.datapath.test_old_kernels import {function}; {function}()")


def test_packets_go_unmarked_where_the_kernel_takes_no_tos_with_a_message(run_on: Callable[..., str]) -> None:
    function = lose_nothing_when_a_tos_is_refused.__name__
    run_on("no_tos", "-c", f"from tests.datapath.test_old_kernels import {function}; {function}()")


@pytest.mark.netns
def test_a_path_too_narrow_is_told_from_a_kernel_that_cannot_segment(run_on: Callable[..., str]) -> None:
    tests = str(HERE / "test_path_mtu.py")
    assert " passed" in run_on("narrow_einval", "-m", "pytest", "-p", "no:cacheprovider", tests)


def lose_nothing_when_merged_writes_are_refused() -> None:
    with FastDatapath() as fast:
        model = ReferenceDatapath()
        model.table = fast.table
        for transport, protocol, refused in (
            (lambda i: tcp_segment(NEAR_POD, POD, pattern(500, i), sequence=i * 500), 6, Offload.WRITE_TCP),
            (lambda i: udp_segment(NEAR_POD, POD, pattern(500, i)), 17, Offload.WRITE_UDP),
        ):
            assert not fast.refused & refused
            train = b"".join(ipv4(NEAR_POD, POD, transport(i), protocol=protocol, ident=i) for i in range(8))
            messages = [Message(train, NEAR, len(train) // 8)] * 2
            got, expected = fast.decap_messages(messages), model.decap_messages(messages)
            assert got.counts == expected.counts == {"decap_packets": 16, "decap_delivered": 16}
            assert assert_same_packets(got.writes, expected.writes) == 0
            assert fast.refused & refused


def lose_nothing_when_a_tos_is_refused() -> None:
    with FastDatapath() as fast:
        packets = [NO_VNET_HDR + ipv4(POD, NEAR_POD, udp_segment(POD, NEAR_POD), tos=n % 4 // 2 * 2) for n in range(40)]
        assert fast.encap_tos(packets) == [0] * 40
        # Messages of many datagrams were refused too, but not for being so long.
        assert fast.refused == Offload.ECN
        assert fast.encap_trains(packets) == [(40, 28)]

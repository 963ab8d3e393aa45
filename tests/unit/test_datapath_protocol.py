"""HELLO, as this build reads it from any build."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from udptun.core.tunnel import Confinement
from udptun.datapath.processes import Process
from udptun.datapath.protocol import Descriptors, Hello
from udptun.datapath.worker import (
    HELLO,
    HELLO_CONFINEMENT,
    HELLO_IPV6,
    HELLO_IPV6_SENDERS,
    HELLO_MAGIC,
    HELLO_QUEUES,
    HELLO_VERSION,
)

BUILD_ID = "0123456789abcdef" * 2
OURS = HELLO.pack(HELLO_MAGIC, HELLO.size, 1, 1, 2, 5_000, BUILD_ID.encode(), 4711, 8, 3)
UNDERSTOOD = Hello(4711, True, 8, 2, 3, 5_000, BUILD_ID)


def test_frozen_part_is_what_it_was_when_it_was_frozen() -> None:
    """No build may change this: others look for these bytes."""
    assert [OURS[:4], OURS[28:60]] == [b"udpt", b"0123456789abcdef0123456789abcdef"]
    assert struct.unpack("=IIIIQ", OURS[4:28]) == (72, 1, 1, 2, 5_000)
    assert struct.unpack("=III", OURS[60:]) == (4711, 8, 3)


def test_hello_of_version_1_is_understood() -> None:
    assert Hello.parse(OURS) == UNDERSTOOD


@pytest.mark.parametrize(
    ("number", "confinement"),
    [(0, Confinement.OFF), (1, Confinement.CAPABILITIES), (2, Confinement.FULL), (3, None)],
)
def test_hello_of_this_build_says_what_its_process_has_given_up(number: int, confinement: Confinement | None) -> None:
    more = HELLO_CONFINEMENT.pack(number, 2) + HELLO_IPV6.pack(2) + HELLO_QUEUES.pack(3) + HELLO_IPV6_SENDERS.pack(4)
    head = struct.pack("=4sII", b"udpt", HELLO.size + len(more), HELLO_VERSION)
    ours = head + OURS[12:] + more
    assert (len(ours), HELLO_VERSION) == (92, 7)
    understood = replace(UNDERSTOOD, confinement=confinement, has_events=True)
    of_version_6 = replace(understood, wanted_confinement=Confinement.FULL, n_ipv6=2, n_more_queues=3)
    assert Hello.parse(ours) == replace(of_version_6, n_ipv6_senders=4)
    before = head[:8] + struct.pack("=I", 6) + ours[12:]
    assert Hello.parse(before) == Hello.parse(ours[:88]) == of_version_6
    before = head[:8] + struct.pack("=I", 5) + ours[12:]
    assert Hello.parse(before) == replace(understood, wanted_confinement=Confinement.FULL, n_ipv6=2)
    # One for each of the two workers, or none.
    for n_ipv6 in (0, 1, 3):
        others = Hello.parse(ours[:80] + HELLO_IPV6.pack(n_ipv6))
        assert others == replace(understood, wanted_confinement=Confinement.FULL)
    before = head[:8] + struct.pack("=I", 4) + ours[12:]
    assert Hello.parse(before) == replace(understood, wanted_confinement=Confinement.FULL)
    # Cut off, it says nothing of that; 76 bytes are all that versions 2 and 3 had.
    assert Hello.parse(ours[:76]) == Hello.parse(ours[:78]) == understood
    assert Hello.parse(ours[:74]) == replace(UNDERSTOOD, has_events=True)


def test_hello_of_a_later_build_is_understood_as_far_as_it_is_known() -> None:
    more = b"fields of another year"
    later = struct.pack("=4sII", b"udpt", 72 + len(more), 12) + OURS[12:] + more
    assert Hello.parse(later) == replace(UNDERSTOOD, has_events=True)


def test_hello_of_the_first_builds_is_told_by_its_size() -> None:
    first = struct.pack("=4sIIIIQ32s", b"udpt", 5, 4711, 0, 2, 5_000, BUILD_ID.encode())
    assert Hello.parse(first) == replace(UNDERSTOOD, is_active=False, layout_version=5, n_senders=None)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="empty"),
        pytest.param(OURS[:59], id="shorter than any"),
        pytest.param(OURS[:71], id="cut"),
        pytest.param(b"tpdu" + OURS[4:], id="another magic"),
        pytest.param(b"tpdu" + OURS[4:60], id="another magic in 60 bytes"),
        pytest.param(OURS[:4] + struct.pack("=I", 71) + OURS[8:], id="says that it is shorter"),
    ],
)
def test_anything_else_is_no_hello(message: bytes) -> None:
    assert Hello.parse(message) is None


def test_descriptors_are_told_apart_by_their_order() -> None:
    known = Descriptors(0, 1, 2, (3, 4), (5, 6), (7, 8, 9))
    assert Descriptors.from_list(range(10), UNDERSTOOD) == known
    assert Descriptors.from_list(range(12), UNDERSTOOD) == known
    assert Descriptors.from_list(range(12), replace(UNDERSTOOD, n_senders=None)).senders == tuple(range(7, 12))
    assert known.as_list() == list(range(10))
    assert replace(known, events=(10, 11)).as_list() == list(range(12))
    assert replace(known, events=(10, 11), ipv6=(12, 13)).as_list() == list(range(14))
    assert replace(known, tun=(3, 4, 12, 13), events=(10, 11)).as_list() == list(range(14))
    assert replace(known, tun=(3, 4, 12), events=(10, 11), ipv6_senders=(13, 14)).as_list() == list(range(15))


@pytest.mark.parametrize(
    ("n_fds", "n_workers", "n_senders"), [(9, 2, 3), (6, 2, None), (2, 1, 0), (3, 0, 0), (4, 0, None)]
)
def test_fewer_descriptors_than_hello_says_are_refused(n_fds: int, n_workers: int, n_senders: int | None) -> None:
    with pytest.raises(ValueError, match=f"{n_fds} descriptors for {n_workers} workers"):
        Descriptors.from_list(range(n_fds), replace(UNDERSTOOD, n_workers=n_workers, n_senders=n_senders))


async def test_when_a_process_began_does_not_wander(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was worked out of two clocks, read one after the other, each time that /metrics was asked."""
    child = cast("subprocess.Popen[bytes]", SimpleNamespace(pid=4711))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = Process(ours, Path("datapath-x.sock"), child)
        started_s = time.time() - 60
        started_ns = time.monotonic_ns() - 60_000_000_000
        hello = OURS[:20] + struct.pack("=Q", started_ns) + OURS[28:]
        process._take_hello(hello, [])
        first_s = process.started_s
        assert abs(first_s - started_s) < 5
        monkeypatch.setattr(time, "time", lambda: started_s + 3600)
        process._take_hello(hello, [])
        assert (process.started_ns, process.started_s) == (started_ns, first_s)
        process.detach()

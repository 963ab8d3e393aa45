"""What the kernel is asked about our filters, and in which order.  For what it does see tests/netns/test_filters.py."""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest

from udptun.core.errors import KernelError
from udptun.kernel import filters
from udptun.kernel.bpf import Hook
from udptun.kernel.filters import remove_filters
from udptun.kernel.rtnetlink import Request, attribute

ALIAS = "udptun 10.244.0.0/16"
UNDERLAY, FAR, DETOUR = 9, 3, 4
"""Indexes of links: an underlay may be younger than the pair."""
PROGRAMS = {UNDERLAY: ("decap", "clsact"), FAR: ("deliver",), DETOUR: ("arrive",)}


class FakeKernel:
    """Answers as a kernel where a killed daemon has left its filters."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def __aenter__(self) -> FakeKernel:
        return self

    async def __aexit__(self, *_of: object) -> None:
        pass

    async def dump(self, request: Request) -> list[bytes]:
        if request.type == filters._GETQDISC:
            kind = attribute(filters._TCA_KIND, b"clsact\0")
            return [filters._MESSAGE.pack(0, it, 0, filters._CLSACT_PARENT, 0) + kind for it in sorted(PROGRAMS)]
        _, link_index, _, parent, info = filters._MESSAGE.unpack_from(request.body)
        if parent != filters._PARENTS[Hook.INGRESS]:
            return []
        return [self.shown(link_index, parent, info, program) for program in PROGRAMS[link_index]]

    @staticmethod
    def shown(link_index: int, parent: int, info: int, program: str) -> bytes:
        name = attribute(filters._TCA_BPF_NAME, f"{ALIAS} {program}".encode() + b"\0")
        chain = struct.pack("=I", filters._SIGN_CHAIN if program == "clsact" else 0)
        parts = attribute(filters._TCA_OPTIONS, name) + attribute(filters._TCA_CHAIN, chain)
        return filters._MESSAGE.pack(0, link_index, 1, parent, info) + parts

    async def change(self, requests: list[Request]) -> list[None]:
        self.said += [f"delete {it.operation.split()[-4]}" for it in requests if it.type == filters._DELTFILTER]
        return [None] * len(requests)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    it = FakeKernel()
    monkeypatch.setattr(filters, "Netlink", lambda: it)

    async def sleep(_s: float) -> None:
        it.said.append("wait")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return it


async def test_filters_that_get_packets_out_go_a_moment_after_those_that_take_them_in(kernel: FakeKernel) -> None:
    """They went in the order of the links: `deliver` first, while `decap` of a killed daemon still sent to it."""
    gone = await remove_filters([ALIAS])
    assert kernel.said == ["delete decap", "wait", "delete deliver", "delete arrive"]
    assert {(it.link_index, it.name) for it in gone} == {
        (UNDERLAY, f"{ALIAS} decap"),
        (FAR, f"{ALIAS} deliver"),
        (DETOUR, f"{ALIAS} arrive"),
    }


async def test_nobody_waits_where_there_are_no_filters(kernel: FakeKernel) -> None:
    assert await remove_filters(["udptun 10.0.0.0/16"]) == []
    assert kernel.said == []


@pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.EPERM])
async def test_a_kernel_without_qdiscs_has_no_filters(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """No daemon started there, whatever its Backend, and `udptun cleanup` removed nothing.  Other errors are raised."""

    async def refuse(request: Request) -> list[bytes]:
        raise KernelError(request.operation, answer)

    monkeypatch.setattr(kernel, "dump", refuse)
    if answer == errno.EOPNOTSUPP:
        assert await remove_filters([ALIAS], with_clsact=True) == []
    else:
        with pytest.raises(KernelError, match="cannot list qdiscs: EPERM"):
            await remove_filters([ALIAS])

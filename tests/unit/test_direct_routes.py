"""Which gateways count as directly reached, with a kernel that is made up and a clock that jumps."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

import virtual_time

from udptun.core.desired import DesiredRoute, DesiredState
from udptun.core.errors import KernelError
from udptun.core.network_state import Route
from udptun.kernel import rtnetlink
from udptun.kernel.reconcile.change import Change, Verb
from udptun.kernel.reconcile.direct import DirectRoutes
from udptun.kernel.rtnetlink import Request

A, B = IPv4Address("192.0.2.7"), IPv4Address("192.0.2.8")
SUBNETS = {A: IPv4Network("10.244.7.0/24"), B: IPv4Network("10.244.8.0/24")}
INVALID = KernelError("cannot add route 10.244.7.0/24", errno.ENETUNREACH, "Nexthop has invalid gateway")


class Kernel:
    """`links`: where it reaches whom; `error`: what it answers to routes; `tried`: the routes it was asked to add."""

    def __init__(self, links: Mapping[IPv4Address, int]) -> None:
        self.links = links
        self.error: KernelError | None = INVALID
        self.tried: list[Route] = []

    async def on_link(self, ips: Iterable[IPv4Address]) -> dict[IPv4Address, int]:
        return {ip: self.links[ip] for ip in ips if ip in self.links}

    async def change(self, requests: Sequence[Request]) -> list[KernelError | None]:
        added = [it for it in requests if it.type == rtnetlink.NEWROUTE]
        self.tried += [rtnetlink.decode_route(it.body) for it in added]
        return [self.error if it in added else None for it in requests]


def decide(direct: Mapping[IPv4Address, int]) -> DesiredState:
    return DesiredState(routes=tuple(DesiredRoute(SUBNETS[ip], gateway=ip, oif=oif) for ip, oif in direct.items()))


def refused(error: KernelError = INVALID) -> list[tuple[Change, KernelError]]:
    return [(Change(Verb.ADD, Route(SUBNETS[A], A, 2)), error)]


async def after_a_refusal(kernel: Kernel) -> DirectRoutes:
    direct = DirectRoutes()
    assert direct.set_decision([A, B], decide) == DesiredState()
    assert await direct.look(kernel) == decide(kernel.links)  # type: ignore[arg-type]  # what it uses of one
    assert direct.note_refused(refused()) == decide({B: 2})
    return direct


def test_a_refused_route_is_given_up_alone_and_tried_every_30_s() -> None:
    async def main() -> None:
        kernel = Kernel({A: 2, B: 2})
        direct = await after_a_refusal(kernel)
        (problem,) = direct.problems
        assert problem.endswith("so its packets go through the tunnel, not straight to 192.0.2.7 (DirectRouting)")
        for wait_s, n_tries in ((29, 0), (1, 1), (29, 1), (1, 2)):
            await asyncio.sleep(wait_s)
            assert await direct.look(kernel) is None  # type: ignore[arg-type]  # what it uses of one
            assert len(kernel.tried) == n_tries
        # Not in the place of the route that carries the packets, and better than the one that refuses them.
        assert {route.metric for route in kernel.tried} == {0xFFFFFFFE}
        direct.expect_better()
        kernel.error = None
        assert await direct.look(kernel) == decide({A: 2, B: 2})  # type: ignore[arg-type]  # what it uses of one
        assert direct.problems == ()

    virtual_time.run(main())


def test_a_trial_that_an_ended_daemon_left_is_no_refusal() -> None:
    async def main() -> None:
        kernel = Kernel({A: 2, B: 2})
        direct = await after_a_refusal(kernel)
        kernel.error = KernelError("cannot add route", errno.EEXIST)
        direct.expect_better()
        assert await direct.look(kernel) == decide({A: 2, B: 2})  # type: ignore[arg-type]  # what it uses of one

    virtual_time.run(main())


def test_a_refusal_is_forgotten_when_the_peer_is_on_another_link_or_none() -> None:
    async def main() -> None:
        for links in ({A: 3, B: 2}, {B: 2}):
            kernel = Kernel({A: 2, B: 2})
            direct = await after_a_refusal(kernel)
            kernel.links = links
            await direct.look(kernel)  # type: ignore[arg-type]  # what it uses of one
            assert (direct.problems, kernel.tried) == ((), [])

    virtual_time.run(main())


def test_a_place_that_another_route_has_and_other_failures_are_not_given_up() -> None:
    async def main() -> None:
        direct = DirectRoutes()
        direct.set_decision([A, B], decide)
        await direct.look(Kernel({A: 2, B: 2}))  # type: ignore[arg-type]  # what it uses of one
        assert direct.note_refused(refused(KernelError("cannot add route", errno.EEXIST))) is None
        elsewhere = Change(Verb.ADD, Route(SUBNETS[A], A, 9))
        removal = Change(Verb.DELETE, Route(SUBNETS[A], A, 2))
        assert direct.note_refused([(elsewhere, INVALID), (removal, INVALID)]) is None
        assert direct.problems == ()

    virtual_time.run(main())

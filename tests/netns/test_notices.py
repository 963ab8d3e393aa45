"""The kernel's notices, of routing and of nftables, heard in a namespace."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest
from namespace import Namespace, linked_namespace, requires_netns

from udptun.firewall.ruleset_notices import RulesetNotice, watch_ruleset
from udptun.kernel import notices
from udptun.kernel.notices import Notice, NoticeKind, watch

pytestmark = [pytest.mark.netns, requires_netns]


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """v0 (192.0.2.1/24, up) -- v1 (up) in one namespace."""
    with linked_namespace() as ns:
        yield ns


def collect(ns: Namespace, act: Callable[[], None], until: Callable[[set[Notice]], bool]) -> set[Notice]:
    """The notices that `act` brings, up to and including the one that satisfies `until`."""

    async def listen() -> set[Notice]:
        seen: set[Notice] = set()
        batches = watch()
        assert await anext(batches) == {Notice(NoticeKind.OVERFLOW)}
        async with asyncio.timeout(10):
            await asyncio.to_thread(act)
            while not until(seen):
                seen |= await anext(batches)
        await batches.aclose()
        return seen

    return ns.call_async(listen)


def kinds(notices: set[Notice]) -> set[NoticeKind]:
    return {notice.kind for notice in notices}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("link set v0 mtu 1400", NoticeKind.LINK),
        ("link delete v0", NoticeKind.LINK),
        ("address add 10.9.9.9/32 dev v0", NoticeKind.ADDRESS),
        ("address flush dev v0", NoticeKind.ADDRESS),
        ("route add 10.9.0.0/16 dev v0", NoticeKind.ROUTE),
    ],
)
def test_watch_reports_a_change(ns: Namespace, command: str, kind: NoticeKind) -> None:
    assert kind in kinds(collect(ns, lambda: ns.ip(command), lambda seen: kind in kinds(seen)))


def test_watch_tells_whose_route_changed_and_what_it_leads_to(ns: Namespace) -> None:
    wanted = Notice(NoticeKind.ROUTE, protocol=99, prefixlen=20, dst=int(IPv4Address("10.9.16.0")))
    collect(ns, lambda: ns.ip("route add 10.9.16.0/20 dev v0 proto 99"), lambda seen: wanted in seen)


def test_watch_reports_an_overflow_and_goes_on(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices that nobody reads fill the buffer: ENOBUFS, "look again".

    The kernel says so once and drops in silence until the queue is empty: the change that followed at once was
    missed when the overflow was passed on before the queue was drained.
    """
    monkeypatch.setattr(notices, "_BUFFER_LEN", 4096)

    async def listen() -> bool:
        batches = watch()
        await anext(batches)
        # No await in between, so that nothing is read meanwhile.
        for n in range(60):
            ns.ip(f"route add 10.9.{n}.0/24 dev v0")
        async with asyncio.timeout(10):
            while Notice(NoticeKind.OVERFLOW) not in await anext(batches):
                pass
            await asyncio.to_thread(ns.ip, "link set v0 mtu 1400")
            while Notice(NoticeKind.LINK) not in await anext(batches):
                pass
        await batches.aclose()
        return True

    assert ns.call_async(listen)


def test_watch_opens_a_new_socket_when_its_own_fails(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[socket.socket] = []
    real = notices._open

    def remembered(protocol: int, groups: int) -> socket.socket:
        opened.append(real(protocol, groups))
        return opened[-1]

    monkeypatch.setattr(notices, "_open", remembered)

    async def listen() -> None:
        batches = watch()
        await anext(batches)
        # A closed descriptor is the only failure a test can cause: EBADF.
        opened[0].close()
        async with asyncio.timeout(10):
            assert await anext(batches) == {Notice(NoticeKind.OVERFLOW)}
            await asyncio.to_thread(ns.ip, "link set v0 mtu 1400")
            while Notice(NoticeKind.LINK) not in await anext(batches):
                pass
        await batches.aclose()

    ns.call_async(listen)
    assert len(opened) == 2


def test_watch_reports_a_neighbour_and_an_fdb_entry_with_their_link_when_asked_to(ns: Namespace) -> None:
    ns.ip("link add flannel.7 type vxlan id 7 dev v0 dstport 4789")
    ns.ip("link set flannel.7 up")
    wanted = Notice(NoticeKind.NEIGHBOUR, link_index=ns.show("link show flannel.7")[0]["ifindex"])
    ns.ip("neigh add 10.244.7.0 lladdr 02:00:00:00:00:77 dev flannel.7 nud permanent")
    for change in ("ip neigh delete 10.244.7.0", "bridge fdb add 02:00:00:00:00:88 dst 192.0.2.8"):
        command = ["ip", "netns", "exec", ns.name, *change.split(), "dev", "flannel.7"]

        async def listen(command: list[str] = command) -> None:
            batches = watch(neighbours=True)
            await anext(batches)
            async with asyncio.timeout(10):
                await asyncio.to_thread(subprocess.run, command, check=True)
                while wanted not in await anext(batches):
                    pass
            await batches.aclose()

        ns.call_async(listen)


def test_a_notice_that_is_cut_off_counts_as_an_overflow() -> None:
    route = struct.pack("=IHHIIBBBBBBBBI", 28, 24, 0, 0, 0, socket.AF_INET, 16, 0, 0, 254, 99, 0, 1, 0)
    assert notices._decode(route) == {Notice(NoticeKind.ROUTE, protocol=99, prefixlen=16)}
    assert Notice(NoticeKind.OVERFLOW) in notices._decode(route + route[:20])


# --- notices of the packet filter's rules


def test_ruleset_notices_name_table_and_chain(ns: Namespace) -> None:
    """One that is told of a whole table must look at every chain of it."""

    def nft(command: str) -> None:
        subprocess.run(["ip", "netns", "exec", ns.name, "nft", command], check=True, timeout=30)

    async def listen() -> None:
        batches = watch_ruleset()
        assert await anext(batches) is None
        heard: set[RulesetNotice] = set()

        async def hear(*wanted: RulesetNotice) -> None:
            async with asyncio.timeout(10):
                while not heard.issuperset(wanted):
                    heard.update(await anext(batches) or ())
            heard.clear()

        table = "add table ip t { chain a { accept; }; chain b { type filter hook input priority 0; }; }"
        await asyncio.to_thread(nft, table)
        await hear(RulesetNotice(2, "t", None), RulesetNotice(2, "t", "a"), RulesetNotice(2, "t", "b", is_base=True))
        await asyncio.to_thread(nft, "add rule ip t b accept")
        await hear(RulesetNotice(2, "t", "b"))
        await asyncio.to_thread(nft, "add table ip6 u")
        await hear(RulesetNotice(10, "u", None))
        await asyncio.to_thread(nft, "flush ruleset")
        await hear(RulesetNotice(2, "t", None), RulesetNotice(2, "t", "a"), RulesetNotice(10, "u", None))
        await batches.aclose()

    ns.call_async(listen)

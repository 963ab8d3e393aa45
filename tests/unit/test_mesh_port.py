"""`--mesh-port`: who may ask, where it listens, and what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import SimpleNamespace
from typing import Any, cast

import pytest

from udptun.commands.mesh.answer import read_view
from udptun.control.http import Request, Response
from udptun.control.mesh import port as port_module
from udptun.control.mesh import view as view_module
from udptun.control.mesh.port import MeshPort
from udptun.control.running import Running
from udptun.core.family import Family
from udptun.core.lease import EventType, Lease, LeaseAttrs, LeaseEvent, Subnets
from udptun.core.lease_table import LeaseTable
from udptun.core.mesh import MOST_PEERS
from udptun.core.network_state import IPAddress
from udptun.core.tunnel import device_mtu_to
from udptun.probing.liveness import Liveness

HERE, PEER = IPv4Address("127.0.0.1"), IPv4Address("127.0.2.0")


def table(*subnets: IPv4Network) -> LeaseTable:
    network = IPv4Network("127.0.0.0/16")
    found = LeaseTable(
        *(Family.IPV4, network, (network,), IPv4Network("127.0.0.0/24"), lambda lease: False, lambda lease: None),
        outer=lambda attrs: Family.IPV4,
    )
    leases = [Lease(Subnets(it), LeaseAttrs(IPv4Address("192.0.2.1") + i)) for i, it in enumerate(subnets)]
    found.update([LeaseEvent(EventType.ADDED, lease) for lease in leases])
    return found


def running(port: int, tables: Iterable[LeaseTable] = (), device: str | None = "flannel0") -> Running:
    # Its tunnel address is of the loopback device.
    subnets = SimpleNamespace(of=lambda family: SimpleNamespace(network_address=HERE))
    membership = SimpleNamespace(own=SimpleNamespace(subnets=subnets), tables=tables)
    forwarding = SimpleNamespace(
        families=(Family.IPV4,), device=lambda family: device, backend=SimpleNamespace(type="host-gw")
    )
    return cast(
        Running,
        SimpleNamespace(options=SimpleNamespace(mesh_port=port), membership=membership, forwarding=forwarding),
    )


_PORTS = itertools.count(10_000 + os.getpid() % 10_000)
"""None of those that the kernel gives to whoever asks for any."""


def free_port() -> int:
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.create_server((str(HERE), port)):
            return port
    raise AssertionError


async def ask(port: int, source: IPAddress, request: bytes = b"GET /mesh HTTP/1.1\r\n\r\n") -> bytes:
    """The whole answer; nothing where it hangs up."""
    reader, writer = await asyncio.open_connection(str(HERE), port, local_addr=(str(source), 0))
    with contextlib.suppress(OSError):
        writer.write(request)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def serve(mesh: MeshPort, test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        serving = asyncio.create_task(mesh.run())
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await test()
        serving.cancel()
        await asyncio.wait([serving])

    asyncio.run(main())


def test_a_peer_is_answered_and_anybody_else_is_turned_out_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "view", lambda running: {"schema": 1})
    port = free_port()
    mesh = MeshPort(running(port, [table(IPv4Network("127.0.2.0/24"), IPv4Network("127.0.3.0/24"))]))

    async def test() -> None:
        head, _, body = (await ask(port, PEER)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(body) == {"schema": 1}
        # A pod of the peer, a host that has no lease, and this host.
        for stranger in ("127.0.2.1", "127.0.4.0", "127.0.0.1"):
            assert await ask(port, IPv4Address(stranger)) == b""
        assert (await ask(port, PEER, b"POST /mesh HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
        for path in (b"/status", b"/", b"/metrics", b"/mesh/", b"/trace?src=1"):
            assert (await ask(port, PEER, b"GET " + path + b" HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        assert (await ask(port, PEER, b"GET /mesh HTTP/1.1\r\n" + b"x" * 9000)).startswith(b"HTTP/1.1 400 ")

    serve(mesh, test)


def test_many_who_are_not_welcome_keep_no_peer_from_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "view", lambda running: {})
    port = free_port()
    mesh = MeshPort(running(port, [table(IPv4Network("127.0.2.0/24"))]))

    async def test() -> None:
        stranger = IPv4Address("127.0.9.9")
        *turned_out, answer = await asyncio.gather(*(ask(port, stranger) for _ in range(100)), ask(port, PEER))
        assert set(turned_out) == {b""}
        assert answer.endswith(b"{}\n")

    serve(mesh, test)


def test_a_port_that_is_held_is_a_problem_and_is_served_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(port_module, "LOOK_S", 0.01)
    monkeypatch.setattr(view_module, "view", lambda running: {})
    caplog.set_level("INFO")
    holder = socket.create_server((str(HERE), 0))
    port = holder.getsockname()[1]
    mesh = MeshPort(running(port, [table(IPv4Network("127.0.2.0/24"))]))
    problem = (
        f"cannot listen on 127.0.0.1:{port}: EADDRINUSE; another program listens there; it is tried again every "
        "second, and until then `udptun mesh` on other hosts shows this host from their side only"
    )

    async def test() -> None:
        await asyncio.sleep(0.05)
        assert mesh.problems == (problem,)
        holder.close()
        while mesh.problems:
            await asyncio.sleep(0.01)
        assert (await ask(port, PEER)).endswith(b"{}\n")

    serve(mesh, test)
    assert mesh.problems == ()
    lines = [record.getMessage() for record in caplog.records if record.name == port_module.__name__]
    assert lines == [problem, f"mesh is served now ip=127.0.0.1 port={port}"]


def test_without_a_tunnel_address_it_is_said_once_that_nothing_is_served(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(MeshPort(running(8286, device=None)).run())
    asyncio.run(MeshPort(running(0)).run())
    assert caplog.messages == ["--mesh-port has no effect: with Backend.Type host-gw this host has no tunnel address"]


def test_the_address_may_come_later_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is made anew has its address a moment later, and listeners were not bound meanwhile."""
    monkeypatch.setattr(port_module, "serve_to_some", served := Served())
    mesh = MeshPort(running(1))
    addresses: set[IPAddress] = {IPv4Address("10.99.0.0"), IPv6Address("fd99::")}
    monkeypatch.setattr(mesh, "_addresses", lambda: addresses)
    mesh._look()
    assert served.there == addresses
    addresses = {IPv4Address("10.99.0.0")}
    mesh._look()
    assert served.there == addresses
    assert served.n == 2


class Served:
    """In the place of `serve_to_some`."""

    def __init__(self) -> None:
        self.there: set[IPAddress] = set()
        self.n = 0

    def __call__(self, routes: object, ip: IPAddress, port: int, is_welcome: object) -> Any:
        self.there.add(ip)
        self.n += 1
        return SimpleNamespace(close=lambda: self.there.discard(ip))


def test_an_address_that_this_host_does_not_have_can_be_listened_at() -> None:
    async def main() -> None:
        for address in (IPv4Address("10.99.0.0"), IPv6Address("fd99::")):
            server = port_module.serve_to_some({}, address, free_port(), lambda ip: True)
            assert server.sockets[0].getsockname()[0] == str(address)
            server.close()
            await asyncio.sleep(0)

    asyncio.run(main())


# --- the view


FOUND = {"liveness": "alive", "rtt_ms": 0.5, "rtt_age_s": 1.0, "path_mtu": 1452, "probes_sent": 3, "probes_lost": 1}


def lease_of(number: int, *, ipv6: bool = False) -> Lease:
    subnet = IPv4Network(f"10.{244 + number // 200}.{number % 200}.0/24")
    return Lease(Subnets(subnet, IPv6Network(f"fd00:244:0:{number:x}::/64") if ipv6 else None), LeaseAttrs(HERE))


def view_of(
    monkeypatch: pytest.MonkeyPatch,
    leases: list[Lease],
    backend: str,
    peers: list[dict[str, Any]],
    ipv6: dict[str, Any] | None,
    asked: list[int] | None = None,
) -> dict[str, Any]:
    status = {
        "lease": {"subnet": "10.244.0.0/24", "public_ip": "192.0.2.1"},
        "backend": {"type": backend, "mtu": 1472, "probes": "on"},
        "underlay": {"address": "192.0.2.1"},
        "peers": peers,
        "ipv6": ipv6,
    }

    def document(running: object, uptime_s: float, keys: set[str]) -> dict[str, Any]:
        if asked is not None:
            asked.extend(i for i, lease in enumerate(leases) if lease.key in keys)
        return status

    monkeypatch.setattr(view_module, "document", document)
    here = SimpleNamespace(
        membership=SimpleNamespace(
            tables=[SimpleNamespace(peers={lease.key: lease for lease in leases})],
            own=SimpleNamespace(subnets=Subnets(IPv4Network("10.244.0.0/24"))),
        ),
        forwarding=SimpleNamespace(
            liveness=lambda lease: Liveness.DEAD if lease is leases[-1] else Liveness.ALIVE,
        ),
        options=SimpleNamespace(mesh_port=8286),
    )
    made = view_module.view(cast(Running, here))
    # What one version writes, it reads.
    read_view(json.dumps(made).encode())
    return made


def test_a_view_has_what_the_status_says_of_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"subnet": "10.244.2.0/24", "ipv6_subnet": "fd00:244:0:2::/64", "public_ip": "192.0.2.2", "udptun": True}
    more = {"port": 8285, "encap_packets": 7, "expires_at": None}
    twin = {"subnet": "fd00:244:0:2::/64", "public_ip": "2001:db8::2", **FOUND, "path_mtu": 1280}
    leases = [lease_of(2, ipv6=True)]
    ipv6 = {"mtu": 1430, "peers": [twin]}
    made = view_of(monkeypatch, leases, "vxlan", [{**known, **FOUND, **more}], ipv6)
    assert made["peers"] == [
        {**known, **FOUND, "mtu": 1472, "ipv6": {**FOUND, "path_mtu": 1280, "mtu": 1430}},
    ]
    assert (made["n_peers"], made["backend"], made["mesh_port"]) == (1, "vxlan", 8286)
    # In Type udp both families go one way.
    assert view_of(monkeypatch, leases, "udp", [{**known, **FOUND}], ipv6)["peers"][0]["ipv6"] is None


def test_a_peer_by_ipv6_alone_is_there_and_one_over_ipv6_has_a_shorter_mtu(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = {"subnet": "fd00:244:0:2::/64", "public_ip": "2001:db8::2", **FOUND}
    over = {"subnet": "10.244.3.0/24", "ipv6_subnet": None, "public_ip": "2001:db8::3", "udptun": True, **FOUND}
    made = view_of(monkeypatch, [lease_of(3)], "udp", [over], {"mtu": 1430, "peers": [twin]})
    assert [(it["subnet"], it["mtu"]) for it in made["peers"]] == [("10.244.3.0/24", 1452), (twin["subnet"], 1430)]
    assert device_mtu_to("2001:db8::3", "2001:db8::1", 1452) == 1452


def test_of_very_many_peers_a_view_has_the_dead_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    leases, asked = [lease_of(i) for i in range(1, MOST_PEERS + 51)], list[int]()
    made = view_of(monkeypatch, leases, "udp", [], None, asked)
    assert made["n_peers"] == MOST_PEERS + 50
    assert asked == [*range(MOST_PEERS - 1), MOST_PEERS + 49]


def test_a_view_is_made_in_a_thread_and_not_anew_for_each_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def costly(running: object) -> dict[str, Any]:
        made.append(threading.current_thread())
        sum(range(300_000))
        return {}

    monkeypatch.setattr(view_module, "view", costly)

    async def main() -> list[Response]:
        mesh = MeshPort(running(0))
        return await asyncio.gather(*(mesh.answer(Request("GET", "/mesh")) for _ in range(50)))

    assert {it.status for it in asyncio.run(main())} == {HTTPStatus.OK}
    assert len(made) < 10
    assert threading.main_thread() not in made

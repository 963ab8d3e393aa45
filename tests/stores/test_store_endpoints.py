"""What udptun doctor says of each server of a store: of real etcd, and of the API server of the lab."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from etcd_harness import NEEDS, ON_SHARED_SERVERS, SHARED_ETCD
from etcd_server import free_ports
from kube_server import SHARED, TOKEN, Client, write_kubeconfig

from udptun.config.flags import parse_daemon_flags
from udptun.doctor import endpoints, store
from udptun.doctor.endpoints import ask_endpoints
from udptun.doctor.facts import Facts

pytestmark = ON_SHARED_SERVERS

LATE_S = 1.0


@asynccontextmanager
async def behind_a_slow_link(port: int) -> AsyncIterator[int]:
    """A port of 127.0.0.1 that leads to that one; what the server says comes later."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late_s: float) -> None:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(late_s)
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        tasks.update(
            asyncio.create_task(it) for it in (carry(reader, back, 0), carry(there, writer, LATE_S))
        )

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.skipif(bool(NEEDS), reason=f"needs {', '.join(NEEDS)}")
async def test_a_server_of_etcd_that_is_slow_or_away_is_told_from_one_that_is_well() -> None:
    """The store went on with the server that answered, and nobody saw that it had one less."""
    (server,) = SHARED_ETCD.get("plain")
    before = server.etcdctl("endpoint", "status", "-w", "simple").split(",")[-3:]

    async with behind_a_slow_link(server.port) as slow_port:
        urls = [f"http://127.0.0.1:{port}" for port in (server.port, slow_port, *free_ports(1))]
        asked = parse_daemon_flags(["--store=etcd", f"--etcd-endpoints={','.join(urls)}"], {})
        found = await ask_endpoints(asked)
    well, slow, away = found
    assert well.latency_s is not None
    assert slow.latency_s is not None
    assert LATE_S <= slow.latency_s > well.latency_s
    assert away.latency_s is None
    assert "connection refused" in away.error.lower()
    said = await store.store_endpoints(cast(Facts, SimpleNamespace(endpoints=found)))
    # On a busy machine any server may be slow.
    by_server = {it.subject: it.cause for it in said}
    assert "ms for a small answer" in by_server[urls[1]]
    assert "does not answer this host" in by_server[urls[2]]
    # Only slow ones are named too.
    assert len(await store.store_endpoints(cast(Facts, SimpleNamespace(endpoints=(slow,))))) == 1
    # The revision is the same: nothing was written.
    assert server.etcdctl("endpoint", "status", "-w", "simple").split(",")[-3:] == before


def test_the_api_server_is_timed_by_a_look_at_our_own_node(tmp_path: Path) -> None:
    server = SHARED.get("ours", tmp_path, None)
    client = Client(server.url)
    client.add_node("timed", "10.244.7.0/24")
    try:
        config = write_kubeconfig(tmp_path / "kubeconfig", server.url, token=TOKEN, ca=None)
        argv = ["--kube-subnet-mgr", f"--kubeconfig-file={config}"]
        (found,) = asyncio.run(ask_endpoints(parse_daemon_flags(argv, {"NODE_NAME": "timed"})))
        assert found.error == ""
        assert found.latency_s is not None
        assert found.latency_s < endpoints.SLOW_S
    finally:
        client.delete("timed")


def test_a_store_without_a_server_has_no_endpoints(tmp_path: Path) -> None:
    assert asyncio.run(ask_endpoints(parse_daemon_flags([f"--store=local:{tmp_path}/l.db"], {}))) == ()
    assert [*tmp_path.iterdir()] == []

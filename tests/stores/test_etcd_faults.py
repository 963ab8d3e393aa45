"""What becomes of the etcd store and its watchers when etcd fails: real servers, real faults.

For each fault there is one clear line while it lasts, nothing raises, and the table of every watcher is right within a
second of etcd's return.  The default tier allows five seconds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from etcd_harness import LARGE_TXN, NEEDS, EtcdHarness, etcd_store
from etcd_server import DEADLINE_S, Authority, EtcdServer, cluster, free_ports, running, until
from follower import Follower, following
from store_harness import SUBNETS, exactly, host

from udptun.core.errors import LeaseError, StoreUnavailableError
from udptun.core.lease import EventType
from udptun.stores.etcd import client
from udptun.stores.etcd import etcd_pb2 as pb

pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"needs {', '.join(NEEDS)}")

PREFIX = "/coreos.com/network/subnets/"
NAMES = [subnets.key for subnets in SUBNETS[:100]]


@pytest.fixture
def within_s(request: pytest.FixtureRequest) -> float:
    """How long after etcd's return a table may be wrong."""
    return 1.0 if request.config.getoption("--full") else 5.0


def put(server: EtcdServer, number: int) -> None:
    server.etcdctl("put", PREFIX + NAMES[number], host(number).to_json())


def delete(server: EtcdServer, number: int) -> None:
    server.etcdctl("del", PREFIX + NAMES[number])


async def right(follower: Follower, within_s: float, *numbers: int) -> None:
    """Wait until the table has just these, which has to be in time."""
    took_s = await follower.until_keys(*(NAMES[number] for number in numbers))
    print(f"table right after {took_s:.2f} s; lines: {follower.errors}")
    assert took_s < within_s


def lines_are_few(follower: Follower, most: int) -> None:
    """A fault is one step or two (it broke; it cannot be reached), and each is said once."""
    assert 1 <= len(follower.errors) <= most, follower.errors
    assert all("\n" not in line for line in follower.errors)


def test_killed_and_restarted_etcd_costs_two_lines_and_no_change(tmp_path: Path, within_s: float) -> None:
    server = EtcdServer(tmp_path)

    async def main() -> None:
        async with following(etcd_store(f"--etcd-endpoints={server.endpoint}")) as follower:
            put(server, 1)
            put(server, 2)
            await follower.until_keys(NAMES[1], NAMES[2])
            server.kill()
            await follower.until_error("connection refused")
            assert follower.leases.keys() == {NAMES[1], NAMES[2]}
            server.start()
            put(server, 3)
            delete(server, 1)
            await right(follower, within_s, 2, 3)
            assert follower.n_snapshots == 0
            lines_are_few(follower, 2)
            # And our own lease can be had at once.
            assert (await follower.store.claim(host(9), exactly(9))).subnets == SUBNETS[9]

    with running([server]):
        asyncio.run(main())


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a loopback of its own."""
    name = f"ut-etcd-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@contextmanager
def follower_process(command: Sequence[str], *flags: str) -> Iterator[Path]:
    """follower.py in a process of its own; yields the file with what it prints."""
    with ExitStack() as undo:
        path = Path(flags[-1])
        output = undo.enter_context(path.open("w"))
        script = [sys.executable, str(Path(__file__).with_name("follower.py"))]
        process = subprocess.Popen([*command, *script, *flags[:-1]], stdout=output)
        undo.callback(process.wait, DEADLINE_S)
        undo.callback(process.terminate)
        yield path


def told(path: Path) -> list[dict[str, Any]]:
    """What a follower process has told so far."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.netns
@pytest.mark.parametrize(
    ("cut_s", "compact"),
    [(5.0, True), pytest.param(60.0, True, marks=pytest.mark.full), pytest.param(60.0, False, marks=pytest.mark.full)],
)
@pytest.mark.timeout(180)
def test_etcd_that_is_cut_off_is_noticed_and_its_changes_are_caught_up(
    tmp_path: Path, namespace: str, within_s: float, figure: Callable[..., None], cut_s: float, compact: bool
) -> None:
    """The packets of one port are dropped in both directions; etcdctl comes in by another."""
    inside = ["ip", "netns", "exec", namespace]
    port, control_port = free_ports(2)
    server = EtcdServer(tmp_path, port=port, control_port=control_port, command=inside)

    def nft(rules: str) -> None:
        subprocess.run([*inside, "nft", "-f", "-"], input=rules, text=True, check=True)

    with running([server]), follower_process(inside, f"--etcd-endpoints={server.endpoint}", f"{tmp_path}/told") as path:
        put(server, 1)
        put(server, 2)
        until(lambda: told(path)[-1:] and told(path)[-1]["keys"] == NAMES[1:3], "the table is there", path.read_text)
        nft(
            "table inet cut { chain input { type filter hook input priority 0;"
            f" tcp dport {port} drop; tcp sport {port} drop; }}; }}"
        )
        cut_at_s = time.monotonic()
        put(server, 3)
        delete(server, 1)
        if compact:
            put(server, 4)
            server.etcdctl("compact", str(revision(server)))
            delete(server, 4)
        until(lambda: told(path)[-1]["errors"], "the cut is noticed")
        noticed_s = told(path)[-1]["at_s"] - cut_at_s
        until(lambda: time.monotonic() - cut_at_s > cut_s, "the cut has lasted", deadline_s=cut_s + DEADLINE_S)
        assert told(path)[-1]["keys"] == NAMES[1:3]
        back_at_s = time.monotonic()
        nft("delete table inet cut")
        until(lambda: told(path)[-1]["keys"] == NAMES[2:4], "the table is right", path.read_text)
        took_s = told(path)[-1]["at_s"] - back_at_s
        errors = told(path)[-1]["errors"]
        print(f"lines: {errors}")
        figure(f"etcd cut off for {cut_s:.0f} s, noticed after", noticed_s, "s")
        figure("the table is right after its return", took_s, "s")
        assert noticed_s < 15
        assert took_s < within_s
        assert 1 <= len(errors) <= 2, errors


def revision(server: EtcdServer) -> int:
    (member,) = json.loads(server.etcdctl("endpoint", "status", "-w", "json"))
    return int(member["Status"]["header"]["revision"])


@asynccontextmanager
async def following_cluster(servers: list[EtcdServer]) -> AsyncIterator[Follower]:
    endpoints = ",".join(server.endpoint for server in servers)
    async with following(etcd_store(f"--etcd-endpoints={endpoints}")) as follower:
        yield follower


def connected_to(follower: Follower, servers: list[EtcdServer]) -> EtcdServer:
    connection = follower.store._client._connection  # type: ignore[attr-defined]
    return next(server for server in servers if server.endpoint == str(connection.endpoint))


async def led_again(member: EtcdServer) -> None:
    """Wait until the cluster takes writes; in a thread, so that the follower goes on."""

    def writes() -> bool:
        return member._etcdctl("put", "/coreos.com/network/unrelated", "").returncode == 0

    await asyncio.to_thread(until, writes, "the cluster takes writes")


@pytest.mark.parametrize(
    "victim",
    [
        "the leader",
        pytest.param("the one that we are connected to", marks=pytest.mark.full),
        pytest.param("both in one", marks=pytest.mark.full),
    ],
)
def test_a_member_of_three_that_is_killed_costs_nothing(tmp_path: Path, within_s: float, victim: str) -> None:
    async def main(servers: list[EtcdServer]) -> None:
        leader = next(server for server in servers if server.is_leader())
        if victim == "both in one":
            servers = [leader, *(server for server in servers if server is not leader)]
        async with following_cluster(servers) as follower:
            put(servers[0], 1)
            await follower.until_keys(NAMES[1])
            killed = connected_to(follower, servers) if victim.startswith("the one") else leader
            killed.kill()
            survivor = next(server for server in servers if server is not killed)
            await led_again(survivor)
            put(survivor, 2)
            await right(follower, within_s, 1, 2)
            lease = await follower.store.claim(host(9), exactly(9))
            await follower.until(lambda: lease.key in follower.leases)
            assert len(follower.errors) <= 2, follower.errors
            # Most of it gone: nothing can be written or trusted, and that is said.
            rest = next(server for server in servers if server not in (killed, survivor))
            survivor.kill()
            with pytest.raises(StoreUnavailableError):
                await follower.store.renew(lease)
            await follower.until(lambda: any("no leader" in line for line in follower.errors))
            assert lease.key in follower.leases
            survivor.start()
            delete(rest, 1)
            put(rest, 3)
            took_s = await follower.until(lambda: follower.leases.keys() == {NAMES[2], NAMES[3], lease.key})
            assert took_s < within_s
            print(f"{victim} killed: right after the quorum's return {took_s:.2f} s; lines: {follower.errors}")

    with running(cluster(tmp_path)) as servers:
        asyncio.run(main(servers))


def test_a_frozen_member_is_left_for_another(
    tmp_path: Path, within_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its connections and answers nothing; only keepalive pings tell.  Faster ones than in real life."""
    options = dict(client._CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 500}
    monkeypatch.setattr(client, "_CHANNEL_OPTIONS", tuple(options.items()))

    async def main(servers: list[EtcdServer]) -> None:
        async with following_cluster(servers) as follower:
            put(servers[0], 1)
            await follower.until_keys(NAMES[1])
            frozen = connected_to(follower, servers)
            frozen.freeze()
            survivor = next(server for server in servers if server is not frozen)
            await led_again(survivor)
            put(survivor, 2)
            await right(follower, 1.5 + within_s, 1, 2)
            lines_are_few(follower, 2)

    with running(cluster(tmp_path, flags=["--grpc-keepalive-min-time=500ms"])) as servers:
        asyncio.run(main(servers))


def test_attempts_at_a_server_that_never_answers_leave_no_sockets_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kept its socket for 20 s after it had been given up, up to 21 at a time: so long grpc waits for an answer.

    Nobody accepts: as with a server that a signal has stopped, the kernel completes the connection.
    """
    limit_ms = dict(client._CHANNEL_OPTIONS)["grpc.min_reconnect_backoff_ms"]
    assert 1000 * client.CONNECT_S < limit_ms <= 5000
    options = dict(client._CHANNEL_OPTIONS) | {"grpc.min_reconnect_backoff_ms": 600}
    monkeypatch.setattr(client, "_CHANNEL_OPTIONS", tuple(options.items()))
    monkeypatch.setattr(client, "CONNECT_S", 0.5)
    monkeypatch.setattr(client, "_STAGGER_S", 0.1)

    async def main(frozen: socket.socket) -> None:
        at = "{}:{}".format(*frozen.getsockname())
        store = etcd_store(f"--etcd-endpoints=http://{at}")
        try:
            with pytest.raises(StoreUnavailableError, match="no answer within"):
                await store.network_config()
            assert connections_to(at) > 2
            async with asyncio.timeout(5):
                while connections_to(at):
                    await asyncio.sleep(0.05)
        finally:
            await store.aclose()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as frozen:
        asyncio.run(main(frozen))


def connections_to(at: str) -> int:
    """How many sockets of this process are connected to that address and port."""
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    ss = subprocess.run(["ss", "-Htne", "dst", at], capture_output=True, text=True, check=True).stdout
    return sum(f" ino:{link[8:-1]} " in ss for link in links if link.startswith("socket:["))


def test_an_expired_certificate_is_named_and_a_renewed_one_is_enough(tmp_path: Path, within_s: float) -> None:
    authority = Authority(tmp_path / "tls")
    expired, renewed = authority.issue("expired", expired=True), authority.issue("renewed")
    server = EtcdServer(tmp_path, tls=authority.issue("server"), ca=authority.certificate)
    flags = [f"--etcd-endpoints={server.endpoint}", f"--etcd-cafile={authority.certificate}"]

    async def main() -> None:
        async with following(etcd_store(*flags)) as follower:
            put(server, 1)
            await follower.until_keys(NAMES[1])
            server.kill()
            server.replace_certificate(expired)
            server.start(wait=False)
            server.wait_listening()
            line = await follower.until_error("expired")
            assert line == f"cannot watch the leases in etcd: {server.endpoint}: its TLS certificate has expired"
            assert follower.leases.keys() == {NAMES[1]}
            server.replace_certificate(renewed)
            put(server, 2)
            await right(follower, within_s, 1, 2)
            lines_are_few(follower, 3)

    with running([server]):
        asyncio.run(main())


def test_a_password_that_is_changed_is_named_and_its_return_is_enough(tmp_path: Path, within_s: float) -> None:
    server = EtcdServer(tmp_path)
    flags = [f"--etcd-endpoints={server.endpoint}", "--etcd-username=flannel", "--etcd-password=secret"]

    def change_password(password: str) -> None:
        server.etcdctl("user", "passwd", "flannel", "--interactive=false", stdin=f"{password}\n")

    async def main() -> None:
        async with following(etcd_store(*flags)) as follower:
            put(server, 1)
            await follower.until_keys(NAMES[1])
            change_password("another")
            server.kill()
            server.start()
            line = await follower.until_error("password")
            assert "invalid user ID or password; mend --etcd-username and --etcd-password" in line
            assert "secret" not in "".join(follower.errors)
            assert follower.leases.keys() == {NAMES[1]}
            put(server, 2)
            change_password("secret")
            await right(follower, within_s, 1, 2)
            lines_are_few(follower, 3)

    with running([server]):
        server.enable_auth("/coreos.com/network")
        asyncio.run(main())


def test_a_full_disk_refuses_writes_in_one_line_and_goes_on_telling(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, flags=[f"--quota-backend-bytes={1 << 20}"])

    async def main() -> None:
        async with following(etcd_store(f"--etcd-endpoints={server.endpoint}")) as follower:
            store = follower.store
            lease = await store.claim(host(1), exactly(1))
            put(server, 2)
            await follower.until_keys(NAMES[1], NAMES[2])
            until(lambda: server._etcdctl("put", "junk", stdin="x" * 100_000).returncode != 0, "the disk is full")
            for call in (store.claim(host(3), exactly(3)), store.renew(lease)):
                with pytest.raises(StoreUnavailableError) as caught:
                    await call
                print(caught.value)
                assert "database space exceeded; it takes nothing new until it is compacted" in str(caught.value)
            delete(server, 2)
            await follower.until_keys(NAMES[1])
            assert not follower.errors
            server.etcdctl("compact", str(revision(server)))
            server.etcdctl("defrag")
            server.etcdctl("alarm", "disarm")
            assert (await store.renew(lease)).revision > lease.revision
            await store.claim(host(3), exactly(3))
            await follower.until_keys(NAMES[1], NAMES[3])
            assert not follower.errors

    with running([server]):
        asyncio.run(main())


# Many changes at once


def history(harness: EtcdHarness, first: int, last: int) -> list[tuple[str, str, str]]:
    """What etcd itself says has happened: kind, name and value of each event, in order."""
    server = harness.servers[0]
    command = ["etcdctl", "--endpoints", server.endpoint, "watch", "-w", "json", f"--rev={first}", "--prefix"]
    environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
    process = subprocess.Popen([*command, harness.key("")], stdout=subprocess.PIPE, text=True, env=environment)
    events: list[tuple[str, str, str]] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            for event in json.loads(line)["Events"]:
                kv = event["kv"]
                name = base64.b64decode(kv["key"]).decode().removeprefix(harness.key(""))
                if event.get("type") == 1:
                    events.append(("removed", name, ""))
                else:
                    events.append(("added", name, base64.b64decode(kv["value"]).decode()))
                if kv["mod_revision"] == last:
                    last = -1
            if last == -1:
                return events
    finally:
        process.kill()
        process.wait()
    raise AssertionError(f"etcdctl watch ended before revision {last}")


def seen(follower: Follower) -> list[tuple[str, str, str]]:
    """What a follower was told, but for expiries that became known."""
    revisions: dict[str, int] = {}
    events: list[tuple[str, str, str]] = []
    for event in follower.events:
        lease = event.lease
        if event.type is EventType.REMOVED:
            revisions.pop(lease.key, None)
            events.append(("removed", lease.key, ""))
        elif revisions.get(lease.key) != lease.revision:
            revisions[lease.key] = lease.revision
            events.append(("added", lease.key, lease.attrs.to_json()))
    return events


@pytest.mark.parametrize("n_changes", [400, pytest.param(2000, marks=pytest.mark.full)])
async def test_every_table_equals_etcds_history_through_a_thousand_at_once_and_a_storm(
    tmp_path: Path, figure: Callable[..., None], n_changes: int
) -> None:
    harness = EtcdHarness(tmp_path)
    assert "--max-txn-ops=20000" in LARGE_TXN

    async def storm(store: Any) -> int:
        """Adds and removes as fast as etcd takes them, 50 at a time; returns the last revision."""
        revisions: list[int] = []

        async def some(numbers: Iterator[int]) -> None:
            for number in numbers:
                key = harness.key(SUBNETS[number % 700].key).encode()
                put_request = pb.PutRequest(key=key, value=host(number).to_json().encode())
                is_put = number % 3
                operation = (
                    pb.RequestOp(request_put=put_request)
                    if is_put
                    else pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
                )
                response = await store._client.call(client.TXN, pb.TxnRequest(success=[operation]), "storm")
                revisions.append(response.header.revision)

        numbers = iter(range(n_changes))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                tasks.create_task(some(numbers))
        return max(revisions)

    writer = harness.store()
    first = (await writer.snapshot()).revision + 1
    async with following(harness.store()) as a, following(harness.store()) as b, following(harness.store()) as c:
        for follower in (a, b, c):
            await follower.until(lambda follower=follower: follower.revision > 0)
        await asyncio.to_thread(harness.write, [(number, number) for number in range(1000)])
        for follower in (a, b, c):
            await follower.until(lambda follower=follower: len(follower.leases) == 1000)
        began_s = time.monotonic()
        last = await storm(writer)
        took_s = time.monotonic() - began_s
        for follower in (a, b, c):
            await follower.until(lambda follower=follower: follower.revision >= last)
        figure(f"{n_changes} changes in {took_s:.2f} s, known everywhere after", time.monotonic() - began_s, "s")
        truth = await asyncio.to_thread(history, harness, first, last)
        assert len(truth) >= 1000 + n_changes * 2 // 3
        now = {lease.key: lease.attrs for lease in (await writer.snapshot()).leases}
        for follower in (a, b, c):
            assert seen(follower) == truth
            assert {key: lease.attrs for key, lease in follower.leases.items()} == now
            assert (follower.n_snapshots, follower.errors) == (0, [])
        figure(f"of {len(truth)} events of etcd's history, missing in three tables", 0)
    await writer.aclose()


async def test_a_thousand_leases_of_one_transaction_are_one_batch(tmp_path: Path) -> None:
    harness = EtcdHarness(tmp_path)

    async with following(harness.store()) as follower:
        await follower.until(lambda: follower.revision > 0)
        await asyncio.to_thread(harness.write, [(number, number) for number in range(1000)])
        await follower.until(lambda: len(follower.leases) == 1000)
        assert len({lease.revision for lease in follower.leases.values()}) == 1


async def test_a_server_whose_answers_are_none_is_a_store_that_does_not_answer() -> None:
    """Each call ended with an AttributeError, and the daemon with it: grpc makes None of bytes that are no message."""

    async def answer(request: object, context: object) -> bytes:
        return b"\xff\xff\xff"

    async def answers(requests: object, context: object) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            if details.method.endswith("/Watch"):
                return grpc.stream_stream_rpc_method_handler(answers)
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    store = etcd_store(f"--etcd-endpoints=http://127.0.0.1:{port}")
    for ask in (store.snapshot, store.network_config, lambda: anext(store.watch(5))):
        with pytest.raises(LeaseError, match=r"cannot .* in etcd: http://127\.0\.0\.1:\d+: its answer is none"):
            await ask()
    await store.aclose()
    await server.stop(None)
